//! Permissions: what plugins decide is asked once and kept as a lease; what they take back ends.
#![allow(missing_docs, reason = "tests")]

mod common;

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Poll, Waker};

use wasmqtt_protocol::access::{Action, Decision, Lease, Rule, Verdict};
use wasmqtt_protocol::codec::ReasonCode;
use wasmqtt_protocol::ports::{
    Access, AuthOutcome, AuthRequest, AuthStep, Call, Client, Grant, Memory, Plugins, ShardPlugins,
};
use wasmqtt_protocol::topic::Filter;

use self::common::{Broker, CONNACK, PUBACK, PUBLISH, SUBACK};

/// Allows what does not contain "secret", for a minute and everything below the first level.
#[derive(Default)]
struct Policy {
    asked: AtomicUsize,
    epoch: AtomicU64,
    /// Nothing is allowed any more.
    closed: AtomicBool,
    /// What begins with it is not allowed; empty: nothing is meant.
    denied: Mutex<String>,
    /// The plugin cannot answer.
    broken: AtomicBool,
    /// Decisions hold for what was asked, once.
    once: AtomicBool,
    /// Calls wait a moment, as those do that compute for long.
    late: AtomicBool,
    /// Calls wait for [`Policy::answer`].
    slow: AtomicBool,
    waiting: Mutex<Vec<Waker>>,
    rules: Vec<Rule>,
}

impl Policy {
    fn answer(&self) {
        self.slow.store(false, Ordering::SeqCst);
        for waker in self.waiting.lock().unwrap().drain(..) {
            waker.wake();
        }
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }

    fn decide(&self, access: &Access) -> Decision {
        if self.broken.load(Ordering::SeqCst) {
            let verdict = Some(Verdict::Deny(ReasonCode::NOT_AUTHORIZED));
            return Decision { verdict, lease: None, failed: true };
        }
        let denied = self.denied.lock().unwrap();
        let denied = !denied.is_empty() && access.topic.starts_with(&**denied);
        let allowed = !access.topic.contains("secret") && !self.closed.load(Ordering::SeqCst) && !denied;
        let first = access.topic.split('/').next().unwrap();
        let scope = allowed.then(|| Filter::parse(&format!("{first}/#")).unwrap());
        let verdict = if allowed { Verdict::Allow } else { Verdict::Deny(ReasonCode::NOT_AUTHORIZED) };
        if self.once.load(Ordering::SeqCst) {
            return Decision { verdict: Some(verdict), lease: None, failed: false };
        }
        Decision { verdict: Some(verdict), lease: Some(Lease { scope, seconds: 60 }), failed: false }
    }
}

struct Port(Arc<Policy>);

impl Plugins for Port {
    fn shard(&self, _index: usize) -> Box<dyn ShardPlugins> {
        Box::new(Port(Arc::clone(&self.0)))
    }
}

impl ShardPlugins for Port {
    fn has_auth(&self) -> bool {
        !self.0.rules.is_empty()
    }
    fn authenticate(&self, _request: Arc<AuthRequest>) -> Call<AuthOutcome> {
        let grant = Grant { rules: self.0.rules.clone(), complete: true, ..Grant::default() };
        Box::pin(std::future::ready(AuthOutcome::Allow(grant)))
    }
    fn proceed(&self, _step: AuthStep) -> Call<AuthOutcome> {
        Box::pin(std::future::ready(AuthOutcome::Next))
    }
    fn has_acl(&self) -> bool {
        true
    }
    fn epoch(&self) -> (u64, u64) {
        let epoch = self.0.epoch.load(Ordering::SeqCst);
        (epoch, epoch)
    }
    fn authorize(&self, client: Arc<Client>, accesses: Arc<[Access]>) -> Call<Vec<Decision>> {
        assert!(!client.client_id.is_empty());
        let policy = Arc::clone(&self.0);
        policy.asked.fetch_add(accesses.len(), Ordering::SeqCst);
        let mut late = policy.late.load(Ordering::SeqCst);
        Box::pin(std::future::poll_fn(move |context| {
            if std::mem::take(&mut late) {
                context.waker().wake_by_ref();
                return Poll::Pending;
            }
            if policy.slow.load(Ordering::SeqCst) {
                policy.waiting.lock().unwrap().push(context.waker().clone());
                return Poll::Pending;
            }
            Poll::Ready(accesses.iter().map(|access| policy.decide(access)).collect())
        }))
    }
}

fn start(policy: Policy) -> (Broker, Arc<Policy>) {
    let policy = Arc::new(policy);
    (Broker::start(Arc::new(Port(Arc::clone(&policy))), Arc::new(Memory)), policy)
}

fn connect(broker: &Broker, client_id: &str) -> common::Client {
    let mut client = broker.connect(client_id, true);
    client.expect(CONNACK);
    client
}

#[test]
fn a_lease_keeps_the_plugin_out_of_the_message_path() {
    let (broker, policy) = start(Policy::default());
    let mut subscriber = connect(&broker, "subscriber");
    subscriber.subscribe("a/#", 1);
    assert_eq!(subscriber.expect(SUBACK)[2], 1);
    let mut publisher = connect(&broker, "publisher");
    let before = policy.asked();
    for n in 0..100 {
        publisher.publish(&format!("a/{}", n % 10), 1, false);
        publisher.expect(PUBACK);
        subscriber.expect(PUBLISH);
    }
    assert_eq!(policy.asked() - before, 1, "one lease covers all of a/#");
}

/// [MQTT-3.3.5-2] of MQTT 3.1.1: what is not allowed is acknowledged and not delivered.
#[test]
fn what_is_denied_is_not_delivered_and_others_go_on() {
    let (broker, policy) = start(Policy::default());
    let mut subscriber = connect(&broker, "subscriber");
    subscriber.subscribe("secret/#", 0);
    assert_eq!(subscriber.expect(SUBACK)[2], 0x80);
    subscriber.subscribe("$share/group/secret/x", 0);
    assert_eq!(subscriber.expect(SUBACK)[2], 0x80, "the filter behind the ShareName counts");
    subscriber.subscribe("a/#", 0);
    assert_eq!(subscriber.expect(SUBACK)[2], 0);
    let mut publisher = connect(&broker, "publisher");
    publisher.publish("a/secret", 1, false);
    publisher.expect(PUBACK);
    publisher.publish("a/plain", 1, false);
    publisher.expect(PUBACK);
    let got = subscriber.expect(PUBLISH);
    assert!(got.windows(7).any(|window| window == b"a/plain"), "{got:?}");
    let before = policy.asked();
    publisher.publish("a/secret", 1, false);
    publisher.expect(PUBACK);
    assert_eq!(policy.asked(), before, "a prohibition is leased, too");
}

/// Packets behind the one that is asked about keep their order, and other clients do not wait.
#[test]
fn a_slow_plugin_holds_up_its_own_client_only() {
    let (broker, policy) = start(Policy::default());
    let mut subscriber = connect(&broker, "subscriber");
    subscriber.subscribe("a/#", 0);
    subscriber.expect(SUBACK);
    policy.slow.store(true, Ordering::SeqCst);
    let mut publisher = connect(&broker, "publisher");
    for n in 0..3 {
        publisher.publish(&format!("a/{n}"), 1, false);
    }
    publisher.subscribe("b", 0);
    publisher.expect_silence();
    subscriber.ping();
    policy.answer();
    for _ in 0..3 {
        publisher.expect(PUBACK);
    }
    publisher.expect(SUBACK);
    for n in 0..3_u8 {
        let got = subscriber.expect(PUBLISH);
        assert_eq!(got[4], b'0' + n, "{got:?}");
    }
}

/// Whether the answer came at once or late: what was said without a lease holds for one packet.
#[test]
fn what_is_said_once_holds_once() {
    let (broker, policy) = start(Policy::default());
    policy.once.store(true, Ordering::SeqCst);
    let mut publisher = connect(&broker, "publisher");
    for late in [false, true] {
        policy.late.store(late, Ordering::SeqCst);
        let before = policy.asked();
        for _ in 0..5 {
            publisher.publish("a/x", 1, false);
            publisher.expect(PUBACK);
        }
        assert_eq!(policy.asked() - before, 5, "late: {late}");
    }
}

#[test]
fn a_client_that_leaves_while_plugins_think_is_forgotten() {
    let (broker, policy) = start(Policy::default());
    policy.slow.store(true, Ordering::SeqCst);
    let mut gone = connect(&broker, "gone");
    gone.publish("a/x", 1, false);
    gone.expect_silence();
    drop(gone);
    let mut other = connect(&broker, "other");
    other.ping();
    policy.answer();
    other.publish("a/x", 1, false);
    other.expect(PUBACK);
}

#[test]
fn replaced_plugins_are_asked_again_and_subscriptions_they_deny_end() {
    let (broker, policy) = start(Policy::default());
    let mut subscriber = connect(&broker, "subscriber");
    subscriber.subscribe("a/#", 0);
    subscriber.expect(SUBACK);
    let mut publisher = connect(&broker, "publisher");
    publisher.publish("a/1", 1, false);
    publisher.expect(PUBACK);
    subscriber.expect(PUBLISH);
    let asked = policy.asked();
    policy.closed.store(true, Ordering::SeqCst);
    policy.epoch.fetch_add(1, Ordering::SeqCst);
    // Asked again within a second: once for the subscription, once for the publisher's topic.
    let until = std::time::Instant::now() + std::time::Duration::from_secs(10);
    publisher.publish("a/2", 1, false);
    publisher.expect(PUBACK);
    while policy.asked() < asked + 2 && std::time::Instant::now() < until {
        publisher.ping();
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    assert_eq!(policy.asked(), asked + 2);
    policy.closed.store(false, Ordering::SeqCst);
    let mut third = connect(&broker, "third");
    third.publish("a/3", 1, false);
    third.expect(PUBACK);
    subscriber.expect_silence();
}

#[test]
fn rules_from_authentication_are_evaluated_without_any_plugin() {
    let rule = |action, filter, allow| Rule { action, filter: Filter::parse(filter).unwrap(), allow };
    let rules = vec![rule(Some(Action::Publish), "up/#", true), rule(Some(Action::Subscribe), "down/+", true)];
    let (broker, policy) = start(Policy { rules, ..Policy::default() });
    let mut client = connect(&broker, "client");
    for (filter, code) in [("down/x", 0), ("down/#", 0x80), ("up/x", 0x80), ("#", 0x80)] {
        client.subscribe(filter, 0);
        assert_eq!(client.expect(SUBACK)[2], code, "{filter}");
    }
    client.publish("down/x", 1, false);
    client.expect(PUBACK);
    client.expect_silence();
    assert_eq!(policy.asked(), 0);
}

/// A Session that is left while messages wait for it.
fn leave_with_queue(broker: &Broker, filters: &[&str], topics: &[&str]) {
    let mut client = broker.connect("keeper", false);
    client.expect(CONNACK);
    for filter in filters {
        client.subscribe(filter, 1);
        assert_eq!(client.expect(SUBACK)[2], 1, "{filter}");
    }
    client.send(0xe0, &[]);
    assert!(client.is_closed());
    let mut publisher = connect(broker, "publisher");
    for topic in topics {
        publisher.publish(topic, 1, false);
        publisher.expect(PUBACK);
    }
}

fn topic(body: &[u8]) -> String {
    let length = usize::from(u16::from_be_bytes([body[0], body[1]]));
    String::from_utf8(body[2..2 + length].to_vec()).unwrap()
}

/// With a store in which messages wait, and without.
fn stores() -> Vec<(Arc<dyn wasmqtt_protocol::ports::Store>, Option<tempfile::TempDir>)> {
    let folder = tempfile::tempdir().unwrap();
    let kept = wasmqtt_store::RocksStore::open(wasmqtt_store::StoreConfig::new(folder.path())).unwrap();
    vec![(Arc::new(Memory), None), (kept, Some(folder))]
}

/// What waited in the queue is asked about before it leaves: nothing is read that the client may not read by now.
/// MQTT 5.0 and 3.1.1 §3.10.4: a server may leave out what was buffered for a subscription that has ended.
#[test]
fn messages_that_waited_leave_only_if_they_may_still_be_read() {
    for (store, _folder) in stores() {
        let policy = Arc::new(Policy::default());
        let broker = Broker::start(Arc::new(Port(Arc::clone(&policy))), store);
        leave_with_queue(&broker, &["a/#", "b/#"], &["a/1", "b/1", "a/2", "b/2"]);
        *policy.denied.lock().unwrap() = "a/".into();
        let mut client = broker.connect("keeper", false);
        assert_eq!(client.expect(CONNACK)[0], 1, "the Session is there");
        assert_eq!([client.expect(PUBLISH), client.expect(PUBLISH)].map(|body| topic(&body)), ["b/1", "b/2"]);
        client.expect_silence();
        let mut publisher = connect(&broker, "publisher");
        publisher.publish("a/3", 1, false);
        client.expect_silence();
    }
}

/// While plugins think about it, nothing leaves, the CONNACK neither; then everything does.
#[test]
fn a_resumed_session_waits_for_the_answer_of_plugins() {
    for (store, _folder) in stores() {
        let policy = Arc::new(Policy::default());
        let broker = Broker::start(Arc::new(Port(Arc::clone(&policy))), store);
        leave_with_queue(&broker, &["a/#"], &["a/1"]);
        policy.slow.store(true, Ordering::SeqCst);
        let mut client = broker.connect("keeper", false);
        client.publish("b/x", 1, false);
        client.expect_silence();
        policy.answer();
        assert_eq!(client.expect(CONNACK)[0], 1);
        let mut seen = vec![client.next(std::time::Duration::from_secs(10)).expect("an answer").0];
        seen.push(client.next(std::time::Duration::from_secs(10)).expect("an answer").0);
        seen.sort_unstable();
        assert_eq!(seen, [PUBLISH, PUBACK], "what waited, and what the client sent meanwhile");
    }
}

/// A plugin that cannot answer costs a client neither its subscriptions nor what waits: it comes when it can.
#[test]
fn messages_wait_until_a_plugin_can_answer() {
    let (broker, policy) = start(Policy::default());
    leave_with_queue(&broker, &["a/#"], &["a/1"]);
    policy.broken.store(true, Ordering::SeqCst);
    let mut client = broker.connect("keeper", false);
    assert_eq!(client.expect(CONNACK)[0], 1);
    client.expect_silence();
    client.ping();
    policy.broken.store(false, Ordering::SeqCst);
    assert_eq!(topic(&client.expect(PUBLISH)), "a/1");
}

/// A client that leaves before its CONNACK has lost nothing.
#[test]
fn a_client_that_leaves_while_plugins_think_finds_its_messages_later() {
    let (broker, policy) = start(Policy::default());
    leave_with_queue(&broker, &["a/#"], &["a/1"]);
    policy.slow.store(true, Ordering::SeqCst);
    let mut client = broker.connect("keeper", false);
    client.expect_silence();
    drop(client);
    policy.answer();
    let mut client = broker.connect("keeper", false);
    assert_eq!(client.expect(CONNACK)[0], 1);
    assert_eq!(topic(&client.expect(PUBLISH)), "a/1");
}
