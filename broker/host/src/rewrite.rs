//! Messages of one turn on their way through the storage hooks.

use std::rc::Rc;
use std::sync::Arc;

use wasmqtt_protocol::codec::ReasonCode;
use wasmqtt_protocol::ports::{Accepted, Client, Submission};
use wasmqtt_protocol::router::Message;

use crate::call;
use crate::config::OnError;
use crate::hook::{Change, Moment, Rewrite, Shown};
use crate::shard::Slot;

/// A message between two hooks.
struct Work {
    plugins: u64,
    client: Option<Arc<Client>>,
    delivered: Arc<Message>,
    /// The form for the store, if that is another.
    kept: Option<Arc<Message>>,
    discarded: Option<ReasonCode>,
}

impl Work {
    fn shown(&self, at_rest: bool) -> Shown {
        let kept = self.kept.as_ref().filter(|_| at_rest);
        Shown { message: Arc::clone(kept.unwrap_or(&self.delivered)), client: self.client.clone() }
    }

    fn apply(&mut self, change: Change, at_rest: bool) {
        let before = self.shown(at_rest).message;
        match change.apply(&before) {
            Ok(after) if at_rest => self.kept = Some(after),
            Ok(after) => self.delivered = after,
            Err(reason) => self.discarded = Some(reason),
        }
    }

    fn accepted(self) -> Accepted {
        match (self.discarded, self.kept) {
            (Some(reason), _) => Accepted::Discard(reason),
            (None, Some(kept)) => Accepted::Seal { delivered: self.delivered, kept },
            (None, None) => Accepted::Keep(self.delivered),
        }
    }
}

/// Shows the messages to each hook that wants them, in order; each sees what the one before made of them.
///
/// Those whose form is for the store alone come last, so that they see what is delivered.
pub(crate) async fn rewrite(slots: &[Rc<Slot>], messages: Vec<Submission>) -> Vec<Accepted> {
    let mut works: Vec<Work> = messages
        .into_iter()
        .map(|Submission { plugins, client, message }| Work {
            plugins,
            client,
            delivered: message,
            kept: None,
            discarded: None,
        })
        .collect();
    for at_rest in [false, true] {
        for slot in slots {
            let wanted = slot.generation.registration();
            if wanted.before_store && wanted.at_rest == at_rest && slot.generation.exports.storage_hook.is_some() {
                show(slot, &mut works).await;
            }
        }
    }
    works.into_iter().map(Work::accepted).collect()
}

async fn show(slot: &Slot, works: &mut [Work]) {
    let bit = slot.generation.plugin.bit;
    let wanted = slot.generation.registration();
    let places: Vec<usize> = works
        .iter()
        .enumerate()
        .filter(|(_, work)| work.plugins & bit != 0 && work.discarded.is_none())
        .filter(|(_, work)| slot.is_for_listener(work.client.as_ref().map_or("", |client| &client.listener)))
        .map(|(place, _)| place)
        .collect();
    if places.is_empty() {
        return;
    }
    let question = |messages| Rewrite { moment: Moment::BeforeStore, messages, payload: wanted.payload };
    let all = places.iter().map(|place| works[*place].shown(wanted.at_rest)).collect();
    if let Ok(changes) = call::ask(slot, &question(all)).await {
        for (at, change) in changes {
            works[places[at as usize]].apply(change, wanted.at_rest);
        }
        return;
    }
    // One of them did it: each alone, so that the others do not suffer.
    for place in places {
        let one = vec![works[place].shown(wanted.at_rest)];
        match call::ask(slot, &question(one)).await {
            Ok(changes) => {
                for (_, change) in changes {
                    works[place].apply(change, wanted.at_rest);
                }
            }
            Err(OnError::Allow | OnError::Skip) => {}
            Err(OnError::Deny | OnError::Retry) => {
                works[place].discarded = Some(ReasonCode::IMPLEMENTATION_SPECIFIC_ERROR);
            }
        }
    }
}
