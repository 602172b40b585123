//! Promises wait for the store: CONNACK, SUBACK and PUBACK leave after the commit of what they promise, and nothing
//! else waits for it.
#![allow(missing_docs, reason = "tests")]

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use wasmqtt_protocol::ports::{Memory, NoPlugins};

use self::common::store::Slow;
use self::common::{Broker, CONNACK, Client, PINGRESP, PUBACK, PUBLISH, QUIET, SUBACK, connect, publish};

const PUBREC: u8 = 0x50;

#[test]
fn promises_leave_after_the_commit() {
    let store = Slow::default();
    let broker = Broker::start(Arc::new(NoPlugins), Arc::new(store.clone()));
    let mut keeper = broker.connect("keeper", false);
    keeper.expect_silence();
    store.commit_all();
    keeper.expect(CONNACK);
    keeper.subscribe("a/#", 1);
    keeper.expect_silence();
    store.commit_all();
    keeper.expect(SUBACK);
    assert_eq!(store.take(), ["opened keeper 604800", "subscribed 1 a/#"]);

    let mut guest = broker.connect("guest", true);
    guest.expect(CONNACK);
    guest.publish("a/1", 1, true);
    guest.expect_silence();
    keeper.expect(PUBLISH);
    let sent = "1 Sent { packet_id: 1, id: 2, qos: AtLeastOnce }";
    assert_eq!(store.take(), ["retained a/1", "queued 2 a/1 1:AtLeastOnce", sent]);
    store.commit_all();
    guest.expect(PUBACK);
}

/// A client whose promise waits holds up nobody else; and what needs no store is answered at once.
#[test]
fn others_do_not_wait() {
    let store = Slow::default();
    let broker = Broker::start(Arc::new(NoPlugins), Arc::new(store.clone()));
    let mut waiting = broker.connect("waiting", false);
    waiting.expect_silence();
    let mut subscriber = broker.connect("subscriber", true);
    subscriber.expect(CONNACK);
    subscriber.subscribe("b", 1);
    subscriber.expect(SUBACK);
    let mut publisher = broker.connect("publisher", true);
    publisher.expect(CONNACK);
    publisher.publish("b", 1, false);
    publisher.expect(PUBACK);
    subscriber.expect(PUBLISH);
    waiting.expect_silence();
    store.commit_all();
    waiting.expect(CONNACK);
}

#[test]
fn a_session_is_told_from_its_first_connection_to_its_end() {
    let store = Slow::default();
    let broker = Broker::start(Arc::new(NoPlugins), Arc::new(store.clone()));
    let mut client = broker.connect("c", false);
    store_settles(&store, &["opened c 604800"]);
    store.commit_all();
    client.expect(CONNACK);
    client.send(0xe0, &[]);
    store_settles(&store, &["closed c 604800"]);
    let _clean = broker.connect("c", true);
    store_settles(&store, &["ended 1"]);
    let mut gone = broker.connect("never-kept", true);
    gone.expect(CONNACK);
    gone.subscribe("x", 1);
    gone.send(0xe0, &[]);
    std::thread::sleep(QUIET);
    assert!(store.take().is_empty(), "a Session that ends with its connection is not told of");
}

fn store_settles(store: &Slow, expected: &[&str]) {
    let until = Instant::now() + Duration::from_secs(10);
    let mut seen = Vec::new();
    while seen.len() < expected.len() && Instant::now() < until {
        seen.extend(store.take());
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(seen, expected);
}

#[test]
fn without_a_store_nothing_waits() {
    let broker = Broker::start(Arc::new(NoPlugins), Arc::new(Memory));
    let mut client = broker.connect("c", false);
    client.expect(CONNACK);
    client.subscribe("a", 1);
    client.expect(SUBACK);
    client.publish("b", 1, true);
    client.expect(PUBACK);
}

/// Waits until the store was told so many changes of that kind, however busy the machine is.
fn await_told(store: &Slow, kind: &str, mut count: usize) {
    let until = Instant::now() + Duration::from_secs(30);
    while count > 0 {
        assert!(Instant::now() < until, "the store was not told: {kind}");
        count = count.saturating_sub(store.take().iter().filter(|change| change.starts_with(kind)).count());
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn keeper(broker: &Broker, store: &Slow, filter: &str) -> Client {
    let mut keeper = broker.connect("keeper", false);
    keeper.expect_silence();
    await_told(store, "opened", 1);
    store.commit_all();
    keeper.expect(CONNACK);
    keeper.subscribe(filter, 1);
    keeper.expect_silence();
    await_told(store, "subscribed", 1);
    store.commit_all();
    keeper.expect(SUBACK);
    keeper
}

/// Only the answer that promises something waits: the connection goes on.
#[test]
fn a_client_that_waits_for_the_store_is_served() {
    let store = Slow::default();
    let broker = Broker::start(Arc::new(NoPlugins), Arc::new(store.clone()));
    let mut keeper = keeper(&broker, &store, "a");
    let mut publisher = broker.connect_alive("publisher", 1);
    publisher.publish("a", 1, false);
    keeper.expect(PUBLISH);
    await_told(&store, "queued", 1);
    // Twice its Keep Alive.
    for _ in 0..6 {
        publisher.ping();
        std::thread::sleep(Duration::from_millis(500));
    }
    publisher.subscribe("b", 0);
    keeper.publish("b", 0, false);
    publisher.expect(PUBLISH);
    publisher.ping();
    store.commit_all();
    publisher.expect(PUBACK);
    publisher.expect(SUBACK);
}

/// A client that sends on and on while the store hangs, or while it commits little by little.
#[test]
fn answers_that_wait_for_the_store_are_bounded() {
    const WAITING_MAX: usize = 1024;
    const COUNT: usize = 5 * WAITING_MAX / 2;
    let store = Slow::default();
    let broker = Broker::start(Arc::new(NoPlugins), Arc::new(store.clone()));
    let _keeper = keeper(&broker, &store, "a");
    let mut publisher = broker.connect("publisher", true);
    publisher.expect(CONNACK);
    store.take();
    let packet = |id: usize| publish(PUBLISH | 2, "a", Some(u16::try_from(id).unwrap()), b"x");
    // All of them fit into one read.
    let mut bytes: Vec<u8> = (1..=COUNT).flat_map(packet).collect();
    bytes.extend_from_slice(&[0xc0, 0]);
    publisher.write(&bytes);
    await_told(&store, "queued", WAITING_MAX);
    let (mut queued, mut answers) = (WAITING_MAX, Vec::new());
    let until = Instant::now() + Duration::from_mins(1);
    while answers.len() <= COUNT && Instant::now() < until {
        answers.extend(std::iter::from_fn(|| publisher.next(Duration::from_millis(50))).map(|(kind, _)| kind));
        queued += store.take().iter().filter(|change| change.starts_with("queued")).count();
        let answered = answers.iter().filter(|kind| matches!(**kind, PUBACK)).count();
        assert!(queued <= answered + WAITING_MAX, "{queued} were handled, {answered} are answered");
        store.commit_one();
    }
    assert_eq!((queued, answers.len()), (COUNT, COUNT + 1));
    let pong = answers.iter().position(|kind| *kind == PINGRESP).expect("is answered, too");
    assert!(pong >= COUNT - WAITING_MAX, "what came behind the others is answered after {pong} of them");
}

/// What nobody is promised makes nobody wait: a lasting client leaves, a retained message with QoS 0.
#[test]
fn a_change_that_nobody_waits_for_holds_up_no_other_client() {
    let store = Slow::default();
    let broker = Broker::start(Arc::new(NoPlugins), Arc::new(store.clone()));
    let mut keeper = keeper(&broker, &store, "a");
    let mut retainer = broker.connect("retainer", true);
    retainer.expect(CONNACK);
    store.take();
    retainer.publish("r", 0, true);
    store_settles(&store, &["retained r"]);
    keeper.send(0xe0, &[]);
    store_settles(&store, &["closed keeper 604800"]);
    let mut publisher = broker.connect("publisher", true);
    publisher.expect(CONNACK);
    publisher.publish("nobody", 1, false);
    publisher.expect(PUBACK);
}

/// What cannot be kept is refused where the protocol can say so, and not acknowledged where it cannot.
#[test]
fn what_cannot_be_kept_is_refused() {
    let store = Slow::default();
    let broker = Broker::start(Arc::new(NoPlugins), Arc::new(store.clone()));
    let _keeper = keeper(&broker, &store, "a");
    let (mut old, mut new) = (broker.connect("old", true), broker.open());
    old.expect(CONNACK);
    new.write(&connect(5, 2, 0, &["new"]));
    new.expect(CONNACK);
    for qos in 1..=2 {
        old.publish("a", qos, false);
        // The same with no properties.
        new.write(&[PUBLISH | qos << 1, 7, 0, 1, b'a', 0, 7, 0, b'x']);
        old.expect_silence();
        new.expect_silence();
        await_told(&store, "queued", 2);
        store.fail_all();
        let answer = new.expect(if qos == 1 { PUBACK } else { PUBREC });
        assert_eq!(answer[..3], [0, 7, 0x97], "Quota exceeded");
        old.ping();
        new.ping();
    }
    // The Packet Identifier of the QoS 2 message is free: the same again is a message.
    new.write(&[PUBLISH | 4, 7, 0, 1, b'a', 0, 7, 0, b'x']);
    new.expect_silence();
    await_told(&store, "queued", 1);
    store.commit_all();
    assert_eq!(new.expect(PUBREC), [0, 7]);
}

#[test]
fn a_session_that_cannot_be_kept_is_refused() {
    let store = Slow::default();
    let broker = Broker::start(Arc::new(NoPlugins), Arc::new(store.clone()));
    let mut client = broker.open();
    // Session Expiry Interval 100.
    client.write(&[0x10, 19, 0, 4, b'M', b'Q', b'T', b'T', 5, 0, 0, 0, 5, 17, 0, 0, 0, 100, 0, 1, b'c']);
    client.expect_silence();
    await_told(&store, "opened", 1);
    store.fail_all();
    assert_eq!(client.expect(CONNACK)[..2], [0, 0x97], "no Session Present, Quota exceeded");
    assert!(client.is_closed());
    // It does not know of a Session: there must be none. [MQTT-3.2.2-4]
    let mut again = broker.connect("c", false);
    again.expect_silence();
    await_told(&store, "opened", 1);
    store.commit_all();
    assert_eq!(again.expect(CONNACK), [0, 0]);
    again.subscribe("a", 1);
    again.expect_silence();
    await_told(&store, "subscribed", 1);
    store.fail_all();
    assert_eq!(again.expect(SUBACK), [0, 1, 0x80]);
    again.publish("a", 0, false);
    again.ping();
}

/// Clients that have nothing stored are served while the store is behind; others are not read.
#[test]
fn a_store_that_does_not_keep_up_holds_those_who_write() {
    let store = Slow::default();
    let broker = Broker::start(Arc::new(NoPlugins), Arc::new(store.clone()));
    let _keeper = keeper(&broker, &store, "a");
    let mut subscriber = broker.connect("subscriber", true);
    subscriber.expect(CONNACK);
    subscriber.subscribe("b", 0);
    subscriber.expect(SUBACK);
    store.congest(true);
    let mut writer = broker.connect("writer", true);
    writer.expect(CONNACK);
    writer.publish("a", 1, false);
    writer.expect_silence();
    await_told(&store, "queued", 1);
    writer.publish("b", 0, false);
    let mut free = broker.connect("free", true);
    free.expect(CONNACK);
    free.publish("b", 0, false);
    subscriber.expect(PUBLISH);
    subscriber.expect_silence();
    store.commit_all();
    writer.expect(PUBACK);
    subscriber.expect_silence();
    store.congest(false);
    subscriber.expect(PUBLISH);
    writer.ping();
}
