//! For authors of plugins: a new project, and a component alone on the bench.

mod bench; // `plugin bench`
mod cases; // `plugin test`
mod check; // `plugin check`
mod heard; // what a component says meanwhile
mod new; // `plugin new`

pub(crate) use self::bench::bench;
pub(crate) use self::cases::test;
pub(crate) use self::check::check;
pub(crate) use self::new::{Kind, Language, new};

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Args;
use tokio::runtime::Runtime;
use wasmqtt_host::{Grants, HostConfig, Inspection, PluginConfig, PluginHost, PluginLimits, Status};
use wasmqtt_protocol::ports::{Plugins, ShardPlugins};
use wasmqtt_protocol::topic::Filter;

use self::heard::Heard;
use crate::settings;

/// A component, and the bounds it is tried with.
#[derive(Debug, Args)]
pub(crate) struct Subject {
    /// The component.
    pub(crate) file: PathBuf,
    /// A limit, as under `limits` of a `[[plugin]]` entry, such as `memory_mib=32`; may be repeated.
    #[arg(long, value_name = "KEY=VALUE", value_parser = parse_pair)]
    pub(crate) limit: Vec<(String, String)>,
}

impl Subject {
    /// `name` of the plugin in messages: that of the file.
    fn name(&self) -> String {
        self.file.file_stem().map_or_else(|| "plugin".into(), |stem| stem.to_string_lossy().into_owned())
    }

    fn limits(&self) -> anyhow::Result<PluginLimits> {
        // A machine on which things are tried may be slow, and nobody waits.
        let default = PluginLimits { hook_cpu_ms: 1000, ..PluginLimits::default() };
        settings::limits(&self.limit, default).map_err(|why| anyhow::anyhow!("--limit {why}"))
    }
}

/// Shows on standard error what the component said, whatever comes of it.
fn aloud<T>(run: impl FnOnce(&Heard) -> anyhow::Result<T>) -> anyhow::Result<T> {
    let heard = Heard::start();
    let result = run(heard);
    eprint!("{}", heard.take_text());
    result
}

/// One component without a broker around it, with everything granted but files, environment and networks.
struct Bench {
    // Before the host, which waits for it.
    shard: Box<dyn ShardPlugins>,
    host: Arc<PluginHost>,
    runtime: Runtime,
    /// From the file to an instance that answers.
    start: Duration,
    cache: tempfile::TempDir,
}

impl Bench {
    fn open(subject: &Subject, config: &[(String, String)]) -> anyhow::Result<Self> {
        Self::open_with(subject, config, tempfile::tempdir().context("make a folder for compiled components")?)
    }

    /// With what an earlier one has compiled.
    fn open_with(subject: &Subject, config: &[(String, String)], cache: tempfile::TempDir) -> anyhow::Result<Self> {
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
        let limits = subject.limits()?;
        let plugin = PluginConfig {
            name: subject.name(),
            path: subject.file.clone(),
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

    fn inspection(&self) -> anyhow::Result<Inspection> {
        self.host.inspection(&self.status()?.name).context("the component is gone")
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
