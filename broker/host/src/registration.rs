//! What a plugin wants to be shown.

use wasmqtt_protocol::ports::EventKind;
use wasmqtt_protocol::text::escaped;
use wasmqtt_protocol::topic::Filter;

use crate::bindings::NAME_BYTES_MAX;
use crate::bindings::lifecycle::exports::wasmqtt::plugin::lifecycle as wit;

/// Topic Filters one plugin may register.
const FILTERS_MAX: usize = 1000;

/// What a plugin wants to be shown, see `registration` in `wit/plugin.wit`.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
#[allow(missing_docs, reason = "named as in the contract")]
pub struct Registered {
    pub filters: Vec<String>,
    pub before_store: bool,
    pub at_rest: bool,
    pub committed: bool,
    pub payload: bool,
    pub events: Vec<&'static str>,
}

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
        let filter = |text: &String| {
            Filter::parse(text).map_err(|error| format!("filter {:?}: {error}", escaped(text, NAME_BYTES_MAX)))
        };
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

    /// For displays.
    pub(crate) fn shown(&self) -> Registered {
        let kinds = EventKind::ALL.iter().filter(|kind| self.events & kind.bit() != 0);
        Registered {
            filters: self.filters.iter().map(ToString::to_string).collect(),
            before_store: self.before_store,
            at_rest: self.at_rest,
            committed: self.committed,
            payload: self.payload,
            events: kinds.map(|kind| kind.name()).collect(),
        }
    }

    pub(crate) fn wants_topic(&self, topic: &str) -> bool {
        self.filters.iter().any(|filter| filter.matches(topic))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_filter_is_named_in_short() {
        let filters = vec!["\u{1}".repeat(1 << 20) + "#"];
        let (before_store, at_rest, committed, payload, events) = (false, false, false, false, Vec::new());
        let from = wit::Registration { filters, before_store, at_rest, committed, payload, events, extra: Vec::new() };
        assert!(Registration::checked(from).is_err_and(|error| error.len() < 500));
    }
}
