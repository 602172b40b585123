//! Whether a build that serves since a short time does worse than the one before.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use crate::generation::Generation;

/// Fewer failures than this say nothing.
const FAILURES_MIN: u64 = 3;

/// A build that serves, and the one that is kept to go back to.
pub(crate) struct Probation {
    pub(crate) old: Arc<Generation>,
    pub(crate) new: Arc<Generation>,
    since: Instant,
}

/// What is to be done.
pub(crate) enum Judgement {
    TooEarly,
    Passed,
    Fails,
}

impl Probation {
    pub(crate) fn new(old: &Arc<Generation>, new: &Arc<Generation>) -> Self {
        Self { old: Arc::clone(old), new: Arc::clone(new), since: Instant::now() }
    }

    pub(crate) fn judge(&self) -> Judgement {
        if Self::fails_more(&self.old, &self.new) {
            Judgement::Fails
        } else if self.since.elapsed() >= self.new.config.probation {
            Judgement::Passed
        } else {
            Judgement::TooEarly
        }
    }

    /// More of its calls fail than of its predecessor's, by more than chance.
    pub(crate) fn fails_more(old: &Generation, new: &Generation) -> bool {
        let counts = |of: &Generation| (of.calls.load(Ordering::Relaxed), of.failures.load(Ordering::Relaxed));
        is_worse(counts(old), counts(new))
    }
}

/// Each with calls and failures among them. A tenth more than before is worse.
fn is_worse((old_calls, old_failures): (u64, u64), (calls, failures): (u64, u64)) -> bool {
    let before = u128::from(old_failures) * 10 + u128::from(old_calls);
    failures >= FAILURES_MIN
        && u128::from(failures) * 10 * u128::from(old_calls.max(1)) > before * u128::from(calls.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tenth_more_failures_are_worse() {
        assert!(is_worse((1000, 0), (3, 3)));
        assert!(!is_worse((1000, 0), (3, 2)), "may be chance");
        assert!(!is_worse((1000, 0), (1000, 50)), "one in twenty");
        assert!(is_worse((1000, 0), (1000, 101)));
        assert!(!is_worse((1000, 500), (100, 55)), "it was bad before");
        assert!(is_worse((1000, 500), (100, 65)));
        assert!(is_worse((0, 0), (10, 5)), "a predecessor that was never asked has not failed");
    }
}
