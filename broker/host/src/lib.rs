//! `wasmqtt-host`: loads Wasm components, runs them per shard, and replaces them while traffic flows.
//!
//! The only crate that names wasmtime and notify. Meets the server at `wasmqtt_protocol::ports`; knows no
//! clients' sockets, only those of plugins.

mod acl;
mod allowance;
mod auth;
mod background;
mod bindings;
mod breaker;
mod cache;
mod call;
mod cancel;
mod chain;
mod cluster;
mod compile;
mod compiling;
mod config;
mod counters;
mod deploy;
mod diagnosis;
mod engine;
mod events;
mod explain;
mod exports;
mod feed;
mod feeder;
mod files;
mod generation;
mod grants;
mod guest;
mod held;
mod hook;
mod http;
mod imports;
mod inspect;
mod instance;
mod jobs;
mod keyvalue;
mod loader;
mod lookup;
mod metrics;
mod network;
mod plugin;
mod pool;
mod probation;
mod queue;
mod reaper;
mod reconfigure;
mod registration;
mod rewrite;
mod services;
mod shadow;
mod shard;
mod share;
mod sockets;
mod source;
mod swap;
mod threads;
mod transaction;
mod trials;
mod versions;
mod watch;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use arc_swap::ArcSwap;
use wasmqtt_protocol::ports::{Access, Broker, Client, Plugins, ShardPlugins, Submission};

pub use cancel::Cancel;
pub use compile::{COMPILE_SUBCOMMAND, CompileLimits, Compiler, compile_child};
pub use compiling::Compiling;
pub use config::{FileGrant, Grants, HostConfig, Mode, OnError, PluginConfig, PluginLimits, Rollout, is_plugin_name};
pub use explain::{Opinion, Outcome};
pub use feed::{FedMessage, FeedList};
pub use imports::check_grants;
pub use inspect::{Inspection, inspect};
pub use metrics::Value;
pub use network::{HttpGrant, SocketGrant};
pub use registration::Registered;
pub use source::read_file;
pub use threads::ThreadDied;

use chain::Chain;
use compiling::Compilers;
use deploy::Deployed;
use generation::HandOver;
use hook::Shown;
use loader::{Loader, Occasion};
use pool::Room;
use reaper::Reaper;
use services::Door;
use versions::Versions;
use watch::{Order, Signal};

/// How long compilers may take to end when the host does: they are killed.
const COMPILERS_END: Duration = Duration::from_secs(1);

/// A plugin could not be loaded, or something it needs is missing. The text names file and reason.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct HostError(pub(crate) String);

impl HostError {
    pub(crate) fn new(what: impl std::fmt::Display) -> Self {
        Self(what.to_string())
    }
}

/// Loads and watches plugins; shards get their view through [`Plugins`].
///
/// Its calls are polled by hand on the thread of their shard, which must have entered a tokio runtime with time and I/O enabled
/// (a guest's files, clocks and sockets wait there). A call gives the thread back at least once in a millisecond.
pub struct PluginHost {
    chain: Arc<ArcSwap<Chain>>,
    door: Door,
    signal: Signal,
    runtime: tokio::runtime::Handle,
    versions: Versions,
    compilers: Arc<Compilers>,
    /// `None`: each instance is allocated alone.
    room: Option<Room>,
    /// Until it is stopped.
    threads: Mutex<Option<(JoinHandle<()>, Reaper)>>,
}

/// One serving plugin, for status displays.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Status {
    /// Name in the configuration, or the file's stem.
    pub name: String,
    /// Counts builds of this plugin, from 1.
    pub generation: u64,
    /// SHA-256 of the component.
    pub digest: String,
    /// A newer build on trial.
    pub candidate: Option<Tried>,
    /// How often a build went back to its predecessor by itself.
    pub rolled_back: u64,
    /// Interfaces it exports.
    pub plug_points: Vec<&'static str>,
    /// What it wants to be shown.
    pub registered: Registered,
    /// Bytes of linear memory of its largest instance after `init`.
    pub memory_bytes: usize,
    /// Calls since the broker started.
    pub calls: u64,
    /// Calls without an answer among them: traps, deadlines, failures, full queues.
    pub failures: u64,
    /// Questions that were not asked, because it keeps failing.
    pub refused: u64,
    /// Instances that exist, of old builds too while they finish.
    pub instances: usize,
    /// Milliseconds of computing, by calls that took longer than about a millisecond.
    pub cpu_ms: u64,
    /// How often a call waited because the plugin had computed more than `limits.cpu_share`.
    pub cpu_waits: u64,
    /// How often its circuit breaker opened.
    pub breaker_opened: u64,
    /// Messages that wait for `committed`.
    pub feed_waiting: usize,
    /// Their bytes.
    pub feed_bytes: usize,
    /// Messages that `committed` could not take and that are set aside.
    pub feed_aside: usize,
    /// Messages that were dropped, because too many waited or were set aside.
    pub feed_dropped: u64,
    /// Events that were dropped, because too many waited.
    pub events_dropped: u64,
    /// Changes of filters that were dropped, because too many waited.
    pub interest_dropped: u64,
    /// What it tried without a grant: addresses, HTTP servers, files, buckets, functions of the broker.
    pub denied: u64,
    /// Sockets that its instances have.
    pub sockets: usize,
    /// Files that its instances have open.
    pub files: usize,
    /// Bytes in its buckets.
    pub keyvalue_bytes: usize,
    /// Values of metrics that were not recorded.
    pub metrics_lost: u64,
    /// What it counts itself.
    pub metrics: BTreeMap<String, Value>,
}

/// A build on trial.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Tried {
    /// Its number.
    pub generation: u64,
    /// SHA-256 of the component.
    pub digest: String,
    /// Clients of a hundred that it serves; `None`: it runs in the shadow.
    pub percent: Option<u8>,
    /// Its calls.
    pub calls: u64,
    /// Those without an answer.
    pub failures: u64,
    /// Answers of a shadow that were compared.
    pub compared: u64,
    /// Those that were others than the serving build's.
    pub differs: u64,
}

impl Status {
    /// For `$SYS/broker/plugins/…`.
    fn into_topics(self) -> Vec<(String, String)> {
        let Self { name, .. } = &self;
        [
            ("generation", self.generation),
            ("calls", self.calls),
            ("failures", self.failures),
            ("refused", self.refused),
            ("instances", self.instances as u64),
            ("cpu/ms", self.cpu_ms),
            ("cpu/waits", self.cpu_waits),
            ("breaker opened", self.breaker_opened),
            ("rolled back", self.rolled_back),
            ("shadow/compared", self.candidate.as_ref().map_or(0, |tried| tried.compared)),
            ("shadow/differs", self.candidate.as_ref().map_or(0, |tried| tried.differs)),
            ("feed/waiting", self.feed_waiting as u64),
            ("feed/bytes", self.feed_bytes as u64),
            ("feed/aside", self.feed_aside as u64),
            ("feed/dropped", self.feed_dropped),
            ("events/dropped", self.events_dropped),
            ("interest/dropped", self.interest_dropped),
            ("denied", self.denied),
            ("keyvalue/bytes", self.keyvalue_bytes as u64),
            ("metrics/lost", self.metrics_lost),
        ]
        .map(|(what, value)| (format!("{name}/{what}"), value.to_string()))
        .into()
    }
}

impl PluginHost {
    /// Loads every configured plugin and those in the folder, then watches for changes. Must be called inside a tokio
    /// runtime with time and I/O enabled, but not by one of its tasks.
    ///
    /// # Errors
    /// A plugin cannot be loaded, or the folder cannot be read: without one of them, clients might be allowed what it
    /// would have denied. Or `stop` of the configuration was asked for.
    pub fn start(config: HostConfig) -> Result<Arc<Self>, HostError> {
        let runtime = tokio::runtime::Handle::try_current()
            .map_err(|_| HostError::new("plugins need a tokio runtime, and none was entered"))?;
        let (debounce, stop) = (config.debounce, config.stop.clone());
        let chain = Arc::new(ArcSwap::default());
        let door = Door::default();
        let (mut loader, reaper) =
            Loader::new(config, Arc::clone(&chain), Arc::clone(&door), stop.clone(), runtime.clone())?;
        let (versions, compilers, room) = (loader.versions(), loader.compilers(), loader.room);
        let started = match loader.load_all(Occasion::Start, Vec::new()) {
            Ok(()) => watch::start(loader, debounce, stop.clone()),
            Err(error) => {
                drop(loader);
                Err(error)
            }
        };
        match started {
            Ok((signal, thread)) => {
                let threads = Mutex::new(Some((thread, reaper)));
                Ok(Arc::new(Self { chain, door, signal, runtime, versions, compilers, room, threads }))
            }
            Err(error) => {
                // Instances that were made keep the store open, and the caller may end the process at once.
                let_all_go(&chain);
                reaper.finish();
                Err(error)
            }
        }
    }

    /// Some plugin decides who may connect.
    pub fn has_auth(&self) -> bool {
        self.chain.load().has_auth()
    }

    /// The plugins that serve now.
    pub fn status(&self) -> Vec<Status> {
        self.chain.load().links.iter().map(chain::Link::status).collect()
    }

    /// The outside of the component that serves under this name.
    pub fn inspection(&self, name: &str) -> Option<Inspection> {
        let chain = self.chain.load();
        chain.link(name).map(|link| link.serving.inspection())
    }

    /// What is compiled at the moment.
    pub fn compiling(&self) -> Vec<Compiling> {
        self.compilers.jobs()
    }

    /// Builds these components, by the names of their plugins, and lets all serve in one step; or none, and says why.
    /// They are kept in the plugins' files.
    ///
    /// # Errors
    /// One cannot serve.
    pub fn deploy(&self, files: Vec<(String, Vec<u8>)>) -> Result<(), HostError> {
        self.deploy_with(files, false, &Cancel::default())
    }

    /// Like [`Self::deploy`]. With `fresh`, the running builds are not asked for what they know. It may take as long as
    /// compiling does, on this thread; others may deploy meanwhile, and it can be cancelled.
    ///
    /// # Errors
    /// One cannot serve; it was cancelled.
    pub fn deploy_with(&self, files: Vec<(String, Vec<u8>)>, fresh: bool, cancel: &Cancel) -> Result<(), HostError> {
        let mut names: Vec<&str> = files.iter().map(|(name, _)| name.as_str()).collect();
        names.sort_unstable();
        if let Some([name, _]) = names.array_windows().find(|[a, b]| a == b) {
            return Err(HostError::new(format!("plugin {name:?} is there twice; nothing was changed")));
        }
        let components = self.compile_all(files, cancel)?;
        let hand_over = if fresh { HandOver::Fresh } else { HandOver::Wanted };
        self.signal.order(Order::Deploy { components, at_once: false, hand_over, cancel: cancel.clone() })
    }

    /// All at a time, as far as there are compilers.
    fn compile_all(&self, files: Vec<(String, Vec<u8>)>, cancel: &Cancel) -> Result<Vec<Deployed>, HostError> {
        let compile = |(name, bytes): (String, Vec<u8>)| {
            let digest = cache::digest(&bytes);
            let compiled = self.compilers.component(&name, &bytes, &digest, cancel);
            match compiled {
                Ok(compiled) => Ok(Deployed { name, bytes: bytes.into(), digest, compiled }),
                Err(error) => {
                    let error = diagnosis::memory(&error.to_string(), self.memory_mib(&name)).unwrap_or(error);
                    Err(HostError::new(format!("plugin {name:?}: {error}; nothing was changed")))
                }
            }
        };
        std::thread::scope(|scope| {
            let threads: Vec<_> = files.into_iter().map(|file| scope.spawn(move || compile(file))).collect();
            let panicked = |_| Err(HostError::new("compiling has panicked"));
            threads.into_iter().map(|thread| thread.join().unwrap_or_else(panicked)).collect()
        })
    }

    /// Of an instance of this plugin.
    fn memory_mib(&self, name: &str) -> u32 {
        let serving = self.chain.load().link(name).map(|link| link.serving.config.limits);
        serving.unwrap_or_default().memory_mib
    }

    /// Lets the version before serve again, or the kept one whose SHA-256 begins with `digest`; drops a build on trial.
    /// The running build is not asked for what it knows: it is the one to get rid of.
    ///
    /// # Errors
    /// There is none, or it cannot serve any more.
    pub fn roll_back(&self, name: &str, digest: Option<&str>) -> Result<(), HostError> {
        self.roll_back_with(name, digest, &Cancel::default())
    }

    /// Like [`Self::roll_back`], and can be cancelled: the earlier version may have to be compiled again.
    ///
    /// # Errors
    /// There is none, or it cannot serve any more; it was cancelled.
    pub fn roll_back_with(&self, name: &str, digest: Option<&str>, cancel: &Cancel) -> Result<(), HostError> {
        let chain = self.chain.load_full();
        let link = chain.link(name).ok_or_else(|| HostError::new(format!("there is no plugin {name:?}")))?;
        if digest.is_none() && link.candidate.is_some() {
            return self.signal.order(Order::DropCandidate(name.to_owned()));
        }
        let version = self.versions.find(name, &link.serving.digest, digest)?;
        let components = self.compile_all(vec![(name.to_owned(), version)], cancel)?;
        let hand_over = HandOver::Fresh;
        self.signal.order(Order::Deploy { components, at_once: true, hand_over, cancel: cancel.clone() })
    }

    /// Lets the build on trial serve everybody.
    ///
    /// # Errors
    /// None is on trial.
    pub fn promote(&self, name: &str) -> Result<(), HostError> {
        self.signal.order(Order::Promote(name.to_owned()))
    }

    /// Other settings for plugins with an entry in the configuration: those that they concern are built anew and serve
    /// in one step, or nothing changes.
    ///
    /// # Errors
    /// One of them cannot serve.
    pub fn reconfigure(&self, plugins: Vec<PluginConfig>) -> Result<(), HostError> {
        self.reconfigure_with(plugins, &Cancel::default())
    }

    /// Like [`Self::reconfigure`]. It may take as long as compiling does, on this thread; others may deploy meanwhile,
    /// and it can be cancelled.
    ///
    /// # Errors
    /// One of them cannot serve; it was cancelled.
    pub fn reconfigure_with(&self, plugins: Vec<PluginConfig>, cancel: &Cancel) -> Result<(), HostError> {
        let compiled = jobs::compile_all(&self.compilers, &self.chain.load_full(), &plugins, cancel);
        if cancel.is_cancelled() {
            return Err(HostError::new("it was cancelled"));
        }
        self.signal.order(Order::Reconfigure { plugins, compiled })
    }

    /// What other settings ask for and cannot have before a restart stays as it is `now`: rooms for instances were made
    /// at the start.
    pub fn fit(&self, now: &[PluginConfig], wanted: &mut [PluginConfig]) {
        if let Some(room) = &self.room {
            room.fit(now, wanted);
        }
    }

    /// What each `acl` plugin would say, in the order in which they are asked.
    pub fn explain(&self, client: &Arc<Client>, access: &Access) -> Vec<Opinion> {
        let chain = self.chain.load_full();
        let builds = chain.links.iter().map(|link| link.build_for(&client.client_id));
        let asked = builds.filter(|build| build.exports.acl.is_some());
        asked.map(|build| self.runtime.block_on(explain::opinion(build, client, access))).collect()
    }

    /// Messages that a plugin has not taken.
    ///
    /// # Errors
    /// There is no such plugin.
    pub fn feed(&self, plugin: &str) -> Result<FeedList, HostError> {
        Ok(self.serving(plugin)?.plugin.feed.list())
    }

    /// One of them, with the beginning of its payload.
    ///
    /// # Errors
    /// There is no such plugin or message.
    pub fn feed_message(&self, plugin: &str, id: &str) -> Result<FedMessage, HostError> {
        self.serving(plugin)?.plugin.feed.show(id).map_err(HostError::new)
    }

    /// Forgets messages that a plugin has not taken, in the store as well.
    ///
    /// # Errors
    /// There is no such plugin, or one of the messages is not there; those before it are forgotten.
    pub fn feed_skip(&self, plugin: &str, ids: &[String]) -> Result<usize, HostError> {
        let serving = self.serving(plugin)?;
        for id in ids {
            let skipped = serving.plugin.feed.skip(id).map_err(HostError::new)?;
            serving.fed(&[skipped]);
        }
        Ok(ids.len())
    }

    /// Has messages that are set aside tried again; without any, all.
    ///
    /// # Errors
    /// There is no such plugin, or one of the messages is not set aside; those before it are tried again.
    pub fn feed_retry(&self, plugin: &str, ids: &[String]) -> Result<usize, HostError> {
        let feed = &self.serving(plugin)?.plugin.feed;
        let ids = if ids.is_empty() { feed.all_aside() } else { ids.to_vec() };
        ids.iter().try_for_each(|id| feed.retry(id)).map_err(HostError::new)?;
        Ok(ids.len())
    }

    fn serving(&self, plugin: &str) -> Result<Arc<generation::Generation>, HostError> {
        let chain = self.chain.load();
        let link = chain.link(plugin).ok_or_else(|| HostError::new(format!("no plugin {plugin:?} serves")))?;
        Ok(Arc::clone(&link.serving))
    }

    /// SHA-256 of the versions of a plugin that are kept, the last to serve first.
    pub fn versions(&self, name: &str) -> Vec<String> {
        self.versions.digests(name)
    }

    /// Looks for changed files now, instead of when the folder watch says so.
    pub fn rescan(&self) {
        self.signal.rescan();
    }

    /// The name of a thread that has ended although the host was not stopped: it panicked, and plugins are not replaced
    /// any more, or do not end.
    pub fn ended(&self) -> Option<String> {
        let threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        let (loader, reaper) = threads.as_ref().filter(|_| !self.signal.is_stopped())?;
        if loader.is_finished() {
            return Some(loader.thread().name().unwrap_or("the plugin loader").to_owned());
        }
        reaper.has_ended().then(|| "plugin-reaper".to_owned())
    }

    /// Stops watching, ends compilers, unloads, and waits until instances have said goodbye: views of shards should be
    /// gone by now, or it waits for them in vain, two seconds at most. Calls under way may finish; later ones find no
    /// plugins.
    pub fn stop(&self) {
        self.signal.stop();
        let threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some((loader, reaper)) = threads else { return };
        let _ = loader.join();
        self.compilers.finish(COMPILERS_END);
        let_all_go(&self.chain);
        reaper.finish();
    }
}

fn let_all_go(chain: &ArcSwap<Chain>) {
    for generation in chain.swap(Arc::default()).generations() {
        generation.retire();
        generation.plugin.end();
    }
}

impl Drop for PluginHost {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Plugins for PluginHost {
    fn attach(&self, broker: Arc<dyn Broker>) {
        let _ = self.door.set(broker);
    }

    fn fed_again(&self) {
        for link in &self.chain.load().links {
            link.serving.plugin.feed.restored();
        }
    }

    fn feed_again(&self, plugin: &str, message: Submission) -> bool {
        let chain = self.chain.load();
        let Some(link) = chain.link(plugin) else { return false };
        let takes = link.serving.exports.storage_hook.is_some() && link.serving.registration().committed;
        if takes {
            let lost = link.serving.plugin.feed.push_again(Shown::from(&message));
            link.serving.lost(&lost);
        }
        takes
    }

    fn shard(&self, index: usize) -> Box<dyn ShardPlugins> {
        Box::new(shard::View::new(Arc::clone(&self.chain), index))
    }
}
