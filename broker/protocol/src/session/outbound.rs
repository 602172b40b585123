//! Messages on their way to the client: sent, queued, or dropped.

use std::num::{NonZeroU16, NonZeroU32};
use std::sync::Arc;

use bytes::Bytes;
use smallvec::SmallVec;

use super::inflight::Phase;
use super::queue::bytes_of;
use super::{Delivery, FrameCache, Incoming, Link, Outbox, Parked, QueuePolicy, ServerLimits, Session, Step};
use crate::codec::{
    Ack, Packet, PacketId, PublishHead, Qos, ReasonCode, UserProperties, Version, encode, encode_publish_head,
    publish_len,
};
use crate::router::{Available, Group, MessageId};

/// What became of a delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivered {
    /// In the outbox.
    Sent,
    /// Waits for the client, or for an acknowledgement of others before it.
    Queued,
    /// Too large for the client, expired, QoS 0 to a slow or absent client, or the queue is full.
    Dropped,
}

/// How one Session wants a message.
#[derive(Debug, Clone, Copy)]
pub struct Wish<'a> {
    /// The lower of the message's and the subscription's QoS.
    pub qos: Qos,
    /// RETAIN flag of the outgoing packet.
    pub retain: bool,
    /// Subscription Identifiers.
    pub ids: &'a [NonZeroU32],
    /// The name under which the store keeps the message for this Session; `None`: it does not.
    pub id: Option<MessageId>,
}

impl Session {
    /// Sends a message, queues it, or drops it.
    #[allow(
        clippy::too_many_arguments,
        reason = "the hot path: a struct built per subscriber costs more than it tells"
    )]
    pub fn deliver(
        &mut self,
        now_ms: u64,
        incoming: &Incoming<'_>,
        wish: Wish<'_>,
        share: Option<&Arc<Group>>,
        frames: &mut FrameCache,
        server: &ServerLimits,
        out: Option<&mut Outbox>,
    ) -> Delivered {
        let online = match (&mut self.link, out) {
            (Some(link), Some(out)) if out.len() < server.outbound_bytes_max && !self.reading.is_held() => {
                Some((link, out))
            }
            _ => None,
        };
        if wish.qos == Qos::AtMostOnce {
            return match online {
                Some((link, out)) => link.send_publish(now_ms, incoming, wish, None, frames, out),
                None => Delivered::Dropped,
            };
        }
        if let Some((link, out)) = online
            && !self.queue.has_next()
            && !self.inflight.has_unsent()
            && self.inflight.takes_more(&link.limits, server)
        {
            if !link.fits(now_ms, incoming, wish) {
                self.steps.done(None, wish.id);
                return Delivered::Dropped;
            }
            let packet_id = self.inflight.push_sent(kept(incoming, wish, share));
            if let Some(id) = wish.id {
                self.steps.note(Step::Sent { packet_id, id, qos: wish.qos });
            }
            link.send_publish(now_ms, incoming, wish, Some((packet_id, false)), frames, out);
            self.refresh_availability(out.len(), server);
            return Delivered::Sent;
        }
        match wish.id {
            // Nobody reads it soon: only the store has it. Those of Shared Subscriptions may go to other members.
            Some(id) if self.link.is_none() && share.is_none() && self.steps.is_on() => {
                self.enqueue_parked(Parked::new(id, incoming.queued_bytes(), incoming.expires_at_ms), server)
            }
            _ => self.enqueue(kept(incoming, wish, share), server),
        }
    }

    fn enqueue(&mut self, delivery: Delivery, server: &ServerLimits) -> Delivered {
        if self.shares > 0 && self.link.is_some() {
            self.availability.set(Available::Busy);
        }
        let (delivered, has_room) = self.make_room(bytes_of(&delivery), server);
        if has_room {
            self.queue.push(delivery);
        } else {
            self.steps.done(None, delivery.id);
        }
        delivered
    }

    fn enqueue_parked(&mut self, parked: Parked, server: &ServerLimits) -> Delivered {
        let (delivered, has_room) = self.make_room(parked.bytes as usize, server);
        if has_room {
            self.queue.push_parked(parked);
        } else {
            self.steps.done(None, Some(parked.id));
        }
        delivered
    }

    /// Drops the oldest for one of so many bytes, where the policy says so: what becomes of messages, and whether there
    /// is room.
    fn make_room(&mut self, bytes: usize, server: &ServerLimits) -> (Delivered, bool) {
        let mut delivered = Delivered::Queued;
        while !self.queue.has_room_for(bytes, server.queue_messages_max, server.queue_bytes_max) {
            delivered = Delivered::Dropped;
            if self.queue_policy != QueuePolicy::DropOldest || self.queue.len() == 0 {
                return (delivered, false);
            }
            let oldest = self.queue.drop_oldest();
            self.steps.done(None, oldest);
        }
        (delivered, true)
    }

    /// More can go out if the outbox gets room.
    pub fn wants_pump(&self) -> bool {
        !self.reading.is_held() && (self.queue.has_next() || self.inflight.has_unsent())
    }

    /// Sends what waits, as far as the client's Receive Maximum and the outbox allow.
    pub fn pump(&mut self, now_ms: u64, server: &ServerLimits, out: &mut Outbox) {
        if self.reading.is_held() {
            return;
        }
        let Some(mut link) = self.link.take() else { return };
        self.send_again(&mut link, now_ms, server, out);
        self.send_queued(&mut link, now_ms, server, out);
        self.link = Some(link);
        self.refresh_availability(out.len(), server);
    }

    fn has_quota(&self, link: &Link, server: &ServerLimits, out: &Outbox) -> bool {
        self.inflight.outstanding() < usize::from(link.limits.receive_maximum) && out.len() < server.outbound_bytes_max
    }

    /// One that was not sent before may be sent.
    fn takes_more(&self, link: &Link, server: &ServerLimits, out: &Outbox) -> bool {
        !self.inflight.has_unsent()
            && self.inflight.takes_more(&link.limits, server)
            && out.len() < server.outbound_bytes_max
    }

    /// What an earlier Network Connection did not finish. [MQTT-4.4.0-1]
    fn send_again(&mut self, link: &mut Link, now_ms: u64, server: &ServerLimits, out: &mut Outbox) {
        let mut frames = FrameCache::default();
        while self.inflight.has_unsent() && self.has_quota(link, server, out) && !self.inflight.waits_for_store() {
            let Some(slot) = self.inflight.next_unsent() else { return };
            let packet_id = slot.packet_id;
            match &slot.phase {
                Phase::Publish(delivery) => {
                    let incoming = Incoming::from_message(&delivery.message);
                    let id = delivery.id;
                    let wish = Wish { qos: delivery.qos, retain: delivery.retain, ids: &delivery.ids, id };
                    frames.reset();
                    if link.fits(now_ms, &incoming, wish) {
                        link.send_publish(now_ms, &incoming, wish, Some((packet_id, true)), &mut frames, out);
                    } else {
                        // The client takes less than last time. [MQTT-3.1.2-25]
                        self.inflight.finish(packet_id);
                        self.steps.done(Some(packet_id), id);
                    }
                }
                Phase::Release => {
                    let (reason, user_properties) = (ReasonCode::SUCCESS, UserProperties::default());
                    let ack = Ack { packet_id, reason, reason_string: None, user_properties };
                    out.append(|bytes| encode(link.version, &Packet::Pubrel(ack), bytes));
                }
                Phase::Done | Phase::Parked(..) | Phase::Withheld(..) => {}
            }
        }
    }

    fn send_queued(&mut self, link: &mut Link, now_ms: u64, server: &ServerLimits, out: &mut Outbox) {
        let mut frames = FrameCache::default();
        while self.takes_more(link, server, out) {
            let Some(delivery) = self.queue.pop() else {
                if self.queue.len() == 0 {
                    self.queue_compared();
                }
                return;
            };
            let message = Arc::clone(&delivery.message);
            let ids = delivery.ids.clone();
            let incoming = Incoming::from_message(&message);
            let wish = Wish { qos: delivery.qos, retain: delivery.retain, ids: &ids, id: delivery.id };
            let may_leave = self.may_send_queued(incoming.topic);
            if !may_leave || incoming.is_expired(now_ms) || !link.fits(now_ms, &incoming, wish) {
                self.steps.done(None, wish.id);
                continue;
            }
            let packet_id = self.inflight.push_sent(delivery);
            if let Some(id) = wish.id {
                self.steps.note(Step::Sent { packet_id, id, qos: wish.qos });
            }
            frames.reset();
            link.send_publish(now_ms, &incoming, wish, Some((packet_id, false)), &mut frames, out);
        }
    }

    /// Tells the router whether Shared Subscriptions should count on this member.
    pub fn refresh_availability(&self, outbound: usize, server: &ServerLimits) {
        if self.shares == 0 {
            return;
        }
        let Some(link) = &self.link else { return };
        let ready = !self.reading.is_held()
            && !self.queue.has_next()
            && outbound < server.outbound_bytes_max
            && self.inflight.takes_more(&link.limits, server);
        self.availability.set(if ready { Available::Ready } else { Available::Busy });
    }
}

fn kept(incoming: &Incoming<'_>, wish: Wish<'_>, share: Option<&Arc<Group>>) -> Delivery {
    Delivery {
        message: Arc::clone(incoming.message()),
        qos: wish.qos,
        retain: wish.retain,
        ids: SmallVec::from_slice(wish.ids),
        id: wish.id,
        share: share.cloned(),
        kept_as: share.and(incoming.kept_as.clone()),
    }
}

impl Link {
    /// The client takes packets of this size. What is larger counts as delivered. [MQTT-3.1.2-25]
    fn fits(&self, now_ms: u64, incoming: &Incoming<'_>, wish: Wish<'_>) -> bool {
        if self.limits.packet_bytes_max == u32::MAX {
            return true;
        }
        let head = PublishHead {
            dup: false,
            qos: wish.qos,
            retain: wish.retain,
            topic: incoming.topic,
            packet_id: (wish.qos != Qos::AtMostOnce).then_some(NonZeroU16::MIN),
            topic_alias: (self.limits.topic_alias_maximum > 0).then_some(NonZeroU16::MIN),
            message_expiry: incoming.expiry_left(now_ms),
            subscription_ids: wish.ids,
            properties: incoming.properties,
        };
        publish_len(self.version, &head, incoming.payload.len()) <= self.limits.packet_bytes_max as usize
    }

    fn send_publish(
        &mut self,
        now_ms: u64,
        incoming: &Incoming<'_>,
        wish: Wish<'_>,
        packet: Option<(PacketId, bool)>,
        frames: &mut FrameCache,
        out: &mut Outbox,
    ) -> Delivered {
        if packet.is_none() && !self.fits(now_ms, incoming, wish) {
            return Delivered::Dropped;
        }
        if wish.ids.is_empty() && self.limits.topic_alias_maximum == 0 {
            let (frame, packet_id_at) = frames.frame(incoming, now_ms, self.version, wish.qos, wish.retain);
            out.append(|bytes| {
                let start = bytes.len();
                bytes.extend_from_slice(frame);
                if let Some((packet_id, dup)) = packet {
                    bytes[start] |= u8::from(dup) << 3;
                    let at = start + packet_id_at;
                    bytes[at..at + 2].copy_from_slice(&packet_id.get().to_be_bytes());
                }
            });
            if incoming.shares_payload() {
                out.push_shared(shared_payload(incoming));
            }
            return Delivered::Sent;
        }
        let (topic, topic_alias) = self.alias_for(incoming.topic);
        let head = PublishHead {
            dup: packet.is_some_and(|(_, dup)| dup),
            qos: wish.qos,
            retain: wish.retain,
            topic,
            packet_id: packet.map(|(packet_id, _)| packet_id),
            topic_alias,
            message_expiry: incoming.expiry_left(now_ms),
            subscription_ids: wish.ids,
            properties: incoming.properties,
        };
        out.append(|bytes| encode_publish_head(self.version, &head, incoming.payload.len(), bytes));
        if incoming.shares_payload() {
            out.push_shared(shared_payload(incoming));
        } else {
            out.extend(incoming.payload);
        }
        Delivered::Sent
    }

    /// The first topics of a connection get aliases, until the client's maximum is used up.
    fn alias_for<'a>(&mut self, topic: &'a str) -> (&'a str, Option<NonZeroU16>) {
        if self.version != Version::V5 || self.limits.topic_alias_maximum == 0 {
            return (topic, None);
        }
        if let Some(alias) = self.aliases_out.get(topic) {
            return ("", Some(*alias));
        }
        let used = self.aliases_out.len();
        if used >= usize::from(self.limits.topic_alias_maximum) {
            return (topic, None);
        }
        if self.alias_bytes_out + topic.len() > self.alias_bytes_max {
            return (topic, None);
        }
        let alias = u16::try_from(used + 1).ok().and_then(NonZeroU16::new);
        if let Some(alias) = alias {
            self.alias_bytes_out += topic.len();
            self.aliases_out.insert(topic.into(), alias);
        }
        (topic, alias)
    }
}

fn shared_payload(incoming: &Incoming<'_>) -> Bytes {
    incoming.message().payload.clone()
}
