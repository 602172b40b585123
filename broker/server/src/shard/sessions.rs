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
}

pub(crate) struct Sessions {
    shard: u16,
    places: Vec<Place>,
    free: Vec<u32>,
}

impl Sessions {
    pub(crate) fn new(shard: u16) -> Self {
        Self { shard, places: Vec::new(), free: Vec::new() }
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
        self.places.get_mut(slot as usize)?.standing.as_deref_mut()
    }

    pub(super) fn standing_of(&self, slot: u32) -> Option<&Standing> {
        self.places.get(slot as usize)?.standing.as_deref()
    }

    pub(crate) fn set_standing(&mut self, slot: u32, standing: Option<Box<Standing>>) {
        self.places[slot as usize].standing = standing;
    }

    /// Places from this one on.
    pub(super) fn slots_from(&self, slot: u32) -> std::ops::Range<u32> {
        slot..self.places.len() as u32
    }

    /// All Sessions, with their connections.
    pub(super) fn keys(&self) -> impl Iterator<Item = SessionKey> {
        self.places.iter().filter_map(|place| place.session.as_ref().map(|session| session.key))
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
