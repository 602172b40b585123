//! The thread that writes: what came from all shards since the last time becomes one write, and one sync.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::time::{Duration, Instant};

use hashbrown::{HashMap, HashSet};
use rocksdb::{WriteBatch, WriteOptions};
use tracing::{error, info};
use wasmqtt_protocol::ports::{Load, StoreError, Ticket};

use super::batch::{Batch, Kind, Row};
use super::database::{Database, column};
use super::rows::{Family, Take};
use super::{Durability, Lines};

/// Bytes of one write.
const GROUP_BYTES_MAX: usize = 16 << 20;
/// What RocksDB needs for a row in a write, beside key and value: kind, column family, two lengths.
const ROW_OVERHEAD_BYTES: usize = 16;
/// Between two attempts to write when the last one failed.
const RETRY_PAUSE: Duration = Duration::from_millis(250);
/// Between two lines about it.
const COMPLAINT_PAUSE: Duration = Duration::from_secs(10);

/// For the writer.
pub(super) enum Job {
    /// A turn of a shard.
    Batch { shard: usize, ticket: Ticket, batch: Batch },
    /// Goes on to the reader, when everything before is written.
    Load { shard: usize, load: Load },
    /// Everything before is written; then the thread ends.
    Stop,
}

pub(super) struct Writer {
    pub(super) database: Arc<Database>,
    pub(super) lines: Arc<Lines>,
    pub(super) jobs: Receiver<Job>,
    pub(super) reader: Sender<(usize, Load)>,
    /// Messages for several Sessions: how many of these still need each.
    pub(super) counts: HashMap<u64, u32>,
    pub(super) durability: Durability,
    pub(super) sync_interval: Duration,
}

/// What is written together.
#[derive(Default)]
struct Group {
    batches: Vec<(usize, Ticket, Batch)>,
    loads: Vec<(usize, Load)>,
    bytes: usize,
    is_last: bool,
}

impl Group {
    fn add(&mut self, job: Job) {
        match job {
            Job::Batch { shard, ticket, batch } => {
                self.bytes += batch.len_bytes();
                self.batches.push((shard, ticket, batch));
            }
            Job::Load { shard, load } => self.loads.push((shard, load)),
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
            self.commit(&group.batches);
            self.lines.give_back(group.batches.into_iter().map(|(_, _, batch)| batch));
            for load in group.loads {
                let _ = self.reader.send(load);
            }
            if group.is_last {
                return self.sync();
            }
        }
    }

    /// Waits for something, then takes what is there.
    fn next_group(&self, last_sync: &mut Instant) -> Option<Group> {
        let mut group = Group::default();
        group.add(self.first_job(last_sync)?);
        let until = match self.durability {
            Durability::Fsync => Instant::now() + self.sync_interval,
            Durability::Os => Instant::now(),
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

    fn commit(&mut self, batches: &[(usize, Ticket, Batch)]) {
        let mut plan = Plan { is_final: !batches.iter().any(|(_, _, batch)| batch.removes()), ..Plan::default() };
        plan.writes.reserve(batches.iter().map(|(_, _, batch)| batch.len_rows()).sum());
        for row in batches.iter().flat_map(|(_, _, batch)| batch.rows()) {
            plan.add(row, &mut self.counts);
        }
        let mut complaint: Option<Instant> = None;
        while let Err(why) = self.write(&plan) {
            self.lines.failing.store(true, Ordering::Release);
            if complaint.is_none_or(|at| at.elapsed() >= COMPLAINT_PAUSE) {
                error!(error = %why, "store cannot be written; what needs it is refused until it can");
                complaint = Some(Instant::now());
                self.lines.wake_all();
            }
            if self.lines.stopping.load(Ordering::Acquire) {
                return;
            }
            std::thread::sleep(RETRY_PAUSE);
            // It says itself why not, with the next attempt to write.
            let _ = self.database.reopen();
        }
        if complaint.is_some() {
            info!("store can be written again");
            self.lines.failing.store(false, Ordering::Release);
        }
        let mut shards = HashSet::<usize>::new();
        for (shard, ticket, batch) in batches {
            let line = self.lines.line(*shard);
            line.committed.store(*ticket, Ordering::Release);
            self.lines.waiting_bytes.fetch_sub(batch.len_bytes(), Ordering::Relaxed);
            shards.insert(*shard);
        }
        shards.into_iter().for_each(|shard| self.lines.wake(shard));
    }

    fn write(&self, plan: &Plan<'_>) -> Result<(), StoreError> {
        let held = self.database.held();
        let Some(db) = held.db() else { return Err(self.database.wrong("it cannot be opened")) };
        let columns = Family::ALL.map(|family| column(db, family));
        let column = |family: Family| columns[family as usize].as_ref().map_err(|error| StoreError(error.to_string()));
        let mut rows = WriteBatch::with_capacity_bytes(plan.bytes + plan.writes.len() * ROW_OVERHEAD_BYTES);
        for write in plan.writes.iter().flatten() {
            match *write {
                Write::Put(family, key, value) => rows.put_cf(column(family)?, key, value),
                Write::Delete(family, key) => rows.delete_cf(column(family)?, key),
                Write::AllDone(id) => rows.delete_range_cf(column(Family::Done)?, key(id), key(id + 1)),
            }
        }
        if rows.is_empty() {
            return Ok(());
        }
        let mut options = WriteOptions::default();
        options.set_sync(self.durability == Durability::Fsync);
        db.write_opt(rows, &options).map_err(|error| self.database.wrong(error.as_ref()))
    }
}

fn key(id: u64) -> [u8; 8] {
    id.to_be_bytes()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Write<'a> {
    Put(Family, &'a [u8], &'a [u8]),
    Delete(Family, &'a [u8]),
    /// All rows of [`Family::Done`] of this message.
    AllDone(u64),
}

/// The rows of a group. What is put and not needed any more within it is left out.
#[derive(Default)]
struct Plan<'a> {
    writes: Vec<Option<Write<'a>>>,
    /// Keys and values.
    bytes: usize,
    /// Nothing in the group removes a row, so that none can be left out.
    is_final: bool,
    /// Rows that did not exist before, and their places.
    fresh: HashMap<(Family, &'a [u8]), usize, foldhash::fast::RandomState>,
}

impl<'a> Plan<'a> {
    fn add(&mut self, row: Row<'a>, counts: &mut HashMap<u64, u32>) {
        match row.kind {
            Kind::Message(receivers) => {
                if receivers > 1 {
                    counts.insert(id_of(row.key), receivers);
                } else {
                    self.note_fresh(row);
                }
                self.put(row);
            }
            Kind::Done => self.done(row, counts),
            Kind::Put => {
                let is_new = match row.family {
                    Family::Received => true,
                    // The first of its rows; or one whose first was left out.
                    Family::Inflight => row.value[0] <= 2 || self.forget((row.family, row.key)),
                    _ => false,
                };
                if is_new {
                    self.note_fresh(row);
                }
                self.put(row);
            }
            Kind::Delete => {
                if !self.forget((row.family, row.key)) {
                    self.writes.push(Some(Write::Delete(row.family, row.key)));
                }
            }
        }
    }

    fn note_fresh(&mut self, row: Row<'a>) {
        if !self.is_final {
            self.fresh.insert((row.family, row.key), self.writes.len());
        }
    }

    fn put(&mut self, row: Row<'a>) {
        self.bytes += row.key.len() + row.value.len();
        self.writes.push(Some(Write::Put(row.family, row.key, row.value)));
    }

    /// Leaves out what would only be put to be deleted; `false`: it is in the store already.
    fn forget(&mut self, row: (Family, &'a [u8])) -> bool {
        let Some(place) = self.fresh.remove(&row) else { return false };
        self.writes[place] = None;
        true
    }

    fn done(&mut self, row: Row<'a>, counts: &mut HashMap<u64, u32>) {
        let (message, id) = (&row.key[..8], id_of(row.key));
        match counts.get_mut(&id) {
            Some(left) if *left > 1 => {
                *left -= 1;
                self.writes.push(Some(Write::Put(Family::Done, row.key, row.value)));
            }
            Some(_) => {
                counts.remove(&id);
                self.writes.push(Some(Write::Delete(row.family, message)));
                self.writes.push(Some(Write::AllDone(id)));
            }
            None => {
                if !self.forget((row.family, message)) {
                    self.writes.push(Some(Write::Delete(row.family, message)));
                }
            }
        }
    }
}

fn id_of(key: &[u8]) -> u64 {
    Take(key).u64().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::super::rows::Put;
    use super::*;

    fn row<'a>(family: Family, kind: Kind, key: &'a [u8], value: &'a [u8]) -> Row<'a> {
        Row { family, kind, key, value }
    }

    fn done_key(id: u64, session: u64) -> Vec<u8> {
        let mut to = Vec::new();
        to.put_u64(id);
        to.put_u64(session);
        to
    }

    fn left<'a>(plan: &Plan<'a>) -> Vec<Write<'a>> {
        plan.writes.iter().flatten().copied().collect()
    }

    #[test]
    fn what_is_acknowledged_before_it_is_written_is_not_written() {
        let (id, done, handshake) = (key(7), done_key(7, 1), [1; 10]);
        let (mut plan, mut counts) = (Plan::default(), HashMap::new());
        plan.add(row(Family::Message, Kind::Message(1), &id, b"m"), &mut counts);
        plan.add(row(Family::Inflight, Kind::Put, &handshake, &[1]), &mut counts);
        plan.add(row(Family::Inflight, Kind::Delete, &handshake, &[]), &mut counts);
        plan.add(row(Family::Message, Kind::Done, &done, &[]), &mut counts);
        assert_eq!(left(&plan), []);
    }

    #[test]
    fn a_row_of_an_earlier_group_is_deleted() {
        let (id, done, handshake) = (key(7), done_key(7, 1), [1; 10]);
        let (mut plan, mut counts) = (Plan::default(), HashMap::new());
        // PUBREC and PUBCOMP of a message that was sent before.
        plan.add(row(Family::Inflight, Kind::Put, &handshake, &[3]), &mut counts);
        plan.add(row(Family::Message, Kind::Done, &done, &[]), &mut counts);
        plan.add(row(Family::Inflight, Kind::Delete, &handshake, &[]), &mut counts);
        let expected = [
            Write::Put(Family::Inflight, &handshake, &[3]),
            Write::Delete(Family::Message, &id),
            Write::Delete(Family::Inflight, &handshake),
        ];
        assert_eq!(left(&plan), expected);
    }

    #[test]
    fn a_message_goes_when_its_last_receiver_has_it() {
        let id = key(7);
        let keys = [done_key(7, 1), done_key(7, 2), done_key(7, 3)];
        let (mut plan, mut counts) = (Plan::default(), HashMap::new());
        plan.add(row(Family::Message, Kind::Message(3), &id, b"m"), &mut counts);
        for key in &keys {
            plan.add(row(Family::Message, Kind::Done, key, &[]), &mut counts);
        }
        let expected = [
            Write::Put(Family::Message, &id, b"m"),
            Write::Put(Family::Done, &keys[0], &[]),
            Write::Put(Family::Done, &keys[1], &[]),
            Write::Delete(Family::Message, &id),
            Write::AllDone(7),
        ];
        assert_eq!(left(&plan), expected);
        assert!(counts.is_empty());
    }
}
