//! What outlives the builds of a plugin: its numbers, and the messages and events that wait for it.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use tokio::sync::Notify;
use wasmqtt_protocol::ports::{Buckets as Store, Event};

use crate::counters::Counters;
use crate::generation::Generation;
use crate::hook::Shown;
use crate::keyvalue::Buckets;
use crate::metrics::Metrics;

/// Events that wait for one plugin.
const EVENTS_MAX: usize = 10_000;
/// Changes of filters that wait for one plugin.
const INTEREST_MAX: usize = 100_000;
/// Between two lines about messages that are dropped.
const COMPLAINT_PAUSE: Duration = Duration::from_secs(10);
/// Bytes of messages that wait for one plugin.
const FEED_BYTES_MAX: usize = 256 << 20;

/// One plugin, whatever build of it serves.
pub(crate) struct Plugin {
    pub(crate) name: Arc<str>,
    /// Its bit in `Interest`.
    pub(crate) bit: u64,
    pub(crate) counters: Counters,
    pub(crate) metrics: Metrics,
    pub(crate) buckets: Buckets,
    /// Messages for `committed`.
    pub(crate) feed: Queue<Shown>,
    /// For `observed`.
    pub(crate) events: Queue<Event>,
    /// Topic Filters that have got their first subscriber (`true`) or lost their last one.
    pub(crate) interest: Queue<(String, bool)>,
    /// The build that serves.
    pub(crate) serving: ArcSwapOption<Generation>,
    gone: AtomicBool,
    /// When messages that were dropped were last complained of.
    complained: Mutex<Option<Instant>>,
}

impl Plugin {
    pub(crate) fn new(
        name: &str,
        bit: u64,
        shards: usize,
        feed_messages_max: usize,
        store: Option<&Arc<dyn Store>>,
    ) -> Arc<Self> {
        let name: Arc<str> = name.into();
        Arc::new(Self {
            bit,
            counters: Counters::new(shards),
            metrics: Metrics::default(),
            buckets: Buckets::new(&name, store),
            feed: Queue::new(feed_messages_max, FEED_BYTES_MAX),
            events: Queue::new(EVENTS_MAX, usize::MAX),
            interest: Queue::new(INTEREST_MAX, usize::MAX),
            serving: ArcSwapOption::empty(),
            gone: AtomicBool::new(false),
            complained: Mutex::default(),
            name,
        })
    }

    /// Once in a while.
    pub(crate) fn may_complain(&self) -> bool {
        let mut last = self.complained.lock().unwrap_or_else(PoisonError::into_inner);
        let may = last.is_none_or(|at| at.elapsed() >= COMPLAINT_PAUSE);
        if may {
            *last = Some(Instant::now());
        }
        may
    }

    /// No build serves any more.
    pub(crate) fn end(&self) {
        self.gone.store(true, Ordering::Release);
        self.serving.store(None);
        self.feed.wake();
        self.events.wake();
        self.interest.wake();
    }

    pub(crate) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }
}

/// What waits for a plugin, oldest first. When it is full the oldest are dropped and counted.
pub(crate) struct Queue<T> {
    items: Mutex<Items<T>>,
    items_max: usize,
    bytes_max: usize,
    dropped: AtomicU64,
    notify: Notify,
    started: AtomicBool,
}

struct Items<T> {
    waiting: VecDeque<T>,
    bytes: usize,
    /// Items that were taken for good or dropped, since the broker started: the cursor.
    passed: u64,
}

/// What an item takes.
pub(crate) trait Weight {
    fn bytes(&self) -> usize;
}

impl Weight for Shown {
    fn bytes(&self) -> usize {
        self.message.payload.len() + self.message.topic.len() + 128
    }
}

impl Weight for (String, bool) {
    fn bytes(&self) -> usize {
        1
    }
}

impl Weight for Event {
    fn bytes(&self) -> usize {
        1
    }
}

impl<T: Weight + Clone> Queue<T> {
    fn new(items_max: usize, bytes_max: usize) -> Self {
        let items = Items { waiting: VecDeque::new(), bytes: 0, passed: 0 };
        Self {
            items: Mutex::new(items),
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
            items.bytes += item.bytes();
            items.waiting.push_back(item);
            while items.waiting.len() > self.items_max || items.bytes > self.bytes_max {
                let Some(oldest) = items.waiting.pop_front() else { break };
                items.bytes -= oldest.bytes();
                items.passed += 1;
                self.dropped.fetch_add(1, Ordering::Relaxed);
                gone.push(oldest);
            }
        }
        drop(items);
        self.notify.notify_one();
        gone
    }

    /// The oldest, which stay, and the cursor before them.
    pub(crate) fn peek(&self, items_max: usize, bytes_max: usize) -> (Vec<T>, u64) {
        let items = self.items();
        let mut bytes = 0;
        let fits = |item: &&T| {
            bytes += item.bytes();
            bytes <= bytes_max
        };
        let mut batch: Vec<T> = items.waiting.iter().take(items_max).take_while(fits).cloned().collect();
        if batch.is_empty() {
            batch.extend(items.waiting.front().cloned());
        }
        (batch, items.passed)
    }

    /// Moves the cursor behind the first `count` of what [`Self::peek`] gave; some may have been dropped meanwhile.
    pub(crate) fn pass(&self, cursor: u64, count: usize) {
        let mut items = self.items();
        let until = cursor + count as u64;
        while items.passed < until {
            let Some(item) = items.waiting.pop_front() else { break };
            items.bytes -= item.bytes();
            items.passed += 1;
        }
    }

    /// Nobody works on it so far.
    pub(crate) fn is_first_start(&self) -> bool {
        !self.started.swap(true, Ordering::Relaxed)
    }

    pub(crate) fn len(&self) -> usize {
        self.items().waiting.len()
    }

    pub(crate) fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    fn wake(&self) {
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
        assert_eq!(queue.peek(10, 100), (vec![2, 3, 4], 1));
        queue.push([98].into_iter());
        assert_eq!(queue.peek(10, 100), (vec![98], 4), "by bytes, too");
        assert_eq!((queue.len(), queue.dropped()), (1, 4));
    }

    #[test]
    fn the_cursor_passes_what_was_shown_even_if_some_was_dropped_meanwhile() {
        let queue = Queue::<u32>::new(3, 100);
        queue.push([1, 2, 3].into_iter());
        let (batch, cursor) = queue.peek(2, 100);
        assert_eq!(batch, [1, 2]);
        queue.push([4].into_iter());
        queue.pass(cursor, batch.len());
        assert_eq!(queue.peek(10, 100).0, [3, 4]);
    }

    #[test]
    fn one_large_item_is_a_batch_of_its_own() {
        let queue = Queue::<u32>::new(3, 100);
        queue.push([50, 1].into_iter());
        assert_eq!(queue.peek(10, 10).0, [50]);
    }
}
