//! What a guest makes the broker hold or do has a bound, in bytes where it has bytes, whatever was granted.

mod common;

use std::net::TcpListener;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use common::{Broker, allowed, plugin, request};
use wasmqtt_host::{FileGrant, Grants, Mode, PluginConfig, PluginLimits};
use wasmqtt_protocol::ports::AuthOutcome;
use wasmqtt_protocol::topic::Filter;

fn hoard(settings: &[(&str, &str)]) -> PluginConfig {
    // It imports `publish`, so that must be granted.
    let grants = Grants { publish: vec![Filter::parse("granted").expect("a filter")], ..Grants::default() };
    PluginConfig { grants, ..plugin("h", wasmqtt_guests::component("hoard"), settings) }
}

/// What the guest says it got.
fn got(broker: &Broker, username: &str) -> usize {
    match broker.ask("c", username) {
        AuthOutcome::Allow(grant) => grant.principal.parse().expect("a number"),
        other => panic!("{username}: {other:?}"),
    }
}

#[test]
fn a_request_that_is_never_sent_is_small() {
    let broker = Broker::start(vec![hoard(&[])]);
    let bytes = got(&broker, "request:");
    assert!((1..=32 << 10).contains(&bytes), "{bytes} bytes");
}

#[test]
fn resources_of_an_instance_are_few() {
    let broker = Broker::start(vec![hoard(&[])]);
    assert_eq!(broker.ask("a", "resources:200"), allowed("200"));
    assert_eq!(broker.ask("b", "resources:300"), AuthOutcome::Unavailable);
}

#[test]
fn listings_of_folders_are_few() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let files = vec![FileGrant { host: folder.path().into(), guest: "/data".into(), mode: Mode::Read }];
    let broker = Broker::start(vec![PluginConfig { files, ..hoard(&[]) }]);
    for _ in 0..3 {
        assert_eq!(got(&broker, "listings:100"), 16, "those that are closed do not count");
    }
}

/// In `init` as in any call.
#[test]
fn what_is_handed_over_in_init_is_bounded() {
    let started = Broker::try_start(tempfile::tempdir().expect("a temporary folder"), vec![hoard(&[("init", "long")])]);
    let error = started.err().expect("is refused").to_string();
    assert!(error.contains("init: ") && error.contains("fuel"), "{error}");
}

#[test]
fn requests_to_the_broker_are_bounded_per_call() {
    let limits = PluginLimits { host_calls_per_sec: 1_000_000, cpu_ms: 20_000, ..PluginLimits::default() };
    let broker = Broker::start(vec![PluginConfig { limits, ..hoard(&[]) }]);
    assert_eq!(broker.ask("c", "publish:12000"), allowed("10000"));
}

#[test]
fn a_trap_gives_no_further_requests() {
    let limits = PluginLimits { host_calls_per_sec: 100, ..PluginLimits::default() };
    let broker = Broker::start(vec![PluginConfig { limits, ..hoard(&[]) }]);
    let begun = Instant::now();
    let asked: usize = (0..5)
        .map(|n| {
            let asked = got(&broker, "publish:1000");
            assert_eq!(broker.ask(&format!("villain-{n}"), "shout:0"), AuthOutcome::Unavailable);
            asked
        })
        .sum();
    let most = 100 * (begun.elapsed().as_secs() as usize + 1);
    assert!((100..=most).contains(&asked), "{asked} and at most {most}");
}

/// Over all instances of a plugin: each connection is a file descriptor of the broker.
#[test]
fn http_requests_of_a_plugin_are_few() {
    let service = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = service.local_addr().expect("an address");
    let http = vec![format!("http://{address}").parse().expect("a grant")];
    let limits = PluginLimits { instances: 12, deadline_ms: 30_000, ..PluginLimits::default() };
    let plugin = hoard(&[]);
    let grants = Grants { http, ..plugin.grants.clone() };
    let broker = Broker::start(vec![PluginConfig { grants, limits, ..plugin }]);
    let mut calls: Vec<_> = (0..12)
        .map(|n| broker.shard.authenticate(Arc::new(request(&format!("c{n}"), &format!("http:{address}"), ""))))
        .collect();
    let mut under_way = 0;
    // All at the same time.
    while !calls.is_empty() {
        std::thread::sleep(Duration::from_millis(1));
        calls.retain_mut(|call| match broker.poll(call) {
            Poll::Pending => true,
            Poll::Ready(AuthOutcome::Allow(grant)) => {
                under_way += grant.principal.parse::<usize>().expect("a number");
                false
            }
            Poll::Ready(other) => panic!("{other:?}"),
        });
    }
    assert_eq!(under_way, 64);
}

#[test]
fn names_are_looked_up_for_those_that_may_make_sockets() {
    let plugin = hoard(&[]);
    let grants = Grants { sockets: vec!["127.0.0.1:*".parse().expect("a grant")], ..plugin.grants.clone() };
    let broker = Broker::start(vec![PluginConfig { grants, ..plugin }]);
    assert!(got(&broker, "resolve:localhost") > 0);
    assert_eq!(got(&broker, "resolve:[::1]"), 1);
    assert_eq!(got(&broker, &format!("resolve:{}", "x".repeat(300))), 0);
    assert_eq!(got(&Broker::start(vec![hoard(&[])]), "resolve:localhost"), 0);
}
