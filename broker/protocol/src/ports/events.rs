//! What happens in the broker, for plugins that watch.

use std::sync::Arc;

use super::Client;

/// Kinds of events. Plugins know them by [`EventKind::name`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EventKind {
    /// A client got its CONNACK.
    ClientConnected,
    /// The Network Connection of a client ended.
    ClientDisconnected,
    /// A client was not let in.
    ClientRefused,
    /// A Session ended.
    SessionEnded,
    /// A subscription was made or replaced.
    Subscribed,
    /// A subscription was ended.
    Unsubscribed,
    /// Publishing or subscribing was denied.
    AccessDenied,
    /// A message for a client was dropped: too large for it, expired, its queue is full, or it is slow and the message
    /// has QoS 0.
    MessageDropped,
}

impl EventKind {
    /// All there are.
    pub const ALL: [Self; 8] = [
        Self::ClientConnected,
        Self::ClientDisconnected,
        Self::ClientRefused,
        Self::SessionEnded,
        Self::Subscribed,
        Self::Unsubscribed,
        Self::AccessDenied,
        Self::MessageDropped,
    ];

    /// Its place in a set.
    pub fn bit(self) -> u32 {
        1 << self as u32
    }

    /// As plugins and logs know it.
    pub fn name(self) -> &'static str {
        match self {
            Self::ClientConnected => "client-connected",
            Self::ClientDisconnected => "client-disconnected",
            Self::ClientRefused => "client-refused",
            Self::SessionEnded => "session-ended",
            Self::Subscribed => "subscribed",
            Self::Unsubscribed => "unsubscribed",
            Self::AccessDenied => "access-denied",
            Self::MessageDropped => "message-dropped",
        }
    }
}

/// Something that happened.
#[derive(Debug, Clone)]
pub struct Event {
    /// What.
    pub kind: EventKind,
    /// Milliseconds since 1970.
    pub at_ms: u64,
    /// Whose client.
    pub client: Arc<Client>,
    /// More, by name: `reason`, `filter`, `topic`, `address` …
    pub fields: Vec<(&'static str, String)>,
}
