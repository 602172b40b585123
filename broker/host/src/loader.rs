//! Loads plugins, watches their files, and replaces what changed. Everything happens on one thread of its own, at low
//! priority; shards only see the finished chain.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Instant;

use arc_swap::ArcSwap;
use notify::{RecommendedWatcher, RecursiveMode};
use notify_debouncer_full::{DebounceEventResult, Debouncer, RecommendedCache, new_debouncer};
use tracing::{info, warn};
use wasmtime::Engine;
use wasmtime::component::Linker;

use crate::cache::{self, Cache};
use crate::config::{HostConfig, Mode, PluginConfig};
use crate::engine::{self, Clock};
use crate::generation::{Generation, Mount, Parts, copy_alone, reap};
use crate::instance::{Dead, Guest, linker};
use crate::{Chain, HostError};

/// Bytes a component file may have.
pub(crate) const COMPONENT_BYTES_MAX: usize = 64 << 20;
/// Bytes of a granted single file.
const FILE_BYTES_MAX: u64 = 64 << 20;

enum Wake {
    Rescan,
    Stop,
}

/// Tells the loader something.
pub(crate) struct Signal(Sender<Wake>);

impl Signal {
    pub(crate) fn rescan(&self) {
        let _ = self.0.send(Wake::Rescan);
    }
    pub(crate) fn stop(&self) {
        let _ = self.0.send(Wake::Stop);
    }
}

pub(crate) struct Loader {
    config: HostConfig,
    chain: Arc<ArcSwap<Chain>>,
    engine: Engine,
    linker: Linker<Guest>,
    clock: Arc<Clock>,
    cache: Cache,
    reaper: Sender<Dead>,
    reaper_thread: Option<std::thread::JoinHandle<()>>,
    /// Identities that were refused: not tried again until something changes.
    refused: HashMap<String, String>,
    next_number: u64,
    wake: (Sender<Wake>, Receiver<Wake>),
    watcher: Option<Debouncer<RecommendedWatcher, RecommendedCache>>,
}

impl Loader {
    pub(crate) fn new(config: HostConfig, chain: Arc<ArcSwap<Chain>>) -> Result<Self, HostError> {
        let engine = engine::engine()?;
        let clock = Clock::start(engine.clone())?;
        let (reaper, dead) = channel();
        let runtime = tokio::runtime::Handle::current();
        let for_reaper = Arc::clone(&clock);
        let reaper_thread = std::thread::Builder::new()
            .name("plugin-reaper".into())
            .spawn(move || reap(dead, &runtime, &for_reaper))
            .map_err(|error| HostError::new(format!("cannot start the plugin reaper: {error}")))?;
        Ok(Self {
            linker: linker(&engine)?,
            cache: Cache::open(&config.cache_dir)?,
            config,
            chain,
            engine,
            clock,
            reaper,
            reaper_thread: Some(reaper_thread),
            refused: HashMap::new(),
            next_number: 1,
            wake: channel(),
            watcher: None,
        })
    }

    /// Watches every folder in which something lies that a plugin is made from.
    pub(crate) fn watch(&mut self) -> Result<Signal, HostError> {
        let wake = self.wake.0.clone();
        let notice = move |result: DebounceEventResult| {
            if result.is_ok_and(|events| events.iter().any(|event| !event.kind.is_access())) {
                let _ = wake.send(Wake::Rescan);
            }
        };
        let failed = |error: notify::Error| HostError::new(format!("cannot watch for changed plugins: {error}"));
        let mut watcher = new_debouncer(self.config.debounce, None, notice).map_err(failed)?;
        let mut folders: Vec<PathBuf> = self.config.dir.clone().into_iter().collect();
        for plugin in &self.config.plugins {
            let files = plugin.files.iter().map(|grant| &grant.host).filter(|host| host.is_file());
            folders.extend(std::iter::once(&plugin.path).chain(files).filter_map(|file| parent(file)));
        }
        folders.sort();
        folders.dedup();
        for folder in folders {
            watcher.watch(&folder, RecursiveMode::NonRecursive).map_err(failed)?;
        }
        self.watcher = Some(watcher);
        Ok(Signal(self.wake.0.clone()))
    }

    pub(crate) fn run(mut self) {
        lower_priority();
        while let Ok(Wake::Rescan) = self.wake.1.recv() {
            // Notices that came together are one.
            while let Ok(Wake::Rescan) = self.wake.1.try_recv() {}
            if let Err(error) = self.load_all(false) {
                warn!(%error, "plugins not reloaded");
            }
        }
        self.chain.store(Arc::new(Chain { plugins: Vec::new() }));
        let reaper_thread = self.reaper_thread.take();
        let clock = Arc::clone(&self.clock);
        drop(self);
        clock.stop();
        drop(reaper_thread);
    }

    /// Brings the chain in line with the files. With `strict`, a configured plugin that cannot be loaded is an error;
    /// later it is a warning, and what runs goes on.
    pub(crate) fn load_all(&mut self, strict: bool) -> Result<(), HostError> {
        let old = self.chain.load_full();
        let mut plugins = Vec::new();
        let mut changed = false;
        for (config, configured) in self.wanted() {
            let running = old.plugins.iter().find(|plugin| *plugin.name == *config.name).cloned();
            match self.load(&config, running.as_ref()) {
                Ok(None) => plugins.extend(running),
                Ok(Some(plugin)) => {
                    plugins.push(plugin);
                    changed = true;
                }
                Err(error) if strict && configured => {
                    return Err(HostError::new(format!(
                        "plugin {:?} ({}): {error}",
                        config.name,
                        config.path.display()
                    )));
                }
                Err(error) => {
                    if running.is_some() {
                        warn!(plugin = %config.name, path = %config.path.display(), %error, "new build rejected, keeping the running one");
                    } else {
                        warn!(plugin = %config.name, path = %config.path.display(), %error, "plugin not loaded");
                    }
                    plugins.extend(running);
                }
            }
        }
        for gone in old.plugins.iter().filter(|gone| !plugins.iter().any(|plugin| plugin.name == gone.name)) {
            info!(plugin = %gone.name, generation = gone.number, "plugin unloaded: its file is gone");
            changed = true;
        }
        if changed {
            plugins.sort_by(|a, b| (a.config.order, &a.name).cmp(&(b.config.order, &b.name)));
            self.chain.store(Arc::new(Chain { plugins }));
        }
        Ok(())
    }

    /// Configured plugins, and files in the folder that no entry names.
    fn wanted(&self) -> Vec<(PluginConfig, bool)> {
        let mut wanted: Vec<(PluginConfig, bool)> =
            self.config.plugins.iter().map(|plugin| (plugin.clone(), true)).collect();
        let entries = self.config.dir.as_deref().and_then(|dir| std::fs::read_dir(dir).ok());
        for entry in entries.into_iter().flatten().flatten() {
            let path = entry.path();
            let Some(name) = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()) else { continue };
            let named = self.config.plugins.iter().any(|plugin| plugin.path == path || plugin.name == name);
            if path.extension().is_some_and(|extension| extension == "wasm") && !name.starts_with('.') && !named {
                wanted.push((PluginConfig { name, path, ..PluginConfig::default() }, false));
            }
        }
        wanted
    }

    /// `None`: what runs is what the files say, or the file is gone and was configured.
    fn load(
        &mut self,
        config: &PluginConfig,
        running: Option<&Arc<Generation>>,
    ) -> Result<Option<Arc<Generation>>, HostError> {
        let bytes = read_component(config)?;
        let identity = identity(config, &bytes)?;
        if running.is_some_and(|running| running.identity == identity)
            || self.refused.get(&config.name) == Some(&identity)
        {
            return Ok(None);
        }
        let loaded = self.build(config, &bytes, &identity, running.is_some());
        match &loaded {
            Ok(_) => self.refused.remove(&config.name),
            Err(_) => self.refused.insert(config.name.clone(), identity),
        };
        loaded.map(Some)
    }

    fn build(
        &mut self,
        config: &PluginConfig,
        bytes: &[u8],
        identity: &str,
        replaces: bool,
    ) -> Result<Arc<Generation>, HostError> {
        let begun = Instant::now();
        let (component, cached) = self.cache.component(&self.engine, bytes, &cache::digest(bytes))?;
        let compile_ms = begun.elapsed().as_millis() as u64;
        let number = self.next_number;
        self.next_number += 1;
        let mounts = self.mounts(config, number)?;
        let parts = Parts { engine: &self.engine, linker: &self.linker, clock: &self.clock, reaper: &self.reaper };
        let generation =
            Arc::new(Generation::new(&parts, &component, config.clone(), (number, identity.to_owned()), mounts)?);
        tokio::runtime::Handle::current().block_on(generation.prepare(self.config.shards))?;
        let what = if replaces { "plugin replaced" } else { "plugin loaded" };
        info!(plugin = %config.name, generation = number, compile_ms, cached, "{what}");
        Ok(generation)
    }

    /// Folders as granted; a single file in a folder of its own, so that nothing beside it can be reached.
    fn mounts(&self, config: &PluginConfig, number: u64) -> Result<Vec<Mount>, HostError> {
        let mut mounts: Vec<Mount> = Vec::new();
        for (place, grant) in config.files.iter().enumerate() {
            let failed =
                |error: &dyn std::fmt::Display| HostError::new(format!("grant {}: {error}", grant.host.display()));
            if grant.host.is_dir() {
                mounts.push(Mount { host: grant.host.clone(), guest: grant.guest.clone(), mode: grant.mode });
                continue;
            }
            if grant.mode == Mode::Write {
                return Err(failed(&"a single file can only be read; grant its folder to let the plugin write"));
            }
            let guest = Path::new(&grant.guest);
            let (Some(folder), Some(name)) = (guest.parent(), guest.file_name()) else {
                return Err(failed(&format!("{:?} is no name for a file", grant.guest)));
            };
            let folder = folder.to_string_lossy().into_owned();
            let name = name.to_string_lossy().into_owned();
            let known = mounts.iter().find(|mount| mount.guest == folder).map(|mount| mount.host.clone());
            let alone = known.unwrap_or_else(|| {
                self.cache.dir().join("files").join(format!("{}-{}-{number}-{place}", config.name, std::process::id()))
            });
            copy_alone(&grant.host, &alone, &name).map_err(|error| failed(&error))?;
            if !mounts.iter().any(|mount| mount.guest == folder) {
                mounts.push(Mount { host: alone, guest: folder, mode: Mode::Read });
            }
        }
        Ok(mounts)
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(self.cache.dir().join("files"));
    }
}

fn parent(file: &Path) -> Option<PathBuf> {
    let folder = file.parent()?;
    Some(if folder.as_os_str().is_empty() { PathBuf::from(".") } else { folder.to_owned() })
}

fn read_component(config: &PluginConfig) -> Result<Vec<u8>, HostError> {
    let failed = |error: std::io::Error| HostError::new(format!("cannot read {}: {error}", config.path.display()));
    let size = std::fs::metadata(&config.path).map_err(failed)?.len();
    if size > COMPONENT_BYTES_MAX as u64 {
        return Err(HostError::new(format!("{size} bytes; at most {COMPONENT_BYTES_MAX} are allowed")));
    }
    let bytes = std::fs::read(&config.path).map_err(failed)?;
    if let Some(pin) = &config.sha256
        && !pin.eq_ignore_ascii_case(&cache::digest(&bytes))
    {
        return Err(HostError::new(format!(
            "its SHA-256 is {}, configured is sha256 = {pin:?}",
            cache::digest(&bytes)
        )));
    }
    Ok(bytes)
}

/// Changes when the component or a granted single file does.
fn identity(config: &PluginConfig, bytes: &[u8]) -> Result<String, HostError> {
    let mut identity = cache::digest(bytes);
    for grant in config.files.iter().filter(|grant| grant.host.is_file()) {
        let failed = |error: std::io::Error| HostError::new(format!("grant {}: {error}", grant.host.display()));
        if std::fs::metadata(&grant.host).map_err(failed)?.len() > FILE_BYTES_MAX {
            return Err(HostError::new(format!("grant {}: larger than {FILE_BYTES_MAX} bytes", grant.host.display())));
        }
        identity.push('-');
        identity.push_str(&cache::digest(&std::fs::read(&grant.host).map_err(failed)?));
    }
    Ok(identity)
}

/// Compiling must not take a core from the shards.
fn lower_priority() {
    const NICE: i32 = 10;
    if let Err(error) = rustix::process::setpriority_process(Some(rustix::thread::gettid()), NICE) {
        tracing::debug!(%error, "the plugin loader keeps its priority");
    }
}
