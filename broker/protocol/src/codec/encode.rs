//! Packets to bytes. Always appends; never fails: text that does not fit its length field is cut.

use std::num::{NonZeroU16, NonZeroU32};

use smallvec::SmallVec;

use super::wire::{Property, VARINT_MAX, cut, put_binary, put_text, put_varint, put_with_length, varint_len};
use super::{
    Ack, Auth, Connack, Connect, Disconnect, Packet, PacketId, Publish, Qos, ReasonCode, Suback, Subscribe,
    SubscribeOptions, Unsubscribe, UserProperties, Version, Will,
};

/// Appends one packet. For 3.x without what those versions do not have: properties, most Reason Codes, and AUTH.
///
/// CONNECT is written in the version it names. A packet over the receiver's Maximum Packet Size is for the caller
/// to shorten or leave out.
pub fn encode(version: Version, packet: &Packet<'_>, out: &mut Vec<u8>) {
    match packet {
        Packet::Connect(connect) => put_connect(connect, out),
        Packet::Connack(connack) => put_connack(version, connack, out),
        Packet::Publish(publish) => put_publish(version, publish, out),
        Packet::Puback(ack) => put_ack(version, 0x40, ack, out),
        Packet::Pubrec(ack) => put_ack(version, 0x50, ack, out),
        Packet::Pubrel(ack) => put_ack(version, 0x62, ack, out),
        Packet::Pubcomp(ack) => put_ack(version, 0x70, ack, out),
        Packet::Subscribe(subscribe) => put_subscribe(version, subscribe, out),
        Packet::Suback(suback) => put_suback(version, 0x90, suback, out),
        Packet::Unsubscribe(unsubscribe) => put_unsubscribe(version, unsubscribe, out),
        Packet::Unsuback(unsuback) => put_suback(version, 0xB0, unsuback, out),
        Packet::Pingreq => out.extend_from_slice(&[0xC0, 0]),
        Packet::Pingresp => out.extend_from_slice(&[0xD0, 0]),
        Packet::Disconnect(disconnect) => put_disconnect(version, disconnect, out),
        Packet::Auth(auth) => put_auth(version, auth, out),
    }
}

/// A PUBLISH without its payload, so that many receivers can share that. MQTT 5.0 §3.3.
#[derive(Debug, Clone, Copy, Default)]
pub struct PublishHead<'a> {
    /// DUP flag.
    pub dup: bool,
    /// QoS level.
    pub qos: Qos,
    /// RETAIN flag.
    pub retain: bool,
    /// At most 65 535 bytes; empty if the alias alone stands for it.
    pub topic: &'a str,
    /// Present exactly if QoS > 0.
    pub packet_id: Option<PacketId>,
    /// Not written for 3.x.
    pub topic_alias: Option<NonZeroU16>,
    /// Seconds that are left. Not written for 3.x.
    pub message_expiry: Option<u32>,
    /// 1..=268 435 455 each. Not written for 3.x.
    pub subscription_ids: &'a [NonZeroU32],
    /// As [`super::PublishProperties::forwardable`] returns them. Not written for 3.x.
    pub properties: &'a [u8],
}

impl PublishHead<'_> {
    /// Without their length.
    #[inline]
    fn properties_len(&self) -> usize {
        let ids = self.subscription_ids.iter().map(|id| 1 + varint_len(id.get().min(VARINT_MAX)));
        self.topic_alias.map_or(0, |_| 3)
            + self.message_expiry.map_or(0, |_| 5)
            + ids.sum::<usize>()
            + self.properties.len()
    }

    /// The value of Remaining Length.
    #[inline]
    fn remaining_len(&self, version: Version, properties_len: usize, payload_len: usize) -> usize {
        let properties = if version == Version::V5 { varint_len(properties_len as u32) + properties_len } else { 0 };
        2 + cut(self.topic).len() + self.packet_id.map_or(0, |_| 2) + properties + payload_len
    }
}

/// Appends all of a PUBLISH but the payload, whose length it announces. Reserves once, for what it writes.
#[inline]
pub fn encode_publish_head(version: Version, head: &PublishHead<'_>, payload_len: usize, out: &mut Vec<u8>) {
    debug_assert_eq!(head.packet_id.is_some(), head.qos != Qos::AtMostOnce);
    let properties_len = head.properties_len();
    let remaining = head.remaining_len(version, properties_len, payload_len);
    out.reserve(1 + 4 + remaining - payload_len);
    out.push(0x30 | u8::from(head.dup) << 3 | (head.qos as u8) << 1 | u8::from(head.retain));
    put_varint(remaining as u32, out);
    put_text(head.topic, out);
    if let Some(packet_id) = head.packet_id {
        out.extend_from_slice(&packet_id.get().to_be_bytes());
    }
    if version == Version::V5 {
        put_varint(properties_len as u32, out);
        if properties_len > 0 {
            put(head.topic_alias.map(Property::TopicAlias), out);
            put(head.message_expiry.map(Property::MessageExpiry), out);
            for id in head.subscription_ids {
                Property::SubscriptionId(*id).put(out);
            }
            out.extend_from_slice(head.properties);
        }
    }
}

/// Bytes of the whole packet, to compare with the receiver's Maximum Packet Size. [MQTT-3.1.2-24]
#[inline]
pub fn publish_len(version: Version, head: &PublishHead<'_>, payload_len: usize) -> usize {
    let remaining = head.remaining_len(version, head.properties_len(), payload_len);
    1 + varint_len(u32::try_from(remaining).unwrap_or(u32::MAX)) + remaining
}

fn put_publish(version: Version, publish: &Publish<'_>, out: &mut Vec<u8>) {
    let ids: SmallVec<[NonZeroU32; 8]> = publish.properties.subscription_ids().collect();
    let head = PublishHead {
        dup: publish.dup,
        qos: publish.qos,
        retain: publish.retain,
        topic: publish.topic,
        packet_id: publish.packet_id,
        topic_alias: publish.properties.topic_alias,
        message_expiry: publish.properties.message_expiry,
        subscription_ids: &ids,
        properties: &publish.properties.forwardable(),
    };
    encode_publish_head(version, &head, publish.payload.len(), out);
    out.extend_from_slice(publish.payload);
}

fn put_ack(version: Version, first: u8, ack: &Ack<'_>, out: &mut Vec<u8>) {
    let [high, low] = ack.packet_id.get().to_be_bytes();
    let plain = ack.reason_string.is_none() && ack.user_properties.is_empty();
    if version != Version::V5 || (plain && ack.reason == ReasonCode::SUCCESS) {
        out.extend_from_slice(&[first, 2, high, low]);
    } else if plain {
        out.extend_from_slice(&[first, 3, high, low, ack.reason.0]);
    } else {
        put_packet(first, out, |out| {
            out.extend_from_slice(&[high, low, ack.reason.0]);
            put_reason_properties(ack.reason_string, &ack.user_properties, out);
        });
    }
}

fn put_connect(connect: &Connect<'_>, out: &mut Vec<u8>) {
    let version = connect.version;
    put_packet(0x10, out, |out| {
        put_text(if version == Version::V31 { "MQIsdp" } else { "MQTT" }, out);
        let level = match version {
            Version::V31 => 3,
            Version::V311 => 4,
            Version::V5 => 5,
        };
        out.push(level | u8::from(connect.bridge) << 7);
        out.push(connect_flags(connect));
        out.extend_from_slice(&connect.keep_alive.to_be_bytes());
        put_properties(version, out, |out| {
            put(connect.session_expiry.map(Property::SessionExpiry), out);
            put(connect.receive_maximum.map(Property::ReceiveMaximum), out);
            put(connect.maximum_packet_size.map(Property::MaximumPacketSize), out);
            put(connect.topic_alias_maximum.map(Property::TopicAliasMaximum), out);
            put(connect.request_response_information.map(Property::RequestResponseInformation), out);
            put(connect.request_problem_information.map(Property::RequestProblemInformation), out);
            connect.user_properties.put(out);
            put(connect.authentication_method.map(Property::AuthenticationMethod), out);
            put(connect.authentication_data.map(Property::AuthenticationData), out);
        });
        put_text(connect.client_id, out);
        if let Some(will) = &connect.will {
            put_will(version, will, out);
        }
        if let Some(username) = connect.username {
            put_text(username, out);
        }
        if let Some(password) = connect.password {
            put_binary(password, out);
        }
    });
}

fn connect_flags(connect: &Connect<'_>) -> u8 {
    let mut flags = u8::from(connect.clean_start) << 1;
    if let Some(will) = &connect.will {
        flags |= 1 << 2 | (will.qos as u8) << 3 | u8::from(will.retain) << 5;
    }
    flags | u8::from(connect.password.is_some()) << 6 | u8::from(connect.username.is_some()) << 7
}

fn put_will(version: Version, will: &Will<'_>, out: &mut Vec<u8>) {
    put_properties(version, out, |out| {
        put(will.delay.map(Property::WillDelay), out);
        put(will.properties.message_expiry.map(Property::MessageExpiry), out);
        out.extend_from_slice(&will.properties.forwardable());
    });
    put_text(will.topic, out);
    put_binary(will.payload, out);
}

fn put_connack(version: Version, connack: &Connack<'_>, out: &mut Vec<u8>) {
    put_packet(0x20, out, |out| {
        // 3.1 has no Session Present; its byte is reserved.
        out.push(u8::from(connack.session_present && version != Version::V31));
        out.push(connack.reason.0);
        put_properties(version, out, |out| {
            put(connack.session_expiry.map(Property::SessionExpiry), out);
            put(connack.receive_maximum.map(Property::ReceiveMaximum), out);
            put(connack.maximum_qos.map(|qos| Property::MaximumQos(qos != 0)), out);
            put(connack.retain_available.map(Property::RetainAvailable), out);
            put(connack.maximum_packet_size.map(Property::MaximumPacketSize), out);
            put(connack.assigned_client_id.map(Property::AssignedClientId), out);
            put(connack.topic_alias_maximum.map(Property::TopicAliasMaximum), out);
            put(connack.reason_string.map(Property::ReasonString), out);
            connack.user_properties.put(out);
            put(connack.wildcard_subscription_available.map(Property::WildcardSubscriptionAvailable), out);
            put(connack.subscription_ids_available.map(Property::SubscriptionIdsAvailable), out);
            put(connack.shared_subscription_available.map(Property::SharedSubscriptionAvailable), out);
            put(connack.server_keep_alive.map(Property::ServerKeepAlive), out);
            put(connack.response_information.map(Property::ResponseInformation), out);
            put(connack.server_reference.map(Property::ServerReference), out);
            put(connack.authentication_method.map(Property::AuthenticationMethod), out);
            put(connack.authentication_data.map(Property::AuthenticationData), out);
        });
    });
}

fn put_subscribe(version: Version, subscribe: &Subscribe<'_>, out: &mut Vec<u8>) {
    put_packet(0x82, out, |out| {
        out.extend_from_slice(&subscribe.packet_id.get().to_be_bytes());
        put_properties(version, out, |out| {
            put(subscribe.subscription_id.map(Property::SubscriptionId), out);
            subscribe.user_properties.put(out);
        });
        for (filter, options) in &subscribe.filters {
            put_text(filter, out);
            out.push(if version == Version::V5 { options_byte(*options) } else { options.qos as u8 });
        }
    });
}

fn options_byte(options: SubscribeOptions) -> u8 {
    options.qos as u8
        | u8::from(options.no_local) << 2
        | u8::from(options.retain_as_published) << 3
        | (options.retain_handling as u8) << 4
}

/// SUBACK and UNSUBACK.
fn put_suback(version: Version, first: u8, suback: &Suback<'_>, out: &mut Vec<u8>) {
    put_packet(first, out, |out| {
        out.extend_from_slice(&suback.packet_id.get().to_be_bytes());
        if version == Version::V5 {
            put_reason_properties(suback.reason_string, &suback.user_properties, out);
            out.extend(suback.reasons.iter().map(|reason| reason.0));
        } else if first == 0x90 {
            // The only failure 3.1.1 knows; 3.1 knows none, and its clients take it for a strange QoS.
            out.extend(suback.reasons.iter().map(|reason| if reason.is_error() { 0x80 } else { reason.0 }));
        }
    });
}

fn put_unsubscribe(version: Version, unsubscribe: &Unsubscribe<'_>, out: &mut Vec<u8>) {
    put_packet(0xA2, out, |out| {
        out.extend_from_slice(&unsubscribe.packet_id.get().to_be_bytes());
        put_properties(version, out, |out| unsubscribe.user_properties.put(out));
        for filter in &unsubscribe.filters {
            put_text(filter, out);
        }
    });
}

fn put_disconnect(version: Version, disconnect: &Disconnect<'_>, out: &mut Vec<u8>) {
    if version != Version::V5 || *disconnect == Disconnect::default() {
        out.extend_from_slice(&[0xE0, 0]);
        return;
    }
    put_packet(0xE0, out, |out| {
        out.push(disconnect.reason.0);
        put_properties(version, out, |out| {
            put(disconnect.session_expiry.map(Property::SessionExpiry), out);
            put(disconnect.reason_string.map(Property::ReasonString), out);
            disconnect.user_properties.put(out);
            put(disconnect.server_reference.map(Property::ServerReference), out);
        });
    });
}

fn put_auth(version: Version, auth: &Auth<'_>, out: &mut Vec<u8>) {
    if version != Version::V5 {
        debug_assert!(false, "AUTH in a version that has none");
        return;
    }
    if *auth == Auth::default() {
        out.extend_from_slice(&[0xF0, 0]);
        return;
    }
    put_packet(0xF0, out, |out| {
        out.push(auth.reason.0);
        put_properties(version, out, |out| {
            put(auth.authentication_method.map(Property::AuthenticationMethod), out);
            put(auth.authentication_data.map(Property::AuthenticationData), out);
            put(auth.reason_string.map(Property::ReasonString), out);
            auth.user_properties.put(out);
        });
    });
}

fn put_packet(first: u8, out: &mut Vec<u8>, body: impl FnOnce(&mut Vec<u8>)) {
    out.push(first);
    put_with_length(out, body);
}

fn put_properties(version: Version, out: &mut Vec<u8>, properties: impl FnOnce(&mut Vec<u8>)) {
    if version == Version::V5 {
        put_with_length(out, properties);
    }
}

fn put_reason_properties(reason: Option<&str>, user_properties: &UserProperties<'_>, out: &mut Vec<u8>) {
    put_with_length(out, |out| {
        put(reason.map(Property::ReasonString), out);
        user_properties.put(out);
    });
}

#[inline]
fn put(property: Option<Property<'_>>, out: &mut Vec<u8>) {
    if let Some(property) = property {
        property.put(out);
    }
}
