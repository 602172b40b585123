//! Other settings for a running broker: what can fail is prepared first, and then everything is applied.

use std::sync::Arc;

use crate::StartError;
use crate::acceptor::{AcceptorHandle, Order};
use crate::config::{Anonymous, Identity, Limits, Listener};
use crate::listening::{Listening, bind_all};
use crate::shared::Shared;
use crate::tunable::Tunable;

/// Changes the settings of a running broker; outlives it, and then does nothing.
#[derive(Clone)]
pub struct Reloader {
    shared: Arc<Shared>,
    acceptor: AcceptorHandle,
}

/// New listeners, bound and not served; dropping it lets them go.
pub struct PreparedListeners {
    wanted: Vec<Listener>,
    bound: Vec<Listening>,
}

impl PreparedListeners {
    /// New ones, with the ports they really have.
    pub fn added(&self) -> Vec<String> {
        self.bound.iter().map(|listening| listening.shown.clone()).collect()
    }
}

impl Reloader {
    pub(crate) fn new(shared: Arc<Shared>, acceptor: AcceptorHandle) -> Self {
        Self { shared, acceptor }
    }

    /// Binds those of `wanted` that are not there yet. Nothing is accepted on them before [`Self::apply`].
    ///
    /// # Errors
    /// [`StartError::Listen`] names the first that cannot be bound.
    pub fn prepare(&self, wanted: Vec<Listener>) -> Result<PreparedListeners, StartError> {
        let now = self.shared.tunables.current();
        let is_new = |listener: &&Listener| !now.listeners.iter().any(|other| other.name == listener.name);
        let new: Vec<Listener> = wanted.iter().filter(is_new).cloned().collect();
        let bound = bind_all(&new, &wanted).map_err(|(listener, error)| StartError::Listen { listener, error })?;
        Ok(PreparedListeners { wanted, bound })
    }

    /// Everything takes effect within a turn of each shard: bounds of queues for all Sessions, what a client is told in
    /// CONNACK for those that connect from now on. Clients of a listener that is gone stay connected.
    pub fn apply(&self, listeners: PreparedListeners, limits: Limits, who: (Anonymous, Identity)) {
        let now = self.shared.tunables.current();
        let PreparedListeners { wanted, bound } = listeners;
        let wanted_by_name = |name: &str| wanted.iter().find(|listener| *listener.name == *name);
        let gone = now.listeners.iter().filter(|old| wanted_by_name(&old.name).is_none());
        let closed = gone.map(|old| Order::Close(Arc::clone(&old.name)));
        let changed = now.listeners.iter().filter_map(|old| wanted_by_name(&old.name).filter(|new| *new != old));
        let updated = changed.map(|new| Order::Update(new.clone()));
        let orders: Vec<Order> = closed.chain(updated).chain(bound.into_iter().map(Order::Serve)).collect();
        self.shared.memory.limit(limits.memory_max);
        self.shared.retained_mut().limit(limits.retained_messages_max, limits.retained_bytes_max);
        self.shared.tunables.replace(Tunable::of(limits, who, wanted));
        if !orders.is_empty() {
            self.acceptor.send(orders);
        }
        for mailbox in &self.shared.mailboxes {
            mailbox.wake();
        }
    }
}
