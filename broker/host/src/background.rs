//! Calls that no client waits for: events and changes of filters, and in [`crate::feeder`] messages that are committed.
//! Each plugin has a task for each, with an instance of its own.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tracing::{debug, warn};

use crate::call::{Fault, Question, Said, put};
use crate::cluster::InterestChanged;
use crate::events::Observed;
use crate::feeder::Feeder;
use crate::generation::Generation;
use crate::instance::Pooled;
use crate::plugin::Plugin;
use crate::queue::{Queue, Weight};

/// Messages, events or changes shown at once, and their bytes.
pub(crate) const BATCH_MAX: usize = 512;
pub(crate) const BATCH_BYTES_MAX: usize = 1 << 20;
/// Wait after a failure.
const PAUSE: Duration = Duration::from_millis(100);

/// An instance that lives as long as its build serves and answers.
#[derive(Default)]
pub(crate) struct Seat {
    generation: Option<Arc<Generation>>,
    pooled: Option<Pooled>,
}

impl Seat {
    pub(crate) async fn ask<Q: Question + Sync>(&mut self, plugin: &Plugin, question: &Q) -> Result<Q::Answer, Fault> {
        let Some(serving) = plugin.serving.load_full() else { return Err(Fault::Busy("no build serves".into())) };
        if !self.generation.as_ref().is_some_and(|mine| Arc::ptr_eq(mine, &serving)) {
            self.pooled = None;
            self.generation = Some(Arc::clone(&serving));
        }
        plugin.counters.background_called();
        serving.calls.fetch_add(1, Ordering::Relaxed);
        let deadline = serving.deadline();
        let call = async {
            let mut pooled = match self.pooled.take() {
                Some(pooled) => pooled,
                None => serving.instantiate(&plugin.background, None).await.map_err(Fault::NoInstance)?,
            };
            let Some(running) = pooled.begin() else { return Err(Fault::Broke("no instance".into())) };
            let budget = serving.budget_of(&plugin.background, Q::cpu_ms(&serving.config.limits));
            let said = put(running, question, budget, &serving).await;
            let said = said.map_err(|error| Fault::Broke(serving.explained(running, error)))?;
            pooled.finished();
            self.pooled = Some(pooled);
            match said {
                Said::Answer(answer) => Ok(answer),
                Said::Failure(text) => Err(Fault::Failure(text)),
                Said::Nonsense(text) => Err(Fault::Broke(text)),
            }
        };
        let late = || Err(Fault::Late(format!("no answer within deadline_ms = {}", deadline.as_millis())));
        let answer = tokio::time::timeout(deadline, call).await.unwrap_or_else(|_| late());
        if answer.is_err() {
            plugin.counters.background_failed();
            serving.failures.fetch_add(1, Ordering::Relaxed);
        }
        answer
    }
}

/// Starts what a plugin's build wants and is not running yet.
pub(crate) fn start(plugin: &Arc<Plugin>, runtime: &tokio::runtime::Handle) {
    let Some(serving) = plugin.serving.load_full() else { return };
    let wanted = serving.registration();
    if wanted.committed && serving.exports.storage_hook.is_some() && plugin.feed.waiting.begins() {
        runtime.spawn(Feeder::new(plugin).run());
    }
    if serving.exports.cluster.is_some() && plugin.interest.begins() {
        runtime.spawn(tell_interest(Arc::clone(plugin)));
    }
    if wanted.events != 0 && serving.exports.events.is_some() && plugin.events.begins() {
        runtime.spawn(watch(Arc::clone(plugin)));
    }
}

/// The oldest with their numbers, at most `items_max`; `None`: the plugin is gone.
pub(crate) async fn next<T: Weight + Clone>(
    plugin: &Plugin,
    queue: &Queue<T>,
    items_max: usize,
) -> Option<Vec<(u64, T)>> {
    loop {
        if plugin.is_gone() {
            queue.ends();
            // It may have come back meanwhile, and its build may have found that somebody works on this.
            if plugin.is_gone() || !queue.begins() {
                return None;
            }
        }
        let batch = queue.peek(items_max, BATCH_BYTES_MAX);
        if !batch.is_empty() {
            return Some(batch);
        }
        queue.changed().await;
    }
}

/// The oldest, which are taken out of the queue before the plugin is asked: a batch that breaks it must not come again.
async fn take<T: Weight + Clone>(plugin: &Plugin, queue: &Queue<T>) -> Option<Vec<T>> {
    let batch = next(plugin, queue, BATCH_MAX).await?;
    if let Some((last, _)) = batch.last() {
        queue.pass(*last);
    }
    Some(batch.into_iter().map(|(_, item)| item).collect())
}

async fn tell_interest(plugin: Arc<Plugin>) {
    let mut seat = Seat::default();
    while let Some(changes) = take(&plugin, &plugin.interest).await {
        match seat.ask(&plugin, &InterestChanged::of(&changes)).await {
            Ok(advert) => debug!(plugin = %plugin.name, bytes = advert.len(), "no other broker to tell"),
            Err(fault) => {
                let error = fault.into_text();
                warn!(plugin = %plugin.name, %error, "plugin could not be told of subscriptions");
                plugin.rest(PAUSE).await;
            }
        }
    }
}

async fn watch(plugin: Arc<Plugin>) {
    let mut seat = Seat::default();
    while let Some(events) = take(&plugin, &plugin.events).await {
        let count = events.len();
        if let Err(fault) = seat.ask(&plugin, &Observed(events)).await {
            let error = fault.into_text();
            warn!(plugin = %plugin.name, %error, lost = count, "plugin could not be told of events");
            plugin.rest(PAUSE).await;
        }
    }
}
