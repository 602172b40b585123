//! Reason Codes. MQTT 5.0 §2.4.

/// What a packet says about the outcome; 0x80 and above is failure.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct ReasonCode(pub u8);

macro_rules! reason_codes {
    ($($value:literal $name:ident $text:literal)*) => {
        #[allow(missing_docs, reason = "named as in the standard")]
        impl ReasonCode { $(pub const $name: Self = Self($value);)* }
        impl ReasonCode {
            /// The name the standard gives it.
            pub const fn name(self) -> &'static str {
                match self.0 { $($value => $text,)* _ => "unknown" }
            }
        }
    };
}

reason_codes! {
    0x00 SUCCESS "Success"
    0x01 GRANTED_QOS_1 "Granted QoS 1"
    0x02 GRANTED_QOS_2 "Granted QoS 2"
    0x04 DISCONNECT_WITH_WILL "Disconnect with Will Message"
    0x10 NO_MATCHING_SUBSCRIBERS "No matching subscribers"
    0x11 NO_SUBSCRIPTION_EXISTED "No subscription existed"
    0x18 CONTINUE_AUTHENTICATION "Continue authentication"
    0x19 REAUTHENTICATE "Re-authenticate"
    0x80 UNSPECIFIED_ERROR "Unspecified error"
    0x81 MALFORMED_PACKET "Malformed Packet"
    0x82 PROTOCOL_ERROR "Protocol Error"
    0x83 IMPLEMENTATION_SPECIFIC_ERROR "Implementation specific error"
    0x84 UNSUPPORTED_PROTOCOL_VERSION "Unsupported Protocol Version"
    0x85 CLIENT_IDENTIFIER_NOT_VALID "Client Identifier not valid"
    0x86 BAD_USER_NAME_OR_PASSWORD "Bad User Name or Password"
    0x87 NOT_AUTHORIZED "Not authorized"
    0x88 SERVER_UNAVAILABLE "Server unavailable"
    0x89 SERVER_BUSY "Server busy"
    0x8A BANNED "Banned"
    0x8B SERVER_SHUTTING_DOWN "Server shutting down"
    0x8C BAD_AUTHENTICATION_METHOD "Bad authentication method"
    0x8D KEEP_ALIVE_TIMEOUT "Keep Alive timeout"
    0x8E SESSION_TAKEN_OVER "Session taken over"
    0x8F TOPIC_FILTER_INVALID "Topic Filter invalid"
    0x90 TOPIC_NAME_INVALID "Topic Name invalid"
    0x91 PACKET_IDENTIFIER_IN_USE "Packet Identifier in use"
    0x92 PACKET_IDENTIFIER_NOT_FOUND "Packet Identifier not found"
    0x93 RECEIVE_MAXIMUM_EXCEEDED "Receive Maximum exceeded"
    0x94 TOPIC_ALIAS_INVALID "Topic Alias invalid"
    0x95 PACKET_TOO_LARGE "Packet too large"
    0x96 MESSAGE_RATE_TOO_HIGH "Message rate too high"
    0x97 QUOTA_EXCEEDED "Quota exceeded"
    0x98 ADMINISTRATIVE_ACTION "Administrative action"
    0x99 PAYLOAD_FORMAT_INVALID "Payload format invalid"
    0x9A RETAIN_NOT_SUPPORTED "Retain not supported"
    0x9B QOS_NOT_SUPPORTED "QoS not supported"
    0x9C USE_ANOTHER_SERVER "Use another server"
    0x9D SERVER_MOVED "Server moved"
    0x9E SHARED_SUBSCRIPTIONS_NOT_SUPPORTED "Shared Subscriptions not supported"
    0x9F CONNECTION_RATE_EXCEEDED "Connection rate exceeded"
    0xA0 MAXIMUM_CONNECT_TIME "Maximum connect time"
    0xA1 SUBSCRIPTION_IDENTIFIERS_NOT_SUPPORTED "Subscription Identifiers not supported"
    0xA2 WILDCARD_SUBSCRIPTIONS_NOT_SUPPORTED "Wildcard Subscriptions not supported"
}

impl ReasonCode {
    /// A client may say it in DISCONNECT; the others are a server's. MQTT 5.0 §3.14.2.1, table 3-10.
    pub const fn may_client_disconnect_with(self) -> bool {
        matches!(self.0, 0x00 | 0x04 | 0x80..=0x83 | 0x90 | 0x93..=0x99)
    }

    /// This code if CONNACK may carry it, and Not authorized otherwise. MQTT 5.0 §3.2.2.2, table 3-1.
    #[must_use]
    pub const fn for_connack(self) -> Self {
        let fits = matches!(self.0, 0x00 | 0x80..=0x8A | 0x8C | 0x90 | 0x95 | 0x97 | 0x99..=0x9D | 0x9F);
        if fits { self } else { Self::NOT_AUTHORIZED }
    }

    /// This code if PUBACK and PUBREC may carry it, and Not authorized otherwise. MQTT 5.0 §3.4.2.1 and §3.5.2.1.
    #[must_use]
    pub const fn for_puback(self) -> Self {
        let fits = matches!(self.0, 0x00 | 0x10 | 0x80 | 0x83 | 0x87 | 0x90 | 0x91 | 0x97 | 0x99);
        if fits { self } else { Self::NOT_AUTHORIZED }
    }

    /// This code if SUBACK may carry it, and Not authorized otherwise. MQTT 5.0 §3.9.3, table 3-8.
    #[must_use]
    pub const fn for_suback(self) -> Self {
        let fits = matches!(self.0, 0x00..=0x02 | 0x80 | 0x83 | 0x87 | 0x8F | 0x91 | 0x97 | 0x9E | 0xA1 | 0xA2);
        if fits { self } else { Self::NOT_AUTHORIZED }
    }

    /// This code if a server may send it in DISCONNECT, and Administrative action otherwise. MQTT 5.0 §3.14.2.1, table
    /// 3-10.
    #[must_use]
    pub const fn for_disconnect(self) -> Self {
        let fits = matches!(self.0, 0x80..=0x83 | 0x87 | 0x89 | 0x8B | 0x8D..=0x90 | 0x93..=0xA2);
        if fits { self } else { Self::ADMINISTRATIVE_ACTION }
    }

    /// 0x80 and above.
    pub const fn is_error(self) -> bool {
        self.0 >= 0x80
    }

    /// The CONNACK return code a 3.1 or 3.1.1 client gets instead; `None`: close without CONNACK. MQTT 3.1.1 §3.2.2.3.
    pub const fn connect_return_code(self) -> Option<u8> {
        match self {
            Self::SUCCESS => Some(0),
            Self::UNSUPPORTED_PROTOCOL_VERSION => Some(1),
            Self::CLIENT_IDENTIFIER_NOT_VALID => Some(2),
            Self::SERVER_UNAVAILABLE | Self::SERVER_BUSY | Self::QUOTA_EXCEEDED => Some(3),
            Self::BAD_USER_NAME_OR_PASSWORD => Some(4),
            Self::NOT_AUTHORIZED | Self::BANNED | Self::BAD_AUTHENTICATION_METHOD => Some(5),
            _ => None,
        }
    }
}

impl std::fmt::Debug for ReasonCode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "0x{:02X} {}", self.0, self.name())
    }
}
