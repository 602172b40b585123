//! How rows look: big-endian numbers, texts and blobs behind their lengths, so that keys sort and never run together.

use std::net::IpAddr;
use std::num::{NonZeroU32, NonZeroU64};
use std::sync::Arc;

use bytes::Bytes;
use smallvec::SmallVec;
use wasmqtt_protocol::codec::{Qos, RetainHandling, SubscribeOptions};
use wasmqtt_protocol::ports::{BanPattern, Client, ClockRow, Receiver};
use wasmqtt_protocol::router::{Message, MessageId, MessageRef, Position, SessionId, Subscription};
use wasmqtt_protocol::session::{Replay, WillMessage};
use wasmqtt_protocol::topic::Filter;

/// Column families. A new one, or another form of a row, needs a new [`super::SCHEMA`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub(super) enum Family {
    /// `schema` → u32.
    Meta,
    /// Session → client, expiry, when it was left, will.
    Session,
    /// Session, Topic Filter → options, Subscription Identifier.
    Subscription,
    /// Session, Topic Filter → how far retained messages have come on their way to the subscription.
    Replay,
    /// Message → properties, receivers, payload.
    Message,
    /// Message, Session: this one of several receivers does not need it any more.
    Done,
    /// Session, Packet Identifier → handshake towards the client.
    Inflight,
    /// Session, Packet Identifier: a QoS 2 message of the client that waits for PUBREL.
    Received,
    /// Topic Name → message.
    Retained,
    /// Pattern → until when, note.
    Ban,
    /// Plugin, bucket, key → value.
    KeyValue,
    /// Message → properties, publisher, plugins that collect it, payload.
    Feed,
}

impl Family {
    pub(super) const ALL: [Self; 12] = [
        Self::Meta,
        Self::Session,
        Self::Subscription,
        Self::Replay,
        Self::Message,
        Self::Done,
        Self::Inflight,
        Self::Received,
        Self::Retained,
        Self::Ban,
        Self::KeyValue,
        Self::Feed,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Meta => "meta",
            Self::Session => "session",
            Self::Subscription => "subscription",
            Self::Replay => "replay",
            Self::Message => "message",
            Self::Done => "done",
            Self::Inflight => "inflight",
            Self::Received => "received",
            Self::Retained => "retained",
            Self::Ban => "ban",
            Self::KeyValue => "kv",
            Self::Feed => "feed",
        }
    }
}

/// Columns are looked up by these numbers.
const _: () = {
    let mut place = 0;
    while place < Family::ALL.len() {
        assert!(Family::ALL[place] as usize == place);
        place += 1;
    }
};

/// Appends to a row.
pub(super) trait Put {
    fn put_u8(&mut self, value: u8);
    fn put_u16(&mut self, value: u16);
    fn put_u32(&mut self, value: u32);
    fn put_u64(&mut self, value: u64);
    fn put_blob(&mut self, value: &[u8]);
}

impl Put for Vec<u8> {
    fn put_u8(&mut self, value: u8) {
        self.push(value);
    }
    fn put_u16(&mut self, value: u16) {
        self.extend_from_slice(&value.to_be_bytes());
    }
    fn put_u32(&mut self, value: u32) {
        self.extend_from_slice(&value.to_be_bytes());
    }
    fn put_u64(&mut self, value: u64) {
        self.extend_from_slice(&value.to_be_bytes());
    }
    fn put_blob(&mut self, value: &[u8]) {
        self.put_u32(value.len() as u32);
        self.extend_from_slice(value);
    }
}

/// Reads a row; `None`: it is damaged.
pub(super) struct Take<'a>(pub(super) &'a [u8]);

impl<'a> Take<'a> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*head)
    }

    pub(super) fn u8(&mut self) -> Option<u8> {
        self.array().map(u8::from_be_bytes)
    }

    pub(super) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    pub(super) fn id(&mut self) -> Option<NonZeroU64> {
        self.u64().and_then(NonZeroU64::new)
    }

    pub(super) fn blob(&mut self) -> Option<&'a [u8]> {
        let length = self.u32()? as usize;
        let (blob, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(blob)
    }

    pub(super) fn text(&mut self) -> Option<&'a str> {
        std::str::from_utf8(self.blob()?).ok()
    }
}

const RETAIN: u8 = 0b0100;
const SEALED: u8 = 0b1000;
const EXPIRES: u8 = 0b1_0000;
/// A retained message says when it was retained, behind what all forms begin with.
const STAMPED: u8 = 0b10_0000;
/// Behind the expiry stands when the row was written.
const WRITTEN: u8 = 0b100_0000;

/// What all forms of a message begin with.
fn put_head(to: &mut Vec<u8>, message: MessageRef<'_>, sealed: bool, written_ms: Option<u64>) {
    let retain = if message.retain { RETAIN } else { 0 };
    let is_sealed = if sealed { SEALED } else { 0 };
    let expires = if message.expires_at_ms.is_some() { EXPIRES } else { 0 };
    let written_ms = written_ms.filter(|_| message.expires_at_ms.is_some());
    let written = if written_ms.is_some() { WRITTEN } else { 0 };
    to.put_u8(message.qos as u8 | retain | is_sealed | expires | written);
    for at_ms in message.expires_at_ms.into_iter().chain(written_ms) {
        to.put_u64(at_ms);
    }
}

struct Head {
    qos: Qos,
    retain: bool,
    sealed: bool,
    expires_at_ms: Option<u64>,
    /// 0: not known, long ago.
    written_ms: u64,
}

fn take_head(row: &mut Take<'_>) -> Option<Head> {
    let bits = row.u8()?;
    let expires_at_ms = if bits & EXPIRES != 0 { Some(row.u64()?) } else { None };
    let written_ms = if bits & WRITTEN != 0 { row.u64()? } else { 0 };
    let qos = Qos::from_bits(bits & 0b11)?;
    Some(Head { qos, retain: bits & RETAIN != 0, sealed: bits & SEALED != 0, expires_at_ms, written_ms })
}

fn message(head: &Head, topic: &str, properties: &[u8], payload: &[u8]) -> Message {
    Message {
        topic: topic.into(),
        payload: Bytes::copy_from_slice(payload),
        properties: Bytes::copy_from_slice(properties),
        qos: head.qos,
        retain: head.retain,
        expires_at_ms: head.expires_at_ms,
        publisher: None,
    }
}

/// Row of [`Family::Message`].
pub(super) fn put_message(to: &mut Vec<u8>, message: MessageRef<'_>, sealed: bool, receivers: &[Receiver<'_>]) {
    put_head(to, message, sealed, None);
    to.put_blob(message.topic.as_bytes());
    to.put_blob(message.properties);
    to.put_u32(receivers.len() as u32);
    for Receiver { session, wish } in receivers {
        to.put_u64(session.get());
        to.put_u8(wish.qos as u8 | if wish.retain { RETAIN } else { 0 });
        let ids = &wish.ids[..wish.ids.len().min(usize::from(u16::MAX))];
        to.put_u16(ids.len() as u16);
        for id in ids {
            to.put_u32(id.get());
        }
    }
    to.extend_from_slice(message.payload);
}

/// One receiver in a row of [`Family::Message`].
pub(super) struct To {
    pub(super) session: SessionId,
    pub(super) qos: Qos,
    pub(super) retain: bool,
    pub(super) ids: SmallVec<[NonZeroU32; 1]>,
}

fn take_receiver(row: &mut Take<'_>) -> Option<To> {
    let session = row.id()?;
    let bits = row.u8()?;
    let count = row.u16()?;
    let ids = (0..count).map(|_| row.u32().and_then(NonZeroU32::new)).collect::<Option<_>>()?;
    Some(To { session, qos: Qos::from_bits(bits & 0b11)?, retain: bits & RETAIN != 0, ids })
}

/// A row of [`Family::Message`] that is being read.
pub(super) struct MessageRow<'a> {
    head: Head,
    topic: &'a str,
    properties: &'a [u8],
    pub(super) receivers: usize,
    rest: &'a [u8],
}

impl<'a> MessageRow<'a> {
    pub(super) fn parse(row: &'a [u8]) -> Option<Self> {
        let mut row = Take(row);
        let head = take_head(&mut row)?;
        let (topic, properties) = (row.text()?, row.blob()?);
        let receivers = row.u32()? as usize;
        Some(Self { head, topic, properties, receivers, rest: row.0 })
    }

    pub(super) fn sealed(&self) -> bool {
        self.head.sealed
    }

    pub(super) fn expires_at_ms(&self) -> Option<u64> {
        self.head.expires_at_ms
    }

    /// Receivers, and where the payload begins; nothing is copied but the receivers.
    pub(super) fn receivers(&self) -> Option<Receivers<'a>> {
        let mut row = Take(self.rest);
        // Each takes eleven bytes at least; a damaged number must not reserve memory.
        let mut to = Vec::with_capacity(self.receivers.min(row.0.len() / 11 + 1));
        for _ in 0..self.receivers {
            to.push(take_receiver(&mut row)?);
        }
        let payload = row.0;
        let bytes = wasmqtt_protocol::session::queued_bytes(self.topic.len(), self.properties.len(), payload.len());
        Some(Receivers { to, bytes, payload })
    }

    pub(super) fn topic(&self) -> &'a str {
        self.topic
    }

    /// Copies everything.
    pub(super) fn message(&self, payload: &[u8]) -> Message {
        message(&self.head, self.topic, self.properties, payload)
    }
}

/// See [`MessageRow::receivers`].
pub(super) struct Receivers<'a> {
    pub(super) to: Vec<To>,
    /// What is counted for each of them.
    pub(super) bytes: usize,
    pub(super) payload: &'a [u8],
}

/// What stands for a plugin beside Sessions in [`Family::Done`]: FNV-1a of its name.
pub(super) fn plugin_number(name: &str) -> u64 {
    name.bytes().fold(0xCBF2_9CE4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3))
}

/// Row of [`Family::Feed`].
pub(super) fn put_feed(
    to: &mut Vec<u8>,
    client: Option<&Client>,
    message: MessageRef<'_>,
    sealed: bool,
    plugins: &[Arc<str>],
) {
    put_head(to, message, sealed, None);
    to.put_blob(message.topic.as_bytes());
    to.put_blob(message.properties);
    to.put_u8(client.is_some().into());
    for text in client.into_iter().flat_map(|client| [&client.client_id, &client.principal, &client.listener]) {
        to.put_blob(text.as_bytes());
    }
    to.put_u32(plugins.len() as u32);
    for plugin in plugins {
        to.put_blob(plugin.as_bytes());
    }
    to.extend_from_slice(message.payload);
}

/// What a row of [`Family::Feed`] says.
pub(super) struct FeedRow {
    pub(super) client: Option<Client>,
    pub(super) message: Message,
    pub(super) sealed: bool,
    pub(super) plugins: Vec<String>,
}

pub(super) fn take_feed(row: &[u8]) -> Option<FeedRow> {
    let mut row = Take(row);
    let head = take_head(&mut row)?;
    let (topic, properties) = (row.text()?, row.blob()?);
    let client = match row.u8()? {
        0 => None,
        _ => {
            Some(Client { client_id: row.text()?.into(), principal: row.text()?.into(), listener: row.text()?.into() })
        }
    };
    let count = row.u32()?;
    let plugins = (0..count).map(|_| row.text().map(str::to_owned)).collect::<Option<_>>()?;
    Some(FeedRow { client, message: message(&head, topic, properties, row.0), sealed: head.sealed, plugins })
}

/// Row of [`Family::Retained`], whose key is the Topic Name.
pub(super) fn put_retained(to: &mut Vec<u8>, message: MessageRef<'_>, sealed: bool, stamp: u64, now_ms: u64) {
    let begin = to.len();
    put_head(to, message, sealed, Some(now_ms));
    to[begin] |= STAMPED;
    to.put_u64(stamp);
    to.put_blob(message.properties);
    to.extend_from_slice(message.payload);
}

/// What a row of [`Family::Retained`] says.
pub(super) struct RetainedRow {
    pub(super) message: Message,
    pub(super) sealed: bool,
    /// See [`wasmqtt_protocol::router::RetainedMessage::stamp`]; zero in a row of the first schema.
    pub(super) stamp: u64,
    /// When it was written; 0: not known, long ago.
    pub(super) written_ms: u64,
}

pub(super) fn take_retained(topic: &[u8], row: &[u8]) -> Option<RetainedRow> {
    let is_stamped = row.first()? & STAMPED != 0;
    let mut row = Take(row);
    let head = take_head(&mut row)?;
    let stamp = if is_stamped { row.u64()? } else { 0 };
    let properties = row.blob()?;
    let message = message(&head, std::str::from_utf8(topic).ok()?, properties, row.0);
    Some(RetainedRow { message, sealed: head.sealed, stamp, written_ms: head.written_ms })
}

/// In the byte that says whether there is a will: behind it stands when the row was written.
const SESSION_WRITTEN: u8 = 0b10;

/// Row of [`Family::Session`].
pub(super) fn put_session(
    to: &mut Vec<u8>,
    client: &Client,
    expiry: u32,
    closed_at_ms: Option<u64>,
    will: Option<&WillMessage>,
    now_ms: u64,
) {
    for text in [&client.client_id, &client.principal, &client.listener] {
        to.put_blob(text.as_bytes());
    }
    to.put_u32(expiry);
    to.put_u64(closed_at_ms.unwrap_or(0));
    to.put_u8(u8::from(will.is_some()) | SESSION_WRITTEN);
    to.put_u64(now_ms);
    if let Some(will) = will {
        to.put_u32(will.delay);
        to.put_u8(will.expiry.is_some().into());
        to.put_u32(will.expiry.unwrap_or(0));
        put_head(to, (&will.message).into(), false, None);
        to.put_blob(will.message.topic.as_bytes());
        to.put_blob(&will.message.properties);
        to.extend_from_slice(&will.message.payload);
    }
}

/// What a row of [`Family::Session`] says.
pub(super) struct SessionRow {
    pub(super) client: Client,
    pub(super) expiry: u32,
    pub(super) closed_at_ms: Option<u64>,
    pub(super) will: Option<WillMessage>,
    /// When it was written; 0: not known, long ago.
    pub(super) written_ms: u64,
}

pub(super) fn take_session(row: &[u8]) -> Option<SessionRow> {
    let mut row = Take(row);
    let client = Client { client_id: row.text()?.into(), principal: row.text()?.into(), listener: row.text()?.into() };
    let (expiry, closed) = (row.u32()?, row.u64()?);
    let bits = row.u8()?;
    let written_ms = if bits & SESSION_WRITTEN != 0 { row.u64()? } else { 0 };
    let will = if bits & !SESSION_WRITTEN == 0 {
        None
    } else {
        let (delay, has_expiry, will_expiry) = (row.u32()?, row.u8()?, row.u32()?);
        let head = take_head(&mut row)?;
        let (topic, properties) = (row.text()?, row.blob()?);
        let message = message(&head, topic, properties, row.0);
        Some(WillMessage { message, expiry: (has_expiry != 0).then_some(will_expiry), delay })
    };
    Some(SessionRow { client, expiry, closed_at_ms: (closed != 0).then_some(closed), will, written_ms })
}

/// Row of [`Family::Subscription`].
pub(super) fn put_subscription(to: &mut Vec<u8>, subscription: &Subscription) {
    let options = &subscription.options;
    let bits = options.qos as u8
        | u8::from(options.no_local) << 2
        | u8::from(options.retain_as_published) << 3
        | (options.retain_handling as u8) << 4;
    to.put_u8(bits);
    to.put_u32(subscription.id.map_or(0, NonZeroU32::get));
}

pub(super) fn take_subscription(row: &[u8]) -> Option<Subscription> {
    let mut row = Take(row);
    let bits = row.u8()?;
    let retain_handling = match bits >> 4 {
        0 => RetainHandling::Send,
        1 => RetainHandling::SendIfNew,
        2 => RetainHandling::DoNotSend,
        _ => return None,
    };
    let options = SubscribeOptions {
        qos: Qos::from_bits(bits & 0b11)?,
        no_local: bits & 0b100 != 0,
        retain_as_published: bits & 0b1000 != 0,
        retain_handling,
    };
    Some(Subscription { options, id: NonZeroU32::new(row.u32()?) })
}

/// Row of [`Family::Replay`].
pub(super) fn put_replay(to: &mut Vec<u8>, replay: &Replay) {
    to.put_u64(replay.until);
    to.extend_from_slice(replay.from.as_str().as_bytes());
}

pub(super) fn take_replay(row: &[u8]) -> Option<Replay> {
    let mut row = Take(row);
    let until = row.u64()?;
    Some(Replay { from: Position::parse(std::str::from_utf8(row.0).ok()?), until })
}

/// Key of a row that belongs to one Session.
pub(super) fn session_key(to: &mut Vec<u8>, session: SessionId, rest: &[u8]) {
    to.put_u64(session.get());
    to.extend_from_slice(rest);
}

const RELEASE: u8 = 3;

/// Row of [`Family::Inflight`]; `None`: it waits for PUBCOMP.
pub(super) fn put_inflight(to: &mut Vec<u8>, message: Option<(MessageId, Qos)>) {
    to.put_u8(message.map_or(RELEASE, |(_, qos)| qos as u8));
    to.put_u64(message.map_or(0, |(id, _)| id.get()));
}

/// What a row of [`Family::Inflight`] waits for.
pub(super) enum Handshake {
    /// PUBACK or PUBREC.
    Message(MessageId, Qos),
    /// PUBCOMP.
    Release,
}

impl Handshake {
    pub(super) fn message(self) -> Option<(MessageId, Qos)> {
        match self {
            Self::Message(id, qos) => Some((id, qos)),
            Self::Release => None,
        }
    }
}

pub(super) fn take_inflight(row: &[u8]) -> Option<Handshake> {
    let mut row = Take(row);
    match row.u8()? {
        RELEASE => Some(Handshake::Release),
        bits => Some(Handshake::Message(row.id()?, Qos::from_bits(bits)?)),
    }
}

/// Key of a row of [`Family::KeyValue`]; with an empty bucket and key the beginning of all of a plugin.
pub(super) fn value_key(plugin: &str, bucket_and_key: Option<(&str, &str)>) -> Vec<u8> {
    let mut to = Vec::new();
    to.put_blob(plugin.as_bytes());
    if let Some((bucket, key)) = bucket_and_key {
        to.put_blob(bucket.as_bytes());
        to.extend_from_slice(key.as_bytes());
    }
    to
}

/// Bucket and key, of a key without its plugin.
pub(super) fn take_value_key(rest: &[u8]) -> Option<(String, String)> {
    let mut rest = Take(rest);
    let bucket = rest.text()?.to_owned();
    Some((bucket, std::str::from_utf8(rest.0).ok()?.to_owned()))
}

/// Key of a row of [`Family::Ban`].
pub(super) fn ban_key(pattern: &BanPattern) -> String {
    match pattern {
        BanPattern::ClientId(client_id) => format!("client:{client_id}"),
        BanPattern::Username(username) => format!("user:{username}"),
        BanPattern::Address { network, prefix } => format!("address:{network}/{prefix}"),
    }
}

/// Row of [`Family::Ban`].
pub(super) fn put_ban(to: &mut Vec<u8>, until_ms: u64, note: &str, now_ms: u64) {
    to.put_u64(until_ms);
    to.put_blob(note.as_bytes());
    to.put_u64(now_ms);
}

/// What a row of [`Family::Ban`] says.
pub(super) struct BanRow {
    pub(super) pattern: BanPattern,
    pub(super) until_ms: u64,
    pub(super) note: String,
    /// When it was written; 0: not known, long ago.
    pub(super) written_ms: u64,
}

pub(super) fn take_ban(key: &[u8], row: &[u8]) -> Option<BanRow> {
    let (kind, value) = std::str::from_utf8(key).ok()?.split_once(':')?;
    let pattern = match kind {
        "client" => BanPattern::ClientId(value.into()),
        "user" => BanPattern::Username(value.into()),
        "address" => {
            let (network, prefix) = value.rsplit_once('/')?;
            BanPattern::Address { network: network.parse::<IpAddr>().ok()?, prefix: prefix.parse().ok()? }
        }
        _ => return None,
    };
    let mut row = Take(row);
    let (until_ms, note) = (row.u64()?, row.text()?.to_owned());
    Some(BanRow { pattern, until_ms, note, written_ms: row.u64().unwrap_or(0) })
}

/// Whether a row of a family says something. Any bytes may be asked about.
pub(super) fn is_readable(family: Family, key: &[u8], row: &[u8]) -> bool {
    let filter = || key.get(8..).and_then(|filter| std::str::from_utf8(filter).ok());
    let has_filter = || filter().is_some_and(|filter| Filter::parse(filter).is_ok());
    match family {
        Family::Meta | Family::Done => true,
        Family::KeyValue => {
            let mut rest = Take(key);
            rest.text().is_some() && take_value_key(rest.0).is_some()
        }
        Family::Session => Take(key).id().is_some() && take_session(row).is_some(),
        Family::Subscription => has_filter() && take_subscription(row).is_some(),
        Family::Replay => has_filter() && take_replay(row).is_some(),
        Family::Message => MessageRow::parse(row).and_then(|row| row.receivers()).is_some(),
        Family::Inflight => key.len() == 10 && take_inflight(row).is_some(),
        Family::Received => key.len() == 10,
        Family::Retained => take_retained(key, row).is_some(),
        Family::Feed => take_feed(row).is_some(),
        Family::Ban => take_ban(key, row).is_some(),
    }
}

/// For fuzzing: reads a row as the broker does when it starts, without a database. `family` counts on from the last one
/// with the first.
pub fn read_any(family: usize, key: &[u8], row: &[u8]) -> bool {
    ClockRow::take(row);
    is_readable(Family::ALL[family % Family::ALL.len()], key, row)
}
