//! The plugin chain as one shard sees it: its own instances, its own failures.

use std::cell::{Cell, RefCell};
use std::hash::RandomState;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use arc_swap::{ArcSwap, Cache};
use tokio::sync::Semaphore;
use wasmqtt_protocol::access::{Decision, Lease, Verdict};
use wasmqtt_protocol::codec::ReasonCode;
use wasmqtt_protocol::ports::{
    Accepted, Access, AuthOutcome, AuthRequest, AuthStep, Call, Client, Event, Interest, ShardPlugins, Submission,
};
use wasmqtt_protocol::topic::{Filter, filter_covers, filters_overlap};

use crate::acl::Authorization;
use crate::auth::Authentication;
use crate::breaker::Breaker;
use crate::call::{self, Lateness};
use crate::chain::{Chain, Link, Trial};
use crate::generation::Generation;
use crate::hook::Shown;
use crate::rewrite::{open, rewrite};

/// How long nobody is asked about a topic that no plugin is responsible for; plugins that come end it.
const NOBODY_ASKED_SECS: u32 = 3600;

/// One build on this shard.
pub(crate) struct Slot {
    pub(crate) generation: Arc<Generation>,
    pub(crate) shard: usize,
    /// As many as there may be instances.
    pub(crate) permits: Semaphore,
    /// Of questions that wait for one.
    pub(crate) waiting_bytes: Cell<usize>,
    pub(crate) breaker: RefCell<Breaker>,
    /// When a failure was last logged, and how many were left out since.
    pub(crate) logged: Cell<(Option<Instant>, u64)>,
    /// Keyed at random: nobody can choose Client Identifiers that collide in the breaker.
    pub(crate) hasher: RandomState,
    /// Of a build in the shadow.
    pub(crate) lateness: Cell<Lateness>,
}

/// One plugin on this shard.
pub(crate) struct PluginSlots {
    /// The build that serves.
    pub(crate) serving: Rc<Slot>,
    /// A newer build that is being tried.
    pub(crate) tried: Option<Tried>,
}

pub(crate) struct Tried {
    pub(crate) slot: Rc<Slot>,
    pub(crate) trial: Trial,
}

impl Slot {
    fn new(generation: &Arc<Generation>, shard: usize) -> Self {
        Self {
            generation: Arc::clone(generation),
            shard,
            permits: Semaphore::new(generation.config.limits.instances.max(1)),
            waiting_bytes: Cell::new(0),
            breaker: RefCell::default(),
            logged: Cell::default(),
            hasher: RandomState::new(),
            lateness: Cell::default(),
        }
    }

    pub(crate) fn is_for_listener(&self, listener: &str) -> bool {
        self.generation.config.is_for_listener(listener)
    }

    /// Whether a decision of this plugin may hold for a whole Topic Filter: not where it is not asked itself, and not
    /// where one `before` it is asked, which may say otherwise about another topic.
    fn may_decide(&self, scope: &Filter, before: &[&Self]) -> bool {
        let topics = &self.generation.config.topics;
        let scope = scope.topic_filter();
        let is_asked_in = |other: &Self| {
            let topics = &other.generation.config.topics;
            topics.is_empty() || topics.iter().any(|filter| filters_overlap(filter.topic_filter(), scope))
        };
        (topics.is_empty() || topics.iter().any(|filter| filter_covers(filter.topic_filter(), scope)))
            && !before.iter().any(|other| is_asked_in(other))
    }
}

impl PluginSlots {
    /// The build that is asked as well.
    pub(crate) fn shadow(&self) -> Option<&Slot> {
        self.tried.as_ref().filter(|tried| tried.trial == Trial::Shadow).map(|tried| &*tried.slot)
    }

    fn slots(&self) -> impl Iterator<Item = &Rc<Slot>> {
        std::iter::once(&self.serving).chain(self.tried.iter().map(|tried| &tried.slot))
    }
}

/// See [`crate::PluginHost`].
pub(crate) struct View {
    /// The one that serves: a look at it is one read of memory that nobody writes to.
    chain: RefCell<Cache<Arc<ArcSwap<Chain>>, Arc<Chain>>>,
    shard: usize,
    /// The chain that `slots` were made for.
    seen: RefCell<Arc<Chain>>,
    slots: RefCell<Slots>,
}

/// In the order in which they are asked.
type Slots = Rc<[PluginSlots]>;

impl View {
    pub(crate) fn new(chain: Arc<ArcSwap<Chain>>, shard: usize) -> Self {
        Self {
            chain: RefCell::new(Cache::new(chain)),
            shard,
            seen: RefCell::default(),
            slots: RefCell::new(Rc::from([])),
        }
    }

    /// The plugins of the chain that serves now. Builds that go on keep their slots, also if they serve now and were
    /// tried before; calls under way keep what they began on.
    fn slots(&self) -> Slots {
        let mut chain = self.chain.borrow_mut();
        let chain = chain.load();
        if !Arc::ptr_eq(chain, &self.seen.borrow()) {
            let old = Rc::clone(&self.slots.borrow());
            *self.slots.borrow_mut() = chain.links.iter().map(|link| self.plugin(link, &old)).collect();
            *self.seen.borrow_mut() = Arc::clone(chain);
        }
        Rc::clone(&self.slots.borrow())
    }

    fn plugin(&self, link: &Link, old: &[PluginSlots]) -> PluginSlots {
        let slot = |generation: &Arc<Generation>| {
            let mut known = old.iter().flat_map(PluginSlots::slots);
            let known = known.find(|slot| Arc::ptr_eq(&slot.generation, generation));
            known.map_or_else(|| Rc::new(Slot::new(generation, self.shard)), Rc::clone)
        };
        let tried = link.candidate.as_ref();
        let tried = tried.map(|candidate| Tried { slot: slot(&candidate.generation), trial: candidate.trial });
        PluginSlots { serving: slot(&link.serving), tried }
    }
}

impl ShardPlugins for View {
    fn has_auth(&self) -> bool {
        self.chain.borrow_mut().load().has_auth()
    }

    fn authenticate(&self, request: Arc<AuthRequest>) -> Call<AuthOutcome> {
        let slots = self.slots();
        Box::pin(async move { authenticate(&slots, &Authentication::Connect(request)).await })
    }

    fn proceed(&self, step: AuthStep) -> Call<AuthOutcome> {
        let slots = self.slots();
        Box::pin(async move {
            if step.plugin.is_empty() {
                return authenticate(&slots, &Authentication::Step(step)).await;
            }
            let Some(plugin) = slots.iter().find(|plugin| plugin.serving.generation.name == step.plugin) else {
                return AuthOutcome::Unavailable;
            };
            match call::consult(plugin, &Authentication::Step(step)).await {
                // Nobody else knows the exchange, and the `anonymous` rule must not decide it.
                AuthOutcome::Next => AuthOutcome::Deny(ReasonCode::NOT_AUTHORIZED),
                outcome => outcome,
            }
        })
    }

    fn has_acl(&self) -> bool {
        self.chain.borrow_mut().load().serving().any(|plugin| plugin.exports.acl.is_some())
    }

    fn epoch(&self) -> (u64, u64) {
        let mut chain = self.chain.borrow_mut();
        let chain = chain.load();
        (chain.number, chain.acl_number)
    }

    fn authorize(&self, client: Arc<Client>, accesses: Arc<[Access]>) -> Call<Vec<Decision>> {
        let slots = self.slots();
        Box::pin(async move { authorize(&slots, client, &accesses).await })
    }

    fn interest(&self, topic: &str) -> Interest {
        let mut interest = Interest::default();
        for PluginSlots { serving: slot, .. } in &*self.slots() {
            let wanted = slot.generation.registration();
            let is_here = slot.generation.exports.storage_hook.is_some() && slot.generation.config.is_for_topic(topic);
            if is_here && wanted.wants_topic(topic) {
                let bit = slot.generation.plugin.bit;
                interest.before |= if wanted.before_store { bit } else { 0 };
                interest.committed |= if wanted.committed { bit } else { 0 };
            }
        }
        interest
    }

    fn before_store(&self, messages: Vec<Submission>) -> Call<Vec<Accepted>> {
        let slots = self.slots();
        Box::pin(async move { rewrite(&slots, messages).await })
    }

    fn after_load(&self, messages: Vec<Submission>) -> Call<Vec<Accepted>> {
        let slots = self.slots();
        Box::pin(async move { open(&slots, messages).await })
    }

    fn wants_interest(&self) -> bool {
        self.slots().iter().any(|plugin| plugin.serving.generation.exports.cluster.is_some())
    }

    fn interest_changed(&self, filter: &str, is_wanted: bool) {
        for PluginSlots { serving: slot, .. } in
            self.slots().iter().filter(|plugin| plugin.serving.generation.exports.cluster.is_some())
        {
            slot.generation.plugin.interest.push(std::iter::once((filter.to_owned(), is_wanted)));
        }
    }

    fn committed(&self, messages: Vec<Submission>) {
        for PluginSlots { serving: slot, .. } in &*self.slots() {
            let bit = slot.generation.plugin.bit;
            let is_wanted = |sent: &&Submission| {
                sent.plugins & bit != 0
                    && slot.is_for_listener(sent.client.as_ref().map_or("", |client| &client.listener))
            };
            if slot.generation.registration().committed && messages.iter().any(|sent| is_wanted(&sent)) {
                let lost = slot.generation.plugin.feed.waiting.push(messages.iter().filter(is_wanted).map(Shown::from));
                slot.generation.lost(&lost);
            }
        }
    }

    fn names(&self, plugins: u64) -> Vec<Arc<str>> {
        let slots = self.slots();
        let named = slots.iter().filter(|plugin| plugins & plugin.serving.generation.plugin.bit != 0);
        named.map(|plugin| Arc::clone(&plugin.serving.generation.name)).collect()
    }

    fn wanted_events(&self) -> u32 {
        self.slots().iter().fold(0, |wanted, plugin| wanted | plugin.serving.generation.registration().events)
    }

    fn observe(&self, events: Vec<Event>) {
        for PluginSlots { serving: slot, .. } in &*self.slots() {
            let wanted = slot.generation.registration().events;
            let is_wanted =
                |event: &&Event| wanted & event.kind.bit() != 0 && slot.is_for_listener(&event.client.listener);
            if events.iter().any(|event| is_wanted(&event)) {
                slot.generation.plugin.events.push(events.iter().filter(is_wanted).cloned());
            }
        }
    }

    fn set_crowded(&self, crowded: bool) {
        for PluginSlots { serving: slot, .. } in &*self.slots() {
            slot.generation.plugin.share(self.shard).set_crowded(crowded);
        }
    }

    fn status(&self) -> Vec<(String, String)> {
        self.chain.borrow_mut().load().links.iter().flat_map(|link| link.status().into_topics()).collect()
    }
}

async fn authenticate(slots: &[PluginSlots], question: &Authentication) -> AuthOutcome {
    let listener = &question.request().listener;
    let is_responsible = |plugin: &&PluginSlots| {
        plugin.serving.generation.exports.auth.is_some() && plugin.serving.is_for_listener(listener)
    };
    for plugin in slots.iter().filter(is_responsible) {
        match call::consult(plugin, question).await {
            AuthOutcome::Next => {}
            outcome => return outcome,
        }
    }
    AuthOutcome::Next
}

/// What nobody is responsible for is allowed, as without any plugin; what all pass on is left without verdict.
async fn authorize(slots: &[PluginSlots], client: Arc<Client>, accesses: &[Access]) -> Vec<Decision> {
    let mut decisions: Vec<Option<Decision>> = vec![None; accesses.len()];
    let mut failed = vec![false; accesses.len()];
    let mut was_asked = vec![false; accesses.len()];
    let mut before: Vec<&Slot> = Vec::new();
    let is_responsible = |plugin: &&PluginSlots| {
        plugin.serving.generation.exports.acl.is_some() && plugin.serving.is_for_listener(&client.listener)
    };
    for plugin in slots.iter().filter(is_responsible) {
        let slot = &plugin.serving;
        let is_open = |at: &usize| decisions[*at].is_none() && slot.generation.config.is_for_access(&accesses[*at]);
        let open: Vec<usize> = (0..accesses.len()).filter(is_open).collect();
        if open.is_empty() {
            before.push(slot);
            continue;
        }
        let asked = open.iter().map(|at| accesses[*at].clone()).collect();
        let question = Authorization { client: Arc::clone(&client), accesses: asked };
        for (at, mut decision) in open.into_iter().zip(call::consult(plugin, &question).await) {
            was_asked[at] = true;
            failed[at] |= decision.failed;
            if let Some(lease) = &mut decision.lease {
                lease.scope = lease.scope.take().filter(|scope| slot.may_decide(scope, &before));
            }
            if decision.verdict.is_some() {
                decisions[at] = Some(decision);
            }
        }
        before.push(slot);
    }
    let nobody = Decision {
        verdict: Some(Verdict::Allow),
        lease: Some(Lease { scope: None, seconds: NOBODY_ASKED_SECS }),
        failed: false,
    };
    let passed_on = |at: usize| Decision { failed: failed[at], ..Decision::default() };
    let or_default = |(at, decision): (usize, Option<Decision>)| match decision {
        Some(decision) => decision,
        None if was_asked[at] => passed_on(at),
        None => nobody.clone(),
    };
    decisions.into_iter().enumerate().map(or_default).collect()
}
