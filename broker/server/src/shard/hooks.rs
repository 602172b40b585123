//! Storage hooks on the way of a message, and what happened for those who watch.
//!
//! Messages that a plugin wants to see before they are accepted are collected during a turn and shown to it together.
//! Their publishers are not read from until it has answered, so that order holds and what waits has a bound.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use wasmqtt_protocol::codec::{PacketId, Qos, ReasonCode};
use wasmqtt_protocol::ports::{Accepted, Client, Event, EventKind, Outgoing, Submission, Ticket};
use wasmqtt_protocol::router::Message;
use wasmqtt_protocol::session::Incoming;

use super::Shard;
use super::calls::Answer;

/// A PUBLISH that waits for storage hooks.
pub(super) struct Pending {
    /// Its connection, which is told the outcome.
    conn: Option<(usize, u32)>,
    slot: u32,
    qos: Qos,
    packet_id: Option<PacketId>,
    sent: Submission,
}

/// Messages and events on their way to plugins.
#[derive(Default)]
pub(super) struct Hooks {
    /// Collected during this turn.
    batch: Vec<Pending>,
    /// Shown to plugins, which have not answered.
    under_way: Vec<Pending>,
    /// Kept as soon as the store has committed the ticket; then plugins get them.
    feed: VecDeque<(Ticket, Submission)>,
    events: Vec<Event>,
    /// Set of [`EventKind::bit`].
    pub(super) wanted_events: u32,
    /// A plugin wants to know which filters have subscribers.
    pub(super) wants_interest: bool,
}

impl Hooks {
    /// Nothing waits here that only another turn would bring on.
    pub(super) fn is_idle(&self) -> bool {
        self.batch.is_empty() || !self.under_way.is_empty()
    }
}

impl Shard {
    /// Has storage hooks see a PUBLISH first, or stand behind one of the same client that they see.
    pub(super) fn submit(
        &mut self,
        id: usize,
        slot: u32,
        plugins: u64,
        incoming: &Incoming<'_>,
        packet_id: Option<PacketId>,
    ) {
        let client = self.sessions.standing(slot).map(|standing| Arc::clone(&standing.client));
        if incoming.qos == Qos::ExactlyOnce
            && let (Some(packet_id), Some(session)) = (packet_id, self.sessions.get_mut(slot))
        {
            session.submitted(packet_id);
            self.tell(slot, Some(id));
        }
        let conn = &mut self.conns[id];
        conn.submitted += 1;
        let sent = Submission { plugins, client, message: Arc::clone(incoming.message()), fed: None };
        self.hooks.batch.push(Pending { conn: Some((id, conn.epoch)), slot, qos: incoming.qos, packet_id, sent });
    }

    /// A message without a connection that waits for its outcome: a will, or one of a plugin's.
    pub(super) fn publish_unattended(&mut self, client: Option<Arc<Client>>, message: Arc<Message>, origin: u64) {
        let route = self.route(&message.topic);
        let plugins = route.interest.before & !origin;
        if plugins == 0 {
            self.accept(client, &message, None, origin);
            return;
        }
        let qos = message.qos;
        let sent = Submission { plugins, client, message, fed: None };
        self.hooks.batch.push(Pending { conn: None, slot: 0, qos, packet_id: None, sent });
    }

    /// A plugin publishes.
    pub(super) fn on_outgoing(&mut self, outgoing: Outgoing) {
        let Outgoing { origin, topic, payload, properties, qos, retain, expiry } = outgoing;
        let expires_at_ms = expiry.map(|secs| self.now_ms + u64::from(secs) * 1000);
        let message = Message { topic, payload, properties, qos, retain, expires_at_ms, publisher: None };
        self.publish_unattended(None, Arc::new(message), origin);
    }

    /// Shows the plugins what this turn brought.
    pub(super) fn run_hooks(&mut self) {
        if self.hooks.is_idle() {
            return;
        }
        let batch = std::mem::take(&mut self.hooks.batch);
        let messages = batch.iter().map(|pending| pending.sent.clone()).collect();
        self.hooks.under_way = batch;
        let call = self.plugins.before_store(messages);
        let call = Box::pin(async move { Answer::Stored(call.await) });
        if let Some(answer) = self.calls.begin(None, call) {
            self.on_answer(answer);
        }
    }

    /// The storage hooks have answered for all that was shown to them.
    pub(super) fn on_stored(&mut self, answers: Vec<Accepted>) {
        let answers = answers.into_iter().map(Some).chain(std::iter::repeat_with(|| None));
        for (pending, answer) in std::mem::take(&mut self.hooks.under_way).into_iter().zip(answers) {
            let answer = answer.unwrap_or(Accepted::Discard(ReasonCode::IMPLEMENTATION_SPECIFIC_ERROR));
            self.settle(pending, answer);
        }
    }

    fn settle(&mut self, pending: Pending, answer: Accepted) {
        let Pending { conn, slot, qos, packet_id, sent } = pending;
        let reason = match answer {
            Accepted::Discard(reason) => {
                self.tally.dropped += 1;
                reason
            }
            Accepted::Keep(message) => self.accept(sent.client, &message, None, 0),
            Accepted::Seal { delivered, kept } => self.accept(sent.client, &delivered, Some(kept), 0),
        };
        let Some((id, _)) = conn.filter(|(id, epoch)| self.is_current(*id, *epoch)) else { return };
        self.conns[id].submitted -= 1;
        self.acknowledge(id, slot, qos, packet_id, reason);
        if self.conns.get(id).is_some_and(|conn| conn.submitted == 0) {
            self.hold(id);
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
        self.hooks.feed.push_back((self.durable.ticket(), sent));
    }

    /// End of a turn: what is kept by now goes to the plugins that collect it, and what happened to those that watch.
    pub(super) fn feed_plugins(&mut self) {
        if !self.hooks.feed.is_empty() {
            let ready = self.hooks.feed.iter().take_while(|(ticket, _)| !self.durable.waits(*ticket)).count();
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
