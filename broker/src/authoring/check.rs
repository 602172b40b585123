//! `plugin check`: would the broker take it, and what would it have to be granted?

use std::fmt::Write as _;
use std::path::Path;

use serde::Serialize;
use wasmqtt_host::{Inspection, Status};

use super::{Bench, Subject, aloud};

#[derive(Serialize)]
struct Checked {
    #[serde(flatten)]
    inspection: Inspection,
    grants: Vec<String>,
    start_ms: u64,
    memory_bytes: usize,
    registration: wasmqtt_host::Registered,
}

/// Grants that its imports stand for.
fn grants(inspection: &Inspection) -> Vec<String> {
    let of_host = inspection.host_functions.iter().filter_map(|function| match function.as_str() {
        "publish" => Some("publish = [\"a topic filter\"]".to_owned()),
        "disconnect" | "ban" | "revoke" => Some(format!("{function} = true")),
        _ => None,
    });
    let imports = |package: &str| inspection.imports.iter().any(|name| name.starts_with(package));
    let http = imports("wasi:http/").then(|| "http = [\"https://a.server\"]".to_owned());
    let keyvalue = imports("wasi:keyvalue/").then(|| "keyvalue_mib = 16".to_owned());
    let hint = imports("wasi:filesystem/").then(|| {
        "files = [{ host = \"…\", guest = \"…\" }]   if it reads files: its language may import this anyway".to_owned()
    });
    of_host.chain(http).chain(keyvalue).chain(hint).collect()
}

/// Loads it as the broker would.
pub(crate) fn check(subject: &Subject, config: &[(String, String)], json: bool) -> anyhow::Result<String> {
    aloud(|_| loaded(subject, config, json))
}

fn loaded(subject: &Subject, config: &[(String, String)], json: bool) -> anyhow::Result<String> {
    let bench = Bench::open(subject, config)?;
    let inspection = bench.inspection()?;
    let Status { registered, memory_bytes, .. } = bench.status()?;
    let start_ms = bench.start.as_millis() as u64;
    let grants = grants(&inspection);
    let checked = Checked { inspection, grants, start_ms, memory_bytes, registration: registered };
    bench.close();
    if json {
        return crate::output::json(&checked);
    }
    Ok(shown(&subject.file, &checked))
}

fn shown(file: &Path, checked: &Checked) -> String {
    let Checked { inspection, grants, start_ms, memory_bytes, registration } = checked;
    let kib = memory_bytes / 1024;
    let mut text = format!(
        "{}: ok\n  {} bytes; compiled and started in {start_ms} ms; an instance has {kib} KiB of memory\n",
        file.display(),
        inspection.size
    );
    let _ = writeln!(text, "plug-points: {}", inspection.plug_points.join(", "));
    let wanted = [
        ("filters", registration.filters.join(" ")),
        ("events", registration.events.join(" ")),
        ("before-store", if registration.before_store { "yes".into() } else { String::new() }),
        ("at-rest", if registration.at_rest { "yes".into() } else { String::new() }),
        ("committed", if registration.committed { "yes".into() } else { String::new() }),
    ];
    for (name, value) in wanted.iter().filter(|(_, value)| !value.is_empty()) {
        let _ = writeln!(text, "registers {name}: {value}");
    }
    if grants.is_empty() {
        text.push_str("grants: none needed\n");
    } else {
        text.push_str("grants it needs:\n");
    }
    for grant in grants {
        let _ = writeln!(text, "  {grant}");
    }
    text
}
