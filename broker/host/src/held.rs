//! File descriptors of the broker that guests hold: sockets, files and connections of HTTP requests. Their number is bounded per plugin, over all its
//! instances, so that enough are left for clients.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use wasmtime::component::{Resource, ResourceTable, ResourceTableError};
use wasmtime_wasi::p2::bindings::filesystem::types::Descriptor;

use crate::lookup::Lookups;
use crate::plugin::Plugin;

/// Those of all instances of a plugin.
#[derive(Default)]
pub(crate) struct Open {
    sockets: AtomicUsize,
    files: AtomicUsize,
    requests: AtomicUsize,
    pub(crate) lookups: Lookups,
}

impl Open {
    pub(crate) fn sockets(&self) -> usize {
        self.sockets.load(Ordering::Relaxed)
    }

    pub(crate) fn files(&self) -> usize {
        self.files.load(Ordering::Relaxed)
    }
}

/// An HTTP request under way; its connection is a file descriptor.
pub(crate) struct OpenRequest(Arc<Plugin>);

impl OpenRequest {
    /// `None`: all instances together have `max` requests under way already.
    pub(crate) fn begin(plugin: &Arc<Plugin>, max: usize) -> Option<Self> {
        take(&plugin.open.requests, max).then(|| Self(Arc::clone(plugin)))
    }
}

impl Drop for OpenRequest {
    fn drop(&mut self) {
        self.0.open.requests.fetch_sub(1, Ordering::Relaxed);
    }
}

fn take(open: &AtomicUsize, max: usize) -> bool {
    open.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |open| (open < max).then_some(open + 1)).is_ok()
}

/// Those of one instance; given back with it.
pub(crate) struct Held {
    plugin: Arc<Plugin>,
    sockets: usize,
    /// Files being opened.
    opening: usize,
    /// Open files; granted folders are not among them, the operator opened those.
    files: BTreeSet<u32>,
    /// Files that the guest has closed while streams of theirs are open.
    half_closed: Vec<Resource<Descriptor>>,
}

impl Held {
    pub(crate) fn new(plugin: &Arc<Plugin>) -> Self {
        Self { plugin: Arc::clone(plugin), sockets: 0, opening: 0, files: BTreeSet::new(), half_closed: Vec::new() }
    }

    /// `false`: all instances together have `max` sockets already.
    pub(crate) fn take_socket(&mut self, max: usize) -> bool {
        let taken = take(&self.plugin.open.sockets, max);
        self.sockets += usize::from(taken);
        taken
    }

    pub(crate) fn give_back_socket(&mut self) {
        if self.sockets > 0 {
            self.sockets -= 1;
            self.plugin.open.sockets.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// `false`: all instances together have `max` files open already.
    pub(crate) fn take_file(&mut self, table: &mut ResourceTable, max: usize) -> bool {
        self.sweep(table);
        let taken = take(&self.plugin.open.files, max);
        self.opening += usize::from(taken);
        taken
    }

    /// What came of [`Self::take_file`].
    pub(crate) fn file_opened(&mut self, file: Option<&Resource<Descriptor>>) {
        self.opening = self.opening.saturating_sub(1);
        match file {
            Some(file) => drop(self.files.insert(file.rep())),
            None => drop(self.plugin.open.files.fetch_sub(1, Ordering::Relaxed)),
        }
    }

    /// The guest closes a file. While streams of it are there the file stays open, and counts.
    pub(crate) fn close_file(&mut self, table: &mut ResourceTable, file: Resource<Descriptor>) -> wasmtime::Result<()> {
        let rep = file.rep();
        match table.delete(file) {
            Ok(_) => self.file_closed(rep),
            Err(ResourceTableError::HasChildren) => self.half_closed.push(Resource::new_own(rep)),
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    fn file_closed(&mut self, rep: u32) {
        if self.files.remove(&rep) {
            self.plugin.open.files.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Closes files whose last stream is gone.
    fn sweep(&mut self, table: &mut ResourceTable) {
        for file in std::mem::take(&mut self.half_closed) {
            let rep = file.rep();
            match table.delete(file) {
                Ok(_) => self.file_closed(rep),
                Err(_) => self.half_closed.push(Resource::new_own(rep)),
            }
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.plugin.open.sockets.fetch_sub(self.sockets, Ordering::Relaxed);
        self.plugin.open.files.fetch_sub(self.files.len() + self.opening, Ordering::Relaxed);
    }
}
