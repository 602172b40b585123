//! How a newer build takes over: with what the old one knew, on probation, as a canary, as a shadow, several at once.

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::{Broker, allowed, another_build, misbehave, plugin, replace};
use wasmqtt_host::{Cancel, Grants, HostConfig, PluginConfig, Rollout, ThreadDied};
use wasmqtt_protocol::access::Action;
use wasmqtt_protocol::codec::Qos;
use wasmqtt_protocol::ports::{Access, AuthOutcome, Client};
use wasmqtt_protocol::topic::Filter;

fn original(component: &str) -> Vec<u8> {
    std::fs::read(wasmqtt_guests::component(component)).expect("the guest is built")
}

/// A configured plugin whose file can be replaced.
fn start(component: &str, config: PluginConfig) -> (Broker, PathBuf) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("p.wasm");
    std::fs::write(&file, original(component)).expect("can write");
    let config = PluginConfig { name: "p".into(), path: file.clone(), ..config };
    (Broker::try_start(folder, vec![config]).expect("loads"), file)
}

fn probe(settings: &[(&str, &str)]) -> PluginConfig {
    let grants = Grants {
        publish: vec![Filter::parse("#").expect("a filter")],
        disconnect: true,
        ban: true,
        revoke: true,
        ..Grants::default()
    };
    PluginConfig { grants, ..plugin("p", "", settings) }
}

fn authorize(broker: &Broker) {
    let client = Client { client_id: "c".into(), principal: "".into(), listener: "".into() };
    let access = Access { action: Action::Publish, topic: "a".into(), qos: Qos::AtMostOnce, retain: false };
    broker.run(broker.shard.authorize(Arc::new(client), Arc::new([access])));
}

#[test]
fn the_new_build_knows_what_the_old_one_knew() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (broker, file) = start("probe", probe(&[]));
    drop(folder);
    for _ in 0..3 {
        authorize(&broker);
    }
    replace(&file, &another_build("probe"));
    broker.wait("the new build serves", |broker| broker.generation("p") == 2);
    // A third one is told by the second what that was told by the first, and what it saw itself.
    authorize(&broker);
    replace(&file, &original("probe"));
    broker.wait("the next build serves", |broker| broker.generation("p") == 3);
    assert_eq!(broker.status("p").expect("serves").failures, 0);
}

#[test]
fn a_build_that_cannot_take_over_what_the_running_one_knows_does_not_serve() {
    let (broker, file) = start("probe", probe(&[("restore", "fail")]));
    replace(&file, &another_build("probe"));
    std::thread::sleep(Duration::from_millis(700));
    assert_eq!(broker.generation("p"), 1);
    authorize(&broker);
}

/// It is asked a few times, since it may fail by chance, and then its successor begins without what it knew.
#[test]
fn a_running_build_that_hands_nothing_over_is_replaced_nevertheless() {
    let (broker, file) = start("probe", probe(&[("snapshot", "fail")]));
    replace(&file, &another_build("probe"));
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(broker.generation("p"), 1, "it is asked again");
    authorize(&broker);
    broker.wait("the new build serves", |broker| broker.generation("p") == 2);
}

/// An operator is told, and decides; a roll-back never asks the build that is to go.
#[test]
fn a_running_build_that_hands_nothing_over_does_not_keep_an_operator_from_anything() {
    let (broker, file) = start("probe", probe(&[("snapshot", "fail")]));
    let deploy = |fresh| {
        let components = vec![("p".to_owned(), another_build("probe"))];
        broker.host.deploy_with(components, fresh, &Cancel::default())
    };
    let refused = deploy(false).expect_err("is refused").to_string();
    assert!(refused.contains("--fresh") && refused.contains("nothing was changed"), "{refused}");
    assert_eq!(std::fs::read(&file).expect("readable"), original("probe"));
    deploy(true).expect("without asking");
    let second = broker.status("p").expect("serves").digest;
    broker.host.roll_back("p", None).expect("without asking");
    assert_ne!(broker.status("p").expect("serves").digest, second);
}

/// Whoever reloads settings is told that they are not in force.
#[test]
fn settings_that_a_build_does_not_get_are_an_error() {
    let (broker, file) = start("probe", probe(&[("snapshot", "fail")]));
    let other = PluginConfig { path: file, ..probe(&[("snapshot", "fail"), ("other", "1")]) };
    let refused = broker.host.reconfigure(vec![other]).expect_err("is refused").to_string();
    assert!(refused.contains("does not hand over"), "{refused}");
    assert_eq!(broker.generation("p"), 1);
}

/// Within two seconds, without an operator; and it is not tried again until its file changes.
#[test]
fn a_build_that_traps_goes_back_to_its_predecessor() {
    let (broker, file) = start("auth-demo", misbehave("p", &[]));
    let good = |broker: &Broker| matches!(broker.ask("good", "alice"), AuthOutcome::Deny(_));
    assert!(good(&broker));
    replace(&file, &original("misbehave"));
    broker.wait("the new build serves", |broker| broker.generation("p") == 2);
    let begun = Instant::now();
    let mut client = 0;
    while broker.generation("p") == 2 {
        client += 1;
        broker.ask(&format!("c{client}"), "trap");
        assert!(begun.elapsed() < Duration::from_secs(2), "still the build that traps");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!((broker.generation("p"), broker.status("p").expect("serves").rolled_back), (1, 1));
    assert!(good(&broker));
    let failed = broker.host.roll_back("p", None).expect_err("there is none before the first").to_string();
    assert!(failed.contains("no such earlier version") && broker.generation("p") == 1, "{failed}");
    broker.host.rescan();
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(broker.generation("p"), 1, "the same file is not tried again");
    replace(&file, &another_build("misbehave"));
    broker.wait("another file is", |broker| broker.generation("p") == 3);
}

#[test]
fn a_build_that_does_well_stays_and_the_old_one_is_let_go() {
    let probation = Duration::from_millis(300);
    let (broker, file) = start("misbehave", PluginConfig { probation, ..misbehave("p", &[]) });
    replace(&file, &another_build("misbehave"));
    broker.wait("the new build serves", |broker| broker.generation("p") == 2);
    broker.wait("the old one is gone", |broker| broker.status("p").expect("serves").instances == 1);
    assert_eq!(broker.ask("c", ""), allowed("allow"));
}

#[test]
fn a_canary_serves_its_share_and_then_everybody() {
    let rollout = Rollout::Canary { percent: 30, time: Duration::from_secs(6) };
    let (broker, file) = start("misbehave", PluginConfig { rollout, ..misbehave("p", &[]) });
    replace(&file, &original("auth-demo"));
    broker.wait("the canary is there", |broker| broker.status("p").expect("serves").candidate.is_some());
    // The canary denies everybody.
    let denied = |broker: &Broker| {
        (0..200).filter(|n| matches!(broker.ask(&format!("c{n}"), "x"), AuthOutcome::Deny(_))).count()
    };
    let first = denied(&broker);
    assert!((30..=90).contains(&first), "{first} of 200");
    assert_eq!(denied(&broker), first, "always the same clients");
    broker.wait("it serves everybody", |broker| broker.generation("p") == 2);
    assert_eq!(denied(&broker), 200);
}

#[test]
fn a_canary_that_fails_goes() {
    let rollout = Rollout::Canary { percent: 50, time: Duration::from_mins(10) };
    let (broker, file) = start("auth-demo", PluginConfig { rollout, ..misbehave("p", &[]) });
    replace(&file, &original("misbehave"));
    broker.wait("the canary is there", |broker| broker.status("p").expect("serves").candidate.is_some());
    for n in 0..40 {
        broker.ask(&format!("c{n}"), "trap");
    }
    broker.wait("it is gone", |broker| broker.status("p").expect("serves").candidate.is_none());
    assert_eq!(broker.generation("p"), 1);
    assert!(broker.host.roll_back("p", None).is_err(), "it never served everybody");
}

#[test]
fn a_shadow_is_compared_and_changes_nothing_until_it_is_promoted() {
    let (broker, file) = start("misbehave", PluginConfig { rollout: Rollout::Shadow, ..misbehave("p", &[]) });
    assert!(broker.host.promote("p").is_err(), "nothing is on trial");
    replace(&file, &original("auth-demo"));
    broker.wait("the shadow is there", |broker| broker.status("p").expect("serves").candidate.is_some());
    for n in 0..10 {
        assert_eq!(broker.ask(&format!("c{n}"), "x"), allowed("allow"));
    }
    let tried = broker.status("p").expect("serves").candidate.expect("on trial");
    assert_eq!((tried.compared, tried.differs, tried.percent), (10, 10, None));
    broker.host.promote("p").expect("is promoted");
    assert!(matches!(broker.ask("c", "x"), AuthOutcome::Deny(_)));
    // Back at once: an operator who wants that has no time for a trial.
    broker.host.roll_back("p", None).expect("there is one");
    assert_eq!(broker.ask("c", "x"), allowed("allow"));
    assert_eq!(broker.status("p").expect("serves").candidate, None);
    // Another trial is counted anew.
    replace(&file, &another_build("misbehave"));
    broker.wait("the next shadow is there", |broker| broker.status("p").expect("serves").candidate.is_some());
    let tried = broker.status("p").expect("serves").candidate.expect("on trial");
    assert_eq!((tried.compared, tried.differs), (0, 0));
}

#[test]
fn an_explanation_asks_the_build_that_serves_the_client() {
    let rollout = Rollout::Canary { percent: 50, time: Duration::from_mins(10) };
    let (broker, file) = start("probe", PluginConfig { rollout, ..probe(&[]) });
    replace(&file, &another_build("probe"));
    broker.wait("the canary is there", |broker| broker.status("p").expect("serves").candidate.is_some());
    let access = Access { action: Action::Publish, topic: "a".into(), qos: Qos::AtMostOnce, retain: false };
    let mut seen = [false; 2];
    for n in 0..20 {
        let client = Client { client_id: format!("c{n}").into(), principal: "".into(), listener: "".into() };
        let opinions = broker.host.explain(&Arc::new(client), &access);
        seen[opinions[0].generation as usize - 1] = true;
    }
    assert_eq!(seen, [true, true]);
}

fn with_two(folder: &Path) -> Vec<PluginConfig> {
    ["a", "b"]
        .map(|name| {
            let path = folder.join(format!("{name}.wasm"));
            std::fs::write(&path, original("misbehave")).expect("can write");
            plugin(name, path, &[("answer", "next")])
        })
        .to_vec()
}

#[test]
fn several_are_deployed_in_one_step_or_none() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let plugins = with_two(folder.path());
    let files: Vec<PathBuf> = plugins.iter().map(|plugin| plugin.path.clone()).collect();
    let broker = Broker::try_start(folder, plugins).expect("loads");
    let deploy = |a: Vec<u8>, b: Vec<u8>| broker.host.deploy(vec![("a".into(), a), ("b".into(), b)]);
    let refused = deploy(another_build("misbehave"), b"rubbish".to_vec()).expect_err("is refused");
    assert!(refused.to_string().contains("\"b\"") && refused.to_string().contains("nothing was changed"), "{refused}");
    assert_eq!((broker.generation("a"), broker.generation("b")), (1, 1));
    assert_eq!(std::fs::read(&files[0]).expect("readable"), original("misbehave"));
    deploy(another_build("misbehave"), another_build("misbehave")).expect("both are good");
    assert_eq!(std::fs::read(&files[1]).expect("readable"), another_build("misbehave"));
    let status = |name| broker.status(name).expect("serves").digest;
    assert_eq!(status("a"), status("b"));
    assert!(broker.host.deploy(vec![("nobody".into(), original("misbehave"))]).is_err(), "there is no folder");
}

/// Neither files nor a probation are left of it, at whose end the serving build would have gone.
#[test]
fn a_deploy_that_fails_half_way_leaves_nothing() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let probation = Duration::from_millis(100);
    let plugins: Vec<_> =
        with_two(folder.path()).into_iter().map(|plugin| PluginConfig { probation, ..plugin }).collect();
    let files: Vec<PathBuf> = plugins.iter().map(|plugin| plugin.path.clone()).collect();
    let broker = Broker::try_start(folder, plugins).expect("loads");
    let check = |b: Vec<u8>, why: &str| {
        let components = vec![("a".into(), another_build("misbehave")), ("b".into(), b)];
        let refused = broker.host.deploy(components).expect_err("is refused").to_string();
        assert!(refused.contains(why) && refused.contains("nothing was changed"), "{refused}");
        broker.host.rescan();
        std::thread::sleep(Duration::from_millis(700));
        let a = broker.status("a").expect("serves");
        assert_eq!((a.generation, a.instances), (1, 1), "it serves, and its instance is kept for the next call");
        assert_eq!(std::fs::read(&files[0]).expect("readable"), original("misbehave"));
    };
    check(b"rubbish".to_vec(), "not WebAssembly");
    // The name of the second belongs to a folder by now.
    std::fs::remove_file(&files[1]).expect("can remove");
    std::fs::create_dir(&files[1]).expect("can make a folder");
    check(another_build("misbehave"), "cannot write");
    let left = std::fs::read_dir(broker.folder.path()).expect("a folder").flatten().map(|entry| entry.file_name());
    let left: Vec<_> = left.filter(|name| name.to_string_lossy().starts_with('.')).collect();
    assert!(left.is_empty(), "{left:?}");
}

/// Which of two builds should lie in it afterwards, nobody could say.
#[test]
fn plugins_with_the_same_file_are_not_deployed_together() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut plugins = with_two(folder.path());
    plugins[1].path = plugins[0].path.clone();
    let file = plugins[0].path.clone();
    let broker = Broker::try_start(folder, plugins).expect("loads");
    let deployed = ["a", "b"].map(|name| (name.to_owned(), another_build("misbehave")));
    let refused = broker.host.deploy(deployed.to_vec()).expect_err("is refused").to_string();
    assert!(refused.contains("the same file") && refused.contains("nothing was changed"), "{refused}");
    assert_eq!(std::fs::read(&file).expect("readable"), original("misbehave"));
}

/// One has its new content, the other one has not: both are as they were when the broker starts again.
#[test]
fn a_deploy_that_was_interrupted_is_undone_by_the_next_start() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let plugins = with_two(folder.path());
    let beside = |file: &Path, what: &str| {
        let name = file.file_name().expect("has one").to_string_lossy();
        file.with_file_name(format!(".{name}.{what}"))
    };
    for PluginConfig { path, .. } in &plugins {
        std::fs::hard_link(path, beside(path, "old")).expect("can link");
        std::fs::write(beside(path, "new"), another_build("misbehave")).expect("can write");
    }
    std::fs::rename(beside(&plugins[0].path, "new"), &plugins[0].path).expect("can rename");
    std::fs::create_dir(folder.path().join("cache")).expect("can make a folder");
    let journal = folder.path().join("cache/deploying");
    let entry = |plugin: &PluginConfig| format!("+{}\0", plugin.path.display());
    std::fs::write(&journal, plugins.iter().map(entry).collect::<String>()).expect("can write");
    let broker = Broker::try_start(folder, plugins.clone()).expect("loads");
    for PluginConfig { path, .. } in &plugins {
        assert_eq!(std::fs::read(path).expect("readable"), original("misbehave"));
        assert!(!beside(path, "old").exists() && !beside(path, "new").exists());
    }
    assert!(!journal.exists() && broker.generation("a") == 1);
}

#[test]
fn a_deploy_can_be_cancelled() {
    let (broker, file) = start("misbehave", misbehave("p", &[]));
    let cancel = Cancel::default();
    cancel.cancel();
    let components = vec![("p".to_owned(), another_build("misbehave"))];
    let refused = broker.host.deploy_with(components, false, &cancel).expect_err("was cancelled").to_string();
    assert!(refused.contains("cancelled"), "{refused}");
    assert_eq!((broker.generation("p"), std::fs::read(&file).expect("readable")), (1, original("misbehave")));
}

/// A `shutdown` that takes its time, of many instances, ends with the host and holds up nobody.
#[test]
fn slow_goodbyes_hold_up_no_other_plugin_and_end_with_the_host() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut plugins = with_two(folder.path());
    plugins[0] = PluginConfig { probation: Duration::ZERO, ..plugins[0].clone() };
    plugins[0].config.push(("end".into(), "slow".into()));
    let died = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&died);
    let count: ThreadDied = Arc::new(move |_| _ = counted.fetch_add(1, Ordering::SeqCst));
    let with_count = |config| HostConfig { thread_died: Some(count), ..config };
    let broker = Broker::try_start_with(folder, plugins, with_count).expect("loads");
    let builds = [another_build("misbehave"), original("misbehave")];
    for round in 0..12 {
        broker.host.deploy(vec![("a".into(), builds[round % 2].clone())]).expect("is deployed");
    }
    let begun = Instant::now();
    broker.host.deploy(vec![("b".into(), another_build("misbehave"))]).expect("is deployed");
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}: one goodbye after another", begun.elapsed());
    broker.wait("all have said goodbye", |broker| broker.status("a").expect("serves").instances <= 2);
    for round in 0..3 {
        broker.host.deploy(vec![("a".into(), builds[round % 2].clone())]).expect("is deployed");
    }
    // With the runtime that goodbyes need.
    drop(broker);
    std::thread::sleep(Duration::from_millis(1200));
    assert_eq!(died.load(Ordering::SeqCst), 0, "a thread has panicked");
}

#[test]
fn an_operator_goes_back_to_an_earlier_version() {
    let (broker, file) = start("misbehave", misbehave("p", &[]));
    assert!(broker.host.roll_back("p", None).is_err(), "there is no earlier one");
    let first = broker.status("p").expect("serves").digest;
    replace(&file, &another_build("misbehave"));
    broker.wait("the new build serves", |broker| broker.generation("p") == 2);
    let second = broker.status("p").expect("serves").digest;
    broker.wait("both are kept", |broker| broker.host.versions("p") == [second.clone(), first.clone()]);
    broker.host.roll_back("p", None).expect("there is one");
    assert_eq!(broker.status("p").expect("serves").digest, first);
    assert_eq!(std::fs::read(&file).expect("readable"), original("misbehave"));
    broker.host.roll_back("p", Some(&second[..8])).expect("by its digest");
    assert_eq!(broker.status("p").expect("serves").digest, second);
    let unknown = broker.host.roll_back("p", Some("ffffffff")).expect_err("there is none");
    assert!(unknown.to_string().contains(&first[..12]), "{unknown}");
}
