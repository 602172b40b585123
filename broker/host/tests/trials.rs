//! A newer build beside the one that serves, and in its place: what a shard knows of both goes on.

mod common;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Broker, another_build, misbehave, plugin, replace};
use wasmqtt_host::{Grants, PluginConfig, PluginLimits, Rollout};
use wasmqtt_protocol::access::Action;
use wasmqtt_protocol::codec::Qos;
use wasmqtt_protocol::ports::{Access, Client};
use wasmqtt_protocol::topic::Filter;

fn original(component: &str) -> Vec<u8> {
    std::fs::read(wasmqtt_guests::component(component)).expect("the guest is built")
}

/// Configured plugins `p` and `q` whose files can be replaced.
fn start(component: &str, config: PluginConfig) -> (Broker, PathBuf, PathBuf) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let files = ["p.wasm", "q.wasm"].map(|name| folder.path().join(name));
    std::fs::write(&files[0], original(component)).expect("can write");
    std::fs::write(&files[1], original("misbehave")).expect("can write");
    let p = PluginConfig { name: "p".into(), path: files[0].clone(), ..config };
    let q = plugin("q", files[1].clone(), &[("answer", "next")]);
    let broker = Broker::try_start(folder, vec![p, q]).expect("loads");
    let [p, q] = files;
    (broker, p, q)
}

fn tried(broker: &Broker) -> wasmqtt_host::Tried {
    broker.status("p").expect("serves").candidate.expect("on trial")
}

/// Each late answer costs an instance of it, so after a few it is not asked for a while.
#[test]
fn a_shadow_that_is_too_slow_is_not_compared() {
    let (broker, file, _) = start("auth-demo", PluginConfig { rollout: Rollout::Shadow, ..misbehave("p", &[]) });
    replace(&file, &original("misbehave"));
    broker.wait("the shadow is there", |broker| broker.status("p").expect("serves").candidate.is_some());
    for n in 0..20 {
        broker.ask(&format!("c{n}"), "sleep");
    }
    let tried = tried(&broker);
    assert_eq!((tried.compared, tried.differs), (0, 0));
    assert!((1..=5).contains(&tried.calls), "{} calls", tried.calls);
}

/// The circuit breaker of a build on trial stays open when another plugin is replaced.
#[test]
fn what_is_known_of_a_build_on_trial_outlives_changes_of_others() {
    let rollout = Rollout::Canary { percent: 100, time: Duration::from_mins(10) };
    let (broker, file, other) = start("auth-demo", PluginConfig { rollout, ..misbehave("p", &[]) });
    replace(&file, &original("misbehave"));
    broker.wait("the canary is there", |broker| broker.status("p").expect("serves").candidate.is_some());
    // Two of them do not make it go.
    for _ in 0..2 {
        broker.ask("villain", "trap");
    }
    assert_eq!(tried(&broker).calls, 1, "it broke the plugin");
    replace(&other, &another_build("misbehave"));
    broker.wait("the other one is replaced", |broker| broker.generation("q") == 2);
    broker.ask("villain", "trap");
    assert_eq!(tried(&broker).calls, 1, "nobody asks about it, as before");
    broker.host.promote("p").expect("is promoted");
    broker.ask("villain", "trap");
    assert_eq!(broker.status("p").map(|status| status.failures), Some(1));
}

fn authorize(broker: &Broker, topic: &str) {
    let client = Client { client_id: "c".into(), principal: "".into(), listener: "".into() };
    let access = Access { action: Action::Publish, topic: topic.into(), qos: Qos::AtMostOnce, retain: false };
    broker.run(broker.shard.authorize(Arc::new(client), Arc::new([access])));
}

/// A build that has trapped has no instance that could hand over what it knows; its successor does not wait for one.
#[test]
fn the_successor_of_a_build_that_trapped_serves_at_once() {
    let publish = vec![Filter::parse("#").expect("a filter")];
    let grants = Grants { publish, disconnect: true, ban: true, revoke: true, ..Grants::default() };
    let limits = PluginLimits { deadline_ms: 20_000, ..PluginLimits::default() };
    let (broker, file, _) = start("probe", PluginConfig { grants, limits, ..plugin("p", "", &[]) });
    authorize(&broker, "a/trap");
    let begun = Instant::now();
    replace(&file, &another_build("probe"));
    broker.wait("the new build serves", |broker| broker.generation("p") == 2);
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
}
