//! What a plugin wants to be shown.

use wasmqtt_protocol::ports::EventKind;
use wasmqtt_protocol::topic::Filter;

use crate::bindings::lifecycle::exports::wasmqtt::plugin::lifecycle as wit;

/// Topic Filters one plugin may register.
const FILTERS_MAX: usize = 1000;

#[derive(Debug, Default)]
pub(crate) struct Registration {
    pub(crate) filters: Vec<Filter>,
    pub(crate) before_store: bool,
    pub(crate) at_rest: bool,
    pub(crate) committed: bool,
    pub(crate) payload: bool,
    /// Set of [`EventKind::bit`].
    pub(crate) events: u32,
}

impl Registration {
    pub(crate) const NOTHING: Self =
        Self { filters: Vec::new(), before_store: false, at_rest: false, committed: false, payload: false, events: 0 };

    pub(crate) fn checked(from: wit::Registration) -> Result<Self, String> {
        if from.filters.len() > FILTERS_MAX {
            return Err(format!("{} filters; at most {FILTERS_MAX} are allowed", from.filters.len()));
        }
        let filter = |text: &String| Filter::parse(text).map_err(|error| format!("filter {text:?}: {error}"));
        // A kind that this broker does not know will not happen here.
        let kind = |name: &String| EventKind::ALL.into_iter().find(|kind| kind.name() == name);
        Ok(Self {
            filters: from.filters.iter().map(filter).collect::<Result<_, _>>()?,
            before_store: from.before_store,
            at_rest: from.at_rest,
            committed: from.committed,
            payload: from.payload,
            events: from.events.iter().filter_map(kind).fold(0, |set, kind| set | kind.bit()),
        })
    }

    pub(crate) fn wants_topic(&self, topic: &str) -> bool {
        self.filters.iter().any(|filter| filter.matches(topic))
    }
}
