//! What of a Session's queue its client may still read.
//!
//! Permissions may have changed while messages waited. Until they are known nothing leaves, and then a message leaves
//! only if one of the subscriptions that are left matches its topic: those that are not allowed any more have ended.

use super::{Outbox, ServerLimits, Session};
use crate::router::{Index, Matches};

/// Subscriptions that are compared one by one; more of them become an index first.
const COMPARED_MAX: usize = 32;

/// What keeps queued messages from the client.
#[derive(Debug, Default)]
pub(super) struct Reading {
    /// It is not known yet whether the subscriptions are still allowed.
    held: bool,
    /// Queued messages are compared with the subscriptions that are left.
    compared: bool,
    /// The subscriptions while messages are compared, if they are many.
    index: Option<Box<(Index, Matches)>>,
}

impl Reading {
    pub(super) fn is_held(&self) -> bool {
        self.held
    }

    pub(super) fn hold(&mut self) {
        self.held = true;
    }

    /// The Network Connection is gone; the next one begins held, where permissions matter.
    pub(super) fn reset(&mut self) {
        *self = Self::default();
    }

    /// Subscriptions changed.
    pub(super) fn forget(&mut self) {
        self.index = None;
    }
}

impl Session {
    /// Nothing leaves before [`Session::release`].
    pub fn is_held(&self) -> bool {
        self.reading.is_held()
    }

    /// It is known which subscriptions are allowed, and the others have ended: what waits is sent. With `compared`, as
    /// long as a subscription that is left matches it.
    pub fn release(&mut self, now_ms: u64, compared: bool, server: &ServerLimits, out: &mut Outbox) {
        self.reading.held = false;
        self.reading.compared |= compared;
        self.pump(now_ms, server, out);
    }

    /// A subscription ended because it is no longer allowed: what waits for it is not sent.
    pub fn compare_queue(&mut self) {
        self.reading.compared = true;
    }

    /// A queued message about this topic may leave. The server may leave out what was buffered for a subscription that
    /// has ended. MQTT 5.0 and 3.1.1 §3.10.4
    pub(super) fn may_send_queued(&mut self, topic: &str) -> bool {
        if !self.reading.compared {
            return true;
        }
        if self.subscription_count() <= COMPARED_MAX {
            return self.subscriptions().any(|(filter, _)| filter.matches(topic));
        }
        if self.reading.index.is_none() {
            let mut index = Index::default();
            for (filter, subscription) in self.subscriptions() {
                index.subscribe(filter.topic_filter(), self.key, *subscription);
            }
            self.reading.index = Some(Box::new((index, Matches::default())));
        }
        let Some((index, matches)) = self.reading.index.as_deref_mut() else { return false };
        index.matches(topic, matches);
        !matches.direct.is_empty()
    }

    /// Everything that waited was looked at.
    pub(super) fn queue_compared(&mut self) {
        if !self.reading.held {
            self.reading.compared = false;
            self.reading.index = None;
        }
    }
}
