//! What the broker does for a plugin, within its grants.

use std::net::IpAddr;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use wasmqtt_protocol::codec::{PublishPropertiesBuilder, Qos, ReasonCode};
use wasmqtt_protocol::ports::{BanPattern, Broker, Outgoing, Refusal};
use wasmqtt_protocol::text::escaped;
use wasmtime_wasi_config::WasiConfigVariables;

use crate::bindings::NAME_BYTES_MAX;
use crate::bindings::imports::wasmqtt::plugin::host as wit;
use crate::bindings::types::Pair;
use crate::config::Grants;
use crate::guest::Denials;
use crate::metrics::{self, Kind, series_name};
use crate::network::HttpGrant;
use crate::plugin::Plugin;

/// The broker, once it is there: plugins are loaded before it.
pub(crate) type Door = Arc<OnceLock<Arc<dyn Broker>>>;

/// Text that MQTT can carry.
const STRING_BYTES_MAX: usize = 65_535;
/// User Properties of one message.
const USER_PROPERTIES_MAX: usize = 100;

/// What all instances of one build share.
pub(crate) struct Services {
    pub(crate) plugin: Arc<Plugin>,
    pub(crate) grants: Grants,
    pub(crate) calls_per_sec: u32,
    pub(crate) sockets_max: usize,
    pub(crate) files_max: usize,
    pub(crate) http_requests_max: usize,
    pub(crate) keyvalue_per_sec: u64,
    pub(crate) door: Door,
    /// For `wasi:config/store`.
    pub(crate) settings: WasiConfigVariables,
    pub(crate) http: Arc<[HttpGrant]>,
}

fn refused(from: Refusal) -> wit::Refusal {
    match from {
        Refusal::Busy => wit::Refusal::Busy,
        Refusal::Invalid(text) => wit::Refusal::Invalid(text),
    }
}

fn invalid<T>(text: impl Into<String>) -> Result<T, wit::Refusal> {
    Err(wit::Refusal::Invalid(text.into()))
}

impl Services {
    fn broker(&self) -> Result<&Arc<dyn Broker>, wit::Refusal> {
        self.door.get().ok_or(wit::Refusal::Busy)
    }

    pub(crate) fn publish(&self, from: wit::Outgoing, denials: &Denials) -> Result<(), wit::Refusal> {
        if !self.grants.publish.iter().any(|filter| filter.matches(&from.topic)) {
            let topic = escaped(&from.topic, NAME_BYTES_MAX);
            denials.note(format_args!("publishing to {topic:?}; grants.publish does not cover it"));
            return Err(wit::Refusal::Denied);
        }
        let Some(qos) = Qos::from_bits(from.qos) else { return invalid("qos is 0, 1 or 2") };
        if from.user_properties.len() > USER_PROPERTIES_MAX {
            return invalid("more than 100 user properties");
        }
        let mut properties = PublishPropertiesBuilder::default();
        for Pair { name, value } in &from.user_properties {
            if name.len().max(value.len()) > STRING_BYTES_MAX || name.contains('\0') || value.contains('\0') {
                return invalid("a user property is longer than 65,535 bytes or has a null character");
            }
            properties = properties.user(name, value);
        }
        let outgoing = Outgoing {
            origin: if from.see_own { 0 } else { self.plugin.bit },
            topic: from.topic.into(),
            payload: Bytes::from(from.payload),
            properties: Bytes::from(properties.build()),
            qos,
            retain: from.retain,
            expiry: (from.expiry > 0).then_some(from.expiry),
        };
        self.broker()?.publish(outgoing).map_err(refused)
    }

    pub(crate) fn disconnect(&self, client_id: &str, reason: u8) -> Result<(), wit::Refusal> {
        if !self.grants.disconnect {
            return Err(wit::Refusal::Denied);
        }
        if reason < 0x80 {
            return invalid("the reason is no error code");
        }
        self.broker()?.disconnect(client_id, ReasonCode(reason));
        Ok(())
    }

    pub(crate) fn ban(&self, who: &str, seconds: u32, note: &str) -> Result<(), wit::Refusal> {
        if !self.grants.ban {
            return Err(wit::Refusal::Denied);
        }
        let Some(pattern) = ban_pattern(who) else {
            return invalid("who is `client:ID`, `user:NAME` or `address:IP/BITS`");
        };
        self.broker()?.ban(pattern, seconds, note).map_err(refused)
    }

    pub(crate) fn revoke(&self, client_id: &str) -> Result<(), wit::Refusal> {
        if !self.grants.revoke {
            return Err(wit::Refusal::Denied);
        }
        self.broker()?.revoke((!client_id.is_empty()).then_some(client_id));
        Ok(())
    }

    pub(crate) fn record(&self, kind: Kind, name: &str, labels: &[Pair], value: f64) {
        // Before anything is made of it: what a guest hands over may be megabytes.
        let bytes = name.len() + labels.iter().map(|Pair { name, value }| name.len() + value.len() + 4).sum::<usize>();
        if bytes > metrics::NAME_BYTES_MAX {
            return self.plugin.metrics.lose();
        }
        let labels = labels.iter().map(|Pair { name, value }| (name.as_str(), value.as_str()));
        self.plugin.metrics.record(kind, series_name(name, labels), value);
    }
}

fn ban_pattern(who: &str) -> Option<BanPattern> {
    let (kind, what) = who.split_once(':')?;
    if what.is_empty() || what.len() > STRING_BYTES_MAX {
        return None;
    }
    match kind {
        "client" => Some(BanPattern::ClientId(what.into())),
        "user" => Some(BanPattern::Username(what.into())),
        "address" => {
            let (address, prefix) = what.split_once('/').map_or((what, None), |(address, bits)| (address, Some(bits)));
            let network: IpAddr = address.parse().ok()?;
            let bits_max = if network.is_ipv4() { 32 } else { 128 };
            let prefix = prefix.map_or(Some(bits_max), |bits| bits.parse().ok().filter(|bits| *bits <= bits_max))?;
            Some(BanPattern::Address { network, prefix })
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bans_are_written_as_kind_and_value() {
        let network = |text: &str, prefix| Some(BanPattern::Address { network: text.parse().unwrap(), prefix });
        assert_eq!(ban_pattern("client:a:b"), Some(BanPattern::ClientId("a:b".into())));
        assert_eq!(ban_pattern("user:u"), Some(BanPattern::Username("u".into())));
        assert_eq!(ban_pattern("address:10.0.0.0/8"), network("10.0.0.0", 8));
        assert_eq!(ban_pattern("address:::1"), network("::1", 128));
        for wrong in ["client", "client:", "x:y", "address:10.0.0.0/33", "address:host", "address:1.2.3.4/x"] {
            assert_eq!(ban_pattern(wrong), None, "{wrong}");
        }
    }
}
