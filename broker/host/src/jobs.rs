//! Components that changed files bring, compiled while the loader does something else.

use std::sync::{Arc, PoisonError};

use crate::HostError;
use crate::cache;
use crate::cancel::Cancel;
use crate::compiling::Compiled;
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
    /// The component of a file; `None`: somebody compiles it now.
    pub(crate) fn compiled(
        &mut self,
        config: &PluginConfig,
        bytes: &[u8],
        made_from: &str,
        done: &mut Vec<Done>,
        strict: bool,
    ) -> Option<Result<Compiled, HostError>> {
        let (compilers, digest) = (Arc::clone(&self.compilers), cache::digest(bytes));
        if let Some(at) = done.iter().position(|done| done.name == config.name && done.made_from == made_from) {
            return Some(done.swap_remove(at).compiled);
        }
        if strict {
            return Some(compilers.component(&config.name, bytes, &digest, &self.stop));
        }
        if let Some(compiled) = compilers.cached(&digest) {
            return Some(Ok(compiled));
        }
        let (cancel, nudge) = (Cancel::default(), self.nudge.clone());
        let (name, made_from, bytes) = (config.name.clone(), made_from.to_owned(), bytes.to_vec());
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

    /// At the start: all at a time, as far as there are compilers.
    pub(crate) fn compile_all(&self, wanted: &[PluginConfig], done: &mut Vec<Done>) {
        let chain = self.chain.load_full();
        let chain = &chain;
        std::thread::scope(|scope| {
            let compile = |config: &PluginConfig| {
                let source = Source::read(config);
                if chain.link(&config.name).is_some_and(|link| link.serving.made_from == source.made_from) {
                    return None;
                }
                let bytes = source.bytes?.ok()?;
                let digest = cache::digest(&bytes);
                let compiled = self.compilers.component(&config.name, &bytes, &digest, &self.stop);
                Some(Done { name: config.name.clone(), made_from: source.made_from, compiled })
            };
            let threads: Vec<_> = wanted.iter().map(|config| scope.spawn(move || compile(config))).collect();
            done.extend(threads.into_iter().filter_map(|thread| thread.join().ok().flatten()));
        });
    }
}
