//! Plugin calls under way on this shard, polled by hand between sockets.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use hashbrown::HashMap;
use slab::Slab;
use smallvec::SmallVec;
use wasmqtt_protocol::access::Decision;
use wasmqtt_protocol::ports::{Accepted, Access, AuthOutcome, Call, Client, Loaded};
use wasmqtt_protocol::router::{Message, SessionKey};

use super::Shard;

/// Time one turn spends on plugin calls, before clients get theirs; a guest that computes yields about once a
/// millisecond.
const TURN: Duration = Duration::from_millis(1);
/// Calls that compute for longer than a guest may without yielding, of those that begin in one turn. Further ones are
/// polled first when their turn comes.
const SLOW_BEGINS_MAX: usize = 2;

/// Calls that want to be polled, in the order in which they were woken. Bounded: each call is in it at most once.
#[derive(Default)]
struct Ready(Mutex<VecDeque<usize>>);

impl Ready {
    fn keys(&self) -> MutexGuard<'_, VecDeque<usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Signal {
    key: usize,
    /// It is in `all`.
    ready: AtomicBool,
    all: Arc<Ready>,
    shard: Arc<mio::Waker>,
}

impl Wake for Signal {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }
    fn wake_by_ref(self: &Arc<Self>) {
        if !self.ready.swap(true, Ordering::AcqRel) {
            self.all.keys().push_back(self.key);
            let _ = self.shard.wake();
        }
    }
}

/// What plugins were asked about a client.
pub(super) struct Asked {
    pub(super) accesses: Arc<[Access]>,
    /// See [`Standing::revoked`](super::sessions::Standing::revoked).
    pub(super) revoked: u32,
}

/// What a call comes back with, and for whom.
pub(super) enum Answer {
    /// For the CONNECT or AUTH of a connection.
    Auth { conn: usize, epoch: u32, outcome: AuthOutcome },
    /// For a packet that waits for it.
    Packet { conn: usize, epoch: u32, asked: Asked, decisions: Vec<Decision> },
    /// For subscriptions that were made earlier.
    Subscriptions { session: SessionKey, client: Arc<Client>, asked: Asked, decisions: Vec<Decision> },
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
    /// Those that end with a connection, by its place.
    of_conns: HashMap<usize, SmallVec<[usize; 1]>, foldhash::fast::RandomState>,
    ready: Arc<Ready>,
    waker: Arc<mio::Waker>,
    /// Calls that began since the last turn and yielded.
    slow_begins: usize,
}

impl Calls {
    pub(super) fn new(waker: Arc<mio::Waker>) -> Self {
        Self { running: Slab::new(), of_conns: HashMap::default(), ready: Arc::default(), waker, slow_begins: 0 }
    }

    pub(super) fn any_ready(&self) -> bool {
        !self.running.is_empty() && !self.ready.keys().is_empty()
    }

    /// Drops the calls of a connection that is gone.
    pub(super) fn cancel(&mut self, conn: usize, epoch: u32) {
        let Some(mut keys) = self.of_conns.remove(&conn) else { return };
        keys.retain(|key| {
            let is_over = self.running.get(*key).is_none_or(|running| running.conn == Some((conn, epoch)));
            if is_over {
                drop(self.running.try_remove(*key));
            }
            !is_over
        });
        if !keys.is_empty() {
            self.of_conns.insert(conn, keys);
        }
    }

    /// The call that was woken first. One that ended meanwhile may have left its key to another call, which is then
    /// polled once too often.
    fn take_next(&mut self) -> Option<usize> {
        loop {
            let key = self.ready.keys().pop_front()?;
            if self.running.contains(key) {
                return Some(key);
            }
        }
    }

    fn poll(&mut self, key: usize) -> Option<Answer> {
        let running = self.running.get_mut(key)?;
        running.signal.ready.store(false, Ordering::Release);
        let waker = Waker::from(Arc::clone(&running.signal));
        let Poll::Ready(answer) = running.call.as_mut().poll(&mut Context::from_waker(&waker)) else { return None };
        let ended = self.running.remove(key);
        if let Some((conn, _)) = ended.conn
            && let Some(keys) = self.of_conns.get_mut(&conn)
        {
            keys.retain(|other| *other != key);
            if keys.is_empty() {
                self.of_conns.remove(&conn);
            }
        }
        Some(answer)
    }

    /// Begins a call and polls it once: most are done by then. `conn` ends it when it ends.
    pub(super) fn begin(&mut self, conn: Option<(usize, u32)>, call: Call<Answer>) -> Option<Answer> {
        let entry = self.running.vacant_entry();
        let (key, all) = (entry.key(), Arc::clone(&self.ready));
        let signal = Arc::new(Signal { key, ready: AtomicBool::new(false), all, shard: Arc::clone(&self.waker) });
        entry.insert(Running { conn, call, signal: Arc::clone(&signal) });
        let answer = if self.slow_begins >= SLOW_BEGINS_MAX {
            signal.wake_by_ref();
            None
        } else {
            self.poll(key)
        };
        if let (None, Some((conn, _))) = (&answer, conn) {
            self.of_conns.entry(conn).or_default().push(key);
        }
        // It was woken while it was polled: it computes.
        self.slow_begins += usize::from(answer.is_none() && signal.ready.load(Ordering::Acquire));
        answer
    }

    /// Calls under way.
    fn len(&self) -> usize {
        self.running.len()
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
            Answer::Packet { conn, epoch, asked, decisions } => {
                self.on_packet_decisions(conn, epoch, &asked, decisions);
            }
            Answer::Subscriptions { session, client, asked, decisions } => {
                self.on_subscription_decisions(session, &client, &asked, decisions);
            }
            Answer::Stored { batch, answers } => self.on_stored(batch, answers),
            Answer::Opened { opened, loaded } => self.on_loaded(loaded, opened),
            Answer::Will { client, message, decisions } => self.on_will_decision(client, &message, &decisions),
        }
    }

    pub(super) fn run_calls(&mut self) {
        self.calls.slow_begins = 0;
        if self.calls.running.is_empty() {
            return;
        }
        // Clients whose own call is under way do not count: they wait for it anyway.
        self.plugins.set_crowded(self.conns.len() > self.calls.len());
        let begun = Instant::now();
        // Not those that are woken meanwhile: each call gets one turn.
        let ready = self.calls.ready.keys().len();
        for _ in 0..ready {
            let Some(key) = self.calls.take_next() else { break };
            if let Some(answer) = self.calls.poll(key) {
                self.on_answer(answer);
            }
            if begun.elapsed() >= TURN {
                break;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pending for so many polls, waking itself at once, as a guest does that computes.
    fn computing(polls: usize) -> Call<Answer> {
        let mut left = polls;
        Box::pin(std::future::poll_fn(move |context| {
            if left == 0 {
                return Poll::Ready(Answer::Auth { conn: 0, epoch: 0, outcome: AuthOutcome::Next });
            }
            left -= 1;
            context.waker().wake_by_ref();
            Poll::Pending
        }))
    }

    fn calls() -> (mio::Poll, Calls) {
        let poll = mio::Poll::new().expect("epoll");
        let waker = Arc::new(mio::Waker::new(poll.registry(), mio::Token(0)).expect("a waker"));
        (poll, Calls::new(waker))
    }

    #[test]
    fn calls_that_compute_take_turns() {
        let (_poll, mut calls) = calls();
        assert!(calls.begin(None, computing(0)).is_some(), "done at once");
        assert!(!calls.any_ready());
        for _ in 0..2 {
            assert!(calls.begin(None, computing(3)).is_none());
        }
        let order: Vec<usize> =
            (0..6).filter_map(|_| calls.take_next().inspect(|key| drop(calls.poll(*key)))).collect();
        assert_eq!(order, [0, 1, 0, 1, 0, 1]);
        assert!(calls.running.is_empty() && !calls.any_ready());
    }

    #[test]
    fn what_begins_behind_slow_calls_waits_for_its_turn() {
        let (_poll, mut calls) = calls();
        for _ in 0..SLOW_BEGINS_MAX {
            assert!(calls.begin(None, computing(1)).is_none());
        }
        assert!(calls.begin(None, computing(0)).is_none(), "not polled in this turn");
        assert_eq!(calls.ready.keys().len(), SLOW_BEGINS_MAX + 1);
    }

    #[test]
    fn keys_of_calls_that_are_gone_are_skipped() {
        let (_poll, mut calls) = calls();
        assert!(calls.begin(Some((1, 1)), computing(5)).is_none());
        calls.cancel(1, 1);
        assert_eq!(calls.take_next(), None);
        assert!(!calls.any_ready());
    }
}
