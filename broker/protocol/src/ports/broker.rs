//! What plugins may ask of the broker.

use std::net::IpAddr;
use std::sync::Arc;

use bytes::Bytes;

use crate::codec::{Qos, ReasonCode};
use crate::router::MessageId;

/// A message that a plugin publishes.
#[derive(Debug, Clone)]
pub struct Outgoing {
    /// Bit of the plugin in [`super::Interest`]: it is not shown its own messages. 0: it is.
    pub origin: u64,
    /// Topic Name.
    pub topic: Box<str>,
    /// Application Message.
    pub payload: Bytes,
    /// Encoded properties that are forwarded unaltered.
    pub properties: Bytes,
    /// QoS it is published with.
    pub qos: Qos,
    /// Becomes the retained message of its topic; with an empty payload that is removed.
    pub retain: bool,
    /// Message Expiry Interval in seconds.
    pub expiry: Option<u32>,
}

/// Why the broker did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Too much of it is waiting; later it may do.
    #[error("the broker is busy")]
    Busy,
    /// It cannot be done.
    #[error("{0}")]
    Invalid(String),
}

/// Who is banned.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum BanPattern {
    /// One Client Identifier.
    ClientId(Arc<str>),
    /// One User Name, or the identity that authentication made of one.
    Username(Arc<str>),
    /// Addresses that begin with these bits.
    Address {
        /// First address.
        network: IpAddr,
        /// How many bits count: at most 32 or 128.
        prefix: u8,
    },
}

/// The broker as plugins reach it, from any thread. Nothing here blocks.
pub trait Broker: Send + Sync {
    /// Publishes as the broker itself: permissions of clients do not apply.
    ///
    /// # Errors
    /// [`Refusal::Invalid`] for a Topic Name that may not be published to, [`Refusal::Busy`] while too much waits.
    fn publish(&self, message: Outgoing) -> Result<(), Refusal>;
    /// Ends the connection of a client, if it has one. MQTT 5.0 clients are told the reason.
    fn disconnect(&self, client_id: &str, reason: ReasonCode);
    /// Keeps clients out for `seconds`, and ends the connections of those that are in. 0 lifts the ban.
    ///
    /// # Errors
    /// [`Refusal::Busy`] when there are as many bans as the broker keeps.
    fn ban(&self, pattern: BanPattern, seconds: u32, note: &str) -> Result<(), Refusal>;
    /// Other plugins serve from now on: shards look at [`super::ShardPlugins::epoch`] without waiting for traffic.
    fn plugins_changed(&self);
    /// Forgets what `acl` plugins decided for one client, or for all.
    fn revoke(&self, client_id: Option<&str>);
    /// A plugin has these messages for good ([`super::Submission::fed`]): the store need not keep them for it.
    fn fed(&self, _plugin: &Arc<str>, _ids: Vec<MessageId>) {}
}
