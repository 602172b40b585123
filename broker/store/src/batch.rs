//! Changes of one turn of one shard, as rows that are on their way to the writer.

use std::ops::Range;

use wasmqtt_protocol::codec::{PacketId, Qos};
use wasmqtt_protocol::ports::Change;
use wasmqtt_protocol::router::{MessageId, SessionId};
use wasmqtt_protocol::session::Step;

use super::rows::{self, Family, Put};

/// What happens to a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Put,
    Delete,
    /// A message for so many Sessions, or plugins, is put.
    Message(u32),
    /// One of them does not need a message of this family any more. The key is that of [`Family::Done`].
    Done,
}

#[derive(Debug, Clone, Copy)]
struct Op {
    family: Family,
    kind: Kind,
    key: u32,
    value: u32,
}

/// Rows one after another, their bytes in one piece.
#[derive(Debug, Default)]
pub(super) struct Batch {
    ops: Vec<Op>,
    bytes: Vec<u8>,
    /// Rows that were put a moment ago may not be needed any more.
    removes: bool,
}

/// One row of a batch.
#[derive(Debug, Clone, Copy)]
pub(super) struct Row<'a> {
    pub(super) family: Family,
    pub(super) kind: Kind,
    pub(super) key: &'a [u8],
    pub(super) value: &'a [u8],
}

impl Batch {
    pub(super) fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    /// What it holds of memory, roughly.
    pub(super) fn len_bytes(&self) -> usize {
        self.bytes.len() + self.ops.len() * size_of::<Op>()
    }

    pub(super) fn len_rows(&self) -> usize {
        self.ops.len()
    }

    pub(super) fn removes(&self) -> bool {
        self.removes
    }

    /// Keeps its memory.
    pub(super) fn clear(&mut self) {
        self.ops.clear();
        self.bytes.clear();
        self.removes = false;
    }

    pub(super) fn capacity_bytes(&self) -> usize {
        self.bytes.capacity() + self.ops.capacity() * size_of::<Op>()
    }

    pub(super) fn rows(&self) -> impl Iterator<Item = Row<'_>> {
        let mut at = 0;
        let mut next = move |length: u32| -> Range<usize> {
            let range = at..at + length as usize;
            at = range.end;
            range
        };
        self.ops.iter().map(move |op| {
            let (key, value) = (next(op.key), next(op.value));
            Row { family: op.family, kind: op.kind, key: &self.bytes[key], value: &self.bytes[value] }
        })
    }

    fn row(&mut self, family: Family, kind: Kind, key: impl FnOnce(&mut Vec<u8>), value: impl FnOnce(&mut Vec<u8>)) {
        let start = self.bytes.len();
        key(&mut self.bytes);
        let middle = self.bytes.len();
        value(&mut self.bytes);
        let (key, value) = ((middle - start) as u32, (self.bytes.len() - middle) as u32);
        self.removes |= matches!(kind, Kind::Delete | Kind::Done);
        self.ops.push(Op { family, kind, key, value });
    }

    fn put(&mut self, family: Family, key: impl FnOnce(&mut Vec<u8>), value: impl FnOnce(&mut Vec<u8>)) {
        self.row(family, Kind::Put, key, value);
    }

    fn delete(&mut self, family: Family, key: impl FnOnce(&mut Vec<u8>)) {
        self.row(family, Kind::Delete, key, |_| {});
    }

    fn done(&mut self, family: Family, receiver: u64, id: MessageId) {
        let key = |to: &mut Vec<u8>| {
            to.put_u64(id.get());
            to.put_u64(receiver);
        };
        self.row(family, Kind::Done, key, |_| {});
    }

    pub(super) fn add(&mut self, change: Change<'_>, now_ms: &dyn Fn() -> u64) {
        match change {
            Change::Session { session, client, expiry, closed_at_ms, will } => self.put(
                Family::Session,
                |to| to.put_u64(session.get()),
                |to| rows::put_session(to, client, expiry, closed_at_ms, will, now_ms()),
            ),
            Change::SessionEnded { session } => self.delete(Family::Session, |to| to.put_u64(session.get())),
            Change::Subscribed { session, filter, subscription } => self.put(
                Family::Subscription,
                |to| rows::session_key(to, session, filter.as_str().as_bytes()),
                |to| rows::put_subscription(to, subscription),
            ),
            Change::Unsubscribed { session, filter } => {
                self.delete(Family::Subscription, |to| rows::session_key(to, session, filter.as_str().as_bytes()));
            }
            Change::Replay { session, filter, replay } => self.put(
                Family::Replay,
                |to| rows::session_key(to, session, filter.as_str().as_bytes()),
                |to| rows::put_replay(to, replay),
            ),
            Change::ReplayEnded { session, filter } => {
                self.delete(Family::Replay, |to| rows::session_key(to, session, filter.as_str().as_bytes()));
            }
            Change::Queued { id, message, sealed, receivers } => self.row(
                Family::Message,
                Kind::Message(receivers.len() as u32),
                |to| to.put_u64(id.get()),
                |to| rows::put_message(to, message, sealed, receivers),
            ),
            Change::Step { session, step } => self.step(session, step),
            Change::Fed { id, client, message, sealed, plugins } => self.row(
                Family::Feed,
                Kind::Message(plugins.len() as u32),
                |to| to.put_u64(id.get()),
                |to| rows::put_feed(to, client, message, sealed, plugins),
            ),
            Change::FedDone { plugin, id } => self.done(Family::Feed, rows::plugin_number(plugin), id),
            Change::Retained { message, sealed, stamp } => self.put(
                Family::Retained,
                |to| to.extend_from_slice(message.topic.as_bytes()),
                |to| rows::put_retained(to, message, sealed, stamp, now_ms()),
            ),
            Change::RetainedRemoved { topic } => {
                self.delete(Family::Retained, |to| to.extend_from_slice(topic.as_bytes()));
            }
            Change::Ban { pattern, until_ms: 0, .. } => {
                self.delete(Family::Ban, |to| to.extend_from_slice(rows::ban_key(pattern).as_bytes()));
            }
            Change::Ban { pattern, until_ms, note } => self.put(
                Family::Ban,
                |to| to.extend_from_slice(rows::ban_key(pattern).as_bytes()),
                |to| rows::put_ban(to, until_ms, note, now_ms()),
            ),
        }
    }

    /// A row that is known by its whole key goes.
    pub(super) fn delete_row(&mut self, family: Family, key: &[u8]) {
        self.delete(family, |to| to.extend_from_slice(key));
    }

    /// A value of a plugin, or (`None`) its end.
    pub(super) fn value(&mut self, plugin: &str, bucket: &str, key: &str, value: Option<&[u8]>) {
        let name = rows::value_key(plugin, Some((bucket, key)));
        match value {
            Some(value) => {
                self.put(Family::KeyValue, |to| to.extend_from_slice(&name), |to| to.extend_from_slice(value));
            }
            None => self.delete(Family::KeyValue, |to| to.extend_from_slice(&name)),
        }
    }

    fn step(&mut self, session: SessionId, step: Step) {
        let key = |packet_id: PacketId| {
            move |to: &mut Vec<u8>| rows::session_key(to, session, &packet_id.get().to_be_bytes())
        };
        let mut handshake = |packet_id, message: Option<(MessageId, Qos)>| {
            self.put(Family::Inflight, key(packet_id), |to| rows::put_inflight(to, message));
        };
        match step {
            Step::Sent { packet_id, id, qos } => handshake(packet_id, Some((id, qos))),
            Step::Releasing { packet_id, id } => {
                handshake(packet_id, None);
                if let Some(id) = id {
                    self.done(Family::Message, session.get(), id);
                }
            }
            Step::Done { packet_id, id } => {
                if let Some(packet_id) = packet_id {
                    self.delete(Family::Inflight, key(packet_id));
                }
                self.done(Family::Message, session.get(), id);
            }
            Step::Released { packet_id } => self.delete(Family::Inflight, key(packet_id)),
            Step::Received { packet_id } => self.put(Family::Received, key(packet_id), |_| {}),
            Step::ReceivedDone { packet_id } => self.delete(Family::Received, key(packet_id)),
        }
    }
}
