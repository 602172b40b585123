//! The shard's cache: Topic Name → who gets it.

use std::cell::Cell;
use std::hash::BuildHasher;
use std::rc::Rc;
use std::sync::Arc;

use hashbrown::HashMap;
use wasmqtt_protocol::ports::{Interest, ShardPlugins};
use wasmqtt_protocol::router::{Group, Matches, Target, merge};

use crate::shared::Shared;

/// Topics a shard remembers; when full it starts anew.
const ROUTES_MAX: usize = 65_536;

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
}

#[derive(Default)]
pub(super) struct Routes {
    cache: HashMap<Box<str>, Rc<Route>, foldhash::fast::RandomState>,
    built: u64,
}

impl Routes {
    /// Other plugins may want other topics.
    pub(super) fn forget(&mut self) {
        self.cache.clear();
    }

    /// The route of `topic`, from the cache while nobody subscribed or left.
    #[inline]
    pub(super) fn get(
        &mut self,
        topic: &str,
        own: u16,
        shared: &Shared,
        matches: &mut Matches,
        plugins: &dyn ShardPlugins,
    ) -> Rc<Route> {
        if let Some(route) = self.cache.get(topic)
            && route.generation == shared.route_generation(route.bucket)
        {
            return Rc::clone(route);
        }
        self.built += 1;
        let route = Rc::new(build(self.built, topic, own, shared, matches, plugins.interest(topic)));
        if self.cache.len() >= ROUTES_MAX {
            self.cache.clear();
        }
        self.cache.insert(topic.into(), Rc::clone(&route));
        route
    }
}

fn build(id: u64, topic: &str, own: u16, shared: &Shared, matches: &mut Matches, interest: Interest) -> Route {
    let bucket = Shared::route_bucket(topic);
    let generation = shared.route_generation(bucket);
    shared.index().matches(topic, matches);
    let mut local = Vec::new();
    let mut stored = Vec::new();
    let mut remote: Vec<(u16, Vec<Target>)> = Vec::new();
    for mut target in merge(&mut matches.direct) {
        let shard = target.session.shard;
        target.stored = shared.stored(target.session);
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
