//! Messages that wait for a client: the first ones in memory, the others, if the store has them, only there.

use std::collections::VecDeque;
use std::sync::Arc;

use super::Delivery;
use crate::router::MessageId;

/// Messages and bytes that a Session holds in memory, where the store has them as well.
const WINDOW_MESSAGES_MAX: usize = 512;
const WINDOW_BYTES_MAX: usize = 512 * 1024;
/// Seconds of the broker's clock that stand for "never".
const NEVER: u32 = u32::MAX;

/// A message that only the store has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parked {
    /// Its name there.
    pub id: MessageId,
    /// What it counts for in the queue.
    pub bytes: u32,
    expires_s: u32,
}

impl Parked {
    /// `expires_at_ms`: broker clock.
    pub fn new(id: MessageId, bytes: usize, expires_at_ms: Option<u64>) -> Self {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        let seconds = |at: u64| u32::try_from(at.div_ceil(1000)).unwrap_or(NEVER);
        Self { id, bytes, expires_s: expires_at_ms.map_or(NEVER, seconds) }
    }

    fn is_expired(self, now_ms: u64) -> bool {
        self.expires_s != NEVER && u64::from(self.expires_s) * 1000 <= now_ms
    }
}

/// What a message counts for in a queue.
pub fn queued_bytes(topic: usize, properties: usize, payload: usize) -> usize {
    topic + properties + payload + 64
}

pub(super) fn bytes_of(delivery: &Delivery) -> usize {
    let message = &delivery.message;
    queued_bytes(message.topic.len(), message.properties.len(), message.payload.len())
}

fn parked(delivery: &Delivery, id: MessageId) -> Parked {
    Parked::new(id, bytes_of(delivery), delivery.message.expires_at_ms)
}

/// Oldest first.
#[derive(Debug, Default)]
pub(super) struct Queue {
    window: VecDeque<Delivery>,
    window_bytes: usize,
    parked: VecDeque<Parked>,
    parked_bytes: usize,
    /// So many of the oldest parked ones could not be opened: the next connection tries again.
    withheld: usize,
}

impl Queue {
    /// As it was when the broker ended.
    pub(super) fn restored(parked: Vec<Parked>) -> Self {
        let parked_bytes = parked.iter().map(|parked| parked.bytes as usize).sum();
        Self { parked: parked.into(), parked_bytes, ..Self::default() }
    }

    pub(super) fn len(&self) -> usize {
        self.window.len() + self.parked.len()
    }

    /// Some may be sent on this connection.
    pub(super) fn has_next(&self) -> bool {
        !self.window.is_empty() || self.parked.len() > self.withheld
    }

    /// Whether one more is within the bounds.
    pub(super) fn has_room_for(&self, bytes: usize, messages_max: usize, bytes_max: usize) -> bool {
        self.len() < messages_max && self.window_bytes + self.parked_bytes + bytes <= bytes_max
    }

    pub(super) fn is_full(&self, messages_max: usize, bytes_max: usize) -> bool {
        self.len() >= messages_max || self.window_bytes + self.parked_bytes >= bytes_max
    }

    /// Memory is for those that the client gets soon.
    pub(super) fn push(&mut self, delivery: Delivery) {
        let is_full = self.window.len() >= WINDOW_MESSAGES_MAX || self.window_bytes >= WINDOW_BYTES_MAX;
        match delivery.id {
            // Those of Shared Subscriptions may go to other members, and stay whole.
            Some(id) if delivery.share.is_none() && (is_full || self.parked.len() > self.withheld) => {
                self.push_parked(parked(&delivery, id));
            }
            _ => {
                self.window_bytes += bytes_of(&delivery);
                self.window.push_back(delivery);
            }
        }
    }

    pub(super) fn push_parked(&mut self, parked: Parked) {
        self.parked_bytes += parked.bytes as usize;
        self.parked.push_back(parked);
    }

    /// The oldest, if it is in memory.
    pub(super) fn pop(&mut self) -> Option<Delivery> {
        let delivery = self.window.pop_front()?;
        self.window_bytes -= bytes_of(&delivery);
        if self.window.is_empty() && self.window.capacity() > 64 {
            self.window = VecDeque::new();
        }
        Some(delivery)
    }

    /// Makes room; gives back what the store knew of the oldest.
    pub(super) fn drop_oldest(&mut self) -> Option<MessageId> {
        if self.withheld > 0 {
            self.withheld -= 1;
            return self.remove_parked(0).map(|parked| parked.id);
        }
        if let Some(delivery) = self.pop() {
            return delivery.id;
        }
        self.remove_parked(0).map(|parked| parked.id)
    }

    fn remove_parked(&mut self, place: usize) -> Option<Parked> {
        let parked = self.parked.remove(place)?;
        self.parked_bytes -= parked.bytes as usize;
        if self.parked.is_empty() {
            self.parked = VecDeque::new();
        }
        Some(parked)
    }

    /// What to get from the store next; empty: enough is here.
    pub(super) fn missing(&self) -> impl Iterator<Item = MessageId> {
        let is_low = self.window.len() <= WINDOW_MESSAGES_MAX / 2 && self.window_bytes <= WINDOW_BYTES_MAX / 2;
        let room = if is_low { WINDOW_MESSAGES_MAX - self.window.len() } else { 0 };
        let mut bytes = self.window_bytes;
        let fits = move |parked: &&Parked| {
            let is_first = bytes == 0;
            bytes += parked.bytes as usize;
            is_first || bytes <= WINDOW_BYTES_MAX
        };
        self.parked.iter().skip(self.withheld).take(room).take_while(fits).map(|parked| parked.id)
    }

    /// One that was [`Queue::missing`] is here, or (`None`) nowhere. Others may have been dropped meanwhile.
    pub(super) fn arrived(&mut self, id: MessageId, delivery: Option<Delivery>) {
        if !self.is_next(id) {
            return;
        }
        self.remove_parked(self.withheld);
        if let Some(delivery) = delivery {
            self.window_bytes += bytes_of(&delivery);
            self.window.push_back(delivery);
        }
    }

    /// One that was [`Queue::missing`] is here and cannot be opened.
    pub(super) fn withhold(&mut self, id: MessageId) {
        self.withheld += usize::from(self.is_next(id));
    }

    fn is_next(&self, id: MessageId) -> bool {
        self.parked.get(self.withheld).is_some_and(|parked| parked.id == id)
    }

    /// The client is gone: memory keeps only what the store does not have.
    pub(super) fn park(&mut self) {
        let withheld: Vec<Parked> = self.parked.drain(..std::mem::take(&mut self.withheld)).collect();
        let (kept, mut gone): (VecDeque<_>, VecDeque<_>) =
            self.window.drain(..).partition(|delivery| delivery.id.is_none() || delivery.share.is_some());
        while let Some(delivery) = gone.pop_back() {
            if let Some(id) = delivery.id {
                let parked = parked(&delivery, id);
                self.parked_bytes += parked.bytes as usize;
                self.parked.push_front(parked);
            }
        }
        for parked in withheld.into_iter().rev() {
            self.parked.push_front(parked);
        }
        self.window = kept;
        self.window.shrink_to_fit();
        self.window_bytes = self.window.iter().map(bytes_of).sum();
    }

    /// Takes those of Shared Subscriptions out.
    pub(super) fn take_shared(&mut self) -> Vec<Delivery> {
        if !self.window.iter().any(|delivery| delivery.share.is_some()) {
            return Vec::new();
        }
        let (shared, own): (VecDeque<_>, VecDeque<_>) =
            self.window.drain(..).partition(|delivery| delivery.share.is_some());
        self.window = own;
        self.window_bytes = self.window.iter().map(bytes_of).sum();
        shared.into()
    }

    /// Takes out what has expired, of those that only the store has; looks at `budget` at most.
    pub(super) fn take_expired(&mut self, now_ms: u64, budget: &mut usize) -> Vec<MessageId> {
        let looked_at = self.parked.len().min(*budget);
        *budget -= looked_at;
        if !self.parked.iter().take(looked_at).any(|parked| parked.is_expired(now_ms)) {
            return Vec::new();
        }
        let mut expired = Vec::new();
        let front: Vec<Parked> = self.parked.drain(..looked_at).collect();
        for (place, parked) in front.into_iter().enumerate().rev() {
            if parked.is_expired(now_ms) {
                self.parked_bytes -= parked.bytes as usize;
                self.withheld -= usize::from(place < self.withheld);
                expired.push(parked.id);
            } else {
                self.parked.push_front(parked);
            }
        }
        expired
    }

    /// See [`super::Session::age`].
    pub(super) fn age(&mut self, is_old: impl Fn(MessageId) -> bool, by_ms: u64) {
        for parked in self.parked.iter_mut().filter(|parked| parked.expires_s != NEVER && is_old(parked.id)) {
            let at_ms = (u64::from(parked.expires_s) * 1000).saturating_sub(by_ms);
            parked.expires_s = u32::try_from(at_ms.div_ceil(1000)).unwrap_or(NEVER);
        }
    }

    /// Empties it; gives back what the store knew.
    pub(super) fn clear(&mut self) -> Vec<MessageId> {
        let queue = std::mem::take(self);
        let here = queue.window.into_iter().filter_map(|delivery| delivery.id);
        here.chain(queue.parked.into_iter().map(|parked| parked.id)).collect()
    }
}

/// A message of the store as a delivery.
pub(super) fn delivery(kept: &super::Kept, id: MessageId) -> Delivery {
    Delivery {
        message: Arc::clone(&kept.message),
        qos: kept.qos,
        retain: kept.retain,
        ids: kept.ids.clone(),
        id: Some(id),
        share: None,
        kept_as: None,
    }
}
