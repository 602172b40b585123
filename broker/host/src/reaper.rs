//! Where instances end: a thread that has time for it.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::task::{JoinSet, LocalSet};
use tracing::{debug, warn};

use crate::HostError;
use crate::cancel::Cancel;
use crate::engine::Clock;
use crate::instance::{Budget, Dead, Running, metered};
use crate::threads::Watched;

/// Instances that may wait for their end; those beyond are dropped where they are.
const WAITING_MAX: usize = 1024;
/// How long an instance may take to say goodbye.
const FAREWELL: Duration = Duration::from_secs(1);
/// How long all of them may take when the host ends.
const FAREWELLS: Duration = Duration::from_secs(2);

/// Where dead instances go.
pub(crate) type Grave = mpsc::Sender<Dead>;

/// The thread ends when nobody can send it an instance any more, or when it is told to hurry.
pub(crate) struct Reaper {
    thread: JoinHandle<()>,
    ended: Receiver<()>,
    hurry: Cancel,
}

impl Reaper {
    /// Starts the thread, and says where dead instances go. The clock is stopped when there is none left.
    pub(crate) fn start(runtime: Handle, clock: Arc<Clock>, watched: Watched) -> Result<(Grave, Self), HostError> {
        let (sender, dead) = mpsc::channel(WAITING_MAX);
        let (end, ended) = sync_channel(1);
        let hurry = Cancel::default();
        let hurried = hurry.clone();
        let reap = move || {
            let _watched = watched;
            // On this thread, whatever it costs: no client waits for it, and neither does another plugin.
            runtime.block_on(LocalSet::new().run_until(reap(dead, &clock, &hurried)));
            drop(end);
        };
        let thread = std::thread::Builder::new().name("plugin-reaper".into()).spawn(reap);
        let thread = thread.map_err(|error| HostError::new(format!("cannot start the plugin reaper: {error}")))?;
        Ok((sender, Self { thread, ended, hurry }))
    }

    /// The thread is gone.
    pub(crate) fn has_ended(&self) -> bool {
        self.ended.try_recv() == Err(TryRecvError::Disconnected)
    }

    /// Waits until all instances have ended, for a bounded time: they need the runtime, and what they keep needs the
    /// store. Then nothing of them runs any more.
    pub(crate) fn finish(self) {
        if self.ended.recv_timeout(FAREWELLS) == Err(RecvTimeoutError::Timeout) {
            warn!("some instances of plugins are still in use, or take too long to end");
        }
        self.hurry.cancel();
        if self.thread.join().is_err() {
            warn!("the thread on which instances of plugins end has panicked");
        }
    }
}

/// All at once: one that takes its time for a goodbye holds up no other, and so no other plugin's next build.
async fn reap(mut dead: mpsc::Receiver<Dead>, clock: &Arc<Clock>, hurry: &Cancel) {
    let mut farewells = JoinSet::new();
    loop {
        tokio::select! {
            biased;
            () = hurry.cancelled() => return,
            Some(done) = farewells.join_next() => if let Err(error) = done {
                debug!(%error, "an instance of a plugin ended badly");
            },
            next = dead.recv() => match next {
                Some(Dead { running, healthy: true }) => {
                    farewells.spawn_local(say_goodbye(running, Arc::clone(clock)));
                }
                Some(Dead { running, healthy: false }) => drop(running),
                None => break,
            },
        }
    }
    tokio::select! {
        () = hurry.cancelled() => return,
        () = async { while farewells.join_next().await.is_some() {} } => {}
    }
    // Without it the last guests could not be interrupted, so it ends last.
    clock.stop();
}

async fn say_goodbye(mut running: Box<Running>, clock: Arc<Clock>) {
    let (meter, plugin) = (running.meter(), running.plugin());
    running.store.set_epoch_deadline(1);
    let Running { store, exports, .. } = &mut *running;
    if let Some(lifecycle) = &exports.lifecycle {
        let call = lifecycle.wasmqtt_plugin_lifecycle().call_shutdown(store);
        let budget = Budget { cpu: FAREWELL, share: &plugin.loading, percent: 100 };
        let _ = tokio::time::timeout(FAREWELL, metered(&clock, &meter, budget, call)).await;
    }
}
