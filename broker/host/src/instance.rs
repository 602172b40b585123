//! One running component: its store, its limits and what it may reach.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::io::AsyncWrite;
use wasmtime::component::{HasSelf, Linker, ResourceTable};
use wasmtime::{Engine, ResourceLimiter, Store, UpdateDeadline};
use wasmtime_wasi::cli::{IsTerminal, StdoutStream};
use wasmtime_wasi::{WasiCtx, WasiCtxView, WasiView};

use crate::HostError;
use crate::bindings::{auth, imports, lifecycle};
use crate::engine::thread_cpu_ns;

/// Table elements an instance may have, over all its tables.
const TABLE_ELEMENTS_MAX: usize = 100_000;
/// Core instances, tables and memories of one component; Python needs over a hundred.
const PARTS_MAX: usize = 256;
/// Log lines per second and instance, and bytes of one.
const LOG_LINES_MAX: u32 = 100;
const LOG_LINE_BYTES_MAX: usize = 4096;

/// What the store knows about its guest.
pub(crate) struct Guest {
    wasi: WasiCtx,
    table: ResourceTable,
    limits: Limits,
    log: Log,
}

impl Guest {
    pub(crate) fn new(plugin: &Arc<str>, wasi: WasiCtx, memory_bytes_max: usize) -> Self {
        let limits = Limits { memory_bytes: 0, memory_bytes_max, table_elements: 0 };
        Self { wasi, table: ResourceTable::new(), limits, log: Log::new(plugin) }
    }
}

impl WasiView for Guest {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        WasiCtxView { ctx: &mut self.wasi, table: &mut self.table }
    }
}

/// Sums over all memories and tables of the store: a limit per memory would be none.
struct Limits {
    memory_bytes: usize,
    memory_bytes_max: usize,
    table_elements: usize,
}

impl ResourceLimiter for Limits {
    fn memory_growing(&mut self, current: usize, desired: usize, _max: Option<usize>) -> wasmtime::Result<bool> {
        let total = self.memory_bytes - current.min(self.memory_bytes) + desired;
        if total > self.memory_bytes_max {
            return Ok(false);
        }
        self.memory_bytes = total;
        Ok(true)
    }
    fn table_growing(&mut self, current: usize, desired: usize, _max: Option<usize>) -> wasmtime::Result<bool> {
        let total = self.table_elements - current.min(self.table_elements) + desired;
        if total > TABLE_ELEMENTS_MAX {
            return Ok(false);
        }
        self.table_elements = total;
        Ok(true)
    }
    fn instances(&self) -> usize {
        PARTS_MAX
    }
    fn tables(&self) -> usize {
        PARTS_MAX
    }
    fn memories(&self) -> usize {
        PARTS_MAX
    }
}

/// A guest's lines on their way to the broker's log.
#[derive(Clone)]
pub(crate) struct Log {
    plugin: Arc<str>,
    since: Instant,
    lines: u32,
}

impl Log {
    pub(crate) fn new(plugin: &Arc<str>) -> Self {
        Self { plugin: Arc::clone(plugin), since: Instant::now(), lines: 0 }
    }

    fn write(&mut self, level: imports::wasmqtt::plugin::host::Level, message: &str) {
        use imports::wasmqtt::plugin::host::Level;
        if self.since.elapsed() >= Duration::from_secs(1) {
            if self.lines > LOG_LINES_MAX {
                tracing::warn!(target: "plugin", plugin = %self.plugin, left_out = self.lines - LOG_LINES_MAX, "too many log lines");
            }
            (self.since, self.lines) = (Instant::now(), 0);
        }
        self.lines = self.lines.saturating_add(1);
        if self.lines > LOG_LINES_MAX {
            return;
        }
        let end = message.floor_char_boundary(LOG_LINE_BYTES_MAX);
        let (plugin, message) = (&self.plugin, &message[..end]);
        match level {
            Level::Trace => tracing::trace!(target: "plugin", %plugin, "{message}"),
            Level::Debug => tracing::debug!(target: "plugin", %plugin, "{message}"),
            Level::Info => tracing::info!(target: "plugin", %plugin, "{message}"),
            Level::Warn => tracing::warn!(target: "plugin", %plugin, "{message}"),
            Level::Error => tracing::error!(target: "plugin", %plugin, "{message}"),
        }
    }
}

impl imports::wasmqtt::plugin::host::Host for Guest {
    fn log(&mut self, level: imports::wasmqtt::plugin::host::Level, message: String) {
        self.log.write(level, &message);
    }
}

/// stdout and stderr of a guest: lines at debug level.
impl StdoutStream for Log {
    fn async_stream(&self) -> Box<dyn AsyncWrite + Send + Sync> {
        Box::new(self.clone())
    }
}

impl IsTerminal for Log {
    fn is_terminal(&self) -> bool {
        false
    }
}

impl AsyncWrite for Log {
    fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<std::io::Result<usize>> {
        for line in String::from_utf8_lossy(bytes).lines() {
            self.write(imports::wasmqtt::plugin::host::Level::Debug, line);
        }
        Poll::Ready(Ok(bytes.len()))
    }
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// Everything a guest can import, linked once.
pub(crate) fn linker(engine: &Engine) -> Result<Linker<Guest>, HostError> {
    let mut linker = Linker::new(engine);
    wasmtime_wasi::p2::add_to_linker_async(&mut linker).map_err(|error| HostError::new(format!("{error:#}")))?;
    imports::wasmqtt::plugin::host::add_to_linker::<Guest, HasSelf<Guest>>(&mut linker, |guest| guest)
        .map_err(|error| HostError::new(format!("{error:#}")))?;
    Ok(linker)
}

/// CPU time of one call, over all the polls it takes.
#[derive(Default)]
pub(crate) struct Meter {
    /// Nanoseconds, like the others.
    spent: AtomicU64,
    polled_at: AtomicU64,
    budget: AtomicU64,
}

impl Meter {
    fn begin(&self, budget: Duration) {
        self.spent.store(0, Ordering::Relaxed);
        self.budget.store(budget.as_nanos() as u64, Ordering::Relaxed);
    }

    fn is_over(&self) -> bool {
        let now = thread_cpu_ns().saturating_sub(self.polled_at.load(Ordering::Relaxed));
        self.spent.load(Ordering::Relaxed) + now > self.budget.load(Ordering::Relaxed)
    }
}

/// A store with its instance and the interfaces it exports.
pub(crate) struct Running {
    pub(crate) store: Store<Guest>,
    pub(crate) auth: Option<auth::HasAuth>,
    pub(crate) lifecycle: Option<lifecycle::HasLifecycle>,
    meter: Arc<Meter>,
}

impl Running {
    pub(crate) fn store(engine: &Engine, guest: Guest) -> (Store<Guest>, Arc<Meter>) {
        let meter = Arc::new(Meter::default());
        let mut store = Store::new(engine, guest);
        store.limiter(|guest| &mut guest.limits);
        let watched = Arc::clone(&meter);
        store.epoch_deadline_callback(move |_| {
            if watched.is_over() {
                let budget_ms = watched.budget.load(Ordering::Relaxed) / 1_000_000;
                return Err(wasmtime::Error::msg(format!("computed longer than cpu_ms = {budget_ms}")));
            }
            Ok(UpdateDeadline::Yield(1))
        });
        (store, meter)
    }

    pub(crate) fn new(
        (store, meter): (Store<Guest>, Arc<Meter>),
        auth: Option<auth::HasAuth>,
        lifecycle: Option<lifecycle::HasLifecycle>,
    ) -> Self {
        Self { store, auth, lifecycle, meter }
    }

    pub(crate) fn meter(&self) -> Arc<Meter> {
        Arc::clone(&self.meter)
    }
}

/// Runs guest code under its two limits: computing and waiting.
pub(crate) async fn limited<T>(
    meter: &Arc<Meter>,
    cpu: Duration,
    deadline: Duration,
    call: impl Future<Output = wasmtime::Result<T>>,
) -> Result<T, String> {
    meter.begin(cpu);
    let metered = Metered { meter: Arc::clone(meter), call: Box::pin(call) };
    match tokio::time::timeout(deadline, metered).await {
        Ok(result) => result.map_err(|error| one_line(&error)),
        Err(_) => Err(format!("no answer within deadline_ms = {}", deadline.as_millis())),
    }
}

/// The chain of causes without the backtrace of the guest.
fn one_line(error: &wasmtime::Error) -> String {
    let causes: Vec<String> =
        error.chain().map(|cause| cause.to_string().lines().next().unwrap_or_default().to_owned()).collect();
    causes.join(": ")
}

struct Metered<F> {
    meter: Arc<Meter>,
    call: Pin<Box<F>>,
}

impl<F: Future> Future for Metered<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        let begun = thread_cpu_ns();
        self.meter.polled_at.store(begun, Ordering::Relaxed);
        let result = self.call.as_mut().poll(context);
        self.meter.spent.fetch_add(thread_cpu_ns().saturating_sub(begun), Ordering::Relaxed);
        result
    }
}

/// An instance in a pool. Goes to the reaper when it is dropped: ending a store takes longer than a shard should wait.
pub(crate) struct Pooled {
    running: Option<Box<Running>>,
    reaper: Sender<Dead>,
    healthy: bool,
}

/// An instance on its way out.
pub(crate) struct Dead {
    pub(crate) running: Box<Running>,
    /// It may still be called, to say goodbye.
    pub(crate) healthy: bool,
}

impl Pooled {
    pub(crate) fn new(running: Running, reaper: Sender<Dead>) -> Self {
        Self { running: Some(Box::new(running)), reaper, healthy: true }
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
            // The reaper is gone only when the broker ends.
            let _ = self.reaper.send(Dead { running, healthy: self.healthy });
        }
    }
}
