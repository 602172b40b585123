//! Events for those who watch, in the words of `wit/`.

use std::sync::Arc;

use wasmqtt_protocol::ports::Event;

use crate::acl::client;
use crate::bindings::events::exports::wasmqtt::plugin::events as wit;
use crate::bindings::types::Pair;
use crate::call::{Question, Said};
use crate::config::{OnError, PluginLimits};
use crate::instance::Running;
use crate::queue::Weight;

pub(crate) struct Observed(pub(crate) Vec<Event>);

impl Question for Observed {
    type Answer = ();

    fn client_id(&self) -> &'static str {
        ""
    }

    fn bytes(&self) -> usize {
        self.0.iter().map(Weight::bytes).sum()
    }

    fn cpu_ms(limits: &PluginLimits) -> u64 {
        limits.cpu_ms
    }

    fn agree(_one: &(), _other: &()) -> bool {
        true
    }

    fn fallback(&self, _on_error: OnError) {}

    async fn put(&self, running: &mut Running, _plugin: &Arc<str>) -> wasmtime::Result<Said<()>> {
        let Some(events) = &running.exports.events else { return Ok(Said::nonsense("it does not export events")) };
        let told: Vec<wit::Event> = self.0.iter().map(event).collect();
        events.wasmqtt_plugin_events().call_observed(&mut running.store, &told).await?;
        Ok(Said::Answer(()))
    }
}

#[allow(clippy::cast_precision_loss, reason = "milliseconds since 1970 fit")]
fn event(from: &Event) -> wit::Event {
    let pair = |(name, value): &(&str, String)| Pair { name: (*name).to_owned(), value: value.clone() };
    wit::Event {
        kind: from.kind.name().to_owned(),
        at: from.at_ms as f64 / 1000.0,
        who: client(&from.client),
        fields: from.fields.iter().map(pair).collect(),
    }
}
