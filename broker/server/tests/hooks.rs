//! Storage hooks and watchers: what they see, in which order, and what they can do to a message.
#![allow(missing_docs, reason = "tests")]

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use wasmqtt_protocol::access::{Decision, Verdict};
use wasmqtt_protocol::codec::{Qos, ReasonCode};
use wasmqtt_protocol::ports::{
    Accepted, Access, AuthOutcome, AuthRequest, AuthStep, BanPattern, Broker as Port, Call, Client, Event, Interest,
    Memory, Outgoing, Plugins, Refusal, ShardPlugins, Store, Submission,
};
use wasmqtt_protocol::router::Message;

use self::common::store::Slow;
use self::common::{Broker, CONNACK, PINGRESP, PUBACK, PUBCOMP, PUBLISH, PUBREC, PUBREL, SUBACK};

/// Upper-cases `up/…`, refuses `no/…`, watches everything below `seen/`, in batches that wait while it is slow.
#[derive(Default)]
struct Hook {
    slow: AtomicBool,
    /// While it is slow, it is so for batches with such topics only.
    slow_for: Mutex<&'static str>,
    waiting: Mutex<Vec<Waker>>,
    batches: Mutex<Vec<usize>>,
    /// Topics and publishers of what it was shown.
    shown: Mutex<Vec<String>>,
    /// Has to be asked what clients may do, and allows everything.
    has_acl: AtomicBool,
    committed: Mutex<Vec<String>>,
    events: Mutex<Vec<String>>,
    broker: Mutex<Option<Arc<dyn Port>>>,
}

impl Hook {
    fn answer(&self) {
        self.slow.store(false, Ordering::SeqCst);
        self.waiting.lock().unwrap().drain(..).for_each(Waker::wake);
    }

    fn broker(&self) -> Arc<dyn Port> {
        self.broker.lock().unwrap().clone().expect("attached at the start")
    }
}

fn decide(sent: Submission) -> Accepted {
    let message = sent.message;
    if message.topic.starts_with("no/") {
        return Accepted::Discard(ReasonCode::QUOTA_EXCEEDED);
    }
    if !message.topic.starts_with("up/") {
        return Accepted::Keep(message);
    }
    let payload = Bytes::from(message.payload.to_ascii_uppercase());
    Accepted::Keep(Arc::new(Message { payload, ..(*message).clone() }))
}

fn line(sent: &Submission) -> String {
    let publisher = sent.client.as_ref().map_or("-", |client| &client.client_id);
    format!("{} {publisher}", sent.message.topic)
}

struct Plug(Arc<Hook>);

impl Plugins for Plug {
    fn attach(&self, broker: Arc<dyn Port>) {
        *self.0.broker.lock().unwrap() = Some(broker);
    }
    fn shard(&self, _index: usize) -> Box<dyn ShardPlugins> {
        Box::new(Plug(Arc::clone(&self.0)))
    }
}

impl ShardPlugins for Plug {
    fn has_auth(&self) -> bool {
        false
    }
    fn authenticate(&self, _request: Arc<AuthRequest>) -> Call<AuthOutcome> {
        Box::pin(std::future::ready(AuthOutcome::Next))
    }
    fn proceed(&self, _step: AuthStep) -> Call<AuthOutcome> {
        Box::pin(std::future::ready(AuthOutcome::Next))
    }
    fn has_acl(&self) -> bool {
        self.0.has_acl.load(Ordering::SeqCst)
    }
    fn authorize(&self, _client: Arc<Client>, accesses: Arc<[Access]>) -> Call<Vec<Decision>> {
        let allowed = |_: &Access| Decision { verdict: Some(Verdict::Allow), ..Decision::default() };
        Box::pin(std::future::ready(accesses.iter().map(allowed).collect()))
    }
    fn interest(&self, topic: &str) -> Interest {
        let before = u64::from(topic.starts_with("up/") || topic.starts_with("no/") || topic.starts_with("seen/"));
        Interest { before, committed: u64::from(topic.starts_with("seen/")) }
    }
    fn before_store(&self, messages: Vec<Submission>) -> Call<Vec<Accepted>> {
        self.0.batches.lock().unwrap().push(messages.len());
        self.0.shown.lock().unwrap().extend(messages.iter().map(line));
        let hook = Arc::clone(&self.0);
        let slow_for = *hook.slow_for.lock().unwrap();
        let may_wait = messages.iter().any(|sent| sent.message.topic.starts_with(slow_for));
        let mut messages = Some(messages);
        Box::pin(std::future::poll_fn(move |context| {
            if may_wait && hook.slow.load(Ordering::SeqCst) {
                hook.waiting.lock().unwrap().push(context.waker().clone());
                return Poll::Pending;
            }
            Poll::Ready(messages.take().unwrap_or_default().into_iter().map(decide).collect())
        }))
    }
    fn committed(&self, messages: Vec<Submission>) {
        self.0.committed.lock().unwrap().extend(messages.iter().map(line));
    }
    fn wanted_events(&self) -> u32 {
        u32::MAX
    }
    fn observe(&self, events: Vec<Event>) {
        let line = |event: Event| format!("{} {}", event.kind.name(), event.client.client_id);
        self.0.events.lock().unwrap().extend(events.into_iter().map(line));
    }
}

fn start() -> (Broker, Arc<Hook>) {
    start_with(Hook::default(), Arc::new(Memory))
}

fn start_with(hook: Hook, store: Arc<dyn Store>) -> (Broker, Arc<Hook>) {
    let hook = Arc::new(hook);
    (Broker::start(Arc::new(Plug(Arc::clone(&hook))), store), hook)
}

fn subscriber(broker: &Broker) -> common::Client {
    let mut client = broker.connect("subscriber", true);
    client.expect(CONNACK);
    client.subscribe("#", 1);
    client.expect(SUBACK);
    client
}

fn settles<T: PartialEq + std::fmt::Debug>(what: impl Fn() -> T, expected: T) {
    let until = Instant::now() + Duration::from_secs(10);
    while what() != expected && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(what(), expected);
}

#[test]
fn messages_are_replaced_and_discarded_and_keep_their_order() {
    let (broker, hook) = start();
    let mut subscriber = subscriber(&broker);
    let mut publisher = broker.connect("publisher", true);
    publisher.expect(CONNACK);
    hook.slow.store(true, Ordering::SeqCst);
    for topic in ["up/1", "plain", "no/2", "up/3"] {
        publisher.publish(topic, 1, false);
    }
    publisher.expect_silence();
    subscriber.ping();
    hook.answer();
    for _ in 0..4 {
        publisher.expect(PUBACK);
    }
    for (topic, payload) in [("up/1", b'X'), ("plain", b'x'), ("up/3", b'X')] {
        let got = subscriber.expect(PUBLISH);
        assert_eq!(&got[2..2 + topic.len()], topic.as_bytes());
        assert_eq!(got.last(), Some(&payload));
    }
    subscriber.expect_silence();
    assert!(hook.batches.lock().unwrap().len() <= 4);
}

/// A store with a Session that waits for `up/#` with QoS 2.
fn start_durable() -> (Broker, Arc<Hook>, Slow) {
    let store = Slow::at_once();
    let (broker, hook) = start_with(Hook::default(), Arc::new(store.clone()));
    let mut away = broker.connect("away", false);
    away.expect(CONNACK);
    away.subscribe("up/#", 2);
    away.expect(SUBACK);
    away.send(0xe0, &[]);
    settles(|| store.was_told("closed away"), true);
    (broker, hook, store)
}

/// A crash in between must leave both or neither: otherwise the client is told PUBREC for a message that nobody gets.
/// MQTT 5.0 §4.3.3 [MQTT-4.3.3-10].
#[test]
fn a_qos_2_message_and_its_identifier_reach_the_store_together_when_the_hook_has_answered() {
    let (broker, hook, store) = start_durable();
    let mut publisher = broker.connect("publisher", false);
    publisher.expect(CONNACK);
    store.take();
    hook.slow.store(true, Ordering::SeqCst);
    publisher.publish("up/1", 2, false);
    publisher.expect_silence();
    assert_eq!(store.take(), [""; 0], "nothing is acknowledged, nothing is stored");
    hook.answer();
    publisher.expect(PUBREC);
    let told = store.take_batches();
    let batch_of = |part: &str| told.iter().find(|(_, change)| change.contains(part)).map(|(batch, _)| *batch);
    assert!(batch_of("queued").is_some(), "{told:?}");
    assert_eq!(batch_of("queued"), batch_of("Received { packet_id: 7 }"), "{told:?}");
}

/// The client has no PUBREC so far and sends PUBLISH again: it is the same message, and is not acknowledged before it
/// was taken over. MQTT 5.0 §4.3.3 [MQTT-4.3.3-10], §4.4 [MQTT-4.4.0-1].
#[test]
fn a_qos_2_message_that_is_repeated_while_a_hook_thinks_is_taken_over_once() {
    for is_repeated_early in [true, false] {
        let (broker, hook, store) = start_durable();
        let mut publisher = broker.connect("publisher", false);
        publisher.expect(CONNACK);
        hook.slow.store(true, Ordering::SeqCst);
        publisher.publish("up/1", 2, false);
        publisher.expect_silence();
        drop(publisher);
        if !is_repeated_early {
            hook.answer();
        }
        let mut publisher = broker.connect("publisher", false);
        publisher.publish("up/1", 2, false);
        publisher.expect(CONNACK);
        if is_repeated_early {
            publisher.expect_silence();
            hook.answer();
        }
        publisher.expect(PUBREC);
        publisher.send(PUBREL | 2, &[0, 7]);
        publisher.expect(PUBCOMP);
        let told = store.take();
        let count = |part: &str| told.iter().filter(|change| change.contains(part)).count();
        assert_eq!((count("queued"), count(" Received {"), count("ReceivedDone")), (1, 1, 1), "{told:?}");
    }
}

/// One client's own messages keep their order; others do not wait for them.
#[test]
fn a_slow_message_holds_up_its_own_publisher_only() {
    let (broker, hook) = start();
    let mut subscriber = subscriber(&broker);
    *hook.slow_for.lock().unwrap() = "up/";
    hook.slow.store(true, Ordering::SeqCst);
    let mut slow = broker.connect("slow", true);
    slow.expect(CONNACK);
    slow.publish("up/1", 1, false);
    slow.publish("seen/own", 1, false);
    slow.expect_silence();
    let mut others = ["a", "b", "c"].map(|client_id| broker.connect(client_id, true));
    for other in &mut others {
        other.expect(CONNACK);
        for _ in 0..3 {
            other.publish("seen/other", 1, false);
            other.expect(PUBACK);
        }
    }
    for _ in 0..9 {
        subscriber.expect(PUBLISH);
    }
    slow.expect_silence();
    hook.answer();
    slow.expect(PUBACK);
    slow.expect(PUBACK);
    for topic in ["up/1", "seen/own"] {
        assert_eq!(&subscriber.expect(PUBLISH)[2..2 + topic.len()], topic.as_bytes());
    }
}

/// When a hook answers nobody, so many batches are under way; later messages wait for an answer, and their publishers are
/// not read from.
#[test]
fn batches_under_way_are_bounded() {
    const BATCHES_MAX: usize = 16;
    const PUBLISHERS: usize = 3 * BATCHES_MAX;
    let (broker, hook) = start();
    hook.slow.store(true, Ordering::SeqCst);
    let mut publishers: Vec<_> = (0..PUBLISHERS).map(|n| broker.connect(&format!("c{n}"), true)).collect();
    for (n, publisher) in publishers.iter_mut().enumerate() {
        publisher.expect(CONNACK);
        publisher.publish("up/1", 1, false);
        if n < BATCHES_MAX {
            settles(|| hook.batches.lock().unwrap().len(), n + 1);
        }
    }
    // All were read.
    publishers[PUBLISHERS - 1].expect_silence();
    for publisher in &mut publishers {
        publisher.send(0xc0, &[]);
    }
    publishers[0].expect_silence();
    assert_eq!(*hook.batches.lock().unwrap(), [1; BATCHES_MAX]);
    for publisher in &mut publishers {
        assert_eq!(publisher.next(Duration::from_millis(1)), None, "a publisher whose message waits is not read");
    }
    hook.answer();
    for publisher in &mut publishers {
        publisher.expect(PUBACK);
        publisher.expect(PINGRESP);
    }
    assert_eq!(hook.batches.lock().unwrap().iter().sum::<usize>(), PUBLISHERS, "each was shown once");
}

/// Also when an `acl` plugin had to be asked about it: hooks for some clients only must not miss it.
#[test]
fn a_will_is_shown_as_its_clients() {
    for has_acl in [false, true] {
        let (broker, hook) = start();
        hook.has_acl.store(has_acl, Ordering::SeqCst);
        drop(broker.connect_with_will("mortal", true, "seen/will"));
        settles(|| hook.shown.lock().unwrap().clone(), vec!["seen/will mortal".to_owned()]);
        settles(|| hook.committed.lock().unwrap().clone(), vec!["seen/will mortal".to_owned()]);
    }
}

/// A crash while a hook thinks must not lose it, nor may the next connection's will take its place. MQTT 5.0 §3.1.2.5.
#[test]
fn a_will_stays_in_the_store_until_hooks_have_answered() {
    let (broker, hook, store) = start_durable();
    hook.slow.store(true, Ordering::SeqCst);
    drop(broker.connect_with_will("mortal", false, "up/will"));
    settles(|| store.was_told("closed mortal 604800 with will"), true);
    let mut again = broker.connect("mortal", false);
    again.expect_silence();
    assert!(!store.was_told("queued"));
    store.take();
    hook.answer();
    again.expect(CONNACK);
    let told = store.take_batches();
    let batch_of = |part: &str| told.iter().find(|(_, change)| change.contains(part)).map(|(batch, _)| *batch);
    assert!(batch_of("queued").is_some(), "{told:?}");
    assert_eq!(batch_of("queued"), batch_of("closed mortal 604800"), "{told:?}");
    assert!(!told.iter().any(|(_, change)| change.contains("with will")), "{told:?}");
}

/// MQTT 5.0 §4.3.3: a QoS 2 message that is discarded is answered like any other, and its identifier is free again.
#[test]
fn a_publisher_that_leaves_is_forgotten_but_its_message_is_not() {
    let (broker, hook) = start();
    let mut subscriber = subscriber(&broker);
    hook.slow.store(true, Ordering::SeqCst);
    let mut publisher = broker.connect("publisher", true);
    publisher.expect(CONNACK);
    publisher.publish("up/1", 0, false);
    publisher.expect_silence();
    drop(publisher);
    subscriber.ping();
    hook.answer();
    assert_eq!(subscriber.expect(PUBLISH).last(), Some(&b'X'));
}

#[test]
fn what_is_kept_is_fed_in_order_and_plugins_do_not_see_their_own() {
    let (broker, hook) = start();
    let mut subscriber = subscriber(&broker);
    let mut publisher = broker.connect("publisher", true);
    publisher.expect(CONNACK);
    for n in 0..3 {
        publisher.publish(&format!("seen/{n}"), 0, false);
        subscriber.expect(PUBLISH);
    }
    let own = |origin| Outgoing {
        origin,
        topic: "seen/own".into(),
        payload: Bytes::from_static(b"x"),
        properties: Bytes::new(),
        qos: Qos::AtMostOnce,
        retain: false,
        expiry: None,
    };
    let port = hook.broker();
    let batches = hook.batches.lock().unwrap().len();
    port.publish(own(1)).unwrap();
    subscriber.expect(PUBLISH);
    assert_eq!(hook.batches.lock().unwrap().len(), batches, "not shown to the plugin that published it");
    port.publish(own(0)).unwrap();
    subscriber.expect(PUBLISH);
    let expected = ["seen/0 publisher", "seen/1 publisher", "seen/2 publisher", "seen/own -"];
    settles(|| hook.committed.lock().unwrap().clone(), expected.map(str::to_owned).to_vec());
    let wrong = port.publish(Outgoing { topic: "a/#".into(), ..own(0) });
    assert!(matches!(wrong, Err(Refusal::Invalid(_))), "{wrong:?}");
}

#[test]
fn watchers_are_told_what_happens() {
    let (broker, hook) = start();
    let mut client = subscriber(&broker);
    client.send(0xe0, &[]);
    let expected = ["client-connected", "subscribed", "client-disconnected", "session-ended"]
        .map(|kind| format!("{kind} subscriber"));
    settles(|| hook.events.lock().unwrap().clone(), expected.to_vec());
}

#[test]
fn watchers_are_told_what_a_client_misses() {
    let (broker, hook) = start();
    let mut away = broker.connect("away", false);
    away.expect(CONNACK);
    away.subscribe("a", 0);
    away.expect(SUBACK);
    away.send(0xe0, &[]);
    let mut publisher = broker.connect("publisher", true);
    publisher.expect(CONNACK);
    let has = |line: &str| hook.events.lock().unwrap().iter().any(|other| other == line);
    settles(|| has("client-disconnected away"), true);
    publisher.publish("a", 0, false);
    settles(|| has("message-dropped away"), true);
}

#[test]
fn plugins_disconnect_and_ban() {
    let (broker, hook) = start();
    let mut one = broker.connect("one", true);
    one.expect(CONNACK);
    let mut two = broker.connect("two", true);
    two.expect(CONNACK);
    let port = hook.broker();
    port.disconnect("one", ReasonCode::NOT_AUTHORIZED);
    assert!(one.is_closed());
    port.ban(BanPattern::ClientId("two".into()), 60, "test").unwrap();
    assert!(two.is_closed());
    let mut again = broker.connect("two", true);
    assert_eq!(again.expect(CONNACK), [0, 5], "not authorized, of MQTT 3.1.1");
    let mut other = broker.connect("three", true);
    assert_eq!(other.expect(CONNACK), [0, 0]);
    port.ban(BanPattern::ClientId("two".into()), 0, "").unwrap();
    let mut again = broker.connect("two", true);
    assert_eq!(again.expect(CONNACK), [0, 0]);
}
