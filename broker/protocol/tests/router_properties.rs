//! The index and the retained store against the plainest matcher one can write.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;

use bytes::Bytes;
use proptest::prelude::*;
use wasmqtt_protocol::codec::Qos;
use wasmqtt_protocol::router::{
    Index, Matches, Message, Position, Retained, RetainedMessage, SessionKey, Subscription,
};

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

fn message(topic: &str, expires_at_ms: Option<u64>) -> Message {
    Message {
        topic: topic.into(),
        payload: Bytes::from_static(b"x"),
        properties: Bytes::new(),
        qos: Qos::AtMostOnce,
        retain: true,
        expires_at_ms,
        publisher: None,
    }
}

fn topics_of(found: &[RetainedMessage]) -> Vec<&str> {
    found.iter().map(|found| &*found.message.topic).collect()
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
        let mut model: HashSet<(String, u32)> = HashSet::new();
        for (filter, slot, add) in steps {
            if add {
                let old = index.subscribe(&filter, key(slot), Subscription::default());
                prop_assert_eq!(old.is_none(), model.insert((filter, slot)));
            } else {
                let had = index.unsubscribe(&filter, key(slot));
                prop_assert_eq!(had, model.remove(&(filter, slot)));
            }
        }
        prop_assert_eq!(index.len(), model.len());
        let mut found = Matches::default();
        for topic in topics {
            index.matches(&topic, &mut found);
            let mut slots: Vec<u32> = found.direct.iter().map(|(key, _)| key.slot).collect();
            let mut wanted: Vec<u32> =
                model.iter().filter(|(filter, _)| matches(filter, &topic)).map(|(_, slot)| *slot).collect();
            slots.sort_unstable();
            wanted.sort_unstable();
            prop_assert_eq!(slots, wanted, "topic {}", topic);
        }
        for (filter, slot) in &model {
            prop_assert!(index.unsubscribe(filter, key(*slot)));
        }
        prop_assert_eq!(index.nodes(), 0, "an empty index holds no memory");
    }

    /// The same for retained messages and a new subscription.
    #[test]
    fn retained_agrees_with_the_plain_matcher(
        steps in prop::collection::vec((topic(), any::<bool>()), 0..40),
        filters in prop::collection::vec(filter(), 1..10),
        looks in 1_usize..10,
    ) {
        let mut retained = Retained::new(1000, 1 << 20);
        let mut model: HashSet<String> = HashSet::new();
        for (topic, set) in steps {
            if set {
                retained.set(Arc::new(message(&topic, None)), None).unwrap();
                model.insert(topic);
            } else {
                prop_assert_eq!(retained.remove(&topic), model.remove(&topic));
            }
        }
        prop_assert_eq!(retained.len(), model.len());
        for filter in filters {
            let mut found = Vec::new();
            let mut from = Some(Position::default());
            while let Some(at) = from {
                from = retained.walk(&filter, &at, (0, u64::MAX), looks, &mut found);
            }
            let mut topics = topics_of(&found);
            let mut wanted: Vec<&str> = model.iter().map(String::as_str).filter(|t| matches(&filter, t)).collect();
            topics.sort_unstable();
            wanted.sort_unstable();
            prop_assert_eq!(topics, wanted, "filter {}", filter);
        }
        for topic in &model {
            prop_assert!(retained.remove(topic));
        }
        prop_assert_eq!((retained.len(), retained.bytes()), (0, 0));
    }
}

proptest! {
    /// Filters with few and with many subscribers keep one subscription for each. [MQTT-3.8.4-3]
    #[test]
    fn sessions_of_one_filter_come_and_go(
        first in 0_u32..100,
        steps in prop::collection::vec((0_u32..100, any::<u32>(), any::<bool>()), 0..150),
    ) {
        let mut index = Index::default();
        let mut model = BTreeMap::new();
        let joins = (0..first).map(|slot| (slot, slot, true));
        let leaves = (0..100).map(|slot| (slot, 0, false));
        for (slot, id, add) in joins.chain(steps).chain(leaves) {
            if add {
                let subscription = Subscription { id: std::num::NonZeroU32::new(id), ..Subscription::default() };
                prop_assert_eq!(index.subscribe("a", key(slot), subscription), model.insert(slot, subscription));
            } else {
                prop_assert_eq!(index.unsubscribe("a", key(slot)), model.remove(&slot).is_some());
            }
            let mut found = Matches::default();
            index.matches("a", &mut found);
            prop_assert_eq!(found.direct.len(), model.len());
            let found: BTreeMap<u32, Subscription> = found.direct.iter().map(|(key, s)| (key.slot, *s)).collect();
            prop_assert_eq!(&found, &model);
        }
        prop_assert_eq!((index.len(), index.nodes()), (0, 0));
    }

    /// A topic finds each group whose filter matches, with the members it has now. MQTT 5.0 §4.8.2.
    #[test]
    fn groups_agree_with_the_plain_matcher(
        steps in prop::collection::vec((0_usize..2, filter(), 0_u32..3, any::<bool>()), 0..40),
        topics in prop::collection::vec(topic(), 1..10),
    ) {
        let mut index = Index::default();
        let mut model: BTreeMap<(&str, String), BTreeSet<u32>> = BTreeMap::new();
        for (share, filter, slot, add) in steps {
            let share = ["g", "h"][share];
            if add {
                let old = index.subscribe_shared(share, &filter, key(slot), Subscription::default(), Arc::default());
                prop_assert_eq!(old.is_none(), model.entry((share, filter)).or_default().insert(slot));
            } else {
                let had = index.unsubscribe_shared(share, &filter, key(slot));
                prop_assert_eq!(had, model.entry((share, filter)).or_default().remove(&slot));
            }
        }
        model.retain(|_, slots| !slots.is_empty());
        prop_assert_eq!(index.len(), model.values().map(BTreeSet::len).sum::<usize>());
        let mut found = Matches::default();
        for topic in topics {
            index.matches(&topic, &mut found);
            let groups: Vec<((&str, String), BTreeSet<u32>)> = found.groups.iter().map(|group| {
                let slots = group.members.iter().map(|member| member.session.slot).collect();
                ((&*group.share, group.filter.to_string()), slots)
            }).collect();
            prop_assert!(found.direct.is_empty());
            let count = groups.len();
            let groups: BTreeMap<_, _> = groups.into_iter().collect();
            prop_assert_eq!(groups.len(), count, "no group is found twice");
            let mut wanted = model.clone();
            wanted.retain(|(_, filter), _| matches(filter, &topic));
            prop_assert_eq!(groups, wanted, "topic {}", topic);
        }
        for ((share, filter), slots) in &model {
            for slot in slots {
                prop_assert!(index.unsubscribe_shared(share, filter, key(*slot)));
            }
        }
        prop_assert_eq!((index.len(), index.nodes()), (0, 0));
    }

    /// Expired messages are not found, and sweeping removes those and no others. [MQTT-3.3.2-5]
    #[test]
    fn messages_expire_at_their_time(
        steps in prop::collection::vec((topic(), prop::option::of(0_u64..20)), 0..40),
        now in 0_u64..20,
    ) {
        let mut retained = Retained::new(1000, 1 << 20);
        let mut model: BTreeMap<String, Option<u64>> = BTreeMap::new();
        for (topic, expires_at_ms) in steps {
            retained.set(Arc::new(message(&topic, expires_at_ms)), None).unwrap();
            model.insert(topic, expires_at_ms);
        }
        model.retain(|_, at| at.is_none_or(|at| at > now));
        let mut found = Vec::new();
        for filter in ["#", "$s/#"] {
            retained.walk(filter, &Position::default(), (now, u64::MAX), usize::MAX, &mut found);
        }
        let mut topics = topics_of(&found);
        topics.sort_unstable();
        prop_assert_eq!(topics, model.keys().map(String::as_str).collect::<Vec<_>>());
        let expired = retained.len() - model.len();
        let swept = std::iter::from_fn(|| retained.remove_expired(now)).count();
        prop_assert_eq!((swept, retained.len()), (expired, model.len()));
        while retained.remove_expired(u64::MAX).is_some() {}
        for (topic, at) in &model {
            prop_assert_eq!(retained.remove(topic), at.is_none());
        }
        prop_assert_eq!((retained.len(), retained.bytes()), (0, 0));
    }
}

/// Topics of the greatest possible depth cost neither stack nor, afterwards, memory. [MQTT-4.7.3-3]
#[test]
fn deepest_retained_topic_comes_and_goes() {
    let deep = "/".repeat(65_535);
    let mut retained = Retained::new(10, 1 << 30);
    retained.set(Arc::new(message(&deep, None)), None).unwrap();
    let mut found = Vec::new();
    for filter in ["#", "/#", &format!("{}#", "+/".repeat(65_535)), &deep] {
        retained.walk(filter, &Position::default(), (0, u64::MAX), 10, &mut found);
    }
    assert_eq!(found.len(), 4);
    assert!(retained.remove(&deep));
    assert_eq!((retained.len(), retained.bytes()), (0, 0));
}

/// Filters of the greatest possible depth cost neither stack nor, afterwards, memory. [MQTT-4.7.3-3]
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
