//! A plugin's share of a thread: one that computes for long must not slow down clients that do not need it.
//!
//! Computing is paid for with waiting: at a share of 25 percent, a millisecond of computing is followed by three in which
//! the plugin waits. Calls that end before the clock's first tick, a millisecond at most, are neither measured nor held
//! back, so that quick ones cost nothing.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Computing that is not paid for at once.
const BURST: Duration = Duration::from_millis(4);

/// What a plugin computes on one thread.
#[derive(Default)]
#[repr(align(128))]
pub(crate) struct Share {
    /// When all computing so far is paid for, in nanoseconds of [`now_ns`].
    paid_at: AtomicU64,
    /// Others have work for the thread; if not, nobody waits.
    crowded: AtomicBool,
    /// Measured computing, in nanoseconds.
    cpu_ns: AtomicU64,
    /// How often a call waited for its share.
    waits: AtomicU64,
}

impl Share {
    /// A thread that always has other work.
    pub(crate) fn crowded() -> Self {
        Self { crowded: AtomicBool::new(true), ..Self::default() }
    }

    pub(crate) fn set_crowded(&self, crowded: bool) {
        if self.crowded.load(Ordering::Relaxed) != crowded {
            self.crowded.store(crowded, Ordering::Relaxed);
        }
    }

    /// How long the plugin must wait before it computes again.
    pub(crate) fn wait(&self, percent: u8) -> Option<Duration> {
        if percent >= 100 || !self.crowded.load(Ordering::Relaxed) {
            return None;
        }
        let wait = self.wait_at(now_ns());
        if wait.is_some() {
            self.waits.fetch_add(1, Ordering::Relaxed);
        }
        wait
    }

    fn wait_at(&self, now: u64) -> Option<Duration> {
        let wait = self.paid_at.load(Ordering::Relaxed).saturating_sub(now);
        (wait > 0).then(|| Duration::from_nanos(wait))
    }

    /// The plugin has computed.
    pub(crate) fn spend(&self, cpu_ns: u64, percent: u8) {
        self.cpu_ns.fetch_add(cpu_ns, Ordering::Relaxed);
        self.spend_at(now_ns(), cpu_ns, percent);
    }

    /// `now` is the end of the computing.
    fn spend_at(&self, now: u64, cpu_ns: u64, percent: u8) {
        let burst = BURST.as_nanos() as u64;
        let price = cpu_ns * 100 / u64::from(percent.clamp(1, 100));
        let begun = now.saturating_sub(cpu_ns).saturating_sub(burst);
        let paid_at = self.paid_at.load(Ordering::Relaxed).max(begun) + price;
        self.paid_at.store(paid_at, Ordering::Relaxed);
    }

    pub(crate) fn cpu(&self) -> Duration {
        Duration::from_nanos(self.cpu_ns.load(Ordering::Relaxed))
    }

    pub(crate) fn waits(&self) -> u64 {
        self.waits.load(Ordering::Relaxed)
    }
}

/// A rate: each step has a price in nanoseconds, and so many of these pass in a second as in any other.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Pace {
    paid_at: u64,
}

impl Pace {
    /// What a step costs so that `per_sec` of them are free in a second.
    pub(crate) fn price(steps: usize, per_sec: u64) -> u64 {
        (u128::from(steps as u64) * 1_000_000_000 / u128::from(per_sec.max(1))) as u64
    }

    /// Pays for steps. Returns how long they are ahead of the rate, more than `burst` allows.
    pub(crate) fn take(&mut self, price_ns: u64, burst: Duration) -> Option<Duration> {
        let (now, burst) = (now_ns(), burst.as_nanos() as u64);
        self.paid_at = self.paid_at.max(now).saturating_add(price_ns);
        let ahead = self.paid_at.saturating_sub(now).saturating_sub(burst);
        (ahead > 0).then(|| Duration::from_nanos(ahead))
    }

    /// Pays only if that keeps to the rate.
    pub(crate) fn try_take(&mut self, price_ns: u64, burst: Duration) -> bool {
        let (before, fits) = (*self, self.take(price_ns, burst).is_none());
        if !fits {
            *self = before;
        }
        fits
    }
}

/// Nanoseconds since the first look.
fn now_ns() -> u64 {
    static FIRST: OnceLock<Instant> = OnceLock::new();
    FIRST.get_or_init(Instant::now).elapsed().as_nanos() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    #[test]
    fn a_pace_allows_a_burst_and_then_its_rate() {
        let mut pace = Pace::default();
        let price = Pace::price(1, 1_000);
        assert_eq!(price, MS);
        let taken = (0..5_000).filter(|_| pace.try_take(price, Duration::from_secs(1))).count();
        assert!((1_000..2_000).contains(&taken), "{taken}");
        let ahead = pace.take(1_000 * MS, Duration::from_secs(1)).expect("far ahead");
        assert!(ahead <= Duration::from_secs(1) && ahead > Duration::from_millis(500), "{ahead:?}");
    }

    #[test]
    fn computing_is_paid_for_with_waiting() {
        let (share, mut now, mut computed) = (Share::default(), 100 * MS, 0);
        // A guest that always wants to compute, for a second.
        while now < 1100 * MS {
            if let Some(wait) = share.wait_at(now) {
                now += wait.as_nanos() as u64;
            } else {
                now += MS;
                computed += MS;
                share.spend_at(now, MS, 25);
            }
        }
        assert!((240 * MS..=260 * MS).contains(&computed), "{computed}");
    }

    #[test]
    fn little_computing_never_waits() {
        let share = Share::default();
        for turn in 1..1000 {
            assert_eq!(share.wait_at(turn * 10 * MS), None);
            share.spend_at(turn * 10 * MS + MS, MS, 25);
        }
    }

    #[test]
    fn nobody_waits_where_nobody_else_has_work() {
        let share = Share::default();
        share.spend(1_000_000_000_000, 1);
        assert_eq!(share.wait(1), None);
        share.set_crowded(true);
        assert!(share.wait(1).is_some());
        assert_eq!(share.wait(100), None);
        assert_eq!((share.waits(), share.cpu()), (1, Duration::from_secs(1000)));
    }
}
