//! Other settings for plugins while they serve.

use wasmqtt_protocol::topic::Filter;

use crate::HostError;
use crate::cache;
use crate::config::{Grants, PluginConfig};
use crate::jobs::Done;
use crate::loader::{Loader, Occasion};

impl Loader {
    /// Builds every plugin anew whose settings are others, and lets all of them serve in one step; or changes nothing.
    /// Those without an entry any more go. `compiled`: their components, as far as they have others.
    pub(crate) fn reconfigure(&mut self, plugins: Vec<PluginConfig>, compiled: Vec<Done>) -> Result<(), HostError> {
        let old = std::mem::replace(&mut self.config.plugins, plugins);
        let loaded = self.load_all(Occasion::Settings, compiled);
        if loaded.is_err() {
            self.config.plugins = old;
            // What was compiled for files meanwhile may have been taken, and was not used.
            self.known.values_mut().for_each(|known| known.job = None);
            self.forget();
        }
        loaded
    }
}

impl PluginConfig {
    /// Tells settings that make another build from those that make the same: not where its file is, and not how it
    /// begins, which an operator's roll-back overrides. The values themselves are not in it: some are secrets.
    pub(crate) fn fingerprint(&self) -> String {
        // Taken apart, so that a setting that is added is not forgotten here.
        let Self {
            name: _,
            path: _,
            order,
            on_error,
            config,
            files,
            grants,
            listeners,
            topics,
            limits,
            sha256,
            rollout: _,
            probation: _,
        } = self;
        let Grants { publish, disconnect, ban, revoke, keyvalue_mib, environment, http, sockets } = grants;
        let topics: Vec<&str> = topics.iter().map(Filter::as_str).collect();
        let publish: Vec<&str> = publish.iter().map(Filter::as_str).collect();
        let http: Vec<String> = http.iter().map(ToString::to_string).collect();
        let sockets: Vec<String> = sockets.iter().map(ToString::to_string).collect();
        let who = (order, on_error, listeners, topics, sha256);
        let may = (files, publish, disconnect, ban, revoke, keyvalue_mib, environment, http, sockets);
        cache::digest(format!("{who:?} {may:?} {config:?} {limits:?}").as_bytes())
    }
}
