//! Packets in, errors out: what no peer may send, by clause. MQTT 5.0 unless 3.1.1 is named.

mod properties;

use super::{Limits, answer_version, decode, frame};
use crate::codec::Version::{self, V5, V31, V311};
use crate::codec::{DecodeError, Packet, ReasonCode, encode};

const ALL: &[Version] = &[V31, V311, V5];
const V3: &[Version] = &[V31, V311];

const MALFORMED: ReasonCode = ReasonCode::MALFORMED_PACKET;
const PROTOCOL: ReasonCode = ReasonCode::PROTOCOL_ERROR;

/// `first`, the length of `body`, `body`.
fn packet(first: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![first];
    crate::codec::wire::put_with_length(&mut bytes, |out| out.extend_from_slice(body));
    bytes
}

fn text(text: &[u8]) -> Vec<u8> {
    [&(text.len() as u16).to_be_bytes(), text].concat()
}

fn check_refused(versions: &[Version], first: u8, body: &[u8], code: ReasonCode) {
    let packet = packet(first, body);
    for &version in versions {
        match decode(version, &packet) {
            Err(error) => assert_eq!(error.reason_code(), code, "{version:?} {packet:02X?}: {error}"),
            Ok(decoded) => panic!("{version:?} {packet:02X?} is not refused: {decoded:?}"),
        }
    }
}

/// It decodes, and encodes to the same bytes.
fn check_same(versions: &[Version], first: u8, body: &[u8]) {
    let bytes = packet(first, body);
    for &version in versions {
        let decoded = decode(version, &bytes).unwrap_or_else(|error| panic!("{version:?} {bytes:02X?}: {error}"));
        let mut again = Vec::new();
        encode(version, &decoded, &mut again);
        assert_eq!(again, bytes, "{version:?} {decoded:?}");
    }
}

fn check_taken(versions: &[Version], first: u8, body: &[u8]) {
    let bytes = packet(first, body);
    for &version in versions {
        decode(version, &bytes).unwrap_or_else(|error| panic!("{version:?} {bytes:02X?}: {error}"));
    }
}

/// One CONNECT: level, flags, properties (5.0 only) and payload.
fn connect(version: Version, flags: u8, properties: &[u8], payload: &[&[u8]]) -> Vec<u8> {
    let mut body = match version {
        V31 => b"\0\x06MQIsdp\x03".to_vec(),
        V311 => b"\0\x04MQTT\x04".to_vec(),
        V5 => b"\0\x04MQTT\x05".to_vec(),
    };
    body.extend_from_slice(&[flags, 0, 60]);
    if version == V5 {
        body.push(properties.len() as u8);
        body.extend_from_slice(properties);
    }
    for part in payload {
        body.extend(text(part));
    }
    body
}

fn check_connect_refused(versions: &[Version], flags: u8, properties: &[u8], payload: &[&[u8]], code: ReasonCode) {
    for &version in versions {
        check_refused(&[version], 0x10, &connect(version, flags, properties, payload), code);
    }
}

/// One whole packet of each type that this version has, with all it can carry.
fn one_of_each(version: Version) -> Vec<(u8, Vec<u8>)> {
    let will: &[&[u8]] = &[b"id", b"will", b"gone", b"user", b"pass"];
    if version != V5 {
        return vec![
            (0x10, connect(version, 0b1110_1110, &[], will)),
            (0x20, vec![0, 5]),
            (0x3B, b"\0\x03a/b\0\x07hello".to_vec()),
            (0x40, vec![0, 1]),
            (0x50, vec![0, 1]),
            (0x62, vec![0, 1]),
            (0x70, vec![0, 1]),
            (0x82, b"\0\x01\0\x01a\x01\0\x03b/#\x02".to_vec()),
            (0x90, vec![0, 1, 0, 1, 2, 0x80]),
            (0xA2, b"\0\x01\0\x01a\0\x03b/#".to_vec()),
            (0xB0, vec![0, 1]),
            (0xC0, vec![]),
            (0xD0, vec![]),
            (0xE0, vec![]),
        ];
    }
    let connect_properties =
        b"\x11\0\0\0\x05\x21\0\x05\x27\0\0\x01\0\x22\0\x05\x19\x01\x17\0\x26\0\x01a\0\x01b\x15\0\x01m\x16\0\x01d";
    let mut connect = connect(version, 0b1110_1110, connect_properties, &[b"id"]);
    connect.extend_from_slice(b"\x0F\x18\0\0\0\x01\x02\0\0\0\x02\x26\0\0\0\0");
    connect.extend([&b"will"[..], b"gone", b"user", b"pass"].iter().flat_map(|part| text(part)));
    let explained = b"\x0B\x1F\0\x01r\x26\0\x01a\0\x01b";
    let with = |head: &[u8], tail: &[u8]| [head, explained, tail].concat();
    vec![
        (0x10, connect),
        (0x20, b"\x01\0\x3A\x11\0\0\0\x05\x21\0\x05\x24\x01\x25\0\x27\0\0\0\x05\x12\0\x01i\x22\0\x05\x1F\0\x01r\x26\0\0\0\0\x28\0\x29\0\x2A\x01\x13\0\x05\x1A\0\x01i\x1C\0\x01s\x15\0\x01m\x16\0\x01d".to_vec()),
        (0x3B, b"\0\x03a/b\0\x07\x22\x23\0\x02\x02\0\0\0\x09\x0B\x80\x01\x0B\x05\x01\x01\x03\0\x01c\x08\0\x01r\x09\0\x01d\x26\0\x01a\0\x01bhello".to_vec()),
        (0x40, with(&[0, 1, 0x10], &[])),
        (0x50, with(&[0, 1, 0x97], &[])),
        (0x62, with(&[0, 1, 0x92], &[])),
        (0x70, with(&[0, 1, 0x92], &[])),
        (0x82, b"\0\x01\x09\x0B\x80\x01\x26\0\0\0\x01z\0\x01a\x2C\0\x03b/#\x12".to_vec()),
        (0x90, with(&[0, 1], &[0, 1, 2, 0x80, 0x9E])),
        (0xA2, b"\0\x01\x07\x26\0\x01a\0\x01b\0\x01a\0\x03b/#".to_vec()),
        (0xB0, with(&[0, 1], &[0, 0x11])),
        (0xC0, vec![]),
        (0xD0, vec![]),
        (0xE0, b"\x04\x13\x11\0\0\0\x01\x1F\0\x01r\x26\0\x01a\0\0\x1C\0\x01s".to_vec()),
        (0xF0, b"\x18\x0D\x15\0\x01m\x16\0\x01d\x26\0\0\0\0".to_vec()),
    ]
}

/// [MQTT-2.2.2-1] (5.0): a Property Length is there also when it is zero.
#[test]
fn packets_of_every_type_and_version_decode_and_encode_to_the_same_bytes() {
    for &version in ALL {
        for (first, body) in one_of_each(version) {
            check_same(&[version], first, &body);
        }
    }
}

/// [MQTT-2.1.3-1], [MQTT-2.2.2-2] in 3.1.1.
#[test]
fn reserved_flags_of_the_fixed_header_are_malformed() {
    for &version in ALL {
        for (first, body) in one_of_each(version) {
            for flipped in (1..16).map(|flags| first ^ flags) {
                let is_dup_of_31 = version == V31 && matches!(flipped, 0x6A | 0x8A | 0xAA);
                if first >> 4 != 3 && !is_dup_of_31 {
                    check_refused(&[version], flipped, &body, MALFORMED);
                }
            }
            assert!(decode(version, &packet(first & 0x0F, &body)).is_err());
        }
    }
    check_refused(V3, 0xF0, &[], MALFORMED);
}

#[test]
fn packets_cut_short_anywhere_are_refused() {
    for &version in ALL {
        for (first, body) in one_of_each(version) {
            let whole = packet(first, &body);
            for end in 0..whole.len() {
                assert!(
                    matches!(decode(version, &whole[..end]), Err(DecodeError::Malformed(_))),
                    "{version:?} {whole:02X?}"
                );
            }
            for end in 0..body.len() {
                // Some bodies are whole without their last parts: a payload, a list, and what may be omitted.
                let decoded = decode(version, &packet(first, &body[..end])).map(|packet| {
                    let mut bytes = Vec::new();
                    encode(version, &packet, &mut bytes);
                    bytes
                });
                let is_shorter = matches!(first >> 4, 3..=11 | 14 | 15);
                assert!(decoded.is_err() || is_shorter, "{version:?} {first:02X} {:02X?}", &body[..end]);
            }
        }
    }
}

#[test]
fn bytes_behind_the_end_are_malformed() {
    for &version in ALL {
        for (first, mut body) in one_of_each(version) {
            let whole = packet(first, &body);
            assert!(matches!(decode(version, &[&whole[..], &[0]].concat()), Err(DecodeError::Malformed(_))));
            body.push(0);
            // A payload takes any byte, a list of Reason Codes another code, a list of filters a filter cut short.
            if first >> 4 != 3 && first != 0x90 && first != 0xB0 && first != 0xE0 && first != 0xF0 {
                check_refused(&[version], first, &body, MALFORMED);
            }
        }
    }
    check_refused(V3, 0xB0, &[0, 1, 0], MALFORMED);
    check_refused(V3, 0xE0, &[0], MALFORMED);
    check_refused(&[V5], 0xE0, &[0, 0, 0], MALFORMED);
    check_refused(V3, 0x40, &[0, 1, 0], MALFORMED);
    check_refused(&[V5], 0x40, &[0, 1, 0, 0, 0], MALFORMED);
}

/// MQTT 5.0 §2.2.2.2: an identifier that does not belong is malformed, one that is there twice a Protocol Error.
/// §3.1.2.11, §3.3.2.3.
/// §1.5.4 [MQTT-1.5.4-1] [MQTT-1.5.4-2], [MQTT-1.5.3-1] [MQTT-1.5.3-2] in 3.1.1.
#[test]
fn strings_that_are_not_utf8_or_contain_null_are_malformed() {
    for wrong in
        [&b"\0"[..], b"a\0b", b"\xFF", b"\xC0\x80", b"\xED\xA0\x80", b"\xED\xBF\xBF", b"\xF4\x90\x80\x80", b"\xE2\x82"]
    {
        check_connect_refused(ALL, 2, &[], &[wrong], MALFORMED);
        check_connect_refused(ALL, 0x82, &[], &[b"id", wrong], MALFORMED);
        for &version in ALL {
            let no_properties: &[u8] = if version == V5 { &[0] } else { &[] };
            let filter = [&[0, 1], no_properties, &text(wrong)].concat();
            check_refused(&[version], 0xA2, &filter, MALFORMED);
            check_refused(&[version], 0x82, &[&filter[..], &[0]].concat(), MALFORMED);
            let name = [&text(wrong), no_properties].concat();
            let code = if wrong.contains(&0) { ReasonCode::TOPIC_NAME_INVALID } else { MALFORMED };
            check_refused(&[version], 0x30, &name, code);
        }
    }
    // [MQTT-1.5.4-3]: U+FEFF is a character like any other.
    for &version in ALL {
        let bytes = packet(0x10, &connect(version, 2, &[], &["\u{FEFF}".as_bytes()]));
        let Packet::Connect(connect) = decode(version, &bytes).unwrap() else { panic!() };
        assert_eq!(connect.client_id, "\u{FEFF}");
    }
}

/// §3.1.2.3; [MQTT-3.1.2-3] [MQTT-3.1.2-11] [MQTT-3.1.2-12] [MQTT-3.1.2-13]; [MQTT-3.1.2-14] [MQTT-3.1.2-22] in 3.1.1.
#[test]
fn connect_flags_that_contradict_each_other_are_malformed() {
    check_connect_refused(&[V311, V5], 0x03, &[], &[b"id"], MALFORMED);
    check_taken(&[V31], 0x10, &connect(V31, 0x03, &[], &[b"id"]));
    check_connect_refused(ALL, 0x0A, &[], &[b"id"], MALFORMED);
    check_connect_refused(ALL, 0x22, &[], &[b"id"], MALFORMED);
    check_connect_refused(ALL, 0x1E, &[], &[b"id", b"w", b""], MALFORMED);
    check_connect_refused(V3, 0x42, &[], &[b"id", b"pass"], MALFORMED);
    check_same(&[V5], 0x10, &connect(V5, 0x42, &[], &[b"id", b"pass"]));
    // [MQTT-3.1.2-16] and its like: a flag without its field.
    check_connect_refused(ALL, 0x82, &[], &[b"id"], MALFORMED);
    check_connect_refused(ALL, 0xC2, &[], &[b"id", b"user"], MALFORMED);
    // [MQTT-3.1.2-17] and its like: a field without its flag.
    check_connect_refused(ALL, 0x02, &[], &[b"id", b"user"], MALFORMED);
}

/// §3.1.2.1, §3.1.2.2 [MQTT-3.1.2-1] [MQTT-3.1.2-2].
#[test]
fn other_protocols_and_levels_are_refused_and_answered_in_the_nearest_version() {
    let rest = b"\x02\0\0\0\0";
    for (name, level, answer) in [
        ("MQTT", 0, Some(V311)),
        ("MQTT", 3, Some(V311)),
        ("MQTT", 6, Some(V5)),
        ("MQTT", 0x83, Some(V311)),
        ("MQIsdp", 4, Some(V311)),
        ("MQIsdp", 0x84, Some(V311)),
    ] {
        let body = [&text(name.as_bytes())[..], &[level], rest].concat();
        check_refused(ALL, 0x10, &body, ReasonCode::UNSUPPORTED_PROTOCOL_VERSION);
        assert_eq!(answer_version(&packet(0x10, &body)), answer);
    }
    for name in ["", "mqtt", "MQTTT", "HTTP"] {
        let body = [&text(name.as_bytes())[..], &[4], rest].concat();
        check_refused(ALL, 0x10, &body, MALFORMED);
        assert_eq!(answer_version(&packet(0x10, &body)), None);
    }
    assert_eq!(answer_version(&packet(0x10, &connect(V31, 0, &[], &[]))), Some(V31));
    assert_eq!(answer_version(&[0xC0, 0]), None);
    assert_eq!(answer_version(&[0x10]), None);
}

/// §3.1.3.3 [MQTT-3.1.3-11]: the Will Topic is a Topic Name.
#[test]
fn will_topic_is_a_topic_name() {
    for topic in [&b""[..], b"a/#", b"+"] {
        for &version in V3 {
            check_refused(
                &[version],
                0x10,
                &connect(version, 6, &[], &[b"id", topic, b""]),
                ReasonCode::TOPIC_NAME_INVALID,
            );
        }
        let mut body = connect(V5, 6, &[], &[b"id"]);
        body.push(0);
        body.extend([text(topic), text(b"")].concat());
        check_refused(&[V5], 0x10, &body, ReasonCode::TOPIC_NAME_INVALID);
    }
}

/// §3.3.1, §3.3.2 [MQTT-3.3.1-2] [MQTT-3.3.1-4] [MQTT-3.3.2-2], in 3.1.1 too.
#[test]
fn publish_has_a_topic_name_and_no_qos_3_and_no_dup_with_qos_0() {
    for &version in ALL {
        let end: &[u8] = if version == V5 { &[0] } else { &[] };
        check_same(&[version], 0x30, &[b"\0\x01a", end].concat());
        check_refused(&[version], 0x36, &[b"\0\x01a\0\x01", end].concat(), MALFORMED);
        check_refused(&[version], 0x38, &[b"\0\x01a", end].concat(), MALFORMED);
        check_refused(&[version], 0x30, &[b"\0\x01#", end].concat(), ReasonCode::TOPIC_NAME_INVALID);
        check_refused(&[version], 0x30, &[b"\0\x03a/+", end].concat(), ReasonCode::TOPIC_NAME_INVALID);
        check_refused(&[version], 0x32, &[b"\0\x01a\0\0", end].concat(), PROTOCOL);
        check_refused(&[version], 0x32, b"\0\x01a\0", MALFORMED);
        check_refused(&[version], 0x30, &[b"\0\0", end].concat(), if version == V5 { PROTOCOL } else { MALFORMED });
    }
    check_same(&[V5], 0x30, b"\0\0\x03\x23\0\x01payload");
}

/// §2.2.1 [MQTT-2.2.1-3], [MQTT-2.3.1-1] in 3.1.1.
#[test]
fn packet_identifier_0_is_a_protocol_error() {
    for &version in ALL {
        for (first, mut body) in one_of_each(version) {
            if matches!(first >> 4, 4..=11) {
                body[..2].fill(0);
                check_refused(&[version], first, &body, PROTOCOL);
            }
        }
    }
}

/// §3.4.2.1, §3.4.2.2, §3.14.2.1, §3.14.2.2.
#[test]
fn reason_code_and_properties_may_be_omitted() {
    for first in [0x40, 0x50, 0x62, 0x70] {
        check_same(ALL, first, &[0, 1]);
        check_taken(&[V5], first, &[0, 1, 0]);
        check_taken(&[V5], first, &[0, 1, 0, 0]);
    }
    check_same(&[V5], 0x40, &[0, 1, 0x10]);
    check_same(ALL, 0xE0, &[]);
    check_taken(&[V5], 0xE0, &[0x04]);
    check_same(&[V5], 0xE0, &[0x04, 0]);
    check_same(&[V5], 0xF0, &[]);
    check_refused(&[V5], 0xF0, &[0x18], MALFORMED);
    check_refused(&[V5], 0xF0, &[0x18, 0], PROTOCOL);
}

/// §3.2.2.2, §3.4.2.1, §3.6.2.1, §3.9.3, §3.11.3, §3.14.2.1, §3.15.2.1.
#[test]
fn reason_codes_of_another_packet_are_protocol_errors() {
    for (first, before, behind, wrong) in [
        (0x20, &[0][..], &[0][..], [0x01, 0x8B]),
        (0x40, &[0, 1], &[0], [0x01, 0x92]),
        (0x50, &[0, 1], &[0], [0x11, 0x92]),
        (0x62, &[0, 1], &[0], [0x10, 0x80]),
        (0x70, &[0, 1], &[0], [0x10, 0x91]),
        (0x90, &[0, 1, 0], &[], [0x03, 0x81]),
        (0xB0, &[0, 1, 0], &[], [0x01, 0x97]),
        (0xE0, &[], &[0], [0x01, 0x84]),
        (0xF0, &[], &[0], [0x01, 0x87]),
    ] {
        for code in wrong {
            check_refused(&[V5], first, &[before, &[code], behind].concat(), PROTOCOL);
        }
    }
    check_refused(V3, 0x20, &[0, 6], PROTOCOL);
    check_refused(&[V311], 0x20, &[2, 0], MALFORMED);
    check_refused(V3, 0x90, &[0, 1, 3], PROTOCOL);
}

/// §3.8.3 [MQTT-3.8.3-2] [MQTT-3.8.3-5], §3.10.3 [MQTT-3.10.3-2]; [MQTT-3.8.3-3] [MQTT-3-8.3-4] in 3.1.1.
#[test]
fn subscribe_has_filters_and_options_that_exist() {
    check_refused(V3, 0x82, &[0, 1], PROTOCOL);
    check_refused(&[V5], 0x82, &[0, 1, 0], PROTOCOL);
    check_refused(V3, 0xA2, &[0, 1], PROTOCOL);
    check_refused(&[V5], 0xA2, &[0, 1, 0], PROTOCOL);
    check_refused(&[V5], 0x90, &[0, 1, 0], PROTOCOL);
    for options in 3..=0xFF {
        check_refused(V3, 0x82, &[0, 1, 0, 1, b'a', options], MALFORMED);
    }
    for (options, code) in [(0x03, PROTOCOL), (0x30, PROTOCOL), (0x40, MALFORMED), (0x80, MALFORMED)] {
        check_refused(&[V5], 0x82, &[0, 1, 0, 0, 1, b'a', options], code);
    }
    check_same(&[V5], 0x82, &[0, 1, 0, 0, 1, b'a', 0x2E]);
}

/// §4.7.1 [MQTT-4.7.1-1] [MQTT-4.7.1-2], §4.7.3 [MQTT-4.7.3-1], §4.8.2 [MQTT-4.8.2-1] [MQTT-4.8.2-2], §4.13
/// [MQTT-4.13.1-1]; [MQTT-4.7.1-2] [MQTT-4.7.1-3] [MQTT-4.7.3-1] [MQTT-4.8.0-1] in 3.1.1.
#[test]
fn filters_that_are_none_are_malformed() {
    let check = |filter: &str, is_taken: bool| {
        for &version in ALL {
            let no_properties: &[u8] = if version == V5 { &[0] } else { &[] };
            let body = [&[0, 1], no_properties, &text(b"fine"), &[0], &text(filter.as_bytes())].concat();
            let names = [&[0, 1], no_properties, &text(b"fine"), &text(filter.as_bytes())].concat();
            for (first, body) in [(0x82, [&body[..], &[0]].concat()), (0xA2, names)] {
                let decoded = decode(version, &packet(first, &body)).map(|_| ());
                let expected = if is_taken { Ok(()) } else { Err(MALFORMED) };
                assert_eq!(decoded.map_err(|error| error.reason_code()), expected, "{filter:?} {version:?}");
            }
        }
    };
    for filter in ["", "a#", "a/#/b", "#/", "+a", "a+/b", "a/b+", "$share/", "$share/g", "$share/g/", "$share//a"] {
        check(filter, false);
    }
    for filter in ["$share/g+/a", "$share/#/a", "$share/g/a#", "$share/g/+a"] {
        check(filter, false);
    }
    // `$share` alone is well formed, and answered.
    for filter in ["#", "+", "/", "a/+/#", "$share/g/#", "$share/g//", "$share", "$shared/a"] {
        check(filter, true);
    }
}

/// The highest bit of the Protocol Level is that of a bridge; unknown levels with it are answered as 3.1.1, where
/// mosquitto's bridges read return code 1 and come again without it.
#[test]
fn a_bridge_says_so_in_its_protocol_level() {
    for (version, name, level) in [(V31, &b"MQIsdp"[..], 0x83), (V311, b"MQTT", 0x84)] {
        for (level, bridge) in [(level, true), (level & 0x7F, false)] {
            let body = [&text(name)[..], &[level, 2, 0, 60], &text(b"id")].concat();
            let packet = packet(0x10, &body);
            let Ok(Packet::Connect(connect)) = decode(V5, &packet) else { panic!("{level:02X} is refused") };
            assert_eq!((connect.version, connect.bridge), (version, bridge));
            assert_eq!(answer_version(&packet), Some(version));
        }
    }
    for (level, answer) in [(0x85, V311), (0xFF, V311), (0x80, V311), (6, V5), (0x7F, V5), (0, V311)] {
        let packet = packet(0x10, &[&text(b"MQTT")[..], &[level, 2, 0, 60, 0], &text(b"id")].concat());
        assert!(matches!(decode(V5, &packet), Err(DecodeError::UnsupportedVersion { .. })), "{level:02X}");
        assert_eq!(answer_version(&packet), Some(answer), "{level:02X}");
    }
}

/// MQTT 3.1 §2.1: DUP also marks PUBREL, SUBSCRIBE and UNSUBSCRIBE that are sent again.
#[test]
fn dup_of_control_packets_is_taken_from_3_1_alone() {
    check_taken(&[V31], 0x6A, &[0, 1]);
    check_refused(&[V311, V5], 0x6A, &[0, 1], MALFORMED);
}

/// §1.5.5 [MQTT-1.5.5-1].
#[test]
fn overlong_lengths_are_malformed_in_5() {
    assert_eq!(decode(V311, &[0x40, 0x82, 0x00, 0, 1]).unwrap(), decode(V311, &[0x40, 2, 0, 1]).unwrap());
    assert!(matches!(decode(V5, &[0x40, 0x82, 0x00, 0, 1]), Err(DecodeError::Malformed(_))));
    let mut long = packet(0x10, &connect(V5, 2, &[], &[b"id"]));
    long.splice(1..2, [long[1] | 0x80, 0]);
    assert!(matches!(decode(V5, &long), Err(DecodeError::Malformed(_))));
    check_refused(&[V5], 0x30, b"\0\x01a\x80\0", MALFORMED);
    check_refused(&[V5], 0x30, b"\0\x01a\x80\x80\x80\x80\x01", MALFORMED);
}

/// §2.1.4, §3.1.2.11.4.
#[test]
fn frame_tells_the_size_before_the_body_is_there() {
    let limits = Limits { packet_bytes_max: 1_000 };
    for (buffer, expected) in [
        (&[][..], None),
        (&[0x30], None),
        (&[0x30, 0x80], None),
        (&[0x30, 0], Some((2, 2))),
        (&[0x30, 0x7F], Some((2, 129))),
        (&[0x30, 0xE5, 0x07, 1], Some((3, 1_000))),
        (&[0x30, 0x80, 0x80, 0x80, 0x00], Some((5, 5))),
    ] {
        let measured = frame(buffer, &limits).unwrap().map(|frame| (frame.header_len, frame.total_len));
        assert_eq!(measured, expected, "{buffer:02X?}");
    }
    let too_large = DecodeError::PacketTooLarge { announced: 1_001, limit: 1_000 };
    assert_eq!(frame(&[0x30, 0xE6, 0x07], &limits), Err(too_large));
    assert_eq!(too_large.reason_code(), ReasonCode::PACKET_TOO_LARGE);
    assert!(matches!(frame(&[0x30, 0xFF, 0xFF, 0xFF, 0x7F], &limits), Err(DecodeError::PacketTooLarge { .. })));
    for wrong in [&[0x30, 0x80, 0x80, 0x80, 0x80][..], &[0x00], &[0x36], &[0x38], &[0x11], &[0x60], &[0x80], &[0xC1]] {
        assert!(matches!(frame(wrong, &limits), Err(DecodeError::Malformed(_))), "{wrong:02X?}");
    }
}

/// [MQTT-3.3.2-4] [MQTT-3.3.2-15] [MQTT-3.3.2-17] [MQTT-3.3.2-20]; the rest is for one Network Connection.
#[test]
fn publish_fits_two_cache_lines() {
    assert!(size_of::<Packet<'_>>() <= 128, "{}", size_of::<Packet<'_>>());
}
