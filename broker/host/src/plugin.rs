//! What outlives the builds of a plugin: its numbers, and the messages and events that wait for it.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use tokio::sync::watch;
use wasmqtt_protocol::ports::{Buckets as Store, Event};

use crate::HostError;
use crate::allowance::Allowance;
use crate::config::PluginLimits;
use crate::counters::Counters;
use crate::feed::Feed;
use crate::generation::Generation;
use crate::held::Open;
use crate::keyvalue::Buckets;
use crate::metrics::Metrics;
use crate::queue::Queue;
use crate::share::Share;

/// Events that wait for one plugin, and their bytes.
const EVENTS_MAX: usize = 10_000;
const EVENTS_BYTES_MAX: usize = 16 << 20;
/// Changes of filters that wait for one plugin, and their bytes.
const INTEREST_MAX: usize = 100_000;
const INTEREST_BYTES_MAX: usize = 16 << 20;
/// Between two lines about messages that are dropped.
const COMPLAINT_PAUSE: Duration = Duration::from_secs(10);

/// One plugin, whatever build of it serves.
pub(crate) struct Plugin {
    pub(crate) name: Arc<str>,
    /// Its bit in `Interest`.
    pub(crate) bit: u64,
    pub(crate) counters: Counters,
    pub(crate) metrics: Metrics,
    pub(crate) buckets: Buckets,
    /// File descriptors of the broker that its instances hold.
    pub(crate) open: Open,
    /// Messages for `committed`.
    pub(crate) feed: Feed,
    /// For `observed`.
    pub(crate) events: Queue<Event>,
    /// Topic Filters that have got their first subscriber (`true`) or lost their last one.
    pub(crate) interest: Queue<(String, bool)>,
    /// What it computes on the thread of each shard.
    shares: Box<[Share]>,
    /// What its instances may ask of the broker, by shard, and where no client waits for it.
    allowances: Box<[Arc<Allowance>]>,
    background_allowance: Arc<Allowance>,
    /// What it computes where no client waits for it, and while it is loaded.
    pub(crate) background: Share,
    pub(crate) loading: Share,
    /// The build that serves.
    pub(crate) serving: ArcSwapOption<Generation>,
    /// No build serves: its file or its entry is gone, or the broker ends.
    gone: watch::Sender<bool>,
    /// When messages that were dropped were last complained of.
    complained: Mutex<Option<Instant>>,
}

impl Plugin {
    /// # Errors
    /// What it has kept cannot be read.
    pub(crate) fn new(
        name: &str,
        bit: u64,
        shards: usize,
        limits: &PluginLimits,
        store: Option<&Arc<dyn Store>>,
    ) -> Result<Arc<Self>, HostError> {
        let name: Arc<str> = name.into();
        Ok(Arc::new(Self {
            bit,
            counters: Counters::new(shards),
            metrics: Metrics::default(),
            buckets: Buckets::new(&name, store)?,
            open: Open::default(),
            feed: Feed::new(&name, limits, store),
            events: Queue::new(EVENTS_MAX, EVENTS_BYTES_MAX),
            interest: Queue::new(INTEREST_MAX, INTEREST_BYTES_MAX),
            shares: (0..shards.max(1)).map(|_| Share::default()).collect(),
            allowances: (0..shards.max(1)).map(|_| Allowance::new(&name)).collect(),
            background_allowance: Allowance::new(&name),
            background: Share::crowded(),
            loading: Share::default(),
            serving: ArcSwapOption::empty(),
            gone: watch::Sender::new(false),
            complained: Mutex::default(),
            name,
        }))
    }

    pub(crate) fn share(&self, shard: usize) -> &Share {
        &self.shares[shard % self.shares.len()]
    }

    /// `None`: where no client waits.
    pub(crate) fn allowance(&self, shard: Option<usize>) -> &Arc<Allowance> {
        shard.map_or(&self.background_allowance, |shard| &self.allowances[shard % self.allowances.len()])
    }

    fn all_shares(&self) -> impl Iterator<Item = &Share> {
        self.shares.iter().chain([&self.background, &self.loading])
    }

    /// Measured computing of all threads.
    pub(crate) fn cpu(&self) -> Duration {
        self.all_shares().map(Share::cpu).sum()
    }

    /// How often a call waited for its share of a thread.
    pub(crate) fn cpu_waits(&self) -> u64 {
        self.all_shares().map(Share::waits).sum()
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

    /// This build serves, perhaps after a time in which none did.
    pub(crate) fn begin(&self, serving: &Arc<Generation>) {
        self.serving.store(Some(Arc::clone(serving)));
        self.gone.send_replace(false);
    }

    /// No build serves any more.
    pub(crate) fn end(&self) {
        self.gone.send_replace(true);
        self.serving.store(None);
        self.feed.waiting.wake();
        self.events.wake();
        self.interest.wake();
    }

    pub(crate) fn is_gone(&self) -> bool {
        *self.gone.borrow()
    }

    /// Waits so long, or until it is gone.
    pub(crate) async fn rest(&self, pause: Duration) {
        let mut gone = self.gone.subscribe();
        let _ = tokio::time::timeout(pause, gone.wait_for(|gone| *gone)).await;
    }
}

#[cfg(test)]
mod tests {
    use wasmqtt_protocol::ports::{Client, EventKind};

    use super::*;
    use crate::background::{BATCH_BYTES_MAX, BATCH_MAX, next};

    fn plugin() -> Arc<Plugin> {
        Plugin::new("p", 1, 1, &PluginLimits::default(), None).expect("nothing was kept")
    }

    fn event(bytes: usize) -> Event {
        let client = Arc::new(Client { client_id: "c".into(), principal: "".into(), listener: "".into() });
        Event { kind: EventKind::Subscribed, at_ms: 0, client, fields: vec![("filter", "x".repeat(bytes))] }
    }

    #[test]
    fn events_and_filters_that_wait_are_bounded_in_number() {
        let plugin = plugin();
        plugin.events.push((0..EVENTS_MAX + 7).map(|_| event(0)));
        assert_eq!((plugin.events.len(), plugin.events.dropped()), (EVENTS_MAX, 7));
        plugin.interest.push((0..INTEREST_MAX + 7).map(|_| (String::new(), true)));
        assert_eq!((plugin.interest.len(), plugin.interest.dropped()), (INTEREST_MAX, 7));
    }

    /// One call is shown so many items, or so many bytes, and the rest waits for the next call.
    #[tokio::test]
    async fn a_batch_is_bounded_in_items_and_bytes() {
        let plugin = plugin();
        plugin.events.push((0..=2 * BATCH_MAX).map(|_| event(0)));
        let mut batches = Vec::new();
        while plugin.events.len() > 0 {
            let batch = next(&plugin, &plugin.events, BATCH_MAX).await.expect("the plugin is there");
            batches.push(batch.len());
            plugin.events.pass(batch.last().expect("never empty").0);
        }
        assert_eq!(batches, [BATCH_MAX, BATCH_MAX, 1]);
        for bytes in [BATCH_BYTES_MAX / 2, BATCH_BYTES_MAX / 3, BATCH_BYTES_MAX / 3, 2 * BATCH_BYTES_MAX, 0] {
            plugin.events.push(std::iter::once(event(bytes)));
        }
        batches.clear();
        while plugin.events.len() > 0 {
            let batch = next(&plugin, &plugin.events, BATCH_MAX).await.expect("the plugin is there");
            batches.push(batch.len());
            plugin.events.pass(batch.last().expect("never empty").0);
        }
        assert_eq!(batches, [2, 1, 1, 1], "one that is larger comes alone");
    }
}
