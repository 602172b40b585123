//! `[[plugin]]`: what the file says about one plugin.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use wasmqtt_host::{FileGrant, Grants, Mode, PluginConfig, PluginLimits, Rollout};
use wasmqtt_protocol::topic::Filter;
use wasmqtt_server::Listener;

use super::grants::Granted;
use super::listener::meant_names;
use super::read::{Section, Source, Text};
use super::{MODES, ON_ERROR, ORDER_DEFAULT, Problem};

/// What `[[plugin]]` tables are read with.
pub(super) struct Plugins<'s, 'a> {
    /// Where relative paths begin.
    pub(super) base: &'s Path,
    /// The plugin folder.
    pub(super) dir: Option<&'s Path>,
    pub(super) listeners: &'s [Listener],
    /// Components are read as well, and what they import must be granted.
    pub(super) reads_components: bool,
    /// Of those so far.
    pub(super) names: HashSet<&'a str>,
    /// Grants of those so far, to be checked when all plugins are known.
    pub(super) granted: Vec<Granted<'a>>,
}

pub(super) fn meant_plugin<'a>(mut plugin: Section<'a>, plugins: &mut Plugins<'_, 'a>) -> Option<PluginConfig> {
    let base = plugins.base;
    let name = plugin.required("name", "a name such as \"auth-file\"");
    if let Some(name) = &name {
        if !wasmqtt_host::is_plugin_name(name.value) {
            plugin.problem(name, "must be 1 to 64 letters, digits, `-` or `_`");
        } else if !plugins.names.insert(name.value) {
            plugin.problem(name, "another [[plugin]] has this name already");
        }
    }
    let path = meant_plugin_path(&mut plugin, name.as_ref(), plugins.dir.unwrap_or(base));
    let sha256 = plugin.text("sha256");
    if let Some(digest) = &sha256
        && !(digest.value.len() == 64 && digest.value.bytes().all(|byte| byte.is_ascii_hexdigit()))
    {
        plugin.problem(digest, "must be 64 hexadecimal digits");
    }
    let order = plugin.number("order", ORDER_DEFAULT, -1_000_000..=1_000_000);
    let on_error = plugin.choice("on_error", &ON_ERROR).unwrap_or_default();
    let config = flatten(plugin.table("config"));

    let listeners = meant_names(&mut plugin, plugins.listeners, base);
    let topics = filters(&mut plugin, "topics");
    let (files, grants) = meant_grants(plugin.section("grants"), base, &mut plugins.granted);
    let rollout = meant_rollout(&mut plugin);
    let probation = plugin.seconds("probation_secs", Duration::from_mins(1), 0..=86_400);
    let mut default = PluginLimits::default();
    if !grants.http.is_empty() || !grants.sockets.is_empty() {
        default.instances = NETWORK_INSTANCES;
    }
    let limits = meant_limits(plugin.section("limits"), default);
    plugin.finish();
    if let (Some(name), Some(path)) = (&name, &path)
        && plugins.reads_components
        && path.is_file()
        && let Err(error) = wasmqtt_host::check_grants(path, &grants)
    {
        plugin.problem(name, &format!("{}: {error}", path.display()));
    }
    Some(PluginConfig {
        name: name?.value.to_owned(),
        path: path?,
        order,
        on_error,
        config,
        files,
        grants,
        listeners,
        topics,
        limits,
        rollout,
        probation,
        sha256: sha256.map(|digest| digest.value.to_ascii_lowercase()),
    })
}

fn meant_rollout(plugin: &mut Section<'_>) -> Rollout {
    let percent: u8 = plugin.number("canary", 0, 0..=99);
    let time = plugin.seconds("canary_secs", Duration::from_mins(5), 1..=604_800);
    let shadow = plugin.flag("shadow").unwrap_or(false);
    match (shadow, percent) {
        (true, _) => Rollout::Shadow,
        (false, 0) => Rollout::AtOnce,
        (false, percent) => Rollout::Canary { percent, time },
    }
}

fn meant_grants<'a>(mut grants: Section<'a>, base: &Path, granted: &mut Vec<Granted<'a>>) -> (Vec<FileGrant>, Grants) {
    let files = grants.sections("files").into_iter().filter_map(|file| meant_file_grant(file, base, granted)).collect();
    let meant = Grants {
        publish: filters(&mut grants, "publish"),
        disconnect: grants.flag("disconnect").unwrap_or(false),
        ban: grants.flag("ban").unwrap_or(false),
        revoke: grants.flag("revoke").unwrap_or(false),
        keyvalue_mib: grants.number("keyvalue_mib", 0, 0..=4_096),
        environment: flatten(grants.table("environment")),
        http: parsed(&mut grants, "http"),
        sockets: parsed(&mut grants, "sockets"),
    };
    grants.finish();
    (files, meant)
}

/// Instances per shard of plugins that may use the network: most of their calls wait for it.
const NETWORK_INSTANCES: usize = 16;

/// Limits as `KEY=VALUE` on the command line, with the keys and ranges of the configuration file.
///
/// # Errors
/// Names what is wrong and what is allowed.
pub(crate) fn limits(pairs: &[(String, String)], default: PluginLimits) -> Result<PluginLimits, String> {
    let is_word = |text: &str| text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-'));
    let is_number = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'_') && !text.is_empty();
    if let Some((key, value)) = pairs.iter().find(|(key, value)| !is_word(key) || !is_number(value)) {
        return Err(format!("{key}={value}: allowed are a key of `limits` and a number"));
    }
    // What is no number becomes a text, so that the message about it names its key.
    let number = |text: &str| text.parse::<i64>().map_or_else(|_| format!("\"{text}\""), |number| number.to_string());
    let lines = pairs.iter().map(|(key, value)| format!("{key} = {}\n", number(value)));
    let text = std::iter::once("[limits]\n".to_owned()).chain(lines).collect::<String>();
    let source = Source::new(&text);
    let shown =
        |problems: Vec<Problem>| problems.into_iter().map(|problem| problem.text).collect::<Vec<_>>().join("; ");
    let document = source.parse().map_err(shown)?;
    let mut root = source.root(&document);
    let meant = meant_limits(root.section("limits"), default);
    source.finish().map_err(shown)?;
    Ok(meant)
}

fn meant_limits(mut limits: Section<'_>, default: PluginLimits) -> PluginLimits {
    let meant = PluginLimits {
        memory_mib: limits.number("memory_mib", default.memory_mib, 1..=4_096),
        deadline_ms: limits.number("deadline_ms", default.deadline_ms, 1..=600_000),
        queue_ms: limits.number("queue_ms", default.queue_ms, 1..=600_000),
        cpu_ms: limits.number("cpu_ms", default.cpu_ms, 1..=600_000),
        hook_cpu_ms: limits.number("hook_cpu_ms", default.hook_cpu_ms, 1..=600_000),
        cpu_share: limits.number("cpu_share", default.cpu_share, 1..=100),
        host_calls_per_sec: limits.number("host_calls_per_sec", default.host_calls_per_sec, 1..=1_000_000),
        sockets: limits.number("sockets", default.sockets, 1..=100_000),
        files: limits.number("files", default.files, 1..=100_000),
        keyvalue_mib_per_sec: limits.number("keyvalue_mib_per_sec", default.keyvalue_mib_per_sec, 1..=4_096),
        feed_messages_max: limits.number("feed_messages_max", default.feed_messages_max, 1..=10_000_000),
        feed_mib: limits.number("feed_mib", default.feed_mib, 1..=65_536),
        feed_aside_mib: limits.number("feed_aside_mib", default.feed_aside_mib, 0..=65_536),
        feed_tries: limits.number("feed_tries", default.feed_tries, 1..=1_000),
        instances: limits.number("instances", default.instances, 1..=1_024),
    };
    limits.finish();
    meant
}

/// A list of texts that mean something else; empty if absent.
fn parsed<T: FromStr<Err = String>>(section: &mut Section<'_>, key: &'static str) -> Vec<T> {
    let texts = section.texts(key);
    texts.iter().filter_map(|text| text.value.parse().map_err(|why: String| section.problem(text, &why)).ok()).collect()
}

/// A list of Topic Filters; empty if absent.
fn filters(section: &mut Section<'_>, key: &'static str) -> Vec<Filter> {
    let texts = section.texts(key);
    texts
        .iter()
        .filter_map(|text| match Filter::parse(text.value) {
            Ok(filter) => Some(filter),
            Err(error) => {
                section.problem(text, &format!("must be a Topic Filter such as \"a/#\": {error}"));
                None
            }
        })
        .collect()
}

/// A relative path starts at the plugin folder, where uploads and reloads happen; `NAME.wasm` if there is none.
fn meant_plugin_path(plugin: &mut Section<'_>, name: Option<&Text<'_>>, root: &Path) -> Option<PathBuf> {
    let written = plugin.text("path");
    let path = match (&written, name) {
        (Some(path), _) => root.join(path.value),
        (None, Some(name)) => root.join(format!("{}.wasm", name.value)),
        (None, None) => return None,
    };
    if !path.is_file() {
        let file = path.display();
        match (&written, name) {
            (Some(written), _) => plugin.problem(written, &format!("no such file ({file})")),
            (None, Some(name)) => plugin.problem(name, &format!("without `path`, and no such file ({file})")),
            (None, None) => {}
        }
    }
    Some(path)
}

/// Pairs, as plugins take their settings: `config = { a = { b = 1 } }` becomes `a.b` and `1`. Lists count from 0. What is
/// empty becomes an empty text: without it a plugin would take its default, which may be to check nothing.
fn flatten(table: toml::Table) -> Vec<(String, String)> {
    let mut pairs = Vec::new();
    let mut open: Vec<(String, toml::Value)> = table.into_iter().rev().collect();
    while let Some((name, value)) = open.pop() {
        match value {
            toml::Value::Table(inner) if inner.is_empty() => pairs.push((name, String::new())),
            toml::Value::Array(items) if items.is_empty() => pairs.push((name, String::new())),
            toml::Value::Table(inner) => {
                open.extend(inner.into_iter().rev().map(|(key, value)| (format!("{name}.{key}"), value)));
            }
            toml::Value::Array(items) => {
                open.extend(items.into_iter().enumerate().rev().map(|(at, value)| (format!("{name}.{at}"), value)));
            }
            toml::Value::String(text) => pairs.push((name, text)),
            other => pairs.push((name, other.to_string())),
        }
    }
    pairs
}

fn meant_file_grant<'a>(mut grant: Section<'a>, base: &Path, granted: &mut Vec<Granted<'a>>) -> Option<FileGrant> {
    let host = grant.required("host", "a file or folder of this machine");
    let guest = grant.required("guest", "the path under which the plugin sees it, such as \"/passwords\"");
    let mode = grant.choice("mode", &MODES).unwrap_or_default();
    grant.finish();
    let (host, guest): (Text<'a>, Text<'a>) = (host?, guest?);
    let path = base.join(host.value);
    if !path.exists() {
        grant.problem(&host, &format!("no such file or folder ({})", path.display()));
    }
    if path.is_file() && mode == Mode::Write {
        grant.problem(&host, "a single file can only be read: grant its folder, or say mode = \"read\"");
    }
    if !guest.value.starts_with('/') || guest.value.split('/').any(|part| part == "..") {
        grant.problem(&guest, "must be an absolute path without `..`, such as \"/passwords\"");
    }
    let guest = guest.value.to_owned();
    granted.push(Granted { section: grant, host, path: path.clone(), mode });
    Some(FileGrant { host: path, guest, mode })
}
