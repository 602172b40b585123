//! The wasmtime engine and its clock.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::Thread;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use wasmtime::{Config, Engine, InstanceAllocationStrategy, OptLevel, PoolingAllocationConfig};

use crate::HostError;
use crate::pool::Pool;
use crate::threads::Watched;

/// A guest that computes gives its thread back once in this time.
const TICK: Duration = Duration::from_millis(1);
/// Ticks without any call after which the clock sleeps.
const IDLE_TICKS: u32 = 64;
/// Stack of a guest, and of the fiber it runs on.
const WASM_STACK_BYTES: usize = 512 * 1024;
const FIBER_STACK_BYTES: usize = 2 * 1024 * 1024;

/// Parts of one component. Most have a memory, two tables and a core instance or two; Python has over a hundred core
/// instances, and a component made of two has the parts of both.
pub(crate) const CORE_INSTANCES_MAX: u32 = 256;
pub(crate) const MEMORIES_MAX: u32 = 2;
pub(crate) const TABLES_MAX: u32 = 16;
/// Elements of one table, eight bytes each.
const TABLE_ELEMENTS_MAX: usize = 20_000;

/// Bytes that stay resident in a free slot of the pool, so that the next instance need not fault them in again.
const KEEP_RESIDENT_BYTES: usize = 64 * 1024;

/// The engine for all plugins. Without address space for the pool, instances are allocated one by one, which makes
/// them two to five times slower to make and calls as fast as ever.
pub(crate) fn engine(pool: Option<Pool>) -> Result<Engine, HostError> {
    if let Some(pool) = pool {
        match Engine::new(config().allocation_strategy(pooling(pool))) {
            Ok(engine) => return Ok(engine),
            Err(error) => {
                tracing::warn!(%error, "no pool for plugin instances, they are allocated one by one");
            }
        }
    }
    Engine::new(&config()).map_err(|error| HostError::new(format!("cannot start wasmtime: {error:#}")))
}

/// Concurrency support is off: with it every call costs two to five times as much.
fn config() -> Config {
    let mut config = Config::new();
    config
        .concurrency_support(false)
        .epoch_interruption(true)
        .cranelift_opt_level(OptLevel::Speed)
        .max_wasm_stack(WASM_STACK_BYTES)
        .async_stack_size(FIBER_STACK_BYTES)
        .wasm_backtrace_max_frames(std::num::NonZeroUsize::new(8));
    config
}

fn pooling(pool: Pool) -> InstanceAllocationStrategy {
    // As many of each for every instance as its component may have: none takes what another needs. Core instances are
    // only counted, tables are 160 kB of address space each.
    let mut pooling = PoolingAllocationConfig::new();
    pooling
        .total_component_instances(pool.instances)
        .total_core_instances(pool.instances.saturating_mul(CORE_INSTANCES_MAX))
        .max_core_instances_per_component(CORE_INSTANCES_MAX)
        .total_memories(pool.instances.saturating_mul(MEMORIES_MAX))
        .max_memories_per_component(MEMORIES_MAX)
        .max_memory_size(pool.memory_bytes)
        .total_tables(pool.instances.saturating_mul(TABLES_MAX))
        .max_tables_per_component(TABLES_MAX)
        .table_elements(TABLE_ELEMENTS_MAX)
        .total_stacks(pool.instances)
        .linear_memory_keep_resident(KEEP_RESIDENT_BYTES)
        .async_stack_keep_resident(KEEP_RESIDENT_BYTES);
    InstanceAllocationStrategy::Pooling(pooling)
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
    pub(crate) fn start(engine: Engine, watched: Watched) -> Result<Arc<Self>, HostError> {
        let clock = Arc::new(Self {
            used: AtomicBool::new(false),
            asleep: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
            idle: AtomicU32::new(0),
            thread: std::sync::OnceLock::new(),
        });
        let ticking = Arc::clone(&clock);
        let thread = std::thread::Builder::new().name("plugin-clock".into()).spawn(move || {
            let _watched = watched;
            ticking.tick(&engine);
        });
        let thread = thread.map_err(|error| HostError::new(format!("cannot start the plugin clock: {error}")))?;
        let _ = clock.thread.set(thread.thread().clone());
        Ok(clock)
    }

    /// Guest code is about to run until the next tick; to be said again before it goes on.
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
                // A call or a stop that came in between is seen here, or it has left a token for `park`.
                if !self.used.load(Ordering::SeqCst) && !self.stopped.load(Ordering::SeqCst) {
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

#[cfg(test)]
mod tests {
    use wasmtime::Store;
    use wasmtime::component::{Component, Linker};

    use super::*;

    /// Each instance has room for all the parts that its component may have, whatever others have.
    #[test]
    fn the_pool_has_room_for_all_parts_of_all_instances() {
        let module = |name: &str, part: &str, count: u32| {
            let instances = format!("(core instance (instantiate ${name})) ").repeat(count as usize);
            format!("(core module ${name} ({part})) {instances}")
        };
        let others = CORE_INSTANCES_MAX - MEMORIES_MAX - TABLES_MAX;
        let parts = [
            module("memories", "memory 1", MEMORIES_MAX),
            module("tables", "table 1 funcref", TABLES_MAX),
            module("others", "func", others),
        ];
        let engine = engine(Some(Pool { instances: 3, memory_bytes: 1 << 20 })).expect("an engine");
        let wat = wat::parse_str(format!("(component {})", parts.concat())).expect("is valid text");
        let component = Component::new(&engine, wat).expect("may be instantiated");
        let linker = Linker::new(&engine);
        let instantiate = || {
            let mut store = Store::new(&engine, ());
            store.set_epoch_deadline(1);
            let instance = linker.instantiate(&mut store, &component);
            instance.map(|_| store)
        };
        let held: Vec<_> = (0..3).map(|_| instantiate().expect("is its share")).collect();
        assert!(instantiate().is_err(), "there are {}", held.len());
    }
}
