//! Two shards and two clients, with plugins whose answers come late, lost connections, takeovers and passing time; or one
//! shard with a store that commits late and refuses. What clients see must be whole, valid packets in an order that makes
//! sense, and nothing may be left when they are gone.
#![no_main]

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use wasmqtt_protocol::access::{Decision, Lease, Verdict};
use wasmqtt_protocol::codec::{self, Packet, Qos, ReasonCode, Version};
use wasmqtt_protocol::ports::{
    Accepted, Access, AuthOutcome, AuthRequest, AuthStep, Call, Client, Interest, Memory, Plugins, ShardPlugins,
    Submission,
};
use wasmqtt_server::stepped::Stepped;
use wasmqtt_server::{Anonymous, Config, Identity, Limits};

use self::store::Slow;

#[path = "../../../broker/server/tests/common/store.rs"]
#[allow(dead_code, reason = "tests use more of it")]
mod store;

/// Below `x` nothing is allowed, nor is what overlaps it; `once` has no lease; below `hook` messages are shown to a hook.
struct Late;

/// Comes with the second look.
fn late<T: Unpin + 'static>(value: T) -> Call<T> {
    let mut value = Some(value);
    let mut is_first = true;
    Box::pin(std::future::poll_fn(move |context| {
        if std::mem::take(&mut is_first) {
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        Poll::Ready(value.take().expect("asked once"))
    }))
}

impl Plugins for Late {
    fn shard(&self, _index: usize) -> Box<dyn ShardPlugins> {
        Box::new(Self)
    }
}

impl ShardPlugins for Late {
    fn has_auth(&self) -> bool {
        true
    }
    fn authenticate(&self, _request: Arc<AuthRequest>) -> Call<AuthOutcome> {
        late(AuthOutcome::Next)
    }
    fn proceed(&self, _step: AuthStep) -> Call<AuthOutcome> {
        late(AuthOutcome::Next)
    }
    fn has_acl(&self) -> bool {
        true
    }
    fn authorize(&self, _client: Arc<Client>, accesses: Arc<[Access]>) -> Call<Vec<Decision>> {
        let decide = |access: &Access| {
            let denied = access.topic.starts_with(['x', '#', '+']) || access.topic.is_empty();
            let verdict = if denied { Verdict::Deny(ReasonCode::NOT_AUTHORIZED) } else { Verdict::Allow };
            let lease = (!access.topic.starts_with("once")).then_some(Lease { scope: None, seconds: 5 });
            Decision { verdict: Some(verdict), lease, failed: false }
        };
        late(accesses.iter().map(decide).collect())
    }
    fn interest(&self, topic: &str) -> Interest {
        Interest { before: u64::from(topic.starts_with("hook")), committed: 0 }
    }
    fn before_store(&self, messages: Vec<Submission>) -> Call<Vec<Accepted>> {
        let answer = |sent: Submission| match sent.message.payload.first() {
            Some(b'd') => Accepted::Discard(ReasonCode::QUOTA_EXCEEDED),
            _ => Accepted::Keep(sent.message),
        };
        late(messages.into_iter().map(answer).collect())
    }
}

const FILTERS: [&str; 8] = ["a", "a/+", "hook/#", "once", "#", "$share/g/a/+", "$share/g/hook/b", "x/b"];
const TOPICS: [&str; 8] = ["a", "a/b", "hook/b", "once", "x/b", "hook", "$SYS/x", ""];

/// A client that does not keep to anything.
#[derive(Default)]
struct Hostile {
    socket: Option<UnixStream>,
    sent: Vec<u8>,
    version: Option<Version>,
    received: Vec<u8>,
    is_in: bool,
    /// Packet Identifiers of messages that were received and not answered.
    unanswered: BTreeSet<u16>,
}

impl Hostile {
    fn open(&mut self, broker: &Stepped) {
        *self = Self { socket: Some(broker.connect()), ..Self::default() };
    }

    /// What does not fit into the socket is lost, with the connection.
    fn send(&mut self, bytes: &[u8]) {
        let Some(socket) = &mut self.socket else { return };
        if self.version.is_none() {
            self.sent.extend_from_slice(bytes);
            let limits = codec::Limits { packet_bytes_max: u32::MAX };
            if let Ok(Some(frame)) = codec::frame(&self.sent, &limits)
                && let Some(first) = self.sent.get(..frame.total_len)
                && let Ok(Packet::Connect(connect)) = codec::decode(Version::V5, first)
            {
                self.version = Some(connect.version);
            }
        }
        if !matches!(socket.write(bytes), Ok(count) if count == bytes.len()) {
            self.socket = None;
        }
    }

    fn packet(&mut self, first: u8, body: &[u8]) {
        // Bodies of this file are short.
        let mut bytes = vec![first, (body.len() & 0x7f) as u8];
        bytes.extend_from_slice(&body[..body.len() & 0x7f]);
        self.send(&bytes);
    }

    fn connect(&mut self, broker: &Stepped, bits: u8, more: u8) {
        self.open(broker);
        let is_v5 = bits & 1 != 0;
        let mut flags = bits & 0b10;
        if bits & 4 != 0 {
            flags |= 0b100 | (bits & 0b11_1000);
        }
        let mut body = vec![0, 4, b'M', b'Q', b'T', b'T', if is_v5 { 5 } else { 4 }, flags, 0, more & 3];
        if is_v5 {
            // Session Expiry Interval and Receive Maximum.
            body.extend_from_slice(&[8, 17, 0, 0, 0, more >> 3, 33, 0, 1 + (more & 7)]);
        }
        text(&mut body, if bits & 0x40 == 0 { "one" } else { "two" });
        if bits & 4 != 0 {
            if is_v5 {
                // Will Delay Interval.
                body.extend_from_slice(&[5, 24, 0, 0, 0, more & 3]);
            }
            text(&mut body, TOPICS[usize::from(more & 7)]);
            text(&mut body, "w");
        }
        self.packet(0x10, &body);
    }

    fn is_v5(&self) -> bool {
        self.version == Some(Version::V5)
    }

    /// Reads all there is, and looks at it.
    fn read(&mut self) {
        let Some(socket) = &mut self.socket else { return };
        let mut buffer = [0; 4096];
        let is_closed = loop {
            match socket.read(&mut buffer) {
                Ok(0) => break true,
                Ok(count) => self.received.extend_from_slice(&buffer[..count]),
                Err(error) => break error.kind() != ErrorKind::WouldBlock,
            }
        };
        let received = std::mem::take(&mut self.received);
        let mut rest = &received[..];
        let limits = codec::Limits { packet_bytes_max: u32::MAX };
        while let Some(frame) = codec::frame(rest, &limits).expect("a packet") {
            let Some(packet) = rest.get(..frame.total_len) else { break };
            // A protocol that the broker does not speak is refused in the form of one that it does.
            let packet = match self.version {
                Some(version) => codec::decode(version, packet),
                None => codec::decode(Version::V5, packet).or_else(|_| codec::decode(Version::V311, packet)),
            };
            self.look(&packet.expect("a valid packet"));
            rest = &rest[frame.total_len..];
        }
        self.received = rest.to_vec();
        if is_closed {
            assert!(self.received.is_empty(), "half a packet");
            self.socket = None;
        }
    }

    fn look(&mut self, packet: &Packet<'_>) {
        match packet {
            Packet::Connack(connack) => {
                assert!(!self.is_in, "CONNACK twice");
                self.is_in = connack.reason == ReasonCode::SUCCESS;
            }
            Packet::Disconnect(_) | Packet::Auth(_) => {
                assert!(self.version != Some(Version::V311), "not before MQTT 5")
            }
            packet => assert!(self.is_in, "{packet:?} before CONNACK"),
        }
        if let Packet::Publish(publish) = packet {
            assert!(!publish.topic.starts_with('x'), "a denied topic");
            assert!(!(publish.topic.starts_with("hook") && publish.payload.first() == Some(&b'd')), "discarded");
            assert!(publish.qos != Qos::AtMostOnce || !publish.dup, "[MQTT-3.3.1-2]");
            if let Some(id) = publish.packet_id {
                // [MQTT-2.2.1-4]: not in use; only after a lost connection is something sent again.
                assert!(self.unanswered.insert(id.get()), "Packet Identifier {id} is in use");
            }
        }
    }

    /// Answers what was received, or something else.
    fn answer(&mut self, kind: u8, id: u8) {
        let id = match self.unanswered.first() {
            Some(first) if id == 0 => *first,
            _ => u16::from(id),
        };
        let first = [0x40, 0x50, 0x62, 0x70][usize::from(kind & 3)];
        // PUBREC is no end of it.
        if first != 0x50 {
            self.unanswered.remove(&id);
        }
        self.packet(first, &id.to_be_bytes());
    }
}

fn text(body: &mut Vec<u8>, text: &str) {
    body.extend_from_slice(&(text.len() as u16).to_be_bytes());
    body.extend_from_slice(text.as_bytes());
}

fn config(shards: usize) -> Config {
    let limits = Limits {
        packet_bytes_max: 4096,
        receive_maximum: 4,
        inflight_max: 4,
        topic_alias_maximum: 2,
        queue_messages_max: 8,
        queue_bytes_max: 4096,
        inflight_bytes_max: 2048,
        outbound_bytes_max: 1024,
        subscriptions_max: 4,
        filters_per_packet_max: 4,
        retained_messages_max: 3,
        retained_bytes_max: 1024,
        session_expiry_max: Duration::from_secs(60),
        memory_max: Some(usize::MAX),
        ..Limits::default()
    };
    Config {
        listeners: Vec::new(),
        anonymous: Anonymous::Allow,
        identity: Identity::default(),
        limits,
        shards,
        sys_interval: Duration::ZERO,
    }
}

/// The step, and how much of `tail` it used.
fn step(broker: &mut Stepped, store: &Slow, clients: &mut [Hostile; 2], step: u8, tail: &[u8]) -> usize {
    let client = &mut clients[usize::from(step & 1)];
    let argument = |at: usize| tail.get(at).copied().unwrap_or_default();
    let (first, second) = (argument(0), argument(1));
    let topic = |from: [&'static str; 8]| from[usize::from(first & 7)];
    match step >> 1 & 15 {
        0 => {
            client.connect(broker, first, second);
            2
        }
        1 | 2 => {
            let is_end = step >> 1 & 15 == 2;
            let mut body = vec![0, 1 + (second & 7)];
            if client.is_v5() {
                body.push(0);
            }
            text(&mut body, topic(FILTERS));
            if !is_end {
                body.push(second & if client.is_v5() { 0x3f } else { 3 });
            }
            client.packet(if is_end { 0xA2 } else { 0x82 }, &body);
            2
        }
        3 | 4 => {
            let qos = second & 3;
            let mut body = Vec::new();
            text(&mut body, topic(TOPICS));
            if qos > 0 {
                body.extend_from_slice(&[0, 1 + (second >> 4 & 7)]);
            }
            if client.is_v5() {
                // With a Message Expiry Interval, a Topic Alias or nothing.
                let properties: &[u8] = match first >> 6 {
                    1 => &[5, 2, 0, 0, 0, 2],
                    2 => &[3, 35, 0, 1],
                    _ => &[0],
                };
                body.extend_from_slice(properties);
            }
            body.extend_from_slice(if first & 8 == 0 { b"dd" } else { b"kk" });
            client.packet(0x30 | qos << 1 | second >> 7 | (second & 4) << 1, &body);
            2
        }
        5 | 6 => {
            client.answer(first, second & 7);
            2
        }
        7 => {
            client.packet(0xC0, &[]);
            0
        }
        8 => {
            client.packet(0xE0, if client.is_v5() && first & 1 != 0 { &[4] } else { &[] });
            1
        }
        9 => {
            let count = usize::from(first & 0x3f).min(tail.len().saturating_sub(1));
            if client.socket.is_none() {
                client.open(broker);
            }
            client.send(&tail[tail.len().min(1)..][..count]);
            1 + count
        }
        10 => {
            *client = Hostile::default();
            0
        }
        11 => {
            broker.skip(Duration::from_secs(1 << (first & 3)));
            1
        }
        12 | 13 => {
            broker.settle();
            client.read();
            0
        }
        14 => {
            if first & 1 == 0 {
                store.commit_all();
            } else {
                store.fail_all();
            }
            1
        }
        _ => {
            store.refuse(first & 1 != 0);
            1
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((&mode, mut rest)) = data.split_first() else { return };
    let store = Slow::default();
    let mut broker = match mode & 1 {
        0 => Stepped::new(config(2), &Late, &Memory),
        _ => Stepped::new(config(1), &Late, &store),
    };
    let mut clients = [Hostile::default(), Hostile::default()];
    while let Some((&kind, tail)) = rest.split_first() {
        let used = step(&mut broker, &store, &mut clients, kind, tail);
        rest = tail.get(used..).unwrap_or_default();
    }
    store.refuse(false);
    store.commit_all();
    broker.settle();
    for client in &mut clients {
        client.read();
    }
    clients = Default::default();
    drop(clients);
    // Wills are published, Sessions expire, leases end.
    for _ in 0..3 {
        broker.settle();
        store.commit_all();
        broker.skip(Duration::from_secs(70));
    }
    broker.settle();
    let left = (broker.connections(), broker.sessions(), broker.subscriptions());
    assert_eq!(left, (0, 0, 0), "connections, Sessions and subscriptions are left");
});
