//! What a plugin can have too much of: each bound is filled, and the next one is refused or waits.

mod common;

use std::net::TcpListener;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use common::{Broker, allowed, another_build, misbehave, request};
use wasmqtt_host::{FileGrant, Grants, Mode, PluginConfig, PluginLimits};
use wasmqtt_protocol::ports::{AuthOutcome, AuthRequest};

type Asking = Pin<Box<dyn Future<Output = AuthOutcome>>>;

/// Asks for the first time; the answer, if it is there.
fn begin(broker: &Broker, request: AuthRequest) -> (Asking, Option<AuthOutcome>) {
    let mut call: Asking = broker.shard.authenticate(Arc::new(request));
    let answer = match broker.poll(&mut call) {
        Poll::Ready(answer) => Some(answer),
        Poll::Pending => None,
    };
    (call, answer)
}

fn instances(broker: &Broker) -> usize {
    broker.status("m").expect("it serves").instances
}

/// Eight at a time; the others are refused at once with an error that says so.
#[test]
fn http_requests_of_an_instance_are_bounded() {
    let service = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let url = format!("http://{}", service.local_addr().expect("an address"));
    let grants = Grants { http: vec![url.parse().expect("a grant")], ..Grants::default() };
    let broker = Broker::start(vec![PluginConfig { grants, ..misbehave("m", &[]) }]);
    assert_eq!(broker.ask("a", &format!("requests:{url}")), allowed("4"), "eight of twelve are under way");
    broker.wait("those that the guest gave up count no longer", |broker| {
        broker.ask("a", &format!("requests:{url}")) == allowed("4")
    });
}

/// A file whose streams are open is open, though the guest has closed it.
#[test]
fn streams_of_closed_files_count_as_open_files() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let granted = folder.path().join("granted");
    std::fs::create_dir(&granted).expect("can make a folder");
    std::fs::write(granted.join("file"), "x").expect("can write");
    let files = vec![FileGrant { host: granted, guest: "/data".into(), mode: Mode::Read }];
    let limits = PluginLimits { files: 20, ..PluginLimits::default() };
    let plugins = vec![PluginConfig { files, limits, ..misbehave("m", &[]) }];
    let broker = Broker::try_start(folder, plugins).expect("it loads");
    for _ in 0..3 {
        assert_eq!(broker.ask("a", "streams:file"), allowed("20"), "and they end with their streams");
    }
}

/// 100,000 calls of the broker in a second and some more at once: who makes 200,000 waits for most of two seconds.
#[test]
fn calls_of_the_broker_have_a_pace() {
    let broker = Broker::start(vec![misbehave("m", &[])]);
    let begun = Instant::now();
    assert_eq!(broker.ask("c", "clock"), allowed("allow"), "it waits, and nothing fails");
    let (elapsed, cpu_ms) = (begun.elapsed(), broker.status("m").expect("it serves").cpu_ms);
    assert!(elapsed > Duration::from_millis(1800), "{elapsed:?}, of which {cpu_ms} ms are its own");
}

/// As many calls as a shard has instances of a plugin are under way; the others wait, up to so many bytes and so long.
#[test]
fn calls_that_wait_for_an_instance_are_bounded() {
    const WAITING_BYTES_MAX: usize = 16 << 20;
    let limits = PluginLimits { instances: 2, queue_ms: 1500, deadline_ms: 60_000, ..PluginLimits::default() };
    let broker = Broker::start(vec![PluginConfig { limits, ..misbehave("m", &[]) }]);
    let password = "x".repeat(1 << 20);
    let ask = |n: usize, username: &str| begin(&broker, request(&format!("c{n}"), username, &password));
    let mut asleep: Vec<_> = (0..2).map(|n| ask(n, "sleep")).collect();
    let begun = Instant::now();
    // An instance is made in more than one go on a busy machine.
    while instances(&broker) < 2 {
        assert!(begun.elapsed() < Duration::from_secs(20), "{} instances", instances(&broker));
        assert!(asleep.iter_mut().all(|(call, _)| broker.poll(call).is_pending()));
        std::thread::sleep(Duration::from_millis(5));
    }
    let begun = Instant::now();
    let mut waiting: Vec<_> = (2..30).map(|n| ask(n, "")).collect();
    assert_eq!(instances(&broker), 2);
    let fits = WAITING_BYTES_MAX / (password.len() + 1024);
    assert!(waiting[..fits].iter().all(|(_, answer)| answer.is_none()), "they wait");
    let refused = |(_, answer): &(Asking, Option<AuthOutcome>)| *answer == Some(AuthOutcome::Unavailable);
    assert!(waiting[fits..].iter().all(refused), "`on_error` answers at once");
    let (last, answer) = waiting.swap_remove(0);
    assert!(answer.is_none());
    assert_eq!(broker.run(last), AuthOutcome::Unavailable, "none was free in time");
    assert!((1400..20_000).contains(&begun.elapsed().as_millis()), "{:?}", begun.elapsed());
    // There is room again, and an instance.
    drop(waiting);
    let (next, answer) = ask(30, "");
    assert!(answer.is_none());
    asleep.clear();
    assert_eq!(broker.run(next), allowed("allow"));
}

/// A plugin with all its builds has a number of instances: no call makes another one, and no build is prepared.
#[test]
fn instances_of_all_builds_of_a_plugin_are_bounded() {
    // Three builds, of each one for this shard and three for what nobody waits for.
    const MOST: usize = 12;
    let limits = PluginLimits { instances: 1, deadline_ms: 60_000, ..PluginLimits::default() };
    let broker = Broker::start(vec![PluginConfig { limits, ..misbehave("m", &[]) }]);
    let original = std::fs::read(wasmqtt_guests::component("misbehave")).expect("the guest is built");
    let builds = [original, another_build("misbehave")];
    let mut asleep = Vec::new();
    let error = loop {
        // The call goes on with the build on which it began.
        let (call, answer) = begin(&broker, request(&format!("c{}", asleep.len()), "sleep", ""));
        assert!(answer.is_none());
        asleep.push(call);
        match broker.host.deploy(vec![("m".into(), builds[asleep.len() % 2].clone())]) {
            Ok(()) => assert!(asleep.len() < MOST, "{} instances", instances(&broker)),
            Err(error) => break error.to_string(),
        }
    };
    assert_eq!((asleep.len(), instances(&broker)), (MOST, MOST), "{error}");
    assert!(error.contains("all 12 instances that limits.instances = 1 allows this plugin"), "{error}");
    asleep.clear();
    broker.wait("there is room", |broker| instances(broker) < MOST);
    assert_eq!(broker.ask("c", ""), allowed("allow"));
}
