//! What the broker does for a plugin. In native tests a stand-in does it, see [`crate::testing`].

use crate::bindings::imports::wasmqtt::plugin as wit;

pub use wit::host::{Level, Outgoing, Refusal};

#[cfg(not(target_arch = "wasm32"))]
use crate::testing::{Asked, Sample, record};

/// Writes a line to the broker's log, under the plugin's name.
pub fn log(level: Level, message: &str) {
    #[cfg(target_arch = "wasm32")]
    wit::host::log(level, message);
    #[cfg(not(target_arch = "wasm32"))]
    record(|host| host.lines.push((level, message.to_owned())));
}

/// Logs for somebody who is looking for a fault.
pub fn debug(message: &str) {
    log(Level::Debug, message);
}

/// Logs what an operator likes to know.
pub fn info(message: &str) {
    log(Level::Info, message);
}

/// Logs what should not happen.
pub fn warn(message: &str) {
    log(Level::Warn, message);
}

/// Logs what an operator has to do something about.
pub fn error(message: &str) {
    log(Level::Error, message);
}

impl Outgoing {
    /// QoS 0, not retained, without properties.
    pub fn new(topic: impl Into<String>, payload: impl Into<Vec<u8>>) -> Self {
        Self {
            topic: topic.into(),
            payload: payload.into(),
            qos: 0,
            retain: false,
            expiry: 0,
            user_properties: Vec::new(),
            see_own: false,
        }
    }

    /// The same, retained.
    #[must_use]
    pub fn retained(self) -> Self {
        Self { retain: true, ..self }
    }
}

/// Publishes as the broker itself, to topics that `grants.publish` allows.
///
/// # Errors
/// [`Refusal::Denied`] without the grant, [`Refusal::Busy`] when too much waits, [`Refusal::Invalid`].
pub fn publish(message: &Outgoing) -> Result<(), Refusal> {
    #[cfg(target_arch = "wasm32")]
    return wit::host::publish(message);
    #[cfg(not(target_arch = "wasm32"))]
    record(|host| {
        host.published.push(message.clone());
        host.answer()
    })
}

/// Ends a client's connection (`grants.disconnect`).
///
/// # Errors
/// As [`publish`].
pub fn disconnect(client_id: &str, reason: u8) -> Result<(), Refusal> {
    #[cfg(target_arch = "wasm32")]
    return wit::host::disconnect(client_id, reason);
    #[cfg(not(target_arch = "wasm32"))]
    record(|host| {
        host.asked.push(Asked::Disconnect { client_id: client_id.to_owned(), reason });
        host.answer()
    })
}

/// Keeps clients out (`grants.ban`); `who` is `client:ID`, `user:NAME` or `address:IP/BITS`.
///
/// # Errors
/// As [`publish`].
pub fn ban(who: &str, seconds: u32, note: &str) -> Result<(), Refusal> {
    #[cfg(target_arch = "wasm32")]
    return wit::host::ban(who, seconds, note);
    #[cfg(not(target_arch = "wasm32"))]
    record(|host| {
        host.asked.push(Asked::Ban { who: who.to_owned(), seconds, note: note.to_owned() });
        host.answer()
    })
}

/// Forgets the leases of a client, or of all with an empty name (`grants.revoke`).
///
/// # Errors
/// As [`publish`].
pub fn revoke(client_id: &str) -> Result<(), Refusal> {
    #[cfg(target_arch = "wasm32")]
    return wit::host::revoke(client_id);
    #[cfg(not(target_arch = "wasm32"))]
    record(|host| {
        host.asked.push(Asked::Revoke { client_id: client_id.to_owned() });
        host.answer()
    })
}

#[cfg(target_arch = "wasm32")]
fn pairs(labels: &[(&str, &str)]) -> Vec<crate::Pair> {
    labels.iter().map(|(name, value)| crate::Pair { name: (*name).to_owned(), value: (*value).to_owned() }).collect()
}

/// Adds to a counter.
pub fn count(name: &str, labels: &[(&str, &str)], by: f64) {
    #[cfg(target_arch = "wasm32")]
    wit::metrics::count(name, &pairs(labels), by);
    #[cfg(not(target_arch = "wasm32"))]
    record(|host| host.samples.push(Sample::new("count", name, labels, by)));
}

/// Sets a gauge.
pub fn gauge(name: &str, labels: &[(&str, &str)], value: f64) {
    #[cfg(target_arch = "wasm32")]
    wit::metrics::gauge(name, &pairs(labels), value);
    #[cfg(not(target_arch = "wasm32"))]
    record(|host| host.samples.push(Sample::new("gauge", name, labels, value)));
}

/// Adds a value to a histogram.
pub fn observe(name: &str, labels: &[(&str, &str)], value: f64) {
    #[cfg(target_arch = "wasm32")]
    wit::metrics::observe(name, &pairs(labels), value);
    #[cfg(not(target_arch = "wasm32"))]
    record(|host| host.samples.push(Sample::new("observe", name, labels, value)));
}
