//! What clients see of one shard, with time, plugins and store in the hands of the test.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::sync::Mutex;
use std::task::{Poll, Waker};

use bytes::Bytes;
use wasmqtt_protocol::access::{Decision, Lease, Verdict};
use wasmqtt_protocol::codec::{Qos, ReasonCode};
use wasmqtt_protocol::ports::{
    Accepted, Access, AuthOutcome, AuthRequest, AuthStep, BanPattern, Broker as _, Call, Client as Who, Grant,
    Interest, Memory, NoPlugins, Outgoing, Refusal, ShardPlugins, Submission,
};

use wasmqtt_protocol::session::QueuePolicy;

use self::store::Slow;
use super::*;
use crate::control::Control;
use crate::memory::Pressure;
use crate::{Anonymous, Identity, Limits, Listener};

#[path = "../../tests/common/store.rs"]
#[allow(dead_code, reason = "other tests use more of it")]
mod store;

const CONNACK: u8 = 0x20;
const PUBLISH: u8 = 0x30;
const PUBACK: u8 = 0x40;
const PUBREC: u8 = 0x50;
const SUBACK: u8 = 0x90;
const DISCONNECT: u8 = 0xe0;
const AUTH: u8 = 0xf0;

#[derive(Default)]
struct State {
    /// Answers wait until they are let go, all or those about permissions.
    holds: bool,
    holds_acl: bool,
    holds_hooks: bool,
    waiting: Vec<Waker>,
    has_acl: bool,
    /// What begins with it is denied, if it is not empty.
    denied: String,
    epoch: u64,
    asked: usize,
}

/// Plugins that do as the test says. They decide when they are asked, and answer when they may.
#[derive(Default, Clone)]
struct Script(Arc<Mutex<State>>);

impl Script {
    fn set(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.0.lock().unwrap());
    }

    fn hold(&self) {
        self.set(|state| state.holds = true);
    }

    fn let_go(&self) {
        self.set(|state| {
            (state.holds, state.holds_acl, state.holds_hooks) = (false, false, false);
            state.waiting.drain(..).for_each(Waker::wake);
        });
    }

    fn let_go_of_permissions(&self) {
        self.set(|state| {
            state.holds = false;
            state.waiting.drain(..).for_each(Waker::wake);
        });
    }

    fn answer<T: Unpin + 'static>(&self, value: T) -> Call<T> {
        self.answer_when(value, |state| !state.holds)
    }

    fn answer_when<T: Unpin + 'static>(&self, value: T, may: impl Fn(&State) -> bool + 'static) -> Call<T> {
        let (state, mut value) = (Arc::clone(&self.0), Some(value));
        Box::pin(std::future::poll_fn(move |context| {
            let mut state = state.lock().unwrap();
            if !may(&state) {
                state.waiting.push(context.waker().clone());
                return Poll::Pending;
            }
            Poll::Ready(value.take().unwrap())
        }))
    }
}

impl Plugins for Script {
    fn shard(&self, _index: usize) -> Box<dyn ShardPlugins> {
        Box::new(self.clone())
    }
}

impl ShardPlugins for Script {
    fn has_auth(&self) -> bool {
        true
    }
    fn authenticate(&self, request: Arc<AuthRequest>) -> Call<AuthOutcome> {
        self.answer(match request.method {
            Some(_) => AuthOutcome::Challenge { data: Bytes::new(), state: Bytes::new(), plugin: "script".into() },
            None if request.username.is_some() => AuthOutcome::Allow(Grant::default()),
            None => AuthOutcome::Next,
        })
    }
    fn proceed(&self, _step: AuthStep) -> Call<AuthOutcome> {
        self.answer(AuthOutcome::Next)
    }
    fn has_acl(&self) -> bool {
        self.0.lock().unwrap().has_acl
    }
    fn epoch(&self) -> (u64, u64) {
        let epoch = self.0.lock().unwrap().epoch;
        (epoch, epoch)
    }
    fn authorize(&self, _client: Arc<Who>, accesses: Arc<[Access]>) -> Call<Vec<Decision>> {
        let decide = |access: &Access| {
            let mut state = self.0.lock().unwrap();
            state.asked += 1;
            let is_denied = !state.denied.is_empty() && access.topic.starts_with(&state.denied);
            let verdict = if is_denied { Verdict::Deny(ReasonCode::NOT_AUTHORIZED) } else { Verdict::Allow };
            Decision { verdict: Some(verdict), lease: Some(Lease { scope: None, seconds: 1000 }), failed: false }
        };
        let decisions = accesses.iter().map(decide).collect();
        self.answer_when(decisions, |state| !state.holds && !state.holds_acl)
    }
    fn interest(&self, topic: &str) -> Interest {
        Interest { before: u64::from(topic.starts_with("hook/")), committed: 0 }
    }
    fn before_store(&self, messages: Vec<Submission>) -> Call<Vec<Accepted>> {
        let accepted = messages.into_iter().map(|sent| Accepted::Keep(sent.message)).collect();
        self.answer_when(accepted, |state| !state.holds && !state.holds_hooks)
    }
}

fn start_with(plugins: &dyn Plugins, store: &dyn Store, limits: Limits) -> Stepped {
    let listener = Listener::unix("stepped".into());
    let listener = Listener { name: "stepped".into(), queue_policy: QueuePolicy::RejectPublish, ..listener };
    let config = Config {
        listeners: vec![listener],
        anonymous: Anonymous::Allow,
        identity: Identity::default(),
        limits,
        shards: 1,
        sys_interval: Duration::ZERO,
    };
    Stepped::new(config, plugins, store)
}

fn start(plugins: &dyn Plugins) -> Stepped {
    start_with(plugins, &Memory, Limits::default())
}

fn text(body: &mut Vec<u8>, text: &str) {
    body.extend_from_slice(&(text.len() as u16).to_be_bytes());
    body.extend_from_slice(text.as_bytes());
}

/// A client's end, and what came out of it and was not looked at. MQTT 5.0 in its plainest form.
struct Client {
    socket: UnixStream,
    bytes: VecDeque<u8>,
}

impl Client {
    fn open(broker: &Stepped) -> Self {
        Self { socket: broker.connect(), bytes: VecDeque::new() }
    }

    /// Sends CONNECT; a Session that outlives the connection has `expiry` seconds.
    fn connect(broker: &Stepped, client_id: &str, expiry: u8) -> Self {
        Self::connect_with(broker, client_id, expiry, 0, None)
    }

    fn connect_with(broker: &Stepped, client_id: &str, expiry: u8, keep_alive: u8, will: Option<&str>) -> Self {
        let mut client = Self::open(broker);
        let mut body = vec![0, 4, b'M', b'Q', b'T', b'T', 5];
        // Clean Start, and a will with QoS 1.
        let flags = if expiry == 0 { 2 } else { 0 } | if will.is_some() { 0b1100 } else { 0 };
        body.extend_from_slice(&[flags, 0, keep_alive]);
        body.extend_from_slice(&[5, 17, 0, 0, 0, expiry]);
        text(&mut body, client_id);
        if let Some(topic) = will {
            body.push(0);
            text(&mut body, topic);
            text(&mut body, "will");
        }
        client.send(0x10, &body);
        client
    }

    fn send(&mut self, first: u8, body: &[u8]) {
        let mut packet = vec![first];
        let mut left = body.len();
        loop {
            packet.push((left & 0x7f) as u8 | u8::from(left > 0x7f) << 7);
            left >>= 7;
            if left == 0 {
                break;
            }
        }
        packet.extend_from_slice(body);
        self.socket.write_all(&packet).unwrap();
    }

    fn subscribe(&mut self, packet_id: u8, filters: &[&str], qos: u8) {
        let mut body = vec![0, packet_id, 0];
        for filter in filters {
            text(&mut body, filter);
            body.push(qos);
        }
        self.send(0x82, &body);
    }

    fn retain(&mut self, topic: &str) {
        let mut body = Vec::new();
        text(&mut body, topic);
        body.extend_from_slice(&[0, b'x']);
        self.send(0x31, &body);
    }

    /// `packet_id` 0: QoS 0.
    fn publish(&mut self, topic: &str, qos: u8, packet_id: u8, payload: &str) {
        let mut body = Vec::new();
        text(&mut body, topic);
        if packet_id > 0 {
            body.extend_from_slice(&[0, packet_id]);
        }
        body.push(0);
        body.extend_from_slice(payload.as_bytes());
        self.send(0x30 | qos << 1, &body);
    }

    /// The next packet: its first byte and what follows the length.
    fn packet(&mut self) -> Option<(u8, Vec<u8>)> {
        let mut bytes = vec![0; 1 << 16];
        while let Ok(count @ 1..) = self.socket.read(&mut bytes) {
            self.bytes.extend(&bytes[..count]);
        }
        let first = self.bytes.pop_front()?;
        let (mut length, mut shift) = (0, 0);
        loop {
            let byte = self.bytes.pop_front().unwrap();
            length |= usize::from(byte & 0x7f) << shift;
            shift += 7;
            if byte & 0x80 == 0 {
                break;
            }
        }
        Some((first, self.bytes.drain(..length).collect()))
    }

    /// The next packet, which is of this type.
    fn expect(&mut self, kind: u8) -> Vec<u8> {
        let (first, body) = self.packet().unwrap_or_else(|| panic!("nothing, instead of {kind:#x}"));
        assert_eq!(first & 0xf0, kind, "{first:#x} {body:?}");
        body
    }

    fn is_quiet(&mut self) -> bool {
        self.packet().is_none()
    }
}

/// A client that is in.
fn client(broker: &mut Stepped, client_id: &str, expiry: u8) -> Client {
    let mut client = Client::connect(broker, client_id, expiry);
    broker.settle();
    assert_eq!(client.expect(CONNACK)[1], 0);
    client
}

/// Time passes for a client that must say something, not for one that waits for an answer.
#[test]
fn a_client_does_not_pay_for_the_time_that_plugins_take() {
    let plugins = Script::default();
    plugins.hold();
    let mut broker = start(&plugins);
    let mut silent = Client::open(&broker);
    let mut plain = Client::connect(&broker, "plain", 0);
    // With Authentication Method "m".
    let mut enhanced = Client::open(&broker);
    enhanced.send(0x10, b"\x00\x04MQTT\x05\x02\x00\x00\x04\x15\x00\x01m\x00\x01e");
    broker.settle();
    assert_eq!(broker.connections(), 3);
    for _ in 0..3 {
        broker.skip(Duration::from_secs(11));
        broker.settle();
    }
    assert_eq!(broker.connections(), 2, "the silent one is gone");
    assert!(silent.is_quiet());
    plugins.let_go();
    broker.settle();
    plain.expect(CONNACK);
    enhanced.expect(AUTH);
    // Now it is the client that is slow.
    broker.skip(Duration::from_secs(11));
    broker.settle();
    assert_eq!(broker.connections(), 1);
    drop(plain);
    broker.settle();
    assert_eq!((broker.connections(), broker.sessions()), (0, 0));
}

/// A storage hook answers when the place of the publisher's Session belongs to another one.
#[test]
fn a_late_answer_of_a_hook_is_for_the_session_that_published() {
    let plugins = Script::default();
    let mut broker = start(&plugins);
    let mut subscriber = client(&mut broker, "subscriber", 0);
    subscriber.subscribe(1, &["hook/#"], 2);
    let mut first = client(&mut broker, "c", 0);
    plugins.hold();
    first.publish("hook/a", 2, 1, "one");
    broker.settle();
    let mut second = Client::connect(&broker, "c", 0);
    plugins.set(|state| state.holds = false);
    broker.settle();
    second.expect(CONNACK);
    plugins.let_go();
    broker.settle();
    // The same Packet Identifier, in a Session of its own.
    second.publish("hook/b", 2, 1, "two");
    broker.settle();
    second.expect(PUBREC);
    subscriber.expect(SUBACK);
    let mut got = Vec::new();
    while let Some((_, body)) = subscriber.packet() {
        got.push(body[body.len() - 3..].to_vec());
    }
    assert_eq!(got, [b"one".to_vec(), b"two".to_vec()]);
}

/// More filters than leases: each is decided about as the plugin said, whether that came at once or late.
#[test]
fn one_packet_may_ask_for_more_than_there_are_leases() {
    let plugins = Script::default();
    plugins.set(|state| {
        state.has_acl = true;
        state.denied = "f/7".into();
    });
    let filters: Vec<String> = (0..100).map(|n| format!("f/{n}")).collect();
    let filters: Vec<&str> = filters.iter().map(String::as_str).collect();
    let expected: Vec<u8> = filters.iter().map(|filter| if filter.starts_with("f/7") { 0x87 } else { 0 }).collect();
    for is_late in [false, true] {
        let mut broker = start(&plugins);
        let mut client = client(&mut broker, "c", 0);
        if is_late {
            plugins.hold();
        }
        client.subscribe(1, &filters, 0);
        broker.settle();
        plugins.let_go();
        broker.settle();
        assert_eq!(client.expect(SUBACK)[3..], expected, "late: {is_late}");
    }
}

/// A plugin is replaced while the one before still thinks: what that one says does not outlive it.
#[test]
fn an_answer_from_before_a_revocation_leaves_no_lease() {
    let plugins = Script::default();
    plugins.set(|state| state.has_acl = true);
    let mut broker = start(&plugins);
    let mut client = client(&mut broker, "c", 0);
    for (publishes, other) in [(true, "p/1"), (false, "s/1")] {
        plugins.set(|state| state.denied.clear());
        plugins.hold();
        if publishes {
            client.publish(other, 1, 1, "x");
        } else {
            client.subscribe(1, &[other], 0);
        }
        broker.settle();
        plugins.set(|state| {
            state.denied = other.into();
            state.epoch += 1;
        });
        broker.settle();
        plugins.let_go();
        broker.settle();
        // What waited was decided about before.
        assert_eq!(client.packet().unwrap().1.last(), Some(if publishes { &0x10 } else { &0 }));
    }
    client.publish("p/1", 1, 2, "x");
    broker.skip(Duration::from_secs(2));
    broker.settle();
    assert_eq!(client.expect(PUBACK)[2], 0x10, "it is asked again, about the topic that is allowed now");
    plugins.set(|state| {
        state.denied = "p/1".into();
        state.epoch += 1;
    });
    broker.settle();
    client.publish("p/1", 1, 3, "x");
    broker.settle();
    assert_eq!(client.expect(PUBACK)[2], 0x87);
    assert_eq!(broker.subscriptions(), 0, "the subscription has ended");
}

/// The ban comes while the client is being authenticated.
#[test]
fn a_ban_holds_for_a_client_that_is_just_coming() {
    for pattern in [BanPattern::ClientId("c".into()), BanPattern::Username("u".into())] {
        let plugins = Script::default();
        plugins.hold();
        let mut broker = start(&plugins);
        let mut client = Client::connect(&broker, "c", 0);
        if matches!(pattern, BanPattern::Username(_)) {
            client = Client::open(&broker);
            client.send(0x10, b"\x00\x04MQTT\x05\x82\x00\x00\x00\x00\x01c\x00\x01u");
        }
        broker.settle();
        Control(Arc::clone(&broker.shared)).ban(pattern, 60, "a test").unwrap();
        broker.settle();
        plugins.let_go();
        broker.settle();
        let (first, body) = client.packet().unwrap();
        assert!(first == DISCONNECT || body[1] >= 0x80 || client.packet().unwrap().0 == DISCONNECT);
        assert_eq!(broker.sessions(), 0);
    }
}

/// Two clients with Sessions in a store that commits when it is told to: `s` is subscribed to `t`, QoS 2.
fn start_stored() -> (Stepped, Script, Slow, Client, Client) {
    let (plugins, store) = (Script::default(), Slow::at_once());
    let mut broker = start_with(&plugins, &store, Limits::default());
    let mut subscriber = client(&mut broker, "s", 100);
    subscriber.subscribe(1, &["t"], 2);
    let publisher = client(&mut broker, "p", 100);
    subscriber.expect(SUBACK);
    store.hang();
    store.take();
    (broker, plugins, store, subscriber, publisher)
}

fn fail(broker: &mut Stepped, store: &Slow) {
    broker.settle();
    store.fail_all();
    broker.settle();
}

fn commit(broker: &mut Stepped, store: &Slow) {
    broker.settle();
    store.commit_all();
    broker.settle();
}

/// The disk refuses a QoS 2 message when its publisher is gone already, with or without DISCONNECT from the broker.
#[test]
fn what_could_not_be_kept_is_taken_when_it_is_sent_again() {
    for is_ended in [false, true] {
        let (mut broker, _, store, subscriber, mut publisher) = start_stored();
        drop(subscriber);
        commit(&mut broker, &store);
        publisher.publish("t", 2, 1, "x");
        if is_ended {
            // CONNECT is for the begin. [MQTT-3.1.0-2]
            publisher.send(0x10, b"\x00\x04MQTT\x05\x02\x00\x00\x00\x00\x00");
        }
        broker.settle();
        drop(publisher);
        fail(&mut broker, &store);
        assert!(store.take().iter().any(|change| change.starts_with("queued")));
        let mut publisher = Client::connect(&broker, "p", 100);
        commit(&mut broker, &store);
        assert_eq!(publisher.expect(CONNACK)[0], 1, "the Session is present");
        publisher.publish("t", 2, 1, "x");
        commit(&mut broker, &store);
        assert_eq!(publisher.expect(PUBREC)[..2], [0, 1]);
        assert!(store.take().iter().any(|change| change.starts_with("queued")), "ended: {is_ended}");
    }
}

/// A client that is not heard of is gone, however much is sent to it. [MQTT-3.1.2-22]
#[test]
fn commits_do_not_keep_a_silent_client_alive() {
    let (mut broker, _, store, _subscriber, mut publisher) = start_stored();
    let mut silent = Client::connect_with(&broker, "silent", 100, 10, None);
    commit(&mut broker, &store);
    silent.expect(CONNACK);
    silent.subscribe(1, &["t"], 2);
    commit(&mut broker, &store);
    assert_eq!(broker.connections(), 3);
    for packet_id in 1..=4 {
        publisher.publish("t", 2, packet_id, "x");
        commit(&mut broker, &store);
        broker.skip(Duration::from_secs(5));
        broker.settle();
    }
    assert_eq!(broker.connections(), 2);
}

#[test]
fn a_subscription_stays_as_it_was_when_another_cannot_be_kept() {
    let (mut broker, _, store, mut subscriber, mut publisher) = start_stored();
    subscriber.subscribe(2, &["t", "new"], 0);
    fail(&mut broker, &store);
    assert_eq!(subscriber.expect(SUBACK)[3..], [0x97, 0x97]);
    publisher.publish("t", 0, 0, "x");
    publisher.publish("new", 0, 0, "x");
    publisher.publish("t", 1, 1, "x");
    commit(&mut broker, &store);
    subscriber.expect(PUBLISH);
    let (first, body) = subscriber.packet().unwrap();
    assert_eq!((first, &body[1..2]), (0x32, &b"\x01"[..]), "QoS 1, although QoS 0 was wanted");
    assert!(subscriber.is_quiet());
}

/// CONNACK waits for plugins and for the store; the store is done first.
#[test]
fn a_session_that_cannot_be_kept_is_refused_though_plugins_think_longer() {
    let (mut broker, plugins, store, subscriber, mut publisher) = start_stored();
    drop(subscriber);
    commit(&mut broker, &store);
    plugins.set(|state| (state.has_acl, state.holds_acl) = (true, true));
    plugins.set(|state| state.epoch += 1);
    let mut refused = Client::connect(&broker, "s", 100);
    fail(&mut broker, &store);
    plugins.let_go();
    broker.settle();
    assert_eq!(refused.expect(CONNACK)[1], 0x97);
    drop(refused);
    commit(&mut broker, &store);

    plugins.set(|state| state.holds_acl = true);
    let mut subscriber = Client::connect(&broker, "s", 100);
    commit(&mut broker, &store);
    plugins.let_go();
    broker.settle();
    assert_eq!(subscriber.expect(CONNACK)[1], 0);
    publisher.publish("t", 2, 1, "x");
    commit(&mut broker, &store);
    let id = subscriber.expect(PUBLISH)[3..5].to_vec();
    subscriber.send(PUBREC, &id);
    fail(&mut broker, &store);
    while let Some((first, _)) = subscriber.packet() {
        assert_ne!(first, CONNACK, "it is in already");
    }
}

/// Retained messages are on their way with QoS 1, and then with QoS 0, which the store need not know of.
#[test]
fn a_replay_in_the_store_ends_with_the_subscription_it_was_for() {
    let (mut broker, _, store, mut subscriber, mut publisher) = start_stored();
    for n in 0..3000 {
        publisher.retain(&format!("r/{n}"));
        if n % 100 == 0 {
            commit(&mut broker, &store);
        }
    }
    subscriber.subscribe(2, &["r/+"], 1);
    commit(&mut broker, &store);
    assert!(store.was_told("replay 1 r/+"));
    store.take();
    subscriber.subscribe(3, &["r/+"], 0);
    for _ in 0..50 {
        commit(&mut broker, &store);
        while subscriber.packet().is_some() {}
    }
    assert!(store.was_told("replayed 1 r/+"));
}

/// What a client may not publish costs the same however many have subscribed to it.
#[test]
fn a_denied_topic_is_not_looked_up() {
    let plugins = Script::default();
    plugins.set(|state| (state.has_acl, state.denied) = (true, "no".into()));
    let mut broker = start(&plugins);
    let mut client = client(&mut broker, "c", 0);
    for n in 1..=20 {
        client.publish("no/way", 1, n, "x");
        broker.settle();
        assert_eq!(client.expect(PUBACK)[2], 0x87);
    }
    assert_eq!(broker.shared.stats.routes_built.load(Ordering::Relaxed), 0);
    client.publish("yes", 1, 21, "x");
    broker.settle();
    assert_eq!(client.expect(PUBACK)[2], 0x10);
    assert_eq!(broker.shared.stats.routes_built.load(Ordering::Relaxed), 1);
}

/// Messages of plugins wait for a storage hook that hangs: so many bytes, and then they are refused.
#[test]
fn what_plugins_publish_is_bounded_while_hooks_see_it() {
    let plugins = Script::default();
    let mut broker = start(&plugins);
    let mut bystander = client(&mut broker, "bystander", 0);
    plugins.hold();
    let control = Control(Arc::clone(&broker.shared));
    let message = || Outgoing {
        origin: 0,
        topic: "hook/x".into(),
        payload: vec![0; 900_000].into(),
        properties: Bytes::new(),
        qos: Qos::AtMostOnce,
        retain: false,
        expiry: None,
    };
    let mut taken = 0;
    for _ in 0..100 {
        taken += usize::from(control.publish(message()).is_ok());
        broker.settle();
    }
    assert!((10..30).contains(&taken), "{taken} of 900 KB");
    bystander.send(0xc0, &[]);
    broker.settle();
    bystander.expect(0xd0);
    plugins.let_go();
    broker.settle();
    assert!(control.publish(message()).is_ok());
    // Properties count, too.
    let large = Outgoing { properties: vec![0; 1 << 20].into(), ..message() };
    assert!(matches!(control.publish(large), Err(Refusal::Invalid(_))));
}

/// The queue fills while a hook thinks: its answer finds no room, and the publisher is told.
#[test]
fn there_is_room_for_a_message_when_hooks_have_answered_or_it_is_refused() {
    let plugins = Script::default();
    let limits = Limits { queue_messages_max: 10, ..Limits::default() };
    let store = Slow::at_once();
    let mut broker = start_with(&plugins, &store, limits);
    let mut away = client(&mut broker, "away", 100);
    away.subscribe(1, &["hook/#"], 1);
    broker.settle();
    drop(away);
    let mut publisher = client(&mut broker, "p", 0);
    plugins.hold();
    for n in 1..=30 {
        publisher.publish("hook/x", 1, n, "x");
    }
    broker.settle();
    plugins.let_go();
    broker.settle();
    let reasons: Vec<u8> = (0..30).map(|_| *publisher.expect(PUBACK).get(2).unwrap_or(&0)).collect();
    assert_eq!((reasons[..10].to_vec(), reasons[10..].to_vec()), (vec![0; 10], vec![0x97; 20]));
}

/// [MQTT-4.6.0-2]
#[test]
fn a_refusal_does_not_overtake_an_acknowledgement() {
    let plugins = Script::default();
    plugins.set(|state| (state.has_acl, state.denied) = (true, "no".into()));
    let mut broker = start(&plugins);
    let mut client = client(&mut broker, "c", 0);
    plugins.set(|state| state.holds_acl = false);
    client.publish("hook/x", 1, 1, "x");
    client.publish("no", 1, 2, "x");
    broker.settle();
    for (id, reason) in [(1, 0x10), (2, 0x87)] {
        assert_eq!(client.expect(PUBACK)[..3], [0, id, reason]);
    }
    plugins.set(|state| state.holds_hooks = true);
    client.publish("hook/x", 1, 3, "x");
    client.publish("no", 1, 4, "x");
    client.publish("$SYS/x", 2, 5, "x");
    broker.settle();
    assert!(client.is_quiet());
    plugins.let_go();
    broker.settle();
    for (id, kind, reason) in [(3, PUBACK, 0x10), (4, PUBACK, 0x87), (5, PUBREC, 0x87)] {
        assert_eq!(client.expect(kind)[..3], [0, id, reason]);
    }
}

/// A plugin is asked about a will when the broker ends: its answer is waited for.
#[test]
fn a_will_is_published_before_the_end() {
    let plugins = Script::default();
    plugins.set(|state| state.has_acl = true);
    let mut broker = start(&plugins);
    let mut client = Client::connect_with(&broker, "c", 0, 0, Some("hook/w"));
    broker.settle();
    client.expect(CONNACK);
    plugins.hold();
    broker.drain();
    broker.settle();
    drop(client);
    broker.settle();
    assert!(!broker.is_done());
    plugins.set(|state| state.holds_hooks = true);
    plugins.let_go_of_permissions();
    broker.settle();
    assert!(!broker.is_done(), "a storage hook sees it");
    plugins.let_go();
    broker.settle();
    assert!(broker.is_done());
    let late = broker.connect();
    broker.settle();
    assert!(broker.is_done() && broker.connections() == 0, "nobody comes any more");
    drop(late);
}

/// Half a CONNECT costs memory, and nobody knows for whom.
#[test]
fn who_is_not_in_gives_way_when_memory_is_used_up() {
    let mut broker = start_with(&NoPlugins, &Memory, Limits { memory_max: Some(1), ..Limits::default() });
    let mut half = Client::open(&broker);
    half.socket.write_all(b"\x10\xff\x7f\x00\x04MQTT").unwrap();
    broker.skip(Duration::from_secs(1));
    broker.settle();
    assert_eq!(broker.connections(), 0);
}

/// Who publishes is slowed down, and nobody else.
#[test]
fn publishers_are_slowed_when_memory_runs_short() {
    let mut broker = start(&NoPlugins);
    let (mut publisher, mut other) = (client(&mut broker, "p", 0), client(&mut broker, "o", 0));
    broker.shared.memory.freeze(Pressure::High);
    let mut answered = Vec::new();
    // A turn for each packet that comes, and a millisecond.
    for n in 1..=100 {
        publisher.publish("t", 1, n, "x");
        other.send(0xc0, &[]);
        broker.shards[0].turn(&mut broker.news, Some(Duration::ZERO));
        broker.skip(Duration::from_millis(1));
        other.expect(0xd0);
        let mut count = 0;
        while publisher.packet().is_some() {
            count += 1;
        }
        answered.push(count);
    }
    let turns = answered.iter().filter(|count| **count > 0).count();
    assert!((4..=20).contains(&turns), "read in {turns} of 100 turns: {answered:?}");
    broker.shared.memory.freeze(Pressure::None);
    broker.settle();
    let mut rest = 0;
    while publisher.packet().is_some() {
        rest += 1;
    }
    assert_eq!(answered.iter().sum::<i32>() + rest, 100, "none is lost");
}

/// A will falls due while the disk is full: the client that is away gets it when there is room again.
#[test]
fn a_will_waits_for_the_disk() {
    for (expiry, after) in [(0, 3), (100, 3), (10, 30)] {
        let (mut broker, _, store, mut subscriber, publisher) = start_stored();
        drop(publisher);
        subscriber.subscribe(2, &["w"], 1);
        commit(&mut broker, &store);
        drop(subscriber);
        let mut mortal = Client::connect_with(&broker, "mortal", expiry, 0, Some("w"));
        commit(&mut broker, &store);
        mortal.expect(CONNACK);
        store.refuse(true);
        drop(mortal);
        for _ in 0..after {
            broker.skip(Duration::from_secs(1));
            broker.settle();
        }
        store.take();
        store.refuse(false);
        broker.skip(Duration::from_secs(2));
        commit(&mut broker, &store);
        assert!(store.was_told("queued"), "expiry {expiry}, full for {after} s");
    }
}
