//! How shards and the acceptor talk to a shard.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, PoisonError};

use hashbrown::HashMap;
use mio::Waker;
use wasmqtt_protocol::codec::ReasonCode;
use wasmqtt_protocol::ports::{Access, Correction, Outgoing};
use wasmqtt_protocol::router::{Group, Message, MessageId, SessionKey, Target};

use crate::Explained;
use crate::shard::{Adopted, Arrival};

/// Bytes waiting in one mailbox beyond which the senders stop reading from their clients, and plugins are refused.
const CONGESTED_BYTES: usize = 16 << 20;
/// What an entry costs beside what it holds.
const MAIL_BYTES: usize = 128;

/// Something for another shard.
pub(crate) enum Mail {
    /// A new connection. As many as `connections_max` lets in.
    Arrived(Arrival),
    /// A connection that was accepted, for a Session that lives here. As many as `connections_max` lets in.
    Adopt(Box<Adopted>),
    /// Messages for Sessions here.
    Deliver(Vec<Remote>),
    /// A plugin publishes.
    Publish(Box<Outgoing>),
    /// A plugin has messages that the store kept for it. As many as plugins may have waiting.
    Fed(Arc<str>, Vec<MessageId>),
    /// The store is to know of bans.
    KeepBans,
    /// The client of this Session was banned.
    Banned(SessionKey),
    /// Somebody wants to know what a client may do; they wait for the answer.
    Explain { client_id: Arc<str>, access: Access, reply: SyncSender<Option<Explained>> },
    /// What was stored before some start of the broker is older than it seemed.
    Aged(Correction),
    /// Say goodbye to everybody.
    Drain,
}

impl Mail {
    fn bytes(&self) -> usize {
        MAIL_BYTES
            + match self {
                Self::Deliver(remotes) => remotes.iter().map(Remote::bytes).sum(),
                Self::Publish(outgoing) => outgoing.payload.len() + outgoing.topic.len() + outgoing.properties.len(),
                Self::Fed(plugin, ids) => plugin.len() + size_of_val(&ids[..]),
                Self::Explain { access, .. } => access.topic.len(),
                Self::Arrived(_) | Self::Adopt(_) | Self::KeepBans | Self::Banned(_) | Self::Aged(_) | Self::Drain => 0,
            }
    }
}

/// What plugins want of one client. Wanted twice it is the same, so that no more than one waits for each Session.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Wish {
    /// What plugins decided for it is asked again.
    pub(crate) revoke: bool,
    /// It is to go, for this reason.
    pub(crate) disconnect: Option<ReasonCode>,
}

/// One message and its receivers on the shard it is sent to.
pub(crate) struct Remote {
    pub(crate) message: Arc<Message>,
    /// The form that the store keeps, where that is another: for members of Shared Subscriptions that may leave.
    pub(crate) kept_as: Option<Arc<Message>>,
    pub(crate) targets: Arc<[Target]>,
    pub(crate) share: Option<Arc<Group>>,
    /// The name under which the store keeps it for those targets that it knows.
    pub(crate) id: Option<MessageId>,
}

impl Remote {
    fn bytes(&self) -> usize {
        let of = |message: &Message| message.payload.len() + message.topic.len() + message.properties.len();
        of(&self.message) + self.kept_as.as_deref().map_or(0, of) + size_of_val(&*self.targets) + MAIL_BYTES
    }
}

/// What waits for a shard.
#[derive(Default)]
pub(crate) struct Waiting {
    pub(crate) mails: Vec<Mail>,
    pub(crate) wishes: HashMap<Arc<str>, Wish, foldhash::fast::RandomState>,
    /// Somebody was banned; who is in may have to go.
    pub(crate) is_ban_new: bool,
    bytes: usize,
}

/// One per shard. Bytes are bounded by [`CONGESTED_BYTES`] plus what each sender reads in one batch.
pub(crate) struct Mailbox {
    waiting: Mutex<Waiting>,
    bytes: AtomicUsize,
    /// Of messages that storage hooks see and no client waits for.
    held_bytes: AtomicUsize,
    awake: AtomicBool,
    waker: Arc<Waker>,
}

impl Mailbox {
    pub(crate) fn new(waker: Arc<Waker>) -> Self {
        let (bytes, held_bytes) = (AtomicUsize::new(0), AtomicUsize::new(0));
        Self { waiting: Mutex::default(), bytes, held_bytes, awake: AtomicBool::new(false), waker }
    }

    pub(crate) fn waker(&self) -> &Arc<Waker> {
        &self.waker
    }

    pub(crate) fn send(&self, mail: Mail) {
        let bytes = mail.bytes();
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.add(|waiting| {
            waiting.bytes += bytes;
            waiting.mails.push(mail);
        });
    }

    /// A plugin wants something of a client, which has a Session here.
    pub(crate) fn wish(&self, client_id: &str, wish: Wish) {
        self.add(|waiting| {
            let known = waiting.wishes.entry(client_id.into()).or_default();
            known.revoke |= wish.revoke;
            known.disconnect = known.disconnect.or(wish.disconnect);
        });
    }

    /// Somebody was banned.
    pub(crate) fn announce_ban(&self) {
        self.add(|waiting| waiting.is_ban_new = true);
    }

    /// Has the shard take a turn: plugins changed, or decisions were revoked.
    pub(crate) fn wake(&self) {
        // One wake-up until the shard has looked: an eventfd write costs more than the message.
        if !self.awake.swap(true, Ordering::AcqRel) {
            let _ = self.waker.wake();
        }
    }

    fn add(&self, add: impl FnOnce(&mut Waiting)) {
        add(&mut self.waiting.lock().unwrap_or_else(PoisonError::into_inner));
        self.wake();
    }

    /// Moves everything into `waiting`, which must be empty.
    pub(crate) fn take(&self, waiting: &mut Waiting) {
        debug_assert!(waiting.mails.is_empty() && waiting.wishes.is_empty() && !waiting.is_ban_new);
        if !self.awake.swap(false, Ordering::AcqRel) {
            return;
        }
        std::mem::swap(&mut *self.waiting.lock().unwrap_or_else(PoisonError::into_inner), waiting);
    }

    /// What was taken is done.
    pub(crate) fn done(&self, waiting: &mut Waiting) {
        self.bytes.fetch_sub(std::mem::take(&mut waiting.bytes), Ordering::Relaxed);
    }

    /// A message that no client waits for is shown to storage hooks.
    pub(crate) fn hold(&self, bytes: usize) {
        self.held_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// It was.
    pub(crate) fn release(&self, bytes: usize) {
        self.held_bytes.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Messages of plugins wait, here or for other plugins, and more must not.
    pub(crate) fn refuses_plugins(&self) -> bool {
        self.is_congested() || self.held_bytes.load(Ordering::Relaxed) > CONGESTED_BYTES
    }

    pub(crate) fn is_congested(&self) -> bool {
        self.bytes.load(Ordering::Relaxed) > CONGESTED_BYTES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mailbox() -> (mio::Poll, Mailbox) {
        let poll = mio::Poll::new().expect("epoll");
        let waker = Waker::new(poll.registry(), mio::Token(0)).expect("eventfd");
        (poll, Mailbox::new(Arc::new(waker)))
    }

    fn remote(bytes: usize) -> Remote {
        let message = Message {
            topic: "t".into(),
            payload: bytes::Bytes::new(),
            properties: vec![0; bytes].into(),
            qos: wasmqtt_protocol::codec::Qos::AtMostOnce,
            retain: false,
            expires_at_ms: None,
            publisher: None,
        };
        Remote { message: Arc::new(message), targets: Arc::from([]), share: None, id: None, kept_as: None }
    }

    #[test]
    fn every_byte_counts_until_it_is_done() {
        let (_poll, mailbox) = mailbox();
        let half = CONGESTED_BYTES / 2 + 1;
        mailbox.send(Mail::Deliver(vec![remote(half)]));
        assert!(!mailbox.is_congested());
        mailbox.send(Mail::Deliver(vec![remote(half)]));
        assert!(mailbox.is_congested(), "properties count like payloads");
        let mut waiting = Waiting::default();
        mailbox.take(&mut waiting);
        assert!(mailbox.is_congested(), "taken is not done");
        waiting.mails.clear();
        mailbox.done(&mut waiting);
        assert!(!mailbox.is_congested());
        assert_eq!(mailbox.bytes.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn what_is_wanted_of_one_client_waits_once() {
        let (_poll, mailbox) = mailbox();
        for _ in 0..1000 {
            mailbox.wish("c", Wish { revoke: true, ..Wish::default() });
            mailbox.wish("c", Wish { disconnect: Some(ReasonCode::NOT_AUTHORIZED), ..Wish::default() });
            mailbox.wish("c", Wish { disconnect: Some(ReasonCode::SERVER_BUSY), ..Wish::default() });
            mailbox.announce_ban();
        }
        let mut waiting = Waiting::default();
        mailbox.take(&mut waiting);
        let expected = Wish { revoke: true, disconnect: Some(ReasonCode::NOT_AUTHORIZED) };
        assert_eq!(waiting.wishes.drain().collect::<Vec<_>>(), [("c".into(), expected)]);
        assert!(std::mem::take(&mut waiting.is_ban_new) && waiting.mails.is_empty());
        mailbox.take(&mut waiting);
        assert!(waiting.mails.is_empty(), "nothing new");
    }
}
