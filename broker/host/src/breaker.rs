//! The circuit breaker: when a plugin is not asked for a while after failures.
//!
//! A client whose question broke the plugin is not asked about for a while. When questions of several clients in a row
//! failed, and none was answered in between, the plugin itself seems to fail, and nobody is asked about until a pause is
//! over and one call tries again. Since any answer ends the row, a hostile client that takes many names cannot switch a
//! plugin off that works for others.
//!
//! One incident counts once: calls that began before the breaker opened fail for the same reason, and when they end
//! they make the pause neither longer nor begin anew. It grows only when a call fails that was let through after it.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Clients in a row whose questions failed.
const CLIENTS_MAX: usize = 5;
/// How long a client is not asked about, and how long a failure counts.
const WINDOW: Duration = Duration::from_secs(10);
/// How long the breaker is open at first; doubles up to the longest.
const PAUSE: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_mins(1);
/// Failures remembered; the oldest are forgotten first.
const RECENT_MAX: usize = 256;

#[derive(Debug, Default)]
pub(crate) struct Breaker {
    /// At most one for each client.
    recent: VecDeque<Failure>,
    /// Of `recent`, those since the last answer.
    row: usize,
    open: Option<Open>,
    /// How often it opened, or stayed open after a try.
    incidents: u32,
}

#[derive(Debug)]
struct Failure {
    at: Instant,
    client: u64,
    /// The client's question is at fault, as far as one can tell.
    blamed: bool,
}

#[derive(Debug)]
struct Open {
    until: Instant,
    pause: Duration,
}

/// When a call began: before which incidents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Begun(u32);

impl Breaker {
    /// Whether to answer this client without the plugin. After a pause one call is let through to try.
    pub(crate) fn refuses(&mut self, client: u64, now: impl Fn() -> Instant) -> bool {
        if self.recent.is_empty() && self.open.is_none() {
            return false;
        }
        let now = now();
        let is_blamed =
            |failure: &Failure| failure.blamed && failure.client == client && now.duration_since(failure.at) < WINDOW;
        if self.recent.iter().any(is_blamed) {
            return true;
        }
        match &mut self.open {
            Some(open) if now < open.until => true,
            Some(open) => {
                open.until = now + open.pause;
                false
            }
            None => false,
        }
    }

    /// For a call that begins now.
    pub(crate) fn begun(&self) -> Begun {
        Begun(self.incidents)
    }

    /// The plugin answered.
    pub(crate) fn answered(&mut self) {
        self.row = 0;
        self.open = None;
    }

    /// A question of this client failed; `blamed`: because of the question, as far as one can tell. Returns how long the
    /// breaker is open, if it now opened or stays open.
    pub(crate) fn broke(&mut self, client: u64, begun: Begun, blamed: bool, now: Instant) -> Option<Duration> {
        if begun != self.begun() {
            return None;
        }
        let first_of_row = self.recent.len() - self.row.min(self.recent.len());
        let in_row = |(place, failure): (usize, &Failure)| {
            place >= first_of_row && failure.client != client && now.duration_since(failure.at) < WINDOW
        };
        self.row = self.recent.iter().enumerate().filter(|entry| in_row(*entry)).count() + 1;
        self.recent.retain(|failure| failure.client != client && now.duration_since(failure.at) < WINDOW);
        if self.recent.len() == RECENT_MAX {
            self.recent.pop_front();
        }
        self.recent.push_back(Failure { at: now, client, blamed });
        let pause = match &self.open {
            Some(open) => (open.pause * 2).min(PAUSE_MAX),
            None if self.row >= CLIENTS_MAX => PAUSE,
            None => return None,
        };
        // Whoever asked in this row, the plugin failed.
        let first_of_row = self.recent.len().saturating_sub(self.row);
        self.recent.iter_mut().skip(first_of_row).for_each(|failure| failure.blamed = false);
        self.open = Some(Open { until: now + pause, pause });
        self.incidents = self.incidents.wrapping_add(1);
        Some(pause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Breaker {
        /// A call that begins and breaks at once.
        fn breaks(&mut self, client: u64, now: Instant) -> Option<Duration> {
            self.broke(client, self.begun(), true, now)
        }
    }

    #[test]
    fn one_client_cannot_open_it() {
        let (mut breaker, now) = (Breaker::default(), Instant::now());
        for _ in 0..100 {
            assert_eq!(breaker.breaks(1, now), None);
        }
        assert!(breaker.refuses(1, || now), "the client itself waits");
        assert!(!breaker.refuses(2, || now));
        assert!(!breaker.refuses(1, || now + WINDOW));
    }

    #[test]
    fn answers_in_between_keep_it_closed() {
        let (mut breaker, now) = (Breaker::default(), Instant::now());
        for client in 0..1000 {
            assert_eq!(breaker.breaks(client, now), None);
            breaker.answered();
        }
        assert!(breaker.refuses(999, || now));
        assert!(!breaker.refuses(5000, || now));
    }

    #[test]
    fn many_clients_open_it_for_longer_and_longer_and_an_answer_closes_it() {
        let (mut breaker, mut now) = (Breaker::default(), Instant::now());
        let pauses: Vec<_> = (0..5).map(|client| breaker.breaks(client, now)).collect();
        assert_eq!(pauses, [None, None, None, None, Some(PAUSE)]);
        assert!(breaker.refuses(99, || now));
        let mut pause = PAUSE;
        for client in 100..110 {
            now += pause;
            assert!(!breaker.refuses(client, || now), "one may try");
            assert!(breaker.refuses(client + 1000, || now), "and only one");
            pause = (pause * 2).min(PAUSE_MAX);
            assert_eq!(breaker.breaks(client, now), Some(pause));
        }
        assert_eq!(pause, PAUSE_MAX);
        now += PAUSE_MAX;
        assert!(!breaker.refuses(400, || now));
        breaker.answered();
        assert!(!breaker.refuses(401, || now));
    }

    #[test]
    fn calls_that_were_under_way_when_it_opened_do_not_count() {
        let (mut breaker, now) = (Breaker::default(), Instant::now());
        let begun = breaker.begun();
        let opened = (0..25).filter(|client| breaker.broke(*client, begun, false, now).is_some()).count();
        assert_eq!(opened, 1, "25 calls of one incident");
        assert!(breaker.refuses(99, || now));
        let later = now + PAUSE;
        assert!(!breaker.refuses(3, || later), "the pause has not grown, and who waited in vain may try");
        let tried = breaker.begun();
        assert_eq!(breaker.broke(3, tried, false, later), Some(PAUSE * 2));
        assert_eq!(breaker.broke(4, tried, false, later), None, "a second try of the same time");
    }

    #[test]
    fn who_waited_in_vain_is_asked_about_again() {
        let (mut breaker, now) = (Breaker::default(), Instant::now());
        breaker.broke(1, breaker.begun(), false, now);
        assert!(!breaker.refuses(1, || now));
    }
}
