//! A message from its publisher to everybody who wants it.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;

use tracing::debug;
use wasmqtt_protocol::access::Verdict;
use wasmqtt_protocol::codec::{PacketId, Publish, Qos, ReasonCode, Version};
use wasmqtt_protocol::ports::EventKind;
use wasmqtt_protocol::router::{Group, Merged, MessageId, Target, pick};
use wasmqtt_protocol::session::{Delivered, Delivery, Incoming, QueuePolicy, Step, Wish};

use super::durable::Receipt;
use super::gate::Reason;
use super::hooks::Shown;
use super::routes::{Route, random};
use super::{Ending, Shard};
use crate::mailbox::Remote;
use crate::memory::Pressure;

impl Shard {
    pub(super) fn on_publish(&mut self, id: usize, slot: u32, publish: &Publish<'_>, aliased: Option<&str>) {
        let Some(key) = self.sessions.get(slot).map(|session| session.key) else { return };
        let properties = publish.properties.forwardable();
        let incoming = Incoming::new(
            aliased.unwrap_or(publish.topic),
            publish.payload,
            &properties,
            (publish.qos, publish.retain),
            publish.properties.message_expiry.map(|secs| self.now_ms + u64::from(secs) * 1000),
            Some(key),
        );
        if !self.tunable.limits.takes_topic(incoming.topic) {
            return self.fault(id, ReasonCode::TOPIC_NAME_INVALID, "Topic Name with too many levels or bytes");
        }
        let cached = self.routes.find(incoming.topic, &self.shared);
        let route = cached.as_ref().map(|found| found.route.id);
        let Some(verdict) = self.may_publish(id, key, &incoming, route) else { return };
        self.tally.received += 1;
        if self.pressure > Pressure::None {
            self.pause(id, Reason::Memory);
        }
        if let Verdict::Deny(reason) = verdict {
            debug!(client_id = %self.client_id(slot), topic = incoming.topic, "publishing denied");
            self.event(EventKind::AccessDenied, slot, || {
                vec![("action", "publish".into()), ("topic", incoming.topic.into())]
            });
            return self.refuse_publish(id, slot, &incoming, publish.packet_id, reason);
        }
        if incoming.topic.starts_with("$SYS/") {
            return self.refuse_publish(id, slot, &incoming, publish.packet_id, ReasonCode::NOT_AUTHORIZED);
        }
        let route = match cached {
            Some(found) => self.routes.keep(incoming.topic, found),
            None => self.build_route(incoming.topic),
        };
        if self.must_refuse(&route, &incoming) {
            if self.conns[id].version != Version::V5 && publish.qos != Qos::AtMostOnce {
                // 3.x has no way to say so; what is not acknowledged is sent again later.
                self.tally.dropped += 1;
                return;
            }
            return self.refuse_publish(id, slot, &incoming, publish.packet_id, ReasonCode::QUOTA_EXCEEDED);
        }
        if route.interest.before != 0 || self.conns[id].submitted > 0 {
            let shown = Shown::To(route.interest.before);
            return self.submit(id, slot, shown, &incoming, publish.packet_id);
        }
        let mark = self.durable.mark();
        let found = self.publish_to(&route, &incoming);
        if route.interest.committed != 0 {
            let client = self.sessions.standing(slot).map(|standing| Arc::clone(&standing.client));
            self.feed(route.interest.committed, client, &incoming);
        }
        let reason = if found { ReasonCode::SUCCESS } else { ReasonCode::NO_MATCHING_SUBSCRIBERS };
        let receipt = self.durable.since(mark);
        if let Some(packet_id) = publish.packet_id {
            self.acknowledge(id, slot, (publish.qos, packet_id), reason, receipt);
        } else {
            self.note_written(id, receipt);
        }
    }

    /// A message goes nowhere. Its acknowledgement stands behind those of messages that storage hooks see.
    /// [MQTT-4.6.0-2]
    fn refuse_publish(
        &mut self,
        id: usize,
        slot: u32,
        incoming: &Incoming<'_>,
        packet_id: Option<PacketId>,
        reason: ReasonCode,
    ) {
        if packet_id.is_some() && self.conns[id].submitted > 0 {
            return self.submit(id, slot, Shown::Refused(reason), incoming, packet_id);
        }
        self.tally.dropped += 1;
        if let Some(packet_id) = packet_id {
            self.acknowledge(id, slot, (incoming.qos, packet_id), reason, Receipt::default());
        }
    }

    /// The store would have to keep it and cannot, memory would have to and is used up, or a receiver that must not miss
    /// it has no room.
    pub(super) fn must_refuse(&self, route: &Route, incoming: &Incoming<'_>) -> bool {
        if incoming.qos == Qos::AtMostOnce && !incoming.retain {
            return false;
        }
        let is_queued = incoming.qos != Qos::AtMostOnce;
        let is_kept = incoming.retain || (is_queued && !(route.stored.is_empty() && route.groups.is_empty()));
        if is_kept && self.durable.is_failing() {
            return true;
        }
        let is_removal = incoming.retain && incoming.payload.is_empty();
        if self.pressure == Pressure::Full && !is_removal && (incoming.retain || !route.is_empty()) {
            return true;
        }
        let targets = || route.local.iter().chain(route.remote.iter().flat_map(|(_, targets)| targets.iter()));
        let groups = || route.groups.iter().map(|(group, _)| &**group);
        is_queued && self.shared.full.any() && self.shared.full.has(targets().map(|target| target.session), groups())
    }

    /// Answers a QoS 1 or QoS 2 PUBLISH, when what was written for it is kept.
    pub(super) fn acknowledge(
        &mut self,
        id: usize,
        slot: u32,
        (qos, packet_id): (Qos, PacketId),
        reason: ReasonCode,
        receipt: Receipt,
    ) {
        let Some(conn) = self.conns.get(id) else { return };
        let Some(session) = self.sessions.get_mut(slot) else { return };
        // 3.x has no reasons: what was refused is acknowledged and dropped. MQTT 3.1.1 §3.3.5
        let reason = if conn.version == Version::V5 { reason.for_puback() } else { ReasonCode::SUCCESS };
        let mark = self.durable.mark();
        if qos == Qos::ExactlyOnce && !reason.is_error() {
            session.accepted(packet_id);
            self.tell(slot, None);
        }
        let receipt = receipt.and(self.durable.since(mark));
        if receipt.is_some() || !self.conns[id].promises.is_empty() {
            return self.promise_publish(id, slot, (qos, packet_id), reason, receipt);
        }
        // As a promise that is kept already.
        let (Some(session), Some(conn)) = (self.sessions.get_mut(slot), self.conns.get_mut(id)) else { return };
        conn.outbox.lend(&mut self.pool);
        session.acknowledge(qos, packet_id, reason, &mut conn.outbox);
        self.tell(slot, Some(id));
        self.mark_dirty(id);
    }

    /// The route of a message that nobody has to be asked about.
    pub(super) fn route(&mut self, topic: &str) -> Rc<Route> {
        match self.routes.find(topic, &self.shared) {
            Some(found) => self.routes.keep(topic, found),
            None => self.build_route(topic),
        }
    }

    fn build_route(&mut self, topic: &str) -> Rc<Route> {
        self.routes.build(topic, self.index, &self.shared, &mut self.matches, &*self.plugins)
    }

    /// Keeps it, if it is retained, and hands it to all its subscribers; `false`: there are none.
    pub(super) fn publish_to(&mut self, route: &Route, incoming: &Incoming<'_>) -> bool {
        if !incoming.retain || !self.limits.retain_available {
            return self.forward(route, incoming);
        }
        self.retain(incoming);
        // Whoever subscribed until now has a replay that finds it, or is in this route: nobody is in neither.
        let route = self.route(incoming.topic);
        self.forward(&route, incoming)
    }

    /// [MQTT-3.3.1-5], [MQTT-3.3.1-6]: an empty payload removes.
    fn retain(&mut self, incoming: &Incoming<'_>) {
        let mut retained = self.shared.retained_mut();
        if incoming.payload.is_empty() {
            retained.remove(incoming.topic);
            self.durable.write_retained(incoming.topic, None);
        } else if let Ok(stamp) = retained.set(Arc::clone(incoming.message()), incoming.kept_as.clone()) {
            self.durable.write_retained(incoming.topic, Some((incoming, stamp)));
        } else {
            debug!(topic = incoming.topic, "retained message not kept: the store of retained messages is full");
            self.tally.dropped += 1;
        }
        self.durable.hand_over();
    }

    fn forward(&mut self, route: &Route, incoming: &Incoming<'_>) -> bool {
        if route.is_empty() {
            return false;
        }
        let kept = if route.stored.is_empty() { None } else { self.store_queued(incoming, &route.stored) };
        self.frames.reset();
        for target in &route.local {
            self.deliver_target(incoming, target, kept, None);
        }
        for (shard, targets) in &route.remote {
            let message = Arc::clone(incoming.message());
            let remote = Remote { message, kept_as: None, targets: Arc::clone(targets), share: None, id: kept };
            self.outgoing[usize::from(*shard)].push(remote);
        }
        for (group, cursor) in &route.groups {
            self.deliver_group(incoming, group, cursor);
        }
        true
    }

    /// One member gets it. [MQTT-4.8.2-2] ff.
    fn deliver_group(&mut self, incoming: &Incoming<'_>, group: &Arc<Group>, cursor: &Cell<u32>) {
        let mut place = cursor.get();
        let member = pick(group, &mut place, incoming.qos);
        cursor.set(place);
        let Some(member) = member else {
            self.tally.dropped += 1;
            return;
        };
        let mut target = Target::of(member);
        let mut id = None;
        // Looking for the name of a Session takes a lock.
        if self.durable.is_on() && incoming.qos.min(member.subscription.options.qos) > Qos::AtMostOnce {
            target.stored = self.shared.stored(member.session);
            id = self.store_queued(incoming, std::slice::from_ref(&target));
        }
        if member.session.shard == self.index {
            self.deliver_target(incoming, &target, id, Some(group));
        } else {
            let remote = Remote {
                message: Arc::clone(incoming.message()),
                kept_as: incoming.kept_as.clone(),
                targets: Arc::from([target]),
                share: Some(Arc::clone(group)),
                id,
            };
            self.outgoing[usize::from(member.session.shard)].push(remote);
        }
    }

    /// `id`: the name under which the store keeps it for the targets that it knows.
    fn deliver_target(
        &mut self,
        incoming: &Incoming<'_>,
        target: &Target,
        id: Option<MessageId>,
        share: Option<&Arc<Group>>,
    ) {
        let own = incoming.publisher == Some(target.session);
        let Some(merged) = target.merged(own) else { return };
        let mut wish = wish(incoming, merged);
        if wish.qos > Qos::AtMostOnce && target.stored.is_some() {
            wish.id = id;
        }
        self.deliver(incoming, target, wish, share);
    }

    #[inline]
    fn deliver(&mut self, incoming: &Incoming<'_>, target: &Target, wish: Wish<'_>, share: Option<&Arc<Group>>) {
        let Some((session, conn_id)) = self.sessions.resolve(target.session) else {
            // The Session ended while this was on its way.
            if let (Some(session), Some(id)) = (target.stored, wish.id) {
                self.durable.write_step(session, Step::Done { packet_id: None, id });
            }
            return;
        };
        let mut conn = conn_id.and_then(|id| self.conns.get_mut(id));
        if let Some(conn) = &mut conn {
            conn.outbox.lend(&mut self.pool);
        }
        let out = conn.as_mut().map(|conn| &mut conn.outbox);
        let delivered = session.deliver(self.now_ms, incoming, wish, share, &mut self.frames, &self.limits, out);
        match delivered {
            Delivered::Sent => {
                self.tally.sent += 1;
                if let (Some(conn), Some(id)) = (conn, conn_id)
                    && !conn.dirty
                {
                    conn.dirty = true;
                    self.dirty.push(id);
                }
            }
            Delivered::Queued => {
                if session.queue_policy == QueuePolicy::RejectPublish
                    && session.is_full(&self.limits)
                    && self.shared.full.insert(target.session)
                {
                    self.full.push(target.session);
                }
            }
            Delivered::Dropped => self.note_dropped(target.session.slot, incoming),
        }
        if wish.id.is_some() {
            self.tell(target.session.slot, conn_id);
        }
    }

    /// A message did not get into the Session of a client.
    #[cold]
    pub(super) fn note_dropped(&mut self, slot: u32, incoming: &Incoming<'_>) {
        self.tally.dropped += 1;
        self.event(EventKind::MessageDropped, slot, || {
            vec![("topic", incoming.topic.into()), ("qos", (incoming.qos as u8).to_string())]
        });
    }

    /// Publishers are refused no longer for the sake of those that have room again.
    pub(super) fn look_for_room(&mut self) {
        if self.full.is_empty() {
            return;
        }
        let (sessions, shared, limits) = (&mut self.sessions, &self.shared, &self.limits);
        self.full.retain(|key| {
            let is_full = sessions.resolve(*key).is_some_and(|(session, _)| session.is_full(limits));
            if !is_full {
                shared.full.remove(*key);
            }
            is_full
        });
    }

    /// Messages that other shards routed to Sessions here.
    pub(super) fn on_remotes(&mut self, remotes: &[Remote]) {
        for remote in remotes {
            let mut incoming = Incoming::from_message(&remote.message);
            incoming.kept_as.clone_from(&remote.kept_as);
            self.frames.reset();
            for target in remote.targets.iter() {
                let gone = remote.share.is_some() && self.sessions.resolve(target.session).is_none();
                match &remote.share {
                    // The member left while this was on its way: another one gets it.
                    Some(group) if gone => {
                        if let (Some(session), Some(id)) = (target.stored, remote.id) {
                            self.durable.write_step(session, Step::Done { packet_id: None, id });
                        }
                        self.redeliver_one(&incoming, group);
                    }
                    share => self.deliver_target(&incoming, target, remote.id, share.as_ref()),
                }
            }
        }
    }

    /// A member of a Shared Subscription is gone: others get what it did not take. MQTT 5.0 §4.8.2
    pub(super) fn redeliver(&mut self, deliveries: Vec<Delivery>) {
        for delivery in deliveries {
            if let Some(group) = &delivery.share {
                self.frames.reset();
                let mut incoming = Incoming::from_message(&delivery.message);
                incoming.kept_as.clone_from(&delivery.kept_as);
                self.redeliver_one(&incoming, group);
            }
        }
    }

    fn redeliver_one(&mut self, incoming: &Incoming<'_>, old: &Group) {
        let group = self.shared.index().group_of(&old.share, &old.filter);
        match group {
            Some(group) => self.deliver_group(incoming, &group, &Cell::new(random())),
            None => self.tally.dropped += 1,
        }
    }

    /// Ends a connection that broke a rule while a packet of it was handled.
    pub(super) fn fault(&mut self, id: usize, reason: ReasonCode, text: &'static str) {
        self.end(id, Ending::Server(reason, text));
    }
}

pub(super) fn wish<'a>(incoming: &Incoming<'_>, merged: &'a Merged) -> Wish<'a> {
    Wish {
        qos: incoming.qos.min(merged.qos),
        // [MQTT-3.3.1-12], [MQTT-3.3.1-13]
        retain: incoming.retain && merged.retain_as_published,
        ids: &merged.ids,
        id: None,
    }
}
