//! What this shard must do at an instant: Keep Alive, Session Expiry, Will Delay, housekeeping.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use wasmqtt_protocol::codec::ReasonCode;
use wasmqtt_protocol::ports::{Correction, time_of};
use wasmqtt_protocol::router::SessionKey;
use wasmqtt_protocol::session::{Link, Session};

use super::conn::State;
use super::gate::Reason;
use super::{Ending, Shard};

/// Expired retained messages removed per second.
const SWEEP_BUDGET: usize = 10_000;

/// What one turn does of what is due; others are served before the rest.
const TIMERS_PER_TURN: usize = 1000;
/// Until the Keep Alive of a client that is about to be read is looked at again.
const LOOK_AGAIN_MS: u64 = 100;
/// Messages waiting in queues that are looked at per second and shard, whether they have expired.
const QUEUE_BUDGET: usize = 50_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Timer {
    Connect {
        id: usize,
        epoch: u32,
    },
    KeepAlive {
        id: usize,
        epoch: u32,
    },
    Linger {
        id: usize,
        epoch: u32,
    },
    Expiry(SessionKey),
    Will(SessionKey),
    /// Permissions of its subscriptions are asked for again.
    Check(SessionKey),
    /// What authentication granted ends.
    Grant {
        id: usize,
        epoch: u32,
    },
    Sweep,
    Queues,
    Sys,
}

/// Each connection has one timer and another for its grant, each Session at most three: one of a kind, noted at its
/// owner, and taken back when the owner goes. Keep Alive is not moved by packets: when it fires, it looks when the last
/// one came, so a packet costs no timer work.
#[derive(Default)]
pub(super) struct Timers {
    set: BTreeSet<(u64, Timer)>,
    /// How many the broker's counter knows of.
    counted: usize,
}

impl Timers {
    pub(super) fn set(&mut self, at_ms: u64, timer: Timer) {
        self.set.insert((at_ms, timer));
    }

    pub(super) fn cancel(&mut self, at_ms: u64, timer: Timer) {
        self.set.remove(&(at_ms, timer));
    }

    /// Moves the one timer of its kind that an owner has, sets it for the first time, or (`None`) takes it back.
    pub(super) fn replace(&mut self, old_ms: Option<u64>, at_ms: Option<u64>, timer: Timer) {
        if let Some(at) = old_ms {
            self.cancel(at, timer);
        }
        if let Some(at) = at_ms {
            self.set(at, timer);
        }
    }

    /// Tells in `all`, which all shards share, how many this shard has.
    pub(super) fn count(&mut self, all: &AtomicUsize) {
        let counted = std::mem::replace(&mut self.counted, self.set.len());
        match self.set.len().checked_sub(counted) {
            Some(0) => {}
            Some(more) => drop(all.fetch_add(more, Ordering::Relaxed)),
            None => drop(all.fetch_sub(counted - self.set.len(), Ordering::Relaxed)),
        }
    }

    pub(super) fn next_ms(&self) -> Option<u64> {
        self.set.first().map(|(at, _)| *at)
    }

    fn take_due(&mut self, now_ms: u64) -> Option<Timer> {
        if self.next_ms()? > now_ms {
            return None;
        }
        self.set.pop_first().map(|(_, timer)| timer)
    }
}

impl Shard {
    pub(super) fn start_housekeeping(&mut self) {
        if self.durable.is_on() {
            self.timers.set(self.now_ms + 1000, Timer::Queues);
        }
        if self.index == 0 {
            self.timers.set(self.now_ms + 1000, Timer::Sweep);
            if !self.shared.sys_interval.is_zero() {
                self.timers.set(self.now_ms, Timer::Sys);
            }
        }
    }

    /// For Sessions that the store gave back.
    pub(super) fn start_deadlines(&mut self) {
        for (key, expires_ms, will_ms) in self.sessions.all_deadlines() {
            for (at_ms, timer) in [(expires_ms, Timer::Expiry(key)), (will_ms, Timer::Will(key))] {
                if let Some(at_ms) = at_ms {
                    self.timers.set(at_ms, timer);
                }
            }
        }
    }

    /// Sessions and messages that were stored before some start of the broker are older than it seemed.
    pub(super) fn age(&mut self, correction: Correction) {
        let Correction { before_ms, by_ms } = correction;
        for slot in self.sessions.slots_from(0) {
            let Some(session) = self.sessions.get_mut(slot) else { continue };
            let key = session.key;
            session.age(|id| time_of(id.get()) < before_ms, by_ms);
            let expiry_ms = u64::from(session.session_expiry()) * 1000;
            let (expires_ms, will_ms) = self.sessions.deadlines(key.slot);
            // Left before that start.
            if expires_ms.is_some_and(|at| at.saturating_sub(expiry_ms) < before_ms) {
                let aged = |at: u64| at.saturating_sub(by_ms);
                self.set_deadlines(key, expires_ms.map(aged), will_ms.map(aged));
            }
        }
    }

    /// Replaces the one timer of a connection.
    pub(super) fn set_conn_timer(&mut self, id: usize, at_ms: u64, timer: Timer) {
        let Some(conn) = self.conns.get_mut(id) else { return };
        if let Some((at, old)) = conn.timer.replace((at_ms, timer)) {
            self.timers.cancel(at, old);
        }
        self.timers.set(at_ms, timer);
    }

    /// Replaces the deadlines of a Session.
    pub(super) fn set_deadlines(&mut self, key: SessionKey, expires_ms: Option<u64>, will_ms: Option<u64>) {
        let old = self.sessions.replace_deadlines(key.slot, expires_ms, will_ms);
        self.timers.replace(old.0, expires_ms, Timer::Expiry(key));
        self.timers.replace(old.1, will_ms, Timer::Will(key));
    }

    pub(super) fn run_timers(&mut self) {
        for _ in 0..TIMERS_PER_TURN {
            let Some(timer) = self.timers.take_due(self.now_ms) else { return };
            self.on_timer(timer);
        }
    }

    fn on_timer(&mut self, timer: Timer) {
        match timer {
            Timer::Connect { id, epoch } => self.on_connect_timeout(id, epoch),
            Timer::Linger { id, epoch } => {
                if self.is_current(id, epoch) {
                    self.remove(id);
                }
            }
            Timer::KeepAlive { id, epoch } => self.on_keep_alive(id, epoch),
            Timer::Expiry(key) if self.postpones_will(key) => self.retry_will(key, 0),
            Timer::Expiry(key) => self.end_session(key),
            Timer::Will(key) => self.on_will_delay(key),
            Timer::Check(key) => self.check_subscriptions(key),
            Timer::Grant { id, epoch } => self.on_grant_end(id, epoch),
            Timer::Sweep => {
                self.shared.look_at_clock();
                self.sweep_retained();
                self.sweep_bans();
                self.timers.set(self.now_ms + 1000, Timer::Sweep);
            }
            Timer::Queues => {
                self.sweep_queues();
                self.retry_replays();
                self.timers.set(self.now_ms + 1000, Timer::Queues);
            }
            Timer::Sys => {
                self.publish_sys();
                self.timers.set(self.now_ms + self.shared.sys_interval.as_millis() as u64, Timer::Sys);
            }
        }
    }

    /// Time for CONNECT, and for each AUTH after it. While plugins think it is not the client that is slow, and they have
    /// limits of their own.
    fn on_connect_timeout(&mut self, id: usize, epoch: u32) {
        if !self.is_current(id, epoch) {
            return;
        }
        let gate = &self.conns[id].gate;
        if gate.is_closed_for(Reason::Opening) || gate.is_closed_for(Reason::Leaving) {
            let timeout = self.tunable.limits.connect_timeout.as_millis() as u64;
            return self.set_conn_timer(id, self.now_ms + timeout, Timer::Connect { id, epoch });
        }
        self.remove(id);
    }

    fn sweep_retained(&mut self) {
        let shared = Arc::clone(&self.shared);
        let mut retained = shared.retained_mut();
        for _ in 0..SWEEP_BUDGET {
            let Some(topic) = retained.remove_expired(self.now_ms) else { break };
            self.durable.write_retained(&topic, None);
        }
        self.durable.hand_over();
    }

    /// Drops messages that waited longer than they may, a part of the Sessions each time.
    fn sweep_queues(&mut self) {
        let mut budget = QUEUE_BUDGET;
        for slot in self.sessions.slots_from(self.swept) {
            let Some(session) = self.sessions.get_mut(slot) else { continue };
            self.tally.dropped += session.drop_expired(self.now_ms, &mut budget) as u64;
            self.tell(slot, None);
            self.swept = slot + 1;
            budget = budget.saturating_sub(1);
            if budget == 0 {
                return;
            }
        }
        self.swept = 0;
    }

    /// One and a half times the Keep Alive without a packet ends the connection. [MQTT-3.1.2-22]
    fn on_keep_alive(&mut self, id: usize, epoch: u32) {
        if !self.is_current(id, epoch) {
            return;
        }
        let State::Live { slot } = self.conns[id].state else { return };
        let Some(keep_alive) = self.sessions.get(slot).and_then(Session::link).and_then(Link::keep_alive_ms) else {
            return;
        };
        let conn = &mut self.conns[id];
        let stream = &conn.stream;
        let due = match conn.gate.silent_since_ms(|| stream.unread()) {
            Some(since_ms) => since_ms + keep_alive,
            None => self.now_ms + keep_alive,
        };
        if due > self.now_ms {
            self.set_conn_timer(id, due, Timer::KeepAlive { id, epoch });
        } else if conn.held {
            // What it has sent is read in the next turn.
            self.set_conn_timer(id, self.now_ms + LOOK_AGAIN_MS, Timer::KeepAlive { id, epoch });
        } else {
            self.end(id, Ending::Server(ReasonCode::KEEP_ALIVE_TIMEOUT, "no packet within the Keep Alive"));
        }
    }
}
