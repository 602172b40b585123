//! Hands a plugin the messages that are committed: at least once, in order.
//!
//! A batch that fails is halved down to one message. If that one fails alone as well, it may be at fault itself, or the
//! plugin may fail for another reason, such as a server that is away:
//!
//! - A trap, or a failure of the kind `internal`, is the message's own fault, for a number of messages in a row.
//! - For any other failure another message is tried alone: if it succeeds, and the first one fails once more, the first
//!   one is at fault. While nothing succeeds everything waits, with longer and longer pauses.
//!
//! What is at fault is set aside, see [`crate::feed`], and the next message has its turn. A message that was tried alone
//! and succeeded, while others before it still wait, is shown again in its turn: order matters more than duplicates.

use std::sync::Arc;
use std::time::Duration;

use tracing::{info, warn};
use wasmqtt_protocol::text::escaped;

use crate::background::{BATCH_MAX, Seat, next};
use crate::call::Fault;
use crate::hook::{Committed, Shown};
use crate::plugin::Plugin;

/// Wait after a failure; doubles up to the longest.
const PAUSE: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_mins(1);
/// Batches that must succeed before a larger one is tried again.
const GOOD_IN_ROW: u32 = 8;
/// Messages in a row that are set aside because of traps, with no success in between: after that the plugin is at fault.
const TRAPS_IN_ROW_MAX: u32 = 100;
/// Bytes of a topic in the log.
const TOPIC_BYTES_MAX: usize = 256;

/// The task that hands over the messages of one plugin.
pub(crate) struct Feeder {
    plugin: Arc<Plugin>,
    seat: Seat,
    /// Messages in the next batch.
    size: usize,
    good: u32,
    pause: Duration,
    failures: u64,
    traps: u32,
    /// How far behind the oldest message the next one lies that is tried in its place.
    probe: usize,
}

impl Feeder {
    pub(crate) fn new(plugin: &Arc<Plugin>) -> Self {
        Self {
            plugin: Arc::clone(plugin),
            seat: Seat::default(),
            size: BATCH_MAX,
            good: 0,
            pause: PAUSE,
            failures: 0,
            traps: 0,
            probe: 1,
        }
    }

    /// Until the plugin is gone.
    pub(crate) async fn run(mut self) {
        let plugin = Arc::clone(&self.plugin);
        while let Some(batch) = next(&plugin, &plugin.feed.waiting, self.size).await {
            let first = batch[0].0;
            let last = batch[batch.len() - 1].0;
            let messages: Vec<Shown> = batch.into_iter().map(|(_, shown)| shown).collect();
            let count = messages.len();
            match self.ask(&messages).await {
                Ok(()) => {
                    self.passed(last, &messages);
                    self.grow();
                }
                Err(fault) if count > 1 => {
                    self.size = count / 2;
                    self.good = 0;
                    let error = self.note(fault, count, PAUSE);
                    plugin.feed.failed_together(first, &error);
                    plugin.rest(PAUSE).await;
                }
                Err(fault) => self.failed_alone(first, fault).await,
            }
        }
    }

    async fn ask(&mut self, messages: &[Shown]) -> Result<(), Fault> {
        let payload = self.plugin.serving.load().as_ref().is_some_and(|serving| serving.registration().payload);
        let is_taken = self.seat.ask(&self.plugin, &Committed { messages: messages.to_vec(), payload }).await?;
        if is_taken { Ok(()) } else { Err(Fault::Busy("not yet".into())) }
    }

    fn passed(&mut self, last: u64, messages: &[Shown]) {
        self.plugin.feed.waiting.pass(last);
        self.tell_store(messages);
        if self.failures > 0 {
            info!(plugin = %self.plugin.name, failures = self.failures, "plugin takes messages again");
        }
        (self.pause, self.failures, self.traps) = (PAUSE, 0, 0);
    }

    /// The store need not keep these messages for this plugin.
    fn tell_store(&self, messages: &[Shown]) {
        if let Some(serving) = self.plugin.serving.load_full() {
            serving.fed(messages);
        }
    }

    fn grow(&mut self) {
        self.good += 1;
        if self.size < BATCH_MAX && self.good >= GOOD_IN_ROW {
            (self.size, self.good) = ((self.size * 2).min(BATCH_MAX), 0);
        }
    }

    fn note(&mut self, fault: Fault, count: usize, pause: Duration) -> String {
        self.failures += 1;
        let (error, waiting) = (fault.into_text(), self.plugin.feed.waiting.len());
        let pause_ms = pause.as_millis() as u64;
        warn!(plugin = %self.plugin.name, %error, messages = count, waiting, pause_ms, "plugin did not take messages, will try again");
        error
    }

    /// The oldest message failed alone.
    async fn failed_alone(&mut self, number: u64, fault: Fault) {
        let is_its_own = matches!(fault, Fault::Broke(_));
        let pause = if is_its_own { PAUSE } else { self.pause };
        let error = self.note(fault, 1, pause);
        if self.plugin.feed.failed_alone(number, &error) {
            if is_its_own && self.traps < TRAPS_IN_ROW_MAX {
                self.traps += 1;
                self.set_aside(number);
                return;
            }
            if self.others_succeed(number).await {
                return;
            }
        }
        self.plugin.rest(pause).await;
        if !is_its_own || self.traps >= TRAPS_IN_ROW_MAX {
            self.pause = (self.pause * 2).min(PAUSE_MAX);
        }
    }

    /// Tries another message alone, and the oldest once more if that one succeeds. Returns whether the oldest is out of
    /// the way.
    async fn others_succeed(&mut self, oldest: u64) -> bool {
        let plugin = Arc::clone(&self.plugin);
        let behind = plugin.feed.waiting.len().saturating_sub(1);
        if behind == 0 {
            return false;
        }
        let place = self.probe.clamp(1, behind);
        let Some((number, other)) = plugin.feed.waiting.at(place) else { return false };
        if self.ask(std::slice::from_ref(&other)).await.is_err() {
            // Next, twice as far and so on up to the newest, then from the beginning.
            self.probe = if place == behind { 1 } else { (place * 2).min(behind) };
            return false;
        }
        self.pause = PAUSE;
        let Some(first) = plugin.feed.waiting.get(oldest) else { return true };
        match self.ask(std::slice::from_ref(&first)).await {
            Ok(()) => self.passed(oldest, &[first]),
            Err(fault) => {
                plugin.feed.failed_alone(oldest, &fault.into_text());
                self.set_aside(oldest);
                self.traps = 0;
                if place == 1 && plugin.feed.waiting.remove(number).is_some() {
                    self.tell_store(&[other]);
                }
                self.probe = (place - 1).max(1);
            }
        }
        true
    }

    fn set_aside(&mut self, number: u64) {
        let Some(shown) = self.plugin.feed.waiting.get(number) else { return };
        let gone = self.plugin.feed.set_aside(number);
        let (topic, bytes) = (escaped(&shown.message.topic, TOPIC_BYTES_MAX), shown.message.payload.len());
        let (plugin, aside) = (&self.plugin.name, self.plugin.feed.aside().0);
        warn!(%plugin, %topic, bytes, aside, "message set aside, the plugin cannot take it; see `wasmqtt plugin feed list`");
        if let Some(serving) = self.plugin.serving.load_full() {
            serving.lost(&gone);
        }
    }
}
