//! CONNECT, CONNACK, and what they agree on. MQTT 5.0 §3.1, §3.2, §3.12 and 3.1.1 the same.

use std::net::Shutdown;
use std::time::{Duration, Instant};

use wasmqtt_protocol::codec::Packet;
use wasmqtt_tests::{ALL, BOTH, Broker, Client, Connack, Got, Message, Options, Version, raw};

const V311: Version = Version::V311;
const V5: Version = Version::V5;

/// [MQTT-3.1.4-5], [MQTT-3.2.0-1] (5.0); [MQTT-3.1.4-4], [MQTT-3.2.0-1] (3.1.1).
#[test]
fn connect_is_answered_with_connack_before_anything_else() {
    let broker = Broker::start("");
    let mut publisher = broker.connect(&Options::new(V5, "publisher"));
    for version in ALL {
        let options = Options::new(version, "session").resume();
        let mut client = broker.connect(&options);
        client.subscribe("t", 1);
        client.vanish();
        publisher.publish(&Message::new("t", "waiting").qos(1));
        let mut client = broker.connect(&options); // `connect` checks that CONNACK is first
        assert_eq!(client.message().text(), "waiting");
        client.disconnect();
        broker.connect(&Options::new(version, "session")).disconnect();
    }
}

/// [MQTT-3.1.0-1] (both).
#[test]
fn first_packet_must_be_connect() {
    let broker = Broker::start("");
    let firsts: [&[u8]; 5] = [
        &[0xC0, 0x00],
        &raw::publish(V311, 0x30, b"t", None, &[], b"x"),
        &raw::filters(V311, 0x82, 1, &[], &[raw::text("t"), vec![0]].concat()),
        &[0xE0, 0x00],
        &[0xF0, 0x00],
    ];
    for first in firsts {
        let mut client = Client::open(broker.address(), V311);
        client.send_raw(first);
        assert_eq!(client.recv(), Got::Closed, "{first:02x?}");
    }
}

/// [MQTT-3.1.0-2] (both), [MQTT-3.2.0-2] (5.0).
#[test]
fn second_connect_is_a_protocol_error() {
    let broker = Broker::start("");
    for version in ALL {
        let options = Options::new(version, "twice");
        let mut client = broker.connect(&options);
        client.send_connect(&options);
        client.check_ended(0x82);
    }
}

/// [MQTT-3.1.2-1] (both).
#[test]
fn other_protocol_names_are_refused() {
    let broker = Broker::start("");
    for (name, level) in [("HTTP", 4), ("mqtt", 5), ("MQTT5", 5), ("", 4)] {
        let mut client = Client::open(broker.address(), V311);
        client.send_raw(&raw::connect_as(name, level, 2, &[], &[raw::text("c")]));
        assert_eq!(client.recv(), Got::Closed, "{name} {level}");
    }
}

/// [MQTT-3.1.2-2] (both), [MQTT-3.2.2-7] (5.0), [MQTT-3.2.2-5] (3.1.1).
#[test]
fn other_protocol_levels_are_told_so() {
    let broker = Broker::start("");
    for (level, answer, code) in
        [(6, V5, 0x84), (127, V5, 0x84), (0, V311, 1), (2, V311, 1), (0x85, V311, 1), (255, V311, 1)]
    {
        let mut client = Client::open(broker.address(), answer);
        client.send_raw(&raw::connect_as("MQTT", level, 2, &[0], &[raw::text("c")]));
        let got = client.recv();
        assert!(matches!(&got, Got::Connack(Connack { reason, .. }) if *reason == code), "level {level}: {got:?}");
        assert_eq!(client.recv(), Got::Closed);
    }
}

fn check_malformed_connect(broker: &Broker, version: Version, bytes: &[u8], code: u8) {
    let mut client = Client::open(broker.address(), version);
    client.send_raw(bytes);
    if version == V5 {
        let got = client.recv();
        assert!(matches!(&got, Got::Connack(Connack { reason, .. }) if *reason == code), "{got:?} {bytes:02x?}");
    }
    assert_eq!(client.recv(), Got::Closed, "{bytes:02x?}");
}

/// [MQTT-3.1.2-3], [MQTT-3.1.2-11], [MQTT-3.1.2-12], [MQTT-3.1.2-13], [MQTT-3.1.4-1] (5.0);
/// [MQTT-3.1.2-3], [MQTT-3.1.2-11], [MQTT-3.1.2-13], [MQTT-3.1.2-14], [MQTT-3.1.2-15], [MQTT-3.1.4-1],
/// [MQTT-3.2.2-6] (3.1.1).
#[test]
fn contradicting_connect_flags_are_malformed() {
    let broker = Broker::start("");
    for version in BOTH {
        let will = [raw::text("c"), raw::properties(version, &[]), raw::text("w"), raw::text("gone")];
        // Reserved; Will QoS, Will Retain without will.
        for flags in [0x03, 0x0A, 0x12, 0x22] {
            check_malformed_connect(&broker, version, &raw::connect(version, flags, &[], &[raw::text("c")]), 0x81);
        }
        check_malformed_connect(&broker, version, &raw::connect(version, 0x1E, &[], &will), 0x81);
    }
}

/// [MQTT-3.1.2-9], [MQTT-3.1.2-16], [MQTT-3.1.2-17], [MQTT-3.1.2-18], [MQTT-3.1.2-19], [MQTT-3.1.3-1], [MQTT-3.1.3-3]
/// (5.0); [MQTT-3.1.2-9], [MQTT-3.1.2-18] to [MQTT-3.1.2-22], [MQTT-3.1.3-1], [MQTT-3.1.3-3] (3.1.1).
#[test]
fn payload_of_connect_has_what_its_flags_say() {
    let broker = Broker::start("");
    let id = || raw::text("c");
    for version in BOTH {
        let none = || raw::properties(version, &[]);
        // Promised and missing: will, user name, password. Not promised and there: user name. No Client Identifier.
        let wrong = [
            (0x06, vec![id()]),
            (0x06, vec![id(), none(), raw::text("w")]),
            (0x82, vec![id()]),
            (0xC2, vec![id(), raw::text("user")]),
            (0x02, vec![id(), raw::text("user")]),
            (0x82, vec![id(), raw::text("user"), raw::text("password")]),
            (0x02, vec![]),
        ];
        for (flags, payload) in wrong {
            check_malformed_connect(&broker, version, &raw::connect(version, flags, &[], &payload), 0x81);
        }
        let all = [id(), none(), raw::text("w"), raw::text("gone"), raw::text("user"), raw::text("password")];
        let mut client = Client::open(broker.address(), version);
        client.send_raw(&raw::connect(version, 0xC6, &[], &all));
        assert!(matches!(client.recv(), Got::Connack(Connack { reason: 0, .. })));
        client.disconnect();
    }
    // Password without User Name: 5.0 allows it.
    let password = [id(), raw::text("password")];
    check_malformed_connect(&broker, V311, &raw::connect(V311, 0x42, &[], &password), 0x81);
    let mut client = Client::open(broker.address(), V5);
    client.send_raw(&raw::connect(V5, 0x42, &[], &password));
    assert!(matches!(client.recv(), Got::Connack(Connack { reason: 0, .. })));
}

/// [MQTT-3.1.3-4], [MQTT-3.1.3-11], [MQTT-3.1.3-12] (5.0); [MQTT-3.1.3-4], [MQTT-3.1.3-10], [MQTT-3.1.3-11] (3.1.1).
#[test]
fn client_identifier_will_topic_and_user_name_are_utf8() {
    let broker = Broker::start("");
    for version in BOTH {
        for bad in [&b"\xFF"[..], b"a\0b", b"\xED\xA0\x80", b"\xC0\x80"] {
            let id = || raw::text("c");
            let none = || raw::properties(version, &[]);
            for (flags, payload) in [
                (0x02, vec![raw::text(bad)]),
                (0x82, vec![id(), raw::text(bad)]),
                (0x06, vec![id(), none(), raw::text(bad), raw::text("gone")]),
            ] {
                // A Will Topic with NUL is a Topic Name that is not valid as well.
                let mut client = Client::open(broker.address(), version);
                client.send_raw(&raw::connect(version, flags, &[], &payload));
                if version == V5 {
                    let got = client.recv();
                    let Got::Connack(Connack { reason: 0x81 | 0x90, .. }) = got else { panic!("{got:?} {bad:02x?}") };
                }
                assert_eq!(client.recv(), Got::Closed);
            }
        }
    }
}

/// [MQTT-3.1.3-6], [MQTT-3.1.3-7], [MQTT-3.2.2-16] (5.0).
#[test]
fn server_assigns_a_client_identifier_and_tells_it() {
    let broker = Broker::start("");
    let options = Options::new(V5, "").session_expiry(100);
    let mut first = broker.connect(&options);
    let second = broker.connect(&options);
    let id = first.connack.assigned_client_id.clone().expect("assigned");
    assert_ne!(Some(&id), second.connack.assigned_client_id.as_ref());
    first.subscribe("t", 1);
    first.vanish();
    // It is a Client Identifier like others.
    let again = broker.connect(&Options::new(V5, &id).resume());
    assert!(again.connack.session_present);
    assert_eq!(again.connack.assigned_client_id, None);
    // Clean Start 0 is no obstacle.
    assert!(broker.connect(&options.unclean()).connack.assigned_client_id.is_some());
}

/// [MQTT-3.1.3-6], [MQTT-3.1.3-7], [MQTT-3.1.3-8], [MQTT-3.1.3-9] (3.1.1); MQTT 3.1 §3.1 wants 1 to 23 characters.
#[test]
fn empty_client_identifier_needs_a_clean_session_in_3_1_1() {
    let broker = Broker::start("");
    let mut first = broker.connect(&Options::new(V311, ""));
    let mut second = broker.connect(&Options::new(V311, ""));
    first.ping();
    second.ping();
    broker.check_refused(&Options::new(V311, "").unclean(), 2);
    broker.check_refused(&Options::new(Version::V31, ""), 2);
}

/// [MQTT-3.1.3-5], [MQTT-3.1.3-2] (both).
#[test]
fn client_identifiers_tell_sessions_apart() {
    let broker = Broker::start("");
    let long = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ".repeat(20);
    for version in BOTH {
        for id in ["a", "A", "0123456789ABCDEFGHIJKLM", "nopqrstuvwxyzNOPQRSTUVW", "müller/€ $", &long] {
            let options = Options::new(version, id).resume();
            let client = broker.connect(&options);
            assert!(!client.connack.session_present, "{id}");
            client.vanish();
            assert!(broker.connect(&options).connack.session_present, "{id}");
            broker.connect(&Options::new(version, id)).disconnect();
        }
    }
}

/// [MQTT-3.1.2-4], [MQTT-3.1.2-5], [MQTT-3.1.2-6], [MQTT-3.1.4-4], [MQTT-3.2.2-2], [MQTT-3.2.2-3] (5.0);
/// [MQTT-3.1.2-4], [MQTT-3.1.2-6], [MQTT-3.1.4-3], [MQTT-3.2.2-1], [MQTT-3.2.2-2], [MQTT-3.2.2-3] (3.1.1).
#[test]
fn clean_start_begins_a_new_session_and_its_absence_resumes() {
    let broker = Broker::start("");
    let mut publisher = broker.connect(&Options::new(V5, "publisher"));
    for version in BOTH {
        let resume = Options::new(version, "c").resume();
        let mut client = broker.connect(&resume);
        assert!(!client.connack.session_present, "no state yet");
        client.subscribe("t", 1);
        client.vanish();
        let mut client = broker.connect(&resume);
        assert!(client.connack.session_present);
        publisher.publish(&Message::new("t", "still subscribed"));
        assert_eq!(client.message().text(), "still subscribed");
        client.vanish();
        publisher.publish(&Message::new("t", "to be discarded").qos(1));
        let mut client = broker.connect(&Options::new(version, "c"));
        assert!(!client.connack.session_present);
        publisher.publish(&Message::new("t", "no longer subscribed"));
        client.check_silent();
        client.disconnect();
    }
}

/// [MQTT-3.2.2-6] (5.0), [MQTT-3.2.2-4] (3.1.1): `check_refused` looks at Session Present. [MQTT-3.1.4-2] (5.0),
/// [MQTT-3.1.4-5], [MQTT-3.2.2-5] (3.1.1), [MQTT-3.1.4-6], [MQTT-3.2.2-7], [MQTT-3.2.2-8] (5.0).
#[test]
fn refused_client_is_told_and_nothing_it_sends_is_processed() {
    // Only the first Session finds room: others are refused, and the first sees whether they publish all the same.
    let broker = Broker::start("[limits]\nsessions_max = 1\n");
    let mut watcher = broker.connect(&Options::new(V5, "watcher"));
    watcher.subscribe("#", 1);
    for (version, code) in [(V311, 3), (V5, 0x97)] {
        let options = Options::new(version, "c").resume();
        broker.check_refused(&options, code);
        // Packets behind the CONNECT.
        let mut client = Client::open(broker.address(), version);
        client.send_connect(&options);
        client.send_publish(&Message::new("t", "not yours").qos(1));
        client.send(&Packet::Pingreq);
        let got = client.recv();
        assert!(matches!(&got, Got::Connack(Connack { reason, .. }) if *reason == code), "{got:?}");
        assert_eq!(client.recv(), Got::Closed);
        watcher.check_silent();
    }
    let denied = Broker::start("[auth]\nanonymous = false\n");
    for (version, code) in [(V311, 5), (V5, 0x87)] {
        denied.check_refused(&Options::new(version, "c").resume(), code);
    }
}

/// [MQTT-3.1.4-3], [MQTT-3.14.4-1], [MQTT-3.14.4-2] (5.0), [MQTT-3.1.4-2] (3.1.1).
#[test]
fn second_connection_takes_the_session_over() {
    let broker = Broker::start("");
    for old in BOTH {
        for new in BOTH {
            let mut first = broker.connect(&Options::new(old, "one"));
            let mut second = broker.connect(&Options::new(new, "one"));
            first.check_ended(0x8E);
            second.ping();
            second.disconnect();
        }
    }
}

/// Takeover works whichever shards the connections are on, and keeps the Session. [MQTT-3.1.4-3] (5.0),
/// [MQTT-3.1.4-2] (3.1.1), [MQTT-4.1.0-1] (both).
#[test]
fn session_survives_being_taken_over_again_and_again() {
    let broker = Broker::start("");
    let mut publisher = broker.connect(&Options::new(V5, "publisher"));
    let mut client = broker.connect(&Options::new(V5, "c").resume());
    client.subscribe("t", 1);
    for round in 0..20 {
        let mut next = broker.connect(&Options::new(BOTH[round % 2], "c").resume());
        assert!(next.connack.session_present);
        client.check_ended(0x8E);
        publisher.publish(&Message::new("t", round.to_string()).qos(1));
        assert_eq!(next.message().text(), round.to_string());
        next.ping(); // so that the PUBACK is there before the next takeover
        client = next;
    }
}

/// [MQTT-3.1.2-22] (5.0), [MQTT-3.1.2-24] (3.1.1).
#[test]
fn silence_beyond_one_and_a_half_keep_alives_ends_the_connection() {
    let broker = Broker::start("");
    for version in BOTH {
        let mut client = broker.connect(&Options::new(version, "c").keep_alive(2));
        std::thread::sleep(Duration::from_millis(1500));
        client.ping(); // a packet begins the time anew
        let start = Instant::now();
        client.check_ended(0x8D);
        let waited = start.elapsed();
        assert!(waited > Duration::from_millis(2600) && waited < Duration::from_secs(8), "{waited:?}");
    }
}

/// Keep Alive 0 switches it off. MQTT 5.0 and 3.1.1 §3.1.2.10; [MQTT-3.2.2-22] (5.0): the client's own value counts.
#[test]
fn keep_alive_0_is_never_too_late() {
    let broker = Broker::start("");
    let mut clients = BOTH.map(|version| broker.connect(&Options::new(version, "").keep_alive(0)));
    assert_eq!(clients[1].connack.server_keep_alive, None);
    std::thread::sleep(Duration::from_millis(2500));
    clients.iter_mut().for_each(Client::ping);
}

/// MQTT 5.0 §3.2.2.3.14, [MQTT-3.1.2-22]; 3.1.1 clients cannot be told.
#[test]
fn server_keep_alive_overrides_the_clients() {
    let broker = Broker::start("[limits]\nkeep_alive_max_secs = 1\n");
    let mut client = broker.connect(&Options::new(V5, "c").keep_alive(600));
    assert_eq!(client.connack.server_keep_alive, Some(1));
    client.check_ended(0x8D);
    let mut never = broker.connect(&Options::new(V5, "c").keep_alive(0));
    assert_eq!(never.connack.server_keep_alive, Some(1));
    never.check_ended(0x8D);
    assert_eq!(broker.connect(&Options::new(V5, "c").keep_alive(1)).connack.server_keep_alive, None);
}

/// A connection that says nothing is not kept. MQTT 5.0 and 3.1.1 §3.1.4.
#[test]
fn connection_without_connect_is_closed_in_time() {
    let broker = Broker::start("[limits]\nconnect_timeout_secs = 1\n");
    for begun in [&[][..], &[0x10], &[0x10, 0x20, 0x00, 0x04, b'M']] {
        let mut client = Client::open(broker.address(), V311);
        client.send_raw(begun);
        let start = Instant::now();
        assert_eq!(client.recv(), Got::Closed);
        assert!(start.elapsed() > Duration::from_millis(800), "{begun:?}");
    }
}

/// [MQTT-3.12.4-1] (both).
#[test]
fn pingreq_is_answered_with_pingresp() {
    let broker = Broker::start("");
    for version in ALL {
        let mut client = broker.connect(&Options::new(version, "c"));
        client.send_raw(&[0xC0, 0x00, 0xC0, 0x00]);
        assert_eq!((client.recv(), client.recv()), (Got::Pingresp, Got::Pingresp));
    }
}

/// [MQTT-3.1.2-24], [MQTT-3.1.2-25], [MQTT-4.5.0-1] (5.0).
#[test]
fn messages_larger_than_the_clients_maximum_packet_size_are_left_out() {
    let broker = Broker::start("");
    let mut publisher = broker.connect(&Options::new(V5, "publisher"));
    let options = Options { maximum_packet_size: Some(100), ..Options::new(V5, "small") };
    let mut small = broker.connect(&options);
    let mut large = broker.connect(&Options::new(V5, "large"));
    for qos in [0, 1, 2] {
        small.subscribe("t", qos);
        large.subscribe("t", qos);
        // Fixed header 2, topic 3, Packet Identifier 2 if QoS > 0, Property Length 1.
        let room = if qos == 0 { 94 } else { 92 };
        for len in [200, room + 1, room, 1] {
            publisher.publish(&Message::new("t", vec![b'x'; len]).qos(qos));
            assert_eq!(large.message().payload.len(), len);
        }
        for len in [room, 1] {
            assert_eq!(small.message().payload.len(), len);
        }
        assert!(small.last_len <= 100);
    }
    small.check_silent();
}

/// [MQTT-3.1.2-24], [MQTT-3.2.2-19], [MQTT-3.14.2-3] (5.0): texts are left away if they do not fit.
#[test]
fn connack_and_disconnect_fit_the_clients_maximum_packet_size() {
    let broker = Broker::start("");
    let options = Options { maximum_packet_size: Some(8), ..Options::new(V5, "small") };
    let (client, got) = broker.try_connect(&options);
    // A client so small cannot even be told what the server grants.
    if matches!(got, Got::Connack(_)) {
        assert!(client.last_len <= 8, "CONNACK of {} bytes", client.last_len);
    }
    let options = Options { maximum_packet_size: Some(40), ..Options::new(V5, "small") };
    let mut client = broker.connect(&options);
    assert!(client.last_len <= 40);
    client.send_connect(&options);
    assert_eq!(client.recv(), Got::Disconnect(0x82, Some("second CONNECT".into())));
    assert!(client.last_len <= 40);
}

/// MQTT 5.0 §3.2.2.3.6, [MQTT-3.2.2-15] seen from the server: 0x95 (5.0), close (3.1.1).
#[test]
fn packets_larger_than_the_servers_maximum_end_the_connection() {
    let broker = Broker::start("[limits]\npacket_bytes_max = 1000\n");
    for version in BOTH {
        let mut client = broker.connect(&Options::new(version, "c"));
        if version == V5 {
            assert_eq!(client.connack.maximum_packet_size, Some(1000));
        }
        let overhead = if version == V5 { 7 } else { 6 };
        client.subscribe("t", 0);
        client.publish(&Message::new("t", vec![0; 1000 - overhead]));
        assert_eq!(client.message().payload.len(), 1000 - overhead);
        client.publish(&Message::new("t", vec![0; 1001 - overhead]));
        client.check_ended(0x95);
    }
}

/// The header alone decides, so that nothing large is ever kept. MQTT 5.0 §3.2.2.3.6.
#[test]
fn packet_too_large_is_refused_before_its_body_arrives() {
    let broker = Broker::start("");
    for version in BOTH {
        let mut client = broker.connect(&Options::new(version, "c"));
        client.send_raw(&[0x30, 0xFF, 0xFF, 0xFF, 0x7F]);
        client.check_ended(0x95);
        let mut early = Client::open(broker.address(), version);
        early.send_raw(&[0x10, 0xFF, 0xFF, 0xFF, 0x7F]);
        assert_eq!(early.recv(), Got::Closed);
        // The whole packet counts: one of 1 MiB is taken, and of one with a byte more the first five are enough.
        let mut client = broker.connect(&Options::new(version, "c"));
        let largest = |payload: usize| raw::publish(version, 0x30, b"t", None, &[], &vec![b'x'; payload]);
        let head = largest(1 << 19).len() - (1 << 19);
        let packet = largest((1 << 20) - head);
        assert_eq!(packet.len(), 1 << 20);
        client.send_raw(&packet);
        client.ping();
        client.send_raw(&largest((1 << 20) - head + 1)[..5]);
        client.check_ended(0x95);
    }
}

/// [MQTT-3.3.4-9], [MQTT-3.3.4-10], [MQTT-4.9.0-1], [MQTT-4.9.0-2], [MQTT-4.9.0-3] (5.0).
#[test]
fn server_keeps_to_the_clients_receive_maximum() {
    let broker = Broker::start("");
    let mut publisher = broker.connect(&Options::new(V5, "publisher"));
    let mut client = broker.connect(&Options { receive_maximum: Some(2), ..Options::new(V5, "c") });
    client.subscribe("t", 2);
    for (index, qos) in [1, 2, 1, 2].into_iter().enumerate() {
        publisher.publish(&Message::new("t", index.to_string()).qos(qos));
    }
    let first = client.recv_publish();
    let second = client.recv_publish();
    client.check_silent();
    // Other packets are not held back, nor is QoS 0.
    publisher.publish(&Message::new("t", "quick"));
    assert_eq!(client.recv_publish().text(), "quick");
    client.subscribe("u", 0);
    client.ack(Packet::Pubrec, second.id, 0); // a PUBREC without error frees nothing
    assert_eq!(client.recv(), Got::Pubrel(second.id, 0));
    client.check_silent();
    client.ack(Packet::Puback, first.id, 0);
    let third = client.recv_publish();
    assert_eq!(third.text(), "2");
    client.check_silent();
    client.ack(Packet::Pubcomp, second.id, 0);
    let fourth = client.recv_publish();
    assert_eq!(fourth.text(), "3");
    client.ack(Packet::Pubrec, fourth.id, 0x97); // one with an error does
    publisher.publish(&Message::new("t", "4").qos(1));
    assert_eq!(client.recv_publish().text(), "4");
}

/// [MQTT-3.3.4-7] seen from the server, [MQTT-4.13.1-1] (5.0).
#[test]
fn client_that_exceeds_the_servers_receive_maximum_is_disconnected() {
    let broker = Broker::start("[limits]\nreceive_maximum = 3\n");
    let mut client = broker.connect(&Options::new(V5, "c"));
    assert_eq!(client.connack.receive_maximum, Some(3));
    for id in 1..=3 {
        client.send_publish(&Message::new("t", "x").qos(2).id(id));
        assert!(matches!(client.recv(), Got::Pubrec(of, 0 | 0x10) if of == id));
    }
    client.publish(&Message::new("t", "QoS 0 does not count"));
    client.send_publish(&Message::new("t", "x").qos(2).id(4));
    client.check_ended(0x93);
}

/// [MQTT-3.3.2-12], [MQTT-3.3.2-7] (5.0).
#[test]
fn topic_aliases_of_the_client_stand_for_topics_on_their_connection() {
    let broker = Broker::start("");
    let mut subscriber = broker.connect(&Options::new(V5, "subscriber"));
    subscriber.subscribe("#", 2);
    let mut client = broker.connect(&Options::new(V5, "c").resume());
    assert_eq!(client.connack.topic_alias_maximum, Some(64));
    for alias in 1..=64 {
        client.publish(&Message::new(&format!("t/{alias}"), "set").alias(alias));
        assert_eq!(subscriber.message().topic, format!("t/{alias}"));
    }
    for (alias, qos) in [(1, 0), (64, 1), (30, 2)] {
        client.publish(&Message::new("", "used").alias(alias).qos(qos));
        let message = subscriber.message();
        assert_eq!((message.topic, message.alias), (format!("t/{alias}"), None));
    }
    client.publish(&Message::new("another", "set anew").alias(1));
    client.publish(&Message::new("", "used").alias(1));
    assert_eq!([subscriber.message().topic, subscriber.message().topic], ["another", "another"]);
    // Forgotten with the connection, not with the Session.
    client.vanish();
    let mut client = broker.connect(&Options::new(V5, "c").resume());
    client.publish(&Message::new("", "unknown").alias(1));
    client.check_ended(0x82);
}

/// [MQTT-3.3.2-8], [MQTT-3.3.2-9] seen from the server (5.0).
#[test]
fn topic_aliases_out_of_range_are_invalid() {
    let broker = Broker::start("[limits]\ntopic_alias_maximum = 4\n");
    let mut client = broker.connect(&Options::new(V5, "c"));
    client.send_publish(&Message::new("t", "x").alias(5));
    client.check_ended(0x94);
    let mut client = broker.connect(&Options::new(V5, "c"));
    client.send_raw(&raw::publish(V5, 0x30, b"t", None, &[0x23, 0, 0], b"x"));
    client.check_ended(0x94);
    // No topic and no alias.
    let mut client = broker.connect(&Options::new(V5, "c"));
    client.send_raw(&raw::publish(V5, 0x30, b"", None, &[], b"x"));
    client.check_ended(0x82);
    let none = Broker::start("[limits]\ntopic_alias_maximum = 0\n");
    let mut client = none.connect(&Options::new(V5, "c"));
    assert_eq!(client.connack.topic_alias_maximum, None);
    client.send_publish(&Message::new("t", "x").alias(1));
    client.check_ended(0x94);
}

/// [MQTT-3.1.2-26], [MQTT-3.1.2-27], [MQTT-3.3.2-11] (5.0).
#[test]
fn server_uses_topic_aliases_as_far_as_the_client_allows() {
    let broker = Broker::start("");
    let mut publisher = broker.connect(&Options::new(V5, "publisher"));
    for maximum in [None, Some(0), Some(2)] {
        let mut client = broker.connect(&Options { topic_alias_maximum: maximum, ..Options::new(V5, "c") });
        client.subscribe("t/+", 1);
        let mut known = std::collections::HashMap::new();
        for round in 0..3 {
            for topic in ["t/1", "t/2", "t/3", "t/4"] {
                publisher.publish(&Message::new(topic, topic).qos(round % 2));
                let message = client.message();
                if let Some(alias) = message.alias {
                    assert!(alias <= maximum.unwrap_or(0), "alias {alias} of {maximum:?}");
                    if !message.topic.is_empty() {
                        known.insert(alias, message.topic.clone());
                    }
                }
                let topic_meant = message.alias.map_or(&message.topic, |alias| &known[&alias]);
                assert_eq!((&**topic_meant, message.text()), (topic, topic));
            }
        }
        client.disconnect();
    }
}

/// [MQTT-3.1.2-29] (5.0). DISCONNECT and CONNACK may carry them all the same.
#[test]
fn reason_strings_are_withheld_from_clients_that_do_not_want_them() {
    let broker = Broker::start("");
    let options = Options { request_problem_information: Some(false), ..Options::new(V5, "c") };
    let mut client = broker.connect(&options);
    client.subscribe("$share", 0);
    // PUBACK, PUBREC and PUBCOMP for identifiers nobody knows: nothing but the code.
    client.ack(Packet::Pubrel, 7, 0);
    assert_eq!(client.recv(), Got::Pubcomp(7, 0x92));
    assert!(client.last_len <= 6, "{}", client.last_len);
    client.send_connect(&options);
    assert!(matches!(client.recv(), Got::Disconnect(0x82, _)));
}

/// [MQTT-3.1.2-28] (5.0): never unless asked; we have none to give.
#[test]
fn response_information_is_not_sent_unasked() {
    let broker = Broker::start("");
    for asked in [None, Some(false), Some(true)] {
        let options = Options { request_response_information: asked, ..Options::new(V5, "c") };
        assert_eq!(broker.connect(&options).connack.response_information, None);
    }
}

/// [MQTT-3.2.2-9], [MQTT-3.2.2-10], [MQTT-3.2.2-12] (5.0).
#[test]
fn maximum_qos_is_told_and_binds_the_will() {
    for maximum in [0, 1] {
        let broker = Broker::start(&format!("[limits]\nmaximum_qos = {maximum}\n"));
        let mut client = broker.connect(&Options::new(V5, "c"));
        assert_eq!(client.connack.maximum_qos, Some(maximum));
        for asked in [0, 1, 2] {
            assert_eq!(client.subscribe("t", asked), asked.min(maximum));
        }
        let will = |qos| Options::new(V5, "w").will(Message::new("w", "gone").qos(qos));
        broker.check_refused(&will(maximum + 1), 0x9B);
        broker.connect(&will(maximum));
    }
}

/// [MQTT-3.2.2-13] (5.0).
#[test]
fn retained_will_is_refused_where_nothing_is_retained() {
    let broker = Broker::start("[limits]\nretain_available = false\n");
    let client = broker.connect(&Options::new(V5, "c"));
    assert_eq!(client.connack.retain_available, Some(false));
    broker.check_refused(&Options::new(V5, "w").will(Message::new("w", "gone").retained()), 0x9A);
}

/// Property values outside their range, and properties twice. MQTT 5.0 §3.1.2.11, [MQTT-3.1.4-1].
#[test]
fn connect_properties_are_checked() {
    let broker = Broker::start("");
    let wrong: [&[u8]; 10] = [
        &[0x21, 0, 0],                         // Receive Maximum 0
        &[0x27, 0, 0, 0, 0],                   // Maximum Packet Size 0
        &[0x17, 2],                            // Request Problem Information 2
        &[0x19, 2],                            // Request Response Information 2
        &[0x11, 0, 0, 0, 1, 0x11, 0, 0, 0, 1], // Session Expiry Interval twice
        &[0x21, 0, 1, 0x21, 0, 1],             // Receive Maximum twice
        &[0x16, 0, 1, 7],                      // Authentication Data without a method
        &[0x23, 0, 1],                         // Topic Alias, of PUBLISH
        &[0x7F, 0],                            // no property at all
        &[0x11, 0, 0],                         // cut short
    ];
    for block in wrong {
        let mut client = Client::open(broker.address(), V5);
        client.send_raw(&raw::connect(V5, 2, block, &[raw::text("c")]));
        let got = client.recv();
        let Got::Connack(Connack { reason: 0x81 | 0x82, .. }) = got else { panic!("{got:?} {block:02x?}") };
        assert_eq!(client.recv(), Got::Closed);
    }
}

/// Bytes may arrive one at a time, and many packets at once. [MQTT-4.2.0-1] (5.0), [MQTT-7.1.1-1] (3.1.1).
#[test]
fn packets_may_be_split_and_joined_at_will() {
    let broker = Broker::start("");
    for version in ALL {
        let mut client = Client::open(broker.address(), version);
        for byte in raw::connect(version, 2, &[], &[raw::text("c")]) {
            client.send_raw(&[byte]);
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(matches!(client.recv(), Got::Connack(Connack { reason: 0, .. })));
        client.disconnect();
        // CONNECT and what follows, without waiting for CONNACK. MQTT 5.0 and 3.1.1 §3.1.4.
        let mut client = Client::open(broker.address(), version);
        let bytes = [
            raw::connect(version, 2, &[], &[raw::text("c")]),
            raw::filters(version, 0x82, 1, &[], &[raw::text("t"), vec![1]].concat()),
            raw::publish(version, 0x32, b"t", Some(2), &[], b"early"),
            vec![0xC0, 0x00],
        ];
        client.send_raw(&bytes.concat());
        assert!(matches!(client.recv(), Got::Connack(Connack { reason: 0, .. })));
        assert_eq!(client.recv(), Got::Suback(1, vec![1]));
        assert_eq!(client.message().text(), "early");
        client.recv_where(|got| matches!(got, Got::Puback(2, 0)).then_some(()));
        client.recv_where(|got| (*got == Got::Pingresp).then_some(()));
    }
}

/// A client may close its half once it has said all. [MQTT-3.14.4-2] (5.0).
#[test]
fn half_closed_connection_still_ends() {
    let broker = Broker::start("");
    for version in BOTH {
        let mut client = broker.connect(&Options::new(version, "c"));
        client.stream().shutdown(Shutdown::Write).expect("shutdown");
        assert_eq!(client.recv(), Got::Closed);
    }
}

/// MQTT 5.0 §3.2.2.3: what is not limited is not mentioned.
#[test]
fn connack_has_only_what_differs_from_the_default() {
    let broker = Broker::start("");
    let connack = broker.connect(&Options::new(V5, "c")).connack;
    let expected = Connack {
        receive_maximum: Some(1024),
        maximum_packet_size: Some(1_048_576),
        topic_alias_maximum: Some(64),
        ..Connack::default()
    };
    assert_eq!(connack, expected);
}
