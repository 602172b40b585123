use std::num::{NonZeroU16, NonZeroU32};

use wasmqtt_protocol::codec::{
    self, Connect, Packet, PacketId, Publish, PublishProperties, PublishPropertiesBuilder, Qos, UserProperties, Version,
};

/// An Application Message in a PUBLISH, in either direction. `id` 0: none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Message {
    pub topic: String,
    pub payload: Vec<u8>,
    pub qos: u8,
    pub retain: bool,
    pub dup: bool,
    pub id: u16,
    pub alias: Option<u16>,
    pub expiry: Option<u32>,
    pub payload_format: Option<bool>,
    pub content_type: Option<String>,
    pub response_topic: Option<String>,
    pub correlation_data: Option<Vec<u8>>,
    pub user: Vec<(String, String)>,
    pub subscription_ids: Vec<u32>,
}

impl Message {
    pub fn new(topic: &str, payload: impl AsRef<[u8]>) -> Self {
        Self { topic: topic.into(), payload: payload.as_ref().into(), ..Self::default() }
    }

    #[must_use]
    pub fn qos(self, qos: u8) -> Self {
        Self { qos, ..self }
    }

    #[must_use]
    pub fn retained(self) -> Self {
        Self { retain: true, ..self }
    }

    #[must_use]
    pub fn id(self, id: u16) -> Self {
        Self { id, ..self }
    }

    #[must_use]
    pub fn dup(self) -> Self {
        Self { dup: true, ..self }
    }

    #[must_use]
    pub fn alias(self, alias: u16) -> Self {
        Self { alias: Some(alias), ..self }
    }

    #[must_use]
    pub fn expiry(self, seconds: u32) -> Self {
        Self { expiry: Some(seconds), ..self }
    }

    #[must_use]
    pub fn user(mut self, name: &str, value: &str) -> Self {
        self.user.push((name.into(), value.into()));
        self
    }

    /// The payload as text.
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.payload).expect("a payload of text")
    }

    fn block(&self) -> Vec<u8> {
        let mut block = PublishPropertiesBuilder::default();
        if let Some(is_utf8) = self.payload_format {
            block = block.payload_format(is_utf8);
        }
        if let Some(content_type) = &self.content_type {
            block = block.content_type(content_type);
        }
        if let Some(topic) = &self.response_topic {
            block = block.response_topic(topic);
        }
        if let Some(data) = &self.correlation_data {
            block = block.correlation_data(data);
        }
        for (name, value) in &self.user {
            block = block.user(name, value);
        }
        block.build()
    }

    pub(crate) fn encode(&self, version: Version) -> Vec<u8> {
        let block = self.block();
        let mut properties = PublishProperties::from_forwardable(&block, self.expiry);
        properties.topic_alias = self.alias.and_then(NonZeroU16::new);
        let publish = Publish {
            dup: self.dup,
            qos: qos(self.qos),
            retain: self.retain,
            topic: &self.topic,
            packet_id: PacketId::new(self.id),
            properties,
            payload: &self.payload,
        };
        encode(version, &Packet::Publish(publish))
    }

    fn of(publish: &Publish<'_>) -> Self {
        let properties = &publish.properties;
        Self {
            topic: publish.topic.into(),
            payload: publish.payload.into(),
            qos: publish.qos as u8,
            retain: publish.retain,
            dup: publish.dup,
            id: publish.packet_id.map_or(0, PacketId::get),
            alias: properties.topic_alias.map(NonZeroU16::get),
            expiry: properties.message_expiry,
            payload_format: properties.payload_format(),
            content_type: properties.content_type().map(Into::into),
            response_topic: properties.response_topic().map(Into::into),
            correlation_data: properties.correlation_data().map(Into::into),
            user: pairs(&properties.user_properties()),
            subscription_ids: properties.subscription_ids().map(NonZeroU32::get).collect(),
        }
    }
}

/// The will inside a CONNECT.
#[derive(Debug, Clone, Default)]
pub struct Will {
    pub message: Message,
    pub delay: Option<u32>,
}

/// What a CONNECT says.
#[derive(Debug, Clone)]
pub struct Options {
    pub version: Version,
    /// As mosquitto says it: the highest bit of the Protocol Level.
    pub bridge: bool,
    pub client_id: String,
    pub clean: bool,
    pub keep_alive: u16,
    pub will: Option<Will>,
    pub username: Option<String>,
    pub password: Option<Vec<u8>>,
    pub session_expiry: Option<u32>,
    pub receive_maximum: Option<u16>,
    pub maximum_packet_size: Option<u32>,
    pub topic_alias_maximum: Option<u16>,
    pub request_response_information: Option<bool>,
    pub request_problem_information: Option<bool>,
    pub authentication_method: Option<String>,
    pub authentication_data: Option<Vec<u8>>,
}

impl Options {
    /// A clean start with Keep Alive 60.
    pub fn new(version: Version, client_id: &str) -> Self {
        Self {
            version,
            bridge: false,
            client_id: client_id.into(),
            clean: true,
            keep_alive: 60,
            will: None,
            username: None,
            password: None,
            session_expiry: None,
            receive_maximum: None,
            maximum_packet_size: None,
            topic_alias_maximum: None,
            request_response_information: None,
            request_problem_information: None,
            authentication_method: None,
            authentication_data: None,
        }
    }

    /// Goes on with the Session that is there and keeps it: for an hour in 5.0.
    #[must_use]
    pub fn resume(self) -> Self {
        Self { clean: false, session_expiry: Some(3600), ..self }
    }

    /// With this User Name, and a password nobody looks at.
    #[must_use]
    pub fn named(self, username: &str) -> Self {
        Self { username: Some(username.into()), password: Some(b"secret".into()), ..self }
    }

    /// 5.0 only.
    #[must_use]
    pub fn session_expiry(self, seconds: u32) -> Self {
        Self { session_expiry: Some(seconds), ..self }
    }

    #[must_use]
    pub fn unclean(self) -> Self {
        Self { clean: false, ..self }
    }

    #[must_use]
    pub fn keep_alive(self, seconds: u16) -> Self {
        Self { keep_alive: seconds, ..self }
    }

    #[must_use]
    pub fn will(self, message: Message) -> Self {
        Self { will: Some(Will { message, delay: None }), ..self }
    }

    #[must_use]
    pub fn will_delay(mut self, seconds: u32) -> Self {
        if let Some(will) = &mut self.will {
            will.delay = Some(seconds);
        }
        self
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let block = self.will.as_ref().map(|will| will.message.block()).unwrap_or_default();
        let connect = Connect {
            version: self.version,
            bridge: self.bridge,
            clean_start: self.clean,
            keep_alive: self.keep_alive,
            client_id: &self.client_id,
            will: self.will.as_ref().map(|will| codec::Will {
                qos: qos(will.message.qos),
                retain: will.message.retain,
                topic: &will.message.topic,
                payload: &will.message.payload,
                delay: will.delay,
                properties: PublishProperties::from_forwardable(&block, will.message.expiry),
            }),
            username: self.username.as_deref(),
            password: self.password.as_deref(),
            session_expiry: self.session_expiry,
            receive_maximum: self.receive_maximum.and_then(NonZeroU16::new),
            maximum_packet_size: self.maximum_packet_size.and_then(NonZeroU32::new),
            topic_alias_maximum: self.topic_alias_maximum,
            request_response_information: self.request_response_information,
            request_problem_information: self.request_problem_information,
            user_properties: UserProperties::default(),
            authentication_method: self.authentication_method.as_deref(),
            authentication_data: self.authentication_data.as_deref(),
        };
        encode(self.version, &Packet::Connect(Box::new(connect)))
    }
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Connack {
    pub session_present: bool,
    pub reason: u8,
    pub session_expiry: Option<u32>,
    pub receive_maximum: Option<u16>,
    pub maximum_qos: Option<u8>,
    pub retain_available: Option<bool>,
    pub maximum_packet_size: Option<u32>,
    pub assigned_client_id: Option<String>,
    pub topic_alias_maximum: Option<u16>,
    pub server_keep_alive: Option<u16>,
    pub response_information: Option<String>,
    pub reason_string: Option<String>,
    pub authentication_method: Option<String>,
    pub user: Vec<(String, String)>,
}

/// What a client sees: a packet, or the end of the Network Connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Got {
    Connack(Connack),
    Publish(Message),
    /// Packet Identifier and Reason Code; the same for the next three.
    Puback(u16, u8),
    Pubrec(u16, u8),
    Pubrel(u16, u8),
    Pubcomp(u16, u8),
    /// Packet Identifier and Reason Codes.
    Suback(u16, Vec<u8>),
    Unsuback(u16, Vec<u8>),
    Pingresp,
    /// Reason Code and Reason String.
    Disconnect(u8, Option<String>),
    /// Reason Code, Authentication Method and Data.
    Auth(u8, Option<String>, Option<Vec<u8>>),
    Closed,
}

impl Got {
    pub(crate) fn decode(version: Version, bytes: &[u8]) -> Self {
        let packet = codec::decode(version, bytes)
            .unwrap_or_else(|error| panic!("the broker sent what is not a packet: {error}: {bytes:02x?}"));
        match packet {
            Packet::Connack(connack) => Self::Connack(Connack {
                session_present: connack.session_present,
                reason: connack.reason.0,
                session_expiry: connack.session_expiry,
                receive_maximum: connack.receive_maximum.map(NonZeroU16::get),
                maximum_qos: connack.maximum_qos,
                retain_available: connack.retain_available,
                maximum_packet_size: connack.maximum_packet_size.map(NonZeroU32::get),
                assigned_client_id: connack.assigned_client_id.map(Into::into),
                topic_alias_maximum: connack.topic_alias_maximum,
                server_keep_alive: connack.server_keep_alive,
                response_information: connack.response_information.map(Into::into),
                reason_string: connack.reason_string.map(Into::into),
                authentication_method: connack.authentication_method.map(Into::into),
                user: pairs(&connack.user_properties),
            }),
            Packet::Publish(publish) => Self::Publish(Message::of(&publish)),
            Packet::Puback(ack) => Self::Puback(ack.packet_id.get(), ack.reason.0),
            Packet::Pubrec(ack) => Self::Pubrec(ack.packet_id.get(), ack.reason.0),
            Packet::Pubrel(ack) => Self::Pubrel(ack.packet_id.get(), ack.reason.0),
            Packet::Pubcomp(ack) => Self::Pubcomp(ack.packet_id.get(), ack.reason.0),
            Packet::Suback(ack) => Self::Suback(ack.packet_id.get(), ack.reasons.iter().map(|code| code.0).collect()),
            Packet::Unsuback(ack) => {
                Self::Unsuback(ack.packet_id.get(), ack.reasons.iter().map(|code| code.0).collect())
            }
            Packet::Pingresp => Self::Pingresp,
            Packet::Disconnect(end) => {
                // [MQTT-3.14.2-2]
                assert_eq!(end.session_expiry, None, "a server does not say how long a Session lives here");
                Self::Disconnect(end.reason.0, end.reason_string.map(Into::into))
            }
            Packet::Auth(auth) => Self::Auth(
                auth.reason.0,
                auth.authentication_method.map(Into::into),
                auth.authentication_data.map(Into::into),
            ),
            other => panic!("the broker sent what only clients send: {other:?}"),
        }
    }
}

pub(crate) fn encode(version: Version, packet: &Packet<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    codec::encode(version, packet, &mut bytes);
    bytes
}

fn qos(qos: u8) -> Qos {
    Qos::from_bits(qos).expect("QoS")
}

fn pairs(properties: &UserProperties<'_>) -> Vec<(String, String)> {
    properties.iter().map(|(name, value)| (name.into(), value.into())).collect()
}
