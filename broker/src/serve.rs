//! `wasmqtt serve`: from settings to a running broker, and back to nothing when a signal says so.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use rustix::process::{Resource, getrlimit, setrlimit};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2};
use signal_hook::iterator::Signals;
use tracing::{info, warn};
use wasmqtt_host::{Cancel, PluginHost};
use wasmqtt_protocol::ports;
use wasmqtt_server::{Anonymous, Bind, Server};
use wasmqtt_store::RocksStore;

use crate::control::{self, Reach};
use crate::reload::{self, Origin, Running};
use crate::settings::Settings;
use crate::supervise::{self, Supervisor};
use crate::{log, plugins};

/// Time for clients to take what is waiting for them once a signal has come.
const DRAIN_GRACE: Duration = Duration::from_secs(10);
/// Between two updates of `$SYS`.
const SYS_INTERVAL: Duration = Duration::from_secs(10);
/// Threads on which plugins wait for clocks, files and networks. Clients are served elsewhere, components compiled by
/// child processes.
const BACKGROUND_THREADS: usize = 2;

/// Runs the broker; returns once it has drained.
pub(crate) fn run(origin: Origin) -> anyhow::Result<()> {
    // Before any thread could miss them, and before SIGHUP could end what has only begun.
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2]).context("listen for signals")?;
    let settings = origin.load()?;
    let log = Arc::new(log::start(&settings.log)?);
    raise_open_files();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(BACKGROUND_THREADS)
        .thread_name("background")
        .enable_all()
        .build()
        .context("start background threads")?;
    let starting = Cancel::default();
    cancel_at_end(starting.clone())?;
    let store = settings.store.clone().map(RocksStore::open).transpose()?;
    let plugins = {
        let _entered = runtime.enter();
        plugins::start(&settings, store.as_ref(), starting.clone())
    };
    let plugins = match plugins {
        Ok(plugins) => plugins,
        Err(error) => {
            // Its threads must not outlive `main`.
            if let Some(store) = store {
                store.stop();
            }
            return if starting.is_cancelled() { Ok(()) } else { Err(error) };
        }
    };
    check_exposure(&settings, plugins.as_ref().is_some_and(|plugins| plugins.has_auth()))?;

    let data_dir = settings.data_dir.clone();
    let config = wasmqtt_server::Config {
        listeners: settings.listeners.clone(),
        anonymous: settings.anonymous,
        identity: settings.identity,
        limits: settings.limits.clone(),
        shards: settings.shards,
        sys_interval: SYS_INTERVAL,
    };
    let port: Arc<dyn ports::Store> = match &store {
        Some(store) => Arc::clone(store) as Arc<dyn ports::Store>,
        None => Arc::new(ports::Memory),
    };
    let server = Server::start(config, plugins::port(plugins.as_ref()), port, runtime.handle().clone())?;
    let running = Arc::new(Running::new(origin, settings, server.reloader(), plugins.clone(), log.level()));
    let inspector = server.inspector();
    let (for_signals, server_for_commands) = (Arc::clone(&running), inspector.clone());
    let reach = Reach { plugins: plugins.clone(), store: store.clone(), server: server_for_commands, running };
    let commands = control::start(&data_dir, reach);
    let (reload, reloads) = reload::on_wish(for_signals)?;
    // Scripts wait for these lines.
    for listener in server.listeners() {
        crate::output::print(&format!("listening on {listener}\n"))?;
    }

    let mut looks = watched(&server, store.as_ref(), plugins.as_ref());
    looks.extend(commands.into_iter().chain([reloads]).map(supervise::thread));
    let for_supervisor = Arc::clone(&log);
    looks.push(Box::new(move || for_supervisor.ended()));
    let supervisor = Supervisor::start(looks, DRAIN_GRACE)?;
    for signal in signals.forever() {
        match signal {
            // One that waits already is the same wish.
            SIGHUP => drop(reload.try_send(())),
            SIGUSR1 => info!(status = %inspector.status(), "status"),
            SIGUSR2 => info!("SIGUSR2 does nothing"),
            _ => {
                info!(signal, "draining; a second signal ends it at once");
                break;
            }
        }
    }
    let for_second = Arc::clone(&log);
    std::thread::spawn(move || {
        if let Some(signal) = signals.forever().find(|signal| matches!(*signal, SIGINT | SIGTERM)) {
            for_second.flush();
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
    let verdict = supervisor.verdict();
    log.flush();
    verdict
}

/// The threads that serve clients, keep what they send and ask plugins.
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

/// A signal gives up what plugins are doing at the moment, such as compiling: a start ends, and a running broker need not
/// wait for that.
fn cancel_at_end(starting: Cancel) -> anyhow::Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM]).context("listen for signals")?;
    let wait = move || {
        if signals.forever().next().is_some() {
            starting.cancel();
        }
    };
    std::thread::Builder::new().name("signals".into()).spawn(wait).context("listen for signals")?;
    Ok(())
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
pub(crate) fn check_exposure(settings: &Settings, has_auth: bool) -> anyhow::Result<()> {
    if has_auth {
        return Ok(());
    }
    match settings.anonymous {
        Anonymous::Allow => Ok(()),
        Anonymous::Deny => {
            warn!("auth.anonymous = false and no plugin authenticates: every client will be refused");
            Ok(())
        }
        Anonymous::Loopback => {
            match settings.listeners.iter().find(|listener| listener.proxied || is_exposed(&listener.bind)) {
                None => Ok(()),
                Some(listener) => bail!(
                    "refusing to listen on {}: other machines could reach it{}, and nothing says who may connect\n  load a \
                 plugin that authenticates, such as auth-file ([plugins] and [[plugin]] in the configuration), or\n  let \
                 everybody in with `anonymous = true` under [auth], or\n  listen on 127.0.0.1 only",
                    listener.name,
                    if listener.proxied { " through the proxy in front of it" } else { "" }
                ),
            }
        }
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
        let mut settings = defaults(&[]).expect("defaults");
        settings.listeners = parse_listen(listen).expect("address").0;
        settings.anonymous = anonymous;
        assert_eq!(check_exposure(&settings, has_auth).is_err(), refused, "{listen} {anonymous:?} {has_auth}");
    }

    /// Behind a proxy, this machine is everybody.
    #[test]
    fn a_listener_behind_a_proxy_is_an_open_door() {
        let mut settings = defaults(&[]).expect("defaults");
        settings.listeners[0].proxied = true;
        let error = check_exposure(&settings, false).expect_err("refused");
        assert!(error.to_string().contains("the proxy in front of it"), "{error}");
        assert!(check_exposure(&settings, true).is_ok());
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
