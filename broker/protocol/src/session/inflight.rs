//! Packet Identifiers in use towards the client, and the QoS 1 and QoS 2 handshakes behind them. MQTT 5.0 §4.3.

use std::collections::VecDeque;
use std::num::NonZeroU16;

use super::queue::bytes_of;
use super::{Delivery, LinkLimits, ServerLimits};
use crate::codec::{PacketId, Qos};
use crate::router::MessageId;

/// Where one outgoing message stands.
#[derive(Debug)]
pub(super) enum Phase {
    /// PUBLISH sent or to be sent; waits for PUBACK or PUBREC.
    Publish(Box<Delivery>),
    /// The same, with a message that only the store has.
    Parked(MessageId, Qos),
    /// The same, and it could not be opened: the next connection tries again.
    Withheld(MessageId, Qos),
    /// PUBREC arrived; waits for PUBCOMP. The message itself is no longer needed. [MQTT-4.3.3-5]
    Release,
    /// Acknowledged, but an older one is not: keeps the place until the front moves on.
    Done,
}

#[derive(Debug)]
pub(super) struct Slot {
    pub(super) packet_id: PacketId,
    pub(super) phase: Phase,
    /// Sent on this Network Connection.
    pub(super) sent: bool,
}

impl Slot {
    /// Not sent again on this Network Connection.
    fn is_passed_over(&self) -> bool {
        matches!(self.phase, Phase::Done | Phase::Withheld(..))
    }

    fn bytes(&self) -> usize {
        match &self.phase {
            Phase::Publish(delivery) => bytes_of(delivery),
            Phase::Parked(..) | Phase::Withheld(..) | Phase::Release | Phase::Done => 0,
        }
    }

    /// QoS and name of the message that waits for PUBACK or PUBREC.
    pub(super) fn message(&self) -> (Option<Qos>, Option<MessageId>) {
        match &self.phase {
            Phase::Publish(delivery) => (Some(delivery.qos), delivery.id),
            Phase::Parked(id, qos) | Phase::Withheld(id, qos) => (Some(*qos), Some(*id)),
            Phase::Release | Phase::Done => (None, None),
        }
    }
}

/// Outgoing messages that are not yet acknowledged, oldest first.
///
/// Packet Identifiers are given in sequence, so the place of one is found by subtraction. Clients acknowledge in order
/// [MQTT-4.6.0-2]; one that leaves its oldest message unacknowledged gets at most `SPAN_MAX` after it.
#[derive(Debug, Default)]
pub struct Inflight {
    slots: VecDeque<Slot>,
    next: u16,
    /// Slots that are sent on this Network Connection and not done.
    outstanding: usize,
    /// Index of the first slot that may be unsent.
    unsent: usize,
    /// Bytes of the messages that are held in memory here.
    bytes: usize,
}

/// Most places from the oldest unacknowledged message on.
const SPAN_MAX: usize = 65_000;

impl Inflight {
    /// Messages sent on this Network Connection and not acknowledged.
    pub fn outstanding(&self) -> usize {
        self.outstanding
    }

    /// No message is under way.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// A message that was not sent before may be sent: within the client's Receive Maximum, and within the bytes that
    /// this server holds for a client that does not acknowledge. [MQTT-3.3.4-9]
    #[inline]
    pub(super) fn takes_more(&self, client: &LinkLimits, server: &ServerLimits) -> bool {
        self.outstanding < usize::from(client.receive_maximum)
            && self.bytes < server.inflight_bytes_max
            && self.slots.len() < SPAN_MAX
    }

    pub(super) fn has_unsent(&self) -> bool {
        self.unsent < self.slots.len()
    }

    /// Takes a message in as sent and gives it its Packet Identifier. [MQTT-2.2.1-4]
    pub(super) fn push_sent(&mut self, delivery: Delivery) -> PacketId {
        debug_assert!(!self.has_unsent() && self.slots.len() < SPAN_MAX);
        self.bytes += bytes_of(&delivery);
        self.next = if self.next == u16::MAX { 1 } else { self.next + 1 };
        let packet_id = NonZeroU16::new(self.next).unwrap_or(NonZeroU16::MIN);
        self.slots.push_back(Slot { packet_id, phase: Phase::Publish(Box::new(delivery)), sent: true });
        self.unsent = self.slots.len();
        self.outstanding += 1;
        packet_id
    }

    fn place(&self, packet_id: PacketId) -> Option<usize> {
        let front = self.slots.front()?.packet_id.get();
        let place = if packet_id.get() >= front {
            usize::from(packet_id.get() - front)
        } else {
            // 0 is not an identifier, so a lap has 65 535 places.
            usize::from(u16::MAX - front) + usize::from(packet_id.get())
        };
        (place < self.slots.len()).then_some(place)
    }

    pub(super) fn get_mut(&mut self, packet_id: PacketId) -> Option<&mut Slot> {
        let place = self.place(packet_id)?;
        self.slots.get_mut(place).filter(|slot| !matches!(slot.phase, Phase::Done))
    }

    /// Ends a handshake; gives the message back if its PUBLISH was what waited.
    pub(super) fn finish(&mut self, packet_id: PacketId) {
        let Some(place) = self.place(packet_id) else { return };
        let slot = &mut self.slots[place];
        if matches!(slot.phase, Phase::Done) {
            return;
        }
        if slot.sent {
            self.outstanding -= 1;
        }
        self.bytes -= slot.bytes();
        slot.phase = Phase::Done;
        while matches!(self.slots.front(), Some(Slot { phase: Phase::Done, .. })) {
            self.slots.pop_front();
            self.unsent = self.unsent.saturating_sub(1);
        }
    }

    /// The client has a QoS 2 message: it is no longer needed, its Packet Identifier is. [MQTT-4.3.3-5]
    pub(super) fn release(&mut self, packet_id: PacketId) {
        let Some(place) = self.place(packet_id) else { return };
        self.bytes -= self.slots[place].bytes();
        self.slots[place].phase = Phase::Release;
    }

    /// A new Network Connection: all must be sent again, in order. [MQTT-4.4.0-1]
    pub(super) fn rewind(&mut self) {
        self.outstanding = 0;
        self.unsent = 0;
        for slot in &mut self.slots {
            slot.sent = false;
        }
    }

    /// As it was when the broker ended; identifiers in any order.
    pub(super) fn restored(mut used: Vec<(u16, Option<(MessageId, Qos)>)>) -> Self {
        used.sort_unstable_by_key(|(packet_id, _)| *packet_id);
        // They are a run that may go round the end: it begins after the widest gap.
        let gap_before = |place: usize| match place.checked_sub(1) {
            Some(before) => used[place].0 - used[before].0,
            None => used[0].0 + (u16::MAX - used[used.len() - 1].0),
        };
        let Some(first) = (0..used.len()).max_by_key(|place| gap_before(*place)) else { return Self::default() };
        used.rotate_left(first);
        let mut inflight = Self::default();
        for (packet_id, message) in used {
            let Some(packet_id) = NonZeroU16::new(packet_id) else { continue };
            while !inflight.slots.is_empty() && inflight.following() != packet_id {
                let between = inflight.following();
                inflight.push(between, Phase::Done);
            }
            inflight.push(packet_id, message.map_or(Phase::Release, |(id, qos)| Phase::Parked(id, qos)));
        }
        inflight
    }

    fn following(&self) -> PacketId {
        let next = if self.next == u16::MAX { 1 } else { self.next + 1 };
        NonZeroU16::new(next).unwrap_or(NonZeroU16::MIN)
    }

    fn push(&mut self, packet_id: PacketId, phase: Phase) {
        self.next = packet_id.get();
        self.slots.push_back(Slot { packet_id, phase, sent: false });
    }

    /// The client is gone: memory keeps only the messages that the store does not have.
    pub(super) fn park(&mut self) {
        for slot in &mut self.slots {
            match &slot.phase {
                Phase::Publish(delivery) if delivery.share.is_none() => {
                    let Some(id) = delivery.id else { continue };
                    self.bytes -= bytes_of(delivery);
                    slot.phase = Phase::Parked(id, delivery.qos);
                }
                Phase::Withheld(id, qos) => slot.phase = Phase::Parked(*id, *qos),
                _ => {}
            }
        }
    }

    /// Messages that are to be sent again and that only the store has.
    pub(super) fn missing(&self) -> impl Iterator<Item = MessageId> {
        self.slots.iter().skip(self.unsent).filter_map(|slot| match slot.phase {
            Phase::Parked(id, _) => Some(id),
            _ => None,
        })
    }

    /// One that was [`Inflight::missing`] is here, or (`None`) nowhere; `false`: it is not one of these.
    pub(super) fn arrived(&mut self, id: MessageId, delivery: Option<Delivery>) -> bool {
        let Some(slot) = self.find_parked(id) else { return false };
        if let Some(delivery) = delivery {
            let bytes = bytes_of(&delivery);
            slot.phase = Phase::Publish(Box::new(delivery));
            self.bytes += bytes;
        } else {
            let packet_id = slot.packet_id;
            self.finish(packet_id);
        }
        true
    }

    /// One that was [`Inflight::missing`] is here and cannot be opened; `false`: it is not one of these.
    pub(super) fn withhold(&mut self, id: MessageId) -> bool {
        let Some(slot) = self.find_parked(id) else { return false };
        if let Phase::Parked(id, qos) = slot.phase {
            slot.phase = Phase::Withheld(id, qos);
        }
        true
    }

    fn find_parked(&mut self, id: MessageId) -> Option<&mut Slot> {
        let is_it = |slot: &&mut Slot| matches!(slot.phase, Phase::Parked(other, _) if other == id);
        self.slots.iter_mut().skip(self.unsent).find(is_it)
    }

    /// Nothing can be sent before the store has given the next message back.
    pub(super) fn waits_for_store(&self) -> bool {
        let next = self.slots.iter().skip(self.unsent).find(|slot| !slot.sent && !slot.is_passed_over());
        matches!(next, Some(Slot { phase: Phase::Parked(..), .. }))
    }

    /// The next slot to send again, now counted as sent.
    pub(super) fn next_unsent(&mut self) -> Option<&mut Slot> {
        while let Some(slot) = self.slots.get(self.unsent) {
            let skip = slot.sent || slot.is_passed_over();
            self.unsent += 1;
            if !skip {
                self.outstanding += 1;
                let slot = &mut self.slots[self.unsent - 1];
                slot.sent = true;
                return Some(slot);
            }
        }
        None
    }

    /// Removes everything, oldest first.
    pub(super) fn drain(&mut self) -> impl Iterator<Item = Slot> + '_ {
        self.outstanding = 0;
        self.unsent = 0;
        self.bytes = 0;
        self.slots.drain(..)
    }
}
