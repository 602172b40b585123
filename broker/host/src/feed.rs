//! Messages for `committed`: those that wait for their turn, and those that the plugin could not take.
//!
//! A message that fails again and again while others succeed is set aside, so that what is behind it goes on. It stays
//! in the store, with a note beside it, until an operator has it tried again or skips it, or until newer ones that are
//! set aside need its room.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use wasmqtt_protocol::ports::Buckets as Store;
use wasmqtt_protocol::text::escaped;

use crate::config::PluginLimits;
use crate::hook::Shown;
use crate::queue::{ITEM_OVERHEAD_BYTES, Queue, Weight};

/// Messages that are set aside for one plugin, whatever their size.
const ASIDE_MAX: usize = 10_000;
/// Bytes of the text that says why a message was not taken.
const ERROR_BYTES_MAX: usize = 1024;
/// Messages of each kind that a list shows.
const LISTED_MAX: usize = 200;
/// Bytes of a payload that are shown.
const PAYLOAD_SHOWN_BYTES: usize = 1024;
/// In the store, notes lie where no plugin can reach: no plugin has such a name.
const NOTES: &str = "\u{1}feed/";

impl Weight for Shown {
    fn bytes(&self) -> usize {
        let client = self
            .client
            .as_ref()
            .map_or(0, |client| client.client_id.len() + client.principal.len() + client.listener.len());
        let message = &self.message;
        2 * ITEM_OVERHEAD_BYTES + message.topic.len() + message.payload.len() + message.properties.len() + client
    }
}

/// A message that the plugin could not take.
struct Aside {
    number: u64,
    shown: Shown,
    note: Note,
}

/// What the store keeps about a message that is set aside.
#[derive(Clone)]
struct Note {
    tries: u32,
    error: String,
}

impl Note {
    fn read(row: &[u8]) -> Option<Self> {
        let (tries, error) = std::str::from_utf8(row).ok()?.split_once('\n')?;
        Some(Self { tries: tries.parse().ok()?, error: error.to_owned() })
    }
}

impl Aside {
    fn bytes(&self) -> usize {
        self.shown.bytes() + self.note.error.len()
    }
}

#[derive(Default)]
struct Kept {
    aside: VecDeque<Aside>,
    bytes: usize,
    next: u64,
    /// Notes in the store whose messages have not come from there yet, by the name of the message.
    notes: BTreeMap<u64, Note>,
}

/// The message that is tried now: the oldest that waits.
#[derive(Default, Clone)]
struct Trying {
    number: u64,
    /// How often it failed alone.
    tries: u32,
    error: String,
}

/// All messages of one plugin that it has not taken.
pub(crate) struct Feed {
    pub(crate) waiting: Queue<Shown>,
    kept: Mutex<Kept>,
    trying: Mutex<Trying>,
    aside_bytes_max: usize,
    aside_dropped: AtomicU64,
    tries_max: u32,
    store: Option<(Arc<dyn Store>, String)>,
}

/// A message that waits or is set aside, as operators see it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct FedMessage {
    /// Its number; holds until the broker ends.
    pub id: String,
    /// It could not be taken, and what was behind it went on.
    pub aside: bool,
    /// Topic Name.
    pub topic: String,
    /// Client Identifier of its publisher, if a client published it.
    pub client_id: Option<String>,
    /// QoS it was published with.
    pub qos: u8,
    /// RETAIN flag it was published with.
    pub retain: bool,
    /// Bytes of the payload.
    pub payload_bytes: usize,
    /// Bytes of the properties.
    pub property_bytes: usize,
    /// Bytes that count against the bounds.
    pub bytes: usize,
    /// How often it failed alone.
    pub tries: u32,
    /// Why it failed the last time.
    pub error: Option<String>,
    /// The beginning of the payload; only where one message is shown.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub payload: Option<String>,
}

/// Messages of one plugin that it has not taken, as operators see them.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct FeedList {
    /// How many wait.
    pub waiting: usize,
    /// Their bytes.
    pub waiting_bytes: usize,
    /// How many are set aside.
    pub aside: usize,
    /// Their bytes.
    pub aside_bytes: usize,
    /// How many were dropped, because too many waited or were set aside.
    pub dropped: u64,
    /// Those that are set aside, then those that wait, oldest first; 200 of each at most.
    pub messages: Vec<FedMessage>,
}

impl Feed {
    pub(crate) fn new(plugin: &str, limits: &PluginLimits, store: Option<&Arc<dyn Store>>) -> Self {
        let store = store.map(|store| (Arc::clone(store), format!("{NOTES}{plugin}")));
        let mut kept = Kept { next: 1, ..Kept::default() };
        if let Some((store, notes)) = &store {
            match store.load(notes) {
                Ok(values) => {
                    let parsed =
                        |(_, id, note): (String, String, Vec<u8>)| Some((id.parse().ok()?, Note::read(&note)?));
                    kept.notes = values.into_iter().filter_map(parsed).collect();
                }
                Err(error) => {
                    tracing::error!(%plugin, %error, "which messages are set aside cannot be read; they are tried again");
                }
            }
        }
        Self {
            waiting: Queue::new(limits.feed_messages_max, mib(limits.feed_mib)),
            kept: Mutex::new(kept),
            trying: Mutex::default(),
            aside_bytes_max: mib(limits.feed_aside_mib),
            aside_dropped: AtomicU64::new(0),
            tries_max: limits.feed_tries,
            store,
        }
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn trying(&self) -> MutexGuard<'_, Trying> {
        self.trying.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A message from the store, oldest first. Gives back what had to make room.
    pub(crate) fn push_again(&self, shown: Shown) -> Vec<Shown> {
        let note = shown.fed.and_then(|id| self.kept().notes.remove(&id.get()));
        match note {
            Some(note) => self.put_aside(shown, note),
            None => self.waiting.push(std::iter::once(shown)),
        }
    }

    /// Every message that the store has was pushed again: what is noted about others is of no use.
    pub(crate) fn restored(&self) {
        let left = std::mem::take(&mut self.kept().notes);
        for id in left.into_keys() {
            self.write_note(id, None);
        }
    }

    /// The oldest message failed when it was shown alone. Returns whether that was often enough to set it aside.
    pub(crate) fn failed_alone(&self, number: u64, error: &str) -> bool {
        let mut trying = self.trying();
        if trying.number != number {
            *trying = Trying { number, ..Trying::default() };
        }
        trying.tries = trying.tries.saturating_add(1);
        error.clone_into(&mut trying.error);
        trying.tries >= self.tries_max
    }

    /// A batch that begins with this message failed.
    pub(crate) fn failed_together(&self, number: u64, error: &str) {
        let mut trying = self.trying();
        if trying.number != number {
            *trying = Trying { number, ..Trying::default() };
        }
        error.clone_into(&mut trying.error);
    }

    /// Takes a message out of the way of those behind it. Gives back what had to make room.
    pub(crate) fn set_aside(&self, number: u64) -> Vec<Shown> {
        let Some(shown) = self.waiting.remove(number) else { return Vec::new() };
        let tried = self.trying().clone();
        let note = Note { tries: tried.tries, error: escaped(&tried.error, ERROR_BYTES_MAX).to_string() };
        if let Some(id) = shown.fed {
            self.write_note(id.get(), Some(&note));
        }
        self.put_aside(shown, note)
    }

    fn put_aside(&self, shown: Shown, note: Note) -> Vec<Shown> {
        let mut gone = Vec::new();
        let mut kept = self.kept();
        let aside = Aside { number: kept.next, shown, note };
        kept.next += 1;
        kept.bytes += aside.bytes();
        kept.aside.push_back(aside);
        while kept.aside.len() > ASIDE_MAX || kept.bytes > self.aside_bytes_max {
            let Some(oldest) = kept.aside.pop_front() else { break };
            kept.bytes -= oldest.bytes();
            self.aside_dropped.fetch_add(1, Ordering::Relaxed);
            gone.push(oldest.shown);
        }
        drop(kept);
        gone.iter().filter_map(|shown| shown.fed).for_each(|id| self.write_note(id.get(), None));
        gone
    }

    fn write_note(&self, id: u64, note: Option<&Note>) {
        let Some((store, plugin)) = &self.store else { return };
        let note = note.map(|Note { tries, error }| format!("{tries}\n{error}").into_bytes());
        // If the store cannot take it now, the message is tried again after the next start.
        let _ = store.keep(plugin, "aside", &id.to_string(), note.as_deref());
    }

    fn take_aside(&self, number: u64) -> Option<Shown> {
        let mut kept = self.kept();
        let place = kept.aside.iter().position(|aside| aside.number == number)?;
        let aside = kept.aside.remove(place)?;
        kept.bytes -= aside.bytes();
        drop(kept);
        if let Some(id) = aside.shown.fed {
            self.write_note(id.get(), None);
        }
        Some(aside.shown)
    }

    /// Forgets a message. The caller tells the store of what is returned.
    pub(crate) fn skip(&self, id: &str) -> Result<Shown, String> {
        let (is_aside, number) = parse_id(id)?;
        let found = if is_aside { self.take_aside(number) } else { self.waiting.remove(number) };
        found.ok_or_else(|| format!("no message {id} waits or is set aside"))
    }

    /// Has a message that is set aside tried again, behind those that wait.
    pub(crate) fn retry(&self, id: &str) -> Result<(), String> {
        let (true, number) = parse_id(id)? else {
            return Err(format!("{id} is not set aside, it waits"));
        };
        let shown = self.take_aside(number).ok_or_else(|| format!("no message {id} is set aside"))?;
        self.waiting.push_if_room(shown).map_err(|shown| {
            let _ = self.put_aside(shown, Note { tries: 0, error: "no room to try it again".into() });
            "there is no room: too many messages wait".to_owned()
        })
    }

    /// Identifiers of all that are set aside.
    pub(crate) fn all_aside(&self) -> Vec<String> {
        self.kept().aside.iter().map(|aside| format!("a{}", aside.number)).collect()
    }

    /// Nothing waits or is set aside.
    pub(crate) fn is_empty(&self) -> bool {
        self.waiting.len() == 0 && self.kept().aside.is_empty()
    }

    pub(crate) fn aside(&self) -> (usize, usize) {
        let kept = self.kept();
        (kept.aside.len(), kept.bytes)
    }

    pub(crate) fn dropped(&self) -> u64 {
        self.waiting.dropped() + self.aside_dropped.load(Ordering::Relaxed)
    }

    pub(crate) fn list(&self) -> FeedList {
        let kept = self.kept();
        let trying = self.trying().clone();
        let aside = kept.aside.iter().take(LISTED_MAX);
        let mut messages: Vec<_> =
            aside.map(|aside| fed_message(&aside.shown, aside.number, Some(&aside.note))).collect();
        let waiting = self.waiting.peek(LISTED_MAX, usize::MAX);
        messages.extend(waiting.iter().map(|(number, shown)| waiting_message(shown, *number, &trying)));
        FeedList {
            waiting: self.waiting.len(),
            waiting_bytes: self.waiting.bytes(),
            aside: kept.aside.len(),
            aside_bytes: kept.bytes,
            dropped: self.dropped(),
            messages,
        }
    }

    /// One message with the beginning of its payload.
    pub(crate) fn show(&self, id: &str) -> Result<FedMessage, String> {
        let missing = || format!("no message {id} waits or is set aside");
        let (mut found, shown) = match parse_id(id)? {
            (true, number) => {
                let kept = self.kept();
                let aside = kept.aside.iter().find(|aside| aside.number == number).ok_or_else(missing)?;
                (fed_message(&aside.shown, number, Some(&aside.note)), aside.shown.clone())
            }
            (false, number) => {
                let shown = self.waiting.get(number).ok_or_else(missing)?;
                (waiting_message(&shown, number, &self.trying().clone()), shown)
            }
        };
        let payload = &shown.message.payload;
        let begin = String::from_utf8_lossy(&payload[..payload.len().min(PAYLOAD_SHOWN_BYTES)]);
        found.payload = Some(escaped(&begin, 2 * PAYLOAD_SHOWN_BYTES).to_string());
        Ok(found)
    }
}

fn mib(mib: u32) -> usize {
    (mib as usize) << 20
}

/// Numbers of messages that are set aside begin with `a`: `a7`.
fn parse_id(id: &str) -> Result<(bool, u64), String> {
    let (is_aside, number) = id.strip_prefix('a').map_or((false, id), |number| (true, number));
    let wrong =
        |_| format!("{:?} is no message: they are called like 7 or a7, see `plugin feed list`", escaped(id, 64));
    number.parse().map(|number| (is_aside, number)).map_err(wrong)
}

fn waiting_message(shown: &Shown, number: u64, trying: &Trying) -> FedMessage {
    let mut message = fed_message(shown, number, None);
    if trying.number == number {
        message.tries = trying.tries;
        message.error = Some(escaped(&trying.error, ERROR_BYTES_MAX).to_string());
    }
    message
}

fn fed_message(shown: &Shown, number: u64, note: Option<&Note>) -> FedMessage {
    let message = &shown.message;
    FedMessage {
        id: if note.is_some() { format!("a{number}") } else { number.to_string() },
        aside: note.is_some(),
        topic: message.topic.to_string(),
        client_id: shown.client.as_ref().map(|client| client.client_id.to_string()),
        qos: message.qos as u8,
        retain: message.retain,
        payload_bytes: message.payload.len(),
        property_bytes: message.properties.len(),
        bytes: shown.bytes(),
        tries: note.map_or(0, |note| note.tries),
        error: note.map(|note| note.error.clone()),
        payload: None,
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use wasmqtt_protocol::codec::Qos;
    use wasmqtt_protocol::router::Message;

    use super::*;

    fn shown(topic: &str, payload: usize, properties: usize) -> Shown {
        let message = Message {
            topic: topic.into(),
            payload: Bytes::from(vec![b'x'; payload]),
            properties: Bytes::from(vec![0; properties]),
            qos: Qos::AtLeastOnce,
            retain: false,
            expires_at_ms: None,
            publisher: None,
        };
        Shown { message: Arc::new(message), client: None, fed: None }
    }

    fn feed(aside_mib: u32) -> Feed {
        let limits = PluginLimits { feed_mib: 1, feed_aside_mib: aside_mib, feed_tries: 2, ..PluginLimits::default() };
        Feed::new("p", &limits, None)
    }

    #[test]
    fn properties_and_topics_count_as_payloads_do() {
        let feed = feed(1);
        for large in [shown("t", 600_000, 0), shown("t", 0, 600_000), shown(&"t".repeat(600_000), 0, 0)] {
            feed.waiting.push(std::iter::once(large));
        }
        assert_eq!((feed.waiting.len(), feed.dropped()), (1, 2));
        assert!((0..5000).any(|_| !feed.waiting.push(std::iter::once(shown("t", 0, 0))).is_empty()), "empty ones, too");
    }

    #[test]
    fn a_message_that_failed_alone_is_set_aside_and_comes_back_on_demand() {
        let feed = feed(1);
        feed.waiting.push([shown("bad", 3, 0), shown("good", 0, 0)].into_iter());
        assert!(!feed.failed_alone(1, "no\n"));
        assert!(feed.failed_alone(1, "no\n"));
        assert!(feed.set_aside(1).is_empty());
        let list = feed.list();
        let shown: Vec<_> = list.messages.iter().map(|message| (message.id.as_str(), message.tries)).collect();
        assert_eq!(shown, [("a1", 2), ("2", 0)]);
        let bad = feed.show("a1").expect("is there");
        assert_eq!((bad.error.as_deref(), bad.payload.as_deref()), (Some("no\\n"), Some("xxx")));
        feed.retry("a1").expect("there is room");
        assert_eq!((feed.aside(), feed.waiting.len()), ((0, 0), 2));
        assert_eq!(feed.skip("3").map(|skipped| skipped.message.topic.to_string()), Ok("bad".into()));
        assert!(feed.skip("3").is_err() && feed.retry("2").is_err() && feed.show("x").is_err());
    }

    #[test]
    fn what_is_set_aside_is_bounded_in_messages() {
        let feed = feed(16);
        let mut gone = 0;
        for number in 1..=ASIDE_MAX as u64 + 5 {
            feed.waiting.push(std::iter::once(shown("t", 0, 0)));
            gone += feed.set_aside(number).len();
        }
        assert_eq!((feed.aside().0, feed.dropped(), gone), (ASIDE_MAX, 5, 5));
        assert_eq!(feed.all_aside().first().map(String::as_str), Some("a6"), "the oldest are dropped");
    }

    #[test]
    fn what_is_set_aside_is_bounded_in_bytes() {
        let feed = feed(1);
        for number in 1..=3 {
            feed.waiting.push(std::iter::once(shown("t", 600_000, 0)));
            let gone = feed.set_aside(number);
            assert_eq!(gone.len(), usize::from(number > 1));
        }
        assert_eq!((feed.aside().0, feed.dropped()), (1, 2));
        let none = Feed::new("p", &PluginLimits { feed_aside_mib: 0, ..PluginLimits::default() }, None);
        none.waiting.push(std::iter::once(shown("t", 1, 0)));
        assert_eq!(none.set_aside(1).len(), 1, "0: it is dropped");
    }
}
