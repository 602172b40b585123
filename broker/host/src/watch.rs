//! Notices changed files, and runs the loader for them.

use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use notify::{RecommendedWatcher, RecursiveMode};
use notify_debouncer_full::{DebounceEventResult, Debouncer, RecommendedCache, new_debouncer};
use tracing::{debug, warn};

use crate::HostError;
use crate::loader::Loader;

/// How often files are looked at where the system cannot tell about changes.
const LOOK_EVERY: Duration = Duration::from_secs(2);

enum Wake {
    Rescan,
    Stop,
}

/// Tells the loader's thread something.
pub(crate) struct Signal(Sender<Wake>);

impl Signal {
    pub(crate) fn rescan(&self) {
        let _ = self.0.send(Wake::Rescan);
    }

    pub(crate) fn stop(&self) {
        let _ = self.0.send(Wake::Stop);
    }
}

type Watcher = Debouncer<RecommendedWatcher, RecommendedCache>;

/// Starts the loader's thread.
pub(crate) fn start(loader: Loader, debounce: Duration) -> Result<(Signal, JoinHandle<()>), HostError> {
    let (wake, woken) = channel();
    let watcher = match watch(&loader, debounce, wake.clone()) {
        Ok(watcher) => Some(watcher),
        Err(error) => {
            warn!(%error, "no notice of changed plugins, looking every two seconds");
            None
        }
    };
    let thread = std::thread::Builder::new().name("plugin-loader".into());
    let thread = thread.spawn(move || run(loader, watcher, &woken));
    let thread = thread.map_err(|error| HostError::new(format!("cannot start the plugin loader: {error}")))?;
    Ok((Signal(wake), thread))
}

fn watch(loader: &Loader, debounce: Duration, wake: Sender<Wake>) -> notify::Result<Watcher> {
    let notice = move |result: DebounceEventResult| {
        // Reading a file is an event too, and it is what the loader does. After an error anything may have changed.
        if result.map_or(true, |events| events.iter().any(|event| !event.kind.is_access())) {
            let _ = wake.send(Wake::Rescan);
        }
    };
    let mut watcher = new_debouncer(debounce, None, notice)?;
    for folder in loader.folders() {
        watcher.watch(Path::new(&folder), RecursiveMode::NonRecursive)?;
    }
    Ok(watcher)
}

fn run(mut loader: Loader, watcher: Option<Watcher>, woken: &Receiver<Wake>) {
    lower_priority();
    // What changed between the first load and the watch was not noticed.
    let mut next = Ok(Wake::Rescan);
    loop {
        match next {
            Ok(Wake::Rescan) | Err(RecvTimeoutError::Timeout) => {}
            Ok(Wake::Stop) | Err(RecvTimeoutError::Disconnected) => return,
        }
        if let Err(error) = loader.load_all(false) {
            warn!(%error, "plugins not reloaded");
        }
        let wait = if watcher.is_some() { Duration::MAX } else { LOOK_EVERY };
        next = match wait {
            Duration::MAX => woken.recv().map_err(|_| RecvTimeoutError::Disconnected),
            wait => woken.recv_timeout(wait),
        };
    }
}

/// Compiling must not take a core from the shards.
fn lower_priority() {
    const NICE: i32 = 10;
    if let Err(error) = rustix::process::setpriority_process(Some(rustix::thread::gettid()), NICE) {
        debug!(%error, "the plugin loader keeps its priority");
    }
}
