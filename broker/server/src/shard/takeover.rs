//! A client connects again while its Session has a connection. MQTT 5.0 §3.1.4, [MQTT-3.1.4-3].
//!
//! What the older connection had sent counts, its DISCONNECT above all: it is read to its end before the Session goes to
//! the newer one. Connections are numbered as they are accepted, since shards may see their CONNECT packets in another
//! order: an older connection never takes a Session away from a newer one.

use wasmqtt_protocol::codec::ReasonCode;
use wasmqtt_protocol::ports::Grant;

use super::conn::State;
use super::connect::Opening;
use super::gate::Reason;
use super::{Ending, Shard};

/// How much is read of a connection that loses its Session, and for how long, if it goes on sending or waits for plugins.
const LAST_BYTES_MAX: u32 = 16 << 20;
const LAST_MS_MAX: u64 = 2000;

const TAKEN_OVER: Ending = Ending::Server(ReasonCode::SESSION_TAKEN_OVER, "another connection took the Session over");

/// A connection that is read to its end, and the one that waits for that.
pub(super) struct Takeover {
    old: (usize, u32),
    /// `None`: nobody waits, the Session has another connection already.
    new: Option<(usize, u32)>,
    until_ms: u64,
}

impl Shard {
    /// `old` has the Session that `id` is to have.
    pub(super) fn take_over(&mut self, id: usize, old: usize, opening: Box<Opening>, grant: Grant) {
        if self.conns[old].number > self.conns[id].number {
            // What this one has sent comes late, and counts as if it had come in time.
            self.open_apart(id, *opening, &grant);
            return self.read_to_end(id, None);
        }
        let conn = &mut self.conns[id];
        conn.state = State::TakingOver { opening, grant: Box::new(grant) };
        conn.gate.close(Reason::Leaving, self.now_ms);
        let new = (id, conn.epoch);
        self.read_to_end(old, Some(new));
    }

    /// Has what the client has sent read to its end, and then the connection ended; in this turn, if it is little.
    fn read_to_end(&mut self, old: usize, new: Option<(usize, u32)>) {
        let Some(conn) = self.conns.get_mut(old) else { return };
        if conn.last_bytes.is_none() {
            conn.last_bytes = Some(LAST_BYTES_MAX);
            conn.is_caught_up = false;
        }
        self.takeovers.push(Takeover { old: (old, conn.epoch), new, until_ms: self.now_ms + LAST_MS_MAX });
    }

    /// Reads on those that lose their Sessions, and goes on with those that wait for that.
    pub(super) fn run_takeovers(&mut self) {
        for takeover in std::mem::take(&mut self.takeovers) {
            if !self.is_over(&takeover) {
                self.on_readable(takeover.old.0);
            }
            if self.is_over(&takeover) {
                self.finish(takeover);
            } else {
                self.takeovers.push(takeover);
            }
        }
    }

    fn is_over(&self, takeover: &Takeover) -> bool {
        let (old, epoch) = takeover.old;
        let Some(conn) = self.conns.get(old).filter(|conn| conn.epoch == epoch) else { return true };
        !matches!(conn.state, State::Live { .. })
            || conn.is_caught_up
            || conn.last_bytes == Some(0)
            || self.now_ms >= takeover.until_ms
    }

    fn finish(&mut self, takeover: Takeover) {
        let (old, epoch) = takeover.old;
        if self.is_current(old, epoch) && matches!(self.conns[old].state, State::Live { .. }) {
            self.end(old, TAKEN_OVER);
        }
        let Some((id, _)) = takeover.new.filter(|(id, epoch)| self.is_current(*id, *epoch)) else { return };
        let conn = &mut self.conns[id];
        match std::mem::replace(&mut conn.state, State::New) {
            State::TakingOver { opening, grant } => self.admit_again(id, opening, *grant),
            other => conn.state = other,
        }
    }
}
