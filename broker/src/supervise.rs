//! A thread that ends early ends the broker.
//!
//! Each shard has Sessions that no other thread knows, and without the thread that writes nothing is kept: a broker that
//! lost one of its threads would go on with a part of its clients, and hold up the others. So it ends, in good order as
//! far as that goes and with an exit status of its own, and whoever started it starts it again.

use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context;
use rustix::process::{Signal, getpid, kill_process};
use tracing::error;

/// Exit status of a broker that one of its threads left: "internal software error" of `sysexits.h`.
pub(crate) const EXIT: u8 = 70;
/// Between two looks at the threads.
const LOOK_PAUSE: Duration = Duration::from_millis(250);
/// What the end may take beyond the time that clients are given.
const END_GRACE: Duration = Duration::from_secs(5);

/// Looks at some threads; gives the name of one that has ended though nobody stopped it.
pub(crate) type Look = Box<dyn Fn() -> Option<String> + Send>;

/// Looks at a thread that runs as long as the process.
pub(crate) fn thread(thread: JoinHandle<()>) -> Look {
    Box::new(move || thread.is_finished().then(|| thread.thread().name().unwrap_or("unnamed").to_owned()))
}

/// A thread of the broker ended early.
#[derive(Debug, thiserror::Error)]
#[error("thread {0} has ended; the broker cannot go on without it")]
pub(crate) struct Died(String);

/// Watches threads.
pub(crate) struct Supervisor {
    died: Arc<OnceLock<String>>,
}

impl Supervisor {
    /// Watches until the process ends. When a thread has ended, the broker is ended as SIGTERM would, and if that takes
    /// longer than `grace` and some seconds, without further ado.
    pub(crate) fn start(looks: Vec<Look>, grace: Duration) -> anyhow::Result<Self> {
        let terminate = || {
            let _ = kill_process(getpid(), Signal::TERM);
        };
        let end = move || {
            std::thread::sleep(grace + END_GRACE);
            error!("the broker does not end in good order");
            crate::log::flush();
            std::process::exit(i32::from(EXIT));
        };
        Self::watch(looks, terminate, end)
    }

    fn watch(
        looks: Vec<Look>,
        terminate: impl Fn() + Send + 'static,
        end: impl FnOnce() + Send + 'static,
    ) -> anyhow::Result<Self> {
        let died = Arc::new(OnceLock::new());
        let supervisor = Self { died: Arc::clone(&died) };
        let watch = move || {
            let name = loop {
                if let Some(name) = looks.iter().find_map(|look| look()) {
                    break name;
                }
                std::thread::sleep(LOOK_PAUSE);
            };
            error!(thread = %name, "a thread of the broker has ended: draining, then the broker ends");
            let _ = died.set(name);
            terminate();
            end();
        };
        std::thread::Builder::new().name("supervisor".into()).spawn(watch).context("start the supervisor")?;
        Ok(supervisor)
    }

    /// # Errors
    /// [`Died`]: a thread had ended.
    pub(crate) fn verdict(&self) -> anyhow::Result<()> {
        self.died.get().map_or(Ok(()), |name| Err(Died(name.clone()).into()))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    /// The broker is told to end once, and says by its exit status why.
    #[test]
    fn a_thread_that_panics_ends_the_broker() {
        let thread = std::thread::Builder::new().name("shard-7".into());
        let thread = thread.spawn(|| panic!("a test")).expect("a thread");
        let healthy: Look = Box::new(|| None);
        let watched = super::thread(thread);
        let ((told, terminated), (last, ended)) = (channel(), channel());
        let (terminate, end) = (move || told.send(()).expect("a test"), move || last.send(()).expect("a test"));
        let supervisor = Supervisor::watch(vec![healthy, watched], terminate, end).expect("starts");
        terminated.recv_timeout(Duration::from_secs(20)).expect("is told to end");
        ended.recv_timeout(Duration::from_secs(20)).expect("ends if it does not do that");
        let error = supervisor.verdict().expect_err("did not end well");
        assert!(error.downcast_ref::<Died>().is_some() && error.to_string().contains("shard-7"), "{error}");
    }

    #[test]
    fn a_broker_with_all_its_threads_ends_well() {
        let ((told, terminated), (last, _ended)) = (channel(), channel());
        let (terminate, end) = (move || told.send(()).expect("a test"), move || last.send(()).expect("a test"));
        let supervisor = Supervisor::watch(vec![Box::new(|| None)], terminate, end).expect("starts");
        assert!(terminated.recv_timeout(3 * LOOK_PAUSE).is_err());
        assert!(supervisor.verdict().is_ok());
    }
}
