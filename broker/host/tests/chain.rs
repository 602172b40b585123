//! Who is asked, in which order, and what the answers mean.

mod common;

use std::sync::Arc;

use bytes::Bytes;
use common::{Broker, allowed, denied, misbehave, plugin, request};
use wasmqtt_host::{OnError, PluginConfig};
use wasmqtt_protocol::ports::{AuthOutcome, AuthStep, Grant, Plugins};

fn demo() -> PluginConfig {
    plugin("demo", wasmqtt_guests::component("auth-demo"), &[("alice", "secret")])
}

#[test]
fn a_plugin_allows_denies_and_has_no_opinion() {
    let broker = Broker::start(vec![demo()]);
    assert!(broker.shard.has_auth());
    assert_eq!(broker.authenticate(request("c", "alice", "secret")), allowed("alice"));
    assert_eq!(broker.authenticate(request("c", "alice", "wrong")), denied(0x86));
    let mut anonymous = request("c", "", "");
    anonymous.username = None;
    assert_eq!(broker.authenticate(anonymous), AuthOutcome::Next);
    let status = broker.status("demo").expect("it serves");
    assert_eq!((status.calls, status.failures, status.generation, status.instances), (3, 0, 1, 1));
}

#[test]
fn the_first_opinion_counts_in_configured_order() {
    let first = PluginConfig { order: -1, ..misbehave("z", &[("answer", "z")]) };
    let broker = Broker::start(vec![misbehave("b", &[("answer", "b")]), misbehave("a", &[("answer", "next")]), first]);
    let names: Vec<String> = broker.host.status().into_iter().map(|status| status.name).collect();
    assert_eq!(names, ["z", "a", "b"]);
    assert_eq!(broker.ask("c", ""), allowed("z"));
    assert_eq!(broker.ask("c", "next"), AuthOutcome::Next);
    assert_eq!(broker.status("b").map(|status| status.calls), Some(1));
    assert_eq!(broker.status("a").map(|status| status.calls), Some(1));
}

#[test]
fn without_a_principal_the_user_name_is_the_identity() {
    let broker = Broker::start(vec![misbehave("m", &[("answer", "")])]);
    assert_eq!(broker.ask("c", "alice"), allowed("alice"));
}

/// MQTT 5.0 §4.12.
#[test]
fn enhanced_authentication_goes_on_in_any_instance() {
    let broker = Broker::start(vec![misbehave("first", &[("answer", "next")]), demo()]);
    let mut connect = request("c", "alice", "");
    connect.method = Some("ping".into());
    let connect = Arc::new(connect);
    let outcome = broker.authenticate((*connect).clone());
    let AuthOutcome::Challenge { data, state, plugin } = outcome else { panic!("{outcome:?}") };
    assert_eq!((&data[..], &*plugin), (&b"ping"[..], "demo"));
    let step = |data: &'static [u8], state: Bytes, plugin: &str, reauthenticate| AuthStep {
        request: Arc::clone(&connect),
        data: Bytes::from_static(data),
        state,
        plugin: plugin.into(),
        reauthenticate,
    };
    assert_eq!(broker.proceed(step(b"pong", state.clone(), "demo", false)), allowed("player"));
    assert_eq!(broker.proceed(step(b"bang", state.clone(), "demo", false)), denied(0x87));
    let again = broker.proceed(step(b"", Bytes::new(), "", true));
    assert!(matches!(again, AuthOutcome::Challenge { .. }), "{again:?}");
    assert_eq!(broker.proceed(step(b"", state.clone(), "first", false)), denied(0x87), "next is a refusal here");
    assert_eq!(broker.proceed(step(b"", state, "gone", false)), AuthOutcome::Unavailable);
}

#[test]
fn on_error_decides_when_there_is_no_answer() {
    let with = |on_error| {
        let broker =
            Broker::start(vec![PluginConfig { on_error, ..misbehave("a", &[]) }, misbehave("b", &[("answer", "b")])]);
        let outcome = broker.ask("c", "trap");
        // `b` traps as well when it is asked.
        (outcome, broker.status("a").map(|status| status.calls), broker.status("b").map(|status| status.calls))
    };
    assert_eq!(with(OnError::Deny), (AuthOutcome::Unavailable, Some(1), Some(0)));
    assert_eq!(with(OnError::Retry), (AuthOutcome::Unavailable, Some(2), Some(0)));
    assert_eq!(with(OnError::Allow), (AuthOutcome::Allow(Grant::default()), Some(1), Some(0)));
    assert_eq!(with(OnError::Skip), (AuthOutcome::Unavailable, Some(1), Some(1)));
}

#[test]
fn without_plugins_there_is_nobody_to_ask() {
    let broker = Broker::start(Vec::new());
    assert!(!broker.shard.has_auth() && !broker.host.has_auth());
    assert_eq!(broker.ask("c", "alice"), AuthOutcome::Next);
}

#[test]
fn calls_beyond_the_instances_wait_their_turn() {
    let broker = Broker::start(vec![misbehave("m", &[])]);
    let mut calls: Vec<_> =
        (0..50).map(|n| broker.shard.authenticate(Arc::new(request(&format!("c{n}"), "work", "")))).collect();
    for call in &mut calls {
        assert!(broker.poll(call).is_pending());
    }
    calls.truncate(8);
    for call in calls {
        assert_eq!(broker.run(call), allowed("allow"));
    }
    let instances = broker.status("m").expect("it serves").instances;
    assert!(instances <= 4, "{instances}");
}

#[test]
fn each_shard_has_instances_of_its_own() {
    let broker = Broker::start(vec![demo()]);
    let other = broker.host.shard(1);
    let outcome = broker.run(other.authenticate(Arc::new(request("c", "alice", "secret"))));
    assert_eq!(outcome, allowed("alice"));
}

/// Run with `--ignored --nocapture` to see what a call costs.
#[test]
#[ignore = "measures"]
fn cost_of_a_call() {
    const CALLS: u32 = 20_000;
    let broker = Broker::start(vec![demo()]);
    let connect = Arc::new(request("client-0001", "alice", "secret"));
    for round in 0..5 {
        let begun = std::time::Instant::now();
        for _ in 0..CALLS {
            broker.run(broker.shard.authenticate(Arc::clone(&connect)));
        }
        println!("round {round}: {:?} a call", begun.elapsed() / CALLS);
    }
}
