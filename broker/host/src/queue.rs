//! What waits for a plugin: bounded in items and in bytes.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use wasmqtt_protocol::ports::Event;

/// What an item costs beside its own bytes: its place in the queue and the allocations behind it.
pub(crate) const ITEM_OVERHEAD_BYTES: usize = 128;

/// What waits for a plugin, oldest first. When it is full the oldest are dropped and counted.
///
/// Each item has a number, one more than the item before; items that were removed leave gaps.
pub(crate) struct Queue<T> {
    items: Mutex<Items<T>>,
    items_max: usize,
    bytes_max: usize,
    dropped: AtomicU64,
    notify: Notify,
    started: AtomicBool,
}

struct Items<T> {
    waiting: VecDeque<(u64, T)>,
    bytes: usize,
    /// Number of the next item.
    next: u64,
}

impl<T: Weight> Items<T> {
    fn push_back(&mut self, item: T) {
        self.bytes += item.bytes();
        self.waiting.push_back((self.next, item));
        self.next += 1;
    }

    fn pop_front(&mut self) -> Option<T> {
        let (_, item) = self.waiting.pop_front()?;
        self.bytes -= item.bytes();
        Some(item)
    }

    fn place(&self, number: u64) -> Option<usize> {
        self.waiting.binary_search_by_key(&number, |(number, _)| *number).ok()
    }
}

/// Bytes of memory that an item holds.
pub(crate) trait Weight {
    fn bytes(&self) -> usize;
}

impl Weight for (String, bool) {
    fn bytes(&self) -> usize {
        ITEM_OVERHEAD_BYTES + self.0.len()
    }
}

impl Weight for Event {
    fn bytes(&self) -> usize {
        let client = &self.client;
        let fields: usize = self.fields.iter().map(|(_, value)| value.len() + 48).sum();
        ITEM_OVERHEAD_BYTES + client.client_id.len() + client.principal.len() + client.listener.len() + fields
    }
}

impl<T: Weight + Clone> Queue<T> {
    pub(crate) fn new(items_max: usize, bytes_max: usize) -> Self {
        Self {
            items: Mutex::new(Items { waiting: VecDeque::new(), bytes: 0, next: 1 }),
            items_max,
            bytes_max,
            dropped: AtomicU64::new(0),
            notify: Notify::new(),
            started: AtomicBool::new(false),
        }
    }

    fn items(&self) -> MutexGuard<'_, Items<T>> {
        self.items.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives back what had to make room.
    pub(crate) fn push(&self, new: impl Iterator<Item = T>) -> Vec<T> {
        let mut gone = Vec::new();
        let mut items = self.items();
        for item in new {
            items.push_back(item);
            while items.waiting.len() > self.items_max || items.bytes > self.bytes_max {
                let Some(oldest) = items.pop_front() else { break };
                self.dropped.fetch_add(1, Ordering::Relaxed);
                gone.push(oldest);
            }
        }
        drop(items);
        self.notify.notify_one();
        gone
    }

    /// Appends an item unless it would push others out.
    pub(crate) fn push_if_room(&self, item: T) -> Result<(), T> {
        let mut items = self.items();
        if items.waiting.len() >= self.items_max || items.bytes + item.bytes() > self.bytes_max {
            return Err(item);
        }
        items.push_back(item);
        drop(items);
        self.notify.notify_one();
        Ok(())
    }

    /// The oldest with their numbers; they stay in the queue. An item that is larger than `bytes_max` comes alone.
    pub(crate) fn peek(&self, items_max: usize, bytes_max: usize) -> Vec<(u64, T)> {
        let items = self.items();
        let mut bytes = 0;
        let fits = |entry: &&(u64, T)| {
            bytes += entry.1.bytes();
            bytes <= bytes_max
        };
        let mut batch: Vec<_> = items.waiting.iter().take(items_max).take_while(fits).cloned().collect();
        if batch.is_empty() {
            batch.extend(items.waiting.front().cloned());
        }
        batch
    }

    /// The item `place` places behind the oldest.
    pub(crate) fn at(&self, place: usize) -> Option<(u64, T)> {
        self.items().waiting.get(place).cloned()
    }

    pub(crate) fn get(&self, number: u64) -> Option<T> {
        let items = self.items();
        items.place(number).map(|place| items.waiting[place].1.clone())
    }

    /// Takes items out up to and including `number`; some of them may have been dropped meanwhile.
    pub(crate) fn pass(&self, number: u64) {
        let mut items = self.items();
        while items.waiting.front().is_some_and(|(front, _)| *front <= number) {
            items.pop_front();
        }
    }

    pub(crate) fn remove(&self, number: u64) -> Option<T> {
        let mut items = self.items();
        let place = items.place(number)?;
        let (_, item) = items.waiting.remove(place)?;
        items.bytes -= item.bytes();
        Some(item)
    }

    /// Whether whoever asks is the one who works on it from now on: nobody does so far.
    pub(crate) fn begins(&self) -> bool {
        !self.started.swap(true, Ordering::AcqRel)
    }

    /// Nobody works on it any more.
    pub(crate) fn ends(&self) {
        // Not a mere store: what was done before the last `begins` is to be seen by whoever calls this.
        self.started.swap(false, Ordering::AcqRel);
    }

    pub(crate) fn len(&self) -> usize {
        self.items().waiting.len()
    }

    pub(crate) fn bytes(&self) -> usize {
        self.items().bytes
    }

    pub(crate) fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    pub(crate) fn wake(&self) {
        self.notify.notify_one();
    }

    /// Until something may have come.
    pub(crate) async fn changed(&self) {
        self.notify.notified().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Weight for u32 {
        fn bytes(&self) -> usize {
            *self as usize
        }
    }

    #[test]
    fn the_oldest_are_dropped_and_counted() {
        let queue = Queue::<u32>::new(3, 100);
        queue.push([1, 2, 3, 4].into_iter());
        assert_eq!(queue.peek(10, 100), [(2, 2), (3, 3), (4, 4)]);
        queue.push([98].into_iter());
        assert_eq!(queue.peek(10, 100), [(5, 98)], "by bytes, too");
        assert_eq!((queue.len(), queue.bytes(), queue.dropped()), (1, 98, 4));
        assert_eq!(queue.push([101].into_iter()), [98, 101], "one that never fits");
        assert_eq!((queue.len(), queue.bytes()), (0, 0));
    }

    #[test]
    fn what_was_shown_is_passed_even_if_some_was_dropped_meanwhile() {
        let queue = Queue::<u32>::new(3, 100);
        queue.push([1, 2, 3].into_iter());
        let batch = queue.peek(2, 100);
        assert_eq!(batch, [(1, 1), (2, 2)]);
        queue.push([4].into_iter());
        queue.pass(2);
        assert_eq!(queue.peek(10, 100), [(3, 3), (4, 4)]);
    }

    #[test]
    fn one_large_item_is_a_batch_of_its_own() {
        let queue = Queue::<u32>::new(3, 100);
        queue.push([50, 1].into_iter());
        assert_eq!(queue.peek(10, 10), [(1, 50)]);
    }

    #[test]
    fn items_are_taken_out_of_the_middle() {
        let queue = Queue::<u32>::new(3, 100);
        queue.push([7, 8, 9].into_iter());
        assert_eq!((queue.remove(2), queue.remove(2), queue.get(2)), (Some(8), None, None));
        assert_eq!((queue.at(1), queue.get(3), queue.bytes()), (Some((3, 9)), Some(9), 16));
        assert_eq!(queue.push_if_room(85), Err(85), "others are not pushed out");
        assert_eq!(queue.push_if_room(84), Ok(()));
        assert_eq!(queue.peek(10, 1000), [(1, 7), (3, 9), (4, 84)]);
    }
}
