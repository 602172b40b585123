//! A shard: one thread with its own epoll, connections, Sessions and plugin instances.
//!
//! Nothing here is locked or shared but what `shared` holds. Each turn of [`Shard::run`] takes what the sockets, the
//! mailbox, the plugins and the clock have, and then writes to each client once.

mod acl;
mod auth;
mod banned;
mod calls;
mod close;
mod conn;
mod connect;
mod durable;
mod gate;
mod hooks;
mod promises;
mod publish;
mod read;
mod replay;
mod routes;
mod sessions;
mod subscribe;
mod sys;
mod takeover;
mod timers;
mod wills;

use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use hashbrown::HashMap;
use mio::{Events, Poll, Token, Waker};
use slab::Slab;
use tracing::error;
use wasmqtt_protocol::codec::ReasonCode;
use wasmqtt_protocol::ports::{ShardPlugins, ShardStore};
use wasmqtt_protocol::router::{Matches, RetainedMessage, SessionKey};
use wasmqtt_protocol::session::{FrameCache, ServerLimits};

pub(crate) use self::conn::Arrival;
pub(crate) use self::connect::Adopted;
pub(crate) use self::sessions::{Sessions, Standing};

use self::calls::Calls;
use self::close::Ending;
use self::conn::{Conn, State};
use self::durable::Durable;
use self::hooks::Hooks;
use self::read::Share;
use self::routes::Routes;
use self::sessions::Sweep;
use self::takeover::Takeover;
use self::timers::Timers;
use self::wills::WillUnderWay;
use crate::mailbox::{Mail, Remote, Waiting};
use crate::memory::{self, Pressure};
use crate::shared::Shared;
use crate::tunable::Tunable;

const WAKE: Token = Token(usize::MAX);
/// Bytes one read takes at most; the buffer belongs to the shard, so idle connections own none. What does not fit into
/// the turn of its client waits in a buffer of its own, of no more than this and one packet.
const SCRATCH_BYTES: usize = 64 * 1024;
/// Events taken from the kernel at a time.
const EVENTS_MAX: usize = 1024;
/// Empty outbound buffers kept for reuse, and the largest one worth keeping.
const POOL_BUFFERS_MAX: usize = 256;
const POOL_BUFFER_BYTES_MAX: usize = 64 * 1024;
/// Clients that one turn says goodbye to when the broker ends.
const DRAINED_PER_TURN: usize = 1000;
/// Once a turn has served its clients for so long, those that have sent more wait for the next one.
const FURTHER_SHARES: Duration = Duration::from_millis(2);
/// How long a congested shard waits before it looks again.
const CONGESTION_PAUSE: Duration = Duration::from_millis(1);

/// How often a shard looks whether there is memory again.
const PRESSURE_PAUSE: Duration = Duration::from_millis(50);

/// The epoll of a shard and what wakes it.
pub(crate) fn poll() -> io::Result<(Poll, Arc<Waker>)> {
    let poll = Poll::new()?;
    let waker = Arc::new(Waker::new(poll.registry(), WAKE)?);
    Ok((poll, waker))
}

/// What a turn takes from the kernel and from other threads; empty in between.
pub(crate) struct News {
    pub(crate) events: Events,
    waiting: Waiting,
}

impl Default for News {
    fn default() -> Self {
        Self { events: Events::with_capacity(EVENTS_MAX), waiting: Waiting::default() }
    }
}

/// Counters of one batch, added to the shared ones at its end.
#[derive(Default)]
struct Tally {
    received: u64,
    sent: u64,
    dropped: u64,
    bytes_received: u64,
    bytes_sent: u64,
}

pub(crate) struct Shard {
    index: u16,
    poll: Poll,
    shared: Arc<Shared>,
    /// Settings in force since the last turn in which their generation had changed.
    tunable: Arc<Tunable>,
    limits: Arc<ServerLimits>,
    tunable_generation: u64,
    plugins: Box<dyn ShardPlugins>,
    durable: Durable,
    conns: Slab<Conn>,
    conn_epoch: u32,
    sessions: Sessions,
    routes: Routes,
    timers: Timers,
    calls: Calls,
    hooks: Hooks,
    /// Connections with something to write.
    dirty: Vec<usize>,
    /// Connections that have their share of the next turn without an event, each once.
    readable: Vec<(usize, u32)>,
    /// Connections that are not read because others do not keep up, each once.
    paused: Vec<(usize, u32)>,
    /// What each connection may have of this turn.
    share: Share,
    /// Connections whose Sessions others wait for.
    takeovers: Vec<Takeover>,
    /// Connections that go to another shard at the end of the batch.
    leaving: Vec<usize>,
    /// Messages for other shards, by shard.
    outgoing: Vec<Vec<Remote>>,
    scratch: Vec<u8>,
    pool: Vec<Vec<u8>>,
    frames: FrameCache,
    matches: Matches,
    tally: Tally,
    now_ms: u64,
    /// How near the broker is to its memory budget.
    pressure: Pressure,
    /// Another shard does not keep up with what this one sends.
    is_congested: bool,
    /// When publishers that were slowed down for that are read again.
    slowed_until_ms: u64,
    /// Plugins and revocations that the Sessions here know of.
    plugins_epoch: [u64; 3],
    /// A plugin decides what clients may do.
    has_acl: bool,
    draining: bool,
    /// Places of connections that were said goodbye to.
    drained: usize,
    /// Sessions here that have no room and whose publishers are told so.
    full: Vec<SessionKey>,
    /// Sessions with retained messages that can be sent now.
    replays: VecDeque<SessionKey>,
    /// Those whose store cannot take more at present.
    held_replays: BTreeSet<SessionKey>,
    /// Retained messages that a turn has found; empty in between.
    found: Vec<RetainedMessage>,
    /// Will Messages that plugins think about.
    wills: HashMap<SessionKey, WillUnderWay>,
    /// Calls under way about whether they may be published.
    wills_asked: usize,
    /// Subscriptions are asked about again.
    revoked: Sweep,
    /// Somebody was banned.
    banned: Sweep,
    /// Where the next look for expired messages begins.
    swept: u32,
}

impl Shard {
    pub(crate) fn new(
        index: usize,
        poll: Poll,
        shared: Arc<Shared>,
        sessions: Sessions,
        plugins: Box<dyn ShardPlugins>,
        store: Box<dyn ShardStore>,
    ) -> Self {
        let index = index as u16;
        let waker = Arc::clone(shared.mailboxes[usize::from(index)].waker());
        let tunable_generation = shared.tunables.generation();
        let tunable = shared.tunables.current();
        let routes = Routes::new(tunable.limits.route_cache_bytes_max);
        let mut shard = Self {
            index,
            limits: Arc::clone(&tunable.for_sessions),
            tunable,
            tunable_generation,
            poll,
            durable: Durable::new(store),
            conns: Slab::new(),
            conn_epoch: 0,
            sessions,
            routes,
            timers: Timers::default(),
            calls: Calls::new(waker),
            hooks: Hooks::default(),
            dirty: Vec::new(),
            readable: Vec::new(),
            paused: Vec::new(),
            share: Share::of(1),
            takeovers: Vec::new(),
            leaving: Vec::new(),
            outgoing: shared.mailboxes.iter().map(|_| Vec::new()).collect(),
            scratch: vec![0; SCRATCH_BYTES],
            pool: Vec::new(),
            frames: FrameCache::default(),
            matches: Matches::default(),
            tally: Tally::default(),
            now_ms: shared.now_ms(),
            pressure: Pressure::None,
            is_congested: false,
            slowed_until_ms: 0,
            plugins_epoch: [u64::MAX; 3],
            has_acl: plugins.has_acl(),
            plugins,
            draining: false,
            drained: 0,
            full: Vec::new(),
            replays: VecDeque::new(),
            held_replays: BTreeSet::new(),
            found: Vec::new(),
            wills: HashMap::new(),
            wills_asked: 0,
            revoked: Sweep::default(),
            banned: Sweep::default(),
            swept: 0,
            shared,
        };
        shard.look_for_changes();
        shard.start_deadlines();
        shard.start_housekeeping();
        shard
    }

    /// Serves until drained.
    pub(crate) fn run(mut self) {
        let mut news = News::default();
        while !self.is_done() {
            let timeout = self.wait_for();
            self.turn(&mut news, timeout);
        }
    }

    /// It is to end, and what its clients sent, and their wills, are where they belong.
    pub(crate) fn is_done(&self) -> bool {
        self.draining && self.conns.is_empty() && self.hooks.is_empty() && self.wills_asked == 0
    }

    /// Waits for something to do, for at most `timeout`, and does it.
    pub(crate) fn turn(&mut self, news: &mut News, timeout: Option<Duration>) {
        let News { events, waiting } = news;
        if let Err(error) = self.poll.poll(events, timeout)
            && error.kind() != io::ErrorKind::Interrupted
        {
            error!(shard = self.index, %error, "epoll failed");
            std::thread::sleep(CONGESTION_PAUSE);
        }
        self.now_ms = self.shared.now_ms();
        self.look_for_settings();
        self.look_at_memory();
        self.look_at_mailboxes();
        self.take_mail(waiting);
        self.end_pauses();
        self.serve_sockets(events);
        self.look_for_changes();
        self.run_sweeps();
        self.run_calls();
        self.run_takeovers();
        self.run_timers();
        self.run_hooks();
        self.run_loads();
        self.run_replays();
        self.run_leaving();
        self.run_drain();
        self.flush_all();
    }

    fn look_for_settings(&mut self) {
        let generation = self.shared.tunables.generation();
        if self.tunable_generation != generation {
            self.tunable_generation = generation;
            self.tunable = self.shared.tunables.current();
            self.limits = Arc::clone(&self.tunable.for_sessions);
            self.routes.limit(self.tunable.limits.route_cache_bytes_max);
        }
    }

    /// Each connection that has sent something gets one share of the turn, by an event or because it was held back, and
    /// further ones while the turn is short: what is written at its end is worth a system call.
    fn serve_sockets(&mut self, events: &Events) {
        let again = std::mem::take(&mut self.readable);
        let begun = (!again.is_empty() || !events.is_empty()).then(Instant::now);
        self.share = Share::of(again.len() + events.iter().filter(|event| event.is_readable()).count());
        for event in events {
            let Token(id) = event.token();
            if event.token() == WAKE {
                continue;
            }
            if event.is_writable() {
                self.on_writable(id);
            }
            if event.is_error() || event.is_read_closed() {
                self.on_read_closed(id);
            }
            let has_news = event.is_readable() || event.is_error() || event.is_read_closed();
            if has_news && self.conns.get(id).is_some_and(|conn| !conn.held) {
                self.on_readable(id);
            }
        }
        self.serve_held(again);
        while !self.readable.is_empty() && begun.is_some_and(|begun| begun.elapsed() < FURTHER_SHARES) {
            let again = std::mem::take(&mut self.readable);
            self.serve_held(again);
        }
    }

    fn serve_held(&mut self, held: Vec<(usize, u32)>) {
        for (id, epoch) in held {
            if self.is_current(id, epoch) {
                debug_assert!(self.conns[id].held, "who is on the list knows it");
                self.conns[id].held = false;
                self.on_readable(id);
            }
        }
    }

    /// How long there is nothing to do unless a socket, the mailbox or a plugin has something; `None`: for ever.
    pub(crate) fn wait_for(&self) -> Option<Duration> {
        let drains = self.draining && self.drained < self.conns.capacity();
        let is_sweeping = self.revoked.is_under_way() || self.banned.is_under_way();
        if drains || is_sweeping || self.calls.any_ready() || !self.readable.is_empty() || !self.replays.is_empty() {
            return Some(Duration::ZERO);
        }
        let timer = self.timers.next_ms().map(|at| Duration::from_millis(at.saturating_sub(self.now_ms)));
        let pause = (!self.paused.is_empty() || !self.takeovers.is_empty()).then_some(CONGESTION_PAUSE);
        let pressure = (self.pressure > Pressure::None).then_some(PRESSURE_PAUSE);
        timer.into_iter().chain(pause).chain(pressure).min()
    }

    fn look_at_memory(&mut self) {
        self.pressure = self.shared.memory.look(self.now_ms);
        if self.pressure > Pressure::None {
            memory::collect();
        }
    }

    fn look_at_mailboxes(&mut self) {
        let own = usize::from(self.index);
        let mut others = self.shared.mailboxes.iter().enumerate().filter(|(shard, _)| *shard != own);
        self.is_congested = others.any(|(_, mailbox)| mailbox.is_congested());
    }

    fn on_mail(&mut self, mail: Mail) {
        match mail {
            Mail::Arrived(arrival) => self.on_arrival(arrival),
            Mail::Adopt(adopted) => self.on_adopt(*adopted),
            Mail::Deliver(remotes) => self.on_remotes(&remotes),
            Mail::Publish(outgoing) => self.on_outgoing(*outgoing),
            Mail::Explain { client_id, access, reply } => drop(reply.try_send(self.explain(&client_id, &access))),
            Mail::KeepBans => self.store_bans(),
            Mail::Fed(plugin, ids) => ids.iter().for_each(|id| self.durable.write_fed(&plugin, *id)),
            Mail::Banned(key) => self.on_banned(key),
            Mail::Aged(correction) => self.age(correction),
            Mail::Drain => self.draining = true,
        }
    }

    fn take_mail(&mut self, waiting: &mut Waiting) {
        let shared = Arc::clone(&self.shared);
        let mailbox = &shared.mailboxes[usize::from(self.index)];
        mailbox.take(waiting);
        for mail in waiting.mails.drain(..) {
            self.on_mail(mail);
        }
        for (client_id, wish) in waiting.wishes.drain() {
            if wish.revoke {
                self.on_revoke(&client_id);
            }
            if let Some(reason) = wish.disconnect {
                self.on_disconnect_wanted(&client_id, reason);
            }
        }
        if std::mem::take(&mut waiting.is_ban_new) {
            self.end_banned();
        }
        mailbox.done(waiting);
    }

    /// Says goodbye to some more clients.
    fn run_drain(&mut self) {
        if !self.draining {
            return;
        }
        let until = (self.drained + DRAINED_PER_TURN).min(self.conns.capacity());
        for id in std::mem::replace(&mut self.drained, until)..until {
            if self.conns.get(id).is_some_and(|conn| !matches!(conn.state, State::Lingering)) {
                self.end(id, Ending::Server(ReasonCode::SERVER_SHUTTING_DOWN, "broker is shutting down"));
            }
        }
    }

    /// End of a batch: one write per client, one message per shard.
    fn flush_all(&mut self) {
        // The store has what it is to keep before another shard may tell it what became of that.
        self.durable.hand_over();
        for shard in 0..self.outgoing.len() {
            if !self.outgoing[shard].is_empty() {
                let remotes = std::mem::take(&mut self.outgoing[shard]);
                self.shared.mailboxes[shard].send(Mail::Deliver(remotes));
            }
        }
        self.release_committed();
        self.feed_plugins();
        // Flushing can make room for queued messages of the same client, never of another.
        let mut dirty = std::mem::take(&mut self.dirty);
        for id in dirty.drain(..) {
            self.flush(id);
        }
        if self.dirty.is_empty() {
            self.dirty = dirty;
        }
        self.look_for_room();
        // Refilling may have begun handshakes.
        self.durable.hand_over();
        let tally = std::mem::take(&mut self.tally);
        let stats = &self.shared.stats;
        self.timers.count(&stats.timers);
        for (counter, value) in [
            (&stats.messages_received, tally.received),
            (&stats.messages_sent, tally.sent),
            (&stats.messages_dropped, tally.dropped),
            (&stats.bytes_received, tally.bytes_received),
            (&stats.bytes_sent, tally.bytes_sent),
            (&stats.routes_built, self.routes.take_built()),
        ] {
            if value > 0 {
                counter.fetch_add(value, Ordering::Relaxed);
            }
        }
    }
}
