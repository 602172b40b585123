//! Commands for the plugins of a running broker: `plugin list`, `deploy`, `rollback`, `promote`, `explain`.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow, bail};
use clap::Args;
use serde_json::Value;
use wasmqtt_protocol::text::{Escaped, escaped};

use crate::control::{Answer, Request, ask};
use crate::{output, settings};

/// Which broker.
#[derive(Debug, Args)]
pub(crate) struct Which {
    /// Configuration file of the broker; without it, the data folder `data` here.
    #[arg(short, long, value_name = "FILE")]
    config: Option<PathBuf>,
}

impl Which {
    pub(crate) fn data_dir(&self) -> anyhow::Result<PathBuf> {
        Ok(match &self.config {
            Some(file) => settings::data_dir(file)?,
            None => settings::defaults(&[])?.data_dir,
        })
    }
}

/// Number of hexadecimal digits by which people tell versions apart.
const SHORT: usize = 12;

fn short(digest: &str) -> &str {
    &digest[..digest.len().min(SHORT)]
}

pub(crate) fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

/// A text of others as it can be printed: on one line, without control characters.
fn shown<'a>(value: &'a Value, key: &str) -> Escaped<'a> {
    escaped(text(value, key), TEXT_BYTES_MAX)
}

pub(crate) fn number(value: &Value, key: &str) -> u64 {
    value[key].as_u64().unwrap_or_default()
}

/// What `plugin list` prints.
pub(crate) fn list(which: &Which, json: bool) -> anyhow::Result<String> {
    let Answer::Plugins(plugins) = ask(&which.data_dir()?, &Request::List, &[])? else { bail!("an unexpected answer") };
    if json {
        return output::json(&plugins);
    }
    let plugins = plugins.as_array().map(Vec::as_slice).unwrap_or_default();
    let head = ["NAME", "BUILD", "VERSION", "PLUG-POINTS", "CALLS", "FAILURES", "EARLIER"].map(str::to_owned);
    let rows = plugins.iter().map(|plugin| {
        let names = |key: &str| plugin[key].as_array().into_iter().flatten().filter_map(Value::as_str);
        let points: Vec<&str> =
            names("plug_points").filter(|name| !matches!(*name, "lifecycle" | "handover")).collect();
        let earlier: Vec<&str> =
            names("versions").filter(|digest| *digest != text(plugin, "digest")).map(short).collect();
        [
            text(plugin, "name").to_owned(),
            number(plugin, "generation").to_string(),
            short(text(plugin, "digest")).to_owned(),
            points.join(","),
            number(plugin, "calls").to_string(),
            number(plugin, "failures").to_string(),
            earlier.join(" "),
        ]
    });
    let mut shown = table(&std::iter::once(head).chain(rows).collect::<Vec<_>>());
    for plugin in plugins.iter().filter(|plugin| plugin["compiling"].is_object()) {
        let (name, job) = (text(plugin, "name"), &plugin["compiling"]);
        let (bytes, seconds) = (number(job, "bytes"), number(job, "seconds"));
        let what = if job["waits"] == Value::Bool(true) { "waits to be compiled" } else { "is being compiled" };
        let _ = writeln!(shown, "{name}: a build of {bytes} bytes {what}, for {seconds} s so far");
    }
    for plugin in plugins.iter().filter(|plugin| plugin["candidate"].is_object()) {
        let tried = &plugin["candidate"];
        let how = match tried["percent"].as_u64() {
            Some(percent) => format!("a canary for {percent} % of the clients"),
            None => format!("a shadow: {} of {} answers differ", number(tried, "differs"), number(tried, "compared")),
        };
        let (name, version, failures) = (text(plugin, "name"), short(text(tried, "digest")), number(tried, "failures"));
        let calls = number(tried, "calls");
        let _ = writeln!(shown, "{name}: {version} is on trial, {how}; {failures} of {calls} calls failed");
    }
    for plugin in plugins {
        shown += &notices(plugin);
    }
    Ok(shown)
}

/// Bytes of one text of others in what is printed.
const TEXT_BYTES_MAX: usize = 4096;

/// What is worth knowing and is not there as a rule.
fn notices(plugin: &Value) -> String {
    let name = text(plugin, "name");
    let kinds = [
        ("feed_aside", "messages are set aside, see `wasmqtt plugin feed list`"),
        ("feed_dropped", "messages were dropped, because too many waited or were set aside"),
        ("events_dropped", "events were dropped, because too many waited"),
        ("interest_dropped", "changes of filters were dropped, because too many waited"),
    ];
    let told = kinds.iter().filter(|(key, _)| number(plugin, key) > 0);
    told.map(|(key, what)| format!("{name}: {} {what}\n", number(plugin, key))).collect::<Vec<_>>().concat()
}

pub(crate) fn table<const N: usize>(rows: &[[String; N]]) -> String {
    // Names and versions are texts of others.
    let rows: Vec<[String; N]> =
        rows.iter().map(|row| row.each_ref().map(|cell| escaped(cell, TEXT_BYTES_MAX).to_string())).collect();
    let widths: Vec<usize> =
        (0..N).map(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0)).collect();
    let mut text = String::new();
    for row in &rows {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        let _ = writeln!(text, "{}", cells.collect::<Vec<_>>().join("  ").trim_end());
    }
    text
}

/// Name of the plugin that a file is for: its stem, with `_` as cargo writes it read as `-`.
fn plugin_name(file: &Path) -> anyhow::Result<String> {
    let stem = file.file_stem().ok_or_else(|| anyhow!("{} is no name of a file", file.display()))?;
    Ok(stem.to_string_lossy().replace('_', "-"))
}

/// Replaces plugins of a running broker in one step.
pub(crate) fn deploy(which: &Which, name: Option<&str>, fresh: bool, files: &[PathBuf]) -> anyhow::Result<String> {
    if name.is_some() && files.len() > 1 {
        bail!("--name is for one file; there are {}", files.len());
    }
    let mut names = Vec::new();
    let mut components = Vec::new();
    for file in files {
        let component = std::fs::read(file).with_context(|| format!("read {}", file.display()))?;
        let name = name.map_or_else(|| plugin_name(file), |name| Ok(name.to_owned()))?;
        names.push((name, component.len() as u64));
        components.push(component);
    }
    let deployed: Vec<String> = names.iter().map(|(name, _)| name.clone()).collect();
    ask(&which.data_dir()?, &Request::Deploy { files: names, fresh }, &components)?;
    Ok(format!("deployed {}\n", deployed.join(", ")))
}

/// Lets an earlier version serve again.
pub(crate) fn roll_back(which: &Which, name: &str, digest: Option<&str>) -> anyhow::Result<String> {
    let request = Request::RollBack { name: name.to_owned(), digest: digest.map(str::to_owned) };
    ask(&which.data_dir()?, &request, &[])?;
    Ok(format!("rolled {name} back\n"))
}

/// Lets the build on trial serve everybody.
pub(crate) fn promote(which: &Which, name: &str) -> anyhow::Result<String> {
    ask(&which.data_dir()?, &Request::Promote { name: name.to_owned() }, &[])?;
    Ok(format!("promoted {name}\n"))
}

/// An access that is asked about.
#[derive(Debug, Args)]
pub(crate) struct Access {
    /// Client Identifier.
    #[arg(long, value_name = "ID")]
    client: String,
    /// Its identity, if it is not connected.
    #[arg(long, value_name = "NAME")]
    principal: Option<String>,
    /// May it publish to this topic?
    #[arg(long, value_name = "TOPIC", required_unless_present = "subscribe", conflicts_with = "subscribe")]
    publish: Option<String>,
    /// May it subscribe to this filter?
    #[arg(long, value_name = "FILTER")]
    subscribe: Option<String>,
}

/// Who would decide what, and why.
pub(crate) fn explain(which: &Which, access: &Access, json: bool) -> anyhow::Result<String> {
    let (publish, topic) = match (&access.publish, &access.subscribe) {
        (Some(topic), _) => (true, topic.clone()),
        (None, Some(filter)) => (false, filter.clone()),
        (None, None) => bail!("say --publish TOPIC or --subscribe FILTER"),
    };
    let request = Request::Explain {
        client_id: access.client.clone(),
        principal: access.principal.clone(),
        publish,
        topic: topic.clone(),
    };
    let Answer::Explanation(found) = ask(&which.data_dir()?, &request, &[])? else { bail!("an unexpected answer") };
    if json {
        return output::json(&found);
    }
    let what = if publish { "publish to" } else { "subscribe to" };
    let state = if found["connected"] == Value::Bool(true) { "connected" } else { "not connected" };
    let (client_id, principal) = (shown(&found, "client_id"), shown(&found, "principal"));
    let topic = escaped(&topic, TEXT_BYTES_MAX);
    let mut lines = format!("client {client_id} (principal {principal:?}, {state}) wants to {what} {topic}\n");
    if found["known"].is_string() {
        let _ = writeln!(lines, "  without asking: {}", shown(&found, "known"));
    }
    for opinion in found["opinions"].as_array().into_iter().flatten() {
        let (plugin, generation) = (shown(opinion, "plugin"), number(opinion, "generation"));
        let (verdict, note) = (shown(opinion, "verdict"), shown(opinion, "note"));
        let _ = writeln!(lines, "  {plugin} (build {generation}): {verdict} — {note}");
    }
    let _ = writeln!(lines, "=> {}", shown(&found, "verdict"));
    Ok(lines)
}
