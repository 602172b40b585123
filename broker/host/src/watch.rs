//! Notices changed files, and runs the loader for them.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use notify::{RecommendedWatcher, RecursiveMode};
use notify_debouncer_full::{DebounceEventResult, Debouncer, RecommendedCache, new_debouncer};
use tracing::{debug, warn};

use crate::HostError;
use crate::loader::Loader;

/// How often files are looked at where the system cannot tell about changes, and folders whether they are still the same.
const LOOK_EVERY: Duration = Duration::from_secs(2);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
    let mut watched = Watched::new(loader.folders());
    let watcher = match watch(&mut watched, debounce, wake.clone()) {
        Ok(watcher) => Some(watcher),
        Err(error) => {
            warn!(%error, "no notice of changed plugins, looking every two seconds");
            None
        }
    };
    let thread = std::thread::Builder::new().name("plugin-loader".into());
    let thread = thread.spawn(move || run(loader, watched, watcher, &woken));
    let thread = thread.map_err(|error| HostError::new(format!("cannot start the plugin loader: {error}")))?;
    Ok((Signal(wake), thread))
}

fn watch(watched: &mut Watched, debounce: Duration, wake: Sender<Wake>) -> notify::Result<Watcher> {
    let notice = move |result: DebounceEventResult| {
        // Reading a file is an event too, and it is what the loader does. After an error anything may have changed.
        if result.map_or(true, |events| events.iter().any(|event| !event.kind.is_access())) {
            let _ = wake.send(Wake::Rescan);
        }
    };
    let mut watcher = new_debouncer(debounce, None, notice)?;
    watched.renew(&mut watcher)?;
    Ok(watcher)
}

fn run(mut loader: Loader, mut watched: Watched, mut watcher: Option<Watcher>, woken: &Receiver<Wake>) {
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
        next = loop {
            let woken = woken.recv_timeout(LOOK_EVERY);
            // A folder that was moved, made again or is a link to another one now is not watched any more.
            let moved = watcher.as_mut().is_some_and(|watcher| {
                watched.renew(watcher).unwrap_or_else(|error| {
                    warn!(%error, "cannot watch the plugin folder again");
                    false
                })
            });
            if woken.is_ok() || woken == Err(RecvTimeoutError::Disconnected) || moved || watcher.is_none() {
                break woken;
            }
        };
    }
}

/// The folders that are watched, as they are called and as they are: a folder may be a link.
struct Watched(Vec<(PathBuf, Option<Real>)>);

/// A folder without links in its path, and what tells it from others that had the same path.
type Real = (PathBuf, u64, u64);

fn real(folder: &Path) -> Option<Real> {
    let path = folder.canonicalize().ok()?;
    let found = std::fs::metadata(&path).ok()?;
    Some((path, found.dev(), found.ino()))
}

impl Watched {
    /// Nothing is watched so far.
    fn new(folders: Vec<PathBuf>) -> Self {
        Self(folders.into_iter().map(|folder| (folder, None)).collect())
    }

    /// Watches what is another folder by now; `true`: there was such a one.
    fn renew(&mut self, watcher: &mut Watcher) -> notify::Result<bool> {
        let mut renewed = false;
        for (folder, known) in &mut self.0 {
            let now = real(folder);
            if now == *known {
                continue;
            }
            renewed = true;
            if let Some((path, ..)) = known.take() {
                let _ = watcher.unwatch(path);
            }
            if let Some((path, ..)) = &now {
                watcher.watch(path, RecursiveMode::NonRecursive)?;
            }
            *known = now;
        }
        Ok(renewed)
    }
}

/// Compiling must not take a core from the shards.
fn lower_priority() {
    const NICE: i32 = 10;
    if let Err(error) = rustix::process::setpriority_process(Some(rustix::thread::gettid()), NICE) {
        debug!(%error, "the plugin loader keeps its priority");
    }
}
