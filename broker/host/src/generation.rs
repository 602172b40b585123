//! A loaded build of a plugin: compiled, checked, ready to be instantiated on any shard.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tracing::{error, info};
use wasmtime::Engine;
use wasmtime::component::{Component, InstancePre, Linker};
use wasmtime_wasi::WasiCtxBuilder;

use crate::bindings::failure;
use crate::bindings::handover::exports::wasmqtt::plugin::handover::State;
use crate::bindings::types::Pair;
use crate::call::ANSWER_BYTES_MAX;
use crate::config::PluginConfig;
use crate::diagnosis;
use crate::engine::Clock;
use crate::exports::Indices;
use crate::grants::{self, Mounts};
use crate::guest::{Guest, Limits};
use crate::hook::Shown;
use crate::http::PLUGIN_REQUESTS_MAX;
use crate::instance::{Alive, Budget, Pooled, Running, metered, one_line};
use crate::plugin::Plugin;
use crate::pool;
use crate::reaper::Grave;
use crate::registration::Registration;
use crate::services::{Door, Services};
use crate::share::Share;
use crate::{HostError, Inspection, Status};

/// Bytes one instance may hand over.
const STATE_BYTES_MAX: usize = 16 << 20;
/// Instances per shard that are kept when they have nothing to do, and how long others are.
const IDLE_KEPT: usize = 4;
const IDLE_TIME: Duration = Duration::from_secs(30);
/// Between two looks for an instance that has nothing to do.
const BUSY_PAUSE: Duration = Duration::from_millis(1);

/// What all generations share.
pub(crate) struct Parts {
    pub(crate) engine: Engine,
    pub(crate) linker: Linker<Guest>,
    pub(crate) clock: Arc<Clock>,
    pub(crate) reaper: Grave,
    pub(crate) shards: usize,
    pub(crate) door: Door,
}

/// What becomes of what the serving build knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HandOver {
    /// The new build takes it over, or is not prepared.
    Wanted,
    /// The serving build is not asked for it.
    Fresh,
}

/// Why a build is not prepared.
#[derive(Debug)]
pub(crate) enum Unready {
    /// The serving build does not hand over what it knows: the new one may be without fault.
    Snapshot(HostError),
    Failed(HostError),
}

impl From<HostError> for Unready {
    fn from(error: HostError) -> Self {
        Self::Failed(error)
    }
}

/// Who a build is.
pub(crate) struct Identity {
    pub(crate) number: u64,
    /// What it was made from: component and granted files.
    pub(crate) made_from: String,
    pub(crate) plugin: Arc<Plugin>,
}

/// One build. Immutable, but for the instances that have nothing to do.
pub(crate) struct Generation {
    pub(crate) name: Arc<str>,
    pub(crate) number: u64,
    pub(crate) made_from: String,
    pub(crate) plugin: Arc<Plugin>,
    pub(crate) config: PluginConfig,
    pub(crate) clock: Arc<Clock>,
    engine: Engine,
    pre: InstancePre<Guest>,
    pub(crate) exports: Indices,
    registration: OnceLock<Registration>,
    services: Arc<Services>,
    /// Calls of this build without an answer.
    pub(crate) failures: AtomicU64,
    /// All calls of this build.
    pub(crate) calls: AtomicU64,
    /// Answers it gave as a shadow, and those of them that were others than the serving build's.
    pub(crate) compared: AtomicU64,
    pub(crate) differs: AtomicU64,
    pub(crate) born: Instant,
    /// For the log, once it is in the chain.
    loading: Mutex<Option<Loading>>,
    /// Of the largest instance after `init`.
    memory_bytes: AtomicUsize,
    /// SHA-256 of the component.
    pub(crate) digest: String,
    mounts: Arc<Mounts>,
    reaper: Grave,
    /// By shard. Only that shard takes from it; the lock is for the loader, which empties it in the end.
    idle: Box<[Mutex<Vec<Idle>>]>,
    /// Instances of this build by shard, with those that are in a call.
    alive: Box<[Arc<AtomicUsize>]>,
    retired: AtomicBool,
    /// Instances that all builds of the plugin may have.
    instances_max: usize,
}

/// An instance that has nothing to do.
struct Idle {
    pooled: Pooled,
    /// Since when; only known of those beyond [`IDLE_KEPT`].
    since: Option<Instant>,
}

/// How a build came to be.
pub(crate) struct Loading {
    pub(crate) what: &'static str,
    pub(crate) load_ms: u64,
    pub(crate) compile_ms: u64,
    pub(crate) cached: bool,
}

impl Generation {
    pub(crate) fn new(
        parts: &Parts,
        component: &Component,
        config: PluginConfig,
        identity: Identity,
        mounts: Mounts,
        digest: &str,
    ) -> Result<Self, HostError> {
        let ty = component.component_type();
        let pre = parts.linker.instantiate_pre(component);
        let pre = pre.map_err(|error| diagnosis::import(&ty, &parts.engine, &one_line(&error)))?;
        grants::check_imports(&ty, &parts.engine, &config.grants)?;
        let exports = Indices::find(&pre);
        if let Some(error) = diagnosis::incomplete(&ty, &parts.engine, &exports.names()) {
            return Err(error);
        }
        if !exports.has_plug_point() {
            return Err(diagnosis::no_plug_point(&ty, &parts.engine));
        }
        let plugin = identity.plugin;
        let instances_max = pool::share(&config.limits, parts.shards);
        let services = Services {
            plugin: Arc::clone(&plugin),
            grants: config.grants.clone(),
            calls_per_sec: config.limits.host_calls_per_sec,
            sockets_max: config.limits.sockets,
            files_max: config.limits.files,
            http_requests_max: PLUGIN_REQUESTS_MAX.max(parts.shards * config.limits.instances),
            keyvalue_per_sec: u64::from(config.limits.keyvalue_mib_per_sec) << 20,
            door: Arc::clone(&parts.door),
            settings: config.config.iter().cloned().collect(),
            http: config.grants.http.as_slice().into(),
        };
        Ok(Self {
            name: Arc::clone(&plugin.name),
            number: identity.number,
            made_from: identity.made_from,
            plugin,
            config,
            clock: Arc::clone(&parts.clock),
            engine: parts.engine.clone(),
            pre,
            exports,
            registration: OnceLock::new(),
            services: Arc::new(services),
            failures: AtomicU64::new(0),
            calls: AtomicU64::new(0),
            compared: AtomicU64::new(0),
            differs: AtomicU64::new(0),
            born: Instant::now(),
            loading: Mutex::default(),
            memory_bytes: AtomicUsize::new(0),
            digest: digest.to_owned(),
            mounts: Arc::new(mounts),
            reaper: parts.reaper.clone(),
            idle: (0..parts.shards.max(1)).map(|_| Mutex::default()).collect(),
            alive: (0..parts.shards.max(1)).map(|_| Arc::default()).collect(),
            retired: AtomicBool::new(false),
            instances_max,
        })
    }

    pub(crate) fn set_loading(&self, loading: Loading) {
        *self.loading.lock().unwrap_or_else(PoisonError::into_inner) = Some(loading);
    }

    /// Says in the log, once, that it is there.
    pub(crate) fn announce(&self) {
        let loading = self.loading.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(Loading { what, load_ms, compile_ms, cached }) = loading {
            info!(plugin = %self.name, generation = self.number, load_ms, compile_ms, cached, "{what}");
        }
    }

    /// What it wants to be shown; nothing before its first instance has said so.
    pub(crate) fn registration(&self) -> &Registration {
        static NOTHING: Registration = Registration::NOTHING;
        self.registration.get().unwrap_or(&NOTHING)
    }

    pub(crate) fn inspection(&self) -> Inspection {
        let bytes = std::fs::metadata(&self.config.path).map_or(0, |file| file.len());
        Inspection::of(&self.pre.component().component_type(), &self.engine, bytes)
    }

    pub(crate) fn status(&self) -> Status {
        Status {
            name: self.name.to_string(),
            generation: self.number,
            digest: self.digest.clone(),
            candidate: None,
            rolled_back: self.plugin.counters.rolled_back.load(Ordering::Relaxed),
            plug_points: self.exports.names(),
            registered: self.registration().shown(),
            memory_bytes: self.memory_bytes.load(Ordering::Relaxed),
            calls: self.plugin.counters.calls(),
            failures: self.plugin.counters.failures(),
            refused: self.plugin.counters.refused(),
            instances: self.plugin.counters.instances.load(Ordering::Relaxed),
            cpu_ms: self.plugin.cpu().as_millis() as u64,
            cpu_waits: self.plugin.cpu_waits(),
            breaker_opened: self.plugin.counters.breaker_opened.load(Ordering::Relaxed),
            feed_waiting: self.plugin.feed.waiting.len(),
            feed_bytes: self.plugin.feed.waiting.bytes(),
            feed_aside: self.plugin.feed.aside().0,
            feed_dropped: self.plugin.feed.dropped(),
            events_dropped: self.plugin.events.dropped(),
            interest_dropped: self.plugin.interest.dropped(),
            denied: self.plugin.counters.denied.load(Ordering::Relaxed),
            sockets: self.plugin.open.sockets(),
            files: self.plugin.open.files(),
            keyvalue_bytes: self.plugin.buckets.bytes(),
            metrics_lost: self.plugin.metrics.lost(),
            metrics: self.plugin.metrics.snapshot(),
        }
    }

    /// The plugin has these messages for good, as far as the broker is concerned.
    pub(crate) fn fed(&self, messages: &[Shown]) {
        let ids: Vec<_> = messages.iter().filter_map(|shown| shown.fed).collect();
        if let Some(broker) = self.services.door.get()
            && !ids.is_empty()
        {
            broker.fed(&self.name, ids);
        }
    }

    /// Too many messages waited for `committed`.
    pub(crate) fn lost(&self, messages: &[Shown]) {
        if messages.is_empty() {
            return;
        }
        self.fed(messages);
        if self.plugin.may_complain() {
            let (plugin, dropped) = (&self.name, self.plugin.feed.dropped());
            error!(%plugin, dropped, "messages for `committed` are dropped: too many wait or are set aside (limits.feed_messages_max, feed_mib, feed_aside_mib)");
        }
    }

    /// For calls that no client waits for.
    pub(crate) fn budget<'a>(&self, share: &'a Share) -> Budget<'a> {
        self.budget_of(share, self.config.limits.cpu_ms)
    }

    pub(crate) fn budget_of<'a>(&self, share: &'a Share, cpu_ms: u64) -> Budget<'a> {
        Budget { cpu: Duration::from_millis(cpu_ms), share, percent: self.config.limits.cpu_share }
    }

    pub(crate) fn deadline(&self) -> Duration {
        Duration::from_millis(self.config.limits.deadline_ms)
    }

    /// Makes an instance for each shard before this build serves, the first of which must say that it is well. Each
    /// takes over what an instance of the serving build on the same shard knows.
    pub(crate) async fn prepare(&self, old: Option<&Self>, hand_over: HandOver) -> Result<(), Unready> {
        let hands_over = |old: &&Self| {
            hand_over == HandOver::Wanted && old.exports.handover.is_some() && self.exports.handover.is_some()
        };
        let old = old.filter(hands_over);
        for shard in 0..self.idle.len() {
            let mut pooled = self.in_time("init", self.instantiate(&self.plugin.loading, Some(shard))).await?;
            if shard == 0 {
                self.in_time("health", self.check_health(&mut pooled)).await?;
            }
            if let Some(old) = old {
                let state = old.in_time("snapshot", old.snapshot(shard)).await.map_err(Unready::Snapshot)?;
                if let Some(state) = state {
                    self.in_time("restore", self.restore(&mut pooled, &state)).await?;
                }
            }
            self.put_idle(shard, pooled);
        }
        Ok(())
    }

    async fn in_time<T>(&self, what: &str, work: impl Future<Output = Result<T, String>>) -> Result<T, HostError> {
        match tokio::time::timeout(self.deadline(), work).await {
            Ok(result) => result.map_err(HostError::new),
            Err(_) => {
                Err(HostError::new(format!("{what}: not done within deadline_ms = {}", self.deadline().as_millis())))
            }
        }
    }

    /// What an instance that has nothing to do knows; `None`: this shard has none.
    async fn snapshot(&self, shard: usize) -> Result<Option<State>, String> {
        let mut pooled = loop {
            if let Some(pooled) = self.take_idle(shard) {
                break pooled;
            }
            if self.alive[shard % self.alive.len()].load(Ordering::Relaxed) == 0 {
                return Ok(None);
            }
            tokio::time::sleep(BUSY_PAUSE).await;
        };
        let Some(running) = pooled.begin() else { return Ok(None) };
        let meter = running.meter();
        let Some(handover) = &running.exports.handover else { return Ok(None) };
        running.store.set_epoch_deadline(1);
        running.store.set_hostcall_fuel(STATE_BYTES_MAX + ANSWER_BYTES_MAX);
        let call = handover.wasmqtt_plugin_handover().call_snapshot(&mut running.store);
        let answer = metered(&self.clock, &meter, self.budget(&self.plugin.loading), call).await;
        let answer = answer.map_err(|error| format!("snapshot: {}", self.explained(running, error)))?;
        pooled.finished();
        self.put_idle(shard, pooled);
        let state = answer.map_err(|from| format!("snapshot: {}", failure(from)))?;
        if state.bytes.len() > STATE_BYTES_MAX {
            let bytes = state.bytes.len();
            return Err(format!("snapshot: a state of {bytes} bytes; at most {STATE_BYTES_MAX} are allowed"));
        }
        Ok(Some(state))
    }

    async fn restore(&self, pooled: &mut Pooled, state: &State) -> Result<(), String> {
        let Some(running) = pooled.begin() else { return Ok(()) };
        let meter = running.meter();
        if let Some(handover) = &running.exports.handover {
            running.store.set_epoch_deadline(1);
            let call = handover.wasmqtt_plugin_handover().call_restore(&mut running.store, state);
            let answer = metered(&self.clock, &meter, self.budget(&self.plugin.loading), call).await;
            let answer = answer.map_err(|error| format!("restore: {}", self.explained(running, error)))?;
            answer.map_err(|from| format!("restore: {}", failure(from)))?;
        }
        pooled.finished();
        Ok(())
    }

    async fn check_health(&self, pooled: &mut Pooled) -> Result<(), String> {
        let Some(running) = pooled.begin() else { return Ok(()) };
        let meter = running.meter();
        if let Some(lifecycle) = &running.exports.lifecycle {
            running.store.set_epoch_deadline(1);
            let call = lifecycle.wasmqtt_plugin_lifecycle().call_health(&mut running.store);
            let answer = metered(&self.clock, &meter, self.budget(&self.plugin.loading), call).await;
            let answer = answer.map_err(|error| format!("health: {}", self.explained(running, error)))?;
            answer.map_err(|from| format!("health: {}", failure(from)))?;
        }
        pooled.finished();
        Ok(())
    }

    /// An instance of this shard that has nothing to do.
    pub(crate) fn take_idle(&self, shard: usize) -> Option<Pooled> {
        self.idle_of(shard).lock().unwrap_or_else(PoisonError::into_inner).pop().map(|idle| idle.pooled)
    }

    /// Keeps an instance for the next call, or lets go of it if this build does not serve any more.
    pub(crate) fn put_idle(&self, shard: usize, pooled: Pooled) {
        let mut idle = self.idle_of(shard).lock().unwrap_or_else(PoisonError::into_inner);
        // Under the lock, or `retire` could come between.
        if self.retired.load(Ordering::Relaxed) {
            return;
        }
        // The last one is taken first, so what lies behind those that are always kept was needed in a rush, long ago.
        let since = (idle.len() >= IDLE_KEPT).then(Instant::now);
        if let (Some(now), Some(oldest)) = (since, idle.get(IDLE_KEPT).and_then(|idle| idle.since))
            && now.duration_since(oldest) > IDLE_TIME
        {
            idle.remove(IDLE_KEPT);
        }
        idle.push(Idle { pooled, since });
    }

    fn idle_of(&self, shard: usize) -> &Mutex<Vec<Idle>> {
        &self.idle[shard % self.idle.len()]
    }

    /// Calls under way finish; everything else goes to the reaper.
    pub(crate) fn retire(&self) {
        self.retired.store(true, Ordering::Relaxed);
        for idle in &self.idle {
            idle.lock().unwrap_or_else(PoisonError::into_inner).clear();
        }
    }

    /// `share`: of the thread that it is made on; `shard`: where it is to serve, `None`: where no client waits.
    pub(crate) async fn instantiate(&self, share: &Share, shard: Option<usize>) -> Result<Pooled, String> {
        // What one plugin has too many of must not be lacking for another.
        if self.plugin.counters.instances.load(Ordering::Relaxed) >= self.instances_max {
            let (instances, most) = (self.config.limits.instances, self.instances_max);
            return Err(format!(
                "all {most} instances that limits.instances = {instances} allows this plugin on all shards, for all its \
                 builds, are in use; those of earlier builds may still be ending"
            ));
        }
        let mut wasi = WasiCtxBuilder::new();
        self.mounts.open(&mut wasi)?;
        wasi.envs(&self.config.grants.environment);
        let allowance = self.plugin.allowance(shard);
        let memory_bytes_max = self.config.limits.memory_mib as usize * 1024 * 1024;
        let (mut store, meter) =
            Running::store(&self.engine, Guest::new(&self.services, allowance, wasi, memory_bytes_max));
        store.set_epoch_deadline(1);
        let begun = self.pre.instantiate_async(&mut store);
        let instance = metered(&self.clock, &meter, self.budget(share), begun).await;
        let instance = instance
            .map_err(|error| format!("cannot be instantiated: {}", self.explained_by(&store.data().limits, error)))?;
        let exports = self.exports.load(&mut store, &instance)?;
        let (mounts, plugin) = (Arc::clone(&self.mounts), Arc::clone(&self.plugin));
        let running = Running::new((store, meter), exports, mounts, plugin);
        let alive = shard.map(|shard| Alive::new(&self.alive[shard % self.alive.len()]));
        let mut pooled = Pooled::new(running, self.reaper.clone(), alive);
        self.init(&mut pooled, share).await?;
        Ok(pooled)
    }

    async fn init(&self, pooled: &mut Pooled, share: &Share) -> Result<(), String> {
        let Some(running) = pooled.begin() else { return Ok(()) };
        let meter = running.meter();
        if let Some(lifecycle) = &running.exports.lifecycle {
            let pair = |(name, value): &(String, String)| Pair { name: name.clone(), value: value.clone() };
            let settings: Vec<Pair> = self.config.config.iter().map(pair).collect();
            running.store.set_epoch_deadline(1);
            let call = lifecycle.wasmqtt_plugin_lifecycle().call_init(&mut running.store, &settings);
            let answer = metered(&self.clock, &meter, self.budget(share), call).await;
            let answer = answer.map_err(|error| format!("init: {}", self.explained(running, error)))?;
            let wanted = answer.map_err(|from| format!("init: {}", failure(from)))?;
            let wanted = Registration::checked(wanted).map_err(|error| format!("init: registration: {error}"))?;
            let _ = self.registration.set(wanted);
        }
        self.memory_bytes.fetch_max(running.store.data().limits.memory_bytes(), Ordering::Relaxed);
        pooled.finished();
        Ok(())
    }

    /// A guest that gets no more memory traps somewhere; the operator should read why.
    pub(crate) fn explained(&self, running: &Running, error: String) -> String {
        self.explained_by(&running.store.data().limits, error)
    }

    fn explained_by(&self, limits: &Limits, error: String) -> String {
        let memory_mib = self.config.limits.memory_mib;
        match (limits.memory_refused, limits.tables_refused) {
            (true, _) => {
                let cure = diagnosis::raise_memory(memory_mib, (u64::from(memory_mib) + 1).next_power_of_two());
                format!("it wanted more memory than {cure}: {error}")
            }
            (_, true) => format!("it wanted more table elements than there may be: {error}"),
            _ => error,
        }
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        self.retire();
    }
}
