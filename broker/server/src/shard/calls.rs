//! Plugin calls under way on this shard, polled by hand between sockets.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use slab::Slab;
use wasmqtt_protocol::access::Decision;
use wasmqtt_protocol::ports::{Accepted, Access, AuthOutcome, Call, Client, Loaded};
use wasmqtt_protocol::router::{Message, SessionKey};

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

/// What a call comes back with, and for whom.
pub(super) enum Answer {
    /// For the CONNECT or AUTH of a connection.
    Auth { conn: usize, epoch: u32, outcome: AuthOutcome },
    /// For a packet that waits for it.
    Packet { conn: usize, epoch: u32, accesses: Arc<[Access]>, decisions: Vec<Decision> },
    /// For subscriptions that were made earlier.
    Subscriptions { session: SessionKey, accesses: Arc<[Access]>, decisions: Vec<Decision> },
    /// For the messages that were shown to storage hooks in one batch.
    Stored { batch: u64, answers: Vec<Accepted> },
    /// For messages from the store that were sealed.
    Opened { opened: Vec<Accepted>, loaded: Loaded },
    /// For the Will Message of a client that is gone.
    Will { client: Arc<Client>, message: Arc<Message>, decisions: Vec<Decision> },
}

struct Running {
    /// The connection that ends the call when it ends.
    conn: Option<(usize, u32)>,
    call: Call<Answer>,
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
        self.running.retain(|_, running| running.conn != Some((conn, epoch)));
    }

    fn take_next(&mut self) -> Option<usize> {
        let ready = |(key, running): (usize, &Running)| running.signal.ready.load(Ordering::Acquire).then_some(key);
        let from = self.next;
        let found = self.running.iter().filter(|(key, _)| *key >= from).find_map(ready);
        let found = found.or_else(|| self.running.iter().find_map(ready));
        self.next = found.map_or(0, |key| key + 1);
        found
    }

    fn poll(&mut self, key: usize) -> Option<Answer> {
        let running = self.running.get_mut(key)?;
        running.signal.ready.store(false, Ordering::Release);
        let waker = Waker::from(Arc::clone(&running.signal));
        let Poll::Ready(answer) = running.call.as_mut().poll(&mut Context::from_waker(&waker)) else { return None };
        self.running.remove(key);
        Some(answer)
    }

    /// Begins a call and polls it once: most are done by then. `conn` ends it when it ends.
    pub(super) fn begin(&mut self, conn: Option<(usize, u32)>, call: Call<Answer>) -> Option<Answer> {
        let signal = Arc::new(Signal { ready: AtomicBool::new(false), shard: Arc::clone(&self.waker) });
        let key = self.running.insert(Running { conn, call, signal });
        self.poll(key)
    }
}

impl Shard {
    /// Has the chain answer a CONNECT or AUTH.
    pub(super) fn call_auth(&mut self, conn: usize, epoch: u32, call: Call<AuthOutcome>) {
        let call = Box::pin(async move { Answer::Auth { conn, epoch, outcome: call.await } });
        if let Some(answer) = self.calls.begin(Some((conn, epoch)), call) {
            self.on_answer(answer);
        }
    }

    pub(super) fn on_answer(&mut self, answer: Answer) {
        match answer {
            Answer::Auth { conn, epoch, outcome } => self.on_auth_outcome(conn, epoch, outcome),
            Answer::Packet { conn, epoch, accesses, decisions } => {
                self.on_packet_decisions(conn, epoch, &accesses, decisions);
            }
            Answer::Subscriptions { session, accesses, decisions } => {
                self.on_subscription_decisions(session, &accesses, decisions);
            }
            Answer::Stored { batch, answers } => self.on_stored(batch, answers),
            Answer::Opened { opened, loaded } => self.on_loaded(loaded, opened),
            Answer::Will { client, message, decisions } => self.on_will_decision(client, &message, &decisions),
        }
    }

    pub(super) fn run_calls(&mut self) {
        if self.calls.running.is_empty() {
            return;
        }
        let begun = Instant::now();
        while let Some(key) = self.calls.take_next() {
            if let Some(answer) = self.calls.poll(key) {
                self.on_answer(answer);
            }
            if begun.elapsed() >= TURN {
                break;
            }
        }
    }
}
