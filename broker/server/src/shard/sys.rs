//! `$SYS`: the broker's own numbers, as retained messages.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use wasmqtt_protocol::codec::Qos;
use wasmqtt_protocol::router::Message;
use wasmqtt_protocol::session::Incoming;

use super::Shard;

impl Shard {
    pub(super) fn publish_sys(&mut self) {
        let shared = Arc::clone(&self.shared);
        let stats = &shared.stats;
        let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed).to_string();
        let retained = shared.retained().len();
        let values = [
            ("version", concat!("wasmqtt ", env!("CARGO_PKG_VERSION")).to_owned()),
            ("uptime", (self.shared.uptime_ms() / 1000).to_string()),
            ("clients/connected", shared.connections.load(Ordering::Relaxed).to_string()),
            ("clients/total", stats.sessions.load(Ordering::Relaxed).to_string()),
            ("subscriptions/count", stats.subscriptions.load(Ordering::Relaxed).to_string()),
            ("retained messages/count", retained.to_string()),
            ("messages/received", count(&stats.messages_received)),
            ("messages/sent", count(&stats.messages_sent)),
            ("messages/dropped", count(&stats.messages_dropped)),
            ("bytes/received", count(&stats.bytes_received)),
            ("bytes/sent", count(&stats.bytes_sent)),
            ("routes/built", count(&stats.routes_built)),
        ];
        let plugins = self.plugins.status().into_iter().map(|(name, value)| (format!("plugins/{name}"), value));
        for (name, value) in values.map(|(name, value)| (name.to_owned(), value)).into_iter().chain(plugins) {
            let message = Arc::new(Message {
                topic: format!("$SYS/broker/{name}").into(),
                payload: Bytes::from(value),
                properties: Bytes::new(),
                qos: Qos::AtMostOnce,
                retain: true,
                expires_at_ms: None,
                publisher: None,
            });
            let route = self.route(&message.topic);
            self.publish_to(&route, &Incoming::from_message(&message));
        }
    }
}
