//! A client connects again while its Session has a connection: what it had sent counts.
#![allow(missing_docs, reason = "tests")]

mod common;

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use wasmqtt_protocol::ports::{Memory, NoPlugins};

use self::common::{Broker, CONNACK, Client, PUBACK, PUBLISH, SUBACK, connect, packet, publish};

const DISCONNECT: [u8; 2] = [0xe0, 0];
/// Will Flag, Clean Session.
const WITH_WILL: u8 = 0b110;
const PATIENCE: Duration = Duration::from_secs(5);

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
