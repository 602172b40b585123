//! Clients with persistent Sessions that go on after the broker was killed, and know what they may expect then.
//! MQTT 3.1.1, so that the whole state of a client is in this file.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::{Version, raw};

const V311: Version = Version::V311;
/// How long anything may take while a broker is there.
const PATIENCE: Duration = Duration::from_mins(1);
/// Messages a publisher has under way.
const WINDOW: usize = 16;
/// Between two messages of a publisher.
const PACE: Duration = Duration::from_micros(500);

/// Where the broker is; `None`: it was killed and is not back.
pub type Place = Arc<Mutex<Option<SocketAddr>>>;

fn wait_for(place: &Place, stop: &AtomicBool) -> Option<SocketAddr> {
    while !stop.load(Ordering::SeqCst) {
        if let Some(address) = *place.lock().expect("not poisoned") {
            return Some(address);
        }
        thread::sleep(Duration::from_millis(2));
    }
    None
}

/// One connection; every error means that the broker is gone.
struct Wire {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Wire {
    /// With the state of the Session, if there is some.
    fn open(address: SocketAddr, client_id: &str) -> std::io::Result<(Self, bool)> {
        Self::open_with(address, client_id, &raw::connect(V311, 0, &[], &[raw::text(client_id)]))
    }

    /// The same with this CONNECT.
    fn open_with(address: SocketAddr, client_id: &str, connect: &[u8]) -> std::io::Result<(Self, bool)> {
        let stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
        stream.set_nodelay(true)?;
        let mut wire = Self { stream, buffer: Vec::new() };
        wire.send(connect)?;
        let begun = Instant::now();
        loop {
            if let Some((first, body)) = wire.recv(Duration::from_millis(100))? {
                assert_eq!((first, body[1]), (0x20, 0), "{client_id} is let in");
                return Ok((wire, body[0] == 1));
            }
            assert!(begun.elapsed() < PATIENCE, "{client_id}: no CONNACK");
        }
    }

    fn send(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.stream.write_all(bytes)
    }

    fn acknowledge(&mut self, first: u8, id: u16) -> std::io::Result<()> {
        self.send(&raw::packet(first, &id.to_be_bytes()))
    }

    /// The next packet: first byte and body; `None`: nothing came in that time.
    fn recv(&mut self, wait: Duration) -> std::io::Result<Option<(u8, Vec<u8>)>> {
        loop {
            if let Some(packet) = self.take() {
                return Ok(Some(packet));
            }
            self.stream.set_read_timeout(Some(wait.max(Duration::from_millis(1))))?;
            let mut chunk = [0; 16 * 1024];
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(count) => self.buffer.extend_from_slice(&chunk[..count]),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }

    fn take(&mut self) -> Option<(u8, Vec<u8>)> {
        let first = *self.buffer.first()?;
        let (mut length, mut shift, mut at) = (0_usize, 0, 1);
        loop {
            let byte = *self.buffer.get(at)?;
            length |= usize::from(byte & 0x7F) << shift;
            (shift, at) = (shift + 7, at + 1);
            if byte & 0x80 == 0 {
                break;
            }
        }
        let body = self.buffer.get(at..at + length)?.to_vec();
        self.buffer.drain(..at + length);
        Some((first, body))
    }
}

fn id_of(body: &[u8]) -> u16 {
    u16::from_be_bytes([body[0], body[1]])
}

/// What of a message is under way.
#[derive(Clone, Copy)]
enum Phase {
    Publish,
    Release,
}

/// Publishes numbered messages to one topic until it is told to stop; then until all are acknowledged.
pub struct Publisher {
    thread: JoinHandle<u64>,
}

impl Publisher {
    /// `retain`: with the RETAIN flag. `acknowledged` is told each number that was.
    pub fn start(
        place: &Place,
        topic: &str,
        qos: u8,
        retain: bool,
        stop: &Arc<AtomicBool>,
        acknowledged: impl Fn(u64) + Send + 'static,
    ) -> Self {
        let (place, topic, stop) = (Arc::clone(place), topic.to_owned(), Arc::clone(stop));
        let thread = thread::spawn(move || publish(&place, &topic, qos, retain, &stop, &acknowledged));
        Self { thread }
    }

    /// How many it has published, all acknowledged.
    pub fn join(self) -> u64 {
        self.thread.join().expect("a publisher failed")
    }
}

fn publish(place: &Place, topic: &str, qos: u8, retain: bool, stop: &AtomicBool, acknowledged: &dyn Fn(u64)) -> u64 {
    let client_id = format!("pub-{}", topic.replace('/', "-"));
    let mut under_way: BTreeMap<u64, (u16, Phase)> = BTreeMap::new();
    let (mut next, mut next_id) = (0_u64, 0_u16);
    let flags = 0x30 | qos << 1 | u8::from(retain);
    let packet = |dup: bool, number: u64, id: u16| {
        let first = flags | u8::from(dup) << 3;
        raw::publish(V311, first, topic.as_bytes(), Some(id), &[], number.to_string().as_bytes())
    };
    let never = AtomicBool::new(false);
    loop {
        let Some(address) = wait_for(place, &never) else { return next };
        let mut session = || -> std::io::Result<()> {
            let (mut wire, present) = Wire::open(address, &client_id)?;
            for (number, (id, phase)) in &under_way {
                match phase {
                    Phase::Publish => wire.send(&packet(true, *number, *id))?,
                    Phase::Release => wire.acknowledge(0x62, *id)?,
                }
            }
            assert!(
                present
                    || next == 0
                    || under_way.is_empty()
                    || !under_way.values().any(|(_, phase)| matches!(phase, Phase::Release)),
                "{client_id}: its Session is gone"
            );
            loop {
                let wants_more = !stop.load(Ordering::SeqCst);
                if !wants_more && under_way.is_empty() {
                    return Ok(());
                }
                if wants_more && under_way.len() < WINDOW {
                    next_id = next_id % 60_000 + 1;
                    under_way.insert(next, (next_id, Phase::Publish));
                    next += 1;
                    wire.send(&packet(false, next - 1, next_id))?;
                }
                let wait = if under_way.len() < WINDOW { PACE } else { Duration::from_millis(50) };
                let Some((first, body)) = wire.recv(wait)? else { continue };
                let id = id_of(&body);
                let found = under_way.iter().find(|(_, (other, _))| *other == id).map(|(number, _)| *number);
                let Some(number) = found else { continue };
                match first {
                    0x50 => {
                        // Taken over by the broker: from here on nothing may be lost.
                        acknowledged(number);
                        under_way.insert(number, (id, Phase::Release));
                        wire.acknowledge(0x62, id)?;
                    }
                    0x40 => {
                        acknowledged(number);
                        under_way.remove(&number);
                    }
                    0x70 => drop(under_way.remove(&number)),
                    other => panic!("{client_id}: a packet 0x{other:02X}"),
                }
            }
        };
        if session().is_ok() {
            return next;
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// Changes its subscriptions `{topic}/0` to `{topic}/7` all the time, and knows what the broker said last.
pub struct Changer {
    thread: JoinHandle<[Option<bool>; 8]>,
}

impl Changer {
    /// Until it is told to stop.
    pub fn start(place: &Place, client_id: &str, topic: &str, stop: &Arc<AtomicBool>) -> Self {
        let (place, stop) = (Arc::clone(place), Arc::clone(stop));
        let (client_id, topic) = (client_id.to_owned(), topic.to_owned());
        let thread = thread::spawn(move || {
            let (mut known, mut round) = ([None; 8], 0);
            while let Some(address) = wait_for(&place, &stop) {
                // An error: the broker is gone.
                let _ = change(address, &client_id, &topic, &stop, &mut known, &mut round);
                thread::sleep(Duration::from_millis(5));
            }
            known
        });
        Self { thread }
    }

    /// By number: subscribed, not subscribed, or nobody knows.
    pub fn join(self) -> [Option<bool>; 8] {
        self.thread.join().expect("the changing client failed")
    }
}

fn change(
    address: SocketAddr,
    client_id: &str,
    topic: &str,
    stop: &AtomicBool,
    known: &mut [Option<bool>; 8],
    round: &mut usize,
) -> std::io::Result<()> {
    let (mut wire, _) = Wire::open(address, client_id)?;
    while !stop.load(Ordering::SeqCst) {
        *round += 1;
        // Each is there for eight rounds of all, and then away for as many.
        let (place, wanted) = (*round % 8, (*round / 64).is_multiple_of(2));
        known[place] = None;
        let filter = raw::text(format!("{topic}/{place}"));
        let (first, entry) = if wanted { (0x82, [filter, vec![1]].concat()) } else { (0xA2, filter) };
        wire.send(&raw::filters(V311, first, 1, &[], &entry))?;
        let begun = Instant::now();
        loop {
            match wire.recv(Duration::from_millis(50))? {
                Some((0x90 | 0xB0, _)) => break,
                _ => assert!(begun.elapsed() < PATIENCE, "{client_id}: no answer"),
            }
        }
        known[place] = Some(wanted);
    }
    Ok(())
}

/// A client that connects with a numbered Will Message (QoS 2) and goes without a word, again and again.
pub struct Mortal {
    thread: JoinHandle<Wills>,
}

/// Numbers of Will Messages.
#[derive(Debug, Default)]
pub struct Wills {
    /// Their CONNECT was acknowledged: each is published.
    pub acknowledged: Vec<u64>,
    /// Nobody knows whether the broker has seen the CONNECT.
    pub uncertain: Vec<u64>,
}

impl Mortal {
    /// Until it is told to stop.
    pub fn start(place: &Place, client_id: &str, topic: &str, stop: &Arc<AtomicBool>) -> Self {
        let (place, stop) = (Arc::clone(place), Arc::clone(stop));
        let (client_id, topic) = (client_id.to_owned(), topic.to_owned());
        let thread = thread::spawn(move || {
            let mut wills = Wills::default();
            for number in 0.. {
                let Some(address) = wait_for(&place, &stop) else { break };
                let payload = [raw::text(&client_id), raw::text(&topic), raw::text(number.to_string())];
                match Wire::open_with(address, &client_id, &raw::connect(V311, 0x14, &[], &payload)) {
                    Ok(_) => wills.acknowledged.push(number),
                    Err(_) => wills.uncertain.push(number),
                }
                thread::sleep(Duration::from_millis(10));
            }
            wills
        });
        Self { thread }
    }

    /// What became of its CONNECTs.
    pub fn join(self) -> Wills {
        self.thread.join().expect("the client with a Will Message failed")
    }
}

/// What a subscriber has got, by topic, in order.
pub type Got = HashMap<String, Vec<u64>>;

/// Receives with one QoS; while `away`, it is not connected.
pub struct Subscriber {
    thread: JoinHandle<Got>,
    /// It stays away while this is set.
    pub away: Arc<AtomicBool>,
    /// It has subscribed.
    pub ready: Arc<AtomicBool>,
    numbers: Arc<Mutex<HashMap<String, HashSet<u64>>>>,
}

impl Subscriber {
    /// Subscribes to `filter`.
    pub fn start(place: &Place, client_id: &str, filter: &str, qos: u8, stop: &Arc<AtomicBool>) -> Self {
        let (away, ready) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let numbers = Arc::default();
        let state = Receiver {
            place: Arc::clone(place),
            client_id: client_id.to_owned(),
            filter: filter.to_owned(),
            qos,
            stop: Arc::clone(stop),
            away: Arc::clone(&away),
            ready: Arc::clone(&ready),
            numbers: Arc::clone(&numbers),
            seen: RefCell::default(),
        };
        Self { thread: thread::spawn(move || state.run()), away, ready, numbers }
    }

    /// Numbers of this topic that it has seen, each counted once.
    pub fn seen(&self, topic: &str) -> u64 {
        self.numbers.lock().expect("not poisoned").get(topic).map_or(0, |numbers| numbers.len() as u64)
    }

    /// It has seen this number of the topic.
    pub fn has(&self, topic: &str, number: u64) -> bool {
        self.numbers.lock().expect("not poisoned").get(topic).is_some_and(|numbers| numbers.contains(&number))
    }

    /// What it got.
    pub fn join(self) -> Got {
        self.thread.join().expect("a subscriber failed")
    }
}

struct Receiver {
    place: Place,
    client_id: String,
    filter: String,
    qos: u8,
    stop: Arc<AtomicBool>,
    away: Arc<AtomicBool>,
    ready: Arc<AtomicBool>,
    numbers: Arc<Mutex<HashMap<String, HashSet<u64>>>>,
    seen: RefCell<HashMap<String, HashSet<u64>>>,
}

impl Receiver {
    fn run(self) -> Got {
        let mut got = Got::new();
        let mut received: HashSet<u16> = HashSet::new();
        while let Some(address) = wait_for(&self.place, &self.stop) {
            if self.away.load(Ordering::SeqCst) {
                thread::sleep(Duration::from_millis(2));
                continue;
            }
            let _ = self.session(address, &mut got, &mut received);
            thread::sleep(Duration::from_millis(5));
        }
        got
    }

    fn session(&self, address: SocketAddr, got: &mut Got, received: &mut HashSet<u16>) -> std::io::Result<()> {
        let (mut wire, present) = Wire::open(address, &self.client_id)?;
        if self.ready.load(Ordering::SeqCst) {
            assert!(present, "{}: its Session is gone", self.client_id);
        } else {
            received.clear();
            wire.send(&raw::filters(V311, 0x82, 1, &[], &[raw::text(&self.filter), vec![self.qos]].concat()))?;
        }
        while !self.stop.load(Ordering::SeqCst) && !self.away.load(Ordering::SeqCst) {
            let Some((first, body)) = wire.recv(Duration::from_millis(20))? else { continue };
            match first & 0xF0 {
                0x90 => {
                    assert_eq!(body[2], self.qos, "{}: subscribed", self.client_id);
                    self.ready.store(true, Ordering::SeqCst);
                }
                0x30 => self.on_publish(&mut wire, first, &body, got, received)?,
                0x60 => {
                    received.remove(&id_of(&body));
                    wire.acknowledge(0x70, id_of(&body))?;
                }
                other => panic!("{}: a packet 0x{other:02X}", self.client_id),
            }
        }
        Ok(())
    }

    fn on_publish(
        &self,
        wire: &mut Wire,
        first: u8,
        body: &[u8],
        got: &mut Got,
        received: &mut HashSet<u16>,
    ) -> std::io::Result<()> {
        let length = usize::from(id_of(body));
        let topic = std::str::from_utf8(&body[2..2 + length]).expect("UTF-8").to_owned();
        let id = id_of(&body[2 + length..]);
        let number =
            std::str::from_utf8(&body[4 + length..]).ok().and_then(|text| text.parse().ok()).expect("a number");
        let is_new = match first >> 1 & 3 {
            // Exactly once: the Packet Identifier tells what is a repetition.
            2 => received.insert(id),
            _ => true,
        };
        if is_new {
            let numbers = got.entry(topic.clone()).or_default();
            // At least once: repetitions are what they are.
            let is_first = self.seen.borrow_mut().entry(topic.clone()).or_default().insert(number);
            if first >> 1 & 3 == 2 || is_first {
                numbers.push(number);
            }
            self.numbers.lock().expect("not poisoned").entry(topic).or_default().insert(number);
        }
        match first >> 1 & 3 {
            2 => wire.acknowledge(0x50, id),
            _ => wire.acknowledge(0x40, id),
        }
    }
}
