//! A whole Session script: packets from a hostile client, deliveries, lost connections and passing time.
#![no_main]

use std::io::IoSlice;
use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use wasmqtt_protocol::codec::{self, Packet, Qos, ReasonCode, Version};
use wasmqtt_protocol::router::SessionKey;
use wasmqtt_protocol::session::{
    Event, FrameCache, Incoming, Link, Outbox, ServerLimits, Session, Wish,
};

const LIMITS: ServerLimits = ServerLimits {
    packet_bytes_max: 1 << 16,
    receive_maximum: 8,
    inflight_max: 8,
    topic_alias_maximum: 4,
    topic_alias_bytes_max: 1000,
    maximum_qos: Qos::ExactlyOnce,
    retain_available: true,
    keep_alive_max: 0,
    session_expiry_max: 1000,
    queue_messages_max: 32,
    queue_bytes_max: 1 << 16,
    inflight_bytes_max: 1 << 12,
    outbound_bytes_max: 1 << 14,
};

/// A client that reads when it pleases, and as much: what it sees must be whole, valid packets in the end.
#[derive(Default)]
struct Reader {
    pending: Vec<u8>,
}

impl Reader {
    /// Takes at most `count` bytes; the outbox may never become empty.
    fn read(&mut self, out: &mut Outbox, count: usize, version: Version) {
        let mut slices = [IoSlice::new(&[]); 4];
        let used = out.slices(&mut slices);
        let bytes: Vec<u8> = slices[..used].iter().flat_map(|slice| slice.iter().copied()).take(count).collect();
        out.consume(bytes.len());
        // One packet may go beyond the bound, a buffer is twice as large as its content after it grew, and what was
        // written is given back when it is more than half.
        let bound = 4 * (LIMITS.outbound_bytes_max + LIMITS.packet_bytes_max as usize);
        assert!(out.capacity() <= bound, "{} bytes for {}", out.capacity(), out.len());
        self.pending.extend(bytes);
        let mut rest = &self.pending[..];
        while let Some(frame) = codec::frame(rest, &codec::Limits { packet_bytes_max: u32::MAX }).expect("frame") {
            if frame.total_len > rest.len() {
                break;
            }
            codec::decode(version, &rest[..frame.total_len]).expect("valid");
            rest = &rest[frame.total_len..];
        }
        self.pending = rest.to_vec();
    }
}

fuzz_target!(|data: &[u8]| {
    let mut session = Session::new(
        Arc::from("fuzz"),
        SessionKey {
            shard: 0,
            slot: 0,
            epoch: 0,
        },
    );
    let mut out = Outbox::default();
    let mut reader = Reader::default();
    let mut frames = FrameCache::default();
    let mut now_ms = 0;
    let mut rest = data;
    let mut version = Version::V5;
    while let Some((&step, tail)) = rest.split_first() {
        rest = tail;
        match step {
            0..=0x0F => {
                let qos = Qos::from_bits(step & 3).unwrap_or_default();
                let topic = if step & 4 == 0 { "a" } else { "b/c" };
                let incoming = Incoming::new(
                    topic,
                    &tail[..tail.len().min(3)],
                    &[],
                    (qos, step & 8 != 0),
                    Some(now_ms + 1500),
                    None,
                );
                frames.reset();
                let online = session.link().is_some().then_some(&mut out);
                session.deliver(
                    now_ms,
                    &incoming,
                    Wish {
                        qos,
                        retain: false,
                        ids: &[],
                        id: None,
                    },
                    None,
                    &mut frames,
                    &LIMITS,
                    online,
                );
                continue;
            }
            0xF1 => {
                session.disconnected();
                out = Outbox::default();
                reader = Reader::default();
                continue;
            }
            0xF2 => {
                now_ms += 1000;
                continue;
            }
            // Reads a few bytes, or a lot.
            0xF3..=0xF7 => {
                reader.read(&mut out, 1 << (3 * (step - 0xF2)), version);
                if session.link().is_some() {
                    session.pump(now_ms, &LIMITS, &mut out);
                }
                continue;
            }
            _ => {}
        }
        let bytes = &data[data.len() - tail.len() - 1..];
        let Ok(Some(frame)) = codec::frame(
            bytes,
            &codec::Limits {
                packet_bytes_max: LIMITS.packet_bytes_max,
            },
        ) else {
            return;
        };
        if frame.total_len > bytes.len() {
            return;
        }
        let Ok(packet) = codec::decode(version, &bytes[..frame.total_len]) else {
            return;
        };
        rest = &bytes[frame.total_len..];
        if session.link().is_none() {
            let Packet::Connect(connect) = packet else {
                return;
            };
            version = connect.version;
            session.connected(
                now_ms,
                Link::negotiate(&connect, &LIMITS),
                &LIMITS,
                &mut out,
            );
            continue;
        }
        match session.handle_packet(now_ms, packet, &LIMITS, &mut out) {
            Ok(Event::Publish { publish, .. }) => {
                session.published(
                    publish.qos,
                    publish.packet_id,
                    ReasonCode::SUCCESS,
                    &mut out,
                );
            }
            Ok(Event::Disconnect { .. }) | Err(_) => {
                session.disconnected();
                out = Outbox::default();
                reader = Reader::default();
            }
            Ok(_) => {}
        }
    }
});
