//! Builds that have to prove themselves: on trial beside the one that serves, or on probation in its place.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tracing::{debug, info, warn};

use crate::HostError;
use crate::chain::{Candidate, Link, Trial};
use crate::loader::Loader;
use crate::probation::{Judgement, Probation};
use crate::swap::Built;

impl Loader {
    /// Ends a trial: the build on trial serves everybody.
    pub(crate) fn promote(&mut self, name: &str) -> Result<(), HostError> {
        let chain = self.chain.load_full();
        let Some(Link { candidate: Some(candidate), serving }) = chain.link(name) else {
            return Err(HostError::new(format!("no build of {name:?} is on trial")));
        };
        let generation = Arc::clone(&candidate.generation);
        let links = chain.links.iter().map(|link| {
            if link.serving.name == generation.name {
                Link { serving: Arc::clone(&generation), candidate: None }
            } else {
                link.clone()
            }
        });
        let links = links.collect();
        info!(plugin = name, generation = generation.number, "plugin promoted");
        self.publish(links, vec![Built::promoted(generation, serving)]);
        Ok(())
    }

    /// The build on trial goes, and is not tried again until its file changes.
    pub(crate) fn drop_candidate(&mut self, name: &str, why: &str) {
        let chain = self.chain.load_full();
        let Some(Link { candidate: Some(candidate), .. }) = chain.link(name) else { return };
        warn!(plugin = name, generation = candidate.generation.number, why, "plugin on trial dropped");
        self.refuse(name, &candidate.generation.made_from);
        let without = |link: &Link| match &*link.serving.name {
            found if found == name => Link { candidate: None, ..link.clone() },
            _ => link.clone(),
        };
        self.publish(chain.links.iter().map(without).collect(), Vec::new());
    }

    /// Looks after builds that serve since a short time: those that fail more than their predecessors go.
    pub(crate) fn check_probations(&mut self) {
        for probation in std::mem::take(&mut self.probations) {
            match probation.judge() {
                Judgement::TooEarly => self.probations.push(probation),
                Judgement::Fails => self.undo(&probation),
                Judgement::Passed => {
                    debug!(plugin = %probation.new.name, generation = probation.new.number, "probation passed");
                    self.retire(&probation.old);
                }
            }
        }
        for link in &self.chain.load_full().links {
            let Some(Candidate { generation, trial }) = &link.candidate else { continue };
            let name = link.serving.name.to_string();
            if Probation::fails_more(&link.serving, generation) {
                self.drop_candidate(&name, "it fails more than the serving build");
            } else if matches!(trial, Trial::Canary(_)) && generation.born.elapsed() >= generation.config.canary_time()
            {
                let _ = self.promote(&name);
            }
        }
    }

    /// Back to the predecessor.
    fn undo(&mut self, probation: &Probation) {
        let Probation { old, new, .. } = probation;
        let chain = self.chain.load_full();
        if !chain.link(&new.name).is_some_and(|link| Arc::ptr_eq(&link.serving, new)) {
            return;
        }
        let (plugin, failures) = (&new.name, new.failures.load(Ordering::Relaxed));
        warn!(%plugin, generation = new.number, failures, back_to = old.number, "plugin rolled back, it keeps failing");
        new.plugin.counters.rolled_back.fetch_add(1, Ordering::Relaxed);
        self.refuse(plugin, &new.made_from);
        self.versions.is_unproven(plugin, &new.digest);
        let back = |link: &Link| {
            if Arc::ptr_eq(&link.serving, new) {
                Link { serving: Arc::clone(old), candidate: None }
            } else {
                link.clone()
            }
        };
        self.publish(chain.links.iter().map(back).collect(), Vec::new());
    }
}
