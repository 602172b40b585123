//! A Network Connection: what is known of it, and writing bytes out. Reading is in `read`.

use std::io::{self, IoSlice};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use mio::{Interest, Token};
use tracing::{debug, trace};
use wasmqtt_protocol::codec::{ReasonCode, Version};
use wasmqtt_protocol::ports::Grant;
use wasmqtt_protocol::session::{Outbox, ServerLimits};

use super::connect::Opening;
use super::durable::Receipt;
use super::gate::{Gate, Reason};
use super::promises::Promises;
use super::read::Inbox;
use super::timers::Timer;
use super::{POOL_BUFFER_BYTES_MAX, POOL_BUFFERS_MAX, Shard};
use crate::acceptor::Connecting;
use crate::memory::Pressure;
use crate::stream::Stream;

/// A connection as the acceptor hands it over.
pub(crate) struct Arrival {
    pub(crate) stream: Stream,
    pub(crate) address: Option<IpAddr>,
    pub(crate) listener: Arc<str>,
    /// Counts connections in the order in which they were accepted.
    pub(crate) number: u64,
    /// A proxy stands in front: the address is the proxy's.
    pub(crate) proxied: bool,
    pub(crate) connecting: Connecting,
}

/// Slices of one `writev`.
const SLICES_MAX: usize = 64;

/// How far a connection has come.
pub(super) enum State {
    /// CONNECT has not arrived.
    New,
    /// Authentication is under way.
    Opening(Box<Opening>),
    /// Let in, and about to move to the shard its Session lives on.
    Leaving { opening: Box<Opening>, grant: Box<Grant>, to: u16 },
    /// Let in, and about to take a Session over from an older connection, which is read to its end first.
    TakingOver { opening: Box<Opening>, grant: Box<Grant> },
    /// Has a Session.
    Live { slot: u32 },
    /// Said goodbye; waits for the peer to close.
    Lingering,
}

pub(crate) struct Conn {
    pub(super) stream: Stream,
    pub(super) address: Option<IpAddr>,
    pub(super) listener: Arc<str>,
    /// Those in force when it connected, which CONNACK told the client: what it sends is measured by them.
    pub(super) limits: Arc<ServerLimits>,
    /// See [`Arrival::proxied`].
    pub(super) proxied: bool,
    /// User Name of CONNECT, where authentication made another identity of it.
    pub(super) username: Option<Arc<str>>,
    pub(super) state: State,
    /// See [`Arrival::number`].
    pub(super) number: u64,
    /// Until its client is let in.
    pub(super) connecting: Option<Connecting>,
    /// Tells this connection from another that had the same place.
    pub(super) epoch: u32,
    /// Version of CONNECT; what DISCONNECT is written in.
    pub(super) version: Version,
    /// Whether it is read, and why not.
    pub(super) gate: Gate,
    pub(super) inbox: Inbox,
    pub(super) outbox: Outbox,
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
    /// The last look found nothing more to read.
    pub(super) is_caught_up: bool,
    /// Writing failed: nothing more goes out, and what the client has sent is read to its end.
    is_broken: bool,
    /// Another connection takes its Session over: so many bytes are still read of it. `None`: none does.
    pub(super) last_bytes: Option<u32>,
    /// It is not known yet which of its subscriptions are still allowed: nothing goes out, the CONNACK neither.
    pub(super) unchecked: bool,
    /// Messages of its Session that wait for storage hooks.
    pub(super) submitted: u32,
    /// The route it may publish to without another look, and until when; here, where each packet comes by anyway.
    pub(super) permitted: (u64, u64),
    /// When what authentication granted ends.
    pub(super) granted_until_ms: Option<u64>,
    /// Nothing is written before the store has settled these batches.
    pub(super) barrier: Receipt,
    /// CONNACK waits for them.
    pub(super) is_unanswered: bool,
    /// Its Session began with it.
    pub(super) has_new_session: bool,
    /// Answers that wait for the store one by one.
    pub(super) promises: Promises,
    /// On the list of those that wait for the store.
    pub(super) waits: bool,
    /// Authentication after CONNECT (MQTT 5.0 §4.12.1), and its method.
    pub(super) auth: Option<Box<super::auth::Standing>>,
}

impl Conn {
    /// It is to be read.
    pub(super) fn is_read(&self) -> bool {
        match self.last_bytes {
            None => self.gate.is_open(),
            Some(left) => left > 0 && self.gate.is_open_for_the_last_time(),
        }
    }

    /// Packets that were read already are handled, since their answers have room.
    #[inline]
    pub(super) fn passes_packets(&self) -> bool {
        // What storage hooks see may have to wait for the store afterwards.
        self.gate.passes_packets() && !self.promises.has_no_room_beside(self.submitted)
    }

    /// So many bytes came; `true`: no more is read, since another connection waits for the Session.
    pub(super) fn count_last_bytes(&mut self, count: usize) -> bool {
        self.last_bytes = self.last_bytes.map(|left| left.saturating_sub(count as u32));
        self.last_bytes == Some(0)
    }

    /// What is in the outbox, and whatever follows, waits for the store.
    pub(super) fn after(&mut self, receipt: Receipt) {
        self.barrier = self.barrier.and(receipt);
    }

    /// What belongs to a shard stays there.
    pub(super) fn leave_shard(&mut self, now_ms: u64) {
        self.dirty = false;
        self.held = false;
        self.blocked = false;
        self.gate.leave_shard(now_ms);
    }
}

/// Reasons for which a connection is on the list of those that are paused.
const PAUSES: [Reason; 3] = [Reason::Congested, Reason::Store, Reason::Memory];
/// Near the memory budget a publisher is read once in so many milliseconds.
const SLOWED_MS: u64 = 20;

impl Shard {
    pub(super) fn on_arrival(&mut self, arrival: Arrival) {
        if self.draining {
            self.shared.connections.fetch_sub(1, Ordering::Relaxed);
            self.shared.load[usize::from(self.index)].fetch_sub(1, Ordering::Relaxed);
            return;
        }
        let conn = Conn {
            stream: arrival.stream,
            address: arrival.address,
            listener: arrival.listener,
            limits: Arc::clone(&self.limits),
            proxied: arrival.proxied,
            username: None,
            state: State::New,
            number: arrival.number,
            connecting: Some(arrival.connecting),
            epoch: 0,
            version: Version::V311,
            gate: Gate::new(self.now_ms),
            inbox: Inbox::default(),
            outbox: Outbox::default(),
            timer: None,
            dirty: false,
            blocked: false,
            held: false,
            read_closed: false,
            is_caught_up: false,
            is_broken: false,
            last_bytes: None,
            unchecked: false,
            submitted: 0,
            permitted: (0, 0),
            granted_until_ms: None,
            barrier: Receipt::default(),
            is_unanswered: false,
            has_new_session: false,
            promises: Promises::default(),
            waits: false,
            auth: None,
        };
        let timeout = self.tunable.limits.connect_timeout.as_millis() as u64;
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
            debug_assert!(!self.readable.contains(&(id, conn.epoch)), "a connection has one share of a turn");
            conn.held = true;
            self.readable.push((id, conn.epoch));
        }
    }

    /// One reason not to read a connection is gone.
    pub(super) fn open_gate(&mut self, id: usize, reason: Reason) {
        let Some(conn) = self.conns.get_mut(id) else { return };
        if conn.gate.open(reason, self.now_ms) || conn.last_bytes.is_some() {
            self.hold(id);
        }
    }

    /// Another shard or the store does not keep up, or memory is nearly used up: no more is read of this connection for
    /// now, see [`Shard::end_pauses`].
    pub(super) fn pause(&mut self, id: usize, reason: Reason) {
        let Some(conn) = self.conns.get_mut(id) else { return };
        if !PAUSES.iter().any(|pause| conn.gate.is_closed_for(*pause)) {
            self.paused.push((id, conn.epoch));
        }
        conn.gate.close(reason, self.now_ms);
    }

    /// Goes on with those that were paused, as far as others keep up by now.
    pub(super) fn end_pauses(&mut self) {
        if self.paused.is_empty() {
            return;
        }
        let (mailboxes, store) = (self.is_congested, self.durable.is_congested());
        let memory = self.pressure > Pressure::None && self.now_ms < self.slowed_until_ms;
        if !memory {
            self.slowed_until_ms = self.now_ms + SLOWED_MS;
        }
        for (id, epoch) in std::mem::take(&mut self.paused) {
            if !self.is_current(id, epoch) {
                continue;
            }
            for (reason, is_congested) in
                [(Reason::Congested, mailboxes), (Reason::Store, store), (Reason::Memory, memory)]
            {
                if !is_congested {
                    self.open_gate(id, reason);
                }
            }
            let gate = &self.conns[id].gate;
            if PAUSES.iter().any(|pause| gate.is_closed_for(*pause)) {
                self.paused.push((id, epoch));
            }
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
        let Some(conn) = self.conns.get_mut(id) else { return };
        conn.dirty = false;
        if conn.unchecked {
            return;
        }
        if self.durable.waits(conn.barrier) {
            return self.wait_for_commit(id);
        }
        if conn.is_broken {
            conn.outbox = Outbox::default();
            return self.open_gate(id, Reason::Outbox);
        }
        self.write_out(id);
        // Half empty is empty enough, and not so often.
        if let Some(conn) = self.conns.get(id)
            && conn.gate.is_closed_for(Reason::Outbox)
            && conn.outbox.len() <= self.limits.outbound_bytes_max / 2
        {
            self.open_gate(id, Reason::Outbox);
        }
    }

    fn write_out(&mut self, id: usize) {
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
                    return self.on_write_failed(id);
                }
            }
            if self.conns[id].outbox.is_empty() && !self.refill(id) {
                break;
            }
            if self.durable.waits(self.conns[id].barrier) {
                return self.wait_for_commit(id);
            }
        }
        let conn = &mut self.conns[id];
        let buffer = conn.outbox.release();
        if buffer.capacity() > 0 && buffer.capacity() <= POOL_BUFFER_BYTES_MAX && self.pool.len() < POOL_BUFFERS_MAX {
            self.pool.push(buffer);
        }
        if matches!(conn.state, State::Lingering) {
            conn.stream.shutdown_write();
        }
    }

    /// The client does not listen any more. What it sent before it went still counts, its DISCONNECT above all.
    fn on_write_failed(&mut self, id: usize) {
        let conn = &mut self.conns[id];
        if matches!(conn.state, State::Lingering) {
            return self.remove(id);
        }
        conn.is_broken = true;
        conn.outbox = Outbox::default();
        self.hold(id);
    }

    /// Fills an empty outbox from the Session's queue; `false`: nothing waits. Retained messages follow in the next turn.
    fn refill(&mut self, id: usize) -> bool {
        let State::Live { slot } = self.conns[id].state else { return false };
        self.schedule_replays(slot);
        let conn = &mut self.conns[id];
        if let Some(session) = self.sessions.get_mut(slot) {
            if session.wants_pump() {
                session.pump(self.now_ms, &self.limits, &mut conn.outbox);
            } else {
                session.refresh_availability(conn.outbox.len(), &self.limits);
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
            session.pump(self.now_ms, &self.limits, &mut conn.outbox);
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
