//! A Network Connection: reading packets out of bytes and writing bytes out.

use std::io::{self, IoSlice};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use mio::{Interest, Token};
use tracing::{debug, trace};
use wasmqtt_protocol::codec::{self, DecodeError, ReasonCode, Version};
use wasmqtt_protocol::ports::{Grant, Ticket};
use wasmqtt_protocol::session::{Event, Outbox};

use super::connect::Opening;
use super::timers::Timer;
use super::{Ending, POOL_BUFFER_BYTES_MAX, POOL_BUFFERS_MAX, Shard};
use crate::stream::Stream;

/// A connection as the acceptor hands it over.
pub(crate) struct Arrival {
    pub(crate) stream: Stream,
    pub(crate) address: Option<IpAddr>,
    pub(crate) listener: Arc<str>,
}

/// Slices of one `writev`.
const SLICES_MAX: usize = 64;
/// Buffers a connection may take per turn before others get theirs.
const READS_MAX: usize = 4;

/// How far a connection has come.
pub(super) enum State {
    /// CONNECT has not arrived.
    New,
    /// Authentication is under way.
    Opening(Box<Opening>),
    /// Let in, and about to move to the shard its Session lives on.
    Leaving { opening: Box<Opening>, grant: Grant, to: u16 },
    /// Has a Session.
    Live { slot: u32 },
    /// Said goodbye; waits for the peer to close.
    Lingering,
}

impl State {
    fn reads(&self) -> bool {
        match self {
            Self::Opening(opening) => opening.reads,
            Self::Leaving { .. } => false,
            Self::New | Self::Live { .. } | Self::Lingering => true,
        }
    }
}

pub(crate) struct Conn {
    pub(super) stream: Stream,
    pub(super) address: Option<IpAddr>,
    pub(super) listener: Arc<str>,
    pub(super) state: State,
    /// Tells this connection from another that had the same place.
    pub(super) epoch: u32,
    /// Version of CONNECT; what DISCONNECT is written in.
    pub(super) version: Version,
    /// Start of a packet whose rest is not here yet.
    pub(super) partial: Vec<u8>,
    pub(super) outbox: Outbox,
    /// When the last packet came, on the broker's clock.
    pub(super) heard_ms: u64,
    /// Its one timer.
    pub(super) timer: Option<(u64, Timer)>,
    /// On the shard's dirty list.
    pub(super) dirty: bool,
    /// The kernel's buffer was full; its event will tell.
    pub(super) blocked: bool,
    /// On the shard's readable list.
    pub(super) held: bool,
    /// The client has closed its side, and epoll will not say so again: what is there is read to its end.
    pub(super) read_closed: bool,
    /// A packet waits for plugins to say whether it is allowed, and what follows waits behind it.
    pub(super) asking: bool,
    /// Messages of its Session that wait for storage hooks; meanwhile nothing more is read.
    pub(super) submitted: u32,
    /// The route it may publish to without another look, and until when; here, where each packet comes by anyway.
    pub(super) permitted: (u64, u64),
    /// When what authentication granted ends.
    pub(super) granted_until_ms: Option<u64>,
    /// Nothing is written before the store has committed this batch.
    pub(super) barrier: Ticket,
    /// Authentication after CONNECT (MQTT 5.0 §4.12.1), and its method.
    pub(super) auth: Option<Box<super::auth::Standing>>,
}

impl Conn {
    /// Packets are read and handled; otherwise they wait for an answer of ours.
    fn reads(&self) -> bool {
        !self.asking && self.state.reads()
    }
}

impl Shard {
    pub(super) fn on_arrival(&mut self, arrival: Arrival) {
        let conn = Conn {
            stream: arrival.stream,
            address: arrival.address,
            listener: arrival.listener,
            state: State::New,
            epoch: 0,
            version: Version::V311,
            partial: Vec::new(),
            outbox: Outbox::default(),
            heard_ms: self.now_ms,
            timer: None,
            dirty: false,
            blocked: false,
            held: false,
            read_closed: false,
            asking: false,
            submitted: 0,
            permitted: (0, 0),
            granted_until_ms: None,
            barrier: 0,
            auth: None,
        };
        let timeout = self.shared.config.limits.connect_timeout.as_millis() as u64;
        if let Some((id, epoch)) = self.insert(conn) {
            self.set_conn_timer(id, self.now_ms + timeout, Timer::Connect { id, epoch });
        }
    }

    /// Registers a connection with this shard's epoll.
    pub(super) fn insert(&mut self, mut conn: Conn) -> Option<(usize, u32)> {
        self.conn_epoch = self.conn_epoch.wrapping_add(1);
        conn.epoch = self.conn_epoch;
        let entry = self.conns.vacant_entry();
        let id = entry.key();
        let interests = Interest::READABLE | Interest::WRITABLE;
        if let Err(error) = self.poll.registry().register(&mut conn.stream, Token(id), interests) {
            debug!(%error, "cannot watch a new connection");
            self.shared.connections.fetch_sub(1, Ordering::Relaxed);
            self.shared.load[usize::from(self.index)].fetch_sub(1, Ordering::Relaxed);
            return None;
        }
        entry.insert(conn);
        Some((id, self.conn_epoch))
    }

    pub(super) fn is_current(&self, id: usize, epoch: u32) -> bool {
        self.conns.get(id).is_some_and(|conn| conn.epoch == epoch)
    }

    /// Comes back to this connection in the next turn.
    pub(super) fn hold(&mut self, id: usize) {
        if let Some(conn) = self.conns.get_mut(id)
            && !conn.held
        {
            conn.held = true;
            self.readable.push(id);
        }
    }

    /// The client closed its side, or the connection broke; bytes may still be waiting.
    pub(super) fn on_read_closed(&mut self, id: usize) {
        if let Some(conn) = self.conns.get_mut(id) {
            conn.read_closed = true;
        }
    }

    pub(super) fn on_readable(&mut self, id: usize) {
        let congested = self.is_congested();
        let outbound_max = self.shared.limits.outbound_bytes_max;
        let Some(conn) = self.conns.get_mut(id) else { return };
        conn.held = false;
        if matches!(conn.state, State::Lingering) {
            return self.discard_input(id);
        }
        // What follows CONNECT is read when the answer is known; when a client's answers pile up, it is read on when
        // they are written, see `flush`.
        // What was promised is written first, so that a client is never ahead of the store by more than a batch.
        if !conn.reads() || conn.outbox.len() >= outbound_max || conn.submitted > 0 || self.durable.waits(conn.barrier)
        {
            return;
        }
        if congested {
            return self.hold(id);
        }
        let mut scratch = std::mem::take(&mut self.scratch);
        let mut reads = 0;
        while let Some(conn) = self.conns.get_mut(id) {
            if !conn.reads() || matches!(conn.state, State::Lingering) {
                break;
            }
            if reads == READS_MAX || conn.outbox.len() >= outbound_max {
                self.hold(id);
                break;
            }
            reads += 1;
            match conn.stream.read(&mut scratch) {
                Ok(0) => {
                    self.end(id, Ending::Lost);
                    break;
                }
                Ok(count) => {
                    self.tally.bytes_received += count as u64;
                    self.on_bytes(id, &scratch[..count]);
                    if count < scratch.len() && self.conns.get(id).is_none_or(|conn| !conn.read_closed) {
                        break;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => {
                    self.end(id, Ending::Lost);
                    break;
                }
            }
        }
        self.scratch = scratch;
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

    /// Handles all whole packets; keeps the rest.
    fn on_bytes(&mut self, id: usize, bytes: &[u8]) {
        let Some(conn) = self.conns.get_mut(id) else { return };
        if conn.partial.is_empty() {
            let used = self.on_packets(id, bytes);
            if let Some(conn) = self.conns.get_mut(id)
                && used < bytes.len()
            {
                conn.partial.extend_from_slice(&bytes[used..]);
            }
        } else {
            conn.partial.extend_from_slice(bytes);
            self.on_partial(id);
        }
    }

    /// Goes on with what was kept.
    pub(super) fn on_partial(&mut self, id: usize) {
        let Some(conn) = self.conns.get_mut(id) else { return };
        let mut partial = std::mem::take(&mut conn.partial);
        let used = self.on_packets(id, &partial);
        if used < partial.len()
            && let Some(conn) = self.conns.get_mut(id)
        {
            partial.drain(..used);
            conn.partial = partial;
        }
    }

    /// How many bytes were used up; everything, once the connection ends.
    fn on_packets(&mut self, id: usize, bytes: &[u8]) -> usize {
        let limits = codec::Limits { packet_bytes_max: self.shared.limits.packet_bytes_max };
        let mut used = 0;
        loop {
            let Some(conn) = self.conns.get_mut(id) else { return bytes.len() };
            if matches!(conn.state, State::Lingering) {
                return bytes.len();
            }
            if !conn.reads() {
                return used;
            }
            let rest = &bytes[used..];
            if rest.is_empty() {
                return used;
            }
            let frame = match codec::frame(rest, &limits) {
                Ok(Some(frame)) if frame.total_len <= rest.len() => frame,
                Ok(frame) => {
                    if let Some(frame) = frame {
                        // An honest client fills this; what it really sends is what gets allocated page by page.
                        conn.partial.reserve(frame.total_len.min(rest.len() * 4 + 64));
                    }
                    return used;
                }
                Err(error) => {
                    self.on_malformed(id, &error);
                    return bytes.len();
                }
            };
            conn.heard_ms = self.now_ms;
            self.on_packet(id, &rest[..frame.total_len]);
            if self.conns.get(id).is_some_and(|conn| conn.asking) {
                // It is handled again when the answer is here.
                return used;
            }
            used += frame.total_len;
        }
    }

    fn on_packet(&mut self, id: usize, packet: &[u8]) {
        let conn = &mut self.conns[id];
        let State::Live { slot } = conn.state else { return self.on_early_packet(id, packet) };
        let decoded = match codec::decode(conn.version, packet) {
            Ok(decoded) => decoded,
            Err(error) => return self.on_malformed(id, &error),
        };
        let Some(session) = self.sessions.get_mut(slot) else { return };
        conn.outbox.lend(&mut self.pool);
        let event = session.handle_packet(self.now_ms, decoded, &self.shared.limits, &mut conn.outbox);
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
            Ok(Event::None) => {}
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

    pub(super) fn mark_dirty(&mut self, id: usize) {
        if let Some(conn) = self.conns.get_mut(id)
            && !conn.dirty
        {
            conn.dirty = true;
            self.dirty.push(id);
        }
    }

    pub(super) fn on_writable(&mut self, id: usize) {
        if let Some(conn) = self.conns.get_mut(id)
            && conn.blocked
        {
            conn.blocked = false;
            self.mark_dirty(id);
        }
    }

    /// Writes what the client has waiting, and then what waits behind that in its Session.
    pub(super) fn flush(&mut self, id: usize) {
        let outbound_max = self.shared.limits.outbound_bytes_max;
        let Some(conn) = self.conns.get_mut(id) else { return };
        if self.durable.waits(conn.barrier) {
            return self.durable.wait(id);
        }
        conn.dirty = false;
        let was_full = conn.outbox.len() >= outbound_max;
        loop {
            let Some(conn) = self.conns.get_mut(id) else { return };
            if conn.blocked {
                return;
            }
            match write_once(conn) {
                Ok(written) => self.tally.bytes_sent += written as u64,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    conn.blocked = true;
                    return;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    trace!(%error, "write failed");
                    return self.end(id, Ending::Lost);
                }
            }
            if self.conns[id].outbox.is_empty() && !self.refill(id) {
                break;
            }
            let conn = &mut self.conns[id];
            if self.durable.waits(conn.barrier) {
                conn.dirty = true;
                return self.durable.wait(id);
            }
        }
        let conn = &mut self.conns[id];
        let buffer = conn.outbox.release();
        if buffer.capacity() > 0 && buffer.capacity() <= POOL_BUFFER_BYTES_MAX && self.pool.len() < POOL_BUFFERS_MAX {
            self.pool.push(buffer);
        }
        if matches!(conn.state, State::Lingering) {
            conn.stream.shutdown_write();
        } else if was_full {
            self.hold(id);
        }
    }

    /// Fills an empty outbox from the Session's queue; `false`: nothing waits. Retained messages follow in the next turn.
    fn refill(&mut self, id: usize) -> bool {
        let State::Live { slot } = self.conns[id].state else { return false };
        self.schedule_replays(slot);
        let conn = &mut self.conns[id];
        if let Some(session) = self.sessions.get_mut(slot) {
            if session.wants_pump() {
                session.pump(self.now_ms, &self.shared.limits, &mut conn.outbox);
            } else {
                session.refresh_availability(conn.outbox.len(), &self.shared.limits);
            }
        }
        if self.durable.is_on() {
            self.tell(slot, Some(id));
            self.load_more(slot);
        }
        !self.conns[id].outbox.is_empty()
    }

    /// Sends what has come from the store.
    pub(super) fn pump(&mut self, id: usize, slot: u32) {
        let Some(conn) = self.conns.get_mut(id) else { return };
        conn.outbox.lend(&mut self.pool);
        if let Some(session) = self.sessions.get_mut(slot) {
            session.pump(self.now_ms, &self.shared.limits, &mut conn.outbox);
        }
        self.tell(slot, Some(id));
        self.load_more(slot);
        self.mark_dirty(id);
    }
}

fn write_once(conn: &mut Conn) -> io::Result<usize> {
    if conn.outbox.is_empty() {
        return Ok(0);
    }
    let written = if let Some(bytes) = conn.outbox.single() {
        conn.stream.write(bytes)?
    } else {
        let mut slices = [IoSlice::new(&[]); SLICES_MAX];
        let count = conn.outbox.slices(&mut slices);
        conn.stream.write_vectored(&slices[..count])?
    };
    if written == 0 {
        return Err(io::ErrorKind::WriteZero.into());
    }
    conn.outbox.consume(written);
    Ok(written)
}

/// For logs: what a Reason Code means to the reader.
pub(super) fn is_fault(reason: ReasonCode) -> bool {
    reason.is_error() && reason != ReasonCode::SERVER_SHUTTING_DOWN && reason != ReasonCode::SESSION_TAKEN_OVER
}
