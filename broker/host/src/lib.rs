//! `wasmqtt-host`: loads Wasm components, runs them per shard, and replaces them while traffic flows.
//!
//! The only crate that names wasmtime and notify. Meets the server at `wasmqtt_protocol::ports`; knows no sockets.
#![deny(unsafe_code)]

mod bindings;
mod cache;
mod call;
mod config;
mod engine;
mod generation;
mod inspect;
mod instance;
mod loader;
mod shard;

use std::sync::Arc;
use std::thread::JoinHandle;

use arc_swap::ArcSwap;
use wasmqtt_protocol::ports::{Plugins, ShardPlugins};

pub use config::{FileGrant, HostConfig, Mode, OnError, PluginConfig, PluginLimits};
pub use inspect::{Inspection, inspect};

use generation::Generation;
use loader::{Loader, Signal};

/// A plugin could not be loaded, or something it needs is missing. The text names file and reason.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct HostError(pub(crate) String);

impl HostError {
    pub(crate) fn new(what: impl std::fmt::Display) -> Self {
        Self(what.to_string())
    }
}

/// The plugins that serve now, in the order they are asked. Immutable: a change makes a new one.
pub(crate) struct Chain {
    pub(crate) plugins: Vec<Arc<Generation>>,
}

/// Loads and watches plugins; shards get their view through [`Plugins`].
pub struct PluginHost {
    chain: Arc<ArcSwap<Chain>>,
    signal: Signal,
    loader: std::sync::Mutex<Option<JoinHandle<()>>>,
}

/// One serving plugin, for status displays.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Status {
    /// Name in the configuration, or the file's stem.
    pub name: String,
    /// Counts builds of this plugin, from 1.
    pub generation: u64,
    /// Calls begun in this generation.
    pub calls: u64,
    /// Traps, deadlines and failures among them.
    pub failures: u64,
}

impl PluginHost {
    /// Loads every configured plugin and those in the folder, then watches for changes. Must be called inside a tokio
    /// runtime; plugins wait for clocks and files there.
    ///
    /// # Errors
    /// A plugin with an entry in the configuration cannot be loaded. One that merely lies in the folder is logged and
    /// left out.
    pub fn start(config: HostConfig) -> Result<Arc<Self>, HostError> {
        let chain = Arc::new(ArcSwap::from_pointee(Chain { plugins: Vec::new() }));
        let mut loader = Loader::new(config, Arc::clone(&chain))?;
        loader.load_all(true)?;
        let signal = loader.watch()?;
        let runtime = tokio::runtime::Handle::current();
        let thread = std::thread::Builder::new().name("plugin-loader".into()).spawn(move || {
            let _entered = runtime.enter();
            loader.run();
        });
        let thread = thread.map_err(|error| HostError::new(format!("cannot start the plugin loader: {error}")))?;
        Ok(Arc::new(Self { chain, signal, loader: std::sync::Mutex::new(Some(thread)) }))
    }

    /// Some plugin decides who may connect.
    pub fn has_auth(&self) -> bool {
        self.chain.load().plugins.iter().any(|plugin| plugin.has_auth())
    }

    /// The plugins that serve now.
    pub fn status(&self) -> Vec<Status> {
        self.chain.load().plugins.iter().map(|plugin| plugin.status()).collect()
    }

    /// Looks for changed files now, instead of when the folder watch says so.
    pub fn rescan(&self) {
        self.signal.rescan();
    }

    /// Stops watching and unloads.
    pub fn stop(&self) {
        self.signal.stop();
        let thread = self.loader.lock().ok().and_then(|mut loader| loader.take());
        if let Some(thread) = thread {
            let _ = thread.join();
        }
        self.chain.store(Arc::new(Chain { plugins: Vec::new() }));
    }
}

impl Plugins for PluginHost {
    fn shard(&self, _index: usize) -> Box<dyn ShardPlugins> {
        Box::new(shard::View::new(Arc::clone(&self.chain)))
    }
}
