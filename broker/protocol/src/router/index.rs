//! Subscriptions by Topic Filter.

use std::sync::Arc;

use hashbrown::HashMap;

use super::trie::Trie;
use super::{Availability, Group, Member, SessionKey, Subscription};

/// Subscriptions of one filter that are looked through one by one; with more of them, a table says where each is. A
/// hundred thousand clients of one filter would otherwise need seconds to subscribe.
const SCANNED_MAX: usize = 64;

/// Subscriptions of one filter, side by side: a match copies them at once.
#[derive(Debug, Default)]
struct Direct {
    list: Vec<(SessionKey, Subscription)>,
    /// The place of each Session in `list`. There if `list` outgrew [`SCANNED_MAX`], until half of that is left.
    places: Option<Box<HashMap<SessionKey, u32, foldhash::fast::RandomState>>>,
}

impl Direct {
    fn place(&self, session: SessionKey) -> Option<usize> {
        match &self.places {
            Some(places) => places.get(&session).map(|place| *place as usize),
            None => self.list.iter().position(|(other, _)| *other == session),
        }
    }

    fn set(&mut self, session: SessionKey, subscription: Subscription) -> Option<Subscription> {
        if let Some(place) = self.place(session) {
            return Some(std::mem::replace(&mut self.list[place].1, subscription));
        }
        self.list.push((session, subscription));
        if let Some(places) = &mut self.places {
            places.insert(session, self.list.len() as u32 - 1);
        } else if self.list.len() > SCANNED_MAX {
            self.places =
                Some(Box::new((0..).zip(&self.list).map(|(place, (session, _))| (*session, place)).collect()));
        }
        None
    }

    fn remove(&mut self, session: SessionKey) -> bool {
        let Some(place) = self.place(session) else { return false };
        self.list.swap_remove(place);
        if self.list.is_empty() {
            *self = Self::default();
        } else if let Some(places) = &mut self.places {
            if self.list.len() <= SCANNED_MAX / 2 {
                self.places = None;
                self.list.shrink_to_fit();
                return true;
            }
            places.remove(&session);
            if let Some((moved, _)) = self.list.get(place) {
                places.insert(*moved, place as u32);
            }
        }
        true
    }
}

#[derive(Debug, Default)]
struct Subscribers {
    direct: Direct,
    groups: Vec<Arc<Group>>,
}

impl Subscribers {
    fn is_used(&self) -> bool {
        !self.direct.list.is_empty() || !self.groups.is_empty()
    }
}

/// Every subscription of the broker.
#[derive(Debug, Default)]
pub struct Index {
    trie: Trie<Subscribers>,
    len: usize,
}

/// What [`Index::matches`] found; reused from call to call.
#[derive(Debug, Default)]
pub struct Matches {
    /// Subscriptions, perhaps several of one Session.
    pub direct: Vec<(SessionKey, Subscription)>,
    /// Shared Subscriptions.
    pub groups: Vec<Arc<Group>>,
}

impl Index {
    /// Subscriptions in it.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Nobody has subscribed.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Levels it holds in memory; 0 when it is empty.
    pub fn nodes(&self) -> usize {
        self.trie.len()
    }

    /// Somebody subscribes with exactly this filter.
    pub fn has(&self, filter: &str) -> bool {
        self.trie.find(filter).is_some_and(|node| self.trie.value(node).is_used())
    }

    /// Adds a subscription, or replaces that of the same Session and filter. [MQTT-3.8.4-3]
    pub fn subscribe(&mut self, filter: &str, session: SessionKey, subscription: Subscription) -> Option<Subscription> {
        let node = self.trie.entry(filter);
        let old = self.trie.value_mut(node).direct.set(session, subscription);
        self.len += usize::from(old.is_none());
        old
    }

    /// Removes a subscription; `false` if there was none.
    pub fn unsubscribe(&mut self, filter: &str, session: SessionKey) -> bool {
        let Some(node) = self.trie.find(filter) else { return false };
        if !self.trie.value_mut(node).direct.remove(session) {
            return false;
        }
        self.len -= 1;
        self.trie.prune(filter, Subscribers::is_used);
        true
    }

    /// Joins a Shared Subscription, or changes the Session's part in it. MQTT 5.0 §4.8.2.
    pub fn subscribe_shared(
        &mut self,
        share: &str,
        filter: &str,
        session: SessionKey,
        subscription: Subscription,
        availability: Arc<Availability>,
    ) -> Option<Subscription> {
        let node = self.trie.entry(filter);
        let groups = &mut self.trie.value_mut(node).groups;
        let member = Member { session, subscription, availability };
        let Some(group) = groups.iter_mut().find(|group| &*group.share == share) else {
            groups.push(Arc::new(Group { share: share.into(), filter: filter.into(), members: vec![member] }));
            self.len += 1;
            return None;
        };
        let members = &mut Arc::make_mut(group).members;
        if let Some(old) = members.iter_mut().find(|old| old.session == session) {
            return Some(std::mem::replace(old, member).subscription);
        }
        members.push(member);
        self.len += 1;
        None
    }

    /// Leaves a Shared Subscription; `false` if the Session was not in it.
    pub fn unsubscribe_shared(&mut self, share: &str, filter: &str, session: SessionKey) -> bool {
        let Some(node) = self.trie.find(filter) else { return false };
        let groups = &mut self.trie.value_mut(node).groups;
        let Some(place) = groups.iter().position(|group| &*group.share == share) else { return false };
        let members = &groups[place].members;
        let Some(member) = members.iter().position(|member| member.session == session) else { return false };
        if members.len() == 1 {
            groups.swap_remove(place);
        } else {
            Arc::make_mut(&mut groups[place]).members.remove(member);
        }
        self.len -= 1;
        self.trie.prune(filter, Subscribers::is_used);
        true
    }

    /// The Shared Subscription as it is now.
    pub fn group_of(&self, share: &str, filter: &str) -> Option<Arc<Group>> {
        let groups = &self.trie.value(self.trie.find(filter)?).groups;
        groups.iter().find(|group| &*group.share == share).cloned()
    }

    /// Everybody whose filter matches; clears `out` first.
    pub fn matches(&self, topic: &str, out: &mut Matches) {
        out.direct.clear();
        out.groups.clear();
        self.trie.matching_filters(topic, |found| {
            out.direct.extend_from_slice(&found.direct.list);
            out.groups.extend(found.groups.iter().cloned());
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::{Qos, SubscribeOptions};

    fn key(slot: u32) -> SessionKey {
        SessionKey { shard: 0, slot, epoch: 0 }
    }

    fn with_qos(qos: Qos) -> Subscription {
        Subscription { options: SubscribeOptions { qos, ..SubscribeOptions::default() }, id: None }
    }

    fn join(index: &mut Index, share: &str, filter: &str, slot: u32) -> Option<Subscription> {
        index.subscribe_shared(share, filter, key(slot), Subscription::default(), Arc::default())
    }

    fn slots(group: &Group) -> Vec<u32> {
        group.members.iter().map(|member| member.session.slot).collect()
    }

    fn check_matches(filters: &[&str], topic: &str, wanted: &[&str]) {
        let mut index = Index::default();
        for (slot, filter) in (0..).zip(filters) {
            index.subscribe(filter, key(slot), Subscription::default());
        }
        let mut matches = Matches::default();
        index.matches(topic, &mut matches);
        let mut found: Vec<&str> = matches.direct.iter().map(|(key, _)| filters[key.slot as usize]).collect();
        found.sort_unstable();
        assert_eq!(found, wanted, "{topic}");
    }

    /// MQTT 5.0 and 3.1.1 §4.7.1.2.
    #[test]
    fn multi_level_wildcard_also_matches_its_parent_level() {
        let filters = ["#", "sport/#", "sport/tennis/#", "sport/tennis/player1/#"];
        check_matches(&filters, "sport/tennis", &["#", "sport/#", "sport/tennis/#"]);
        check_matches(&filters, "sports", &["#"]);
    }

    /// MQTT 5.0 and 3.1.1 §4.7.1.3.
    #[test]
    fn single_level_wildcard_matches_one_level_that_may_be_empty() {
        let filters = ["+", "+/+", "/+", "sport/+"];
        check_matches(&filters, "/finance", &["+/+", "/+"]);
        check_matches(&filters, "sport/", &["+/+", "sport/+"]);
        check_matches(&filters, "sport", &["+"]);
    }

    /// MQTT 5.0 and 3.1.1 §4.7.2 [MQTT-4.7.2-1].
    #[test]
    fn leading_wildcard_does_not_match_dollar_topics() {
        let filters = ["#", "$SYS/#", "$SYS/+", "+/uptime"];
        check_matches(&filters, "$SYS/uptime", &["$SYS/#", "$SYS/+"]);
        check_matches(&filters, "a/uptime", &["#", "+/uptime"]);
    }

    /// MQTT 5.0 §3.8.4 [MQTT-3.8.4-3].
    #[test]
    fn subscribing_again_replaces_the_subscription() {
        let mut index = Index::default();
        assert_eq!(index.subscribe("a", key(0), with_qos(Qos::AtMostOnce)), None);
        let old = index.subscribe("a", key(0), with_qos(Qos::ExactlyOnce));
        assert_eq!((old, index.len()), (Some(with_qos(Qos::AtMostOnce)), 1));
        let mut matches = Matches::default();
        index.matches("a", &mut matches);
        assert_eq!(matches.direct, [(key(0), with_qos(Qos::ExactlyOnce))]);
    }

    /// The epoch tells a Session from the one that had its place before.
    #[test]
    fn session_in_a_reused_place_is_another_one() {
        let mut index = Index::default();
        index.subscribe("a", key(0), Subscription::default());
        assert!(!index.unsubscribe("a", SessionKey { epoch: 1, ..key(0) }));
        assert_eq!(index.len(), 1);
    }

    /// Share Name and Topic Filter make the group; subscriptions outside of it are apart. MQTT 5.0 §4.8.2.
    #[test]
    fn every_group_and_every_other_subscription_is_matched() {
        let mut index = Index::default();
        join(&mut index, "g", "a/+", 0);
        join(&mut index, "g", "a/+", 1);
        join(&mut index, "h", "a/+", 0);
        join(&mut index, "g", "a/b", 0);
        index.subscribe("a/b", key(0), Subscription::default());
        let mut matches = Matches::default();
        index.matches("a/b", &mut matches);
        let mut groups: Vec<_> = matches.groups.iter().map(|g| (&*g.share, &*g.filter, slots(g))).collect();
        groups.sort_unstable();
        assert_eq!(groups, [("g", "a/+", vec![0, 1]), ("g", "a/b", vec![0]), ("h", "a/+", vec![0])]);
        assert_eq!((matches.direct.len(), index.len()), (1, 5));
    }

    /// A message on its way keeps the members it was routed to.
    #[test]
    fn group_that_was_handed_out_does_not_change() {
        let mut index = Index::default();
        join(&mut index, "g", "a", 0);
        let before = index.group_of("g", "a").unwrap();
        assert!(join(&mut index, "g", "a", 1).is_none());
        assert!(join(&mut index, "g", "a", 1).is_some(), "joining again changes the member");
        let after = index.group_of("g", "a").unwrap();
        assert!(index.unsubscribe_shared("g", "a", key(0)));
        assert_eq!((slots(&before), slots(&after)), (vec![0], vec![0, 1]));
        assert_eq!(slots(&index.group_of("g", "a").unwrap()), [1]);
        assert!(index.unsubscribe_shared("g", "a", key(1)) && !index.unsubscribe_shared("g", "a", key(1)));
        assert!(index.group_of("g", "a").is_none());
        assert_eq!((index.len(), index.nodes()), (0, 0));
    }
}
