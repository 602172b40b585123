//! Promises wait for the store: CONNACK, SUBACK and PUBACK leave after the commit of what they promise, and nothing
//! else waits for it.
#![allow(missing_docs, reason = "tests")]

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use wasmqtt_protocol::ports::{Change, Memory, NoPlugins, ShardStore, Store, Ticket};
use wasmqtt_server::{Anonymous, Bind, Config, Limits, Listener, Server};

const CONNACK: u8 = 0x20;
const PUBLISH: u8 = 0x30;
const PUBACK: u8 = 0x40;
const SUBACK: u8 = 0x90;
/// Long enough for an answer that is not held back to arrive.
const QUIET: Duration = Duration::from_millis(150);

#[derive(Default)]
struct Log {
    changes: Vec<String>,
    batch: Ticket,
    is_open: bool,
    committed: Ticket,
    wake: Option<Box<dyn Fn() + Send + Sync>>,
}

/// Commits when the test says so.
#[derive(Default, Clone)]
struct Slow(Arc<Mutex<Log>>);

impl Slow {
    fn commit_all(&self) {
        let mut log = self.0.lock().unwrap();
        log.committed = log.batch;
        if let Some(wake) = &log.wake {
            wake();
        }
    }

    fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap().changes)
    }
}

impl Store for Slow {
    fn shard(&self, _index: usize, wake: Box<dyn Fn() + Send + Sync>) -> Box<dyn ShardStore> {
        self.0.lock().unwrap().wake = Some(wake);
        Box::new(self.clone())
    }
}

impl ShardStore for Slow {
    fn is_durable(&self) -> bool {
        true
    }

    fn write(&mut self, change: Change<'_>) {
        let mut log = self.0.lock().unwrap();
        if !log.is_open {
            log.is_open = true;
            log.batch += 1;
        }
        log.changes.push(match change {
            Change::SessionOpened { client_id, expiry, .. } => format!("opened {client_id} {expiry}"),
            Change::SessionClosed { client_id, expiry, .. } => format!("closed {client_id} {expiry}"),
            Change::SessionEnded { client_id } => format!("ended {client_id}"),
            Change::Subscribed { client_id, filter, .. } => format!("subscribed {client_id} {}", filter.as_str()),
            Change::Unsubscribed { client_id, filter } => format!("unsubscribed {client_id} {}", filter.as_str()),
            Change::Queued { message, receivers } => {
                let receivers: Vec<_> =
                    receivers.iter().map(|to| format!("{}:{:?}", to.client_id, to.wish.qos)).collect();
                format!("queued {} {}", message.topic, receivers.join(","))
            }
            Change::Retained(message) => format!("retained {}", message.topic),
            Change::RetainedRemoved { topic } => format!("removed {topic}"),
        });
    }

    fn commit(&mut self) {
        self.0.lock().unwrap().is_open = false;
    }

    fn ticket(&self) -> Ticket {
        self.0.lock().unwrap().batch
    }

    fn committed(&self) -> Ticket {
        self.0.lock().unwrap().committed
    }
}

struct Broker {
    server: Option<Server>,
    address: String,
    _runtime: tokio::runtime::Runtime,
}

impl Broker {
    fn start(store: Arc<dyn Store>) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
        let config = Config {
            listeners: vec![Listener { bind: Bind::Tcp("127.0.0.1:0".parse().unwrap()), name: "mqtt".into() }],
            anonymous: Anonymous::Allow,
            limits: Limits::default(),
            shards: 1,
            sys_interval: Duration::ZERO,
        };
        let server = Server::start(config, Arc::new(NoPlugins), store, runtime.handle().clone()).unwrap();
        let address = server.listeners()[0].trim_start_matches("mqtt://").to_owned();
        Self { server: Some(server), address, _runtime: runtime }
    }

    /// MQTT 3.1.1; the Session outlives the connection unless `clean`.
    fn connect(&self, client_id: &str, clean: bool) -> Client {
        let mut client = Client(TcpStream::connect(&self.address).unwrap());
        let mut body = vec![0, 4, b'M', b'Q', b'T', b'T', 4, if clean { 2 } else { 0 }, 0, 0];
        string(client_id, &mut body);
        client.send(0x10, &body);
        client
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        if let Some(server) = self.server.take() {
            server.stop(Duration::from_secs(2));
        }
    }
}

fn string(text: &str, bytes: &mut Vec<u8>) {
    bytes.extend_from_slice(&u16::try_from(text.len()).unwrap().to_be_bytes());
    bytes.extend_from_slice(text.as_bytes());
}

struct Client(TcpStream);

impl Client {
    fn send(&mut self, first: u8, body: &[u8]) {
        self.0.write_all(&[first, u8::try_from(body.len()).unwrap()]).unwrap();
        self.0.write_all(body).unwrap();
    }

    fn subscribe(&mut self, filter: &str, qos: u8) {
        let mut body = vec![0, 1];
        string(filter, &mut body);
        body.push(qos);
        self.send(0x82, &body);
    }

    fn publish(&mut self, topic: &str, qos: u8, retain: bool) {
        let mut body = Vec::new();
        string(topic, &mut body);
        if qos > 0 {
            body.extend_from_slice(&[0, 7]);
        }
        body.push(b'x');
        self.send(PUBLISH | qos << 1 | u8::from(retain), &body);
    }

    /// The type of the next packet; `None`: nothing comes within `patience`.
    fn next(&mut self, patience: Duration) -> Option<u8> {
        self.0.set_read_timeout(Some(patience)).unwrap();
        let mut head = [0; 2];
        match self.0.read_exact(&mut head) {
            Ok(()) => {}
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => return None,
            Err(error) => panic!("connection lost: {error}"),
        }
        let mut body = vec![0; usize::from(head[1])];
        self.0.read_exact(&mut body).unwrap();
        Some(head[0] & 0xf0)
    }

    fn expect(&mut self, kind: u8) {
        assert_eq!(self.next(Duration::from_secs(10)), Some(kind));
    }

    fn expect_silence(&mut self) {
        assert_eq!(self.next(QUIET), None, "sent before the commit");
    }
}

#[test]
fn promises_leave_after_the_commit() {
    let store = Slow::default();
    let broker = Broker::start(Arc::new(store.clone()));
    let mut keeper = broker.connect("keeper", false);
    keeper.expect_silence();
    store.commit_all();
    keeper.expect(CONNACK);
    keeper.subscribe("a/#", 1);
    keeper.expect_silence();
    store.commit_all();
    keeper.expect(SUBACK);
    assert_eq!(store.take(), ["opened keeper 604800", "subscribed keeper a/#"]);

    let mut guest = broker.connect("guest", true);
    guest.expect(CONNACK);
    guest.publish("a/1", 1, true);
    guest.expect_silence();
    keeper.expect(PUBLISH);
    assert_eq!(store.take(), ["retained a/1", "queued a/1 keeper:AtLeastOnce"]);
    store.commit_all();
    guest.expect(PUBACK);
}

/// A client whose promise waits holds up nobody else; and what needs no store is answered at once.
#[test]
fn others_do_not_wait() {
    let store = Slow::default();
    let broker = Broker::start(Arc::new(store.clone()));
    let mut waiting = broker.connect("waiting", false);
    waiting.expect_silence();
    let mut subscriber = broker.connect("subscriber", true);
    subscriber.expect(CONNACK);
    subscriber.subscribe("b", 1);
    subscriber.expect(SUBACK);
    let mut publisher = broker.connect("publisher", true);
    publisher.expect(CONNACK);
    publisher.publish("b", 1, false);
    publisher.expect(PUBACK);
    subscriber.expect(PUBLISH);
    waiting.expect_silence();
    store.commit_all();
    waiting.expect(CONNACK);
}

#[test]
fn a_session_is_told_from_its_first_connection_to_its_end() {
    let store = Slow::default();
    let broker = Broker::start(Arc::new(store.clone()));
    let mut client = broker.connect("c", false);
    store_settles(&store, &["opened c 604800"]);
    store.commit_all();
    client.expect(CONNACK);
    client.send(0xe0, &[]);
    store_settles(&store, &["closed c 604800"]);
    let _clean = broker.connect("c", true);
    store_settles(&store, &["ended c"]);
    let mut gone = broker.connect("never-kept", true);
    gone.expect(CONNACK);
    gone.subscribe("x", 1);
    gone.send(0xe0, &[]);
    std::thread::sleep(QUIET);
    assert!(store.take().is_empty(), "a Session that ends with its connection is not told of");
}

fn store_settles(store: &Slow, expected: &[&str]) {
    let until = Instant::now() + Duration::from_secs(10);
    let mut seen = Vec::new();
    while seen.len() < expected.len() && Instant::now() < until {
        seen.extend(store.take());
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(seen, expected);
}

#[test]
fn without_a_store_nothing_waits() {
    let broker = Broker::start(Arc::new(Memory));
    let mut client = broker.connect("c", false);
    client.expect(CONNACK);
    client.subscribe("a", 1);
    client.expect(SUBACK);
    client.publish("b", 1, true);
    client.expect(PUBACK);
}
