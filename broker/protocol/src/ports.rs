//! Traits through which the broker reaches plugins and the store. One plug-point, one trait.
//!
//! The server implements none of the plug-points and the plugin host knows nothing of sockets: they meet here.

use std::fmt;
use std::future::Future;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;

use crate::access::{Action, Decision, Rule};
use crate::codec::{Qos, ReasonCode, Version};
use crate::text::Secret;

mod broker;
mod clock;
mod events;
mod hook;
mod store;

pub use broker::{BanPattern, Broker, Outgoing, Refusal};
pub use clock::{ClockRow, Correction, Gap};
pub use events::{Event, EventKind};
pub use hook::{Accepted, Interest, Submission};
pub use store::{
    Buckets, Change, Clock, Load, Loaded, Memory, Receiver, Restore, RestoredSession, ShardStore, Store, StoreError,
    Ticket, Value, first_id, time_of,
};

/// A call into a plugin; polled on the shard that made it. Dropping it cancels the call.
pub type Call<T> = Pin<Box<dyn Future<Output = T>>>;

/// What a CONNECT packet says about who is asking, and where it came from.
#[derive(Clone)]
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
    /// Listener by its address as configured, such as `mqtt://127.0.0.1:1883`.
    pub listener: Arc<str>,
    /// User Properties of CONNECT, in order.
    pub user_properties: Vec<(String, String)>,
}

impl fmt::Debug for AuthRequest {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { client_id, username, password, method, data, version, address, listener, .. } = self;
        // User Properties may be where a client has its token.
        out.debug_struct("AuthRequest")
            .field("client_id", client_id)
            .field("username", username)
            .field("password", &Secret::of(password.as_ref()))
            .field("method", method)
            .field("data", &Secret::of(data.as_ref()))
            .field("version", version)
            .field("address", address)
            .field("listener", listener)
            .finish_non_exhaustive()
    }
}

/// One AUTH packet in an exchange of enhanced authentication or re-authentication.
#[derive(Clone)]
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

impl fmt::Debug for AuthStep {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { request, plugin, reauthenticate, .. } = self;
        out.debug_struct("AuthStep")
            .field("request", request)
            .field("plugin", plugin)
            .field("reauthenticate", reauthenticate)
            .finish_non_exhaustive()
    }
}

/// The answer of the whole plugin chain.
#[derive(Clone, PartialEq, Eq)]
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

impl fmt::Debug for AuthOutcome {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Next => out.write_str("Next"),
            Self::Allow(grant) => out.debug_tuple("Allow").field(grant).finish(),
            Self::Deny(reason) => out.debug_tuple("Deny").field(reason).finish(),
            Self::Challenge { plugin, .. } => {
                out.debug_struct("Challenge").field("plugin", plugin).finish_non_exhaustive()
            }
            Self::Unavailable => out.write_str("Unavailable"),
        }
    }
}

/// What an authenticated client gets.
#[derive(Clone, PartialEq, Eq, Default)]
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

impl fmt::Debug for Grant {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { principal, data, rules, complete, expires } = self;
        out.debug_struct("Grant")
            .field("principal", principal)
            .field("data", &Secret::of(data.as_ref()))
            .field("rules", rules)
            .field("complete", complete)
            .field("expires", expires)
            .finish()
    }
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
    /// Two numbers: another first one when plugins were loaded, replaced or removed, and another second one when that
    /// concerns `acl` plugins, so that what they decided is asked again.
    fn epoch(&self) -> (u64, u64) {
        (0, 0)
    }
    /// Asks the chain what a client may do: one decision for each access, in the same order.
    fn authorize(&self, _client: Arc<Client>, accesses: Arc<[Access]>) -> Call<Vec<Decision>> {
        Box::pin(std::future::ready(accesses.iter().map(|_| Decision::default()).collect()))
    }
    /// Which plugins want messages of a topic. Asked once per topic and [`Self::epoch`].
    fn interest(&self, _topic: &str) -> Interest {
        Interest::default()
    }
    /// Shows messages to the storage hooks before they are kept or delivered: one answer each, in the same order.
    fn before_store(&self, messages: Vec<Submission>) -> Call<Vec<Accepted>> {
        Box::pin(std::future::ready(messages.into_iter().map(|sent| Accepted::Keep(sent.message)).collect()))
    }
    /// Shows messages that come back from the store to the hooks that sealed them; [`Accepted::Discard`]: it cannot be
    /// delivered.
    fn after_load(&self, messages: Vec<Submission>) -> Call<Vec<Accepted>> {
        // Whoever sealed them is not here.
        let closed = || Accepted::Discard(ReasonCode::IMPLEMENTATION_SPECIFIC_ERROR);
        Box::pin(std::future::ready(messages.iter().map(|_| closed()).collect()))
    }
    /// Some plugin wants to know which filters have subscribers. Asked once per [`Self::epoch`].
    fn wants_interest(&self) -> bool {
        false
    }
    /// A Topic Filter has got its first subscriber, or lost its last one. Must not block.
    fn interest_changed(&self, _filter: &str, _is_wanted: bool) {}
    /// Names of the plugins that these bits stand for.
    fn names(&self, _plugins: u64) -> Vec<Arc<str>> {
        Vec::new()
    }
    /// Hands over messages that are kept, in order; [`Submission::plugins`] says to whom. Must not block.
    fn committed(&self, _messages: Vec<Submission>) {}
    /// Kinds of events that somebody wants, as a set of [`EventKind::bit`]. Asked once per [`Self::epoch`].
    fn wanted_events(&self) -> u32 {
        0
    }
    /// Tells what happened, in order. Must not block.
    fn observe(&self, _events: Vec<Event>) {}
    /// Whether other clients have, or may have, work for this thread: then plugins that compute for long keep to their
    /// share of it. Said before each round of polling calls.
    fn set_crowded(&self, _crowded: bool) {}
    /// For `$SYS/broker/plugins/…`: what is behind that, and its value.
    fn status(&self) -> Vec<(String, String)> {
        Vec::new()
    }
}

/// Makes the view of each shard.
pub trait Plugins: Send + Sync {
    /// Called once, before any shard: plugins can reach the broker from now on.
    fn attach(&self, _broker: Arc<dyn Broker>) {}
    /// Called once: all messages that the store has for plugins were handed over by [`Self::feed_again`].
    fn fed_again(&self) {}
    /// Called once on each shard's thread.
    fn shard(&self, index: usize) -> Box<dyn ShardPlugins>;
    /// Hands over a message that a plugin had not taken for good when the broker ended, oldest first; `false`: there is
    /// no such plugin, or it collects no messages.
    fn feed_again(&self, _plugin: &str, _message: Submission) -> bool {
        false
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_for_debugging_has_no_secrets() {
        let secret = || Bytes::from_static(b"hunter2");
        let request = AuthRequest {
            client_id: "c".into(),
            username: Some("ann".into()),
            password: Some(secret()),
            method: Some("SCRAM".into()),
            data: Some(secret()),
            version: Version::V5,
            address: None,
            listener: "mqtt://127.0.0.1:1883".into(),
            user_properties: vec![("token".into(), "hunter2".into())],
        };
        let step = AuthStep {
            request: Arc::new(request.clone()),
            data: secret(),
            state: secret(),
            plugin: "p".into(),
            reauthenticate: false,
        };
        let challenge = AuthOutcome::Challenge { data: secret(), state: secret(), plugin: "p".into() };
        let allowed = AuthOutcome::Allow(Grant { data: Some(secret()), ..Grant::default() });
        let shown = format!("{request:?} {step:?} {challenge:?} {allowed:?}");
        // As text, and as the list of numbers that a slice of bytes is shown as.
        assert!(!shown.contains("hunter2") && !shown.contains("104, 117, 110"), "{shown}");
        assert!(shown.contains("ann") && shown.contains("password: Some((secret))"), "{shown}");
    }
}
