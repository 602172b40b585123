//! The thread that writes: what came from all shards since the last time becomes one write, and one sync.
//!
//! What the disk refuses moves to `held`, but for messages, and so does everything after it; whoever waits for it is told
//! at once that it was refused. From time to time the whole of it is tried again.

use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use hashbrown::HashSet;
use rocksdb::{WriteBatch, WriteOptions};
use tracing::{error, info};
use wasmqtt_protocol::ports::{StoreError, Ticket};

use super::batch::Batch;
use super::database::{CLOCK_KEY, Database, column};
use super::plan::{Counts, Plan, Write};
use super::rows::Family;
use super::{Durability, Lines};

/// Bytes of one write.
const GROUP_BYTES_MAX: usize = 16 << 20;
/// What RocksDB needs for a row in a write, beside key and value: kind, column family, two lengths.
const ROW_OVERHEAD_BYTES: usize = 16;
/// Between two attempts to write when the last one failed: at first, and after many.
const RETRY_PAUSE: Duration = Duration::from_millis(250);
const RETRY_PAUSE_MAX: Duration = Duration::from_secs(4);
/// Between two lines about it.
const COMPLAINT_PAUSE: Duration = Duration::from_secs(10);
/// How old the row with the broker's clock may become while other rows are written.
const CLOCK_PAUSE: Duration = Duration::from_secs(2);

/// For the writer.
pub(super) enum Job {
    /// A turn of a shard.
    Batch { shard: usize, ticket: Ticket, batch: Batch },
    /// The broker's clock changed in a way that must last.
    Clock,
    /// Everything before is written; then the thread ends.
    Stop,
}

pub(super) struct Writer {
    pub(super) database: Arc<Database>,
    pub(super) lines: Arc<Lines>,
    pub(super) jobs: Receiver<Job>,
    pub(super) counts: Counts,
    pub(super) durability: Durability,
    pub(super) sync_interval: Duration,
    /// The disk refuses at present.
    pub(super) trouble: Option<Trouble>,
    pub(super) clock_written: Option<Instant>,
}

/// Since the disk refused, until it takes everything again.
pub(super) struct Trouble {
    retry_at: Instant,
    pause: Duration,
    complained_at: Instant,
    /// Messages that were refused: of clients, that were told so, of Sessions that are gone, and of plugins.
    messages: u64,
}

impl Trouble {
    /// Begins; the log says why.
    pub(super) fn new(lines: &Lines, why: &StoreError) -> Self {
        error!(error = %why, "store cannot be written; what needs it is refused until it can");
        lines.failing.store(true, Ordering::Release);
        let now = Instant::now();
        Self { retry_at: now + RETRY_PAUSE, pause: RETRY_PAUSE, complained_at: now, messages: 0 }
    }

    fn goes_on(&mut self, why: &StoreError) {
        self.pause = (self.pause * 2).min(RETRY_PAUSE_MAX);
        self.retry_at = Instant::now() + self.pause;
        if self.complained_at.elapsed() >= COMPLAINT_PAUSE {
            error!(error = %why, "store still cannot be written");
            self.complained_at = Instant::now();
        }
    }
}

/// What is written together.
#[derive(Default)]
struct Group {
    batches: Vec<(usize, Ticket, Batch)>,
    bytes: usize,
    clock: bool,
    is_last: bool,
}

impl Group {
    fn add(&mut self, job: Job) {
        match job {
            Job::Batch { shard, ticket, batch } => {
                self.bytes += batch.len_bytes();
                self.batches.push((shard, ticket, batch));
            }
            Job::Clock => self.clock = true,
            Job::Stop => self.is_last = true,
        }
    }

    fn is_full(&self) -> bool {
        self.is_last || self.bytes >= GROUP_BYTES_MAX
    }
}

impl Writer {
    pub(super) fn run(mut self) {
        let mut last_sync = Instant::now();
        while let Some(group) = self.next_group(&mut last_sync) {
            self.settle(&group);
            let count = group.batches.len() as u64;
            self.lines.waiting_bytes.fetch_sub(group.bytes, Ordering::Relaxed);
            self.lines.settled(count);
            self.lines.give_back(group.batches.into_iter().map(|(_, _, batch)| batch));
            if group.is_last {
                return self.finish();
            }
        }
    }

    /// Waits for something, then takes what is there. Empty: it is time to try again what was refused.
    fn next_group(&self, last_sync: &mut Instant) -> Option<Group> {
        let mut group = Group::default();
        let first = match &self.trouble {
            Some(trouble) => match self.jobs.recv_timeout(trouble.retry_at.saturating_duration_since(Instant::now())) {
                Ok(job) => job,
                Err(RecvTimeoutError::Timeout) => return Some(group),
                Err(RecvTimeoutError::Disconnected) => return None,
            },
            None => self.first_job(last_sync)?,
        };
        group.add(first);
        let until = match self.durability {
            Durability::Fsync if self.trouble.is_none() => Instant::now() + self.sync_interval,
            _ => Instant::now(),
        };
        while !group.is_full() {
            match self.jobs.try_recv() {
                Ok(job) => group.add(job),
                Err(TryRecvError::Disconnected) => break,
                Err(TryRecvError::Empty) => {
                    match self.jobs.recv_timeout(until.saturating_duration_since(Instant::now())) {
                        Ok(job) => group.add(job),
                        Err(_) => break,
                    }
                }
            }
        }
        Some(group)
    }

    /// Syncs from time to time meanwhile, if that was asked for.
    fn first_job(&self, last_sync: &mut Instant) -> Option<Job> {
        if self.durability == Durability::Fsync || self.sync_interval.is_zero() {
            return self.jobs.recv().ok();
        }
        loop {
            let due = (*last_sync + self.sync_interval).saturating_duration_since(Instant::now());
            if due.is_zero() {
                self.sync();
                *last_sync = Instant::now();
                continue;
            }
            match self.jobs.recv_timeout(due) {
                Ok(job) => return Some(job),
                Err(RecvTimeoutError::Disconnected) => return None,
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    fn sync(&self) {
        let held = self.database.held();
        if let Some(Err(error)) = held.db().map(|db| db.flush_wal(true)) {
            error!(%error, "store: cannot sync");
        }
    }

    /// Writes a group, or says that it is refused.
    fn settle(&mut self, group: &Group) {
        let batches = &group.batches;
        let removes = batches.iter().any(|(_, _, batch)| batch.removes());
        let mut plan = Plan::new(batches.iter().map(|(_, _, batch)| batch.len_rows()).sum(), removes);
        for row in batches.iter().flat_map(|(_, _, batch)| batch.rows()) {
            plan.add(row, &mut self.counts);
        }
        if self.trouble.is_none() {
            if group.clock || group.is_last {
                self.clock_written = None;
            }
            match self.write(plan.writes(), group.is_last) {
                Ok(()) => return self.committed(batches),
                Err(why) => self.trouble = Some(Trouble::new(&self.lines, &why)),
            }
        }
        self.refuse(&plan, batches);
        if self.trouble.as_ref().is_some_and(|trouble| Instant::now() >= trouble.retry_at) {
            self.retry();
        }
    }

    fn committed(&self, batches: &[(usize, Ticket, Batch)]) {
        let mut shards = HashSet::<usize>::new();
        for (shard, ticket, _) in batches {
            self.lines.line(*shard).committed.store(*ticket, Ordering::Release);
            shards.insert(*shard);
        }
        shards.into_iter().for_each(|shard| self.lines.wake(shard));
    }

    /// Has nobody wait for it. Messages are refused with it, unless a client has one already; all else stays in memory.
    fn refuse(&mut self, plan: &Plan<'_>, batches: &[(usize, Ticket, Batch)]) {
        {
            let under_way = |write: Write<'_>| match write {
                Write::Put(Family::Inflight, _, row) => row.get(1..9).map(<[u8]>::to_vec),
                _ => None,
            };
            let under_way: HashSet<Vec<u8>> = plan.writes().filter_map(under_way).collect();
            let mut held = self.lines.held.lock().unwrap_or_else(PoisonError::into_inner);
            for write in plan.writes() {
                match write {
                    Write::Put(Family::Message | Family::Feed, key, _) if !under_way.contains(key) => {
                        self.counts.drop_message(key);
                        self.trouble.iter_mut().for_each(|trouble| trouble.messages += 1);
                    }
                    write => held.add(write),
                }
            }
            self.lines.held_bytes.store(held.bytes(), Ordering::Relaxed);
        }
        let mut shards = HashSet::<usize>::new();
        for (shard, ticket, _) in batches {
            let line = self.lines.line(*shard);
            // Before the shard sees that it is settled.
            // What is for no shard has no number, and nobody asks for it.
            if *ticket > 0 {
                line.failed.lock().unwrap_or_else(PoisonError::into_inner).push(*ticket);
            }
            line.committed.store(*ticket, Ordering::Release);
            shards.insert(*shard);
        }
        shards.into_iter().for_each(|shard| self.lines.wake(shard));
    }

    /// Tries again what was refused; gives it up to the log when the broker ends.
    fn retry(&mut self) {
        // RocksDB refuses everything after a failed write: it is closed and opened.
        let held = self.lines.held.lock().unwrap_or_else(PoisonError::into_inner).bytes();
        let outcome = self.database.reopen(held).and_then(|()| {
            self.clock_written = None;
            let lines = Arc::clone(&self.lines);
            let held = lines.held.lock().unwrap_or_else(PoisonError::into_inner);
            self.write(held.writes(), false)
        });
        if let Err(why) = outcome {
            if let Some(trouble) = &mut self.trouble {
                trouble.goes_on(&why);
            }
            return;
        }
        let refused_messages = self.trouble.take().map_or(0, |trouble| trouble.messages);
        info!(refused_messages, "store can be written again");
        // Whoever looks for it now finds it in the database.
        self.lines.held.lock().unwrap_or_else(PoisonError::into_inner).clear();
        self.lines.held_bytes.store(0, Ordering::Relaxed);
        self.lines.failing.store(false, Ordering::Release);
        self.lines.wake_all();
    }

    fn finish(&mut self) {
        if self.trouble.is_some() {
            self.retry();
        }
        let held = self.lines.held.lock().unwrap_or_else(PoisonError::into_inner).len();
        if held > 0 {
            error!(rows = held, "the broker ends before the store could be written; none of it was acknowledged");
        }
        self.sync();
    }

    fn write<'a>(&mut self, writes: impl Iterator<Item = Write<'a>> + Clone, is_last: bool) -> Result<(), StoreError> {
        let gone = self.counts.ranges(is_last);
        let is_due = self.clock_written.is_none_or(|at| at.elapsed() >= CLOCK_PAUSE);
        let clock = self.lines.clock.get().filter(|_| is_due).map(|clock| clock.row());
        let held = self.database.held();
        let Some(db) = held.db() else { return Err(self.database.wrong("it cannot be opened")) };
        let columns = Family::ALL.map(|family| column(db, family));
        let column = |family: Family| columns[family as usize].as_ref().map_err(|error| StoreError(error.to_string()));
        let size = |write: Write<'_>| match write {
            Write::Put(_, key, value) => key.len() + value.len() + ROW_OVERHEAD_BYTES,
            Write::Delete(_, key) => key.len() + ROW_OVERHEAD_BYTES,
        };
        let mut rows = WriteBatch::with_capacity_bytes(writes.clone().map(size).sum());
        for write in writes {
            match write {
                Write::Put(family, key, value) => rows.put_cf(column(family)?, key, value),
                Write::Delete(family, key) => rows.delete_cf(column(family)?, key),
            }
        }
        for (from, to) in &gone {
            rows.delete_range_cf(column(Family::Done)?, from.to_be_bytes(), to.to_be_bytes());
        }
        if let Some(row) = &clock {
            rows.put_cf(column(Family::Meta)?, CLOCK_KEY, row);
        }
        if rows.is_empty() {
            return Ok(());
        }
        let mut options = WriteOptions::default();
        options.set_sync(self.durability == Durability::Fsync);
        db.write_opt(rows, &options).map_err(|error| self.database.wrong(error.as_ref()))?;
        if !gone.is_empty() {
            self.counts.forget_gone();
        }
        if clock.is_some() {
            self.clock_written = Some(Instant::now());
        }
        Ok(())
    }
}
