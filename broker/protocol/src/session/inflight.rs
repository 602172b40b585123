//! Packet Identifiers in use towards the client, and the QoS 1 and QoS 2 handshakes behind them. MQTT 5.0 §4.3.

use std::collections::VecDeque;
use std::num::NonZeroU16;

use super::Delivery;
use crate::codec::PacketId;

/// Where one outgoing message stands.
#[derive(Debug)]
pub(super) enum Phase {
    /// PUBLISH sent or to be sent; waits for PUBACK or PUBREC.
    Publish(Box<Delivery>),
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

    pub(super) fn has_room(&self) -> bool {
        self.slots.len() < SPAN_MAX
    }

    pub(super) fn has_unsent(&self) -> bool {
        self.unsent < self.slots.len()
    }

    /// Takes a message in as sent and gives it its Packet Identifier. [MQTT-2.2.1-4]
    pub(super) fn push_sent(&mut self, delivery: Delivery) -> PacketId {
        debug_assert!(!self.has_unsent() && self.has_room());
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
        slot.phase = Phase::Done;
        while matches!(self.slots.front(), Some(Slot { phase: Phase::Done, .. })) {
            self.slots.pop_front();
            self.unsent = self.unsent.saturating_sub(1);
        }
    }

    /// A new Network Connection: all must be sent again, in order. [MQTT-4.4.0-1]
    pub(super) fn rewind(&mut self) {
        self.outstanding = 0;
        self.unsent = 0;
        for slot in &mut self.slots {
            slot.sent = false;
        }
    }

    /// The next slot to send again, now counted as sent.
    pub(super) fn next_unsent(&mut self) -> Option<&mut Slot> {
        while let Some(slot) = self.slots.get(self.unsent) {
            let skip = slot.sent || matches!(slot.phase, Phase::Done);
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

    /// Removes everything; what was still waiting for PUBACK or PUBREC comes out, oldest first.
    pub(super) fn drain(&mut self) -> impl Iterator<Item = Delivery> + '_ {
        self.outstanding = 0;
        self.unsent = 0;
        self.slots.drain(..).filter_map(|slot| match slot.phase {
            Phase::Publish(delivery) => Some(*delivery),
            Phase::Release | Phase::Done => None,
        })
    }
}
