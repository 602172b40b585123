//! Subscriptions by Topic Filter.

use std::sync::Arc;

use super::trie::Trie;
use super::{Availability, Group, Member, SessionKey, Subscription};

#[derive(Debug, Default)]
struct Subscribers {
    direct: Vec<(SessionKey, Subscription)>,
    groups: Vec<Arc<Group>>,
}

impl Subscribers {
    fn is_used(&self) -> bool {
        !self.direct.is_empty() || !self.groups.is_empty()
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

    /// Adds a subscription, or replaces that of the same Session and filter. [MQTT-3.8.4-3]
    pub fn subscribe(&mut self, filter: &str, session: SessionKey, subscription: Subscription) -> Option<Subscription> {
        let node = self.trie.entry(filter);
        let direct = &mut self.trie.value_mut(node).direct;
        if let Some((_, old)) = direct.iter_mut().find(|(other, _)| *other == session) {
            return Some(std::mem::replace(old, subscription));
        }
        direct.push((session, subscription));
        self.len += 1;
        None
    }

    /// Removes a subscription; `false` if there was none.
    pub fn unsubscribe(&mut self, filter: &str, session: SessionKey) -> bool {
        let Some(node) = self.trie.find(filter) else { return false };
        let direct = &mut self.trie.value_mut(node).direct;
        let Some(place) = direct.iter().position(|(other, _)| *other == session) else { return false };
        direct.swap_remove(place);
        if direct.is_empty() {
            *direct = Vec::new();
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
            out.direct.extend_from_slice(&found.direct);
            out.groups.extend(found.groups.iter().cloned());
        });
    }
}
