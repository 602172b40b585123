//! Many clients, large messages, slow readers.

use std::time::{Duration, Instant};

use wasmqtt_protocol::codec::Packet;
use wasmqtt_tests::{BOTH, Broker, Client, Got, Message, Options, Version, at_most};

const V5: Version = Version::V5;

/// All connected before the first one leaves.
#[test]
fn two_thousand_clients_at_once_publish_and_subscribe() {
    const THREADS: usize = 10;
    const EACH: usize = 200;
    let broker = Broker::start("");
    let connected = std::sync::Barrier::new(THREADS + 1);
    let done = std::sync::Barrier::new(THREADS + 1);
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (broker, connected, done) = (&broker, &connected, &done);
            scope.spawn(move || {
                let mut clients: Vec<Client> = (0..EACH)
                    .map(|index| {
                        let mut client = broker.connect(&Options::new(BOTH[index % 2], &format!("c{thread}-{index}")));
                        let own = format!("own/{thread}/{index}");
                        client.subscribe_with(None, &[("all", at_most(1)), (&own, at_most(1))]);
                        client
                    })
                    .collect();
                connected.wait();
                for (index, client) in clients.iter_mut().enumerate() {
                    // To the neighbour, who may be on another shard.
                    let to = format!("own/{thread}/{}", (index + 1) % EACH);
                    client.send_publish(&Message::new(&to, index.to_string()).qos(1).id(9));
                }
                for (index, client) in clients.iter_mut().enumerate() {
                    let mut seen: Vec<_> = client.texts(2);
                    seen.sort();
                    let mut expected = ["everybody".to_owned(), ((index + EACH - 1) % EACH).to_string()];
                    expected.sort();
                    assert_eq!(seen, expected);
                    client.recv_where(|got| matches!(got, Got::Puback(9, 0)).then_some(()));
                }
                done.wait();
            });
        }
        let mut publisher = broker.connect(&Options::new(V5, "publisher"));
        connected.wait();
        publisher.publish(&Message::new("all", "everybody").qos(1));
        done.wait();
    });
}

/// MQTT 5.0 and 3.1.1 §3.3.3.
#[test]
fn payloads_of_one_mebibyte_arrive_whole() {
    let broker = Broker::start("[limits]\npacket_bytes_max = 1100000\n");
    let payload: Vec<u8> = (0..1_048_576_u32).map(|index| (index % 251) as u8).collect();
    for version in BOTH {
        let mut publisher = broker.connect(&Options::new(version, "publisher"));
        let mut subscriber = broker.connect(&Options::new(version, "subscriber"));
        subscriber.subscribe("big", 2);
        for qos in [0, 1, 2] {
            publisher.publish(&Message::new("big", &payload).qos(qos).retained());
            let message = subscriber.message();
            assert_eq!((message.qos, message.retain, message.payload.len()), (qos, false, payload.len()));
            assert!(message.payload == payload);
        }
        let mut late = broker.connect(&Options::new(version, "late"));
        late.subscribe("big", 2);
        let message = late.message();
        assert!(message.payload == payload && message.retain);
        publisher.publish(&Message::new("big", "").retained().qos(1));
    }
}

/// The default limit takes a packet of exactly one mebibyte.
#[test]
fn packet_of_exactly_the_limit_is_taken() {
    let broker = Broker::start("");
    for version in BOTH {
        let mut client = broker.connect(&Options::new(version, "c"));
        client.subscribe("t", 0);
        let head = 1 + 3 + 3 + usize::from(version == V5);
        client.publish(&Message::new("t", vec![7; 1_048_576 - head]));
        assert_eq!(client.message().payload.len(), 1_048_576 - head);
        assert_eq!(client.last_len, 1_048_576);
    }
}

/// Bounded buffers: a client that does not read loses QoS 0 messages, and nobody waits for it.
#[test]
fn slow_reader_costs_itself_and_nobody_else() {
    const COUNT: usize = 400;
    let broker = Broker::start("");
    let mut slow = broker.connect(&Options::new(V5, "slow"));
    slow.subscribe("flood", 0);
    let mut fast = broker.connect(&Options::new(V5, "fast"));
    fast.subscribe("flood", 0);
    let mut publisher = broker.connect(&Options::new(V5, "publisher"));
    let payload = vec![b'x'; 100_000];
    let before = broker.rss();
    let start = Instant::now();
    for index in 0..COUNT {
        publisher.send_publish(&Message::new("flood", [index.to_string().as_bytes(), b" ", &payload].concat()));
        let message = fast.message();
        assert!(message.payload.starts_with(format!("{index} ").as_bytes()));
    }
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    let grown = broker.rss().saturating_sub(before);
    assert!(grown < 16 << 20, "{grown} bytes kept for one slow reader");
    // It is still connected, and gets what comes once it reads again.
    slow.ping();
    let mut got = 0;
    while let Some(Got::Publish(_)) = slow.recv_within(Duration::from_millis(300)) {
        got += 1;
    }
    assert!(got < COUNT, "{got}");
    publisher.publish(&Message::new("flood", "after"));
    assert_eq!(slow.message().text(), "after");
}

/// The same with QoS 1: what does not fit waits, and all of it arrives in order.
#[test]
fn slow_reader_gets_all_its_qos_1_messages() {
    const COUNT: usize = 300;
    let broker = Broker::start("[limits]\nqueue_bytes_max = 67108864\n");
    let mut slow = broker.connect(&Options::new(V5, "slow"));
    slow.subscribe("t", 1);
    let mut publisher = broker.connect(&Options::new(V5, "publisher"));
    let payload = vec![b'x'; 50_000];
    for index in 0..COUNT {
        publisher.publish(&Message::new("t", [index.to_string().as_bytes(), b" ", &payload].concat()).qos(1));
    }
    for index in 0..COUNT {
        assert!(slow.message().payload.starts_with(format!("{index} ").as_bytes()));
    }
    slow.check_silent();
}

/// `connections_max`: what cannot be served is closed. [MQTT-4.8.0-2] (3.1.1).
#[test]
fn connections_beyond_the_limit_are_closed() {
    let broker = Broker::start("[limits]\nconnections_max = 5\n");
    // The harness itself connects once to see whether the broker is ready, which the broker may not yet have let go.
    let mut clients: Vec<_> = (0..5).map(|_| connect_in_the_end(&broker)).collect();
    let mut sixth = Client::open(broker.address(), V5);
    sixth.send_connect(&Options::new(V5, ""));
    let got = sixth.recv();
    assert!(matches!(&got, Got::Closed) || matches!(&got, Got::Connack(connack) if connack.reason >= 0x80), "{got:?}");
    clients.iter_mut().for_each(Client::ping);
    clients.pop().expect("one").disconnect();
    connect_in_the_end(&broker).ping();
}

/// `retained_messages_max` and `retained_bytes_max`, which `$SYS` has a part of: what does not fit is delivered and not
/// kept; what is there can be replaced. MQTT 5.0 §3.3.1.3.
#[test]
fn retained_messages_beyond_the_limit_are_delivered_and_not_kept() {
    const COUNT: usize = 60;
    for (limits, payload) in [("retained_messages_max = 50", 10), ("retained_bytes_max = 500000", 10_000)] {
        let broker = Broker::start(&format!("[limits]\n{limits}\n"));
        let mut publisher = broker.connect(&Options::new(V5, "publisher"));
        let mut live = broker.connect(&Options::new(V5, "live"));
        live.subscribe("r/+", 1);
        let message =
            |n: usize, letter: &str| Message::new(&format!("r/{n:02}"), letter.repeat(payload)).qos(1).retained();
        for n in 0..COUNT {
            publisher.publish(&message(n, "x"));
            assert_eq!(live.message().topic, format!("r/{n:02}"), "it is delivered");
        }
        publisher.publish(&message(7, "y"));
        let mut late = broker.connect(&Options::new(V5, "late"));
        late.subscribe("r/+", 1);
        let mut kept = Vec::new();
        while let Some(Got::Publish(message)) = late.recv_within(Duration::from_millis(500)) {
            late.ack(Packet::Puback, message.id, 0);
            kept.push((message.topic.clone(), message.text().starts_with('y')));
        }
        kept.sort();
        assert!((20..50).contains(&kept.len()), "{limits}: {} are kept", kept.len());
        let expected: Vec<_> = (0..kept.len()).map(|n| (format!("r/{n:02}"), n == 7)).collect();
        assert_eq!(kept, expected, "the first ones, and the one that was replaced");
    }
}

/// Tries until there is room.
fn connect_in_the_end(broker: &Broker) -> Client {
    let begun = Instant::now();
    loop {
        match broker.try_connect(&Options::new(V5, "")) {
            (client, Got::Connack(connack)) if connack.reason == 0 => return client,
            (_, got) => assert!(begun.elapsed() < Duration::from_secs(10), "{got:?}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// More retained messages than the client takes at once, and than fit into a buffer: each comes, once.
#[test]
fn thousands_of_retained_messages_reach_a_new_subscription() {
    const COUNT: usize = 3000;
    let broker = Broker::start("[limits]\nqueue_messages_max = 100\noutbound_bytes_max = 65536\n");
    let mut publisher = broker.connect(&Options::new(V5, "publisher"));
    for index in 0..COUNT {
        publisher.send_publish(&Message::new(&format!("r/{index}"), vec![b'x'; 100]).retained());
    }
    publisher.ping();
    for version in BOTH {
        for qos in [0, 1] {
            let mut client = broker.connect(&Options { receive_maximum: Some(7), ..Options::new(version, "c") });
            publisher.publish(&Message::new("r/live", "gone again").retained().qos(1));
            publisher.publish(&Message::new("r/live", "").retained().qos(1));
            client.subscribe_with(None, &[("r/+", at_most(qos))]);
            let mut seen: Vec<usize> = (0..COUNT)
                .map(|_| {
                    let message = client.message();
                    message.topic.strip_prefix("r/").and_then(|rest| rest.parse().ok()).expect("its number")
                })
                .collect();
            seen.sort_unstable();
            assert_eq!(seen, (0..COUNT).collect::<Vec<_>>(), "{version:?} QoS {qos}");
            client.check_silent();
        }
    }
}

/// One Client Identifier, many connections that take it from each other: one stays, and its Session works.
#[test]
fn storm_of_takeovers_leaves_one_connection() {
    let broker = Broker::start("");
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let broker = &broker;
            scope.spawn(move || {
                for _ in 0..40 {
                    let mut client = Client::open(broker.address(), BOTH[thread % 2]);
                    client.send_connect(&Options::new(client.version, "contested").resume());
                    client.send_subscribe(None, &[("t", at_most(1))]);
                    // Whatever comes, it is a sequence of packets that makes sense.
                    let first = client.recv();
                    let let_in = matches!(&first, Got::Connack(connack) if connack.reason == 0);
                    assert!(let_in || first == Got::Closed, "{first:?}");
                }
            });
        }
    });
    let mut last = broker.connect(&Options::new(V5, "contested").resume());
    assert!(last.connack.session_present);
    last.subscribe("t", 1);
    let mut publisher = broker.connect(&Options::new(V5, "publisher"));
    publisher.publish(&Message::new("t", "settled").qos(1));
    assert_eq!(last.message().text(), "settled");
    last.check_silent();
}

/// Subscriptions that come and go do not disturb those that stay.
#[test]
fn churn_around_a_subscription_loses_nothing() {
    const COUNT: usize = 2000;
    let broker = Broker::start("");
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for thread in 0..3 {
            let (broker, done) = (&broker, &done);
            scope.spawn(move || {
                let filters = ["busy/+", "#", "$share/g/busy/1", "busy/1"];
                for round in 0.. {
                    if done.load(std::sync::atomic::Ordering::Relaxed) {
                        break;
                    }
                    let mut client = broker.connect(&Options::new(BOTH[round % 2], &format!("churn{thread}")));
                    client.subscribe(filters[(round + thread) % 4], 1);
                    client.unsubscribe(&[filters[(round + thread) % 4]]);
                    client.subscribe(filters[round % 4], 0);
                    drop(client);
                }
            });
        }
        let mut stays = broker.connect(&Options::new(V5, "stays"));
        stays.subscribe("busy/#", 1);
        let mut publisher = broker.connect(&Options::new(V5, "publisher"));
        for index in 0..COUNT {
            publisher.publish(&Message::new("busy/1", index.to_string()).qos(1));
            assert_eq!(stays.message().text(), index.to_string());
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        stays.check_silent();
    });
}
