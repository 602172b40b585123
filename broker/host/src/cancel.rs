//! A request to give up what takes long: compiling a component, starting its instances.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::Notify;

/// Handed to what takes long by whoever may lose interest in it; clones are the same request.
#[derive(Clone, Default)]
pub struct Cancel(Arc<Inner>);

#[derive(Default)]
struct Inner {
    wanted: AtomicBool,
    notify: Notify,
}

impl Cancel {
    /// Asks for it, for good.
    pub fn cancel(&self) {
        self.0.wanted.store(true, Ordering::Release);
        self.0.notify.notify_waiters();
    }

    /// Somebody asked.
    pub fn is_cancelled(&self) -> bool {
        self.0.wanted.load(Ordering::Acquire)
    }

    /// Until somebody asks.
    pub(crate) async fn cancelled(&self) {
        loop {
            let mut notified = std::pin::pin!(self.0.notify.notified());
            // Before the look at the mark, or a request between the two would not be noticed.
            notified.as_mut().enable();
            if self.is_cancelled() {
                return;
            }
            notified.await;
        }
    }
}
