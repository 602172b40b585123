//! The index and the retained store against the plainest matcher one can write.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use proptest::prelude::*;
use wasmqtt_protocol::codec::Qos;
use wasmqtt_protocol::router::{Index, Matches, Message, Retained, SessionKey, Subscription};

/// MQTT 5.0 §4.7, level by level.
fn naive(filter: &[&str], topic: &[&str]) -> bool {
    match (filter.split_first(), topic.split_first()) {
        (Some((&"#", _)), _) | (None, None) => true,
        (Some((level, filter)), Some((name, topic))) => (*level == "+" || level == name) && naive(filter, topic),
        _ => false,
    }
}

fn matches(filter: &str, topic: &str) -> bool {
    let hidden = topic.starts_with('$') && filter.starts_with(['+', '#']);
    !hidden && naive(&filter.split('/').collect::<Vec<_>>(), &topic.split('/').collect::<Vec<_>>())
}

fn topic() -> impl Strategy<Value = String> {
    let level = prop_oneof![Just("a"), Just("b"), Just(""), Just("$s")];
    prop::collection::vec(level, 1..5).prop_map(|levels| levels.join("/")).prop_filter("not empty", |t| !t.is_empty())
}

fn filter() -> impl Strategy<Value = String> {
    let level = prop_oneof![Just("a"), Just("b"), Just(""), Just("+"), Just("$s")];
    (prop::collection::vec(level, 0..4), any::<bool>())
        .prop_map(|(mut levels, hash)| {
            if hash || levels.is_empty() {
                levels.push("#");
            }
            levels.join("/")
        })
        .prop_filter("not empty", |f| !f.is_empty())
}

fn key(slot: u32) -> SessionKey {
    SessionKey { shard: 0, slot, epoch: 0 }
}

proptest! {
    /// Whatever came and went, a topic finds exactly the filters that match it. [MQTT-4.7.1-1] to [MQTT-4.7.3-4]
    #[test]
    fn index_agrees_with_the_plain_matcher(
        steps in prop::collection::vec((filter(), 0_u32..3, any::<bool>()), 0..40),
        topics in prop::collection::vec(topic(), 1..10),
    ) {
        let mut index = Index::default();
        let mut model: HashMap<(String, u32), ()> = HashMap::new();
        for (filter, slot, add) in steps {
            if add {
                let old = index.subscribe(&filter, key(slot), Subscription::default());
                prop_assert_eq!(old.is_some(), model.insert((filter, slot), ()).is_some());
            } else {
                let had = index.unsubscribe(&filter, key(slot));
                prop_assert_eq!(had, model.remove(&(filter, slot)).is_some());
            }
        }
        prop_assert_eq!(index.len(), model.len());
        let mut found = Matches::default();
        for topic in topics {
            index.matches(&topic, &mut found);
            let mut slots: Vec<u32> = found.direct.iter().map(|(key, _)| key.slot).collect();
            let mut wanted: Vec<u32> =
                model.keys().filter(|(filter, _)| matches(filter, &topic)).map(|(_, slot)| *slot).collect();
            slots.sort_unstable();
            wanted.sort_unstable();
            prop_assert_eq!(slots, wanted, "topic {}", topic);
        }
        for (filter, slot) in model.keys() {
            prop_assert!(index.unsubscribe(filter, key(*slot)));
        }
        prop_assert_eq!(index.nodes(), 0, "an empty index holds no memory");
    }

    /// The same for retained messages and a new subscription.
    #[test]
    fn retained_agrees_with_the_plain_matcher(
        steps in prop::collection::vec((topic(), any::<bool>()), 0..40),
        filters in prop::collection::vec(filter(), 1..10),
    ) {
        let mut retained = Retained::new(1000, 1 << 20);
        let mut model: HashMap<String, ()> = HashMap::new();
        for (topic, set) in steps {
            if set {
                let message = Message {
                    topic: topic.as_str().into(),
                    payload: Bytes::from_static(b"x"),
                    properties: Bytes::new(),
                    qos: Qos::AtMostOnce,
                    retain: true,
                    expires_at_ms: None,
                    publisher: None,
                };
                retained.set(Arc::new(message)).unwrap();
                model.insert(topic, ());
            } else {
                prop_assert_eq!(retained.remove(&topic), model.remove(&topic).is_some());
            }
        }
        prop_assert_eq!(retained.len(), model.len());
        for filter in filters {
            let mut found = Vec::new();
            retained.matching(&filter, 0, &mut found);
            let mut topics: Vec<&str> = found.iter().map(|message| &*message.topic).collect();
            let mut wanted: Vec<&str> = model.keys().map(String::as_str).filter(|t| matches(&filter, t)).collect();
            topics.sort_unstable();
            wanted.sort_unstable();
            prop_assert_eq!(topics, wanted, "filter {}", filter);
        }
        for topic in model.keys() {
            prop_assert!(retained.remove(topic));
        }
        prop_assert_eq!((retained.nodes(), retained.bytes()), (0, 0));
    }
}

/// Filters of the greatest possible depth cost neither stack nor, afterwards, memory.
#[test]
fn deepest_filter_comes_and_goes() {
    let deep = "/".repeat(65_535);
    let mut index = Index::default();
    index.subscribe(&deep, key(0), Subscription::default());
    let mut found = Matches::default();
    index.matches(&deep, &mut found);
    assert_eq!(found.direct.len(), 1);
    assert!(index.unsubscribe(&deep, key(0)));
    assert_eq!(index.nodes(), 0);
}
