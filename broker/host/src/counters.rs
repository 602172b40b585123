//! What is counted about a plugin, over all its generations.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// One shard's share; alone on its cache lines, since it is written in every call.
#[derive(Default)]
#[repr(align(128))]
pub(crate) struct ShardCounters {
    pub(crate) calls: AtomicU64,
    pub(crate) failures: AtomicU64,
}

pub(crate) struct Counters {
    shards: Box<[ShardCounters]>,
    /// Running now, those on their way out included.
    pub(crate) instances: AtomicUsize,
}

impl Counters {
    pub(crate) fn new(shards: usize) -> Self {
        Self { shards: (0..shards.max(1)).map(|_| ShardCounters::default()).collect(), instances: AtomicUsize::new(0) }
    }

    pub(crate) fn shard(&self, index: usize) -> &ShardCounters {
        &self.shards[index % self.shards.len()]
    }

    pub(crate) fn calls(&self) -> u64 {
        self.shards.iter().map(|shard| shard.calls.load(Ordering::Relaxed)).sum()
    }

    pub(crate) fn failures(&self) -> u64 {
        self.shards.iter().map(|shard| shard.failures.load(Ordering::Relaxed)).sum()
    }
}
