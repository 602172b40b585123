//! A store that notes what it is told, and commits when the test says so.

use std::num::NonZeroU64;
use std::sync::{Arc, Mutex};

use wasmqtt_protocol::ports::{Change, Load, Loaded, Restore, ShardStore, Store, StoreError, Ticket};
use wasmqtt_protocol::router::{MessageId, SessionId};

#[derive(Default)]
struct Log {
    changes: Vec<(Ticket, String)>,
    commits_at_once: bool,
    batch: Ticket,
    is_open: bool,
    committed: Ticket,
    failed: Vec<Ticket>,
    is_congested: bool,
    is_failing: bool,
    names: u64,
    wake: Option<Box<dyn Fn() + Send + Sync>>,
}

/// Commits when the test says so.
#[derive(Default, Clone)]
pub(crate) struct Slow(Arc<Mutex<Log>>);

impl Slow {
    /// Commits each batch when it ends.
    pub(crate) fn at_once() -> Self {
        let store = Self::default();
        store.0.lock().unwrap().commits_at_once = true;
        store
    }

    /// From now on it commits when the test says so.
    pub(crate) fn hang(&self) {
        self.0.lock().unwrap().commits_at_once = false;
    }

    pub(crate) fn commit_all(&self) {
        let mut log = self.0.lock().unwrap();
        log.committed = log.batch;
        if let Some(wake) = &log.wake {
            wake();
        }
    }

    /// Commits one batch more.
    pub(crate) fn commit_one(&self) {
        let mut log = self.0.lock().unwrap();
        log.committed = log.batch.min(log.committed + 1);
        if let Some(wake) = &log.wake {
            wake();
        }
    }

    /// Nothing of what waits can be written.
    pub(crate) fn fail_all(&self) {
        {
            let mut log = self.0.lock().unwrap();
            let failed = log.committed + 1..=log.batch;
            log.failed.extend(failed);
        }
        self.commit_all();
    }

    /// Nothing can be written at present, or it can again.
    pub(crate) fn refuse(&self, is_failing: bool) {
        self.0.lock().unwrap().is_failing = is_failing;
    }

    pub(crate) fn congest(&self, is_congested: bool) {
        self.0.lock().unwrap().is_congested = is_congested;
    }

    fn next(&self) -> NonZeroU64 {
        let mut log = self.0.lock().unwrap();
        log.names += 1;
        NonZeroU64::new(log.names).expect("not zero")
    }

    /// It was told something like this since [`Self::take`].
    pub(crate) fn was_told(&self, part: &str) -> bool {
        self.0.lock().unwrap().changes.iter().any(|(_, change)| change.contains(part))
    }

    /// What it was told since the last time.
    pub(crate) fn take(&self) -> Vec<String> {
        self.take_batches().into_iter().map(|(_, change)| change).collect()
    }

    /// The same, with the number of the batch that each is in.
    pub(crate) fn take_batches(&self) -> Vec<(Ticket, String)> {
        std::mem::take(&mut self.0.lock().unwrap().changes)
    }
}

impl Store for Slow {
    fn restore(&self, _to: &mut dyn Restore) -> Result<(), StoreError> {
        Ok(())
    }

    fn shard(&self, _index: usize, wake: Box<dyn Fn() + Send + Sync>) -> Box<dyn ShardStore> {
        self.0.lock().unwrap().wake = Some(wake);
        Box::new(self.clone())
    }
}

fn told(change: Change<'_>) -> String {
    match change {
        Change::Session { client, expiry, closed_at_ms, will, .. } => {
            let will = if will.is_some() { " with will" } else { "" };
            let what = if closed_at_ms.is_some() { "closed" } else { "opened" };
            format!("{what} {} {expiry}{will}", client.client_id)
        }
        Change::SessionEnded { session } => format!("ended {session}"),
        Change::Subscribed { session, filter, .. } => format!("subscribed {session} {}", filter.as_str()),
        Change::Unsubscribed { session, filter } => format!("unsubscribed {session} {}", filter.as_str()),
        Change::Queued { id, message, receivers, .. } => {
            let receivers: Vec<_> = receivers.iter().map(|to| format!("{}:{:?}", to.session, to.wish.qos)).collect();
            format!("queued {id} {} {}", message.topic, receivers.join(","))
        }
        Change::Step { session, step } => format!("{session} {step:?}"),
        Change::Replay { session, filter, .. } => format!("replay {session} {}", filter.as_str()),
        Change::ReplayEnded { session, filter } => format!("replayed {session} {}", filter.as_str()),
        Change::Retained { message, .. } => format!("retained {}", message.topic),
        Change::RetainedRemoved { topic, .. } => format!("removed {topic}"),
        Change::Fed { id, .. } | Change::FedDone { id, .. } => format!("fed {id}"),
        Change::Ban { note, .. } => format!("ban {note}"),
    }
}

impl ShardStore for Slow {
    fn is_durable(&self) -> bool {
        true
    }

    fn is_failing(&self) -> bool {
        self.0.lock().unwrap().is_failing
    }

    fn is_congested(&self) -> bool {
        self.0.lock().unwrap().is_congested
    }

    fn take_failed(&mut self) -> Vec<Ticket> {
        std::mem::take(&mut self.0.lock().unwrap().failed)
    }

    fn new_session(&mut self) -> SessionId {
        self.next()
    }

    fn new_message(&mut self) -> MessageId {
        self.next()
    }

    fn write(&mut self, change: Change<'_>) {
        let mut log = self.0.lock().unwrap();
        if !log.is_open {
            log.is_open = true;
            log.batch += 1;
        }
        let batch = log.batch;
        log.changes.push((batch, told(change)));
    }

    fn commit(&mut self) {
        let mut log = self.0.lock().unwrap();
        log.is_open = false;
        if log.commits_at_once && log.committed < log.batch {
            log.committed = log.batch;
            if let Some(wake) = &log.wake {
                wake();
            }
        }
    }

    fn ticket(&self) -> Ticket {
        self.0.lock().unwrap().batch
    }

    fn committed(&self) -> Ticket {
        self.0.lock().unwrap().committed
    }

    fn load(&mut self, _load: Load) {}

    fn loaded(&mut self) -> Vec<Loaded> {
        Vec::new()
    }
}
