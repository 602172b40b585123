//! Who wants which message: subscriptions, Shared Subscriptions, retained messages. MQTT 5.0 §4.7, §4.8.
//!
//! Uses `codec` and `topic`. Knows nothing of Sessions but their [`SessionKey`]; pure data, no clock, no I/O. All walks
//! are loops over an arena: a filter of sixty thousand levels costs no stack.

mod index;
mod retained;
mod trie;

use std::num::{NonZeroU32, NonZeroU64};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use bytes::Bytes;
use smallvec::SmallVec;

use crate::codec::{Qos, SubscribeOptions};

pub use index::{Index, Matches};
pub use retained::{Full, Position, Retained, RetainedMessage};

/// Where a Session lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionKey {
    /// Shard.
    pub shard: u16,
    /// Place in that shard.
    pub slot: u32,
    /// Tells it from other Sessions that had the same place.
    pub epoch: u32,
}

/// One subscription of one Session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Subscription {
    /// Subscription Options.
    pub options: SubscribeOptions,
    /// Subscription Identifier.
    pub id: Option<NonZeroU32>,
}

/// Names a Session in the store. One that ended gives its name to no other.
pub type SessionId = NonZeroU64;

/// Names a message in the store; later ones are larger.
pub type MessageId = NonZeroU64;

/// A message that is kept; immutable and shared.
#[derive(Debug, Clone)]
pub struct Message {
    /// Topic Name.
    pub topic: Box<str>,
    /// Application Message.
    pub payload: Bytes,
    /// Encoded properties that are forwarded unaltered, see `codec::PublishProperties::forwardable`.
    pub properties: Bytes,
    /// QoS it was published with.
    pub qos: Qos,
    /// RETAIN flag it was published with.
    pub retain: bool,
    /// When it expires, in milliseconds of the broker's clock.
    pub expires_at_ms: Option<u64>,
    /// Who published it; `None` for the broker itself.
    pub publisher: Option<SessionKey>,
}

/// What the store keeps of a message, wherever that lies.
#[derive(Debug, Clone, Copy)]
pub struct MessageRef<'a> {
    /// See [`Message::topic`].
    pub topic: &'a str,
    /// See [`Message::payload`].
    pub payload: &'a [u8],
    /// See [`Message::properties`].
    pub properties: &'a [u8],
    /// See [`Message::qos`].
    pub qos: Qos,
    /// See [`Message::retain`].
    pub retain: bool,
    /// See [`Message::expires_at_ms`].
    pub expires_at_ms: Option<u64>,
}

impl<'a> From<&'a Message> for MessageRef<'a> {
    fn from(message: &'a Message) -> Self {
        Self {
            topic: &message.topic,
            payload: &message.payload,
            properties: &message.properties,
            qos: message.qos,
            retain: message.retain,
            expires_at_ms: message.expires_at_ms,
        }
    }
}

/// Whether a member of a Shared Subscription can take a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Available {
    /// No Network Connection: QoS 1 and 2 would be queued.
    Offline = 0,
    /// Has as much unacknowledged or unwritten as it may.
    Busy = 1,
    /// Would get it at once.
    Ready = 2,
}

/// Written by the shard that owns the Session, read by all that publish. A hint: being late by a message is harmless.
#[derive(Debug, Default)]
pub struct Availability(AtomicU8);

impl Availability {
    /// Sets it.
    pub fn set(&self, available: Available) {
        self.0.store(available as u8, Ordering::Relaxed);
    }

    /// Reads it.
    pub fn get(&self) -> Available {
        match self.0.load(Ordering::Relaxed) {
            0 => Available::Offline,
            1 => Available::Busy,
            _ => Available::Ready,
        }
    }
}

/// A Session in a Shared Subscription.
#[derive(Debug, Clone)]
pub struct Member {
    /// The Session.
    pub session: SessionKey,
    /// As it subscribed.
    pub subscription: Subscription,
    /// Can it take more?
    pub availability: Arc<Availability>,
}

/// A Shared Subscription: all members of one `ShareName` and Topic Filter. A snapshot; a change makes a new one.
#[derive(Debug, Clone)]
pub struct Group {
    /// `ShareName`.
    pub share: Box<str>,
    /// Topic Filter behind it.
    pub filter: Box<str>,
    /// Never empty.
    pub members: Vec<Member>,
}

/// What several overlapping subscriptions of one Session come to. [MQTT-3.3.4-2] to [MQTT-3.3.4-5]
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Merged {
    /// The highest of them.
    pub qos: Qos,
    /// One of them asks for it.
    pub retain_as_published: bool,
    /// All there are.
    pub ids: SmallVec<[NonZeroU32; 1]>,
}

/// One Session that gets a message, once.
#[derive(Debug, Clone)]
pub struct Target {
    /// The Session.
    pub session: SessionKey,
    /// For messages of other clients; always there but for a member of a group.
    pub others: Option<Merged>,
    /// For its own messages: only subscriptions without No Local count. [MQTT-3.8.3-3]
    pub own: Option<Merged>,
    /// The Session's name in the store; `None`: it is not there.
    pub stored: Option<SessionId>,
}

impl Merged {
    fn of(subscription: &Subscription) -> Self {
        Self {
            qos: subscription.options.qos,
            retain_as_published: subscription.options.retain_as_published,
            ids: subscription.id.into_iter().collect(),
        }
    }

    fn add(merged: &mut Option<Self>, subscription: &Subscription) {
        match merged {
            None => *merged = Some(Self::of(subscription)),
            Some(merged) => {
                merged.qos = merged.qos.max(subscription.options.qos);
                merged.retain_as_published |= subscription.options.retain_as_published;
                merged.ids.extend(subscription.id);
            }
        }
    }
}

impl Target {
    /// A member of a Shared Subscription, which never has No Local. [MQTT-3.8.3-4]
    pub fn of(member: &Member) -> Self {
        let merged = Merged::of(&member.subscription);
        Self { session: member.session, own: Some(merged.clone()), others: Some(merged), stored: None }
    }

    /// What its subscriptions come to, for a message of its `own` or of others.
    #[inline]
    pub fn merged(&self, own: bool) -> Option<&Merged> {
        if own { self.own.as_ref() } else { self.others.as_ref() }
    }
}

/// One target per Session. Sorts `direct`.
pub fn merge(direct: &mut [(SessionKey, Subscription)]) -> Vec<Target> {
    direct.sort_by_key(|(session, _)| *session);
    let mut targets: Vec<Target> = Vec::new();
    for (session, subscription) in direct {
        if targets.last().is_none_or(|last| last.session != *session) {
            targets.push(Target { session: *session, others: None, own: None, stored: None });
        }
        if let Some(target) = targets.last_mut() {
            Merged::add(&mut target.others, subscription);
            if !subscription.options.no_local {
                Merged::add(&mut target.own, subscription);
            }
        }
    }
    targets
}

/// The member that gets the next message: round robin from `cursor` over those that are ready, else over those that are
/// connected, else, if it can be queued, over all. `None`: nobody can have it.
pub fn pick<'a>(group: &'a Group, cursor: &mut u32, qos: Qos) -> Option<&'a Member> {
    let count = group.members.len();
    let start = *cursor as usize % count.max(1);
    for wanted in [Available::Ready, Available::Busy, Available::Offline] {
        for step in 0..count {
            let place = (start + step) % count;
            let member = &group.members[place];
            let queues = qos.min(member.subscription.options.qos) > Qos::AtMostOnce;
            if member.availability.get() == wanted && (wanted != Available::Offline || queues) {
                *cursor = place as u32 + 1;
                return Some(member);
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(slot: u32) -> SessionKey {
        SessionKey { shard: 0, slot, epoch: 0 }
    }

    fn subscription(qos: Qos, no_local: bool, id: u32) -> Subscription {
        Subscription {
            options: SubscribeOptions { qos, no_local, ..SubscribeOptions::default() },
            id: NonZeroU32::new(id),
        }
    }

    fn group(states: &[Available]) -> Group {
        let members = states.iter().enumerate().map(|(slot, available)| {
            let availability = Arc::new(Availability::default());
            availability.set(*available);
            Member { session: key(slot as u32), subscription: subscription(Qos::AtLeastOnce, false, 0), availability }
        });
        Group { share: "g".into(), filter: "t".into(), members: members.collect() }
    }

    /// One copy with the highest QoS and every identifier. [MQTT-3.3.4-2], [MQTT-3.3.4-4], [MQTT-3.3.5-1] (3.1.1)
    #[test]
    fn overlapping_subscriptions_become_one_target() {
        let mut direct = vec![
            (key(1), subscription(Qos::AtMostOnce, false, 7)),
            (key(0), subscription(Qos::AtLeastOnce, false, 0)),
            (key(1), subscription(Qos::ExactlyOnce, true, 9)),
        ];
        let targets = merge(&mut direct);
        assert_eq!(targets.len(), 2);
        let others = targets[1].others.as_ref().unwrap();
        assert_eq!((others.qos, others.ids.len()), (Qos::ExactlyOnce, 2));
        let own = targets[1].own.as_ref().unwrap();
        assert_eq!((own.qos, own.ids.len()), (Qos::AtMostOnce, 1), "No Local does not count for own messages");
    }

    /// Each message goes to one member, and the broker may choose which. MQTT 5.0 §4.8.2.
    #[test]
    fn members_take_turns_and_busy_ones_are_skipped() {
        use Available::{Busy, Offline, Ready};
        let turns = |states: &[Available], qos| {
            let group = group(states);
            let mut cursor = 0;
            (0..4).map(|_| pick(&group, &mut cursor, qos).map(|m| m.session.slot)).collect::<Vec<_>>()
        };
        assert_eq!(turns(&[Ready, Ready, Ready], Qos::AtMostOnce), [Some(0), Some(1), Some(2), Some(0)]);
        assert_eq!(turns(&[Ready, Busy, Ready], Qos::AtMostOnce), [Some(0), Some(2), Some(0), Some(2)]);
        assert_eq!(turns(&[Offline, Busy], Qos::AtLeastOnce), [Some(1); 4]);
        assert_eq!(turns(&[Offline, Offline], Qos::AtLeastOnce), [Some(0), Some(1), Some(0), Some(1)]);
        assert_eq!(turns(&[Offline, Offline], Qos::AtMostOnce), [None; 4]);
    }
}
