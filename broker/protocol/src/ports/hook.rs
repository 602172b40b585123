//! Storage hooks: plugins that see messages as they are accepted, and after they are kept.

use std::sync::Arc;

use super::Client;
use crate::codec::ReasonCode;
use crate::router::{Message, MessageId};

/// Plugins that want messages of one topic, each a bit; the bits belong to one [`super::ShardPlugins::epoch`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Interest {
    /// Before a message is kept or delivered.
    pub before: u64,
    /// After it is kept.
    pub committed: u64,
}

/// A message as plugins see it.
#[derive(Debug, Clone)]
pub struct Submission {
    /// Bits of the plugins that want it.
    pub plugins: u64,
    /// `None`: the broker or a plugin published it.
    pub client: Option<Arc<Client>>,
    /// The message.
    pub message: Arc<Message>,
    /// The name under which the store keeps it for those that collect it; `None`: it does not.
    pub fed: Option<MessageId>,
}

/// What storage hooks make of a message.
#[derive(Debug, Clone)]
pub enum Accepted {
    /// Goes on, perhaps in another form than it came.
    Keep(Arc<Message>),
    /// Goes on, and is kept in another form than it is delivered in.
    Seal {
        /// For subscribers.
        delivered: Arc<Message>,
        /// For the store.
        kept: Arc<Message>,
    },
    /// Goes nowhere; the publisher is told the reason.
    Discard(ReasonCode),
}
