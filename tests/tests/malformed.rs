//! What no client should send. MQTT 5.0 §4.13, 3.1.1 §4.8: told why (5.0), closed, and nobody else notices.

use wasmqtt_tests::{BOTH, Broker, Client, Connack, Got, Message, Options, Version, raw};

const V311: Version = Version::V311;
const V5: Version = Version::V5;

/// A packet of a connected client, and the Reason Codes it may end with in 5.0.
struct Case {
    what: &'static str,
    bytes: Vec<u8>,
    reasons: &'static [u8],
}

fn case(what: &'static str, bytes: Vec<u8>, reasons: &'static [u8]) -> Case {
    Case { what, bytes, reasons }
}

const MALFORMED: &[u8] = &[0x81];
const PROTOCOL: &[u8] = &[0x82];
const EITHER: &[u8] = &[0x81, 0x82];
const NOT_UTF8: [&[u8]; 5] = [b"\xFF", b"a\0", b"\xED\xA0\x80", b"\xC0\xAF", b"\xF4\x90\x80\x80"];

fn entry(filter: &[u8], options: u8) -> Vec<u8> {
    [raw::text(filter), vec![options]].concat()
}

/// One good packet of each type a client sends, with its first byte.
fn good(version: Version) -> Vec<(u8, Vec<u8>)> {
    let properties = |block: &[u8]| raw::properties(version, block);
    let id = vec![0, 7];
    let mut all = vec![
        (0x32, [raw::text("t"), id.clone(), properties(&[0x01, 1])].concat()),
        (0x82, [id.clone(), properties(&[0x0B, 1]), entry(b"t", 1)].concat()),
        (0xA2, [id.clone(), properties(&[]), raw::text("t")].concat()),
    ];
    for first in [0x40, 0x50, 0x62, 0x70] {
        all.push((first, id.clone()));
    }
    if version == V5 {
        for first in [0x40, 0x50, 0x62, 0x70] {
            all.push((first, [id.clone(), vec![0], properties(&[0x1F, 0, 1, b'r'])].concat()));
        }
        all.push((0xE0, [vec![0], properties(&[0x11, 0, 0, 0, 0])].concat()));
        all.push((0xF0, [vec![0x18], properties(&[0x15, 0, 1, b'm'])].concat()));
    }
    all
}

/// [MQTT-2.1.3-1], [MQTT-3.6.1-1], [MQTT-3.8.1-1], [MQTT-3.10.1-1], [MQTT-3.14.1-1], [MQTT-3.15.1-1], [MQTT-3.3.1-2],
/// [MQTT-3.3.1-4] (5.0); [MQTT-2.2.2-1], [MQTT-2.2.2-2], [MQTT-3.6.1-1], [MQTT-3.8.1-1], [MQTT-3.10.1-1],
/// [MQTT-3.14.1-1], [MQTT-3.3.1-2], [MQTT-3.3.1-4] (3.1.1).
#[test]
fn reserved_flags_of_every_packet_type_are_malformed() {
    let mut cases = Vec::new();
    for version in BOTH {
        cases.clear();
        for (first, body) in good(version).into_iter().filter(|(first, _)| first >> 4 != 3) {
            for flags in 0..16 {
                if flags != first & 0x0F {
                    cases.push(case("reserved flags", raw::packet(first & 0xF0 | flags, &body), MALFORMED));
                }
            }
        }
        for first in [0xC1, 0xC8, 0xE1, 0xE2] {
            cases.push(case("reserved flags", vec![first, 0], MALFORMED));
        }
        cases.push(case("QoS 3", raw::publish(version, 0x36, b"t", Some(7), &[], b""), MALFORMED));
        cases.push(case("DUP with QoS 0", raw::publish(version, 0x38, b"t", None, &[], b""), MALFORMED));
        cases.push(case("packet type 0", vec![0x00, 0x00], MALFORMED));
        check(version, &cases);
    }
}

/// [MQTT-4.13.1-1] (5.0), [MQTT-4.8.0-1] (3.1.1): the Remaining Length ends the packet early.
#[test]
fn truncated_packets_of_every_type_are_refused() {
    for version in BOTH {
        let mut cases = Vec::new();
        for (first, body) in good(version) {
            for len in 0..body.len() {
                // What is left may be a packet: an acknowledgement or a PUBLISH can be shorter.
                let still_good = match first >> 4 {
                    3 => version == V311 && len >= 5,
                    4..=7 => len == 2 || version == V5 && len == 3,
                    14 => len <= 1,
                    _ => false,
                };
                if !still_good {
                    cases.push(case("truncated", raw::packet(first, &body[..len]), EITHER));
                }
            }
        }
        check(version, &cases);
    }
}

/// The same for bytes behind the end, and for lengths that are not what they should. [MQTT-1.5.5-1] (5.0),
/// [MQTT-4.8.0-1] (3.1.1).
#[test]
fn overlong_packets_of_every_type_are_refused() {
    for version in BOTH {
        let mut cases = Vec::new();
        for (first, body) in good(version).into_iter().filter(|(first, _)| first >> 4 != 3) {
            // In 5.0 a byte behind the identifier is a Reason Code; two are one and a Property Length.
            let tail: &[u8] = if version == V5 && body.len() == 2 { &[0, 0, 0] } else { &[0] };
            cases.push(case("overlong", raw::packet(first, &[&body, tail].concat()), EITHER));
        }
        cases.push(case("PINGREQ with a body", vec![0xC0, 1, 0], EITHER));
        cases.push(case("five length bytes", vec![0x30, 0x80, 0x80, 0x80, 0x80, 0x01], MALFORMED));
        if version == V5 {
            cases.push(case("needless length byte", vec![0xC0, 0x80, 0x00], MALFORMED));
            let publish = [raw::text("t"), vec![0x80, 0x00]].concat();
            cases.push(case("needless property length byte", raw::packet(0x30, &publish), MALFORMED));
        } else {
            cases.push(case("DISCONNECT with a body", vec![0xE0, 1, 0], EITHER));
        }
        check(version, &cases);
    }
}

/// [MQTT-1.5.4-1], [MQTT-1.5.4-2], [MQTT-1.5.7-1], [MQTT-3.8.3-1], [MQTT-3.10.3-1], [MQTT-3.3.2-1], [MQTT-3.3.2-13],
/// [MQTT-3.3.2-19], [MQTT-4.7.3-2] (5.0); [MQTT-1.5.3-1], [MQTT-1.5.3-2], [MQTT-3.8.3-1], [MQTT-3.10.3-1],
/// [MQTT-3.3.2-1], [MQTT-4.7.3-2] (3.1.1).
#[test]
fn text_that_is_not_utf8_is_malformed() {
    for version in BOTH {
        let mut cases = Vec::new();
        for text in NOT_UTF8 {
            // NUL in a Topic Name is also a Topic Name that is not valid.
            cases.push(case("topic", raw::publish(version, 0x30, text, None, &[], b""), &[0x81, 0x90]));
            cases.push(case("filter", raw::filters(version, 0x82, 7, &[], &entry(text, 0)), &[0x81, 0x8F]));
            cases.push(case("filter", raw::filters(version, 0xA2, 7, &[], &raw::text(text)), &[0x81, 0x8F]));
            if version == V311 {
                continue;
            }
            let user = |name: &[u8], value: &[u8]| [vec![0x26], raw::text(name), raw::text(value)].concat();
            let text_of = |id: u8| [vec![id], raw::text(text)].concat();
            for block in [user(text, b"v"), user(b"n", text), text_of(0x03), text_of(0x08)] {
                let reasons = if block[0] == 0x08 { &[0x81, 0x90][..] } else { MALFORMED };
                cases.push(case("property", raw::publish(V5, 0x30, b"t", None, &block, b""), reasons));
            }
            for first in [0x40, 0x50, 0x62, 0x70] {
                let reason = [vec![0, 7, 0], raw::properties(V5, &text_of(0x1F))].concat();
                cases.push(case("reason string", raw::packet(first, &reason), MALFORMED));
            }
            let reason = [vec![0], raw::properties(V5, &text_of(0x1F))].concat();
            cases.push(case("reason string", raw::packet(0xE0, &reason), MALFORMED));
            let method = [vec![0x18], raw::properties(V5, &text_of(0x15))].concat();
            cases.push(case("method", raw::packet(0xF0, &method), MALFORMED));
        }
        check(version, &cases);
    }
}

/// MQTT 5.0 §2.2.2, [MQTT-2.2.2-1]: what does not belong is malformed, what comes twice a Protocol Error.
#[test]
fn illegal_and_duplicate_properties_are_refused() {
    let publish = |block: &[u8]| raw::publish(V5, 0x30, b"t", None, block, b"");
    let subscribe = |block: &[u8]| raw::filters(V5, 0x82, 7, block, &entry(b"t", 0));
    let unsubscribe = |block: &[u8]| raw::filters(V5, 0xA2, 7, block, &raw::text("t"));
    let ack = |first: u8, block: &[u8]| raw::packet(first, &[vec![0, 7, 0], raw::properties(V5, block)].concat());
    let end = |block: &[u8]| raw::packet(0xE0, &[vec![0], raw::properties(V5, block)].concat());
    let mut cases = vec![
        case("Session Expiry in PUBLISH", publish(&[0x11, 0, 0, 0, 1]), EITHER),
        case("unknown property", publish(&[0x7F, 1]), EITHER),
        case("Payload Format 2", publish(&[0x01, 2]), EITHER),
        case("Payload Format twice", publish(&[0x01, 1, 0x01, 1]), EITHER),
        case("Message Expiry twice", publish(&[0x02, 0, 0, 0, 1, 0x02, 0, 0, 0, 1]), EITHER),
        case("Content Type twice", publish(&[0x03, 0, 0, 0x03, 0, 0]), EITHER),
        case("Topic Alias twice", publish(&[0x23, 0, 1, 0x23, 0, 1]), EITHER),
        case("Correlation Data twice", publish(&[0x09, 0, 0, 0x09, 0, 0]), EITHER),
        case("Response Topic twice", publish(&[0x08, 0, 1, b'r', 0x08, 0, 1, b'r']), EITHER),
        case("property cut short", publish(&[0x02, 0, 0]), MALFORMED),
        case("Subscription Identifier 0", subscribe(&[0x0B, 0]), EITHER),
        case("Subscription Identifier twice", subscribe(&[0x0B, 1, 0x0B, 2]), EITHER),
        case("Message Expiry in SUBSCRIBE", subscribe(&[0x02, 0, 0, 0, 1]), EITHER),
        case("Subscription Identifier in UNSUBSCRIBE", unsubscribe(&[0x0B, 1]), EITHER),
        case("Session Expiry twice", end(&[0x11, 0, 0, 0, 0, 0x11, 0, 0, 0, 0]), EITHER),
        case("Content Type in DISCONNECT", end(&[0x03, 0, 0]), EITHER),
    ];
    for first in [0x40, 0x50, 0x62, 0x70] {
        cases.push(case("Reason String twice", ack(first, &[0x1F, 0, 0, 0x1F, 0, 0]), EITHER));
        cases.push(case("Topic Alias in an acknowledgement", ack(first, &[0x23, 0, 1]), EITHER));
    }
    check(V5, &cases);
}

/// [MQTT-2.2.1-3] seen from the server (5.0), [MQTT-2.3.1-1] (3.1.1).
#[test]
fn packet_identifier_0_is_refused_everywhere() {
    for version in BOTH {
        let mut cases = vec![
            case("PUBLISH QoS 1", raw::publish(version, 0x32, b"t", Some(0), &[], b""), EITHER),
            case("PUBLISH QoS 2", raw::publish(version, 0x34, b"t", Some(0), &[], b""), EITHER),
            case("SUBSCRIBE", raw::filters(version, 0x82, 0, &[], &entry(b"t", 0)), EITHER),
            case("UNSUBSCRIBE", raw::filters(version, 0xA2, 0, &[], &raw::text("t")), EITHER),
        ];
        for first in [0x40, 0x50, 0x62, 0x70] {
            cases.push(case("acknowledgement", raw::packet(first, &[0, 0]), EITHER));
        }
        check(version, &cases);
    }
}

/// [MQTT-3.3.2-2], [MQTT-3.3.2-14], [MQTT-4.7.0-1], [MQTT-4.7.3-1] (5.0); [MQTT-3.3.2-2], [MQTT-4.7.1-1], [MQTT-4.7.3-1] (3.1.1).
#[test]
fn topic_names_with_wildcards_or_nothing_are_refused() {
    for version in BOTH {
        let mut cases = Vec::new();
        for topic in ["+", "#", "a/+/b", "a/#"] {
            cases.push(case("topic", raw::publish(version, 0x30, topic.as_bytes(), None, &[], b""), &[0x90]));
            if version == V5 {
                let block = [vec![0x08], raw::text(topic)].concat();
                cases.push(case("response topic", raw::publish(V5, 0x30, b"t", None, &block, b""), &[0x82, 0x90]));
            }
        }
        cases.push(case("empty topic", raw::publish(version, 0x30, b"", None, &[], b""), &[0x82, 0x90]));
        check(version, &cases);
    }
}

/// [MQTT-3.8.3-2], [MQTT-3.8.3-5], [MQTT-3.10.3-2] (5.0); [MQTT-3.8.3-3], [MQTT-3-8.3-4], [MQTT-3.10.3-2] (3.1.1).
#[test]
fn subscribe_and_unsubscribe_have_filters_and_options_that_exist() {
    for version in BOTH {
        let mut cases = vec![
            case("SUBSCRIBE without filters", raw::filters(version, 0x82, 7, &[], &[]), PROTOCOL),
            case("UNSUBSCRIBE without filters", raw::filters(version, 0xA2, 7, &[], &[]), PROTOCOL),
            case("QoS 3", raw::filters(version, 0x82, 7, &[], &entry(b"t", 3)), EITHER),
            case("reserved option", raw::filters(version, 0x82, 7, &[], &entry(b"t", 0x40)), MALFORMED),
            case("reserved option", raw::filters(version, 0x82, 7, &[], &entry(b"t", 0x80)), MALFORMED),
        ];
        let unknown = if version == V5 { 0x30 } else { 0x04 };
        cases.push(case(
            "Retain Handling 3, or an option of 5.0",
            raw::filters(version, 0x82, 7, &[], &entry(b"t", unknown)),
            EITHER,
        ));
        check(version, &cases);
    }
}

/// [MQTT-3.4.2-1], [MQTT-3.5.2-1], [MQTT-3.6.2-1], [MQTT-3.7.2-1], [MQTT-3.14.2-1], [MQTT-3.15.2-1] (5.0), and packets
/// only a server sends.
#[test]
fn packets_of_servers_and_unknown_reason_codes_are_refused() {
    for version in BOTH {
        let mut cases = vec![
            case("CONNACK", raw::packet(0x20, if version == V5 { &[0, 0, 0] } else { &[0, 0] }), PROTOCOL),
            case("PINGRESP", vec![0xD0, 0], PROTOCOL),
            case("SUBACK", raw::packet(0x90, &[vec![0, 7], raw::properties(version, &[]), vec![0]].concat()), PROTOCOL),
        ];
        if version == V5 {
            for first in [0x40, 0x50, 0x62, 0x70] {
                cases.push(case("reason code", raw::packet(first, &[0, 7, 0x01]), EITHER));
            }
            for reason in [0x03, 0x18, 0xFF] {
                cases.push(case("reason code", raw::packet(0xE0, &[reason]), EITHER));
            }
            cases.push(case("reason code", raw::packet(0xF0, &[0x01, 0x00]), EITHER));
        }
        check(version, &cases);
    }
}

/// Limits are kept before memory is spent. MQTT 5.0 §3.1.2.11.4.
#[test]
fn remaining_length_over_the_limit_is_refused() {
    for version in BOTH {
        let mut cases = Vec::new();
        for first in [0x30, 0x32, 0x82, 0xA2, 0x40, 0xE0] {
            cases.push(case("too large", vec![first, 0xFF, 0xFF, 0xFF, 0x7F], &[0x95, 0x81]));
        }
        check(version, &cases);
    }
}

/// Each case ends its own connection, and the bystander does not notice.
fn check(version: Version, cases: &[Case]) {
    let broker = Broker::start("");
    let mut bystander = broker.connect(&Options::new(version, "bystander"));
    bystander.subscribe("calm", 1);
    for Case { what, bytes, reasons } in cases {
        let mut client = broker.connect(&Options::new(version, "offender"));
        client.send_raw(bytes);
        if version == V5 {
            let got = client.recv();
            let expected = matches!(&got, Got::Disconnect(reason, _) if reasons.contains(reason));
            assert!(expected, "{what} {bytes:02x?}: {got:?} instead of {reasons:02x?}");
        }
        let got = client.recv();
        assert_eq!(got, Got::Closed, "{what} {bytes:02x?}");
        bystander.publish(&Message::new("calm", *what).qos(1));
        assert_eq!(bystander.message().text(), *what);
    }
}

/// CONNECT is answered with CONNACK, if its version can be read. [MQTT-3.1.4-1] (both), [MQTT-3.14.0-1] (5.0).
#[test]
fn malformed_connect_gets_no_disconnect() {
    let broker = Broker::start("");
    for version in BOTH {
        let good = raw::connect(version, 2, &[], &[raw::text("c")]);
        // Cut anywhere behind the level, with the length to match.
        for len in 9..good.len() {
            let mut bytes = good[..len].to_vec();
            bytes[1] = (len - 2) as u8;
            let mut client = Client::open(broker.address(), version);
            client.send_raw(&bytes);
            if version == V5 {
                let got = client.recv();
                assert!(matches!(got, Got::Connack(Connack { reason: 0x81 | 0x82, .. })), "{got:?} {bytes:02x?}");
            }
            assert_eq!(client.recv(), Got::Closed, "{bytes:02x?}");
        }
        let mut long = raw::connect(version, 2, &[], &[raw::text("c"), vec![0]]);
        for bytes in [long.clone(), {
            long[0] = 0x11;
            long
        }] {
            let mut client = Client::open(broker.address(), version);
            client.send_raw(&bytes);
            let got = client.recv();
            if got != Got::Closed {
                assert_eq!(version, V5);
                assert!(matches!(got, Got::Connack(Connack { reason: 0x81 | 0x82, .. })), "{got:?} {bytes:02x?}");
                assert_eq!(client.recv(), Got::Closed);
            }
        }
    }
}

/// Noise of all kinds, two thousand times: memory stays, others go on.
#[test]
fn two_thousand_bad_connections_leave_nothing_behind() {
    let broker = Broker::start("");
    let mut bystander = broker.connect(&Options::new(V5, "bystander"));
    bystander.subscribe("calm", 1);
    let bad: [(Version, Vec<u8>); 6] = [
        (V311, vec![0x00, 0x00]),
        (V311, b"GET / HTTP/1.1\r\nHost: here\r\n\r\n".to_vec()),
        (V311, vec![0x10, 0xFF, 0xFF, 0xFF, 0x7F]),
        (V5, raw::connect(V5, 0x03, &[], &[raw::text("c")])),
        (
            V5,
            [raw::connect(V5, 2, &[], &[raw::text("")]), raw::publish(V5, 0x36, b"t", Some(1), &[], &[0; 5000])]
                .concat(),
        ),
        (
            V311,
            [raw::connect(V311, 2, &[], &[raw::text("")]), raw::publish(V311, 0x30, b"#", None, &[], &[0; 5000])]
                .concat(),
        ),
    ];
    let round = |count: usize| {
        for (version, bytes) in bad.iter().cycle().take(count) {
            let mut client = Client::open(broker.address(), *version);
            client.send_raw(bytes);
            while client.recv() != Got::Closed {}
        }
    };
    round(600);
    let before = broker.rss();
    round(2000);
    let after = broker.rss();
    let grown = after.saturating_sub(before);
    assert!(grown < 2 << 20, "{grown} bytes more than {before}");
    bystander.publish(&Message::new("calm", "calm").qos(1));
    assert_eq!(bystander.message().text(), "calm");
}

/// A packet that never ends holds nobody up.
#[test]
fn unfinished_packets_do_not_delay_others() {
    let broker = Broker::start("");
    let stuck: Vec<_> = (0..50)
        .map(|index| {
            let mut client = broker.connect(&Options::new(BOTH[index % 2], ""));
            client.send_raw(&[0x30, 0x80, 0x80, 0x20, 0x00]);
            client
        })
        .collect();
    let mut client = broker.connect(&Options::new(V5, "c"));
    client.subscribe("t", 2);
    client.publish(&Message::new("t", "through").qos(2));
    assert_eq!(client.message().text(), "through");
    drop(stuck);
    client.ping();
}
