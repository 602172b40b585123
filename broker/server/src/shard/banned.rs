//! Bans: clients that are connected and not wanted any more, and the rows of bans in the store.

use std::sync::Arc;

use wasmqtt_protocol::codec::ReasonCode;
use wasmqtt_protocol::router::SessionKey;

use super::{Ending, Shard};

/// Bans that have ended and are forgotten per second.
const ENDED_PER_SWEEP: usize = 10_000;

impl Shard {
    /// Clients were banned by user name or address: all connected ones are looked at, see [`Self::run_sweeps`]. A
    /// thousand new bans cost no more than one.
    pub(super) fn end_banned(&mut self) {
        self.banned.begin(&self.sessions);
    }

    /// The client of this Session was banned.
    pub(super) fn on_banned(&mut self, key: SessionKey) {
        if self.sessions.resolve(key).is_some() {
            self.end_if_banned(key);
        }
    }

    pub(super) fn end_if_banned(&mut self, key: SessionKey) {
        let Some(id) = self.sessions.conn(key.slot) else { return };
        let Some(conn) = self.conns.get(id) else { return };
        let Some(standing) = self.sessions.standing_of(key.slot) else { return };
        let client = Arc::clone(&standing.client);
        let names = std::iter::once(&client.principal).chain(conn.username.as_ref());
        let is_banned = self.shared.bans().find(self.now_ms, &client.client_id, names, conn.address).is_some();
        if is_banned {
            // Banned is for CONNACK alone.
            self.end(id, Ending::Server(ReasonCode::ADMINISTRATIVE_ACTION, "banned"));
        }
    }

    /// Forgets bans that have ended; their rows go, too.
    pub(super) fn sweep_bans(&mut self) {
        self.shared.bans_mut().end(self.now_ms, ENDED_PER_SWEEP);
        self.store_bans();
    }

    /// Has the store keep bans as they are now.
    pub(super) fn store_bans(&mut self) {
        if !self.shared.bans().has_changed() {
            return;
        }
        let changed = self.shared.bans_mut().take_changed();
        for (pattern, ban) in &changed {
            self.durable.write_ban(pattern, ban.as_ref().map(|(until_ms, note)| (*until_ms, &**note)));
        }
    }
}
