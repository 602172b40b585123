//! What the store has kept becomes the broker's state again, before anybody connects.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use hashbrown::HashSet;
use tracing::{info, warn};
use wasmqtt_protocol::access::Permits;
use wasmqtt_protocol::ports::{
    Accepted, BanPattern, Client, Plugins, Restore, RestoredSession, ShardPlugins, Store, StoreError, Submission,
};
use wasmqtt_protocol::router::{Message, MessageId, RetainedMessage};
use wasmqtt_protocol::session::Session;

use crate::shard::{Sessions, Standing};
use crate::shared::{Restored, Shared};

/// Sealed retained messages that storage hooks open at a time.
const SEALED_MAX: usize = 1024;

/// Fills `shared`, and the Sessions of each shard.
pub(crate) fn restore(
    store: &dyn Store,
    shared: &Shared,
    plugins: &dyn Plugins,
    runtime: &tokio::runtime::Handle,
) -> Result<Vec<Sessions>, StoreError> {
    let begun = std::time::Instant::now();
    let shards = (0..shared.mailboxes.len()).map(|shard| Sessions::new(shard as u16)).collect();
    let mut filling = Filling {
        shared,
        shards,
        texts: HashSet::new(),
        now_ms: shared.now_ms(),
        next: 0,
        retained: 0,
        sealed: Vec::new(),
        expiring: Restored::default(),
        plugins: plugins.shard(0),
        all_plugins: plugins,
        runtime,
    };
    store.restore(&mut filling)?;
    filling.open_sealed();
    let Filling { shards, next: sessions, retained, expiring, .. } = filling;
    shared.set_restored(expiring);
    if sessions + retained > 0 {
        info!(sessions, retained, took_ms = begun.elapsed().as_millis() as u64, "store read");
    }
    Ok(shards)
}

struct Filling<'a> {
    shared: &'a Shared,
    shards: Vec<Sessions>,
    /// Names that many clients share.
    texts: HashSet<Arc<str>>,
    now_ms: u64,
    next: usize,
    retained: usize,
    /// With their stamps.
    sealed: Vec<(Message, u64)>,
    expiring: Restored,
    plugins: Box<dyn ShardPlugins>,
    all_plugins: &'a dyn Plugins,
    runtime: &'a tokio::runtime::Handle,
}

impl Filling<'_> {
    fn one_text(&mut self, text: Arc<str>) -> Arc<str> {
        Arc::clone(self.texts.get_or_insert(text))
    }

    fn keep_retained(&mut self, message: Arc<Message>, kept_as: Option<Arc<Message>>, stamp: u64) {
        self.retained += 1;
        let topic = message.topic.clone();
        let expiring = message.expires_at_ms.map(|_| Arc::downgrade(&message));
        if self.shared.retained_mut().restore(RetainedMessage { message, kept_as, stamp }).is_err() {
            warn!(%topic, "retained message left out: there are too many");
        } else {
            self.expiring.retained.extend(expiring);
        }
    }

    /// Has storage hooks open what they have sealed.
    fn open_sealed(&mut self) {
        if self.sealed.is_empty() {
            return;
        }
        let submit =
            |message: Message| Submission { plugins: u64::MAX, client: None, message: Arc::new(message), fed: None };
        let (sealed, stamps): (Vec<Submission>, Vec<u64>) =
            std::mem::take(&mut self.sealed).into_iter().map(|(message, stamp)| (submit(message), stamp)).unzip();
        let opened = self.runtime.block_on(self.plugins.after_load(sealed.clone()));
        for ((sealed, stamp), opened) in sealed.iter().zip(stamps).zip(opened) {
            match opened {
                Accepted::Keep(message) | Accepted::Seal { delivered: message, .. } => {
                    self.keep_retained(message, Some(Arc::clone(&sealed.message)), stamp);
                }
                Accepted::Discard(_) => {
                    warn!(topic = %sealed.message.topic, "a sealed retained message cannot be opened");
                }
            }
        }
    }
}

impl Restore for Filling<'_> {
    fn session(&mut self, from: RestoredSession) {
        let RestoredSession { session: name, client, expiry, closed_at_ms, will, subscriptions, .. } = from;
        let shared = self.shared;
        let sessions = &mut self.shards[self.next % shared.mailboxes.len()];
        self.next += 1;
        let key = sessions.reserve();
        let client_id = client.client_id;
        let mut session =
            Session::restored(Arc::clone(&client_id), key, name, expiry, from.parked, from.inflight, from.received);
        session.queue_policy = shared.tunables.current().queue_policy(&client.listener);
        let closed_ms = closed_at_ms.unwrap_or(self.now_ms);
        let will_ms = will.as_ref().map(|will| closed_ms + u64::from(will.delay.min(expiry)) * 1000);
        session.will = will.map(Box::new);
        {
            let mut index = shared.index_mut();
            for (filter, subscription) in subscriptions {
                match filter.share() {
                    Some(share) => {
                        let availability = Arc::clone(session.availability());
                        index.subscribe_shared(share, filter.topic_filter(), key, subscription, availability);
                    }
                    None => {
                        index.subscribe(filter.topic_filter(), key, subscription);
                    }
                }
                session.subscribe(filter, subscription);
                shared.stats.subscriptions.fetch_add(1, Ordering::Relaxed);
            }
        }
        for (filter, replay) in from.replays {
            shared.retained_mut().raise_stamp(replay.until);
            if session.subscription(&filter).is_some() {
                session.begin_replay(filter, replay);
            }
        }
        shared.stats.sessions.fetch_add(1, Ordering::Relaxed);
        shared.directory(&client_id).insert(Arc::clone(&client_id), key);
        shared.set_stored(key, Some(name));
        sessions.put(session);
        sessions.replace_deadlines(key.slot, Some(closed_ms + u64::from(expiry) * 1000), will_ms);
        let principal =
            if client.principal == client_id { Arc::clone(&client_id) } else { self.one_text(client.principal) };
        let listener = self.one_text(client.listener);
        let client = Arc::new(Client { client_id, principal, listener });
        let standing = Standing::new(client, Permits::default());
        self.shards[usize::from(key.shard)].set_standing(key.slot, Some(Box::new(standing)));
    }

    fn retained(&mut self, message: Message, sealed: bool, stamp: u64) {
        if !sealed {
            return self.keep_retained(Arc::new(message), None, stamp);
        }
        self.sealed.push((message, stamp));
        if self.sealed.len() >= SEALED_MAX {
            self.open_sealed();
        }
    }

    fn fed(&mut self, plugin: &str, id: MessageId, client: Option<Client>, message: Message, sealed: bool) -> bool {
        let (client, message) = (client.map(Arc::new), Arc::new(message));
        let mut sent = Submission { plugins: u64::MAX, client, message, fed: Some(id) };
        if sealed {
            let opened = self.runtime.block_on(self.plugins.after_load(vec![sent.clone()]));
            let Some(Accepted::Keep(message)) = opened.into_iter().next() else { return true };
            sent.message = message;
        }
        self.all_plugins.feed_again(plugin, sent)
    }

    fn ban(&mut self, pattern: BanPattern, until_ms: u64, note: &str) {
        self.shared.bans_mut().restore(pattern.clone(), until_ms, note);
        self.expiring.bans.push((pattern, until_ms));
    }
}
