//! `plugin test`: calls from a file against a component, without a broker.

use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, bail};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use wasmqtt_protocol::access::{Action, Decision, Verdict};
use wasmqtt_protocol::codec::{Qos, Version};
use wasmqtt_protocol::ports::{Accepted, Access, AuthOutcome, AuthRequest, Client, Event, EventKind, Submission};
use wasmqtt_protocol::router::Message;
use wasmqtt_protocol::text::escaped;

use super::heard::Heard;
use super::{Bench, Subject, aloud};

/// Bytes that are shown of why there was no answer.
const FAILURE_BYTES_MAX: usize = 1000;

/// A file of cases.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Cases {
    /// Settings of the plugin, for all cases.
    #[serde(default)]
    config: toml::Table,
    #[serde(rename = "case", default)]
    cases: Vec<Case>,
}

/// What can be called.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Call {
    Authenticate,
    Authorize,
    BeforeStore,
    Observed,
}

/// One call, and what must come back.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    name: String,
    call: Call,
    /// Instead of those of the file.
    config: Option<toml::Table>,
    #[serde(default = "client")]
    client_id: String,
    #[serde(default)]
    principal: String,
    username: Option<String>,
    password: Option<String>,
    address: Option<std::net::IpAddr>,
    #[serde(default = "listener")]
    listener: String,
    publish: Option<String>,
    subscribe: Option<String>,
    #[serde(default)]
    topic: String,
    #[serde(default)]
    payload: String,
    #[serde(default)]
    qos: u8,
    #[serde(default)]
    retain: bool,
    #[serde(default)]
    kind: String,
    #[serde(default)]
    fields: toml::Table,
    /// Only what is named is compared.
    expect: Map<String, Value>,
}

fn client() -> String {
    "c".into()
}

fn listener() -> String {
    "mqtt://127.0.0.1:1883".into()
}

/// How a case went.
#[derive(Debug, Serialize)]
struct Outcome {
    name: String,
    ok: bool,
    expected: Map<String, Value>,
    actual: Map<String, Value>,
    /// Why the component gave no answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    failure: Option<String>,
}

fn pairs(table: &toml::Table) -> Vec<(String, String)> {
    let text = |value: &toml::Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    table.iter().map(|(name, value)| (name.clone(), text(value))).collect()
}

impl Case {
    fn client(&self) -> Arc<Client> {
        Arc::new(Client {
            client_id: self.client_id.as_str().into(),
            principal: self.principal.as_str().into(),
            listener: self.listener.as_str().into(),
        })
    }

    fn qos(&self) -> anyhow::Result<Qos> {
        Qos::from_bits(self.qos).with_context(|| format!("qos = {}: allowed are 0, 1 and 2", self.qos))
    }

    fn run(&self, bench: &Bench) -> anyhow::Result<Value> {
        match self.call {
            Call::Authenticate => Ok(self.authenticate(bench)),
            Call::Authorize => self.authorize(bench),
            Call::BeforeStore => self.before_store(bench),
            Call::Observed => self.observed(bench),
        }
    }

    fn authenticate(&self, bench: &Bench) -> Value {
        let request = AuthRequest {
            client_id: self.client_id.as_str().into(),
            username: self.username.as_deref().map(Into::into),
            password: self.password.as_ref().map(|password| Bytes::from(password.clone())),
            method: None,
            data: None,
            version: Version::V5,
            address: self.address,
            listener: self.listener.as_str().into(),
            user_properties: Vec::new(),
        };
        match bench.run(bench.shard.authenticate(Arc::new(request))) {
            AuthOutcome::Next => json!({ "outcome": "next" }),
            AuthOutcome::Allow(grant) => json!({
                "outcome": "allow",
                "principal": grant.principal,
                "rules": grant.rules.len(),
                "complete": grant.complete,
                "expires": grant.expires,
            }),
            AuthOutcome::Deny(reason) => json!({ "outcome": "deny", "reason": reason.0 }),
            AuthOutcome::Challenge { data, .. } => {
                json!({ "outcome": "challenge", "data": String::from_utf8_lossy(&data) })
            }
            AuthOutcome::Unavailable => json!({ "outcome": "failed" }),
        }
    }

    fn authorize(&self, bench: &Bench) -> anyhow::Result<Value> {
        let (action, topic) = match (&self.publish, &self.subscribe) {
            (Some(topic), None) => (Action::Publish, topic),
            (None, Some(filter)) => (Action::Subscribe, filter),
            _ => bail!("`authorize` needs one of `publish` and `subscribe`"),
        };
        let access = Access { action, topic: topic.as_str().into(), qos: self.qos()?, retain: self.retain };
        let decisions = bench.run(bench.shard.authorize(self.client(), Arc::new([access])));
        let Some(Decision { verdict, lease, failed }) = decisions.into_iter().next() else { bail!("no decision") };
        let (verdict, reason) = match verdict {
            _ if failed => ("failed", None),
            None => ("next", None),
            Some(Verdict::Allow) => ("allow", None),
            Some(Verdict::Deny(reason)) => ("deny", Some(reason.0)),
        };
        let scope = lease.as_ref().and_then(|lease| lease.scope.as_ref()).map(ToString::to_string);
        Ok(json!({
            "verdict": verdict,
            "reason": reason,
            "ttl": lease.as_ref().map_or(0, |lease| lease.seconds),
            "scope": scope.unwrap_or_default(),
        }))
    }

    fn before_store(&self, bench: &Bench) -> anyhow::Result<Value> {
        let message = Message {
            topic: self.topic.as_str().into(),
            payload: Bytes::from(self.payload.clone()),
            properties: Bytes::new(),
            qos: self.qos()?,
            retain: self.retain,
            expires_at_ms: None,
            publisher: None,
        };
        let interest = bench.shard.interest(&self.topic);
        if interest.before == 0 {
            return Ok(json!({ "outcome": "not shown" }));
        }
        let sent =
            Submission { plugins: interest.before, client: Some(self.client()), message: Arc::new(message), fed: None };
        let accepted = bench.run(bench.shard.before_store(vec![sent])).into_iter().next();
        let text = |message: &Message| String::from_utf8_lossy(&message.payload).into_owned();
        Ok(match accepted.context("no answer")? {
            Accepted::Keep(message) => json!({ "outcome": "keep", "payload": text(&message) }),
            Accepted::Seal { delivered, kept } => {
                json!({ "outcome": "seal", "payload": text(&delivered), "kept": text(&kept) })
            }
            Accepted::Discard(reason) => json!({ "outcome": "discard", "reason": reason.0 }),
        })
    }

    fn observed(&self, bench: &Bench) -> anyhow::Result<Value> {
        let kind = EventKind::ALL.into_iter().find(|kind| kind.name() == self.kind);
        let kind = kind.with_context(|| {
            let names: Vec<_> = EventKind::ALL.iter().map(|kind| kind.name()).collect();
            format!("kind = {:?}: allowed are {}", self.kind, names.join(", "))
        })?;
        if bench.shard.wanted_events() & kind.bit() == 0 {
            return Ok(json!({ "outcome": "not shown" }));
        }
        // Names of fields are fixed in the broker; a test may use any.
        let fields = pairs(&self.fields).into_iter().map(|(name, value)| (&*name.leak(), value)).collect();
        bench.shard.observe(vec![Event { kind, at_ms: 0, client: self.client(), fields }]);
        for _ in 0..500 {
            let status = bench.status()?;
            if status.calls > 0 && status.instances > 0 {
                std::thread::sleep(std::time::Duration::from_millis(20));
                return Ok(json!({ "outcome": "told", "failures": bench.status()?.failures }));
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        bail!("it was not told within five seconds")
    }
}

/// Runs all cases; an error if one fails.
pub(crate) fn test(subject: &Subject, cases: &Path, json: bool) -> anyhow::Result<(String, bool)> {
    aloud(|heard| run(subject, cases, json, heard))
}

fn run(subject: &Subject, cases: &Path, json: bool, heard: &Heard) -> anyhow::Result<(String, bool)> {
    let text = std::fs::read_to_string(cases).with_context(|| format!("read {}", cases.display()))?;
    let Cases { config, cases: list } = toml::from_str(&text).with_context(|| format!("read {}", cases.display()))?;
    if list.is_empty() {
        bail!("{} has no [[case]]", cases.display());
    }
    let mut outcomes = Vec::new();
    let mut cache = tempfile::tempdir().context("make a folder for compiled components")?;
    for case in list {
        // Each with an instance of its own; compiled once.
        let bench = Bench::open_with(subject, &pairs(case.config.as_ref().unwrap_or(&config)), cache)?;
        let actual = case.run(&bench).with_context(|| format!("case {:?}", case.name))?;
        cache = bench.close();
        let failure = heard.take_failure();
        let actual = actual.as_object().cloned().unwrap_or_default();
        let ok = case.expect.iter().all(|(name, expected)| actual.get(name) == Some(expected));
        outcomes.push(Outcome { name: case.name, ok, expected: case.expect, actual, failure });
    }
    let ok = outcomes.iter().all(|outcome| outcome.ok);
    let text = if json { crate::output::json(&outcomes)? } else { shown(&outcomes) };
    Ok((text, ok))
}

fn shown(outcomes: &[Outcome]) -> String {
    let mut text = String::new();
    for Outcome { name, ok, expected, actual, failure } in outcomes {
        let _ = writeln!(text, "{} {name}", if *ok { "ok  " } else { "FAIL" });
        if let Some(failure) = failure.as_ref().filter(|_| !ok) {
            let _ = writeln!(text, "     no answer: {}", escaped(failure, FAILURE_BYTES_MAX));
        }
        for (key, wanted) in expected.iter().filter(|(key, wanted)| actual.get(*key) != Some(wanted)) {
            let _ = writeln!(text, "     - {key}: {wanted}");
            let _ = writeln!(text, "     + {key}: {}", actual.get(key).unwrap_or(&Value::Null));
        }
    }
    let failed = outcomes.iter().filter(|outcome| !outcome.ok).count();
    let _ = writeln!(text, "{} cases, {failed} failed", outcomes.len());
    text
}
