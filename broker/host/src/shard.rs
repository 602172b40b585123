//! The plugin chain as one shard sees it: its own instances, its own failures.

use std::cell::{Cell, RefCell};
use std::hash::RandomState;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use arc_swap::ArcSwap;
use tokio::sync::Semaphore;
use wasmqtt_protocol::codec::ReasonCode;
use wasmqtt_protocol::ports::{AuthOutcome, AuthRequest, AuthStep, Call, ShardPlugins};

use crate::Chain;
use crate::breaker::Breaker;
use crate::call::{self, Question};
use crate::generation::Generation;

/// Calls of one plugin that may wait for an instance, per shard. More are answered by `on_error`.
pub(crate) const WAITING_MAX: usize = 1024;

/// One build on this shard.
pub(crate) struct Slot {
    pub(crate) generation: Arc<Generation>,
    pub(crate) shard: usize,
    /// As many as there may be instances.
    pub(crate) permits: Semaphore,
    pub(crate) waiting: Cell<usize>,
    pub(crate) breaker: RefCell<Breaker>,
    /// When a failure was last logged, and how many were left out since.
    pub(crate) logged: Cell<(Option<Instant>, u64)>,
    /// Keyed at random: nobody can choose Client Identifiers that collide in the breaker.
    pub(crate) hasher: RandomState,
}

impl Slot {
    fn new(generation: &Arc<Generation>, shard: usize) -> Self {
        Self {
            generation: Arc::clone(generation),
            shard,
            permits: Semaphore::new(generation.config.limits.instances.max(1)),
            waiting: Cell::new(0),
            breaker: RefCell::default(),
            logged: Cell::default(),
            hasher: RandomState::new(),
        }
    }
}

/// See [`crate::PluginHost`].
pub(crate) struct View {
    chain: Arc<ArcSwap<Chain>>,
    shard: usize,
    /// The chain that `slots` were made for.
    seen: RefCell<Arc<Chain>>,
    slots: RefCell<Rc<[Rc<Slot>]>>,
}

impl View {
    pub(crate) fn new(chain: Arc<ArcSwap<Chain>>, shard: usize) -> Self {
        Self { chain, shard, seen: RefCell::default(), slots: RefCell::new(Rc::from([])) }
    }

    /// The slots of the chain that serves now. Builds that go on keep theirs; calls under way keep what they began on.
    fn slots(&self) -> Rc<[Rc<Slot>]> {
        let chain = self.chain.load();
        if !Arc::ptr_eq(&chain, &self.seen.borrow()) {
            let old = Rc::clone(&self.slots.borrow());
            let slot = |generation: &Arc<Generation>| {
                let known = old.iter().find(|slot| Arc::ptr_eq(&slot.generation, generation));
                known.map_or_else(|| Rc::new(Slot::new(generation, self.shard)), Rc::clone)
            };
            *self.slots.borrow_mut() = chain.plugins.iter().filter(|plugin| plugin.has_auth()).map(slot).collect();
            *self.seen.borrow_mut() = Arc::clone(&chain);
        }
        Rc::clone(&self.slots.borrow())
    }
}

impl ShardPlugins for View {
    fn has_auth(&self) -> bool {
        self.chain.load().has_auth()
    }

    fn authenticate(&self, request: Arc<AuthRequest>) -> Call<AuthOutcome> {
        let slots = self.slots();
        Box::pin(async move { ask_all(&slots, &Question::Authenticate(request)).await })
    }

    fn proceed(&self, step: AuthStep) -> Call<AuthOutcome> {
        let slots = self.slots();
        Box::pin(async move {
            if step.plugin.is_empty() {
                return ask_all(&slots, &Question::Proceed(step)).await;
            }
            let Some(slot) = slots.iter().find(|slot| slot.generation.name == step.plugin) else {
                return AuthOutcome::Unavailable;
            };
            match call::ask(slot, &Question::Proceed(step)).await {
                // Nobody else knows the exchange, and the `anonymous` rule must not decide it.
                AuthOutcome::Next => AuthOutcome::Deny(ReasonCode::NOT_AUTHORIZED),
                outcome => outcome,
            }
        })
    }
}

async fn ask_all(slots: &[Rc<Slot>], question: &Question) -> AuthOutcome {
    for slot in slots {
        match call::ask(slot, question).await {
            AuthOutcome::Next => {}
            outcome => return outcome,
        }
    }
    AuthOutcome::Next
}
