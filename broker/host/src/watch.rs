//! Notices changed files, and runs the loader for them.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use notify::{RecommendedWatcher, RecursiveMode};
use notify_debouncer_full::{DebounceEventResult, Debouncer, RecommendedCache, new_debouncer};
use tracing::{debug, warn};

use crate::HostError;
use crate::loader::Loader;

/// How often files are looked at where the system cannot tell about changes, and folders whether they are still the same.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// How often builds on probation or on trial are looked after.
const LOOK_AFTER_EVERY: Duration = Duration::from_millis(100);

enum Wake {
    Rescan,
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
}

/// Tells the loader's thread something.
pub(crate) struct Signal(Sender<Wake>);

impl Signal {
    pub(crate) fn rescan(&self) {
        let _ = self.0.send(Wake::Rescan);
    }

    /// Has it done, and waits until it is.
    pub(crate) fn order(&self, order: Order) -> Result<(), HostError> {
        let (reply, done) = sync_channel(1);
        let ended = || HostError::new("the plugin loader has ended");
        self.0.send(Wake::Order(order, reply)).map_err(|_| ended())?;
        done.recv().map_err(|_| ended())?
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
    let mut looked = Instant::now();
    loop {
        match next {
            Ok(Wake::Stop) | Err(RecvTimeoutError::Disconnected) => return,
            Ok(Wake::Order(order, reply)) => drop(reply.send(obey(&mut loader, order))),
            Ok(Wake::Rescan) => load(&mut loader),
            Err(RecvTimeoutError::Timeout) if loader.looks_again() => load(&mut loader),
            Err(RecvTimeoutError::Timeout) => {}
        }
        loader.check_probations();
        if looked.elapsed() >= LOOK_EVERY {
            looked = Instant::now();
            // A folder that was moved, made again or is a link to another one now is not watched any more.
            let renewed = watcher.as_mut().map(|watcher| watched.renew(watcher));
            match renewed {
                Some(Ok(false)) => {}
                Some(Ok(true)) | None => load(&mut loader),
                Some(Err(error)) => warn!(%error, "cannot watch the plugin folder again"),
            }
        }
        next = woken.recv_timeout(if loader.is_restless() { LOOK_AFTER_EVERY } else { LOOK_EVERY });
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
