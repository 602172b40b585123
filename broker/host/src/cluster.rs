//! Where messages go between brokers, in the words of `wit/`. This broker is alone: it has nobody to tell.

use std::sync::Arc;

use crate::bindings::failure;
use crate::call::{Question, Said};
use crate::config::{OnError, PluginLimits};
use crate::instance::Running;

/// Changes of what is subscribed to here. The answer is what other nodes would be told.
pub(crate) struct InterestChanged {
    pub(crate) added: Vec<String>,
    pub(crate) removed: Vec<String>,
}

impl InterestChanged {
    /// What is left of changes in their order: a filter that came and went did neither.
    pub(crate) fn of(changes: &[(String, bool)]) -> Self {
        let (mut added, mut removed) = (Vec::new(), Vec::new());
        for (filter, is_wanted) in changes {
            let (to, from) = if *is_wanted { (&mut added, &mut removed) } else { (&mut removed, &mut added) };
            match from.iter().position(|other| other == filter) {
                Some(place) => drop(from.swap_remove(place)),
                None => to.push(filter.clone()),
            }
        }
        Self { added, removed }
    }
}

impl Question for InterestChanged {
    type Answer = Vec<u8>;

    fn client_id(&self) -> &'static str {
        ""
    }

    fn bytes(&self) -> usize {
        self.added.iter().chain(&self.removed).map(String::len).sum()
    }

    fn cpu_ms(limits: &PluginLimits) -> u64 {
        limits.cpu_ms
    }

    fn agree(one: &Vec<u8>, other: &Vec<u8>) -> bool {
        one == other
    }

    fn fallback(&self, _on_error: OnError) -> Vec<u8> {
        Vec::new()
    }

    async fn put(&self, running: &mut Running, _plugin: &Arc<str>) -> wasmtime::Result<Said<Vec<u8>>> {
        let Some(cluster) = &running.exports.cluster else { return Ok(Said::nonsense("it does not export cluster")) };
        let cluster = cluster.wasmqtt_plugin_cluster();
        let answer = cluster.call_interest_changed(&mut running.store, &self.added, &self.removed).await?;
        Ok(match answer {
            Ok(advert) => Said::Answer(advert),
            Err(from) => Said::Failure(failure(from)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_that_came_and_went_did_neither() {
        let changes = [("a", true), ("b", true), ("a", false), ("c", false), ("c", true), ("d", false)];
        let changes = changes.map(|(filter, is_wanted)| (filter.to_owned(), is_wanted));
        let InterestChanged { added, removed } = InterestChanged::of(&changes);
        assert_eq!((added, removed), (vec!["b".to_owned()], vec!["d".to_owned()]));
    }
}
