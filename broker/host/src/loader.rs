//! Loads plugins and replaces what changed, on one thread of its own at low priority. Shards only see a finished chain.

use std::collections::HashMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::time::Instant;

use arc_swap::ArcSwap;
use tracing::{info, warn};

use crate::background;
use crate::cache::{self, Cache};
use crate::config::{HostConfig, PluginConfig, PluginLimits};
use crate::engine::{self, Clock, Pool};
use crate::generation::{Generation, Identity, Parts, reap};
use crate::grants::{self, FILE_BYTES_MAX, Mounts};
use crate::guest::linker;
use crate::plugin::Plugin;
use crate::services::Door;
use crate::{Chain, HostError};

/// Bytes a component file may have.
pub(crate) const COMPONENT_BYTES_MAX: u64 = 64 << 20;
/// Order of plugins that merely lie in the folder: the default of those with an entry.
const UNNAMED_ORDER: i32 = 100;
/// Instances the pool has room for: at least so many, at most so many.
const POOL_INSTANCES_MIN: usize = 64;
const POOL_INSTANCES_MAX: usize = 1000;
/// Plugins from the folder that the pool has room for, beside configured ones.
const FOLDER_PLUGINS: usize = 4;

/// Instances that wait for their end.
const DEAD_MAX: usize = 1024;

/// What is known about a plugin beyond one build.
struct Known {
    /// Builds that have served.
    builds: u64,
    plugin: Arc<Plugin>,
    /// The last build or state of files that was refused: not tried again until something changes.
    refused: Option<String>,
}

pub(crate) struct Loader {
    config: HostConfig,
    chain: Arc<ArcSwap<Chain>>,
    parts: Parts,
    cache: Cache,
    known: HashMap<String, Known>,
    runtime: tokio::runtime::Handle,
}

/// `made_from` is what a build is made from, or what is wrong with that.
struct Source {
    bytes: Result<Vec<u8>, HostError>,
    made_from: String,
}

impl Loader {
    pub(crate) fn new(
        config: HostConfig,
        chain: Arc<ArcSwap<Chain>>,
        door: Door,
        runtime: tokio::runtime::Handle,
    ) -> Result<Self, HostError> {
        let cache = Cache::open(&config.cache_dir)?;
        grants::clean(&copies(&cache));
        let engine = engine::engine(Some(pool(&config)))?;
        let linker = linker(&engine)?;
        let clock = Clock::start(engine.clone())?;
        let (reaper, dead) = sync_channel(DEAD_MAX);
        let (reaper_runtime, reaper_clock) = (runtime.clone(), Arc::clone(&clock));
        let reap = move || {
            reap(&dead, &reaper_runtime, &reaper_clock);
            // Without it the last guests could not be interrupted, so it ends last.
            reaper_clock.stop();
        };
        let thread = std::thread::Builder::new().name("plugin-reaper".into()).spawn(reap);
        thread.map_err(|error| HostError::new(format!("cannot start the plugin reaper: {error}")))?;
        let parts = Parts { engine, linker, clock, reaper, shards: config.shards, door };
        Ok(Self { config, chain, parts, cache, known: HashMap::new(), runtime })
    }

    /// Folders in which something lies that a plugin is made from.
    pub(crate) fn folders(&self) -> Vec<PathBuf> {
        let mut folders: Vec<PathBuf> = self.config.dir.clone().into_iter().collect();
        for plugin in &self.config.plugins {
            let files = plugin.files.iter().map(|grant| &grant.host).filter(|host| !host.is_dir());
            folders.extend(std::iter::once(&plugin.path).chain(files).filter_map(|file| parent(file)));
        }
        folders.sort();
        folders.dedup();
        folders
    }

    /// Brings the chain in line with the files. With `strict`, a configured plugin that cannot be loaded is an error;
    /// later it is a warning, and what runs goes on.
    pub(crate) fn load_all(&mut self, strict: bool) -> Result<(), HostError> {
        let old = self.chain.load_full();
        let mut plugins = Vec::new();
        for (config, configured) in self.wanted() {
            let running = old.plugins.iter().find(|plugin| *plugin.name == *config.name);
            match self.load(&config, running) {
                Ok(None) => plugins.extend(running.cloned()),
                Ok(Some(plugin)) => plugins.push(plugin),
                Err(error) if strict && configured => {
                    return Err(HostError::new(format!(
                        "plugin {:?} ({}): {error}",
                        config.name,
                        config.path.display()
                    )));
                }
                Err(error) => {
                    let (plugin, path) = (&config.name, config.path.display());
                    let what = match running {
                        Some(_) => "new build rejected, keeping the running one",
                        None => "plugin not loaded",
                    };
                    warn!(%plugin, %path, %error, "{what}");
                    plugins.extend(running.cloned());
                }
            }
        }
        plugins.sort_by(|a, b| (a.config.order, &a.name).cmp(&(b.config.order, &b.name)));
        self.publish(&old, plugins);
        Ok(())
    }

    fn publish(&mut self, old: &Chain, plugins: Vec<Arc<Generation>>) {
        let is_same = |(a, b): (&Arc<Generation>, &Arc<Generation>)| Arc::ptr_eq(a, b);
        if plugins.len() == old.plugins.len() && plugins.iter().zip(&old.plugins).all(is_same) {
            return;
        }
        let acl = |plugins: &[Arc<Generation>]| -> Vec<*const Generation> {
            plugins.iter().filter(|plugin| plugin.exports.acl.is_some()).map(Arc::as_ptr).collect()
        };
        let acl_number = old.acl_number + u64::from(acl(&plugins) != acl(&old.plugins));
        let chain = Arc::new(Chain { plugins, number: old.number + 1, acl_number });
        self.chain.store(Arc::clone(&chain));
        for generation in &chain.plugins {
            generation.plugin.serving.store(Some(Arc::clone(generation)));
            background::start(&generation.plugin, &self.runtime);
        }
        if let Some(broker) = self.parts.door.get() {
            broker.plugins_changed();
        }
        for gone in old.plugins.iter().filter(|gone| !chain.plugins.iter().any(|plugin| Arc::ptr_eq(plugin, gone))) {
            gone.retire();
            if !chain.plugins.iter().any(|plugin| plugin.name == gone.name) {
                info!(plugin = %gone.name, generation = gone.number, "plugin unloaded, its file is gone");
                gone.plugin.end();
                self.known.remove(&*gone.name);
            }
        }
        self.known.retain(|name, _| {
            chain.plugins.iter().any(|plugin| *plugin.name == **name)
                || self.config.plugins.iter().any(|plugin| plugin.name == *name)
                || self.config.dir.as_ref().is_some_and(|dir| dir.join(format!("{name}.wasm")).exists())
        });
    }

    /// Configured plugins, and files in the folder that no entry names.
    fn wanted(&self) -> Vec<(PluginConfig, bool)> {
        let mut wanted: Vec<(PluginConfig, bool)> =
            self.config.plugins.iter().map(|plugin| (plugin.clone(), true)).collect();
        let entries = self.config.dir.as_deref().and_then(|dir| std::fs::read_dir(dir).ok());
        for entry in entries.into_iter().flatten().flatten() {
            let path = entry.path();
            let Some(name) = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()) else { continue };
            let named =
                self.config.plugins.iter().any(|plugin| plugin.name == name || is_same_file(&plugin.path, &path));
            if path.extension().is_some_and(|extension| extension == "wasm") && !name.starts_with('.') && !named {
                wanted.push((PluginConfig { name, path, order: UNNAMED_ORDER, ..PluginConfig::default() }, false));
            }
        }
        wanted
    }

    /// `None`: nothing has changed since the last time.
    fn load(
        &mut self,
        config: &PluginConfig,
        running: Option<&Arc<Generation>>,
    ) -> Result<Option<Arc<Generation>>, HostError> {
        let source = Source::read(config);
        let bit = self.free_bit();
        let (shards, feed_messages_max) = (self.config.shards, config.limits.feed_messages_max);
        let known = self.known.entry(config.name.clone()).or_insert_with(|| Known {
            builds: 0,
            plugin: Plugin::new(&config.name, bit, shards, feed_messages_max),
            refused: None,
        });
        if running.is_some_and(|running| running.made_from == source.made_from) {
            known.refused = None;
            return Ok(None);
        }
        if known.refused.as_ref() == Some(&source.made_from) {
            return Ok(None);
        }
        let identity = Identity {
            number: known.builds + 1,
            made_from: source.made_from.clone(),
            plugin: Arc::clone(&known.plugin),
        };
        let built = source.bytes.and_then(|bytes| self.build(config, &bytes, identity, running.is_some()));
        if let Some(known) = self.known.get_mut(&config.name) {
            known.builds += u64::from(built.is_ok());
            known.refused = built.is_err().then_some(source.made_from);
        }
        built.map(Some)
    }

    /// For a plugin that is new. Beyond 64 plugins there is none, and storage hooks of theirs are shown nothing.
    fn free_bit(&self) -> u64 {
        let used = self.known.values().fold(0, |used, known| used | known.plugin.bit);
        1_u64.checked_shl(used.trailing_ones()).unwrap_or(0)
    }

    fn build(
        &self,
        config: &PluginConfig,
        bytes: &[u8],
        identity: Identity,
        replaces: bool,
    ) -> Result<Arc<Generation>, HostError> {
        let begun = Instant::now();
        let (component, cached) = self.cache.component(&self.parts.engine, bytes, &cache::digest(bytes))?;
        let compile_ms = begun.elapsed().as_millis() as u64;
        let mounts = Mounts::new(&config.files, &copies(&self.cache))?;
        let generation = Arc::new(Generation::new(&self.parts, &component, config.clone(), identity, mounts)?);
        let _entered = self.runtime.enter();
        self.runtime.block_on(generation.prepare())?;
        let what = if replaces { "plugin replaced" } else { "plugin loaded" };
        info!(plugin = %config.name, generation = generation.number, compile_ms, cached, "{what}");
        Ok(generation)
    }
}

impl Source {
    fn read(config: &PluginConfig) -> Self {
        let bytes = read_component(config);
        let made_from = match &bytes {
            Ok(bytes) => config.files.iter().fold(cache::digest(bytes), |made_from, grant| {
                let file = if grant.host.is_dir() { Ok(Vec::new()) } else { read(&grant.host, FILE_BYTES_MAX) };
                let file = file.map_or_else(|error| error.to_string(), |file| cache::digest(&file));
                format!("{made_from}-{file}")
            }),
            Err(error) => error.to_string(),
        };
        Self { bytes, made_from }
    }
}

fn read_component(config: &PluginConfig) -> Result<Vec<u8>, HostError> {
    let bytes = read(&config.path, COMPONENT_BYTES_MAX)?;
    let digest = cache::digest(&bytes);
    match &config.sha256 {
        Some(pin) if !pin.eq_ignore_ascii_case(&digest) => {
            Err(HostError::new(format!("its SHA-256 is {digest}, but the configuration says sha256 = {pin:?}")))
        }
        _ => Ok(bytes),
    }
}

/// Reads a whole file, or refuses it when it is too large.
pub(crate) fn read(path: &Path, bytes_max: u64) -> Result<Vec<u8>, HostError> {
    let mut bytes = Vec::new();
    let read = std::fs::File::open(path).and_then(|file| file.take(bytes_max + 1).read_to_end(&mut bytes));
    read.map_err(|error| HostError::new(format!("cannot read {}: {error}", path.display())))?;
    if bytes.len() as u64 > bytes_max {
        return Err(HostError::new(format!("{} has more than {bytes_max} bytes", path.display())));
    }
    Ok(bytes)
}

/// Where copies of granted files lie.
fn copies(cache: &Cache) -> PathBuf {
    cache.dir().join("files")
}

/// Twice what may run at a time, since two generations overlap while a plugin is replaced.
fn pool(config: &HostConfig) -> Pool {
    let folder = PluginLimits::default();
    let limits = || config.plugins.iter().map(|plugin| plugin.limits).chain(std::iter::once(folder));
    let per_shard = limits().map(|limits| limits.instances).sum::<usize>() + folder.instances * FOLDER_PLUGINS;
    let instances = (2 * per_shard * config.shards.max(1)).clamp(POOL_INSTANCES_MIN, POOL_INSTANCES_MAX);
    let memory_mib = limits().map(|limits| limits.memory_mib).max().unwrap_or(folder.memory_mib);
    // The address space that a memory reserves ends there.
    let memory_bytes = (memory_mib.min(4095) as usize) << 20;
    Pool { instances: instances as u32, memory_bytes }
}

fn parent(file: &Path) -> Option<PathBuf> {
    let folder = file.parent()?;
    Some(if folder.as_os_str().is_empty() { PathBuf::from(".") } else { folder.to_owned() })
}

fn is_same_file(a: &Path, b: &Path) -> bool {
    a == b || matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}
