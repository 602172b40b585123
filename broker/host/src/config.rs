//! What the operator says about plugins.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use wasmqtt_protocol::access::{Action, Verdict};
use wasmqtt_protocol::codec::ReasonCode;
use wasmqtt_protocol::ports::{Access, Buckets};
use wasmqtt_protocol::topic::{Filter, filters_overlap};

use crate::cancel::Cancel;
use crate::chain::Trial;
use crate::compile::{CompileLimits, Compiler};
use crate::network::{HttpGrant, SocketGrant};
use crate::threads::ThreadDied;

/// Everything [`crate::PluginHost::start`] needs.
#[derive(Clone)]
pub struct HostConfig {
    /// Every `*.wasm` in it is loaded; `None`: only configured ones.
    pub dir: Option<PathBuf>,
    /// Plugins with an entry of their own.
    pub plugins: Vec<PluginConfig>,
    /// Compiled components and copies of granted files. Ours alone: what lies there is trusted code.
    pub cache_dir: PathBuf,
    /// The key that tells what is in `cache_dir` from what others put there. A file that nobody else can read, in a
    /// folder that no plugin is granted; made when it is not there. `None`: the cache is of use to this process only.
    pub cache_key: Option<PathBuf>,
    /// What compiles components.
    pub compiler: Compiler,
    /// What it may use for each.
    pub compile_limits: CompileLimits,
    /// How many are compiled at a time; default one per core.
    pub compile_at_once: usize,
    /// How many shards will ask for a view; that many instances are made before a build serves.
    pub shards: usize,
    /// A changed file is looked at when it has been quiet this long.
    pub debounce: Duration,
    /// Keeps what plugins have in buckets; `None`: it ends with the broker.
    pub buckets: Option<Arc<dyn Buckets>>,
    /// Gives up what takes long, also the start itself. Stopping the host does so too.
    pub stop: Cancel,
    /// Called when a thread of the host has panicked.
    pub thread_died: Option<ThreadDied>,
}

impl Default for HostConfig {
    fn default() -> Self {
        Self {
            dir: None,
            plugins: Vec::new(),
            cache_dir: PathBuf::from("plugin-cache"),
            cache_key: None,
            compiler: Compiler::default(),
            compile_limits: CompileLimits::default(),
            compile_at_once: std::thread::available_parallelism().map_or(1, usize::from),
            shards: 1,
            debounce: Duration::from_millis(20),
            buckets: None,
            stop: Cancel::default(),
            thread_died: None,
        }
    }
}

/// Whether a plugin may be called so: 1 to 64 letters, digits, `-` or `_`, which fit into topics, paths and tables.
pub fn is_plugin_name(name: &str) -> bool {
    (1..=64).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
}

/// One plugin. Its settings and environment may be secrets: `Debug` leaves them out.
#[derive(Clone)]
pub struct PluginConfig {
    /// Name in logs and `$SYS`.
    pub name: String,
    /// The component.
    pub path: PathBuf,
    /// Lower is asked first; equal ones by name.
    pub order: i32,
    /// What an answer that did not come counts as.
    pub on_error: OnError,
    /// Its settings.
    pub config: Vec<(String, String)>,
    /// Files and folders it may reach.
    pub files: Vec<FileGrant>,
    /// What else it may do.
    pub grants: Grants,
    /// Listeners whose clients it is asked about; empty: all.
    pub listeners: Vec<String>,
    /// Topics that `acl` and `storage-hook` are asked about; empty: all.
    pub topics: Vec<Filter>,
    /// Its bounds.
    pub limits: PluginLimits,
    /// SHA-256 the file must have, in hexadecimal.
    pub sha256: Option<String>,
    /// How a newer build begins.
    pub rollout: Rollout,
    /// How long a build that replaced another is watched: if it fails more, the other one serves again.
    pub probation: Duration,
}

impl std::fmt::Debug for PluginConfig {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<&str> = self.config.iter().map(|(name, _)| name.as_str()).collect();
        out.debug_struct("PluginConfig")
            .field("name", &self.name)
            .field("path", &self.path)
            .field("settings", &names)
            .finish_non_exhaustive()
    }
}

impl PluginConfig {
    pub(crate) fn trial(&self) -> Option<Trial> {
        match self.rollout {
            Rollout::AtOnce => None,
            Rollout::Canary { percent, .. } => Some(Trial::Canary(percent)),
            Rollout::Shadow => Some(Trial::Shadow),
        }
    }

    pub(crate) fn canary_time(&self) -> Duration {
        match self.rollout {
            Rollout::Canary { time, .. } => time,
            Rollout::AtOnce | Rollout::Shadow => Duration::MAX,
        }
    }

    pub(crate) fn is_for_listener(&self, listener: &str) -> bool {
        self.listeners.is_empty() || self.listeners.iter().any(|name| name == listener)
    }

    pub(crate) fn is_for_topic(&self, topic: &str) -> bool {
        self.topics.is_empty() || self.topics.iter().any(|filter| filter.matches(topic))
    }

    /// A Topic Filter is its business if one of its topics is.
    pub(crate) fn is_for_access(&self, access: &Access) -> bool {
        match access.action {
            Action::Publish => self.is_for_topic(&access.topic),
            Action::Subscribe => {
                let overlaps = |filter: &Filter| filters_overlap(filter.topic_filter(), &access.topic);
                self.topics.is_empty() || self.topics.iter().any(overlaps)
            }
        }
    }
}

impl Default for PluginConfig {
    fn default() -> Self {
        Self {
            name: String::new(),
            path: PathBuf::new(),
            order: 0,
            on_error: OnError::default(),
            config: Vec::new(),
            files: Vec::new(),
            grants: Grants::default(),
            listeners: Vec::new(),
            topics: Vec::new(),
            limits: PluginLimits::default(),
            sha256: None,
            rollout: Rollout::default(),
            probation: Duration::from_mins(1),
        }
    }
}

/// How a newer build of a plugin begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Rollout {
    /// For everybody.
    #[default]
    AtOnce,
    /// For some clients, chosen by their Client Identifier; for all after a time in which it did not fail more.
    Canary {
        /// Of a hundred clients; 1..=99.
        percent: u8,
        /// How long.
        time: Duration,
    },
    /// For nobody: it is asked beside the serving build, and differences are counted, until it is promoted.
    Shadow,
}

/// What a plugin may do beside reading files. The default is nothing.
#[derive(Clone, Default)]
pub struct Grants {
    /// Topics it may publish to.
    pub publish: Vec<Filter>,
    /// It may end connections.
    pub disconnect: bool,
    /// It may keep clients out.
    pub ban: bool,
    /// It may have leases forgotten.
    pub revoke: bool,
    /// MiB that it may keep in buckets of `wasi:keyvalue`; 0, the default: none.
    pub keyvalue_mib: u32,
    /// Environment variables it sees.
    pub environment: Vec<(String, String)>,
    /// HTTP servers it may ask.
    pub http: Vec<HttpGrant>,
    /// Addresses it may connect to.
    pub sockets: Vec<SocketGrant>,
}

/// When a plugin traps, takes too long or fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnError {
    /// The client is told that the server is unavailable.
    #[default]
    Deny,
    /// The client is let in.
    Allow,
    /// The next plugin is asked.
    Skip,
    /// A fresh instance is asked once; then as [`OnError::Deny`].
    Retry,
}

impl OnError {
    /// What it stands for where a client wants to do something; `None`: the next plugin is asked.
    pub(crate) fn verdict(self) -> Option<Verdict> {
        match self {
            Self::Deny | Self::Retry => Some(Verdict::Deny(ReasonCode::NOT_AUTHORIZED)),
            Self::Allow => Some(Verdict::Allow),
            Self::Skip => None,
        }
    }
}

/// A file or folder a plugin may reach.
#[derive(Debug, Clone)]
pub struct FileGrant {
    /// Where it is. A single file is handed over as a copy, which is renewed when the file changes.
    pub host: PathBuf,
    /// What the plugin calls it; absolute.
    pub guest: String,
    /// What it may do. Single files can only be read.
    pub mode: Mode,
}

/// What a plugin may do with a granted folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// Read.
    #[default]
    Read,
    /// Read, write, create and delete.
    Write,
}

/// Bounds of one plugin.
#[derive(Debug, Clone, Copy)]
pub struct PluginLimits {
    /// MiB of linear memory per instance, over all its memories; 1..=4096, default 16.
    pub memory_mib: u32,
    /// Milliseconds one call may take, waiting for others included; default 5,000.
    pub deadline_ms: u64,
    /// Milliseconds a call may wait for an instance before that; default 30,000.
    pub queue_ms: u64,
    /// Milliseconds of computing one call may take; default 1,000.
    pub cpu_ms: u64,
    /// The same for `acl` and `before-store`, which clients wait for; default 50.
    pub hook_cpu_ms: u64,
    /// Percent of a shard's thread that the plugin may compute while other clients are connected there; 1..=100, default
    /// 50. Calls that compute less than about a millisecond do not count.
    pub cpu_share: u8,
    /// Calls of the broker's functions the plugin may make in a second on each shard, and as many where no client waits,
    /// log lines apart; default 1,000.
    pub host_calls_per_sec: u32,
    /// Sockets that all instances together may have; default 16.
    pub sockets: usize,
    /// Files that all instances together may have open; default 64.
    pub files: usize,
    /// MiB that may go into and out of buckets of `wasi:keyvalue` in a second, each call counting as 256 bytes more; default 8.
    pub keyvalue_mib_per_sec: u32,
    /// Messages that may wait for `committed`; default 100,000.
    pub feed_messages_max: usize,
    /// MiB of messages that may wait for `committed`, everything that belongs to a message included; default 128.
    pub feed_mib: u32,
    /// MiB of messages that `committed` could not take and that are set aside; 0: they are dropped; default 16.
    pub feed_aside_mib: u32,
    /// How often a message is shown alone before it is set aside; default 3.
    pub feed_tries: u32,
    /// Instances per shard, and so calls under way; made when they are needed, default 4. Settings say 16 for plugins
    /// that may use the network, since their calls wait for others most of the time.
    pub instances: usize,
}

impl Default for PluginLimits {
    fn default() -> Self {
        Self {
            memory_mib: 16,
            deadline_ms: 5000,
            queue_ms: 30_000,
            cpu_ms: 1000,
            hook_cpu_ms: 50,
            cpu_share: 50,
            host_calls_per_sec: 1000,
            sockets: 16,
            files: 64,
            keyvalue_mib_per_sec: 8,
            feed_messages_max: 100_000,
            feed_mib: 128,
            feed_aside_mib: 16,
            feed_tries: 3,
            instances: 4,
        }
    }
}
