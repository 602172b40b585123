//! One question to one plugin, and what happens when no answer comes.

use std::cell::Cell;
use std::hash::BuildHasher;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tracing::warn;
use wasmqtt_protocol::ports::{AuthOutcome, AuthRequest, AuthStep, Grant};

use crate::bindings;
use crate::config::OnError;
use crate::instance::metered;
use crate::shard::{Slot, WAITING_MAX};

/// Log lines about failed calls: at most one per shard and plugin in this time.
const LOG_PAUSE: Duration = Duration::from_secs(1);

pub(crate) enum Question {
    Authenticate(Arc<AuthRequest>),
    Proceed(AuthStep),
}

impl Question {
    fn request(&self) -> &AuthRequest {
        match self {
            Self::Authenticate(request) => request,
            Self::Proceed(step) => &step.request,
        }
    }
}

/// Why there is no answer.
enum Fault {
    /// The plugin was not asked: too many wait already, or no instance became free in time.
    Busy(String),
    /// The plugin says that it cannot tell.
    Failure(String),
    /// A fresh instance could not be made.
    NoInstance(String),
    /// Trap, deadline or an answer that makes no sense.
    Broke(String),
}

impl Fault {
    fn into_text(self) -> String {
        match self {
            Self::Busy(text) | Self::Failure(text) | Self::NoInstance(text) | Self::Broke(text) => text,
        }
    }
}

/// Asks, and turns everything that goes wrong into what `on_error` says.
pub(crate) async fn ask(slot: &Slot, question: &Question) -> AuthOutcome {
    let generation = &slot.generation;
    let on_error = generation.config.on_error;
    let client = slot.hasher.hash_one(&question.request().client_id);
    if slot.breaker.borrow_mut().refuses(client, Instant::now) {
        return fallback(on_error);
    }
    let counters = generation.counters.shard(slot.shard);
    let tries = if on_error == OnError::Retry { 2 } else { 1 };
    for _ in 0..tries {
        counters.calls.fetch_add(1, Ordering::Relaxed);
        let fault = match call_in_time(slot, question).await {
            Ok(outcome) => {
                slot.breaker.borrow_mut().answered();
                return outcome;
            }
            Err(fault) => fault,
        };
        counters.failures.fetch_add(1, Ordering::Relaxed);
        note(slot, question, client, fault);
    }
    fallback(on_error)
}

fn fallback(on_error: OnError) -> AuthOutcome {
    match on_error {
        OnError::Deny | OnError::Retry => AuthOutcome::Unavailable,
        OnError::Allow => AuthOutcome::Allow(Grant::default()),
        OnError::Skip => AuthOutcome::Next,
    }
}

fn note(slot: &Slot, question: &Question, client: u64, fault: Fault) {
    let (plugin, generation) = (&slot.generation.name, slot.generation.number);
    let now = Instant::now();
    if matches!(fault, Fault::Broke(_) | Fault::NoInstance(_))
        && let Some(pause) = slot.breaker.borrow_mut().broke(client, now)
    {
        warn!(%plugin, generation, pause_ms = pause.as_millis() as u64, "plugin keeps failing, left alone for a while");
    }
    let (logged, left_out) = slot.logged.get();
    if logged.is_some_and(|at| now.duration_since(at) < LOG_PAUSE) {
        slot.logged.set((logged, left_out + 1));
        return;
    }
    slot.logged.set((Some(now), 0));
    let (client_id, error) = (&question.request().client_id, fault.into_text());
    warn!(%plugin, generation, %client_id, %error, left_out, "plugin call failed");
}

/// The deadline counts from the question, time in the queue included.
async fn call_in_time(slot: &Slot, question: &Question) -> Result<AuthOutcome, Fault> {
    let begun = Cell::new(false);
    let deadline = slot.generation.deadline();
    if let Ok(result) = tokio::time::timeout(deadline, call(slot, question, &begun)).await {
        return result;
    }
    let text = format!("no answer within deadline_ms = {}", deadline.as_millis());
    Err(if begun.get() { Fault::Broke(text) } else { Fault::Busy(text) })
}

async fn call(slot: &Slot, question: &Question, begun: &Cell<bool>) -> Result<AuthOutcome, Fault> {
    let permit = if let Ok(permit) = slot.permits.try_acquire() {
        permit
    } else {
        let _waiting = Waiting::new(slot)?;
        slot.permits.acquire().await.map_err(|error| Fault::Busy(error.to_string()))?
    };
    let generation = &slot.generation;
    let mut pooled = match generation.take_idle(slot.shard) {
        Some(pooled) => pooled,
        None => generation.instantiate().await.map_err(Fault::NoInstance)?,
    };
    begun.set(true);
    let missing = || Fault::Broke("it does not export auth".into());
    let running = pooled.begin().ok_or_else(missing)?;
    let meter = running.meter();
    let auth = running.auth.as_ref().ok_or_else(missing)?.wasmqtt_plugin_auth();
    running.store.set_epoch_deadline(1);
    let answer = match question {
        Question::Authenticate(request) => {
            let request = bindings::request(request);
            metered(&generation.clock, &meter, generation.cpu(), auth.call_authenticate(&mut running.store, &request))
                .await
        }
        Question::Proceed(step) => {
            let step = bindings::step(step);
            metered(&generation.clock, &meter, generation.cpu(), auth.call_proceed(&mut running.store, &step)).await
        }
    };
    let answer = answer.map_err(|error| Fault::Broke(generation.explained(running, error)))?;
    pooled.finished();
    generation.put_idle(slot.shard, pooled);
    drop(permit);
    let outcome = answer.map_err(|failure| Fault::Failure(bindings::failure(failure)))?;
    bindings::outcome(outcome, question.request(), &generation.name).map_err(Fault::Broke)
}

/// Counts a call that waits for an instance, also if it is dropped meanwhile.
struct Waiting<'a>(&'a Slot);

impl<'a> Waiting<'a> {
    fn new(slot: &'a Slot) -> Result<Self, Fault> {
        if slot.waiting.get() >= WAITING_MAX {
            return Err(Fault::Busy(format!("{WAITING_MAX} calls wait already")));
        }
        slot.waiting.set(slot.waiting.get() + 1);
        Ok(Self(slot))
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.set(self.0.waiting.get() - 1);
    }
}
