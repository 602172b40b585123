//! How shards and the acceptor talk to a shard.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, PoisonError};

use mio::Waker;
use wasmqtt_protocol::codec::ReasonCode;
use wasmqtt_protocol::ports::{Access, BanPattern, Outgoing};
use wasmqtt_protocol::router::{Group, Message, MessageId, Target};

use crate::Explained;
use crate::shard::{Adopted, Arrival};

/// Bytes of messages waiting in one mailbox beyond which the senders stop reading from their clients.
const CONGESTED_BYTES: usize = 16 << 20;

/// Something for another shard.
pub(crate) enum Mail {
    /// A new connection.
    Arrived(Arrival),
    /// A connection that was accepted, for a Session that lives here.
    Adopt(Box<Adopted>),
    /// Messages for Sessions here.
    Deliver(Vec<Remote>),
    /// What plugins decided for a client is asked again.
    Revoke(Arc<str>),
    /// A plugin publishes.
    Publish(Box<Outgoing>),
    /// A plugin wants a client to go.
    Disconnect(Arc<str>, ReasonCode),
    /// A plugin has messages that the store kept for it.
    Fed(Arc<str>, Vec<MessageId>),
    /// The store is to know of a ban.
    KeepBan(BanPattern, u64, Box<str>),
    /// Somebody was banned; who is in may have to go.
    Banned,
    /// Plugins changed, or decisions were revoked.
    Look,
    /// Somebody wants to know what a client may do.
    Explain { client_id: Arc<str>, access: Access, reply: SyncSender<Option<Explained>> },
    /// Say goodbye to everybody.
    Drain,
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
    pub(crate) fn bytes(&self) -> usize {
        self.message.payload.len() + self.message.topic.len() + 128
    }
}

pub(crate) fn outgoing_bytes(outgoing: &Outgoing) -> usize {
    outgoing.payload.len() + outgoing.topic.len() + outgoing.properties.len() + 128
}

/// One per shard. Message bytes are bounded by [`CONGESTED_BYTES`] plus what each sender reads in one batch.
pub(crate) struct Mailbox {
    mails: Mutex<Vec<Mail>>,
    bytes: AtomicUsize,
    awake: AtomicBool,
    waker: Arc<Waker>,
}

impl Mailbox {
    pub(crate) fn new(waker: Arc<Waker>) -> Self {
        Self { mails: Mutex::default(), bytes: AtomicUsize::new(0), awake: AtomicBool::new(false), waker }
    }

    pub(crate) fn waker(&self) -> &Arc<Waker> {
        &self.waker
    }

    pub(crate) fn send(&self, mail: Mail) {
        let bytes = match &mail {
            Mail::Deliver(remotes) => remotes.iter().map(Remote::bytes).sum(),
            Mail::Publish(outgoing) => outgoing_bytes(outgoing),
            _ => 0,
        };
        if bytes > 0 {
            self.bytes.fetch_add(bytes, Ordering::Relaxed);
        }
        self.mails.lock().unwrap_or_else(PoisonError::into_inner).push(mail);
        // One wake-up until the shard has looked: an eventfd write costs more than the message.
        if !self.awake.swap(true, Ordering::AcqRel) {
            let _ = self.waker.wake();
        }
    }

    /// Moves everything into `mails`, which must be empty.
    pub(crate) fn take(&self, mails: &mut Vec<Mail>) {
        if !self.awake.swap(false, Ordering::AcqRel) {
            return;
        }
        std::mem::swap(&mut *self.mails.lock().unwrap_or_else(PoisonError::into_inner), mails);
    }

    pub(crate) fn delivered(&self, bytes: usize) {
        self.bytes.fetch_sub(bytes, Ordering::Relaxed);
    }

    pub(crate) fn is_congested(&self) -> bool {
        self.bytes.load(Ordering::Relaxed) > CONGESTED_BYTES
    }
}
