//! The packet types, borrowed from the bytes they were decoded from.

use std::fmt;
use std::num::{NonZeroU16, NonZeroU32};

use super::{PublishProperties, ReasonCode, UserProperties};
use crate::text::Secret;

/// Identifies a packet in flight; 1..=65 535 per Session and direction. MQTT 5.0 §2.2.1.
pub type PacketId = NonZeroU16;

/// Protocol version of a Network Connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Version {
    /// MQTT 3.1 (`MQIsdp`, level 3).
    V31,
    /// MQTT 3.1.1 (level 4).
    V311,
    /// MQTT 5.0 (level 5).
    V5,
}

impl Version {
    /// As the standard is called.
    pub fn name(self) -> &'static str {
        match self {
            Self::V31 => "3.1",
            Self::V311 => "3.1.1",
            Self::V5 => "5.0",
        }
    }
}

/// Quality of Service. MQTT 5.0 §4.3.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
#[repr(u8)]
pub enum Qos {
    /// 0
    #[default]
    AtMostOnce = 0,
    /// 1
    AtLeastOnce = 1,
    /// 2
    ExactlyOnce = 2,
}

impl Qos {
    /// `None` for 3, which no packet may carry. [MQTT-3.3.1-4]
    pub const fn from_bits(bits: u8) -> Option<Self> {
        match bits {
            0 => Some(Self::AtMostOnce),
            1 => Some(Self::AtLeastOnce),
            2 => Some(Self::ExactlyOnce),
            _ => None,
        }
    }
}

/// Any packet, either direction.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "named as in the standard")]
pub enum Packet<'a> {
    Connect(Box<Connect<'a>>),
    Connack(Box<Connack<'a>>),
    Publish(Publish<'a>),
    Puback(Ack<'a>),
    Pubrec(Ack<'a>),
    Pubrel(Ack<'a>),
    Pubcomp(Ack<'a>),
    Subscribe(Subscribe<'a>),
    Suback(Suback<'a>),
    Unsubscribe(Unsubscribe<'a>),
    Unsuback(Suback<'a>),
    Pingreq,
    Pingresp,
    Disconnect(Disconnect<'a>),
    Auth(Auth<'a>),
}

/// MQTT 5.0 §3.1.
#[derive(Clone, PartialEq)]
pub struct Connect<'a> {
    /// Version the client speaks.
    pub version: Version,
    /// The client is a bridge to another broker, and says so in the highest bit of the Protocol Level, which is no part
    /// of the standard: its own messages must not come back to it, and RETAIN is forwarded as it was published. 3.x.
    pub bridge: bool,
    /// 3.1.1: Clean Session.
    pub clean_start: bool,
    /// Seconds; 0 switches Keep Alive off.
    pub keep_alive: u16,
    /// May be empty.
    pub client_id: &'a str,
    /// The Will Message, if the Will Flag is set.
    pub will: Option<Will<'a>>,
    /// User Name.
    pub username: Option<&'a str>,
    /// Password.
    pub password: Option<&'a [u8]>,
    /// Seconds; `0xFFFF_FFFF` never expires. Absent is 0.
    pub session_expiry: Option<u32>,
    /// Packets; absent is 65 535.
    pub receive_maximum: Option<NonZeroU16>,
    /// Bytes.
    pub maximum_packet_size: Option<NonZeroU32>,
    /// Absent is 0.
    pub topic_alias_maximum: Option<u16>,
    /// Absent is false.
    pub request_response_information: Option<bool>,
    /// Absent is true.
    pub request_problem_information: Option<bool>,
    /// User Properties.
    pub user_properties: UserProperties<'a>,
    /// Authentication Method.
    pub authentication_method: Option<&'a str>,
    /// Authentication Data.
    pub authentication_data: Option<&'a [u8]>,
}

impl fmt::Debug for Connect<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Connect")
            .field("version", &self.version)
            .field("bridge", &self.bridge)
            .field("clean_start", &self.clean_start)
            .field("keep_alive", &self.keep_alive)
            .field("client_id", &self.client_id)
            .field("will", &self.will)
            .field("username", &self.username)
            .field("password", &Secret::of(self.password))
            .field("session_expiry", &self.session_expiry)
            .field("receive_maximum", &self.receive_maximum)
            .field("maximum_packet_size", &self.maximum_packet_size)
            .field("topic_alias_maximum", &self.topic_alias_maximum)
            .field("request_response_information", &self.request_response_information)
            .field("request_problem_information", &self.request_problem_information)
            .field("authentication_method", &self.authentication_method)
            .field("authentication_data", &Secret::of(self.authentication_data))
            // User Properties may be where a client has its token.
            .finish_non_exhaustive()
    }
}

/// The will inside CONNECT. MQTT 5.0 §3.1.3.2. `properties` holds what is published with it.
#[derive(Debug, Clone, PartialEq)]
pub struct Will<'a> {
    /// Will QoS.
    pub qos: Qos,
    /// Will Retain.
    pub retain: bool,
    /// Will Topic.
    pub topic: &'a str,
    /// Will Payload.
    pub payload: &'a [u8],
    /// Seconds; absent is 0.
    pub delay: Option<u32>,
    /// As in PUBLISH (never a Topic Alias or Subscription Identifier).
    pub properties: PublishProperties<'a>,
}

/// MQTT 5.0 §3.2. For 3.x `reason` is written as the return code it already is (0..=5).
#[derive(Debug, Clone, PartialEq, Default)]
#[allow(missing_docs, reason = "named as in the standard")]
pub struct Connack<'a> {
    pub session_present: bool,
    pub reason: ReasonCode,
    pub session_expiry: Option<u32>,
    pub receive_maximum: Option<NonZeroU16>,
    pub maximum_qos: Option<u8>,
    pub retain_available: Option<bool>,
    pub maximum_packet_size: Option<NonZeroU32>,
    pub assigned_client_id: Option<&'a str>,
    pub topic_alias_maximum: Option<u16>,
    pub reason_string: Option<&'a str>,
    pub user_properties: UserProperties<'a>,
    pub wildcard_subscription_available: Option<bool>,
    pub subscription_ids_available: Option<bool>,
    pub shared_subscription_available: Option<bool>,
    pub server_keep_alive: Option<u16>,
    pub response_information: Option<&'a str>,
    pub server_reference: Option<&'a str>,
    pub authentication_method: Option<&'a str>,
    pub authentication_data: Option<&'a [u8]>,
}

/// MQTT 5.0 §3.3.
#[derive(Debug, Clone, PartialEq)]
pub struct Publish<'a> {
    /// DUP flag.
    pub dup: bool,
    /// QoS level.
    pub qos: Qos,
    /// RETAIN flag.
    pub retain: bool,
    /// Valid Topic Name (no wildcard); empty only in 5.0 with a Topic Alias.
    pub topic: &'a str,
    /// Present exactly if QoS > 0.
    pub packet_id: Option<PacketId>,
    /// Properties; all empty for 3.x.
    pub properties: PublishProperties<'a>,
    /// Application Message.
    pub payload: &'a [u8],
}

/// PUBACK, PUBREC, PUBREL, PUBCOMP. MQTT 5.0 §3.4 to §3.7.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "named as in the standard")]
pub struct Ack<'a> {
    pub packet_id: PacketId,
    pub reason: ReasonCode,
    pub reason_string: Option<&'a str>,
    pub user_properties: UserProperties<'a>,
}

/// MQTT 5.0 §3.8.
#[derive(Debug, Clone, PartialEq)]
pub struct Subscribe<'a> {
    /// Packet Identifier.
    pub packet_id: PacketId,
    /// 1..=268 435 455.
    pub subscription_id: Option<NonZeroU32>,
    /// User Properties.
    pub user_properties: UserProperties<'a>,
    /// At least one. The filter text is UTF-8 without NUL, its wildcards are not yet checked.
    pub filters: Vec<(&'a str, SubscribeOptions)>,
}

/// Subscription Options. MQTT 5.0 §3.8.3.1. 3.x has the QoS alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SubscribeOptions {
    /// Maximum QoS.
    pub qos: Qos,
    /// No Local.
    pub no_local: bool,
    /// Retain As Published.
    pub retain_as_published: bool,
    /// Retain Handling.
    pub retain_handling: RetainHandling,
}

/// When retained messages are sent at SUBSCRIBE.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u8)]
pub enum RetainHandling {
    /// 0: always.
    #[default]
    Send = 0,
    /// 1: only if the subscription is new.
    SendIfNew = 1,
    /// 2: never.
    DoNotSend = 2,
}

/// SUBACK and UNSUBACK. 3.x UNSUBACK carries no reasons.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "named as in the standard")]
pub struct Suback<'a> {
    pub packet_id: PacketId,
    pub reasons: Vec<ReasonCode>,
    pub reason_string: Option<&'a str>,
    pub user_properties: UserProperties<'a>,
}

/// MQTT 5.0 §3.10.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "named as in the standard")]
pub struct Unsubscribe<'a> {
    pub packet_id: PacketId,
    pub user_properties: UserProperties<'a>,
    pub filters: Vec<&'a str>,
}

/// MQTT 5.0 §3.14.
#[derive(Debug, Clone, PartialEq, Default)]
#[allow(missing_docs, reason = "named as in the standard")]
pub struct Disconnect<'a> {
    pub reason: ReasonCode,
    pub session_expiry: Option<u32>,
    pub reason_string: Option<&'a str>,
    pub user_properties: UserProperties<'a>,
    pub server_reference: Option<&'a str>,
}

/// MQTT 5.0 §3.15.
#[derive(Clone, PartialEq, Default)]
#[allow(missing_docs, reason = "named as in the standard")]
pub struct Auth<'a> {
    pub reason: ReasonCode,
    pub authentication_method: Option<&'a str>,
    pub authentication_data: Option<&'a [u8]>,
    pub reason_string: Option<&'a str>,
    pub user_properties: UserProperties<'a>,
}

impl fmt::Debug for Auth<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Auth")
            .field("reason", &self.reason)
            .field("authentication_method", &self.authentication_method)
            .field("authentication_data", &Secret::of(self.authentication_data))
            .field("reason_string", &self.reason_string)
            .finish_non_exhaustive()
    }
}
