//! The Session itself.

use std::num::NonZeroU16;
use std::sync::Arc;

use hashbrown::{HashMap, HashSet};

use super::inflight::{Inflight, Phase};
use super::queue::Queue;
use super::reading::Reading;
use super::replay::Replays;
use super::steps::Steps;
use super::{Link, Outbox, ServerLimits, Step};
use crate::codec::{
    Ack, Auth, Packet, PacketId, Publish, Qos, ReasonCode, Subscribe, Unsubscribe, UserProperties, encode,
};
use crate::router::{Availability, Available, Message, SessionKey, Subscription};
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

type Submitted = HashMap<u16, bool, foldhash::fast::RandomState>;
/// Most that one level of a filter costs in the index, its name apart, in bytes: a node of the tree and its parent's table.
const LEVEL_BYTES: usize = 320;

/// Most that a subscription with this filter costs, in bytes: its text in the Session and in the index, and a node of
/// the index for each level. Less if others subscribe to the same filter.
pub fn subscription_bytes(filter: &Filter) -> usize {
    let levels = filter.topic_filter().split('/').count();
    2 * filter.as_str().len() + 2 * size_of::<(Filter, Subscription)>() + levels * LEVEL_BYTES
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
    /// In the order of their filters: most Sessions have one or two, and a hash table for these is four times as large.
    subscriptions: Vec<(Filter, Subscription)>,
    /// What they cost here and in the index, see [`subscription_bytes`].
    subscription_bytes: usize,
    /// When its queue is full.
    pub queue_policy: QueuePolicy,
    pub(super) inflight: Inflight,
    pub(super) queue: Queue,
    pub(super) steps: Steps,
    /// Packet Identifiers of QoS 2 messages that were routed and wait for PUBREL. [MQTT-4.3.3-10]
    pub(super) received: HashSet<u16, foldhash::fast::RandomState>,
    /// Packet Identifiers of QoS 2 messages that wait to be taken over; `true`: the client sent PUBLISH again meanwhile.
    /// In memory only: what was not acknowledged is repeated by the client. `None`: there are none.
    submitted: Option<Box<Submitted>>,
    /// Retained messages that were not sent so far. `None`: there are none.
    pub(super) replays: Option<Box<Replays>>,
    pub(super) link: Option<Box<Link>>,
    pub(super) expiry: u32,
    pub(super) availability: Arc<Availability>,
    pub(super) shares: usize,
    pub(super) reading: Reading,
}

impl Session {
    /// A Session without state or Network Connection.
    pub fn new(client_id: Arc<str>, key: SessionKey) -> Self {
        Self {
            client_id,
            key,
            will: None,
            subscriptions: Vec::new(),
            subscription_bytes: 0,
            queue_policy: QueuePolicy::default(),
            inflight: Inflight::default(),
            queue: Queue::default(),
            steps: Steps::default(),
            received: HashSet::default(),
            submitted: None,
            replays: None,
            link: None,
            expiry: 0,
            availability: Arc::default(),
            shares: 0,
            reading: Reading::default(),
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

    /// Its queue holds half of the bytes it may.
    pub fn is_half_full(&self, server: &ServerLimits) -> bool {
        self.queue.is_full(usize::MAX, server.queue_bytes_max.div_ceil(2))
    }

    /// Shared with the router, which skips members that cannot take more.
    pub fn availability(&self) -> &Arc<Availability> {
        &self.availability
    }

    /// The subscriptions, in the order of their filters.
    pub fn subscriptions(&self) -> impl Iterator<Item = (&Filter, &Subscription)> {
        self.subscriptions.iter().map(|(filter, subscription)| (filter, subscription))
    }

    fn place_of(&self, filter: &Filter) -> Result<usize, usize> {
        self.subscriptions.binary_search_by(|(known, _)| known.cmp(filter))
    }

    /// How many subscriptions it has.
    pub fn subscription_count(&self) -> usize {
        self.subscriptions.len()
    }

    /// Bytes that its subscriptions cost, an upper estimate.
    pub fn subscription_bytes(&self) -> usize {
        self.subscription_bytes
    }

    /// The subscription with this filter.
    pub fn subscription(&self, filter: &Filter) -> Option<&Subscription> {
        self.place_of(filter).ok().map(|at| &self.subscriptions[at].1)
    }

    /// Keeps a subscription; gives back the one it replaces. [MQTT-3.8.4-3]
    pub fn subscribe(&mut self, filter: Filter, subscription: Subscription) -> Option<Subscription> {
        self.reading.forget();
        match self.place_of(&filter) {
            Ok(at) => Some(std::mem::replace(&mut self.subscriptions[at].1, subscription)),
            Err(at) => {
                self.shares += usize::from(filter.share().is_some());
                self.subscription_bytes += subscription_bytes(&filter);
                if self.subscriptions.is_empty() {
                    self.subscriptions.reserve_exact(1);
                }
                self.subscriptions.insert(at, (filter, subscription));
                None
            }
        }
    }

    /// Ends a subscription; `false` if there was none.
    pub fn unsubscribe(&mut self, filter: &Filter) -> bool {
        let Ok(at) = self.place_of(filter) else { return false };
        self.reading.forget();
        self.subscriptions.remove(at);
        self.advance_replay(filter, None);
        self.subscription_bytes -= subscription_bytes(filter);
        self.shares -= usize::from(filter.share().is_some());
        true
    }

    /// A Network Connection begins, after its CONNACK was written: sends again what was not acknowledged, then what
    /// was queued. [MQTT-4.4.0-1]
    pub fn connected(&mut self, now_ms: u64, link: Link, server: &ServerLimits, out: &mut Outbox) {
        self.connected_held(link);
        self.release(now_ms, false, server, out);
    }

    /// The same, where permissions have to be looked at first: nothing is sent before [`Session::release`].
    pub fn connected_held(&mut self, link: Link) {
        self.expiry = link.limits.session_expiry;
        self.link = Some(Box::new(link));
        self.inflight.rewind();
        self.reading.hold();
        self.availability.set(Available::Busy);
    }

    /// The Network Connection is gone.
    pub fn disconnected(&mut self) {
        self.link = None;
        self.reading.reset();
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
            // It is acknowledged when it was taken over, and not before.
            if let Some(is_repeated) = self.submitted.as_mut().and_then(|waiting| waiting.get_mut(&packet_id.get())) {
                *is_repeated = true;
                return Ok(Event::None);
            }
            let waiting = self.submitted.as_ref().map_or(0, |waiting| waiting.len());
            if self.received.len() + waiting >= usize::from(server.receive_maximum) {
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
        let old = link.aliases_in[place].as_ref().map_or(0, |old| old.len());
        let bytes = link.alias_bytes_in - old + topic.len();
        if bytes > link.alias_bytes_max {
            // The client may count on an alias that it was allowed to set, so none can be forgotten instead.
            return Err(fault(ReasonCode::QUOTA_EXCEEDED, "Topic Names with aliases above topic_alias_bytes_max"));
        }
        link.alias_bytes_in = bytes;
        link.aliases_in[place] = Some(topic.into());
        Ok(None)
    }

    /// A QoS 2 message waits to be taken over: the same packet again is no second message, and is not acknowledged
    /// either. The store is told when it was taken over, together with the message. [MQTT-4.3.3-10]
    pub fn submitted(&mut self, packet_id: PacketId) {
        self.submitted.get_or_insert_default().insert(packet_id.get(), false);
    }

    /// The message was taken over by the broker (or refused, with an error): acknowledges it.
    pub fn published(&mut self, qos: Qos, packet_id: Option<PacketId>, reason: ReasonCode, out: &mut Outbox) {
        let Some(packet_id) = packet_id else { return };
        if qos == Qos::ExactlyOnce && !reason.is_error() {
            self.accepted(packet_id);
        }
        self.acknowledge(qos, packet_id, reason, out);
    }

    /// A QoS 2 message was taken over, and is acknowledged later.
    pub fn accepted(&mut self, packet_id: PacketId) {
        self.take_over(packet_id, ReasonCode::SUCCESS);
    }

    /// Acknowledges a message; one with QoS 2 that is not refused was [`Session::accepted`].
    pub fn acknowledge(&mut self, qos: Qos, packet_id: PacketId, reason: ReasonCode, out: &mut Outbox) {
        match qos {
            Qos::AtMostOnce => {}
            Qos::AtLeastOnce => self.send_ack(Packet::Puback, packet_id, reason, out),
            Qos::ExactlyOnce => {
                if reason.is_error() {
                    self.take_over(packet_id, reason);
                    self.forget_received(packet_id);
                }
                self.send_ack(Packet::Pubrec, packet_id, reason, out);
            }
        }
    }

    /// A QoS 2 message that came over an earlier Network Connection was taken over, or refused. `true`: the client has
    /// sent PUBLISH again, and is to be acknowledged; if it does so later, what is noted here answers. [MQTT-4.3.3-10]
    pub fn published_earlier(&mut self, packet_id: PacketId, reason: ReasonCode) -> bool {
        self.take_over(packet_id, reason)
    }

    /// A QoS 2 message waits no more; `true`: the client has repeated it meanwhile.
    fn take_over(&mut self, packet_id: PacketId, reason: ReasonCode) -> bool {
        let is_repeated = self.submitted.as_mut().and_then(|waiting| waiting.remove(&packet_id.get()));
        self.submitted.take_if(|waiting| waiting.is_empty());
        if !reason.is_error() {
            self.received.insert(packet_id.get());
            self.steps.note(Step::Received { packet_id });
        }
        is_repeated.unwrap_or(false)
    }

    /// A QoS 2 message was not taken over after all: the same packet again is another message.
    pub fn forget_received(&mut self, packet_id: PacketId) {
        if self.received.remove(&packet_id.get()) {
            self.steps.note(Step::ReceivedDone { packet_id });
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
        self.inflight.release(ack.packet_id);
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
            Some(Phase::Publish(_) | Phase::Parked(..) | Phase::Withheld(..)) => {
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
}
