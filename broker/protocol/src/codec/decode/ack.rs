//! Packets that are little more than a Reason Code. MQTT 5.0 §3.4 to §3.7, §3.14, §3.15.

use super::reason;
use crate::codec::wire::{Properties, Property, Reader, id, set};
use crate::codec::{Ack, Auth, DecodeError, Disconnect, ReasonCode, UserProperties, Version};

pub(super) const PUBLISH_REASONS: &[u8] = &[0x00, 0x10, 0x80, 0x83, 0x87, 0x90, 0x91, 0x97, 0x99];
pub(super) const RELEASE_REASONS: &[u8] = &[0x00, 0x92];
const DISCONNECT_REASONS: &[u8] = &[
    0x00, 0x04, 0x80, 0x81, 0x82, 0x83, 0x87, 0x89, 0x8B, 0x8C, 0x8D, 0x8E, 0x8F, 0x90, 0x93, 0x94, 0x95, 0x96, 0x97,
    0x98, 0x99, 0x9A, 0x9B, 0x9C, 0x9D, 0x9E, 0x9F, 0xA0, 0xA1, 0xA2,
];
const AUTH_REASONS: &[u8] = &[0x00, 0x18, 0x19];

const ACK: u64 = set(&[id::ReasonString, id::User]);
const DISCONNECT: u64 = set(&[id::SessionExpiry, id::ReasonString, id::User, id::ServerReference]);
const AUTH: u64 = set(&[id::AuthenticationMethod, id::AuthenticationData, id::ReasonString, id::User]);

/// Without a Reason Code it is 0x00; without properties there are none. MQTT 5.0 §3.4.2.1, §3.4.2.2.
pub(super) fn ack<'a>(version: Version, body: &mut Reader<'a>, allowed: &[u8]) -> Result<Ack<'a>, DecodeError> {
    let packet_id = body.packet_id()?;
    let mut ack =
        Ack { packet_id, reason: ReasonCode::SUCCESS, reason_string: None, user_properties: UserProperties::default() };
    if version == Version::V5 && !body.is_empty() {
        ack.reason = reason(body.u8()?, allowed)?;
        if !body.is_empty() {
            (ack.reason_string, ack.user_properties) = reason_properties(version, body)?;
        }
    }
    Ok(ack)
}

/// The two properties that explain a Reason Code.
pub(super) fn reason_properties<'a>(
    version: Version,
    body: &mut Reader<'a>,
) -> Result<(Option<&'a str>, UserProperties<'a>), DecodeError> {
    let mut properties = Properties::open(version, body, ACK)?;
    let mut reason_string = None;
    while let Some(property) = properties.next()? {
        if let Property::ReasonString(text) = property {
            reason_string = Some(text);
        }
    }
    Ok((reason_string, UserProperties::from_raw(properties.raw)))
}

/// MQTT 5.0 §3.14.2.1, §3.14.2.2.
pub(super) fn disconnect<'a>(version: Version, body: &mut Reader<'a>) -> Result<Disconnect<'a>, DecodeError> {
    let mut disconnect = Disconnect::default();
    if version != Version::V5 || body.is_empty() {
        return Ok(disconnect);
    }
    disconnect.reason = reason(body.u8()?, DISCONNECT_REASONS)?;
    if body.is_empty() {
        return Ok(disconnect);
    }
    let mut properties = Properties::open(version, body, DISCONNECT)?;
    while let Some(property) = properties.next()? {
        match property {
            Property::SessionExpiry(seconds) => disconnect.session_expiry = Some(seconds),
            Property::ReasonString(text) => disconnect.reason_string = Some(text),
            Property::ServerReference(text) => disconnect.server_reference = Some(text),
            _ => {}
        }
    }
    disconnect.user_properties = UserProperties::from_raw(properties.raw);
    Ok(disconnect)
}

/// MQTT 5.0 §3.15.2. Empty means Success without properties, although a method is otherwise required.
pub(super) fn auth<'a>(version: Version, body: &mut Reader<'a>) -> Result<Auth<'a>, DecodeError> {
    let mut auth = Auth::default();
    if body.is_empty() {
        return Ok(auth);
    }
    auth.reason = reason(body.u8()?, AUTH_REASONS)?;
    let mut properties = Properties::open(version, body, AUTH)?;
    while let Some(property) = properties.next()? {
        match property {
            Property::AuthenticationMethod(method) => auth.authentication_method = Some(method),
            Property::AuthenticationData(data) => auth.authentication_data = Some(data),
            Property::ReasonString(text) => auth.reason_string = Some(text),
            _ => {}
        }
    }
    if auth.authentication_method.is_none() {
        return Err(DecodeError::Protocol("no authentication method"));
    }
    auth.user_properties = UserProperties::from_raw(properties.raw);
    Ok(auth)
}
