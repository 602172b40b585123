//! The store.

use std::sync::Arc;

use crate::router::{Message, Subscription};
use crate::session::{WillMessage, Wish};
use crate::topic::Filter;

/// Something that must survive the broker. Sessions are named by their Client Identifier; one that ends with its Network
/// Connection is not told of.
#[derive(Debug)]
pub enum Change<'a> {
    /// A Session was begun or resumed, with the Will Message of its Network Connection.
    SessionOpened {
        /// Client Identifier.
        client_id: &'a str,
        /// Session Expiry Interval in seconds.
        expiry: u32,
        /// To be published if the broker does not live to see the client go.
        will: Option<&'a WillMessage>,
    },
    /// Its Network Connection is gone: from now on it expires.
    SessionClosed {
        /// Client Identifier.
        client_id: &'a str,
        /// Session Expiry Interval in seconds, which DISCONNECT may have changed.
        expiry: u32,
        /// Waits for its Will Delay Interval.
        will: Option<&'a WillMessage>,
    },
    /// It is gone, with all that belongs to it.
    SessionEnded {
        /// Client Identifier.
        client_id: &'a str,
    },
    /// A subscription was made or replaced.
    Subscribed {
        /// Client Identifier.
        client_id: &'a str,
        /// With its `ShareName`, if it has one.
        filter: &'a Filter,
        /// Options and Subscription Identifier.
        subscription: &'a Subscription,
    },
    /// A subscription was ended.
    Unsubscribed {
        /// Client Identifier.
        client_id: &'a str,
        /// As it was made.
        filter: &'a Filter,
    },
    /// A message is on its way to Sessions that outlive their Network Connections, with QoS 1 or 2.
    Queued {
        /// The same for all its receivers.
        message: &'a Arc<Message>,
        /// Never empty.
        receivers: &'a [Receiver<'a>],
    },
    /// A topic has another retained message.
    Retained(&'a Arc<Message>),
    /// A topic has no retained message any more.
    RetainedRemoved {
        /// Topic Name.
        topic: &'a str,
    },
}

/// One Session that gets a message, and how.
#[derive(Debug, Clone, Copy)]
pub struct Receiver<'a> {
    /// Client Identifier.
    pub client_id: &'a str,
    /// What it asked for.
    pub wish: Wish<'a>,
}

/// Counts the batches of one shard, from 1.
pub type Ticket = u64;

/// The store as one shard sees it. A shard tells of all changes of a turn, ends the batch, and sends nothing that
/// promises them (CONNACK, SUBACK, PUBACK, PUBREC) before the batch is committed.
pub trait ShardStore {
    /// False: nothing survives, so the shard need not tell of changes, nor wait.
    fn is_durable(&self) -> bool;
    /// Adds to the present batch.
    fn write(&mut self, change: Change<'_>);
    /// Ends the present batch, if anything is in it, and begins to commit it.
    fn commit(&mut self);
    /// The batch with the last change that was told; 0 before the first.
    fn ticket(&self) -> Ticket;
    /// The last batch that is committed, with all before it.
    fn committed(&self) -> Ticket;
}

/// Keeps what must survive.
pub trait Store: Send + Sync {
    /// Called once on each shard's thread. `wake` has the shard look at [`ShardStore::committed`].
    fn shard(&self, index: usize, wake: Box<dyn Fn() + Send + Sync>) -> Box<dyn ShardStore>;
}

/// Nothing outlives the broker: `durability = "memory"`.
#[derive(Debug, Clone, Copy, Default)]
pub struct Memory;

impl Store for Memory {
    fn shard(&self, _index: usize, _wake: Box<dyn Fn() + Send + Sync>) -> Box<dyn ShardStore> {
        Box::new(Self)
    }
}

impl ShardStore for Memory {
    fn is_durable(&self) -> bool {
        false
    }
    fn write(&mut self, _change: Change<'_>) {}
    fn commit(&mut self) {}
    fn ticket(&self) -> Ticket {
        0
    }
    fn committed(&self) -> Ticket {
        0
    }
}
