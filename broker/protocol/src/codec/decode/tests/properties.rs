//! Properties: which, how often, with which values, and what is forwarded. MQTT 5.0 §2.2.2.

use super::{MALFORMED, PROTOCOL, check_connect_refused, check_refused, check_taken, packet};
use crate::codec::Version::V5;
use crate::codec::{Packet, Qos, ReasonCode, decode};

type Bytes = &'static [u8];
type Parts = &'static [Bytes];
/// First byte, what stands before and behind the properties, and the identifiers allowed there.
type Place = (u8, Bytes, Bytes, Bytes);

#[test]
fn properties_belong_into_their_packet_and_come_once() {
    let values: &[(u8, &[u8])] = &[
        (0x01, &[1]),
        (0x02, &[0, 0, 0, 1]),
        (0x03, b"\0\x01c"),
        (0x08, b"\0\x01r"),
        (0x09, b"\0\x01d"),
        (0x0B, &[1]),
        (0x11, &[0, 0, 0, 1]),
        (0x12, b"\0\x01i"),
        (0x13, &[0, 1]),
        (0x15, b"\0\x01m"),
        (0x16, b"\0\x01d"),
        (0x17, &[1]),
        (0x18, &[0, 0, 0, 1]),
        (0x19, &[1]),
        (0x1A, b"\0\x01i"),
        (0x1C, b"\0\x01s"),
        (0x1F, b"\0\x01r"),
        (0x21, &[0, 1]),
        (0x22, &[0, 1]),
        (0x23, &[0, 1]),
        (0x24, &[1]),
        (0x25, &[1]),
        (0x26, &[0, 0, 0, 0]),
        (0x27, &[0, 0, 0, 1]),
        (0x28, &[1]),
        (0x29, &[1]),
        (0x2A, &[1]),
    ];
    // MQTT 5.0 §2.2.2.2, table 2-4.
    let places: &[Place] = &[
        (0x10, b"\0\x04MQTT\x05\x02\0\0", b"\0\0", &[0x11, 0x15, 0x16, 0x17, 0x19, 0x21, 0x22, 0x26, 0x27]),
        (0x10, b"\0\x04MQTT\x05\x06\0\0\0\0\0", b"\0\x01w\0\0", &[0x01, 0x02, 0x03, 0x08, 0x09, 0x18, 0x26]),
        (
            0x20,
            &[0, 0],
            &[],
            &[0x11, 0x12, 0x13, 0x15, 0x16, 0x1A, 0x1C, 0x1F, 0x21, 0x22, 0x24, 0x25, 0x26, 0x27, 0x28, 0x29, 0x2A],
        ),
        (0x30, b"\0\x01a", &[], &[0x01, 0x02, 0x03, 0x08, 0x09, 0x0B, 0x23, 0x26]),
        (0x40, &[0, 1, 0], &[], &[0x1F, 0x26]),
        (0x50, &[0, 1, 0], &[], &[0x1F, 0x26]),
        (0x62, &[0, 1, 0], &[], &[0x1F, 0x26]),
        (0x70, &[0, 1, 0], &[], &[0x1F, 0x26]),
        (0x82, &[0, 1], b"\0\x01a\0", &[0x0B, 0x26]),
        (0x90, &[0, 1], &[0], &[0x1F, 0x26]),
        (0xA2, &[0, 1], b"\0\x01a", &[0x26]),
        (0xB0, &[0, 1], &[0], &[0x1F, 0x26]),
        (0xE0, &[0], &[], &[0x11, 0x1C, 0x1F, 0x26]),
        (0xF0, &[0], &[], &[0x15, 0x16, 0x1F, 0x26]),
    ];
    for &(first, before, behind, allowed) in places {
        for &(id, value) in values {
            let one = [&[id], value].concat();
            // Authentication Data is only allowed with a method, and AUTH requires one.
            let needs_method = id == 0x16 || (first == 0xF0 && id != 0x15);
            let method: &[u8] = if needs_method { b"\x15\0\x01m" } else { b"" };
            let body = |properties: &[u8]| [before, &[properties.len() as u8], properties, behind].concat();
            let (once, twice) = ([method, &one].concat(), [method, &one, &one].concat());
            if !allowed.contains(&id) {
                check_refused(&[V5], first, &body(&one), MALFORMED);
                continue;
            }
            check_taken(&[V5], first, &body(&once));
            if id == 0x26 || (id == 0x0B && first == 0x30) {
                check_taken(&[V5], first, &body(&twice));
            } else {
                check_refused(&[V5], first, &body(&twice), PROTOCOL);
            }
            check_refused(&[V5], first, &body(&once[..once.len() - 1]), MALFORMED);
        }
        for unknown in [0x00, 0x04, 0x2B, 0x7F, 0xFF] {
            check_refused(&[V5], first, &[before, &[2, unknown, 0], behind].concat(), MALFORMED);
        }
    }
}

#[test]
fn property_values_outside_their_range_are_refused() {
    let values: &[(Bytes, ReasonCode)] = &[
        (&[0x21, 0, 0], PROTOCOL),
        (&[0x27, 0, 0, 0, 0], PROTOCOL),
        (&[0x19, 2], PROTOCOL),
        (&[0x17, 2], PROTOCOL),
        (&[0x16, 0, 0], PROTOCOL),
        (b"\x15\0\x01\0", MALFORMED),
        (b"\x15\0\x01\xFF", MALFORMED),
    ];
    for (properties, code) in values {
        check_connect_refused(&[V5], 2, properties, &[b"id"], *code);
    }
    let values: &[(Bytes, ReasonCode)] = &[
        (&[0x23, 0, 0], ReasonCode::TOPIC_ALIAS_INVALID),
        (&[0x01, 2], PROTOCOL),
        (&[0x0B, 0], PROTOCOL),
        (&[0x0B, 0x80, 0x00], MALFORMED),
        (&[0x0B, 0xFF, 0xFF, 0xFF, 0xFF, 0x01], MALFORMED),
        (b"\x08\0\x01#", PROTOCOL),
        (b"\x08\0\x01+", PROTOCOL),
        (b"\x08\0\0", PROTOCOL),
        (b"\x03\0\x03\xED\xA0\x80", MALFORMED),
    ];
    for (properties, code) in values {
        let body = [b"\0\x01a", &[properties.len() as u8][..], properties].concat();
        check_refused(&[V5], 0x30, &body, *code);
    }
    check_refused(&[V5], 0x82, b"\0\x01\x02\x0B\0\0\x01a\0", PROTOCOL);
    check_refused(&[V5], 0x20, &[0, 0, 2, 0x24, 2], PROTOCOL);
}

#[test]
fn forwardable_properties_keep_their_bytes_and_order() {
    const USER: Bytes = b"\x26\0\x01a\0\x01b";
    const FORMAT: Bytes = b"\x01\x01";
    const CONTENT: Bytes = b"\x03\0\x01c";
    const ALIAS: Bytes = b"\x23\0\x07";
    const EXPIRY: Bytes = b"\x02\0\0\0\x09";
    const ID: Bytes = b"\x0B\x05";
    let cases: &[(Parts, Parts, bool)] = &[
        (&[], &[], true),
        (&[USER, FORMAT], &[USER, FORMAT], true),
        (&[ALIAS, USER, FORMAT], &[USER, FORMAT], true),
        (&[USER, FORMAT, ALIAS, EXPIRY], &[USER, FORMAT], true),
        (&[ALIAS, EXPIRY, ID], &[], true),
        (&[USER, ALIAS, FORMAT, EXPIRY, CONTENT, ID, USER], &[USER, FORMAT, CONTENT, USER], false),
    ];
    for (parts, expected, is_borrowed) in cases {
        let properties = parts.concat();
        let bytes = packet(0x30, &[b"\0\x01t", &[properties.len() as u8][..], &properties].concat());
        let Packet::Publish(publish) = decode(V5, &bytes).unwrap() else { panic!() };
        let forwardable = publish.properties.forwardable();
        assert_eq!(*forwardable, expected.concat());
        assert_eq!(matches!(forwardable, std::borrow::Cow::Borrowed(_)), *is_borrowed);
        assert_eq!(publish.properties.has_subscription_ids(), parts.contains(&ID));
        assert_eq!(publish.properties.message_expiry, parts.contains(&EXPIRY).then_some(9));
        assert_eq!(publish.qos, Qos::AtMostOnce);
    }
}
