//! What a Session tells of itself for the store, and what it gets back from there.

use std::num::NonZeroU32;
use std::sync::Arc;

use smallvec::SmallVec;

use super::inflight::{Inflight, Phase};
use super::queue::{self, Parked, Queue};
use super::{Delivery, Session};
use crate::codec::{PacketId, Qos};
use crate::router::{Message, MessageId, SessionId, SessionKey};

/// A QoS 1 or 2 handshake of a Session that the store knows went on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// A message has got its Packet Identifier.
    Sent {
        /// That.
        packet_id: PacketId,
        /// Of the message.
        id: MessageId,
        /// At least once, or exactly once.
        qos: Qos,
    },
    /// A message is acknowledged, or was dropped: this Session does not need it any more.
    Done {
        /// If it had one.
        packet_id: Option<PacketId>,
        /// Of the message.
        id: MessageId,
    },
    /// PUBREC came: PUBREL is what is repeated from now on, and the message is not needed any more.
    Releasing {
        /// Of the handshake.
        packet_id: PacketId,
        /// Of the message; `None`: the store does not know it.
        id: Option<MessageId>,
    },
    /// PUBCOMP came.
    Released {
        /// Of the handshake.
        packet_id: PacketId,
    },
    /// A QoS 2 message of the client was taken over.
    Received {
        /// The client's.
        packet_id: PacketId,
    },
    /// PUBREL came: the Packet Identifier is free.
    ReceivedDone {
        /// The client's.
        packet_id: PacketId,
    },
}

impl Step {
    /// What is sent next says that this has happened: it must not be forgotten after that.
    pub fn is_promised(self) -> bool {
        match self {
            Self::Sent { qos, .. } => qos == Qos::ExactlyOnce,
            Self::Releasing { .. } | Self::Received { .. } | Self::ReceivedDone { .. } => true,
            Self::Done { .. } | Self::Released { .. } => false,
        }
    }
}

/// A message from the store, for one Session.
#[derive(Debug, Clone)]
pub struct Kept {
    /// The message.
    pub message: Arc<Message>,
    /// Storage hooks have to open it first, or could not.
    pub sealed: bool,
    /// See [`super::Wish::qos`].
    pub qos: Qos,
    /// See [`super::Wish::retain`].
    pub retain: bool,
    /// See [`super::Wish::ids`].
    pub ids: SmallVec<[NonZeroU32; 1]>,
}

/// What of a Session the store keeps.
#[derive(Debug, Default)]
pub(super) struct Steps {
    /// The Session's name in the store.
    name: Option<SessionId>,
    noted: Vec<Step>,
    /// Messages were asked for and are not here.
    pub(super) loading: bool,
    /// Counts what was asked for, so that an answer to an earlier connection is known.
    pub(super) turn: u32,
}

impl Steps {
    #[inline]
    pub(super) fn note(&mut self, step: Step) {
        if self.name.is_some() {
            self.noted.push(step);
        }
    }

    /// A message that the store may have is not needed any more.
    pub(super) fn done(&mut self, packet_id: Option<PacketId>, id: Option<MessageId>) {
        if let Some(id) = id {
            self.note(Step::Done { packet_id, id });
        }
    }

    pub(super) fn is_on(&self) -> bool {
        self.name.is_some()
    }
}

impl Session {
    /// As the store gave it back; its subscriptions come with [`Session::subscribe`].
    pub fn restored(
        client_id: Arc<str>,
        key: SessionKey,
        name: SessionId,
        expiry: u32,
        parked: Vec<Parked>,
        inflight: Vec<(u16, Option<(MessageId, Qos)>)>,
        received: Vec<u16>,
    ) -> Self {
        let mut session = Self::new(client_id, key);
        session.expiry = expiry;
        session.queue = Queue::restored(parked);
        session.inflight = Inflight::restored(inflight);
        session.received.extend(received);
        session.steps.name = Some(name);
        session
    }

    /// Its name in the store; `None`: it is not there.
    pub fn stored(&self) -> Option<SessionId> {
        self.steps.name
    }

    /// The store knows it from now on, by this name; handshakes that are under way are noted.
    pub fn keep(&mut self, name: SessionId) {
        self.steps.name = Some(name);
        for packet_id in &self.received {
            if let Some(packet_id) = PacketId::new(*packet_id) {
                self.steps.note(Step::Received { packet_id });
            }
        }
    }

    /// Handshakes went on since [`Session::take_steps`].
    #[inline]
    pub fn has_steps(&self) -> bool {
        !self.steps.noted.is_empty()
    }

    /// What went on since the last time, in order.
    pub fn take_steps(&mut self) -> Vec<Step> {
        std::mem::take(&mut self.steps.noted)
    }

    /// [`Session::begin_load`] would want some.
    #[inline]
    pub fn wants_load(&self) -> bool {
        self.stored().is_some()
            && self.link.is_some()
            && !self.steps.loading
            && (self.queue.missing().next().is_some() || self.inflight.waits_for_store())
    }

    /// Messages that have to come from the store before more can be sent, and a number to tell their arrival by; `None`:
    /// none at present.
    pub fn begin_load(&mut self) -> Option<(u32, Vec<MessageId>)> {
        if self.link.is_none() || self.steps.loading {
            return None;
        }
        let mut ids: Vec<MessageId> = self.inflight.missing().take(LOAD_MESSAGES_MAX).collect();
        if ids.len() < LOAD_MESSAGES_MAX {
            ids.extend(self.queue.missing());
        }
        if ids.is_empty() {
            return None;
        }
        self.steps.loading = true;
        self.steps.turn = self.steps.turn.wrapping_add(1);
        Some((self.steps.turn, ids))
    }

    /// They are here; those that are sealed still are kept for the next connection. `false`: for a connection that is
    /// gone.
    pub fn loaded(&mut self, turn: u32, messages: &[(MessageId, Option<Kept>)]) -> bool {
        if !self.steps.loading || turn != self.steps.turn {
            return false;
        }
        self.steps.loading = false;
        for (id, kept) in messages {
            if kept.as_ref().is_some_and(|kept| kept.sealed) {
                if !self.inflight.withhold(*id) {
                    self.queue.withhold(*id);
                }
                continue;
            }
            let delivery = kept.as_ref().map(|kept| queue::delivery(kept, *id));
            if !self.inflight.arrived(*id, delivery.clone()) {
                self.queue.arrived(*id, delivery);
            }
        }
        true
    }

    /// Messages that the store had when the broker began are older than it seemed: those that `is_old` expire so much
    /// earlier. Those that are in memory are about to be sent, and stay as they are.
    pub fn age(&mut self, is_old: impl Fn(MessageId) -> bool, by_ms: u64) {
        self.queue.age(is_old, by_ms);
    }

    /// Drops messages that waited too long; looks at `budget` of them, and takes that off it.
    pub fn drop_expired(&mut self, now_ms: u64, budget: &mut usize) -> usize {
        let expired = self.queue.take_expired(now_ms, budget);
        let count = expired.len();
        for id in expired {
            self.steps.done(None, Some(id));
        }
        count
    }

    /// Takes what came through Shared Subscriptions and was never sent, so that other members can have it.
    pub fn take_unsent_shared(&mut self) -> Vec<Delivery> {
        let shared = self.queue.take_shared();
        for delivery in &shared {
            self.steps.done(None, delivery.id);
        }
        shared
    }

    /// The Session ends: what other members of Shared Subscriptions may still get. QoS 2 messages that were sent are
    /// not given to anybody else. [MQTT-4.8.2-5]
    pub fn take_shared_at_end(&mut self) -> Vec<Delivery> {
        let mut left = Vec::new();
        for slot in self.inflight.drain() {
            let packet_id = slot.packet_id;
            match slot.phase {
                Phase::Publish(delivery) => {
                    self.steps.done(Some(packet_id), delivery.id);
                    if delivery.share.is_some() && delivery.qos == Qos::AtLeastOnce {
                        left.push(*delivery);
                    }
                }
                Phase::Parked(id, _) | Phase::Withheld(id, _) => self.steps.done(Some(packet_id), Some(id)),
                Phase::Release => self.steps.note(Step::Released { packet_id }),
                Phase::Done => {}
            }
        }
        left.extend(self.take_unsent_shared());
        for id in self.queue.clear() {
            self.steps.done(None, Some(id));
        }
        for packet_id in self.received.drain().filter_map(PacketId::new) {
            self.steps.note(Step::ReceivedDone { packet_id });
        }
        left
    }
}

/// Messages asked for at a time.
const LOAD_MESSAGES_MAX: usize = 512;
