//! A message on its way to subscribers: borrowed while it is routed, shared once somebody must keep it.

use std::cell::OnceCell;
use std::num::NonZeroU32;
use std::sync::Arc;

use bytes::Bytes;
use smallvec::SmallVec;

use super::outbox::SHARED_PAYLOAD_BYTES_MIN;
use super::queue::queued_bytes;
use crate::codec::{PublishHead, Qos, Version, encode_publish_head};
use crate::router::{Group, Message, MessageId, MessageRef, SessionKey};

/// One message for one Session, as its subscription wants it.
#[derive(Debug, Clone)]
pub struct Delivery {
    /// The message, shared by all its receivers.
    pub message: Arc<Message>,
    /// The lower of the message's QoS and the subscription's. [MQTT-3.8.4-8]
    pub qos: Qos,
    /// RETAIN flag of the outgoing packet.
    pub retain: bool,
    /// Subscription Identifiers of all that matched.
    pub ids: SmallVec<[NonZeroU32; 1]>,
    /// The name under which the store keeps it for this Session; `None`: it does not.
    pub id: Option<MessageId>,
    /// The Shared Subscription it came through, so that another member can have it.
    pub share: Option<Arc<Group>>,
    /// The form that the store keeps, where that is another and another member may need it.
    pub kept_as: Option<Arc<Message>>,
}

/// A message that is being routed.
#[derive(Debug)]
pub struct Incoming<'a> {
    /// Topic Name.
    pub topic: &'a str,
    /// Application Message.
    pub payload: &'a [u8],
    /// Encoded properties that are forwarded unaltered.
    pub properties: &'a [u8],
    /// QoS it was published with.
    pub qos: Qos,
    /// RETAIN as published.
    pub retain: bool,
    /// Broker clock.
    pub expires_at_ms: Option<u64>,
    /// Who published it.
    pub publisher: Option<SessionKey>,
    /// The form that the store keeps, where that is another.
    pub kept_as: Option<Arc<Message>>,
    message: OnceCell<Arc<Message>>,
}

impl<'a> Incoming<'a> {
    /// From a packet that lies in a read buffer.
    pub fn new(
        topic: &'a str,
        payload: &'a [u8],
        properties: &'a [u8],
        (qos, retain): (Qos, bool),
        expires_at_ms: Option<u64>,
        publisher: Option<SessionKey>,
    ) -> Self {
        Self {
            topic,
            payload,
            properties,
            qos,
            retain,
            expires_at_ms,
            publisher,
            kept_as: None,
            message: OnceCell::new(),
        }
    }

    /// From a message that is kept already.
    pub fn from_message(message: &'a Arc<Message>) -> Self {
        let incoming = Self::new(
            &message.topic,
            &message.payload,
            &message.properties,
            (message.qos, message.retain),
            message.expires_at_ms,
            message.publisher,
        );
        let _ = incoming.message.set(Arc::clone(message));
        incoming
    }

    /// The shared form; copied out of the read buffer the first time somebody asks.
    pub fn message(&self) -> &Arc<Message> {
        self.message.get_or_init(|| {
            Arc::new(Message {
                topic: self.topic.into(),
                payload: Bytes::copy_from_slice(self.payload),
                properties: Bytes::copy_from_slice(self.properties),
                qos: self.qos,
                retain: self.retain,
                expires_at_ms: self.expires_at_ms,
                publisher: self.publisher,
            })
        })
    }

    /// What the store keeps.
    pub fn kept(&self) -> MessageRef<'_> {
        match &self.kept_as {
            Some(message) => MessageRef::from(&**message),
            None => MessageRef {
                topic: self.topic,
                payload: self.payload,
                properties: self.properties,
                qos: self.qos,
                retain: self.retain,
                expires_at_ms: self.expires_at_ms,
            },
        }
    }

    /// What it counts for in a queue.
    pub(super) fn queued_bytes(&self) -> usize {
        queued_bytes(self.topic.len(), self.properties.len(), self.payload.len())
    }

    pub(super) fn shares_payload(&self) -> bool {
        self.payload.len() >= SHARED_PAYLOAD_BYTES_MIN
    }

    /// Seconds left, rounded up; `Some(0)` is never sent, see [`Incoming::is_expired`]. [MQTT-3.3.2-6]
    pub(super) fn expiry_left(&self, now_ms: u64) -> Option<u32> {
        let left = self.expires_at_ms?.saturating_sub(now_ms);
        Some(u32::try_from(left.div_ceil(1000)).unwrap_or(u32::MAX))
    }

    /// Its lifetime has passed. [MQTT-3.3.2-5]
    pub fn is_expired(&self, now_ms: u64) -> bool {
        self.expires_at_ms.is_some_and(|at| at <= now_ms)
    }
}

/// The PUBLISH frame of the message being routed, encoded once for all receivers that want the same bytes.
#[derive(Debug, Default)]
pub struct FrameCache {
    key: Option<(bool, Qos, bool)>,
    bytes: Vec<u8>,
    /// Where the Packet Identifier stands.
    packet_id_at: usize,
}

impl FrameCache {
    /// Must be called before each message.
    pub fn reset(&mut self) {
        self.key = None;
    }

    /// The frame (without payload, if that is shared) and the place of its Packet Identifier.
    pub(super) fn frame(
        &mut self,
        incoming: &Incoming<'_>,
        now_ms: u64,
        version: Version,
        qos: Qos,
        retain: bool,
    ) -> (&[u8], usize) {
        let key = (version == Version::V5, qos, retain);
        if self.key != Some(key) {
            self.bytes.clear();
            let head = PublishHead {
                dup: false,
                qos,
                retain,
                topic: incoming.topic,
                packet_id: (qos != Qos::AtMostOnce).then_some(std::num::NonZeroU16::MIN),
                topic_alias: None,
                message_expiry: incoming.expiry_left(now_ms),
                subscription_ids: &[],
                properties: incoming.properties,
            };
            encode_publish_head(version, &head, incoming.payload.len(), &mut self.bytes);
            let length_bytes = 1 + self.bytes[1..].iter().take_while(|byte| **byte & 0x80 != 0).count();
            self.packet_id_at = 1 + length_bytes + 2 + incoming.topic.len();
            if !incoming.shares_payload() {
                self.bytes.extend_from_slice(incoming.payload);
            }
            self.key = Some(key);
        }
        (&self.bytes, self.packet_id_at)
    }
}
