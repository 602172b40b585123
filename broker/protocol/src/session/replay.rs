//! Retained messages on their way to new subscriptions. MQTT 5.0 §3.3.1.3.
//!
//! What was not sent so far is a place in the order of topics, not a list of messages; it belongs to the Session and
//! goes on with its next Network Connection. §4.1

use std::collections::BTreeMap;
use std::ops::Bound;

use super::Session;
use crate::router::{Position, Subscription};
use crate::topic::Filter;

/// A walk over the retained messages that one subscription matches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replay {
    /// What comes before it was sent, or queued.
    pub from: Position,
    /// What was retained after this one came to the subscription when it was published.
    pub until: u64,
}

/// Replays of one Session: at most one for each subscription.
#[derive(Debug, Default)]
pub(super) struct Replays {
    by_filter: BTreeMap<Filter, Replay>,
    /// Whose turn it was last.
    last: Option<Filter>,
    /// The caller will go on with them by itself.
    is_scheduled: bool,
}

impl Session {
    /// A subscription gets the retained messages that it matches; one that has begun begins again.
    pub fn begin_replay(&mut self, filter: Filter, replay: Replay) {
        self.replays.get_or_insert_default().by_filter.insert(filter, replay);
    }

    /// Retained messages wait to be sent.
    #[inline]
    pub fn has_replays(&self) -> bool {
        self.replays.is_some()
    }

    /// All of them.
    pub fn replays(&self) -> impl Iterator<Item = (&Filter, &Replay)> {
        self.replays.iter().flat_map(|replays| &replays.by_filter)
    }

    /// Where the replay of a subscription stands, if it has one.
    pub fn replay(&self, filter: &Filter) -> Option<&Replay> {
        self.replays.as_ref()?.by_filter.get(filter)
    }

    /// The subscription whose turn it is, and where its replay stands: each gets a part in turn.
    pub fn next_replay(&mut self) -> Option<(Filter, Replay, Subscription)> {
        let replays = self.replays.as_mut()?;
        let behind = replays.last.take().and_then(|last| {
            let mut behind = replays.by_filter.range((Bound::Excluded(last), Bound::Unbounded));
            behind.next().map(|(filter, replay)| (filter.clone(), replay.clone()))
        });
        let first = || replays.by_filter.first_key_value().map(|(filter, replay)| (filter.clone(), replay.clone()));
        let (filter, replay) = behind.or_else(first)?;
        replays.last = Some(filter.clone());
        let subscription = *self.subscription(&filter)?;
        Some((filter, replay, subscription))
    }

    /// A part of a replay is done; `None`: all of it.
    pub fn advance_replay(&mut self, filter: &Filter, to: Option<Position>) {
        let Some(replays) = &mut self.replays else { return };
        match to {
            Some(to) => {
                if let Some(replay) = replays.by_filter.get_mut(filter) {
                    replay.from = to;
                }
            }
            None => drop(replays.by_filter.remove(filter)),
        }
        if replays.by_filter.is_empty() {
            self.replays = None;
        }
    }

    /// The caller goes on with the replays by itself; `false`: there are none, or it does so already.
    pub fn schedule_replays(&mut self) -> bool {
        self.replays.as_mut().is_some_and(|replays| !std::mem::replace(&mut replays.is_scheduled, true))
    }

    /// The caller goes on when it is asked to: the client has to take something first.
    pub fn pause_replays(&mut self) {
        if let Some(replays) = &mut self.replays {
            replays.is_scheduled = false;
        }
    }
}
