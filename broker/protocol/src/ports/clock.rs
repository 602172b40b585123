//! What is kept of the broker's clock.

use bytes::{Buf, BufMut};

/// What is to be taken off times in rows that were written before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Correction {
    /// Those that were written before this instant of broker time.
    pub before_ms: u64,
    /// So many milliseconds.
    pub by_ms: u64,
}

/// The time before a start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gap {
    /// Broker time of that start.
    pub before_ms: u64,
    /// The system's clock made sense then; otherwise nothing was counted.
    pub is_believed: bool,
}

/// The broker's clock and what is known of the system's, as the store keeps them. All times are in milliseconds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClockRow {
    /// Broker time when the row was written.
    pub broker_ms: u64,
    /// What the system's clock said at that instant.
    pub wall_ms: u64,
    /// The same at the last instant at which the system's clock was as expected.
    pub anchor: (u64, u64),
    /// A time before a start of which too little may have been counted.
    pub gap: Option<Gap>,
    /// The latest that the system's clock ever said.
    pub highest_wall_ms: u64,
    /// What was learned about earlier rows, in order.
    pub corrections: Vec<Correction>,
}

impl ClockRow {
    /// As bytes; see [`Self::take`].
    pub fn put(&self) -> Vec<u8> {
        let mut to = Vec::new();
        for number in [self.broker_ms, self.wall_ms, self.anchor.0, self.anchor.1, self.highest_wall_ms] {
            to.put_u64(number);
        }
        to.put_u8(self.gap.map_or(0, |gap| 1 + u8::from(gap.is_believed)));
        to.put_u64(self.gap.map_or(0, |gap| gap.before_ms));
        to.put_u16(self.corrections.len() as u16);
        for correction in &self.corrections {
            to.put_u64(correction.before_ms);
            to.put_u64(correction.by_ms);
        }
        to
    }

    /// From the bytes of [`Self::put`]; `None`: they are damaged.
    pub fn take(mut row: &[u8]) -> Option<Self> {
        let mut u64 = || row.try_get_u64().ok();
        let (broker_ms, wall_ms, anchor, highest_wall_ms) = (u64()?, u64()?, (u64()?, u64()?), u64()?);
        let (kind, before_ms) = (row.try_get_u8().ok()?, row.try_get_u64().ok()?);
        let gap = match kind {
            0 => None,
            1 | 2 => Some(Gap { before_ms, is_believed: kind == 2 }),
            _ => return None,
        };
        let count = row.try_get_u16().ok()?;
        let mut correction = || Some(Correction { before_ms: row.try_get_u64().ok()?, by_ms: row.try_get_u64().ok()? });
        let corrections = (0..count).map(|_| correction()).collect::<Option<_>>()?;
        Some(Self { broker_ms, wall_ms, anchor, gap, highest_wall_ms, corrections })
    }

    /// What the system's clock says, or said, at an instant of broker time.
    pub fn wall_of(&self, at_ms: u64) -> u64 {
        let (broker_ms, wall_ms) = self.anchor;
        (wall_ms + at_ms).saturating_sub(broker_ms)
    }
}
