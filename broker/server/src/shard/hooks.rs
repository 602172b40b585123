//! Storage hooks on the way of a message, and what happened for those who watch.
//!
//! Messages that a plugin wants to see before they are accepted are collected during a turn and shown to it in batches,
//! several of which may be under way. A publisher's own messages keep their order: those that come later wait until its
//! earlier ones are answered, and it is not read from, so that what waits has a bound. Other publishers do not wait.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use hashbrown::{HashMap, HashSet};
use wasmqtt_protocol::codec::{PacketId, Qos, ReasonCode, Version};
use wasmqtt_protocol::ports::{Accepted, Client, Event, EventKind, Outgoing, Submission};
use wasmqtt_protocol::router::{Message, SessionKey};
use wasmqtt_protocol::session::Incoming;

use super::Shard;
use super::calls::Answer;
use super::durable::Receipt;
use super::gate::Reason;

/// Batches that plugins of this shard have and did not answer. Beyond it, messages are collected for the next one.
const BATCHES_MAX: usize = 16;
/// After a batch that was not answered at once, each publisher gets a batch of its own for so long, as far as
/// [`BATCHES_MAX`] allows: no client waits for what a plugin does for another one's message.
const SPLIT_MS: u64 = 10_000;

/// Whose messages keep their order; `None`: those of plugins.
type Publisher = Option<SessionKey>;

/// A PUBLISH that waits for storage hooks.
pub(super) struct Pending {
    /// Its connection, which is told the outcome; `None`: nobody waits for it.
    conn: Option<(usize, u32)>,
    publisher: Publisher,
    qos: Qos,
    packet_id: Option<PacketId>,
    sent: Submission,
    /// Bits of the plugin that published it.
    origin: u64,
    /// It goes nowhere, and its acknowledgement stands behind those of others.
    refused: Option<ReasonCode>,
}

impl Pending {
    fn bytes(&self) -> usize {
        let message = &self.sent.message;
        size_of::<Self>() + message.topic.len() + message.payload.len() + message.properties.len()
    }
}

/// Why a PUBLISH waits here.
#[derive(Debug, Clone, Copy)]
pub(super) enum Shown {
    /// These plugins see it; none: it stands behind another one.
    To(u64),
    /// It was refused, and stands behind another one.
    Refused(ReasonCode),
}

/// Messages and events on their way to plugins.
#[derive(Default)]
pub(super) struct Hooks {
    /// Not shown to plugins so far, in the order in which they came.
    collected: Vec<Pending>,
    /// Something came, or was answered, since `collected` was looked through.
    is_changed: bool,
    /// Shown to plugins, which have not answered; by number of the batch.
    under_way: HashMap<u64, Vec<Pending>>,
    /// Those with messages in `under_way`.
    busy: HashSet<Publisher>,
    /// How many messages of each wait here.
    waiting: HashMap<Publisher, u32>,
    /// Number of the last batch.
    batches: u64,
    /// Until then each publisher gets its own batch.
    split_until_ms: u64,
    /// Plugins get them as soon as the store has them.
    feed: VecDeque<(Receipt, Submission)>,
    events: Vec<Event>,
    /// Set of [`EventKind::bit`].
    pub(super) wanted_events: u32,
    /// A plugin wants to know which filters have subscribers.
    pub(super) wants_interest: bool,
}

impl Hooks {
    /// No message waits for storage hooks.
    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// How many messages of a Session wait for storage hooks.
    pub(super) fn waiting_of(&self, key: SessionKey) -> u32 {
        if self.waiting.is_empty() { 0 } else { self.waiting.get(&Some(key)).copied().unwrap_or(0) }
    }

    /// What can be shown to plugins now: nothing of a publisher that has messages under way.
    fn take_batches(&mut self, now_ms: u64) -> Vec<Vec<Pending>> {
        let free = BATCHES_MAX.saturating_sub(self.under_way.len());
        if free == 0 || !std::mem::take(&mut self.is_changed) {
            return Vec::new();
        }
        let collected = std::mem::take(&mut self.collected);
        let (waiting, ready): (Vec<_>, Vec<_>) = if self.busy.is_empty() {
            (Vec::new(), collected)
        } else {
            collected.into_iter().partition(|pending| self.busy.contains(&pending.publisher))
        };
        self.collected = waiting;
        if ready.is_empty() {
            return Vec::new();
        }
        if now_ms >= self.split_until_ms {
            return vec![ready];
        }
        let mut places: HashMap<Publisher, usize> = HashMap::new();
        let mut batches: Vec<Vec<Pending>> = Vec::new();
        for pending in ready {
            let next = places.len() % free;
            let place = *places.entry(pending.publisher).or_insert(next);
            if place == batches.len() {
                batches.push(Vec::new());
            }
            batches[place].push(pending);
        }
        batches
    }
}

impl Shard {
    /// Has storage hooks see a PUBLISH first, or stand behind one of the same client that they see.
    pub(super) fn submit(
        &mut self,
        id: usize,
        slot: u32,
        shown: Shown,
        incoming: &Incoming<'_>,
        packet_id: Option<PacketId>,
    ) {
        let (plugins, refused) = match shown {
            Shown::To(plugins) => (plugins, None),
            Shown::Refused(reason) => (0, Some(reason)),
        };
        let client = self.sessions.standing(slot).map(|standing| Arc::clone(&standing.client));
        let Some(session) = self.sessions.get_mut(slot) else { return };
        let publisher = Some(session.key);
        if incoming.qos == Qos::ExactlyOnce
            && let Some(packet_id) = packet_id
        {
            session.submitted(packet_id);
        }
        let conn = Some((id, self.conns[id].epoch));
        let sent = Submission { plugins, client, message: Arc::clone(incoming.message()), fed: None };
        self.collect(Pending { conn, publisher, qos: incoming.qos, packet_id, sent, origin: 0, refused });
    }

    /// A message without a connection that waits for its outcome: a will, or one of a plugin's.
    pub(super) fn publish_unattended(&mut self, client: Option<Arc<Client>>, message: Arc<Message>, origin: u64) {
        let route = self.route(&message.topic);
        let plugins = route.interest.before & !origin;
        let publisher = message.publisher;
        if plugins == 0 && !self.hooks.waiting.contains_key(&publisher) {
            self.accept(client, &message, None, origin);
            if let Some(key) = publisher {
                self.will_done(key);
            }
            return;
        }
        let qos = message.qos;
        let sent = Submission { plugins, client, message, fed: None };
        self.collect(Pending { conn: None, publisher, qos, packet_id: None, sent, origin, refused: None });
    }

    fn collect(&mut self, pending: Pending) {
        *self.hooks.waiting.entry(pending.publisher).or_insert(0) += 1;
        if let Some(conn) = self.conn_of(pending.publisher).and_then(|id| self.conns.get_mut(id)) {
            conn.submitted += 1;
            conn.gate.close(Reason::Hook, self.now_ms);
        }
        if pending.conn.is_none() {
            // No client can be made to wait for it, but whoever sends more can.
            self.shared.mailboxes[usize::from(self.index)].hold(pending.bytes());
        }
        self.hooks.collected.push(pending);
        self.hooks.is_changed = true;
    }

    /// The present connection of a publisher.
    pub(super) fn conn_of(&mut self, publisher: Publisher) -> Option<usize> {
        self.sessions.resolve(publisher?).and_then(|(_, conn)| conn)
    }

    /// A plugin publishes.
    pub(super) fn on_outgoing(&mut self, outgoing: Outgoing) {
        let Outgoing { origin, topic, payload, properties, qos, retain, expiry } = outgoing;
        let expires_at_ms = expiry.map(|secs| self.now_ms + u64::from(secs) * 1000);
        let message = Message { topic, payload, properties, qos, retain, expires_at_ms, publisher: None };
        self.publish_unattended(None, Arc::new(message), origin);
    }

    /// Shows the plugins what this turn brought, and what waited until now.
    pub(super) fn run_hooks(&mut self) {
        if self.hooks.collected.is_empty() {
            return;
        }
        for batch in self.hooks.take_batches(self.now_ms) {
            self.show(batch);
        }
    }

    fn show(&mut self, batch: Vec<Pending>) {
        let messages = batch.iter().map(|pending| pending.sent.clone()).collect();
        self.hooks.batches += 1;
        let number = self.hooks.batches;
        self.hooks.under_way.insert(number, batch);
        let call = self.plugins.before_store(messages);
        let call = Box::pin(async move { Answer::Stored { batch: number, answers: call.await } });
        if let Some(answer) = self.calls.begin(None, call) {
            return self.on_answer(answer);
        }
        self.hooks.split_until_ms = self.now_ms + SPLIT_MS;
        let publishers = self.hooks.under_way.get(&number).into_iter().flatten().map(|pending| pending.publisher);
        self.hooks.busy.extend(publishers);
    }

    /// The storage hooks have answered for all of one batch.
    pub(super) fn on_stored(&mut self, batch: u64, answers: Vec<Accepted>) {
        let Some(batch) = self.hooks.under_way.remove(&batch) else { return };
        self.hooks.is_changed = true;
        let answers = answers.into_iter().map(Some).chain(std::iter::repeat_with(|| None));
        for (pending, answer) in batch.into_iter().zip(answers) {
            self.hooks.busy.remove(&pending.publisher);
            let answer = answer.unwrap_or(Accepted::Discard(ReasonCode::IMPLEMENTATION_SPECIFIC_ERROR));
            self.settle(pending, answer);
        }
    }

    /// What the store is told of the message and of its QoS 2 handshake is in one batch: after a crash it has both or
    /// neither.
    fn settle(&mut self, pending: Pending, answer: Accepted) {
        if pending.conn.is_none() {
            self.shared.mailboxes[usize::from(self.index)].release(pending.bytes());
        }
        let Pending { conn, publisher, qos, packet_id, sent, origin, refused } = pending;
        if let Some(waiting) = self.hooks.waiting.get_mut(&publisher) {
            *waiting -= 1;
            if *waiting == 0 {
                self.hooks.waiting.remove(&publisher);
            }
        }
        let mark = self.durable.mark();
        let (delivered, kept) = match answer {
            Accepted::Discard(reason) => (Err(reason), None),
            Accepted::Keep(message) => (Ok(message), None),
            Accepted::Seal { delivered, kept } => (Ok(delivered), Some(kept)),
        };
        let accepted = match refused.map_or(delivered, Err) {
            Ok(message) if conn.is_some() && !self.has_room(&message) => None,
            Ok(message) => Some(self.accept(sent.client, &message, kept, origin)),
            Err(reason) => Some(reason),
        };
        if accepted.is_none_or(ReasonCode::is_error) {
            self.tally.dropped += 1;
        }
        let Some(key) = publisher else { return };
        let receipt = self.durable.since(mark);
        // A connection that ended lingers for a while, and the place of its Session may have another one by now.
        let present = self.conn_of(publisher);
        let is_v5 = present.and_then(|id| self.conns.get(id)).is_none_or(|conn| conn.version == Version::V5);
        let reason = accepted.unwrap_or(ReasonCode::QUOTA_EXCEEDED);
        match conn {
            // 3.x has no way to say so; what is not acknowledged is sent again later.
            Some(_) if accepted.is_none() && !is_v5 => self.forget_submitted(key, qos, packet_id),
            Some((id, epoch)) if present == Some(id) && self.is_current(id, epoch) => match packet_id {
                Some(packet_id) => self.acknowledge(id, key.slot, (qos, packet_id), reason, receipt),
                None => self.note_written(id, receipt),
            },
            Some(_) => self.acknowledge_earlier(key, qos, packet_id, reason, receipt),
            None => self.will_done(key),
        }
        let Some(id) = present else { return };
        let Some(conn) = self.conns.get_mut(id) else { return };
        conn.submitted = conn.submitted.saturating_sub(1);
        if conn.submitted == 0 {
            self.open_gate(id, Reason::Hook);
        }
    }

    /// Whether there is room for a message of a client now.
    pub(super) fn has_room(&mut self, message: &Arc<Message>) -> bool {
        let route = self.route(&message.topic);
        !self.must_refuse(&route, &Incoming::from_message(message))
    }

    fn forget_submitted(&mut self, key: SessionKey, qos: Qos, packet_id: Option<PacketId>) {
        if let (Qos::ExactlyOnce, Some(packet_id)) = (qos, packet_id)
            && let Some((session, _)) = self.sessions.resolve(key)
        {
            session.published_earlier(packet_id, ReasonCode::QUOTA_EXCEEDED);
        }
    }

    /// The connection that a QoS 2 message came over is gone, and its Session may have another one by now.
    fn acknowledge_earlier(
        &mut self,
        key: SessionKey,
        qos: Qos,
        packet_id: Option<PacketId>,
        reason: ReasonCode,
        receipt: Receipt,
    ) {
        let (Qos::ExactlyOnce, Some(packet_id)) = (qos, packet_id) else { return };
        let Some((session, id)) = self.sessions.resolve(key) else { return };
        let conn = id.and_then(|id| self.conns.get(id));
        let is_v5 = conn.is_none_or(|conn| conn.version == Version::V5);
        let reason = if is_v5 { reason.for_puback() } else { ReasonCode::SUCCESS };
        let mark = self.durable.mark();
        let is_repeated = session.published_earlier(packet_id, reason);
        self.tell(key.slot, None);
        let receipt = receipt.and(self.durable.since(mark));
        match id {
            Some(id) if is_repeated => self.promise_publish(id, key.slot, (qos, packet_id), reason, receipt),
            _ if reason.is_error() => {}
            _ => self.orphan(key, packet_id, receipt),
        }
    }

    fn accept(
        &mut self,
        client: Option<Arc<Client>>,
        message: &Arc<Message>,
        kept: Option<Arc<Message>>,
        origin: u64,
    ) -> ReasonCode {
        let mut incoming = Incoming::from_message(message);
        incoming.kept_as = kept;
        let route = self.route(&message.topic);
        let found = self.publish_to(&route, &incoming);
        let plugins = route.interest.committed & !origin;
        if plugins != 0 {
            self.feed(plugins, client, &incoming);
        }
        if found { ReasonCode::SUCCESS } else { ReasonCode::NO_MATCHING_SUBSCRIBERS }
    }

    /// Lets plugins have a message as soon as it is kept.
    #[cold]
    pub(super) fn feed(&mut self, plugins: u64, client: Option<Arc<Client>>, incoming: &Incoming<'_>) {
        let fed = self.store_fed(plugins, client.as_deref(), incoming);
        let sent = Submission { plugins, client, message: Arc::clone(incoming.message()), fed };
        self.hooks.feed.push_back((self.durable.last(), sent));
    }

    /// End of a turn: what is kept by now goes to the plugins that collect it, and what happened to those that watch.
    pub(super) fn feed_plugins(&mut self) {
        if !self.hooks.feed.is_empty() {
            let ready = self.hooks.feed.iter().take_while(|(receipt, _)| !self.durable.waits(*receipt)).count();
            let messages: Vec<_> = self.hooks.feed.drain(..ready).map(|(_, sent)| sent).collect();
            if !messages.is_empty() {
                self.plugins.committed(messages);
            }
        }
        if !self.hooks.events.is_empty() {
            self.plugins.observe(std::mem::take(&mut self.hooks.events));
        }
    }

    pub(super) fn wants(&self, kind: EventKind) -> bool {
        self.hooks.wanted_events & kind.bit() != 0
    }

    /// Tells those who watch, if there are any.
    pub(super) fn event(&mut self, kind: EventKind, slot: u32, fields: impl FnOnce() -> Vec<(&'static str, String)>) {
        if !self.wants(kind) {
            return;
        }
        let Some(client) = self.sessions.standing(slot).map(|standing| Arc::clone(&standing.client)) else { return };
        self.event_of(kind, client, fields());
    }

    pub(super) fn event_of(&mut self, kind: EventKind, client: Arc<Client>, fields: Vec<(&'static str, String)>) {
        let at_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
        self.hooks.events.push(Event { kind, at_ms, client, fields });
    }
}
