//! Messages for storage hooks, in the columns of `wit/`, and what becomes of them.

use std::sync::Arc;

use bytes::Bytes;
use wasmqtt_protocol::codec::{PublishProperties, ReasonCode};
use wasmqtt_protocol::ports::{Client, Submission};
use wasmqtt_protocol::router::{Message, MessageId};

use crate::bindings::failure;
use crate::bindings::storage_hook::exports::wasmqtt::plugin::storage_hook as wit;
use crate::bindings::types::Failure;
use crate::call::{ANSWER_BYTES_MAX, Question, Said};
use crate::config::{OnError, PluginLimits};
use crate::instance::Running;
use crate::queue::Weight;

/// Bytes replaced properties may have.
const PROPERTIES_BYTES_MAX: usize = 256 * 1024;

/// What a plugin does to one message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Change {
    Discard(ReasonCode),
    Replace { payload: Option<Bytes>, properties: Option<Bytes> },
}

impl Change {
    /// The message with this change.
    pub(crate) fn apply(self, message: &Message) -> Result<Arc<Message>, ReasonCode> {
        match self {
            Self::Discard(reason) => Err(reason),
            Self::Replace { payload, properties } => Ok(Arc::new(Message {
                topic: message.topic.clone(),
                payload: payload.unwrap_or_else(|| message.payload.clone()),
                properties: properties.unwrap_or_else(|| message.properties.clone()),
                ..*message
            })),
        }
    }
}

/// A message as it is shown.
#[derive(Clone)]
pub(crate) struct Shown {
    pub(crate) message: Arc<Message>,
    pub(crate) client: Option<Arc<Client>>,
    /// The name under which the store keeps it for those that collect it.
    pub(crate) fed: Option<MessageId>,
}

impl From<&Submission> for Shown {
    fn from(sent: &Submission) -> Self {
        Self { message: Arc::clone(&sent.message), client: sent.client.clone(), fed: sent.fed }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Moment {
    BeforeStore,
    AfterLoad,
}

/// Messages on their way into or out of the store. The answer has the place of each message that changes.
pub(crate) struct Rewrite {
    pub(crate) moment: Moment,
    pub(crate) messages: Vec<Shown>,
    pub(crate) payload: bool,
}

impl Question for Rewrite {
    type Answer = Result<Vec<(u32, Change)>, OnError>;

    /// Of a batch that is a message, its publisher; otherwise nobody in particular.
    fn client_id(&self) -> &str {
        match &*self.messages {
            [only] => only.client.as_ref().map_or("", |client| &client.client_id),
            _ => "",
        }
    }

    fn is_about_one(&self) -> bool {
        self.messages.len() == 1
    }

    fn answer_bytes_max(&self) -> usize {
        let bytes = |Shown { message, .. }: &Shown| 4 * message.payload.len() + 2 * message.properties.len();
        ANSWER_BYTES_MAX + self.messages.iter().map(bytes).sum::<usize>()
    }

    fn bytes(&self) -> usize {
        self.messages.iter().map(Weight::bytes).sum()
    }

    fn cpu_ms(limits: &PluginLimits) -> u64 {
        limits.hook_cpu_ms
    }

    fn agree(one: &Self::Answer, other: &Self::Answer) -> bool {
        one == other
    }

    fn fallback(&self, on_error: OnError) -> Self::Answer {
        Err(on_error)
    }

    async fn put(&self, running: &mut Running, _plugin: &Arc<str>) -> wasmtime::Result<Said<Self::Answer>> {
        let Some(hook) = &running.exports.storage_hook else {
            return Ok(Said::nonsense("it does not export storage-hook"));
        };
        let hook = hook.wasmqtt_plugin_storage_hook();
        let batch = columns(&self.messages, self.payload);
        let answer = match self.moment {
            Moment::BeforeStore => hook.call_before_store(&mut running.store, &batch).await?,
            Moment::AfterLoad => hook.call_after_load(&mut running.store, &batch).await?,
        };
        Ok(match answer {
            Ok(changes) => Said::from_checked(checked(changes, self.messages.len()).map(Ok)),
            Err(from) => Said::Failure(failure(from)),
        })
    }
}

/// Messages that are kept.
pub(crate) struct Committed {
    pub(crate) messages: Vec<Shown>,
    pub(crate) payload: bool,
}

impl Question for Committed {
    /// `false`: not yet.
    type Answer = bool;

    fn client_id(&self) -> &'static str {
        ""
    }

    fn bytes(&self) -> usize {
        self.messages.iter().map(Weight::bytes).sum()
    }

    fn cpu_ms(limits: &PluginLimits) -> u64 {
        limits.cpu_ms
    }

    fn agree(one: &bool, other: &bool) -> bool {
        one == other
    }

    fn fallback(&self, _on_error: OnError) -> bool {
        false
    }

    async fn put(&self, running: &mut Running, _plugin: &Arc<str>) -> wasmtime::Result<Said<bool>> {
        let Some(hook) = &running.exports.storage_hook else {
            return Ok(Said::nonsense("it does not export storage-hook"));
        };
        let batch = columns(&self.messages, self.payload);
        let answer = hook.wasmqtt_plugin_storage_hook().call_committed(&mut running.store, &batch).await?;
        Ok(match answer {
            Ok(()) => Said::Answer(true),
            // It is about these messages, not about something that may be there later.
            Err(from @ Failure::Internal(_)) => Said::Nonsense(failure(from)),
            Err(from) => Said::Failure(failure(from)),
        })
    }
}

fn columns(messages: &[Shown], with_payload: bool) -> wit::Batch {
    let count = messages.len();
    let bytes = |of: fn(&Message) -> usize| messages.iter().map(|shown| of(&shown.message)).sum::<usize>();
    let payload_bytes = if with_payload { bytes(|message| message.payload.len()) } else { 0 };
    let mut batch = wit::Batch {
        topics: String::with_capacity(bytes(|message| message.topic.len())),
        topic_ends: Vec::with_capacity(count),
        clients: String::new(),
        client_ends: Vec::with_capacity(count),
        payloads: Vec::with_capacity(payload_bytes),
        payload_ends: Vec::with_capacity(count),
        properties: Vec::new(),
        property_ends: Vec::with_capacity(count),
        bits: Vec::with_capacity(count),
    };
    for Shown { message, client, .. } in messages {
        batch.topics.push_str(&message.topic);
        batch.topic_ends.push(batch.topics.len() as u32);
        batch.clients.push_str(client.as_ref().map_or("", |client| &client.client_id));
        batch.client_ends.push(batch.clients.len() as u32);
        if with_payload {
            batch.payloads.extend_from_slice(&message.payload);
            batch.properties.extend_from_slice(&message.properties);
        }
        batch.payload_ends.push(batch.payloads.len() as u32);
        batch.property_ends.push(batch.properties.len() as u32);
        batch.bits.push(message.qos as u8 | if message.retain { 4 } else { 0 });
    }
    batch
}

fn checked(changes: Vec<(u32, wit::Change)>, count: usize) -> Result<Vec<(u32, Change)>, String> {
    let mut next = 0;
    let mut checked = Vec::with_capacity(changes.len());
    for (place, change) in changes {
        if place < next || place as usize >= count {
            return Err(format!("change for place {place}, out of order or not in a batch of {count}"));
        }
        next = place + 1;
        checked.push((place, checked_change(change)?));
    }
    Ok(checked)
}

fn checked_change(change: wit::Change) -> Result<Change, String> {
    match change {
        wit::Change::Discard(code) if code >= 0x80 => Ok(Change::Discard(ReasonCode(code))),
        wit::Change::Discard(code) => Err(format!("discarded with Reason Code 0x{code:02X}, which is no error")),
        wit::Change::Replace(wit::Replacement { payload, properties }) => {
            within("properties", properties.as_ref(), PROPERTIES_BYTES_MAX)?;
            if let Some(properties) = &properties {
                PublishProperties::check_forwardable(properties).map_err(|error| format!("properties: {error}"))?;
            }
            Ok(Change::Replace { payload: payload.map(Bytes::from), properties: properties.map(Bytes::from) })
        }
    }
}

fn within(what: &str, bytes: Option<&Vec<u8>>, bytes_max: usize) -> Result<(), String> {
    match bytes {
        Some(bytes) if bytes.len() > bytes_max => {
            Err(format!("{what} of {} bytes; at most {bytes_max} are allowed", bytes.len()))
        }
        _ => Ok(()),
    }
}
