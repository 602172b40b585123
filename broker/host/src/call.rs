//! One question to one plugin, and what happens when no answer comes.

use std::hash::BuildHasher;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::sync::SemaphorePermit;
use tracing::{info, warn};
use wasmqtt_protocol::text::escaped;

use crate::breaker::Begun;
use crate::config::{OnError, PluginLimits};
use crate::instance::{Budget, Running, metered};
use crate::shard::{PluginSlots, Slot};

/// Log lines about failed calls: at most one per shard and plugin in this time.
const LOG_PAUSE: Duration = Duration::from_secs(1);

/// How long a client waits for a build whose answer does not count.
const SHADOW_PATIENCE: Duration = Duration::from_millis(20);
/// So many late answers of it in a row, and it is not asked for so long; after that one more is enough.
const LATE_IN_ROW_MAX: u32 = 5;
const LATE_PAUSE: Duration = Duration::from_secs(10);

/// Bytes of questions to one plugin that may wait for an instance, per shard, and what each costs beside its own. More
/// are answered by `on_error`.
const WAITING_BYTES_MAX: usize = 16 << 20;
const WAITING_OVERHEAD_BYTES: usize = 1024;

/// Bytes of a Client Identifier in the log.
const CLIENT_ID_BYTES_MAX: usize = 256;

/// Bytes of an answer, and of what is handed to one function of the broker.
pub(crate) const ANSWER_BYTES_MAX: usize = 4 << 20;

/// What a plugin can be asked.
pub(crate) trait Question {
    type Answer;

    /// Whose sake it is asked for; for the breaker and the log.
    fn client_id(&self) -> &str;

    /// `false`: about several clients at a time, none of whom is to blame for a failure.
    fn is_about_one(&self) -> bool {
        true
    }

    /// Bytes the question holds while it waits.
    fn bytes(&self) -> usize;

    /// Bytes the answer may have; copying more would hold up the shard.
    fn answer_bytes_max(&self) -> usize {
        ANSWER_BYTES_MAX
    }

    /// How long the plugin may compute.
    fn cpu_ms(limits: &PluginLimits) -> u64;

    /// Whether two builds say the same.
    fn agree(one: &Self::Answer, other: &Self::Answer) -> bool;

    /// The answer when none comes.
    fn fallback(&self, on_error: OnError) -> Self::Answer;

    /// Asks. An error is a trap.
    fn put(
        &self,
        running: &mut Running,
        plugin: &Arc<str>,
    ) -> impl Future<Output = wasmtime::Result<Said<Self::Answer>>> + Send;
}

/// What came back from a plugin.
pub(crate) enum Said<T> {
    Answer(T),
    /// It says that it cannot tell.
    Failure(String),
    /// It makes no sense.
    Nonsense(String),
}

impl<T> Said<T> {
    pub(crate) fn nonsense(what: impl Into<String>) -> Self {
        Self::Nonsense(what.into())
    }

    pub(crate) fn from_checked(checked: Result<T, String>) -> Self {
        checked.map_or_else(Self::Nonsense, Self::Answer)
    }
}

/// Why there is no answer.
pub(crate) enum Fault {
    /// The plugin was not asked: too many wait already, or no instance became free in time.
    Busy(String),
    /// The plugin says that it cannot tell.
    Failure(String),
    /// A fresh instance could not be made.
    NoInstance(String),
    /// No answer in time; mostly because something that the plugin waits for did not answer.
    Late(String),
    /// Trap, too much computing, or an answer that makes no sense.
    Broke(String),
}

impl Fault {
    pub(crate) fn into_text(self) -> String {
        match self {
            Self::Busy(text) | Self::Failure(text) | Self::NoInstance(text) | Self::Late(text) | Self::Broke(text) => {
                text
            }
        }
    }
}

/// Asks the build that is to serve this client, and one that runs in the shadow besides.
pub(crate) async fn consult<Q: Question>(plugin: &PluginSlots, question: &Q) -> Q::Answer {
    match &plugin.tried {
        Some(tried) if tried.trial.serves(question.client_id()) => ask(&tried.slot, question).await,
        _ => compared(&plugin.serving, plugin.shadow(), question).await,
    }
}

/// Asks a build, and one in its shadow, whose answer does not count.
pub(crate) async fn compared<Q: Question>(slot: &Slot, shadow: Option<&Slot>, question: &Q) -> Q::Answer {
    let answer = ask(slot, question).await;
    if let Some(shadow) = shadow
        && !shadow.lateness.get().is_left_alone(Instant::now())
    {
        compare(shadow, question, &answer).await;
    }
    answer
}

async fn compare<Q: Question>(slot: &Slot, question: &Q, answer: &Q::Answer) {
    let other = tokio::time::timeout(SHADOW_PATIENCE, ask(slot, question)).await;
    slot.lateness.set(slot.lateness.get().after(other.is_err(), Instant::now()));
    let Ok(other) = other else {
        let (plugin, generation) = (&slot.generation.name, slot.generation.number);
        if slot.lateness.get().is_left_alone(Instant::now()) {
            let pause_secs = LATE_PAUSE.as_secs();
            info!(%plugin, generation, pause_secs, "shadow is too slow to be compared, it is left alone for a while");
        }
        return;
    };
    slot.generation.compared.fetch_add(1, Ordering::Relaxed);
    if !Q::agree(answer, &other) {
        slot.generation.differs.fetch_add(1, Ordering::Relaxed);
        note_difference(slot, question.client_id());
    }
}

/// Answers of a shadow that came too late, in a row. Each costs the instance that was to give it.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Lateness {
    in_row: u32,
    last: Option<Instant>,
}

impl Lateness {
    fn after(self, is_late: bool, now: Instant) -> Self {
        if is_late { Self { in_row: self.in_row.saturating_add(1), last: Some(now) } } else { Self::default() }
    }

    fn is_left_alone(self, now: Instant) -> bool {
        self.in_row >= LATE_IN_ROW_MAX && self.last.is_some_and(|last| now.duration_since(last) < LATE_PAUSE)
    }
}

fn note_difference(slot: &Slot, client_id: &str) {
    let (logged, left_out) = slot.logged.get();
    let now = Instant::now();
    if logged.is_some_and(|at| now.duration_since(at) < LOG_PAUSE) {
        slot.logged.set((logged, left_out + 1));
        return;
    }
    slot.logged.set((Some(now), 0));
    let (plugin, generation) = (&slot.generation.name, slot.generation.number);
    let client_id = escaped(client_id, CLIENT_ID_BYTES_MAX);
    info!(%plugin, generation, %client_id, left_out, "shadow answers otherwise than the serving build");
}

/// Asks, and turns everything that goes wrong into what `on_error` says.
pub(crate) async fn ask<Q: Question>(slot: &Slot, question: &Q) -> Q::Answer {
    let generation = &slot.generation;
    let on_error = generation.config.on_error;
    let client = slot.hasher.hash_one(question.client_id());
    if slot.breaker.borrow_mut().refuses(client, Instant::now) {
        generation.plugin.counters.shard(slot.shard).refused.fetch_add(1, Ordering::Relaxed);
        return question.fallback(on_error);
    }
    let begun = slot.breaker.borrow().begun();
    let counters = generation.plugin.counters.shard(slot.shard);
    let tries = if on_error == OnError::Retry { 2 } else { 1 };
    for _ in 0..tries {
        counters.calls.fetch_add(1, Ordering::Relaxed);
        generation.calls.fetch_add(1, Ordering::Relaxed);
        let fault = match call_in_time(slot, question, begun).await {
            Ok(answer) => {
                slot.breaker.borrow_mut().answered();
                return answer;
            }
            Err(fault) => fault,
        };
        counters.failures.fetch_add(1, Ordering::Relaxed);
        generation.failures.fetch_add(1, Ordering::Relaxed);
        note(slot, question, (client, begun), fault);
    }
    question.fallback(on_error)
}

fn note<Q: Question>(slot: &Slot, question: &Q, (client, begun): (u64, Begun), fault: Fault) {
    let (plugin, generation) = (&slot.generation.name, slot.generation.number);
    let now = Instant::now();
    if question.is_about_one()
        && matches!(fault, Fault::Broke(_) | Fault::Late(_) | Fault::NoInstance(_))
        && let Some(pause) = slot.breaker.borrow_mut().broke(client, begun, matches!(fault, Fault::Broke(_)), now)
    {
        slot.generation.plugin.counters.breaker_opened.fetch_add(1, Ordering::Relaxed);
        warn!(%plugin, generation, pause_ms = pause.as_millis() as u64, "plugin keeps failing, circuit breaker open");
    }
    let (logged, left_out) = slot.logged.get();
    if logged.is_some_and(|at| now.duration_since(at) < LOG_PAUSE) {
        slot.logged.set((logged, left_out + 1));
        return;
    }
    slot.logged.set((Some(now), 0));
    let client_id = escaped(question.client_id(), CLIENT_ID_BYTES_MAX);
    let error = fault.into_text();
    warn!(%plugin, generation, %client_id, %error, left_out, "plugin call failed");
}

/// The deadline counts from when an instance is there.
async fn call_in_time<Q: Question>(slot: &Slot, question: &Q, begun: Begun) -> Result<Q::Answer, Fault> {
    let permit = if let Ok(permit) = slot.permits.try_acquire() {
        permit
    } else {
        let permit = wait_for_turn(slot, question).await?;
        if slot.breaker.borrow().begun() != begun {
            return Err(Fault::Busy("the circuit breaker opened while it waited for an instance".into()));
        }
        permit
    };
    let deadline = slot.generation.deadline();
    let answer = tokio::time::timeout(deadline, call(slot, question)).await;
    drop(permit);
    answer.unwrap_or_else(|_| Err(Fault::Late(format!("no answer within deadline_ms = {}", deadline.as_millis()))))
}

async fn wait_for_turn<'a, Q: Question>(slot: &'a Slot, question: &Q) -> Result<SemaphorePermit<'a>, Fault> {
    let _waiting = Waiting::new(slot, question.bytes())?;
    let queue_ms = slot.generation.config.limits.queue_ms;
    let permit = tokio::time::timeout(Duration::from_millis(queue_ms), slot.permits.acquire()).await;
    let permit = permit.map_err(|_| Fault::Busy(format!("no instance was free within queue_ms = {queue_ms}")))?;
    permit.map_err(|error| Fault::Busy(error.to_string()))
}

async fn call<Q: Question>(slot: &Slot, question: &Q) -> Result<Q::Answer, Fault> {
    let generation = &slot.generation;
    let share = generation.plugin.share(slot.shard);
    let mut pooled = match generation.take_idle(slot.shard) {
        Some(pooled) => pooled,
        None => generation.instantiate(share, Some(slot.shard)).await.map_err(Fault::NoInstance)?,
    };
    let Some(running) = pooled.begin() else { return Err(Fault::Broke("no instance".into())) };
    let budget = generation.budget_of(share, Q::cpu_ms(&generation.config.limits));
    let said = put(running, question, budget, generation).await;
    let said = said.map_err(|error| Fault::Broke(generation.explained(running, error)))?;
    pooled.finished();
    generation.put_idle(slot.shard, pooled);
    match said {
        Said::Answer(answer) => Ok(answer),
        Said::Failure(text) => Err(Fault::Failure(text)),
        Said::Nonsense(text) => Err(Fault::Broke(text)),
    }
}

/// Asks one instance within a budget.
pub(crate) async fn put<Q: Question>(
    running: &mut Running,
    question: &Q,
    budget: Budget<'_>,
    generation: &crate::generation::Generation,
) -> Result<Said<Q::Answer>, String> {
    let meter = running.meter();
    running.store.set_epoch_deadline(1);
    running.store.data_mut().begin_call();
    running.store.set_hostcall_fuel(question.answer_bytes_max());
    metered(&generation.clock, &meter, budget, question.put(running, &generation.name)).await
}

/// Counts the bytes of a call that waits for an instance, also if it is dropped meanwhile.
struct Waiting<'a> {
    slot: &'a Slot,
    bytes: usize,
}

impl<'a> Waiting<'a> {
    fn new(slot: &'a Slot, bytes: usize) -> Result<Self, Fault> {
        let bytes = bytes + WAITING_OVERHEAD_BYTES;
        let waiting = slot.waiting_bytes.get() + bytes;
        if waiting > WAITING_BYTES_MAX && slot.waiting_bytes.get() > 0 {
            return Err(Fault::Busy(format!("{WAITING_BYTES_MAX} bytes of calls wait for an instance already")));
        }
        slot.waiting_bytes.set(waiting);
        Ok(Self { slot, bytes })
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.slot.waiting_bytes.set(self.slot.waiting_bytes.get() - self.bytes);
    }
}
