//! The Session itself.

use std::num::{NonZeroU16, NonZeroU32};
use std::sync::Arc;

use bytes::Bytes;
use hashbrown::{HashMap, HashSet};
use smallvec::SmallVec;

use super::inflight::{Inflight, Phase};
use super::queue::Queue;
use super::steps::Steps;
use super::{Delivery, FrameCache, Incoming, Link, Outbox, ServerLimits, Step};
use crate::codec::{
    Ack, Auth, Packet, PacketId, Publish, PublishHead, Qos, ReasonCode, Subscribe, Unsubscribe, UserProperties,
    Version, encode, encode_publish_head, publish_len,
};
use crate::router::{Availability, Available, Message, MessageId, SessionKey, Subscription};
use crate::topic::Filter;

/// Published when the client goes without saying DISCONNECT. MQTT 5.0 §3.1.2.5.
#[derive(Debug, Clone)]
pub struct WillMessage {
    /// The message; its expiry begins to count when it is published.
    pub message: Message,
    /// Message Expiry Interval in seconds.
    pub expiry: Option<u32>,
    /// Will Delay Interval in seconds.
    pub delay: u32,
}

/// What the caller has to do after a packet was handled.
#[derive(Debug)]
pub enum Event<'a> {
    /// Nothing: the answer, if any, is in the outbox.
    None,
    /// Route this message, then call [`Session::published`].
    Publish {
        /// The packet.
        publish: Publish<'a>,
        /// The Topic Name behind its Topic Alias, when the packet itself has none.
        aliased: Option<Arc<str>>,
    },
    /// Subscribe, then answer with SUBACK.
    Subscribe(Subscribe<'a>),
    /// Unsubscribe, then answer with UNSUBACK.
    Unsubscribe(Unsubscribe<'a>),
    /// Re-authentication goes on.
    Auth(Auth<'a>),
    /// The client said goodbye; with `will` it wants its Will Message published. [MQTT-3.14.4-3]
    Disconnect {
        /// Any Reason Code but 0x00.
        will: bool,
    },
}

/// The client broke a rule: DISCONNECT with this reason (5.0) and close.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct Fault {
    /// What DISCONNECT says.
    pub reason: ReasonCode,
    /// For the log and the Reason String.
    pub text: &'static str,
}

const fn fault(reason: ReasonCode, text: &'static str) -> Fault {
    Fault { reason, text }
}

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

/// What happens to a QoS 1 or 2 message when the queue of its receiver is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum QueuePolicy {
    /// It is dropped.
    #[default]
    DropNewest,
    /// The oldest that waits is dropped for it.
    DropOldest,
    /// Its publisher is told (0x97), and nobody gets it.
    RejectPublish,
}

/// One client's state; survives its Network Connections for the Session Expiry Interval.
#[derive(Debug)]
pub struct Session {
    /// Client Identifier.
    pub client_id: Arc<str>,
    /// Where this Session lives.
    pub key: SessionKey,
    /// The Will Message of the present or last Network Connection.
    pub will: Option<Box<WillMessage>>,
    subscriptions: HashMap<Filter, Subscription, foldhash::fast::RandomState>,
    /// When its queue is full.
    pub queue_policy: QueuePolicy,
    pub(super) inflight: Inflight,
    pub(super) queue: Queue,
    pub(super) steps: Steps,
    /// Packet Identifiers of QoS 2 messages that were routed and wait for PUBREL. [MQTT-4.3.3-10]
    pub(super) received: HashSet<u16, foldhash::fast::RandomState>,
    pub(super) link: Option<Box<Link>>,
    pub(super) expiry: u32,
    availability: Arc<Availability>,
    shares: usize,
}

impl Session {
    /// A Session without state or Network Connection.
    pub fn new(client_id: Arc<str>, key: SessionKey) -> Self {
        Self {
            client_id,
            key,
            will: None,
            subscriptions: HashMap::default(),
            queue_policy: QueuePolicy::default(),
            inflight: Inflight::default(),
            queue: Queue::default(),
            steps: Steps::default(),
            received: HashSet::default(),
            link: None,
            expiry: 0,
            availability: Arc::default(),
            shares: 0,
        }
    }

    /// The Network Connection's state, while there is one.
    pub fn link(&self) -> Option<&Link> {
        self.link.as_deref()
    }

    /// Seconds this Session outlives its Network Connection.
    pub fn session_expiry(&self) -> u32 {
        self.expiry
    }

    /// Messages that wait in the queue.
    pub fn queued(&self) -> usize {
        self.queue.len()
    }

    /// One more message might not find room.
    pub fn is_full(&self, server: &ServerLimits) -> bool {
        self.queue.is_full(server.queue_messages_max, server.queue_bytes_max)
    }

    /// Shared with the router, which skips members that cannot take more.
    pub fn availability(&self) -> &Arc<Availability> {
        &self.availability
    }

    /// The subscriptions, in no order.
    pub fn subscriptions(&self) -> impl Iterator<Item = (&Filter, &Subscription)> {
        self.subscriptions.iter()
    }

    /// How many subscriptions it has.
    pub fn subscription_count(&self) -> usize {
        self.subscriptions.len()
    }

    /// The subscription with this filter.
    pub fn subscription(&self, filter: &Filter) -> Option<&Subscription> {
        self.subscriptions.get(filter)
    }

    /// Keeps a subscription; gives back the one it replaces. [MQTT-3.8.4-3]
    pub fn subscribe(&mut self, filter: Filter, subscription: Subscription) -> Option<Subscription> {
        let shared = filter.share().is_some();
        let old = self.subscriptions.insert(filter, subscription);
        self.shares += usize::from(shared && old.is_none());
        old
    }

    /// Ends a subscription; `false` if there was none.
    pub fn unsubscribe(&mut self, filter: &Filter) -> bool {
        let found = self.subscriptions.remove(filter).is_some();
        self.shares -= usize::from(found && filter.share().is_some());
        found
    }

    /// A Network Connection begins, after its CONNACK was written: sends again what was not acknowledged, then what
    /// was queued. [MQTT-4.4.0-1]
    pub fn connected(&mut self, now_ms: u64, link: Link, server: &ServerLimits, out: &mut Outbox) {
        self.expiry = link.limits.session_expiry;
        self.link = Some(Box::new(link));
        self.inflight.rewind();
        self.pump(now_ms, server, out);
    }

    /// The Network Connection is gone.
    pub fn disconnected(&mut self) {
        self.link = None;
        self.steps.loading = false;
        if self.steps.is_on() {
            self.inflight.park();
            self.queue.park();
        }
        self.availability.set(Available::Offline);
    }

    /// Takes one packet from the client.
    ///
    /// # Errors
    /// A [`Fault`] ends the Network Connection.
    pub fn handle_packet<'a>(
        &mut self,
        now_ms: u64,
        packet: Packet<'a>,
        server: &ServerLimits,
        out: &mut Outbox,
    ) -> Result<Event<'a>, Fault> {
        match packet {
            Packet::Publish(publish) => return self.on_publish(publish, server, out),
            Packet::Puback(ack) => self.on_puback(&ack)?,
            Packet::Pubrec(ack) => self.on_pubrec(&ack, out)?,
            Packet::Pubrel(ack) => self.on_pubrel(&ack, out),
            Packet::Pubcomp(ack) => self.on_pubcomp(&ack)?,
            Packet::Pingreq => self.send(&Packet::Pingresp, out),
            Packet::Subscribe(subscribe) => return Ok(Event::Subscribe(subscribe)),
            Packet::Unsubscribe(unsubscribe) => return Ok(Event::Unsubscribe(unsubscribe)),
            // Table 3-11: success is for the server to say.
            Packet::Auth(auth) if auth.reason == ReasonCode::SUCCESS => {
                return Err(fault(ReasonCode::PROTOCOL_ERROR, "AUTH with a reason code that only a server sends"));
            }
            Packet::Auth(auth) => return Ok(Event::Auth(auth)),
            Packet::Disconnect(disconnect) => {
                if !disconnect.reason.may_client_disconnect_with() {
                    let text = "DISCONNECT with a reason code that only a server sends";
                    return Err(fault(ReasonCode::PROTOCOL_ERROR, text));
                }
                if let Some(expiry) = disconnect.session_expiry {
                    self.change_expiry(expiry, server)?;
                }
                // [MQTT-3.1.2-8]: only a normal goodbye takes the will back.
                return Ok(Event::Disconnect { will: disconnect.reason != ReasonCode::SUCCESS });
            }
            Packet::Connect(_) => return Err(fault(ReasonCode::PROTOCOL_ERROR, "second CONNECT")),
            Packet::Connack(_) | Packet::Suback(_) | Packet::Unsuback(_) | Packet::Pingresp => {
                return Err(fault(ReasonCode::PROTOCOL_ERROR, "packet that only a server sends"));
            }
        }
        self.pump(now_ms, server, out);
        Ok(Event::None)
    }

    /// MQTT 5.0 §3.14.2.2.2: an interval that was zero stays zero.
    fn change_expiry(&mut self, expiry: u32, server: &ServerLimits) -> Result<(), Fault> {
        if self.expiry == 0 && expiry > 0 {
            return Err(fault(ReasonCode::PROTOCOL_ERROR, "Session Expiry Interval raised from zero at DISCONNECT"));
        }
        self.expiry = expiry.min(server.session_expiry_max);
        Ok(())
    }

    fn on_publish<'a>(
        &mut self,
        publish: Publish<'a>,
        server: &ServerLimits,
        out: &mut Outbox,
    ) -> Result<Event<'a>, Fault> {
        if publish.properties.has_subscription_ids() {
            // [MQTT-3.3.4-6]
            return Err(fault(ReasonCode::PROTOCOL_ERROR, "Subscription Identifier in a PUBLISH from the client"));
        }
        if publish.qos > server.maximum_qos {
            return Err(fault(ReasonCode::QOS_NOT_SUPPORTED, "PUBLISH above the Maximum QoS"));
        }
        if publish.retain && !server.retain_available {
            return Err(fault(ReasonCode::RETAIN_NOT_SUPPORTED, "retained PUBLISH while Retain Available is 0"));
        }
        let aliased = match publish.properties.topic_alias {
            Some(alias) => self.resolve_alias(alias, publish.topic, server)?,
            None => None,
        };
        if publish.qos == Qos::ExactlyOnce
            && let Some(packet_id) = publish.packet_id
        {
            if self.received.contains(&packet_id.get()) {
                self.send_ack(Packet::Pubrec, packet_id, ReasonCode::SUCCESS, out);
                return Ok(Event::None);
            }
            if self.received.len() >= usize::from(server.receive_maximum) {
                return Err(fault(ReasonCode::RECEIVE_MAXIMUM_EXCEEDED, "more QoS 2 messages than Receive Maximum"));
            }
        }
        Ok(Event::Publish { publish, aliased })
    }

    /// MQTT 5.0 §3.3.2.3.4.
    fn resolve_alias(
        &mut self,
        alias: NonZeroU16,
        topic: &str,
        server: &ServerLimits,
    ) -> Result<Option<Arc<str>>, Fault> {
        let Some(link) = &mut self.link else { return Ok(None) };
        if alias.get() > server.topic_alias_maximum {
            return Err(fault(ReasonCode::TOPIC_ALIAS_INVALID, "Topic Alias above the Topic Alias Maximum"));
        }
        let place = usize::from(alias.get()) - 1;
        if topic.is_empty() {
            let known = link.aliases_in.get(place).cloned().flatten();
            return known.map(Some).ok_or(fault(ReasonCode::PROTOCOL_ERROR, "Topic Alias was never set"));
        }
        if link.aliases_in.len() <= place {
            link.aliases_in.resize(place + 1, None);
        }
        link.aliases_in[place] = Some(topic.into());
        Ok(None)
    }

    /// A QoS 2 message waits to be taken over: the same packet again is no second message. [MQTT-4.3.3-10]
    pub fn submitted(&mut self, packet_id: PacketId) {
        self.received.insert(packet_id.get());
        self.steps.note(Step::Received { packet_id });
    }

    /// The message was taken over by the broker (or refused, with an error): acknowledges it.
    pub fn published(&mut self, qos: Qos, packet_id: Option<PacketId>, reason: ReasonCode, out: &mut Outbox) {
        let Some(packet_id) = packet_id else { return };
        match qos {
            Qos::AtMostOnce => {}
            Qos::AtLeastOnce => self.send_ack(Packet::Puback, packet_id, reason, out),
            Qos::ExactlyOnce => {
                if !reason.is_error() {
                    self.received.insert(packet_id.get());
                    self.steps.note(Step::Received { packet_id });
                } else if self.received.remove(&packet_id.get()) {
                    self.steps.note(Step::ReceivedDone { packet_id });
                }
                self.send_ack(Packet::Pubrec, packet_id, reason, out);
            }
        }
    }

    fn on_puback(&mut self, ack: &Ack<'_>) -> Result<(), Fault> {
        let Some(slot) = self.inflight.get_mut(ack.packet_id) else { return Ok(()) };
        let (Some(Qos::AtLeastOnce), id) = slot.message() else {
            return Err(fault(ReasonCode::PROTOCOL_ERROR, "PUBACK for a QoS 2 message"));
        };
        self.inflight.finish(ack.packet_id);
        self.steps.done(Some(ack.packet_id), id);
        Ok(())
    }

    fn on_pubrec(&mut self, ack: &Ack<'_>, out: &mut Outbox) -> Result<(), Fault> {
        let Some(slot) = self.inflight.get_mut(ack.packet_id) else {
            if !ack.reason.is_error() {
                self.send_ack(Packet::Pubrel, ack.packet_id, ReasonCode::PACKET_IDENTIFIER_NOT_FOUND, out);
            }
            return Ok(());
        };
        let (qos, id) = slot.message();
        if qos == Some(Qos::AtLeastOnce) {
            return Err(fault(ReasonCode::PROTOCOL_ERROR, "PUBREC for a QoS 1 message"));
        }
        if ack.reason.is_error() {
            self.inflight.finish(ack.packet_id);
            match id {
                Some(_) => self.steps.done(Some(ack.packet_id), id),
                None => self.steps.note(Step::Released { packet_id: ack.packet_id }),
            }
            return Ok(());
        }
        slot.phase = Phase::Release;
        if qos.is_some() {
            self.steps.note(Step::Releasing { packet_id: ack.packet_id, id });
        }
        self.send_ack(Packet::Pubrel, ack.packet_id, ReasonCode::SUCCESS, out);
        Ok(())
    }

    fn on_pubrel(&mut self, ack: &Ack<'_>, out: &mut Outbox) {
        let known = self.received.remove(&ack.packet_id.get());
        if known {
            self.steps.note(Step::ReceivedDone { packet_id: ack.packet_id });
        }
        let reason = if known { ReasonCode::SUCCESS } else { ReasonCode::PACKET_IDENTIFIER_NOT_FOUND };
        self.send_ack(Packet::Pubcomp, ack.packet_id, reason, out);
    }

    fn on_pubcomp(&mut self, ack: &Ack<'_>) -> Result<(), Fault> {
        match self.inflight.get_mut(ack.packet_id).map(|slot| &slot.phase) {
            Some(Phase::Publish(_) | Phase::Parked(..)) => {
                Err(fault(ReasonCode::PROTOCOL_ERROR, "PUBCOMP before PUBREC"))
            }
            Some(_) => {
                self.inflight.finish(ack.packet_id);
                self.steps.note(Step::Released { packet_id: ack.packet_id });
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// Writes a packet in the version of the Network Connection. One larger than the client takes counts as sent.
    /// [MQTT-3.1.2-24], [MQTT-3.1.2-25]
    pub fn send(&self, packet: &Packet<'_>, out: &mut Outbox) {
        let Some(link) = &self.link else { return };
        out.append(|bytes| {
            let start = bytes.len();
            encode(link.version, packet, bytes);
            if bytes.len() - start > link.limits.packet_bytes_max as usize {
                bytes.truncate(start);
            }
        });
    }

    fn send_ack(
        &self,
        kind: fn(Ack<'static>) -> Packet<'static>,
        packet_id: PacketId,
        reason: ReasonCode,
        out: &mut Outbox,
    ) {
        let ack = Ack { packet_id, reason, reason_string: None, user_properties: UserProperties::default() };
        self.send(&kind(ack), out);
    }

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
        share: Option<&Arc<crate::router::Group>>,
        frames: &mut FrameCache,
        server: &ServerLimits,
        out: Option<&mut Outbox>,
    ) -> Delivered {
        let online = match (&mut self.link, out) {
            (Some(link), Some(out)) if out.len() < server.outbound_bytes_max => Some((link, out)),
            _ => None,
        };
        if wish.qos == Qos::AtMostOnce {
            return match online {
                Some((link, out)) => link.send_publish(now_ms, incoming, wish, None, frames, out),
                None => Delivered::Dropped,
            };
        }
        if let Some((link, out)) = online
            && self.queue.is_empty()
            && !self.inflight.has_unsent()
            && self.inflight.has_room()
            && self.inflight.outstanding() < usize::from(link.limits.receive_maximum)
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
        self.enqueue(kept(incoming, wish, share), server)
    }

    fn enqueue(&mut self, delivery: Delivery, server: &ServerLimits) -> Delivered {
        if self.shares > 0 && self.link.is_some() {
            self.availability.set(Available::Busy);
        }
        let (messages_max, bytes_max) = (server.queue_messages_max, server.queue_bytes_max);
        let mut delivered = Delivered::Queued;
        while !self.queue.has_room_for(&delivery, messages_max, bytes_max) {
            delivered = Delivered::Dropped;
            if self.queue_policy != QueuePolicy::DropOldest || self.queue.is_empty() {
                self.steps.done(None, delivery.id);
                return delivered;
            }
            let oldest = self.queue.drop_oldest();
            self.steps.done(None, oldest);
        }
        self.queue.push(delivery, self.steps.is_on() && self.link.is_none());
        delivered
    }

    /// More can go out if the outbox gets room.
    pub fn wants_pump(&self) -> bool {
        !self.queue.is_empty() || self.inflight.has_unsent()
    }

    /// Sends what waits, as far as the client's Receive Maximum and the outbox allow.
    pub fn pump(&mut self, now_ms: u64, server: &ServerLimits, out: &mut Outbox) {
        let Some(link) = &mut self.link else { return };
        let quota = usize::from(link.limits.receive_maximum);
        let mut frames = FrameCache::default();
        while self.inflight.has_unsent() && self.inflight.outstanding() < quota && out.len() < server.outbound_bytes_max
        {
            if self.inflight.waits_for_store() {
                return;
            }
            let Some(slot) = self.inflight.next_unsent() else { break };
            match &slot.phase {
                Phase::Publish(delivery) => {
                    let incoming = Incoming::from_message(&delivery.message);
                    let id = delivery.id;
                    let wish = Wish { qos: delivery.qos, retain: delivery.retain, ids: &delivery.ids, id };
                    frames.reset();
                    let packet_id = slot.packet_id;
                    if link.fits(now_ms, &incoming, wish) {
                        link.send_publish(now_ms, &incoming, wish, Some((packet_id, true)), &mut frames, out);
                    } else {
                        // The client takes less than last time. [MQTT-3.1.2-25]
                        self.inflight.finish(packet_id);
                        self.steps.done(Some(packet_id), id);
                    }
                }
                Phase::Release => {
                    let ack = Ack {
                        packet_id: slot.packet_id,
                        reason: ReasonCode::SUCCESS,
                        reason_string: None,
                        user_properties: UserProperties::default(),
                    };
                    out.append(|bytes| encode(link.version, &Packet::Pubrel(ack), bytes));
                }
                Phase::Done | Phase::Parked(..) => {}
            }
        }
        while !self.inflight.has_unsent()
            && self.inflight.outstanding() < quota
            && self.inflight.has_room()
            && out.len() < server.outbound_bytes_max
        {
            let Some(delivery) = self.queue.pop() else { break };
            let message = Arc::clone(&delivery.message);
            let ids = delivery.ids.clone();
            let incoming = Incoming::from_message(&message);
            let wish = Wish { qos: delivery.qos, retain: delivery.retain, ids: &ids, id: delivery.id };
            if incoming.is_expired(now_ms) || !link.fits(now_ms, &incoming, wish) {
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
        self.refresh_availability(out.len(), server);
    }

    /// Tells the router whether Shared Subscriptions should count on this member.
    pub fn refresh_availability(&self, outbound: usize, server: &ServerLimits) {
        if self.shares == 0 {
            return;
        }
        let Some(link) = &self.link else { return };
        let ready = self.queue.is_empty()
            && outbound < server.outbound_bytes_max
            && self.inflight.outstanding() < usize::from(link.limits.receive_maximum);
        self.availability.set(if ready { Available::Ready } else { Available::Busy });
    }
}

fn kept(incoming: &Incoming<'_>, wish: Wish<'_>, share: Option<&Arc<crate::router::Group>>) -> Delivery {
    Delivery {
        message: Arc::clone(incoming.message()),
        qos: wish.qos,
        retain: wish.retain,
        ids: SmallVec::from_slice(wish.ids),
        id: wish.id,
        share: share.cloned(),
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
        let alias = u16::try_from(used + 1).ok().and_then(NonZeroU16::new);
        if let Some(alias) = alias {
            self.aliases_out.insert(topic.into(), alias);
        }
        (topic, alias)
    }
}

fn shared_payload(incoming: &Incoming<'_>) -> Bytes {
    incoming.message().payload.clone()
}
