//! Packets by hand, for what the codec would never write.

use crate::Version;

/// First byte, Remaining Length, body.
pub fn packet(first: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![first];
    bytes.extend(varint(body.len()));
    bytes.extend_from_slice(body);
    bytes
}

/// Variable Byte Integer.
pub fn varint(mut value: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    loop {
        let low = (value & 0x7F) as u8;
        value >>= 7;
        bytes.push(if value == 0 { low } else { low | 0x80 });
        if value == 0 {
            return bytes;
        }
    }
}

/// Length and bytes, whatever they are.
pub fn text(text: impl AsRef<[u8]>) -> Vec<u8> {
    let text = text.as_ref();
    let mut bytes = u16::try_from(text.len()).expect("short text").to_be_bytes().to_vec();
    bytes.extend_from_slice(text);
    bytes
}

/// A block of properties with its length, in 5.0; nothing in 3.x.
pub fn properties(version: Version, block: &[u8]) -> Vec<u8> {
    if version == Version::V5 { [varint(block.len()), block.to_vec()].concat() } else { Vec::new() }
}

/// Name, level and flags of the version, Keep Alive 60, the properties and the payload.
pub fn connect(version: Version, flags: u8, block: &[u8], payload: &[Vec<u8>]) -> Vec<u8> {
    let (name, level) = match version {
        Version::V31 => ("MQIsdp", 3),
        Version::V311 => ("MQTT", 4),
        Version::V5 => ("MQTT", 5),
    };
    connect_as(name, level, flags, &properties(version, block), payload)
}

/// The same with any name and level; `properties` with their length.
pub fn connect_as(name: &str, level: u8, flags: u8, properties: &[u8], payload: &[Vec<u8>]) -> Vec<u8> {
    let head = [text(name), vec![level, flags, 0, 60], properties.to_vec()].concat();
    packet(0x10, &[head, payload.concat()].concat())
}

/// PUBLISH; `first` has the flags, `id` is left out if there is none.
pub fn publish(version: Version, first: u8, topic: &[u8], id: Option<u16>, block: &[u8], payload: &[u8]) -> Vec<u8> {
    let id = id.map_or(Vec::new(), |id| id.to_be_bytes().to_vec());
    packet(first, &[text(topic), id, properties(version, block), payload.to_vec()].concat())
}

/// SUBSCRIBE or UNSUBSCRIBE (0x82, 0xA2) with entries as they are.
pub fn filters(version: Version, first: u8, id: u16, block: &[u8], entries: &[u8]) -> Vec<u8> {
    packet(first, &[id.to_be_bytes().to_vec(), properties(version, block), entries.to_vec()].concat())
}
