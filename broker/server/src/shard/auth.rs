//! Answers of auth plugins, enhanced authentication and re-authentication. MQTT 5.0 §4.12.

use std::sync::Arc;

use bytes::Bytes;
use tracing::{debug, info, warn};
use wasmqtt_protocol::codec::{self, Auth, Packet, ReasonCode, Version, encode};
use wasmqtt_protocol::ports::{AuthOutcome, AuthRequest, AuthStep, Client, EventKind};

use super::conn::State;
use super::connect::principal_of;
use super::gate::Reason;
use super::{Ending, Shard};

/// Bytes a plugin may ask the broker to keep between a challenge and its answer.
const STATE_BYTES_MAX: usize = 64 * 1024;

/// Lets a connected client authenticate again.
pub(super) struct Standing {
    request: Arc<AuthRequest>,
    state: Bytes,
    plugin: Arc<str>,
    /// A plugin is thinking about the client's last AUTH.
    busy: bool,
    /// The client began with 0x19 and a challenge is out.
    challenged: bool,
}

impl Standing {
    /// Only for clients that used enhanced authentication at CONNECT.
    pub(super) fn of(request: &Arc<AuthRequest>, version: Version) -> Option<Box<Self>> {
        let wanted = version == Version::V5 && request.method.is_some();
        wanted.then(|| {
            Box::new(Self {
                request: Arc::clone(request),
                state: Bytes::new(),
                plugin: "".into(),
                busy: false,
                challenged: false,
            })
        })
    }
}

impl Shard {
    /// The plugin chain answered for this connection.
    pub(super) fn on_auth_outcome(&mut self, id: usize, epoch: u32, outcome: AuthOutcome) {
        if !self.is_current(id, epoch) {
            return;
        }
        match &self.conns[id].state {
            State::Opening(opening) => {
                let request = Arc::clone(&opening.request);
                self.on_connect_outcome(id, &request, outcome);
            }
            State::Live { .. } => self.on_reauth_outcome(id, outcome),
            State::New | State::Leaving { .. } | State::TakingOver { .. } | State::Lingering => {}
        }
    }

    fn on_connect_outcome(&mut self, id: usize, request: &AuthRequest, outcome: AuthOutcome) {
        match outcome {
            AuthOutcome::Allow(grant) => self.let_in(id, request, grant),
            AuthOutcome::Next => match self.native_rule(id, request) {
                Ok(grant) => self.let_in(id, request, grant),
                Err(reason) => self.deny(id, request, reason),
            },
            AuthOutcome::Deny(reason) => self.deny(id, request, reason),
            AuthOutcome::Unavailable => self.deny(id, request, ReasonCode::SERVER_UNAVAILABLE),
            AuthOutcome::Challenge { data, state, plugin } => {
                if request.method.is_none() || state.len() > STATE_BYTES_MAX {
                    warn!(%plugin, "challenge for a client without Authentication Method, or with more than 64 KiB of state");
                    return self.deny(id, request, ReasonCode::SERVER_UNAVAILABLE);
                }
                self.send_auth(id, request, ReasonCode::CONTINUE_AUTHENTICATION, Some(&data));
                if let State::Opening(opening) = &mut self.conns[id].state {
                    opening.state = state;
                    opening.plugin = plugin;
                }
                self.open_gate(id, Reason::Opening);
                self.on_kept(id);
            }
        }
    }

    /// One line at `info` for a client that may not come in, as tools that block addresses want it, but only some from
    /// one address. That a plugin could not answer is no fault of the client.
    pub(super) fn note_refusal(&self, request: &AuthRequest, reason: ReasonCode) {
        let AuthRequest { client_id, username, address, .. } = request;
        let refusals = &self.shared.refusals;
        if reason != ReasonCode::SERVER_UNAVAILABLE
            && let Some(left_out) = refusals.count(*address, self.shared.uptime_ms())
        {
            let address = address.map_or_else(|| "unix".to_owned(), |address| address.to_string());
            let user = username.as_deref().unwrap_or_default();
            info!(address, %client_id, user, ?reason, left_out, "login refused");
        } else {
            debug!(%client_id, ?address, ?reason, "login refused");
        }
    }

    pub(super) fn deny(&mut self, id: usize, request: &AuthRequest, reason: ReasonCode) {
        self.note_refusal(request, reason);
        if self.wants(EventKind::ClientRefused) {
            let client = Client {
                client_id: Arc::clone(&request.client_id),
                principal: request.username.clone().unwrap_or_default(),
                listener: Arc::clone(&request.listener),
            };
            let address = request.address.map(|address| address.to_string()).unwrap_or_default();
            let fields = vec![("address", address), ("reason", format!("{reason:?}"))];
            self.event_of(EventKind::ClientRefused, Arc::new(client), fields);
        }
        self.refuse(id, if reason.is_error() { reason } else { ReasonCode::NOT_AUTHORIZED });
    }

    fn send_auth(&mut self, id: usize, request: &AuthRequest, reason: ReasonCode, data: Option<&[u8]>) {
        let auth = Auth {
            reason,
            authentication_method: request.method.as_deref(),
            authentication_data: data,
            ..Auth::default()
        };
        let Some(conn) = self.conns.get_mut(id) else { return };
        conn.outbox.append(|bytes| encode(Version::V5, &Packet::Auth(auth), bytes));
        self.mark_dirty(id);
    }

    /// A packet between CONNECT and CONNACK: only AUTH is allowed, with the same method. [MQTT-4.12.0-2] ff.
    pub(super) fn on_opening_auth(&mut self, id: usize, packet: &[u8]) {
        let decoded = match codec::decode(Version::V5, packet) {
            Ok(decoded) => decoded,
            Err(error) => return self.on_malformed(id, &error),
        };
        let conn = &mut self.conns[id];
        let epoch = conn.epoch;
        let State::Opening(opening) = &mut conn.state else { return };
        match decoded {
            Packet::Auth(auth) if auth.reason == ReasonCode::CONTINUE_AUTHENTICATION => {
                if auth.authentication_method != opening.request.method.as_deref() {
                    return self.refuse(id, ReasonCode::PROTOCOL_ERROR);
                }
                conn.gate.close(Reason::Opening, self.now_ms);
                let step = AuthStep {
                    request: Arc::clone(&opening.request),
                    data: Bytes::copy_from_slice(auth.authentication_data.unwrap_or_default()),
                    state: std::mem::take(&mut opening.state),
                    plugin: Arc::clone(&opening.plugin),
                    reauthenticate: false,
                };
                let call = self.plugins.proceed(step);
                self.call_auth(id, epoch, call);
            }
            Packet::Disconnect(_) => self.remove(id),
            _ => self.refuse(id, ReasonCode::PROTOCOL_ERROR),
        }
    }

    /// AUTH from a connected client. [MQTT-4.12.1-1]
    pub(super) fn on_reauth(&mut self, id: usize, auth: &Auth<'_>) {
        let conn = &mut self.conns[id];
        let epoch = conn.epoch;
        let Some(standing) = &mut conn.auth else {
            return self.fault(id, ReasonCode::PROTOCOL_ERROR, "AUTH from a client that sent no Authentication Method");
        };
        if auth.authentication_method != standing.request.method.as_deref() {
            return self.fault(id, ReasonCode::PROTOCOL_ERROR, "AUTH with another Authentication Method");
        }
        let begins = auth.reason == ReasonCode::REAUTHENTICATE;
        if standing.busy || begins == standing.challenged {
            return self.fault(id, ReasonCode::PROTOCOL_ERROR, "AUTH out of turn");
        }
        standing.busy = true;
        standing.challenged = false;
        let step = AuthStep {
            request: Arc::clone(&standing.request),
            data: Bytes::copy_from_slice(auth.authentication_data.unwrap_or_default()),
            state: std::mem::take(&mut standing.state),
            plugin: if begins { "".into() } else { Arc::clone(&standing.plugin) },
            reauthenticate: true,
        };
        let call = self.plugins.proceed(step);
        self.call_auth(id, epoch, call);
    }

    fn on_reauth_outcome(&mut self, id: usize, outcome: AuthOutcome) {
        let Some(standing) = &mut self.conns[id].auth else { return };
        standing.busy = false;
        let request = Arc::clone(&standing.request);
        match outcome {
            AuthOutcome::Allow(grant) => {
                let State::Live { slot } = self.conns[id].state else { return };
                let Some(key) = self.sessions.get(slot).map(|session| session.key) else { return };
                let owner = self.sessions.standing_of(slot).map(|standing| Arc::clone(&standing.client.principal));
                if owner.is_some_and(|owner| owner != principal_of(&request, &grant)) {
                    // The Session, with its subscriptions and messages, belongs to the one who began it.
                    let ending = Ending::Server(ReasonCode::NOT_AUTHORIZED, "re-authentication as somebody else");
                    return self.end(id, ending);
                }
                self.grant(id, key, &request, &grant);
                self.check_subscriptions(key);
                self.send_auth(id, &request, ReasonCode::SUCCESS, grant.data.as_deref());
            }
            AuthOutcome::Challenge { data, state, plugin } if state.len() <= STATE_BYTES_MAX => {
                standing.state = state;
                standing.plugin = plugin;
                standing.challenged = true;
                self.send_auth(id, &request, ReasonCode::CONTINUE_AUTHENTICATION, Some(&data));
            }
            AuthOutcome::Deny(reason) if reason.is_error() => {
                self.end(id, Ending::Server(reason.for_disconnect(), "re-authentication failed"));
            }
            AuthOutcome::Unavailable => {
                self.end(id, Ending::Server(ReasonCode::SERVER_BUSY, "re-authentication is not possible now"));
            }
            _ => self.end(id, Ending::Server(ReasonCode::NOT_AUTHORIZED, "re-authentication failed")),
        }
    }
}
