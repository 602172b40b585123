//! Traits through which the broker reaches plugins and the store. One plug-point, one trait.
//!
//! The server implements none of the plug-points and the plugin host knows nothing of sockets: they meet here.

use std::future::Future;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;

use crate::access::{Action, Decision, Rule};
use crate::codec::{Qos, ReasonCode, Version};
use crate::router::{Message, Subscription};
use crate::session::{WillMessage, Wish};
use crate::topic::Filter;

/// A call into a plugin; polled on the shard that made it. Dropping it cancels the call.
pub type Call<T> = Pin<Box<dyn Future<Output = T>>>;

/// What a CONNECT packet says about who is asking, and where it came from.
#[derive(Debug, Clone)]
pub struct AuthRequest {
    /// Client Identifier, never empty: an assigned one is filled in before.
    pub client_id: Arc<str>,
    /// User Name, if any.
    pub username: Option<Arc<str>>,
    /// Password, if any.
    pub password: Option<Bytes>,
    /// Authentication Method of enhanced authentication. MQTT 5.0 §4.12.
    pub method: Option<Arc<str>>,
    /// Authentication Data that came with CONNECT.
    pub data: Option<Bytes>,
    /// Protocol version the client speaks.
    pub version: Version,
    /// Address of the peer; `None` for Unix sockets.
    pub address: Option<IpAddr>,
    /// Listener as written in the configuration, such as `mqtt://127.0.0.1:1883`.
    pub listener: Arc<str>,
    /// User Properties of CONNECT, in order.
    pub user_properties: Vec<(String, String)>,
}

/// One AUTH packet in an exchange of enhanced authentication or re-authentication.
#[derive(Debug, Clone)]
pub struct AuthStep {
    /// The CONNECT that began the exchange.
    pub request: Arc<AuthRequest>,
    /// Authentication Data of this packet.
    pub data: Bytes,
    /// What the plugin handed over with its last challenge; empty at the start of a re-authentication.
    pub state: Bytes,
    /// Name of the plugin that made the last challenge; empty at the start of a re-authentication.
    pub plugin: Arc<str>,
    /// Re-authentication of a connected client (Reason Code 0x19).
    pub reauthenticate: bool,
}

/// The answer of the whole plugin chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AuthOutcome {
    /// No plugin had an opinion.
    Next,
    /// Let in.
    Allow(Grant),
    /// Refused, with the Reason Code for CONNACK or DISCONNECT.
    Deny(ReasonCode),
    /// Enhanced authentication goes on with an AUTH packet.
    Challenge {
        /// Authentication Data for the client.
        data: Bytes,
        /// Kept by the broker and handed back with the next [`AuthStep`]; at most 64 KiB.
        state: Bytes,
        /// Which plugin is asking.
        plugin: Arc<str>,
    },
    /// No plugin could answer (trap, deadline, queue full): 0x88 (5.0), 3 (3.1.1).
    Unavailable,
}

/// What an authenticated client gets.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Grant {
    /// Identity for permissions and logs; the User Name when the plugin left it empty.
    pub principal: String,
    /// Last Authentication Data, sent with CONNACK or AUTH.
    pub data: Option<Bytes>,
    /// Evaluated by the broker itself, in order, before `acl` plugins are asked.
    pub rules: Vec<Rule>,
    /// What no rule is about is denied, and `acl` plugins are never asked.
    pub complete: bool,
    /// Seconds until the client has to authenticate again; 0: never.
    pub expires: u32,
}

/// A connected client, as far as permissions go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Client {
    /// Client Identifier.
    pub client_id: Arc<str>,
    /// Identity that authentication gave it; the User Name or nothing without a plugin.
    pub principal: Arc<str>,
    /// Listener as written in the configuration.
    pub listener: Arc<str>,
}

/// What a client wants to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Access {
    /// Publish or subscribe.
    pub action: Action,
    /// Topic Name, or Topic Filter without `$share/{ShareName}/`.
    pub topic: Arc<str>,
    /// QoS of the PUBLISH, or the Maximum QoS asked for.
    pub qos: Qos,
    /// RETAIN flag of the PUBLISH.
    pub retain: bool,
}

/// The plug-points as seen from one shard. Lives and dies on that shard's thread.
pub trait ShardPlugins {
    /// False: no plugin exports `auth`, and the broker's own `anonymous` rule decides alone.
    fn has_auth(&self) -> bool;
    /// Asks the chain about a CONNECT.
    fn authenticate(&self, request: Arc<AuthRequest>) -> Call<AuthOutcome>;
    /// Goes on with enhanced authentication.
    fn proceed(&self, step: AuthStep) -> Call<AuthOutcome>;
    /// False: no plugin exports `acl`, and everything is allowed but what rules of a [`Grant`] deny.
    fn has_acl(&self) -> bool {
        false
    }
    /// Another value when plugins were loaded, replaced or removed: what they decided is asked again.
    fn epoch(&self) -> u64 {
        0
    }
    /// Asks the chain what a client may do: one decision for each access, in the same order.
    fn authorize(&self, _client: Arc<Client>, accesses: Arc<[Access]>) -> Call<Vec<Decision>> {
        Box::pin(std::future::ready(accesses.iter().map(|_| Decision::default()).collect()))
    }
}

/// Makes the view of each shard.
pub trait Plugins: Send + Sync {
    /// Called once on each shard's thread.
    fn shard(&self, index: usize) -> Box<dyn ShardPlugins>;
}

/// No plugins at all.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoPlugins;

impl Plugins for NoPlugins {
    fn shard(&self, _index: usize) -> Box<dyn ShardPlugins> {
        Box::new(Self)
    }
}

impl ShardPlugins for NoPlugins {
    fn has_auth(&self) -> bool {
        false
    }
    fn authenticate(&self, _request: Arc<AuthRequest>) -> Call<AuthOutcome> {
        Box::pin(std::future::ready(AuthOutcome::Next))
    }
    fn proceed(&self, _step: AuthStep) -> Call<AuthOutcome> {
        Box::pin(std::future::ready(AuthOutcome::Next))
    }
}

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
