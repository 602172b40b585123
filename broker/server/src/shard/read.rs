//! Reading: bytes out of sockets, packets out of bytes, and how much of a turn one client gets.

use std::io;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tracing::{debug, warn};
use wasmqtt_protocol::codec::{self, DecodeError, Packet};
use wasmqtt_protocol::session::Event;

use super::conn::State;
use super::gate::Reason;
use super::{Ending, Shard};
use crate::memory::Pressure;

/// Reads of one connection per turn.
const READS_MAX: usize = 16;
/// Packets that one turn handles, of all clients that have sent something, where each keeps its smallest share.
const TURN_PACKETS: u32 = 4096;
/// Packets of one client per turn: the most, and what it may always have.
const SHARE_PACKETS_MAX: u32 = 1024;
const SHARE_PACKETS_MIN: u32 = 64;
/// The same for time. A packet may be expensive: it goes to thousands of subscribers, or asks a plugin.
const TURN_TIME: Duration = Duration::from_millis(4);
const SHARE_TIME_MIN: Duration = Duration::from_micros(250);
/// Packets and deliveries between two looks at the clock.
const LOOK_EVERY: u64 = 32;

/// What each client that has sent something may have of this turn.
#[derive(Debug, Clone, Copy)]
pub(super) struct Share {
    packets: u32,
    time: Duration,
}

impl Share {
    /// Of so many clients.
    pub(super) fn of(clients: usize) -> Self {
        let clients = u32::try_from(clients).unwrap_or(u32::MAX).max(1);
        Self {
            packets: (TURN_PACKETS / clients).clamp(SHARE_PACKETS_MIN, SHARE_PACKETS_MAX),
            time: (TURN_TIME / clients).max(SHARE_TIME_MIN),
        }
    }
}

/// What is left of it.
pub(super) struct Budget {
    share: Share,
    /// Those that count, and all.
    packets: u32,
    handled: u64,
    /// Packets and deliveries at which the clock is looked at again.
    look_at: u64,
    until: Option<Instant>,
}

impl Budget {
    /// `sent`: deliveries of this turn so far.
    pub(super) fn new(share: Share, sent: u64) -> Self {
        Self { share, packets: 0, handled: 0, look_at: sent + LOOK_EVERY, until: None }
    }

    /// A packet was handled; `sent`: deliveries of this turn so far. Acknowledgements count as the time they take: a
    /// client that gets what many publish has many of them.
    #[inline]
    fn spend(&mut self, is_acknowledgement: bool, sent: u64) {
        self.packets += u32::from(!is_acknowledgement);
        self.handled += 1;
        if self.handled + sent >= self.look_at {
            self.look(sent);
        }
    }

    fn look(&mut self, sent: u64) {
        self.look_at = self.handled + sent + LOOK_EVERY;
        let now = Instant::now();
        if now >= *self.until.get_or_insert(now + self.share.time) {
            self.packets = self.packets.max(self.share.packets);
        }
    }

    fn is_spent(&self) -> bool {
        self.packets >= self.share.packets
    }
}

/// What was read of a client and is not handled: the begin of a packet, or packets that wait for their turn.
#[derive(Default)]
pub(super) struct Inbox {
    bytes: Vec<u8>,
    /// Bytes at the front that were handled.
    at: usize,
}

impl Inbox {
    pub(super) fn is_empty(&self) -> bool {
        self.at == self.bytes.len()
    }

    fn rest(&self) -> &[u8] {
        &self.bytes[self.at..]
    }

    fn extend(&mut self, bytes: &[u8]) {
        if self.at > 0 {
            self.bytes.drain(..self.at);
            self.at = 0;
        }
        self.bytes.extend_from_slice(bytes);
    }

    fn consume(&mut self, count: usize) {
        self.at += count;
    }
}

/// What became of bytes that were read.
struct Handled {
    /// So many of them are done with.
    used: usize,
    /// So many bytes the packet will have whose begin is what is left; 0: it is not known.
    wanted: usize,
}

impl Shard {
    /// The client closed its side, or the connection broke; bytes may still be waiting.
    pub(super) fn on_read_closed(&mut self, id: usize) {
        if let Some(conn) = self.conns.get_mut(id) {
            conn.read_closed = true;
        }
    }

    /// Closes the gate of a connection for what holds now; `true`: it is to be read.
    fn may_read(&mut self, id: usize) -> bool {
        let conn = &mut self.conns[id];
        if conn.outbox.len() >= self.limits.outbound_bytes_max {
            conn.gate.close(Reason::Outbox, self.now_ms);
        }
        if self.is_congested {
            self.pause(id, Reason::Congested);
        }
        // What was promised is written first, so that a client is never ahead of the store by more than a batch.
        if self.durable.waits(self.conns[id].barrier) {
            self.wait_for_commit(id);
        }
        self.conns[id].is_read()
    }

    pub(super) fn on_readable(&mut self, id: usize) {
        let Some(conn) = self.conns.get_mut(id) else { return };
        if matches!(conn.state, State::Lingering) {
            return self.discard_input(id);
        }
        if !self.may_read(id) {
            return;
        }
        let mut budget = Budget::new(self.share, self.tally.sent);
        self.on_inbox(id, &mut budget);
        let mut scratch = std::mem::take(&mut self.scratch);
        let is_all = self.read(id, &mut scratch, &mut budget);
        self.scratch = scratch;
        if let Some(conn) = self.conns.get_mut(id) {
            conn.is_caught_up = is_all && conn.passes_packets();
        }
    }

    /// Reads and handles what the client has sent, as far as its share goes; `true`: that was all.
    fn read(&mut self, id: usize, scratch: &mut [u8], budget: &mut Budget) -> bool {
        let outbound_max = self.limits.outbound_bytes_max;
        let mut reads = 0;
        while let Some(conn) = self.conns.get_mut(id) {
            if conn.outbox.len() >= outbound_max {
                conn.gate.close(Reason::Outbox, self.now_ms);
            }
            if matches!(conn.state, State::Lingering) || !conn.passes_packets() || !conn.is_read() {
                return false;
            }
            if reads == READS_MAX || budget.is_spent() {
                self.hold(id);
                return false;
            }
            reads += 1;
            match conn.stream.read(scratch) {
                Ok(0) => {
                    self.end(id, Ending::Lost);
                    return true;
                }
                Ok(count) => {
                    self.tally.bytes_received += count as u64;
                    let is_last = count < scratch.len() && !conn.read_closed;
                    let is_enough = conn.count_last_bytes(count);
                    self.on_bytes(id, &scratch[..count], budget);
                    if is_enough || is_last && !budget.is_spent() {
                        return true;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => {
                    self.end(id, Ending::Lost);
                    return true;
                }
            }
        }
        true
    }

    fn discard_input(&mut self, id: usize) {
        let Some(conn) = self.conns.get_mut(id) else { return };
        for _ in 0..READS_MAX {
            match conn.stream.read(&mut self.scratch) {
                Ok(count) if count > 0 => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                _ => return self.remove(id),
            }
        }
        self.hold(id);
    }

    /// Handles whole packets; keeps the rest.
    fn on_bytes(&mut self, id: usize, bytes: &[u8], budget: &mut Budget) {
        let Some(conn) = self.conns.get_mut(id) else { return };
        if conn.inbox.is_empty() {
            let Handled { used, wanted } = self.on_packets(id, bytes, budget);
            if let Some(conn) = self.conns.get_mut(id)
                && used < bytes.len()
            {
                conn.inbox.bytes.reserve(wanted);
                conn.inbox.extend(&bytes[used..]);
            }
        } else {
            conn.inbox.extend(bytes);
            self.on_inbox(id, budget);
        }
    }

    /// Goes on with what was kept.
    pub(super) fn on_kept(&mut self, id: usize) {
        let mut budget = Budget::new(self.share, self.tally.sent);
        self.on_inbox(id, &mut budget);
        self.hold(id);
    }

    fn on_inbox(&mut self, id: usize, budget: &mut Budget) {
        let Some(conn) = self.conns.get_mut(id).filter(|conn| !conn.inbox.is_empty()) else { return };
        let mut inbox = std::mem::take(&mut conn.inbox);
        let Handled { used, wanted } = self.on_packets(id, inbox.rest(), budget);
        inbox.consume(used);
        if !inbox.is_empty()
            && let Some(conn) = self.conns.get_mut(id)
        {
            inbox.bytes.reserve(wanted.saturating_sub(inbox.bytes.len()));
            conn.inbox = inbox;
        }
    }

    /// Everything is used up once the connection ends.
    fn on_packets(&mut self, id: usize, bytes: &[u8], budget: &mut Budget) -> Handled {
        let (mut used, all) = (0, Handled { used: bytes.len(), wanted: 0 });
        loop {
            let limits = self.packet_limits(id);
            let Some(conn) = self.conns.get_mut(id) else { return all };
            if matches!(conn.state, State::Lingering) {
                return all;
            }
            if !conn.passes_packets() || budget.is_spent() {
                return Handled { used, wanted: 0 };
            }
            let rest = &bytes[used..];
            if rest.is_empty() {
                return all;
            }
            if matches!(conn.state, State::New) && is_proxy_header(rest) {
                self.on_proxy_header(id);
                return all;
            }
            let frame = match codec::frame(rest, &limits) {
                Ok(Some(frame)) if frame.total_len <= rest.len() => frame,
                Ok(frame) => {
                    if matches!(conn.state, State::New) && self.pressure == Pressure::Full {
                        debug!(address = ?conn.address, "connection ended: half a CONNECT, and memory is used up");
                        self.remove(id);
                        return all;
                    }
                    // An honest client fills this; what it really sends is what gets allocated page by page.
                    let wanted = frame.map_or(0, |frame| frame.total_len.min(rest.len() * 4 + 64));
                    return Handled { used, wanted };
                }
                Err(error) => {
                    // What it speaks may be there already.
                    if matches!(conn.state, State::New)
                        && let Some(version) = codec::answer_version(rest)
                    {
                        conn.version = version;
                    }
                    self.on_malformed(id, &error);
                    return all;
                }
            };
            conn.gate.heard(self.now_ms);
            self.on_packet(id, &rest[..frame.total_len]);
            budget.spend(is_acknowledgement(frame.first), self.tally.sent);
            if self.conns.get(id).is_some_and(|conn| conn.gate.is_closed_for(Reason::Asking)) {
                // It is handled again when the answer is here.
                return Handled { used, wanted: 0 };
            }
            used += frame.total_len;
        }
    }

    /// Who is not let in yet gets less memory.
    fn packet_limits(&self, id: usize) -> codec::Limits {
        let Some(conn) = self.conns.get(id) else { return codec::Limits { packet_bytes_max: 0 } };
        let is_in = matches!(conn.state, State::Live { .. });
        let most = if is_in { u32::MAX } else { self.tunable.limits.connect_bytes_max };
        codec::Limits { packet_bytes_max: conn.limits.packet_bytes_max.min(most) }
    }

    /// A proxy says who the client is, and nobody here listens to that: the client is not let in as the proxy.
    fn on_proxy_header(&mut self, id: usize) {
        let listener = &self.conns[id].listener;
        if !self.shared.proxy_seen.swap(true, Ordering::Relaxed) {
            warn!(%listener, "a connection began with a PROXY protocol header, which is not supported: have the proxy leave \
                   it out, and set `proxied = true` for this listener");
        }
        self.remove(id);
    }

    fn on_packet(&mut self, id: usize, packet: &[u8]) {
        let conn = &mut self.conns[id];
        let State::Live { slot } = conn.state else { return self.on_early_packet(id, packet) };
        let decoded = match codec::decode(conn.version, packet) {
            Ok(decoded) => decoded,
            Err(error) => return self.on_malformed(id, &error),
        };
        let Some(session) = self.sessions.get_mut(slot) else { return };
        let is_publish = matches!(decoded, Packet::Publish(_));
        conn.outbox.lend(&mut self.pool);
        let event = session.handle_packet(self.now_ms, decoded, &conn.limits, &mut conn.outbox);
        if !conn.dirty && !conn.outbox.is_empty() {
            conn.dirty = true;
            self.dirty.push(id);
        }
        if self.durable.is_on() {
            self.tell(slot, Some(id));
            self.load_more(slot);
        }
        self.schedule_replays(slot);
        match event {
            Ok(Event::None) => {
                // A QoS 2 message that came before was acknowledged again, and may still wait for the store.
                if is_publish && !self.conns[id].promises.is_empty() {
                    self.conns[id].after(self.durable.last());
                }
            }
            Ok(Event::Publish { publish, aliased }) => self.on_publish(id, slot, &publish, aliased.as_deref()),
            Ok(Event::Subscribe(subscribe)) => self.on_subscribe(id, slot, &subscribe),
            Ok(Event::Unsubscribe(unsubscribe)) => self.on_unsubscribe(id, slot, &unsubscribe),
            Ok(Event::Auth(auth)) => self.on_reauth(id, &auth),
            Ok(Event::Disconnect { will }) => self.end(id, Ending::Client { will }),
            Err(fault) => self.end(id, Ending::Server(fault.reason, fault.text)),
        }
    }

    pub(super) fn on_malformed(&mut self, id: usize, error: &DecodeError) {
        let Some(conn) = self.conns.get(id) else { return };
        debug!(address = ?conn.address, %error, "malformed packet");
        match conn.state {
            State::Live { .. } => self.end(id, Ending::Server(error.reason_code(), "malformed packet")),
            _ => self.refuse(id, error.reason_code()),
        }
    }
}

/// PUBACK, PUBREC, PUBREL or PUBCOMP, by the first byte.
fn is_acknowledgement(first: u8) -> bool {
    matches!(first >> 4, 4..=7)
}

/// Version 1 or 2 of the PROXY protocol. Neither can be the beginning of a CONNECT.
fn is_proxy_header(bytes: &[u8]) -> bool {
    bytes.starts_with(b"PROXY ") || bytes.starts_with(b"\r\n\r\n\0\r\nQUIT\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_of_packets() {
        for (clients, packets) in [(1, SHARE_PACKETS_MAX), (1_000_000, SHARE_PACKETS_MIN)] {
            // Time does not come first, however slow the machine is.
            let share = Share { time: Duration::from_hours(1), ..Share::of(clients) };
            let mut budget = Budget::new(share, 0);
            for _ in 1..packets {
                budget.spend(true, 0);
                budget.spend(false, 0);
                assert!(!budget.is_spent());
            }
            budget.spend(false, 0);
            assert!(budget.is_spent(), "{packets} packets");
        }
    }

    #[test]
    fn a_share_is_of_time() {
        let mut budget = Budget::new(Share { packets: 1000, time: Duration::from_millis(1) }, 0);
        budget.spend(false, 1000);
        assert!(!budget.is_spent(), "time begins with the first look");
        std::thread::sleep(Duration::from_millis(2));
        budget.spend(false, 1001);
        assert!(!budget.is_spent(), "the clock is not looked at for each packet");
        budget.spend(false, 2000);
        assert!(budget.is_spent(), "deliveries count as work");
    }

    #[test]
    fn shares_become_smaller_but_never_nothing() {
        let shares = [1, 2, 16, 1_000_000].map(Share::of);
        assert!(shares.is_sorted_by(|more, less| more.packets >= less.packets && more.time >= less.time));
        assert_eq!((shares[3].packets, shares[3].time), (SHARE_PACKETS_MIN, SHARE_TIME_MIN));
    }

    #[test]
    fn what_is_kept_stays_in_order() {
        let mut inbox = Inbox::default();
        inbox.extend(b"abcd");
        inbox.consume(3);
        assert_eq!(inbox.rest(), b"d");
        inbox.extend(b"ef");
        assert_eq!(inbox.rest(), b"def");
        inbox.consume(3);
        assert!(inbox.is_empty());
    }
}
