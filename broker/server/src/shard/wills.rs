//! Will Messages on their way: past permissions and storage hooks, and in the store until they are published.
//! MQTT 5.0 §3.1.2.5.

use std::sync::Arc;

use tracing::debug;
use wasmqtt_protocol::access::{Action, Decision, Verdict};
use wasmqtt_protocol::ports::{Access, Client, Grant};
use wasmqtt_protocol::router::{Message, SessionKey};
use wasmqtt_protocol::session::WillMessage;

use super::Shard;
use super::calls::Answer;

/// After this time a will that could not be kept is tried again.
const RETRY_MS: u64 = 1000;

/// The Will Message of a Session that the store knows, while plugins think about it: a crash must not lose it.
pub(super) struct WillUnderWay {
    pub(super) will: Box<WillMessage>,
    /// The store has it as one that is not published.
    is_stored: bool,
    /// The Session has ended, and goes when its Will Message is published.
    ends: bool,
    /// Connections of the same client, with their epochs, that are let in afterwards.
    waiting: Vec<(usize, u32, Grant)>,
}

impl Shard {
    pub(super) fn on_will_delay(&mut self, key: SessionKey) {
        if let Some((session, None)) = self.sessions.resolve(key)
            && session.will.is_some()
        {
            let (expires_ms, _) = self.sessions.deadlines(key.slot);
            if self.postpones_will(key) {
                return self.set_deadlines(key, expires_ms, Some(self.now_ms + RETRY_MS));
            }
            self.set_deadlines(key, expires_ms, None);
            self.publish_will(key);
            self.store_session(key);
        }
    }

    /// The will is due, and would have to be kept where nothing can be kept at present: it is tried again.
    pub(super) fn postpones_will(&mut self, key: SessionKey) -> bool {
        if !self.durable.is_failing() {
            return false;
        }
        let Some((session, _)) = self.sessions.resolve(key) else { return false };
        let Some(will) = &session.will else { return false };
        let message = Arc::new(will.message.clone());
        let postpones = !self.has_room(&message);
        if postpones {
            debug!(topic = %message.topic, "Will Message postponed: the store cannot keep it");
        }
        postpones
    }

    /// The Session stays for so long, or until its will is published.
    pub(super) fn retry_will(&mut self, key: SessionKey, left_ms: u64) {
        let (expires_ms, will_ms) = (self.now_ms + left_ms.max(RETRY_MS), self.now_ms + RETRY_MS);
        self.set_deadlines(key, Some(expires_ms), Some(will_ms));
        self.store_session(key);
    }

    /// The caller tells the store of the Session afterwards.
    pub(super) fn publish_will(&mut self, key: SessionKey) {
        let Some((session, _)) = self.sessions.resolve(key) else { return };
        let Some(will) = session.will.take() else { return };
        let is_durable = session.stored().is_some();
        let expires_at_ms = will.expiry.map(|secs| self.now_ms + u64::from(secs) * 1000);
        let message = Arc::new(Message { expires_at_ms, publisher: Some(key), ..will.message.clone() });
        if is_durable {
            let under_way = WillUnderWay { will, is_stored: false, ends: false, waiting: Vec::new() };
            self.wills.insert(key, under_way);
        }
        match self.may_publish_will(key, &message) {
            Some(true) => {
                let client = self.sessions.standing(key.slot).map(|standing| Arc::clone(&standing.client));
                self.publish_unattended(client, message, 0);
            }
            Some(false) => self.will_done(key),
            None => {}
        }
        if let Some(under_way) = self.wills.get_mut(&key) {
            under_way.is_stored = true;
        }
    }

    /// `None`: plugins are thinking about it.
    fn may_publish_will(&mut self, key: SessionKey, message: &Arc<Message>) -> Option<bool> {
        let Some(standing) = self.sessions.standing(key.slot) else { return Some(true) };
        if !self.has_acl && !standing.permits.has_rules() {
            return Some(true);
        }
        match standing.permits.publish(self.now_ms, None, &message.topic) {
            Some((Verdict::Allow, _)) => return Some(true),
            None if self.has_acl => {}
            Some((Verdict::Deny(_), _)) | None => {
                debug!(client_id = %standing.client.client_id, topic = %message.topic, "Will Message denied");
                return Some(false);
            }
        }
        let access = Access {
            action: Action::Publish,
            topic: (*message.topic).into(),
            qos: message.qos,
            retain: message.retain,
        };
        let client = Arc::clone(&standing.client);
        let call = self.plugins.authorize(Arc::clone(&client), Arc::new([access]));
        let message = Arc::clone(message);
        let call = Box::pin(async move { Answer::Will { client, message, decisions: call.await } });
        self.wills_asked += 1;
        if let Some(answer) = self.calls.begin(None, call) {
            self.on_answer(answer);
        }
        None
    }

    /// The client may be gone by now; its Will Message is shown to storage hooks as its own.
    pub(super) fn on_will_decision(&mut self, client: Arc<Client>, message: &Arc<Message>, decisions: &[Decision]) {
        self.wills_asked -= 1;
        if decisions.first().and_then(|decision| decision.verdict) == Some(Verdict::Allow) {
            return self.publish_unattended(Some(client), Arc::clone(message), 0);
        }
        debug!(client_id = %client.client_id, topic = %message.topic, "Will Message denied");
        if let Some(key) = message.publisher {
            self.will_done(key);
        }
    }

    /// It is published, or will not be: in the batch that says so the store forgets it.
    pub(super) fn will_done(&mut self, key: SessionKey) {
        let Some(done) = self.wills.remove(&key) else { return };
        if done.ends {
            self.end_session(key);
        } else if done.is_stored {
            self.store_session(key);
        }
        for (id, epoch, grant) in done.waiting {
            if self.is_current(id, epoch) {
                self.admit(id, grant);
            }
        }
    }

    /// A Session whose Will Message is under way ends after it.
    pub(super) fn ends_after_will(&mut self, key: SessionKey) -> bool {
        let Some(under_way) = self.wills.get_mut(&key) else { return false };
        under_way.ends = true;
        self.store_session(key);
        true
    }

    /// A client is back before its Will Message is published: it is let in when that has happened. `false`: there is none.
    pub(super) fn waits_for_will(&mut self, key: SessionKey, id: usize, grant: &Grant) -> bool {
        let Some(under_way) = self.wills.get_mut(&key) else { return false };
        let Some(conn) = self.conns.get(id) else { return false };
        under_way.waiting.push((id, conn.epoch, grant.clone()));
        true
    }
}
