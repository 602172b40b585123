//! What must survive is told to the store, and what promises it waits until it is kept.

use std::sync::Arc;

use smallvec::SmallVec;
use wasmqtt_protocol::codec::Qos;
use wasmqtt_protocol::ports::{Change, Receiver, ShardStore, Ticket};
use wasmqtt_protocol::router::{SessionKey, Subscription, Target};
use wasmqtt_protocol::session::Incoming;
use wasmqtt_protocol::topic::Filter;

use super::Shard;
use super::publish::wish;

/// The shard's side of the store.
pub(super) struct Durable {
    store: Box<dyn ShardStore>,
    is_on: bool,
    /// Something was written since the last promise.
    told: bool,
    /// The last batch known to be committed.
    committed: Ticket,
    /// Connections with something to write that waits for a commit.
    waiting: Vec<usize>,
}

impl Durable {
    pub(super) fn new(store: Box<dyn ShardStore>) -> Self {
        Self { is_on: store.is_durable(), told: false, committed: store.committed(), store, waiting: Vec::new() }
    }

    /// `false`: nothing survives, and nothing has to be told.
    pub(super) fn is_on(&self) -> bool {
        self.is_on
    }

    pub(super) fn write(&mut self, change: Change<'_>) {
        if self.is_on {
            self.store.write(change);
            self.told = true;
        }
    }

    /// Has what is sent to a connection from now on wait for what was written on its behalf just before, if anything.
    pub(super) fn promise(&mut self, barrier: &mut Ticket) {
        if std::mem::take(&mut self.told) {
            *barrier = self.store.ticket();
        }
    }

    /// The batch of what was written last.
    pub(super) fn ticket(&self) -> Ticket {
        if self.is_on { self.store.ticket() } else { 0 }
    }

    pub(super) fn waits(&self, barrier: Ticket) -> bool {
        barrier > self.committed
    }

    /// Comes back to a connection, which stays marked as dirty, at the next commit.
    pub(super) fn wait(&mut self, id: usize) {
        self.waiting.push(id);
    }

    /// Ends the batch; gives back the connections that a commit has come for since the last time.
    fn commit(&mut self) -> Vec<usize> {
        if !self.is_on {
            return Vec::new();
        }
        self.store.commit();
        let committed = self.store.committed();
        if committed == self.committed {
            return Vec::new();
        }
        self.committed = committed;
        std::mem::take(&mut self.waiting)
    }
}

impl Shard {
    /// End of a turn: begins to commit what it changed, and lets go what earlier turns promised.
    pub(super) fn commit(&mut self) {
        for id in self.durable.commit() {
            if let Some(conn) = self.conns.get_mut(id) {
                conn.dirty = true;
                self.dirty.push(id);
                self.hold(id);
            }
        }
    }

    /// A Session begins or goes on. The store knows it from the first time that it is to outlive its connection.
    pub(super) fn store_opened(&mut self, id: usize, key: SessionKey) {
        if !self.durable.is_on() {
            return;
        }
        let Some(session) = self.sessions.get(key.slot) else { return };
        let (expiry, client_id) = (session.session_expiry(), &session.client_id);
        let known = self.shared.stored(key).is_some();
        if expiry == 0 && !known {
            return;
        }
        self.durable.write(Change::SessionOpened { client_id, expiry, will: session.will.as_deref() });
        if !known {
            self.shared.set_stored(key, Some(Arc::clone(client_id)));
            for (filter, subscription) in session.subscriptions() {
                self.durable.write(Change::Subscribed { client_id, filter, subscription });
                self.shared.bump(filter.topic_filter());
            }
        }
        self.durable.promise(&mut self.conns[id].barrier);
    }

    /// A subscription was made, or (`None`) ended.
    pub(super) fn store_subscription(&mut self, key: SessionKey, filter: &Filter, subscription: Option<&Subscription>) {
        if !self.durable.is_on() {
            return;
        }
        let Some(client_id) = &self.shared.stored(key) else { return };
        self.durable.write(match subscription {
            Some(subscription) => Change::Subscribed { client_id, filter, subscription },
            None => Change::Unsubscribed { client_id, filter },
        });
    }

    /// A message is on its way to Sessions that the store knows. It is told by the shard that acknowledges the message.
    pub(super) fn store_queued(&mut self, incoming: &Incoming<'_>, targets: &[(Arc<str>, Target)]) {
        let receivers: SmallVec<[Receiver<'_>; 8]> = targets
            .iter()
            .filter_map(|(client_id, target)| {
                let wish = wish(incoming, target.merged(incoming.publisher == Some(target.session))?);
                (wish.qos > Qos::AtMostOnce).then_some(Receiver { client_id, wish })
            })
            .collect();
        if !receivers.is_empty() {
            self.durable.write(Change::Queued { message: incoming.kept(), receivers: &receivers });
        }
    }
}
