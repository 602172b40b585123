//! A guest that misbehaves hurts its own answer, and nothing else.

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Broker, allowed, denied, misbehave, plugin, request};
use wasmqtt_host::{FileGrant, Grants, Mode, OnError, PluginConfig, PluginLimits};
use wasmqtt_protocol::ports::AuthOutcome;

fn limits() -> PluginLimits {
    PluginLimits { cpu_ms: 200, deadline_ms: 2000, ..PluginLimits::default() }
}

fn broker() -> Broker {
    Broker::start(vec![PluginConfig { limits: limits(), ..misbehave("m", &[]) }])
}

/// Unavailable for who asked, and the next call is answered.
fn check_contained(username: &str) {
    let broker = broker();
    assert_eq!(broker.ask("villain", username), AuthOutcome::Unavailable, "{username}");
    assert_eq!(broker.ask("neighbour", "alice"), allowed("allow"), "{username}");
    let status = broker.status("m").expect("it serves");
    assert_eq!((status.calls, status.failures), (2, 1), "{username}");
}

/// A plugin reaches the addresses that were granted to it, and no others.
#[test]
fn sockets_reach_what_was_granted() {
    let service = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = service.local_addr().expect("an address");
    let grants = Grants { sockets: vec![format!("{address}").parse().expect("a grant")], ..Grants::default() };
    let broker = Broker::start(vec![PluginConfig { grants, ..misbehave("m", &[]) }]);
    assert_eq!(broker.ask("c", &format!("dial:{address}")), allowed("yes"));
    assert_eq!(broker.ask("c", "connect"), allowed("yes"), "127.0.0.1:1 is not granted");
    assert_eq!(broker.ask("c", "listen"), allowed("yes"), "connecting only");
    assert!(broker.status("m").is_some_and(|status| status.denied >= 2), "{:?}", broker.status("m"));
}

#[test]
fn a_trap_is_contained() {
    check_contained("trap");
}

#[test]
fn a_loop_is_contained() {
    check_contained("loop");
}

#[test]
fn a_memory_bomb_is_contained() {
    check_contained("memory");
}

#[test]
fn endless_recursion_is_contained() {
    check_contained("recurse");
}

#[test]
fn endless_waiting_is_contained() {
    check_contained("sleep");
}

#[test]
fn answers_that_make_no_sense_are_contained() {
    check_contained("big");
    check_contained("success-as-denial");
    check_contained("challenge");
    check_contained("fail");
}

#[test]
fn chatter_does_not_keep_anybody_waiting() {
    let broker = Broker::start(vec![misbehave("m", &[])]);
    for username in ["chatter", "print"] {
        let mut polls = Vec::new();
        let call = broker.shard.authenticate(Arc::new(request("c", username, "")));
        let _ = broker.run_timed(call, &mut polls);
        check_polls(&polls);
    }
    assert_eq!(broker.ask("c2", ""), allowed("allow"));
}

/// Other clients are served between the polls.
fn check_polls(polls: &[Duration]) {
    let mut sorted = polls.to_vec();
    sorted.sort();
    let typical = sorted[sorted.len() / 2];
    assert!(typical < Duration::from_millis(5), "{typical:?} in {} polls", polls.len());
}

#[test]
fn a_loop_gives_the_thread_back_every_few_milliseconds_and_ends_with_its_cpu_time() {
    let broker = broker();
    let mut polls = Vec::new();
    let call = broker.shard.authenticate(Arc::new(request("c", "loop", "")));
    assert_eq!(broker.run_timed(call, &mut polls), AuthOutcome::Unavailable);
    assert!(polls.len() >= 40, "{} polls", polls.len());
    check_polls(&polls);
}

#[test]
fn others_are_answered_while_one_loops() {
    let broker = broker();
    let mut looping = broker.shard.authenticate(Arc::new(request("villain", "loop", "")));
    assert!(broker.poll(&mut looping).is_pending());
    assert_eq!(broker.ask("neighbour", ""), allowed("allow"));
    assert!(broker.poll(&mut looping).is_pending());
    assert_eq!(broker.run(looping), AuthOutcome::Unavailable);
}

#[test]
fn work_within_the_limits_is_no_fault() {
    let broker = Broker::start(vec![misbehave("m", &[])]);
    assert_eq!(broker.ask("c", "work"), allowed("allow"));
}

#[test]
fn a_client_that_broke_the_plugin_is_not_asked_about_for_a_while_and_others_are() {
    let broker = broker();
    for _ in 0..20 {
        assert_eq!(broker.ask("villain", "trap"), AuthOutcome::Unavailable);
    }
    assert_eq!(broker.status("m").map(|status| status.calls), Some(1));
    assert_eq!(broker.ask("neighbour", ""), allowed("allow"));
}

#[test]
fn a_plugin_that_breaks_for_everybody_is_left_alone() {
    let broker = broker();
    for client in 0..20 {
        assert_eq!(broker.ask(&format!("c{client}"), "trap"), AuthOutcome::Unavailable);
    }
    assert_eq!(broker.status("m").map(|status| status.calls), Some(5));
}

#[test]
fn a_call_that_is_dropped_costs_its_instance_only() {
    let broker = broker();
    let mut call = broker.shard.authenticate(Arc::new(request("c", "sleep", "")));
    assert!(broker.poll(&mut call).is_pending());
    drop(call);
    broker.wait("the instance is dropped", |broker| broker.status("m").is_some_and(|status| status.instances == 0));
    assert_eq!(broker.ask("c", ""), allowed("allow"));
}

#[test]
fn nobody_gets_network_or_environment() {
    let broker = broker();
    assert_eq!(broker.ask("c", "connect"), allowed("yes"), "refused by the host");
    assert_eq!(broker.ask("c", "environment"), allowed("yes"), "there is none");
    assert_eq!(broker.ask("c", "read:/etc/passwd"), denied(0x87));
    assert_eq!(broker.ask("c", "write:/x"), denied(0x87));
}

/// A folder with a secret beside what is granted.
fn with_grant(grant: impl Fn(&std::path::Path) -> FileGrant) -> Broker {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let granted = folder.path().join("granted");
    std::fs::create_dir(&granted).expect("can make a folder");
    std::fs::write(granted.join("users"), "users").expect("can write");
    std::fs::write(granted.join("other"), "other").expect("can write");
    std::fs::write(folder.path().join("secret"), "secret").expect("can write");
    std::os::unix::fs::symlink("../secret", granted.join("link")).expect("can link");
    let files = vec![grant(&granted)];
    Broker::try_start(folder, vec![PluginConfig { files, limits: limits(), ..misbehave("m", &[]) }]).expect("loads")
}

#[test]
fn a_granted_folder_ends_at_its_walls() {
    let broker = with_grant(|granted| FileGrant { host: granted.into(), guest: "/data".into(), mode: Mode::Read });
    assert_eq!(broker.ask("c", "read:/data/users"), allowed("users"));
    for escape in ["/data/../secret", "/data/../../secret", "/data/link", "/data/./../secret", "/secret", "../secret"] {
        assert_eq!(broker.ask("c", &format!("read:{escape}")), denied(0x87), "{escape}");
    }
    assert_eq!(broker.ask("c", "write:/data/users"), denied(0x87), "read-only unless said otherwise");
    assert_eq!(broker.ask("c", "write:/data/new"), denied(0x87));
}

#[test]
fn a_folder_granted_for_writing_can_be_written() {
    let broker = with_grant(|granted| FileGrant { host: granted.into(), guest: "/data".into(), mode: Mode::Write });
    assert_eq!(broker.ask("c", "write:/data/new"), allowed("yes"));
    assert!(broker.folder.path().join("granted/new").exists());
    assert_eq!(broker.ask("c", "write:/data/../new"), denied(0x87));
}

#[test]
fn a_granted_file_is_alone() {
    let grant = |granted: &std::path::Path| FileGrant {
        host: granted.join("users"),
        guest: "/etc/app/users.txt".into(),
        mode: Mode::Read,
    };
    let broker = with_grant(grant);
    assert_eq!(broker.ask("c", "read:/etc/app/users.txt"), allowed("users"));
    for escape in ["/etc/app/other", "/etc/app/../other", "/etc/app/users", "/etc/app/../../secret"] {
        assert_eq!(broker.ask("c", &format!("read:{escape}")), denied(0x87), "{escape}");
    }
    assert_eq!(broker.ask("c", "write:/etc/app/users.txt"), denied(0x87));
}

#[test]
fn a_single_file_cannot_be_granted_for_writing() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("f");
    std::fs::write(&file, "").expect("can write");
    let files = vec![FileGrant { host: file, guest: "/f".into(), mode: Mode::Write }];
    let refused = Broker::try_start(folder, vec![PluginConfig { files, ..misbehave("m", &[]) }]).err();
    assert!(refused.expect("is refused").to_string().contains("a single file can only be read"));
}

fn refusal(plugin: PluginConfig) -> String {
    let begun = Instant::now();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let refused = Broker::try_start(folder, vec![PluginConfig { limits: limits(), ..plugin }]).err();
    assert!(begun.elapsed() < Duration::from_secs(30));
    refused.expect("is refused").to_string()
}

#[test]
fn a_configured_plugin_that_cannot_start_is_an_error_that_says_why() {
    let check = |init: &str, words: &str| {
        let error = refusal(misbehave("m", &[("init", init)]));
        assert!(error.contains("misbehave.wasm") && error.contains(words), "{error}");
    };
    check("trap", "init: ");
    check("loop", "init: computed longer than cpu_ms = 200");
    check("memory", "init: it wanted more memory than limits.memory_mib = 16");
    check("fail", "init: as told");
    let error = refusal(misbehave("m", &[("answer", "sick")]));
    assert!(error.contains("health: unavailable: not well"), "{error}");
}

fn from_text(text: &str) -> (tempfile::TempDir, PluginConfig) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("text.wasm");
    std::fs::write(&path, wat::parse_str(text).expect("is valid text")).expect("can write");
    let plugin = plugin("text", path, &[]);
    (folder, plugin)
}

#[test]
fn components_of_other_worlds_are_refused_by_what_they_want() {
    let (_folder, plugin) = from_text("(component)");
    assert!(refusal(plugin).contains("exports no plug-point"));
    let import = r#"(component (import "acme:rocket/launch@1.0.0" (instance (export "go" (func)))))"#;
    let (_folder, plugin) = from_text(import);
    let error = refusal(plugin);
    assert!(error.contains("acme:rocket/launch@1.0.0"), "{error}");
    let (_folder, plugin) = from_text("(module)");
    assert!(refusal(plugin).contains("text.wasm"));
}

#[test]
fn a_pinned_digest_must_fit() {
    let error = refusal(PluginConfig { sha256: Some("00".repeat(32)), ..misbehave("m", &[]) });
    assert!(error.contains("sha256"), "{error}");
}

#[test]
fn on_error_retry_asks_a_fresh_instance() {
    let broker =
        Broker::start(vec![PluginConfig { on_error: OnError::Retry, limits: limits(), ..misbehave("m", &[]) }]);
    assert_eq!(broker.ask("c", "trap"), AuthOutcome::Unavailable);
    assert_eq!(broker.ask("d", ""), allowed("allow"));
}
