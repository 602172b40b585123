//! From CONNECT to a Session: checks, authentication, takeover, CONNACK. MQTT 5.0 §3.1.4.

use std::num::{NonZeroU16, NonZeroU32};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use tracing::debug;
use wasmqtt_protocol::codec::{self, Connack, Connect, Packet, Qos, ReasonCode, Version, encode};
use wasmqtt_protocol::ports::{AuthOutcome, AuthRequest, EventKind, Grant};
use wasmqtt_protocol::router::{Message, SessionKey};
use wasmqtt_protocol::session::{Link, ServerLimits, Session, WillMessage};

use super::Shard;
use super::conn::{Conn, State};
use super::gate::Reason;
use super::timers::Timer;
use crate::config::{Anonymous, ClientIdTaken};
use crate::mailbox::Mail;
use crate::memory::Pressure;

/// More than any CONNACK takes: properties of fixed size and at most two strings and one blob.
const CONNACK_BYTES_MAX: usize = 256 * 1024;

/// A CONNECT that is being answered.
pub(crate) struct Opening {
    pub(super) request: Arc<AuthRequest>,
    link: Link,
    will: Option<Box<WillMessage>>,
    clean_start: bool,
    keep_alive: u16,
    session_expiry: Option<u32>,
    /// The server chose the Client Identifier. [MQTT-3.2.2-16]
    assigned: bool,
    /// What the plugin that made the challenge wants back.
    pub(super) state: Bytes,
    pub(super) plugin: Arc<str>,
}

/// A connection that was let in, on its way to the shard its Session lives on.
pub(crate) struct Adopted {
    conn: Conn,
    opening: Box<Opening>,
    grant: Grant,
}

impl Shard {
    /// A packet before there is a Session.
    pub(super) fn on_early_packet(&mut self, id: usize, packet: &[u8]) {
        let conn = &self.conns[id];
        if let State::Opening(_) = conn.state {
            return self.on_opening_auth(id, packet);
        }
        match codec::decode(conn.version, packet) {
            Ok(Packet::Connect(connect)) => self.on_connect(id, &connect),
            // [MQTT-3.1.0-1]
            Ok(_) => {
                debug!(address = ?conn.address, "first packet is not CONNECT");
                self.remove(id);
            }
            Err(error) => {
                // What cannot be told to the client in its own version is not told.
                let Some(version) = codec::answer_version(packet) else { return self.remove(id) };
                self.conns[id].version = version;
                self.on_malformed(id, &error);
            }
        }
    }

    fn on_connect(&mut self, id: usize, connect: &Connect<'_>) {
        let conn = &mut self.conns[id];
        conn.version = connect.version;
        let limits = &self.limits;
        if connect.client_id.is_empty() && !may_be_assigned(connect) {
            return self.refuse(id, ReasonCode::CLIENT_IDENTIFIER_NOT_VALID);
        }
        if let Some(will) = &connect.will {
            if will.qos > limits.maximum_qos {
                return self.refuse(id, ReasonCode::QOS_NOT_SUPPORTED);
            }
            if will.retain && !limits.retain_available {
                return self.refuse(id, ReasonCode::RETAIN_NOT_SUPPORTED);
            }
            if !self.tunable.limits.takes_topic(will.topic) {
                return self.refuse(id, ReasonCode::TOPIC_NAME_INVALID);
            }
        }
        if let Some(reason) = self.refusal_of_names(connect.client_id, connect.username) {
            debug!(address = ?self.conns[id].address, ?reason, "Client Identifier or user name with a wildcard");
            return self.refuse(id, reason);
        }
        let conn = &mut self.conns[id];
        let assigned = connect.client_id.is_empty();
        let client_id = if assigned { new_client_id() } else { Some(connect.client_id.into()) };
        let Some(client_id) = client_id else { return self.refuse(id, ReasonCode::SERVER_UNAVAILABLE) };
        let request = AuthRequest {
            client_id,
            username: connect.username.map(Into::into),
            password: connect.password.map(Bytes::copy_from_slice),
            method: connect.authentication_method.map(Into::into),
            data: connect.authentication_data.map(Bytes::copy_from_slice),
            version: connect.version,
            address: conn.address,
            listener: Arc::clone(&conn.listener),
            user_properties: connect.user_properties.iter().map(|(n, v)| (n.to_owned(), v.to_owned())).collect(),
        };
        let opening = Opening {
            request: Arc::new(request),
            link: Link::negotiate(connect, limits),
            will: connect.will.as_ref().filter(|will| is_for_clients(will)).map(|will| Box::new(will_message(will))),
            clean_start: connect.clean_start,
            keep_alive: connect.keep_alive,
            session_expiry: connect.session_expiry,
            assigned,
            state: Bytes::new(),
            plugin: "".into(),
        };
        let request = Arc::clone(&opening.request);
        if self.is_banned(&request, request.username.as_ref()) {
            return self.refuse(id, ReasonCode::BANNED);
        }
        let conn = &mut self.conns[id];
        let epoch = conn.epoch;
        conn.state = State::Opening(Box::new(opening));
        conn.gate.close(Reason::Opening, self.now_ms);
        if self.plugins.has_auth() {
            let call = self.plugins.authenticate(request);
            self.call_auth(id, epoch, call);
        } else {
            self.on_auth_outcome(id, epoch, AuthOutcome::Next);
        }
    }

    /// Why a client may not have these names: a rule such as `clients/%c/#` gives a client `+` the topics of all.
    fn refusal_of_names(&self, client_id: &str, username: Option<&str>) -> Option<ReasonCode> {
        if self.tunable.identity.allow_wildcards {
            return None;
        }
        if has_wildcard(client_id) {
            return Some(ReasonCode::CLIENT_IDENTIFIER_NOT_VALID);
        }
        username.filter(|name| has_wildcard(name)).map(|_| ReasonCode::BAD_USER_NAME_OR_PASSWORD)
    }

    fn is_banned(&self, request: &AuthRequest, name: Option<&Arc<str>>) -> bool {
        let bans = self.shared.bans();
        if bans.is_empty() {
            return false;
        }
        let found = bans.find(self.now_ms, &request.client_id, name, request.address);
        if let Some(note) = found {
            debug!(client_id = %request.client_id, note, "banned");
            self.note_refusal(request, ReasonCode::BANNED);
        }
        found.is_some()
    }

    /// No plugin decided: the broker's own rule does.
    pub(super) fn native_rule(&self, id: usize, request: &AuthRequest) -> Result<Grant, ReasonCode> {
        if request.method.is_some() {
            return Err(ReasonCode::BAD_AUTHENTICATION_METHOD);
        }
        // With plugins, a name nobody vouches for is a wrong name; without, names are not checked at all.
        if request.username.is_some() && self.plugins.has_auth() {
            return Err(ReasonCode::BAD_USER_NAME_OR_PASSWORD);
        }
        let allowed = match self.tunable.anonymous {
            Anonymous::Allow => true,
            Anonymous::Deny => false,
            // Behind a proxy everybody seems to be on this machine.
            Anonymous::Loopback => {
                !self.conns[id].proxied && request.address.is_none_or(|address| address.is_loopback())
            }
        };
        if allowed { Ok(Grant::default()) } else { Err(ReasonCode::NOT_AUTHORIZED) }
    }

    /// Authentication has said who the client is: lets it in, unless that one is not let in.
    pub(super) fn let_in(&mut self, id: usize, request: &AuthRequest, grant: Grant) {
        let principal = principal_of(request, &grant);
        if has_wildcard(&principal) && !self.tunable.identity.allow_wildcards {
            return self.deny(id, request, ReasonCode::NOT_AUTHORIZED);
        }
        // What the plugin calls the client may be banned, and not what it calls itself.
        if request.username.as_ref() != Some(&principal) && self.is_banned(request, Some(&principal)) {
            return self.refuse(id, ReasonCode::BANNED);
        }
        self.admit(id, grant);
    }

    /// The client is let in: finds its Session, here or on another shard.
    pub(super) fn admit(&mut self, id: usize, grant: Grant) {
        let Some(conn) = self.conns.get_mut(id) else { return };
        let State::Opening(opening) = std::mem::replace(&mut conn.state, State::New) else { return };
        let cannot_keep = opening.link.limits.session_expiry > 0 && self.durable.is_failing();
        if self.draining || cannot_keep {
            conn.state = State::Opening(opening);
            let reason = if cannot_keep { ReasonCode::QUOTA_EXCEEDED } else { ReasonCode::SERVER_SHUTTING_DOWN };
            return self.refuse(id, reason);
        }
        let shared = Arc::clone(&self.shared);
        // A client that cannot even be told what it gets. [MQTT-3.1.2-24]
        let client_max = opening.link.limits.packet_bytes_max as usize;
        if client_max < CONNACK_BYTES_MAX && connack(&opening, &grant, false, &self.limits).len() > client_max {
            return self.remove(id);
        }
        let client_id = Arc::clone(&opening.request.client_id);
        let key = {
            let mut directory = shared.directory(&client_id);
            if let Some(key) = directory.get(&client_id) {
                *key
            } else if self.pressure == Pressure::Full
                || shared.stats.sessions.load(Ordering::Relaxed) >= self.tunable.limits.sessions_max
            {
                drop(directory);
                debug!(%client_id, "connection refused: limits.sessions_max or limits.memory_mib");
                self.conns[id].state = State::Opening(opening);
                return self.refuse(id, ReasonCode::QUOTA_EXCEEDED);
            } else {
                let key = self.sessions.reserve();
                directory.insert(Arc::clone(&client_id), key);
                self.sessions.put(Session::new(client_id, key));
                shared.stats.sessions.fetch_add(1, Ordering::Relaxed);
                drop(directory);
                return self.open(id, *opening, &grant, key, false);
            }
        };
        if key.shard == self.index {
            self.resume(id, opening, grant, key);
        } else {
            self.hand_over(id, opening, grant, key);
        }
    }

    /// The Session lives elsewhere: the connection goes there, so that messages already on their way to the Session
    /// keep their order. It leaves at the end of the batch, when the bytes behind its CONNECT are kept.
    fn hand_over(&mut self, id: usize, opening: Box<Opening>, grant: Grant, key: SessionKey) {
        let conn = &mut self.conns[id];
        conn.state = State::Leaving { opening, grant: Box::new(grant), to: key.shard };
        conn.gate.close(Reason::Leaving, self.now_ms);
        self.leaving.push(id);
    }

    pub(super) fn run_leaving(&mut self) {
        for id in std::mem::take(&mut self.leaving) {
            if self.conns.get(id).is_some_and(|conn| matches!(conn.state, State::Leaving { .. })) {
                self.leave_shard(id);
            }
        }
    }

    fn leave_shard(&mut self, id: usize) {
        let mut conn = self.conns.remove(id);
        let State::Leaving { opening, grant, to } = std::mem::replace(&mut conn.state, State::New) else { return };
        if let Some((at, timer)) = conn.timer.take() {
            self.timers.cancel(at, timer);
        }
        let _ = self.poll.registry().deregister(&mut conn.stream);
        conn.leave_shard(self.now_ms);
        self.shared.load[usize::from(self.index)].fetch_sub(1, Ordering::Relaxed);
        self.shared.load[usize::from(to)].fetch_add(1, Ordering::Relaxed);
        self.shared.mailboxes[usize::from(to)].send(Mail::Adopt(Box::new(Adopted { conn, opening, grant: *grant })));
    }

    pub(super) fn on_adopt(&mut self, adopted: Adopted) {
        let Adopted { mut conn, opening, grant } = adopted;
        conn.state = State::Opening(opening);
        if let Some((id, _)) = self.insert(conn) {
            self.admit(id, grant);
        }
    }

    /// The Session exists: takes it over, ends it first, or leaves it to its owner.
    fn resume(&mut self, id: usize, opening: Box<Opening>, grant: Grant, key: SessionKey) {
        let claim = self.claim(key, &principal_of(&opening.request, &grant));
        if claim == Claim::Refused {
            let request = Arc::clone(&opening.request);
            debug!(client_id = %request.client_id, "the Session of this Client Identifier belongs to somebody else");
            self.conns[id].state = State::Opening(opening);
            return self.deny(id, &request, ReasonCode::NOT_AUTHORIZED);
        }
        if let Some(old) = self.sessions.conn(key.slot) {
            return self.take_over(id, old, opening, grant);
        }
        let (expires_ms, will_ms) = self.sessions.deadlines(key.slot);
        // Its delay has passed, for instance while no broker ran: the client is no longer in time to take it back.
        if will_ms.is_some_and(|at| at <= self.now_ms) {
            self.on_will_delay(key);
        }
        let expired = expires_ms.is_some_and(|at| at <= self.now_ms);
        // Ending it also publishes a will that was delayed. MQTT 5.0 §3.1.3.2.2
        let begins_anew = opening.clean_start || expired || claim == Claim::Replaces;
        if self.sessions.resolve(key).is_some() && begins_anew {
            self.end_session(key);
        }
        if self.waits_for_will(key, id, &grant) {
            self.conns[id].state = State::Opening(opening);
            return;
        }
        if self.sessions.resolve(key).is_some() {
            return self.open(id, *opening, &grant, key, true);
        }
        // Ended: begin again, a Session of that name may even live elsewhere by now.
        self.admit_again(id, opening, grant);
    }

    /// Looks for the Session once more.
    pub(super) fn admit_again(&mut self, id: usize, opening: Box<Opening>, grant: Grant) {
        self.conns[id].state = State::Opening(opening);
        self.admit(id, grant);
    }

    /// Opens a connection with a Session that nobody finds and that ends with it.
    pub(super) fn open_apart(&mut self, id: usize, mut opening: Opening, grant: &Grant) {
        // Another connection came within the Will Delay. [MQTT-3.1.3-9]
        opening.will.take_if(|will| will.delay.min(opening.link.limits.session_expiry) > 0);
        opening.link.limits.session_expiry = 0;
        let key = self.sessions.reserve();
        self.sessions.put(Session::new(Arc::clone(&opening.request.client_id), key));
        self.shared.stats.sessions.fetch_add(1, Ordering::Relaxed);
        self.open(id, opening, grant, key, false);
    }

    /// What a client may make of a Session that began with its Client Identifier.
    fn claim(&self, key: SessionKey, principal: &str) -> Claim {
        let owner = self.sessions.standing_of(key.slot).map(|standing| &*standing.client.principal);
        let expired = self.sessions.deadlines(key.slot).0.is_some_and(|at| at <= self.now_ms);
        match owner {
            Some(owner) if owner == principal => Claim::Owns,
            None => Claim::Owns,
            // What belongs to nobody in particular may be replaced, or a broker that begins to ask for names would lock
            // its clients out of their identifiers.
            Some("") => Claim::Replaces,
            Some(_) if expired => Claim::Replaces,
            Some(_) => match self.tunable.identity.client_id_taken {
                ClientIdTaken::Refuse => Claim::Refused,
                ClientIdTaken::NewSession => Claim::Replaces,
            },
        }
    }

    /// Nothing leaves before the permissions of its subscriptions are known, the CONNACK neither.
    fn open(&mut self, id: usize, opening: Opening, grant: &Grant, key: SessionKey, present: bool) {
        let conn = &mut self.conns[id];
        let epoch = conn.epoch;
        conn.outbox.lend(&mut self.pool);
        conn.outbox.extend(&connack(&opening, grant, present, &self.limits));
        conn.state = State::Live { slot: key.slot };
        conn.limits = Arc::clone(&self.limits);
        conn.unchecked = true;
        conn.connecting = None;
        conn.username = opening.request.username.clone().filter(|name| *name != principal_of(&opening.request, grant));
        conn.auth = super::auth::Standing::of(&opening.request, conn.version);
        // What an earlier connection sent comes before what this one sends.
        conn.submitted = self.hooks.waiting_of(key);
        if conn.submitted > 0 {
            conn.gate.close(Reason::Hook, self.now_ms);
        }
        let keep_alive = opening.link.keep_alive_ms();
        if let Some((session, _)) = self.sessions.resolve(key) {
            session.will = opening.will;
            session.queue_policy = self.tunable.queue_policy(&opening.request.listener);
            session.connected_held(opening.link);
        }
        if let Some((at, timer)) = conn.timer.take() {
            self.timers.cancel(at, timer);
        }
        self.sessions.set_conn(key.slot, Some(id));
        self.set_deadlines(key, None, None);
        self.grant(id, key, &opening.request, grant);
        self.store_opened(id, key, present);
        if let Some(keep_alive) = keep_alive {
            self.set_conn_timer(id, self.now_ms + keep_alive, Timer::KeepAlive { id, epoch });
        }
        if self.wants(EventKind::ClientConnected) {
            let conn = &self.conns[id];
            let address = conn.address.map(|address| address.to_string()).unwrap_or_default();
            let version = conn.version.name().to_owned();
            self.event(EventKind::ClientConnected, key.slot, || vec![("address", address), ("version", version)]);
        }
        self.conns[id].gate.open(Reason::Leaving, self.now_ms);
        // Whoever bans it from now on finds it. Authentication may have taken its time.
        self.end_if_banned(key);
        self.check_subscriptions(key);
    }
}

/// Whose Session it is, seen from a client that names its Client Identifier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Claim {
    /// The client's.
    Owns,
    /// Somebody else's; it ends, and the client begins a new one.
    Replaces,
    /// Somebody else's, and stays so.
    Refused,
}

/// The identity that authentication gave a client; the User Name, where no plugin says more; empty for clients without.
pub(super) fn principal_of(request: &AuthRequest, grant: &Grant) -> Arc<str> {
    match (&*grant.principal, &request.username) {
        ("", Some(username)) => Arc::clone(username),
        ("", None) => "".into(),
        (principal, _) if *principal == *request.client_id => Arc::clone(&request.client_id),
        (principal, _) => principal.into(),
    }
}

fn has_wildcard(name: &str) -> bool {
    name.contains(['+', '#'])
}

/// 5.0 servers may always choose [MQTT-3.1.3-6]; 3.1.1 only for a Clean Session [MQTT-3.1.3-8]; 3.1 never.
fn may_be_assigned(connect: &Connect<'_>) -> bool {
    match connect.version {
        Version::V5 => true,
        Version::V311 => connect.clean_start,
        Version::V31 => false,
    }
}

/// Nobody can guess it: who names it later may ask for the Session. `None`: the system has no random numbers.
fn new_client_id() -> Option<Arc<str>> {
    let mut random = [0; 16];
    getrandom::fill(&mut random).ok()?;
    Some(format!("auto-{:032x}", u128::from_ne_bytes(random)).into())
}

/// Bridges of mosquitto have their wills below `$SYS/`, where only the broker publishes: such a will is left out, as what
/// clients publish there is.
fn is_for_clients(will: &codec::Will<'_>) -> bool {
    let is_for_clients = !will.topic.starts_with("$SYS/");
    if !is_for_clients {
        debug!(topic = will.topic, "Will Message below $SYS/ left out");
    }
    is_for_clients
}

fn will_message(will: &codec::Will<'_>) -> WillMessage {
    WillMessage {
        message: Message {
            topic: will.topic.into(),
            payload: Bytes::copy_from_slice(will.payload),
            properties: Bytes::copy_from_slice(&will.properties.forwardable()),
            qos: will.qos,
            retain: will.retain,
            expires_at_ms: None,
            publisher: None,
        },
        expiry: will.properties.message_expiry,
        delay: will.delay.unwrap_or(0),
    }
}

/// What the server grants, where it differs from what the client assumes. MQTT 5.0 §3.2.2.3.
fn connack(opening: &Opening, grant: &Grant, present: bool, limits: &ServerLimits) -> Vec<u8> {
    let granted = &opening.link.limits;
    let version = opening.link.version;
    let connack = Connack {
        session_present: present && version != Version::V31,
        session_expiry: (granted.session_expiry != opening.session_expiry.unwrap_or(0))
            .then_some(granted.session_expiry),
        receive_maximum: NonZeroU16::new(limits.receive_maximum).filter(|max| max.get() < u16::MAX),
        maximum_qos: (limits.maximum_qos < Qos::ExactlyOnce).then_some(limits.maximum_qos as u8),
        retain_available: (!limits.retain_available).then_some(false),
        maximum_packet_size: NonZeroU32::new(limits.packet_bytes_max),
        assigned_client_id: opening.assigned.then_some(&*opening.request.client_id),
        topic_alias_maximum: (limits.topic_alias_maximum > 0).then_some(limits.topic_alias_maximum),
        server_keep_alive: (granted.keep_alive != opening.keep_alive).then_some(granted.keep_alive),
        authentication_method: opening.request.method.as_deref(),
        authentication_data: grant.data.as_deref(),
        ..Connack::default()
    };
    let mut bytes = Vec::with_capacity(64);
    encode(version, &Packet::Connack(Box::new(connack)), &mut bytes);
    bytes
}
