//! Configuration: as written, then as meant.
//!
//! The written form has optional fields and refuses unknown keys; one function turns it into what the server and the
//! plugin host take. Nothing else reads the file.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use toml::Spanned;
use wasmqtt_host::{FileGrant, HostConfig, Mode, OnError, PluginConfig, PluginLimits};
use wasmqtt_protocol::codec::Qos;
use wasmqtt_server::{Anonymous, Bind, Config, Limits, Listener};

/// The file, as written.
#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Written {
    data_dir: Option<PathBuf>,
    /// Threads; 0: one per core.
    shards: usize,
    listener: Vec<WrittenListener>,
    auth: WrittenAuth,
    limits: WrittenLimits,
    plugins: WrittenPlugins,
    plugin: Vec<WrittenPlugin>,
    store: WrittenStore,
    pub(crate) log: WrittenLog,
    #[serde(skip)]
    source: Source,
}

/// Where the text came from, for errors.
#[derive(Debug, Default)]
struct Source {
    path: PathBuf,
    text: String,
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct WrittenListener {
    bind: Spanned<String>,
    #[serde(default = "default_protocol")]
    protocol: Spanned<String>,
}

fn default_protocol() -> Spanned<String> {
    Spanned::new(0..0, "mqtt".into())
}

#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
struct WrittenAuth {
    anonymous: Option<bool>,
}

macro_rules! written_limits {
    ($($name:ident $default:literal $min:literal $max:literal)*) => {
        #[derive(Debug, Deserialize, Serialize)]
        #[serde(deny_unknown_fields, default)]
        struct WrittenLimits {
            $($name: Spanned<i64>,)*
            retain_available: bool,
        }
        impl Default for WrittenLimits {
            fn default() -> Self {
                Self { $($name: Spanned::new(0..0, $default),)* retain_available: true }
            }
        }
        impl WrittenLimits {
            fn check(&self, source: &Source) -> anyhow::Result<()> {
                $(source.range(concat!("limits.", stringify!($name)), &self.$name, $min, $max)?;)*
                Ok(())
            }
        }
    };
}

written_limits! {
    packet_bytes_max      1_048_576   128  268_435_460
    receive_maximum       1024        1    65_535
    inflight_max          1024        1    65_535
    topic_alias_maximum   64          0    65_535
    maximum_qos           2           0    2
    keep_alive_max_secs   0           0    65_535
    connect_timeout_secs  10          1    3_600
    session_expiry_max_secs 604_800   0    4_294_967_295
    queue_messages_max    10_000      1    100_000_000
    queue_bytes_max       16_777_216  1024 1_099_511_627_776
    outbound_bytes_max    1_048_576   1024 1_073_741_824
    connections_max       1_000_000   1    100_000_000
}

#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
struct WrittenPlugins {
    dir: Option<Spanned<PathBuf>>,
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct WrittenPlugin {
    name: String,
    path: Option<Spanned<PathBuf>>,
    #[serde(default)]
    order: i32,
    #[serde(default)]
    on_error: WrittenOnError,
    #[serde(default)]
    config: BTreeMap<String, toml::Value>,
    #[serde(default)]
    grants: WrittenGrants,
    #[serde(default)]
    limits: WrittenPluginLimits,
    sha256: Option<String>,
}

#[derive(Debug, Default, Clone, Copy, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
enum WrittenOnError {
    #[default]
    Deny,
    Allow,
    Skip,
    Retry,
}

#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
struct WrittenGrants {
    files: Vec<WrittenFile>,
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct WrittenFile {
    host: Spanned<PathBuf>,
    guest: String,
    #[serde(default)]
    mode: WrittenMode,
}

#[derive(Debug, Default, Clone, Copy, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
enum WrittenMode {
    #[default]
    Read,
    Write,
}

#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
struct WrittenPluginLimits {
    memory_mib: Option<Spanned<i64>>,
    deadline_ms: Option<Spanned<i64>>,
    cpu_ms: Option<Spanned<i64>>,
    instances: Option<Spanned<i64>>,
}

#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
struct WrittenStore {
    durability: WrittenDurability,
}

#[derive(Debug, Default, Clone, Copy, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
enum WrittenDurability {
    #[default]
    Memory,
}

#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct WrittenLog {
    pub(crate) level: Level,
    pub(crate) format: Format,
}

/// Least severe events that are logged.
#[derive(Debug, Default, Clone, Copy, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Level {
    Error,
    Warn,
    #[default]
    Info,
    Debug,
    Trace,
}

/// How the log looks.
#[derive(Debug, Default, Clone, Copy, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Format {
    #[default]
    Text,
    Json,
}

/// What the broker runs with.
#[derive(Debug)]
pub(crate) struct Meant {
    pub(crate) server: Config,
    pub(crate) host: HostConfig,
    pub(crate) log: (Level, Format),
    /// `auth.anonymous` was not written.
    pub(crate) anonymous_unset: bool,
}

impl Source {
    /// `FILE:LINE`, for a place in the text.
    fn at(&self, place: usize) -> String {
        let line = 1 + self.text.as_bytes().iter().take(place).filter(|byte| **byte == b'\n').count();
        format!("{}:{line}", self.path.display())
    }

    fn range(&self, key: &str, value: &Spanned<i64>, min: i64, max: i64) -> anyhow::Result<i64> {
        let number = *value.get_ref();
        if number < min || number > max {
            bail!("{}: {key} = {number} is out of range, allowed are {min} to {max}", self.at(value.span().start));
        }
        Ok(number)
    }

    /// Relative paths are relative to the file that names them.
    fn resolve(&self, path: &Path) -> PathBuf {
        self.path.parent().map_or_else(|| path.to_owned(), |folder| folder.join(path))
    }
}

/// Reads a file into its written form.
pub(crate) fn read(path: &Path) -> anyhow::Result<Written> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read configuration {}", path.display()))?;
    parse(path, text)
}

fn parse(path: &Path, text: String) -> anyhow::Result<Written> {
    let source = Source { path: path.to_owned(), text };
    match toml::from_str::<Written>(&source.text) {
        Ok(mut written) => {
            written.source = source;
            Ok(written)
        }
        Err(error) => {
            let at = error.span().map_or_else(|| path.display().to_string(), |span| source.at(span.start));
            let line = error.span().and_then(|span| {
                let line = source.text[..span.start].matches('\n').count();
                source.text.lines().nth(line).map(str::trim)
            });
            let line = line.map(|line| format!(" in `{line}`")).unwrap_or_default();
            bail!("{at}: {}{line}", error.message().trim().replace('\n', "; "))
        }
    }
}

/// Every value in force, as TOML or JSON.
pub(crate) fn show(written: &Written, json: bool) -> anyhow::Result<String> {
    Ok(if json { serde_json::to_string_pretty(written)? } else { toml::to_string_pretty(written)? })
}

/// `HOST:PORT` or `unix:PATH`.
pub(crate) fn parse_listen(text: &str) -> anyhow::Result<Listener> {
    if let Some(path) = text.strip_prefix("unix:") {
        return Ok(Listener { bind: Bind::Unix(path.into()), name: text.into() });
    }
    let address: SocketAddr = text
        .parse()
        .with_context(|| format!("{text:?} is no address to listen on: allowed are IP:PORT, such as 127.0.0.1:1883, and unix:PATH"))?;
    Ok(Listener { bind: Bind::Tcp(address), name: format!("mqtt://{address}").into() })
}

impl Meant {
    /// Reads and checks a file.
    pub(crate) fn load(path: &Path) -> anyhow::Result<Self> {
        Self::from_written(&read(path)?)
    }

    /// What an empty file means.
    pub(crate) fn default_values() -> anyhow::Result<Self> {
        Self::from_written(&Written::default())
    }

    fn from_written(written: &Written) -> anyhow::Result<Self> {
        let source = &written.source;
        written.limits.check(source)?;
        let mut listeners = Vec::new();
        for listener in &written.listener {
            listeners.push(meant_listener(source, listener)?);
        }
        if listeners.is_empty() {
            listeners.push(parse_listen("127.0.0.1:1883")?);
        }
        let anonymous = match written.auth.anonymous {
            None => Anonymous::Loopback,
            Some(true) => Anonymous::Allow,
            Some(false) => Anonymous::Deny,
        };
        let data_dir = source.resolve(written.data_dir.as_deref().unwrap_or(Path::new("data")));
        let server = Config {
            listeners,
            anonymous,
            limits: meant_limits(&written.limits),
            shards: written.shards,
            sys_interval: Duration::from_secs(10),
        };
        let mut plugins = Vec::new();
        let dir = plugins_dir(source, written)?;
        for plugin in &written.plugin {
            plugins.push(meant_plugin(source, plugin, dir.as_deref())?);
        }
        let shards = if server.shards == 0 { std::thread::available_parallelism().map_or(1, usize::from) } else { server.shards };
        let host = HostConfig { dir, plugins, cache_dir: data_dir.join("plugin-cache"), shards, ..HostConfig::default() };
        let log = (written.log.level, written.log.format);
        Ok(Self { server, host, log, anonymous_unset: written.auth.anonymous.is_none() })
    }
}

fn meant_listener(source: &Source, listener: &WrittenListener) -> anyhow::Result<Listener> {
    let bind = listener.bind.get_ref();
    let at = |place: &Spanned<String>| source.at(place.span().start);
    match listener.protocol.get_ref().as_str() {
        "mqtt" => parse_listen(bind).with_context(|| format!("{}: listener.bind", at(&listener.bind))),
        "unix" => {
            let path = source.resolve(Path::new(bind));
            Ok(Listener { name: Arc::from(format!("unix:{}", path.display())), bind: Bind::Unix(path) })
        }
        later @ ("mqtts" | "ws" | "wss") => {
            bail!("{}: listener.protocol = {later:?} is not available yet, allowed are \"mqtt\" and \"unix\"", at(&listener.protocol))
        }
        other => bail!("{}: listener.protocol = {other:?} is unknown, allowed are \"mqtt\" and \"unix\"", at(&listener.protocol)),
    }
}

fn meant_limits(written: &WrittenLimits) -> Limits {
    // In range, see `WrittenLimits::check`.
    let size = |value: &Spanned<i64>| usize::try_from(*value.get_ref()).unwrap_or(usize::MAX);
    let short = |value: &Spanned<i64>| u16::try_from(*value.get_ref()).unwrap_or(u16::MAX);
    let secs = |value: &Spanned<i64>| Duration::from_secs(size(value) as u64);
    Limits {
        packet_bytes_max: u32::try_from(*written.packet_bytes_max.get_ref()).unwrap_or(u32::MAX),
        receive_maximum: short(&written.receive_maximum),
        inflight_max: short(&written.inflight_max),
        topic_alias_maximum: short(&written.topic_alias_maximum),
        maximum_qos: u8::try_from(*written.maximum_qos.get_ref()).ok().and_then(Qos::from_bits).unwrap_or(Qos::ExactlyOnce),
        retain_available: written.retain_available,
        keep_alive_max: Some(secs(&written.keep_alive_max_secs)).filter(|time| !time.is_zero()),
        connect_timeout: secs(&written.connect_timeout_secs),
        session_expiry_max: secs(&written.session_expiry_max_secs),
        queue_messages_max: size(&written.queue_messages_max),
        queue_bytes_max: size(&written.queue_bytes_max),
        outbound_bytes_max: size(&written.outbound_bytes_max),
        connections_max: size(&written.connections_max),
    }
}

fn plugins_dir(source: &Source, written: &Written) -> anyhow::Result<Option<PathBuf>> {
    let Some(dir) = &written.plugins.dir else {
        let default = source.resolve(Path::new("plugins"));
        return Ok(default.is_dir().then_some(default));
    };
    let path = source.resolve(dir.get_ref());
    if !path.is_dir() {
        bail!("{}: plugins.dir = {:?} is not a folder (looked for {})", source.at(dir.span().start), dir.get_ref(), path.display());
    }
    Ok(Some(path))
}

fn meant_plugin(source: &Source, written: &WrittenPlugin, dir: Option<&Path>) -> anyhow::Result<PluginConfig> {
    let name = &written.name;
    let place = written.path.as_ref().map_or(0, |path| path.span().start);
    let file = written.path.as_ref().map_or_else(|| PathBuf::from(format!("{name}.wasm")), |path| path.get_ref().clone());
    let candidates = [dir.map(|dir| dir.join(&file)), Some(source.resolve(&file))];
    let path = candidates.iter().flatten().find(|path| path.is_file());
    let Some(path) = path else {
        let looked: Vec<String> = candidates.iter().flatten().map(|path| path.display().to_string()).collect();
        bail!("{}: plugin {name:?}: there is no file {} (looked for {})", source.at(place), file.display(), looked.join(", "));
    };
    let number = |key: &str, value: &Option<Spanned<i64>>, default: i64, max: i64| match value {
        Some(value) => source.range(&format!("plugin.limits.{key}"), value, 1, max).map(|number| number as u64),
        None => Ok(default as u64),
    };
    let limits = PluginLimits {
        memory_mib: number("memory_mib", &written.limits.memory_mib, 16, 4096)? as u32,
        deadline_ms: number("deadline_ms", &written.limits.deadline_ms, 5000, 60_000)?,
        cpu_ms: number("cpu_ms", &written.limits.cpu_ms, 1000, 60_000)?,
        instances: number("instances", &written.limits.instances, 4, 64)? as usize,
    };
    let mut files = Vec::new();
    for file in &written.grants.files {
        let host = source.resolve(file.host.get_ref());
        if !host.exists() {
            bail!("{}: plugin {name:?}: grants.files.host = {:?} does not exist", source.at(file.host.span().start), host);
        }
        let mode = match file.mode {
            WrittenMode::Read => Mode::Read,
            WrittenMode::Write => Mode::Write,
        };
        files.push(FileGrant { host, guest: file.guest.clone(), mode });
    }
    Ok(PluginConfig {
        name: name.clone(),
        path: path.clone(),
        order: written.order,
        on_error: match written.on_error {
            WrittenOnError::Deny => OnError::Deny,
            WrittenOnError::Allow => OnError::Allow,
            WrittenOnError::Skip => OnError::Skip,
            WrittenOnError::Retry => OnError::Retry,
        },
        config: flatten(&written.config),
        files,
        limits,
        sha256: written.sha256.clone(),
    })
}

/// `config = { a = { b = 1 } }` reaches the plugin as the pair `a.b` and `1`.
fn flatten(config: &BTreeMap<String, toml::Value>) -> Vec<(String, String)> {
    let mut pairs = Vec::new();
    let mut stack: Vec<(String, &toml::Value)> = config.iter().rev().map(|(name, value)| (name.clone(), value)).collect();
    while let Some((name, value)) = stack.pop() {
        match value {
            toml::Value::Table(table) => {
                stack.extend(table.iter().map(|(inner, value)| (format!("{name}.{inner}"), value)));
            }
            toml::Value::String(text) => pairs.push((name, text.clone())),
            other => pairs.push((name, other.to_string())),
        }
    }
    pairs
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> String {
        let written = parse(Path::new("test.toml"), text.into());
        let meant = written.and_then(|written| Meant::from_written(&written));
        format!("{:#}", meant.expect_err("must be refused"))
    }

    #[test]
    fn unknown_keys_name_file_line_and_what_is_allowed() {
        let text = error("[limits]\n\npacket_byte_max = 3\n");
        assert!(text.starts_with("test.toml:3: "), "{text}");
        assert!(text.contains("packet_byte_max") && text.contains("packet_bytes_max"), "{text}");
    }

    #[test]
    fn values_out_of_range_name_file_line_key_value_and_range() {
        let text = error("[limits]\nmaximum_qos = 3\n");
        assert_eq!(text, "test.toml:2: limits.maximum_qos = 3 is out of range, allowed are 0 to 2");
    }

    #[test]
    fn wrong_types_show_the_line() {
        let text = error("[auth]\nanonymous = \"yes\"\n");
        assert!(text.starts_with("test.toml:2: ") && text.contains("anonymous"), "{text}");
    }

    #[test]
    fn listeners_must_be_addresses_of_known_protocols() {
        let text = error("[[listener]]\nbind = \"localhost\"\n");
        assert!(text.starts_with("test.toml:2: listener.bind") && text.contains("IP:PORT"), "{text}");
        let text = error("[[listener]]\nbind = \"127.0.0.1:1\"\nprotocol = \"wss\"\n");
        assert!(text.starts_with("test.toml:3: ") && text.contains("not available yet"), "{text}");
    }

    #[test]
    fn missing_files_are_named() {
        let text = error("[plugins]\ndir = \"nowhere\"\n");
        assert!(text.starts_with("test.toml:2: plugins.dir") && text.contains("nowhere"), "{text}");
        let text = error("[[plugin]]\nname = \"x\"\npath = \"x.wasm\"\n");
        assert!(text.starts_with("test.toml:3: plugin \"x\"") && text.contains("x.wasm"), "{text}");
    }

    #[test]
    fn durability_has_one_value_for_now() {
        assert!(error("[store]\ndurability = \"fsync\"\n").contains("memory"));
    }

    #[test]
    fn what_is_shown_means_the_same() {
        let written = parse(Path::new("test.toml"), "shards = 3\n[limits]\ninflight_max = 7\n".into()).unwrap();
        let again = parse(Path::new("test.toml"), show(&written, false).unwrap()).unwrap();
        let meant = Meant::from_written(&again).unwrap();
        assert_eq!((meant.server.shards, meant.server.limits.inflight_max), (3, 7));
    }

    #[test]
    fn nested_settings_become_dotted_names() {
        let config: BTreeMap<String, toml::Value> = toml::from_str("a = 1\nb = { c = \"x\", d = true }").unwrap();
        let mut pairs = flatten(&config);
        pairs.sort();
        let want = [("a", "1"), ("b.c", "x"), ("b.d", "true")].map(|(a, b)| (a.to_owned(), b.to_owned()));
        assert_eq!(pairs, want);
    }
}
