//! Loads plugins and replaces what changed, on one thread of its own at low priority. Shards only see a finished chain.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use tracing::{debug, info, warn};

use crate::HostError;
use crate::background;
use crate::cache::{self, Cache};
use crate::chain::{Candidate, Chain, Link, Trial};
use crate::config::{HostConfig, PluginConfig, PluginLimits, Rollout};
use crate::diagnosis;
use crate::engine::{self, Clock, Pool};
use crate::generation::{Generation, Identity, Loading, Parts};
use crate::grants::{self, FILE_BYTES_MAX, Mounts};
use crate::guest::linker;
use crate::plugin::Plugin;
use crate::probation::{Judgement, Probation};
use crate::reaper::Reaper;
use crate::services::Door;
use crate::versions::Versions;

/// Bytes a component file may have.
pub(crate) const COMPONENT_BYTES_MAX: u64 = 64 << 20;
/// Order of plugins that merely lie in the folder: the default of those with an entry.
const UNNAMED_ORDER: i32 = 100;
/// Instances the pool has room for: at least so many, at most so many.
const POOL_INSTANCES_MIN: usize = 64;
const POOL_INSTANCES_MAX: usize = 1000;
/// Plugins from the folder that the pool has room for, beside configured ones.
const FOLDER_PLUGINS: usize = 4;

/// A file that was changed so short a time ago may still be written to.
const WRITING: Duration = Duration::from_millis(300);

/// What is known about a plugin beyond one build.
struct Known {
    /// Builds that have served.
    builds: u64,
    plugin: Arc<Plugin>,
    /// The last build or state of files that was refused: not tried again until something changes.
    refused: Option<String>,
}

pub(crate) struct Loader {
    pub(crate) config: HostConfig,
    chain: Arc<ArcSwap<Chain>>,
    parts: Parts,
    cache: Cache,
    known: HashMap<String, Known>,
    versions: Versions,
    probations: Vec<Probation>,
    /// A file may not be whole yet.
    look_again: bool,
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
    ) -> Result<(Self, Reaper), HostError> {
        let cache = Cache::open(&config.cache_dir)?;
        grants::clean(&copies(&cache));
        let engine = engine::engine(Some(pool(&config)))?;
        let linker = linker(&engine)?;
        let clock = Clock::start(engine.clone())?;
        let (dead, reaper) = Reaper::start(runtime.clone(), Arc::clone(&clock))?;
        let parts = Parts { engine, linker, clock, reaper: dead, shards: config.shards, door };
        let versions = Versions::new(cache.dir().join("versions"));
        let loader = Self {
            config,
            chain,
            parts,
            cache,
            known: HashMap::new(),
            versions,
            probations: Vec::new(),
            look_again: false,
            runtime,
        };
        Ok((loader, reaper))
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
        self.look_again = false;
        let old = self.chain.load_full();
        let mut links = Vec::new();
        for (config, configured) in self.wanted() {
            let running = old.link(&config.name);
            let source = Source::read(&config);
            match self.load(&config, source, running) {
                Ok(link) => links.extend(link),
                Err(error) if strict && configured => {
                    return Err(HostError::new(format!(
                        "plugin {:?} ({}): {error}",
                        config.name,
                        config.path.display()
                    )));
                }
                Err(error) => {
                    if is_young(&config.path) {
                        // Perhaps it is still being written.
                        self.look_again = true;
                        self.forgive(&config.name);
                    } else {
                        let (plugin, path) = (&config.name, config.path.display());
                        let what = match running {
                            Some(_) => "new build rejected, keeping the running one",
                            None => "plugin not loaded",
                        };
                        warn!(%plugin, %path, %error, "{what}");
                    }
                    links.extend(running.cloned());
                }
            }
        }
        self.publish(links);
        Ok(())
    }

    /// Builds all of them and lets them serve in one step, and keeps them in the files of the plugins; or none.
    pub(crate) fn deploy(&mut self, files: Vec<(String, Vec<u8>)>) -> Result<(), HostError> {
        self.put(files, None)
    }

    /// `rollout`: instead of that in the configuration.
    fn put(&mut self, files: Vec<(String, Vec<u8>)>, rollout: Option<Rollout>) -> Result<(), HostError> {
        let old = self.chain.load_full();
        let mut links = old.links.clone();
        let mut written = Vec::new();
        for (name, bytes) in files {
            let known = self.wanted().into_iter().map(|(config, _)| config).find(|config| config.name == name);
            let mut config = match (known, &self.config.dir) {
                (Some(config), _) => config,
                (None, Some(dir)) => unnamed(&dir.join(format!("{name}.wasm")))
                    .ok_or_else(|| HostError::new(format!("{name:?} is no name for a plugin")))?,
                (None, None) => {
                    return Err(HostError::new(format!("there is no plugin {name:?} and no plugin folder")));
                }
            };
            config.rollout = rollout.unwrap_or(config.rollout);
            let source = Source::of(&config, Ok(bytes.clone()));
            self.forgive(&name);
            let link = self.load(&config, source, old.link(&name));
            let link =
                link.map_err(|error| HostError::new(format!("plugin {name:?}: {error}; nothing was changed")))?;
            links.retain(|link| *link.serving.name != *name);
            links.extend(link);
            written.push((config.path, bytes));
        }
        for (path, bytes) in written {
            write_whole(&path, &bytes)?;
        }
        self.publish(links);
        Ok(())
    }

    /// Lets an earlier version serve again, everybody and at once: the one before, or the one whose digest begins so.
    pub(crate) fn roll_back(&mut self, name: &str, digest: Option<&str>) -> Result<(), HostError> {
        let chain = self.chain.load_full();
        let link = chain.link(name).ok_or_else(|| HostError::new(format!("there is no plugin {name:?}")))?;
        if digest.is_none() && link.candidate.is_some() {
            self.drop_candidate(name, "rolled back by an operator");
            return Ok(());
        }
        let version = self.versions.find(name, &link.serving.digest, digest)?;
        self.put(vec![(name.to_owned(), version)], Some(Rollout::AtOnce))
    }

    /// Ends a trial: the build on trial serves everybody.
    pub(crate) fn promote(&mut self, name: &str) -> Result<(), HostError> {
        let chain = self.chain.load_full();
        let Some(Link { candidate: Some(candidate), .. }) = chain.link(name) else {
            return Err(HostError::new(format!("no build of {name:?} is on trial")));
        };
        let generation = Arc::clone(&candidate.generation);
        let links = chain.links.iter().map(|link| {
            if link.serving.name != generation.name {
                return link.clone();
            }
            self.probations.push(Probation::new(&link.serving, &generation));
            Link { serving: Arc::clone(&generation), candidate: None }
        });
        let links = links.collect();
        info!(plugin = name, generation = generation.number, "plugin promoted");
        self.publish(links);
        Ok(())
    }

    /// The build on trial goes, and is not tried again until its file changes.
    fn drop_candidate(&mut self, name: &str, why: &str) {
        let chain = self.chain.load_full();
        let Some(Link { candidate: Some(candidate), .. }) = chain.link(name) else { return };
        warn!(plugin = name, generation = candidate.generation.number, why, "plugin on trial dropped");
        self.refuse(name, &candidate.generation.made_from);
        let without = |link: &Link| match &*link.serving.name {
            found if found == name => Link { candidate: None, ..link.clone() },
            _ => link.clone(),
        };
        self.publish(chain.links.iter().map(without).collect());
    }

    /// Looks after builds that serve since a short time: those that fail more than their predecessors go.
    pub(crate) fn check_probations(&mut self) {
        for probation in std::mem::take(&mut self.probations) {
            match probation.judge() {
                Judgement::TooEarly => self.probations.push(probation),
                Judgement::Fails => self.undo(&probation),
                Judgement::Passed => {
                    debug!(plugin = %probation.new.name, generation = probation.new.number, "probation passed");
                    probation.old.retire();
                }
            }
        }
        for link in &self.chain.load_full().links {
            let Some(Candidate { generation, trial }) = &link.candidate else { continue };
            let name = link.serving.name.to_string();
            if Probation::fails_more(&link.serving, generation) {
                self.drop_candidate(&name, "it fails more than the serving build");
            } else if matches!(trial, Trial::Canary(_)) && generation.born.elapsed() >= generation.config.canary_time()
            {
                let _ = self.promote(&name);
            }
        }
    }

    /// Where earlier versions are.
    pub(crate) fn versions(&self) -> Versions {
        self.versions.clone()
    }

    /// Something has to be looked after soon.
    pub(crate) fn is_restless(&self) -> bool {
        self.look_again
            || !self.probations.is_empty()
            || self.chain.load().links.iter().any(|link| link.candidate.is_some())
    }

    pub(crate) fn looks_again(&self) -> bool {
        self.look_again
    }

    /// Back to the predecessor.
    fn undo(&mut self, probation: &Probation) {
        let Probation { old, new, .. } = probation;
        let chain = self.chain.load_full();
        if !chain.link(&new.name).is_some_and(|link| Arc::ptr_eq(&link.serving, new)) {
            return;
        }
        let (plugin, failures) = (&new.name, new.failures.load(Ordering::Relaxed));
        warn!(%plugin, generation = new.number, failures, back_to = old.number, "plugin rolled back, it keeps failing");
        new.plugin.counters.rolled_back.fetch_add(1, Ordering::Relaxed);
        self.refuse(plugin, &new.made_from);
        let back = |link: &Link| {
            if Arc::ptr_eq(&link.serving, new) {
                Link { serving: Arc::clone(old), candidate: None }
            } else {
                link.clone()
            }
        };
        self.publish(chain.links.iter().map(back).collect());
    }

    fn publish(&mut self, mut links: Vec<Link>) {
        links.sort_by(|a, b| (a.serving.config.order, &a.serving.name).cmp(&(b.serving.config.order, &b.serving.name)));
        let old = self.chain.load_full();
        if old.is_like(&links) {
            return;
        }
        let begun = Instant::now();
        let mut chain = Chain { links, number: old.number + 1, acl_number: old.acl_number };
        chain.acl_number += u64::from(chain.acl() != old.acl());
        let chain = Arc::new(chain);
        self.chain.store(Arc::clone(&chain));
        if let Some(broker) = self.parts.door.get() {
            broker.plugins_changed();
        }
        let swap_us = begun.elapsed().as_micros() as u64;
        debug!(chain = chain.number, swap_us, "plugins swapped");
        chain.generations().for_each(|generation| generation.announce());
        for generation in chain.serving() {
            generation.plugin.serving.store(Some(Arc::clone(generation)));
            background::start(&generation.plugin, &self.runtime);
        }
        self.let_go(&old, &chain);
    }

    /// Builds that serve no more are retired, but those that one on probation may have to go back to.
    fn let_go(&mut self, old: &Chain, chain: &Chain) {
        let serves = |generation: &Arc<Generation>| chain.generations().any(|other| Arc::ptr_eq(other, generation));
        // One that is on probation itself, and was replaced, protects nobody.
        let (kept, over) =
            std::mem::take(&mut self.probations).into_iter().partition(|one: &Probation| serves(&one.new));
        self.probations = kept;
        let freed = over.iter().map(|probation: &Probation| &probation.old);
        for gone in old.generations().chain(freed).filter(|gone| !serves(gone)) {
            if !self.probations.iter().any(|probation| Arc::ptr_eq(&probation.old, gone)) {
                gone.retire();
            }
            if chain.link(&gone.name).is_none() && !gone.plugin.is_gone() {
                info!(plugin = %gone.name, generation = gone.number, "plugin unloaded, its file is gone");
                gone.plugin.end();
                self.known.remove(&*gone.name);
            }
        }
        self.known.retain(|name, _| {
            chain.link(name).is_some()
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
            let Some(config) = unnamed(&path) else { continue };
            let same = |plugin: &PluginConfig| plugin.name == config.name || is_same_file(&plugin.path, &path);
            if !self.config.plugins.iter().any(same) {
                wanted.push((config, false));
            }
        }
        wanted
    }

    /// The plugin's place in the next chain; `None`: nothing of it serves.
    fn load(
        &mut self,
        config: &PluginConfig,
        source: Source,
        running: Option<&Link>,
    ) -> Result<Option<Link>, HostError> {
        let bit = self.free_bit();
        let shards = self.config.shards;
        let known = match self.known.entry(config.name.clone()) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(place) => {
                let buckets = self.config.buckets.as_ref();
                let plugin = Plugin::new(&config.name, bit, shards, &config.limits, buckets)?;
                place.insert(Known { builds: 0, plugin, refused: None })
            }
        };
        if let Some(link) = running {
            if link.serving.made_from == source.made_from {
                known.refused = None;
                return Ok(Some(Link { serving: Arc::clone(&link.serving), candidate: None }));
            }
            if link.candidate.as_ref().is_some_and(|tried| tried.generation.made_from == source.made_from) {
                return Ok(running.cloned());
            }
        }
        if known.refused.as_ref() == Some(&source.made_from) {
            return Ok(running.cloned());
        }
        let identity = Identity {
            number: known.builds + 1,
            made_from: source.made_from.clone(),
            plugin: Arc::clone(&known.plugin),
        };
        let built = source.bytes.and_then(|bytes| self.build(config, &bytes, identity, running));
        if let Some(known) = self.known.get_mut(&config.name) {
            known.builds += u64::from(built.is_ok());
            known.refused = built.is_err().then_some(source.made_from);
        }
        let new = built?;
        let Some(link) = running else { return Ok(Some(Link { serving: new, candidate: None })) };
        if let Some(trial) = config.trial() {
            let candidate = Some(Candidate { generation: new, trial });
            return Ok(Some(Link { serving: Arc::clone(&link.serving), candidate }));
        }
        self.probations.push(Probation::new(&link.serving, &new));
        Ok(Some(Link { serving: new, candidate: None }))
    }

    /// This state of files is not tried again.
    fn refuse(&mut self, name: &str, made_from: &str) {
        if let Some(known) = self.known.get_mut(name) {
            known.refused = Some(made_from.to_owned());
        }
    }

    /// What was refused is tried again.
    fn forgive(&mut self, name: &str) {
        if let Some(known) = self.known.get_mut(name) {
            known.refused = None;
        }
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
        running: Option<&Link>,
    ) -> Result<Arc<Generation>, HostError> {
        let begun = Instant::now();
        let digest = cache::digest(bytes);
        diagnosis::check_header(bytes)?;
        let component = self.cache.component(&self.parts.engine, bytes, &digest);
        let memory_mib = config.limits.memory_mib;
        let too_large = |error: HostError| diagnosis::memory(&error.to_string(), memory_mib).unwrap_or(error);
        let (component, cached) = component.map_err(too_large)?;
        let compile_ms = begun.elapsed().as_millis() as u64;
        let mounts = Mounts::new(&config.files, &copies(&self.cache))?;
        let generation = Generation::new(&self.parts, &component, config.clone(), identity, mounts, &digest)?;
        let generation = Arc::new(generation);
        let _entered = self.runtime.enter();
        self.runtime.block_on(generation.prepare(running.map(|link| &*link.serving)))?;
        self.versions.keep(&config.name, &digest, bytes);
        let what = match (running, config.trial()) {
            (None, _) => "plugin loaded",
            (Some(_), None) => "plugin replaced",
            (Some(_), Some(Trial::Canary(_))) => "plugin on trial as a canary",
            (Some(_), Some(Trial::Shadow)) => "plugin on trial as a shadow",
        };
        let load_ms = begun.elapsed().as_millis() as u64;
        generation.set_loading(Loading { what, load_ms, compile_ms, cached });
        Ok(generation)
    }
}

impl Source {
    fn read(config: &PluginConfig) -> Self {
        Self::of(config, read(&config.path, COMPONENT_BYTES_MAX))
    }

    fn of(config: &PluginConfig, bytes: Result<Vec<u8>, HostError>) -> Self {
        let bytes = bytes.and_then(|bytes| pinned(config, bytes));
        let made_from = match &bytes {
            Ok(bytes) => config.files.iter().fold(build_of(config, bytes), |made_from, grant| {
                let file = if grant.host.is_dir() { Ok(Vec::new()) } else { read(&grant.host, FILE_BYTES_MAX) };
                let file = file.map_or_else(|error| error.to_string(), |file| cache::digest(&file));
                format!("{made_from}-{file}")
            }),
            Err(error) => error.to_string(),
        };
        Self { bytes, made_from }
    }
}

/// Another component, or other settings, is another build.
fn build_of(config: &PluginConfig, bytes: &[u8]) -> String {
    format!("{}-{}", cache::digest(bytes), config.fingerprint())
}

fn pinned(config: &PluginConfig, bytes: Vec<u8>) -> Result<Vec<u8>, HostError> {
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

/// A plugin that merely lies in the folder; `None`: this file is none.
fn unnamed(path: &Path) -> Option<PluginConfig> {
    let name = path.file_stem()?.to_string_lossy().into_owned();
    let is_one = path.extension().is_some_and(|extension| extension == "wasm") && !name.starts_with('.');
    is_one.then(|| PluginConfig { name, path: path.to_owned(), order: UNNAMED_ORDER, ..PluginConfig::default() })
}

/// It was changed just now.
fn is_young(path: &Path) -> bool {
    let changed = std::fs::metadata(path).and_then(|file| file.modified());
    changed.is_ok_and(|at| at.elapsed().is_ok_and(|age| age < WRITING))
}

/// Under its name it is there as a whole or not at all.
fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), HostError> {
    wasmqtt_files::write_whole(path, bytes, 0o644)
        .map_err(|error| HostError::new(format!("cannot write {}: {error}", path.display())))
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
