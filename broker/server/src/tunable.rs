//! What an operator may change while the broker runs: limits, who may come and under which names, listeners' policies.
//!
//! The settings in force are one immutable value. Shards keep it and compare a number once per turn; nothing here is
//! looked at per message.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use wasmqtt_protocol::session::{QueuePolicy, ServerLimits};

use crate::config::{Anonymous, Config, Identity, Limits, Listener};

/// Settings in force since the start or the last reload.
#[derive(Debug)]
pub(crate) struct Tunable {
    pub(crate) limits: Limits,
    /// The same as Sessions want them; a connection keeps those that its client was told in CONNACK.
    pub(crate) for_sessions: Arc<ServerLimits>,
    pub(crate) anonymous: Anonymous,
    pub(crate) identity: Identity,
    pub(crate) listeners: Vec<Listener>,
}

impl Tunable {
    pub(crate) fn of(limits: Limits, (anonymous, identity): (Anonymous, Identity), listeners: Vec<Listener>) -> Self {
        Self { for_sessions: Arc::new(limits.for_sessions()), limits, anonymous, identity, listeners }
    }

    /// Of the listener with this name; the default if it is gone.
    pub(crate) fn queue_policy(&self, listener: &str) -> QueuePolicy {
        let found = self.listeners.iter().find(|other| *other.name == *listener);
        found.map_or_else(QueuePolicy::default, |found| found.queue_policy)
    }
}

/// The settings in force, and how often they were replaced.
#[derive(Debug)]
pub(crate) struct Tunables {
    current: RwLock<Arc<Tunable>>,
    generation: AtomicU64,
}

impl Tunables {
    pub(crate) fn new(config: &Config) -> Self {
        let tunable = Tunable::of(config.limits.clone(), (config.anonymous, config.identity), config.listeners.clone());
        Self { current: RwLock::new(Arc::new(tunable)), generation: AtomicU64::new(0) }
    }

    /// Takes a lock: for what happens once per connection or seldom.
    pub(crate) fn current(&self) -> Arc<Tunable> {
        Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Changes when [`Self::current`] does. Read before it.
    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    pub(crate) fn replace(&self, tunable: Tunable) {
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(tunable);
        self.generation.fetch_add(1, Ordering::Release);
    }
}
