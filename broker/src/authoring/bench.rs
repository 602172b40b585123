//! `plugin bench`: what a component costs.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use bytes::Bytes;
use serde::Serialize;
use wasmqtt_protocol::access::Action;
use wasmqtt_protocol::codec::{Qos, Version};
use wasmqtt_protocol::ports::{Access, AuthOutcome, AuthRequest, Client, Submission};
use wasmqtt_protocol::router::Message;
use wasmqtt_protocol::text::escaped;

use super::heard::Heard;
use super::{Bench, Subject, aloud};

/// How long each function is called.
const TIME: Duration = Duration::from_secs(2);
/// Calls before that, which are not measured.
const WARM_UP: usize = 100;
/// Bytes that are shown of why a call failed.
const FAILURE_BYTES_MAX: usize = 1000;
/// Payload of a message.
const PAYLOAD_BYTES: usize = 256;

/// One function: figures if every call was answered, otherwise the reason why one was not.
#[derive(Debug, Serialize)]
struct Row {
    function: String,
    #[serde(flatten)]
    figures: Option<Figures>,
    #[serde(skip_serializing_if = "Option::is_none")]
    failed: Option<String>,
}

#[derive(Debug, Serialize)]
struct Figures {
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
    plug_points: Vec<&'static str>,
    functions: Vec<Row>,
}

/// Calls each function that the component exports. `false`: not every call was answered.
pub(crate) fn bench(subject: &Subject, config: &[(String, String)], json: bool) -> anyhow::Result<(String, bool)> {
    let report = aloud(|heard| measured(subject, config, heard))?;
    let ok = report.functions.iter().all(|row| row.failed.is_none());
    let text = if json { crate::output::json(&report)? } else { shown(&report) };
    Ok((text, ok))
}

fn measured(subject: &Subject, config: &[(String, String)], heard: &Heard) -> anyhow::Result<Report> {
    let first = Bench::open(subject, config)?;
    let start = first.start;
    let bench = Bench::open_with(subject, config, first.close())?;
    let status = bench.status()?;
    let mut functions = Vec::new();
    if status.plug_points.contains(&"auth") {
        let call = || {
            let begun = Instant::now();
            let outcome = bench.run(bench.shard.authenticate(request()));
            let time = begun.elapsed();
            (!matches!(outcome, AuthOutcome::Unavailable)).then_some(time)
        };
        functions.push(measure("authenticate", 1, call, heard)?);
    }
    if status.plug_points.contains(&"acl") {
        let (client, accesses) = (client(), accesses());
        let call = || {
            let begun = Instant::now();
            let decisions = bench.run(bench.shard.authorize(Arc::clone(&client), Arc::clone(&accesses)));
            let time = begun.elapsed();
            decisions.iter().all(|decision| !decision.failed).then_some(time)
        };
        functions.push(measure("authorize", 1, call, heard)?);
    }
    if status.registered.before_store {
        for count in [1, 64] {
            let topic = topic_of(&status.registered.filters);
            let plugins = bench.shard.interest(&topic).before;
            let messages = vec![submission(&topic, plugins); count];
            let failures = bench.status()?.failures;
            let call = || {
                let messages = messages.clone();
                let begun = Instant::now();
                drop(bench.run(bench.shard.before_store(messages)));
                let time = begun.elapsed();
                // The answer does not tell a message that is discarded from one that broke the component.
                bench.status().is_ok_and(|status| status.failures == failures).then_some(time)
            };
            functions.push(measure(&format!("before-store, batch of {count}"), count, call, heard)?);
        }
    }
    let report = Report {
        start_ms: start.as_millis() as u64,
        start_compiled_ms: bench.start.as_millis() as u64,
        memory_bytes: status.memory_bytes,
        plug_points: status.plug_points,
        functions,
    };
    bench.close();
    Ok(report)
}

/// `call`: how long it took; `None`: it was not answered. That ends the measuring, since what comes after it would be
/// the time in which nobody is asked.
#[allow(clippy::cast_precision_loss, reason = "microseconds for people")]
fn measure(function: &str, messages: usize, call: impl Fn() -> Option<Duration>, heard: &Heard) -> anyhow::Result<Row> {
    let mut times = Vec::new();
    let mut begun = Instant::now();
    let mut count = 0_usize;
    while count < WARM_UP || begun.elapsed() < TIME {
        let Some(time) = call() else {
            let why = heard.take_failure().unwrap_or_else(|| "no answer".into());
            let failed = Some(format!("call {} failed: {}", count + 1, escaped(&why, FAILURE_BYTES_MAX)));
            return Ok(Row { function: function.to_owned(), figures: None, failed });
        };
        count += 1;
        if count > WARM_UP {
            times.push(time);
        } else {
            begun = Instant::now();
        }
    }
    let per_sec = times.len() as u64 * 1000 / (begun.elapsed().as_millis() as u64).max(1);
    times.sort_unstable();
    let at = |percent: usize| times.get(times.len() * percent / 100).map(|time| time.as_nanos() as f64 / 1000.0);
    let (p50_us, p99_us) = at(50).zip(at(99)).context("not one call in two seconds")?;
    let per_message_us = (messages > 1).then_some(p50_us / messages as f64);
    let figures = Some(Figures { per_sec, p50_us, p99_us, per_message_us });
    Ok(Row { function: function.to_owned(), figures, failed: None })
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
    if report.functions.is_empty() {
        let _ = writeln!(
            text,
            "exports {}: nothing that a client waits for (auth, acl, before-store), so there is nothing to measure",
            report.plug_points.join(", ")
        );
        return text;
    }
    let _ =
        writeln!(text, "{:28} {:>10} {:>10} {:>10} {:>12}", "FUNCTION", "CALLS/S", "P50 µs", "P99 µs", "MESSAGE µs");
    for Row { function, figures, failed } in &report.functions {
        if let Some(Figures { per_sec, p50_us, p99_us, per_message_us }) = figures {
            let message = per_message_us.map(|us| format!("{us:.2}")).unwrap_or_default();
            let _ = writeln!(text, "{function:28} {per_sec:>10} {p50_us:>10.2} {p99_us:>10.2} {message:>12}");
        }
        if let Some(failed) = failed {
            let _ = writeln!(text, "{function:28} {failed}");
        }
    }
    text
}
