//! Every plug-point but `auth`, with a guest that does as it is told.

mod common;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use common::{Broker, plugin};
use wasmqtt_host::{Grants, OnError, PluginConfig, PluginLimits};
use wasmqtt_protocol::access::{Action, Decision, Verdict};
use wasmqtt_protocol::codec::{Qos, ReasonCode};
use wasmqtt_protocol::ports::{
    Accepted, Access, BanPattern, Broker as Port, Client, Event, EventKind, Outgoing, Plugins, Refusal, Submission,
};
use wasmqtt_protocol::router::Message;
use wasmqtt_protocol::topic::Filter;

const NOT_AUTHORIZED: Verdict = Verdict::Deny(ReasonCode::NOT_AUTHORIZED);

fn everything_granted() -> Grants {
    Grants {
        publish: vec![Filter::parse("#").unwrap()],
        disconnect: true,
        ban: true,
        revoke: true,
        ..Grants::default()
    }
}

fn probe(settings: &[(&str, &str)]) -> PluginConfig {
    let config = plugin("probe", wasmqtt_guests::component("probe"), settings);
    PluginConfig { grants: everything_granted(), ..config }
}

fn client(client_id: &str) -> Arc<Client> {
    Arc::new(Client { client_id: client_id.into(), principal: "p".into(), listener: "mqtt://127.0.0.1:1883".into() })
}

fn access(action: Action, topic: &str) -> Access {
    Access { action, topic: topic.into(), qos: Qos::AtLeastOnce, retain: false }
}

fn authorize(broker: &Broker, client_id: &str, accesses: &[Access]) -> Vec<Decision> {
    broker.run(broker.shard.authorize(client(client_id), accesses.into()))
}

fn publish_to(broker: &Broker, topic: &str) -> Decision {
    authorize(broker, "c", &[access(Action::Publish, topic)]).remove(0)
}

fn message(topic: &str, payload: &str) -> Message {
    Message {
        topic: topic.into(),
        payload: Bytes::from(payload.to_owned()),
        properties: Bytes::new(),
        qos: Qos::AtLeastOnce,
        retain: false,
        expires_at_ms: None,
        publisher: None,
    }
}

fn submission(broker: &Broker, client_id: &str, topic: &str, payload: &str) -> Submission {
    let interest = broker.shard.interest(topic);
    let plugins = interest.before | interest.committed;
    Submission { plugins, client: Some(client(client_id)), message: Arc::new(message(topic, payload)), fed: None }
}

/// What becomes of each: the payload, or the reason of the discard.
fn before_store(broker: &Broker, messages: &[(&str, &str)]) -> Vec<String> {
    let sent =
        messages.iter().enumerate().map(|(n, (topic, payload))| submission(broker, &n.to_string(), topic, payload));
    let accepted = broker.run(broker.shard.before_store(sent.collect()));
    let text = |message: &Message| String::from_utf8_lossy(&message.payload).into_owned();
    let outcome = |accepted: &Accepted| match accepted {
        Accepted::Keep(message) => text(message),
        Accepted::Seal { delivered, kept } => format!("{} sealed {}", text(delivered), text(kept)),
        Accepted::Discard(reason) => format!("{:02X}", reason.0),
    };
    accepted.iter().map(outcome).collect()
}

/// Notes what plugins ask of the broker.
#[derive(Default)]
struct Notes(Mutex<Vec<String>>);

impl Notes {
    fn add(&self, line: String) {
        self.0.lock().unwrap().push(line);
    }

    fn await_line(&self, line: &str) {
        let begun = Instant::now();
        while !self.0.lock().unwrap().iter().any(|other| other == line) {
            assert!(begun.elapsed() < Duration::from_secs(20), "{line:?} is not in {:?}", self.0.lock().unwrap());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Port for Notes {
    fn publish(&self, message: Outgoing) -> Result<(), Refusal> {
        self.add(format!("publish {} {}", message.topic, String::from_utf8_lossy(&message.payload)));
        Ok(())
    }
    fn disconnect(&self, client_id: &str, reason: ReasonCode) {
        self.add(format!("disconnect {client_id} {:02X}", reason.0));
    }
    fn ban(&self, pattern: BanPattern, seconds: u32, note: &str) -> Result<(), Refusal> {
        self.add(format!("ban {pattern:?} {seconds} {note}"));
        Ok(())
    }
    fn plugins_changed(&self) {}
    fn revoke(&self, client_id: Option<&str>) {
        self.add(format!("revoke {client_id:?}"));
    }
}

fn attach(broker: &Broker) -> Arc<Notes> {
    let notes = Arc::new(Notes::default());
    broker.host.attach(Arc::clone(&notes) as Arc<dyn Port>);
    notes
}

#[test]
fn decisions_come_with_leases() {
    let broker = Broker::start(vec![probe(&[("ttl", "30")])]);
    assert!(broker.shard.has_acl());
    let allowed = publish_to(&broker, "a/b");
    assert_eq!(allowed.verdict, Some(Verdict::Allow));
    let lease = allowed.lease.expect("a lease");
    assert_eq!((lease.seconds, lease.scope.as_ref().map(Filter::as_str)), (30, Some("a/#")));
    let denied = publish_to(&broker, "a/secret");
    assert_eq!((denied.verdict, denied.failed), (Some(NOT_AUTHORIZED), false));
    let both = [access(Action::Publish, "a/x"), access(Action::Subscribe, "secret/#")];
    let verdicts: Vec<_> = authorize(&broker, "c", &both).into_iter().map(|decision| decision.verdict).collect();
    assert_eq!(verdicts, [Some(Verdict::Allow), Some(NOT_AUTHORIZED)]);
}

/// A decision holds no further than its plugin is asked, and not where one before it may say otherwise.
#[test]
fn a_lease_reaches_no_further_than_its_plugin() {
    let scope = |broker: &Broker| {
        let lease = publish_to(broker, "a/b").lease.expect("a lease");
        lease.scope.map(|scope| scope.to_string())
    };
    let topics = |topics: &[&str]| topics.iter().map(|topic| Filter::parse(topic).unwrap()).collect::<Vec<_>>();
    let of_branch = PluginConfig { topics: topics(&["a/b"]), ..probe(&[]) };
    assert_eq!(scope(&Broker::start(vec![of_branch])), None, "a/# is more than it is asked about");
    let before = |of: &[&str]| PluginConfig {
        topics: topics(of),
        name: "before".into(),
        order: -1,
        ..probe(&[("acl", "next")])
    };
    assert_eq!(scope(&Broker::start(vec![before(&["+/c"]), probe(&[])])), None, "it may prohibit a/c");
    assert_eq!(scope(&Broker::start(vec![before(&["b/#"]), probe(&[])])), Some("a/#".into()));
}

#[test]
fn the_first_opinion_counts_and_scopes_say_who_is_asked() {
    let named = |name: &str, order, settings: &[(&str, &str)]| {
        let config = PluginConfig { order, ..probe(settings) };
        PluginConfig { name: name.into(), ..config }
    };
    let broker = Broker::start(vec![named("second", 2, &[("acl", "deny")]), named("first", 1, &[("acl", "next")])]);
    assert_eq!(publish_to(&broker, "a").verdict, Some(NOT_AUTHORIZED));
    let silent = Broker::start(vec![named("only", 1, &[("acl", "next")])]);
    assert_eq!(publish_to(&silent, "a").verdict, None, "nobody granted it");

    let topics = vec![Filter::parse("a/#").unwrap()];
    let scoped = Broker::start(vec![PluginConfig { topics, ..probe(&[("acl", "deny")]) }]);
    assert_eq!(publish_to(&scoped, "a/x").verdict, Some(NOT_AUTHORIZED));
    assert_eq!(publish_to(&scoped, "b").verdict, Some(Verdict::Allow), "nobody is responsible for it");
    let wide = authorize(&scoped, "c", &[access(Action::Subscribe, "#")]).remove(0);
    assert_eq!(wide.verdict, Some(NOT_AUTHORIZED), "it overlaps");
    let elsewhere = vec!["mqtt://0.0.0.0:1883".to_owned()];
    let other = Broker::start(vec![PluginConfig { listeners: elsewhere, ..probe(&[("acl", "deny")]) }]);
    assert_eq!(publish_to(&other, "a/x").verdict, Some(Verdict::Allow));
}

#[test]
fn on_error_decides_about_accesses_when_there_is_no_answer() {
    for (on_error, expected) in [
        (OnError::Deny, Some(NOT_AUTHORIZED)),
        (OnError::Retry, Some(NOT_AUTHORIZED)),
        (OnError::Allow, Some(Verdict::Allow)),
        (OnError::Skip, None),
    ] {
        for what in ["trap", "fail"] {
            let broker = Broker::start(vec![PluginConfig { on_error, ..probe(&[]) }]);
            let decision = publish_to(&broker, what);
            let decision = if what == "fail" { publish_to(&broker, "x/fail") } else { decision };
            assert_eq!(
                (decision.verdict, decision.lease, decision.failed),
                (expected, None, true),
                "{on_error:?} {what}"
            );
            assert_eq!(authorize(&broker, "other", &[access(Action::Publish, "a")])[0].verdict, Some(Verdict::Allow));
        }
    }
}

#[test]
fn messages_are_replaced_and_discarded_and_only_wanted_ones_are_shown() {
    let broker = Broker::start(vec![probe(&[("filters", "a/# b/+"), ("before", "true")])]);
    assert_ne!(broker.shard.interest("a/x").before, 0);
    assert_eq!(broker.shard.interest("c/upper").before, 0);
    assert_eq!(broker.shard.interest("a/x").committed, 0);
    let messages = [("a/upper", "one"), ("a/plain", "two"), ("b/discard", "three"), ("c/upper", "four")];
    assert_eq!(before_store(&broker, &messages), ["ONE", "two", "97", "four"]);
}

#[test]
fn a_form_for_the_store_alone_comes_back_through_after_load() {
    let settings = [("filters", "#"), ("before", "true"), ("at_rest", "true"), ("rewrite", "true")];
    let broker = Broker::start(vec![probe(&settings)]);
    assert_eq!(before_store(&broker, &[("a", "abc")]), ["abc sealed cba"]);
    let sealed = submission(&broker, "", "a", "cba");
    let opened = broker.run(broker.shard.after_load(vec![sealed]));
    assert!(matches!(&opened[..], [Accepted::Keep(message)] if &message.payload[..] == b"abc"), "{opened:?}");
}

/// One message that breaks the plugin costs no other of its batch.
#[test]
fn a_poisonous_message_is_alone() {
    let limits = PluginLimits { hook_cpu_ms: 100, ..PluginLimits::default() };
    for poison in ["trap", "loop", "memory", "recurse", "big", "fail"] {
        let poison = format!("a/{poison}");
        let messages = [("a/upper", "one"), (poison.as_str(), "x"), ("a/upper", "two")];
        let settings = [("filters", "a/#"), ("before", "true")];
        let broker = Broker::start(vec![PluginConfig { limits, ..probe(&settings) }]);
        assert_eq!(before_store(&broker, &messages), ["ONE", "83", "TWO"], "{poison}");
        let on_error = OnError::Allow;
        let lenient = Broker::start(vec![PluginConfig { limits, on_error, ..probe(&settings) }]);
        assert_eq!(before_store(&lenient, &messages), ["ONE", "x", "TWO"], "{poison}");
    }
}

#[test]
fn kept_messages_are_handed_over_until_the_plugin_takes_them() {
    let broker = Broker::start(vec![probe(&[("filters", "a/#"), ("committed", "true")])]);
    let notes = attach(&broker);
    // It refuses the first batch once.
    broker.shard.committed(vec![submission(&broker, "c", "a/not-yet", "one"), submission(&broker, "c", "a/2", "two")]);
    notes.await_line("publish committed/a/2 two");
    let lines = notes.0.lock().unwrap().clone();
    assert_eq!(lines, ["publish committed/a/not-yet one", "publish committed/a/2 two"]);
    broker.wait("the cursor is behind them", |broker| broker.status("probe").unwrap().feed_waiting == 0);
}

/// As with `rm` and `cp`, or an entry that is taken out for a while: the store has them, but nobody reads it again before
/// the next start.
#[test]
fn messages_wait_for_a_plugin_that_is_gone_for_a_while() {
    let settings = [("filters", "a/#"), ("committed", "true")];
    let away = probe(&[&settings[..], &[("committed_fails", "true")]].concat());
    let broker = Broker::start(vec![away]);
    let notes = attach(&broker);
    let payloads = ["one", "two", "three"];
    broker.shard.committed(payloads.iter().map(|payload| submission(&broker, "c", "a/b", payload)).collect());
    broker.shard.interest_changed("a/#", true);
    broker.wait("it was asked", |broker| broker.status("probe").unwrap().calls >= 2);
    for _ in 0..2 {
        broker.host.reconfigure(Vec::new()).expect("it goes");
        assert!(broker.status("probe").is_none());
        // Its tasks end.
        std::thread::sleep(Duration::from_millis(300));
        broker.host.reconfigure(vec![probe(&settings)]).expect("it is there again");
    }
    notes.await_line("publish committed/a/b three");
    let lines = notes.0.lock().unwrap().clone();
    assert_eq!(lines, payloads.map(|payload| format!("publish committed/a/b {payload}")), "each once, in order");
    broker.shard.committed(vec![submission(&broker, "c", "a/b", "four")]);
    notes.await_line("publish committed/a/b four");
    let calls = broker.status("probe").unwrap().calls;
    broker.shard.interest_changed("b/#", true);
    broker.wait("it was told", |broker| broker.status("probe").unwrap().calls > calls);
}

/// It may wait for a minute until it asks again, and has an instance meanwhile.
#[test]
fn nobody_waits_for_a_plugin_that_takes_no_messages() {
    let settings = [("filters", "a/#"), ("committed", "true"), ("committed_fails", "true")];
    let broker = Broker::start(vec![probe(&settings)]);
    broker.shard.committed(vec![submission(&broker, "c", "a/b", "one")]);
    broker.wait("pauses are long", |broker| broker.status("probe").unwrap().failures >= 6);
    let Broker { host, shard, .. } = broker;
    drop(shard);
    let begun = Instant::now();
    host.stop();
    assert!(begun.elapsed() < Duration::from_millis(1500), "{:?}", begun.elapsed());
}

#[test]
fn events_are_told_and_answered() {
    let broker = Broker::start(vec![probe(&[("events", "client-connected subscribed")])]);
    let notes = attach(&broker);
    let wanted = broker.shard.wanted_events();
    assert_eq!(wanted, EventKind::ClientConnected.bit() | EventKind::Subscribed.bit());
    let event =
        |kind, filter: &str| Event { kind, at_ms: 0, client: client("c"), fields: vec![("filter", filter.to_owned())] };
    let filters = ["kick/me", "ban/me", "revoke/me"].map(|filter| event(EventKind::Subscribed, filter));
    broker.shard.observe(vec![event(EventKind::ClientConnected, ""), event(EventKind::ClientDisconnected, "")]);
    broker.shard.observe(filters.to_vec());
    for line in [
        "publish event/client-connected c",
        "publish event/subscribed c",
        "disconnect c 98",
        "ban ClientId(\"c\") 60 as told",
        "revoke Some(\"c\")",
    ] {
        notes.await_line(line);
    }
    assert!(!notes.0.lock().unwrap().iter().any(|line| line.contains("disconnected")), "not registered for");
}

#[test]
fn changes_of_interest_are_told() {
    let broker = Broker::start(vec![probe(&[])]);
    assert!(broker.shard.wants_interest());
    broker.shard.interest_changed("a/#", true);
    broker.wait("it was told", |broker| broker.status("probe").unwrap().calls == 1);
    assert_eq!(broker.status("probe").unwrap().failures, 0);
}

#[test]
fn what_is_not_granted_is_refused_at_load_by_its_name() {
    let granted = everything_granted();
    for (grants, missing) in [
        (Grants { publish: Vec::new(), ..granted.clone() }, "`publish`"),
        (Grants { disconnect: false, ..granted.clone() }, "`disconnect`"),
        (Grants { ban: false, ..granted.clone() }, "`ban`"),
        (Grants { revoke: false, ..granted }, "`revoke`"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let refused = Broker::try_start(folder, vec![PluginConfig { grants, ..probe(&[]) }]).err().expect("is refused");
        assert!(refused.to_string().contains(missing), "{refused}");
    }
}

#[test]
fn topics_outside_the_grant_are_denied() {
    let publish = vec![Filter::parse("committed/a/yes").unwrap()];
    let grants = Grants { publish, ..everything_granted() };
    let settings = [("filters", "a/#"), ("committed", "true")];
    let broker = Broker::start(vec![PluginConfig { grants, ..probe(&settings) }]);
    let notes = attach(&broker);
    broker.shard.committed(vec![submission(&broker, "c", "a/no", "x"), submission(&broker, "c", "a/yes", "x")]);
    notes.await_line("publish committed/a/yes x");
    assert_eq!(notes.0.lock().unwrap().len(), 1);
}

/// A flood is cut off by the host, not by the operator's disk or the broker's memory.
#[test]
fn floods_are_bounded() {
    let limits = PluginLimits { hook_cpu_ms: 2000, ..PluginLimits::default() };
    let broker = Broker::start(vec![PluginConfig { limits, ..probe(&[]) }]);
    let notes = attach(&broker);
    let begun = Instant::now();
    assert_eq!(publish_to(&broker, "a/storm").verdict, Some(Verdict::Allow));
    let seconds = 1 + usize::try_from(begun.elapsed().as_secs()).unwrap();
    let published = notes.0.lock().unwrap().len();
    assert!((1000..=1000 * seconds).contains(&published), "host_calls_per_sec: {published} in {seconds} s");
    publish_to(&broker, "a/metrics");
    let status = broker.status("probe").unwrap();
    assert_eq!(status.metrics.len(), 200);
    assert!(status.metrics_lost >= 99_000, "{}", status.metrics_lost);
    assert_eq!(publish_to(&broker, "a/plain").verdict, Some(Verdict::Allow));
}
