//! SUBSCRIBE, SUBACK, UNSUBSCRIBE, UNSUBACK. MQTT 5.0 §3.8 to §3.11.

use super::ack::reason_properties;
use super::reason;
use crate::codec::wire::{Properties, Property, Reader, id, set};
use crate::codec::{
    DecodeError, Qos, ReasonCode, RetainHandling, Suback, Subscribe, SubscribeOptions, Unsubscribe, UserProperties,
    Version,
};
use crate::topic::{Filter, FilterError};

const SUBACK_REASONS: &[u8] = &[0x00, 0x01, 0x02, 0x80, 0x83, 0x87, 0x8F, 0x91, 0x97, 0x9E, 0xA1, 0xA2];
const SUBACK_REASONS_3X: &[u8] = &[0x00, 0x01, 0x02, 0x80];
const UNSUBACK_REASONS: &[u8] = &[0x00, 0x11, 0x80, 0x83, 0x87, 0x8F, 0x91];

const SUBSCRIBE: u64 = set(&[id::SubscriptionId, id::User]);
const UNSUBSCRIBE: u64 = set(&[id::User]);

/// [MQTT-3.8.3-2] ([MQTT-3.8.3-3] in 3.1.1)
pub(super) fn subscribe<'a>(version: Version, body: &mut Reader<'a>) -> Result<Subscribe<'a>, DecodeError> {
    let packet_id = body.packet_id()?;
    let mut properties = Properties::open(version, body, SUBSCRIBE)?;
    let mut subscription_id = None;
    while let Some(property) = properties.next()? {
        if let Property::SubscriptionId(id) = property {
            subscription_id = Some(id);
        }
    }
    let mut filters = Vec::new();
    while !body.is_empty() {
        filters.push((filter(body)?, options(version, body.u8()?)?));
    }
    if filters.is_empty() {
        return Err(DecodeError::Protocol("no topic filter"));
    }
    let user_properties = UserProperties::from_raw(properties.raw);
    Ok(Subscribe { packet_id, subscription_id, user_properties, filters })
}

/// One that breaks the rules of Topic Filters is no answer's business: the packet is malformed. [MQTT-4.7.1-1]
/// [MQTT-4.7.1-2] [MQTT-4.7.3-1] [MQTT-4.8.2-1] [MQTT-4.8.2-2] [MQTT-4.13.1-1] ([MQTT-4.7.1-2] [MQTT-4.7.1-3]
/// [MQTT-4.7.3-1] [MQTT-4.8.0-1] in 3.1.1)
fn filter<'a>(body: &mut Reader<'a>) -> Result<&'a str, DecodeError> {
    let text = body.text()?;
    match Filter::check(text) {
        // `$share` alone is a filter, only none that we take.
        Ok(()) | Err(FilterError::Unnamed) => Ok(text),
        Err(_) => Err(DecodeError::Malformed("topic filter is not valid")),
    }
}

/// [MQTT-3.8.3-5] ([MQTT-3-8.3-4] in 3.1.1)
fn options(version: Version, byte: u8) -> Result<SubscribeOptions, DecodeError> {
    if version != Version::V5 {
        let qos = Qos::from_bits(byte).ok_or(DecodeError::Malformed("requested QoS is not 0, 1 or 2"))?;
        return Ok(SubscribeOptions { qos, ..SubscribeOptions::default() });
    }
    if byte & 0b1100_0000 != 0 {
        return Err(DecodeError::Malformed("reserved bits of the subscription options"));
    }
    Ok(SubscribeOptions {
        qos: Qos::from_bits(byte & 0b11).ok_or(DecodeError::Protocol("maximum QoS 3"))?,
        no_local: byte & 0b100 != 0,
        retain_as_published: byte & 0b1000 != 0,
        retain_handling: match byte >> 4 {
            0 => RetainHandling::Send,
            1 => RetainHandling::SendIfNew,
            2 => RetainHandling::DoNotSend,
            _ => return Err(DecodeError::Protocol("retain handling 3")),
        },
    })
}

pub(super) fn suback<'a>(version: Version, body: &mut Reader<'a>) -> Result<Suback<'a>, DecodeError> {
    let (packet_id, (reason_string, user_properties)) = (body.packet_id()?, reason_properties(version, body)?);
    let reasons = reasons(body, if version == Version::V5 { SUBACK_REASONS } else { SUBACK_REASONS_3X })?;
    Ok(Suback { packet_id, reasons, reason_string, user_properties })
}

/// 3.x has no Reason Codes here.
pub(super) fn unsuback<'a>(version: Version, body: &mut Reader<'a>) -> Result<Suback<'a>, DecodeError> {
    let (packet_id, (reason_string, user_properties)) = (body.packet_id()?, reason_properties(version, body)?);
    let reasons = if version == Version::V5 { reasons(body, UNSUBACK_REASONS)? } else { Vec::new() };
    Ok(Suback { packet_id, reasons, reason_string, user_properties })
}

fn reasons(body: &mut Reader<'_>, allowed: &[u8]) -> Result<Vec<ReasonCode>, DecodeError> {
    if body.is_empty() {
        return Err(DecodeError::Protocol("no reason code"));
    }
    let values = body.take(body.rest.len())?;
    values.iter().map(|value| reason(*value, allowed)).collect()
}

/// [MQTT-3.10.3-2]
pub(super) fn unsubscribe<'a>(version: Version, body: &mut Reader<'a>) -> Result<Unsubscribe<'a>, DecodeError> {
    let packet_id = body.packet_id()?;
    let mut properties = Properties::open(version, body, UNSUBSCRIBE)?;
    while properties.next()?.is_some() {}
    let mut filters = Vec::new();
    while !body.is_empty() {
        filters.push(filter(body)?);
    }
    if filters.is_empty() {
        return Err(DecodeError::Protocol("no topic filter"));
    }
    Ok(Unsubscribe { packet_id, user_properties: UserProperties::from_raw(properties.raw), filters })
}
