//! `wasmqtt serve`: from settings to a running broker, and back to nothing when a signal says so.

use std::io::{self, IsTerminal};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use rustix::process::{Resource, getrlimit, setrlimit};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use tracing::{info, warn};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, fmt};
use wasmqtt_host::PluginHost;
use wasmqtt_protocol::ports;
use wasmqtt_server::store::RocksStore;
use wasmqtt_server::{Anonymous, Bind, Server};

use crate::control::{self, Reach};
use crate::plugins;
use crate::settings::{Log, Settings};
use crate::supervise::{self, Supervisor};

/// Time for clients to take what is waiting for them once a signal has come.
const DRAIN_GRACE: Duration = Duration::from_secs(10);
/// Between two updates of `$SYS`.
const SYS_INTERVAL: Duration = Duration::from_secs(10);
/// Threads on which plugins wait for clocks and files, and components are compiled. Clients are served elsewhere.
const BACKGROUND_THREADS: usize = 2;

/// Runs the broker; returns once it has drained.
pub(crate) fn run(settings: Settings) -> anyhow::Result<()> {
    start_log(&settings.log)?;
    supervise::log_panics();
    // Before any thread could miss them.
    let mut signals = Signals::new([SIGINT, SIGTERM]).context("listen for signals")?;
    raise_open_files();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(BACKGROUND_THREADS)
        .thread_name("background")
        .enable_all()
        .build()
        .context("start background threads")?;
    let store = settings.store.clone().map(RocksStore::open).transpose()?;
    let plugins = {
        let _entered = runtime.enter();
        plugins::start(&settings, store.as_ref())?
    };
    check_exposure(&settings, plugins.as_ref().is_some_and(|plugins| plugins.has_auth()))?;

    let data_dir = settings.data_dir.clone();
    let config = wasmqtt_server::Config {
        listeners: settings.listeners,
        anonymous: settings.anonymous,
        limits: settings.limits,
        shards: settings.shards,
        sys_interval: SYS_INTERVAL,
    };
    let port: Arc<dyn ports::Store> = match &store {
        Some(store) => Arc::clone(store) as Arc<dyn ports::Store>,
        None => Arc::new(ports::Memory),
    };
    let server = Server::start(config, plugins::port(plugins.as_ref()), port, runtime.handle().clone())?;
    if plugins.is_some() || store.is_some() {
        let reach = Reach { plugins: plugins.clone(), store: store.clone(), server: server.inspector() };
        control::start(&data_dir, reach);
    }
    // Scripts wait for these lines.
    for listener in server.listeners() {
        crate::print(&format!("listening on {listener}\n"))?;
    }

    let supervisor = Supervisor::start(watched(&server, store.as_ref(), plugins.as_ref()), DRAIN_GRACE)?;
    if let Some(signal) = signals.forever().next() {
        info!(signal, "draining; a second signal ends it at once");
    }
    std::thread::spawn(move || {
        if let Some(signal) = signals.forever().next() {
            // As a shell reports a process that a signal ended.
            std::process::exit(128 + signal);
        }
    });
    server.stop(DRAIN_GRACE);
    if let Some(plugins) = plugins {
        plugins.stop();
    }
    if let Some(store) = store {
        store.stop();
    }
    info!("stopped");
    // A plugin that still waits for something must not hold up the end.
    runtime.shutdown_timeout(Duration::from_secs(1));
    supervisor.verdict()
}

/// All threads that the broker cannot do without.
fn watched(
    server: &Server,
    store: Option<&Arc<RocksStore>>,
    plugins: Option<&Arc<PluginHost>>,
) -> Vec<supervise::Look> {
    let server = server.watch();
    let mut looks: Vec<supervise::Look> = vec![Box::new(move || server.ended())];
    if let Some(store) = store.map(Arc::clone) {
        looks.push(Box::new(move || store.ended()));
    }
    if let Some(plugins) = plugins.map(Arc::clone) {
        looks.push(Box::new(move || plugins.ended()));
    }
    looks
}

fn start_log(log: &Log) -> anyhow::Result<()> {
    let targets: Targets = log.level.parse().with_context(|| format!("log.level = {:?}", log.level))?;
    let layer = fmt::layer().with_writer(io::stderr).with_ansi(io::stderr().is_terminal());
    let layer = if log.json { layer.json().boxed() } else { layer.boxed() };
    tracing_subscriber::registry().with(layer.with_filter(targets)).try_init().context("start the log")
}

/// Each client is an open file; the usual soft limit of 1,024 is for programs that use `select`.
fn raise_open_files() {
    let mut limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        limit.current = limit.maximum;
        if let Err(error) = setrlimit(Resource::Nofile, limit) {
            warn!(%error, "cannot raise the limit of open files");
        }
    }
}

/// A broker that others can reach must have been told whom to let in.
fn check_exposure(settings: &Settings, has_auth: bool) -> anyhow::Result<()> {
    if has_auth {
        return Ok(());
    }
    match settings.anonymous {
        Anonymous::Allow => Ok(()),
        Anonymous::Deny => {
            warn!("auth.anonymous = false and no plugin authenticates: every client will be refused");
            Ok(())
        }
        Anonymous::Loopback => match settings.listeners.iter().find(|listener| is_exposed(&listener.bind)) {
            None => Ok(()),
            Some(listener) => bail!(
                "refusing to listen on {}: other machines could reach it, and nothing says who may connect\n  load a \
                 plugin that authenticates, such as auth-file ([plugins] and [[plugin]] in the configuration), or\n  let \
                 everybody in with `anonymous = true` under [auth], or\n  listen on 127.0.0.1 only",
                listener.name
            ),
        },
    }
}

fn is_exposed(bind: &Bind) -> bool {
    match bind {
        Bind::Tcp(address) => {
            let canonical: IpAddr = address.ip().to_canonical();
            !canonical.is_loopback()
        }
        Bind::Unix(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use crate::settings::{defaults, parse_listen};

    use super::*;

    fn check_refused(listen: &str, anonymous: Anonymous, has_auth: bool, refused: bool) {
        let mut settings = defaults().expect("defaults");
        settings.listeners = vec![parse_listen(listen).expect("address")];
        settings.anonymous = anonymous;
        assert_eq!(check_exposure(&settings, has_auth).is_err(), refused, "{listen} {anonymous:?} {has_auth}");
    }

    #[test]
    fn only_an_open_door_that_nobody_asked_for_is_refused() {
        check_refused("0.0.0.0:1883", Anonymous::Loopback, false, true);
        check_refused("[::]:1883", Anonymous::Loopback, false, true);
        check_refused("10.1.2.3:1883", Anonymous::Loopback, false, true);
        check_refused("10.1.2.3:1883", Anonymous::Loopback, true, false);
        check_refused("10.1.2.3:1883", Anonymous::Allow, false, false);
        check_refused("10.1.2.3:1883", Anonymous::Deny, false, false);
        check_refused("127.0.0.1:1883", Anonymous::Loopback, false, false);
        check_refused("[::1]:1883", Anonymous::Loopback, false, false);
        check_refused("[::ffff:127.0.0.1]:1883", Anonymous::Loopback, false, false);
        check_refused("unix:/run/wasmqtt.sock", Anonymous::Loopback, false, false);
    }
}
