//! `wasmqtt-store`: what outlives the broker. Sessions, their subscriptions and messages, retained messages, bans; in
//! RocksDB.
//!
//! Shards turn the changes of each of their turns into rows (`batch`, `rows`) and hand them to one thread
//! (`writer`), which writes what came from all of them together, syncs once, and tells them how far it is. Another
//! thread (`reader`) reads messages that Sessions want back. `restore` reads everything when the broker starts.
//!
//! A message is one row, with all its receivers in it; it goes when the last of them has it. Which messages wait for a
//! Session is not written anywhere else: the broker knows that from these rows.

#![forbid(unsafe_code)]

mod batch;
mod database;
mod held;
mod plan;
mod reader;
mod restore;
#[cfg(test)]
mod row_tests;
#[doc(hidden)]
pub mod rows;
#[cfg(test)]
mod tests;
mod tools;
mod writer;

use std::cell::Cell;
use std::num::NonZeroU64;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rocksdb::{Direction, IteratorMode};
use tracing::error;
use wasmqtt_protocol::ports::{
    Buckets, Change, Clock, Load, Loaded, Restore, ShardStore, Store, StoreError, Ticket, Value, first_id,
};
use wasmqtt_protocol::router::{MessageId, SessionId};

use self::batch::Batch;
use self::database::Database;
use self::held::Held;
use self::plan::Counts;
use self::reader::Wanted;
use self::rows::Family;
use self::writer::{Job, Trouble, Writer};

pub use self::tools::{Damage, FamilyStats, Offline};

/// Form of all rows. An older store is brought up to it, a newer one refused.
const SCHEMA: u32 = 2;
/// Bytes waiting to be written beyond which clients that need the store wait.
const CONGESTED_BYTES: usize = 64 << 20;
/// Bytes waiting to be written beyond which a shard waits with all its clients. Nothing that is known must be lost, and
/// shards make changes (Sessions that expire, say) that no client can be made to wait for.
const WAITING_BYTES_MAX: usize = 256 << 20;
/// Bytes of messages that a shard has not taken from the reader yet, beyond which the reader waits for it.
const LOADED_BYTES_MAX: usize = 32 << 20;
/// What a message costs beside its own bytes.
const LOADED_OVERHEAD_BYTES: usize = 128;
/// How often whoever waits in here looks whether the store ends.
const LOOK_PAUSE: Duration = Duration::from_millis(20);
/// Shards there can be.
const SHARDS_MAX: usize = 1024;

/// When a change counts as kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// When it is on the disk: survives a power loss.
    Fsync,
    /// When the system has it: survives the end of the broker.
    Os,
}

/// `[store]` of the configuration, where it is not in memory.
#[derive(Debug, Clone)]
pub struct StoreConfig {
    /// Folder; made if it is not there.
    pub path: PathBuf,
    /// What acknowledgements wait for.
    pub durability: Durability,
    /// MiB of changes that RocksDB collects in memory before it writes them as a table; 1..=65536, default 128.
    pub write_buffer_mib: u32,
    /// MiB of tables kept in memory for reading; 1..=1048576, default 256.
    pub cache_mib: u32,
    /// [`Durability::Fsync`]: how long changes are collected before one sync; zero, the default: no longer than the last
    /// sync takes. [`Durability::Os`]: time between two syncs in the background; zero, the default: none.
    pub sync_interval: Duration,
}

impl StoreConfig {
    /// With defaults.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        let sync_interval = Duration::ZERO;
        Self { path: path.into(), durability: Durability::Fsync, write_buffer_mib: 128, cache_mib: 256, sync_interval }
    }
}

/// Batches that are kept for their memory, and the largest of them.
const SPARE_MAX: usize = 64;
const SPARE_BYTES_MAX: usize = 256 << 10;

/// Milliseconds since 1970, as the system has it at present.
fn wall_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

/// What a shard and the threads of the store share.
#[derive(Default)]
struct Line {
    /// The last batch that is written or refused, and those that are refused.
    committed: AtomicU64,
    failed: Mutex<Vec<Ticket>>,
    loaded: Mutex<Vec<Loaded>>,
    loaded_bytes: AtomicUsize,
    wake: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

struct Lines {
    shards: Box<[Line]>,
    /// Of batches on their way to the writer.
    waiting_bytes: AtomicUsize,
    /// What the disk refused, and its bytes.
    held: Mutex<Held>,
    held_bytes: AtomicUsize,
    failing: AtomicBool,
    stopping: AtomicBool,
    /// A thread that ended although it should not.
    dead: OnceLock<&'static str>,
    /// Batches that shards have handed over, and how many of these are written or refused.
    handed: AtomicU64,
    settled: Mutex<u64>,
    settled_more: Condvar,
    next_session: AtomicU64,
    next_message: AtomicU64,
    /// Batches that were written, for their memory.
    spare: Mutex<Vec<Batch>>,
    clock: OnceLock<Arc<dyn Clock>>,
}

impl Lines {
    fn new() -> Self {
        Self {
            shards: (0..SHARDS_MAX).map(|_| Line::default()).collect(),
            waiting_bytes: AtomicUsize::new(0),
            held: Mutex::default(),
            held_bytes: AtomicUsize::new(0),
            failing: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            dead: OnceLock::new(),
            handed: AtomicU64::new(0),
            settled: Mutex::new(0),
            settled_more: Condvar::new(),
            next_session: AtomicU64::new(1),
            next_message: AtomicU64::new(1),
            spare: Mutex::default(),
            clock: OnceLock::new(),
        }
    }

    /// Bytes that are not on the disk yet.
    fn unwritten_bytes(&self) -> usize {
        self.waiting_bytes.load(Ordering::Relaxed) + self.held_bytes.load(Ordering::Relaxed)
    }

    /// The store ends, or one of its threads did.
    fn is_over(&self) -> bool {
        self.stopping.load(Ordering::Acquire) || self.dead.get().is_some()
    }

    /// So many more batches are written or refused.
    fn settled(&self, count: u64) {
        *self.settled.lock().unwrap_or_else(PoisonError::into_inner) += count;
        self.settled_more.notify_all();
    }

    /// Waits until so many batches are; `false`: the store ends.
    fn await_settled(&self, handed: u64) -> bool {
        let mut settled = self.settled.lock().unwrap_or_else(PoisonError::into_inner);
        while *settled < handed {
            if self.is_over() {
                return false;
            }
            let waited = self.settled_more.wait_timeout(settled, LOOK_PAUSE);
            settled = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Gives a shard what it wanted, when it has taken most of what it got before.
    fn put_loaded(&self, shard: usize, loaded: Loaded) {
        let line = self.line(shard);
        while line.loaded_bytes.load(Ordering::Acquire) > LOADED_BYTES_MAX && !self.is_over() {
            std::thread::sleep(LOOK_PAUSE);
        }
        let bytes = |kept: &wasmqtt_protocol::session::Kept| {
            let message = &kept.message;
            LOADED_OVERHEAD_BYTES + message.topic.len() + message.payload.len() + message.properties.len()
        };
        let bytes = loaded.messages.iter().filter_map(|(_, kept)| kept.as_ref()).map(bytes).sum();
        line.loaded_bytes.fetch_add(bytes, Ordering::AcqRel);
        line.loaded.lock().unwrap_or_else(PoisonError::into_inner).push(loaded);
        self.wake(shard);
    }

    /// The broker's time; before it has a clock, that of the system.
    fn now_ms(&self) -> u64 {
        self.clock.get().map_or_else(wall_ms, |clock| clock.now_ms())
    }

    /// A time in a row that was written then, by what was learned of the clock since.
    fn corrected(&self, written_ms: u64, at_ms: u64) -> u64 {
        self.clock.get().map_or(at_ms, |clock| clock.corrected(written_ms, at_ms))
    }

    /// Takes back what was written, as far as it is worth keeping.
    fn give_back(&self, batches: impl Iterator<Item = Batch>) {
        let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        for mut batch in batches.filter(|batch| batch.capacity_bytes() <= SPARE_BYTES_MAX) {
            if spare.len() == SPARE_MAX {
                break;
            }
            batch.clear();
            spare.push(batch);
        }
    }

    fn empty_batch(&self) -> Batch {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default()
    }

    fn line(&self, shard: usize) -> &Line {
        &self.shards[shard % SHARDS_MAX]
    }

    fn wake(&self, shard: usize) {
        if let Some(wake) = self.line(shard).wake.get() {
            wake();
        }
    }

    fn wake_all(&self) {
        self.shards.iter().filter_map(|line| line.wake.get()).for_each(|wake| wake());
    }
}

/// Says that a thread ended, unless it was to.
struct Watch {
    lines: Arc<Lines>,
    name: &'static str,
}

impl Drop for Watch {
    fn drop(&mut self) {
        if !self.lines.stopping.load(Ordering::Acquire) {
            error!(thread = self.name, "a thread of the store ended: nothing is kept any more");
            let _ = self.lines.dead.set(self.name);
            self.lines.failing.store(true, Ordering::Release);
            self.lines.wake_all();
        }
    }
}

/// The store.
pub struct RocksStore {
    config: StoreConfig,
    database: Arc<Database>,
    lines: Arc<Lines>,
    jobs: OnceLock<Sender<Job>>,
    /// `None`: the reader ends.
    loads: OnceLock<Sender<Option<Wanted>>>,
    /// Changes from before there was a thread to write them.
    early: Mutex<Vec<Job>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl RocksStore {
    /// Opens the folder, or makes it.
    ///
    /// # Errors
    /// It cannot be used: in use by another broker, written by a newer one, damaged, not writable.
    pub fn open(config: StoreConfig) -> Result<Arc<Self>, StoreError> {
        let database = Arc::new(Database::open(&config)?);
        let (lines, early, threads) = (Arc::new(Lines::new()), Mutex::default(), Mutex::default());
        Ok(Arc::new(Self { config, database, lines, jobs: OnceLock::new(), loads: OnceLock::new(), early, threads }))
    }

    /// Writes and syncs what shards have handed over, unless it cannot be written, and ends the threads.
    pub fn stop(&self) {
        self.lines.stopping.store(true, Ordering::Release);
        if let Some(jobs) = self.jobs.get() {
            let _ = jobs.send(Job::Stop);
        }
        if let Some(loads) = self.loads.get() {
            let _ = loads.send(None);
        }
        let threads: Vec<JoinHandle<()>> =
            self.threads.lock().unwrap_or_else(PoisonError::into_inner).drain(..).collect();
        for thread in threads {
            let _ = thread.join();
        }
    }

    /// The name of a thread that has ended although the store was not stopped: it panicked, and nothing is kept any
    /// more.
    pub fn ended(&self) -> Option<String> {
        let threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        let ended = threads.iter().find(|thread| thread.is_finished())?;
        let is_stopping = self.lines.stopping.load(Ordering::Acquire);
        (!is_stopping).then(|| ended.thread().name().unwrap_or("a thread of the store").to_owned())
    }

    fn start(&self, counts: Counts) -> Result<(), StoreError> {
        let (jobs, for_writer) = channel();
        let (loads, for_reader) = channel();
        let trouble = self.database.read_only_because().map(|why| Trouble::new(&self.lines, &why));
        let writer = Writer {
            database: Arc::clone(&self.database),
            lines: Arc::clone(&self.lines),
            jobs: for_writer,
            counts,
            durability: self.config.durability,
            sync_interval: self.config.sync_interval,
            trouble,
            clock_written: None,
        };
        let (database, lines) = (Arc::clone(&self.database), Arc::clone(&self.lines));
        let spawn = |name: &'static str, run: Box<dyn FnOnce() + Send>| {
            let watch = Watch { lines: Arc::clone(&self.lines), name };
            let thread = std::thread::Builder::new().name(name.into()).spawn(move || {
                let _watch = watch;
                run();
            });
            thread.map_err(|error| self.database.wrong(&format!("cannot start a thread: {error}")))
        };
        let threads = [
            spawn("store-writer", Box::new(move || writer.run()))?,
            spawn("store-reader", Box::new(move || reader::run(&database, &lines, &for_reader)))?,
        ];
        self.threads.lock().unwrap_or_else(PoisonError::into_inner).extend(threads);
        let mut early = self.early.lock().unwrap_or_else(PoisonError::into_inner);
        for job in early.drain(..) {
            send(&self.lines, &jobs, job);
        }
        let _ = self.jobs.set(jobs);
        let _ = self.loads.set(loads);
        Ok(())
    }
}

/// A writer that is gone has said so itself, see [`Watch`].
fn send(lines: &Lines, jobs: &Sender<Job>, job: Job) {
    lines.handed.fetch_add(u64::from(matches!(job, Job::Batch { .. })), Ordering::AcqRel);
    let _ = jobs.send(job);
}

impl Drop for RocksStore {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Changes that come from no shard.
const NO_SHARD: usize = SHARDS_MAX - 1;

impl Buckets for RocksStore {
    fn load(&self, plugin: &str) -> Result<Vec<Value>, StoreError> {
        let held = self.database.held();
        let db = held.db().ok_or_else(|| self.database.wrong("it is not open"))?;
        let prefix = rows::value_key(plugin, None);
        let from = IteratorMode::From(&prefix, Direction::Forward);
        let mut values = Vec::new();
        for row in db.iterator_cf(&database::column(db, Family::KeyValue)?, from) {
            let (key, value) = row.map_err(|error| self.database.wrong(error.as_ref()))?;
            let Some(rest) = key.strip_prefix(&prefix[..]) else { break };
            if let Some((bucket, key)) = rows::take_value_key(rest) {
                values.push((bucket, key, value.into()));
            }
        }
        Ok(values)
    }

    fn keep(&self, plugin: &str, bucket: &str, key: &str, value: Option<&[u8]>) -> bool {
        if self.lines.unwritten_bytes() > CONGESTED_BYTES || self.lines.dead.get().is_some() {
            return false;
        }
        let mut batch = Batch::default();
        batch.value(plugin, bucket, key, value);
        self.lines.waiting_bytes.fetch_add(batch.len_bytes(), Ordering::Relaxed);
        let mut early = self.early.lock().unwrap_or_else(PoisonError::into_inner);
        let job = Job::Batch { shard: NO_SHARD, ticket: 0, batch };
        match self.jobs.get() {
            Some(jobs) => send(&self.lines, jobs, job),
            // Plugins begin before the broker does.
            None => early.push(job),
        }
        true
    }
}

impl Store for RocksStore {
    fn restore(&self, to: &mut dyn Restore) -> Result<(), StoreError> {
        let found = restore::restore(&self.database, &self.lines, to)?;
        // Names begin with the time, so that one that was given up does not come again.
        let since = first_id(self.lines.now_ms());
        self.lines.next_session.store(since.max(found.last_session + 1), Ordering::Release);
        self.lines.next_message.store(since.max(found.last_message + 1), Ordering::Release);
        if !found.orphans.is_empty() {
            self.lines.waiting_bytes.fetch_add(found.orphans.len_bytes(), Ordering::Relaxed);
            let mut early = self.early.lock().unwrap_or_else(PoisonError::into_inner);
            early.insert(0, Job::Batch { shard: NO_SHARD, ticket: 0, batch: found.orphans });
        }
        self.start(Counts::new(found.counts, found.gone))
    }

    fn clock_row(&self) -> Result<Option<Vec<u8>>, StoreError> {
        self.database.clock_row()
    }

    fn set_clock(&self, clock: Arc<dyn Clock>) {
        let _ = self.lines.clock.set(clock);
    }

    fn clock_changed(&self) {
        if let Some(jobs) = self.jobs.get() {
            send(&self.lines, jobs, Job::Clock);
        }
    }

    fn shard(&self, index: usize, wake: Box<dyn Fn() + Send + Sync>) -> Box<dyn ShardStore> {
        let _ = self.lines.line(index).wake.set(wake);
        let (jobs, loads) = (self.jobs.get().cloned(), self.loads.get().cloned());
        let (lines, batch, seen) = (Arc::clone(&self.lines), Batch::default(), Cell::new(0));
        Box::new(RocksShard { index, lines, jobs, loads, batch, ticket: 0, seen })
    }
}

/// The store as one shard sees it.
struct RocksShard {
    index: usize,
    lines: Arc<Lines>,
    jobs: Option<Sender<Job>>,
    loads: Option<Sender<Option<Wanted>>>,
    batch: Batch,
    /// The last batch that was handed over.
    ticket: Ticket,
    /// What the shard was told is settled.
    seen: Cell<Ticket>,
}

impl ShardStore for RocksShard {
    fn is_durable(&self) -> bool {
        true
    }

    fn is_failing(&self) -> bool {
        self.lines.failing.load(Ordering::Acquire)
    }

    fn is_congested(&self) -> bool {
        self.lines.unwritten_bytes() > CONGESTED_BYTES
    }

    fn new_session(&mut self) -> SessionId {
        NonZeroU64::new(self.lines.next_session.fetch_add(1, Ordering::Relaxed)).unwrap_or(NonZeroU64::MIN)
    }

    fn new_message(&mut self) -> MessageId {
        NonZeroU64::new(self.lines.next_message.fetch_add(1, Ordering::Relaxed)).unwrap_or(NonZeroU64::MIN)
    }

    fn write(&mut self, change: Change<'_>) {
        self.batch.add(change, &|| self.lines.now_ms());
    }

    fn commit(&mut self) {
        if self.batch.is_empty() {
            return;
        }
        // While this waits, the writer takes what is on its way; only a disk that refuses for long keeps it waiting.
        while self.lines.unwritten_bytes() > WAITING_BYTES_MAX && !self.lines.is_over() {
            std::thread::sleep(LOOK_PAUSE);
        }
        self.ticket += 1;
        let batch = std::mem::replace(&mut self.batch, self.lines.empty_batch());
        self.lines.waiting_bytes.fetch_add(batch.len_bytes(), Ordering::Relaxed);
        if let Some(jobs) = &self.jobs {
            send(&self.lines, jobs, Job::Batch { shard: self.index, ticket: self.ticket, batch });
        }
    }

    fn ticket(&self) -> Ticket {
        self.ticket + u64::from(!self.batch.is_empty())
    }

    fn committed(&self) -> Ticket {
        let committed = self.lines.line(self.index).committed.load(Ordering::Acquire);
        self.seen.set(committed);
        committed
    }

    fn take_failed(&mut self) -> Vec<Ticket> {
        let seen = self.seen.get();
        let mut failed = self.lines.line(self.index).failed.lock().unwrap_or_else(PoisonError::into_inner);
        // The writer may be further by now; of those the shard hears when it knows that they are settled.
        failed.extract_if(.., |ticket| *ticket <= seen).collect()
    }

    fn load(&mut self, load: Load) {
        // Behind what this turn has changed.
        self.commit();
        let handed = self.lines.handed.load(Ordering::Acquire);
        if let Some(loads) = &self.loads {
            // A reader that is gone has said so itself.
            let _ = loads.send(Some(Wanted { shard: self.index, handed, load }));
        }
    }

    fn loaded(&mut self) -> Vec<Loaded> {
        let line = self.lines.line(self.index);
        let mut loaded = line.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        line.loaded_bytes.store(0, Ordering::Release);
        std::mem::take(&mut *loaded)
    }
}
