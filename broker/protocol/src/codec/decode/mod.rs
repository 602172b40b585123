//! Bytes to packets: the frame first, then its body. Both directions, for tests and clients too.

mod ack; // PUBACK, PUBREC, PUBREL, PUBCOMP, DISCONNECT, AUTH
mod connect; // CONNECT, CONNACK
mod subscribe; // SUBSCRIBE, SUBACK, UNSUBSCRIBE, UNSUBACK
#[cfg(test)]
mod tests;

pub use connect::answer_version;

use super::wire::Reader;
use super::{DecodeError, Packet, Publish, PublishProperties, Qos, ReasonCode, Version};

/// What we take from a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Largest packet, in bytes, header and body. MQTT 5.0 §3.1.2.11.4.
    pub packet_bytes_max: u32,
}

/// Where a packet ends, known before its body is there. MQTT 5.0 §2.1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame {
    /// Packet type and flags.
    pub first: u8,
    /// Bytes of the fixed header: 2..=5.
    pub header_len: usize,
    /// Bytes of the whole packet, header and body.
    pub total_len: usize,
}

/// Reads the fixed header at the front of `buffer`; `Ok(None)` while bytes of it are missing.
///
/// The body need not be there: compare [`Frame::total_len`] with the length of the buffer.
/// # Errors
/// [`DecodeError::PacketTooLarge`] once the Remaining Length is known, before the body arrives;
/// [`DecodeError::Malformed`] for a type or flags no version has, or a Remaining Length of more than four bytes.
#[inline]
pub fn frame(buffer: &[u8], limits: &Limits) -> Result<Option<Frame>, DecodeError> {
    let Some((&first, rest)) = buffer.split_first() else {
        return Ok(None);
    };
    check_first(first)?;
    let mut remaining = 0;
    for index in 0..4 {
        let Some(&byte) = rest.get(index) else {
            return Ok(None);
        };
        remaining |= u32::from(byte & 0x7F) << (7 * index);
        if byte & 0x80 == 0 {
            let header_len = index + 2;
            let announced = remaining + header_len as u32;
            if announced > limits.packet_bytes_max {
                return Err(DecodeError::PacketTooLarge { announced, limit: limits.packet_bytes_max });
            }
            return Ok(Some(Frame { first, header_len, total_len: announced as usize }));
        }
    }
    Err(DecodeError::Malformed("remaining length of more than four bytes"))
}

/// [MQTT-2.1.3-1] ([MQTT-2.2.2-1] and [MQTT-2.2.2-2] in 3.1.1), [MQTT-3.3.1-2], [MQTT-3.3.1-4]
#[inline]
fn check_first(first: u8) -> Result<(), DecodeError> {
    let flags = first & 0x0F;
    let is_valid = match first >> 4 {
        0 => return Err(DecodeError::Malformed("packet type 0")),
        3 => {
            if flags & 0b0110 == 0b0110 {
                return Err(DecodeError::Malformed("QoS 3"));
            }
            if flags & 0b1110 == 0b1000 {
                return Err(DecodeError::Malformed("DUP with QoS 0"));
            }
            true
        }
        // 3.1 has a DUP flag here; for the others `decode` refuses it, as it knows the version.
        6 | 8 | 10 => flags & 0b0111 == 0b0010,
        _ => flags == 0,
    };
    if is_valid { Ok(()) } else { Err(DecodeError::Malformed("reserved flags of the fixed header")) }
}

/// Decodes one whole packet, as [`frame`] measured it. `version` is that of the Network Connection, and does not
/// matter for CONNECT.
///
/// Allocates for CONNECT, CONNACK and lists of Topic Filters or Reason Codes; PUBLISH and its acknowledgements cost
/// no allocation.
/// # Errors
/// The [`DecodeError`] whose [`DecodeError::reason_code`] the standard names; `Malformed` if `packet` is not exactly
/// one packet.
#[inline]
pub fn decode(version: Version, packet: &[u8]) -> Result<Packet<'_>, DecodeError> {
    let Some(Frame { first, header_len, total_len }) = frame(packet, &Limits { packet_bytes_max: u32::MAX })? else {
        return Err(DecodeError::Malformed("ends early"));
    };
    if total_len != packet.len() {
        return Err(DecodeError::Malformed("length differs from remaining length"));
    }
    if first >> 4 != 1 {
        check_shortest(version, packet, header_len)?;
    }
    if first >> 4 == 3 {
        publish(version, first, Reader::new(&packet[header_len..])).map(Packet::Publish)
    } else {
        other(version, packet, header_len)
    }
}

/// 3.x does not forbid a Remaining Length with needless bytes. [MQTT-1.5.5-1]
#[inline]
fn check_shortest(version: Version, packet: &[u8], header_len: usize) -> Result<(), DecodeError> {
    if version == Version::V5 && header_len > 2 && packet[header_len - 1] == 0 {
        return Err(DecodeError::Malformed("remaining length longer than needed"));
    }
    Ok(())
}

#[inline]
fn publish(version: Version, first: u8, mut body: Reader<'_>) -> Result<Publish<'_>, DecodeError> {
    let qos = Qos::from_bits(first >> 1 & 0b11).ok_or(DecodeError::Malformed("QoS 3"))?;
    let topic = body.utf8()?;
    if crate::topic::has_wildcard_or_nul(topic.as_bytes()) {
        return Err(DecodeError::TopicNameInvalid);
    }
    let packet_id = if qos == Qos::AtMostOnce { None } else { Some(body.packet_id()?) };
    let properties = PublishProperties::read(version, &mut body)?;
    if topic.is_empty() && properties.topic_alias.is_none() {
        return Err(if version == Version::V5 {
            DecodeError::Protocol("neither topic name nor topic alias")
        } else {
            DecodeError::Malformed("topic name is empty")
        });
    }
    let (dup, retain) = (first & 0b1000 != 0, first & 1 != 0);
    Ok(Publish { dup, qos, retain, topic, packet_id, properties, payload: body.rest })
}

fn other(version: Version, packet: &[u8], header_len: usize) -> Result<Packet<'_>, DecodeError> {
    let first = packet[0];
    let kind = first >> 4;
    if matches!(kind, 6 | 8 | 10) && first & 0b1000 != 0 && version != Version::V31 {
        return Err(DecodeError::Malformed("reserved flags of the fixed header"));
    }
    let body = &mut Reader::new(&packet[header_len..]);
    let decoded = match kind {
        1 => {
            let connect = connect::connect(body)?;
            check_shortest(connect.version, packet, header_len)?;
            Packet::Connect(Box::new(connect))
        }
        2 => Packet::Connack(Box::new(connect::connack(version, body)?)),
        4 => Packet::Puback(ack::ack(version, body, ack::PUBLISH_REASONS)?),
        5 => Packet::Pubrec(ack::ack(version, body, ack::PUBLISH_REASONS)?),
        6 => Packet::Pubrel(ack::ack(version, body, ack::RELEASE_REASONS)?),
        7 => Packet::Pubcomp(ack::ack(version, body, ack::RELEASE_REASONS)?),
        8 => Packet::Subscribe(subscribe::subscribe(version, body)?),
        9 => Packet::Suback(subscribe::suback(version, body)?),
        10 => Packet::Unsubscribe(subscribe::unsubscribe(version, body)?),
        11 => Packet::Unsuback(subscribe::unsuback(version, body)?),
        12 => Packet::Pingreq,
        13 => Packet::Pingresp,
        14 => Packet::Disconnect(ack::disconnect(version, body)?),
        15 if version == Version::V5 => Packet::Auth(ack::auth(version, body)?),
        _ => return Err(DecodeError::Malformed("packet type 15")),
    };
    body.end()?;
    Ok(decoded)
}

/// # Errors
/// A Protocol Error if this packet cannot carry that Reason Code.
fn reason(value: u8, allowed: &[u8]) -> Result<ReasonCode, DecodeError> {
    if allowed.contains(&value) {
        Ok(ReasonCode(value))
    } else {
        Err(DecodeError::Protocol("reason code does not belong into this packet"))
    }
}
