//! Notices changed files, and runs the loader for them.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use notify::{Event, RecommendedWatcher, RecursiveMode, Watcher};
use tracing::{debug, warn};

use crate::HostError;
use crate::cancel::Cancel;
use crate::config::PluginConfig;
use crate::deploy::Deployed;
use crate::generation::HandOver;
use crate::jobs::Done;
use crate::loader::{Loader, Occasion};
use crate::threads::Watched;

/// How often files are looked at without notice of a change, and folders whether they are still the same.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// How often builds on probation or on trial are looked after.
const LOOK_AFTER_EVERY: Duration = Duration::from_millis(100);

/// How long files may go on changing before they are looked at: one that is written to all the time holds up no other.
const UNQUIET_MAX: Duration = Duration::from_millis(500);

/// Orders that may wait for the loader; who has one more waits to give it.
const WAITING_MAX: usize = 16;

enum Wake {
    /// Nothing but a nudge: see [`Signal::rescan`] and [`Signal::stop`].
    Nudge,
    Order(Order, SyncSender<Result<(), HostError>>),
}

/// What an operator wants done.
pub(crate) enum Order {
    Deploy {
        components: Vec<Deployed>,
        /// Whatever rollout the configuration says.
        at_once: bool,
        hand_over: HandOver,
        cancel: Cancel,
    },
    /// The build of this plugin that is on trial goes.
    DropCandidate(String),
    Promote(String),
    /// Other settings for configured plugins.
    Reconfigure {
        plugins: Vec<PluginConfig>,
        /// Components that they need.
        compiled: Vec<Done>,
    },
}

/// Tells the loader's thread something.
#[derive(Clone)]
pub(crate) struct Signal {
    wake: SyncSender<Wake>,
    /// Files may have changed since the loader last looked.
    changed: Arc<AtomicBool>,
    stop: Cancel,
}

impl Signal {
    /// Has all files looked at; waits for nothing.
    pub(crate) fn rescan(&self) {
        self.changed.store(true, Ordering::Release);
        // Where there is no room, the loader has something to wake up for, and sees the mark then.
        let _ = self.wake.try_send(Wake::Nudge);
    }

    /// Has it done, and waits until it is.
    pub(crate) fn order(&self, order: Order) -> Result<(), HostError> {
        let (reply, done) = sync_channel(1);
        let ended = || HostError::new("the plugin loader has ended");
        self.wake.send(Wake::Order(order, reply)).map_err(|_| ended())?;
        done.recv().map_err(|_| ended())?
    }

    /// It was told to.
    pub(crate) fn is_stopped(&self) -> bool {
        self.stop.is_cancelled()
    }

    /// The loader ends; what it is doing is given up.
    pub(crate) fn stop(&self) {
        self.stop.cancel();
        let _ = self.wake.try_send(Wake::Nudge);
    }
}

/// Starts the loader's thread. A changed file is looked at when it has been quiet for `debounce`.
pub(crate) fn start(
    mut loader: Loader,
    debounce: Duration,
    stop: Cancel,
) -> Result<(Signal, JoinHandle<()>), HostError> {
    let (signal, woken) = channel(stop.clone());
    let nudge = signal.clone();
    loader.set_nudge(move || nudge.rescan());
    let mut watched = WatchedFolders::new(loader.folders());
    let watcher = match watch(&mut watched, signal.clone()) {
        Ok(watcher) => Some(watcher),
        Err(error) => {
            warn!(%error, "no notice of changed plugins, looking every two seconds");
            None
        }
    };
    let changed = Arc::clone(&signal.changed);
    let died = Watched::new("plugin-loader", loader.config.thread_died.as_ref());
    let watch = Watch { loader, watched, watcher, changed, debounce, stop };
    let thread = std::thread::Builder::new().name("plugin-loader".into());
    let thread = thread.spawn(move || {
        let _died = died;
        watch.run(&woken);
    });
    let thread = thread.map_err(|error| HostError::new(format!("cannot start the plugin loader: {error}")))?;
    Ok((signal, thread))
}

fn channel(stop: Cancel) -> (Signal, Receiver<Wake>) {
    let (wake, woken) = sync_channel(WAITING_MAX);
    // What changed between the first load and the watch was not noticed.
    (Signal { wake, changed: Arc::new(AtomicBool::new(true)), stop }, woken)
}

fn watch(watched: &mut WatchedFolders, signal: Signal) -> notify::Result<RecommendedWatcher> {
    let notice = move |result: notify::Result<Event>| {
        // Reading a file is an event too, and it is what the loader does. After an error anything may have changed.
        if result.map_or(true, |event| !event.kind.is_access()) {
            signal.rescan();
        }
    };
    let mut watcher = notify::recommended_watcher(notice)?;
    watched.renew(&mut watcher)?;
    Ok(watcher)
}

/// What the loader's thread has.
struct Watch {
    loader: Loader,
    watched: WatchedFolders,
    watcher: Option<RecommendedWatcher>,
    changed: Arc<AtomicBool>,
    debounce: Duration,
    stop: Cancel,
}

impl Watch {
    fn run(mut self, woken: &Receiver<Wake>) {
        lower_priority();
        let mut looked = Instant::now();
        while !self.stop.is_cancelled() {
            let is_time = looked.elapsed() >= LOOK_EVERY;
            if is_time {
                looked = Instant::now();
                self.look_at_folders();
            }
            // Also without notice of a change: no file system tells what happens behind a link, or on another machine.
            if self.are_files_changed() || self.loader.looks_again() || is_time {
                load(&mut self.loader);
            }
            self.loader.check_probations();
            match woken.recv_timeout(if self.loader.is_restless() { LOOK_AFTER_EVERY } else { LOOK_EVERY }) {
                Ok(Wake::Order(order, reply)) => {
                    let moves = matches!(order, Order::Reconfigure { .. });
                    drop(reply.send(obey(&mut self.loader, order)));
                    if moves {
                        // Files of other folders may be granted now.
                        self.look_at_folders();
                    }
                }
                Ok(Wake::Nudge) | Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    /// Waits until they are quiet, or [`UNQUIET_MAX`] is over.
    fn are_files_changed(&self) -> bool {
        if !self.changed.swap(false, Ordering::AcqRel) {
            return false;
        }
        let begun = Instant::now();
        let mut last = begun;
        while last.elapsed() < self.debounce && begun.elapsed() < UNQUIET_MAX {
            std::thread::sleep(self.debounce / 4);
            if self.changed.swap(false, Ordering::AcqRel) {
                last = Instant::now();
            }
        }
        true
    }

    /// A folder that was moved, made again or is a link to another one now is not watched any more, and one that a link
    /// leads to now is not watched yet.
    fn look_at_folders(&mut self) {
        let Some(watcher) = &mut self.watcher else { return };
        self.watched.set(self.loader.folders(), watcher);
        if let Err(error) = self.watched.renew(watcher) {
            debug!(%error, "cannot watch a folder of plugins, looking every two seconds");
        }
    }
}

fn load(loader: &mut Loader) {
    if let Err(error) = loader.load_all(Occasion::Files, Vec::new()) {
        warn!(%error, "plugins not reloaded");
    }
}

fn obey(loader: &mut Loader, order: Order) -> Result<(), HostError> {
    match order {
        Order::Deploy { components, at_once, hand_over, cancel } => {
            loader.deploy(components, at_once, hand_over, &cancel)
        }
        Order::DropCandidate(name) => {
            loader.drop_candidate(&name, "rolled back by an operator");
            Ok(())
        }
        Order::Promote(name) => loader.promote(&name),
        Order::Reconfigure { plugins, compiled } => loader.reconfigure(plugins, compiled),
    }
}

/// The folders that are watched, as they are called and as they are: a folder may be a link.
struct WatchedFolders(Vec<(PathBuf, Option<Real>)>);

/// A folder without links in its path, and what tells it from others that had the same path.
type Real = (PathBuf, u64, u64, Option<SystemTime>);

fn real(folder: &Path) -> Option<Real> {
    let path = folder.canonicalize().ok()?;
    let found = std::fs::metadata(&path).ok()?;
    // A folder that was made again may have the number of the old one.
    Some((path, found.dev(), found.ino(), found.created().ok()))
}

impl WatchedFolders {
    /// Nothing is watched so far.
    fn new(folders: Vec<PathBuf>) -> Self {
        Self(folders.into_iter().map(|folder| (folder, None)).collect())
    }

    /// Other folders may have to be watched by now.
    fn set(&mut self, folders: Vec<PathBuf>, watcher: &mut RecommendedWatcher) {
        self.0.retain(|(folder, known)| {
            let stays = folders.contains(folder);
            if let Some((path, ..)) = known.as_ref().filter(|_| !stays) {
                let _ = watcher.unwatch(path);
            }
            stays
        });
        for folder in folders {
            if !self.0.iter().any(|(known, _)| *known == folder) {
                self.0.push((folder, None));
            }
        }
    }

    /// Watches what is another folder by now.
    fn renew(&mut self, watcher: &mut RecommendedWatcher) -> notify::Result<()> {
        for (folder, known) in &mut self.0 {
            let now = real(folder);
            if now == *known {
                continue;
            }
            if let Some((path, ..)) = known.take() {
                let _ = watcher.unwatch(&path);
            }
            if let Some((path, ..)) = &now {
                watcher.watch(path, RecursiveMode::NonRecursive)?;
            }
            *known = now;
        }
        Ok(())
    }
}

/// Preparing a build must not take a core from the shards.
fn lower_priority() {
    const NICE: i32 = 10;
    if let Err(error) = rustix::process::setpriority_process(Some(rustix::thread::gettid()), NICE) {
        debug!(%error, "the plugin loader keeps its priority");
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    /// While the loader does something else for long, so much waits for it. A command with one order more waits as well,
    /// and whoever merely nudges it does not.
    #[test]
    fn orders_for_the_loader_are_bounded() {
        let (signal, woken) = channel(Cancel::default());
        let taken = (0..1000).take_while(|_| signal.wake.try_send(Wake::Nudge).is_ok()).count();
        assert_eq!(taken, WAITING_MAX);
        thread::scope(|scope| {
            let command = scope.spawn(|| signal.order(Order::Promote("p".into())));
            signal.rescan();
            thread::sleep(Duration::from_millis(50));
            assert!(!command.is_finished(), "it waits");
            let mut waited = 0;
            let reply = loop {
                match woken.recv().expect("the signal is there") {
                    Wake::Nudge => waited += 1,
                    Wake::Order(_, reply) => break reply,
                }
            };
            assert_eq!(waited, WAITING_MAX, "in the order in which they came");
            reply.send(Err(HostError::new("as told"))).expect("somebody waits");
            assert_eq!(command.join().expect("ends").expect_err("is told").to_string(), "as told");
        });
    }
}
