//! Plugin calls under way on this shard, polled by hand between sockets.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use slab::Slab;
use wasmqtt_protocol::ports::{AuthOutcome, Call};

use super::Shard;

/// Time one turn spends on plugin calls; a busy guest gives the thread back about once a millisecond.
const TURN: Duration = Duration::from_millis(2);

struct Signal {
    ready: AtomicBool,
    shard: Arc<mio::Waker>,
}

impl Wake for Signal {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }
    fn wake_by_ref(self: &Arc<Self>) {
        if !self.ready.swap(true, Ordering::AcqRel) {
            let _ = self.shard.wake();
        }
    }
}

struct Running {
    conn: usize,
    epoch: u32,
    call: Call<AuthOutcome>,
    signal: Arc<Signal>,
}

pub(super) struct Calls {
    running: Slab<Running>,
    waker: Arc<mio::Waker>,
    /// Where the next turn begins, so that each call gets its share.
    next: usize,
}

impl Calls {
    pub(super) fn new(waker: Arc<mio::Waker>) -> Self {
        Self { running: Slab::new(), waker, next: 0 }
    }

    pub(super) fn any_ready(&self) -> bool {
        self.running.iter().any(|(_, running)| running.signal.ready.load(Ordering::Acquire))
    }

    /// Drops the calls of a connection that is gone.
    pub(super) fn cancel(&mut self, conn: usize, epoch: u32) {
        self.running.retain(|_, running| running.conn != conn || running.epoch != epoch);
    }

    fn take_next(&mut self) -> Option<usize> {
        let ready = |(key, running): (usize, &Running)| running.signal.ready.load(Ordering::Acquire).then_some(key);
        let from = self.next;
        let found = self.running.iter().filter(|(key, _)| *key >= from).find_map(ready);
        let found = found.or_else(|| self.running.iter().find_map(ready));
        self.next = found.map_or(0, |key| key + 1);
        found
    }

    fn poll(&mut self, key: usize) -> Option<(usize, u32, AuthOutcome)> {
        let running = self.running.get_mut(key)?;
        running.signal.ready.store(false, Ordering::Release);
        let waker = Waker::from(Arc::clone(&running.signal));
        let Poll::Ready(outcome) = running.call.as_mut().poll(&mut Context::from_waker(&waker)) else { return None };
        let running = self.running.remove(key);
        Some((running.conn, running.epoch, outcome))
    }
}

impl Shard {
    /// Begins a call and polls it once: most are done by then.
    pub(super) fn call(&mut self, conn: usize, epoch: u32, call: Call<AuthOutcome>) {
        let signal = Arc::new(Signal { ready: AtomicBool::new(false), shard: Arc::clone(&self.calls.waker) });
        let key = self.calls.running.insert(Running { conn, epoch, call, signal });
        if let Some((conn, epoch, outcome)) = self.calls.poll(key) {
            self.on_auth_outcome(conn, epoch, outcome);
        }
    }

    pub(super) fn run_calls(&mut self) {
        if self.calls.running.is_empty() {
            return;
        }
        let begun = Instant::now();
        while let Some(key) = self.calls.take_next() {
            if let Some((conn, epoch, outcome)) = self.calls.poll(key) {
                self.on_auth_outcome(conn, epoch, outcome);
            }
            if begun.elapsed() >= TURN {
                break;
            }
        }
    }
}
