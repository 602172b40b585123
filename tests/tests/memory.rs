//! Whatever clients do, the broker's memory stays within its bounds: each test fills one of those that
//! `broker/ARCHITECTURE.md` lists and looks at the resident memory of the process.
//!
//! `WASMQTT_ATTACK_SECS` makes the attacks that go on for a while longer; `./dev attack` sets it to 60.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use wasmqtt_tests::{Broker, Client, Got, Message, Options, Version, raw};

const V5: Version = Version::V5;
const MIB: usize = 1 << 20;
/// What an allocator, some hundred connections and a debug build take besides.
const SLACK: usize = 24 * MIB;

fn attack_time() -> Duration {
    let secs = std::env::var("WASMQTT_ATTACK_SECS").ok().and_then(|secs| secs.parse().ok()).unwrap_or(4);
    Duration::from_secs(secs)
}

/// The broker has grown by no more than `bound` bytes, and the slack, since it had `before`.
#[track_caller]
fn check_growth(broker: &Broker, before: usize, bound: usize) {
    let grown = broker.rss().saturating_sub(before);
    assert!(grown <= bound + SLACK, "grew by {} MiB, the bound is {} KiB", grown / MIB, bound / 1024);
}

/// Publishes QoS 0 messages of this size as fast as the broker takes them, until told to stop.
fn flood(broker: &Broker, topic: &str, bytes: usize, stop: &AtomicBool) {
    let mut client = broker.connect(&Options::new(V5, "flood"));
    let message = raw::publish(V5, 0x30, topic.as_bytes(), None, &[], &vec![b'x'; bytes]);
    let burst = message.repeat(64 * 1024 / message.len() + 1);
    while !stop.load(Ordering::Relaxed) {
        client.send_raw(&burst);
    }
}

/// A subscriber that reads all the time, and slower than messages come, over a path with a small window: it always has
/// a backlog, and what was written to it is not kept.
#[test]
fn a_slow_but_reading_subscriber_does_not_make_the_broker_grow() {
    let folder = tempfile::tempdir().expect("folder");
    let socket = folder.path().join("mqtt.sock");
    let broker = Broker::start(&format!("[[listener]]\nprotocol = \"unix\"\nbind = \"{}\"\n", socket.display()));
    let mut slow = UnixStream::connect(&socket).expect("connect to the Unix socket");
    slow.write_all(&raw::connect(V5, 2, &[], &[raw::text("slow")])).expect("CONNECT");
    let entry = [raw::text("t"), vec![0]].concat();
    slow.write_all(&raw::filters(V5, 0x82, 1, &[], &entry)).expect("SUBSCRIBE");
    let mut buffer = vec![0; 64 * 1024];
    let mut answers = Vec::new();
    while !answers.windows(4).any(|window| window == [0x90, 4, 0, 1]) {
        let count = slow.read(&mut buffer).expect("CONNACK and SUBACK");
        answers.extend_from_slice(&buffer[..count]);
    }
    let before = broker.rss();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| flood(&broker, "t", 1000, &stop));
        let end = Instant::now() + attack_time();
        let mut read = 0;
        while Instant::now() < end {
            read += slow.read(&mut buffer).expect("messages");
            std::thread::sleep(Duration::from_millis(2));
        }
        stop.store(true, Ordering::Relaxed);
        assert!(read > 4 * MIB, "the subscriber reads: {read} bytes");
        check_growth(&broker, before, 4 * MIB);
    });
}

/// Topic Aliases for the longest topics. MQTT 5.0 §3.3.2.3.4.
#[test]
fn aliases_of_many_clients_stay_within_their_bytes() {
    let broker = Broker::start("[limits]\ntopic_alias_maximum = 64\n");
    let before = broker.rss();
    let mut clients = Vec::new();
    for place in 0..50 {
        let mut client = broker.connect(&Options::new(V5, &format!("c{place}")));
        for alias in 1..=64 {
            client.send_publish(&Message::new(&format!("{alias}/{}", "x".repeat(60_000)), "").alias(alias));
        }
        clients.push(client);
    }
    for client in &mut clients {
        client.check_ended(0x97);
    }
    check_growth(&broker, before, 50 * 256 * 1024);
}

/// A client that reads everything and acknowledges nothing. MQTT 5.0 §4.9.
#[test]
fn unacknowledged_messages_stay_within_their_bytes() {
    let config = "[limits]\ninflight_bytes_max = 1048576\nqueue_bytes_max = 4194304\n";
    let broker = Broker::start(&format!("{config}[store]\ndurability = \"memory\"\n"));
    let options = Options { receive_maximum: Some(65_535), ..Options::new(V5, "silent") };
    let mut silent = broker.connect(&options);
    silent.subscribe("t", 1);
    let mut publisher = broker.connect(&Options::new(V5, "publisher"));
    let before = broker.rss();
    for _ in 0..1000 {
        publisher.publish(&Message::new("t", vec![b'x'; 64 * 1024]).qos(1));
    }
    check_growth(&broker, before, 5 * MIB);
    let first = silent.recv_publish();
    silent.ping();
    assert_eq!(first.id, 1);
}

/// Filters as long as they may be: the Session has room for some, the others are refused. [MQTT-3.8.4-5], §3.9.3.
#[test]
fn subscriptions_stay_within_their_bytes() {
    let broker = Broker::start("[limits]\nsubscription_bytes_max = 4194304\n");
    let mut client = broker.connect(&Options::new(V5, "c"));
    let before = broker.rss();
    let long = format!("{}/{}", "x/".repeat(150), "y".repeat(8000));
    let codes: Vec<u8> = (0..500).map(|place| client.subscribe(&format!("{place}/{long}"), 0)).collect();
    assert_eq!((codes[0], codes[499]), (0, 0x97));
    assert_eq!(client.subscribe(&format!("0/{long}"), 1), 1, "one that is there can be changed");
    let taken = codes.iter().position(|code| *code != 0).expect("one is refused");
    assert!((20..200).contains(&taken), "{taken} were taken");
    check_growth(&broker, before, 4 * MIB);
    for place in 0..taken {
        client.unsubscribe(&[&format!("{place}/{long}")]);
    }
    assert_eq!(client.subscribe(&format!("new/{long}"), 0), 0, "what is given back makes room");
}

/// `sessions_max`: online and offline; who has one may come back. MQTT 5.0 §3.2.2.2, 3.1.1 §3.2.2.3.
#[test]
fn sessions_beyond_the_limit_are_refused() {
    let broker = Broker::start("[limits]\nsessions_max = 10\n");
    let options = |place: usize| Options { session_expiry: Some(3600), ..Options::new(V5, &format!("c{place}")) };
    let clients: Vec<Client> = (0..10).map(|place| broker.connect(&options(place))).collect();
    clients.into_iter().for_each(Client::disconnect);
    broker.check_refused(&options(10), 0x97);
    broker.check_refused(&Options::new(Version::V311, "another"), 3);
    let mut back = broker.connect(&options(3).resume());
    assert!(back.connack.session_present);
    back.ping();
    back.disconnect_with(0, Some(0));
    broker.connect(&options(10)).ping();
}

/// Messages to ever new topics: what is remembered about them is bounded.
#[test]
fn routes_of_ever_new_topics_stay_within_their_bytes() {
    let broker = Broker::start("shards = 1\n[limits]\nroute_cache_bytes_max = 4194304\n");
    let mut all = broker.connect(&Options::new(V5, "all"));
    all.subscribe("#", 0);
    all.unsubscribe(&["#"]);
    let mut client = broker.connect(&Options::new(V5, "c"));
    let before = broker.rss();
    for block in 0..100 {
        let bytes: Vec<u8> = (0..1000)
            .flat_map(|place| {
                let topic = format!("{block}/{place}/{}", "x".repeat(500));
                raw::publish(V5, 0x30, topic.as_bytes(), None, &[], b"x")
            })
            .collect();
        client.send_raw(&bytes);
    }
    client.ping();
    check_growth(&broker, before, 4 * MIB);
}

/// `memory_mib`: queues of many Sessions, each within its own bound, would take far more than the broker may have.
/// Near the budget publishers are slowed and then refused (0x97), the log says so once, and everybody is still there;
/// new clients wait, and get in when there is memory again.
#[test]
fn the_broker_stays_within_its_memory_budget() {
    const BUDGET_MIB: usize = 192;
    let config = format!("shards = 2\n[limits]\nmemory_mib = {BUDGET_MIB}\n[store]\ndurability = \"memory\"\n");
    let broker = Broker::start(&config);
    // They take one message and no more.
    let options = |place: usize| Options { receive_maximum: Some(1), ..Options::new(V5, &format!("c{place}")) };
    let stuck: Vec<Client> = (0..60)
        .map(|place| {
            let mut client = broker.connect(&options(place));
            client.subscribe(&format!("t/{place}"), 1);
            client
        })
        .collect();
    let mut witness = broker.connect(&Options::new(V5, "witness"));
    let mut publisher = broker.connect(&Options::new(V5, "publisher"));
    let mut refused = 0;
    let begun = Instant::now();
    // 60 Sessions could hold 960 MiB.
    for place in (0..60).cycle().take(60 * 160) {
        let reason = publisher.publish(&Message::new(&format!("t/{place}"), vec![b'x'; 100_000]).qos(1));
        refused += usize::from(reason == 0x97);
        if refused > 20 || begun.elapsed() > Duration::from_mins(1) {
            break;
        }
    }
    assert!(refused > 20, "nothing was refused; {} MiB resident", broker.rss() / MIB);
    witness.ping();
    check_growth(&broker, 0, BUDGET_MIB * MIB);
    assert_eq!(broker.log().matches("memory is nearly used up").count(), 1, "{}", broker.log());

    let mut late = Client::open(broker.address(), V5);
    late.send_connect(&Options::new(V5, "late"));
    assert_eq!(late.recv_within(Duration::from_millis(500)), None, "new connections wait");
    stuck.into_iter().for_each(Client::disconnect);
    assert!(matches!(late.recv(), Got::Connack(connack) if connack.reason == 0), "there is memory again");
    witness.ping();
    assert_eq!(publisher.publish(&Message::new("t/0", "x").qos(1)), 0x10, "no subscriber is left, and room is");
}
