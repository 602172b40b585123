//! A loaded build of a plugin: compiled, checked, ready to be instantiated on any shard.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use wasmtime::Engine;
use wasmtime::component::{Component, InstancePre, Linker};
use wasmtime_wasi::WasiCtxBuilder;

use crate::bindings::lifecycle::exports::wasmqtt::plugin::lifecycle::Pair;
use crate::bindings::{auth, lifecycle, lifecycle_failure};
use crate::config::PluginConfig;
use crate::counters::Counters;
use crate::engine::Clock;
use crate::grants::Mounts;
use crate::guest::Guest;
use crate::instance::{Dead, Pooled, Running, metered, one_line};
use crate::{HostError, Status};

/// What all generations share.
pub(crate) struct Parts {
    pub(crate) engine: Engine,
    pub(crate) linker: Linker<Guest>,
    pub(crate) clock: Arc<Clock>,
    pub(crate) reaper: Sender<Dead>,
    pub(crate) shards: usize,
}

/// Who a build is.
pub(crate) struct Identity {
    pub(crate) number: u64,
    /// What it was made from: component and granted files.
    pub(crate) made_from: String,
    pub(crate) counters: Arc<Counters>,
}

/// One build. Immutable, but for the instances that have nothing to do.
pub(crate) struct Generation {
    pub(crate) name: Arc<str>,
    pub(crate) number: u64,
    pub(crate) made_from: String,
    pub(crate) counters: Arc<Counters>,
    pub(crate) config: PluginConfig,
    pub(crate) clock: Arc<Clock>,
    engine: Engine,
    pre: InstancePre<Guest>,
    auth: Option<auth::HasAuthIndices>,
    lifecycle: Option<lifecycle::HasLifecycleIndices>,
    mounts: Arc<Mounts>,
    reaper: Sender<Dead>,
    /// By shard. Only that shard takes from it; the lock is for the loader, which empties it in the end.
    idle: Box<[Mutex<Vec<Pooled>>]>,
    retired: AtomicBool,
}

impl Generation {
    pub(crate) fn new(
        parts: &Parts,
        component: &Component,
        config: PluginConfig,
        identity: Identity,
        mounts: Mounts,
    ) -> Result<Self, HostError> {
        let pre = parts.linker.instantiate_pre(component).map_err(|error| {
            HostError::new(format!("it imports something that this broker does not offer: {}", one_line(&error)))
        })?;
        let auth = auth::HasAuthIndices::new(&pre).ok();
        let lifecycle = lifecycle::HasLifecycleIndices::new(&pre).ok();
        if auth.is_none() {
            return Err(HostError::new("it exports no plug-point; there is wasmqtt:plugin/auth@0.1.0"));
        }
        Ok(Self {
            name: config.name.as_str().into(),
            number: identity.number,
            made_from: identity.made_from,
            counters: identity.counters,
            config,
            clock: Arc::clone(&parts.clock),
            engine: parts.engine.clone(),
            pre,
            auth,
            lifecycle,
            mounts: Arc::new(mounts),
            reaper: parts.reaper.clone(),
            idle: (0..parts.shards.max(1)).map(|_| Mutex::default()).collect(),
            retired: AtomicBool::new(false),
        })
    }

    pub(crate) fn has_auth(&self) -> bool {
        self.auth.is_some()
    }

    pub(crate) fn status(&self) -> Status {
        Status {
            name: self.name.to_string(),
            generation: self.number,
            calls: self.counters.calls(),
            failures: self.counters.failures(),
            instances: self.counters.instances.load(Ordering::Relaxed),
        }
    }

    pub(crate) fn cpu(&self) -> Duration {
        Duration::from_millis(self.config.limits.cpu_ms)
    }

    pub(crate) fn deadline(&self) -> Duration {
        Duration::from_millis(self.config.limits.deadline_ms)
    }

    /// Makes an instance for each shard before this build serves, the first of which must say that it is well.
    pub(crate) async fn prepare(&self) -> Result<(), HostError> {
        for shard in 0..self.idle.len() {
            let mut pooled = self.in_time("init", self.instantiate()).await?;
            if shard == 0 {
                self.in_time("health", self.check_health(&mut pooled)).await?;
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

    async fn check_health(&self, pooled: &mut Pooled) -> Result<(), String> {
        let Some(running) = pooled.begin() else { return Ok(()) };
        let meter = running.meter();
        if let Some(lifecycle) = &running.lifecycle {
            running.store.set_epoch_deadline(1);
            let call = lifecycle.wasmqtt_plugin_lifecycle().call_health(&mut running.store);
            let answer = metered(&self.clock, &meter, self.cpu(), call).await;
            let answer = answer.map_err(|error| format!("health: {}", self.explained(running, error)))?;
            answer.map_err(|failure| format!("health: {}", lifecycle_failure(failure)))?;
        }
        pooled.finished();
        Ok(())
    }

    /// An instance of this shard that has nothing to do.
    pub(crate) fn take_idle(&self, shard: usize) -> Option<Pooled> {
        self.idle_of(shard).lock().unwrap_or_else(PoisonError::into_inner).pop()
    }

    /// Keeps an instance for the next call, or lets go of it if this build does not serve any more.
    pub(crate) fn put_idle(&self, shard: usize, pooled: Pooled) {
        let mut idle = self.idle_of(shard).lock().unwrap_or_else(PoisonError::into_inner);
        // Under the lock, or `retire` could come between.
        if !self.retired.load(Ordering::Relaxed) {
            idle.push(pooled);
        }
    }

    fn idle_of(&self, shard: usize) -> &Mutex<Vec<Pooled>> {
        &self.idle[shard % self.idle.len()]
    }

    /// Calls under way finish; everything else goes to the reaper.
    pub(crate) fn retire(&self) {
        self.retired.store(true, Ordering::Relaxed);
        for idle in &self.idle {
            idle.lock().unwrap_or_else(PoisonError::into_inner).clear();
        }
    }

    pub(crate) async fn instantiate(&self) -> Result<Pooled, String> {
        let mut wasi = WasiCtxBuilder::new();
        self.mounts.open(&mut wasi)?;
        let memory_bytes_max = self.config.limits.memory_mib as usize * 1024 * 1024;
        let (mut store, meter) = Running::store(&self.engine, Guest::new(&self.name, wasi, memory_bytes_max));
        store.set_epoch_deadline(1);
        let instance = metered(&self.clock, &meter, self.cpu(), self.pre.instantiate_async(&mut store)).await;
        let instance = instance.map_err(|error| format!("cannot be instantiated: {error}"))?;
        let failed = |error: wasmtime::Error| one_line(&error);
        let auth = self.auth.as_ref().map(|indices| indices.load(&mut store, &instance)).transpose().map_err(failed)?;
        let lifecycle =
            self.lifecycle.as_ref().map(|indices| indices.load(&mut store, &instance)).transpose().map_err(failed)?;
        let (mounts, counters) = (Arc::clone(&self.mounts), Arc::clone(&self.counters));
        let running = Running::new((store, meter), auth, lifecycle, mounts, counters);
        let mut pooled = Pooled::new(running, self.reaper.clone());
        self.init(&mut pooled).await?;
        Ok(pooled)
    }

    async fn init(&self, pooled: &mut Pooled) -> Result<(), String> {
        let Some(running) = pooled.begin() else { return Ok(()) };
        let meter = running.meter();
        if let Some(lifecycle) = &running.lifecycle {
            let pair = |(name, value): &(String, String)| Pair { name: name.clone(), value: value.clone() };
            let settings: Vec<Pair> = self.config.config.iter().map(pair).collect();
            running.store.set_epoch_deadline(1);
            let call = lifecycle.wasmqtt_plugin_lifecycle().call_init(&mut running.store, &settings);
            let answer = metered(&self.clock, &meter, self.cpu(), call).await;
            let answer = answer.map_err(|error| format!("init: {}", self.explained(running, error)))?;
            answer.map_err(|failure| format!("init: {}", lifecycle_failure(failure)))?;
        }
        pooled.finished();
        Ok(())
    }

    /// A guest that gets no more memory traps somewhere; the operator should read why.
    pub(crate) fn explained(&self, running: &Running, error: String) -> String {
        if running.store.data().limits.memory_refused {
            return format!(
                "it wanted more memory than limits.memory_mib = {}: {error}",
                self.config.limits.memory_mib
            );
        }
        error
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        self.retire();
    }
}

/// Says goodbye to instances that still can answer, and drops them all.
pub(crate) fn reap(dead: &Receiver<Dead>, runtime: &tokio::runtime::Handle, clock: &Clock) {
    const FAREWELL: Duration = Duration::from_secs(1);
    for Dead { mut running, healthy } in dead {
        if healthy {
            let meter = running.meter();
            running.store.set_epoch_deadline(1);
            let Running { store, lifecycle, .. } = &mut *running;
            if let Some(lifecycle) = lifecycle {
                let call = lifecycle.wasmqtt_plugin_lifecycle().call_shutdown(store);
                let call = async { tokio::time::timeout(FAREWELL, metered(clock, &meter, FAREWELL, call)).await };
                let _ = runtime.block_on(call);
            }
        }
    }
}
