//! `plugin bench`: what a component costs.

use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use bytes::Bytes;
use serde::Serialize;
use wasmqtt_protocol::access::Action;
use wasmqtt_protocol::codec::{Qos, Version};
use wasmqtt_protocol::ports::{Access, AuthRequest, Client, Submission};
use wasmqtt_protocol::router::Message;

use super::Bench;

/// How long each function is called.
const TIME: Duration = Duration::from_secs(2);
/// Calls before that, which are not measured.
const WARM_UP: usize = 100;
/// Payload of a message.
const PAYLOAD_BYTES: usize = 256;

/// One function.
#[derive(Debug, Serialize)]
struct Row {
    function: String,
    per_sec: u64,
    p50_us: f64,
    p99_us: f64,
    /// Of a message, where a call is about several.
    per_message_us: Option<f64>,
}

#[derive(Debug, Serialize)]
struct Report {
    start_ms: u64,
    start_compiled_ms: u64,
    memory_bytes: usize,
    functions: Vec<Row>,
}

/// Calls each function that the component exports.
pub(crate) fn bench(file: &Path, config: &[(String, String)], json: bool) -> anyhow::Result<String> {
    let first = Bench::open(file, config)?;
    let start = first.start;
    let bench = Bench::open_with(file, config, first.close())?;
    let status = bench.status()?;
    let mut functions = Vec::new();
    if status.plug_points.contains(&"auth") {
        functions.push(measure("authenticate", 1, || drop(bench.run(bench.shard.authenticate(request()))))?);
    }
    if status.plug_points.contains(&"acl") {
        let (client, accesses) = (client(), accesses());
        let call = || drop(bench.run(bench.shard.authorize(Arc::clone(&client), Arc::clone(&accesses))));
        functions.push(measure("authorize", 1, call)?);
    }
    if status.registered.before_store {
        for count in [1, 64] {
            let topic = topic_of(&status.registered.filters);
            let plugins = bench.shard.interest(&topic).before;
            let messages = vec![submission(&topic, plugins); count];
            let call = || drop(bench.run(bench.shard.before_store(messages.clone())));
            functions.push(measure(&format!("before-store, batch of {count}"), count, call)?);
        }
    }
    if functions.is_empty() {
        bail!("{} exports nothing that a client waits for: no auth, no acl, no before-store", file.display());
    }
    let failures = bench.status()?.failures;
    let report = Report {
        start_ms: start.as_millis() as u64,
        start_compiled_ms: bench.start.as_millis() as u64,
        memory_bytes: status.memory_bytes,
        functions,
    };
    bench.close();
    if json {
        return Ok(serde_json::to_string_pretty(&report).context("write JSON")? + "\n");
    }
    let mut text = shown(&report);
    if failures > 0 {
        let _ = writeln!(text, "{failures} calls failed: these figures say little");
    }
    Ok(text)
}

#[allow(clippy::cast_precision_loss, reason = "microseconds for people")]
fn measure(function: &str, messages: usize, call: impl Fn()) -> anyhow::Result<Row> {
    (0..WARM_UP).for_each(|_| call());
    let begun = Instant::now();
    let mut times = Vec::new();
    while begun.elapsed() < TIME {
        let at = Instant::now();
        call();
        times.push(at.elapsed());
    }
    let per_sec = times.len() as u64 * 1000 / (begun.elapsed().as_millis() as u64).max(1);
    times.sort_unstable();
    let at = |percent: usize| times.get(times.len() * percent / 100).map(|time| time.as_nanos() as f64 / 1000.0);
    let (p50_us, p99_us) = at(50).zip(at(99)).context("not one call in two seconds")?;
    let per_message_us = (messages > 1).then_some(p50_us / messages as f64);
    Ok(Row { function: function.to_owned(), per_sec, p50_us, p99_us, per_message_us })
}

/// A Topic Name that one of the filters matches.
fn topic_of(filters: &[String]) -> String {
    filters.first().map_or_else(|| "a".to_owned(), |filter| filter.replace(['+', '#'], "a"))
}

fn request() -> Arc<AuthRequest> {
    Arc::new(AuthRequest {
        client_id: "bench".into(),
        username: Some("ann".into()),
        password: Some(Bytes::from_static(b"secret")),
        method: None,
        data: None,
        version: Version::V5,
        address: Some([127, 0, 0, 1].into()),
        listener: "mqtt://127.0.0.1:1883".into(),
        user_properties: Vec::new(),
    })
}

fn client() -> Arc<Client> {
    Arc::new(Client { client_id: "bench".into(), principal: "ann".into(), listener: "mqtt://127.0.0.1:1883".into() })
}

fn accesses() -> Arc<[Access]> {
    Arc::new([Access {
        action: Action::Publish,
        topic: "plant/7/temperature".into(),
        qos: Qos::AtLeastOnce,
        retain: false,
    }])
}

fn submission(topic: &str, plugins: u64) -> Submission {
    let message = Message {
        topic: topic.into(),
        payload: Bytes::from(vec![b'x'; PAYLOAD_BYTES]),
        properties: Bytes::new(),
        qos: Qos::AtLeastOnce,
        retain: false,
        expires_at_ms: None,
        publisher: None,
    };
    Submission { plugins, client: Some(client()), message: Arc::new(message), fed: None }
}

fn shown(report: &Report) -> String {
    let mut text = format!(
        "starts in {} ms, in {} ms once it is compiled; an instance has {} KiB of memory\n",
        report.start_ms,
        report.start_compiled_ms,
        report.memory_bytes / 1024
    );
    let _ =
        writeln!(text, "{:28} {:>10} {:>10} {:>10} {:>12}", "FUNCTION", "CALLS/S", "P50 µs", "P99 µs", "MESSAGE µs");
    for row in &report.functions {
        let message = row.per_message_us.map(|us| format!("{us:.2}")).unwrap_or_default();
        let _ = writeln!(
            text,
            "{:28} {:>10} {:>10.2} {:>10.2} {message:>12}",
            row.function, row.per_sec, row.p50_us, row.p99_us
        );
    }
    text
}
