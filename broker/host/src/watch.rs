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
use crate::config::PluginConfig;
use crate::loader::Loader;

/// How often files are looked at where the system cannot tell about changes, and folders whether they are still the same.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// How often builds on probation or on trial are looked after.
const LOOK_AFTER_EVERY: Duration = Duration::from_millis(100);

/// How long files may go on changing before they are looked at: one that is written to all the time holds up no other.
const UNQUIET_MAX: Duration = Duration::from_millis(500);

/// Orders that may wait for the loader; who has one more waits to give it.
const WAITING_MAX: usize = 16;

enum Wake {
    /// Nothing but a nudge: see [`Signal::changed`].
    Changed,
    Order(Order, SyncSender<Result<(), HostError>>),
    Stop,
}

/// What an operator wants done.
pub(crate) enum Order {
    /// Components by the names of their plugins.
    Deploy(Vec<(String, Vec<u8>)>),
    /// The plugin, and the beginning of the digest that is wanted.
    RollBack(String, Option<String>),
    Promote(String),
    /// Other settings for configured plugins.
    Reconfigure(Vec<PluginConfig>),
}

/// Tells the loader's thread something.
#[derive(Clone)]
pub(crate) struct Signal {
    wake: SyncSender<Wake>,
    /// Files may have changed since the loader last looked.
    changed: Arc<AtomicBool>,
}

impl Signal {
    /// Has all files looked at; waits for nothing.
    pub(crate) fn rescan(&self) {
        self.changed.store(true, Ordering::Release);
        // Where there is no room, the loader has something to wake up for, and sees the mark then.
        let _ = self.wake.try_send(Wake::Changed);
    }

    /// Has it done, and waits until it is.
    pub(crate) fn order(&self, order: Order) -> Result<(), HostError> {
        let (reply, done) = sync_channel(1);
        let ended = || HostError::new("the plugin loader has ended");
        self.wake.send(Wake::Order(order, reply)).map_err(|_| ended())?;
        done.recv().map_err(|_| ended())?
    }

    pub(crate) fn stop(&self) {
        let _ = self.wake.send(Wake::Stop);
    }
}

/// Starts the loader's thread. A changed file is looked at when it has been quiet for `debounce`.
pub(crate) fn start(loader: Loader, debounce: Duration) -> Result<(Signal, JoinHandle<()>), HostError> {
    let (wake, woken) = sync_channel(WAITING_MAX);
    // What changed between the first load and the watch was not noticed.
    let signal = Signal { wake, changed: Arc::new(AtomicBool::new(true)) };
    let mut watched = Watched::new(loader.folders());
    let watcher = match watch(&mut watched, signal.clone()) {
        Ok(watcher) => Some(watcher),
        Err(error) => {
            warn!(%error, "no notice of changed plugins, looking every two seconds");
            None
        }
    };
    let changed = Arc::clone(&signal.changed);
    let watch = Watch { loader, watched, watcher, changed, debounce };
    let thread = std::thread::Builder::new().name("plugin-loader".into());
    let thread = thread.spawn(move || watch.run(&woken));
    let thread = thread.map_err(|error| HostError::new(format!("cannot start the plugin loader: {error}")))?;
    Ok((signal, thread))
}

fn watch(watched: &mut Watched, signal: Signal) -> notify::Result<RecommendedWatcher> {
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
    watched: Watched,
    watcher: Option<RecommendedWatcher>,
    changed: Arc<AtomicBool>,
    debounce: Duration,
}

impl Watch {
    fn run(mut self, woken: &Receiver<Wake>) {
        lower_priority();
        let mut looked = Instant::now();
        loop {
            if self.are_files_changed() || self.loader.looks_again() {
                load(&mut self.loader);
            }
            self.loader.check_probations();
            if looked.elapsed() >= LOOK_EVERY {
                looked = Instant::now();
                self.look_at_folders();
            }
            match woken.recv_timeout(if self.loader.is_restless() { LOOK_AFTER_EVERY } else { LOOK_EVERY }) {
                Ok(Wake::Stop) | Err(RecvTimeoutError::Disconnected) => return,
                Ok(Wake::Order(order, reply)) => {
                    let moves = matches!(order, Order::Reconfigure(_));
                    drop(reply.send(obey(&mut self.loader, order)));
                    if moves {
                        // Files of other folders may be granted now; they are watched from the next look on.
                        self.watched = Watched::new(self.loader.folders());
                        self.look_at_folders();
                    }
                }
                Ok(Wake::Changed) | Err(RecvTimeoutError::Timeout) => {}
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

    /// A folder that was moved, made again or is a link to another one now is not watched any more.
    fn look_at_folders(&mut self) {
        match self.watcher.as_mut().map(|watcher| self.watched.renew(watcher)) {
            Some(Ok(false)) => {}
            Some(Ok(true)) | None => load(&mut self.loader),
            Some(Err(error)) => warn!(%error, "cannot watch the plugin folder again"),
        }
    }
}

fn load(loader: &mut Loader) {
    if let Err(error) = loader.load_all(false) {
        warn!(%error, "plugins not reloaded");
    }
}

fn obey(loader: &mut Loader, order: Order) -> Result<(), HostError> {
    match order {
        Order::Deploy(files) => loader.deploy(files),
        Order::RollBack(name, digest) => loader.roll_back(&name, digest.as_deref()),
        Order::Promote(name) => loader.promote(&name),
        Order::Reconfigure(plugins) => loader.reconfigure(plugins),
    }
}

/// The folders that are watched, as they are called and as they are: a folder may be a link.
struct Watched(Vec<(PathBuf, Option<Real>)>);

/// A folder without links in its path, and what tells it from others that had the same path.
type Real = (PathBuf, u64, u64, Option<SystemTime>);

fn real(folder: &Path) -> Option<Real> {
    let path = folder.canonicalize().ok()?;
    let found = std::fs::metadata(&path).ok()?;
    // A folder that was made again may have the number of the old one.
    Some((path, found.dev(), found.ino(), found.created().ok()))
}

impl Watched {
    /// Nothing is watched so far.
    fn new(folders: Vec<PathBuf>) -> Self {
        Self(folders.into_iter().map(|folder| (folder, None)).collect())
    }

    /// Watches what is another folder by now; `true`: there was such a one.
    fn renew(&mut self, watcher: &mut RecommendedWatcher) -> notify::Result<bool> {
        let mut renewed = false;
        for (folder, known) in &mut self.0 {
            let now = real(folder);
            if now == *known {
                continue;
            }
            renewed = true;
            if let Some((path, ..)) = known.take() {
                let _ = watcher.unwatch(&path);
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
