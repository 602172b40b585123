//! Retained messages by Topic Name. MQTT 5.0 §3.3.1.3.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::Message;
use super::trie::Trie;

/// Most that one level of a topic costs, its name apart, in bytes. A level with one child has a table of its own (116
/// bytes measured); the arena doubles when it grows, so a node of 56 bytes may take twice that.
const NODE_BYTES: usize = 232;

/// There is no room for another retained message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the store of retained messages is full")]
pub struct Full;

/// At most one message per topic; bounded by count and bytes.
#[derive(Debug)]
pub struct Retained {
    trie: Trie<Option<Arc<Message>>>,
    expiring: BTreeSet<(u64, Box<str>)>,
    len: usize,
    /// Of messages; levels come on top, see [`Self::bytes`].
    message_bytes: usize,
    messages_max: usize,
    bytes_max: usize,
}

/// Most that a message costs, in bytes, without the nodes of its levels. Its topic is there again as the names of levels
/// and, if it expires, as a key.
fn size(message: &Message) -> usize {
    let counters = 2 * size_of::<usize>();
    let expiry = message.expires_at_ms.map_or(0, |_| 2 * size_of::<(u64, Box<str>)>() + message.topic.len());
    let content = 2 * message.topic.len() + message.payload.len() + message.properties.len();
    size_of::<Message>() + counters + content + expiry
}

impl Retained {
    /// An empty store with its bounds.
    pub fn new(messages_max: usize, bytes_max: usize) -> Self {
        Self { trie: Trie::default(), expiring: BTreeSet::new(), len: 0, message_bytes: 0, messages_max, bytes_max }
    }

    /// Messages in it, expired ones that were not swept included.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Nothing is retained.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What it holds, in bytes, its own cost included: an upper estimate, so that a topic of many levels and few bytes
    /// counts as what it takes.
    pub fn bytes(&self) -> usize {
        self.message_bytes + self.trie.len() * NODE_BYTES
    }

    /// Levels it holds in memory; 0 when it is empty.
    pub fn nodes(&self) -> usize {
        self.trie.len()
    }

    /// Keeps a message in place of the one its topic had. [MQTT-3.3.1-5]
    ///
    /// # Errors
    /// [`Full`] at either bound; what was retained for the topic stays.
    pub fn set(&mut self, message: Arc<Message>) -> Result<(), Full> {
        let old = self.get(&message.topic).map_or(0, |old| size(old));
        let is_new = usize::from(old == 0);
        let message_bytes = self.message_bytes - old + size(&message);
        let nodes = self.trie.len() + self.trie.missing(&message.topic);
        if self.len + is_new > self.messages_max || message_bytes + nodes * NODE_BYTES > self.bytes_max {
            return Err(Full);
        }
        let node = self.trie.entry(&message.topic);
        self.message_bytes = message_bytes;
        self.len += is_new;
        if let Some(at) = message.expires_at_ms {
            self.expiring.insert((at, message.topic.clone()));
        }
        let previous = self.trie.value_mut(node).replace(Arc::clone(&message));
        if let Some(at) = previous.and_then(|previous| previous.expires_at_ms)
            && message.expires_at_ms != Some(at)
        {
            self.expiring.remove(&(at, message.topic.clone()));
        }
        Ok(())
    }

    /// Forgets the message of a topic; `false` if there was none. [MQTT-3.3.1-6]
    pub fn remove(&mut self, topic: &str) -> bool {
        let Some(node) = self.trie.find(topic) else { return false };
        let Some(old) = self.trie.value_mut(node).take() else { return false };
        if let Some(at) = old.expires_at_ms {
            self.expiring.remove(&(at, old.topic.clone()));
        }
        self.len -= 1;
        self.message_bytes -= size(&old);
        self.trie.prune(topic, Option::is_some);
        true
    }

    /// The message of a topic, expired or not.
    pub fn get(&self, topic: &str) -> Option<&Arc<Message>> {
        self.trie.value(self.trie.find(topic)?).as_ref()
    }

    /// Adds every message that `filter` matches and that is not expired.
    pub fn matching(&self, filter: &str, now_ms: u64, out: &mut Vec<Arc<Message>>) {
        self.trie.matching_topics(filter, |message| {
            out.extend(message.iter().filter(|m| m.expires_at_ms.is_none_or(|at| at > now_ms)).cloned());
            true
        });
    }

    /// Removes an expired message; gives its topic. [MQTT-3.3.2-5]
    pub fn remove_expired(&mut self, now_ms: u64) -> Option<Box<str>> {
        let (_, topic) = self.expiring.first().filter(|(at, _)| *at <= now_ms).cloned()?;
        self.remove(&topic);
        Some(topic)
    }
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

    /// [MQTT-3.3.2-5]
    #[test]
    fn expired_messages_are_neither_found_nor_kept() {
        let mut retained = Retained::new(10, 10_000);
        retained.set(message("a", Some(5))).unwrap();
        retained.set(message("b", Some(9))).unwrap();
        retained.set(message("b", None)).unwrap();
        let mut found = Vec::new();
        retained.matching("#", 5, &mut found);
        assert_eq!(found.len(), 1);
        assert_eq!(retained.remove_expired(100).as_deref(), Some("a"));
        assert_eq!(retained.remove_expired(100), None);
        assert_eq!(retained.len(), 1);
    }

    fn check_matching(topics: &[&str], filter: &str, wanted: &[&str]) {
        let mut retained = Retained::new(100, 1 << 20);
        for topic in topics {
            retained.set(message(topic, None)).unwrap();
        }
        let mut found = Vec::new();
        retained.matching(filter, 0, &mut found);
        let mut found: Vec<&str> = found.iter().map(|message| &*message.topic).collect();
        found.sort_unstable();
        assert_eq!(found, wanted, "{filter}");
    }

    /// MQTT 5.0 and 3.1.1 §4.7.1.2, §4.7.1.3.
    #[test]
    fn multi_level_wildcard_finds_its_parent_and_single_level_wildcard_one_level() {
        let topics = ["a", "a/b", "a/b/c", "a/", "b"];
        check_matching(&topics, "a/#", &["a", "a/", "a/b", "a/b/c"]);
        check_matching(&topics, "a/+", &["a/", "a/b"]);
        check_matching(&topics, "+/b/#", &["a/b", "a/b/c"]);
    }

    /// MQTT 5.0 and 3.1.1 §4.7.2 [MQTT-4.7.2-1].
    #[test]
    fn leading_wildcard_does_not_find_dollar_topics() {
        let topics = ["$SYS/uptime", "a/$x", "a"];
        check_matching(&topics, "#", &["a", "a/$x"]);
        check_matching(&topics, "+/uptime", &[]);
        check_matching(&topics, "$SYS/#", &["$SYS/uptime"]);
        check_matching(&topics, "a/+", &["a/$x"]);
    }

    /// Two hundred levels fit into four hundred bytes and take a hundred times as much.
    #[test]
    fn levels_count_towards_the_bound_and_give_it_back() {
        let deep = format!("a{}", "/".repeat(199));
        let mut retained = Retained::new(10, 200 * NODE_BYTES);
        assert_eq!(retained.set(message(&deep, None)), Err(Full));
        assert_eq!((retained.len(), retained.bytes(), retained.nodes()), (0, 0, 0), "a refusal leaves nothing behind");
        let mut retained = Retained::new(10, 210 * NODE_BYTES);
        retained.set(message(&deep, Some(1))).unwrap();
        retained.set(message(&deep, None)).unwrap();
        retained.set(message(&deep[..deep.len() - 1], None)).unwrap();
        assert!(retained.remove(&deep) && retained.remove(&deep[..deep.len() - 1]));
        assert_eq!((retained.bytes(), retained.nodes()), (0, 0));
    }

    #[test]
    fn store_takes_exactly_the_bytes_it_may() {
        let set_all = |bytes_max| {
            let mut retained = Retained::new(10, bytes_max);
            let result = ["a/b/c", "a/b/d", "a", "x/y"].map(|topic| retained.set(message(topic, Some(1))));
            (result[3], retained.bytes())
        };
        let (_, bytes) = set_all(usize::MAX);
        assert_eq!(set_all(bytes), (Ok(()), bytes));
        assert_eq!(set_all(bytes - 1).0, Err(Full));
    }

    #[test]
    fn bounds_hold_and_replacing_needs_no_room() {
        let mut retained = Retained::new(1, 10_000);
        retained.set(message("a", None)).unwrap();
        assert_eq!(retained.set(message("b", None)), Err(Full));
        retained.set(message("a", None)).unwrap();
        assert!(retained.remove("a"));
        assert_eq!((retained.len(), retained.bytes(), retained.nodes()), (0, 0, 0));
    }
}
