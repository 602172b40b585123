//! Who compiles what at the moment, and what is compiled already.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tracing::info;
use wasmtime::Engine;
use wasmtime::component::Component;

use crate::HostError;
use crate::cache::Cache;
use crate::cancel::Cancel;
use crate::compile::{CompileLimits, Compiler};
use crate::diagnosis;

/// How long compiling may take before the log says how far it is, and how long until it says so again.
const LONG: Duration = Duration::from_secs(5);
/// Who waits for a turn looks this often whether it is still wanted.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// A component that is being compiled, for status displays.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Compiling {
    /// The plugin it is for.
    pub plugin: String,
    /// Bytes of the component.
    pub bytes: usize,
    /// Since it was asked for.
    pub seconds: u64,
    /// Others are compiled first.
    pub waits: bool,
}

/// A component that can be loaded.
#[derive(Clone)]
pub(crate) struct Compiled {
    pub(crate) component: Component,
    /// It was there already.
    pub(crate) cached: bool,
    pub(crate) compile_ms: u64,
}

/// Compiles for the loader, and for operators' commands, each on the thread that asks.
pub(crate) struct Compilers {
    pub(crate) cache: Cache,
    engine: Engine,
    compiler: Compiler,
    limits: CompileLimits,
    /// At a time.
    at_once: usize,
    /// The host ends.
    stop: Cancel,
    at_work: Mutex<AtWork>,
    freed: Condvar,
}

#[derive(Default)]
struct AtWork {
    running: usize,
    number: u64,
    jobs: Vec<Job>,
}

struct Job {
    number: u64,
    plugin: String,
    bytes: usize,
    since: Instant,
    waits: bool,
}

impl Compilers {
    pub(crate) fn new(
        cache: Cache,
        engine: Engine,
        compiler: Compiler,
        limits: CompileLimits,
        at_once: usize,
        stop: Cancel,
    ) -> Self {
        let at_once = at_once.max(1);
        let (at_work, freed) = (Mutex::default(), Condvar::new());
        Self { cache, engine, compiler, limits, at_once, stop, at_work, freed }
    }

    fn at_work(&self) -> MutexGuard<'_, AtWork> {
        self.at_work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was compiled earlier.
    pub(crate) fn cached(&self, digest: &str) -> Option<Compiled> {
        let begun = Instant::now();
        let component = self.cache.load(&self.engine, digest)?;
        Some(Compiled { component, cached: true, compile_ms: begun.elapsed().as_millis() as u64 })
    }

    /// From the cache, or compiled now; that may take minutes, unless it is cancelled.
    pub(crate) fn component(
        &self,
        plugin: &str,
        bytes: &[u8],
        digest: &str,
        cancel: &Cancel,
    ) -> Result<Compiled, HostError> {
        diagnosis::check_header(bytes)?;
        if let Some(compiled) = self.cached(digest) {
            return Ok(compiled);
        }
        let begun = Instant::now();
        let turn = self.turn(plugin, bytes.len(), cancel)?;
        // Somebody else may have wanted the same.
        if let Some(compiled) = self.cached(digest) {
            return Ok(compiled);
        }
        let mut said = Instant::now();
        let mut goes_on = || {
            if said.elapsed() >= LONG {
                said = Instant::now();
                let (seconds, bytes) = (begun.elapsed().as_secs(), bytes.len());
                info!(plugin, seconds, bytes, "still compiling");
            }
            !cancel.is_cancelled() && !self.stop.is_cancelled()
        };
        let compiled = self.compiler.compile(&self.engine, bytes, self.limits, self.cache.dir(), &mut goes_on)?;
        drop(turn);
        let component = self.cache.keep(&self.engine, digest, &compiled)?;
        Ok(Compiled { component, cached: false, compile_ms: begun.elapsed().as_millis() as u64 })
    }

    /// Waits until there is one compiler less at work.
    fn turn(&self, plugin: &str, bytes: usize, cancel: &Cancel) -> Result<Turn<'_>, HostError> {
        let mut at_work = self.at_work();
        at_work.number += 1;
        let number = at_work.number;
        at_work.jobs.push(Job { number, plugin: plugin.to_owned(), bytes, since: Instant::now(), waits: true });
        let mut turn = Turn { compilers: self, number, runs: false };
        while at_work.running >= self.at_once {
            if cancel.is_cancelled() || self.stop.is_cancelled() {
                drop(at_work);
                return Err(HostError::new("compiling was cancelled"));
            }
            at_work = self.freed.wait_timeout(at_work, LOOK_EVERY).unwrap_or_else(PoisonError::into_inner).0;
        }
        at_work.running += 1;
        turn.runs = true;
        at_work.jobs.iter_mut().filter(|job| job.number == number).for_each(|job| job.waits = false);
        drop(at_work);
        Ok(turn)
    }

    /// What is compiled now, the oldest first.
    pub(crate) fn jobs(&self) -> Vec<Compiling> {
        let shown = |job: &Job| Compiling {
            plugin: job.plugin.clone(),
            bytes: job.bytes,
            seconds: job.since.elapsed().as_secs(),
            waits: job.waits,
        };
        self.at_work().jobs.iter().map(shown).collect()
    }

    /// Waits until nobody compiles any more, for a bounded time.
    pub(crate) fn finish(&self, patience: Duration) {
        let begun = Instant::now();
        let mut at_work = self.at_work();
        while !at_work.jobs.is_empty() && begun.elapsed() < patience {
            at_work = self.freed.wait_timeout(at_work, LOOK_EVERY).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// The right to start a compiler.
struct Turn<'a> {
    compilers: &'a Compilers,
    number: u64,
    runs: bool,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut at_work = self.compilers.at_work();
        at_work.running -= usize::from(self.runs);
        at_work.jobs.retain(|job| job.number != self.number);
        drop(at_work);
        self.compilers.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;
    use crate::engine::engine;

    /// `plugins.compile_at_once`: one more waits for its turn, and is shown so.
    #[test]
    fn only_so_many_are_compiled_at_a_time() {
        const AT_ONCE: usize = 3;
        let folder = tempfile::tempdir().expect("a temporary folder");
        let cache = Cache::open(folder.path(), None).expect("a folder");
        let (engine, limits) = (engine(None).expect("an engine"), CompileLimits::default());
        let (cancel, stop) = (Cancel::default(), Cancel::default());
        let compilers = Compilers::new(cache, engine, Compiler::InProcess, limits, AT_ONCE, stop);
        let turn = |name: &str| compilers.turn(name, 1, &cancel);
        let waiting = || compilers.jobs().iter().filter(|job| job.waits).count();
        let mut turns: Vec<_> = (0..AT_ONCE).map(|_| turn("first").expect("there is room")).collect();
        thread::scope(|scope| {
            let others: Vec<_> = (0..2).map(|_| scope.spawn(|| turn("other").is_ok())).collect();
            while waiting() < 2 {
                thread::yield_now();
            }
            thread::sleep(5 * LOOK_EVERY);
            assert_eq!((waiting(), compilers.jobs().len()), (2, AT_ONCE + 2));
            assert!(others.iter().all(|other| !other.is_finished()), "they wait");
            turns.pop();
            for other in others {
                assert!(other.join().expect("ends"), "one after the other");
            }
        });
        drop(turns);
        assert!(compilers.jobs().is_empty());
        let _turns: Vec<_> = (0..AT_ONCE).map(|_| turn("last").expect("there is room")).collect();
        cancel.cancel();
        assert!(turn("cancelled").is_err(), "who waits can be told not to");
    }
}
