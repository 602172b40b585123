//! A broker without threads: its shards take their turns when they are told to, and time passes when it is told to.
//! For fuzzing and tests.

#[cfg(test)]
mod tests;

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use wasmqtt_protocol::ports::{Plugins, Store};

use crate::acceptor::{Connecting, place};
use crate::clock::BrokerClock;
use crate::config::Config;
use crate::mailbox::{Mail, Mailbox};
use crate::shard::{self, Arrival, News, Sessions, Shard};
use crate::shared::Shared;
use crate::stream::Stream;

/// Turns in which a broker must have done everything that clients and plugins wanted.
const TURNS_MAX: usize = 100_000;
/// Who waits for less than this looks again and again.
const PAUSE: Duration = Duration::from_millis(1);

/// See the module.
pub struct Stepped {
    shared: Arc<Shared>,
    shards: Vec<Shard>,
    news: News,
}

impl Stepped {
    /// Listeners of `config` are not bound. Nothing that `store` has is read.
    ///
    /// # Panics
    /// The system has no file descriptors left.
    pub fn new(config: Config, plugins: &dyn Plugins, store: &dyn Store) -> Self {
        let polls: Vec<_> = (0..config.shards.max(1)).map(|_| shard::poll().expect("an epoll")).collect();
        let mailboxes = polls.iter().map(|(_, waker)| Mailbox::new(Arc::clone(waker))).collect();
        let shared = Arc::new(Shared::new(config, mailboxes, Arc::new(BrokerClock::start(None))));
        let shard = |(index, (poll, waker)): (usize, (mio::Poll, Arc<mio::Waker>))| {
            let store = store.shard(index, Box::new(move || drop(waker.wake())));
            Shard::new(index, poll, Arc::clone(&shared), Sessions::new(index as u16), plugins.shard(index), store)
        };
        let shards = polls.into_iter().enumerate().map(shard).collect();
        Self { shared, shards, news: News::default() }
    }

    /// The client's end of a new connection, which does not block. It goes to the shard with the fewest connections.
    ///
    /// # Panics
    /// The system has no file descriptors left, or `connecting_max` is reached.
    pub fn connect(&self) -> UnixStream {
        let (client, server) = UnixStream::pair().expect("two sockets");
        for end in [&client, &server] {
            end.set_nonblocking(true).expect("a socket");
        }
        let limits = self.shared.tunables.current().limits.clone();
        let arrival = Arrival {
            stream: Stream::Unix(mio::net::UnixStream::from_std(server)),
            address: None,
            listener: "stepped".into(),
            number: self.shared.arrivals.fetch_add(1, Ordering::Relaxed),
            proxied: false,
            connecting: Connecting::begin(&self.shared.connecting, limits.connecting_max).expect("few connections"),
        };
        place(&self.shared, arrival, limits.connections_max);
        client
    }

    /// Moves time forward.
    pub fn skip(&self, time: Duration) {
        self.shared.clock.skip(time.as_millis() as u64);
    }

    /// Each shard in turn, until none has anything to do.
    ///
    /// # Panics
    /// There is no end to it.
    pub fn settle(&mut self) {
        for _ in 0..TURNS_MAX {
            let mut is_quiet = true;
            for shard in &mut self.shards {
                shard.turn(&mut self.news, Some(Duration::ZERO));
                is_quiet &= self.news.events.is_empty();
            }
            if is_quiet && self.shards.iter().all(|shard| shard.wait_for().is_none_or(|wait| wait > PAUSE)) {
                return;
            }
        }
        panic!("the broker does not come to rest");
    }

    /// Begins to end the broker.
    pub fn drain(&self) {
        self.shared.mailboxes.iter().for_each(|mailbox| mailbox.send(Mail::Drain));
    }

    /// All shards have ended.
    pub fn is_done(&self) -> bool {
        self.shards.iter().all(Shard::is_done)
    }

    /// Network Connections, those included that have not sent CONNECT.
    pub fn connections(&self) -> usize {
        self.shared.connections.load(Ordering::Relaxed)
    }

    /// Sessions, of offline clients too.
    pub fn sessions(&self) -> usize {
        self.shared.stats.sessions.load(Ordering::Relaxed)
    }

    /// Subscriptions of all Sessions.
    pub fn subscriptions(&self) -> usize {
        self.shared.stats.subscriptions.load(Ordering::Relaxed)
    }

    /// Timers that are set.
    pub fn timers(&self) -> usize {
        self.shared.stats.timers.load(Ordering::Relaxed)
    }
}
