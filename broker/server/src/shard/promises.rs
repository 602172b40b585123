//! Answers that wait until the store has what they promise: PUBACK, PUBREC, SUBACK, UNSUBACK.
//!
//! They wait beside the outbox, not in it, so that everything else of the connection goes on, PINGRESP and messages of
//! others above all; and they are written only when it is known whether what they promise was kept. What has to stand
//! in the outbox at once (CONNACK, and handshakes of QoS 2 messages in either direction) makes the whole outbox wait
//! instead, see [`Conn::after`].
//!
//! [`Conn::after`]: super::conn::Conn::after

use std::collections::VecDeque;

use wasmqtt_protocol::codec::{Packet, PacketId, Qos, ReasonCode, Suback, UserProperties, Version};
use wasmqtt_protocol::ports::EventKind;
use wasmqtt_protocol::router::Subscription;
use wasmqtt_protocol::session::Outbox;
use wasmqtt_protocol::topic::Filter;

use super::Shard;
use super::conn::State;
use super::durable::Receipt;
use super::gate::Reason;

/// Answers of one client that may wait; then no packet of it is handled until the store has caught up.
const PROMISES_MAX: usize = 1024;
/// A queue that was longer is not kept when it is empty.
const IDLE_CAPACITY_MAX: usize = 64;

/// One answer.
struct Promise {
    receipt: Receipt,
    answer: Answer,
}

enum Answer {
    /// PUBACK or PUBREC.
    Publish {
        qos: Qos,
        packet_id: PacketId,
        reason: ReasonCode,
    },
    Subscribe(Box<Subscribed>),
}

/// SUBACK or UNSUBACK.
pub(super) struct Subscribed {
    pub(super) packet_id: PacketId,
    pub(super) reasons: Vec<ReasonCode>,
    /// The subscriptions that were made, with those that they replaced; without the store they do not stay. `None`: it
    /// is an UNSUBACK.
    pub(super) made: Option<Vec<(Filter, Option<Subscription>)>>,
}

/// Those of one connection, oldest first.
#[derive(Default)]
#[allow(clippy::box_collection, reason = "a word instead of four in each connection, most of which have none")]
pub(super) struct Promises(Option<Box<VecDeque<Promise>>>);

impl Promises {
    pub(super) fn is_empty(&self) -> bool {
        self.0.as_ref().is_none_or(|waiting| waiting.is_empty())
    }

    pub(super) fn is_full(&self) -> bool {
        self.has_no_room_beside(0)
    }

    /// There is none for another one, when so many are still to come.
    #[inline]
    pub(super) fn has_no_room_beside(&self, others: u32) -> bool {
        self.0.as_ref().map_or(0, |waiting| waiting.len()) + others as usize >= PROMISES_MAX
    }

    fn push(&mut self, promise: Promise) {
        self.0.get_or_insert_default().push_back(promise);
    }

    /// The oldest, if it waits no longer.
    fn pop_if(&mut self, is_kept: impl FnOnce(Receipt) -> bool) -> Option<Promise> {
        let waiting = self.0.as_mut()?;
        if !is_kept(waiting.front()?.receipt) {
            return None;
        }
        let promise = waiting.pop_front();
        if waiting.is_empty() && waiting.capacity() > IDLE_CAPACITY_MAX {
            self.0 = None;
        }
        promise
    }
}

impl Shard {
    /// PUBACK or PUBREC, once what it promises is kept.
    pub(super) fn promise_publish(
        &mut self,
        id: usize,
        slot: u32,
        (qos, packet_id): (Qos, PacketId),
        reason: ReasonCode,
        receipt: Receipt,
    ) {
        self.promise(id, slot, Promise { receipt, answer: Answer::Publish { qos, packet_id, reason } });
    }

    /// SUBACK or UNSUBACK, once the store has the change.
    pub(super) fn promise_subscribed(&mut self, id: usize, slot: u32, answer: Subscribed, receipt: Receipt) {
        self.promise(id, slot, Promise { receipt, answer: Answer::Subscribe(Box::new(answer)) });
    }

    fn promise(&mut self, id: usize, slot: u32, promise: Promise) {
        let Some(conn) = self.conns.get_mut(id) else { return };
        // Acknowledgements leave in the order of what they acknowledge. [MQTT-4.6.0-2], [MQTT-4.6.0-3]
        if conn.promises.is_empty() && !self.durable.waits(promise.receipt) {
            return self.give(id, slot, promise);
        }
        let receipt = promise.receipt;
        conn.promises.push(promise);
        if conn.promises.is_full() {
            conn.gate.close(Reason::Commit, self.now_ms);
        }
        self.wait_for_commit(id);
        self.note_written(id, receipt);
    }

    /// Something was written for a client: when the store does not keep up, those who write are not read.
    pub(super) fn note_written(&mut self, id: usize, receipt: Receipt) {
        if receipt.is_some() && self.durable.is_congested() {
            self.pause(id, Reason::Store);
        }
    }

    /// Gives the answers that wait no longer; `true`: some still do.
    pub(super) fn keep_promises(&mut self, id: usize) -> bool {
        let State::Live { slot } = self.conns[id].state else { return false };
        while let Some(conn) = self.conns.get_mut(id) {
            let durable = &self.durable;
            let Some(promise) = conn.promises.pop_if(|receipt| !durable.waits(receipt)) else { break };
            self.give(id, slot, promise);
        }
        self.conns.get(id).is_some_and(|conn| !conn.promises.is_empty())
    }

    /// The connection ends, and its last words stand behind all answers: they are put there, and wait as a whole.
    pub(super) fn promise_at_last(&mut self, id: usize, slot: u32) {
        while let Some(promise) = self.conns[id].promises.pop_if(|_| true) {
            self.conns[id].after(promise.receipt);
            self.orphan_promise(slot, &promise);
            self.give(id, slot, promise);
        }
    }

    /// The connection is gone, and with it the answers.
    pub(super) fn break_promises(&mut self, promises: &mut Promises, slot: u32) {
        while let Some(promise) = promises.pop_if(|_| true) {
            self.orphan_promise(slot, &promise);
        }
    }

    fn orphan_promise(&mut self, slot: u32, promise: &Promise) {
        if let Answer::Publish { qos: Qos::ExactlyOnce, packet_id, reason } = promise.answer
            && !reason.is_error()
            && let Some(key) = self.sessions.get(slot).map(|session| session.key)
        {
            self.orphan(key, packet_id, promise.receipt);
        }
    }

    fn give(&mut self, id: usize, slot: u32, promise: Promise) {
        let is_refused = self.durable.has_failed(promise.receipt);
        let Some(conn) = self.conns.get_mut(id) else { return };
        conn.outbox.lend(&mut self.pool);
        let version = conn.version;
        match promise.answer {
            Answer::Publish { qos, packet_id, reason } => {
                let Some(session) = self.sessions.get_mut(slot) else { return };
                if !is_refused {
                    session.acknowledge(qos, packet_id, reason, &mut conn.outbox);
                } else if version == Version::V5 {
                    session.acknowledge(qos, packet_id, ReasonCode::QUOTA_EXCEEDED, &mut conn.outbox);
                } else {
                    // 3.x has no way to say so; what is not acknowledged is sent again later.
                    session.forget_received(packet_id);
                }
                self.tell(slot, Some(id));
            }
            Answer::Subscribe(answer) => self.give_subscribed(id, slot, *answer, is_refused),
        }
        self.mark_dirty(id);
    }

    fn give_subscribed(&mut self, id: usize, slot: u32, mut answer: Subscribed, is_refused: bool) {
        let version = self.conns[id].version;
        if is_refused {
            let Some(key) = self.sessions.get(slot).map(|session| session.key) else { return };
            for (filter, replaced) in answer.made.iter().flatten() {
                match replaced {
                    Some(subscription) => drop(self.subscribe(key, filter, *subscription)),
                    None => drop(self.unsubscribe(key, filter)),
                }
            }
            let reason = match (version, &answer.made) {
                (Version::V5, Some(_)) => ReasonCode::QUOTA_EXCEEDED,
                _ => ReasonCode::UNSPECIFIED_ERROR,
            };
            for granted in answer.reasons.iter_mut().filter(|granted| !granted.is_error()) {
                *granted = reason;
            }
        }
        let packet = Suback {
            packet_id: answer.packet_id,
            reasons: answer.reasons,
            reason_string: None,
            user_properties: UserProperties::default(),
        };
        let packet = if answer.made.is_some() { Packet::Suback(packet) } else { Packet::Unsuback(packet) };
        if let (Some(session), Some(conn)) = (self.sessions.get(slot), self.conns.get_mut(id)) {
            session.send(&packet, &mut conn.outbox);
        }
    }

    /// The Session of a client that was just let in cannot be kept: it is refused instead of told a CONNACK that does
    /// not hold.
    pub(super) fn refuse_unkept(&mut self, id: usize) {
        let conn = &mut self.conns[id];
        let State::Live { slot } = conn.state else { return };
        let is_new = conn.has_new_session;
        conn.outbox = Outbox::default();
        conn.state = State::New;
        self.event(EventKind::ClientDisconnected, slot, || vec![("reason", "its Session cannot be kept".into())]);
        let key = self.sessions.get(slot).map(|session| session.key);
        self.leave_session(slot, false);
        // A client that was refused does not expect a Session next time. [MQTT-3.2.2-4]
        if let Some(key) = key.filter(|_| is_new) {
            self.end_session(key);
        }
        self.refuse(id, ReasonCode::QUOTA_EXCEEDED);
    }
}
