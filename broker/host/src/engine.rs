//! The wasmtime engine and its clock.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::Thread;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use wasmtime::{Config, Engine, OptLevel};

use crate::HostError;

/// A guest that computes gives its thread back once in this time.
const TICK: Duration = Duration::from_millis(1);
/// Ticks without any call after which the clock sleeps.
const IDLE_TICKS: u32 = 64;
/// Stack of a guest, and of the fiber it runs on.
const WASM_STACK_BYTES: usize = 512 * 1024;
const FIBER_STACK_BYTES: usize = 2 * 1024 * 1024;

/// The engine for all plugins. Concurrency support is off: with it every call costs two to five times as much.
pub(crate) fn engine() -> Result<Engine, HostError> {
    let mut config = Config::new();
    config
        .concurrency_support(false)
        .epoch_interruption(true)
        .cranelift_opt_level(OptLevel::Speed)
        .max_wasm_stack(WASM_STACK_BYTES)
        .async_stack_size(FIBER_STACK_BYTES)
        .wasm_backtrace_max_frames(std::num::NonZeroUsize::new(8));
    Engine::new(&config).map_err(|error| HostError::new(format!("cannot start wasmtime: {error:#}")))
}

/// Advances the engine's epoch while calls are under way; an idle broker is not woken a thousand times a second.
pub(crate) struct Clock {
    used: AtomicBool,
    asleep: AtomicBool,
    stopped: AtomicBool,
    idle: AtomicU32,
    thread: std::sync::OnceLock<Thread>,
}

impl Clock {
    pub(crate) fn start(engine: Engine) -> Result<Arc<Self>, HostError> {
        let clock = Arc::new(Self {
            used: AtomicBool::new(false),
            asleep: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
            idle: AtomicU32::new(0),
            thread: std::sync::OnceLock::new(),
        });
        let ticking = Arc::clone(&clock);
        let thread = std::thread::Builder::new().name("plugin-clock".into()).spawn(move || ticking.tick(&engine));
        let thread = thread.map_err(|error| HostError::new(format!("cannot start the plugin clock: {error}")))?;
        let _ = clock.thread.set(thread.thread().clone());
        Ok(clock)
    }

    /// Guest code is about to run.
    pub(crate) fn wake(&self) {
        if !self.used.load(Ordering::Relaxed) {
            self.used.store(true, Ordering::SeqCst);
        }
        if self.asleep.load(Ordering::SeqCst)
            && let Some(thread) = self.thread.get()
        {
            thread.unpark();
        }
    }

    pub(crate) fn stop(&self) {
        self.stopped.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
    }

    fn tick(&self, engine: &Engine) {
        while !self.stopped.load(Ordering::SeqCst) {
            std::thread::sleep(TICK);
            engine.increment_epoch();
            if self.used.swap(false, Ordering::SeqCst) {
                self.idle.store(0, Ordering::Relaxed);
            } else if self.idle.fetch_add(1, Ordering::Relaxed) >= IDLE_TICKS {
                self.asleep.store(true, Ordering::SeqCst);
                if !self.used.load(Ordering::SeqCst) {
                    std::thread::park();
                }
                self.asleep.store(false, Ordering::SeqCst);
                self.idle.store(0, Ordering::Relaxed);
            }
        }
    }
}

/// Nanoseconds of CPU time of this thread: time during which it did not run does not count against a guest.
pub(crate) fn thread_cpu_ns() -> u64 {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned()
}
