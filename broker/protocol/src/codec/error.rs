//! What can be wrong with bytes from a peer.

use super::ReasonCode;

/// Why bytes are not a packet we take. The Network Connection ends. MQTT 5.0 §4.13.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// Cannot be parsed according to the standard.
    #[error("malformed packet: {0}")]
    Malformed(&'static str),
    /// Can be parsed, but says what this packet must not say.
    #[error("protocol error: {0}")]
    Protocol(&'static str),
    /// The peer announced more than [`super::Limits::packet_bytes_max`]; the body was not read.
    #[error("packet of {announced} bytes exceeds the limit of {limit}")]
    PacketTooLarge {
        /// Bytes of the whole packet.
        announced: u32,
        /// Bytes of the whole packet.
        limit: u32,
    },
    /// CONNECT with a Protocol Level that is not ours. [MQTT-3.1.2-2]
    #[error("protocol level {level} is not supported")]
    UnsupportedVersion {
        /// As in CONNECT.
        level: u8,
    },
    /// A wildcard or the null character in a Topic Name. [MQTT-3.3.2-2] [MQTT-4.7.3-2]
    #[error("topic name is not valid")]
    TopicNameInvalid,
    /// Topic Alias 0. [MQTT-3.3.2-8]
    #[error("topic alias 0 is not valid")]
    TopicAliasInvalid,
}

impl DecodeError {
    /// What CONNACK or DISCONNECT tells a 5.0 peer. MQTT 5.0 §4.13.
    pub const fn reason_code(&self) -> ReasonCode {
        match self {
            Self::Malformed(_) => ReasonCode::MALFORMED_PACKET,
            Self::Protocol(_) => ReasonCode::PROTOCOL_ERROR,
            Self::PacketTooLarge { .. } => ReasonCode::PACKET_TOO_LARGE,
            Self::UnsupportedVersion { .. } => ReasonCode::UNSUPPORTED_PROTOCOL_VERSION,
            Self::TopicNameInvalid => ReasonCode::TOPIC_NAME_INVALID,
            Self::TopicAliasInvalid => ReasonCode::TOPIC_ALIAS_INVALID,
        }
    }
}
