//! One running component: its store, what it exports, and the measure of its computing time.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use wasmqtt_protocol::text::escaped;
use wasmtime::{Engine, Store, UpdateDeadline};

use crate::bindings::TEXT_BYTES_MAX;
use crate::call::ANSWER_BYTES_MAX;
use crate::engine::{Clock, thread_cpu_ns};
use crate::exports::Exports;
use crate::grants::Mounts;
use crate::guest::Guest;
use crate::plugin::Plugin;
use crate::reaper::Grave;
use crate::share::Share;

/// A store with its instance and the interfaces it exports.
pub(crate) struct Running {
    pub(crate) store: Store<Guest>,
    pub(crate) exports: Exports,
    meter: Arc<Meter>,
    /// Files the guest may open at any time; they go when the last instance does.
    _mounts: Arc<Mounts>,
    plugin: Arc<Plugin>,
}

impl Running {
    /// A store that gives its thread back at every tick, and stops guests that compute too long.
    pub(crate) fn store(engine: &Engine, guest: Guest) -> (Store<Guest>, Arc<Meter>) {
        let meter = Arc::new(Meter::default());
        let mut store = Store::new(engine, guest);
        store.limiter(|guest| &mut guest.limits);
        store.set_hostcall_fuel(ANSWER_BYTES_MAX);
        let watched = Arc::clone(&meter);
        store.epoch_deadline_callback(move |mut store| {
            if watched.is_over() {
                let budget_ms = watched.budget.load(Ordering::Relaxed) / 1_000_000;
                return Err(wasmtime::Error::msg(format!("computed longer than cpu_ms = {budget_ms}")));
            }
            Ok(match store.data_mut().pause() {
                None => UpdateDeadline::Yield(1),
                Some(pause) => UpdateDeadline::YieldCustom(1, Box::pin(tokio::time::sleep(pause))),
            })
        });
        (store, meter)
    }

    pub(crate) fn new(
        (store, meter): (Store<Guest>, Arc<Meter>),
        exports: Exports,
        mounts: Arc<Mounts>,
        plugin: Arc<Plugin>,
    ) -> Self {
        plugin.counters.instances.fetch_add(1, Ordering::Relaxed);
        Self { store, exports, meter, _mounts: mounts, plugin }
    }

    pub(crate) fn plugin(&self) -> Arc<Plugin> {
        Arc::clone(&self.plugin)
    }

    pub(crate) fn meter(&self) -> Arc<Meter> {
        Arc::clone(&self.meter)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.plugin.counters.instances.fetch_sub(1, Ordering::Relaxed);
    }
}

/// [`Meter::polled_at`] during the first poll of a call.
const NOT_MEASURED: u64 = u64::MAX;

/// CPU time of one call, over all the polls it takes.
///
/// The first poll is not measured: it ends with the next tick at the latest, most calls need no second one, and reading
/// the clock would cost a short call a tenth of its time.
///
/// In nanoseconds of [`thread_cpu_ns`].
#[derive(Default)]
pub(crate) struct Meter {
    spent: AtomicU64,
    polled_at: AtomicU64,
    budget: AtomicU64,
}

impl Meter {
    fn is_over(&self) -> bool {
        let polled_at = self.polled_at.load(Ordering::Relaxed);
        if polled_at == NOT_MEASURED {
            return false;
        }
        let now = thread_cpu_ns().saturating_sub(polled_at);
        self.spent.load(Ordering::Relaxed) + now > self.budget.load(Ordering::Relaxed)
    }
}

/// How long a guest may compute, and what it takes of the thread it runs on.
#[derive(Clone, Copy)]
pub(crate) struct Budget<'a> {
    /// It traps when it has computed so long.
    pub(crate) cpu: Duration,
    pub(crate) share: &'a Share,
    /// Of the thread's time, while others have work for it.
    pub(crate) percent: u8,
}

/// Runs guest code within a budget.
pub(crate) async fn metered<T>(
    clock: &Clock,
    meter: &Meter,
    budget: Budget<'_>,
    call: impl Future<Output = wasmtime::Result<T>>,
) -> Result<T, String> {
    meter.spent.store(0, Ordering::Relaxed);
    meter.budget.store(budget.cpu.as_nanos() as u64, Ordering::Relaxed);
    let call = std::pin::pin!(call);
    Metered { clock, meter, budget, call, again: false, pause: None }.await.map_err(|error| one_line(&error))
}

/// The chain of causes without the backtrace of the guest. Some of it is the guest's own text.
pub(crate) fn one_line(error: &wasmtime::Error) -> String {
    let is_backtrace = |cause: &String| cause.starts_with("error while executing at wasm backtrace");
    let first_line = |cause: &dyn std::fmt::Display| cause.to_string().lines().next().unwrap_or_default().to_owned();
    let causes: Vec<String> =
        error.chain().map(|cause| first_line(&cause)).filter(|cause| !is_backtrace(cause)).collect();
    escaped(&causes.join(": "), TEXT_BYTES_MAX).to_string()
}

struct Metered<'a, F> {
    clock: &'a Clock,
    meter: &'a Meter,
    budget: Budget<'a>,
    call: Pin<&'a mut F>,
    again: bool,
    /// Until the plugin has paid for what it computed.
    pause: Option<Pin<Box<tokio::time::Sleep>>>,
}

impl<F> Metered<'_, F> {
    /// Pending while the plugin has computed more than its share.
    fn poll_pause(&mut self, context: &mut Context<'_>) -> Poll<()> {
        if let Some(pause) = &mut self.pause {
            std::task::ready!(pause.as_mut().poll(context));
            self.pause = None;
        }
        match self.budget.share.wait(self.budget.percent) {
            None => Poll::Ready(()),
            Some(wait) => {
                let pause = self.pause.insert(Box::pin(tokio::time::sleep(wait)));
                pause.as_mut().poll(context)
            }
        }
    }
}

impl<F: Future> Future for Metered<'_, F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        // At every poll: the clock sleeps when it was not wanted for a while, and then nothing would end this one.
        self.clock.wake();
        if !self.again {
            self.again = true;
            self.meter.polled_at.store(NOT_MEASURED, Ordering::Relaxed);
            return self.call.as_mut().poll(context);
        }
        std::task::ready!(self.poll_pause(context));
        let begun = thread_cpu_ns();
        self.meter.polled_at.store(begun, Ordering::Relaxed);
        let result = self.call.as_mut().poll(context);
        let spent = thread_cpu_ns().saturating_sub(begun);
        self.meter.spent.fetch_add(spent, Ordering::Relaxed);
        self.budget.share.spend(spent, self.budget.percent);
        result
    }
}

/// An instance in a pool. Goes to the reaper when it is dropped: ending a store takes longer than a shard should wait.
pub(crate) struct Pooled {
    running: Option<Box<Running>>,
    reaper: Grave,
    healthy: bool,
    _alive: Option<Alive>,
}

/// Counts an instance of a build on a shard as long as it may be called.
pub(crate) struct Alive(Arc<AtomicUsize>);

impl Alive {
    pub(crate) fn new(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(count))
    }
}

impl Drop for Alive {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// An instance on its way out.
pub(crate) struct Dead {
    pub(crate) running: Box<Running>,
    /// It may still be called, to say goodbye.
    pub(crate) healthy: bool,
}

impl Pooled {
    pub(crate) fn new(running: Running, reaper: Grave, alive: Option<Alive>) -> Self {
        Self { running: Some(Box::new(running)), reaper, healthy: true, _alive: alive }
    }

    /// While a call is under way the instance counts as broken: if the call is dropped, it is.
    pub(crate) fn begin(&mut self) -> Option<&mut Running> {
        self.healthy = false;
        self.running.as_deref_mut()
    }

    pub(crate) fn finished(&mut self) {
        self.healthy = true;
    }
}

impl Drop for Pooled {
    fn drop(&mut self) {
        if let Some(running) = self.running.take() {
            // The reaper may be busy, or gone when the broker ends; then the store is dropped here.
            let _ = self.reaper.try_send(Dead { running, healthy: self.healthy });
        }
    }
}
