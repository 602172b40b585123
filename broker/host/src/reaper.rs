//! Where instances end: a thread that has time for it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, sync_channel};
use std::time::Duration;

use tokio::runtime::Handle;
use tracing::warn;

use crate::HostError;
use crate::engine::Clock;
use crate::instance::{Budget, Dead, Running, metered};

/// Instances that may wait for their end; those beyond are dropped where they are.
const WAITING_MAX: usize = 1024;
/// How long an instance may take to say goodbye.
const FAREWELL: Duration = Duration::from_secs(1);
/// How long all of them may take when the host ends.
const FAREWELLS: Duration = Duration::from_secs(2);

/// The thread ends when nobody can send it an instance any more.
pub(crate) struct Reaper {
    ended: Receiver<()>,
    hurry: Arc<AtomicBool>,
}

impl Reaper {
    /// Starts the thread, and says where dead instances go. The clock is stopped when there is none left.
    pub(crate) fn start(runtime: Handle, clock: Arc<Clock>) -> Result<(SyncSender<Dead>, Self), HostError> {
        let (sender, dead) = sync_channel(WAITING_MAX);
        let (end, ended) = sync_channel(1);
        let hurry = Arc::new(AtomicBool::new(false));
        let hurried = Arc::clone(&hurry);
        let reap = move || {
            for Dead { running, healthy } in &dead {
                if healthy && !hurried.load(Ordering::Relaxed) {
                    say_goodbye(*running, &runtime, &clock);
                }
            }
            // Without it the last guests could not be interrupted, so it ends last.
            clock.stop();
            drop(end);
        };
        let thread = std::thread::Builder::new().name("plugin-reaper".into()).spawn(reap);
        thread.map_err(|error| HostError::new(format!("cannot start the plugin reaper: {error}")))?;
        Ok((sender, Self { ended, hurry }))
    }

    /// The thread is gone.
    pub(crate) fn has_ended(&self) -> bool {
        self.ended.try_recv() == Err(TryRecvError::Disconnected)
    }

    /// Waits until all instances have ended, for a bounded time: they need the runtime, and what they keep needs the
    /// store.
    pub(crate) fn finish(&self) {
        if self.ended.recv_timeout(FAREWELLS) == Err(RecvTimeoutError::Timeout) {
            self.hurry.store(true, Ordering::Relaxed);
            warn!("some instances of plugins are still in use, or take too long to end");
        }
    }
}

fn say_goodbye(mut running: Running, runtime: &Handle, clock: &Clock) {
    let (meter, plugin) = (running.meter(), running.plugin());
    running.store.set_epoch_deadline(1);
    let Running { store, exports, .. } = &mut running;
    if let Some(lifecycle) = &exports.lifecycle {
        let call = lifecycle.wasmqtt_plugin_lifecycle().call_shutdown(store);
        let budget = Budget { cpu: FAREWELL, share: &plugin.loading, percent: 100 };
        let call = async { tokio::time::timeout(FAREWELL, metered(clock, &meter, budget, call)).await };
        let _ = runtime.block_on(call);
    }
}
