//! CONNECT and CONNACK. MQTT 5.0 §3.1, §3.2.

use super::{Limits, frame, reason};
use crate::codec::wire::{Properties, Property, Reader, id, set};
use crate::codec::{Connack, Connect, DecodeError, PublishProperties, Qos, UserProperties, Version, Will};

const CONNECT: u64 = set(&[
    id::SessionExpiry,
    id::ReceiveMaximum,
    id::MaximumPacketSize,
    id::TopicAliasMaximum,
    id::RequestResponseInformation,
    id::RequestProblemInformation,
    id::User,
    id::AuthenticationMethod,
    id::AuthenticationData,
]);
const CONNACK: u64 = set(&[
    id::SessionExpiry,
    id::ReceiveMaximum,
    id::MaximumQos,
    id::RetainAvailable,
    id::MaximumPacketSize,
    id::AssignedClientId,
    id::TopicAliasMaximum,
    id::ReasonString,
    id::User,
    id::WildcardSubscriptionAvailable,
    id::SubscriptionIdsAvailable,
    id::SharedSubscriptionAvailable,
    id::ServerKeepAlive,
    id::ResponseInformation,
    id::ServerReference,
    id::AuthenticationMethod,
    id::AuthenticationData,
]);
const CONNACK_REASONS: &[u8] = &[
    0x00, 0x80, 0x81, 0x82, 0x83, 0x84, 0x85, 0x86, 0x87, 0x88, 0x89, 0x8A, 0x8C, 0x90, 0x95, 0x97, 0x99, 0x9A, 0x9B,
    0x9C, 0x9D, 0x9F,
];
const CONNACK_RETURN_CODES: &[u8] = &[0, 1, 2, 3, 4, 5];

/// In which version to answer a CONNECT that [`super::decode`] refused; `None` if it is not MQTT at all, or not even
/// its version can be read: close without an answer.
///
/// A Protocol Level we do not know is answered in the nearest version that we do; one with the highest bit set is that
/// of a bridge, which falls back to 3.1.1 without that bit when it reads return code 1. [MQTT-3.1.2-1] [MQTT-3.1.2-2]
pub fn answer_version(packet: &[u8]) -> Option<Version> {
    let header_len = frame(packet, &Limits { packet_bytes_max: u32::MAX }).ok()??.header_len;
    if packet[0] != 0x10 {
        return None;
    }
    match version(&mut Reader::new(&packet[header_len..])) {
        Ok((version, _)) => Some(version),
        Err(DecodeError::UnsupportedVersion { level: 5..BRIDGE }) => Some(Version::V5),
        Err(DecodeError::UnsupportedVersion { .. }) => Some(Version::V311),
        Err(_) => None,
    }
}

/// Set in the Protocol Level by bridges of mosquitto and others.
const BRIDGE: u8 = 0x80;

/// The version, and whether the client is a bridge.
fn version(body: &mut Reader<'_>) -> Result<(Version, bool), DecodeError> {
    let name = body.binary()?;
    if name != b"MQTT" && name != b"MQIsdp" {
        return Err(DecodeError::Malformed("protocol name"));
    }
    let level = body.u8()?;
    let bridge = level & BRIDGE != 0;
    match (name, level & !BRIDGE) {
        (b"MQIsdp", 3) => Ok((Version::V31, bridge)),
        (b"MQTT", 4) => Ok((Version::V311, bridge)),
        (b"MQTT", 5) if !bridge => Ok((Version::V5, false)),
        _ => Err(DecodeError::UnsupportedVersion { level }),
    }
}

pub(super) fn connect<'a>(body: &mut Reader<'a>) -> Result<Connect<'a>, DecodeError> {
    let (version, bridge) = version(body)?;
    let flags = Flags::read(version, body.u8()?)?;
    let mut connect = Connect {
        version,
        bridge,
        clean_start: flags.has(Flags::CLEAN_START),
        keep_alive: body.u16()?,
        client_id: "",
        will: None,
        username: None,
        password: None,
        session_expiry: None,
        receive_maximum: None,
        maximum_packet_size: None,
        topic_alias_maximum: None,
        request_response_information: None,
        request_problem_information: None,
        user_properties: UserProperties::default(),
        authentication_method: None,
        authentication_data: None,
    };
    connect_properties(&mut connect, body)?;
    connect.client_id = body.text()?;
    if flags.has(Flags::WILL) {
        connect.will = Some(will(version, flags, body)?);
    }
    if flags.has(Flags::USERNAME) {
        connect.username = Some(body.text()?);
    }
    if flags.has(Flags::PASSWORD) {
        connect.password = Some(body.binary()?);
    }
    Ok(connect)
}

/// Connect Flags. MQTT 5.0 and 3.1.1 §3.1.2.3.
#[derive(Clone, Copy)]
struct Flags(u8);

impl Flags {
    const CLEAN_START: u8 = 0x02;
    const WILL: u8 = 0x04;
    const WILL_QOS: u8 = 0x18;
    const WILL_RETAIN: u8 = 0x20;
    const PASSWORD: u8 = 0x40;
    const USERNAME: u8 = 0x80;

    fn has(self, flag: u8) -> bool {
        self.0 & flag != 0
    }

    fn read(version: Version, byte: u8) -> Result<Self, DecodeError> {
        let flags = Self(byte);
        // [MQTT-3.1.2-3]; in 3.1 the bit is merely not used.
        if flags.has(0x01) && version != Version::V31 {
            return Err(DecodeError::Malformed("reserved connect flag"));
        }
        // [MQTT-3.1.2-11] [MQTT-3.1.2-13] ([MQTT-3.1.2-13] and [MQTT-3.1.2-15] in 3.1.1)
        if !flags.has(Flags::WILL) && flags.has(Flags::WILL_QOS | Flags::WILL_RETAIN) {
            return Err(DecodeError::Malformed("will QoS or will retain without a will"));
        }
        // [MQTT-3.1.2-12] ([MQTT-3.1.2-14] in 3.1.1)
        if byte & Flags::WILL_QOS == Flags::WILL_QOS {
            return Err(DecodeError::Malformed("will QoS 3"));
        }
        // [MQTT-3.1.2-22] in 3.1.1; 5.0 allows it.
        if flags.has(Flags::PASSWORD) && !flags.has(Flags::USERNAME) && version != Version::V5 {
            return Err(DecodeError::Malformed("password without user name"));
        }
        Ok(flags)
    }
}

fn connect_properties<'a>(connect: &mut Connect<'a>, body: &mut Reader<'a>) -> Result<(), DecodeError> {
    let mut properties = Properties::open(connect.version, body, CONNECT)?;
    while let Some(property) = properties.next()? {
        match property {
            Property::SessionExpiry(seconds) => connect.session_expiry = Some(seconds),
            Property::ReceiveMaximum(packets) => connect.receive_maximum = Some(packets),
            Property::MaximumPacketSize(bytes) => connect.maximum_packet_size = Some(bytes),
            Property::TopicAliasMaximum(aliases) => connect.topic_alias_maximum = Some(aliases),
            Property::RequestResponseInformation(wish) => {
                connect.request_response_information = Some(wish);
            }
            Property::RequestProblemInformation(wish) => {
                connect.request_problem_information = Some(wish);
            }
            Property::AuthenticationMethod(method) => connect.authentication_method = Some(method),
            Property::AuthenticationData(data) => connect.authentication_data = Some(data),
            _ => {}
        }
    }
    connect.user_properties = UserProperties::from_raw(properties.raw);
    check_authentication(connect.authentication_method, connect.authentication_data)
}

/// MQTT 5.0 §3.1.2.11.10.
fn check_authentication(method: Option<&str>, data: Option<&[u8]>) -> Result<(), DecodeError> {
    if data.is_some() && method.is_none() {
        return Err(DecodeError::Protocol("authentication data without a method"));
    }
    Ok(())
}

fn will<'a>(version: Version, flags: Flags, body: &mut Reader<'a>) -> Result<Will<'a>, DecodeError> {
    let (properties, delay) = PublishProperties::read_will(version, body)?;
    let topic = body.text()?;
    if !crate::topic::is_valid_topic_name(topic) {
        return Err(DecodeError::TopicNameInvalid);
    }
    let payload = body.binary()?;
    let qos = Qos::from_bits((flags.0 & Flags::WILL_QOS) >> 3).ok_or(DecodeError::Malformed("will QoS 3"))?;
    Ok(Will { qos, retain: flags.has(Flags::WILL_RETAIN), topic, payload, delay, properties })
}

/// [MQTT-3.2.2-1]
pub(super) fn connack<'a>(version: Version, body: &mut Reader<'a>) -> Result<Connack<'a>, DecodeError> {
    let flags = body.u8()?;
    // 3.1 reserves the whole byte.
    if flags > 1 && version != Version::V31 {
        return Err(DecodeError::Malformed("reserved connect acknowledge flags"));
    }
    let reasons = if version == Version::V5 { CONNACK_REASONS } else { CONNACK_RETURN_CODES };
    let mut connack = Connack {
        session_present: flags == 1 && version != Version::V31,
        reason: reason(body.u8()?, reasons)?,
        ..Connack::default()
    };
    let mut properties = Properties::open(version, body, CONNACK)?;
    while let Some(property) = properties.next()? {
        match property {
            Property::SessionExpiry(seconds) => connack.session_expiry = Some(seconds),
            Property::ReceiveMaximum(packets) => connack.receive_maximum = Some(packets),
            Property::MaximumQos(qos) => connack.maximum_qos = Some(u8::from(qos)),
            Property::RetainAvailable(is) => connack.retain_available = Some(is),
            Property::MaximumPacketSize(bytes) => connack.maximum_packet_size = Some(bytes),
            Property::AssignedClientId(client_id) => connack.assigned_client_id = Some(client_id),
            Property::TopicAliasMaximum(aliases) => connack.topic_alias_maximum = Some(aliases),
            Property::ReasonString(text) => connack.reason_string = Some(text),
            Property::WildcardSubscriptionAvailable(is) => {
                connack.wildcard_subscription_available = Some(is);
            }
            Property::SubscriptionIdsAvailable(is) => connack.subscription_ids_available = Some(is),
            Property::SharedSubscriptionAvailable(is) => {
                connack.shared_subscription_available = Some(is);
            }
            Property::ServerKeepAlive(seconds) => connack.server_keep_alive = Some(seconds),
            Property::ResponseInformation(text) => connack.response_information = Some(text),
            Property::ServerReference(text) => connack.server_reference = Some(text),
            Property::AuthenticationMethod(method) => connack.authentication_method = Some(method),
            Property::AuthenticationData(data) => connack.authentication_data = Some(data),
            _ => {}
        }
    }
    connack.user_properties = UserProperties::from_raw(properties.raw);
    check_authentication(connack.authentication_method, connack.authentication_data)?;
    Ok(connack)
}
