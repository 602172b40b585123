//! The shard's cache: Topic Name → who gets it.

use std::cell::Cell;
use std::hash::BuildHasher;
use std::rc::Rc;
use std::sync::Arc;

use hashbrown::HashMap;
use wasmqtt_protocol::ports::{Interest, ShardPlugins};
use wasmqtt_protocol::router::{Group, Matches, Member, Target, merge};

use crate::shared::Shared;

/// What an entry of the cache costs beside its topic and its targets: the table's slot and the allocations' own bytes.
const ENTRY_BYTES: usize = 96;

/// Where messages of one topic go.
pub(super) struct Route {
    /// Never used again for another topic.
    pub(super) id: u64,
    bucket: u8,
    generation: (u64, u64),
    /// Sessions on this shard.
    pub(super) local: Vec<Target>,
    /// Sessions elsewhere, by shard.
    pub(super) remote: Vec<(u16, Arc<[Target]>)>,
    /// Shared Subscriptions, each with the place of its next member; one member gets a message.
    pub(super) groups: Vec<(Arc<Group>, Cell<u32>)>,
    /// Plugins that want its messages.
    pub(super) interest: Interest,
    /// Those of `local` and `remote` that the store knows.
    pub(super) stored: Vec<Target>,
}

impl Route {
    pub(super) fn is_empty(&self) -> bool {
        self.local.is_empty() && self.remote.is_empty() && self.groups.is_empty()
    }

    /// Memory that it takes in the cache, its topic included.
    fn bytes(&self, topic: &str) -> usize {
        let remote: usize = self.remote.iter().map(|(_, targets)| targets.len()).sum();
        let targets = self.local.capacity() + self.stored.capacity() + remote;
        let shares = self.remote.capacity() * size_of::<(u16, Arc<[Target]>)>()
            + self.groups.capacity() * size_of::<(Arc<Group>, Cell<u32>)>();
        ENTRY_BYTES + size_of::<Self>() + topic.len() + targets * size_of::<Target>() + shares
    }
}

fn group_bytes(group: &Group) -> usize {
    size_of::<Group>() + group.members.len() * size_of::<Member>()
}

/// Routes by Topic Name, and what they take in memory.
#[derive(Default)]
struct Generation {
    routes: HashMap<Box<str>, Rc<Route>, foldhash::fast::RandomState>,
    /// The Shared Subscriptions of these routes, by address, each counted once: one that somebody joined since then is
    /// in memory for the sake of its routes only.
    groups: HashMap<usize, Arc<Group>, foldhash::fast::RandomState>,
    bytes: usize,
}

impl Generation {
    /// What the groups of this route would add to its own bytes.
    fn cost_of_groups(&self, route: &Route) -> usize {
        let is_new = |group: &&Arc<Group>| !self.groups.contains_key(&(Arc::as_ptr(group) as usize));
        let groups = route.groups.iter().map(|(group, _)| group).filter(is_new);
        groups.map(|group| group_bytes(group)).sum()
    }

    fn insert(&mut self, topic: &str, route: &Rc<Route>, bytes: usize) {
        for (group, _) in &route.groups {
            if self.groups.insert(Arc::as_ptr(group) as usize, Arc::clone(group)).is_none() {
                self.bytes += group_bytes(group);
            }
        }
        self.bytes += bytes;
        if let Some(old) = self.routes.insert(topic.into(), Rc::clone(route)) {
            self.bytes -= old.bytes(topic);
        }
    }
}

/// Two generations: a route that is used moves to the young one, and when that has half of the bytes, the old one is
/// forgotten. So topics in use stay however many there are beside them, and no list of uses has to be kept.
pub(super) struct Routes {
    young: Generation,
    old: Generation,
    bytes_max: usize,
    /// Routes that were looked for in the index, which is the number of the last one.
    built: u64,
    /// Of `built`, as many as [`Routes::take_built`] has given.
    counted: u64,
}

/// A route of the cache.
pub(super) struct Found {
    pub(super) route: Rc<Route>,
    is_young: bool,
}

impl Routes {
    /// `bytes_max`: of both generations together. A single route that is larger is kept alone.
    pub(super) fn new(bytes_max: usize) -> Self {
        Self { young: Generation::default(), old: Generation::default(), bytes_max, built: 0, counted: 0 }
    }

    /// Another bound; holds from the next route on.
    pub(super) fn limit(&mut self, bytes_max: usize) {
        self.bytes_max = bytes_max;
    }

    /// Other plugins may want other topics.
    pub(super) fn forget(&mut self) {
        self.young = Generation::default();
        self.old = Generation::default();
    }

    /// How often a route was not in the cache, or was out of date, since the last call.
    pub(super) fn take_built(&mut self) -> u64 {
        self.built - std::mem::replace(&mut self.counted, self.built)
    }

    /// The route of `topic`, while nobody subscribed or left.
    #[inline]
    pub(super) fn find(&self, topic: &str, shared: &Shared) -> Option<Found> {
        match self.young.routes.get(topic) {
            Some(route) if route.generation == shared.route_generation(route.bucket) => {
                Some(Found { route: Rc::clone(route), is_young: true })
            }
            _ => self.find_old(topic, shared),
        }
    }

    fn find_old(&self, topic: &str, shared: &Shared) -> Option<Found> {
        let route = self.old.routes.get(topic)?;
        let is_valid = route.generation == shared.route_generation(route.bucket);
        is_valid.then(|| Found { route: Rc::clone(route), is_young: false })
    }

    /// Looks a route up in the index, and keeps it. Not for a client that may not publish to the topic: that costs much
    /// where many have subscribed, and would fill the cache.
    pub(super) fn build(
        &mut self,
        topic: &str,
        own: u16,
        shared: &Shared,
        matches: &mut Matches,
        plugins: &dyn ShardPlugins,
    ) -> Rc<Route> {
        self.built += 1;
        let route = Rc::new(build(self.built, topic, own, shared, matches, plugins.interest(topic)));
        self.insert(topic, &route);
        route
    }

    /// Keeps a route that is used.
    #[inline]
    pub(super) fn keep(&mut self, topic: &str, found: Found) -> Rc<Route> {
        if !found.is_young {
            self.insert(topic, &found.route);
        }
        found.route
    }

    fn insert(&mut self, topic: &str, route: &Rc<Route>) {
        let bytes = route.bytes(topic);
        if self.young.bytes + bytes + self.young.cost_of_groups(route) > self.bytes_max / 2 {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(topic, route, bytes);
    }

    #[cfg(test)]
    fn bytes(&self) -> usize {
        self.young.bytes + self.old.bytes
    }
}

fn build(id: u64, topic: &str, own: u16, shared: &Shared, matches: &mut Matches, interest: Interest) -> Route {
    let bucket = Shared::route_bucket(topic);
    let generation = shared.route_generation(bucket);
    shared.index().matches(topic, matches);
    let mut local = Vec::new();
    let mut stored = Vec::new();
    let mut remote: Vec<(u16, Vec<Target>)> = Vec::new();
    let names = shared.stored_sessions();
    for mut target in merge(&mut matches.direct) {
        let shard = target.session.shard;
        target.stored = names.get(&target.session).copied();
        if target.stored.is_some() {
            stored.push(target.clone());
        }
        if shard == own {
            local.push(target);
        } else if let Some((_, targets)) = remote.iter_mut().find(|(other, _)| *other == shard) {
            targets.push(target);
        } else {
            remote.push((shard, vec![target]));
        }
    }
    let remote = remote.into_iter().map(|(shard, targets)| (shard, targets.into())).collect();
    let groups = matches.groups.drain(..).map(|group| (group, Cell::new(random()))).collect();
    Route { id, bucket, generation, local, remote, groups, interest, stored }
}

/// Not for secrets: spreads the members that Shared Subscriptions begin with.
pub(super) fn random() -> u32 {
    foldhash::fast::RandomState::default().hash_one(0_u8) as u32
}

#[cfg(test)]
mod tests {
    use wasmqtt_protocol::router::{SessionKey, Subscription};

    use super::*;

    fn target() -> Target {
        let session = SessionKey { shard: 0, slot: 0, epoch: 0 };
        Target { session, others: None, own: None, stored: None }
    }

    fn route(id: u64, targets: usize) -> Rc<Route> {
        Rc::new(Route {
            id,
            bucket: 0,
            generation: (0, 0),
            local: vec![target(); targets],
            remote: Vec::new(),
            groups: Vec::new(),
            interest: Interest::default(),
            stored: Vec::new(),
        })
    }

    fn kept(routes: &mut Routes, topic: &str, route: &Rc<Route>) {
        routes.keep(topic, Found { route: Rc::clone(route), is_young: false });
    }

    /// Long topics and topics with many receivers count as what they take.
    #[test]
    fn any_number_of_topics_stays_within_the_bytes() {
        let mut routes = Routes::new(1 << 20);
        for id in 0..20_000 {
            let topic = format!("{id}/{}", "x".repeat(id as usize % 3000));
            kept(&mut routes, &topic, &route(id, id as usize % 50));
            assert!(routes.bytes() <= 1 << 20, "{} bytes after {id} topics", routes.bytes());
        }
        kept(&mut routes, "large", &route(20_001, 100_000));
        kept(&mut routes, "small", &route(20_002, 1));
        kept(&mut routes, "small too", &route(20_003, 1));
        assert!(routes.young.bytes <= 1 << 19, "a route that is too large goes with the next");
    }

    /// A flood of topics that are used once does not drive out those in use.
    #[test]
    fn topics_in_use_survive_a_flood_of_others() {
        let mut routes = Routes::new(1 << 20);
        let used = route(0, 1);
        kept(&mut routes, "used", &used);
        for id in 1..100_000 {
            kept(&mut routes, &format!("flood/{id}"), &route(id, 0));
            if id % 500 == 0 {
                let is_young = routes.young.routes.contains_key("used");
                assert!(is_young || routes.old.routes.contains_key("used"), "forgotten after {id} others");
                routes.keep("used", Found { route: Rc::clone(&used), is_young });
            }
        }
    }

    /// A Shared Subscription that members join and leave all the time: what routes hold of its former states counts.
    #[test]
    fn former_states_of_groups_count() {
        let mut routes = Routes::new(1 << 20);
        let availability = Arc::default();
        let member = Member { session: target().session, subscription: Subscription::default(), availability };
        for id in 0..1000 {
            let members = vec![member.clone(); 1000];
            let group = Arc::new(Group { share: "g".into(), filter: "#".into(), members });
            let route =
                Route { groups: vec![(group, Cell::new(0))], ..Rc::into_inner(route(id, 0)).expect("one owner") };
            kept(&mut routes, &id.to_string(), &Rc::new(route));
            assert!(routes.bytes() <= 1 << 20, "{} bytes after {id} changes", routes.bytes());
        }
    }

    /// A topic that is looked up anew, since somebody subscribed, is counted once.
    #[test]
    fn a_route_that_replaces_another_does_not_count_twice() {
        let mut routes = Routes::new(1 << 20);
        for id in 0..10_000 {
            kept(&mut routes, "same", &route(id, 10));
        }
        assert_eq!(routes.bytes(), route(0, 10).bytes("same"));
    }
}
