//! Calls that no client waits for: messages that are kept, and events. Each plugin has a task for each, with an
//! instance of its own.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tracing::{debug, info, warn};

use crate::call::{Fault, Question, Said, put};
use crate::cluster::InterestChanged;
use crate::events::Observed;
use crate::generation::Generation;
use crate::hook::Committed;
use crate::instance::Pooled;
use crate::plugin::{Plugin, Queue, Weight};

/// Messages or events shown at once, and bytes of messages.
const BATCH_MAX: usize = 512;
const BATCH_BYTES_MAX: usize = 1 << 20;
/// Wait after a failure; doubles up to the longest.
const PAUSE: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_mins(1);

/// An instance that lives as long as its build serves and answers.
#[derive(Default)]
struct Seat {
    generation: Option<Arc<Generation>>,
    pooled: Option<Pooled>,
}

impl Seat {
    async fn ask<Q: Question + Sync>(&mut self, plugin: &Plugin, question: &Q) -> Result<Q::Answer, Fault> {
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
                None => serving.instantiate().await.map_err(Fault::NoInstance)?,
            };
            let Some(running) = pooled.begin() else { return Err(Fault::Broke("no instance".into())) };
            let cpu = Duration::from_millis(Q::cpu_ms(&serving.config.limits));
            let said = put(running, question, cpu, &serving).await;
            let said = said.map_err(|error| Fault::Broke(serving.explained(running, error)))?;
            pooled.finished();
            self.pooled = Some(pooled);
            match said {
                Said::Answer(answer) => Ok(answer),
                Said::Failure(text) => Err(Fault::Failure(text)),
                Said::Nonsense(text) => Err(Fault::Broke(text)),
            }
        };
        let late = || Err(Fault::Broke(format!("no answer within deadline_ms = {}", deadline.as_millis())));
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
    if wanted.committed && serving.exports.storage_hook.is_some() && plugin.feed.is_first_start() {
        runtime.spawn(feed(Arc::clone(plugin)));
    }
    if serving.exports.cluster.is_some() && plugin.interest.is_first_start() {
        runtime.spawn(tell_interest(Arc::clone(plugin)));
    }
    if wanted.events != 0 && serving.exports.events.is_some() && plugin.events.is_first_start() {
        runtime.spawn(watch(Arc::clone(plugin)));
    }
}

async fn next<T: Weight + Clone>(plugin: &Plugin, queue: &Queue<T>) -> Option<(Vec<T>, u64)> {
    loop {
        if plugin.is_gone() {
            return None;
        }
        let (batch, cursor) = queue.peek(BATCH_MAX, BATCH_BYTES_MAX);
        if !batch.is_empty() {
            return Some((batch, cursor));
        }
        queue.changed().await;
    }
}

/// At least once, in order: the cursor moves when the plugin says so.
async fn feed(plugin: Arc<Plugin>) {
    let mut seat = Seat::default();
    let mut pause = PAUSE;
    let mut failures = 0_u64;
    while let Some((messages, cursor)) = next(&plugin, &plugin.feed).await {
        let count = messages.len();
        let payload = plugin.serving.load().as_ref().is_some_and(|serving| serving.registration().payload);
        match seat.ask(&plugin, &Committed { messages: messages.clone(), payload }).await {
            Ok(true) => {
                plugin.feed.pass(cursor, count);
                if let Some(serving) = plugin.serving.load_full() {
                    serving.fed(&messages);
                }
                if failures > 0 {
                    info!(plugin = %plugin.name, failures, "plugin takes messages again");
                }
                (pause, failures) = (PAUSE, 0);
                continue;
            }
            Ok(false) => {}
            Err(fault) => {
                failures += 1;
                let (error, waiting) = (fault.into_text(), plugin.feed.len());
                let pause_ms = pause.as_millis() as u64;
                warn!(plugin = %plugin.name, %error, waiting, pause_ms, "plugin did not take messages, will try again");
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

async fn tell_interest(plugin: Arc<Plugin>) {
    let mut seat = Seat::default();
    while let Some((changes, cursor)) = next(&plugin, &plugin.interest).await {
        let count = changes.len();
        plugin.interest.pass(cursor, count);
        match seat.ask(&plugin, &InterestChanged::of(&changes)).await {
            Ok(advert) => debug!(plugin = %plugin.name, bytes = advert.len(), "no other broker to tell"),
            Err(fault) => {
                let error = fault.into_text();
                warn!(plugin = %plugin.name, %error, "plugin could not be told of subscriptions");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

async fn watch(plugin: Arc<Plugin>) {
    let mut seat = Seat::default();
    while let Some((events, cursor)) = next(&plugin, &plugin.events).await {
        let count = events.len();
        // Taken before the plugin is asked: a batch that breaks it must not come again.
        plugin.events.pass(cursor, count);
        if let Err(fault) = seat.ask(&plugin, &Observed(events)).await {
            let error = fault.into_text();
            warn!(plugin = %plugin.name, %error, lost = count, "plugin could not be told of events");
            tokio::time::sleep(PAUSE).await;
        }
    }
}
