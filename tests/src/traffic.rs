//! A steady load of messages between pairs of clients, in the background of a test, that knows whether anything was
//! lost, doubled or put into another order, and how long each message took.

use std::fmt::{self, Debug, Formatter};
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::raw;
use wasmqtt_protocol::codec::Version;

/// Each publisher sends this often.
const PACE: Duration = Duration::from_millis(10);
/// Messages on their way to one subscriber, beyond which its publisher waits: none may be dropped for want of room.
const UNDER_WAY_MAX: u64 = 500;
/// How long the last messages may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// Load that runs until [`Traffic::stop`].
pub struct Traffic {
    stop: Arc<AtomicBool>,
    pairs: Vec<Pair>,
    begun: Instant,
}

struct Pair {
    sent: Arc<AtomicU64>,
    publisher: JoinHandle<()>,
    subscriber: JoinHandle<Vec<Duration>>,
}

/// What became of it.
#[derive(Default)]
pub struct Report {
    /// How long each message took from one client to the other; each arrived once and in order.
    latencies: Vec<Duration>,
    took: Duration,
}

impl Report {
    /// Adds what became of another load.
    pub fn extend(&mut self, other: Self) {
        self.latencies.extend(other.latencies);
        self.latencies.sort_unstable();
        self.took += other.took;
    }

    /// 99 of 100 took at most this long.
    pub fn p99(&self) -> Duration {
        self.latencies.get(self.latencies.len() * 99 / 100).copied().unwrap_or_default()
    }
}

impl Debug for Report {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let messages = self.latencies.len();
        let per_sec = messages as u128 * 1000 / self.took.as_millis().max(1);
        let longest = self.latencies.last().copied().unwrap_or_default();
        write!(f, "{messages} messages, {per_sec}/s, p99 {:.1?}, longest {longest:.1?}", self.p99())
    }
}

impl Traffic {
    /// `per_sec` messages over `pairs` pairs of clients, every other pair with QoS 1. Topics are `traffic/N`. `connect`
    /// is the payload of their CONNECT packets behind the Client Identifier: user name and password, or nothing.
    pub fn start(address: SocketAddr, pairs: usize, per_sec: usize, login: Option<(&str, &str)>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let burst = (per_sec as u64 * PACE.as_millis() as u64 / 1000).div_ceil(pairs as u64);
        let pairs = (0..pairs).map(|n| Pair::start(n, address, burst, login, &stop)).collect();
        Self { stop, pairs, begun: Instant::now() }
    }

    /// Ends it, waits for what is on its way, and fails if anything is missing.
    pub fn stop(self) -> Report {
        self.stop.store(true, Ordering::SeqCst);
        let mut report = Report { latencies: Vec::new(), took: self.begun.elapsed() };
        for pair in self.pairs {
            pair.publisher.join().expect("a publisher failed");
            let seen = pair.subscriber.join().expect("a subscriber failed");
            assert_eq!(seen.len() as u64, pair.sent.load(Ordering::SeqCst), "messages are missing");
            report.extend(Report { latencies: seen, took: Duration::ZERO });
        }
        report
    }
}

impl Pair {
    fn start(n: usize, address: SocketAddr, burst: u64, login: Option<(&str, &str)>, stop: &Arc<AtomicBool>) -> Self {
        let qos = (n % 2) as u8;
        let topic = format!("traffic/{n}");
        let mut subscriber = connect(address, &format!("traffic-sub-{n}"), login);
        let entry = [raw::text(&topic), vec![qos]].concat();
        subscriber.write_all(&raw::filters(Version::V311, 0x82, 1, &[], &entry)).expect("subscribe");
        let mut suback = [0; 5];
        subscriber.read_exact(&mut suback).expect("SUBACK");
        assert_eq!(suback[4], qos, "subscribed");
        let publisher = connect(address, &format!("traffic-pub-{n}"), login);
        let (sent, received) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let begun = Instant::now();
        let (to, back, ended) = (Arc::clone(&sent), Arc::clone(&received), Arc::clone(stop));
        let publish = move || publish(publisher, &topic, qos, burst, begun, &to, &back, &ended);
        let (to, ended) = (Arc::clone(&sent), Arc::clone(stop));
        let subscribe = move || receive(subscriber, begun, &to, &received, &ended);
        Self { sent, publisher: thread::spawn(publish), subscriber: thread::spawn(subscribe) }
    }
}

fn connect(address: SocketAddr, client_id: &str, login: Option<(&str, &str)>) -> TcpStream {
    let mut stream = TcpStream::connect(address).expect("connect");
    stream.set_nodelay(true).expect("no delay");
    stream.set_read_timeout(Some(PATIENCE)).expect("read timeout");
    let mut payload = vec![raw::text(client_id)];
    payload.extend(login.into_iter().flat_map(|(username, password)| [raw::text(username), raw::text(password)]));
    let flags = if login.is_some() { 0xC2 } else { 0x02 };
    stream.write_all(&raw::connect(Version::V311, flags, &[], &payload)).expect("send CONNECT");
    let mut connack = [0; 4];
    stream.read_exact(&mut connack).expect("CONNACK");
    assert_eq!(connack, [0x20, 2, 0, 0], "{client_id} is let in");
    stream
}

/// A pause after `due`. What could not be kept up with is forgotten, or a burst would follow.
pub fn next_due(due: Instant, pause: Duration) -> Instant {
    let now = Instant::now();
    if now.saturating_duration_since(due) > Duration::from_millis(100) { now } else { due + pause }
}

/// The payload: number and time of a message.
fn payload(number: u64, begun: Instant) -> [u8; 16] {
    let mut payload = [0; 16];
    payload[..8].copy_from_slice(&number.to_be_bytes());
    payload[8..].copy_from_slice(&(begun.elapsed().as_micros() as u64).to_be_bytes());
    payload
}

#[allow(clippy::too_many_arguments, reason = "one thread's whole world")]
fn publish(
    mut stream: TcpStream,
    topic: &str,
    qos: u8,
    burst: u64,
    begun: Instant,
    sent: &AtomicU64,
    received: &AtomicU64,
    stop: &AtomicBool,
) {
    let mut acknowledgements = stream.try_clone().expect("second handle");
    let mut number = 0;
    let mut due = Instant::now();
    while !stop.load(Ordering::SeqCst) {
        let mut bytes = Vec::new();
        for _ in 0..burst {
            let id = (qos > 0).then_some((number % 65_535) as u16 + 1);
            bytes.extend(raw::publish(
                Version::V311,
                0x30 | qos << 1,
                topic.as_bytes(),
                id,
                &[],
                &payload(number, begun),
            ));
            number += 1;
        }
        sent.store(number, Ordering::SeqCst);
        stream.write_all(&bytes).expect("the publisher is connected");
        if qos > 0 {
            let mut pubacks = vec![0; burst as usize * 4];
            acknowledgements.read_exact(&mut pubacks).expect("PUBACK");
            assert!(pubacks.chunks(4).all(|puback| puback[..2] == [0x40, 2]), "nothing but PUBACK");
        }
        due = next_due(due, PACE);
        thread::sleep(due.saturating_duration_since(Instant::now()));
        let waits = Instant::now();
        while number - received.load(Ordering::SeqCst) > UNDER_WAY_MAX {
            assert!(waits.elapsed() < PATIENCE, "messages are lost or very late");
            thread::sleep(Duration::from_millis(1));
        }
    }
}

fn receive(
    mut stream: TcpStream,
    begun: Instant,
    sent: &AtomicU64,
    received: &AtomicU64,
    stop: &AtomicBool,
) -> Vec<Duration> {
    stream.set_read_timeout(Some(Duration::from_millis(100))).expect("read timeout");
    let mut latencies = Vec::new();
    let mut buffer = Vec::new();
    let mut chunk = vec![0; 64 * 1024];
    let mut last = Instant::now();
    loop {
        match stream.read(&mut chunk) {
            Ok(0) => panic!("the subscriber was disconnected"),
            Ok(count) => buffer.extend_from_slice(&chunk[..count]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(error) => panic!("the subscriber lost its connection: {error}"),
        }
        let mut used = 0;
        let mut pubacks = Vec::new();
        // All packets are small: their Remaining Length is one byte.
        while let Some([first, length]) = buffer.get(used..used + 2).map(|head| [head[0], head[1]])
            && let Some(body) = buffer.get(used + 2..used + 2 + usize::from(length))
        {
            used += 2 + body.len();
            assert_eq!(first & 0xF9, 0x30, "a PUBLISH that is no duplicate");
            let (front, payload) = body.split_at(body.len() - 16);
            let number = u64::from_be_bytes(payload[..8].try_into().expect("8 bytes"));
            let at = u64::from_be_bytes(payload[8..].try_into().expect("8 bytes"));
            assert_eq!(number, latencies.len() as u64, "lost, doubled or out of order");
            latencies.push(begun.elapsed().saturating_sub(Duration::from_micros(at)));
            if first & 0x06 != 0 {
                pubacks.extend([0x40, 2]);
                pubacks.extend(&front[front.len() - 2..]);
            }
            last = Instant::now();
        }
        buffer.drain(..used);
        received.store(latencies.len() as u64, Ordering::SeqCst);
        if !pubacks.is_empty() {
            stream.write_all(&pubacks).expect("acknowledge");
        }
        // The publisher may still be in its last round when `stop` is set.
        let all_here = latencies.len() as u64 == sent.load(Ordering::SeqCst);
        if stop.load(Ordering::SeqCst) && (all_here && last.elapsed() > 2 * PACE || last.elapsed() > PATIENCE) {
            return latencies;
        }
    }
}
