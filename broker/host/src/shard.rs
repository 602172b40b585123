//! The plugin chain as one shard sees it: its own instances, its own failures.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use arc_swap::ArcSwap;
use tokio::sync::Semaphore;
use wasmqtt_protocol::ports::{AuthOutcome, AuthRequest, AuthStep, Call, ShardPlugins};

use crate::Chain;
use crate::call::{self, Failures, Question};
use crate::generation::Generation;
use crate::instance::Pooled;

/// Calls of one plugin that may wait for an instance, per shard. More are answered by `on_error`.
pub(crate) const WAITING_MAX: usize = 1024;

/// One build on this shard.
pub(crate) struct Slot {
    pub(crate) generation: Arc<Generation>,
    pub(crate) idle: RefCell<Vec<Pooled>>,
    pub(crate) permits: Semaphore,
    pub(crate) waiting: Cell<usize>,
    pub(crate) failures: RefCell<Failures>,
}

pub(crate) struct View {
    chain: Arc<ArcSwap<Chain>>,
    /// The chain that `slots` were made for.
    seen: RefCell<Arc<Chain>>,
    slots: RefCell<Rc<[Rc<Slot>]>>,
}

impl View {
    pub(crate) fn new(chain: Arc<ArcSwap<Chain>>) -> Self {
        let empty = Arc::new(Chain { plugins: Vec::new() });
        Self { chain, seen: RefCell::new(empty), slots: RefCell::new(Rc::from([])) }
    }

    /// The slots of the chain that serves now. Builds that go on keep theirs; calls under way keep what they began on.
    fn slots(&self) -> Rc<[Rc<Slot>]> {
        let chain = self.chain.load();
        if !Arc::ptr_eq(&chain, &self.seen.borrow()) {
            let old: HashMap<u64, Rc<Slot>> =
                self.slots.borrow().iter().map(|slot| (slot.generation.number, Rc::clone(slot))).collect();
            let slot = |generation: &Arc<Generation>| match old.get(&generation.number) {
                Some(slot) => Rc::clone(slot),
                None => Rc::new(Slot {
                    permits: Semaphore::new(generation.config.limits.instances),
                    generation: Arc::clone(generation),
                    idle: RefCell::default(),
                    waiting: Cell::new(0),
                    failures: RefCell::default(),
                }),
            };
            *self.slots.borrow_mut() = chain.plugins.iter().map(slot).collect();
            *self.seen.borrow_mut() = Arc::clone(&chain);
        }
        Rc::clone(&self.slots.borrow())
    }
}

impl ShardPlugins for View {
    fn has_auth(&self) -> bool {
        self.chain.load().plugins.iter().any(|plugin| plugin.has_auth())
    }

    fn authenticate(&self, request: Arc<AuthRequest>) -> Call<AuthOutcome> {
        let slots = self.slots();
        Box::pin(async move {
            let question = Question::Authenticate(request);
            for slot in slots.iter().filter(|slot| slot.generation.has_auth()) {
                match call::ask(slot, &question).await {
                    AuthOutcome::Next => {}
                    outcome => return outcome,
                }
            }
            AuthOutcome::Next
        })
    }

    fn proceed(&self, step: AuthStep) -> Call<AuthOutcome> {
        let slots = self.slots();
        Box::pin(async move {
            let asked = Arc::clone(&step.plugin);
            let question = Question::Proceed(step);
            for slot in slots.iter().filter(|slot| slot.generation.has_auth()) {
                // An exchange goes on with the plugin that began it; a new one asks them all.
                if !asked.is_empty() && asked != slot.generation.name {
                    continue;
                }
                match call::ask(slot, &question).await {
                    AuthOutcome::Next => {}
                    outcome => return outcome,
                }
            }
            AuthOutcome::Next
        })
    }
}
