//! Promises wait for the store: CONNACK, SUBACK and PUBACK leave after the commit of what they promise, and nothing
//! else waits for it.
#![allow(missing_docs, reason = "tests")]

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use wasmqtt_protocol::ports::{Memory, NoPlugins};

use self::common::store::Slow;
use self::common::{Broker, CONNACK, PUBACK, PUBLISH, QUIET, SUBACK};

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
