//! Accepts connections and gives each to the shard with the fewest.

use std::collections::BTreeSet;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use mio::{Events, Interest, Poll, Token, Waker};
use slab::Slab;
use tracing::{debug, warn};

use crate::config::Listener;
use crate::listening::{BindError, Listening, bind_all};
use crate::mailbox::Mail;
use crate::memory::Pressure;
use crate::shard::Arrival;
use crate::shared::Shared;

/// Pause after a failed accept (out of file descriptors, say), so as not to spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
const WAKE: Token = Token(usize::MAX);

/// What a reload wants of the acceptor.
pub(crate) enum Order {
    Serve(Listening),
    /// The listener of that name.
    Close(Arc<str>),
    /// Other settings for the listener of that name.
    Update(Listener),
}

/// Reaches the acceptor from other threads.
#[derive(Clone)]
pub(crate) struct AcceptorHandle {
    orders: Arc<Mutex<Vec<Order>>>,
    waker: Arc<Waker>,
}

impl AcceptorHandle {
    pub(crate) fn send(&self, orders: Vec<Order>) {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner).extend(orders);
        self.wake();
    }

    pub(crate) fn wake(&self) {
        let _ = self.waker.wake();
    }
}

/// Listening sockets, bound and not yet served.
pub(crate) struct Acceptor {
    poll: Poll,
    sockets: Slab<Listening>,
    handle: AcceptorHandle,
}

impl Acceptor {
    /// Binds all listeners.
    pub(crate) fn bind(listeners: &[Listener]) -> Result<Self, BindError> {
        let failed = |what: &str| {
            let what = what.to_owned();
            move |error| (what, error)
        };
        let poll = Poll::new().map_err(failed("epoll"))?;
        let waker = Arc::new(Waker::new(poll.registry(), WAKE).map_err(failed("eventfd"))?);
        let mut acceptor =
            Self { poll, sockets: Slab::new(), handle: AcceptorHandle { orders: Arc::default(), waker } };
        for listening in bind_all(listeners, listeners)? {
            let name = Arc::clone(&listening.listener.name);
            acceptor.serve(listening).map_err(failed(&name))?;
        }
        Ok(acceptor)
    }

    fn serve(&mut self, mut listening: Listening) -> io::Result<()> {
        let place = self.sockets.vacant_entry();
        self.poll.registry().register(listening.source(), Token(place.key()), Interest::READABLE)?;
        place.insert(listening);
        Ok(())
    }

    /// With the ports that were really taken.
    pub(crate) fn names(&self) -> Vec<String> {
        self.sockets.iter().map(|(_, listening)| listening.shown.clone()).collect()
    }

    pub(crate) fn handle(&self) -> AcceptorHandle {
        self.handle.clone()
    }

    /// Runs until woken while the broker drains.
    pub(crate) fn run(mut self, shared: &Shared) {
        let mut events = Events::with_capacity(64);
        // Listeners whose clients wait until there is memory again.
        let mut waiting = BTreeSet::new();
        while !shared.draining.load(Ordering::Acquire) {
            let timeout = (!waiting.is_empty()).then_some(ACCEPT_PAUSE);
            if let Err(error) = self.poll.poll(&mut events, timeout)
                && error.kind() != io::ErrorKind::Interrupted
            {
                warn!(%error, "waiting for connections failed");
                std::thread::sleep(ACCEPT_PAUSE);
            }
            waiting.extend(events.iter().map(|event| event.token().0));
            self.run_orders(&mut waiting);
            if waiting.is_empty() || shared.memory.look(shared.now_ms()) > Pressure::None {
                continue;
            }
            for place in std::mem::take(&mut waiting) {
                if let Some(listening) = self.sockets.get(place)
                    && !accept_all(listening, shared)
                {
                    waiting.insert(place);
                }
            }
        }
    }

    /// `waiting`: listeners that may have clients, although no event says so.
    fn run_orders(&mut self, waiting: &mut BTreeSet<usize>) {
        let orders = std::mem::take(&mut *self.handle.orders.lock().unwrap_or_else(PoisonError::into_inner));
        for order in orders {
            let (name, done) = match order {
                Order::Serve(listening) => {
                    let name = Arc::clone(&listening.listener.name);
                    let place = self.sockets.vacant_key();
                    let done = self.serve(listening);
                    // Who connected before it was watched causes no event.
                    waiting.insert(place);
                    (name, done)
                }
                Order::Close(name) => {
                    let done = match self.place(&name) {
                        Some(place) => {
                            let mut listening = self.sockets.remove(place);
                            self.poll.registry().deregister(listening.source())
                        }
                        None => Ok(()),
                    };
                    (name, done)
                }
                Order::Update(listener) => {
                    let name = Arc::clone(&listener.name);
                    let place = self.place(&name);
                    (name, place.map_or(Ok(()), |place| self.sockets[place].update(listener)))
                }
            };
            if let Err(error) = done {
                warn!(listener = %name, %error, "listener not changed as wanted");
            }
        }
    }

    fn place(&self, name: &str) -> Option<usize> {
        self.sockets.iter().find(|(_, listening)| *listening.listener.name == *name).map(|(place, _)| place)
    }
}

/// `false`: others still wait, since memory is nearly used up, or there is no file descriptor.
fn accept_all(listening: &Listening, shared: &Shared) -> bool {
    let name = &listening.listener.name;
    let tunable = shared.tunables.current();
    while shared.memory.look(shared.now_ms()) == Pressure::None {
        match listening.accept() {
            Ok((stream, address)) => {
                if let Some(connecting) = Connecting::begin(&shared.connecting, tunable.limits.connecting_max) {
                    let (listener, proxied) = (Arc::clone(name), listening.listener.proxied);
                    let number = shared.arrivals.fetch_add(1, Ordering::Relaxed);
                    let arrival = Arrival { stream, address, listener, number, proxied, connecting };
                    place(shared, arrival, tunable.limits.connections_max);
                } else {
                    debug!(listener = %name, "connection refused: limits.connecting_max reached");
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
            Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted) => {}
            Err(error) => {
                warn!(listener = %name, %error, "cannot accept a connection; is the limit of open files too low?");
                std::thread::sleep(ACCEPT_PAUSE);
                // Other listeners may be asked for something else than a descriptor.
                return false;
            }
        }
        if shared.draining.load(Ordering::Acquire) {
            return true;
        }
    }
    false
}

/// Counts a connection from accept until its client is let in, or gone.
pub(crate) struct Connecting(Arc<AtomicUsize>);

impl Connecting {
    /// `None`: there are too many.
    pub(crate) fn begin(all: &Arc<AtomicUsize>, most: usize) -> Option<Self> {
        let counted = Self(Arc::clone(all));
        (all.fetch_add(1, Ordering::Relaxed) < most).then_some(counted)
    }
}

impl Drop for Connecting {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

pub(crate) fn place(shared: &Shared, arrival: Arrival, connections_max: usize) {
    if shared.connections.fetch_add(1, Ordering::Relaxed) >= connections_max {
        shared.connections.fetch_sub(1, Ordering::Relaxed);
        debug!(listener = %arrival.listener, "connection refused: connections_max reached");
        return;
    }
    let least = shared.load.iter().enumerate().min_by_key(|(_, load)| load.load(Ordering::Relaxed));
    let shard = least.map_or(0, |(shard, _)| shard);
    shared.load[shard].fetch_add(1, Ordering::Relaxed);
    shared.mailboxes[shard].send(Mail::Arrived(arrival));
}
