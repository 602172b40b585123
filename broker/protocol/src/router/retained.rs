//! Retained messages by Topic Name. MQTT 5.0 §3.3.1.3.
//!
//! In the order of their topics, so that a walk over those that a filter matches can stop anywhere and go on later, with
//! nothing to remember but its place.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::Arc;

use super::Message;

/// Most that the map takes for a message in bytes: key, value and their part of a node that is half full.
const ENTRY_BYTES: usize = 128;

/// There is no room for another retained message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the store of retained messages is full")]
pub struct Full;

/// A retained message.
#[derive(Debug, Clone)]
pub struct RetainedMessage {
    /// For subscribers.
    pub message: Arc<Message>,
    /// The form that the store keeps, where that is another.
    pub kept_as: Option<Arc<Message>>,
    /// Larger than that of every message that was retained before, for whatever topic.
    pub stamp: u64,
}

/// A place in the order of topics; the default is before all of them. Levels are separated by NUL, which no topic
/// contains and which sorts before everything else: so a topic is followed by all that are below it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Position(Box<str>);

impl Position {
    /// Right before a topic.
    pub fn before(topic: &str) -> Self {
        Self(key(topic))
    }

    /// As [`Self::as_str`] gave it.
    pub fn parse(text: &str) -> Self {
        Self(text.into())
    }

    /// For the store.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

fn key(topic: &str) -> Box<str> {
    topic.replace('/', "\0").into()
}

/// At most one message per topic; bounded by count and bytes.
#[derive(Debug)]
pub struct Retained {
    messages: BTreeMap<Box<str>, RetainedMessage>,
    expiring: BTreeSet<(u64, Box<str>)>,
    bytes: usize,
    messages_max: usize,
    bytes_max: usize,
    stamp: u64,
}

/// Most that a message costs, in bytes. Its topic is there again as its key and, if it expires, as another.
fn size(message: &Message, kept_as: Option<&Arc<Message>>) -> usize {
    let content = |message: &Message| message.topic.len() + message.payload.len() + message.properties.len();
    let one = size_of::<Message>() + 2 * size_of::<usize>();
    let expiry = message.expires_at_ms.map_or(0, |_| 2 * size_of::<(u64, Box<str>)>() + message.topic.len());
    let kept = kept_as.map_or(0, |kept| one + content(kept));
    ENTRY_BYTES + one + content(message) + message.topic.len() + expiry + kept
}

impl Retained {
    /// An empty store with its bounds.
    pub fn new(messages_max: usize, bytes_max: usize) -> Self {
        let (messages, expiring) = (BTreeMap::new(), BTreeSet::new());
        Self { messages, expiring, bytes: 0, messages_max, bytes_max, stamp: 0 }
    }

    /// Other bounds; what is there already stays.
    pub fn limit(&mut self, messages_max: usize, bytes_max: usize) {
        self.messages_max = messages_max;
        self.bytes_max = bytes_max;
    }

    /// Messages in it, expired ones that were not swept included.
    pub fn len(&self) -> usize {
        self.messages.len()
    }

    /// Nothing is retained.
    pub fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    /// What it holds, in bytes, its own cost included: an upper estimate.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The stamp of the message that was retained last.
    pub fn last_stamp(&self) -> u64 {
        self.stamp
    }

    /// Stamps after this one are given from now on.
    pub fn raise_stamp(&mut self, stamp: u64) {
        self.stamp = self.stamp.max(stamp);
    }

    /// Keeps a message in place of the one its topic had, and gives its stamp. [MQTT-3.3.1-5]
    ///
    /// # Errors
    /// [`Full`] at either bound; what was retained for the topic stays.
    pub fn set(&mut self, message: Arc<Message>, kept_as: Option<Arc<Message>>) -> Result<u64, Full> {
        let stamp = self.stamp + 1;
        self.restore(RetainedMessage { message, kept_as, stamp })?;
        Ok(stamp)
    }

    /// Keeps a message as it was kept before.
    ///
    /// # Errors
    /// [`Full`] at either bound.
    pub fn restore(&mut self, retained: RetainedMessage) -> Result<(), Full> {
        let message = Arc::clone(&retained.message);
        let key = key(&message.topic);
        let old = self.messages.get(&key);
        let is_new = usize::from(old.is_none());
        let old_bytes = old.map_or(0, |old| size(&old.message, old.kept_as.as_ref()));
        let bytes = self.bytes - old_bytes + size(&message, retained.kept_as.as_ref());
        if self.messages.len() + is_new > self.messages_max || bytes > self.bytes_max {
            return Err(Full);
        }
        self.bytes = bytes;
        self.raise_stamp(retained.stamp);
        if let Some(at) = message.expires_at_ms {
            self.expiring.insert((at, message.topic.clone()));
        }
        let old = self.messages.insert(key, retained);
        if let Some(at) = old.and_then(|old| old.message.expires_at_ms)
            && message.expires_at_ms != Some(at)
        {
            self.expiring.remove(&(at, message.topic.clone()));
        }
        Ok(())
    }

    /// Forgets the message of a topic; `false` if there was none. [MQTT-3.3.1-6]
    pub fn remove(&mut self, topic: &str) -> bool {
        let Some(RetainedMessage { message, kept_as, .. }) = self.messages.remove(&key(topic)) else { return false };
        if let Some(at) = message.expires_at_ms {
            self.expiring.remove(&(at, message.topic.clone()));
        }
        self.bytes -= size(&message, kept_as.as_ref());
        true
    }

    /// The message of a topic, expired or not.
    pub fn get(&self, topic: &str) -> Option<&RetainedMessage> {
        self.messages.get(&key(topic))
    }

    /// Adds messages that `filter` matches, in the order of their topics: from `from` on, those that are not expired and
    /// that were retained no later than `until`. Looks at no more than `looks` topics; gives back where to go on, or
    /// `None` at the end.
    pub fn walk(
        &self,
        filter: &str,
        from: &Position,
        (now_ms, until): (u64, u64),
        mut looks: usize,
        out: &mut Vec<RetainedMessage>,
    ) -> Option<Position> {
        let mut from = from.0.clone();
        loop {
            let mut goes_on_at = None;
            for (key, found) in self.messages.range::<str, _>((Bound::Included(&*from), Bound::Unbounded)) {
                if looks == 0 {
                    return Some(Position(key.clone()));
                }
                looks -= 1;
                match look(filter, key) {
                    Look::Matches => {
                        if found.stamp <= until && found.message.expires_at_ms.is_none_or(|at| at > now_ms) {
                            out.push(found.clone());
                        }
                    }
                    Look::Skips(to) => {
                        goes_on_at = Some(to);
                        break;
                    }
                    Look::Ends => return None,
                }
            }
            from = goes_on_at?;
        }
    }

    /// Removes an expired message; gives its topic. [MQTT-3.3.2-5]
    pub fn remove_expired(&mut self, now_ms: u64) -> Option<Box<str>> {
        let (_, topic) = self.expiring.first().filter(|(at, _)| *at <= now_ms).cloned()?;
        self.remove(&topic);
        Some(topic)
    }
}

/// What a walk does at a key.
enum Look {
    Matches,
    /// Nothing matches before this place.
    Skips(Box<str>),
    /// Nothing that follows matches.
    Ends,
}

/// Compares a key with a Topic Filter. MQTT 5.0 §4.7.1, [MQTT-4.7.2-1].
fn look(filter: &str, key: &str) -> Look {
    if key.starts_with('$') && filter.starts_with(['+', '#']) {
        // The character after `$`.
        return Look::Skips("%".into());
    }
    // Where the name of the present level begins; past the end: the key has no more.
    let mut at = 0;
    // Where the name ends that the last `+` stands for.
    let mut plus_end = None;
    for level in filter.split('/') {
        if level == "#" {
            return Look::Matches;
        }
        if at > key.len() {
            // What is below the key follows it.
            return Look::Skips([key, "\0", if level == "+" { "" } else { level }].concat().into());
        }
        let name = key[at..].split('\0').next().unwrap_or_default();
        let end = at + name.len();
        if level == "+" {
            plus_end = Some(end);
        } else if level > name {
            return Look::Skips([&key[..at], level].concat().into());
        } else if level < name {
            return next_sibling(key, plus_end);
        }
        at = end + 1;
    }
    if at > key.len() { Look::Matches } else { next_sibling(key, plus_end) }
}

/// The next name that the last `+` could stand for.
fn next_sibling(key: &str, plus_end: Option<usize>) -> Look {
    plus_end.map_or(Look::Ends, |end| Look::Skips([&key[..end], "\u{1}"].concat().into()))
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::codec::Qos;

    fn message(topic: &str, expires_at_ms: Option<u64>) -> Arc<Message> {
        Arc::new(Message {
            topic: topic.into(),
            payload: Bytes::from_static(b"x"),
            properties: Bytes::new(),
            qos: Qos::AtMostOnce,
            retain: true,
            expires_at_ms,
            publisher: None,
        })
    }

    fn topics(found: &[RetainedMessage]) -> Vec<&str> {
        found.iter().map(|found| &*found.message.topic).collect()
    }

    fn find(retained: &Retained, filter: &str, now_ms: u64) -> Vec<RetainedMessage> {
        let mut found = Vec::new();
        assert_eq!(retained.walk(filter, &Position::default(), (now_ms, u64::MAX), usize::MAX, &mut found), None);
        found
    }

    /// [MQTT-3.3.2-5]
    #[test]
    fn expired_messages_are_neither_found_nor_kept() {
        let mut retained = Retained::new(10, 10_000);
        retained.set(message("a", Some(5)), None).unwrap();
        retained.set(message("b", Some(9)), None).unwrap();
        retained.set(message("b", None), None).unwrap();
        assert_eq!(find(&retained, "#", 5).len(), 1);
        assert_eq!(retained.remove_expired(100).as_deref(), Some("a"));
        assert_eq!(retained.remove_expired(100), None);
        assert_eq!(retained.len(), 1);
    }

    fn check_matching(topics_there: &[&str], filter: &str, wanted: &[&str]) {
        let mut retained = Retained::new(100, 1 << 20);
        for topic in topics_there {
            retained.set(message(topic, None), None).unwrap();
        }
        assert_eq!(topics(&find(&retained, filter, 0)), wanted, "{filter}");
    }

    /// MQTT 5.0 and 3.1.1 §4.7.1.2, §4.7.1.3.
    #[test]
    fn multi_level_wildcard_finds_its_parent_and_single_level_wildcard_one_level() {
        let topics = ["a", "a/b", "a/b/c", "a/", "b", "a!", "a!/b", "a\u{1}/b"];
        check_matching(&topics, "a/#", &["a", "a/", "a/b", "a/b/c"]);
        check_matching(&topics, "a/+", &["a/", "a/b"]);
        check_matching(&topics, "+/b/#", &["a/b", "a/b/c", "a\u{1}/b", "a!/b"]);
        check_matching(&topics, "+", &["a", "a!", "b"]);
    }

    /// MQTT 5.0 and 3.1.1 §4.7.2 [MQTT-4.7.2-1].
    #[test]
    fn leading_wildcard_does_not_find_dollar_topics() {
        let topics = ["$SYS/uptime", "a/$x", "a", "#no"];
        let topics = &topics[..3];
        check_matching(topics, "#", &["a", "a/$x"]);
        check_matching(topics, "+/uptime", &[]);
        check_matching(topics, "$SYS/#", &["$SYS/uptime"]);
        check_matching(topics, "a/+", &["a/$x"]);
    }

    /// However few topics are looked at in one go, each is found once.
    #[test]
    fn a_walk_goes_on_where_it_stopped() {
        let mut retained = Retained::new(1000, 1 << 20);
        for n in 0..50 {
            for name in ["x", "y", "y/deep", "z"] {
                retained.set(message(&format!("d{n}/{name}"), None), None).unwrap();
            }
        }
        for (filter, count) in [("#", 200), ("+/y", 50), ("d7/+", 3), ("+/y/#", 100), ("d7/z", 1), ("none/+", 0)] {
            let (mut found, mut from, mut rounds) = (Vec::new(), Some(Position::default()), 0);
            while let Some(at) = from {
                from = retained.walk(filter, &at, (0, u64::MAX), 3, &mut found);
                rounds += 1;
            }
            assert_eq!(found.len(), count, "{filter}");
            assert_eq!(topics(&found), topics(&find(&retained, filter, 0)), "{filter}");
            assert!(rounds <= 200 / 3 + 1, "{filter}: {rounds}");
        }
    }

    /// One level of a million names costs a walk nothing where the filter names one of them.
    #[test]
    fn a_walk_skips_what_cannot_match() {
        let mut retained = Retained::new(10_000, 1 << 30);
        for n in 0..1000 {
            for name in ["a", "b", "c", "d", "e"] {
                retained.set(message(&format!("{name}/{n:04}/state"), None), None).unwrap();
            }
        }
        for (filter, looks) in [("c/0500/state", 5), ("+/0500/state", 25), ("+/0500/#", 30), ("e/0999/+", 5)] {
            let mut found = Vec::new();
            let end = retained.walk(filter, &Position::default(), (0, u64::MAX), looks, &mut found);
            assert_eq!((end, found.is_empty()), (None, false), "{filter}");
        }
    }

    /// Who subscribed before a message was retained has got it already.
    #[test]
    fn a_walk_leaves_out_what_is_younger_than_it() {
        let mut retained = Retained::new(10, 10_000);
        retained.set(message("a", None), None).unwrap();
        retained.set(message("b", None), None).unwrap();
        let until = retained.last_stamp();
        retained.set(message("b", None), None).unwrap();
        retained.set(message("c", None), None).unwrap();
        let mut found = Vec::new();
        assert_eq!(retained.walk("#", &Position::default(), (0, until), 100, &mut found), None);
        assert_eq!(topics(&found), ["a"]);
        let old = RetainedMessage { message: message("d", None), kept_as: None, stamp: 9 };
        retained.restore(old).unwrap();
        assert_eq!(retained.set(message("e", None), None), Ok(10));
    }

    #[test]
    fn store_takes_exactly_the_bytes_it_may() {
        let set_all = |bytes_max| {
            let mut retained = Retained::new(10, bytes_max);
            let sealed = Some(message("sealed", None));
            let result =
                ["a/b/c", "a/b/d", "a", "x/y"].map(|topic| retained.set(message(topic, Some(1)), sealed.clone()));
            (result[3].is_ok(), retained.bytes())
        };
        let (_, bytes) = set_all(usize::MAX);
        assert_eq!(set_all(bytes), (true, bytes));
        assert!(!set_all(bytes - 1).0);
    }

    #[test]
    fn bounds_hold_and_replacing_needs_no_room() {
        let mut retained = Retained::new(1, 10_000);
        retained.set(message("a", None), None).unwrap();
        assert_eq!(retained.set(message("b", None), None), Err(Full));
        retained.set(message("a", None), Some(message("a", None))).unwrap();
        assert!(retained.remove("a"));
        assert_eq!((retained.len(), retained.bytes()), (0, 0));
    }
}
