//! Any packet survives encode and decode, any split of the bytes is measured alike, and no bytes panic.

use std::num::{NonZeroU16, NonZeroU32};

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use wasmqtt_protocol::codec::*;
use wasmqtt_protocol::topic::Filter;

/// What packets borrow from. Each of them takes the parts it has room for.
#[derive(Debug)]
struct Parts {
    topic: String,
    texts: Vec<Option<String>>,
    data: Vec<Option<Vec<u8>>>,
    numbers: Vec<Option<u32>>,
    small: Vec<Option<NonZeroU16>>,
    flags: Vec<Option<bool>>,
    pairs: Vec<(String, String)>,
    block: Vec<u8>,
    filters: Vec<(String, u8)>,
    packet_id: NonZeroU16,
    pick: usize,
}

fn text() -> impl Strategy<Value = String> {
    "[^\0]{0,40}"
}

fn block() -> impl Strategy<Value = Vec<u8>> {
    let parts = (
        option::of(any::<bool>()),
        option::of(text()),
        option::of("[^\0+#]{1,20}"),
        option::of(vec(any::<u8>(), 0..20)),
        vec((text(), text()), 0..4),
    );
    parts.prop_map(|(format, content, response, correlation, users)| {
        let mut block = PublishPropertiesBuilder::default();
        for (name, value) in &users {
            block = block.user(name, value);
        }
        if let Some(is_utf8) = format {
            block = block.payload_format(is_utf8);
        }
        if let Some(content) = &content {
            block = block.content_type(content);
        }
        if let Some(topic) = &response {
            block = block.response_topic(topic);
        }
        if let Some(data) = &correlation {
            block = block.correlation_data(data);
        }
        block.build()
    })
}

fn parts() -> impl Strategy<Value = Parts> {
    let borrowed = (
        "[^\0+#]{1,60}",
        vec(option::of(text()), 6),
        vec(option::of(vec(any::<u8>(), 0..200)), 3),
        vec((text(), text()), 0..4),
        block(),
        vec((text(), any::<u8>()), 1..6),
    );
    let plain = (
        vec(option::of(any::<u32>()), 3),
        vec(option::of(any::<NonZeroU16>()), 3),
        vec(option::of(any::<bool>()), 8),
        any::<NonZeroU16>(),
        any::<usize>(),
    );
    (borrowed, plain).prop_map(|(borrowed, plain)| {
        let (topic, texts, data, pairs, block, filters) = borrowed;
        let (numbers, small, flags, packet_id, pick) = plain;
        Parts { topic, texts, data, numbers, small, flags, pairs, block, filters, packet_id, pick }
    })
}

fn version() -> impl Strategy<Value = Version> {
    prop_oneof![Just(Version::V31), Just(Version::V311), Just(Version::V5)]
}

impl Parts {
    fn text(&self, index: usize) -> Option<&str> {
        self.texts[index].as_deref()
    }

    fn data(&self, index: usize) -> Option<&[u8]> {
        self.data[index].as_deref()
    }

    fn is(&self, index: usize) -> bool {
        self.flags[index].unwrap_or_default()
    }

    fn qos(&self) -> Qos {
        Qos::from_bits((self.pick % 3) as u8).expect("below 3")
    }

    /// Others are malformed packets; one at least.
    fn valid_filters(&self) -> impl Iterator<Item = (&str, u8)> {
        let valid = |filter| if Filter::check(filter).is_ok() { filter } else { "a/+/#" };
        self.filters.iter().map(move |(filter, bits)| (valid(filter), *bits))
    }

    fn reason(&self, of: &[u8]) -> ReasonCode {
        ReasonCode(of[self.pick % of.len()])
    }
}

/// Data without a method would not be taken.
fn data_with<'a>(method: Option<&str>, data: Option<&'a [u8]>) -> Option<&'a [u8]> {
    method.and(data)
}

fn connect<'a>(version: Version, of: &'a Parts, users: UserProperties<'a>) -> Packet<'a> {
    let v5 = version == Version::V5;
    let username = of.text(0);
    let method = of.text(1).filter(|_| v5);
    let will = of.data(0).map(|payload| Will {
        qos: of.qos(),
        retain: of.is(0),
        topic: &of.topic,
        payload,
        delay: of.numbers[0].filter(|_| v5),
        properties: if v5 {
            PublishProperties::from_forwardable(&of.block, of.numbers[1])
        } else {
            PublishProperties::default()
        },
    });
    Packet::Connect(Box::new(Connect {
        version,
        bridge: of.is(4) && !v5,
        clean_start: of.is(1),
        keep_alive: of.packet_id.get(),
        client_id: of.text(2).unwrap_or_default(),
        will,
        username,
        password: of.data(1).filter(|_| v5 || username.is_some()),
        session_expiry: of.numbers[2].filter(|_| v5),
        receive_maximum: of.small[0].filter(|_| v5),
        maximum_packet_size: of.small[1].filter(|_| v5).map(NonZeroU32::from),
        topic_alias_maximum: of.small[2].filter(|_| v5).map(NonZeroU16::get),
        request_response_information: of.flags[2].filter(|_| v5),
        request_problem_information: of.flags[3].filter(|_| v5),
        user_properties: users,
        authentication_method: method,
        authentication_data: data_with(method, of.data(2)),
    }))
}

fn connack<'a>(version: Version, of: &'a Parts, users: UserProperties<'a>) -> Packet<'a> {
    let session_present = of.is(0) && version != Version::V31;
    if version != Version::V5 {
        let reason = of.reason(&[0, 1, 2, 3, 4, 5]);
        return Packet::Connack(Box::new(Connack { session_present, reason, ..Connack::default() }));
    }
    Packet::Connack(Box::new(Connack {
        session_present,
        reason: of.reason(&[0x00, 0x80, 0x84, 0x8A, 0x8C, 0x90, 0x95, 0x9F]),
        session_expiry: of.numbers[0],
        receive_maximum: of.small[0],
        maximum_qos: of.flags[1].map(u8::from),
        retain_available: of.flags[2],
        maximum_packet_size: of.small[1].map(NonZeroU32::from),
        assigned_client_id: of.text(0),
        topic_alias_maximum: of.small[2].map(NonZeroU16::get),
        reason_string: of.text(1),
        user_properties: users,
        wildcard_subscription_available: of.flags[3],
        subscription_ids_available: of.flags[4],
        shared_subscription_available: of.flags[5],
        server_keep_alive: of.small[2].map(NonZeroU16::get),
        response_information: of.text(2),
        server_reference: of.text(3),
        authentication_method: of.text(4),
        authentication_data: data_with(of.text(4), of.data(0)),
    }))
}

fn publish(version: Version, of: &Parts) -> Packet<'_> {
    let qos = of.qos();
    let mut properties = PublishProperties::default();
    if version == Version::V5 {
        properties = PublishProperties::from_forwardable(&of.block, of.numbers[0]);
        properties.topic_alias = of.small[0];
    }
    Packet::Publish(Publish {
        dup: of.is(0) && qos != Qos::AtMostOnce,
        qos,
        retain: of.is(1),
        topic: if properties.topic_alias.is_some() && of.is(2) { "" } else { &of.topic },
        packet_id: (qos != Qos::AtMostOnce).then_some(of.packet_id),
        properties,
        payload: of.data(0).unwrap_or_default(),
    })
}

fn ack<'a>(version: Version, of: &'a Parts, users: UserProperties<'a>, reasons: &[u8]) -> Ack<'a> {
    let v5 = version == Version::V5;
    Ack {
        packet_id: of.packet_id,
        reason: if v5 { of.reason(reasons) } else { ReasonCode::SUCCESS },
        reason_string: of.text(0).filter(|_| v5),
        user_properties: users,
    }
}

fn subscribe<'a>(version: Version, of: &'a Parts, users: UserProperties<'a>) -> Packet<'a> {
    let v5 = version == Version::V5;
    let options = |bits: u8| SubscribeOptions {
        qos: Qos::from_bits(bits % 3).expect("below 3"),
        no_local: v5 && bits & 4 != 0,
        retain_as_published: v5 && bits & 8 != 0,
        retain_handling: match bits >> 4 {
            1 if v5 => RetainHandling::SendIfNew,
            2 if v5 => RetainHandling::DoNotSend,
            _ => RetainHandling::Send,
        },
    };
    Packet::Subscribe(Subscribe {
        packet_id: of.packet_id,
        subscription_id: of.numbers[0].and_then(|id| NonZeroU32::new(id >> 4)).filter(|_| v5),
        user_properties: users,
        filters: of.valid_filters().map(|(filter, bits)| (filter, options(bits))).collect(),
    })
}

fn suback<'a>(version: Version, of: &'a Parts, users: UserProperties<'a>, reasons: &[u8]) -> Suback<'a> {
    Suback {
        packet_id: of.packet_id,
        reasons: of.filters.iter().map(|(_, bits)| ReasonCode(reasons[usize::from(*bits) % reasons.len()])).collect(),
        reason_string: of.text(0).filter(|_| version == Version::V5),
        user_properties: users,
    }
}

/// One packet of each type that `version` has.
fn packets<'a>(version: Version, of: &'a Parts, users: UserProperties<'a>) -> Vec<Packet<'a>> {
    let v5 = version == Version::V5;
    let publish_reasons = [0x00, 0x10, 0x80, 0x97];
    let suback_reasons: &[u8] = if v5 { &[0, 1, 2, 0x80, 0x8F, 0xA2] } else { &[0, 1, 2, 0x80] };
    let mut unsuback = suback(version, of, users, &[0, 0x11, 0x87]);
    let mut disconnect = Disconnect::default();
    if v5 {
        disconnect = Disconnect {
            reason: of.reason(&[0x00, 0x04, 0x81, 0x8E, 0xA2]),
            session_expiry: of.numbers[0],
            reason_string: of.text(0),
            user_properties: users,
            server_reference: of.text(1),
        };
    } else {
        unsuback.reasons.clear();
    }
    let mut packets = vec![
        connect(version, of, users),
        connack(version, of, users),
        publish(version, of),
        Packet::Puback(ack(version, of, users, &publish_reasons)),
        Packet::Pubrec(ack(version, of, users, &publish_reasons)),
        Packet::Pubrel(ack(version, of, users, &[0, 0x92])),
        Packet::Pubcomp(ack(version, of, users, &[0, 0x92])),
        subscribe(version, of, users),
        Packet::Suback(suback(version, of, users, suback_reasons)),
        Packet::Unsubscribe(Unsubscribe {
            packet_id: of.packet_id,
            user_properties: users,
            filters: of.valid_filters().map(|(filter, _)| filter).collect(),
        }),
        Packet::Unsuback(unsuback),
        Packet::Pingreq,
        Packet::Pingresp,
        Packet::Disconnect(disconnect),
    ];
    if v5 {
        packets.push(Packet::Auth(Auth {
            reason: of.reason(&[0x00, 0x18, 0x19]),
            authentication_method: Some(&of.topic),
            authentication_data: of.data(0),
            reason_string: of.text(0),
            user_properties: users,
        }));
    }
    packets
}

const ANY_SIZE: Limits = Limits { packet_bytes_max: u32::MAX };

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_packet_survives_encode_and_decode(version in version(), parts in parts()) {
        let pairs: Vec<(&str, &str)> = parts.pairs.iter().map(|(name, value)| (&name[..], &value[..])).collect();
        let users = if version == Version::V5 { UserProperties::from(&pairs[..]) } else { UserProperties::default() };
        for packet in packets(version, &parts, users) {
            let mut bytes = vec![0xFF]; // `encode` appends
            encode(version, &packet, &mut bytes);
            let bytes = &bytes[1..];
            let decoded = decode(version, bytes);
            prop_assert_eq!(decoded.as_ref(), Ok(&packet), "{:02X?}", bytes);
            let mut again = Vec::new();
            encode(version, &decoded.unwrap(), &mut again);
            prop_assert_eq!(&again, bytes);
        }
    }

    #[test]
    fn any_prefix_is_measured_like_the_whole(version in version(), parts in parts(), tail in vec(any::<u8>(), 0..8)) {
        for packet in packets(version, &parts, UserProperties::default()) {
            let mut bytes = Vec::new();
            encode(version, &packet, &mut bytes);
            let total_len = bytes.len();
            bytes.extend_from_slice(&tail);
            let whole = frame(&bytes, &ANY_SIZE).unwrap().unwrap();
            prop_assert_eq!(whole.total_len, total_len);
            for end in 0..bytes.len() {
                let measured = frame(&bytes[..end], &ANY_SIZE).unwrap();
                prop_assert_eq!(measured, (end >= whole.header_len).then_some(whole));
            }
            let limit = Limits { packet_bytes_max: total_len as u32 - 1 };
            let too_large = DecodeError::PacketTooLarge { announced: total_len as u32, limit: limit.packet_bytes_max };
            prop_assert_eq!(frame(&bytes, &limit), Err(too_large));
        }
    }

    #[test]
    fn publish_head_and_payload_are_the_packet_of_the_length_that_was_told(
        version in version(),
        parts in parts(),
        ids in vec(1..=268_435_455_u32, 0..4),
    ) {
        let ids: Vec<NonZeroU32> = ids.into_iter().filter_map(NonZeroU32::new).collect();
        let qos = parts.qos();
        let head = PublishHead {
            dup: false,
            qos,
            retain: parts.is(0),
            topic: &parts.topic,
            packet_id: (qos != Qos::AtMostOnce).then_some(parts.packet_id),
            topic_alias: parts.small[0],
            message_expiry: parts.numbers[0],
            subscription_ids: &ids,
            properties: &parts.block,
        };
        let payload = parts.data(0).unwrap_or_default();
        let mut bytes = Vec::new();
        encode_publish_head(version, &head, payload.len(), &mut bytes);
        bytes.extend_from_slice(payload);
        prop_assert_eq!(bytes.len(), publish_len(version, &head, payload.len()));
        let Ok(Packet::Publish(publish)) = decode(version, &bytes) else { panic!("{bytes:02X?}") };
        prop_assert_eq!((publish.topic, publish.payload), (head.topic, payload));
        if version == Version::V5 {
            prop_assert_eq!(publish.properties.subscription_ids().collect::<Vec<_>>(), ids);
            prop_assert_eq!(&*publish.properties.forwardable(), &parts.block[..]);
        } else {
            prop_assert_eq!(publish.properties, PublishProperties::default());
        }
    }

    #[test]
    fn random_bytes_never_panic(version in version(), bytes in vec(any::<u8>(), 0..64)) {
        let _ = frame(&bytes, &ANY_SIZE);
        let _ = decode(version, &bytes);
        let _ = answer_version(&bytes);
        // Most random bytes fail at the length; these get further.
        if let Some((first, body)) = bytes.split_first() {
            let _ = decode(version, &[&[*first, body.len() as u8], body].concat());
        }
    }

    #[test]
    fn a_damaged_packet_never_panics_and_what_is_taken_survives(
        version in version(), parts in parts(), damage in vec((any::<usize>(), any::<u8>()), 1..4),
    ) {
        for packet in packets(version, &parts, UserProperties::default()) {
            let mut bytes = Vec::new();
            encode(version, &packet, &mut bytes);
            for (at, value) in &damage {
                let at = at % bytes.len();
                bytes[at] ^= value;
            }
            if let Ok(taken) = decode(version, &bytes) {
                let mut again = Vec::new();
                encode(version, &taken, &mut again);
                let retaken = decode(version, &again);
                prop_assert_eq!(retaken.as_ref(), Ok(&taken), "{:02X?}", bytes);
            }
        }
    }
}
