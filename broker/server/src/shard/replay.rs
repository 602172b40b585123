//! Retained messages on their way to new subscriptions. MQTT 5.0 §3.3.1.3.
//!
//! A replay is a place in the order of topics, and a part of it each turn: nothing is collected in advance, and other
//! clients do not wait. Where the store knows the Session it knows the place, too, which is written together with the
//! messages that were queued on the way there.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant};

use smallvec::SmallVec;
use wasmqtt_protocol::codec::Qos;
use wasmqtt_protocol::ports::{Change, Receiver};
use wasmqtt_protocol::router::{Position, RetainedMessage, SessionId, SessionKey, Subscription};
use wasmqtt_protocol::session::{Delivered, Incoming, Replay, Session, Wish};
use wasmqtt_protocol::topic::Filter;

use super::Shard;

/// Topics looked at for one Session before the next one has its turn.
const LOOKS_MAX: usize = 256;
/// Topics looked at when a replay begins, to see whether there is anything at all.
const FIRST_LOOKS: usize = 8;
/// Time one turn spends on replays.
const TURN: Duration = Duration::from_millis(1);
/// Messages of replays that wait in a Session's queue: the others wait where they are retained.
const QUEUED_MAX: usize = 256;

impl Shard {
    /// Subscriptions were made whose clients want the retained messages. What is retained from now on reaches them when
    /// it is published. Told to the store before SUBACK promises it.
    pub(super) fn begin_replays(&mut self, key: SessionKey, filters: impl IntoIterator<Item = Filter>) {
        let shared = Arc::clone(&self.shared);
        let retained = shared.retained();
        let until = retained.last_stamp();
        for filter in filters {
            let Some(session) = self.sessions.get_mut(key.slot) else { return };
            let replay = Replay { from: Position::default(), until };
            let window = (self.now_ms, until);
            let rest = retained.walk(filter.topic_filter(), &replay.from, window, FIRST_LOOKS, &mut self.found);
            let is_empty = rest.is_none() && self.found.is_empty();
            self.found.clear();
            // Most filters match nothing, and then there is nothing to tell the store of.
            if is_empty && session.replay(&filter).is_none() {
                continue;
            }
            let is_stored = session.subscription(&filter).is_some_and(is_stored);
            if let Some(name) = session.stored() {
                if is_stored {
                    self.durable.write(Change::Replay { session: name, filter: &filter, replay: &replay });
                } else if session.replay(&filter).is_some() {
                    self.durable.write(Change::ReplayEnded { session: name, filter: &filter });
                }
            }
            session.begin_replay(filter, replay);
        }
        self.schedule_replays(key.slot);
    }

    /// The client has taken something, or is there again: goes on with what it waits for.
    #[inline]
    pub(super) fn schedule_replays(&mut self, slot: u32) {
        if let Some(session) = self.sessions.get_mut(slot).filter(|session| session.has_replays())
            && session.schedule_replays()
        {
            self.replays.push_back(session.key);
        }
    }

    /// A store that could not be written, or did not keep up, may do so now.
    pub(super) fn retry_replays(&mut self) {
        for key in std::mem::take(&mut self.held_replays) {
            if self.sessions.resolve(key).is_some() {
                self.schedule_replays(key.slot);
            }
        }
    }

    /// A part of each replay whose client takes more, in turn.
    pub(super) fn run_replays(&mut self) {
        if self.replays.is_empty() {
            return;
        }
        let begun = Instant::now();
        while let Some(key) = self.replays.pop_front() {
            if self.run_replay(key) {
                self.replays.push_back(key);
            } else if let Some((session, _)) = self.sessions.resolve(key) {
                session.pause_replays();
            }
            if begun.elapsed() >= TURN {
                return;
            }
        }
    }

    /// `false`: it is done, or waits for [`Self::schedule_replays`].
    fn run_replay(&mut self, key: SessionKey) -> bool {
        let Some((session, Some(id))) = self.sessions.resolve(key) else { return false };
        let Some(conn) = self.conns.get(id) else { return false };
        if conn.outbox.len() >= self.limits.outbound_bytes_max || !has_room(session, &self.limits) {
            return false;
        }
        if session.stored().is_some() && (self.durable.is_failing() || self.durable.is_congested()) {
            self.held_replays.insert(key);
            return false;
        }
        let Some((filter, replay, subscription)) = session.next_replay() else { return false };
        let mut found = std::mem::take(&mut self.found);
        let window = (self.now_ms, replay.until);
        let next = self.shared.retained().walk(filter.topic_filter(), &replay.from, window, LOOKS_MAX, &mut found);
        let sent = self.deliver_retained(key, id, &found, &subscription);
        let next = found.get(sent).map(|left| Position::before(&left.message.topic)).or(next);
        found.clear();
        self.found = found;
        self.advance_replay(key, &filter, &subscription, replay.until, next);
        self.tell(key.slot, Some(id));
        self.load_more(key.slot);
        if self.conns.get(id).is_some_and(|conn| !conn.outbox.is_empty()) {
            self.mark_dirty(id);
        }
        self.sessions.get(key.slot).is_some_and(Session::has_replays)
    }

    /// Notes how far a replay has come, for the store in the same batch as its messages.
    fn advance_replay(
        &mut self,
        key: SessionKey,
        filter: &Filter,
        subscription: &Subscription,
        until: u64,
        next: Option<Position>,
    ) {
        let Some(session) = self.sessions.get_mut(key.slot) else { return };
        if let Some(session) = session.stored() {
            match &next {
                Some(from) if is_stored(subscription) => {
                    let replay = Replay { from: from.clone(), until };
                    self.durable.write(Change::Replay { session, filter, replay: &replay });
                }
                Some(_) => {}
                // It may have begun with another QoS.
                None => self.durable.write(Change::ReplayEnded { session, filter }),
            }
        }
        session.advance_replay(filter, next);
    }

    /// Sends or queues retained messages, and says how many: the others do not fit at present.
    fn deliver_retained(
        &mut self,
        key: SessionKey,
        id: usize,
        found: &[RetainedMessage],
        subscription: &Subscription,
    ) -> usize {
        let limits = &self.limits;
        let Some(conn) = self.conns.get_mut(id) else { return 0 };
        let Some(session) = self.sessions.get_mut(key.slot) else { return 0 };
        conn.outbox.lend(&mut self.pool);
        let ids: SmallVec<[NonZeroU32; 1]> = subscription.id.into_iter().collect();
        for (place, retained) in found.iter().enumerate() {
            if conn.outbox.len() >= limits.outbound_bytes_max || !has_room(session, limits) {
                return place;
            }
            let mut incoming = Incoming::from_message(&retained.message);
            incoming.kept_as.clone_from(&retained.kept_as);
            let qos = incoming.qos.min(subscription.options.qos);
            // [MQTT-3.3.1-8]
            let mut wish = Wish { qos, retain: true, ids: &ids, id: None };
            if wish.qos > Qos::AtMostOnce
                && let Some(name) = session.stored()
            {
                wish.id = Some(self.durable.keep(&incoming, Receiver { session: name, wish }));
            }
            self.frames.reset();
            let out = Some(&mut conn.outbox);
            match session.deliver(self.now_ms, &incoming, wish, None, &mut self.frames, limits, out) {
                Delivered::Dropped => self.tally.dropped += 1,
                Delivered::Sent => self.tally.sent += 1,
                Delivered::Queued => {}
            }
        }
        found.len()
    }

    /// The Session ends, or its subscription.
    pub(super) fn forget_replay(&mut self, session: Option<SessionId>, filter: &Filter) {
        if let Some(session) = session {
            self.durable.write(Change::ReplayEnded { session, filter });
        }
    }
}

/// With QoS 0 nothing of it has to outlive the broker.
fn is_stored(subscription: &Subscription) -> bool {
    subscription.options.qos > Qos::AtMostOnce
}

fn has_room(session: &Session, limits: &wasmqtt_protocol::session::ServerLimits) -> bool {
    !session.is_held()
        && session.queued() < QUEUED_MAX.min(limits.queue_messages_max.div_ceil(2))
        && !session.is_half_full(limits)
}
