//! SUBSCRIBE and UNSUBSCRIBE. MQTT 5.0 §3.8 to §3.11.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use hashbrown::{HashMap, HashSet};
use tracing::debug;
use wasmqtt_protocol::access::Verdict;
use wasmqtt_protocol::codec::{
    ReasonCode, RetainHandling, Subscribe, SubscribeOptions, Unsubscribe, UserProperties, Version,
};
use wasmqtt_protocol::ports::EventKind;
use wasmqtt_protocol::router::{SessionKey, Subscription};
use wasmqtt_protocol::session::{Session, subscription_bytes};
use wasmqtt_protocol::topic::Filter;

use super::Shard;
use super::promises::Subscribed;
use crate::memory::Pressure;

impl Shard {
    pub(super) fn on_subscribe(&mut self, id: usize, slot: u32, subscribe: &Subscribe<'_>) {
        let Some(key) = self.sessions.get(slot).map(|session| session.key) else { return };
        let version = self.conns[id].version;
        let is_bridge = self.sessions.get(slot).and_then(Session::link).is_some_and(|link| link.bridge);
        let (filters, places) = distinct(&subscribe.filters);
        let (packet_id, subscription_id) = (subscribe.packet_id, subscribe.subscription_id);
        let subscribe = &Subscribe { packet_id, subscription_id, user_properties: UserProperties::default(), filters };
        let Some(verdicts) = self.may_subscribe(id, key, subscribe) else { return };
        let mut reasons = Vec::with_capacity(subscribe.filters.len());
        let (mark, mut made) = (self.durable.mark(), Vec::new());
        // A filter with several options in turn is one subscription, which gets the retained messages once.
        let mut retained = BTreeSet::new();
        let filters_max = self.tunable.limits.filters_per_packet_max;
        for (place, (text, options)) in subscribe.filters.iter().enumerate() {
            let parsed = Filter::parse(text).ok().filter(|filter| self.tunable.limits.takes_topic(filter.as_str()));
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
            if place >= filters_max {
                debug!(client_id = %self.client_id(slot), %filter, "subscription refused: limits.filters_per_packet_max");
                reasons.push(refusal(version, ReasonCode::QUOTA_EXCEEDED));
                continue;
            }
            if self.durable.is_failing() && self.is_stored(slot) {
                reasons.push(refusal(version, ReasonCode::QUOTA_EXCEEDED));
                continue;
            }
            if !self.has_room_for(slot, &filter) {
                debug!(client_id = %self.client_id(slot), %filter, "subscription refused: subscriptions_max, subscription_bytes_max or memory_mib");
                reasons.push(refusal(version, ReasonCode::QUOTA_EXCEEDED));
                continue;
            }
            let mut options = SubscribeOptions { qos: options.qos.min(self.limits.maximum_qos), ..*options };
            if is_bridge {
                // What 5.0 has options for. Members of a Shared Subscription get what they published themselves, too.
                options.no_local = filter.share().is_none();
                options.retain_as_published = true;
            }
            let subscription = Subscription { options, id: subscribe.subscription_id };
            let replaced = self.subscribe(key, &filter, subscription);
            let is_new = replaced.is_none();
            if self.is_stored(slot) {
                made.push((filter.clone(), replaced));
            }
            reasons.push(ReasonCode(options.qos as u8));
            let wanted = match options.retain_handling {
                RetainHandling::Send => true,
                RetainHandling::SendIfNew => is_new,
                RetainHandling::DoNotSend => false,
            };
            if wanted && filter.share().is_none() {
                retained.insert(filter);
            }
        }
        let reasons = places.iter().filter_map(|place| reasons.get(*place).copied()).collect();
        let answer = Subscribed { packet_id, reasons, made: Some(made) };
        let receipt = self.durable.since(mark);
        if !retained.is_empty() {
            self.begin_replays(key, retained);
        }
        self.promise_subscribed(id, slot, answer, receipt);
    }

    fn is_stored(&self, slot: u32) -> bool {
        self.sessions.get(slot).is_some_and(|session| session.stored().is_some())
    }

    /// One that replaces another always has.
    fn has_room_for(&self, slot: u32, filter: &Filter) -> bool {
        let has_memory = self.pressure < Pressure::Full;
        let limits = &self.tunable.limits;
        self.sessions.get(slot).is_some_and(|session| {
            let bytes = session.subscription_bytes() + subscription_bytes(filter);
            let has_room =
                session.subscription_count() < limits.subscriptions_max && bytes <= limits.subscription_bytes_max;
            (has_room && has_memory) || session.subscription(filter).is_some()
        })
    }

    pub(super) fn client_id(&self, slot: u32) -> &str {
        self.sessions.get(slot).map_or("", |session| &session.client_id)
    }

    /// Gives back the subscription that it replaces.
    pub(super) fn subscribe(
        &mut self,
        key: SessionKey,
        filter: &Filter,
        subscription: Subscription,
    ) -> Option<Subscription> {
        let session = self.sessions.get_mut(key.slot)?;
        let replaced = session.subscribe(filter.clone(), subscription);
        let availability = Arc::clone(session.availability());
        if let Some(outbox) =
            self.sessions.conn(key.slot).and_then(|id| self.conns.get(id)).map(|conn| conn.outbox.len())
            && let Some(session) = self.sessions.get(key.slot)
        {
            session.refresh_availability(outbox, &self.limits);
        }
        let shared = Arc::clone(&self.shared);
        let order = self.hooks.wants_interest.then(|| shared.interest_order());
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
        drop(order);
        self.shared.bump(filter.topic_filter());
        self.store_subscription(key, filter, Some(&subscription));
        self.event(EventKind::Subscribed, key.slot, || {
            vec![("filter", filter.to_string()), ("qos", (subscription.options.qos as u8).to_string())]
        });
        if replaced.is_none() {
            self.shared.stats.subscriptions.fetch_add(1, Ordering::Relaxed);
        }
        replaced
    }

    pub(super) fn on_unsubscribe(&mut self, id: usize, slot: u32, unsubscribe: &Unsubscribe<'_>) {
        let Some(key) = self.sessions.get(slot).map(|session| session.key) else { return };
        let version = self.conns[id].version;
        let filters_max = self.tunable.limits.filters_per_packet_max;
        if version != Version::V5 && counts_beyond(&unsubscribe.filters, filters_max) {
            // The answer of 3.x cannot say which of them were left, and none may be left without a word. [MQTT-3.10.4-1]
            return self.fault(id, ReasonCode::QUOTA_EXCEEDED, "UNSUBSCRIBE beyond limits.filters_per_packet_max");
        }
        let mut reasons = Vec::with_capacity(unsubscribe.filters.len());
        let mut seen: HashMap<&str, ReasonCode> = HashMap::new();
        let mark = self.durable.mark();
        for text in &unsubscribe.filters {
            let reason = match seen.get(text) {
                // What is there once more in the packet is not there any more in the Session.
                Some(&ReasonCode::SUCCESS) => ReasonCode::NO_SUBSCRIPTION_EXISTED,
                Some(reason) => *reason,
                None if seen.len() >= filters_max => {
                    debug!(client_id = %self.client_id(slot), "filter not unsubscribed: limits.filters_per_packet_max");
                    // UNSUBACK has no Quota exceeded. MQTT 5.0 §3.11.3, table 3-9.
                    ReasonCode::IMPLEMENTATION_SPECIFIC_ERROR
                }
                None => {
                    let reason = match Filter::parse(text) {
                        Ok(filter) if self.unsubscribe(key, &filter) => ReasonCode::SUCCESS,
                        Ok(_) => ReasonCode::NO_SUBSCRIPTION_EXISTED,
                        Err(_) => refusal(version, ReasonCode::TOPIC_FILTER_INVALID),
                    };
                    seen.insert(text, reason);
                    reason
                }
            };
            reasons.push(reason);
        }
        let answer = Subscribed { packet_id: unsubscribe.packet_id, reasons, made: None };
        self.promise_subscribed(id, slot, answer, self.durable.since(mark));
    }

    pub(super) fn unsubscribe(&mut self, key: SessionKey, filter: &Filter) -> bool {
        let Some(session) = self.sessions.get_mut(key.slot) else { return false };
        let is_replayed = session.replay(filter).is_some();
        if !session.unsubscribe(filter) {
            return false;
        }
        let stored = session.stored();
        if is_replayed {
            self.forget_replay(stored, filter);
        }
        let shared = Arc::clone(&self.shared);
        let order = self.hooks.wants_interest.then(|| shared.interest_order());
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
        drop(order);
        self.shared.bump(filter.topic_filter());
        self.store_subscription(key, filter, None);
        self.event(EventKind::Unsubscribed, key.slot, || vec![("filter", filter.to_string())]);
        self.shared.stats.subscriptions.fetch_sub(1, Ordering::Relaxed);
        true
    }
}

type Filters<'a> = Vec<(&'a str, SubscribeOptions)>;

/// A packet may have the same filter any number of times, and each would cost as much as the first: gives those that
/// say something new, and for each filter of the packet its place among them.
fn distinct<'a>(filters: &[(&'a str, SubscribeOptions)]) -> (Filters<'a>, Vec<usize>) {
    let mut distinct: Filters<'a> = Vec::with_capacity(filters.len().min(16));
    let mut last: HashMap<&str, usize> = HashMap::new();
    let places = filters.iter().map(|(text, options)| match last.get(text) {
        Some(place) if distinct[*place].1 == *options => *place,
        _ => {
            distinct.push((text, *options));
            last.insert(text, distinct.len() - 1);
            distinct.len() - 1
        }
    });
    let places = places.collect();
    (distinct, places)
}

/// The packet has more filters than `most`, the same ones counted once.
fn counts_beyond(filters: &[&str], most: usize) -> bool {
    filters.len() > most && filters.iter().collect::<HashSet<_>>().len() > most
}

/// 3.1.1 has one failure code.
fn refusal(version: Version, reason: ReasonCode) -> ReasonCode {
    if version == Version::V5 { reason.for_suback() } else { ReasonCode::UNSPECIFIED_ERROR }
}
