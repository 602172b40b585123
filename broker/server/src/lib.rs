//! `wasmqtt-server`: shards, listeners and everything between sockets and the protocol core.
//!
//! Knows plugins only as the traits in `wasmqtt_protocol::ports`; never names wasmtime.
#![forbid(unsafe_code)]

mod acceptor;
mod bans;
mod clock;
pub mod config;
mod control;
mod listening;
mod mailbox;
mod memory;
mod refusals;
mod reload;
mod restore;
mod shard;
mod shared;
#[cfg(any(test, feature = "fuzzing"))]
pub mod stepped;
mod stream;
mod tunable;
mod watch;

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

use wasmqtt_protocol::access::Verdict;
use wasmqtt_protocol::ports::{Access, Client, Clock, Plugins, Store, StoreError};

pub use config::{Anonymous, Bind, ClientIdTaken, Config, Identity, Limits, Listener};
pub use reload::{PreparedListeners, Reloader};
pub use watch::Watch;

use crate::acceptor::{Acceptor, AcceptorHandle};
use crate::clock::BrokerClock;
use crate::control::Control;
use crate::mailbox::{Mail, Mailbox};
use crate::shard::Shard;
use crate::shared::Shared;

/// Why the server did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// An address could not be listened on.
    #[error("cannot listen on {listener}: {error}")]
    Listen {
        /// As configured.
        listener: String,
        /// What the system said.
        error: io::Error,
    },
    /// The system refused a thread or an epoll.
    #[error("cannot start a shard: {0}")]
    Shard(io::Error),
    /// What the store has kept cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// How long a shard may take to answer a question of an operator.
const EXPLAIN_TIMEOUT: Duration = Duration::from_secs(5);

/// What decides about an access, as far as the broker itself knows.
#[derive(Debug, Clone)]
pub struct Explained {
    /// Who it is about.
    pub client: Arc<Client>,
    /// It has a Network Connection.
    pub connected: bool,
    /// What decides, in words, and what it says; `None`: `acl` plugins are asked, and without any it is allowed.
    pub known: Option<(String, Verdict)>,
}

/// Answers questions about a running broker.
#[derive(Clone)]
pub struct Inspector(Arc<Shared>);

/// How much the broker has to do.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Status {
    /// Network Connections, those included that have not sent CONNECT.
    pub connections: usize,
    /// Sessions, of offline clients too.
    pub sessions: usize,
    /// Subscriptions of all Sessions.
    pub subscriptions: usize,
    /// PUBLISH packets from clients since the start.
    pub messages_received: u64,
    /// PUBLISH packets to clients since the start.
    pub messages_sent: u64,
    /// Messages that were dropped since the start.
    pub messages_dropped: u64,
    /// Since the start.
    pub uptime_secs: u64,
}

impl std::fmt::Display for Status {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { connections, sessions, subscriptions, uptime_secs, .. } = self;
        let Self { messages_received, messages_sent, messages_dropped, .. } = self;
        write!(
            out,
            "{connections} connections, {sessions} Sessions, {subscriptions} subscriptions; since {uptime_secs} s: \
             {messages_received} messages received, {messages_sent} sent, {messages_dropped} dropped"
        )
    }
}

impl Inspector {
    /// Figures of now.
    pub fn status(&self) -> Status {
        let (shared, stats) = (&self.0, &self.0.stats);
        Status {
            connections: shared.connections.load(Ordering::Relaxed),
            sessions: stats.sessions.load(Ordering::Relaxed),
            subscriptions: stats.subscriptions.load(Ordering::Relaxed),
            messages_received: stats.messages_received.load(Ordering::Relaxed),
            messages_sent: stats.messages_sent.load(Ordering::Relaxed),
            messages_dropped: stats.messages_dropped.load(Ordering::Relaxed),
            uptime_secs: shared.uptime_ms() / 1000,
        }
    }

    /// What is known about an access of a client without asking plugins; `None`: it has no Session here.
    pub fn explain(&self, client_id: &str, access: Access) -> Option<Explained> {
        let key = self.0.directory(client_id).get(client_id).copied()?;
        let (reply, answer) = sync_channel(1);
        let client_id = client_id.into();
        self.0.mailboxes[usize::from(key.shard)].send(Mail::Explain { client_id, access, reply });
        answer.recv_timeout(EXPLAIN_TIMEOUT).ok().flatten()
    }
}

/// A running broker.
pub struct Server {
    shared: Arc<Shared>,
    listeners: Vec<String>,
    acceptor_handle: AcceptorHandle,
    watch: Watch,
}

impl Server {
    /// Binds all listeners and serves them. `store` keeps what must survive; `runtime` is where plugins wait for clocks
    /// and files.
    ///
    /// # Errors
    /// [`StartError`] names the listener that could not be bound.
    pub fn start(
        config: Config,
        plugins: Arc<dyn Plugins>,
        store: Arc<dyn Store>,
        runtime: tokio::runtime::Handle,
    ) -> Result<Self, StartError> {
        let acceptor =
            Acceptor::bind(&config.listeners).map_err(|(listener, error)| StartError::Listen { listener, error })?;
        let count = match config.shards {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            count => count,
        };
        let polls: Vec<_> = (0..count).map(|_| shard::poll()).collect::<io::Result<_>>().map_err(StartError::Shard)?;
        let mailboxes = polls.iter().map(|(_, waker)| Mailbox::new(Arc::clone(waker))).collect();
        let clock = Arc::new(BrokerClock::start(store.clock_row()?.as_deref()));
        store.set_clock(Arc::clone(&clock) as Arc<dyn Clock>);
        // The store holds the clock, so the clock must not hold the store.
        let to_store = Arc::downgrade(&store);
        clock.on_change(Box::new(move || {
            if let Some(store) = to_store.upgrade() {
                store.clock_changed();
            }
        }));
        let shared = Arc::new(Shared::new(config, mailboxes, clock));
        plugins.attach(Arc::new(Control(Arc::clone(&shared))));
        let restored = restore::restore(&*store, &shared, &*plugins, &runtime)?;
        plugins.fed_again();
        let mut threads = Vec::new();
        for (index, ((poll, waker), sessions)) in polls.into_iter().zip(restored).enumerate() {
            let (shared, plugins, runtime) = (Arc::clone(&shared), Arc::clone(&plugins), runtime.clone());
            let store = Arc::clone(&store);
            let thread = std::thread::Builder::new().name(format!("shard-{index}")).spawn(move || {
                let _entered = runtime.enter();
                let wake = Box::new(move || drop(waker.wake()));
                let (plugins, store) = (plugins.shard(index), store.shard(index, wake));
                Shard::new(index, poll, shared, sessions, plugins, store).run();
            });
            threads.push(thread.map_err(StartError::Shard)?);
        }
        let listeners = acceptor.names();
        let acceptor_handle = acceptor.handle();
        let for_acceptor = Arc::clone(&shared);
        let acceptor = std::thread::Builder::new()
            .name("acceptor".into())
            .spawn(move || acceptor.run(&for_acceptor))
            .map_err(StartError::Shard)?;
        threads.push(acceptor);
        let watch = Watch { shared: Arc::clone(&shared), threads: Arc::new(threads) };
        Ok(Self { shared, listeners, acceptor_handle, watch })
    }

    /// For whoever ends the broker when a thread of the server has ended.
    pub fn watch(&self) -> Watch {
        self.watch.clone()
    }

    /// For questions of operators; outlives the server, and then knows nobody.
    pub fn inspector(&self) -> Inspector {
        Inspector(Arc::clone(&self.shared))
    }

    /// Changes settings while it runs.
    pub fn reloader(&self) -> Reloader {
        Reloader::new(Arc::clone(&self.shared), self.acceptor_handle.clone())
    }

    /// The listeners with the ports they really have, such as `mqtt://127.0.0.1:1883`.
    pub fn listeners(&self) -> &[String] {
        &self.listeners
    }

    /// Timers that are set, on all shards: a few for each connection and each Session, and none for those that are gone.
    pub fn timers(&self) -> usize {
        self.shared.stats.timers.load(Ordering::Relaxed)
    }

    /// Stops accepting, tells MQTT 5 clients (0x8B), writes what is waiting for at most `grace`, and returns.
    pub fn stop(self, grace: Duration) {
        self.shared.draining.store(true, Ordering::Release);
        self.acceptor_handle.wake();
        for mailbox in &self.shared.mailboxes {
            mailbox.send(Mail::Drain);
        }
        let until = Instant::now() + grace;
        while !self.watch.all_ended() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
