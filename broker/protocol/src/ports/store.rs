//! The store.

use std::sync::Arc;

use super::{BanPattern, Client};
use crate::codec::Qos;
use crate::router::{Message, MessageId, MessageRef, SessionId, SessionKey, Subscription};
use crate::session::{Kept, Parked, Replay, Step, WillMessage, Wish};
use crate::topic::Filter;

/// Something that must survive the broker. A Session that ends with its Network Connection is not told of.
#[derive(Debug)]
pub enum Change<'a> {
    /// A Session began, was resumed, or lost its Network Connection; or its will was published.
    Session {
        /// The Session.
        session: SessionId,
        /// Whose.
        client: &'a Client,
        /// Session Expiry Interval in seconds.
        expiry: u32,
        /// When its Network Connection was gone; `None`: it has one.
        closed_at_ms: Option<u64>,
        /// To be published if the client goes or stays away; `None`: nothing is.
        will: Option<&'a WillMessage>,
    },
    /// It is gone, with all that belongs to it but its messages, of which [`Step::Done`] tells.
    SessionEnded {
        /// The Session.
        session: SessionId,
    },
    /// A subscription was made or replaced.
    Subscribed {
        /// The Session.
        session: SessionId,
        /// With its `ShareName`, if it has one.
        filter: &'a Filter,
        /// Options and Subscription Identifier.
        subscription: &'a Subscription,
    },
    /// A subscription was ended.
    Unsubscribed {
        /// The Session.
        session: SessionId,
        /// As it was made.
        filter: &'a Filter,
    },
    /// Retained messages are on their way to a subscription, and so far they have come.
    Replay {
        /// The Session.
        session: SessionId,
        /// Of the subscription.
        filter: &'a Filter,
        /// What is left.
        replay: &'a Replay,
    },
    /// All retained messages are sent or queued, or the subscription has ended.
    ReplayEnded {
        /// The Session.
        session: SessionId,
        /// Of the subscription.
        filter: &'a Filter,
    },
    /// A message is on its way to Sessions that outlive their Network Connections, with QoS 1 or 2.
    Queued {
        /// A new name.
        id: MessageId,
        /// The same for all its receivers.
        message: MessageRef<'a>,
        /// Storage hooks have to open it before anybody gets it.
        sealed: bool,
        /// Never empty; each Session once.
        receivers: &'a [Receiver<'a>],
    },
    /// A QoS 1 or 2 handshake went on.
    Step {
        /// The Session.
        session: SessionId,
        /// What happened.
        step: Step,
    },
    /// A topic has another retained message.
    Retained {
        /// The message.
        message: MessageRef<'a>,
        /// Storage hooks have to open it before anybody gets it.
        sealed: bool,
        /// See [`crate::router::RetainedMessage::stamp`].
        stamp: u64,
    },
    /// A topic has no retained message any more.
    RetainedRemoved {
        /// Topic Name.
        topic: &'a str,
    },
    /// Plugins collect a message.
    Fed {
        /// A new name.
        id: MessageId,
        /// Its publisher; `None`: the broker or a plugin.
        client: Option<&'a Client>,
        /// The message.
        message: MessageRef<'a>,
        /// Storage hooks have to open it before anybody gets it.
        sealed: bool,
        /// Never empty.
        plugins: &'a [Arc<str>],
    },
    /// A plugin has it for good.
    FedDone {
        /// Which.
        plugin: &'a str,
        /// Of the message.
        id: MessageId,
    },
    /// Somebody is kept out.
    Ban {
        /// Who.
        pattern: &'a BanPattern,
        /// Until when, by the broker's clock; 0: not any more, and the row is deleted.
        until_ms: u64,
        /// For the log.
        note: &'a str,
    },
}

/// One Session that gets a message, and how.
#[derive(Debug, Clone, Copy)]
pub struct Receiver<'a> {
    /// The Session.
    pub session: SessionId,
    /// What it asked for.
    pub wish: Wish<'a>,
}

/// Counts the batches of one shard, from 1.
pub type Ticket = u64;

/// Messages that a Session wants to have back.
#[derive(Debug)]
pub struct Load {
    /// Where the Session lives.
    pub key: SessionKey,
    /// The Session.
    pub session: SessionId,
    /// See [`crate::session::Session::begin_load`].
    pub turn: u32,
    /// In the order in which they are wanted.
    pub ids: Vec<MessageId>,
}

/// What became of a [`Load`].
#[derive(Debug)]
pub struct Loaded {
    /// Where the Session lives.
    pub key: SessionKey,
    /// As it was asked for.
    pub turn: u32,
    /// For each that was wanted the message, if it still is in the store.
    pub messages: Vec<(MessageId, Option<Kept>)>,
}

/// The store as one shard sees it. A shard tells of all changes of a turn, ends the batch, and sends nothing that
/// promises them (CONNACK, SUBACK, PUBACK, PUBREC, PUBREL, PUBCOMP, a QoS 2 PUBLISH) before the batch is committed.
pub trait ShardStore {
    /// False: nothing survives, so the shard need not tell of changes, nor wait.
    fn is_durable(&self) -> bool;
    /// Nothing can be written at present: what would have to be kept must be refused. One load of an atomic.
    fn is_failing(&self) -> bool;
    /// So much waits to be written that what needs the store should wait, and nothing else. Two loads of atomics.
    fn is_congested(&self) -> bool;
    /// A name that no Session had before.
    fn new_session(&mut self) -> SessionId;
    /// A name that is larger than all before.
    fn new_message(&mut self) -> MessageId;
    /// Adds to the present batch.
    fn write(&mut self, change: Change<'_>);
    /// Ends the present batch, if anything is in it, and begins to commit it.
    fn commit(&mut self);
    /// The batch with the last change that was told; 0 before the first.
    fn ticket(&self) -> Ticket;
    /// The last batch that is settled, with all before it: committed, unless [`Self::take_failed`] names it.
    fn committed(&self) -> Ticket;
    /// Batches up to [`Self::committed`] that could not be written, each named once: what was promised with them is
    /// refused. Changes of theirs that take something away or bring a handshake on are not lost by that; they are
    /// written as soon as that is possible.
    fn take_failed(&mut self) -> Vec<Ticket> {
        Vec::new()
    }
    /// Begins to read, with all that any shard has handed over until now, whether it could be written or not.
    fn load(&mut self, load: Load);
    /// Takes what was read since the last time.
    fn loaded(&mut self) -> Vec<Loaded>;
}

/// A Session as it was when the broker ended.
#[derive(Debug)]
pub struct RestoredSession {
    /// Its name.
    pub session: SessionId,
    /// Whose.
    pub client: Client,
    /// Session Expiry Interval in seconds.
    pub expiry: u32,
    /// When its Network Connection was gone; `None`: it had one when the broker ended.
    pub closed_at_ms: Option<u64>,
    /// Not published so far.
    pub will: Option<WillMessage>,
    /// All of them.
    pub subscriptions: Vec<(Filter, Subscription)>,
    /// Retained messages on their way to these.
    pub replays: Vec<(Filter, Replay)>,
    /// Messages that wait, oldest first; those in `inflight` are not among them.
    pub parked: Vec<Parked>,
    /// Packet Identifiers in use, with the message that waits for PUBACK or PUBREC; `None`: it waits for PUBCOMP.
    pub inflight: Vec<(u16, Option<(MessageId, Qos)>)>,
    /// Packet Identifiers of QoS 2 messages that wait for PUBREL.
    pub received: Vec<u16>,
}

/// Takes what the store has kept.
pub trait Restore {
    /// A Session.
    fn session(&mut self, session: RestoredSession);
    /// A retained message; `sealed`: storage hooks have to open it. `stamp`: see
    /// [`crate::router::RetainedMessage::stamp`]; zero where an older broker has kept it.
    fn retained(&mut self, message: Message, sealed: bool, stamp: u64);
    /// A message that this plugin has not taken for good; `false`: nobody wants it any more.
    fn fed(&mut self, plugin: &str, id: MessageId, client: Option<Client>, message: Message, sealed: bool) -> bool;
    /// Somebody who is kept out.
    fn ban(&mut self, pattern: BanPattern, until_ms: u64, note: &str);
}

/// The store cannot be used. The text names folder and reason.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct StoreError(pub String);

/// The broker's time, in which all instants are that the store is told of: it passes evenly and is never set, across
/// restarts as well.
pub trait Clock: Send + Sync {
    /// Milliseconds. Not those since 1970, though seldom far from them.
    fn now_ms(&self) -> u64;
    /// What an instant means that was stored at `written_ms`, by what was learned of the system's clock since.
    fn corrected(&self, written_ms: u64, at_ms: u64) -> u64;
    /// What the next broker needs to go on with this clock.
    fn row(&self) -> Vec<u8>;
}

/// Keeps what must survive.
pub trait Store: Send + Sync {
    /// What [`Clock::row`] of the last broker was; `None`: there was none.
    ///
    /// # Errors
    /// It cannot be read.
    fn clock_row(&self) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(None)
    }
    /// Called once, before [`Store::restore`]. The store keeps the row from now on, refreshed with what it writes.
    fn set_clock(&self, _clock: Arc<dyn Clock>) {}
    /// The row is to be written without waiting for something else to be.
    fn clock_changed(&self) {}
    /// Gives back everything that was kept. Called once, before the first shard begins.
    ///
    /// # Errors
    /// It cannot be read.
    fn restore(&self, to: &mut dyn Restore) -> Result<(), StoreError>;
    /// Called once on each shard's thread. `wake` has the shard look at [`ShardStore::committed`] and
    /// [`ShardStore::loaded`].
    fn shard(&self, index: usize, wake: Box<dyn Fn() + Send + Sync>) -> Box<dyn ShardStore>;
}

/// A bucket, a key in it, and its value.
pub type Value = (String, String, Vec<u8>);

/// Keeps what plugins have in buckets (`wasi:keyvalue`).
pub trait Buckets: Send + Sync {
    /// All values of one plugin.
    ///
    /// # Errors
    /// They cannot be read.
    fn load(&self, plugin: &str) -> Result<Vec<Value>, StoreError>;
    /// Has a value kept, or (`None`) deleted, a moment later and in this order; `false`: too much waits to be written.
    fn keep(&self, plugin: &str, bucket: &str, key: &str, value: Option<&[u8]>) -> bool;
}

/// Nothing outlives the broker: `durability = "memory"`.
#[derive(Debug, Clone, Copy, Default)]
pub struct Memory;

impl Store for Memory {
    fn restore(&self, _to: &mut dyn Restore) -> Result<(), StoreError> {
        Ok(())
    }
    fn shard(&self, _index: usize, _wake: Box<dyn Fn() + Send + Sync>) -> Box<dyn ShardStore> {
        Box::new(Self)
    }
}

impl ShardStore for Memory {
    fn is_durable(&self) -> bool {
        false
    }
    fn is_failing(&self) -> bool {
        false
    }
    fn is_congested(&self) -> bool {
        false
    }
    fn new_session(&mut self) -> SessionId {
        SessionId::MIN
    }
    fn new_message(&mut self) -> MessageId {
        MessageId::MIN
    }
    fn write(&mut self, _change: Change<'_>) {}
    fn commit(&mut self) {}
    fn ticket(&self) -> Ticket {
        0
    }
    fn committed(&self) -> Ticket {
        0
    }
    fn load(&mut self, _load: Load) {}
    fn loaded(&mut self) -> Vec<Loaded> {
        Vec::new()
    }
}

/// The first number of a message or Session that is given at that time, in milliseconds of broker time, or later.
pub fn first_id(now_ms: u64) -> u64 {
    now_ms << 20
}

/// When the number of a message or Session was given, or a moment before, in milliseconds of broker time.
pub fn time_of(id: u64) -> u64 {
    id >> 20
}
