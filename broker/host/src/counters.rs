//! What is counted about a plugin, over all its generations.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// One shard's share; alone on its cache lines, since it is written in every call.
#[derive(Default)]
#[repr(align(128))]
pub(crate) struct ShardCounters {
    pub(crate) calls: AtomicU64,
    pub(crate) failures: AtomicU64,
    /// Answered without the plugin, because it keeps failing.
    pub(crate) refused: AtomicU64,
}

pub(crate) struct Counters {
    shards: Box<[ShardCounters]>,
    /// Running now, those on their way out included.
    pub(crate) instances: AtomicUsize,
    /// How often it was left alone.
    pub(crate) breaker_opened: AtomicU64,
    /// How often a build went back to its predecessor by itself.
    pub(crate) rolled_back: AtomicU64,
    /// What it tried without a grant.
    pub(crate) denied: AtomicU64,
}

impl Counters {
    pub(crate) fn new(shards: usize) -> Self {
        Self {
            shards: (0..shards.max(1)).map(|_| ShardCounters::default()).collect(),
            instances: AtomicUsize::new(0),
            breaker_opened: AtomicU64::new(0),
            rolled_back: AtomicU64::new(0),
            denied: AtomicU64::new(0),
        }
    }

    pub(crate) fn shard(&self, index: usize) -> &ShardCounters {
        &self.shards[index % self.shards.len()]
    }

    /// A call that belongs to no shard.
    pub(crate) fn background_called(&self) {
        self.shards[0].calls.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn background_failed(&self) {
        self.shards[0].failures.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn calls(&self) -> u64 {
        self.shards.iter().map(|shard| shard.calls.load(Ordering::Relaxed)).sum()
    }

    pub(crate) fn refused(&self) -> u64 {
        self.shards.iter().map(|shard| shard.refused.load(Ordering::Relaxed)).sum()
    }

    pub(crate) fn failures(&self) -> u64 {
        self.shards.iter().map(|shard| shard.failures.load(Ordering::Relaxed)).sum()
    }
}
