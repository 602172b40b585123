//! The question who may connect, in the words of `wit/`.

use std::sync::Arc;

use bytes::Bytes;
use wasmqtt_protocol::access::{Action, Rule};
use wasmqtt_protocol::codec::{ReasonCode, Version};
use wasmqtt_protocol::ports::{AuthOutcome, AuthRequest, AuthStep, Grant};
use wasmqtt_protocol::text::escaped;
use wasmqtt_protocol::topic::Filter;

use crate::bindings::auth::exports::wasmqtt::plugin::auth as wit;
use crate::bindings::types::Pair;
use crate::bindings::{NAME_BYTES_MAX, failure};
use crate::call::{Question, Said};
use crate::config::{OnError, PluginLimits};
use crate::instance::Running;

/// Rules one client may be given.
const RULES_MAX: usize = 1000;

pub(crate) enum Authentication {
    Connect(Arc<AuthRequest>),
    Step(AuthStep),
}

impl Authentication {
    pub(crate) fn request(&self) -> &AuthRequest {
        match self {
            Self::Connect(request) => request,
            Self::Step(step) => &step.request,
        }
    }
}

impl Question for Authentication {
    type Answer = AuthOutcome;

    fn client_id(&self) -> &str {
        &self.request().client_id
    }

    fn bytes(&self) -> usize {
        let request = self.request();
        let text = |text: &Option<Arc<str>>| text.as_ref().map_or(0, |text| text.len());
        let binary = |bytes: &Option<Bytes>| bytes.as_ref().map_or(0, Bytes::len);
        let properties: usize = request.user_properties.iter().map(|(name, value)| name.len() + value.len() + 48).sum();
        let step = match self {
            Self::Connect(_) => 0,
            Self::Step(step) => step.data.len() + step.state.len(),
        };
        let (texts, binaries) =
            (text(&request.username) + text(&request.method), binary(&request.password) + binary(&request.data));
        request.client_id.len() + texts + binaries + properties + step
    }

    fn cpu_ms(limits: &PluginLimits) -> u64 {
        limits.cpu_ms
    }

    fn agree(one: &AuthOutcome, other: &AuthOutcome) -> bool {
        match (one, other) {
            // What an exchange is about may well be random.
            (AuthOutcome::Challenge { .. }, AuthOutcome::Challenge { .. }) => true,
            _ => one == other,
        }
    }

    fn fallback(&self, on_error: OnError) -> AuthOutcome {
        match on_error {
            OnError::Deny | OnError::Retry => AuthOutcome::Unavailable,
            OnError::Allow => AuthOutcome::Allow(Grant::default()),
            OnError::Skip => AuthOutcome::Next,
        }
    }

    async fn put(&self, running: &mut Running, plugin: &Arc<str>) -> wasmtime::Result<Said<AuthOutcome>> {
        let Some(auth) = &running.exports.auth else { return Ok(Said::nonsense("it does not export auth")) };
        let auth = auth.wasmqtt_plugin_auth();
        let answer = match self {
            Self::Connect(from) => auth.call_authenticate(&mut running.store, &request(from)).await?,
            Self::Step(from) => auth.call_proceed(&mut running.store, &step(from)).await?,
        };
        Ok(match answer {
            Ok(from) => Said::from_checked(outcome(from, self.request(), plugin)),
            Err(from) => Said::Failure(failure(from)),
        })
    }
}

/// `None`: about nothing.
fn rule_of(from: wit::Rule) -> Result<Option<Rule>, String> {
    let shown = escaped(&from.filter, NAME_BYTES_MAX);
    let filter = Filter::parse(&from.filter).map_err(|error| format!("rule for {shown:?}: {error}"))?;
    let action = match (from.publish, from.subscribe) {
        (true, true) => None,
        (true, false) => Some(Action::Publish),
        (false, true) => Some(Action::Subscribe),
        (false, false) => return Ok(None),
    };
    Ok(Some(Rule { action, filter, allow: from.allow }))
}

fn request(from: &AuthRequest) -> wit::Request {
    wit::Request {
        client_id: from.client_id.to_string(),
        username: from.username.as_deref().map(str::to_owned),
        password: from.password.as_deref().map(<[u8]>::to_vec),
        method: from.method.as_deref().map(str::to_owned),
        data: from.data.as_deref().map(<[u8]>::to_vec),
        address: from.address.map(|address| address.to_string()).unwrap_or_default(),
        listener: from.listener.to_string(),
        protocol_level: match from.version {
            Version::V31 => 3,
            Version::V311 => 4,
            Version::V5 => 5,
        },
        certificate_subject: None,
        user_properties: from
            .user_properties
            .iter()
            .map(|(name, value)| Pair { name: name.clone(), value: value.clone() })
            .collect(),
    }
}

fn step(from: &AuthStep) -> wit::Step {
    wit::Step {
        connect: request(&from.request),
        data: from.data.to_vec(),
        state: from.state.to_vec(),
        reauthenticate: from.reauthenticate,
    }
}

/// The broker's form of an outcome. `Err` says what is wrong with it.
fn outcome(from: wit::Outcome, request: &AuthRequest, plugin: &Arc<str>) -> Result<AuthOutcome, String> {
    match from {
        wit::Outcome::Next => Ok(AuthOutcome::Next),
        wit::Outcome::Allow(grant) => allowed(grant, request).map(AuthOutcome::Allow),
        wit::Outcome::Deny(code) if code >= 0x80 => Ok(AuthOutcome::Deny(ReasonCode(code))),
        wit::Outcome::Deny(code) => Err(format!("denied with Reason Code 0x{code:02X}, which is no error")),
        wit::Outcome::Challenge(_) if request.method.is_none() => {
            Err("challenge for a client without Authentication Method".into())
        }
        wit::Outcome::Challenge(challenge) => {
            within("data of a challenge", challenge.data.len(), BINARY_BYTES_MAX)?;
            within("state of a challenge", challenge.state.len(), STATE_BYTES_MAX)?;
            let (data, state) = (challenge.data.into(), challenge.state.into());
            Ok(AuthOutcome::Challenge { data, state, plugin: Arc::clone(plugin) })
        }
    }
}

/// What MQTT can carry as Binary Data or a string.
const BINARY_BYTES_MAX: usize = 65_535;
/// What the broker keeps between a challenge and its answer.
const STATE_BYTES_MAX: usize = 64 * 1024;

fn within(what: &str, bytes: usize, bytes_max: usize) -> Result<(), String> {
    if bytes > bytes_max { Err(format!("{what} has {bytes} bytes; at most {bytes_max} are allowed")) } else { Ok(()) }
}

fn allowed(grant: wit::Grant, request: &AuthRequest) -> Result<Grant, String> {
    within("principal", grant.principal.len(), BINARY_BYTES_MAX)?;
    within("data of a grant", grant.data.as_ref().map_or(0, Vec::len), BINARY_BYTES_MAX)?;
    let principal = match &request.username {
        Some(username) if grant.principal.is_empty() => username.to_string(),
        _ => grant.principal,
    };
    // Without a method there is no packet that could carry it.
    let data = grant.data.filter(|_| request.method.is_some()).map(Bytes::from);
    if grant.rules.len() > RULES_MAX {
        return Err(format!("{} rules; at most {RULES_MAX} are allowed", grant.rules.len()));
    }
    let rules = grant.rules.into_iter().filter_map(|rule| rule_of(rule).transpose()).collect::<Result<_, _>>()?;
    Ok(Grant { principal, data, rules, complete: grant.complete, expires: grant.expires })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_rule_is_named_in_short() {
        let filter = "\u{1}".repeat(1 << 20) + "#";
        let error = rule_of(wit::Rule { filter, publish: true, subscribe: true, allow: true }).err();
        assert!(error.is_some_and(|error| error.len() < 500));
    }
}
