//! Sessions belong to identities; what a proxy in front means; who is banned.
#![allow(missing_docs, reason = "tests")]

mod common;

use std::io::Write;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use wasmqtt_protocol::ports::{
    AuthOutcome, AuthRequest, AuthStep, BanPattern, Broker as Door, Call, Grant, Memory, NoPlugins, Plugins,
    ShardPlugins,
};
use wasmqtt_server::{Anonymous, ClientIdTaken};
use wasmqtt_store::{Offline, RocksStore, StoreConfig};

use self::common::{Broker, CONNACK, PUBACK, SUBACK};

/// The identity is the User Name without what follows `@`.
#[derive(Default, Clone)]
struct Realm {
    door: Arc<OnceLock<Arc<dyn Door>>>,
    asked: Arc<Mutex<usize>>,
}

impl Plugins for Realm {
    fn attach(&self, broker: Arc<dyn Door>) {
        let _ = self.door.set(broker);
    }
    fn shard(&self, _index: usize) -> Box<dyn ShardPlugins> {
        Box::new(self.clone())
    }
}

impl ShardPlugins for Realm {
    fn has_auth(&self) -> bool {
        true
    }
    fn authenticate(&self, request: Arc<AuthRequest>) -> Call<AuthOutcome> {
        *self.asked.lock().unwrap() += 1;
        let name = request.username.clone().unwrap_or_default();
        let principal = name.split('@').next().unwrap_or_default().to_owned();
        Box::pin(std::future::ready(AuthOutcome::Allow(Grant { principal, ..Grant::default() })))
    }
    fn proceed(&self, _step: AuthStep) -> Call<AuthOutcome> {
        Box::pin(std::future::ready(AuthOutcome::Next))
    }
}

impl Realm {
    fn ban(&self, pattern: BanPattern, seconds: u32) {
        self.door.get().unwrap().ban(pattern, seconds, "a test").unwrap();
    }
}

/// Return code of the CONNACK, and whether the Session was there.
fn answer(client: &mut common::Client) -> (u8, bool) {
    let body = client.expect(CONNACK);
    (body[1], body[0] == 1)
}

/// What the plugin says counts, not what the client calls itself.
#[test]
fn the_identity_that_authentication_gave_owns_the_session() {
    let broker = Broker::start(Arc::new(Realm::default()), Arc::new(Memory));
    let mut ann = broker.connect_as("c", "ann@here", false);
    assert_eq!(answer(&mut ann), (0, false));
    ann.send(0xe0, &[]);
    assert!(ann.is_closed());
    assert_eq!(answer(&mut broker.connect_as("c", "bob@here", false)), (5, false));
    assert_eq!(answer(&mut broker.connect_as("c", "ann@there", false)), (0, true));
}

/// On every shard, also where the connection is handed over.
#[test]
fn sessions_are_guarded_on_all_shards() {
    for (taken, code) in [(ClientIdTaken::Refuse, 5), (ClientIdTaken::NewSession, 0)] {
        let broker = Broker::start_config(Arc::new(NoPlugins), Arc::new(Memory), |config| {
            config.shards = 3;
            config.identity.client_id_taken = taken;
        });
        let ids: Vec<String> = (0..12).map(|n| format!("c{n}")).collect();
        let mut anns: Vec<_> = ids.iter().map(|id| broker.connect_as(id, "ann", false)).collect();
        for (id, ann) in ids.iter().zip(&mut anns) {
            assert_eq!(answer(ann), (0, false));
            ann.subscribe(id, 1);
            ann.expect(SUBACK);
        }
        for (id, ann) in ids.iter().zip(&mut anns) {
            let mut bob = broker.connect_as(id, "bob", false);
            assert_eq!(answer(&mut bob), (code, false), "{id}");
            match taken {
                ClientIdTaken::Refuse => ann.ping(),
                ClientIdTaken::NewSession => {
                    assert!(ann.is_closed());
                    bob.publish(id, 1, false);
                    bob.expect(PUBACK);
                    bob.expect_silence();
                }
            }
        }
    }
}

/// A TLS terminator or a sidecar makes everybody a client of this machine.
#[test]
fn behind_a_proxy_this_machine_has_no_rights() {
    for (proxied, anonymous, code) in [
        (false, Anonymous::Loopback, 0),
        (true, Anonymous::Loopback, 5),
        (true, Anonymous::Allow, 0),
        (true, Anonymous::Deny, 5),
    ] {
        let broker = Broker::start_config(Arc::new(NoPlugins), Arc::new(Memory), |config| {
            config.listeners[0].proxied = proxied;
            config.anonymous = anonymous;
        });
        assert_eq!(answer(&mut broker.connect("c", true)).0, code, "{proxied} {anonymous:?}");
    }
}

/// A connection that is refused may be closed before its CONNECT is written.
fn try_connect(broker: &Broker, client_id: &str) -> Option<common::Client> {
    let mut client = broker.open();
    let is_sent = client.stream().write_all(&common::connect(4, 2, 0, &[client_id])).is_ok();
    (is_sent && client.is_let_in()).then_some(client)
}

/// Those who have not said who they are share a bound.
#[test]
fn connections_that_are_not_let_in_are_bounded() {
    let broker = Broker::start_config(Arc::new(NoPlugins), Arc::new(Memory), |config| config.limits.connecting_max = 5);
    let mut silent: Vec<_> = (0..5).map(|_| broker.open()).collect();
    assert!(try_connect(&broker, "c").is_none());
    silent.pop();
    let until = Instant::now() + Duration::from_secs(20);
    while try_connect(&broker, "c").is_none() && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(20));
    }
    // Those who are in do not count.
    let mut clients = Vec::new();
    for n in 0..20 {
        clients.push(try_connect(&broker, &format!("c{n}")).expect("is let in"));
    }
}

/// By the User Name and by what authentication made of it, at CONNECT and afterwards; and lifted by the same words.
#[test]
fn a_ban_means_a_user_by_either_name() {
    let realm = Realm::default();
    let broker = Broker::start(Arc::new(realm.clone()), Arc::new(Memory));
    for name in ["ann", "ann@here"] {
        let mut ann = broker.connect_as("a", "ann@here", true);
        assert_eq!(answer(&mut ann).0, 0);
        let mut bob = broker.connect_as("b", "bob@here", true);
        assert_eq!(answer(&mut bob).0, 0);
        realm.ban(BanPattern::Username(name.into()), 600);
        assert!(ann.is_closed(), "{name}");
        bob.ping();
        assert_eq!(answer(&mut broker.connect_as("a", "ann@here", true)).0, 5, "{name}");
        realm.ban(BanPattern::Username(name.into()), 0);
        assert_eq!(answer(&mut broker.connect_as("a", "ann@here", true)).0, 0, "{name}");
    }
}

/// A client is found by its identifier without looking at all others, and by its address wherever it is.
#[test]
fn bans_end_connections_of_clients_and_networks() {
    let realm = Realm::default();
    let broker = Broker::start_config(Arc::new(realm.clone()), Arc::new(Memory), |config| config.shards = 2);
    let mut clients: Vec<_> = (0..8).map(|n| broker.connect(&format!("c{n}"), true)).collect();
    for client in &mut clients {
        assert_eq!(answer(client).0, 0);
    }
    realm.ban(BanPattern::ClientId("c3".into()), 600);
    assert!(clients.remove(3).is_closed());
    for client in &mut clients {
        client.ping();
    }
    let network = |text: &str| BanPattern::Address { network: text.parse().unwrap(), prefix: 8 };
    realm.ban(network("127.0.0.9"), 600);
    for client in &mut clients {
        assert!(client.is_closed());
    }
    assert_eq!(answer(&mut broker.connect("c0", true)).0, 5);
    realm.ban(network("127.9.9.9"), 0);
    assert_eq!(answer(&mut broker.connect("c0", true)).0, 0, "lifted, though written otherwise");
}

/// Threads of the broker before may hold the store for another moment.
fn when_free<T, E: std::fmt::Debug>(open: impl Fn() -> Result<T, E>) -> T {
    let until = Instant::now() + Duration::from_secs(20);
    loop {
        match open() {
            Ok(opened) => return opened,
            Err(error) => assert!(Instant::now() < until, "{error:?}"),
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn rows_of_bans(path: &std::path::Path) -> u64 {
    let stats = when_free(|| Offline::open(path)).stats(|_| {}).unwrap();
    stats.iter().find(|family| family.family == "ban").map_or(0, |family| family.rows)
}

/// A ban outlives the broker; its row goes when it is lifted and when it ends.
#[test]
fn the_store_keeps_bans_no_longer_than_they_hold() {
    let folder = tempfile::tempdir().unwrap();
    let network = |text: &str| BanPattern::Address { network: text.parse().unwrap(), prefix: 24 };
    let start = || {
        let realm = Realm::default();
        let store = when_free(|| RocksStore::open(StoreConfig::new(folder.path())));
        (Broker::start(Arc::new(realm.clone()), Arc::clone(&store) as _), realm, store)
    };
    let (broker, realm, store) = start();
    for n in 0..50 {
        realm.ban(BanPattern::ClientId(format!("c{n}").into()), 600);
        realm.ban(BanPattern::ClientId(format!("short{n}").into()), 2);
    }
    realm.ban(network("192.0.2.77"), 600);
    for n in 0..49 {
        realm.ban(BanPattern::ClientId(format!("c{n}").into()), 0);
    }
    std::thread::sleep(Duration::from_secs(1));
    drop(broker);
    store.stop();
    drop(store);
    std::thread::sleep(Duration::from_secs(2));

    // What ended while no broker ran goes, too.
    let (broker, realm, store) = start();
    assert_eq!(answer(&mut broker.connect("c49", true)).0, 5);
    assert_eq!(answer(&mut broker.connect("c1", true)).0, 0);
    assert_eq!(answer(&mut broker.connect("short1", true)).0, 0);
    std::thread::sleep(Duration::from_secs(2));
    realm.ban(network("192.0.2.0"), 0);
    broker.connect("c1", true).expect(CONNACK);
    std::thread::sleep(Duration::from_secs(1));
    drop(broker);
    store.stop();
    drop(store);
    assert_eq!(rows_of_bans(folder.path()), 1, "c49 alone");
}
