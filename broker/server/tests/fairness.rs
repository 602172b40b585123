//! One client that sends as fast as it can does not keep others waiting.
#![allow(missing_docs, reason = "tests")]

mod common;

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use wasmqtt_protocol::ports::{Memory, NoPlugins};

use self::common::store::Slow;
use self::common::{Broker, CONNACK, Client, PUBACK, PUBLISH, SUBACK, packet, publish};

/// Pings for each figure.
const PINGS: usize = 150;
/// A turn of this build, on a machine that does other things as well.
const ENOUGH: Duration = Duration::from_millis(150);

/// How long nineteen of twenty pings take at most.
fn latency(client: &mut Client) -> Duration {
    let mut took: Vec<Duration> = (0..PINGS)
        .map(|_| {
            std::thread::sleep(Duration::from_millis(5));
            let begun = Instant::now();
            client.ping();
            begun.elapsed()
        })
        .collect();
    took.sort_unstable();
    took[PINGS * 19 / 20]
}

/// Sends these bytes again and again until told to stop.
fn flood(broker: &Broker, bytes: &[u8], stop: &AtomicBool) {
    let mut client = broker.connect("flood", true);
    client.expect(CONNACK);
    while !stop.load(Ordering::Relaxed) {
        client.stream().write_all(bytes).unwrap();
    }
}

fn check_others_are_served(broker: &Broker, bytes: &[u8]) {
    let mut client = broker.connect("pings", true);
    client.expect(CONNACK);
    let quiet = latency(&mut client);
    let stop = AtomicBool::new(false);
    let busy = std::thread::scope(|scope| {
        scope.spawn(|| flood(broker, bytes, &stop));
        std::thread::sleep(Duration::from_millis(300));
        let busy = latency(&mut client);
        stop.store(true, Ordering::Relaxed);
        busy
    });
    assert!(busy < ENOUGH.max(quiet * 5), "pings take {busy:?} beside a flood, {quiet:?} without");
}

/// 2,000 messages of one byte at a time, to nobody.
#[test]
fn others_are_served_beside_a_flood_of_tiny_messages() {
    let broker = Broker::start(Arc::new(NoPlugins), Arc::new(Memory));
    check_others_are_served(&broker, &publish(PUBLISH, "t", None, b"x").repeat(2000));
}

/// Few packets, and each is a lot of work: deliveries count as well.
#[test]
fn others_are_served_beside_a_flood_to_many_subscribers() {
    let broker = Broker::start(Arc::new(NoPlugins), Arc::new(Memory));
    // They do not read: after some time messages for them are dropped, which is as much work.
    let subscribers: Vec<Client> = (0..200)
        .map(|number| {
            let mut client = broker.connect(&format!("subscriber-{number}"), true);
            client.expect(CONNACK);
            client.subscribe("t", 0);
            client.expect(SUBACK);
            client
        })
        .collect();
    check_others_are_served(&broker, &publish(PUBLISH, "t", None, b"x").repeat(2000));
    drop(subscribers);
}

/// What cannot be handled for now is not read either, beyond what one read takes: the rest waits where the client sees it.
#[cfg(target_os = "linux")]
#[test]
fn what_is_read_and_not_handled_is_bounded() {
    const INBOX_BYTES: usize = 64 << 10;
    const HANDLED: usize = 1024;
    let store = Slow::at_once();
    let broker = Broker::start(Arc::new(NoPlugins), Arc::new(store.clone()));
    let mut keeper = broker.connect("keeper", false);
    keeper.expect(CONNACK);
    keeper.subscribe("a", 1);
    keeper.expect(SUBACK);
    let mut client = broker.connect("client", true);
    client.expect(CONNACK);
    // As many as there may be wait for the store: nothing else is handled.
    store.hang();
    let tiny = publish(PUBLISH | 2, "a", Some(1), b"x");
    let written = client.stuff(&tiny.repeat(1000));
    let held = written - client.bytes_in_kernel() - HANDLED * tiny.len();
    assert!(written > 4 * INBOX_BYTES, "{written}");
    assert!(held <= INBOX_BYTES, "{held} of {written} bytes are kept");
    // One packet more, of which a byte is missing.
    let mut other = broker.connect("other", true);
    other.expect(CONNACK);
    let large = packet(PUBLISH, &[&[0, 1, b'b'][..], &vec![b'x'; 900_000]].concat());
    let (last, all) = large.split_last().unwrap();
    other.write(all);
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(other.bytes_in_kernel(), 0, "it is read as it comes");
    other.write(&[&[*last], &tiny.repeat(HANDLED)[..]].concat());
    let written = other.stuff(&tiny.repeat(1000));
    let held = written - other.bytes_in_kernel();
    assert!(held <= INBOX_BYTES, "{held} of {written} bytes are kept");
    store.commit_all();
    for client in [&mut client, &mut other] {
        client.expect(PUBACK);
    }
}
