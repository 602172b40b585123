//! Messages of one turn on their way through the storage hooks.

use std::sync::Arc;

use wasmqtt_protocol::codec::ReasonCode;
use wasmqtt_protocol::ports::{Accepted, Client, Submission};
use wasmqtt_protocol::router::Message;

use crate::call;
use crate::config::OnError;
use crate::hook::{Change, Moment, Rewrite, Shown};
use crate::shard::{PluginSlots, Slot};

/// Messages and bytes that are shown at once; a larger message is shown alone.
const PORTION_MAX: usize = 1024;
const PORTION_BYTES_MAX: usize = 1 << 20;

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
        Shown { message: Arc::clone(kept.unwrap_or(&self.delivered)), client: self.client.clone(), fed: None }
    }

    /// Bytes that are copied to show it.
    fn bytes(&self, at_rest: bool, payload: bool) -> usize {
        let message = self.kept.as_ref().filter(|_| at_rest).unwrap_or(&self.delivered);
        let client = self.client.as_ref().map_or(0, |client| client.client_id.len());
        let content = if payload { message.payload.len() + message.properties.len() } else { 0 };
        message.topic.len() + client + content
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

impl From<Submission> for Work {
    fn from(Submission { plugins, client, message, .. }: Submission) -> Self {
        Self { plugins, client, delivered: message, kept: None, discarded: None }
    }
}

/// Shows the messages to each hook that wants them, in order; each sees what the one before made of them.
///
/// Those whose form is for the store alone come last, so that they see what is delivered.
pub(crate) async fn rewrite(plugins: &[PluginSlots], messages: Vec<Submission>) -> Vec<Accepted> {
    let mut works: Vec<Work> = messages.into_iter().map(Work::from).collect();
    for at_rest in [false, true] {
        for plugin in plugins {
            let wanted = plugin.serving.generation.registration();
            if wanted.before_store
                && wanted.at_rest == at_rest
                && plugin.serving.generation.exports.storage_hook.is_some()
            {
                show(plugin, &mut works, Moment::BeforeStore, at_rest).await;
            }
        }
    }
    works.into_iter().map(Work::accepted).collect()
}

/// Shows messages from the store to the hooks that sealed them, the last one first.
pub(crate) async fn open(plugins: &[PluginSlots], messages: Vec<Submission>) -> Vec<Accepted> {
    let mut works: Vec<Work> = messages.into_iter().map(Work::from).collect();
    let mut is_shown = false;
    for plugin in plugins.iter().rev() {
        let wanted = plugin.serving.generation.registration();
        if wanted.before_store && wanted.at_rest && plugin.serving.generation.exports.storage_hook.is_some() {
            show(plugin, &mut works, Moment::AfterLoad, false).await;
            is_shown = true;
        }
    }
    if !is_shown {
        // Whoever sealed them is not here, and nobody is to get them as they are.
        for work in &mut works {
            work.discarded = Some(ReasonCode::IMPLEMENTATION_SPECIFIC_ERROR);
        }
    }
    works.into_iter().map(Work::accepted).collect()
}

/// A build, and one in its shadow.
type Asked<'a> = (&'a Slot, Option<&'a Slot>);

/// Places of the messages that a plugin is to see, apart by the build that is to see them.
fn groups<'a>(plugin: &'a PluginSlots, works: &[Work]) -> Vec<(Asked<'a>, Vec<usize>)> {
    let mut serving = Vec::new();
    let mut canary = Vec::new();
    let slot = &*plugin.serving;
    for (place, work) in works.iter().enumerate() {
        let (listener, client_id) =
            work.client.as_ref().map_or(("", ""), |client| (&client.listener, &client.client_id));
        if work.plugins & slot.generation.plugin.bit == 0 || work.discarded.is_some() || !slot.is_for_listener(listener)
        {
            continue;
        }
        let is_canary = plugin.tried.as_ref().is_some_and(|tried| tried.trial.serves(client_id));
        if is_canary { &mut canary } else { &mut serving }.push(place);
    }
    let canary_slot = plugin.tried.as_ref().map_or(slot, |tried| &tried.slot);
    let groups = [((slot, plugin.shadow()), serving), ((canary_slot, None), canary)];
    groups.into_iter().filter(|(_, places)| !places.is_empty()).collect()
}

/// Parts that are shown at once: what a guest must have room for.
fn portions(places: &[usize], bytes_of: impl Fn(usize) -> usize) -> impl Iterator<Item = &[usize]> {
    let mut rest = places;
    std::iter::from_fn(move || {
        let mut bytes = 0;
        let fits = |place: &&usize| {
            bytes += bytes_of(**place);
            bytes <= PORTION_BYTES_MAX
        };
        let count = rest.iter().take(PORTION_MAX).take_while(fits).count().max(1).min(rest.len());
        let (portion, after) = rest.split_at(count);
        rest = after;
        (!portion.is_empty()).then_some(portion)
    })
}

async fn show(plugin: &PluginSlots, works: &mut [Work], moment: Moment, at_rest: bool) {
    for (asked, places) in groups(plugin, works) {
        let payload = asked.0.generation.registration().payload;
        let portions: Vec<&[usize]> = portions(&places, |place| works[place].bytes(at_rest, payload)).collect();
        for portion in portions {
            show_portion(asked, works, portion, moment, at_rest).await;
        }
    }
}

async fn show_portion((slot, shadow): Asked<'_>, works: &mut [Work], places: &[usize], moment: Moment, at_rest: bool) {
    let payload = slot.generation.registration().payload;
    let question = |messages| Rewrite { moment, messages, payload };
    let all = places.iter().map(|place| works[*place].shown(at_rest)).collect();
    if places.len() > 1
        && let Ok(changes) = call::compared(slot, shadow, &question(all)).await
    {
        for (at, change) in changes {
            works[places[at as usize]].apply(change, at_rest);
        }
        return;
    }
    // There is one, or one of them did it: each alone, so that the others do not suffer.
    for place in places {
        let one = vec![works[*place].shown(at_rest)];
        match call::compared(slot, shadow, &question(one)).await {
            Ok(changes) => {
                for (_, change) in changes {
                    works[*place].apply(change, at_rest);
                }
            }
            // What cannot be opened again must not go out as it is.
            Err(OnError::Allow | OnError::Skip) if moment == Moment::BeforeStore => {}
            Err(_) => works[*place].discarded = Some(ReasonCode::IMPLEMENTATION_SPECIFIC_ERROR),
        }
    }
}

#[cfg(test)]
mod tests {
    use wasmqtt_protocol::codec::Qos;

    use super::*;

    fn message(payload: usize, properties: usize) -> Arc<Message> {
        Arc::new(Message {
            topic: "t".into(),
            payload: vec![0; payload].into(),
            properties: vec![0; properties].into(),
            qos: Qos::AtMostOnce,
            retain: false,
            expires_at_ms: None,
            publisher: None,
        })
    }

    /// How many are shown at a time.
    fn check(
        delivered: &Arc<Message>,
        kept: Option<&Arc<Message>>,
        (at_rest, payload): (bool, bool),
        counts: &[usize],
    ) {
        let work = || Work {
            plugins: 0,
            client: None,
            delivered: Arc::clone(delivered),
            kept: kept.cloned(),
            discarded: None,
        };
        let works: Vec<Work> = (0..1500).map(|_| work()).collect();
        let places: Vec<usize> = (0..works.len()).collect();
        let shown = portions(&places, |place| works[place].bytes(at_rest, payload)).map(<[usize]>::len);
        assert_eq!(shown.take(counts.len()).collect::<Vec<_>>(), counts);
    }

    /// Whatever of a message is copied for the guest counts, and nothing else.
    #[test]
    fn what_is_shown_at_once_is_bounded_in_bytes() {
        check(&message(10, 10), None, (false, true), &[1024, 476]);
        check(&message(0, 900_000), None, (false, true), &[1, 1]);
        check(&message(600_000, 0), None, (false, true), &[1, 1]);
        check(&message(600_000, 900_000), None, (false, false), &[1024, 476]);
        // A form for the store counts for those that are shown it.
        check(&message(0, 0), Some(&message(900_000, 0)), (true, true), &[1, 1]);
        check(&message(0, 0), Some(&message(900_000, 0)), (false, true), &[1024, 476]);
    }
}
