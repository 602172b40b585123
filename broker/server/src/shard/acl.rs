//! May this client do that? Rules and leases answer; plugins are asked for what those do not know.
//!
//! A packet that has to wait for plugins stays in the buffer of its connection and is handled anew with the answer.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tracing::debug;
use wasmqtt_protocol::access::{Action, Decision, Permits, Verdict};
use wasmqtt_protocol::codec::{Qos, ReasonCode, Subscribe};
use wasmqtt_protocol::ports::{Access, AuthRequest, Client, Grant};
use wasmqtt_protocol::router::SessionKey;
use wasmqtt_protocol::session::Incoming;
use wasmqtt_protocol::topic::Filter;

use super::calls::{Answer, Asked};
use super::connect::principal_of;
use super::gate::Reason;
use super::routes::random;
use super::sessions::Standing;
use super::timers::Timer;
use super::{Ending, Shard};
use crate::Explained;

/// After a change that concerns all Sessions, their subscriptions are checked within this time, not at once.
const SPREAD_MS: u32 = 1000;
/// When a plugin could not answer about a subscription, it is asked again after this time.
const RETRY_MS: u64 = 1000;

const NOT_AUTHORIZED: Verdict = Verdict::Deny(ReasonCode::NOT_AUTHORIZED);

impl Shard {
    /// Gives a Session what authentication granted.
    pub(super) fn grant(&mut self, id: usize, key: SessionKey, request: &AuthRequest, grant: &Grant) {
        let permits = Permits::new(grant.rules.clone(), grant.complete);
        let client = Client {
            client_id: Arc::clone(&request.client_id),
            principal: principal_of(request, grant),
            listener: Arc::clone(&request.listener),
        };
        self.forget_check(key);
        let standing = Standing::new(Arc::new(client), permits);
        self.sessions.set_standing(key.slot, Some(Box::new(standing)));
        self.conns[id].permitted = (0, 0);
        self.expire_grant(id, grant.expires);
    }

    /// Sets when the client must have authenticated again; `seconds` 0: never.
    pub(super) fn expire_grant(&mut self, id: usize, seconds: u32) {
        let Some(conn) = self.conns.get_mut(id) else { return };
        let epoch = conn.epoch;
        let until_ms = (seconds > 0).then(|| self.now_ms + u64::from(seconds) * 1000);
        let old = std::mem::replace(&mut conn.granted_until_ms, until_ms);
        self.timers.replace(old, until_ms, Timer::Grant { id, epoch });
    }

    /// The subscriptions of a Session are not looked at at an instant any more.
    pub(super) fn forget_check(&mut self, key: SessionKey) {
        let old = self.sessions.standing(key.slot).and_then(|standing| standing.check_ms.take());
        self.timers.replace(old, None, Timer::Check(key));
    }

    pub(super) fn on_grant_end(&mut self, id: usize, epoch: u32) {
        if self.is_current(id, epoch) && self.conns[id].granted_until_ms.take().is_some() {
            self.end(id, Ending::Server(ReasonCode::NOT_AUTHORIZED, "what authentication granted has expired"));
        }
    }

    /// `None`: plugins are thinking about it. `route`: the number of the topic's route, if the cache has one.
    #[inline]
    pub(super) fn may_publish(
        &mut self,
        id: usize,
        key: SessionKey,
        incoming: &Incoming<'_>,
        route: Option<u64>,
    ) -> Option<Verdict> {
        let (permitted, until_ms) = self.conns[id].permitted;
        if Some(permitted) == route && self.now_ms < until_ms {
            return Some(Verdict::Allow);
        }
        self.may_publish_elsewhere(id, key, incoming, route)
    }

    fn may_publish_elsewhere(
        &mut self,
        id: usize,
        key: SessionKey,
        incoming: &Incoming<'_>,
        route: Option<u64>,
    ) -> Option<Verdict> {
        let Some(standing) = self.sessions.standing(key.slot) else { return Some(Verdict::Allow) };
        if !self.has_acl && !standing.permits.has_rules() {
            if let Some(route) = route {
                self.conns[id].permitted = (route, u64::MAX);
            }
            return Some(Verdict::Allow);
        }
        let (verdict, until_ms) = match standing.permits.publish(self.now_ms, route, incoming.topic) {
            // Perhaps said for this packet, which had to wait for it.
            Some(known) => {
                standing.permits.packet_done();
                known
            }
            None if self.ask_to_publish(id, key, incoming) => {
                let permits = &mut self.sessions.standing(key.slot)?.permits;
                let known = permits.publish(self.now_ms, route, incoming.topic);
                permits.packet_done();
                known.unwrap_or((NOT_AUTHORIZED, 0))
            }
            None => return None,
        };
        if verdict == Verdict::Allow
            && let Some(route) = route
        {
            self.conns[id].permitted = (route, until_ms);
        }
        Some(verdict)
    }

    #[cold]
    fn ask_to_publish(&mut self, id: usize, key: SessionKey, incoming: &Incoming<'_>) -> bool {
        let access = Access {
            action: Action::Publish,
            topic: incoming.topic.into(),
            qos: incoming.qos,
            retain: incoming.retain,
        };
        self.ask(id, key, Arc::new([access]))
    }

    /// One verdict for each filter that is valid, in their places; `None`: plugins are thinking about it. Empty: all are
    /// allowed.
    pub(super) fn may_subscribe(
        &mut self,
        id: usize,
        key: SessionKey,
        subscribe: &Subscribe<'_>,
    ) -> Option<Vec<Verdict>> {
        let Some(standing) = self.sessions.standing(key.slot) else { return Some(Vec::new()) };
        if !self.has_acl && !standing.permits.has_rules() {
            return Some(Vec::new());
        }
        // Those beyond are refused whatever plugins say.
        let asked = subscribe.filters.iter().take(self.tunable.limits.filters_per_packet_max);
        let filters: Vec<_> = asked.map(|(text, options)| (Filter::parse(text).ok(), options.qos)).collect();
        // What is learned for some of them may make others forgotten.
        let known: Vec<_> = filters
            .iter()
            .map(|(filter, _)| standing.permits.subscribe(self.now_ms, filter.as_ref()?.topic_filter()))
            .collect();
        let unknown: Arc<[Access]> = filters
            .iter()
            .zip(&known)
            .filter(|(_, known)| known.is_none())
            .filter_map(|((filter, qos), _)| Some(subscription(filter.as_ref()?.topic_filter(), *qos)))
            .collect();
        if !unknown.is_empty() && !self.ask(id, key, unknown) {
            return None;
        }
        let permits = &mut self.sessions.standing(key.slot)?.permits;
        let mut next_ms = u64::MAX;
        let verdicts = filters.iter().zip(known).map(|((filter, _), known)| {
            let Some(filter) = filter else { return Verdict::Allow };
            let (verdict, until_ms) = known
                .or_else(|| permits.subscribe(self.now_ms, filter.topic_filter()))
                .unwrap_or((NOT_AUTHORIZED, u64::MAX));
            // What was said once is not asked again while the client stays.
            if verdict == Verdict::Allow && until_ms > self.now_ms {
                next_ms = next_ms.min(until_ms);
            }
            verdict
        });
        let verdicts = verdicts.collect();
        permits.packet_done();
        self.check_at(key, next_ms);
        Some(verdicts)
    }

    /// Asks the plugins for the sake of a packet; `false`: it has to wait.
    fn ask(&mut self, id: usize, key: SessionKey, accesses: Arc<[Access]>) -> bool {
        let Some(standing) = self.sessions.standing(key.slot) else { return true };
        let asked = Asked { accesses, revoked: standing.revoked };
        if !self.has_acl {
            // Rules said nothing, and nothing granted means denied.
            self.learn(key, &asked, Vec::new());
            return true;
        }
        let epoch = self.conns[id].epoch;
        let call = self.plugins.authorize(Arc::clone(&standing.client), Arc::clone(&asked.accesses));
        let call = Box::pin(async move { Answer::Packet { conn: id, epoch, asked, decisions: call.await } });
        if let Some(Answer::Packet { asked, decisions, .. }) = self.calls.begin(Some((id, epoch)), call) {
            self.learn(key, &asked, decisions);
            return true;
        }
        self.conns[id].gate.close(Reason::Asking, self.now_ms);
        false
    }

    fn learn(&mut self, key: SessionKey, asked: &Asked, decisions: Vec<Decision>) {
        let now_ms = self.now_ms;
        let Some(standing) = self.sessions.standing(key.slot) else { return };
        // What was asked before a revocation holds for what waits for it, and no longer.
        let is_revoked = standing.revoked != asked.revoked;
        let decisions = decisions.into_iter().map(Some).chain(std::iter::repeat_with(|| None));
        for (access, decision) in asked.accesses.iter().zip(decisions) {
            let mut decision = decision.unwrap_or_default();
            if is_revoked {
                decision.lease = None;
            }
            standing.permits.learn(now_ms, access.action, Arc::clone(&access.topic), decision);
        }
        if is_revoked {
            self.check_at(key, now_ms);
        }
    }

    /// The packet that waited is handled now, and what came behind it.
    pub(super) fn on_packet_decisions(&mut self, id: usize, epoch: u32, asked: &Asked, decisions: Vec<Decision>) {
        if !self.is_current(id, epoch) {
            return;
        }
        let super::conn::State::Live { slot } = self.conns[id].state else { return };
        let Some(key) = self.sessions.get(slot).map(|session| session.key) else { return };
        self.learn(key, asked, decisions);
        self.open_gate(id, Reason::Asking);
        self.on_kept(id);
    }

    /// Plugins came, went or were replaced, or all decisions were revoked.
    pub(super) fn look_for_changes(&mut self) {
        let (chain, acl) = self.plugins.epoch();
        let epoch = [chain, acl, self.shared.revocations.load(Ordering::Acquire)];
        let before = std::mem::replace(&mut self.plugins_epoch, epoch);
        if epoch == before {
            return;
        }
        self.has_acl = self.plugins.has_acl();
        self.hooks.wanted_events = self.plugins.wanted_events();
        self.hooks.wants_interest = self.plugins.wants_interest();
        self.routes.forget();
        if epoch[1..] == before[1..] {
            return;
        }
        self.sessions.revoke_all();
        self.revoked.begin(&self.sessions);
    }

    /// Goes on with what concerns all Sessions: subscriptions that are to be asked about again, clients that were banned.
    pub(super) fn run_sweeps(&mut self) {
        if self.revoked.is_under_way() {
            for key in self.revoked.take(&self.sessions) {
                self.revoke(key, u64::from(random() % SPREAD_MS));
            }
        }
        if self.banned.is_under_way() {
            for key in self.banned.take(&self.sessions) {
                self.end_if_banned(key);
            }
        }
    }

    pub(super) fn on_revoke(&mut self, client_id: &str) {
        let key = self.shared.directory(client_id).get(client_id).copied();
        if let Some(key) = key.filter(|key| key.shard == self.index) {
            self.revoke(key, 0);
        }
    }

    /// What is known about an access without asking plugins; `None`: no such client here.
    pub(super) fn explain(&mut self, client_id: &str, access: &Access) -> Option<Explained> {
        let key = self.shared.directory(client_id).get(client_id).copied().filter(|key| key.shard == self.index)?;
        let connected = self.conn_of(Some(key)).is_some();
        let standing = self.sessions.standing(key.slot)?;
        let known = standing.permits.explain(self.now_ms, access.action, &access.topic);
        Some(Explained { client: Arc::clone(&standing.client), connected, known })
    }

    fn revoke(&mut self, key: SessionKey, check_in_ms: u64) {
        if let Some(standing) = self.sessions.standing(key.slot) {
            standing.revoke();
            self.forget_permitted(key);
            self.check_in(key, check_in_ms);
        }
    }

    fn forget_permitted(&mut self, key: SessionKey) {
        if let Some(conn) = self.sessions.conn(key.slot).and_then(|id| self.conns.get_mut(id)) {
            conn.permitted = (0, 0);
        }
    }

    fn check_in(&mut self, key: SessionKey, ms: u64) {
        let subscribed = self.sessions.get(key.slot).is_some_and(|session| session.subscriptions().next().is_some());
        if subscribed {
            self.check_at(key, self.now_ms + ms);
        }
    }

    /// Has the subscriptions of a Session looked at no later than then.
    fn check_at(&mut self, key: SessionKey, at_ms: u64) {
        let Some(standing) = self.sessions.standing(key.slot) else { return };
        if at_ms == u64::MAX || standing.check_ms.is_some_and(|check_ms| check_ms <= at_ms) {
            return;
        }
        let old = standing.check_ms.replace(at_ms);
        self.timers.replace(old, Some(at_ms), Timer::Check(key));
    }

    /// Looks whether the subscriptions of a Session are still allowed. A client that has just come gets its CONNACK, and
    /// what waits for it, when that is known.
    pub(super) fn check_subscriptions(&mut self, key: SessionKey) {
        if self.sessions.resolve(key).is_none() {
            return;
        }
        self.forget_check(key);
        let Some(standing) = self.sessions.standing(key.slot) else { return };
        if !self.has_acl && !standing.permits.has_rules() {
            return self.on_permissions_known(key, true);
        }
        let (client, revoked) = (Arc::clone(&standing.client), standing.revoked);
        let unknown = self.judge_subscriptions(key);
        if unknown.is_empty() {
            return self.on_permissions_known(key, true);
        }
        let asked = Asked { accesses: unknown.into(), revoked };
        if !self.has_acl {
            return self.on_subscription_decisions(key, &client, &asked, Vec::new());
        }
        let call = self.plugins.authorize(Arc::clone(&client), Arc::clone(&asked.accesses));
        let call =
            Box::pin(async move { Answer::Subscriptions { session: key, client, asked, decisions: call.await } });
        if let Some(answer) = self.calls.begin(None, call) {
            self.on_answer(answer);
        }
    }

    pub(super) fn on_subscription_decisions(
        &mut self,
        key: SessionKey,
        client: &Arc<Client>,
        asked: &Asked,
        mut decisions: Vec<Decision>,
    ) {
        if self.sessions.resolve(key).is_none() {
            return;
        }
        // Asked for the sake of an earlier connection, or of what authentication granted before.
        if !self.sessions.standing_of(key.slot).is_some_and(|standing| Arc::ptr_eq(&standing.client, client)) {
            return;
        }
        let is_open = |decision: &Decision| decision.failed && decision.verdict != Some(Verdict::Allow);
        let is_known = !decisions.iter().any(is_open);
        // A plugin that could not answer must not cost a client its subscriptions; but what waits in its queue waits on.
        let failed = decisions.iter().any(|decision| decision.failed);
        for decision in decisions.iter_mut().filter(|decision| decision.failed) {
            decision.verdict = Some(Verdict::Allow);
            decision.lease = None;
        }
        self.learn(key, asked, decisions);
        self.judge_subscriptions(key);
        if let Some(standing) = self.sessions.standing(key.slot) {
            standing.permits.packet_done();
        }
        if failed {
            self.check_at(key, self.now_ms + RETRY_MS);
        }
        self.on_permissions_known(key, is_known);
    }

    /// It is known which subscriptions of a Session are allowed, and the others have ended: its client gets its CONNACK
    /// and what waits for it. `false`: plugins could not say, and what waits goes on waiting.
    fn on_permissions_known(&mut self, key: SessionKey, is_known: bool) {
        let compared =
            self.has_acl || self.sessions.standing_of(key.slot).is_some_and(|standing| standing.permits.has_rules());
        let Some((session, Some(id))) = self.sessions.resolve(key) else { return };
        let Some(conn) = self.conns.get_mut(id) else { return };
        let is_first = std::mem::take(&mut conn.unchecked);
        let releases = is_known && session.is_held();
        if releases {
            conn.outbox.lend(&mut self.pool);
            session.release(self.now_ms, compared, &self.limits, &mut conn.outbox);
        }
        if releases && self.durable.is_on() {
            self.tell(key.slot, Some(id));
            self.load_more(key.slot);
        }
        if releases {
            self.schedule_replays(key.slot);
        }
        if is_first || releases {
            self.mark_dirty(id);
        }
        if is_first {
            self.open_gate(id, Reason::Opening);
            // What follows CONNECT counts when the client is let in for good. [MQTT-3.1.4-6]
            if self.conns[id].is_unanswered {
                return self.wait_for_commit(id);
            }
            self.on_kept(id);
        }
    }

    /// Ends the subscriptions that are denied by now, and gives back those nobody knows about.
    fn judge_subscriptions(&mut self, key: SessionKey) -> Vec<Access> {
        let Some(session) = self.sessions.get(key.slot) else { return Vec::new() };
        let filters: Vec<_> =
            session.subscriptions().map(|(filter, subscription)| (filter.clone(), subscription.options.qos)).collect();
        let mut unknown = Vec::new();
        let mut next_ms = u64::MAX;
        for (filter, qos) in filters {
            let Some(standing) = self.sessions.standing(key.slot) else { break };
            match standing.permits.subscribe(self.now_ms, filter.topic_filter()) {
                None => unknown.push(subscription(filter.topic_filter(), qos)),
                Some((Verdict::Allow, until_ms)) if until_ms > self.now_ms => next_ms = next_ms.min(until_ms),
                Some((Verdict::Allow, _)) => {}
                Some((Verdict::Deny(_), _)) => {
                    debug!(client_id = %standing.client.client_id, %filter, "subscription ended: no longer allowed");
                    self.unsubscribe(key, &filter);
                    if let Some(session) = self.sessions.get_mut(key.slot) {
                        session.compare_queue();
                    }
                }
            }
        }
        self.check_at(key, next_ms);
        unknown
    }
}

fn subscription(filter: &str, qos: Qos) -> Access {
    Access { action: Action::Subscribe, topic: filter.into(), qos, retain: false }
}
