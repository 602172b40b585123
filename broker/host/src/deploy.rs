//! What operators want to serve: all of it, durably, or none.

use bytes::Bytes;

use crate::HostError;
use crate::cancel::Cancel;
use crate::compiling::Compiled;
use crate::config::{PluginConfig, Rollout, is_plugin_name};
use crate::generation::{HandOver, Unready};
use crate::loader::{Loader, Occasion, unnamed};
use crate::source::Source;
use crate::swap::place;
use crate::transaction::Files;

/// A component that an operator wants to serve.
pub(crate) struct Deployed {
    pub(crate) name: String,
    pub(crate) bytes: Bytes,
    /// SHA-256 of the bytes.
    pub(crate) digest: String,
    pub(crate) compiled: Compiled,
}

impl Loader {
    /// Builds all of them and lets them serve in one step, and keeps them in the files of the plugins; or none.
    /// `at_once`: whatever rollout the configuration says.
    pub(crate) fn deploy(
        &mut self,
        deployed: Vec<Deployed>,
        at_once: bool,
        hand_over: HandOver,
        cancel: &Cancel,
    ) -> Result<(), HostError> {
        let result = self.try_deploy(deployed, at_once, hand_over, cancel);
        self.forget();
        result.map_err(|error| HostError::new(format!("{error}; nothing was changed")))
    }

    fn try_deploy(
        &mut self,
        deployed: Vec<Deployed>,
        at_once: bool,
        hand_over: HandOver,
        cancel: &Cancel,
    ) -> Result<(), HostError> {
        let old = self.chain.load_full();
        let wanted = self.wanted(Occasion::Files)?;
        let mut links = old.links.clone();
        let (mut built, mut files) = (Vec::new(), Files::new(self.journal()));
        for Deployed { name, bytes, digest, compiled } in deployed {
            let failed = |error: HostError| HostError::new(format!("plugin {name:?}: {error}"));
            let mut config = match wanted.iter().find(|config| config.name == name) {
                Some(config) => config.clone(),
                None => self.newcomer(&name)?,
            };
            if at_once {
                config.rollout = Rollout::AtOnce;
            }
            let Source { bytes, digest, made_from } = Source::of(&config, bytes, digest);
            let bytes = bytes.transpose().map_err(failed)?.unwrap_or_default();
            files.stage(&config.path, &bytes).map_err(failed)?;
            let running = old.link(&name);
            let link = if let Some(link) = self.known_as(&config, &made_from, running).map_err(failed)? {
                link
            } else {
                let made = self.build(&config, bytes, (digest, made_from), running, compiled, hand_over, cancel);
                let new = made.map_err(|error| failed(unready(error)))?;
                let link = place(&new, running);
                built.push(new);
                link
            };
            links.retain(|link| *link.serving.name != *name);
            links.push(link);
        }
        files.commit()?;
        for new in &built {
            self.forgive(&new.generation.name);
        }
        self.publish(links, built);
        Ok(())
    }

    fn newcomer(&self, name: &str) -> Result<PluginConfig, HostError> {
        let Some(dir) = &self.config.dir else {
            return Err(HostError::new(format!("there is no plugin {name:?} and no plugin folder")));
        };
        let config = unnamed(&dir.join(format!("{name}.wasm"))).filter(|_| is_plugin_name(name));
        config.ok_or_else(|| HostError::new(format!("{name:?} is no name for a plugin")))
    }
}

/// For an operator, who can choose.
fn unready(error: Unready) -> HostError {
    match error {
        Unready::Failed(error) => error,
        Unready::Snapshot(error) => {
            HostError::new(format!("{}; with --fresh it is not asked for that", not_handed_over(&error)))
        }
    }
}

pub(crate) fn not_handed_over(error: &HostError) -> HostError {
    HostError::new(format!("the running build does not hand over what it knows: {error}"))
}
