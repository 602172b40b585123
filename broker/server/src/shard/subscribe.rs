//! SUBSCRIBE, UNSUBSCRIBE and the retained messages that go with them. MQTT 5.0 §3.8 to §3.11.

use std::collections::VecDeque;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use smallvec::SmallVec;
use tracing::{debug, warn};
use wasmqtt_protocol::access::Verdict;
use wasmqtt_protocol::codec::{
    Packet, Qos, ReasonCode, RetainHandling, Suback, Subscribe, SubscribeOptions, Unsubscribe, UserProperties, Version,
};
use wasmqtt_protocol::ports::{EventKind, Receiver};
use wasmqtt_protocol::router::{Message, SessionKey, Subscription};
use wasmqtt_protocol::session::{Delivered, Incoming, Wish};
use wasmqtt_protocol::topic::Filter;

use super::Shard;
use crate::shared::is_too_deep;

/// Retained messages on their way to a new subscription.
pub(crate) struct Backlog {
    /// How many wait in the backlogs of all clients.
    all: Arc<AtomicUsize>,
    waiting: VecDeque<Waiting>,
}

struct Waiting {
    message: Arc<Message>,
    qos: Qos,
    id: Option<NonZeroU32>,
}

/// Retained messages that may wait for all clients together; what is beyond is left out.
const BACKLOGS_MAX: usize = 4_000_000;

impl Drop for Backlog {
    fn drop(&mut self) {
        self.all.fetch_sub(self.waiting.len(), Ordering::Relaxed);
    }
}

impl Shard {
    pub(super) fn on_subscribe(&mut self, id: usize, slot: u32, subscribe: &Subscribe<'_>) {
        let Some(key) = self.sessions.get(slot).map(|session| session.key) else { return };
        let version = self.conns[id].version;
        let Some(verdicts) = self.may_subscribe(id, key, subscribe) else { return };
        let mut reasons = Vec::with_capacity(subscribe.filters.len());
        let mut retained = Vec::new();
        for (place, (text, options)) in subscribe.filters.iter().enumerate() {
            let parsed = Filter::parse(text).ok().filter(|filter| !is_too_deep(filter.as_str()));
            let Some(filter) = parsed else {
                reasons.push(refusal(version, ReasonCode::TOPIC_FILTER_INVALID));
                continue;
            };
            if filter.share().is_some() && options.no_local {
                // [MQTT-3.8.3-4]
                return self.fault(id, ReasonCode::PROTOCOL_ERROR, "No Local on a Shared Subscription");
            }
            if let Some(Verdict::Deny(reason)) = verdicts.get(place) {
                self.event(EventKind::AccessDenied, key.slot, || {
                    vec![("action", "subscribe".into()), ("topic", filter.to_string())]
                });
                reasons.push(refusal(version, *reason));
                continue;
            }
            if self.durable.is_failing() && self.is_stored(slot) {
                reasons.push(refusal(version, ReasonCode::QUOTA_EXCEEDED));
                continue;
            }
            if !self.has_room_for(slot, &filter) {
                debug!(client_id = %self.client_id(slot), %filter, "subscription refused: limits.subscriptions_max");
                reasons.push(refusal(version, ReasonCode::QUOTA_EXCEEDED));
                continue;
            }
            let options = SubscribeOptions { qos: options.qos.min(self.shared.limits.maximum_qos), ..*options };
            let subscription = Subscription { options, id: subscribe.subscription_id };
            let is_new = self.subscribe(key, &filter, subscription);
            reasons.push(ReasonCode(options.qos as u8));
            let wanted = match options.retain_handling {
                RetainHandling::Send => true,
                RetainHandling::SendIfNew => is_new,
                RetainHandling::DoNotSend => false,
            };
            if wanted && filter.share().is_none() {
                retained.push((filter, subscription));
            }
        }
        let suback = Suback {
            packet_id: subscribe.packet_id,
            reasons,
            reason_string: None,
            user_properties: UserProperties::default(),
        };
        self.answer(id, slot, &Packet::Suback(suback));
        for (filter, subscription) in retained {
            self.queue_retained(id, &filter, subscription);
        }
        self.pump_backlog(id, slot);
    }

    fn is_stored(&self, slot: u32) -> bool {
        self.sessions.get(slot).is_some_and(|session| session.stored().is_some())
    }

    /// One that replaces another always has.
    fn has_room_for(&self, slot: u32, filter: &Filter) -> bool {
        self.sessions.get(slot).is_some_and(|session| {
            session.subscription_count() < self.shared.config.limits.subscriptions_max
                || session.subscription(filter).is_some()
        })
    }

    fn client_id(&self, slot: u32) -> &str {
        self.sessions.get(slot).map_or("", |session| &session.client_id)
    }

    fn answer(&mut self, id: usize, slot: u32, packet: &Packet<'_>) {
        let Some(conn) = self.conns.get_mut(id) else { return };
        conn.outbox.lend(&mut self.pool);
        self.durable.promise(&mut conn.barrier);
        if let Some(session) = self.sessions.get(slot) {
            session.send(packet, &mut conn.outbox);
        }
        self.mark_dirty(id);
    }

    /// `true`: the Session had no such subscription.
    fn subscribe(&mut self, key: SessionKey, filter: &Filter, subscription: Subscription) -> bool {
        let Some(session) = self.sessions.get_mut(key.slot) else { return false };
        let is_new = session.subscribe(filter.clone(), subscription).is_none();
        let availability = Arc::clone(session.availability());
        if let Some(outbox) =
            self.sessions.conn(key.slot).and_then(|id| self.conns.get(id)).map(|conn| conn.outbox.len())
            && let Some(session) = self.sessions.get(key.slot)
        {
            session.refresh_availability(outbox, &self.shared.limits);
        }
        let is_first = {
            let mut index = self.shared.index_mut();
            let is_first = self.hooks.wants_interest && !index.has(filter.topic_filter());
            match filter.share() {
                Some(share) => {
                    index.subscribe_shared(share, filter.topic_filter(), key, subscription, availability);
                }
                None => {
                    index.subscribe(filter.topic_filter(), key, subscription);
                }
            }
            is_first
        };
        if is_first {
            self.plugins.interest_changed(filter.topic_filter(), true);
        }
        self.shared.bump(filter.topic_filter());
        self.store_subscription(key, filter, Some(&subscription));
        self.event(EventKind::Subscribed, key.slot, || {
            vec![("filter", filter.to_string()), ("qos", (subscription.options.qos as u8).to_string())]
        });
        if is_new {
            self.shared.stats.subscriptions.fetch_add(1, Ordering::Relaxed);
        }
        is_new
    }

    pub(super) fn on_unsubscribe(&mut self, id: usize, slot: u32, unsubscribe: &Unsubscribe<'_>) {
        let Some(key) = self.sessions.get(slot).map(|session| session.key) else { return };
        let version = self.conns[id].version;
        let mut reasons = Vec::with_capacity(unsubscribe.filters.len());
        for text in &unsubscribe.filters {
            let reason = match Filter::parse(text) {
                Ok(filter) if self.unsubscribe(key, &filter) => ReasonCode::SUCCESS,
                Ok(_) => ReasonCode::NO_SUBSCRIPTION_EXISTED,
                Err(_) => refusal(version, ReasonCode::TOPIC_FILTER_INVALID),
            };
            reasons.push(reason);
        }
        let unsuback = Suback {
            packet_id: unsubscribe.packet_id,
            reasons,
            reason_string: None,
            user_properties: UserProperties::default(),
        };
        self.answer(id, slot, &Packet::Unsuback(unsuback));
    }

    pub(super) fn unsubscribe(&mut self, key: SessionKey, filter: &Filter) -> bool {
        let Some(session) = self.sessions.get_mut(key.slot) else { return false };
        if !session.unsubscribe(filter) {
            return false;
        }
        let was_last = {
            let mut index = self.shared.index_mut();
            match filter.share() {
                Some(share) => index.unsubscribe_shared(share, filter.topic_filter(), key),
                None => index.unsubscribe(filter.topic_filter(), key),
            };
            self.hooks.wants_interest && !index.has(filter.topic_filter())
        };
        if was_last {
            self.plugins.interest_changed(filter.topic_filter(), false);
        }
        self.shared.bump(filter.topic_filter());
        self.store_subscription(key, filter, None);
        self.event(EventKind::Unsubscribed, key.slot, || vec![("filter", filter.to_string())]);
        self.shared.stats.subscriptions.fetch_sub(1, Ordering::Relaxed);
        true
    }

    fn queue_retained(&mut self, id: usize, filter: &Filter, subscription: Subscription) {
        let mut found = Vec::new();
        self.shared.retained().matching(filter.topic_filter(), self.now_ms, &mut found);
        if found.is_empty() {
            return;
        }
        let Some(conn) = self.conns.get_mut(id) else { return };
        let all = &self.shared.backlogs;
        let backlog =
            conn.backlog.get_or_insert_with(|| Box::new(Backlog { all: Arc::clone(all), waiting: VecDeque::new() }));
        let room = BACKLOGS_MAX.saturating_sub(all.load(Ordering::Relaxed));
        if let Some(left_out) = found.len().checked_sub(room + 1) {
            warn!(%filter, left_out = left_out + 1, "too many retained messages wait for clients, some are left out");
            self.tally.dropped += left_out as u64 + 1;
        }
        all.fetch_add(found.len().min(room), Ordering::Relaxed);
        backlog.waiting.extend(found.into_iter().take(room).map(|message| Waiting {
            qos: message.qos.min(subscription.options.qos),
            message,
            id: subscription.id,
        }));
    }

    /// Sends retained messages while the outbox has room and the Session's queue is short.
    pub(super) fn pump_backlog(&mut self, id: usize, slot: u32) {
        let limits = &self.shared.limits;
        let Some(conn) = self.conns.get_mut(id) else { return };
        let Some(backlog) = &mut conn.backlog else { return };
        let Some(session) = self.sessions.get_mut(slot) else { return };
        conn.outbox.lend(&mut self.pool);
        let retained = self.shared.retained();
        while conn.outbox.len() < limits.outbound_bytes_max && session.queued() < limits.queue_messages_max / 2 {
            let Some(waiting) = backlog.waiting.pop_front() else { break };
            backlog.all.fetch_sub(1, Ordering::Relaxed);
            // Replaced or removed meanwhile: the subscription was there and saw it.
            if !retained.get(&waiting.message.topic).is_some_and(|now| Arc::ptr_eq(now, &waiting.message)) {
                continue;
            }
            let incoming = Incoming::from_message(&waiting.message);
            let ids: SmallVec<[NonZeroU32; 1]> = waiting.id.into_iter().collect();
            // [MQTT-3.3.1-8]
            let mut wish = Wish { qos: waiting.qos, retain: true, ids: &ids, id: None };
            // Where storage hooks seal, the open form must not be stored.
            if wish.qos > Qos::AtMostOnce
                && let Some(name) = session.stored()
                && self.plugins.interest(&waiting.message.topic).before == 0
            {
                wish.id = Some(self.durable.keep(waiting.message.as_ref().into(), Receiver { session: name, wish }));
            }
            self.frames.reset();
            let delivered =
                session.deliver(self.now_ms, &incoming, wish, None, &mut self.frames, limits, Some(&mut conn.outbox));
            match delivered {
                Delivered::Dropped => self.tally.dropped += 1,
                Delivered::Sent => self.tally.sent += 1,
                Delivered::Queued => {}
            }
        }
        if backlog.waiting.is_empty() {
            conn.backlog = None;
        }
        let dirty = !conn.outbox.is_empty();
        drop(retained);
        self.tell(slot, Some(id));
        if dirty {
            self.mark_dirty(id);
        }
    }
}

/// 3.1.1 has one failure code.
fn refusal(version: Version, reason: ReasonCode) -> ReasonCode {
    if version == Version::V5 { reason.for_suback() } else { ReasonCode::UNSPECIFIED_ERROR }
}
