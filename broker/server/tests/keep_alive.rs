//! The Keep Alive counts the client's silence, not ours. MQTT 5.0 and 3.1.1 §3.1.2.10 [MQTT-3.1.2-22], [MQTT-3.1.2-24]
#![allow(missing_docs, reason = "tests")]

mod common;

use std::io::{ErrorKind, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use wasmqtt_protocol::ports::{
    Accepted, AuthOutcome, AuthRequest, AuthStep, Call, Interest, Memory, NoPlugins, Plugins, ShardPlugins, Submission,
};

use self::common::{Broker, CONNACK, PINGRESP, PUBACK, SUBACK, publish};

const PINGREQ: [u8; 2] = [0xc0, 0];

/// A storage hook that takes its time for messages below `slow/`.
struct Slow(Duration);

impl Plugins for Slow {
    fn shard(&self, _index: usize) -> Box<dyn ShardPlugins> {
        Box::new(Self(self.0))
    }
}

impl ShardPlugins for Slow {
    fn has_auth(&self) -> bool {
        false
    }
    fn authenticate(&self, _request: Arc<AuthRequest>) -> Call<AuthOutcome> {
        Box::pin(std::future::ready(AuthOutcome::Next))
    }
    fn proceed(&self, _step: AuthStep) -> Call<AuthOutcome> {
        Box::pin(std::future::ready(AuthOutcome::Next))
    }
    fn interest(&self, topic: &str) -> Interest {
        Interest { before: u64::from(topic.starts_with("slow/")), committed: 0 }
    }
    fn before_store(&self, messages: Vec<Submission>) -> Call<Vec<Accepted>> {
        let takes = tokio::time::sleep(self.0);
        Box::pin(async move {
            takes.await;
            messages.into_iter().map(|sent| Accepted::Keep(sent.message)).collect()
        })
    }
}

/// Keep Alive 1 s, a hook of 4 s, and a client that pings every 0.4 s.
#[test]
fn a_slow_hook_does_not_cost_the_connection() {
    let broker = Broker::start(Arc::new(Slow(Duration::from_secs(4))), Arc::new(Memory));
    let mut client = broker.connect_alive("c", 1);
    client.write(&publish(0x32, "slow/t", Some(1), b"x"));
    for _ in 0..10 {
        std::thread::sleep(Duration::from_millis(400));
        client.write(&PINGREQ);
    }
    let mut answers: Vec<u8> = (0..11).map(|_| client.next(Duration::from_secs(10)).expect("an answer").0).collect();
    answers.sort_unstable();
    assert_eq!(answers, [vec![PUBACK], vec![PINGRESP; 10]].concat());
    client.ping();
}

/// One that waits for its PUBACK before it says anything else has a full Keep Alive after that.
#[test]
fn after_our_silence_a_full_keep_alive_begins() {
    let broker = Broker::start(Arc::new(Slow(Duration::from_secs(3))), Arc::new(Memory));
    let mut client = broker.connect_alive("c", 1);
    client.write(&publish(0x32, "slow/t", Some(1), b"x"));
    client.expect(PUBACK);
    std::thread::sleep(Duration::from_millis(700));
    client.ping();
}

/// Keep Alive 2 s, a client that reads slowly and pings every 0.3 s.
#[test]
fn a_slow_reader_that_pings_stays() {
    let broker = Broker::start(Arc::new(NoPlugins), Arc::new(Memory));
    let mut slow = broker.connect_alive("slow", 2);
    slow.subscribe("t", 0);
    slow.expect(SUBACK);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut publisher = broker.connect_alive("publisher", 0);
            let message = publish(0x30, "t", None, &[0; 10_000]);
            while !stop.load(Ordering::Relaxed) {
                publisher.write(&message);
                std::thread::sleep(Duration::from_micros(500));
            }
        });
        let mut stream = slow.stream();
        stream.set_nonblocking(true).unwrap();
        let (begun, mut pinged) = (Instant::now(), Instant::now());
        while begun.elapsed() < Duration::from_secs(8) {
            match stream.read(&mut vec![0; 20_000]) {
                Ok(0) => panic!("closed after {:?}", begun.elapsed()),
                Ok(_) => {}
                Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock, "after {:?}", begun.elapsed()),
            }
            if pinged.elapsed() > Duration::from_millis(300) {
                pinged = Instant::now();
                stream.write_all(&PINGREQ).unwrap();
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        stop.store(true, Ordering::Relaxed);
    });
}

/// One that reads nothing and sends nothing is gone, even if much waits for it.
#[test]
fn a_client_that_neither_reads_nor_sends_is_cut() {
    let broker = Broker::start(Arc::new(NoPlugins), Arc::new(Memory));
    let mut gone = broker.connect_alive("gone", 1);
    gone.subscribe("t", 0);
    gone.expect(SUBACK);
    let mut publisher = broker.connect("publisher", true);
    publisher.expect(CONNACK);
    let message = publish(0x30, "t", None, &vec![0; 100_000]);
    for _ in 0..200 {
        publisher.write(&message);
    }
    publisher.ping();
    std::thread::sleep(Duration::from_secs(6));
    // It was taken over, or not: the Session is not there any more, and nobody has that name.
    assert!(is_cut(gone.stream()), "still served");
}

/// Whatever was on its way is read first.
fn is_cut(mut stream: &std::net::TcpStream) -> bool {
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    loop {
        match stream.read(&mut vec![0; 1 << 16]) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => return false,
            Err(_) => return true,
        }
    }
}

/// [MQTT-3.1.2-22]
#[test]
fn a_silent_client_is_cut() {
    let broker = Broker::start(Arc::new(NoPlugins), Arc::new(Memory));
    let mut client = broker.connect_alive("c", 1);
    let begun = Instant::now();
    assert!(client.is_closed());
    assert!(begun.elapsed() >= Duration::from_millis(1400), "after {:?}", begun.elapsed());
}
