//! What the operator says about plugins.

use std::path::PathBuf;
use std::time::Duration;

/// Everything [`crate::PluginHost::start`] needs.
#[derive(Debug, Clone)]
pub struct HostConfig {
    /// Every `*.wasm` in it is loaded; `None`: only configured ones.
    pub dir: Option<PathBuf>,
    /// Plugins with an entry of their own.
    pub plugins: Vec<PluginConfig>,
    /// Compiled components and copies of granted files. Ours alone: what lies there is trusted code.
    pub cache_dir: PathBuf,
    /// How many shards will ask for a view; that many instances are made before a build serves.
    pub shards: usize,
    /// A changed file is looked at when it has been quiet this long.
    pub debounce: Duration,
}

impl Default for HostConfig {
    fn default() -> Self {
        Self {
            dir: None,
            plugins: Vec::new(),
            cache_dir: PathBuf::from("plugin-cache"),
            shards: 1,
            debounce: Duration::from_millis(200),
        }
    }
}

/// One plugin.
#[derive(Debug, Clone, Default)]
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
    /// Its bounds.
    pub limits: PluginLimits,
    /// SHA-256 the file must have, in hexadecimal.
    pub sha256: Option<String>,
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
    /// Milliseconds one call may take, waiting included; default 5,000.
    pub deadline_ms: u64,
    /// Milliseconds of computing one call may take; default 1,000.
    pub cpu_ms: u64,
    /// Instances per shard, and so calls under way; default 4.
    pub instances: usize,
}

impl Default for PluginLimits {
    fn default() -> Self {
        Self { memory_mib: 16, deadline_ms: 5000, cpu_ms: 1000, instances: 4 }
    }
}
