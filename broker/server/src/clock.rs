//! The broker's time: milliseconds that only pass, across restarts as well, whatever is done to the clock of the system.
//!
//! All instants in memory and in the store are broker time. It begins as the time since 1970 when a store is made, goes
//! on with a clock that nobody can set, and the store keeps what it was beside what the system's clock said. The next
//! broker asks that clock how long none ran, and believes it if it makes sense. If it does not, or if it is put forward
//! soon after the start (a machine without a battery learns the time from the network), the time that passed is taken
//! off what was stored before that start as soon as it is known. Nobody loses what would not have expired.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::time::{ClockId, clock_gettime};
use tracing::{info, warn};
use wasmqtt_protocol::ports::{Clock, ClockRow, Correction, Gap};

/// No broker is believed to have been off for longer.
const GAP_MAX_MS: u64 = 366 * 24 * 3600 * 1000;
/// How far the clocks may drift apart, or be set, without a word.
const DRIFT_MS: u64 = 5_000;
/// The clock may be a little behind what it said before the restart.
const BACKWARDS_MS: u64 = 60_000;
/// How long after a start a clock that is put forward tells of the time before it.
const LATE_MS: u64 = 24 * 3600 * 1000;
/// Rows may be as much younger than the row of the clock.
const ROW_AGE_MS: u64 = 3_000;
/// Corrections that are remembered: one for each start with a wrong clock, while rows from before it are there.
const CORRECTIONS_MAX: usize = 64;

/// Milliseconds since 1970, as the system has it at present.
fn wall_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

/// Milliseconds that only pass, also while the machine sleeps.
fn passed_ms() -> u64 {
    #[cfg(target_os = "linux")]
    let clock = ClockId::Boottime;
    #[cfg(not(target_os = "linux"))]
    let clock = ClockId::Monotonic;
    let now = clock_gettime(clock);
    now.tv_sec.cast_unsigned() * 1000 + (now.tv_nsec / 1_000_000).cast_unsigned()
}

/// What two clocks said at the same instant.
type Pair = (u64, u64);

/// What is known of the clocks; calculates only.
#[derive(Debug)]
struct Knowledge {
    started_ms: u64,
    /// Broker and system, when the latter was last as expected.
    anchor: Pair,
    /// A time before a start of which too little may have been counted.
    gap: Option<Gap>,
    highest_wall_ms: u64,
}

impl Knowledge {
    /// What the last broker left, and what the system's clock says now; also why that cannot be believed.
    fn start(row: Option<&ClockRow>, wall_ms: u64) -> (Self, Option<&'static str>) {
        let Some(row) = row else {
            let (started_ms, highest_wall_ms) = (wall_ms, wall_ms);
            return (Self { started_ms, anchor: (wall_ms, wall_ms), gap: None, highest_wall_ms }, None);
        };
        let doubt = if wall_ms + BACKWARDS_MS < row.wall_ms {
            Some("it was put back")
        } else if wall_ms > row.wall_ms + GAP_MAX_MS {
            Some("more than a year would have passed")
        } else {
            None
        };
        let off_ms = match doubt {
            None => wall_ms.saturating_sub(row.wall_ms),
            Some(_) => ROW_AGE_MS,
        };
        let started_ms = row.broker_ms + off_ms;
        let open = row.gap.filter(|gap| !gap.is_believed);
        let gap = open.unwrap_or(Gap { before_ms: started_ms, is_believed: doubt.is_none() });
        let anchor = if gap.is_believed { (started_ms, wall_ms) } else { row.anchor };
        let highest_wall_ms = row.highest_wall_ms.max(wall_ms);
        (Self { started_ms, anchor, gap: Some(gap), highest_wall_ms }, doubt)
    }

    /// Looks at the system's clock; gives what must be taken off rows from before a gap.
    fn look(&mut self, broker_ms: u64, wall_ms: u64) -> Option<Correction> {
        self.highest_wall_ms = self.highest_wall_ms.max(wall_ms);
        let (anchor_broker_ms, anchor_wall_ms) = self.anchor;
        let expected_ms = anchor_wall_ms + broker_ms.saturating_sub(anchor_broker_ms);
        if wall_ms.abs_diff(expected_ms) <= DRIFT_MS {
            self.anchor = (broker_ms, wall_ms);
            if let Some(gap) = &mut self.gap {
                gap.is_believed = true;
            }
            return None;
        }
        let gap = self.gap?;
        let is_late = gap.is_believed && broker_ms > self.started_ms + LATE_MS;
        if is_late || wall_ms < expected_ms || wall_ms - expected_ms > GAP_MAX_MS {
            return None;
        }
        self.gap = None;
        self.anchor = (broker_ms, wall_ms);
        Some(Correction { before_ms: gap.before_ms, by_ms: wall_ms - expected_ms })
    }
}

/// The broker's clock.
pub(crate) struct BrokerClock {
    /// [`passed_ms`] at the start.
    begun_ms: u64,
    started_ms: u64,
    knowledge: Mutex<Knowledge>,
    is_corrected: AtomicBool,
    corrections: RwLock<Vec<Correction>>,
    changed: OnceLock<Box<dyn Fn() + Send + Sync>>,
    /// Time that did not really pass.
    #[cfg(any(test, feature = "fuzzing"))]
    skipped_ms: std::sync::atomic::AtomicU64,
}

impl BrokerClock {
    /// Goes on where the last broker ended.
    pub(crate) fn start(row: Option<&[u8]>) -> Self {
        let row = row.and_then(|row| {
            let row_read = ClockRow::take(row);
            if row_read.is_none() {
                warn!("store: the row with the broker's clock is damaged; it begins anew");
            }
            row_read
        });
        let wall_ms = wall_ms();
        let (knowledge, doubt) = Knowledge::start(row.as_ref(), wall_ms);
        if let Some(doubt) = doubt {
            let was = row.as_ref().map_or(0, |row| row.wall_ms);
            warn!(
                was_s = was / 1000,
                is_s = wall_ms / 1000,
                "the clock of the system cannot be believed ({doubt}): the time since the last broker ended is not counted"
            );
        }
        let corrections = row.map(|row| row.corrections).unwrap_or_default();
        let clock = Self {
            begun_ms: passed_ms(),
            started_ms: knowledge.started_ms,
            knowledge: Mutex::new(knowledge),
            is_corrected: AtomicBool::new(!corrections.is_empty()),
            corrections: RwLock::new(corrections),
            changed: OnceLock::new(),
            #[cfg(any(test, feature = "fuzzing"))]
            skipped_ms: std::sync::atomic::AtomicU64::new(0),
        };
        clock.look();
        clock
    }

    /// `changed` is called when the row must be written soon.
    pub(crate) fn on_change(&self, changed: Box<dyn Fn() + Send + Sync>) {
        let _ = self.changed.set(changed);
    }

    pub(crate) fn uptime_ms(&self) -> u64 {
        let passed_ms = passed_ms().saturating_sub(self.begun_ms);
        #[cfg(any(test, feature = "fuzzing"))]
        let passed_ms = passed_ms + self.skipped_ms.load(std::sync::atomic::Ordering::Relaxed);
        passed_ms
    }

    /// Moves time forward.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn skip(&self, ms: u64) {
        self.skipped_ms.fetch_add(ms, std::sync::atomic::Ordering::Relaxed);
    }

    /// Broker time when this broker began.
    pub(crate) fn started_ms(&self) -> u64 {
        self.started_ms
    }

    /// Compares with the system's clock. Gives what is to be taken off what was stored before [`Correction::before_ms`];
    /// rows that are read from now on are given with that taken off.
    pub(crate) fn look(&self) -> Option<Correction> {
        let correction = self.knowledge().look(self.now_ms(), wall_ms())?;
        info!(
            by_s = correction.by_ms / 1000,
            "the clock of the system was put forward: the time since the last broker ended is counted now"
        );
        {
            let mut corrections = self.corrections.write().unwrap_or_else(PoisonError::into_inner);
            if corrections.len() == CORRECTIONS_MAX {
                corrections.remove(0);
            }
            corrections.push(correction);
        }
        self.is_corrected.store(true, Ordering::Release);
        if let Some(changed) = self.changed.get() {
            changed();
        }
        Some(correction)
    }

    fn knowledge(&self) -> MutexGuard<'_, Knowledge> {
        self.knowledge.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Clock for BrokerClock {
    fn now_ms(&self) -> u64 {
        self.started_ms + self.uptime_ms()
    }

    fn corrected(&self, written_ms: u64, at_ms: u64) -> u64 {
        if !self.is_corrected.load(Ordering::Acquire) {
            return at_ms;
        }
        let corrections = self.corrections.read().unwrap_or_else(PoisonError::into_inner);
        let later = corrections.iter().filter(|correction| written_ms < correction.before_ms);
        later.fold(at_ms, |at_ms, correction| at_ms.saturating_sub(correction.by_ms))
    }

    fn row(&self) -> Vec<u8> {
        let knowledge = self.knowledge();
        let corrections = self.corrections.read().unwrap_or_else(PoisonError::into_inner).clone();
        let row = ClockRow {
            broker_ms: self.now_ms(),
            wall_ms: wall_ms(),
            anchor: knowledge.anchor,
            gap: knowledge.gap,
            highest_wall_ms: knowledge.highest_wall_ms,
            corrections,
        };
        row.put()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: u64 = 3600 * 1000;
    const DAY: u64 = 24 * HOUR;
    const YEAR: u64 = 365 * DAY;
    /// Some day in this century.
    const NOW: u64 = 56 * YEAR;

    /// A broker and its clocks, in steps of a second.
    struct Run {
        knowledge: Knowledge,
        broker_ms: u64,
        wall_ms: u64,
        corrections: Vec<Correction>,
        doubted: bool,
    }

    impl Run {
        fn start(row: Option<&ClockRow>, wall_ms: u64) -> Self {
            let (knowledge, doubt) = Knowledge::start(row, wall_ms);
            let corrections = row.map(|row| row.corrections.clone()).unwrap_or_default();
            let broker_ms = knowledge.started_ms;
            let mut run = Self { knowledge, broker_ms, wall_ms, corrections, doubted: doubt.is_some() };
            run.pass(0);
            run
        }

        fn pass(&mut self, ms: u64) {
            self.broker_ms += ms;
            self.wall_ms += ms;
            self.corrections.extend(self.knowledge.look(self.broker_ms, self.wall_ms));
        }

        fn set_wall(&mut self, wall_ms: u64) {
            self.wall_ms = wall_ms;
            self.pass(0);
        }

        fn row(&self) -> ClockRow {
            ClockRow {
                broker_ms: self.broker_ms,
                wall_ms: self.wall_ms,
                anchor: self.knowledge.anchor,
                gap: self.knowledge.gap,
                highest_wall_ms: self.knowledge.highest_wall_ms,
                corrections: self.corrections.clone(),
            }
        }

        /// How long ago something was that was written then, by what is known.
        fn age(&self, written_ms: u64) -> u64 {
            let later = self.corrections.iter().filter(|correction| written_ms < correction.before_ms);
            self.broker_ms - written_ms + later.map(|correction| correction.by_ms).sum::<u64>()
        }
    }

    /// Runs for an hour with the right clock; gives when something was written then, and what is left of it.
    fn an_hour(wall_ms: u64) -> (u64, ClockRow) {
        let mut run = Run::start(None, wall_ms);
        run.pass(HOUR);
        let written = run.broker_ms;
        run.pass(1);
        (written, run.row())
    }

    fn is_about(a: u64, b: u64) -> bool {
        a.abs_diff(b) <= DRIFT_MS
    }

    #[test]
    fn a_plausible_time_off_is_counted() {
        let (written, row) = an_hour(NOW);
        for off in [0, 1, HOUR, 300 * DAY] {
            let run = Run::start(Some(&row), row.wall_ms + off);
            assert!(!run.doubted && is_about(run.age(written), off), "{off}");
        }
        // A clock that was corrected a little is no reason to doubt it.
        let run = Run::start(Some(&row), row.wall_ms - 30_000);
        assert!(!run.doubted && is_about(run.age(written), 0));
    }

    #[test]
    fn years_forward_or_back_before_a_start_are_not_counted() {
        let (written, row) = an_hour(NOW);
        for wall in [NOW + 30 * YEAR, 0, NOW - YEAR, row.wall_ms - HOUR] {
            let mut run = Run::start(Some(&row), wall);
            run.pass(HOUR);
            assert!(run.doubted && is_about(run.age(written), HOUR), "{wall}");
        }
    }

    #[test]
    fn years_forward_or_back_while_it_runs_change_nothing() {
        for wall in [NOW + 30 * YEAR, 5] {
            let (written, row) = an_hour(NOW);
            let mut run = Run::start(Some(&row), row.wall_ms + HOUR);
            run.pass(HOUR);
            let young = run.broker_ms;
            run.set_wall(wall);
            run.pass(HOUR);
            assert!(is_about(run.age(young), HOUR) && is_about(run.age(written), 3 * HOUR), "{wall}");
            // It stays wrong: the next broker can still tell how long none ran.
            let next = Run::start(Some(&run.row()), run.wall_ms + 2 * HOUR);
            assert!(!next.doubted && is_about(next.age(young), 3 * HOUR), "{wall}");
            // It is right again: what passed is known from the time when it was right.
            let right = row.wall_ms + 3 * HOUR + 2 * HOUR;
            let next = Run::start(Some(&run.row()), right);
            assert!(is_about(next.age(young), 3 * HOUR) && is_about(next.age(written), 5 * HOUR), "{wall}");
        }
    }

    /// A machine without a battery: it starts in 1970, or where it was when it was switched off, and learns the time later.
    #[test]
    fn a_clock_that_is_right_later_tells_of_the_time_off() {
        let (written, row) = an_hour(NOW);
        for wrong in [0, row.wall_ms, row.wall_ms + 60_000] {
            let mut run = Run::start(Some(&row), wrong);
            run.pass(60_000);
            let young = run.broker_ms;
            run.set_wall(row.wall_ms + 7 * DAY);
            assert!(is_about(run.age(written), 7 * DAY), "{wrong}");
            assert_eq!(run.age(young), 0, "{wrong}");
            let next = Run::start(Some(&run.row()), run.wall_ms + HOUR);
            assert!(is_about(next.age(young), HOUR) && is_about(next.age(written), 7 * DAY + HOUR), "{wrong}");
        }
    }

    /// Two starts with a wrong clock: nothing of the first is older than it can be.
    #[test]
    fn the_right_clock_after_several_wrong_ones() {
        let (written, row) = an_hour(NOW);
        let mut run = Run::start(Some(&row), 0);
        run.pass(HOUR);
        let young = run.broker_ms;
        let mut run = Run::start(Some(&run.row()), 0);
        run.pass(HOUR);
        run.set_wall(row.wall_ms + 7 * DAY);
        assert!(is_about(run.age(written), 7 * DAY));
        assert!(run.age(young) <= HOUR + ROW_AGE_MS);
        let next = Run::start(Some(&run.row()), row.wall_ms + 8 * DAY);
        assert!(is_about(next.age(written), 8 * DAY));
    }

    /// Long after the start it is somebody who sets it, and no time off.
    #[test]
    fn days_forward_long_after_the_start_change_nothing() {
        let (written, row) = an_hour(NOW);
        let mut run = Run::start(Some(&row), row.wall_ms + HOUR);
        for _ in 0..30 {
            run.pass(HOUR);
        }
        run.set_wall(run.wall_ms + 7 * DAY);
        assert!(is_about(run.age(written), 31 * HOUR));
    }

    #[test]
    fn drift_is_followed() {
        let (written, row) = an_hour(NOW);
        let mut run = Run::start(Some(&row), row.wall_ms);
        for _ in 0..100 {
            run.pass(HOUR);
            run.set_wall(run.wall_ms + 2_000);
        }
        assert!(is_about(run.age(written), 100 * HOUR));
        let next = Run::start(Some(&run.row()), run.wall_ms + HOUR);
        assert!(is_about(next.age(written), 101 * HOUR));
    }

    #[test]
    fn the_row_survives() {
        let (_, row) = an_hour(NOW);
        let correction = Correction { before_ms: 1, by_ms: 2 };
        let row = ClockRow { gap: Some(Gap { before_ms: 3, is_believed: true }), corrections: vec![correction], ..row };
        assert_eq!(ClockRow::take(&row.put()), Some(row));
        assert_eq!(ClockRow::take(b"short"), None);
    }
}
