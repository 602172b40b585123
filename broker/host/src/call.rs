//! One question to one plugin, and what happens when no answer comes.

use std::collections::VecDeque;
use std::hash::BuildHasher;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tracing::warn;
use wasmqtt_protocol::ports::{AuthOutcome, AuthRequest, AuthStep, Grant};

use crate::bindings;
use crate::config::OnError;
use crate::shard::{Slot, WAITING_MAX};

pub(crate) enum Question {
    Authenticate(Arc<AuthRequest>),
    Proceed(AuthStep),
}

impl Question {
    fn client_id(&self) -> &str {
        match self {
            Self::Authenticate(request) => &request.client_id,
            Self::Proceed(step) => &step.request.client_id,
        }
    }
}

/// Asks, and turns everything that goes wrong into what `on_error` says.
pub(crate) async fn ask(slot: &Slot, question: &Question) -> AuthOutcome {
    let generation = &slot.generation;
    let on_error = generation.config.on_error;
    let client = foldhash(question.client_id());
    if slot.failures.borrow().refuses(client, Instant::now()) {
        return fallback(on_error);
    }
    let tries = if on_error == OnError::Retry { 2 } else { 1 };
    for _ in 0..tries {
        generation.calls.fetch_add(1, Ordering::Relaxed);
        match call(slot, question).await {
            Ok(outcome) => {
                slot.failures.borrow_mut().succeeded();
                return outcome;
            }
            Err(error) => {
                generation.failures.fetch_add(1, Ordering::Relaxed);
                if let Some(left_out) = slot.failures.borrow_mut().failed(client, Instant::now()) {
                    let (plugin, client_id) = (&generation.name, question.client_id());
                    warn!(%plugin, generation = generation.number, client_id, %error, left_out, "plugin call failed");
                }
            }
        }
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

fn foldhash(client_id: &str) -> u64 {
    std::hash::BuildHasherDefault::<std::hash::DefaultHasher>::default().hash_one(client_id)
}

async fn call(slot: &Slot, question: &Question) -> Result<AuthOutcome, String> {
    if slot.waiting.get() >= WAITING_MAX {
        return Err(format!("busy: {WAITING_MAX} calls wait already"));
    }
    slot.waiting.set(slot.waiting.get() + 1);
    let waiting = Waiting(slot);
    let permit = slot.permits.acquire().await.map_err(|error| error.to_string())?;
    drop(waiting);
    let idle = slot.idle.borrow_mut().pop();
    let mut pooled = match idle {
        Some(pooled) => pooled,
        None => slot.generation.instance().await?,
    };
    slot.generation.clock.wake();
    let Some(running) = pooled.begin() else { return Err("the instance is gone".into()) };
    let meter = running.meter();
    let Some(auth) = &running.auth else { return Err("it does not export auth".into()) };
    running.store.set_epoch_deadline(1);
    let (cpu, deadline) = (slot.generation.cpu(), slot.generation.deadline());
    let auth = auth.wasmqtt_plugin_auth();
    let answer = match question {
        Question::Authenticate(request) => {
            let request = bindings::request(request);
            let call = auth.call_authenticate(&mut running.store, &request);
            crate::instance::limited(&meter, cpu, deadline, call).await?
        }
        Question::Proceed(step) => {
            let step = bindings::step(step);
            let call = auth.call_proceed(&mut running.store, &step);
            crate::instance::limited(&meter, cpu, deadline, call).await?
        }
    };
    pooled.finished();
    slot.idle.borrow_mut().push(pooled);
    drop(permit);
    bindings::outcome(answer, &slot.generation.name)
}

/// Counts down also when the call is dropped while it waits.
struct Waiting<'a>(&'a Slot);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.set(self.0.waiting.get() - 1);
    }
}

/// Failing clients in [`WINDOW`] after which the plugin is left alone for a while.
const CLIENTS_MAX: usize = 5;
const WINDOW: Duration = Duration::from_secs(10);
/// How long it is left alone at first; doubles up to the longest.
const PAUSE: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_mins(1);
/// Failures remembered.
const RECENT_MAX: usize = 64;

/// A circuit breaker. Failures of one client count once, and that client is not asked about for [`WINDOW`]: a single
/// hostile client cannot switch a plugin off for all others.
#[derive(Default)]
pub(crate) struct Failures {
    recent: VecDeque<(Instant, u64)>,
    open_until: Option<Instant>,
    pause: Duration,
    logged: Option<Instant>,
    left_out: u64,
}

impl Failures {
    pub(crate) fn refuses(&self, client: u64, now: Instant) -> bool {
        self.open_until.is_some_and(|until| now < until)
            || self.recent.iter().any(|(at, other)| *other == client && now.duration_since(*at) < WINDOW)
    }

    fn succeeded(&mut self) {
        if self.open_until.take().is_some() {
            self.recent.clear();
            self.pause = Duration::ZERO;
        }
    }

    /// `Some` when it is time for a log line, with the number of lines left out before.
    fn failed(&mut self, client: u64, now: Instant) -> Option<u64> {
        self.recent.retain(|(at, other)| now.duration_since(*at) < WINDOW && *other != client);
        if self.recent.len() == RECENT_MAX {
            self.recent.pop_front();
        }
        self.recent.push_back((now, client));
        if self.recent.len() >= CLIENTS_MAX {
            self.pause = (self.pause * 2).clamp(PAUSE, PAUSE_MAX);
            self.open_until = Some(now + self.pause);
        }
        if self.logged.is_some_and(|at| now.duration_since(at) < Duration::from_secs(1)) {
            self.left_out += 1;
            return None;
        }
        self.logged = Some(now);
        Some(std::mem::take(&mut self.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_client_cannot_open_the_breaker() {
        let mut failures = Failures::default();
        let now = Instant::now();
        for _ in 0..100 {
            failures.failed(1, now);
        }
        assert!(failures.refuses(1, now), "the client itself waits");
        assert!(!failures.refuses(2, now));
        assert!(!failures.refuses(1, now + WINDOW));
    }

    #[test]
    fn many_clients_open_it_for_longer_and_longer_and_a_success_closes_it() {
        let mut failures = Failures::default();
        let now = Instant::now();
        for client in 0..5 {
            failures.failed(client, now);
        }
        assert!(failures.refuses(99, now));
        assert!(!failures.refuses(99, now + PAUSE));
        failures.failed(6, now + PAUSE);
        assert!(failures.refuses(99, now + PAUSE + PAUSE));
        failures.succeeded();
        assert!(!failures.refuses(99, now));
    }
}
