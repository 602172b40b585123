//! [`Settings`] in the form of the file, with every value that applies.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;
use wasmqtt_host::{FileGrant, PluginConfig, Rollout};
use wasmqtt_protocol::codec::Qos;
use wasmqtt_protocol::topic::Filter;
use wasmqtt_server::{Anonymous, Bind};
use wasmqtt_store::StoreConfig;

use super::{CLIENT_ID_TAKEN, DURABILITY, MODES, ON_ERROR, QUEUE_FULL, Settings, WILDCARD_IDENTIFIERS};

#[derive(Serialize)]
pub(crate) struct Shown<'a> {
    data_dir: &'a Path,
    shards: usize,
    auth: Auth,
    limits: Limits,
    plugins: Folder<'a>,
    store: Store<'a>,
    log: Log<'a>,
    listener: Vec<Listener>,
    plugin: Vec<Plugin<'a>>,
}

#[derive(Serialize)]
struct Listener {
    bind: String,
    protocol: &'static str,
    queue_full: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    tcp_keepalive_secs: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    mode: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    group: Option<String>,
    proxied: bool,
}

/// Absent means loopback clients only, which has no other spelling in the file.
#[derive(Serialize)]
struct Auth {
    #[serde(skip_serializing_if = "Option::is_none")]
    anonymous: Option<bool>,
    client_id_taken: &'static str,
    wildcard_identifiers: &'static str,
}

#[derive(Serialize)]
struct Limits {
    packet_bytes_max: u32,
    receive_maximum: u16,
    inflight_max: u16,
    topic_alias_maximum: u16,
    topic_alias_bytes_max: usize,
    maximum_qos: u8,
    retain_available: bool,
    keep_alive_max_secs: u64,
    connect_timeout_secs: u64,
    session_expiry_max_secs: u64,
    queue_messages_max: usize,
    queue_bytes_max: usize,
    inflight_bytes_max: usize,
    outbound_bytes_max: usize,
    subscriptions_max: usize,
    filters_per_packet_max: usize,
    subscription_bytes_max: usize,
    connections_max: usize,
    sessions_max: usize,
    retained_messages_max: usize,
    retained_bytes_max: usize,
    route_cache_bytes_max: usize,
    memory_mib: usize,
    topic_levels_max: usize,
    topic_bytes_max: usize,
    connect_bytes_max: u32,
    connecting_max: usize,
}

#[derive(Serialize)]
struct Folder<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    dir: Option<&'a Path>,
    compile_memory_mib: u32,
    compile_cpu_secs: u32,
    compiled_mib_max: u32,
    compile_at_once: usize,
}

#[derive(Serialize)]
struct Plugin<'a> {
    name: &'a str,
    path: &'a Path,
    order: i32,
    on_error: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    sha256: Option<&'a str>,
    config: BTreeMap<&'a str, &'a str>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    listeners: &'a [String],
    #[serde(skip_serializing_if = "Vec::is_empty")]
    topics: Vec<&'a str>,
    canary: u8,
    canary_secs: u64,
    shadow: bool,
    probation_secs: u64,
    grants: Grants<'a>,
    limits: ShownLimits,
}

#[derive(Serialize)]
struct Grants<'a> {
    files: Vec<ShownGrant<'a>>,
    publish: Vec<&'a str>,
    disconnect: bool,
    ban: bool,
    revoke: bool,
    keyvalue_mib: u32,
    environment: BTreeMap<&'a str, &'a str>,
    http: Vec<String>,
    sockets: Vec<String>,
}

#[derive(Serialize)]
struct ShownGrant<'a> {
    host: &'a Path,
    guest: &'a str,
    mode: &'static str,
}

#[derive(Serialize)]
struct ShownLimits {
    memory_mib: u32,
    deadline_ms: u64,
    queue_ms: u64,
    cpu_ms: u64,
    hook_cpu_ms: u64,
    cpu_share: u8,
    host_calls_per_sec: u32,
    sockets: usize,
    files: usize,
    keyvalue_mib_per_sec: u32,
    feed_messages_max: usize,
    feed_mib: u32,
    feed_aside_mib: u32,
    feed_tries: u32,
    instances: usize,
}

#[derive(Serialize)]
struct Store<'a> {
    durability: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    path: Option<&'a Path>,
    #[serde(skip_serializing_if = "Option::is_none")]
    write_buffer_mib: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cache_mib: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sync_interval_ms: Option<u64>,
}

#[derive(Serialize)]
struct Log<'a> {
    level: &'a str,
    format: &'static str,
}

impl Settings {
    /// As a file would have to say it; reading that file gives the same settings.
    pub(crate) fn shown(&self) -> Shown<'_> {
        let limits = &self.limits;
        Shown {
            data_dir: &self.data_dir,
            shards: self.shards,
            auth: Auth {
                anonymous: match self.anonymous {
                    Anonymous::Loopback => None,
                    Anonymous::Allow => Some(true),
                    Anonymous::Deny => Some(false),
                },
                client_id_taken: spelling(&CLIENT_ID_TAKEN, self.identity.client_id_taken),
                wildcard_identifiers: spelling(&WILDCARD_IDENTIFIERS, self.identity.allow_wildcards),
            },
            limits: Limits {
                packet_bytes_max: limits.packet_bytes_max,
                receive_maximum: limits.receive_maximum,
                inflight_max: limits.inflight_max,
                topic_alias_maximum: limits.topic_alias_maximum,
                topic_alias_bytes_max: limits.topic_alias_bytes_max,
                maximum_qos: match limits.maximum_qos {
                    Qos::AtMostOnce => 0,
                    Qos::AtLeastOnce => 1,
                    Qos::ExactlyOnce => 2,
                },
                retain_available: limits.retain_available,
                keep_alive_max_secs: limits.keep_alive_max.map_or(0, |time| time.as_secs()),
                connect_timeout_secs: limits.connect_timeout.as_secs(),
                session_expiry_max_secs: limits.session_expiry_max.as_secs(),
                queue_messages_max: limits.queue_messages_max,
                queue_bytes_max: limits.queue_bytes_max,
                inflight_bytes_max: limits.inflight_bytes_max,
                outbound_bytes_max: limits.outbound_bytes_max,
                subscriptions_max: limits.subscriptions_max,
                filters_per_packet_max: limits.filters_per_packet_max,
                subscription_bytes_max: limits.subscription_bytes_max,
                connections_max: limits.connections_max,
                sessions_max: limits.sessions_max,
                retained_messages_max: limits.retained_messages_max,
                retained_bytes_max: limits.retained_bytes_max,
                route_cache_bytes_max: limits.route_cache_bytes_max,
                memory_mib: limits.memory_max.map_or(0, |bytes| bytes >> 20),
                topic_levels_max: limits.topic_levels_max,
                topic_bytes_max: limits.topic_bytes_max,
                connect_bytes_max: limits.connect_bytes_max,
                connecting_max: limits.connecting_max,
            },
            plugins: Folder {
                dir: self.plugin_dir.as_deref(),
                compile_memory_mib: self.compile.limits.memory_mib,
                compile_cpu_secs: self.compile.limits.cpu_secs,
                compiled_mib_max: self.compile.limits.compiled_mib,
                compile_at_once: self.compile.at_once,
            },
            store: shown_store(self.store.as_ref()),
            log: Log { level: &self.log.level, format: if self.log.json { "json" } else { "text" } },
            listener: shown_listeners(&self.listeners),
            plugin: self.plugins.iter().map(shown_plugin).collect(),
        }
    }
}

/// One per `[[listener]]`: a host name with several addresses is written once.
fn shown_listeners(listeners: &[wasmqtt_server::Listener]) -> Vec<Listener> {
    let mut shown = Vec::new();
    let mut before: Option<&wasmqtt_server::Listener> = None;
    for listener in listeners {
        let is_same = before.is_some_and(|before| before.optional && before.written == listener.written);
        before = Some(listener);
        if is_same {
            continue;
        }
        let (bind, protocol) = match &listener.bind {
            Bind::Tcp(_) if listener.optional => (listener.written.to_string(), "mqtt"),
            Bind::Tcp(address) => (address.to_string(), "mqtt"),
            Bind::Unix(path) => (path.display().to_string(), "unix"),
        };
        shown.push(Listener {
            bind,
            protocol,
            queue_full: spelling(&QUEUE_FULL, listener.queue_policy),
            proxied: listener.proxied,
            tcp_keepalive_secs: (protocol == "mqtt").then(|| listener.keepalive.map_or(0, |time| time.as_secs())),
            mode: listener.socket_mode.map(|mode| format!("{mode:04o}")),
            group: listener.socket_group.map(|group| group.to_string()),
        });
    }
    shown
}

fn shown_store(store: Option<&StoreConfig>) -> Store<'_> {
    let durability = spelling(&DURABILITY, store.map(|store| store.durability));
    Store {
        durability,
        path: store.map(|store| &*store.path),
        write_buffer_mib: store.map(|store| store.write_buffer_mib),
        cache_mib: store.map(|store| store.cache_mib),
        sync_interval_ms: store.map(|store| store.sync_interval.as_millis() as u64),
    }
}

fn shown_plugin(plugin: &PluginConfig) -> Plugin<'_> {
    let file = |grant: &FileGrant| spelling(&MODES, grant.mode);
    let limits = &plugin.limits;
    let (canary, canary_secs) = match plugin.rollout {
        Rollout::Canary { percent, time } => (percent, time.as_secs()),
        Rollout::AtOnce | Rollout::Shadow => (0, 300),
    };
    Plugin {
        name: &plugin.name,
        path: &plugin.path,
        order: plugin.order,
        on_error: spelling(&ON_ERROR, plugin.on_error),
        sha256: plugin.sha256.as_deref(),
        config: pairs(&plugin.config),
        listeners: &plugin.listeners,
        canary,
        canary_secs,
        shadow: plugin.rollout == Rollout::Shadow,
        probation_secs: plugin.probation.as_secs(),
        topics: plugin.topics.iter().map(Filter::as_str).collect(),
        grants: Grants {
            files: plugin
                .files
                .iter()
                .map(|grant| ShownGrant { host: &grant.host, guest: &grant.guest, mode: file(grant) })
                .collect(),
            publish: plugin.grants.publish.iter().map(Filter::as_str).collect(),
            disconnect: plugin.grants.disconnect,
            ban: plugin.grants.ban,
            revoke: plugin.grants.revoke,
            keyvalue_mib: plugin.grants.keyvalue_mib,
            environment: pairs(&plugin.grants.environment),
            http: plugin.grants.http.iter().map(ToString::to_string).collect(),
            sockets: plugin.grants.sockets.iter().map(ToString::to_string).collect(),
        },
        limits: ShownLimits {
            memory_mib: limits.memory_mib,
            deadline_ms: limits.deadline_ms,
            queue_ms: limits.queue_ms,
            cpu_ms: limits.cpu_ms,
            hook_cpu_ms: limits.hook_cpu_ms,
            cpu_share: limits.cpu_share,
            host_calls_per_sec: limits.host_calls_per_sec,
            sockets: limits.sockets,
            files: limits.files,
            keyvalue_mib_per_sec: limits.keyvalue_mib_per_sec,
            feed_messages_max: limits.feed_messages_max,
            feed_mib: limits.feed_mib,
            feed_aside_mib: limits.feed_aside_mib,
            feed_tries: limits.feed_tries,
            instances: limits.instances,
        },
    }
}

fn pairs(pairs: &[(String, String)]) -> BTreeMap<&str, &str> {
    pairs.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect()
}

fn spelling<T: PartialEq>(spellings: &[(&'static str, T)], value: T) -> &'static str {
    spellings.iter().find(|(_, known)| *known == value).map_or("", |(name, _)| name)
}
