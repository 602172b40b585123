//! What outlives the broker: Sessions, their subscriptions and messages, retained messages, bans. In RocksDB.
//!
//! Shards turn the changes of each of their turns into rows (`batch`, `rows`) and hand them to one thread
//! (`writer`), which writes what came from all of them together, syncs once, and tells them how far it is. Another
//! thread (`reader`) reads messages that Sessions want back. `restore` reads everything when the broker starts.
//!
//! A message is one row, with all its receivers in it; it goes when the last of them has it. Which messages wait for a
//! Session is not written anywhere else: the broker knows that from these rows.

mod batch;
mod database;
mod reader;
mod restore;
mod rows;
mod tools;
mod writer;

use std::num::NonZeroU64;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rocksdb::{Direction, IteratorMode};
use wasmqtt_protocol::ports::{Buckets, Change, Load, Loaded, Restore, ShardStore, Store, StoreError, Ticket, Value};
use wasmqtt_protocol::router::{MessageId, SessionId};

use self::batch::Batch;
use self::database::Database;
use self::rows::Family;
use self::writer::{Job, Writer};

pub use self::tools::{Damage, FamilyStats, Offline};

/// Form of all rows. An older store is brought up to it, a newer one refused.
const SCHEMA: u32 = 2;
/// Bytes waiting to be written beyond which shards stop reading from clients.
const CONGESTED_BYTES: usize = 64 << 20;
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

/// What a shard and the threads of the store share.
#[derive(Default)]
struct Line {
    committed: AtomicU64,
    loaded: Mutex<Vec<Loaded>>,
    wake: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

struct Lines {
    shards: Box<[Line]>,
    waiting_bytes: AtomicUsize,
    failing: AtomicBool,
    stopping: AtomicBool,
    next_session: AtomicU64,
    next_message: AtomicU64,
    /// Batches that were written, for their memory.
    spare: Mutex<Vec<Batch>>,
}

impl Lines {
    fn new() -> Self {
        Self {
            shards: (0..SHARDS_MAX).map(|_| Line::default()).collect(),
            waiting_bytes: AtomicUsize::new(0),
            failing: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            next_session: AtomicU64::new(1),
            next_message: AtomicU64::new(1),
            spare: Mutex::default(),
        }
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

/// The store.
pub struct RocksStore {
    config: StoreConfig,
    database: Arc<Database>,
    lines: Arc<Lines>,
    jobs: OnceLock<Sender<Job>>,
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
        let (lines, jobs, threads) = (Arc::new(Lines::new()), OnceLock::new(), Mutex::default());
        Ok(Arc::new(Self { config, database, lines, jobs, early: Mutex::default(), threads }))
    }

    /// Writes and syncs what shards have handed over, unless it cannot be written, and ends the threads.
    pub fn stop(&self) {
        self.lines.stopping.store(true, Ordering::Release);
        if let Some(jobs) = self.jobs.get() {
            let _ = jobs.send(Job::Stop);
        }
        for thread in self.threads.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
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

    fn start(&self, counts: hashbrown::HashMap<u64, u32>) -> Result<(), StoreError> {
        let (jobs, for_writer) = channel();
        let (loads, for_reader) = channel();
        let writer = Writer {
            database: Arc::clone(&self.database),
            lines: Arc::clone(&self.lines),
            jobs: for_writer,
            reader: loads,
            counts,
            durability: self.config.durability,
            sync_interval: self.config.sync_interval,
        };
        let (database, lines) = (Arc::clone(&self.database), Arc::clone(&self.lines));
        let spawn = |name: &str, run: Box<dyn FnOnce() + Send>| {
            let thread = std::thread::Builder::new().name(name.into()).spawn(run);
            thread.map_err(|error| self.database.wrong(&format!("cannot start a thread: {error}")))
        };
        let threads = [
            spawn("store-writer", Box::new(move || writer.run()))?,
            spawn("store-reader", Box::new(move || reader::run(&database, &lines, &for_reader)))?,
        ];
        self.threads.lock().unwrap_or_else(PoisonError::into_inner).extend(threads);
        let mut early = self.early.lock().unwrap_or_else(PoisonError::into_inner);
        for job in early.drain(..) {
            let _ = jobs.send(job);
        }
        let _ = self.jobs.set(jobs);
        Ok(())
    }
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
        if self.lines.waiting_bytes.load(Ordering::Relaxed) > CONGESTED_BYTES {
            return false;
        }
        let mut batch = Batch::default();
        batch.value(plugin, bucket, key, value);
        self.lines.waiting_bytes.fetch_add(batch.len_bytes(), Ordering::Relaxed);
        let mut early = self.early.lock().unwrap_or_else(PoisonError::into_inner);
        let job = Job::Batch { shard: NO_SHARD, ticket: 0, batch };
        match self.jobs.get() {
            Some(jobs) => drop(jobs.send(job)),
            // Plugins begin before the broker does.
            None => early.push(job),
        }
        true
    }
}

impl Store for RocksStore {
    fn restore(&self, to: &mut dyn Restore) -> Result<(), StoreError> {
        let found = restore::restore(&self.database, to)?;
        // Names begin with the time, so that one that was given up does not come again.
        let since = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64) << 20;
        self.lines.next_session.store(since.max(found.last_session + 1), Ordering::Release);
        self.lines.next_message.store(since.max(found.last_message + 1), Ordering::Release);
        self.start(found.counts)
    }

    fn shard(&self, index: usize, wake: Box<dyn Fn() + Send + Sync>) -> Box<dyn ShardStore> {
        let _ = self.lines.line(index).wake.set(wake);
        let jobs = self.jobs.get().cloned();
        Box::new(RocksShard { index, lines: Arc::clone(&self.lines), jobs, batch: Batch::default(), ticket: 0 })
    }
}

/// The store as one shard sees it.
struct RocksShard {
    index: usize,
    lines: Arc<Lines>,
    jobs: Option<Sender<Job>>,
    batch: Batch,
    /// The last batch that was handed over.
    ticket: Ticket,
}

impl RocksShard {
    fn send(&self, job: Job) {
        if let Some(jobs) = &self.jobs {
            let _ = jobs.send(job);
        }
    }
}

impl ShardStore for RocksShard {
    fn is_durable(&self) -> bool {
        true
    }

    fn is_failing(&self) -> bool {
        self.lines.failing.load(Ordering::Acquire)
    }

    fn is_congested(&self) -> bool {
        self.lines.waiting_bytes.load(Ordering::Relaxed) > CONGESTED_BYTES
    }

    fn new_session(&mut self) -> SessionId {
        NonZeroU64::new(self.lines.next_session.fetch_add(1, Ordering::Relaxed)).unwrap_or(NonZeroU64::MIN)
    }

    fn new_message(&mut self) -> MessageId {
        NonZeroU64::new(self.lines.next_message.fetch_add(1, Ordering::Relaxed)).unwrap_or(NonZeroU64::MIN)
    }

    fn write(&mut self, change: Change<'_>) {
        self.batch.add(change);
    }

    fn commit(&mut self) {
        if self.batch.is_empty() {
            return;
        }
        self.ticket += 1;
        let batch = std::mem::replace(&mut self.batch, self.lines.empty_batch());
        self.lines.waiting_bytes.fetch_add(batch.len_bytes(), Ordering::Relaxed);
        self.send(Job::Batch { shard: self.index, ticket: self.ticket, batch });
    }

    fn ticket(&self) -> Ticket {
        self.ticket + u64::from(!self.batch.is_empty())
    }

    fn committed(&self) -> Ticket {
        self.lines.line(self.index).committed.load(Ordering::Acquire)
    }

    fn load(&mut self, load: Load) {
        // Behind what this turn has changed.
        self.commit();
        self.send(Job::Load { shard: self.index, load });
    }

    fn loaded(&mut self) -> Vec<Loaded> {
        let mut loaded = self.lines.line(self.index).loaded.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *loaded)
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;
    use std::time::Instant;

    use bytes::Bytes;
    use wasmqtt_protocol::codec::{PacketId, Qos, SubscribeOptions};
    use wasmqtt_protocol::ports::{BanPattern, Client, Receiver, RestoredSession};
    use wasmqtt_protocol::router::{Message, SessionKey, Subscription};
    use wasmqtt_protocol::session::{Step, WillMessage, Wish};
    use wasmqtt_protocol::topic::Filter;

    use super::*;

    #[derive(Default)]
    struct All {
        sessions: Vec<RestoredSession>,
        retained: Vec<(Message, bool, u64)>,
        bans: Vec<(BanPattern, u64, String)>,
        fed: Vec<String>,
    }

    impl Restore for All {
        fn session(&mut self, session: RestoredSession) {
            self.sessions.push(session);
        }
        fn retained(&mut self, message: Message, sealed: bool, stamp: u64) {
            self.retained.push((message, sealed, stamp));
        }
        fn fed(&mut self, plugin: &str, _: MessageId, client: Option<Client>, message: Message, _: bool) -> bool {
            let client_id = client.map_or("-".into(), |client| client.client_id.to_string());
            self.fed.push(format!("{plugin} {client_id} {}", message.topic));
            plugin != "gone"
        }
        fn ban(&mut self, pattern: BanPattern, until_ms: u64, note: &str) {
            self.bans.push((pattern, until_ms, note.to_owned()));
        }
    }

    fn open(path: &std::path::Path) -> (Arc<RocksStore>, All) {
        let store = RocksStore::open(StoreConfig::new(path)).expect("opens");
        let mut all = All::default();
        store.restore(&mut all).expect("is read");
        (store, all)
    }

    fn settle(shard: &mut dyn ShardStore) {
        shard.commit();
        let begun = Instant::now();
        while shard.committed() < shard.ticket() {
            assert!(begun.elapsed() < Duration::from_secs(20), "not committed");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn client(client_id: &str) -> Client {
        Client { client_id: client_id.into(), principal: "p".into(), listener: "l".into() }
    }

    fn message(topic: &str, expires_at_ms: Option<u64>) -> Message {
        Message {
            topic: topic.into(),
            payload: Bytes::from_static(b"payload"),
            properties: Bytes::from_static(&[1, 1]),
            qos: Qos::ExactlyOnce,
            retain: true,
            expires_at_ms,
            publisher: None,
        }
    }

    fn wish(ids: &[NonZeroU32]) -> Wish<'_> {
        Wish { qos: Qos::AtLeastOnce, retain: true, ids, id: None }
    }

    fn packet_id(id: u16) -> PacketId {
        PacketId::new(id).expect("not zero")
    }

    /// All that can be told, and what is left of it after another start.
    #[test]
    fn what_is_written_comes_back() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (store, _) = open(folder.path());
        let mut shard = store.shard(0, Box::new(|| {}));
        let (one, two) = (shard.new_session(), shard.new_session());
        let will = WillMessage { message: message("will", None), expiry: Some(9), delay: 5 };
        for (session, name, closed_at_ms) in [(one, "one", None), (two, "two", Some(77))] {
            let (client, will) = (client(name), (session == one).then_some(&will));
            shard.write(Change::Session { session, client: &client, expiry: 60, closed_at_ms, will });
        }
        let options = SubscribeOptions { qos: Qos::ExactlyOnce, no_local: true, ..SubscribeOptions::default() };
        let subscription = Subscription { options, id: NonZeroU32::new(3) };
        let filters = ["a/#", "$share/g/b", "gone"].map(|filter| Filter::parse(filter).expect("a filter"));
        for filter in &filters {
            shard.write(Change::Subscribed { session: one, filter, subscription: &subscription });
        }
        shard.write(Change::Unsubscribed { session: one, filter: &filters[2] });
        let ids = [NonZeroU32::MIN];
        let both = [one, two].map(|session| Receiver { session, wish: wish(&ids) });
        let names: Vec<MessageId> = (0..4).map(|_| shard.new_message()).collect();
        for id in &names {
            let message = message("a", Some(1_000_000));
            shard.write(Change::Queued { id: *id, message: (&message).into(), sealed: false, receivers: &both });
        }
        let steps = [
            Step::Sent { packet_id: packet_id(65_535), id: names[0], qos: Qos::AtLeastOnce },
            Step::Sent { packet_id: packet_id(1), id: names[1], qos: Qos::ExactlyOnce },
            Step::Releasing { packet_id: packet_id(1), id: Some(names[1]) },
            Step::Done { packet_id: None, id: names[2] },
            Step::Received { packet_id: packet_id(7) },
            Step::Received { packet_id: packet_id(8) },
            Step::ReceivedDone { packet_id: packet_id(8) },
        ];
        for step in steps {
            shard.write(Change::Step { session: one, step });
        }
        for (topic, sealed) in [("r/1", true), ("r/2", false)] {
            shard.write(Change::Retained { message: (&message(topic, None)).into(), sealed, stamp: 41 });
        }
        shard.write(Change::RetainedRemoved { topic: "r/2" });
        let pattern = BanPattern::Address { network: "10.0.0.0".parse().expect("an address"), prefix: 8 };
        shard.write(Change::Ban { pattern: &pattern, until_ms: 99, note: "why" });
        settle(&mut *shard);
        drop((shard, store));

        let (store, all) = open(folder.path());
        let [first, second] = &all.sessions[..] else { panic!("{:?}", all.sessions) };
        assert_eq!((&*first.client.client_id, first.expiry, first.closed_at_ms), ("one", 60, None));
        let will = first.will.as_ref().expect("a will");
        assert_eq!((&*will.message.topic, will.expiry, will.delay), ("will", Some(9), 5));
        let mut found: Vec<&str> = first.subscriptions.iter().map(|(filter, _)| filter.as_str()).collect();
        found.sort_unstable();
        assert_eq!(found, ["$share/g/b", "a/#"]);
        assert!(first.subscriptions.iter().all(|(_, found)| *found == subscription));
        assert_eq!(first.parked.iter().map(|parked| parked.id).collect::<Vec<_>>(), [names[3]]);
        let inflight = [(1, None), (65_535, Some((names[0], Qos::AtLeastOnce)))];
        assert_eq!((&first.inflight[..], &first.received[..]), (&inflight[..], &[7][..]));
        assert_eq!((second.closed_at_ms, second.parked.len(), second.will.is_some()), (Some(77), 4, false));
        assert_eq!(all.retained.len(), 1);
        assert!(&*all.retained[0].0.topic == "r/1" && all.retained[0].1 && all.retained[0].2 == 41, "sealed");
        assert_eq!(all.bans, [(pattern, 99, "why".to_owned())]);

        let mut shard = store.shard(0, Box::new(|| {}));
        assert!(shard.new_message() > names[3] && shard.new_session() > two);
        let key = SessionKey { shard: 0, slot: 0, epoch: 0 };
        let gone = MessageId::new(u64::MAX).expect("not zero");
        shard.load(Load { key, session: two, turn: 5, ids: vec![names[0], gone] });
        let begun = Instant::now();
        let loaded = loop {
            if let Some(loaded) = shard.loaded().pop() {
                break loaded;
            }
            assert!(begun.elapsed() < Duration::from_secs(20), "not loaded");
        };
        let [(_, Some(kept)), (_, None)] = &loaded.messages[..] else { panic!("{loaded:?}") };
        assert_eq!((&kept.message.payload[..], kept.qos, kept.retain), (&b"payload"[..], Qos::AtLeastOnce, true));
        assert_eq!((kept.ids.as_slice(), kept.message.expires_at_ms), (&ids[..], Some(1_000_000)));
    }

    /// The last of several receivers takes the row with it, also when the others had it before another start.
    #[test]
    fn a_message_is_gone_when_all_have_it() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (store, _) = open(folder.path());
        let mut shard = store.shard(0, Box::new(|| {}));
        let sessions = [shard.new_session(), shard.new_session()];
        for session in sessions {
            let client = client(&session.to_string());
            shard.write(Change::Session { session, client: &client, expiry: 1, closed_at_ms: None, will: None });
        }
        let (id, receivers) = (shard.new_message(), sessions.map(|session| Receiver { session, wish: wish(&[]) }));
        shard.write(Change::Queued { id, message: (&message("a", None)).into(), sealed: false, receivers: &receivers });
        settle(&mut *shard);
        shard.write(Change::Step { session: sessions[0], step: Step::Done { packet_id: None, id } });
        settle(&mut *shard);
        drop((shard, store));
        let (store, all) = open(folder.path());
        assert_eq!(all.sessions.iter().map(|session| session.parked.len()).collect::<Vec<_>>(), [0, 1]);
        let mut shard = store.shard(0, Box::new(|| {}));
        shard.write(Change::Step { session: sessions[1], step: Step::Done { packet_id: None, id } });
        settle(&mut *shard);
        drop((shard, store));
        let stats = Offline::open(folder.path()).and_then(|store| store.stats(|_| {})).expect("is read");
        let rows = |name: &str| stats.iter().find(|family| family.family == name).map(|family| family.rows);
        assert_eq!((rows("message"), rows("done"), rows("session")), (Some(0), Some(0), Some(2)));
    }

    /// Each plugin gets what it has not taken; what is for nobody any more goes.
    #[test]
    fn what_plugins_collect_comes_back() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (store, _) = open(folder.path());
        let mut shard = store.shard(0, Box::new(|| {}));
        let publisher = client("c");
        let plugins: [Arc<str>; 2] = ["tap".into(), "gone".into()];
        let ids: Vec<MessageId> = (0..3).map(|_| shard.new_message()).collect();
        for (id, plugins) in [(ids[0], &plugins[..]), (ids[1], &plugins[..1]), (ids[2], &plugins[1..])] {
            let (client, message) = (Some(&publisher), message("t", None));
            shard.write(Change::Fed { id, client, message: (&message).into(), sealed: false, plugins });
        }
        shard.write(Change::FedDone { plugin: "tap", id: ids[1] });
        settle(&mut *shard);
        drop((shard, store));
        let (store, all) = open(folder.path());
        assert_eq!(all.fed, ["tap c t", "gone c t", "gone c t"]);
        drop(store);
        let (store, all) = open(folder.path());
        assert_eq!(all.fed, ["tap c t", "gone c t"]);
        let mut shard = store.shard(0, Box::new(|| {}));
        shard.write(Change::FedDone { plugin: "tap", id: ids[0] });
        settle(&mut *shard);
        drop((shard, store));
        assert!(open(folder.path()).1.fed.is_empty());
    }

    #[test]
    fn a_newer_store_is_refused_and_says_so() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        drop(open(folder.path()));
        {
            let database = Database::open(&StoreConfig::new(folder.path())).expect("opens");
            let held = database.held();
            let db = held.db().expect("is open");
            let meta = database::column(db, rows::Family::Meta).expect("is there");
            db.put_cf(&meta, b"schema", (SCHEMA + 1).to_be_bytes()).expect("is written");
        }
        let error = RocksStore::open(StoreConfig::new(folder.path())).err().expect("is refused").to_string();
        assert!(error.contains("schema 3") && error.contains("newer"), "{error}");
    }

    #[test]
    fn one_folder_is_for_one_broker() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let _first = open(folder.path());
        let error = RocksStore::open(StoreConfig::new(folder.path())).err().expect("is refused").to_string();
        assert!(error.contains("another broker uses it"), "{error}");
    }
}
