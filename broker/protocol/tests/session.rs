//! The Session without sockets: packets in, bytes out, time moved by hand.

use std::num::{NonZeroU16, NonZeroU32};
use std::sync::Arc;

use bytes::Bytes;
use smallvec::SmallVec;
use wasmqtt_protocol::codec::{
    Ack, Auth, Connect, Disconnect, Limits, Packet, PacketId, Publish, PublishProperties, Qos, ReasonCode,
    UserProperties, Version, decode, encode, frame,
};
use wasmqtt_protocol::router::{Message, MessageId, SessionId, SessionKey, Subscription};
use wasmqtt_protocol::session::{
    Delivered, Event, Fault, FrameCache, Incoming, Kept, Link, Outbox, Parked, QueuePolicy, ServerLimits, Session,
    Step, Wish,
};
use wasmqtt_protocol::topic::Filter;

const VERSIONS: [Version; 3] = [Version::V31, Version::V311, Version::V5];

fn limits() -> ServerLimits {
    ServerLimits {
        packet_bytes_max: 1 << 20,
        receive_maximum: 4,
        inflight_max: 8,
        topic_alias_maximum: 4,
        topic_alias_bytes_max: 1000,
        maximum_qos: Qos::ExactlyOnce,
        retain_available: true,
        keep_alive_max: 0,
        session_expiry_max: 1000,
        queue_messages_max: 100,
        queue_bytes_max: 1 << 20,
        inflight_bytes_max: 1 << 20,
        outbound_bytes_max: 1 << 20,
    }
}

fn connect(version: Version) -> Connect<'static> {
    Connect {
        version,
        bridge: false,
        clean_start: false,
        keep_alive: 10,
        client_id: "c",
        will: None,
        username: None,
        password: None,
        session_expiry: Some(500),
        receive_maximum: None,
        maximum_packet_size: None,
        topic_alias_maximum: None,
        request_response_information: None,
        request_problem_information: None,
        user_properties: UserProperties::default(),
        authentication_method: None,
        authentication_data: None,
    }
}

/// A Session with a client on the other side.
struct Pair {
    session: Session,
    out: Outbox,
    limits: ServerLimits,
    now_ms: u64,
    version: Version,
}

/// What the client saw, in short: `PUBLISH 1 dup=false topic payload`.
type Seen = Vec<String>;

impl Pair {
    fn new(connect: &Connect<'_>) -> Self {
        let key = SessionKey { shard: 0, slot: 0, epoch: 0 };
        let mut pair = Self {
            session: Session::new(Arc::from("c"), key),
            out: Outbox::default(),
            limits: limits(),
            now_ms: 0,
            version: connect.version,
        };
        pair.connect(connect);
        pair
    }

    fn connect(&mut self, connect: &Connect<'_>) {
        self.out = Outbox::default();
        let link = Link::negotiate(connect, &self.limits);
        self.session.connected(self.now_ms, link, &self.limits, &mut self.out);
    }

    fn packet(&mut self, packet: Packet<'static>) -> Result<String, Fault> {
        let event = self.session.handle_packet(self.now_ms, packet, &self.limits, &mut self.out)?;
        Ok(match event {
            Event::Publish { publish, aliased } => {
                let topic = aliased.as_deref().unwrap_or(publish.topic).to_owned();
                self.session.published(publish.qos, publish.packet_id, ReasonCode::SUCCESS, &mut self.out);
                format!("route {topic}")
            }
            Event::Disconnect { will } => format!("disconnect will={will}"),
            Event::None => "none".into(),
            other => format!("{other:?}"),
        })
    }

    fn deliver(&mut self, topic: &str, payload: &[u8], qos: Qos) -> Delivered {
        self.deliver_with(topic, payload, qos, None, &[])
    }

    fn deliver_with(
        &mut self,
        topic: &str,
        payload: &[u8],
        qos: Qos,
        expires: Option<u64>,
        ids: &[NonZeroU32],
    ) -> Delivered {
        let incoming = Incoming::new(topic, payload, &[], (qos, false), expires, None);
        let wish = Wish { qos, retain: false, ids, id: None };
        let mut frames = FrameCache::default();
        frames.reset();
        let out = self.session.link().is_some().then_some(&mut self.out);
        self.session.deliver(self.now_ms, &incoming, wish, None, &mut frames, &self.limits, out)
    }

    fn seen(&mut self) -> Seen {
        let bytes = self.out.to_vec();
        self.out.consume(bytes.len());
        let mut rest = &bytes[..];
        let mut seen = Vec::new();
        while !rest.is_empty() {
            let found = frame(rest, &Limits { packet_bytes_max: u32::MAX }).expect("our own frame").expect("whole");
            let packet = decode(self.version, &rest[..found.total_len]).expect("our own packet");
            rest = &rest[found.total_len..];
            seen.push(describe(&packet));
        }
        seen
    }
}

fn describe(packet: &Packet<'_>) -> String {
    match packet {
        Packet::Publish(p) => {
            let id = p.packet_id.map_or(0, NonZeroU16::get);
            let alias = p.properties.topic_alias.map(|a| format!(" alias={a}")).unwrap_or_default();
            let expiry = p.properties.message_expiry.map(|e| format!(" expiry={e}")).unwrap_or_default();
            let dup = if p.dup { " dup" } else { "" };
            format!("PUBLISH {id} {}{dup}{alias}{expiry} {}", p.topic, String::from_utf8_lossy(p.payload))
        }
        Packet::Puback(a) => format!("PUBACK {} {:02X}", a.packet_id, a.reason.0),
        Packet::Pubrec(a) => format!("PUBREC {} {:02X}", a.packet_id, a.reason.0),
        Packet::Pubrel(a) => format!("PUBREL {} {:02X}", a.packet_id, a.reason.0),
        Packet::Pubcomp(a) => format!("PUBCOMP {} {:02X}", a.packet_id, a.reason.0),
        other => format!("{other:?}"),
    }
}

fn ack(id: u16) -> Ack<'static> {
    Ack {
        packet_id: PacketId::new(id).expect("not zero"),
        reason: ReasonCode::SUCCESS,
        reason_string: None,
        user_properties: UserProperties::default(),
    }
}

fn publish(topic: &'static str, qos: Qos, id: u16) -> Packet<'static> {
    Packet::Publish(Publish {
        dup: false,
        qos,
        retain: false,
        topic,
        packet_id: PacketId::new(id),
        properties: PublishProperties::default(),
        payload: b"p",
    })
}

/// QoS 1 towards the server. [MQTT-4.3.2-4] (5.0), [MQTT-4.3.2-2] (3.1.1).
#[test]
fn qos_1_publish_is_acknowledged_with_its_packet_identifier() {
    for version in VERSIONS {
        let mut pair = Pair::new(&connect(version));
        assert_eq!(pair.packet(publish("a", Qos::AtLeastOnce, 7)).unwrap(), "route a");
        assert_eq!(pair.seen(), ["PUBACK 7 00"]);
    }
}

/// QoS 2 towards the server, with the PUBLISH sent twice. [MQTT-4.3.3-10] (5.0), [MQTT-4.3.3-2] (3.1.1).
#[test]
fn qos_2_publish_is_routed_once_until_its_pubrel() {
    for version in VERSIONS {
        let mut pair = Pair::new(&connect(version));
        assert_eq!(pair.packet(publish("a", Qos::ExactlyOnce, 7)).unwrap(), "route a");
        assert_eq!(pair.packet(publish("a", Qos::ExactlyOnce, 7)).unwrap(), "none");
        pair.packet(Packet::Pubrel(ack(7))).unwrap();
        assert_eq!(pair.seen(), ["PUBREC 7 00", "PUBREC 7 00", "PUBCOMP 7 00"]);
        assert_eq!(pair.packet(publish("a", Qos::ExactlyOnce, 7)).unwrap(), "route a");
    }
}

/// The server remembers QoS 2 identifiers across Network Connections. [MQTT-4.1.0-1], §4.1 Session State.
#[test]
fn received_qos_2_identifiers_survive_a_reconnect() {
    for version in VERSIONS {
        let mut pair = Pair::new(&connect(version));
        pair.packet(publish("a", Qos::ExactlyOnce, 7)).unwrap();
        pair.session.disconnected();
        pair.connect(&connect(version));
        assert_eq!(pair.packet(publish("a", Qos::ExactlyOnce, 7)).unwrap(), "none");
        assert_eq!(pair.seen(), ["PUBREC 7 00"]);
    }
}

/// PUBREL for an identifier the server does not know. MQTT 5.0 §3.7.2.1.
#[test]
fn unknown_pubrel_is_completed_with_packet_identifier_not_found() {
    let mut pair = Pair::new(&connect(Version::V5));
    pair.packet(Packet::Pubrel(ack(9))).unwrap();
    assert_eq!(pair.seen(), ["PUBCOMP 9 92"]);
}

/// Both handshakes towards the client. [MQTT-4.3.2-1], [MQTT-4.3.3-1] ff.
#[test]
fn outgoing_messages_walk_through_their_handshakes() {
    for version in VERSIONS {
        let mut pair = Pair::new(&connect(version));
        assert_eq!(pair.deliver("a", b"0", Qos::AtMostOnce), Delivered::Sent);
        assert_eq!(pair.deliver("a", b"1", Qos::AtLeastOnce), Delivered::Sent);
        assert_eq!(pair.deliver("a", b"2", Qos::ExactlyOnce), Delivered::Sent);
        assert_eq!(pair.seen(), ["PUBLISH 0 a 0", "PUBLISH 1 a 1", "PUBLISH 2 a 2"]);
        pair.packet(Packet::Puback(ack(1))).unwrap();
        pair.packet(Packet::Pubrec(ack(2))).unwrap();
        assert_eq!(pair.seen(), ["PUBREL 2 00"]);
        pair.packet(Packet::Pubcomp(ack(2))).unwrap();
        assert_eq!(pair.seen(), [""; 0]);
    }
}

/// An acknowledgement of the wrong kind is a Protocol Error. MQTT 5.0 §4.3.
#[test]
fn acknowledgements_of_the_wrong_kind_end_the_connection() {
    let mut pair = Pair::new(&connect(Version::V5));
    pair.deliver("a", b"2", Qos::ExactlyOnce);
    pair.deliver("a", b"1", Qos::AtLeastOnce);
    for packet in [Packet::Puback(ack(1)), Packet::Pubcomp(ack(1)), Packet::Pubrec(ack(2))] {
        let fault = pair.packet(packet).unwrap_err();
        assert_eq!(fault.reason, ReasonCode::PROTOCOL_ERROR);
    }
}

/// What was not acknowledged is sent again with DUP and the same identifiers, in order; a message in its second half is
/// released again. [MQTT-4.4.0-1], [MQTT-4.6.0-1], [MQTT-3.3.1-1].
#[test]
fn unacknowledged_messages_are_sent_again_in_order_after_a_reconnect() {
    for version in VERSIONS {
        let mut pair = Pair::new(&connect(version));
        pair.deliver("a", b"1", Qos::AtLeastOnce);
        pair.deliver("a", b"2", Qos::ExactlyOnce);
        pair.deliver("a", b"3", Qos::ExactlyOnce);
        pair.packet(Packet::Pubrec(ack(2))).unwrap();
        pair.session.disconnected();
        assert_eq!(pair.deliver("a", b"4", Qos::AtLeastOnce), Delivered::Queued);
        pair.connect(&connect(version));
        assert_eq!(pair.seen(), ["PUBLISH 1 a dup 1", "PUBREL 2 00", "PUBLISH 3 a dup 3", "PUBLISH 4 a 4"]);
    }
}

/// Never more unacknowledged messages than the client's Receive Maximum; QoS 0 is not held back. [MQTT-3.3.4-9],
/// [MQTT-4.9.0-1] ff.
#[test]
fn receive_maximum_of_the_client_holds_messages_back() {
    let connect = Connect { receive_maximum: NonZeroU16::new(2), ..connect(Version::V5) };
    let mut pair = Pair::new(&connect);
    assert_eq!(pair.deliver("a", b"1", Qos::AtLeastOnce), Delivered::Sent);
    assert_eq!(pair.deliver("a", b"2", Qos::ExactlyOnce), Delivered::Sent);
    assert_eq!(pair.deliver("a", b"3", Qos::AtLeastOnce), Delivered::Queued);
    assert_eq!(pair.deliver("a", b"0", Qos::AtMostOnce), Delivered::Sent);
    pair.seen();
    pair.packet(Packet::Pubrec(ack(2))).unwrap();
    assert_eq!(pair.seen(), ["PUBREL 2 00"], "PUBREC does not give the place back");
    pair.packet(Packet::Puback(ack(1))).unwrap();
    assert_eq!(pair.seen(), ["PUBLISH 3 a 3"]);
    pair.session.disconnected();
    pair.connect(&connect);
    assert_eq!(pair.seen(), ["PUBREL 2 00", "PUBLISH 3 a dup 3"]);
}

/// A client that reads and does not acknowledge is sent so many bytes and no more, whatever its Receive Maximum; what
/// it acknowledges makes room. The rest waits in the queue. MQTT 5.0 §4.9.
#[test]
fn unacknowledged_messages_are_bounded_in_bytes() {
    for version in VERSIONS {
        for qos in [Qos::AtLeastOnce, Qos::ExactlyOnce] {
            let mut pair = Pair::new(&connect(version));
            pair.limits.inflight_bytes_max = 2_000;
            let sent = |pair: &mut Pair| pair.seen().iter().filter(|seen| seen.starts_with("PUBLISH")).count();
            for place in 0..6 {
                let wanted = if place < 3 { Delivered::Sent } else { Delivered::Queued };
                assert_eq!(pair.deliver("a", &[b'x'; 900], qos), wanted, "message {place}");
            }
            assert_eq!(sent(&mut pair), 3, "the one that goes beyond the bound is the last");
            let first = if qos == Qos::AtLeastOnce { Packet::Puback(ack(1)) } else { Packet::Pubrec(ack(1)) };
            pair.packet(first).unwrap();
            assert_eq!(sent(&mut pair), 1);
            pair.session.disconnected();
            pair.connect(&connect(version));
            assert_eq!(sent(&mut pair), 3, "sent again, and none beyond them");
        }
    }
}

/// Topic Names behind aliases are bounded in bytes; replacing an alias gives its bytes back. MQTT 5.0 §3.3.2.3.4.
#[test]
fn topic_aliases_are_bounded_in_bytes() {
    let long: &'static str = "x".repeat(600).leak();
    let with = |topic: &'static str, alias: u16| {
        let mut properties = PublishProperties::default();
        properties.topic_alias = NonZeroU16::new(alias);
        let Packet::Publish(publish) = publish(topic, Qos::AtMostOnce, 0) else { unreachable!("just made") };
        Packet::Publish(Publish { properties, ..publish })
    };
    let mut pair = Pair::new(&connect(Version::V5));
    for _ in 0..10 {
        pair.packet(with(long, 1)).unwrap();
    }
    pair.packet(with("short", 2)).unwrap();
    assert_eq!(pair.packet(with(long, 3)).unwrap_err().reason, ReasonCode::QUOTA_EXCEEDED);
    let mut other = Pair::new(&Connect { topic_alias_maximum: Some(4), ..connect(Version::V5) });
    for topic in [long, "a", "b"] {
        other.deliver(topic, b"", Qos::AtMostOnce);
    }
    let second: &'static str = "y".repeat(600).leak();
    other.deliver(second, b"", Qos::AtMostOnce);
    let aliased = other.seen().iter().filter(|seen| seen.contains("alias=")).count();
    assert_eq!(aliased, 3, "a topic that does not fit goes without an alias");
}

/// A PUBREC with an error ends the exchange. [MQTT-4.3.3-4]
#[test]
fn pubrec_with_an_error_frees_the_packet_identifier() {
    let connect = Connect { receive_maximum: NonZeroU16::new(1), ..connect(Version::V5) };
    let mut pair = Pair::new(&connect);
    pair.deliver("a", b"1", Qos::ExactlyOnce);
    pair.deliver("a", b"2", Qos::ExactlyOnce);
    pair.seen();
    let refused = Ack { reason: ReasonCode::QUOTA_EXCEEDED, ..ack(1) };
    pair.packet(Packet::Pubrec(refused)).unwrap();
    assert_eq!(pair.seen(), ["PUBLISH 2 a 2"]);
}

/// More QoS 2 messages than the server's Receive Maximum. [MQTT-3.3.4-7], §3.3.4.
#[test]
fn client_that_exceeds_our_receive_maximum_is_disconnected() {
    let mut pair = Pair::new(&connect(Version::V5));
    for id in 1..=4 {
        pair.packet(publish("a", Qos::ExactlyOnce, id)).unwrap();
    }
    let fault = pair.packet(publish("a", Qos::ExactlyOnce, 5)).unwrap_err();
    assert_eq!(fault.reason, ReasonCode::RECEIVE_MAXIMUM_EXCEEDED);
}

/// Topic Aliases from the client. [MQTT-3.3.2-7] to [MQTT-3.3.2-12].
#[test]
fn topic_aliases_of_the_client_are_remembered_for_the_connection() {
    let mut pair = Pair::new(&connect(Version::V5));
    let with = |topic: &'static str, alias: u16| {
        let mut properties = PublishProperties::default();
        properties.topic_alias = NonZeroU16::new(alias);
        let Packet::Publish(publish) = publish(topic, Qos::AtMostOnce, 0) else { unreachable!("just made") };
        Packet::Publish(Publish { properties, ..publish })
    };
    assert_eq!(pair.packet(with("a/b", 2)).unwrap(), "route a/b");
    assert_eq!(pair.packet(with("", 2)).unwrap(), "route a/b");
    assert_eq!(pair.packet(with("c", 2)).unwrap(), "route c");
    assert_eq!(pair.packet(with("", 2)).unwrap(), "route c");
    assert_eq!(pair.packet(with("", 1)).unwrap_err().reason, ReasonCode::PROTOCOL_ERROR);
    assert_eq!(pair.packet(with("a", 5)).unwrap_err().reason, ReasonCode::TOPIC_ALIAS_INVALID);
    pair.session.disconnected();
    pair.connect(&connect(Version::V5));
    assert_eq!(pair.packet(with("", 2)).unwrap_err().reason, ReasonCode::PROTOCOL_ERROR);
}

/// Topic Aliases towards the client, never more than it allows. [MQTT-3.1.2-26], [MQTT-3.1.2-27]
#[test]
fn topic_aliases_towards_the_client_stay_within_its_maximum() {
    let connect = Connect { topic_alias_maximum: Some(1), ..connect(Version::V5) };
    let mut pair = Pair::new(&connect);
    for topic in ["a", "b", "a"] {
        pair.deliver(topic, b"x", Qos::AtMostOnce);
    }
    assert_eq!(pair.seen(), ["PUBLISH 0 a alias=1 x", "PUBLISH 0 b x", "PUBLISH 0  alias=1 x"]);
}

/// A message larger than the client takes counts as delivered. [MQTT-3.1.2-24], [MQTT-3.1.2-25]
#[test]
fn messages_above_the_clients_maximum_packet_size_are_left_out() {
    let connect = Connect { maximum_packet_size: NonZeroU32::new(30), ..connect(Version::V5) };
    let mut pair = Pair::new(&connect);
    assert_eq!(pair.deliver("a", &[b'x'; 40], Qos::AtMostOnce), Delivered::Dropped);
    assert_eq!(pair.deliver("a", &[b'x'; 40], Qos::AtLeastOnce), Delivered::Dropped);
    assert_eq!(pair.deliver("a", b"y", Qos::AtLeastOnce), Delivered::Sent);
    assert_eq!(pair.seen(), ["PUBLISH 1 a y"]);
}

/// What waits too long is not sent; what is sent carries the time it has left. [MQTT-3.3.2-5], [MQTT-3.3.2-6]
#[test]
fn queued_messages_expire_and_the_rest_of_their_time_is_forwarded() {
    let mut pair = Pair::new(&connect(Version::V5));
    pair.session.disconnected();
    pair.deliver_with("a", b"short", Qos::AtLeastOnce, Some(2_000), &[]);
    pair.deliver_with("a", b"long", Qos::AtLeastOnce, Some(10_000), &[]);
    pair.now_ms = 3_000;
    pair.connect(&connect(Version::V5));
    assert_eq!(pair.seen(), ["PUBLISH 1 a expiry=7 long"]);
}

/// MQTT 5.0 §3.14.2.2.2.
#[test]
fn session_expiry_may_change_at_disconnect_but_not_from_zero() {
    let leave = |expiry| Packet::Disconnect(Disconnect { session_expiry: Some(expiry), ..Disconnect::default() });
    let mut pair = Pair::new(&connect(Version::V5));
    assert_eq!(pair.packet(leave(77)).unwrap(), "disconnect will=false");
    assert_eq!(pair.session.session_expiry(), 77);
    let mut pair = Pair::new(&Connect { session_expiry: None, ..connect(Version::V5) });
    assert_eq!(pair.packet(leave(77)).unwrap_err().reason, ReasonCode::PROTOCOL_ERROR);
}

/// [MQTT-3.1.0-2], [MQTT-3.1.2-2].
/// MQTT 5.0 §3.14.2.1 and §3.15.2.1.
#[test]
fn reason_codes_of_a_server_are_protocol_errors() {
    for code in 0..=0xFF {
        let mut pair = Pair::new(&connect(Version::V5));
        let reason = ReasonCode(code);
        let result = pair.packet(Packet::Disconnect(Disconnect { reason, ..Disconnect::default() }));
        let is_ours = [0x00, 0x04, 0x80, 0x81, 0x82, 0x83, 0x90].contains(&code) || (0x93..=0x99).contains(&code);
        assert_eq!(result.is_ok(), is_ours, "{reason:?}");
    }
    let mut pair = Pair::new(&connect(Version::V5));
    let refused = pair.packet(Packet::Auth(Auth { reason: ReasonCode::SUCCESS, ..Auth::default() }));
    assert_eq!(refused.unwrap_err().reason, ReasonCode::PROTOCOL_ERROR);
}

/// The maximum of the new Network Connection counts for what is sent again. [MQTT-3.1.2-24], [MQTT-3.1.2-25]
#[test]
fn unacknowledged_messages_too_large_for_the_new_connection_are_left_out() {
    let mut pair = Pair::new(&connect(Version::V5));
    pair.deliver("a", &[b'x'; 40], Qos::AtLeastOnce);
    pair.deliver("b", b"y", Qos::AtLeastOnce);
    pair.session.disconnected();
    pair.connect(&Connect { maximum_packet_size: NonZeroU32::new(30), ..connect(Version::V5) });
    assert_eq!(pair.seen(), ["PUBLISH 2 b dup y"]);
    pair.deliver("c", b"z", Qos::AtLeastOnce);
    assert_eq!(pair.seen(), ["PUBLISH 3 c z"]);
}

#[test]
fn second_connect_is_a_protocol_error() {
    for version in VERSIONS {
        let mut pair = Pair::new(&connect(version));
        let fault = pair.packet(Packet::Connect(Box::new(connect(version)))).unwrap_err();
        assert_eq!(fault.reason, ReasonCode::PROTOCOL_ERROR);
    }
}

/// The queue has a bound; the newest messages are the ones that do not fit.
#[test]
fn full_queue_refuses_more() {
    let mut pair = Pair::new(&connect(Version::V5));
    pair.session.disconnected();
    for _ in 0..100 {
        assert_eq!(pair.deliver("a", b"x", Qos::AtLeastOnce), Delivered::Queued);
    }
    assert_eq!(pair.deliver("a", b"x", Qos::AtLeastOnce), Delivered::Dropped);
    assert_eq!(pair.deliver("a", b"x", Qos::AtMostOnce), Delivered::Dropped);
}

/// 200,000 messages through one Session: identifiers wrap and are never reused while in use. [MQTT-2.2.1-4],
/// [MQTT-4.3.2-1], [MQTT-4.3.3-1] (5.0), [MQTT-2.3.1-4] (3.1.1).
#[test]
fn packet_identifiers_wrap_around() {
    let mut pair = Pair::new(&connect(Version::V311));
    for round in 0..200_000_u32 {
        assert_eq!(pair.deliver("a", b"x", Qos::AtLeastOnce), Delivered::Sent);
        let id = u16::try_from(round % 65_535 + 1).expect("in range");
        assert_eq!(pair.seen(), [format!("PUBLISH {id} a x")]);
        pair.packet(Packet::Puback(ack(id))).unwrap();
    }
}

/// Acknowledgements out of order keep the count right.
#[test]
fn acknowledgements_out_of_order_are_accepted() {
    let mut pair = Pair::new(&connect(Version::V5));
    for _ in 0..8 {
        assert_eq!(pair.deliver("a", b"x", Qos::AtLeastOnce), Delivered::Sent);
    }
    assert_eq!(pair.deliver("a", b"9", Qos::AtLeastOnce), Delivered::Queued);
    pair.seen();
    for id in [8, 3, 3, 1, 2] {
        pair.packet(Packet::Puback(ack(id))).unwrap();
    }
    assert_eq!(pair.seen(), ["PUBLISH 9 a 9"]);
    let mut again = Vec::new();
    encode(Version::V5, &Packet::Pingreq, &mut again);
    assert_eq!(again, [0xC0, 0]);
}

/// A message as the store gives it back; its payload is its name.
fn kept(id: MessageId, sealed: bool) -> (MessageId, Option<Kept>) {
    let message = Message {
        topic: "t".into(),
        payload: id.to_string().into(),
        properties: Bytes::new(),
        qos: Qos::ExactlyOnce,
        retain: false,
        expires_at_ms: None,
        publisher: None,
    };
    (id, Some(Kept { message: Arc::new(message), sealed, qos: Qos::AtLeastOnce, retain: false, ids: SmallVec::new() }))
}

/// What storage hooks cannot open holds up nothing, keeps its place and its Packet Identifier, and is tried again on
/// the next Network Connection. [MQTT-4.4.0-1], [MQTT-4.6.0-6]
#[test]
fn sealed_messages_wait_for_the_next_connection() {
    let id = |n: u64| MessageId::new(n).expect("not zero");
    let mut pair = Pair::new(&connect(Version::V5));
    let parked = (3..6).map(|n| Parked::new(id(n), 10, None)).collect();
    let inflight = vec![(1, Some((id(1), Qos::AtLeastOnce))), (2, Some((id(2), Qos::AtLeastOnce)))];
    let (key, name) = (pair.session.key, SessionId::new(1).expect("not zero"));
    pair.session = Session::restored("c".into(), key, name, 500, parked, inflight, Vec::new());

    pair.connect(&connect(Version::V5));
    let (turn, wanted) = pair.session.begin_load().expect("they are in the store");
    assert_eq!(wanted, [1, 2, 3, 4, 5].map(id));
    let sealed = |n: u64| kept(id(n), n == 1 || n == 3 || n == 4);
    assert!(pair.session.loaded(turn, &(1..6).map(sealed).collect::<Vec<_>>()));
    pair.session.pump(0, &pair.limits, &mut pair.out);
    assert_eq!(pair.seen(), ["PUBLISH 2 t dup 2", "PUBLISH 3 t 5"]);
    assert_eq!(pair.deliver("t", b"now", Qos::AtLeastOnce), Delivered::Sent);
    assert_eq!(pair.seen(), ["PUBLISH 4 t now"]);
    assert!(!pair.session.wants_load() && !pair.session.wants_pump());
    assert_eq!(pair.session.queued(), 2);
    for n in 2..5 {
        pair.packet(Packet::Puback(ack(n))).expect("acknowledged");
    }

    pair.session.disconnected();
    pair.connect(&connect(Version::V5));
    let (turn, wanted) = pair.session.begin_load().expect("they are in the store");
    assert_eq!(wanted, [1, 3, 4].map(id));
    let open = |n: MessageId| kept(n, false);
    assert!(pair.session.loaded(turn, &wanted.into_iter().map(open).collect::<Vec<_>>()));
    pair.session.pump(0, &pair.limits, &mut pair.out);
    assert_eq!(pair.seen(), ["PUBLISH 1 t dup 1", "PUBLISH 5 t 3", "PUBLISH 6 t 4"]);
}

/// Messages that cannot be opened count for the bounds of the queue, and are the oldest of it.
#[test]
fn sealed_messages_make_room_for_new_ones() {
    let id = |n: u64| MessageId::new(n).expect("not zero");
    let mut pair = Pair::new(&connect(Version::V5));
    let (key, name) = (pair.session.key, SessionId::new(1).expect("not zero"));
    let parked = vec![Parked::new(id(1), 10, None), Parked::new(id(2), 10, Some(5000))];
    pair.session = Session::restored("c".into(), key, name, 500, parked, Vec::new(), Vec::new());
    pair.limits.queue_messages_max = 2;
    pair.session.queue_policy = QueuePolicy::DropOldest;
    pair.connect(&Connect { receive_maximum: NonZeroU16::new(1), ..connect(Version::V5) });
    let (turn, wanted) = pair.session.begin_load().expect("they are in the store");
    assert!(pair.session.loaded(turn, &wanted.into_iter().map(|id| kept(id, true)).collect::<Vec<_>>()));
    assert_eq!(pair.deliver("t", b"a", Qos::AtLeastOnce), Delivered::Sent);
    assert_eq!(pair.deliver("t", b"b", Qos::AtLeastOnce), Delivered::Dropped);
    let done = |id| Step::Done { packet_id: None, id };
    assert_eq!(pair.session.take_steps(), [done(id(1))]);
    assert_eq!(pair.session.drop_expired(5000, &mut 10), 1);
    assert_eq!(pair.session.take_steps(), [done(id(2))]);
    assert_eq!(pair.session.queued(), 1);
}

/// Nothing leaves before permissions are known; then what was sent before is completed, and of what waits only what a
/// subscription that is left matches. MQTT 5.0 §3.10.4 [MQTT-3.10.4-3], [MQTT-4.4.0-1]
#[test]
fn a_held_session_sends_what_its_subscriptions_still_match() {
    for extra in [0, 100] {
        let mut pair = Pair::new(&connect(Version::V5));
        let (key, name) = (pair.session.key, SessionId::new(1).expect("not zero"));
        pair.session = Session::restored("c".into(), key, name, 500, Vec::new(), Vec::new(), Vec::new());
        let subscribe = |session: &mut Session, filter: &str| {
            session.subscribe(Filter::parse(filter).expect("valid"), Subscription::default());
        };
        subscribe(&mut pair.session, "a/+");
        // More than are compared one by one.
        (0..extra).for_each(|n| subscribe(&mut pair.session, &format!("x/{n}")));
        pair.connect(&connect(Version::V5));
        assert_eq!(pair.deliver("b/sent", b"0", Qos::AtLeastOnce), Delivered::Sent);
        pair.seen();
        pair.session.disconnected();
        for (topic, payload) in [("b/1", b"1"), ("a/2", b"2"), ("b/3", b"3"), ("x/7", b"4")] {
            pair.deliver(topic, payload, Qos::AtLeastOnce);
        }
        let link = Link::negotiate(&connect(Version::V5), &pair.limits);
        pair.session.connected_held(link);
        assert_eq!(pair.deliver("a/5", b"5", Qos::AtLeastOnce), Delivered::Queued);
        assert_eq!(pair.deliver("a/6", b"6", Qos::AtMostOnce), Delivered::Dropped);
        assert!(pair.seen().is_empty() && !pair.session.wants_pump());
        pair.session.release(0, true, &pair.limits, &mut pair.out);
        let all = pair.seen();
        let mut wanted = vec!["PUBLISH 1 b/sent dup 0", "PUBLISH 2 a/2 2"];
        wanted.extend((extra > 0).then_some("PUBLISH 3 x/7 4"));
        let last = format!("PUBLISH {} a/5 5", wanted.len() + 1);
        wanted.push(&last);
        assert_eq!(all, wanted, "{extra}");
        // From now on it is as ever.
        assert_eq!(pair.deliver("b/7", b"7", Qos::AtLeastOnce), Delivered::Sent);
    }
}
