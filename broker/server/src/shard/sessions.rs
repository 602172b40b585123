//! The Sessions that live on this shard, online and offline.

use std::sync::Arc;

use wasmqtt_protocol::access::Permits;
use wasmqtt_protocol::ports::Client;
use wasmqtt_protocol::router::SessionKey;
use wasmqtt_protocol::session::Session;

#[derive(Default)]
struct Place {
    epoch: u32,
    session: Option<Box<Session>>,
    conn: Option<usize>,
    /// When the Session ends, if nobody comes back.
    expires_ms: Option<u64>,
    /// When its Will Message is published, if nobody comes back.
    will_ms: Option<u64>,
    /// What the client of the present or last connection may do; `None`: everything.
    standing: Option<Box<Standing>>,
}

/// A client and its permissions.
pub(crate) struct Standing {
    pub(crate) client: Arc<Client>,
    pub(crate) permits: Permits,
    /// When its subscriptions are to be asked about again.
    pub(crate) check_ms: Option<u64>,
    /// See [`Sessions::revoke_all`].
    revocation: u64,
    /// How often what plugins decided for this client was revoked: what they were asked before counts no more.
    pub(super) revoked: u32,
}

impl Standing {
    pub(crate) fn new(client: Arc<Client>, permits: Permits) -> Self {
        Self { client, permits, check_ms: None, revocation: 0, revoked: 0 }
    }

    /// Leases end; rules of authentication stay.
    pub(super) fn revoke(&mut self) {
        self.permits.revoke();
        self.revoked = self.revoked.wrapping_add(1);
    }
}

/// Places that a sweep looks at in one turn.
const SWEEP_PLACES: u32 = 1_000;

/// A walk over all Sessions, a part of it each turn, so that nobody waits for it. Begun again on its way, it goes once
/// around from where it is.
#[derive(Default)]
pub(super) struct Sweep {
    next: u32,
    left: u32,
}

impl Sweep {
    pub(super) fn begin(&mut self, sessions: &Sessions) {
        self.left = sessions.places.len() as u32;
    }

    pub(super) fn is_under_way(&self) -> bool {
        self.left > 0
    }

    /// The Sessions of this turn.
    pub(super) fn take(&mut self, sessions: &Sessions) -> Vec<SessionKey> {
        let count = sessions.places.len() as u32;
        let mut keys = Vec::new();
        for _ in 0..self.left.min(SWEEP_PLACES) {
            self.left -= 1;
            self.next = if self.next < count { self.next } else { 0 };
            keys.extend(sessions.get(self.next).map(|session| session.key));
            self.next += 1;
        }
        keys
    }
}

pub(crate) struct Sessions {
    shard: u16,
    places: Vec<Place>,
    free: Vec<u32>,
    /// How often what plugins decided was revoked for everybody.
    revocations: u64,
}

impl Sessions {
    pub(crate) fn new(shard: u16) -> Self {
        Self { shard, places: Vec::new(), free: Vec::new(), revocations: 0 }
    }

    pub(crate) fn reserve(&mut self) -> SessionKey {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.places.push(Place::default());
            (self.places.len() - 1) as u32
        });
        SessionKey { shard: self.shard, slot, epoch: self.places[slot as usize].epoch }
    }

    pub(crate) fn put(&mut self, session: Session) {
        let place = &mut self.places[session.key.slot as usize];
        place.session = Some(Box::new(session));
    }

    pub(super) fn take(&mut self, slot: u32) -> Option<Box<Session>> {
        let place = &mut self.places[slot as usize];
        let session = place.session.take()?;
        *place = Place { epoch: place.epoch.wrapping_add(1), ..Place::default() };
        self.free.push(slot);
        Some(session)
    }

    #[inline]
    pub(super) fn get(&self, slot: u32) -> Option<&Session> {
        self.places.get(slot as usize)?.session.as_deref()
    }

    #[inline]
    pub(super) fn get_mut(&mut self, slot: u32) -> Option<&mut Session> {
        self.places.get_mut(slot as usize)?.session.as_deref_mut()
    }

    /// The Session and its connection, if it is still the one that the key means.
    #[inline]
    pub(super) fn resolve(&mut self, key: SessionKey) -> Option<(&mut Session, Option<usize>)> {
        let place = self.places.get_mut(key.slot as usize)?;
        if place.epoch != key.epoch {
            return None;
        }
        Some((place.session.as_deref_mut()?, place.conn))
    }

    pub(super) fn conn(&self, slot: u32) -> Option<usize> {
        self.places.get(slot as usize)?.conn
    }

    pub(super) fn set_conn(&mut self, slot: u32, conn: Option<usize>) {
        self.places[slot as usize].conn = conn;
    }

    #[inline]
    pub(super) fn standing(&mut self, slot: u32) -> Option<&mut Standing> {
        let standing = self.places.get_mut(slot as usize)?.standing.as_deref_mut()?;
        if standing.revocation != self.revocations {
            standing.revocation = self.revocations;
            standing.revoke();
        }
        Some(standing)
    }

    /// What plugins decided for anybody counts no more, from now on: each [`Standing`] forgets it when it is next looked
    /// at, so that this takes no walk over all Sessions.
    pub(super) fn revoke_all(&mut self) {
        self.revocations += 1;
    }

    pub(super) fn standing_of(&self, slot: u32) -> Option<&Standing> {
        self.places.get(slot as usize)?.standing.as_deref()
    }

    pub(crate) fn set_standing(&mut self, slot: u32, mut standing: Option<Box<Standing>>) {
        if let Some(standing) = &mut standing {
            standing.revocation = self.revocations;
        }
        self.places[slot as usize].standing = standing;
    }

    /// Places from this one on.
    pub(super) fn slots_from(&self, slot: u32) -> std::ops::Range<u32> {
        slot..self.places.len() as u32
    }

    /// Sets when the Session ends and when its will is published; gives back what was set.
    pub(crate) fn replace_deadlines(
        &mut self,
        slot: u32,
        expires_ms: Option<u64>,
        will_ms: Option<u64>,
    ) -> (Option<u64>, Option<u64>) {
        let place = &mut self.places[slot as usize];
        (std::mem::replace(&mut place.expires_ms, expires_ms), std::mem::replace(&mut place.will_ms, will_ms))
    }

    /// All Sessions with the instants at which they end and their Will Messages are published.
    pub(super) fn all_deadlines(&self) -> impl Iterator<Item = (SessionKey, Option<u64>, Option<u64>)> {
        self.places
            .iter()
            .filter_map(|place| place.session.as_ref().map(|session| (session.key, place.expires_ms, place.will_ms)))
    }

    /// When the Session ends, and when its Will Message is published.
    pub(super) fn deadlines(&self, slot: u32) -> (Option<u64>, Option<u64>) {
        let place = &self.places[slot as usize];
        (place.expires_ms, place.will_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sessions(count: u32) -> Sessions {
        let mut sessions = Sessions::new(0);
        for n in 0..count {
            let key = sessions.reserve();
            sessions.put(Session::new(n.to_string().into(), key));
        }
        sessions
    }

    /// Each Session once, in bounded parts; begun again in the middle, each once more.
    #[test]
    fn a_sweep_sees_each_session_and_never_many_at_once() {
        let sessions = sessions(2_500);
        let mut sweep = Sweep::default();
        sweep.begin(&sessions);
        let first = sweep.take(&sessions);
        assert_eq!(first.len(), SWEEP_PLACES as usize);
        sweep.begin(&sessions);
        let mut seen = std::collections::BTreeSet::new();
        while sweep.is_under_way() {
            let part = sweep.take(&sessions);
            assert!(part.len() <= SWEEP_PLACES as usize);
            for key in part {
                assert!(seen.insert(key.slot), "{} twice", key.slot);
            }
        }
        assert_eq!(seen.len(), 2_500);
    }

    /// A revocation holds before the sweep has come to a Session.
    #[test]
    fn what_was_revoked_for_everybody_is_not_used_again() {
        use wasmqtt_protocol::access::{Action, Decision, Lease, Verdict};
        let mut sessions = sessions(1);
        let client = Client { client_id: "0".into(), principal: "".into(), listener: "l".into() };
        sessions.set_standing(0, Some(Box::new(Standing::new(Arc::new(client), Permits::new(Vec::new(), false)))));
        let lease = Some(Lease { scope: None, seconds: 60 });
        let decision = Decision { verdict: Some(Verdict::Allow), lease, failed: false };
        let permits = &mut sessions.standing(0).expect("is there").permits;
        permits.learn(0, Action::Subscribe, "a".into(), decision);
        permits.packet_done();
        assert!(sessions.standing(0).expect("is there").permits.subscribe(1, "a").is_some());
        sessions.revoke_all();
        assert!(sessions.standing(0).expect("is there").permits.subscribe(1, "a").is_none());
    }
}
