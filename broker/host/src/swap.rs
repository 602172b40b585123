//! How builds begin to serve, and end.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use tracing::{debug, error, warn};

use crate::background;
use crate::chain::{Candidate, Chain, Link};
use crate::generation::Generation;
use crate::loader::Loader;
use crate::probation::Probation;

/// A build that is prepared and does not serve yet.
pub(crate) struct Built {
    pub(crate) generation: Arc<Generation>,
    /// The one that serves until then.
    pub(crate) old: Option<Arc<Generation>>,
    /// To be kept as a version.
    pub(crate) bytes: Option<Bytes>,
}

impl Built {
    /// It served some already.
    pub(crate) fn promoted(generation: Arc<Generation>, old: &Arc<Generation>) -> Self {
        Self { generation, old: Some(Arc::clone(old)), bytes: None }
    }
}

/// Where a new build goes in the chain.
pub(crate) fn place(new: &Built, running: Option<&Link>) -> Link {
    let generation = Arc::clone(&new.generation);
    match (running, generation.config.trial()) {
        (Some(link), Some(trial)) => {
            Link { serving: Arc::clone(&link.serving), candidate: Some(Candidate { generation, trial }) }
        }
        _ => Link { serving: generation, candidate: None },
    }
}

impl Loader {
    /// The one place where builds begin to serve, and where those that they replace go on probation.
    pub(crate) fn publish(&mut self, mut links: Vec<Link>, built: Vec<Built>) {
        links.sort_by(|a, b| (a.serving.config.order, &a.serving.name).cmp(&(b.serving.config.order, &b.serving.name)));
        let old = self.chain.load_full();
        if old.is_like(&links) {
            return;
        }
        let begun = Instant::now();
        let mut chain = Chain { links, number: old.number + 1, acl_number: old.acl_number };
        chain.acl_number += u64::from(chain.acl() != old.acl());
        let chain = Arc::new(chain);
        self.chain.store(Arc::clone(&chain));
        if let Some(broker) = self.parts.door.get() {
            broker.plugins_changed();
        }
        let swap_us = begun.elapsed().as_micros() as u64;
        debug!(chain = chain.number, swap_us, "plugins swapped");
        chain.generations().for_each(|generation| generation.announce());
        for generation in chain.serving() {
            generation.plugin.begin(generation);
            background::start(&generation.plugin, &self.runtime);
        }
        for Built { generation, old, bytes } in built {
            if let Some(bytes) = bytes {
                self.versions.keep(&generation.name, &generation.digest, &bytes);
            }
            if !chain.serving().any(|serving| Arc::ptr_eq(serving, &generation)) {
                self.versions.is_unproven(&generation.name, &generation.digest);
                continue;
            }
            self.versions.serves(&generation.name, &generation.digest);
            if let Some(old) = old {
                self.probations.push(Probation::new(&old, &generation));
            }
        }
        self.let_go(&old, &chain);
    }

    /// Builds that serve no more are retired, but those that one on probation may have to go back to.
    fn let_go(&mut self, old: &Chain, chain: &Chain) {
        // One that is on probation itself, and was replaced, protects nobody.
        let (kept, over) =
            std::mem::take(&mut self.probations).into_iter().partition(|one: &Probation| chain.holds(&one.new));
        self.probations = kept;
        let freed = over.iter().map(|probation: &Probation| &probation.old);
        for gone in old.generations().chain(freed).filter(|gone| !chain.holds(gone)) {
            if !self.probations.iter().any(|probation| Arc::ptr_eq(&probation.old, gone)) {
                self.retire(gone);
            }
            if chain.link(&gone.name).is_none() && !gone.plugin.is_gone() {
                let points = gone.exports.names();
                let not_asked = points.iter().filter(|name| !matches!(**name, "lifecycle" | "handover"));
                let not_asked = not_asked.copied().collect::<Vec<_>>().join(", ");
                let waiting = gone.plugin.feed.waiting.len() + gone.plugin.feed.aside().0;
                warn!(
                    plugin = %gone.name, generation = gone.number, not_asked, waiting,
                    "plugin unloaded, its file or its entry is gone: it is not asked any more, and what no other plugin \
                     decides is decided as without plugins; messages that wait for it do so until it is there again"
                );
                gone.plugin.end();
                if gone.plugin.feed.is_empty() {
                    self.known.remove(&*gone.name);
                }
            }
        }
        self.forget();
    }

    /// The last step of a build's life, which must not come while it serves.
    pub(crate) fn retire(&self, generation: &Arc<Generation>) {
        if self.chain.load().holds(generation) {
            let plugin = &generation.name;
            error!(%plugin, generation = generation.number, "a build that serves was to be retired; it stays");
            debug_assert!(false, "a build that serves was to be retired");
            return;
        }
        generation.retire();
    }
}
