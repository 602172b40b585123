//! What the server is told at start. Every value is meant; the file form is the binary's business.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use wasmqtt_protocol::codec::Qos;
use wasmqtt_protocol::session::{QueuePolicy, ServerLimits};

/// Everything [`crate::Server::start`] needs.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where to listen; at least one.
    pub listeners: Vec<Listener>,
    /// Who may come without any plugin having said so.
    pub anonymous: Anonymous,
    /// Which names clients may have.
    pub identity: Identity,
    /// Bounds.
    pub limits: Limits,
    /// Shards, each a thread; 0: one per core.
    pub shards: usize,
    /// Time between two updates of `$SYS`; zero switches them off.
    pub sys_interval: Duration,
}

/// The broker's own rule, used where no plugin decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Anonymous {
    /// Clients from the loopback addresses and Unix sockets only.
    Loopback,
    /// Everybody.
    Allow,
    /// Nobody.
    Deny,
}

/// Which Client Identifiers and user names are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Identity {
    /// What becomes of a CONNECT that names the Client Identifier of somebody else's Session.
    pub client_id_taken: ClientIdTaken,
    /// Identifiers and user names with `+` or `#` are taken: rules that build a Topic Filter of them give such a client
    /// the topics of others.
    pub allow_wildcards: bool,
}

/// What becomes of a client that names a Client Identifier whose Session belongs to another identity. Nobody ever gets
/// another's subscriptions or messages; a Session that began without a user name gives way in both cases.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ClientIdTaken {
    /// It is refused (0x87) while that Session is there: nobody can end another's Session.
    #[default]
    Refuse,
    /// It gets a new Session, and the other one ends as by Clean Start, with its connection.
    NewSession,
}

/// One listening socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listener {
    /// Address.
    pub bind: Bind,
    /// As plugins and logs know it, such as `mqtt://127.0.0.1:1883`. It does not depend on the port that the system
    /// picks for port 0, so that it means the same after a restart.
    pub name: Arc<str>,
    /// What the operator wrote. The addresses of one host name are several listeners with the same text here.
    pub written: Arc<str>,
    /// One of several addresses of a host name: left out if this machine does not have it.
    pub optional: bool,
    /// When the queue of a client that came through it is full.
    pub queue_policy: QueuePolicy,
    /// A proxy stands in front of it, so that addresses say nothing about clients: being on this machine gives no rights.
    pub proxied: bool,
    /// TCP: silence after which the system asks whether the peer is still there; `None`: never.
    pub keepalive: Option<Duration>,
    /// Unix: permissions of the socket file; `None`: what the umask leaves.
    pub socket_mode: Option<u32>,
    /// Unix: group of the socket file, by number; `None`: that of the broker.
    pub socket_group: Option<u32>,
}

impl Listener {
    /// Silence before the system asks whether a client is still there, unless a listener says otherwise.
    pub const KEEPALIVE_DEFAULT: Duration = Duration::from_mins(5);

    /// At a TCP address, with default settings.
    pub fn tcp(address: SocketAddr) -> Self {
        Self::new(Bind::Tcp(address), format!("mqtt://{address}"), Some(Self::KEEPALIVE_DEFAULT))
    }

    /// At a socket file, with default settings.
    pub fn unix(path: PathBuf) -> Self {
        let name = format!("unix:{}", path.display());
        Self::new(Bind::Unix(path), name, None)
    }

    fn new(bind: Bind, name: String, keepalive: Option<Duration>) -> Self {
        let name: Arc<str> = name.into();
        Self {
            bind,
            written: Arc::clone(&name),
            name,
            optional: false,
            queue_policy: QueuePolicy::default(),
            proxied: false,
            keepalive,
            socket_mode: None,
            socket_group: None,
        }
    }
}

/// Kind and address of a listener.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Bind {
    /// TCP; port 0 takes a free one.
    Tcp(SocketAddr),
    /// Unix socket; a stale file is replaced.
    Unix(PathBuf),
}

/// Bounds, per client unless they say otherwise. Defaults and ranges as documented in the README.
#[derive(Debug, Clone)]
#[allow(missing_docs, reason = "named as in the configuration file")]
pub struct Limits {
    pub packet_bytes_max: u32,
    pub receive_maximum: u16,
    pub inflight_max: u16,
    pub topic_alias_maximum: u16,
    pub topic_alias_bytes_max: usize,
    pub maximum_qos: Qos,
    pub retain_available: bool,
    pub keep_alive_max: Option<Duration>,
    pub connect_timeout: Duration,
    pub session_expiry_max: Duration,
    pub queue_messages_max: usize,
    pub queue_bytes_max: usize,
    pub inflight_bytes_max: usize,
    pub outbound_bytes_max: usize,
    pub subscriptions_max: usize,
    /// Topic Filters in one SUBSCRIBE or UNSUBSCRIBE; those beyond it are refused.
    pub filters_per_packet_max: usize,
    pub subscription_bytes_max: usize,
    /// Whole broker.
    pub connections_max: usize,
    /// Whole broker.
    pub sessions_max: usize,
    /// Whole broker.
    pub retained_messages_max: usize,
    /// Whole broker.
    pub retained_bytes_max: usize,
    /// Per shard.
    pub route_cache_bytes_max: usize,
    /// Whole broker; `None`: three quarters of what the machine or its control group has.
    pub memory_max: Option<usize>,
    pub topic_levels_max: usize,
    pub topic_bytes_max: usize,
    pub connect_bytes_max: u32,
    /// Whole broker.
    pub connecting_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            packet_bytes_max: 1 << 20,
            receive_maximum: 1024,
            inflight_max: 1024,
            topic_alias_maximum: 64,
            topic_alias_bytes_max: 256 << 10,
            maximum_qos: Qos::ExactlyOnce,
            retain_available: true,
            keep_alive_max: None,
            connect_timeout: Duration::from_secs(10),
            session_expiry_max: Duration::from_hours(7 * 24),
            queue_messages_max: 10_000,
            queue_bytes_max: 16 << 20,
            inflight_bytes_max: 16 << 20,
            outbound_bytes_max: 1 << 20,
            subscriptions_max: 10_000,
            filters_per_packet_max: 1_000,
            subscription_bytes_max: 32 << 20,
            connections_max: 1_000_000,
            sessions_max: 1_000_000,
            retained_messages_max: 4_000_000,
            retained_bytes_max: 4 << 30,
            route_cache_bytes_max: 64 << 20,
            memory_max: None,
            topic_levels_max: 200,
            topic_bytes_max: 65_535,
            connect_bytes_max: 256 << 10,
            connecting_max: 20_000,
        }
    }
}

impl Limits {
    /// Whether a Topic Name or Topic Filter is within the bounds: each level costs memory in the index, and a packet
    /// could bring 65 535.
    #[inline]
    pub(crate) fn takes_topic(&self, topic_or_filter: &str) -> bool {
        let most = self.topic_levels_max;
        topic_or_filter.len() <= self.topic_bytes_max
            && (topic_or_filter.len() < most || topic_or_filter.split('/').count() <= most)
    }

    pub(crate) fn for_sessions(&self) -> ServerLimits {
        ServerLimits {
            packet_bytes_max: self.packet_bytes_max,
            receive_maximum: self.receive_maximum,
            inflight_max: self.inflight_max,
            topic_alias_maximum: self.topic_alias_maximum,
            topic_alias_bytes_max: self.topic_alias_bytes_max,
            maximum_qos: self.maximum_qos,
            retain_available: self.retain_available,
            keep_alive_max: self.keep_alive_max.map_or(0, |t| u16::try_from(t.as_secs()).unwrap_or(u16::MAX)),
            session_expiry_max: u32::try_from(self.session_expiry_max.as_secs()).unwrap_or(u32::MAX),
            queue_messages_max: self.queue_messages_max,
            queue_bytes_max: self.queue_bytes_max,
            inflight_bytes_max: self.inflight_bytes_max,
            outbound_bytes_max: self.outbound_bytes_max,
        }
    }
}
