//! How Network Connections and Sessions end, and what becomes of their wills.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tracing::debug;
use wasmqtt_protocol::codec::{Connack, Disconnect, Packet, ReasonCode, UserProperties, Version, encode};
use wasmqtt_protocol::ports::{Change, EventKind};
use wasmqtt_protocol::router::SessionKey;
use wasmqtt_protocol::session::Session;

use super::Shard;
use super::conn::{State, is_fault};
use super::gate::Reason;
use super::read::Inbox;
use super::timers::Timer;

/// How long a connection that was told to go may still send before it is cut.
const LINGER_MS: u64 = 1000;

/// Why a Network Connection ends.
#[derive(Debug, Clone, Copy)]
pub(super) enum Ending {
    /// The socket closed without DISCONNECT.
    Lost,
    /// The client sent DISCONNECT; `will`: with another Reason Code than 0x00.
    Client { will: bool },
    /// We end it. MQTT 5.0 clients are told the reason.
    Server(ReasonCode, &'static str),
}

impl Ending {
    fn text(self) -> &'static str {
        match self {
            Self::Lost => "connection lost",
            Self::Client { .. } => "disconnected by the client",
            Self::Server(_, text) => text,
        }
    }

    /// The will is published unless the client said a plain goodbye. [MQTT-3.1.2-8], [MQTT-3.14.4-3]
    fn publishes_will(self) -> bool {
        !matches!(self, Self::Client { will: false })
    }
}

impl Shard {
    /// Ends a connection; its Session lives on for its Session Expiry Interval.
    pub(super) fn end(&mut self, id: usize, ending: Ending) {
        self.expire_grant(id, 0);
        let Some(conn) = self.conns.get_mut(id) else { return };
        let epoch = conn.epoch;
        let state = std::mem::replace(&mut conn.state, State::Lingering);
        conn.unchecked = false;
        let live = match state {
            State::Live { slot } => Some(slot),
            State::Opening(_) => {
                self.calls.cancel(id, epoch);
                None
            }
            State::New | State::Leaving { .. } | State::TakingOver { .. } => None,
            State::Lingering => return self.remove(id),
        };
        let conn = &mut self.conns[id];
        let (has_auth, is_asking) = (conn.auth.take().is_some(), conn.gate.is_closed_for(Reason::Asking));
        if has_auth || is_asking {
            self.calls.cancel(id, epoch);
        }
        if let Ending::Server(reason, text) = ending {
            if is_fault(reason) {
                debug!(address = ?conn.address, ?reason, text, "connection ended");
            }
            if let Some(slot) = live {
                self.promise_at_last(id, slot);
            }
            self.say_disconnect(id, live, reason, text);
        }
        if let Some(slot) = live {
            self.event(EventKind::ClientDisconnected, slot, || vec![("reason", ending.text().into())]);
            let mut promises = std::mem::take(&mut self.conns[id].promises);
            self.break_promises(&mut promises, slot);
            self.leave_session(slot, ending.publishes_will());
        }
        match ending {
            Ending::Lost | Ending::Client { .. } => self.remove(id),
            Ending::Server(..) => self.linger(id),
        }
    }

    /// DISCONNECT, with the Reason String if the client wants it and it fits. [MQTT-3.14.2-3]
    fn say_disconnect(&mut self, id: usize, live: Option<u32>, reason: ReasonCode, text: &'static str) {
        let conn = &mut self.conns[id];
        if conn.version != Version::V5 {
            return;
        }
        let Some(link) = live.and_then(|slot| self.sessions.get(slot)).and_then(|session| session.link()) else {
            return;
        };
        let mut packet = Vec::new();
        for text in [link.problem_information.then_some(text), None] {
            packet.clear();
            let disconnect = Disconnect { reason, reason_string: text, ..Disconnect::default() };
            encode(Version::V5, &Packet::Disconnect(disconnect), &mut packet);
            if packet.len() <= link.limits.packet_bytes_max as usize {
                conn.outbox.extend(&packet);
                return;
            }
        }
    }

    /// CONNACK with an error, then close. 3.x clients get the return code that comes nearest, or just the close.
    pub(super) fn refuse(&mut self, id: usize, reason: ReasonCode) {
        let Some(conn) = self.conns.get_mut(id) else { return };
        let reason = match (conn.version, reason.connect_return_code()) {
            (Version::V5, _) => Some(reason.for_connack()),
            (_, code) => code.map(ReasonCode),
        };
        if let Some(reason) = reason {
            let connack = Connack { reason, user_properties: UserProperties::default(), ..Connack::default() };
            let version = conn.version;
            conn.outbox.append(|bytes| encode(version, &Packet::Connack(Box::new(connack)), bytes));
        }
        let epoch = conn.epoch;
        if matches!(conn.state, State::Opening(_)) {
            self.calls.cancel(id, epoch);
        }
        self.conns[id].state = State::Lingering;
        self.conns[id].unchecked = false;
        self.linger(id);
    }

    fn linger(&mut self, id: usize) {
        let epoch = self.conns[id].epoch;
        self.conns[id].inbox = Inbox::default();
        self.set_conn_timer(id, self.now_ms + LINGER_MS, Timer::Linger { id, epoch });
        self.mark_dirty(id);
        self.hold(id);
    }

    /// Closes the socket. What can still be written at once is.
    pub(super) fn remove(&mut self, id: usize) {
        let Some(mut conn) = self.conns.try_remove(id) else { return };
        if let Some((at, timer)) = conn.timer {
            self.timers.cancel(at, timer);
        }
        self.timers.replace(conn.granted_until_ms, None, Timer::Grant { id, epoch: conn.epoch });
        if matches!(conn.state, State::Opening(_)) {
            self.calls.cancel(id, conn.epoch);
        }
        if let State::Live { slot } = conn.state {
            if conn.gate.is_closed_for(Reason::Asking) {
                self.calls.cancel(id, conn.epoch);
            }
            self.break_promises(&mut conn.promises, slot);
            self.event(EventKind::ClientDisconnected, slot, || vec![("reason", Ending::Lost.text().into())]);
            self.leave_session(slot, true);
        }
        if !conn.outbox.is_empty()
            && !self.durable.waits(conn.barrier)
            && let Some(bytes) = conn.outbox.single()
        {
            let _ = conn.stream.write(bytes);
        }
        let _ = self.poll.registry().deregister(&mut conn.stream);
        self.shared.connections.fetch_sub(1, Ordering::Relaxed);
        self.shared.load[usize::from(self.index)].fetch_sub(1, Ordering::Relaxed);
    }

    /// The connection of a Session is gone.
    pub(super) fn leave_session(&mut self, slot: u32, will: bool) {
        self.sessions.set_conn(slot, None);
        let Some(session) = self.sessions.get_mut(slot) else { return };
        session.disconnected();
        let key = session.key;
        let expiry = session.session_expiry();
        if !will {
            session.will = None;
        }
        let delay = session.will.as_ref().map(|will| will.delay.min(expiry));
        let left = session.take_unsent_shared();
        self.tell(slot, None);
        self.redeliver(left);
        match delay {
            Some(0) if self.postpones_will(key) => return self.retry_will(key, u64::from(expiry) * 1000),
            Some(0) => self.publish_will(key),
            Some(delay) => self.set_deadlines(key, None, Some(self.now_ms + u64::from(delay) * 1000)),
            None => {}
        }
        if expiry == 0 {
            self.end_session(key);
        } else {
            let (_, will_ms) = self.sessions.deadlines(slot);
            self.set_deadlines(key, Some(self.now_ms + u64::from(expiry) * 1000), will_ms);
            self.store_session(key);
        }
    }

    /// Ends a Session for good: its subscriptions, queue and place. A will that still waits is published.
    /// [MQTT-3.1.2-8]
    pub(super) fn end_session(&mut self, key: SessionKey) {
        let Some((session, None)) = self.sessions.resolve(key) else { return };
        let client_id = Arc::clone(&session.client_id);
        if self.sessions.deadlines(key.slot).1.is_some() {
            self.publish_will(key);
        }
        self.set_deadlines(key, None, None);
        if self.ends_after_will(key) {
            return;
        }
        self.forget_check(key);
        self.event(EventKind::SessionEnded, key.slot, Vec::new);
        let shared = Arc::clone(&self.shared);
        {
            let mut directory = shared.directory(&client_id);
            if directory.get(&client_id) == Some(&key) {
                directory.remove(&client_id);
            }
        }
        let Some(mut session) = self.sessions.take(key.slot) else { return };
        let left = session.take_shared_at_end();
        if let Some(name) = session.stored() {
            shared.set_stored(key, None);
            for step in session.take_steps() {
                self.durable.write_step(name, step);
            }
            for (filter, _) in session.subscriptions() {
                self.durable.write(Change::Unsubscribed { session: name, filter });
            }
            for (filter, _) in session.replays() {
                self.forget_replay(Some(name), filter);
            }
            self.durable.write(Change::SessionEnded { session: name });
        }
        let count = self.end_subscriptions(&session);
        shared.stats.subscriptions.fetch_sub(count, Ordering::Relaxed);
        shared.stats.sessions.fetch_sub(1, Ordering::Relaxed);
        self.redeliver(left);
    }

    /// Takes the subscriptions of a Session that has ended out of the index; says how many there were.
    fn end_subscriptions(&mut self, session: &Session) -> usize {
        if session.subscription_count() == 0 {
            return 0;
        }
        let shared = Arc::clone(&self.shared);
        let _order = self.hooks.wants_interest.then(|| shared.interest_order());
        let mut unwanted = Vec::new();
        {
            let mut index = shared.index_mut();
            for (filter, _) in session.subscriptions() {
                match filter.share() {
                    Some(share) => index.unsubscribe_shared(share, filter.topic_filter(), session.key),
                    None => index.unsubscribe(filter.topic_filter(), session.key),
                };
                shared.bump(filter.topic_filter());
                if self.hooks.wants_interest && !index.has(filter.topic_filter()) {
                    unwanted.push(filter.topic_filter());
                }
            }
        }
        for filter in unwanted {
            self.plugins.interest_changed(filter, false);
        }
        session.subscription_count()
    }

    /// A plugin wants a client to go.
    pub(super) fn on_disconnect_wanted(&mut self, client_id: &str, reason: ReasonCode) {
        let key = self.shared.directory(client_id).get(client_id).copied();
        if let Some(id) = key.filter(|key| key.shard == self.index).and_then(|key| self.sessions.conn(key.slot)) {
            self.end(id, Ending::Server(reason.for_disconnect(), "disconnected by a plugin"));
        }
    }
}
