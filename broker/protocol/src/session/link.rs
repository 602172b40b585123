//! What client and server agreed on for one Network Connection.

use std::num::{NonZeroU16, NonZeroU32};
use std::sync::Arc;

use hashbrown::HashMap;

use crate::codec::{Connect, Qos, Version};

/// What this server allows any client. Ranges and defaults as in the configuration's `[limits]`.
#[derive(Debug, Clone)]
pub struct ServerLimits {
    /// Bytes of a packet from the client.
    pub packet_bytes_max: u32,
    /// QoS 1 and 2 messages a client may have unacknowledged towards us.
    pub receive_maximum: u16,
    /// The same towards a client that names no Receive Maximum.
    pub inflight_max: u16,
    /// Topic Aliases, in each direction.
    pub topic_alias_maximum: u16,
    /// Bytes of the Topic Names that have aliases, for one Network Connection and direction.
    pub topic_alias_bytes_max: usize,
    /// Highest QoS a client may publish with.
    pub maximum_qos: Qos,
    /// Whether retained messages are supported.
    pub retain_available: bool,
    /// Seconds; 0: as the client asks. 3.x clients are not told.
    pub keep_alive_max: u16,
    /// Seconds.
    pub session_expiry_max: u32,
    /// Messages in one Session's queue.
    pub queue_messages_max: usize,
    /// Bytes in one Session's queue.
    pub queue_bytes_max: usize,
    /// Bytes of messages that were sent to one client and that it has not acknowledged; one message may go beyond.
    pub inflight_bytes_max: usize,
    /// Bytes waiting to be written to one client.
    pub outbound_bytes_max: usize,
}

/// The numbers both sides agreed on at CONNECT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkLimits {
    /// QoS 1 and 2 messages we may have unacknowledged towards the client. [MQTT-3.3.4-9]
    pub receive_maximum: u16,
    /// Largest packet the client takes, in bytes; `u32::MAX` if it did not say. [MQTT-3.1.2-24]
    pub packet_bytes_max: u32,
    /// Topic Aliases we may use towards the client. [MQTT-3.1.2-26]
    pub topic_alias_maximum: u16,
    /// Keep Alive in force, in seconds; 0 is off. [MQTT-3.2.2-21]
    pub keep_alive: u16,
    /// Session Expiry Interval in force, in seconds.
    pub session_expiry: u32,
}

/// State that lives as long as the Network Connection.
#[derive(Debug)]
pub struct Link {
    /// Protocol version.
    pub version: Version,
    /// The agreed numbers.
    pub limits: LinkLimits,
    /// The client is a bridge that says so in its Protocol Level: what it published does not come back to it.
    pub bridge: bool,
    /// Reason Strings and User Properties may be sent on any packet. [MQTT-3.1.2-29]
    pub problem_information: bool,
    /// Topics the client gave aliases to; index is alias - 1.
    pub(super) aliases_in: Vec<Option<Arc<str>>>,
    /// Aliases we gave.
    pub(super) aliases_out: HashMap<Box<str>, NonZeroU16, foldhash::fast::RandomState>,
    /// Bytes of the topics in `aliases_in`, of those in `aliases_out`, and the most that each may come to.
    pub(super) alias_bytes_in: usize,
    pub(super) alias_bytes_out: usize,
    pub(super) alias_bytes_max: usize,
}

impl Link {
    /// What comes of a CONNECT under the server's limits.
    pub fn negotiate(connect: &Connect<'_>, server: &ServerLimits) -> Self {
        let never = server.session_expiry_max;
        let session_expiry = match connect.version {
            Version::V5 => connect.session_expiry.unwrap_or(0).min(never),
            Version::V31 | Version::V311 if connect.clean_start => 0,
            Version::V31 | Version::V311 => never,
        };
        let keep_alive = match (connect.keep_alive, server.keep_alive_max) {
            (asked, 0) => asked,
            (0, max) => max,
            (asked, max) => asked.min(max),
        };
        let limits = LinkLimits {
            receive_maximum: connect.receive_maximum.map_or(server.inflight_max, NonZeroU16::get),
            packet_bytes_max: connect.maximum_packet_size.map_or(u32::MAX, NonZeroU32::get),
            topic_alias_maximum: connect.topic_alias_maximum.unwrap_or(0).min(server.topic_alias_maximum),
            // 3.x has no Server Keep Alive, so the client goes by the time it asked for; the server may end a connection
            // that is silent for longer than it likes at any time. MQTT 3.1.1 §3.1.2.10
            keep_alive,
            session_expiry,
        };
        Self {
            version: connect.version,
            bridge: connect.bridge,
            limits,
            problem_information: connect.request_problem_information.unwrap_or(true),
            aliases_in: Vec::new(),
            aliases_out: HashMap::default(),
            alias_bytes_in: 0,
            alias_bytes_out: 0,
            alias_bytes_max: server.topic_alias_bytes_max,
        }
    }

    /// Milliseconds without a packet after which the client counts as gone; `None`: never. [MQTT-3.1.2-22]
    pub fn keep_alive_ms(&self) -> Option<u64> {
        (self.limits.keep_alive > 0).then(|| u64::from(self.limits.keep_alive) * 1500)
    }
}
