//! The plugins that serve now, in the order they are asked.

use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::generation::Generation;
use crate::{Status, Tried};

/// Immutable: a change makes a new one.
#[derive(Default)]
pub(crate) struct Chain {
    pub(crate) links: Vec<Link>,
    /// Another one for each chain.
    pub(crate) number: u64,
    /// Another one for each chain with other `acl` plugins.
    pub(crate) acl_number: u64,
}

/// One plugin.
#[derive(Clone)]
pub(crate) struct Link {
    pub(crate) serving: Arc<Generation>,
    /// A newer build that is being tried.
    pub(crate) candidate: Option<Candidate>,
}

#[derive(Clone)]
pub(crate) struct Candidate {
    pub(crate) generation: Arc<Generation>,
    pub(crate) trial: Trial,
}

/// How a newer build is tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Trial {
    /// It serves so many of a hundred clients.
    Canary(u8),
    /// It is asked as well, and its answers are compared.
    Shadow,
}

impl Trial {
    /// Whether the build is for that client. The same clients are canaries on every shard and after a restart.
    pub(crate) fn serves(self, client_id: &str) -> bool {
        match self {
            Self::Canary(percent) => {
                BuildHasherDefault::<DefaultHasher>::default().hash_one(client_id) % 100 < u64::from(percent)
            }
            Self::Shadow => false,
        }
    }
}

impl Link {
    /// The build that decides about a client.
    pub(crate) fn build_for(&self, client_id: &str) -> &Arc<Generation> {
        let tried = self.candidate.as_ref().filter(|tried| tried.trial.serves(client_id));
        tried.map_or(&self.serving, |tried| &tried.generation)
    }

    pub(crate) fn status(&self) -> Status {
        let tried = self.candidate.as_ref().map(|candidate| Tried {
            generation: candidate.generation.number,
            digest: candidate.generation.digest.clone(),
            percent: match candidate.trial {
                Trial::Canary(percent) => Some(percent),
                Trial::Shadow => None,
            },
            calls: candidate.generation.calls.load(Ordering::Relaxed),
            failures: candidate.generation.failures.load(Ordering::Relaxed),
            compared: candidate.generation.compared.load(Ordering::Relaxed),
            differs: candidate.generation.differs.load(Ordering::Relaxed),
        });
        Status { candidate: tried, ..self.serving.status() }
    }
}

impl Chain {
    pub(crate) fn serving(&self) -> impl Iterator<Item = &Arc<Generation>> {
        self.links.iter().map(|link| &link.serving)
    }

    /// All builds, those on trial too.
    pub(crate) fn generations(&self) -> impl Iterator<Item = &Arc<Generation>> {
        self.links
            .iter()
            .flat_map(|link| std::iter::once(&link.serving).chain(link.candidate.iter().map(|tried| &tried.generation)))
    }

    /// It serves, or is on trial.
    pub(crate) fn holds(&self, generation: &Arc<Generation>) -> bool {
        self.generations().any(|other| Arc::ptr_eq(other, generation))
    }

    pub(crate) fn link(&self, name: &str) -> Option<&Link> {
        self.links.iter().find(|link| *link.serving.name == *name)
    }

    pub(crate) fn has_auth(&self) -> bool {
        self.serving().any(|plugin| plugin.exports.auth.is_some())
    }

    /// The builds that decide what clients may do: other ones may decide otherwise.
    pub(crate) fn acl(&self) -> Vec<*const Generation> {
        self.generations().filter(|plugin| plugin.exports.acl.is_some()).map(Arc::as_ptr).collect()
    }

    /// Whether the same builds are in the same places.
    pub(crate) fn is_like(&self, links: &[Link]) -> bool {
        let is_same = |a: &Arc<Generation>, b: &Arc<Generation>| Arc::ptr_eq(a, b);
        self.links.len() == links.len()
            && self.links.iter().zip(links).all(|(a, b)| {
                is_same(&a.serving, &b.serving)
                    && match (&a.candidate, &b.candidate) {
                        (None, None) => true,
                        (Some(a), Some(b)) => is_same(&a.generation, &b.generation) && a.trial == b.trial,
                        _ => false,
                    }
            })
    }
}
