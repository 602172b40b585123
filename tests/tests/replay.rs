//! Retained messages on their way to a new subscription: whatever happens to the connection and the broker meanwhile,
//! each comes, and nobody else waits for it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use wasmqtt_protocol::codec::{Packet, SubscribeOptions};
use wasmqtt_tests::traffic::Traffic;
use wasmqtt_tests::{Broker, Client, Got, Message, Options, Version, at_most};

const V5: Version = Version::V5;
const CONFIG: &str = "[store]\ndurability = \"os\"\n";
/// More than a Session's queue takes of a replay, than one look at the topics finds, and than a load from the store.
const COUNT: usize = 3_000;

fn retain(broker: &Broker, count: usize, qos: u8) {
    let mut publisher = broker.connect(&Options::new(V5, "publisher"));
    for index in 0..count {
        let message = Message::new(&format!("ret/{index:05}"), index.to_string()).retained().qos(qos);
        if qos == 0 {
            publisher.send_publish(&message);
        } else {
            assert!(publisher.publish(&message) < 0x80);
        }
    }
    publisher.ping();
}

fn slow_reader() -> Options {
    Options { receive_maximum: Some(50), ..Options::new(V5, "reader").resume() }
}

/// How a connection ends, or its broker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Cut,
    TakenOver,
    Crash,
    Stop,
}

/// Takes `first` messages, loses the connection, takes the rest: how often each came to its end.
fn replay_over(end: End, qos: u8, first: usize) -> BTreeMap<String, usize> {
    let mut broker = Broker::start(CONFIG);
    retain(&broker, COUNT, 2);
    let mut reader = broker.connect(&slow_reader());
    assert_eq!(reader.subscribe("ret/#", qos), qos);
    let mut seen = BTreeMap::new();
    let mut take = |reader: &mut Client, count: usize| {
        for _ in 0..count {
            *seen.entry(reader.message().topic).or_insert(0) += 1;
        }
    };
    take(&mut reader, first);
    match end {
        End::Cut => reader.vanish(),
        End::TakenOver => {}
        End::Crash => broker = Broker::start_in(broker.crash(), CONFIG),
        End::Stop => {
            broker = Broker::start_in(broker.stop_for_another(), CONFIG);
        }
    }
    let mut reader = broker.connect(&slow_reader());
    assert!(reader.connack.session_present);
    take(&mut reader, COUNT - first);
    // With QoS 1 what was acknowledged a moment before may come again.
    while let Some(got) = reader.recv_within(Duration::from_millis(500)) {
        let Got::Publish(message) = got else { continue };
        assert_eq!(qos, 1, "{message:?} came again");
        *seen.entry(message.topic).or_insert(0) += 1;
        reader.ack(Packet::Puback, message.id, 0);
    }
    seen
}

/// No SUBSCRIBE is needed: messages pending transmission are Session state. MQTT 5.0 §4.1, [MQTT-3.3.1-9].
#[test]
fn retained_messages_go_on_with_the_session() {
    for end in [End::Cut, End::TakenOver, End::Crash, End::Stop] {
        let seen = replay_over(end, 1, 500);
        assert_eq!(seen.len(), COUNT, "{end:?}");
    }
}

/// MQTT 5.0 §4.3.3 [MQTT-4.3.3-10].
#[test]
fn retained_messages_of_qos_2_come_exactly_once() {
    for end in [End::Cut, End::Crash] {
        let seen = replay_over(end, 2, 300);
        assert_eq!(seen.len(), COUNT, "{end:?}");
        assert!(seen.values().all(|count| *count == 1), "{end:?}");
    }
}

/// What was retained again reaches the subscription when it is published, and only so; what was removed does not come.
/// [MQTT-3.3.1-5], [MQTT-3.3.1-6], [MQTT-3.3.1-9].
#[test]
fn nothing_old_comes_after_something_new() {
    let broker = Broker::start(CONFIG);
    retain(&broker, COUNT, 1);
    let mut reader = broker.connect(&slow_reader());
    assert_eq!(reader.subscribe("ret/#", 1), 1);
    let first = reader.recv_publish();
    let mut publisher = broker.connect(&Options::new(V5, "other"));
    let last = |back: usize| format!("ret/{:05}", COUNT - back);
    publisher.publish(&Message::new(&last(1), "new").retained().qos(1));
    publisher.publish(&Message::new(&last(2), "").retained().qos(1));
    publisher.publish(&Message::new("ret/99999", "later").retained().qos(1));
    reader.ack(Packet::Puback, first.id, 0);
    let mut seen: BTreeMap<String, Vec<String>> = BTreeMap::new();
    while let Some(Got::Publish(message)) = reader.recv_within(Duration::from_secs(2)) {
        reader.ack(Packet::Puback, message.id, 0);
        seen.entry(message.topic.clone()).or_default().push(message.text().to_owned());
    }
    assert_eq!(seen[&last(1)], ["new"]);
    assert_eq!(seen[&last(2)], [""], "the removal itself is a message, and what was removed does not come");
    assert_eq!(seen["ret/99999"], ["later"]);
    assert_eq!(seen.len(), COUNT, "all but the first, and one more");
    assert!(seen.values().all(|values| values.len() == 1));
}

/// [MQTT-3.10.4-2]: what is left of the replay ends with its subscription, also for the next broker.
#[test]
fn a_replay_ends_with_its_subscription() {
    let broker = Broker::start(CONFIG);
    retain(&broker, COUNT, 1);
    let mut reader = broker.connect(&slow_reader());
    assert_eq!(reader.subscribe("ret/#", 1), 1);
    reader.recv_publish();
    assert_eq!(reader.unsubscribe(&["ret/#"]), [0]);
    let broker = Broker::start_in(broker.crash(), CONFIG);
    let mut reader = broker.connect(&slow_reader());
    let mut count = 0;
    while let Some(Got::Publish(message)) = reader.recv_within(Duration::from_secs(1)) {
        reader.ack(Packet::Puback, message.id, 0);
        count += 1;
    }
    assert!((1..COUNT / 2).contains(&count), "{count}: what was queued before still comes, the rest does not");
}

/// MQTT 5.0 §3.8.4: each gets its Reason Code, and it is one subscription. Filters beyond
/// `limits.filters_per_packet_max` that are not the same are refused.
#[test]
fn the_same_filter_many_times_in_one_packet_is_one_replay() {
    let broker = Broker::start("[limits]\nfilters_per_packet_max = 20\n");
    retain(&broker, 100, 1);
    for (version, refused) in [(Version::V311, 0x80), (V5, 0x97)] {
        let mut client = broker.connect(&Options::new(version, "client"));
        let many: Vec<String> = (0..30).map(|n| format!("other/{n}")).collect();
        let mut filters = vec![("ret/+", at_most(1)); 30];
        filters.extend(many.iter().map(|filter| (filter.as_str(), at_most(0))));
        filters.push(("ret/+", at_most(1)));
        let expected = [[1; 30].as_slice(), &[0; 19], &[refused; 11], &[1]].concat();
        assert_eq!(client.subscribe_with(None, &filters), expected, "{version:?}");
        for _ in 0..100 {
            client.message();
        }
        client.check_silent();
        client.disconnect();
    }
}

/// A client that acknowledges nothing: so many messages of a replay are queued for it, and no more; the others wait where
/// they are retained. With a small queue, half of that is left for messages that are published.
#[test]
fn queued_messages_of_a_replay_are_bounded() {
    for (queue_messages_max, queued) in [(10_000, 256), (100, 50)] {
        let broker = Broker::start(&format!("[limits]\nqueue_messages_max = {queue_messages_max}\n"));
        retain(&broker, 600, 1);
        let mut reader = broker.connect(&Options { receive_maximum: Some(1), ..Options::new(V5, "reader") });
        assert_eq!(reader.subscribe("ret/#", 1), 1);
        let first = reader.recv_publish();
        // Until the replay has gone as far as it goes.
        std::thread::sleep(Duration::from_millis(500));
        assert_eq!(reader.unsubscribe(&["ret/#"]), [0]);
        reader.ack(Packet::Puback, first.id, 0);
        let rest = std::iter::from_fn(|| match reader.recv_within(Duration::from_millis(500))? {
            Got::Publish(message) => {
                reader.ack(Packet::Puback, message.id, 0);
                Some(message)
            }
            got => panic!("{got:?}"),
        });
        assert_eq!(rest.count(), queued, "of {queue_messages_max}");
        assert_eq!(reader.subscribe("ret/#", 1), 1);
        let mut all: Vec<String> = (0..600).map(|_| reader.message().topic).collect();
        all.dedup();
        assert_eq!(all.len(), 600, "they are still there");
    }
}

/// Another SUBSCRIBE with the same filter has the replay begin again, and there is one of it. [MQTT-3.8.4-3]
#[test]
fn a_subscription_has_one_replay() {
    const SUBSCRIBES: usize = 20;
    let broker = Broker::start("");
    retain(&broker, 600, 1);
    let mut reader = broker.connect(&Options { receive_maximum: Some(1), ..Options::new(V5, "reader") });
    for _ in 0..SUBSCRIBES {
        assert_eq!(reader.subscribe("ret/#", 1), 1);
    }
    let mut seen = BTreeMap::new();
    loop {
        match reader.recv_within(Duration::from_millis(500)) {
            Some(Got::Publish(message)) => {
                reader.ack(Packet::Puback, message.id, 0);
                *seen.entry(message.topic).or_insert(0) += 1;
            }
            got => break assert_eq!(got, None),
        }
    }
    assert_eq!(seen.len(), 600);
    // What was queued before it began again still comes; the rest comes once.
    let again = seen.values().filter(|count| **count > 1).count();
    assert!(again <= 300, "{again} of 600 came more than once");
}

/// Replays of others, and packets made to cost as much as possible, do not make anybody wait.
#[test]
fn replays_do_not_hold_up_other_clients() {
    let broker = Broker::start("shards = 1\n");
    retain(&broker, 10_000, 0);
    let traffic = || Traffic::start(broker.address(), 4, 2_000, None);
    let quiet = {
        let traffic = traffic();
        std::thread::sleep(Duration::from_secs(2));
        traffic.stop()
    };
    let traffic = traffic();
    let until = Instant::now() + Duration::from_secs(3);
    let mut attacker = broker.connect(&Options::new(V5, "attacker"));
    let filters: Vec<(&str, SubscribeOptions)> = vec![("#", at_most(0)); 20_000];
    let mut packets = 0;
    while Instant::now() < until {
        let packet_id = attacker.send_subscribe(None, &filters);
        // Each begins the replay again; a part of it comes in between.
        while !matches!(attacker.recv(), Got::Suback(id, reasons) if id == packet_id && reasons.len() == 20_000) {}
        packets += 1;
    }
    let attacked = traffic.stop();
    println!("quiet: {quiet:?}; with {packets} packets: {attacked:?}");
    // One such packet used to take a shard for several seconds.
    assert!(
        attacked.p99() < quiet.p99() * 10 + Duration::from_millis(1_500),
        "quiet: {quiet:?}; attacked: {attacked:?}"
    );
}
