//! Whether the threads of the server run.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;

use crate::shared::Shared;

/// Looks at the threads of a server: each of them serves clients that no other thread knows.
#[derive(Clone)]
pub struct Watch {
    pub(crate) shared: Arc<Shared>,
    pub(crate) threads: Arc<Vec<JoinHandle<()>>>,
}

impl Watch {
    /// The name of a thread that has ended although the server was not stopped: it panicked, and what it served is not
    /// served any more.
    pub fn ended(&self) -> Option<String> {
        let ended = self.threads.iter().find(|thread| thread.is_finished())?;
        // Looked at after the thread, which ends when this is set.
        let is_stopping = self.shared.draining.load(Ordering::Acquire);
        (!is_stopping).then(|| ended.thread().name().unwrap_or("a thread of the server").to_owned())
    }

    pub(crate) fn all_ended(&self) -> bool {
        self.threads.iter().all(JoinHandle::is_finished)
    }
}
