//! A broker without threads: its shards take their turns when they are told to, and time passes when it is told to.
//! For fuzzing and tests.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use wasmqtt_protocol::ports::{Plugins, Store};

use crate::acceptor::{Connecting, place};
use crate::clock::BrokerClock;
use crate::config::Config;
use crate::mailbox::Mailbox;
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
        let most = self.shared.tunables.current().limits.connecting_max;
        let arrival = Arrival {
            stream: Stream::Unix(mio::net::UnixStream::from_std(server)),
            address: None,
            listener: "stepped".into(),
            number: self.shared.arrivals.fetch_add(1, Ordering::Relaxed),
            proxied: false,
            connecting: Connecting::begin(&self.shared.connecting, most).expect("few connections"),
        };
        place(&self.shared, arrival);
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

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::sync::Mutex;
    use std::task::{Poll, Waker};

    use bytes::Bytes;
    use wasmqtt_protocol::ports::{AuthOutcome, AuthRequest, AuthStep, Call, Memory, ShardPlugins};

    use super::*;
    use crate::{Anonymous, Identity, Limits};

    /// Thinks until it is told to answer; then it challenges clients that have an Authentication Method.
    #[derive(Default, Clone)]
    struct Slow(Arc<Mutex<(bool, Vec<Waker>)>>);

    impl Slow {
        fn answer(&self) {
            let mut state = self.0.lock().unwrap();
            state.0 = true;
            state.1.drain(..).for_each(Waker::wake);
        }
    }

    impl Plugins for Slow {
        fn shard(&self, _index: usize) -> Box<dyn ShardPlugins> {
            Box::new(self.clone())
        }
    }

    impl ShardPlugins for Slow {
        fn has_auth(&self) -> bool {
            true
        }
        fn authenticate(&self, request: Arc<AuthRequest>) -> Call<AuthOutcome> {
            let state = Arc::clone(&self.0);
            Box::pin(std::future::poll_fn(move |context| {
                let mut state = state.lock().unwrap();
                if !state.0 {
                    state.1.push(context.waker().clone());
                    return Poll::Pending;
                }
                Poll::Ready(match request.method {
                    Some(_) => {
                        AuthOutcome::Challenge { data: Bytes::new(), state: Bytes::new(), plugin: "slow".into() }
                    }
                    None => AuthOutcome::Next,
                })
            }))
        }
        fn proceed(&self, _step: AuthStep) -> Call<AuthOutcome> {
            Box::pin(std::future::ready(AuthOutcome::Next))
        }
    }

    fn start(plugins: &dyn Plugins) -> Stepped {
        let config = Config {
            listeners: Vec::new(),
            anonymous: Anonymous::Allow,
            identity: Identity::default(),
            limits: Limits::default(),
            shards: 2,
            sys_interval: Duration::ZERO,
        };
        Stepped::new(config, plugins, &Memory)
    }

    fn received(client: &mut UnixStream) -> Vec<u8> {
        let mut bytes = vec![0; 4096];
        let count = client.read(&mut bytes).unwrap_or(0);
        bytes.truncate(count);
        bytes
    }

    /// Time passes for a client that must say something, not for one that waits for an answer.
    #[test]
    fn a_client_does_not_pay_for_the_time_that_plugins_take() {
        let plugins = Slow::default();
        let mut broker = start(&plugins);
        let mut silent = broker.connect();
        let mut plain = broker.connect();
        plain.write_all(b"\x10\x0d\x00\x04MQTT\x04\x02\x00\x00\x00\x01p").unwrap();
        // With Authentication Method "m".
        let mut enhanced = broker.connect();
        enhanced.write_all(b"\x10\x12\x00\x04MQTT\x05\x02\x00\x00\x04\x15\x00\x01m\x00\x01e").unwrap();
        broker.settle();
        assert_eq!(broker.connections(), 3);
        for _ in 0..3 {
            broker.skip(Duration::from_secs(11));
            broker.settle();
        }
        assert_eq!(broker.connections(), 2, "the silent one is gone");
        assert!(received(&mut silent).is_empty());
        plugins.answer();
        broker.settle();
        assert_eq!(received(&mut plain), b"\x20\x02\x00\x00");
        assert_eq!(received(&mut enhanced).first(), Some(&0xf0), "AUTH");
        // Now it is the client that is slow.
        broker.skip(Duration::from_secs(11));
        broker.settle();
        assert_eq!(broker.connections(), 1);
        drop(plain);
        broker.settle();
        assert_eq!((broker.connections(), broker.sessions()), (0, 0));
    }
}
