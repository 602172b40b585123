//! Data representation: integers, strings, binary data and single properties. MQTT 5.0 §1.5, §2.2.2.2.

use std::num::{NonZeroU16, NonZeroU32};

use super::{DecodeError, PacketId, Version};

/// Largest value of a Variable Byte Integer. MQTT 5.0 §1.5.5.
pub(super) const VARINT_MAX: u32 = 268_435_455;

const ENDS_EARLY: DecodeError = DecodeError::Malformed("ends early");

/// Takes values off the front of a packet's body.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reader<'a> {
    pub(super) rest: &'a [u8],
}

impl<'a> Reader<'a> {
    #[inline]
    pub(super) fn new(rest: &'a [u8]) -> Self {
        Self { rest }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    #[inline]
    pub(super) fn take(&mut self, len: usize) -> Result<&'a [u8], DecodeError> {
        let (taken, rest) = self.rest.split_at_checked(len).ok_or(ENDS_EARLY)?;
        self.rest = rest;
        Ok(taken)
    }

    #[inline]
    fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let (taken, rest) = self.rest.split_first_chunk().ok_or(ENDS_EARLY)?;
        self.rest = rest;
        Ok(*taken)
    }

    #[inline]
    pub(super) fn u8(&mut self) -> Result<u8, DecodeError> {
        self.array().map(|[byte]| byte)
    }

    #[inline]
    pub(super) fn u16(&mut self) -> Result<u16, DecodeError> {
        self.array().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, DecodeError> {
        self.array().map(u32::from_be_bytes)
    }

    /// [MQTT-1.5.5-1]
    #[inline]
    pub(super) fn varint(&mut self) -> Result<u32, DecodeError> {
        let mut value = 0;
        for index in 0..4 {
            let byte = self.u8()?;
            value |= u32::from(byte & 0x7F) << (7 * index);
            if byte & 0x80 == 0 {
                return if byte == 0 && index > 0 {
                    Err(DecodeError::Malformed("variable byte integer longer than needed"))
                } else {
                    Ok(value)
                };
            }
        }
        Err(DecodeError::Malformed("variable byte integer of more than four bytes"))
    }

    #[inline]
    pub(super) fn binary(&mut self) -> Result<&'a [u8], DecodeError> {
        let len = self.u16()?;
        self.take(usize::from(len))
    }

    /// [MQTT-1.5.4-1] [MQTT-1.5.4-2]
    pub(super) fn text(&mut self) -> Result<&'a str, DecodeError> {
        let text = self.utf8()?;
        if text.as_bytes().contains(&0) {
            return Err(DecodeError::Malformed("string contains the null character"));
        }
        Ok(text)
    }

    /// A string whose caller looks for the null character.
    #[inline]
    pub(super) fn utf8(&mut self) -> Result<&'a str, DecodeError> {
        std::str::from_utf8(self.binary()?).map_err(|_| DecodeError::Malformed("string is not UTF-8"))
    }

    /// [MQTT-2.2.1-3]
    #[inline]
    pub(super) fn packet_id(&mut self) -> Result<PacketId, DecodeError> {
        NonZeroU16::new(self.u16()?).ok_or(DecodeError::Protocol("packet identifier is 0"))
    }

    pub(super) fn end(&self) -> Result<(), DecodeError> {
        if self.rest.is_empty() { Ok(()) } else { Err(DecodeError::Malformed("bytes after the end of the packet")) }
    }
}

/// Bytes a Variable Byte Integer takes: 1..=4.
#[inline]
pub(super) const fn varint_len(value: u32) -> usize {
    match value {
        0..128 => 1,
        128..16_384 => 2,
        16_384..2_097_152 => 3,
        _ => 4,
    }
}

#[inline]
pub(super) fn put_varint(mut value: u32, out: &mut Vec<u8>) {
    debug_assert!(value <= VARINT_MAX);
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Longer data is cut: a length has two bytes.
#[inline]
pub(super) fn put_binary(data: &[u8], out: &mut Vec<u8>) {
    let len = data.len().min(usize::from(u16::MAX));
    out.extend_from_slice(&(len as u16).to_be_bytes());
    out.extend_from_slice(&data[..len]);
}

/// Longer text is cut between two characters.
#[inline]
pub(super) fn put_text(text: &str, out: &mut Vec<u8>) {
    put_binary(cut(text).as_bytes(), out);
}

#[inline]
pub(super) fn cut(text: &str) -> &str {
    &text[..text.floor_char_boundary(usize::from(u16::MAX))]
}

/// Writes what `write` writes, with its length as a Variable Byte Integer in front.
pub(super) fn put_with_length(out: &mut Vec<u8>, write: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.push(0);
    write(out);
    let mut len = out.len() - start - 1;
    // Nearly always below 128. Otherwise what was written moves, up to three bytes.
    let mut bytes = [0; 4];
    let count = varint_len(len as u32);
    for byte in &mut bytes[..count] {
        *byte = (len & 0x7F) as u8 | 0x80;
        len >>= 7;
    }
    bytes[count - 1] &= 0x7F;
    out.splice(start..=start, bytes[..count].iter().copied());
}

macro_rules! properties {
    ($($id:literal $name:ident $kind:ident $type:ty)*) => {
        /// One property with its value. MQTT 5.0 §2.2.2.2.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(super) enum Property<'a> { $($name($type)),* }

        /// Property identifiers.
        #[allow(non_upper_case_globals, reason = "the names of the variants")]
        pub(super) mod id { $(pub(in crate::codec) const $name: u8 = $id;)* }

        impl<'a> Property<'a> {
            /// # Errors
            /// Malformed if unknown or cut short; otherwise what the standard says of a wrong value.
            pub(super) fn read(reader: &mut Reader<'a>) -> Result<(u8, Self), DecodeError> {
                let id = reader.u8()?;
                let property = match id {
                    $($id => Self::$name(read::$kind(reader)?),)*
                    _ => return Err(DecodeError::Malformed("unknown property")),
                };
                Ok((id, property))
            }

            pub(super) fn put(self, out: &mut Vec<u8>) {
                match self { $(Self::$name(value) => { out.push($id); write::$kind(value, out); })* }
            }
        }

        /// Passes over one property that [`Property::read`] has accepted before.
        pub(super) fn skip(reader: &mut Reader<'_>) -> Result<u8, DecodeError> {
            let id = reader.u8()?;
            match id {
                $($id => skip::$kind(reader)?,)*
                _ => return Err(DecodeError::Malformed("unknown property")),
            }
            Ok(id)
        }
    };
}

properties! {
    0x01 PayloadFormat flag bool
    0x02 MessageExpiry u32 u32
    0x03 ContentType text &'a str
    0x08 ResponseTopic topic &'a str
    0x09 CorrelationData binary &'a [u8]
    0x0B SubscriptionId subscription_id NonZeroU32
    0x11 SessionExpiry u32 u32
    0x12 AssignedClientId text &'a str
    0x13 ServerKeepAlive u16 u16
    0x15 AuthenticationMethod text &'a str
    0x16 AuthenticationData binary &'a [u8]
    0x17 RequestProblemInformation flag bool
    0x18 WillDelay u32 u32
    0x19 RequestResponseInformation flag bool
    0x1A ResponseInformation text &'a str
    0x1C ServerReference text &'a str
    0x1F ReasonString text &'a str
    0x21 ReceiveMaximum nonzero16 NonZeroU16
    0x22 TopicAliasMaximum u16 u16
    0x23 TopicAlias topic_alias NonZeroU16
    0x24 MaximumQos flag bool
    0x25 RetainAvailable flag bool
    0x26 User pair (&'a str, &'a str)
    0x27 MaximumPacketSize nonzero32 NonZeroU32
    0x28 WildcardSubscriptionAvailable flag bool
    0x29 SubscriptionIdsAvailable flag bool
    0x2A SharedSubscriptionAvailable flag bool
}

/// How each kind of value is read, and which values the standard refuses.
mod read {
    use super::{DecodeError, NonZeroU16, NonZeroU32, Reader};

    type Read<T> = Result<T, DecodeError>;

    pub(super) fn flag(reader: &mut Reader<'_>) -> Read<bool> {
        match reader.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(DecodeError::Protocol("property is neither 0 nor 1")),
        }
    }
    pub(super) fn u16(reader: &mut Reader<'_>) -> Read<u16> {
        reader.u16()
    }
    pub(super) fn u32(reader: &mut Reader<'_>) -> Read<u32> {
        reader.u32()
    }
    pub(super) fn nonzero16(reader: &mut Reader<'_>) -> Read<NonZeroU16> {
        NonZeroU16::new(reader.u16()?).ok_or(DecodeError::Protocol("receive maximum is 0"))
    }
    pub(super) fn nonzero32(reader: &mut Reader<'_>) -> Read<NonZeroU32> {
        NonZeroU32::new(reader.u32()?).ok_or(DecodeError::Protocol("maximum packet size is 0"))
    }
    pub(super) fn topic_alias(reader: &mut Reader<'_>) -> Read<NonZeroU16> {
        NonZeroU16::new(reader.u16()?).ok_or(DecodeError::TopicAliasInvalid)
    }
    pub(super) fn subscription_id(reader: &mut Reader<'_>) -> Read<NonZeroU32> {
        NonZeroU32::new(reader.varint()?).ok_or(DecodeError::Protocol("subscription identifier is 0"))
    }
    pub(super) fn text<'a>(reader: &mut Reader<'a>) -> Read<&'a str> {
        reader.text()
    }
    /// [MQTT-3.3.2-14]
    pub(super) fn topic<'a>(reader: &mut Reader<'a>) -> Read<&'a str> {
        let topic = reader.text()?;
        if crate::topic::is_valid_topic_name(topic) {
            Ok(topic)
        } else {
            Err(DecodeError::Protocol("response topic is not a topic name"))
        }
    }
    pub(super) fn binary<'a>(reader: &mut Reader<'a>) -> Read<&'a [u8]> {
        reader.binary()
    }
    pub(super) fn pair<'a>(reader: &mut Reader<'a>) -> Read<(&'a str, &'a str)> {
        Ok((reader.text()?, reader.text()?))
    }
}

mod write {
    use super::{NonZeroU16, NonZeroU32, VARINT_MAX, put_binary, put_text, put_varint};

    pub(super) fn flag(value: bool, out: &mut Vec<u8>) {
        out.push(u8::from(value));
    }
    pub(super) fn u16(value: u16, out: &mut Vec<u8>) {
        out.extend_from_slice(&value.to_be_bytes());
    }
    pub(super) fn u32(value: u32, out: &mut Vec<u8>) {
        out.extend_from_slice(&value.to_be_bytes());
    }
    pub(super) fn nonzero16(value: NonZeroU16, out: &mut Vec<u8>) {
        u16(value.get(), out);
    }
    pub(super) fn nonzero32(value: NonZeroU32, out: &mut Vec<u8>) {
        u32(value.get(), out);
    }
    pub(super) fn topic_alias(value: NonZeroU16, out: &mut Vec<u8>) {
        u16(value.get(), out);
    }
    pub(super) fn subscription_id(value: NonZeroU32, out: &mut Vec<u8>) {
        put_varint(value.get().min(VARINT_MAX), out);
    }
    pub(super) fn text(value: &str, out: &mut Vec<u8>) {
        put_text(value, out);
    }
    pub(super) fn topic(value: &str, out: &mut Vec<u8>) {
        put_text(value, out);
    }
    pub(super) fn binary(value: &[u8], out: &mut Vec<u8>) {
        put_binary(value, out);
    }
    pub(super) fn pair((name, value): (&str, &str), out: &mut Vec<u8>) {
        put_text(name, out);
        put_text(value, out);
    }
}

mod skip {
    use super::{DecodeError, Reader};

    type Skip = Result<(), DecodeError>;

    pub(super) fn flag(reader: &mut Reader<'_>) -> Skip {
        reader.take(1).map(drop)
    }
    pub(super) fn u16(reader: &mut Reader<'_>) -> Skip {
        reader.take(2).map(drop)
    }
    pub(super) fn u32(reader: &mut Reader<'_>) -> Skip {
        reader.take(4).map(drop)
    }
    pub(super) use self::{binary as text, binary as topic, u16 as nonzero16, u16 as topic_alias, u32 as nonzero32};
    pub(super) fn subscription_id(reader: &mut Reader<'_>) -> Skip {
        reader.varint().map(drop)
    }
    pub(super) fn binary(reader: &mut Reader<'_>) -> Skip {
        reader.binary().map(drop)
    }
    pub(super) fn pair(reader: &mut Reader<'_>) -> Skip {
        binary(reader)?;
        binary(reader)
    }
}

/// A set of property identifiers; all are below 64.
pub(super) const fn set(ids: &[u8]) -> u64 {
    let mut bits = 0;
    let mut index = 0;
    while index < ids.len() {
        bits |= 1 << ids[index];
        index += 1;
    }
    bits
}

/// The properties of one packet, checked while they are read.
#[derive(Debug)]
pub(super) struct Properties<'a> {
    pub(super) raw: &'a [u8],
    reader: Reader<'a>,
    allowed: u64,
    seen: u64,
}

impl<'a> Properties<'a> {
    /// Takes the whole block off `reader`; an empty one for 3.x. `allowed` is a [`set`].
    #[inline]
    pub(super) fn open(version: Version, reader: &mut Reader<'a>, allowed: u64) -> Result<Self, DecodeError> {
        let raw = if version == Version::V5 {
            let len = reader.varint()?;
            reader.take(len as usize)?
        } else {
            &[]
        };
        Ok(Self { raw, reader: Reader::new(raw), allowed, seen: 0 })
    }

    /// A block without its length.
    pub(super) fn of_block(raw: &'a [u8], allowed: u64) -> Self {
        Self { raw, reader: Reader::new(raw), allowed, seen: 0 }
    }

    /// # Errors
    /// Malformed if it does not belong into this packet, a Protocol Error if it is there twice. MQTT 5.0 §2.2.2.2.
    #[inline]
    pub(super) fn next(&mut self) -> Result<Option<Property<'a>>, DecodeError> {
        if self.reader.is_empty() {
            return Ok(None);
        }
        self.read().map(Some)
    }

    fn read(&mut self) -> Result<Property<'a>, DecodeError> {
        // The Server sends one Subscription Identifier per matching subscription, in PUBLISH alone.
        const REPEATABLE: u64 = set(&[id::User]);
        const REPEATABLE_IN_PUBLISH: u64 = set(&[id::User, id::SubscriptionId]);
        let (id, property) = Property::read(&mut self.reader)?;
        let bit = 1 << id;
        if self.allowed & bit == 0 {
            return Err(DecodeError::Malformed("property does not belong into this packet"));
        }
        let is_publish = self.allowed & set(&[id::TopicAlias]) != 0;
        let repeatable = if is_publish { REPEATABLE_IN_PUBLISH } else { REPEATABLE };
        if self.seen & bit & !repeatable != 0 {
            return Err(DecodeError::Protocol("property is there twice"));
        }
        self.seen |= bit;
        Ok(property)
    }

    /// One of the properties in `ids` (a [`set`]) was read.
    pub(super) fn has(&self, ids: u64) -> bool {
        self.seen & ids != 0
    }
}
