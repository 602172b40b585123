//! A broker inside the test, and a client that knows just enough of MQTT 3.1.1.
#![allow(dead_code, reason = "each test file uses its own part")]

pub(crate) mod store;

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use wasmqtt_protocol::ports::{Plugins, Store};
use wasmqtt_server::{Anonymous, Config, Identity, Limits, Listener, Server};

pub(crate) const CONNACK: u8 = 0x20;
pub(crate) const PUBLISH: u8 = 0x30;
pub(crate) const PUBACK: u8 = 0x40;
pub(crate) const PUBREC: u8 = 0x50;
pub(crate) const PUBREL: u8 = 0x60;
pub(crate) const PUBCOMP: u8 = 0x70;
pub(crate) const SUBACK: u8 = 0x90;
pub(crate) const PINGRESP: u8 = 0xd0;
/// Long enough for an answer that is not held back to arrive.
pub(crate) const QUIET: Duration = Duration::from_millis(150);

pub(crate) struct Broker {
    server: Option<Server>,
    address: String,
    _runtime: tokio::runtime::Runtime,
}

impl Broker {
    pub(crate) fn start(plugins: Arc<dyn Plugins>, store: Arc<dyn Store>) -> Self {
        Self::start_config(plugins, store, |_| {})
    }

    pub(crate) fn start_with(plugins: Arc<dyn Plugins>, store: Arc<dyn Store>, shards: usize) -> Self {
        Self::start_config(plugins, store, |config| config.shards = shards)
    }

    /// With another configuration.
    pub(crate) fn start_config(
        plugins: Arc<dyn Plugins>,
        store: Arc<dyn Store>,
        change: impl FnOnce(&mut Config),
    ) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_time().build().unwrap();
        let mut config = Config {
            listeners: vec![Listener::tcp("127.0.0.1:0".parse().unwrap())],
            anonymous: Anonymous::Allow,
            identity: Identity::default(),
            limits: Limits::default(),
            shards: 1,
            sys_interval: Duration::ZERO,
        };
        change(&mut config);
        let server = Server::start(config, plugins, store, runtime.handle().clone()).unwrap();
        let address = server.listeners()[0].trim_start_matches("mqtt://").to_owned();
        Self { server: Some(server), address, _runtime: runtime }
    }

    /// A connection on which nothing was said yet.
    pub(crate) fn open(&self) -> Client {
        let stream = TcpStream::connect(&self.address).unwrap();
        // Else a small write may still wait on this side when the connection is closed.
        stream.set_nodelay(true).unwrap();
        Client(stream)
    }

    /// With this Keep Alive, and let in.
    pub(crate) fn connect_alive(&self, client_id: &str, keep_alive: u16) -> Client {
        let mut client = self.open();
        client.write(&connect(4, 2, keep_alive, &[client_id]));
        client.expect(CONNACK);
        client
    }

    pub(crate) fn watch(&self) -> wasmqtt_server::Watch {
        self.server.as_ref().unwrap().watch()
    }

    /// Timers that are set.
    pub(crate) fn timers(&self) -> usize {
        self.server.as_ref().map_or(0, Server::timers)
    }

    /// As [`Broker::connect`], with a User Name.
    pub(crate) fn connect_as(&self, client_id: &str, username: &str, clean: bool) -> Client {
        let mut client = Client(TcpStream::connect(&self.address).unwrap());
        let mut body = vec![0, 4, b'M', b'Q', b'T', b'T', 4, if clean { 0x82 } else { 0x80 }, 0, 0];
        string(client_id, &mut body);
        string(username, &mut body);
        client.send(0x10, &body);
        client
    }

    /// MQTT 3.1.1; the Session outlives the connection unless `clean`.
    pub(crate) fn connect(&self, client_id: &str, clean: bool) -> Client {
        let mut client = Client(TcpStream::connect(&self.address).unwrap());
        let mut body = vec![0, 4, b'M', b'Q', b'T', b'T', 4, if clean { 2 } else { 0 }, 0, 0];
        string(client_id, &mut body);
        client.send(0x10, &body);
        client
    }

    /// As [`Self::connect`], with a Will Message `x` for `topic`.
    pub(crate) fn connect_with_will(&self, client_id: &str, clean: bool, topic: &str) -> Client {
        let mut client = Client(TcpStream::connect(&self.address).unwrap());
        let mut body = vec![0, 4, b'M', b'Q', b'T', b'T', 4, 0b1_0100 | if clean { 2 } else { 0 }, 0, 0];
        for text in [client_id, topic, "x"] {
            string(text, &mut body);
        }
        client.send(0x10, &body);
        client.expect(CONNACK);
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

/// A packet of any length.
pub(crate) fn packet(first: u8, body: &[u8]) -> Vec<u8> {
    let (mut bytes, mut left) = (vec![first], body.len());
    loop {
        let low = (left & 0x7f) as u8;
        left >>= 7;
        bytes.push(if left == 0 { low } else { low | 0x80 });
        if left == 0 {
            break;
        }
    }
    bytes.extend_from_slice(body);
    bytes
}

/// CONNECT of that level, with these strings behind its head (Client Identifier, will); without properties.
pub(crate) fn connect(level: u8, flags: u8, keep_alive: u16, strings: &[&str]) -> Vec<u8> {
    let mut body = vec![0, 4, b'M', b'Q', b'T', b'T', level, flags];
    body.extend_from_slice(&keep_alive.to_be_bytes());
    if level == 5 {
        body.push(0);
    }
    for text in strings {
        string(text, &mut body);
    }
    packet(0x10, &body)
}

/// PUBLISH of 3.1.1; `id` with QoS 1 and 2 only.
pub(crate) fn publish(first: u8, topic: &str, id: Option<u16>, payload: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    string(topic, &mut body);
    body.extend(id.iter().flat_map(|id| id.to_be_bytes()));
    body.extend_from_slice(payload);
    packet(first, &body)
}

pub(crate) struct Client(TcpStream);

impl Client {
    pub(crate) fn stream(&self) -> &TcpStream {
        &self.0
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).unwrap();
    }

    /// Sends these bytes again and again until nobody has taken any for a while, or too many; gives their number.
    pub(crate) fn stuff(&mut self, bytes: &[u8]) -> usize {
        self.0.set_nonblocking(true).unwrap();
        let (mut written, mut progress) = (0, Instant::now());
        while progress.elapsed() < Duration::from_millis(500) && written < 256 << 20 {
            match self.0.write(&bytes[written % bytes.len()..]) {
                Ok(count) => (written, progress) = (written + count, Instant::now()),
                Err(error) if error.kind() == ErrorKind::WouldBlock => std::thread::sleep(Duration::from_millis(5)),
                Err(error) => panic!("{error}"),
            }
        }
        self.0.set_nonblocking(false).unwrap();
        written
    }

    /// The number that a topic of `$SYS` has, once it has been the same for a while.
    pub(crate) fn settled(&mut self) -> usize {
        let mut last = (0, 0);
        while last.1 < 3 {
            let body = self.expect(PUBLISH);
            let number = std::str::from_utf8(&body[2 + usize::from(body[1])..]).unwrap().parse().unwrap();
            last = (number, if number == last.0 { last.1 + 1 } else { 0 });
        }
        last.0
    }

    /// Bytes that the kernel has: those that were not sent, and those that the broker has not read. Linux tells.
    pub(crate) fn bytes_in_kernel(&self) -> usize {
        let spelled = |address: SocketAddr| {
            let SocketAddr::V4(address) = address else { panic!("{address} is no IPv4 address") };
            format!("{:08X}:{:04X}", u32::from_ne_bytes(address.ip().octets()), address.port())
        };
        let (own, peer) = (spelled(self.0.local_addr().unwrap()), spelled(self.0.peer_addr().unwrap()));
        let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
        let ends = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).filter_map(|line| {
            let (unsent, unread) = line.get(4)?.split_once(':')?;
            let number = |hex| usize::from_str_radix(hex, 16).unwrap();
            match (line[1], line[2]) {
                (from, to) if from == own && to == peer => Some(number(unsent)),
                (from, to) if from == peer && to == own => Some(number(unread)),
                _ => None,
            }
        });
        let ends: Vec<usize> = ends.collect();
        assert_eq!(ends.len(), 2, "{table}");
        ends.into_iter().sum()
    }

    pub(crate) fn send(&mut self, first: u8, body: &[u8]) {
        self.0.write_all(&[first, u8::try_from(body.len()).unwrap()]).unwrap();
        self.0.write_all(body).unwrap();
    }

    pub(crate) fn subscribe(&mut self, filter: &str, qos: u8) {
        let mut body = vec![0, 1];
        string(filter, &mut body);
        body.push(qos);
        self.send(0x82, &body);
    }

    pub(crate) fn publish(&mut self, topic: &str, qos: u8, retain: bool) {
        let mut body = Vec::new();
        string(topic, &mut body);
        if qos > 0 {
            body.extend_from_slice(&[0, 7]);
        }
        body.push(b'x');
        self.send(PUBLISH | qos << 1 | u8::from(retain), &body);
    }

    pub(crate) fn ping(&mut self) {
        self.send(0xc0, &[]);
        self.expect(PINGRESP);
    }

    /// Type and body of the next packet; `None`: nothing comes within `patience`.
    pub(crate) fn next(&mut self, patience: Duration) -> Option<(u8, Vec<u8>)> {
        self.0.set_read_timeout(Some(patience)).unwrap();
        let mut head = [0; 2];
        match self.0.read_exact(&mut head) {
            Ok(()) => {}
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => return None,
            Err(error) => panic!("connection lost: {error}"),
        }
        // The rest is on its way.
        self.0.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let (mut length, mut shift, mut byte) = (usize::from(head[1] & 0x7f), 7, [head[1]]);
        while byte[0] & 0x80 != 0 {
            self.0.read_exact(&mut byte).unwrap();
            length |= usize::from(byte[0] & 0x7f) << shift;
            shift += 7;
        }
        let mut body = vec![0; length];
        self.0.read_exact(&mut body).unwrap();
        Some((head[0] & 0xf0, body))
    }

    pub(crate) fn expect(&mut self, kind: u8) -> Vec<u8> {
        let (got, body) = self.next(Duration::from_secs(10)).expect("an answer");
        assert_eq!(got, kind, "{body:?}");
        body
    }

    /// There is a CONNACK without error; `false`: it is refused, or the connection is closed.
    pub(crate) fn is_let_in(&mut self) -> bool {
        self.0.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let mut connack = [0; 4];
        self.0.read_exact(&mut connack).is_ok() && connack[0] == CONNACK && connack[3] == 0
    }

    /// The broker ends the connection, without a word in MQTT 3.1.1.
    pub(crate) fn is_closed(&mut self) -> bool {
        self.0.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        matches!(self.0.read(&mut [0]), Ok(0))
    }

    pub(crate) fn expect_silence(&mut self) {
        assert_eq!(self.next(QUIET), None);
    }
}
