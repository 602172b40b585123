//! A plugin host without sockets, and a shard that polls by hand.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses its part")]

use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tokio::runtime::Runtime;
use wasmqtt_host::{Compiler, HostConfig, HostError, PluginConfig, PluginHost, Status};
use wasmqtt_protocol::codec::{ReasonCode, Version};
use wasmqtt_protocol::ports::{AuthOutcome, AuthRequest, AuthStep, Grant, Plugins, ShardPlugins};

/// Nothing in these tests may take longer.
const PATIENCE: Duration = Duration::from_mins(1);

pub struct Broker {
    // Before the host, which waits for it.
    pub shard: Box<dyn ShardPlugins>,
    pub host: Arc<PluginHost>,
    pub folder: TempDir,
    runtime: Runtime,
}

impl Broker {
    pub fn start(plugins: Vec<PluginConfig>) -> Self {
        Self::try_start(tempfile::tempdir().expect("a temporary folder"), plugins).expect("plugins load")
    }

    /// With the plugins of `folder/plugins`, if it exists.
    pub fn try_start(folder: TempDir, plugins: Vec<PluginConfig>) -> Result<Self, HostError> {
        Self::try_start_with(folder, plugins, |config| config)
    }

    /// The same with another configuration.
    pub fn try_start_with(
        folder: TempDir,
        plugins: Vec<PluginConfig>,
        change: impl FnOnce(HostConfig) -> HostConfig,
    ) -> Result<Self, HostError> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.expect("a runtime");
        let entered = runtime.enter();
        let dir = folder.path().join("plugins");
        let host = PluginHost::start(change(HostConfig {
            dir: dir.is_dir().then_some(dir),
            plugins,
            cache_dir: folder.path().join("cache"),
            cache_key: Some(folder.path().join("cache.key")),
            // This program has no subcommand that compiles.
            compiler: Compiler::InProcess,
            ..HostConfig::default()
        }))?;
        let shard = host.shard(0);
        drop(entered);
        Ok(Self { shard, host, folder, runtime })
    }

    pub fn authenticate(&self, request: AuthRequest) -> AuthOutcome {
        self.run(self.shard.authenticate(Arc::new(request)))
    }

    pub fn ask(&self, client_id: &str, username: &str) -> AuthOutcome {
        self.authenticate(request(client_id, username, ""))
    }

    pub fn proceed(&self, step: AuthStep) -> AuthOutcome {
        self.run(self.shard.proceed(step))
    }

    pub fn run<T>(&self, call: impl Future<Output = T>) -> T {
        let mut polls = Vec::new();
        self.run_timed(call, &mut polls)
    }

    /// As the shard does it: poll, do something else, poll again when woken.
    pub fn run_timed<T>(&self, call: impl Future<Output = T>, polls: &mut Vec<Duration>) -> T {
        let _entered = self.runtime.enter();
        let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
        let mut context = Context::from_waker(&waker);
        let mut call = std::pin::pin!(call);
        let begun = Instant::now();
        loop {
            let poll = Instant::now();
            let result = call.as_mut().poll(&mut context);
            polls.push(poll.elapsed());
            if let Poll::Ready(value) = result {
                return value;
            }
            assert!(begun.elapsed() < PATIENCE, "still not done");
            std::thread::park_timeout(Duration::from_secs(1));
        }
    }

    /// Polls once.
    pub fn poll<T>(&self, call: &mut std::pin::Pin<Box<dyn Future<Output = T>>>) -> Poll<T> {
        let _entered = self.runtime.enter();
        call.as_mut().poll(&mut Context::from_waker(Waker::noop()))
    }

    pub fn status(&self, name: &str) -> Option<Status> {
        self.host.status().into_iter().find(|status| status.name == name)
    }

    pub fn generation(&self, name: &str) -> u64 {
        self.status(name).map_or(0, |status| status.generation)
    }

    pub fn wait(&self, what: &str, is_so: impl Fn(&Self) -> bool) {
        let begun = Instant::now();
        while !is_so(self) {
            assert!(begun.elapsed() < PATIENCE, "still not: {what}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

pub fn plugin(name: &str, component: impl Into<PathBuf>, settings: &[(&str, &str)]) -> PluginConfig {
    let config = settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    PluginConfig { name: name.into(), path: component.into(), config, ..PluginConfig::default() }
}

pub fn misbehave(name: &str, settings: &[(&str, &str)]) -> PluginConfig {
    plugin(name, wasmqtt_guests::component("misbehave"), settings)
}

pub fn request(client_id: &str, username: &str, password: &str) -> AuthRequest {
    AuthRequest {
        client_id: client_id.into(),
        username: Some(username.into()),
        password: Some(password.as_bytes().to_vec().into()),
        method: None,
        data: None,
        version: Version::V5,
        address: Some([192, 0, 2, 1].into()),
        listener: "mqtt://127.0.0.1:1883".into(),
        user_properties: vec![("a".into(), "b".into())],
    }
}

pub fn allowed(principal: &str) -> AuthOutcome {
    AuthOutcome::Allow(Grant { principal: principal.into(), ..Grant::default() })
}

pub fn denied(code: u8) -> AuthOutcome {
    AuthOutcome::Deny(ReasonCode(code))
}

/// As deploying does it: the file is there at once and whole.
pub fn replace(path: &Path, bytes: &[u8]) {
    let temporary = path.with_extension("new");
    std::fs::write(&temporary, bytes).expect("can write");
    std::fs::rename(&temporary, path).expect("can rename");
}

/// The misbehaving guest with something appended that makes it another build: an empty custom section.
pub fn another_build(component: &str) -> Vec<u8> {
    let mut bytes = std::fs::read(wasmqtt_guests::component(component)).expect("the guest is built");
    bytes.extend([0, 2, 1, b'x']);
    bytes
}
