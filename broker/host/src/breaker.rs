//! When a plugin is left alone after failures.
//!
//! A client whose question broke the plugin is not asked about for a while. When questions of several clients in a row
//! broke it, and none was answered in between, the plugin itself seems broken, and nobody is asked about. Since any
//! answer ends the row, a hostile client that takes many names cannot switch a plugin off that works for others.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Clients in a row whose questions broke the plugin.
const CLIENTS_MAX: usize = 5;
/// How long a client is not asked about, and how long a failure counts.
const WINDOW: Duration = Duration::from_secs(10);
/// How long the plugin is left alone at first; doubles up to the longest.
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
}

#[derive(Debug)]
struct Failure {
    at: Instant,
    client: u64,
}

#[derive(Debug)]
struct Open {
    until: Instant,
    pause: Duration,
}

impl Breaker {
    /// Whether to answer this client without the plugin. After a pause one call is let through to try.
    pub(crate) fn refuses(&mut self, client: u64, now: impl Fn() -> Instant) -> bool {
        if self.recent.is_empty() && self.open.is_none() {
            return false;
        }
        let now = now();
        if self.recent.iter().any(|failure| failure.client == client && now.duration_since(failure.at) < WINDOW) {
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

    /// The plugin answered.
    pub(crate) fn answered(&mut self) {
        self.row = 0;
        self.open = None;
    }

    /// A question of this client broke the plugin. Returns how long the plugin is left alone, if it now is.
    pub(crate) fn broke(&mut self, client: u64, now: Instant) -> Option<Duration> {
        let first_of_row = self.recent.len() - self.row.min(self.recent.len());
        let in_row = |(place, failure): (usize, &Failure)| {
            place >= first_of_row && failure.client != client && now.duration_since(failure.at) < WINDOW
        };
        self.row = self.recent.iter().enumerate().filter(|entry| in_row(*entry)).count() + 1;
        self.recent.retain(|failure| failure.client != client && now.duration_since(failure.at) < WINDOW);
        if self.recent.len() == RECENT_MAX {
            self.recent.pop_front();
        }
        self.recent.push_back(Failure { at: now, client });
        let pause = match &self.open {
            Some(open) => (open.pause * 2).min(PAUSE_MAX),
            None if self.row >= CLIENTS_MAX => PAUSE,
            None => return None,
        };
        self.open = Some(Open { until: now + pause, pause });
        Some(pause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_client_cannot_open_it() {
        let (mut breaker, now) = (Breaker::default(), Instant::now());
        for _ in 0..100 {
            assert_eq!(breaker.broke(1, now), None);
        }
        assert!(breaker.refuses(1, || now), "the client itself waits");
        assert!(!breaker.refuses(2, || now));
        assert!(!breaker.refuses(1, || now + WINDOW));
    }

    #[test]
    fn answers_in_between_keep_it_closed() {
        let (mut breaker, now) = (Breaker::default(), Instant::now());
        for client in 0..1000 {
            assert_eq!(breaker.broke(client, now), None);
            breaker.answered();
        }
        assert!(breaker.refuses(999, || now));
        assert!(!breaker.refuses(5000, || now));
    }

    #[test]
    fn many_clients_open_it_for_longer_and_longer_and_an_answer_closes_it() {
        let (mut breaker, mut now) = (Breaker::default(), Instant::now());
        let pauses: Vec<_> = (0..5).map(|client| breaker.broke(client, now)).collect();
        assert_eq!(pauses, [None, None, None, None, Some(PAUSE)]);
        assert!(breaker.refuses(99, || now));
        now += PAUSE;
        assert!(!breaker.refuses(99, || now), "one may try");
        assert!(breaker.refuses(100, || now), "and only one");
        assert_eq!(breaker.broke(99, now), Some(PAUSE * 2));
        for client in 200..210 {
            breaker.broke(client, now);
        }
        assert_eq!(breaker.broke(300, now), Some(PAUSE_MAX));
        now += PAUSE_MAX;
        assert!(!breaker.refuses(400, || now));
        breaker.answered();
        assert!(!breaker.refuses(401, || now));
    }
}
