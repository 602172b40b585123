//! The configuration file, and what it means.
//!
//! [`load`] reads the file once and gives [`Settings`], where every value is present and has been checked. Its errors
//! name file, line, key, value and what is allowed; all problems are reported, not only the first. Nothing else in the
//! broker reads configuration.
mod grants; // what no plugin may be granted
mod listener; // `[[listener]]` and `--listen`
mod plugin; // `[[plugin]]`
mod read; // TOML with spans → values with a place
mod show; // `Settings` → TOML or JSON, as `config show` prints them

use std::collections::HashSet;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use wasmqtt_host::{CompileLimits, Mode, OnError, PluginConfig};
use wasmqtt_protocol::codec::Qos;
use wasmqtt_protocol::session::QueuePolicy;
use wasmqtt_server::{Anonymous, ClientIdTaken, Identity, Limits, Listener};
use wasmqtt_store::{Durability, StoreConfig};

pub(crate) use self::listener::{Listen, parse_listen};
pub(crate) use self::plugin::limits;

use self::grants::Protected;
use self::listener::{default_listener, meant_listener};
use self::plugin::{Plugins, meant_plugin};
use self::read::{Section, Source};

/// Place in the chain when `[[plugin]]` does not say.
const ORDER_DEFAULT: i32 = 100;
/// Spellings of [`OnError`].
const ON_ERROR: [(&str, OnError); 4] =
    [("deny", OnError::Deny), ("allow", OnError::Allow), ("skip", OnError::Skip), ("retry", OnError::Retry)];
/// Spellings of [`Mode`].
const MODES: [(&str, Mode); 2] = [("read", Mode::Read), ("write", Mode::Write)];

/// Spellings of [`Durability`]; `None`: no store.
const DURABILITY: [(&str, Option<Durability>); 3] =
    [("fsync", Some(Durability::Fsync)), ("os", Some(Durability::Os)), ("memory", None)];
/// Spellings of [`ClientIdTaken`].
const CLIENT_ID_TAKEN: [(&str, ClientIdTaken); 2] =
    [("refuse", ClientIdTaken::Refuse), ("new-session", ClientIdTaken::NewSession)];
/// Spellings of [`Identity::allow_wildcards`].
const WILDCARD_IDENTIFIERS: [(&str, bool); 2] = [("refuse", false), ("allow", true)];
/// Spellings of [`QueuePolicy`].
const QUEUE_FULL: [(&str, QueuePolicy); 3] = [
    ("drop-newest", QueuePolicy::DropNewest),
    ("drop-oldest", QueuePolicy::DropOldest),
    ("reject-publish", QueuePolicy::RejectPublish),
];

/// What the operator wants, complete and checked. All paths are absolute.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    /// What the broker keeps on disk; made when it is first needed.
    pub(crate) data_dir: PathBuf,
    /// At least one.
    pub(crate) listeners: Vec<Listener>,
    /// [`Anonymous::Loopback`] if the file does not say.
    pub(crate) anonymous: Anonymous,
    pub(crate) identity: Identity,
    pub(crate) limits: Limits,
    /// 0: one per core.
    pub(crate) shards: usize,
    /// Watched folder with `*.wasm`; `None`: no folder was named, and there is no `plugins` beside the file.
    pub(crate) plugin_dir: Option<PathBuf>,
    pub(crate) compile: Compile,
    /// In the order of the file.
    pub(crate) plugins: Vec<PluginConfig>,
    /// `None`: nothing outlives the broker.
    pub(crate) store: Option<StoreConfig>,
    pub(crate) log: Log,
}

/// How components are compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Compile {
    /// For each.
    pub(crate) limits: CompileLimits,
    /// 0: one per core.
    pub(crate) at_once: usize,
}

/// Where log lines go is not a choice: standard error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Log {
    /// A level, or `target=level` pairs with commas between them.
    pub(crate) level: String,
    /// JSON lines rather than text.
    pub(crate) json: bool,
}

/// Why there are no [`Settings`].
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    #[error("cannot read configuration file {}: {error}", path.display())]
    Read { path: PathBuf, error: io::Error },
    #[error("{}", Problems { path, problems })]
    Invalid { path: PathBuf, problems: Vec<Problem> },
}

/// One thing that is wrong with a file, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Problem {
    /// From 1.
    pub(crate) line: usize,
    pub(crate) text: String,
}

struct Problems<'a> {
    path: &'a Path,
    problems: &'a [Problem],
}

impl fmt::Display for Problems<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (place, problem) in self.problems.iter().enumerate() {
            let separator = if place == 0 { "" } else { "\n" };
            write!(out, "{separator}{}:{}: {}", self.path.display(), problem.line, problem.text)?;
        }
        Ok(())
    }
}

/// Reads and checks the file at `path`. Relative paths in it start at its folder. `listen` replaces its listeners, if
/// there are any.
///
/// # Errors
/// [`ConfigError::Read`] if there is no such file, [`ConfigError::Invalid`] with every problem in it.
pub(crate) fn load(path: &Path, listen: &[Listen]) -> Result<Settings, ConfigError> {
    load_with(path, listen, false)
}

/// The same, and looks into the components of plugins: what they import must be granted.
///
/// # Errors
/// As [`load`].
pub(crate) fn check(path: &Path) -> Result<Settings, ConfigError> {
    load_with(path, &[], true)
}

fn load_with(path: &Path, listen: &[Listen], reads_components: bool) -> Result<Settings, ConfigError> {
    let failed = |error| ConfigError::Read { path: path.to_owned(), error };
    let text = std::fs::read_to_string(path).map_err(failed)?;
    let absolute = std::path::absolute(path).map_err(failed)?;
    let base = absolute.parent().unwrap_or(Path::new("/"));
    let place = Place { base, file: Some(&absolute), listen, reads_components };
    parse(&text, &place).map_err(|problems| ConfigError::Invalid { path: path.to_owned(), problems })
}

/// `data_dir` of a file, whatever else is wrong with it: commands reach a broker that runs, so that its plugins can be
/// mended.
///
/// # Errors
/// The file cannot be read, or is no TOML.
pub(crate) fn data_dir(path: &Path) -> Result<PathBuf, ConfigError> {
    let failed = |error| ConfigError::Read { path: path.to_owned(), error };
    let text = std::fs::read_to_string(path).map_err(failed)?;
    let absolute = std::path::absolute(path).map_err(failed)?;
    let source = Source::new(&text);
    let document = source.parse().map_err(|problems| ConfigError::Invalid { path: path.to_owned(), problems })?;
    Ok(meant_data_dir(&mut source.root(&document), absolute.parent().unwrap_or(Path::new("/"))))
}

fn meant_data_dir(root: &mut Section<'_>, base: &Path) -> PathBuf {
    base.join(root.text("data_dir").map_or("data", |text| text.value))
}

/// What an empty file in the current folder would mean.
///
/// # Errors
/// [`ConfigError::Read`] if there is no current folder.
pub(crate) fn defaults(listen: &[Listen]) -> Result<Settings, ConfigError> {
    let path = PathBuf::from(".");
    let base = std::env::current_dir().map_err(|error| ConfigError::Read { path: path.clone(), error })?;
    parse("", &Place { base: &base, file: None, listen, reads_components: false })
        .map_err(|problems| ConfigError::Invalid { path, problems })
}

/// What else settings depend on.
struct Place<'a> {
    /// Where relative paths begin.
    base: &'a Path,
    /// `None`: there is none.
    file: Option<&'a Path>,
    /// Replaces the listeners of the file, if there are any.
    listen: &'a [Listen],
    /// Components are read as well.
    reads_components: bool,
}

fn parse(text: &str, place: &Place<'_>) -> Result<Settings, Vec<Problem>> {
    let source = Source::new(text);
    let document = source.parse()?;
    let settings = meaning(source.root(&document), place);
    source.finish()?;
    Ok(settings)
}

/// The one place that knows keys, defaults and ranges. Problems are left with the source of `root`.
fn meaning(mut root: Section<'_>, place: &Place<'_>) -> Settings {
    let (base, listen) = (place.base, place.listen);
    let data_dir = meant_data_dir(&mut root, base);
    let shards = root.number("shards", 0, 0..=1024);

    let mut listeners = Vec::new();
    for listener in root.sections("listener") {
        let found = meant_listener(listener, base, &listeners);
        listeners.extend(found);
    }
    if !listen.is_empty() {
        listeners = listen.iter().flat_map(|listen| listen.0.clone()).collect();
    } else if listeners.is_empty() {
        listeners.push(default_listener());
    }

    let mut auth = root.section("auth");
    let anonymous = match auth.flag("anonymous") {
        None => Anonymous::Loopback,
        Some(true) => Anonymous::Allow,
        Some(false) => Anonymous::Deny,
    };
    let identity = Identity {
        client_id_taken: auth.choice("client_id_taken", &CLIENT_ID_TAKEN).unwrap_or_default(),
        allow_wildcards: auth.choice("wildcard_identifiers", &WILDCARD_IDENTIFIERS).unwrap_or_default(),
    };
    auth.finish();

    let limits = meant_limits(root.section("limits"));

    let mut folder = root.section("plugins");
    let plugin_dir = match folder.text("dir") {
        Some(dir) => {
            let path = base.join(dir.value);
            if !path.is_dir() {
                folder.problem(&dir, &format!("no such folder ({})", path.display()));
            }
            Some(path)
        }
        None => Some(base.join("plugins")).filter(|path| path.is_dir()),
    };
    let compile = meant_compile(&mut folder);
    folder.finish();

    let mut reading = Plugins {
        base,
        dir: plugin_dir.as_deref(),
        listeners: &listeners,
        reads_components: place.reads_components,
        names: HashSet::new(),
        granted: Vec::new(),
    };
    let plugins: Vec<PluginConfig> =
        root.sections("plugin").into_iter().filter_map(|plugin| meant_plugin(plugin, &mut reading)).collect();
    let granted = reading.granted;

    let store = meant_store(root.section("store"), base, &data_dir);
    let store_path = store.as_ref().map(|store| &*store.path);
    let mut protected = Protected::new(place.file, &data_dir, plugin_dir.as_deref(), store_path);
    protected.protect_plugins(&plugins, &granted);
    for granted in &granted {
        protected.check(granted);
    }

    let mut log = root.section("log");
    let level = log.text("level");
    if let Some(level) = &level
        && !is_log_level(level.value)
    {
        log.problem(
            level,
            "allowed are error, warn, info, debug, trace, off, and pairs such as \"info,wasmqtt_host=debug\"",
        );
    }
    let level = level.map_or("info", |text| text.value).to_owned();
    let json = log.choice("format", &[("text", false), ("json", true)]).unwrap_or(false);
    log.finish();

    root.finish();
    let log = Log { level, json };
    Settings { data_dir, listeners, anonymous, identity, limits, shards, plugin_dir, compile, plugins, store, log }
}

fn meant_compile(folder: &mut Section<'_>) -> Compile {
    let default = CompileLimits::default();
    let limits = CompileLimits {
        memory_mib: folder.number("compile_memory_mib", default.memory_mib, 512..=1_048_576),
        cpu_secs: folder.number("compile_cpu_secs", default.cpu_secs, 1..=86_400),
        compiled_mib: folder.number("compiled_mib_max", default.compiled_mib, 1..=16_384),
    };
    Compile { limits, at_once: folder.number("compile_at_once", 0, 0..=1_024) }
}

/// `None`: nothing outlives the broker.
fn meant_store(mut store: Section<'_>, base: &Path, data_dir: &Path) -> Option<StoreConfig> {
    let path = store.text("path").map_or_else(|| data_dir.join("store"), |text| base.join(text.value));
    let default = StoreConfig::new(path);
    let durability = store.choice("durability", &DURABILITY).unwrap_or(Some(default.durability));
    let meant = StoreConfig {
        write_buffer_mib: store.number("write_buffer_mib", default.write_buffer_mib, 1..=65_536),
        cache_mib: store.number("cache_mib", default.cache_mib, 1..=1_048_576),
        sync_interval: Duration::from_millis(store.number("sync_interval_ms", 0, 0..=60_000)),
        ..default
    };
    store.finish();
    durability.map(|durability| StoreConfig { durability, ..meant })
}

fn meant_limits(mut limits: Section<'_>) -> Limits {
    let default = Limits::default();
    let meant = Limits {
        packet_bytes_max: limits.number("packet_bytes_max", default.packet_bytes_max, 128..=268_435_460),
        receive_maximum: limits.number("receive_maximum", default.receive_maximum, 1..=65_535),
        inflight_max: limits.number("inflight_max", default.inflight_max, 1..=65_535),
        topic_alias_maximum: limits.number("topic_alias_maximum", default.topic_alias_maximum, 0..=65_535),
        topic_alias_bytes_max: limits.number("topic_alias_bytes_max", default.topic_alias_bytes_max, 0..=1 << 30),
        maximum_qos: match limits.number("maximum_qos", 2, 0..=2) {
            0 => Qos::AtMostOnce,
            1 => Qos::AtLeastOnce,
            _ => Qos::ExactlyOnce,
        },
        retain_available: limits.flag("retain_available").unwrap_or(default.retain_available),
        keep_alive_max: match limits.number("keep_alive_max_secs", 0, 0..=65_535) {
            0 => None,
            seconds => Some(Duration::from_secs(seconds)),
        },
        connect_timeout: limits.seconds("connect_timeout_secs", default.connect_timeout, 1..=3_600),
        session_expiry_max: limits.seconds("session_expiry_max_secs", default.session_expiry_max, 0..=4_294_967_295),
        queue_messages_max: limits.number("queue_messages_max", default.queue_messages_max, 1..=1_000_000_000),
        queue_bytes_max: limits.number("queue_bytes_max", default.queue_bytes_max, 1_024..=1 << 40),
        inflight_bytes_max: limits.number("inflight_bytes_max", default.inflight_bytes_max, 1_024..=1 << 40),
        outbound_bytes_max: limits.number("outbound_bytes_max", default.outbound_bytes_max, 1_024..=1 << 32),
        subscriptions_max: limits.number("subscriptions_max", default.subscriptions_max, 1..=1_000_000),
        filters_per_packet_max: limits.number("filters_per_packet_max", default.filters_per_packet_max, 1..=1_000_000),
        subscription_bytes_max: limits.number(
            "subscription_bytes_max",
            default.subscription_bytes_max,
            1_024..=1 << 40,
        ),
        connections_max: limits.number("connections_max", default.connections_max, 1..=1_000_000_000),
        sessions_max: limits.number("sessions_max", default.sessions_max, 1..=1_000_000_000),
        retained_messages_max: limits.number("retained_messages_max", default.retained_messages_max, 0..=1_000_000_000),
        retained_bytes_max: limits.number("retained_bytes_max", default.retained_bytes_max, 0..=1 << 40),
        route_cache_bytes_max: limits.number("route_cache_bytes_max", default.route_cache_bytes_max, 65_536..=1 << 36),
        memory_max: match limits.number("memory_mib", 0, 0..=1 << 24) {
            0 => None,
            mebibytes => Some(mebibytes << 20),
        },
        topic_levels_max: limits.number("topic_levels_max", default.topic_levels_max, 1..=65_535),
        topic_bytes_max: limits.number("topic_bytes_max", default.topic_bytes_max, 1..=65_535),
        connect_bytes_max: limits.number("connect_bytes_max", default.connect_bytes_max, 128..=268_435_460),
        connecting_max: limits.number("connecting_max", default.connecting_max, 1..=1_000_000_000),
    };
    limits.finish();
    meant
}

/// A bare word must be a level: the log library would take a misspelt one for the name of a target.
fn is_log_level(text: &str) -> bool {
    let is_level = |word: &str| ["off", "error", "warn", "info", "debug", "trace"].contains(&word);
    text.split(',').all(|part| match part.split_once('=') {
        Some((target, level)) => !target.is_empty() && is_level(level),
        None => is_level(part),
    })
}

#[cfg(test)]
mod tests;
