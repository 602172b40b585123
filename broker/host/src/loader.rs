//! Loads plugins and replaces what changed, on one thread of its own at low priority. Shards only see a finished chain.
//!
//! What takes long is done elsewhere: components are compiled by child processes, for which threads of their own wait
//! (see [`crate::compiling`]). A file that changed is looked at again when its component is compiled.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use bytes::Bytes;
use tracing::warn;
use wasmqtt_protocol::text::escaped;

use crate::HostError;
use crate::cache::Cache;
use crate::cancel::Cancel;
use crate::chain::{Chain, Link, Trial};
use crate::compiling::{Compiled, Compilers};
use crate::config::{HostConfig, PluginConfig, is_plugin_name};
use crate::deploy::not_handed_over;
use crate::diagnosis;
use crate::engine::{self, Clock};
use crate::generation::{Generation, HandOver, Identity, Loading, Parts, Unready};
use crate::grants::{self, Mounts};
use crate::guest::linker;
use crate::jobs::{Done, Job, compile_all};
use crate::plugin::Plugin;
use crate::pool::{self, PLUGINS_MAX, Room};
use crate::probation::Probation;
use crate::reaper::Reaper;
use crate::services::Door;
use crate::source::{Seen, Source, is_young};
use crate::swap::{Built, place};
use crate::threads::Watched;
use crate::transaction;
use crate::versions::Versions;

/// Order of plugins that merely lie in the folder: the default of those with an entry.
const UNNAMED_ORDER: i32 = 100;
/// How long a file must be gone before its plugin is unloaded: it may be about to be written anew.
const GONE: Duration = Duration::from_secs(1);
/// How long the start waits for a file that is being written.
const STARTING: Duration = Duration::from_secs(5);
/// Bytes of the name of a file in the log.
const NAME_SHOWN_BYTES: usize = 256;
/// How often a running build is asked for what it knows, before its successor begins without that.
const SNAPSHOTS: u32 = 3;

/// What is known about a plugin beyond one build.
pub(crate) struct Known {
    /// Builds that were prepared.
    builds: u64,
    plugin: Arc<Plugin>,
    /// The last build or state of files that was refused: not tried again until something changes.
    refused: Option<String>,
    /// Its files when they were last read.
    seen: Option<Seen>,
    /// A component of it that is being compiled.
    pub(crate) job: Option<Job>,
    /// Its file is not there any more.
    gone_since: Option<Instant>,
    /// Failures of the running build to hand over what it knows to this one.
    snapshots: (String, u32),
}

pub(crate) struct Loader {
    pub(crate) config: HostConfig,
    pub(crate) chain: Arc<ArcSwap<Chain>>,
    pub(crate) parts: Parts,
    pub(crate) compilers: Arc<Compilers>,
    pub(crate) known: HashMap<String, Known>,
    pub(crate) versions: Versions,
    pub(crate) probations: Vec<Probation>,
    /// A file may not be whole yet.
    look_again: bool,
    /// What the log said last about the folder.
    complaint: Option<String>,
    pub(crate) done: Arc<Mutex<Vec<Done>>>,
    /// Has the loader look again.
    pub(crate) nudge: Option<Arc<dyn Fn() + Send + Sync>>,
    pub(crate) stop: Cancel,
    pub(crate) runtime: tokio::runtime::Handle,
    /// For instances; `None`: each is allocated alone.
    pub(crate) room: Option<Room>,
}

/// Why plugins are loaded, and so what it means that one cannot be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Occasion {
    /// The broker starts: without one of them, clients might be allowed what it would have denied.
    Start,
    /// There are other settings: plugins with an entry serve as it says, or nothing changes.
    Settings,
    /// Files may have changed: what runs goes on.
    Files,
}

/// What a plugin's files are good for.
enum Found {
    /// As it is.
    Link(Option<Link>),
    Built(Built),
    /// Not yet; until then as it is.
    Pending(Option<Link>),
}

impl Loader {
    pub(crate) fn new(
        config: HostConfig,
        chain: Arc<ArcSwap<Chain>>,
        door: Door,
        stop: Cancel,
        runtime: tokio::runtime::Handle,
    ) -> Result<(Self, Reaper), HostError> {
        let cache = Cache::open(&config.cache_dir, config.cache_key.as_deref())?;
        grants::clean(&copies(&cache));
        transaction::recover(&journal(&cache));
        let in_folder = names_in(config.dir.as_deref())?.len();
        let pool = pool::pool(&config, in_folder);
        if pool.is_none() {
            let shards = config.shards;
            warn!(shards, "limits.instances of all plugins, on all shards, are too many for a pool of instances");
        }
        let room = pool.map(|pool| Room::new(&config, pool));
        let engine = engine::engine(pool)?;
        let linker = linker(&engine)?;
        let watched = |name| Watched::new(name, config.thread_died.as_ref());
        let clock = Clock::start(engine.clone(), watched("plugin-clock"))?;
        let (dead, reaper) = Reaper::start(runtime.clone(), Arc::clone(&clock), watched("plugin-reaper"))?;
        let versions = Versions::new(cache.dir().join("versions"));
        let (limits, at_once) = (config.compile_limits, config.compile_at_once);
        let compilers = Compilers::new(cache, engine.clone(), config.compiler.clone(), limits, at_once, stop.clone());
        let parts = Parts { engine, linker, clock, reaper: dead, shards: config.shards, door };
        let loader = Self {
            config,
            chain,
            parts,
            compilers: Arc::new(compilers),
            known: HashMap::new(),
            versions,
            probations: Vec::new(),
            look_again: false,
            complaint: None,
            done: Arc::default(),
            nudge: None,
            stop,
            runtime,
            room,
        };
        Ok((loader, reaper))
    }

    /// Where earlier versions are.
    pub(crate) fn versions(&self) -> Versions {
        self.versions.clone()
    }

    /// What says, while files are written, which ones.
    pub(crate) fn journal(&self) -> PathBuf {
        journal(&self.compilers.cache)
    }

    pub(crate) fn compilers(&self) -> Arc<Compilers> {
        Arc::clone(&self.compilers)
    }

    /// What has the thread of the loader call [`Self::load_all`].
    pub(crate) fn set_nudge(&mut self, nudge: impl Fn() + Send + Sync + 'static) {
        self.nudge = Some(Arc::new(nudge));
    }

    /// Folders in which something lies that a plugin is made from, also those where links lead to.
    pub(crate) fn folders(&self) -> Vec<PathBuf> {
        let mut folders: Vec<PathBuf> = self.config.dir.clone().into_iter().collect();
        for plugin in &self.config.plugins {
            let files = plugin.files.iter().map(|grant| &grant.host).filter(|host| !host.is_dir());
            for file in std::iter::once(&plugin.path).chain(files) {
                let named = parent(file);
                let real = file.canonicalize().ok().as_deref().and_then(parent);
                // One folder is not watched by two names.
                let is_other = real.as_ref() != named.as_ref().and_then(|named| named.canonicalize().ok()).as_ref();
                folders.extend(named.into_iter().chain(real.filter(|_| is_other)));
            }
        }
        folders.sort();
        folders.dedup();
        folders
    }

    /// Brings the chain in line with files and settings. `compiled`: components that it may need.
    pub(crate) fn load_all(&mut self, occasion: Occasion, compiled: Vec<Done>) -> Result<(), HostError> {
        self.look_again = false;
        let wanted = match self.wanted(occasion) {
            Ok(wanted) => wanted,
            Err(error) if occasion != Occasion::Files => return Err(error),
            Err(error) => {
                self.complain(Some(format!("{error}; what was loaded from it goes on")));
                return Ok(());
            }
        };
        let old = self.chain.load_full();
        let mut done = self.take_done();
        done.extend(compiled);
        if occasion == Occasion::Start {
            done.extend(compile_all(&self.compilers, &old, &wanted, &self.stop));
        }
        let (mut links, mut built) = (Vec::new(), Vec::new());
        for config in &wanted {
            let running = old.link(&config.name);
            let must = self.must_serve(&config.name, occasion);
            match self.find(config, running, &mut done, must) {
                Ok(Found::Link(link)) => {
                    self.end_job(&config.name);
                    links.extend(link);
                }
                Ok(Found::Pending(link)) => links.extend(link),
                Ok(Found::Built(new)) => {
                    self.end_job(&config.name);
                    links.push(place(&new, running));
                    built.push(new);
                }
                Err(error) if must => {
                    let (name, path) = (&config.name, config.path.display());
                    return Err(HostError::new(format!("plugin {name:?} ({path}): {error}")));
                }
                Err(error) => {
                    self.end_job(&config.name);
                    self.reject(config, running, &error);
                    links.extend(running.cloned());
                }
            }
        }
        if occasion == Occasion::Files {
            links.extend(self.going(&wanted, &old));
        }
        self.publish(links, built);
        Ok(())
    }

    /// If it cannot, that is an error; otherwise a warning, and what runs goes on.
    fn must_serve(&self, name: &str, occasion: Occasion) -> bool {
        match occasion {
            Occasion::Start => true,
            Occasion::Settings => self.config.plugins.iter().any(|plugin| plugin.name == name),
            Occasion::Files => false,
        }
    }

    /// Says that what is there does not serve, unless it may not be whole yet.
    fn reject(&mut self, config: &PluginConfig, running: Option<&Link>, error: &HostError) {
        if is_young(&config.path) {
            // Perhaps it is still being written.
            self.look_again = true;
            self.forgive(&config.name);
            return;
        }
        let (plugin, path) = (&config.name, config.path.display());
        let what = match running {
            Some(_) => "new build rejected, keeping the running one",
            None => "plugin not loaded",
        };
        warn!(%plugin, %path, %error, "{what}");
    }

    /// Plugins of the folder whose files are not there any more, for a while.
    fn going(&mut self, wanted: &[PluginConfig], old: &Chain) -> Vec<Link> {
        let is_wanted = |name: &str| wanted.iter().any(|config| config.name == name);
        let mut going = Vec::new();
        for link in old.links.iter().filter(|link| !is_wanted(&link.serving.name)) {
            let Some(known) = self.known.get_mut(&*link.serving.name) else { continue };
            if known.gone_since.get_or_insert_with(Instant::now).elapsed() < GONE {
                self.look_again = true;
                going.push(link.clone());
            }
        }
        for config in wanted {
            if let Some(known) = self.known.get_mut(&config.name) {
                known.gone_since = None;
            }
        }
        going
    }

    /// Something to say about the folder, once; `None`: all is well with it.
    fn complain(&mut self, complaint: Option<String>) {
        if let Some(complaint) = complaint.as_ref().filter(|complaint| self.complaint.as_ref() != Some(complaint)) {
            warn!("{complaint}");
        }
        self.complaint = complaint;
    }

    /// This state of files is not tried again.
    pub(crate) fn refuse(&mut self, name: &str, made_from: &str) {
        if let Some(known) = self.known.get_mut(name) {
            known.refused = Some(made_from.to_owned());
        }
    }

    /// What was refused is tried again.
    pub(crate) fn forgive(&mut self, name: &str) {
        if let Some(known) = self.known.get_mut(name) {
            known.refused = None;
        }
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

    /// What is known of plugins that are not there, but for messages that wait for them.
    pub(crate) fn forget(&mut self) {
        let chain = self.chain.load();
        self.known.retain(|name, known| {
            chain.link(name).is_some()
                || !known.plugin.feed.is_empty()
                || self.config.plugins.iter().any(|plugin| plugin.name == *name)
                || self.config.dir.as_ref().is_some_and(|dir| dir.join(format!("{name}.wasm")).exists())
        });
    }

    /// Configured plugins, and files in the folder that no entry names. There can be no more than [`PLUGINS_MAX`]: more
    /// are an error if they must serve; later those that run go first.
    pub(crate) fn wanted(&mut self, occasion: Occasion) -> Result<Vec<PluginConfig>, HostError> {
        let mut wanted = self.config.plugins.clone();
        let taken: Vec<PathBuf> = wanted.iter().filter_map(|plugin| plugin.path.canonicalize().ok()).collect();
        let mut unnamed = names_in(self.config.dir.as_deref())?;
        unnamed.retain(|found| {
            !wanted.iter().any(|plugin| plugin.name == found.name || plugin.path == found.path)
                && !found.path.canonicalize().is_ok_and(|path| taken.contains(&path))
        });
        // What such a name is put into, it may break: topics for instance.
        let wrong: Vec<String> = unnamed
            .extract_if(.., |found| !is_plugin_name(&found.name))
            .map(|found| format!("{:?}", escaped(&found.name, NAME_SHOWN_BYTES)))
            .collect();
        let misnamed = (!wrong.is_empty()).then(|| {
            let wrong = wrong.join(", ");
            format!("not loaded from the plugin folder: {wrong}; a name must be 1 to 64 letters, digits, `-` or `_`")
        });
        let chain = self.chain.load_full();
        unnamed.sort_by_key(|found| (chain.link(&found.name).is_none(), found.name.clone()));
        wanted.append(&mut unnamed);
        let complaint = wanted.get(PLUGINS_MAX).map(|first| {
            let (count, name) = (wanted.len(), &first.name);
            format!(
                "{count} plugins, and there can be {PLUGINS_MAX}: {name:?} and those after it by name are not loaded"
            )
        });
        let must = wanted.get(PLUGINS_MAX).is_some_and(|first| self.must_serve(&first.name, occasion));
        if must && let Some(complaint) = &complaint {
            return Err(HostError::new(complaint));
        }
        if occasion == Occasion::Start
            && let Some(misnamed) = &misnamed
        {
            return Err(HostError::new(misnamed));
        }
        self.complain(complaint.or(misnamed));
        wanted.truncate(PLUGINS_MAX);
        Ok(wanted)
    }

    /// What is known about a plugin; `Ok(None)`: a build has to be made. Also makes room for a plugin that is new.
    pub(crate) fn known_as(
        &mut self,
        config: &PluginConfig,
        made_from: &str,
        running: Option<&Link>,
    ) -> Result<Option<Link>, HostError> {
        if !self.known.contains_key(&config.name) {
            let bit = self.free_bit().ok_or_else(|| {
                HostError::new(format!("there are {PLUGINS_MAX} plugins already, and there can be no more"))
            })?;
            let (shards, buckets) = (self.config.shards, self.config.buckets.as_ref());
            let known = Known {
                builds: 0,
                plugin: Plugin::new(&config.name, bit, shards, &config.limits, buckets)?,
                refused: None,
                seen: None,
                job: None,
                gone_since: None,
                snapshots: (String::new(), 0),
            };
            self.known.insert(config.name.clone(), known);
        }
        let Some(link) = running else { return Ok(None) };
        if link.serving.made_from == made_from {
            self.forgive(&config.name);
            return Ok(Some(Link { serving: Arc::clone(&link.serving), candidate: None }));
        }
        let is_tried = link.candidate.as_ref().is_some_and(|tried| tried.generation.made_from == made_from);
        Ok(is_tried.then(|| link.clone()))
    }

    /// What a plugin's files are good for now.
    fn find(
        &mut self,
        config: &PluginConfig,
        running: Option<&Link>,
        done: &mut Vec<Done>,
        must: bool,
    ) -> Result<Found, HostError> {
        let begun = Instant::now();
        loop {
            match self.try_find(config, running, done, must) {
                // Perhaps it is still being written: then it should not end the start.
                Err(_) if must && is_young(&config.path) && begun.elapsed() < STARTING => {
                    self.forgive(&config.name);
                    std::thread::sleep(Duration::from_millis(100));
                }
                found => return found,
            }
        }
    }

    fn try_find(
        &mut self,
        config: &PluginConfig,
        running: Option<&Link>,
        done: &mut Vec<Done>,
        must: bool,
    ) -> Result<Found, HostError> {
        let mut seen = self.known.get_mut(&config.name).and_then(|known| known.seen.take());
        let mut source = Source::look(config, &mut seen);
        let link = self.known_as(config, &source.made_from, running)?;
        let Some(known) = self.known.get_mut(&config.name) else { return Ok(Found::Link(running.cloned())) };
        known.seen = seen;
        if link.is_some() {
            return Ok(Found::Link(link));
        }
        let is_as_wanted =
            || running.is_some_and(|running| running.serving.config.fingerprint() == config.fingerprint());
        if known.refused.as_ref() == Some(&source.made_from) && (!must || is_as_wanted()) {
            return Ok(Found::Link(running.cloned()));
        }
        if known.job.as_ref().is_some_and(|job| job.made_from == source.made_from)
            && !done.iter().any(|done| done.name == config.name)
        {
            return Ok(Found::Pending(running.cloned()));
        }
        if source.bytes.is_none() {
            source = Source::read(config);
        }
        let Source { bytes, digest, made_from } = source;
        let result = match bytes {
            None => return Ok(Found::Link(running.cloned())),
            Some(Err(error)) => Err(Unready::Failed(error)),
            Some(Ok(bytes)) => match self.compiled(config, &bytes, (&digest, &made_from), done, must) {
                None => return Ok(Found::Pending(running.cloned())),
                Some(Err(error)) => {
                    let memory_mib = config.limits.memory_mib;
                    Err(Unready::Failed(diagnosis::memory(&error.to_string(), memory_mib).unwrap_or(error)))
                }
                Some(Ok(compiled)) => {
                    let hand_over = self.hand_over(&config.name, &made_from);
                    let stop = self.stop.clone();
                    let identity = (digest, made_from.clone());
                    self.build(config, bytes, identity, running, compiled, hand_over, &stop)
                }
            },
        };
        match result {
            Ok(built) => Ok(Found::Built(built)),
            Err(Unready::Snapshot(error)) => {
                self.note_snapshot(&config.name, made_from, &error);
                if must { Err(not_handed_over(&error)) } else { Ok(Found::Link(running.cloned())) }
            }
            Err(Unready::Failed(error)) => {
                // Whoever gave an order is told, and may give it again.
                if !must {
                    self.refuse(&config.name, &made_from);
                }
                Err(error)
            }
        }
    }

    /// The running build is asked for what it knows a few times, and not for ever.
    fn hand_over(&self, name: &str, made_from: &str) -> HandOver {
        match self.known.get(name).map(|known| &known.snapshots) {
            Some((of, failures)) if of == made_from && *failures >= SNAPSHOTS => HandOver::Fresh,
            _ => HandOver::Wanted,
        }
    }

    fn note_snapshot(&mut self, name: &str, made_from: String, error: &HostError) {
        let Some(known) = self.known.get_mut(name) else { return };
        let failures = if known.snapshots.0 == made_from { known.snapshots.1 + 1 } else { 1 };
        known.snapshots = (made_from, failures);
        let next = if failures < SNAPSHOTS { "it is asked again" } else { "the new build begins without that" };
        warn!(plugin = name, %error, failures, next, "new build waits: the running one does not hand over what it knows");
    }

    /// For a plugin that is new. If there is none, those go that are not there: what waits for them is in the store, and
    /// they are shown it after a restart.
    fn free_bit(&mut self) -> Option<u64> {
        for is_last_try in [false, true] {
            let used = self.known.values().fold(0, |used, known| used | known.plugin.bit);
            let bit = 1_u64.checked_shl(used.trailing_ones());
            if bit.is_some() || is_last_try {
                return bit;
            }
            self.known.retain(|_, known| !known.plugin.is_gone());
        }
        None
    }

    /// Makes a build and prepares it. Nothing of the loader, and nothing that serves, is another by then.
    #[allow(clippy::too_many_arguments, reason = "a build is made of this much")]
    pub(crate) fn build(
        &mut self,
        config: &PluginConfig,
        bytes: Bytes,
        (digest, made_from): (String, String),
        running: Option<&Link>,
        compiled: Compiled,
        hand_over: HandOver,
        cancel: &Cancel,
    ) -> Result<Built, Unready> {
        let begun = Instant::now();
        let Some(known) = self.known.get_mut(&config.name) else {
            return Err(HostError::new("nothing is known about it").into());
        };
        let identity = Identity { number: known.builds + 1, made_from, plugin: Arc::clone(&known.plugin) };
        let Compiled { component, cached, compile_ms } = compiled;
        let mounts = Mounts::new(&config.files, &copies(&self.compilers.cache))?;
        let generation = Generation::new(&self.parts, &component, config.clone(), identity, mounts, &digest)?;
        let generation = Arc::new(generation);
        let old = running.map(|link| &link.serving);
        let stop = &self.stop;
        let _entered = self.runtime.enter();
        self.runtime.block_on(async {
            tokio::select! {
                biased;
                () = stop.cancelled() => Err(HostError::new("the broker is stopping").into()),
                () = cancel.cancelled() => Err(HostError::new("it was cancelled").into()),
                prepared = generation.prepare(old.map(|old| &**old), hand_over) => prepared,
            }
        })?;
        known.builds += 1;
        let what = match (running, config.trial()) {
            (None, _) => "plugin loaded",
            (Some(_), None) => "plugin replaced",
            (Some(_), Some(Trial::Canary(_))) => "plugin on trial as a canary",
            (Some(_), Some(Trial::Shadow)) => "plugin on trial as a shadow",
        };
        let load_ms = compile_ms + begun.elapsed().as_millis() as u64;
        generation.set_loading(Loading { what, load_ms, compile_ms, cached });
        Ok(Built { generation, old: old.cloned(), bytes: Some(bytes) })
    }
}

/// Plugins that merely lie in the folder, by name.
fn names_in(dir: Option<&Path>) -> Result<Vec<PluginConfig>, HostError> {
    let Some(dir) = dir else { return Ok(Vec::new()) };
    let failed = |error| HostError::new(format!("cannot read the plugin folder {}: {error}", dir.display()));
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(failed)? {
        found.extend(unnamed(&entry.map_err(failed)?.path()));
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

/// A plugin that merely lies in the folder; `None`: this file is none.
pub(crate) fn unnamed(path: &Path) -> Option<PluginConfig> {
    let name = path.file_stem()?.to_string_lossy().into_owned();
    let is_one = path.extension().is_some_and(|extension| extension == "wasm") && !name.starts_with('.');
    is_one.then(|| PluginConfig { name, path: path.to_owned(), order: UNNAMED_ORDER, ..PluginConfig::default() })
}

/// Where copies of granted files lie.
fn copies(cache: &Cache) -> PathBuf {
    cache.dir().join("files")
}

fn journal(cache: &Cache) -> PathBuf {
    cache.dir().join("deploying")
}

fn parent(file: &Path) -> Option<PathBuf> {
    let folder = file.parent()?;
    Some(if folder.as_os_str().is_empty() { PathBuf::from(".") } else { folder.to_owned() })
}
