//! Properties that are kept as they arrived: those of PUBLISH and of the Will, and User Properties.

use std::borrow::Cow;
use std::num::{NonZeroU16, NonZeroU32};

use super::wire::{Properties, Property, Reader, id, put_text, set, skip};
use super::{DecodeError, Version};

/// What goes to subscribers unaltered. MQTT 5.0 §3.3.2.3 [MQTT-3.3.2-4] [MQTT-3.3.2-15] [MQTT-3.3.2-17] [MQTT-3.3.2-20].
const FORWARDED: &[u8] = &[id::PayloadFormat, id::ContentType, id::ResponseTopic, id::CorrelationData, id::User];
const FORWARDABLE: u64 = set(FORWARDED);
const PUBLISH: u64 = FORWARDABLE | set(&[id::MessageExpiry, id::TopicAlias, id::SubscriptionId]);
const WILL: u64 = FORWARDABLE | set(&[id::MessageExpiry, id::WillDelay]);

/// The properties of a PUBLISH or of a Will Message, borrowed from its packet.
///
/// Two are equal if they say the same; where Topic Alias and Message Expiry Interval stand does not matter.
/// MQTT 5.0 §3.3.2.3, §3.1.3.2.
#[derive(Debug, Clone, Copy, Default)]
pub struct PublishProperties<'a> {
    /// Stands for the Topic Name on this Network Connection, in this direction.
    pub topic_alias: Option<NonZeroU16>,
    /// Seconds.
    pub message_expiry: Option<u32>,
    /// Checked once, by [`Self::read`]; holds the two above as well if they arrived in a packet.
    raw: &'a [u8],
    /// `raw` holds something that is not forwarded.
    is_mixed: bool,
    has_subscription_ids: bool,
}

impl<'a> PublishProperties<'a> {
    /// From a block that [`Self::forwardable`] or [`PublishPropertiesBuilder`] made.
    pub fn from_forwardable(block: &'a [u8], message_expiry: Option<u32>) -> Self {
        Self { message_expiry, raw: block, ..Self::default() }
    }

    /// Looks whether `block` is what [`Self::from_forwardable`] takes.
    ///
    /// # Errors
    /// What is wrong with it, as if it had come in a packet; also if it has a property that is not forwarded.
    pub fn check_forwardable(block: &[u8]) -> Result<(), DecodeError> {
        let mut properties = Properties::of_block(block, FORWARDABLE);
        while properties.next()?.is_some() {}
        Ok(())
    }

    /// The encoded properties that subscribers receive unaltered and in this order: Payload Format Indicator,
    /// Content Type, Response Topic, Correlation Data and User Properties.
    ///
    /// Copies only if a property that is not forwarded stands between two that are.
    pub fn forwardable(&self) -> Cow<'a, [u8]> {
        if self.is_mixed { forwardable(self.raw) } else { Cow::Borrowed(self.raw) }
    }

    /// `Some(true)`: the payload claims to be UTF-8. Not checked here.
    pub fn payload_format(&self) -> Option<bool> {
        self.find(|property| if let Property::PayloadFormat(value) = property { Some(value) } else { None })
    }

    /// Content Type.
    pub fn content_type(&self) -> Option<&'a str> {
        self.find(|property| if let Property::ContentType(value) = property { Some(value) } else { None })
    }

    /// A valid Topic Name. [MQTT-3.3.2-14]
    pub fn response_topic(&self) -> Option<&'a str> {
        self.find(|property| if let Property::ResponseTopic(value) = property { Some(value) } else { None })
    }

    /// Correlation Data.
    pub fn correlation_data(&self) -> Option<&'a [u8]> {
        self.find(|property| if let Property::CorrelationData(value) = property { Some(value) } else { None })
    }

    /// User Properties, in order.
    pub fn user_properties(&self) -> UserProperties<'a> {
        UserProperties::from_raw(self.raw)
    }

    /// Subscription Identifiers. A client must not send any. [MQTT-3.3.4-6]
    pub fn subscription_ids(&self) -> impl Iterator<Item = NonZeroU32> + use<'a> {
        let raw = if self.has_subscription_ids { self.raw } else { &[] };
        iterate(raw).filter_map(|property| if let Property::SubscriptionId(id) = property { Some(id) } else { None })
    }

    /// Whether [`Self::subscription_ids`] has any; costs nothing.
    pub fn has_subscription_ids(&self) -> bool {
        self.has_subscription_ids
    }

    fn find<T>(&self, pick: impl FnMut(Property<'a>) -> Option<T>) -> Option<T> {
        iterate(self.raw).find_map(pick)
    }

    #[inline]
    pub(super) fn read(version: Version, reader: &mut Reader<'a>) -> Result<Self, DecodeError> {
        let properties = Properties::open(version, reader, PUBLISH)?;
        if properties.raw.is_empty() {
            return Ok(Self::default());
        }
        Self::collect(properties).map(|(properties, _)| properties)
    }

    /// The properties of a Will, and its Will Delay Interval.
    pub(super) fn read_will(version: Version, reader: &mut Reader<'a>) -> Result<(Self, Option<u32>), DecodeError> {
        Self::collect(Properties::open(version, reader, WILL)?)
    }

    fn collect(mut properties: Properties<'a>) -> Result<(Self, Option<u32>), DecodeError> {
        let mut all = Self { raw: properties.raw, ..Self::default() };
        let mut delay = None;
        while let Some(property) = properties.next()? {
            match property {
                Property::TopicAlias(value) => all.topic_alias = Some(value),
                Property::MessageExpiry(value) => all.message_expiry = Some(value),
                Property::WillDelay(value) => delay = Some(value),
                _ => {}
            }
        }
        all.is_mixed = properties.has(!FORWARDABLE);
        all.has_subscription_ids = properties.has(set(&[id::SubscriptionId]));
        Ok((all, delay))
    }
}

impl PartialEq for PublishProperties<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.topic_alias == other.topic_alias
            && self.message_expiry == other.message_expiry
            && self.forwardable() == other.forwardable()
            && self.subscription_ids().eq(other.subscription_ids())
    }
}

fn forwardable(raw: &[u8]) -> Cow<'_, [u8]> {
    let mut kept = Cow::Borrowed(&raw[..0]);
    let mut run = 0..0; // of neighbours that are all forwarded
    let mut reader = Reader::new(raw);
    // `raw` was checked when it was read, so that skipping does not fail before its end.
    while let Ok(id) = skip(&mut reader) {
        let end = raw.len() - reader.rest.len();
        if FORWARDABLE & (1 << id) == 0 {
            append(&mut kept, &raw[run]);
            run = end..end;
        } else {
            run.end = end;
        }
    }
    append(&mut kept, &raw[run]);
    kept
}

fn append<'a>(kept: &mut Cow<'a, [u8]>, run: &'a [u8]) {
    if kept.is_empty() {
        *kept = Cow::Borrowed(run);
    } else if !run.is_empty() {
        kept.to_mut().extend_from_slice(run);
    }
}

fn iterate(raw: &[u8]) -> impl Iterator<Item = Property<'_>> {
    let mut reader = Reader::new(raw);
    std::iter::from_fn(move || Property::read(&mut reader).ok().map(|(_, property)| property))
}

/// Encodes a block of properties for [`PublishProperties::from_forwardable`], in the order of the calls.
///
/// All but [`Self::user`] may be called once. Text longer than 65 535 bytes is cut.
#[derive(Debug, Clone, Default)]
pub struct PublishPropertiesBuilder {
    block: Vec<u8>,
}

impl PublishPropertiesBuilder {
    /// `true`: the payload is UTF-8.
    #[must_use]
    pub fn payload_format(self, is_utf8: bool) -> Self {
        self.put(Property::PayloadFormat(is_utf8))
    }

    /// Content Type.
    #[must_use]
    pub fn content_type(self, content_type: &str) -> Self {
        self.put(Property::ContentType(content_type))
    }

    /// A valid Topic Name.
    #[must_use]
    pub fn response_topic(self, topic: &str) -> Self {
        debug_assert!(crate::topic::is_valid_topic_name(topic));
        self.put(Property::ResponseTopic(topic))
    }

    /// Correlation Data.
    #[must_use]
    pub fn correlation_data(self, data: &[u8]) -> Self {
        self.put(Property::CorrelationData(data))
    }

    /// One User Property; call it for each.
    #[must_use]
    pub fn user(self, name: &str, value: &str) -> Self {
        self.put(Property::User((name, value)))
    }

    /// The encoded block, without its length.
    pub fn build(self) -> Vec<u8> {
        self.block
    }

    fn put(mut self, property: Property<'_>) -> Self {
        property.put(&mut self.block);
        self
    }
}

/// Name-value pairs, in order; a name may appear more than once. MQTT 5.0 §1.5.7.
#[derive(Clone, Copy, Default)]
pub struct UserProperties<'a>(Source<'a>);

#[derive(Clone, Copy)]
enum Source<'a> {
    /// All properties of a packet, checked; the others are passed over.
    Raw(&'a [u8]),
    Pairs(&'a [(&'a str, &'a str)]),
}

impl Default for Source<'_> {
    fn default() -> Self {
        Self::Pairs(&[])
    }
}

impl<'a> UserProperties<'a> {
    pub(super) fn from_raw(raw: &'a [u8]) -> Self {
        Self(Source::Raw(raw))
    }

    /// All pairs, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&'a str, &'a str)> + use<'a> {
        let (raw, pairs): (&'a [u8], &'a [_]) = match self.0 {
            Source::Raw(raw) => (raw, &[]),
            Source::Pairs(pairs) => (&[], pairs),
        };
        let of_raw =
            iterate(raw).filter_map(|property| if let Property::User(pair) = property { Some(pair) } else { None });
        of_raw.chain(pairs.iter().copied())
    }

    /// There are none.
    pub fn is_empty(&self) -> bool {
        self.iter().next().is_none()
    }

    pub(super) fn put(&self, out: &mut Vec<u8>) {
        for (name, value) in self.iter() {
            out.push(id::User);
            put_text(name, out);
            put_text(value, out);
        }
    }
}

impl<'a> From<&'a [(&'a str, &'a str)]> for UserProperties<'a> {
    fn from(pairs: &'a [(&'a str, &'a str)]) -> Self {
        Self(Source::Pairs(pairs))
    }
}

impl PartialEq for UserProperties<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.iter().eq(other.iter())
    }
}

impl std::fmt::Debug for UserProperties<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}
