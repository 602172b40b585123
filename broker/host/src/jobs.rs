//! Components that changed files bring, compiled while the loader does something else.

use std::sync::{Arc, PoisonError};

use bytes::Bytes;

use crate::HostError;
use crate::cancel::Cancel;
use crate::chain::Chain;
use crate::compiling::{Compiled, Compilers};
use crate::config::PluginConfig;
use crate::loader::Loader;
use crate::source::Source;

/// A component that is being compiled for the loader, which does not wait for it. Dropped when nobody wants it any more.
pub(crate) struct Job {
    pub(crate) made_from: String,
    cancel: Cancel,
}

impl Drop for Job {
    /// Nobody wants it any more, or it is done.
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

/// What became of a [`Job`].
pub(crate) struct Done {
    pub(crate) name: String,
    pub(crate) made_from: String,
    pub(crate) compiled: Result<Compiled, HostError>,
}

impl Loader {
    /// The component of a file; `None`: somebody compiles it now. `waits`: it is compiled here unless that is done.
    pub(crate) fn compiled(
        &mut self,
        config: &PluginConfig,
        bytes: &Bytes,
        (digest, made_from): (&str, &str),
        done: &mut Vec<Done>,
        waits: bool,
    ) -> Option<Result<Compiled, HostError>> {
        let compilers = Arc::clone(&self.compilers);
        if let Some(at) = done.iter().position(|done| done.name == config.name && done.made_from == made_from) {
            return Some(done.swap_remove(at).compiled);
        }
        if waits {
            return Some(compilers.component(&config.name, bytes, digest, &self.stop));
        }
        if let Some(compiled) = compilers.cached(digest) {
            return Some(Ok(compiled));
        }
        let (cancel, nudge) = (Cancel::default(), self.nudge.clone());
        let (name, bytes) = (config.name.clone(), bytes.clone());
        let (digest, made_from) = (digest.to_owned(), made_from.to_owned());
        let job = Job { made_from: made_from.clone(), cancel: cancel.clone() };
        let finished = Arc::clone(&self.done);
        let compile = move || {
            let compiled = compilers.component(&name, &bytes, &digest, &cancel);
            if !cancel.is_cancelled() {
                let done = Done { name, made_from, compiled };
                finished.lock().unwrap_or_else(PoisonError::into_inner).push(done);
                if let Some(nudge) = nudge {
                    nudge();
                }
            }
        };
        if let Err(error) = std::thread::Builder::new().name("plugin-compiler".into()).spawn(compile) {
            return Some(Err(HostError::new(format!("cannot start a thread: {error}"))));
        }
        // A job for an older file of it ends here.
        if let Some(known) = self.known.get_mut(&config.name) {
            known.job = Some(job);
        }
        None
    }

    pub(crate) fn end_job(&mut self, name: &str) {
        if let Some(known) = self.known.get_mut(name) {
            known.job = None;
        }
    }

    pub(crate) fn take_done(&mut self) -> Vec<Done> {
        let done = std::mem::take(&mut *self.done.lock().unwrap_or_else(PoisonError::into_inner));
        // What was wanted when it began may not be any more.
        let is_wanted = |done: &Done| {
            let job = self.known.get(&done.name).and_then(|known| known.job.as_ref());
            job.is_some_and(|job| job.made_from == done.made_from)
        };
        done.into_iter().filter(is_wanted).collect()
    }
}

/// The components of what does not serve yet, all at a time, as far as there are compilers.
pub(crate) fn compile_all(compilers: &Compilers, chain: &Chain, wanted: &[PluginConfig], cancel: &Cancel) -> Vec<Done> {
    std::thread::scope(|scope| {
        let compile = |config: &PluginConfig| {
            let source = Source::read(config);
            if chain.link(&config.name).is_some_and(|link| link.serving.made_from == source.made_from) {
                return None;
            }
            let bytes = source.bytes?.ok()?;
            let compiled = compilers.component(&config.name, &bytes, &source.digest, cancel);
            Some(Done { name: config.name.clone(), made_from: source.made_from, compiled })
        };
        let threads: Vec<_> = wanted.iter().map(|config| scope.spawn(move || compile(config))).collect();
        threads.into_iter().filter_map(|thread| thread.join().ok().flatten()).collect()
    })
}
