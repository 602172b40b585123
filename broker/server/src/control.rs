//! The broker as plugins reach it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tracing::info;
use wasmqtt_protocol::codec::ReasonCode;
use wasmqtt_protocol::ports::{BanPattern, Broker, Outgoing, Refusal};
use wasmqtt_protocol::router::MessageId;
use wasmqtt_protocol::topic::is_valid_topic_name;

use crate::bans::canonical;
use crate::mailbox::{Mail, Mailbox, Wish};
use crate::memory::Pressure;
use crate::shared::Shared;

/// Handed to plugins.
pub(crate) struct Control(pub(crate) Arc<Shared>);

impl Broker for Control {
    fn publish(&self, message: Outgoing) -> Result<(), Refusal> {
        let shared = &self.0;
        if !is_valid_topic_name(&message.topic) {
            return Err(Refusal::Invalid("not a Topic Name".into()));
        }
        let tunable = shared.tunables.current();
        if !tunable.limits.takes_topic(&message.topic) {
            let why = "a topic beyond limits.topic_levels_max or limits.topic_bytes_max";
            return Err(Refusal::Invalid(why.into()));
        }
        let bytes = message.payload.len() + message.topic.len() + message.properties.len();
        if bytes > tunable.limits.packet_bytes_max as usize {
            return Err(Refusal::Invalid("larger than limits.packet_bytes_max".into()));
        }
        // Always the same shard for a topic, so that the order of a plugin's messages holds.
        let mailbox = &shared.mailboxes[usize::from(Shared::route_bucket(&message.topic)) % shared.mailboxes.len()];
        if mailbox.refuses_plugins() || shared.memory.look(shared.now_ms()) == Pressure::Full {
            return Err(Refusal::Busy);
        }
        mailbox.send(Mail::Publish(Box::new(message)));
        Ok(())
    }

    fn disconnect(&self, client_id: &str, reason: ReasonCode) {
        if let Some(key) = self.0.directory(client_id).get(client_id).copied() {
            let wish = Wish { disconnect: Some(reason), ..Wish::default() };
            self.0.mailboxes[usize::from(key.shard)].wish(client_id, wish);
        }
    }

    fn ban(&self, pattern: BanPattern, seconds: u32, note: &str) -> Result<(), Refusal> {
        let shared = &self.0;
        let now_ms = shared.now_ms();
        info!(?pattern, seconds, note, "ban");
        let pattern = canonical(pattern);
        let until_ms = now_ms + u64::from(seconds) * 1000;
        {
            let mut bans = shared.bans_mut();
            let is_told = bans.has_changed();
            if !bans.set(now_ms, pattern.clone(), until_ms, note) {
                return Err(Refusal::Busy);
            }
            if !is_told && bans.has_changed() {
                shared.mailboxes[0].send(Mail::KeepBans);
            }
        }
        match pattern {
            _ if seconds == 0 => {}
            BanPattern::ClientId(client_id) => {
                if let Some(key) = shared.directory(&client_id).get(&client_id).copied() {
                    shared.mailboxes[usize::from(key.shard)].send(Mail::Banned(key));
                }
            }
            // Who is meant is not known without looking at all clients; once for all bans since the last look.
            BanPattern::Username(_) | BanPattern::Address { .. } => {
                shared.mailboxes.iter().for_each(Mailbox::announce_ban);
            }
        }
        Ok(())
    }

    fn fed(&self, plugin: &Arc<str>, ids: Vec<MessageId>) {
        self.0.mailboxes[0].send(Mail::Fed(Arc::clone(plugin), ids));
    }

    fn plugins_changed(&self) {
        for mailbox in &self.0.mailboxes {
            mailbox.wake();
        }
    }

    fn revoke(&self, client_id: Option<&str>) {
        if let Some(client_id) = client_id {
            if let Some(key) = self.0.directory(client_id).get(client_id).copied() {
                self.0.mailboxes[usize::from(key.shard)].wish(client_id, Wish { revoke: true, ..Wish::default() });
            }
            return;
        }
        self.0.revocations.fetch_add(1, Ordering::Release);
        self.plugins_changed();
    }
}
