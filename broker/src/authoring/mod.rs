//! For authors of plugins: a new project, and a component alone on the bench.

mod bench; // `plugin bench`
mod cases; // `plugin test`
mod check; // `plugin check`
mod new; // `plugin new`

pub(crate) use self::bench::bench;
pub(crate) use self::cases::test;
pub(crate) use self::check::check;
pub(crate) use self::new::{Kind, Language, new};

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::runtime::Runtime;
use wasmqtt_host::{Grants, HostConfig, PluginConfig, PluginHost, PluginLimits, Status};
use wasmqtt_protocol::ports::{Plugins, ShardPlugins};
use wasmqtt_protocol::topic::Filter;

/// One component without a broker around it, with everything granted but files.
struct Bench {
    // Before the host, which waits for it.
    shard: Box<dyn ShardPlugins>,
    host: Arc<PluginHost>,
    runtime: Runtime,
    /// From the file to an instance that answers.
    start: Duration,
    cache: tempfile::TempDir,
}

const NAME: &str = "plugin";

impl Bench {
    fn open(file: &Path, config: &[(String, String)]) -> anyhow::Result<Self> {
        Self::open_with(file, config, tempfile::tempdir().context("make a folder for compiled components")?)
    }

    /// With what an earlier one has compiled.
    fn open_with(file: &Path, config: &[(String, String)], cache: tempfile::TempDir) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .context("start background threads")?;
        let grants = Grants {
            publish: vec![Filter::parse("#")?],
            disconnect: true,
            ban: true,
            revoke: true,
            keyvalue_mib: 64,
            ..Grants::default()
        };
        let limits = PluginLimits { hook_cpu_ms: 1000, ..PluginLimits::default() };
        let plugin = PluginConfig {
            name: NAME.into(),
            path: file.to_owned(),
            config: config.to_vec(),
            grants,
            limits,
            ..PluginConfig::default()
        };
        let config = HostConfig { plugins: vec![plugin], cache_dir: cache.path().to_owned(), ..HostConfig::default() };
        let begun = Instant::now();
        let entered = runtime.enter();
        let host = PluginHost::start(config)?;
        let start = begun.elapsed();
        let shard = host.shard(0);
        drop(entered);
        Ok(Self { shard, host, runtime, start, cache })
    }

    fn run<T>(&self, call: impl Future<Output = T>) -> T {
        self.runtime.block_on(call)
    }

    fn status(&self) -> anyhow::Result<Status> {
        self.host.status().into_iter().next().context("the component is gone")
    }

    /// Stops it, and gives back what it has compiled.
    fn close(self) -> tempfile::TempDir {
        drop(self.shard);
        self.host.stop();
        self.cache
    }
}

/// `name=value`, as on the command line.
pub(crate) fn parse_pair(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("must be NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}
