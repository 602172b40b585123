//! The question what a client may do, in the words of `wit/`.

use std::sync::Arc;

use wasmqtt_protocol::access::{Action, Decision, Lease, Verdict};
use wasmqtt_protocol::codec::ReasonCode;
use wasmqtt_protocol::ports::{Access, Client};
use wasmqtt_protocol::text::escaped;
use wasmqtt_protocol::topic::Filter;

use crate::bindings::acl::exports::wasmqtt::plugin::acl as wit;
use crate::bindings::{NAME_BYTES_MAX, failure, types};
use crate::call::{Question, Said};
use crate::config::{OnError, PluginLimits};
use crate::instance::Running;

/// The longest lease that is kept.
const LEASE_SECS_MAX: u32 = 24 * 3600;

/// One client, and what it wants to do.
pub(crate) struct Authorization {
    pub(crate) client: Arc<Client>,
    pub(crate) accesses: Vec<Access>,
}

pub(crate) fn client(from: &Client) -> types::Client {
    types::Client {
        client_id: from.client_id.to_string(),
        principal: from.principal.to_string(),
        listener: from.listener.to_string(),
    }
}

impl Question for Authorization {
    type Answer = Vec<Decision>;

    fn client_id(&self) -> &str {
        &self.client.client_id
    }

    fn bytes(&self) -> usize {
        self.client.client_id.len() + self.accesses.iter().map(|access| access.topic.len() + 64).sum::<usize>()
    }

    fn cpu_ms(limits: &PluginLimits) -> u64 {
        limits.hook_cpu_ms
    }

    fn agree(one: &Vec<Decision>, other: &Vec<Decision>) -> bool {
        one.iter().map(|decision| decision.verdict).eq(other.iter().map(|decision| decision.verdict))
    }

    fn fallback(&self, on_error: OnError) -> Vec<Decision> {
        let failed = Decision { verdict: on_error.verdict(), lease: None, failed: true };
        vec![failed; self.accesses.len()]
    }

    async fn put(&self, running: &mut Running, _plugin: &Arc<str>) -> wasmtime::Result<Said<Vec<Decision>>> {
        let Some(acl) = &running.exports.acl else { return Ok(Said::nonsense("it does not export acl")) };
        let what: Vec<wit::Access> = self.accesses.iter().map(access).collect();
        let answer = acl.wasmqtt_plugin_acl().call_authorize(&mut running.store, &client(&self.client), &what).await?;
        Ok(match answer {
            Ok(decisions) if decisions.len() == what.len() => {
                Said::from_checked(decisions.into_iter().map(decision).collect())
            }
            Ok(decisions) => Said::nonsense(format!("{} decisions for {} questions", decisions.len(), what.len())),
            Err(from) => Said::Failure(failure(from)),
        })
    }
}

fn access(from: &Access) -> wit::Access {
    wit::Access {
        action: match from.action {
            Action::Publish => wit::Action::Publish,
            Action::Subscribe => wit::Action::Subscribe,
        },
        topic: from.topic.to_string(),
        qos: from.qos as u8,
        retain: from.retain,
    }
}

fn decision(from: wit::Decision) -> Result<Decision, String> {
    let verdict = match from.verdict {
        wit::Verdict::Next => None,
        wit::Verdict::Allow => Some(Verdict::Allow),
        wit::Verdict::Deny(code) if code >= 0x80 => Some(Verdict::Deny(ReasonCode(code))),
        wit::Verdict::Deny(code) => return Err(format!("denied with Reason Code 0x{code:02X}, which is no error")),
    };
    if verdict.is_none() || from.ttl == 0 {
        return Ok(Decision { verdict, lease: None, failed: false });
    }
    let scope = match from.scope.as_str() {
        "" => None,
        text => {
            let shown = escaped(text, NAME_BYTES_MAX);
            Some(Filter::parse(text).map_err(|error| format!("scope {shown:?}: {error}"))?)
        }
    };
    let lease = Lease { scope, seconds: from.ttl.min(LEASE_SECS_MAX) };
    Ok(Decision { verdict, lease: Some(lease), failed: false })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_scope_is_named_in_short() {
        let scope = "\u{1}".repeat(1 << 20) + "#";
        let error = decision(wit::Decision { verdict: wit::Verdict::Allow, scope, ttl: 1 }).err();
        assert!(error.is_some_and(|error| error.len() < 500));
    }
}
