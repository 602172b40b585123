//! A client connects again while its Session has a connection: what it had sent counts.
#![allow(missing_docs, reason = "tests")]

mod common;

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use wasmqtt_protocol::ports::{Memory, NoPlugins};

use self::common::store::Slow;
use self::common::{Broker, CONNACK, Client, PUBACK, PUBLISH, SUBACK, connect, packet, publish};

const DISCONNECT: [u8; 2] = [0xe0, 0];
/// Will Flag, Clean Session.
const WITH_WILL: u8 = 0b110;
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a connection that loses its Session is read at most.
const LAST_TIME: Duration = Duration::from_secs(2);

/// How often a client comes back; more with this in the environment.
fn rounds() -> u16 {
    std::env::var("WASMQTT_TEST_TAKEOVERS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(2000)
}

fn subscriber(broker: &Broker, filter: &str, qos: u8) -> Client {
    let mut client = broker.connect("subscriber", true);
    client.expect(CONNACK);
    client.subscribe(filter, qos);
    client.expect(SUBACK);
    client
}

/// The numbers in the payloads of `t`, as many as there should be, and how many came from `will`.
fn collect(subscriber: &mut Client, count: usize) -> (Vec<u16>, usize) {
    let (mut numbers, mut wills) = (Vec::new(), 0);
    loop {
        // Longer than the longest takeover, until all are there; then a second for what should not come.
        let patience = if numbers.len() < count { PATIENCE } else { Duration::from_secs(1) };
        let Some((kind, body)) = subscriber.next(patience) else { return (numbers, wills) };
        assert_eq!(kind, PUBLISH);
        match body[2] {
            b't' => numbers.push(u16::from_be_bytes([body[3], body[4]])),
            _ => wills += 1,
        }
    }
}

fn check_nothing_is_lost(wait_for_connack: bool) {
    let broker = Broker::start_with(Arc::new(NoPlugins), Arc::new(Memory), 2);
    let mut subscriber = subscriber(&broker, "#", 0);
    let rounds = rounds();
    for round in 0..rounds {
        let mut client = broker.open();
        client.write(&connect(4, WITH_WILL, 60, &["same", "will", "gone"]));
        if wait_for_connack {
            client.expect(CONNACK);
        }
        let sent = [publish(PUBLISH, "t", None, &round.to_be_bytes()), DISCONNECT.to_vec()].concat();
        // The connection may be taken over already: that is what it is about.
        let _ = client.stream().write_all(&sent);
    }
    let (mut numbers, wills) = collect(&mut subscriber, usize::from(rounds));
    numbers.sort_unstable();
    assert_eq!((numbers.len(), wills), (usize::from(rounds), 0), "messages and wills");
    assert!(numbers.into_iter().eq(0..rounds), "each once");
}

/// DISCONNECT takes the will back, however soon the client comes again. MQTT 3.1.1 §3.14 [MQTT-3.14.4-3], [MQTT-3.1.2-10]
#[test]
fn what_was_sent_before_a_takeover_counts() {
    check_nothing_is_lost(true);
}

/// Shards may see the CONNECT packets of one client in another order than that in which it sent them.
#[test]
fn what_was_sent_before_a_takeover_counts_if_nobody_waits() {
    check_nothing_is_lost(false);
}

/// A message that was acknowledged is not sent again. MQTT 3.1.1 §4.4 [MQTT-4.4.0-1]
#[test]
fn an_acknowledgement_before_a_takeover_counts() {
    let broker = Broker::start_with(Arc::new(NoPlugins), Arc::new(Memory), 2);
    let mut publisher = broker.connect("publisher", true);
    publisher.expect(CONNACK);
    let mut client = broker.connect("keeper", false);
    client.expect(CONNACK);
    client.subscribe("t", 1);
    client.expect(SUBACK);
    for round in 0..rounds() / 4 {
        publisher.write(&publish(PUBLISH | 2, "t", Some(1), &round.to_be_bytes()));
        publisher.expect(PUBACK);
        let message = client.expect(PUBLISH);
        assert_eq!(message[5..], round.to_be_bytes(), "once, and in order");
        client.write(&packet(PUBACK, &message[3..5]));
        // Both are open for a moment, on either shard.
        let next = broker.connect("keeper", false);
        drop(std::mem::replace(&mut client, next));
        assert_eq!(client.expect(CONNACK)[0], 1, "Session Present");
    }
}

/// An older connection whose CONNECT is answered late does not throw out a newer one.
#[test]
fn the_newest_connection_has_the_session() {
    let broker = Broker::start_with(Arc::new(NoPlugins), Arc::new(Memory), 2);
    let mut older = broker.open();
    // It is accepted before the newer one, since the acceptor takes connections in order.
    let mut newer = broker.connect("same", true);
    newer.expect(CONNACK);
    older.write(&connect(4, 2, 60, &["same"]));
    older.write(&publish(PUBLISH, "t", None, b"x"));
    older.expect(CONNACK);
    assert!(older.is_closed(), "the newer one has the Session");
    newer.ping();
}

/// A client whose messages are stored: a test can have it not read, and stop the store.
fn stored_publisher(broker: &Broker, client_id: &str) -> Client {
    let mut keeper = broker.connect("keeper", false);
    keeper.expect(CONNACK);
    keeper.subscribe("t", 1);
    keeper.expect(SUBACK);
    let mut publisher = broker.connect(client_id, true);
    publisher.expect(CONNACK);
    publisher
}

/// What somebody goes on sending is read up to a number of bytes, however fast it comes.
#[test]
fn a_connection_that_is_taken_over_has_its_last_bytes() {
    const LAST_BYTES: usize = 16 << 20;
    const READ_BYTES: usize = 64 << 10;
    let store = Slow::at_once();
    let broker = Broker::start_config(Arc::new(NoPlugins), Arc::new(store.clone()), |config| {
        config.sys_interval = Duration::from_millis(100);
    });
    let mut watcher = subscriber(&broker, "$SYS/broker/bytes/received", 0);
    let old = stored_publisher(&broker, "same");
    let pauses = Arc::new(AtomicBool::new(false));
    let flooding = std::thread::spawn({
        let pauses = Arc::clone(&pauses);
        move || {
            // Sending them is less work than reading them: there are always more.
            let bytes = publish(PUBLISH, "nobody", None, &[b'x'; 500]).repeat(200);
            let stored = publish(PUBLISH | 2, "t", Some(7), b"x");
            while old.stream().write_all(&bytes).is_ok() {
                if pauses.swap(false, Ordering::SeqCst) {
                    old.stream().write_all(&stored).unwrap();
                }
            }
        }
    });
    // The kernel makes room for a client that sends so much.
    std::thread::sleep(Duration::from_millis(500));
    // Who writes to a store that does not keep up is not read, until another connection takes the Session over.
    store.congest(true);
    pauses.store(true, Ordering::SeqCst);
    let before = watcher.settled();
    broker.connect("same", true).expect(CONNACK);
    flooding.join().unwrap();
    let last = watcher.settled() - before;
    assert!((1..=LAST_BYTES + 2 * READ_BYTES).contains(&last), "{last} bytes");
}

/// What somebody has sent and cannot be handled is waited for no longer than that: here, the store hangs.
#[test]
fn a_connection_that_is_taken_over_has_its_last_seconds() {
    let store = Slow::at_once();
    let broker = Broker::start(Arc::new(NoPlugins), Arc::new(store.clone()));
    let mut old = stored_publisher(&broker, "same");
    store.hang();
    old.write(&publish(PUBLISH | 2, "t", Some(1), b"x").repeat(3000));
    old.expect_silence();
    let begun = Instant::now();
    let mut new = broker.connect("same", true);
    new.expect(CONNACK);
    assert!((LAST_TIME..2 * LAST_TIME).contains(&begun.elapsed()), "{:?}", begun.elapsed());
    assert!(store.take().iter().filter(|change| change.starts_with("queued")).count() < 1500, "the rest is left");
    new.ping();
}
