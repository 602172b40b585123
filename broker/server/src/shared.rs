//! What all shards see: the subscription index, retained messages, who lives where, counters.

use std::hash::BuildHasher;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak};
use std::time::Duration;

use hashbrown::{HashMap, HashSet};
use wasmqtt_protocol::ports::{BanPattern, Clock as _};
use wasmqtt_protocol::router::{Group, Index, Message, Retained, RetainedMessage, SessionId, SessionKey};

use crate::bans::Bans;
use crate::clock::BrokerClock;
use crate::config::Config;
use crate::mailbox::{Mail, Mailbox};
use crate::memory::Budget;
use crate::refusals::Refusals;
use crate::tunable::Tunables;

/// Buckets of route generations; a SUBSCRIBE empties the caches of topics in its own bucket only.
const BUCKETS: usize = 256;
/// Locks of the directory.
const DIRECTORY_LOCKS: usize = 64;

type Hasher = foldhash::fast::FixedState;
type Directory = HashMap<Arc<str>, SessionKey, foldhash::fast::RandomState>;

type StoredSessions = HashMap<SessionKey, SessionId, foldhash::fast::RandomState>;

pub(crate) struct Shared {
    /// What a reload of the configuration changes. Shards have a copy, see `Shard::limits`.
    pub(crate) tunables: Tunables,
    /// Time between two updates of `$SYS`; zero: none.
    pub(crate) sys_interval: Duration,
    /// Refused logins, as far as they are logged.
    pub(crate) refusals: Refusals,
    pub(crate) mailboxes: Vec<Mailbox>,
    pub(crate) stats: Stats,
    pub(crate) connections: AtomicUsize,
    /// Connections accepted so far.
    pub(crate) arrivals: AtomicU64,
    /// Those of them that have no CONNACK yet.
    pub(crate) connecting: Arc<AtomicUsize>,
    pub(crate) draining: AtomicBool,
    /// A proxy spoke its protocol to us, and the log says so.
    pub(crate) proxy_seen: AtomicBool,
    /// Connections of each shard, for placing new ones.
    pub(crate) load: Vec<AtomicUsize>,
    index: RwLock<Index>,
    retained: RwLock<Retained>,
    /// See [`Shared::interest_order`].
    interest: Mutex<()>,
    generations: Vec<AtomicU64>,
    /// For filters that begin with a wildcard: they match in every bucket.
    generation: AtomicU64,
    directory: Vec<Mutex<Directory>>,
    /// Sessions the store knows; empty when nothing is durable.
    stored: RwLock<StoredSessions>,
    pub(crate) full: FullSessions,
    pub(crate) memory: Budget,
    bans: RwLock<Bans>,
    /// Counts how often what plugins decided was revoked for everybody.
    pub(crate) revocations: AtomicU64,
    pub(crate) clock: Arc<BrokerClock>,
    /// What came out of the store and expires, while it is not sure how long no broker ran.
    restored: Mutex<Restored>,
}

/// Retained messages and bans of the store that expire.
#[derive(Default)]
pub(crate) struct Restored {
    pub(crate) retained: Vec<Weak<Message>>,
    pub(crate) bans: Vec<(BanPattern, u64)>,
}

/// Sessions that have no room, where publishers are to be told. Seldom any, so that looking costs one load.
#[derive(Default)]
pub(crate) struct FullSessions {
    count: AtomicUsize,
    keys: RwLock<HashSet<SessionKey, foldhash::fast::RandomState>>,
}

impl FullSessions {
    pub(crate) fn any(&self) -> bool {
        self.count.load(Ordering::Relaxed) > 0
    }

    /// One of these Sessions has no room, or all members of one of these groups.
    pub(crate) fn has<'g>(
        &self,
        mut sessions: impl Iterator<Item = SessionKey>,
        mut groups: impl Iterator<Item = &'g Group>,
    ) -> bool {
        let keys = self.keys.read().unwrap_or_else(PoisonError::into_inner);
        sessions.any(|key| keys.contains(&key))
            || groups.any(|group| {
                !group.members.is_empty() && group.members.iter().all(|member| keys.contains(&member.session))
            })
    }

    /// `false`: it was known.
    pub(crate) fn insert(&self, key: SessionKey) -> bool {
        let mut keys = self.keys.write().unwrap_or_else(PoisonError::into_inner);
        let is_new = keys.insert(key);
        self.count.store(keys.len(), Ordering::Relaxed);
        is_new
    }

    pub(crate) fn remove(&self, key: SessionKey) {
        let mut keys = self.keys.write().unwrap_or_else(PoisonError::into_inner);
        keys.remove(&key);
        self.count.store(keys.len(), Ordering::Relaxed);
    }
}

/// Counters behind `$SYS`; each shard adds at the end of a batch.
#[derive(Default)]
pub(crate) struct Stats {
    pub(crate) messages_received: AtomicU64,
    pub(crate) messages_sent: AtomicU64,
    pub(crate) messages_dropped: AtomicU64,
    pub(crate) bytes_received: AtomicU64,
    pub(crate) bytes_sent: AtomicU64,
    /// Messages whose receivers were not in a cache of routes, and had to be looked for in the index.
    pub(crate) routes_built: AtomicU64,
    pub(crate) sessions: AtomicUsize,
    pub(crate) subscriptions: AtomicUsize,
    /// Timers that are set, on all shards.
    pub(crate) timers: AtomicUsize,
}

impl Shared {
    pub(crate) fn new(config: Config, mailboxes: Vec<Mailbox>, clock: Arc<BrokerClock>) -> Self {
        let retained = Retained::new(config.limits.retained_messages_max, config.limits.retained_bytes_max);
        Self {
            tunables: Tunables::new(&config),
            sys_interval: config.sys_interval,
            refusals: Refusals::default(),
            load: mailboxes.iter().map(|_| AtomicUsize::new(0)).collect(),
            mailboxes,
            stats: Stats::default(),
            connections: AtomicUsize::new(0),
            arrivals: AtomicU64::new(0),
            connecting: Arc::default(),
            draining: AtomicBool::new(false),
            proxy_seen: AtomicBool::new(false),
            index: RwLock::default(),
            retained: RwLock::new(retained),
            interest: Mutex::default(),
            generations: (0..BUCKETS).map(|_| AtomicU64::new(0)).collect(),
            generation: AtomicU64::new(0),
            directory: (0..DIRECTORY_LOCKS).map(|_| Mutex::default()).collect(),
            stored: RwLock::default(),
            full: FullSessions::default(),
            memory: Budget::new(config.limits.memory_max),
            bans: RwLock::default(),
            revocations: AtomicU64::new(0),
            clock,
            restored: Mutex::default(),
        }
    }

    /// Broker time, see [`crate::clock`].
    pub(crate) fn now_ms(&self) -> u64 {
        self.clock.now_ms()
    }

    pub(crate) fn uptime_ms(&self) -> u64 {
        self.clock.uptime_ms()
    }

    /// What the store gave back, for [`Shared::look_at_clock`].
    pub(crate) fn set_restored(&self, restored: Restored) {
        *self.restored.lock().unwrap_or_else(PoisonError::into_inner) = restored;
    }

    /// Compares the broker's clock with that of the system, from time to time. Now and then that tells for how long no
    /// broker ran: what is older expires so much earlier.
    pub(crate) fn look_at_clock(&self) {
        let Some(correction) = self.clock.look() else { return };
        for mailbox in &self.mailboxes {
            mailbox.send(Mail::Aged(correction));
        }
        let restored = std::mem::take(&mut *self.restored.lock().unwrap_or_else(PoisonError::into_inner));
        // Of several starts with a wrong clock it is not known here what is older than which: the store tells the next.
        if correction.before_ms < self.clock.started_ms() {
            return;
        }
        {
            let mut retained = self.retained_mut();
            for old in restored.retained.iter().filter_map(Weak::upgrade) {
                let Some(now) = retained.get(&old.topic).filter(|now| Arc::ptr_eq(&now.message, &old)) else {
                    continue;
                };
                let aged = |message: &Arc<Message>| {
                    let mut message = (**message).clone();
                    message.expires_at_ms = message.expires_at_ms.map(|at| at.saturating_sub(correction.by_ms));
                    Arc::new(message)
                };
                let (message, kept_as) = (aged(&now.message), now.kept_as.as_ref().map(aged));
                let stamp = now.stamp;
                // It takes no more room than before.
                let _ = retained.restore(RetainedMessage { message, kept_as, stamp });
            }
        }
        self.bans_mut().age(&restored.bans, correction.by_ms);
    }

    pub(crate) fn index(&self) -> RwLockReadGuard<'_, Index> {
        self.index.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn index_mut(&self) -> RwLockWriteGuard<'_, Index> {
        self.index.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Held while subscriptions change and plugins are told of it, so that they hear of changes by several shards in the
    /// order in which these were made. The lock of the index is taken, and given back, under this one.
    pub(crate) fn interest_order(&self) -> MutexGuard<'_, ()> {
        self.interest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn retained(&self) -> RwLockReadGuard<'_, Retained> {
        self.retained.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn retained_mut(&self) -> RwLockWriteGuard<'_, Retained> {
        self.retained.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn bans(&self) -> RwLockReadGuard<'_, Bans> {
        self.bans.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn bans_mut(&self) -> RwLockWriteGuard<'_, Bans> {
        self.bans.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the Session of a client lives. Held while one is made or ended, so that there is never a second.
    pub(crate) fn directory(&self, client_id: &str) -> MutexGuard<'_, Directory> {
        let place = Hasher::default().hash_one(client_id) as usize % DIRECTORY_LOCKS;
        self.directory[place].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The name by which the store knows a Session; `None`: it does not.
    pub(crate) fn stored(&self, key: SessionKey) -> Option<SessionId> {
        self.stored_sessions().get(&key).copied()
    }

    /// The names of all Sessions that the store knows.
    pub(crate) fn stored_sessions(&self) -> RwLockReadGuard<'_, StoredSessions> {
        self.stored.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The store knows a Session from now on, or (`None`) no more.
    pub(crate) fn set_stored(&self, key: SessionKey, id: Option<SessionId>) {
        let mut stored = self.stored.write().unwrap_or_else(PoisonError::into_inner);
        match id {
            Some(id) => stored.insert(key, id),
            None => stored.remove(&key),
        };
    }

    fn bucket(topic_or_filter: &str) -> usize {
        let level = topic_or_filter.split('/').next().unwrap_or_default();
        Hasher::default().hash_one(level) as usize % BUCKETS
    }

    /// What a cached route of `topic` must carry to be valid. Read before the index is asked.
    pub(crate) fn route_generation(&self, bucket: u8) -> (u64, u64) {
        (self.generations[usize::from(bucket)].load(Ordering::Acquire), self.generation.load(Ordering::Acquire))
    }

    pub(crate) fn route_bucket(topic: &str) -> u8 {
        Self::bucket(topic) as u8
    }

    /// Subscriptions under `filter` changed.
    pub(crate) fn bump(&self, filter: &str) {
        if filter.starts_with(['+', '#']) {
            self.generation.fetch_add(1, Ordering::Release);
        } else {
            self.generations[Self::bucket(filter)].fetch_add(1, Ordering::Release);
        }
    }
}
