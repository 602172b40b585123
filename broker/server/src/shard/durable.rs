//! What must survive is told to the store, and what promises it waits until it is kept.

use std::sync::Arc;

use smallvec::SmallVec;
use tracing::{debug, warn};
use wasmqtt_protocol::access::{Action, Verdict};
use wasmqtt_protocol::codec::{PacketId, Qos};
use wasmqtt_protocol::ports::{
    Accepted, BanPattern, Change, Client, Load, Loaded, Receiver, ShardStore, Submission, Ticket,
};
use wasmqtt_protocol::router::{MessageId, SessionId, SessionKey, Subscription, Target};
use wasmqtt_protocol::session::{Incoming, Outbox, Step, WillMessage};
use wasmqtt_protocol::topic::Filter;

use super::Shard;
use super::calls::Answer;
use super::conn::State;
use super::gate::Reason;
use super::publish::wish;
use super::sessions::Standing;

/// The shard's side of the store.
pub(super) struct Durable {
    store: Box<dyn ShardStore>,
    is_on: bool,
    /// Changes so far.
    written: u64,
    /// Batches that were handed over so far, and whether something was written since.
    batches: u64,
    has_batch: bool,
    /// The last batch that is settled: committed, or given up.
    settled: Ticket,
    /// Those of them that were given up, since the last time.
    failed: Vec<Ticket>,
    /// Connections that wait for a commit: their gates are closed for [`Reason::Commit`].
    waiting: Vec<(usize, u32)>,
    /// QoS 2 messages that nobody waits for any more, since their connections are gone. Their Packet Identifiers are
    /// known to the Sessions; those whose messages cannot be kept are forgotten, so that they are taken when they are
    /// sent again.
    orphans: Vec<(Receipt, SessionKey, PacketId)>,
}

/// Where the changes begin that belong to one packet.
#[derive(Debug, Clone, Copy)]
pub(super) struct Mark {
    written: u64,
    batches: u64,
}

/// The batches with the changes that belong to one packet: its answer promises them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Receipt {
    from: Ticket,
    /// 0: nothing was written.
    to: Ticket,
}

impl Receipt {
    /// Something was written.
    pub(super) fn is_some(self) -> bool {
        self.to > 0
    }

    /// What waits for both.
    pub(super) fn and(self, other: Self) -> Self {
        match (self.to, other.to) {
            (0, _) => other,
            (_, 0) => self,
            (to, other_to) => Self { from: self.from.min(other.from), to: to.max(other_to) },
        }
    }
}

impl Durable {
    pub(super) fn new(store: Box<dyn ShardStore>) -> Self {
        Self {
            is_on: store.is_durable(),
            written: 0,
            batches: 0,
            has_batch: false,
            settled: store.committed(),
            failed: Vec::new(),
            store,
            waiting: Vec::new(),
            orphans: Vec::new(),
        }
    }

    /// `false`: nothing survives, and nothing has to be told.
    pub(super) fn is_on(&self) -> bool {
        self.is_on
    }

    /// Nothing can be kept at present.
    pub(super) fn is_failing(&self) -> bool {
        self.is_on && self.store.is_failing()
    }

    pub(super) fn is_congested(&self) -> bool {
        self.is_on && self.store.is_congested()
    }

    pub(super) fn write(&mut self, change: Change<'_>) {
        if self.is_on {
            self.store.write(change);
            self.written += 1;
            self.has_batch = true;
        }
    }

    /// What is written from now on belongs to one packet, see [`Durable::since`].
    #[inline]
    pub(super) fn mark(&self) -> Mark {
        Mark { written: self.written, batches: self.batches }
    }

    /// The receipt for what was written since then.
    #[inline]
    pub(super) fn since(&self, mark: Mark) -> Receipt {
        if self.written == mark.written {
            return Receipt::default();
        }
        let to = self.store.ticket();
        Receipt { from: to + u64::from(!self.has_batch) - (self.batches - mark.batches), to }
    }

    fn ends_batch(&mut self) {
        self.batches += u64::from(std::mem::take(&mut self.has_batch));
    }

    /// A topic has another retained message, with its stamp, or none any more. Called under the lock of the
    /// retained messages, and followed there by [`Durable::hand_over`]: changes of one topic by several shards reach the
    /// store in their order.
    pub(super) fn write_retained(&mut self, topic: &str, message: Option<(&Incoming<'_>, u64)>) {
        // What the broker says of itself is true while it runs.
        if topic.starts_with("$SYS/") {
            return;
        }
        self.write(match message {
            Some((incoming, stamp)) => {
                Change::Retained { message: incoming.kept(), sealed: incoming.kept_as.is_some(), stamp }
            }
            None => Change::RetainedRemoved { topic },
        });
    }

    /// A retained message is on its way to a new subscription.
    pub(super) fn keep(&mut self, incoming: &Incoming<'_>, receiver: Receiver<'_>) -> MessageId {
        let id = self.store.new_message();
        let (message, sealed) = (incoming.kept(), incoming.kept_as.is_some());
        self.write(Change::Queued { id, message, sealed, receivers: &[receiver] });
        id
    }

    /// A plugin has a message that was kept for it.
    pub(super) fn write_fed(&mut self, plugin: &str, id: MessageId) {
        self.write(Change::FedDone { plugin, id });
    }

    /// Somebody is banned until then, or (`None`) not any more.
    pub(super) fn write_ban(&mut self, pattern: &BanPattern, ban: Option<(u64, &str)>) {
        let (until_ms, note) = ban.unwrap_or((0, ""));
        self.write(Change::Ban { pattern, until_ms, note });
    }

    pub(super) fn write_step(&mut self, session: SessionId, step: Step) {
        self.write(Change::Step { session, step });
    }

    /// The receipt for what was written last.
    pub(super) fn last(&self) -> Receipt {
        let to = if self.is_on { self.store.ticket() } else { 0 };
        Receipt { from: to, to }
    }

    #[inline]
    pub(super) fn waits(&self, receipt: Receipt) -> bool {
        receipt.to > self.settled
    }

    /// Of a receipt that waits no longer, asked in the turn in which it is settled: the store could not keep it.
    pub(super) fn has_failed(&self, receipt: Receipt) -> bool {
        self.failed.iter().any(|ticket| (receipt.from..=receipt.to).contains(ticket))
    }

    /// Hands over what was written so far.
    pub(super) fn hand_over(&mut self) {
        if self.is_on {
            self.ends_batch();
            self.store.commit();
        }
    }

    /// The store has settled more since the last time.
    fn settles(&mut self) -> bool {
        if !self.is_on {
            return false;
        }
        let before = std::mem::replace(&mut self.settled, self.store.committed());
        if before == self.settled {
            return false;
        }
        self.failed = self.store.take_failed();
        true
    }
}

impl Shard {
    /// Comes back to a connection when the store has settled more.
    pub(super) fn wait_for_commit(&mut self, id: usize) {
        let Some(conn) = self.conns.get_mut(id) else { return };
        if !conn.waits {
            conn.waits = true;
            self.durable.waiting.push((id, conn.epoch));
        }
        if self.durable.waits(conn.barrier) {
            conn.gate.close(Reason::Commit, self.now_ms);
        }
    }

    /// Lets go what earlier turns promised and is kept by now.
    pub(super) fn release_committed(&mut self) {
        if !self.durable.settles() {
            return;
        }
        self.settle_orphans();
        for (id, epoch) in std::mem::take(&mut self.durable.waiting) {
            if self.is_current(id, epoch) {
                self.conns[id].waits = false;
                self.release(id);
            }
        }
        self.durable.failed.clear();
    }

    /// Nobody will be told whether a QoS 2 message of this Session is kept.
    pub(super) fn orphan(&mut self, key: SessionKey, packet_id: PacketId, receipt: Receipt) {
        if self.durable.waits(receipt) {
            self.durable.orphans.push((receipt, key, packet_id));
        }
    }

    fn settle_orphans(&mut self) {
        let (waiting, settled): (Vec<_>, Vec<_>) = std::mem::take(&mut self.durable.orphans)
            .into_iter()
            .partition(|(receipt, ..)| self.durable.waits(*receipt));
        self.durable.orphans = waiting;
        for (receipt, key, packet_id) in settled {
            if self.durable.has_failed(receipt)
                && let Some((session, _)) = self.sessions.resolve(key)
            {
                session.forget_received(packet_id);
                self.tell(key.slot, None);
            }
        }
    }

    fn release(&mut self, id: usize) {
        if self.conns[id].is_unanswered && !self.durable.waits(self.conns[id].barrier) {
            self.conns[id].is_unanswered = false;
            if self.durable.has_failed(self.conns[id].barrier) {
                return self.refuse_unkept(id);
            }
        }
        let conn = &mut self.conns[id];
        // The last words to a client are not worth more than those before.
        if matches!(conn.state, State::Lingering) && self.durable.has_failed(conn.barrier) {
            conn.outbox = Outbox::default();
        }
        let is_promising = self.keep_promises(id);
        let Some(conn) = self.conns.get(id) else { return };
        if is_promising || self.durable.waits(conn.barrier) {
            self.wait_for_commit(id);
        }
        if !self.durable.waits(self.conns[id].barrier) {
            self.mark_dirty(id);
            if !self.conns[id].promises.is_full() {
                self.open_gate(id, Reason::Commit);
            }
        }
    }

    /// A Session begins or goes on. The store knows it from the first time that it is to outlive its connection.
    pub(super) fn store_opened(&mut self, id: usize, key: SessionKey, is_present: bool) {
        if !self.durable.is_on() {
            return;
        }
        let Some(session) = self.sessions.get_mut(key.slot) else { return };
        let known = session.stored();
        if session.session_expiry() == 0 && known.is_none() {
            return;
        }
        let mark = self.durable.mark();
        if known.is_none() {
            let name = self.durable.store.new_session();
            session.keep(name);
            self.shared.set_stored(key, Some(name));
            for (filter, subscription) in session.subscriptions() {
                self.durable.write(Change::Subscribed { session: name, filter, subscription });
                self.shared.bump(filter.topic_filter());
            }
            for (filter, replay) in session.replays() {
                self.durable.write(Change::Replay { session: name, filter, replay });
            }
        }
        self.store_session(key);
        self.tell(key.slot, Some(id));
        let receipt = self.durable.since(mark);
        let conn = &mut self.conns[id];
        conn.after(receipt);
        conn.is_unanswered = self.durable.waits(receipt);
        conn.has_new_session = !is_present;
        if conn.is_unanswered {
            self.wait_for_commit(id);
        }
    }

    /// Has the store know how a Session stands: connected or not, with its will or without.
    pub(super) fn store_session(&mut self, key: SessionKey) {
        let Some(session) = self.sessions.get(key.slot) else { return };
        let Some(name) = session.stored() else { return };
        let expiry = session.session_expiry();
        let closed_at_ms = match self.sessions.conn(key.slot) {
            Some(_) => None,
            None => self.sessions.deadlines(key.slot).0.map(|at| at.saturating_sub(u64::from(expiry) * 1000)),
        };
        let under_way = self.wills.get(&key).map(|under_way| &*under_way.will);
        let will = session.will.as_deref().or(under_way).filter(|will| self.keeps_will(key, will));
        let Some(Standing { client, .. }) = self.sessions.standing_of(key.slot) else { return };
        self.durable.write(Change::Session { session: name, client, expiry, closed_at_ms, will });
    }

    /// Rules that authentication gave end with the broker; a will that they forbid must not be published by the next.
    fn keeps_will(&self, key: SessionKey, will: &WillMessage) -> bool {
        let Some(Standing { permits, .. }) = self.sessions.standing_of(key.slot) else { return true };
        let known = permits.explain(self.now_ms, Action::Publish, &will.message.topic);
        !matches!(known, Some((_, Verdict::Deny(_))))
    }

    /// A subscription was made, or (`None`) ended.
    pub(super) fn store_subscription(&mut self, key: SessionKey, filter: &Filter, subscription: Option<&Subscription>) {
        let Some(session) = self.sessions.get(key.slot).and_then(wasmqtt_protocol::session::Session::stored) else {
            return;
        };
        self.durable.write(match subscription {
            Some(subscription) => Change::Subscribed { session, filter, subscription },
            None => Change::Unsubscribed { session, filter },
        });
    }

    /// A message is on its way to Sessions that the store knows; gives its name there. It is told by the shard that
    /// acknowledges the message.
    pub(super) fn store_queued(&mut self, incoming: &Incoming<'_>, targets: &[Target]) -> Option<MessageId> {
        if incoming.qos == Qos::AtMostOnce {
            return None;
        }
        let receivers: SmallVec<[Receiver<'_>; 8]> = targets
            .iter()
            .filter_map(|target| {
                let session = target.stored?;
                let wish = wish(incoming, target.merged(incoming.publisher == Some(target.session))?);
                (wish.qos > Qos::AtMostOnce).then_some(Receiver { session, wish })
            })
            .collect();
        self.store_for(incoming, &receivers)
    }

    /// Plugins collect a message: it is kept until they have it.
    pub(super) fn store_fed(
        &mut self,
        plugins: u64,
        client: Option<&Client>,
        incoming: &Incoming<'_>,
    ) -> Option<MessageId> {
        if !self.durable.is_on() || self.durable.is_failing() {
            return None;
        }
        let (names, id) = (self.plugins.names(plugins), self.durable.store.new_message());
        let (message, sealed) = (incoming.kept(), incoming.kept_as.is_some());
        if names.is_empty() {
            return None;
        }
        self.durable.write(Change::Fed { id, client, message, sealed, plugins: &names });
        Some(id)
    }

    pub(super) fn store_for(&mut self, incoming: &Incoming<'_>, receivers: &[Receiver<'_>]) -> Option<MessageId> {
        if receivers.is_empty() {
            return None;
        }
        let id = self.durable.store.new_message();
        let (message, sealed) = (incoming.kept(), incoming.kept_as.is_some());
        self.durable.write(Change::Queued { id, message, sealed, receivers });
        Some(id)
    }

    /// Tells of handshakes of a Session that went on; what its connection is sent next may promise them.
    #[inline]
    pub(super) fn tell(&mut self, slot: u32, id: Option<usize>) {
        if self.sessions.get(slot).is_some_and(wasmqtt_protocol::session::Session::has_steps) {
            self.tell_steps(slot, id);
        }
    }

    fn tell_steps(&mut self, slot: u32, id: Option<usize>) {
        let Some(session) = self.sessions.get_mut(slot) else { return };
        let Some(name) = session.stored() else { return };
        let mut is_promised = false;
        for step in session.take_steps() {
            is_promised |= step.is_promised();
            self.durable.write_step(name, step);
        }
        if is_promised && let Some(conn) = id.and_then(|id| self.conns.get_mut(id)) {
            conn.after(self.durable.last());
        }
    }

    /// Asks the store for messages, if the Session has to have some before it can go on.
    #[inline]
    pub(super) fn load_more(&mut self, slot: u32) {
        if self.sessions.get(slot).is_some_and(wasmqtt_protocol::session::Session::wants_load) {
            self.begin_load(slot);
        }
    }

    fn begin_load(&mut self, slot: u32) {
        let Some(session) = self.sessions.get_mut(slot) else { return };
        let (Some(name), Some((turn, ids))) = (session.stored(), session.begin_load()) else { return };
        // Which hands over what was written before.
        self.durable.ends_batch();
        self.durable.store.load(Load { key: session.key, session: name, turn, ids });
    }

    /// Messages have come back from the store.
    pub(super) fn run_loads(&mut self) {
        if !self.durable.is_on() {
            return;
        }
        for loaded in self.durable.store.loaded() {
            let sealed = |kept: &&wasmqtt_protocol::session::Kept| kept.sealed;
            let messages = loaded.messages.iter().filter_map(|(_, kept)| kept.as_ref()).filter(sealed);
            let submit = |kept: &wasmqtt_protocol::session::Kept| Submission {
                plugins: u64::MAX,
                client: None,
                message: Arc::clone(&kept.message),
                fed: None,
            };
            let messages: Vec<Submission> = messages.map(submit).collect();
            if messages.is_empty() {
                self.on_loaded(loaded, Vec::new());
                continue;
            }
            let call = self.plugins.after_load(messages);
            let call = Box::pin(async move { Answer::Opened { opened: call.await, loaded } });
            if let Some(answer) = self.calls.begin(None, call) {
                self.on_answer(answer);
            }
        }
    }

    /// `opened`: what became of those that were sealed.
    pub(super) fn on_loaded(&mut self, mut loaded: Loaded, opened: Vec<Accepted>) {
        let mut opened = opened.into_iter();
        for (id, kept) in &mut loaded.messages {
            let Some(message) = kept.as_mut().filter(|kept| kept.sealed) else { continue };
            match opened.next() {
                Some(Accepted::Keep(open) | Accepted::Seal { delivered: open, .. }) => {
                    message.message = open;
                    message.sealed = false;
                }
                Some(Accepted::Discard(_)) | None => {
                    let (message, topic) = (id.get(), &message.message.topic);
                    warn!(message, %topic, "a sealed message cannot be opened: it waits for the next connection");
                }
            }
        }
        let slot = loaded.key.slot;
        let Some((session, conn)) = self.sessions.resolve(loaded.key) else { return };
        if !session.loaded(loaded.turn, &loaded.messages) {
            debug!(client_id = %session.client_id, "messages for a connection that is gone");
            return;
        }
        if let Some(id) = conn.filter(|_| !loaded.messages.is_empty()) {
            self.pump(id, slot);
        }
    }
}
