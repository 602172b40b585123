//! A loaded build of a plugin: compiled, checked, ready to be instantiated on any shard.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use wasmtime::Engine;
use wasmtime::component::{Component, InstancePre, Linker};
use wasmtime_wasi::{FsPerms, WasiCtx, WasiCtxBuilder};

use crate::bindings::{auth, lifecycle, lifecycle_failure};
use crate::config::{Mode, PluginConfig};
use crate::engine::Clock;
use crate::instance::{Dead, Guest, Log, Pooled, Running, limited};
use crate::{HostError, Status};

/// A folder of the host under a name of the guest.
pub(crate) struct Mount {
    pub(crate) host: std::path::PathBuf,
    pub(crate) guest: String,
    pub(crate) mode: Mode,
}

/// One build. Immutable but for counters and the instances made in advance.
pub(crate) struct Generation {
    pub(crate) name: Arc<str>,
    pub(crate) number: u64,
    /// What it was made from: component, settings, granted files.
    pub(crate) identity: String,
    pub(crate) config: PluginConfig,
    pub(crate) calls: AtomicU64,
    pub(crate) failures: AtomicU64,
    pub(crate) clock: Arc<Clock>,
    engine: Engine,
    pre: InstancePre<Guest>,
    auth: Option<auth::HasAuthIndices>,
    lifecycle: Option<lifecycle::HasLifecycleIndices>,
    mounts: Vec<Mount>,
    reaper: Sender<Dead>,
    /// Made before this build served, one per shard.
    ready: Mutex<Vec<Pooled>>,
}

/// What all generations share.
pub(crate) struct Parts<'a> {
    pub(crate) engine: &'a Engine,
    pub(crate) linker: &'a Linker<Guest>,
    pub(crate) clock: &'a Arc<Clock>,
    pub(crate) reaper: &'a Sender<Dead>,
}

impl Generation {
    pub(crate) fn new(
        parts: &Parts<'_>,
        component: &Component,
        config: PluginConfig,
        (number, identity): (u64, String),
        mounts: Vec<Mount>,
    ) -> Result<Self, HostError> {
        let pre = parts.linker.instantiate_pre(component).map_err(|error| {
            HostError::new(format!("it imports something that this broker does not offer: {error:#}"))
        })?;
        let auth = auth::HasAuthIndices::new(&pre).ok();
        let lifecycle = lifecycle::HasLifecycleIndices::new(&pre).ok();
        if auth.is_none() {
            return Err(HostError::new("it exports no plug-point; there is wasmqtt:plugin/auth@0.1.0"));
        }
        Ok(Self {
            name: config.name.as_str().into(),
            number,
            identity,
            config,
            calls: AtomicU64::new(0),
            failures: AtomicU64::new(0),
            clock: Arc::clone(parts.clock),
            engine: parts.engine.clone(),
            pre,
            auth,
            lifecycle,
            mounts,
            reaper: parts.reaper.clone(),
            ready: Mutex::default(),
        })
    }

    pub(crate) fn has_auth(&self) -> bool {
        self.auth.is_some()
    }

    pub(crate) fn status(&self) -> Status {
        Status {
            name: self.name.to_string(),
            generation: self.number,
            calls: self.calls.load(Ordering::Relaxed),
            failures: self.failures.load(Ordering::Relaxed),
        }
    }

    pub(crate) fn cpu(&self) -> Duration {
        Duration::from_millis(self.config.limits.cpu_ms)
    }

    pub(crate) fn deadline(&self) -> Duration {
        Duration::from_millis(self.config.limits.deadline_ms)
    }

    /// Makes `count` instances before this build serves, the first of which must say that it is well.
    pub(crate) async fn prepare(&self, count: usize) -> Result<(), HostError> {
        for place in 0..count.max(1) {
            let mut pooled = self.instantiate().await.map_err(HostError::new)?;
            if place == 0 {
                self.check_health(&mut pooled).await.map_err(HostError::new)?;
            }
            self.ready.lock().unwrap_or_else(PoisonError::into_inner).push(pooled);
        }
        Ok(())
    }

    async fn check_health(&self, pooled: &mut Pooled) -> Result<(), String> {
        let Some(running) = pooled.begin() else { return Ok(()) };
        let meter = running.meter();
        if let Some(lifecycle) = &running.lifecycle {
            running.store.set_epoch_deadline(1);
            let call = lifecycle.wasmqtt_plugin_lifecycle().call_health(&mut running.store);
            let answer = limited(&meter, self.cpu(), self.deadline(), call).await;
            answer
                .map_err(|error| format!("health: {error}"))?
                .map_err(|error| format!("health: {}", lifecycle_failure(error)))?;
        }
        pooled.finished();
        Ok(())
    }

    /// An instance: one made in advance, or a new one.
    pub(crate) async fn instance(&self) -> Result<Pooled, String> {
        let ready = self.ready.lock().unwrap_or_else(PoisonError::into_inner).pop();
        match ready {
            Some(pooled) => Ok(pooled),
            None => self.instantiate().await,
        }
    }

    async fn instantiate(&self) -> Result<Pooled, String> {
        self.clock.wake();
        let wasi = self.wasi()?;
        let memory_bytes_max = self.config.limits.memory_mib as usize * 1024 * 1024;
        let (mut store, meter) = Running::store(&self.engine, Guest::new(&self.name, wasi, memory_bytes_max));
        store.set_epoch_deadline(1);
        let instance = limited(&meter, self.cpu(), self.deadline(), self.pre.instantiate_async(&mut store)).await;
        let instance = instance.map_err(|error| format!("instantiate: {error}"))?;
        let failed = |error: wasmtime::Error| format!("{error:#}");
        let auth = self.auth.as_ref().map(|indices| indices.load(&mut store, &instance)).transpose().map_err(failed)?;
        let lifecycle =
            self.lifecycle.as_ref().map(|indices| indices.load(&mut store, &instance)).transpose().map_err(failed)?;
        let mut pooled = Pooled::new(Running::new((store, meter), auth, lifecycle), self.reaper.clone());
        self.init(&mut pooled).await?;
        Ok(pooled)
    }

    async fn init(&self, pooled: &mut Pooled) -> Result<(), String> {
        use lifecycle::exports::wasmqtt::plugin::lifecycle::Pair;
        let Some(running) = pooled.begin() else { return Ok(()) };
        let meter = running.meter();
        if let Some(lifecycle) = &running.lifecycle {
            let settings: Vec<Pair> = self
                .config
                .config
                .iter()
                .map(|(name, value)| Pair { name: name.clone(), value: value.clone() })
                .collect();
            running.store.set_epoch_deadline(1);
            let call = lifecycle.wasmqtt_plugin_lifecycle().call_init(&mut running.store, &settings);
            let answer = limited(&meter, self.cpu(), self.deadline(), call).await;
            answer
                .map_err(|error| format!("init: {error}"))?
                .map_err(|error| format!("init: {}", lifecycle_failure(error)))?;
        }
        pooled.finished();
        Ok(())
    }

    /// No environment, no arguments, no network; files only as granted.
    fn wasi(&self) -> Result<WasiCtx, String> {
        let mut wasi = WasiCtxBuilder::new();
        wasi.stdout(Log::new(&self.name)).stderr(Log::new(&self.name)).allow_tcp(false).allow_udp(false);
        for Mount { host, guest, mode } in &self.mounts {
            let perms = if *mode == Mode::Read { FsPerms::ReadOnly } else { FsPerms::ReadWrite };
            wasi.preopened_dir(host, guest, perms).map_err(|error| format!("grant {}: {error:#}", host.display()))?;
        }
        Ok(wasi.build())
    }
}

/// Says goodbye to instances that still can answer, and drops them all.
pub(crate) fn reap(dead: std::sync::mpsc::Receiver<Dead>, runtime: &tokio::runtime::Handle, clock: &Clock) {
    const FAREWELL: Duration = Duration::from_millis(100);
    for Dead { mut running, healthy } in dead {
        if healthy {
            clock.wake();
            let meter = running.meter();
            running.store.set_epoch_deadline(1);
            let Running { store, lifecycle, .. } = &mut *running;
            if let Some(lifecycle) = lifecycle {
                let call = lifecycle.wasmqtt_plugin_lifecycle().call_shutdown(store);
                let _ = runtime.block_on(limited(&meter, FAREWELL, FAREWELL, call));
            }
        }
    }
}

/// Copies a granted file to a folder of its own, so that nothing beside it can be reached.
pub(crate) fn copy_alone(file: &Path, folder: &Path, name: &str) -> std::io::Result<()> {
    std::fs::create_dir_all(folder)?;
    std::fs::copy(file, folder.join(name)).map(|_| ())
}
