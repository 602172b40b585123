//! The store by itself.

use std::num::NonZeroU32;
use std::time::Instant;

use bytes::Bytes;
use smallvec::SmallVec;
use wasmqtt_protocol::codec::{PacketId, Qos, SubscribeOptions};
use wasmqtt_protocol::ports::{BanPattern, Client, Receiver, RestoredSession};
use wasmqtt_protocol::router::{Message, SessionKey, Subscription};
use wasmqtt_protocol::session::{Kept, Step, WillMessage, Wish};
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

/// A thread that ends early is not taken for one that is slow.
#[test]
fn a_thread_that_ends_early_is_noticed() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (store, _) = open(folder.path());
    let shard = store.shard(0, Box::new(|| {}));
    assert!(!shard.is_failing() && store.keep("p", "b", "k", Some(b"v")));
    let watch = Watch { lines: Arc::clone(&store.lines), name: "store-writer" };
    let ended = std::thread::spawn(move || {
        let _watch = watch;
        panic!("as it may happen");
    });
    assert!(ended.join().is_err());
    assert!(shard.is_failing() && !store.keep("p", "b", "k", Some(b"v")));
}

/// What cannot be written for long takes no more memory than that.
#[test]
fn what_waits_to_be_written_is_bounded() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (store, _) = open(folder.path());
    let mut shard = store.shard(0, Box::new(|| {}));
    store.lines.held_bytes.store(CONGESTED_BYTES + 1, Ordering::Relaxed);
    assert!(shard.is_congested() && !store.keep("p", "b", "k", Some(b"v")));
    store.lines.held_bytes.store(WAITING_BYTES_MAX + 1, Ordering::Relaxed);
    let lines = Arc::clone(&store.lines);
    let disk = std::thread::spawn(move || {
        std::thread::sleep(5 * LOOK_PAUSE);
        let handed = lines.handed.load(Ordering::Acquire);
        lines.held_bytes.store(0, Ordering::Relaxed);
        handed
    });
    shard.write(Change::RetainedRemoved { topic: "a" });
    shard.commit();
    assert_eq!(disk.join().expect("ends"), 0, "nothing was handed over before");
    settle(&mut *shard);
}

/// Nobody writes so far: buckets of plugins are refused first, and then shards wait, until the writer takes what is there.
#[test]
fn what_nobody_writes_fills_its_bounds() {
    const VALUE_BYTES: usize = 900_000;
    let folder = tempfile::tempdir().expect("a temporary folder");
    let store = RocksStore::open(StoreConfig::new(folder.path())).expect("opens");
    let value = vec![b'x'; VALUE_BYTES];
    let kept = (0..1000).take_while(|n: &u32| store.keep("p", "b", &n.to_string(), Some(&value))).count();
    assert!((CONGESTED_BYTES / (VALUE_BYTES + 1000)..=CONGESTED_BYTES / VALUE_BYTES + 1).contains(&kept), "{kept}");
    let store = &store;
    let write = || {
        let mut shard = store.shard(0, Box::new(|| {}));
        assert!(shard.is_congested(), "clients that need the store are not read");
        let large = Message { payload: Bytes::from(vec![b'x'; 1 << 20]), ..message("t", None) };
        shard.write(Change::Retained { message: (&large).into(), sealed: false, stamp: 1 });
        shard.commit();
    };
    let written = (0..1000).take_while(|_| store.lines.unwritten_bytes() <= WAITING_BYTES_MAX).map(|_| write()).count();
    assert!(written <= ((WAITING_BYTES_MAX - CONGESTED_BYTES) >> 20) + 1, "{written}");
    std::thread::scope(|scope| {
        let waiting = scope.spawn(write);
        std::thread::sleep(5 * LOOK_PAUSE);
        assert!(!waiting.is_finished(), "the shard waits");
        store.restore(&mut All::default()).expect("is read, and the writer begins");
        waiting.join().expect("goes on");
    });
}

/// A shard that takes nothing has the reader wait, and does not get the memory of everybody.
#[test]
fn what_was_read_waits_for_its_shard() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (store, _) = open(folder.path());
    let loaded = |topic: usize| {
        let kept = |_| {
            let message = Arc::new(message(&"t".repeat(topic), None));
            Some(Kept { message, sealed: false, qos: Qos::AtLeastOnce, retain: false, ids: SmallVec::new() })
        };
        let messages = (1..=1000).map(|id| (MessageId::new(id).expect("not zero"), kept(id))).collect();
        Loaded { key: SessionKey { shard: 0, slot: 0, epoch: 0 }, turn: 0, messages }
    };
    // Topics count like payloads.
    let most = LOADED_BYTES_MAX / 1000;
    store.lines.put_loaded(0, loaded(most / 2));
    store.lines.put_loaded(0, loaded(most / 2));
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| store.lines.put_loaded(0, loaded(1)));
        std::thread::sleep(5 * LOOK_PAUSE);
        assert!(!reader.is_finished(), "it waits");
        store.lines.put_loaded(1, loaded(1));
        let mut shard = store.shard(0, Box::new(|| {}));
        assert_eq!(shard.loaded().len(), 2);
        reader.join().expect("goes on");
        assert_eq!(shard.loaded().len(), 1);
    });
}

/// A batch is named as refused when the shard knows that it is settled, and not before.
#[test]
fn batches_that_were_refused_are_named_when_they_are_settled() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (store, _) = open(folder.path());
    let mut shard = store.shard(0, Box::new(|| {}));
    let line = store.lines.line(0);
    line.failed.lock().expect("not poisoned").extend([3, 4]);
    line.committed.store(3, Ordering::Release);
    assert_eq!(shard.committed(), 3);
    line.committed.store(4, Ordering::Release);
    assert_eq!(shard.take_failed(), [3]);
    assert!(shard.take_failed().is_empty());
    assert_eq!(shard.committed(), 4);
    assert_eq!(shard.take_failed(), [4]);
}

/// Nobody else reads what clients wrote.
#[test]
fn a_store_is_for_its_owner_alone() {
    use std::os::unix::fs::PermissionsExt as _;
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("data/store");
    let mode = |path: &std::path::Path| std::fs::metadata(path).expect("is there").permissions().mode() & 0o777;
    drop(open(&path));
    // As an older broker made it.
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("is set");
    let (store, _) = open(&path);
    assert_eq!((mode(&folder.path().join("data")), mode(&path), mode(&path.join("CURRENT"))), (0o700, 0o700, 0o600));
    let copy = folder.path().join("copy");
    store.backup(&copy).expect("is copied");
    assert_eq!((mode(&copy), mode(&copy.join("CURRENT"))), (0o700, 0o600));
}
