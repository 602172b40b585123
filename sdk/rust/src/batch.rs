//! Messages in columns, and what a storage hook makes of them.

use crate::Pair;
use crate::bindings::storage_hook::exports::wasmqtt::plugin::storage_hook as wit;

/// Messages that a storage hook is shown.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch(wit::Batch);

/// One message of a [`Batch`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message<'a> {
    /// Its place in the batch.
    pub place: u32,
    /// Topic Name.
    pub topic: &'a str,
    /// Client Identifier of the publisher; empty for the broker and for plugins.
    pub client_id: &'a str,
    /// Empty unless registered for.
    pub payload: &'a [u8],
    /// Encoded as in MQTT 5.0 §2.2.2.2; see [`user_properties`]. Empty unless registered for.
    pub properties: &'a [u8],
    /// QoS it was published with.
    pub qos: u8,
    /// RETAIN flag.
    pub retain: bool,
}

fn slice<'a, T: ?Sized + std::ops::Index<std::ops::Range<usize>, Output = T>>(
    column: &'a T,
    ends: &[u32],
    place: usize,
) -> Option<&'a T> {
    let end = *ends.get(place)? as usize;
    let start = place.checked_sub(1).map_or(0, |before| ends[before] as usize);
    Some(&column[start..end])
}

impl Default for Batch {
    fn default() -> Self {
        Self(wit::Batch {
            topics: String::new(),
            topic_ends: Vec::new(),
            clients: String::new(),
            client_ends: Vec::new(),
            payloads: Vec::new(),
            payload_ends: Vec::new(),
            properties: Vec::new(),
            property_ends: Vec::new(),
            bits: Vec::new(),
        })
    }
}

impl Batch {
    pub(crate) fn new(columns: wit::Batch) -> Self {
        Self(columns)
    }

    /// How many messages.
    pub fn len(&self) -> usize {
        self.0.bits.len()
    }

    /// None.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The messages in their order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Message<'_>> {
        (0..self.len()).map(|place| {
            let bits = self.0.bits[place];
            Message {
                place: place as u32,
                topic: slice(self.0.topics.as_str(), &self.0.topic_ends, place).unwrap_or_default(),
                client_id: slice(self.0.clients.as_str(), &self.0.client_ends, place).unwrap_or_default(),
                payload: slice(self.0.payloads.as_slice(), &self.0.payload_ends, place).unwrap_or_default(),
                properties: slice(self.0.properties.as_slice(), &self.0.property_ends, place).unwrap_or_default(),
                qos: bits & 3,
                retain: bits & 4 != 0,
            }
        })
    }

    /// Appends a message; for tests.
    pub fn push(&mut self, topic: &str, client_id: &str, payload: &[u8], properties: &[u8], qos: u8, retain: bool) {
        let columns = &mut self.0;
        columns.topics.push_str(topic);
        columns.topic_ends.push(columns.topics.len() as u32);
        columns.clients.push_str(client_id);
        columns.client_ends.push(columns.clients.len() as u32);
        columns.payloads.extend_from_slice(payload);
        columns.payload_ends.push(columns.payloads.len() as u32);
        columns.properties.extend_from_slice(properties);
        columns.property_ends.push(columns.properties.len() as u32);
        columns.bits.push(qos | if retain { 4 } else { 0 });
    }
}

/// What a storage hook changes; messages that are not named go on as they are.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Changes(Vec<(u32, wit::Change)>);

impl Changes {
    /// Nothing.
    pub fn none() -> Self {
        Self::default()
    }

    /// The message goes nowhere; its publisher is told the reason.
    pub fn discard(&mut self, message: &Message<'_>, reason: u8) {
        self.set(message.place, wit::Change::Discard(reason));
    }

    /// Another payload.
    pub fn replace_payload(&mut self, message: &Message<'_>, payload: Vec<u8>) {
        self.replace(message, Some(payload), None);
    }

    /// Another payload, other properties, or both.
    pub fn replace(&mut self, message: &Message<'_>, payload: Option<Vec<u8>>, properties: Option<Vec<u8>>) {
        self.set(message.place, wit::Change::Replace(wit::Replacement { payload, properties }));
    }

    /// The payload that takes the place of a message's, if any; for tests.
    pub fn payload_of(&self, place: u32) -> Option<&[u8]> {
        self.0.iter().find(|(other, _)| *other == place).and_then(|(_, change)| match change {
            wit::Change::Replace(replacement) => replacement.payload.as_deref(),
            wit::Change::Discard(_) => None,
        })
    }

    /// Why a message is discarded, if it is; for tests.
    pub fn discarded(&self, place: u32) -> Option<u8> {
        self.0.iter().find(|(other, _)| *other == place).and_then(|(_, change)| match change {
            wit::Change::Discard(reason) => Some(*reason),
            wit::Change::Replace(_) => None,
        })
    }

    fn set(&mut self, place: u32, change: wit::Change) {
        match self.0.binary_search_by_key(&place, |(other, _)| *other) {
            Ok(known) => self.0[known].1 = change,
            Err(at) => self.0.insert(at, (place, change)),
        }
    }

    pub(crate) fn into_wit(self) -> Vec<(u32, wit::Change)> {
        self.0
    }
}

/// Identifier of User Property. MQTT 5.0 §2.2.2.2.
const USER_PROPERTY: u8 = 0x26;

/// The User Properties among encoded properties, in order. Stops at anything that is not valid.
pub fn user_properties(mut properties: &[u8]) -> Vec<Pair> {
    let mut found = Vec::new();
    while let Some((identifier, rest)) = properties.split_first() {
        let after = match identifier {
            // Payload Format Indicator
            0x01 => rest.get(1..),
            // Message Expiry Interval
            0x02 => rest.get(4..),
            // Content Type, Response Topic, Correlation Data
            0x03 | 0x08 | 0x09 => text(rest).map(|(_, after)| after),
            &USER_PROPERTY => pair(rest).map(|(pair, after)| {
                found.push(pair);
                after
            }),
            _ => None,
        };
        let Some(after) = after else { break };
        properties = after;
    }
    found
}

/// Appends a User Property to encoded properties. Name and value are cut at 65,535 bytes.
pub fn add_user_property(properties: &mut Vec<u8>, name: &str, value: &str) {
    properties.push(USER_PROPERTY);
    for text in [name, value] {
        let text = &text[..text.floor_char_boundary(usize::from(u16::MAX))];
        properties.extend_from_slice(&(text.len() as u16).to_be_bytes());
        properties.extend_from_slice(text.as_bytes());
    }
}

fn text(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = bytes.split_first_chunk::<2>()?;
    rest.split_at_checked(usize::from(u16::from_be_bytes(*length)))
}

fn pair(bytes: &[u8]) -> Option<(Pair, &[u8])> {
    let (name, rest) = text(bytes)?;
    let (value, rest) = text(rest)?;
    let owned = |text: &[u8]| String::from_utf8_lossy(text).into_owned();
    Some((Pair { name: owned(name), value: owned(value) }, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_come_back_as_messages() {
        let mut batch = Batch::default();
        batch.push("a/ü", "c", b"xyz", &[], 2, true);
        batch.push("b", "", b"", &[1, 0], 0, false);
        let messages: Vec<_> = batch.iter().collect();
        assert_eq!(messages.len(), 2);
        assert_eq!((messages[0].topic, messages[0].client_id, messages[0].payload), ("a/ü", "c", &b"xyz"[..]));
        assert_eq!((messages[0].qos, messages[0].retain), (2, true));
        assert_eq!((messages[1].topic, messages[1].client_id, messages[1].properties), ("b", "", &[1, 0][..]));
    }

    #[test]
    fn without_payload_columns_payloads_are_empty() {
        let mut batch = Batch::default();
        batch.push("a", "c", b"x", &[], 0, false);
        batch.0.payloads.clear();
        batch.0.payload_ends.clear();
        assert_eq!(batch.iter().next().unwrap().payload, b"");
    }

    #[test]
    fn changes_are_in_order_and_the_last_counts() {
        let batch = crate::testing::batch(&[("a", "", b"1"), ("b", "", b"2")]);
        let messages: Vec<_> = batch.iter().collect();
        let mut changes = Changes::none();
        changes.discard(&messages[1], 0x97);
        changes.replace_payload(&messages[0], b"3".to_vec());
        changes.discard(&messages[0], 0x87);
        assert_eq!(changes.discarded(0), Some(0x87));
        let places: Vec<_> = changes.into_wit().into_iter().map(|(place, _)| place).collect();
        assert_eq!(places, [0, 1]);
    }

    #[test]
    fn user_properties_are_found_among_others() {
        let mut properties = vec![0x01, 1, 0x03, 0, 1, b't'];
        add_user_property(&mut properties, "n", "v");
        add_user_property(&mut properties, "n", "w");
        let values: Vec<_> = user_properties(&properties).into_iter().map(|pair| pair.value).collect();
        assert_eq!(values, ["v", "w"]);
        assert!(user_properties(&[0x26, 0, 9, b'x']).is_empty(), "cut off");
    }
}
