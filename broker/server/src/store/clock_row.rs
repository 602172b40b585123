//! The row with the broker's clock; see [`crate::clock`].

use super::rows::{Put, Take};

/// What is to be taken off times in rows that were written before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Correction {
    /// Broker time.
    pub(crate) before_ms: u64,
    pub(crate) by_ms: u64,
}

/// The time before a start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Gap {
    /// Broker time of that start.
    pub(crate) before_ms: u64,
    /// The system's clock made sense then; otherwise nothing was counted.
    pub(crate) is_believed: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ClockRow {
    pub(crate) broker_ms: u64,
    /// What the system's clock said at that instant.
    pub(crate) wall_ms: u64,
    /// The same at the last instant at which the system's clock was as expected.
    pub(crate) anchor: (u64, u64),
    pub(crate) gap: Option<Gap>,
    /// The latest that the system's clock ever said.
    pub(crate) highest_wall_ms: u64,
    pub(crate) corrections: Vec<Correction>,
}

impl ClockRow {
    pub(crate) fn put(&self) -> Vec<u8> {
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

    /// `None`: it is damaged.
    pub(crate) fn take(row: &[u8]) -> Option<Self> {
        let mut row = Take(row);
        let (broker_ms, wall_ms, anchor) = (row.u64()?, row.u64()?, (row.u64()?, row.u64()?));
        let (highest_wall_ms, kind, before_ms) = (row.u64()?, row.u8()?, row.u64()?);
        let gap = match kind {
            0 => None,
            1 | 2 => Some(Gap { before_ms, is_believed: kind == 2 }),
            _ => return None,
        };
        let correction = |row: &mut Take<'_>| Some(Correction { before_ms: row.u64()?, by_ms: row.u64()? });
        let corrections = (0..row.u16()?).map(|_| correction(&mut row)).collect::<Option<_>>()?;
        Some(Self { broker_ms, wall_ms, anchor, gap, highest_wall_ms, corrections })
    }

    /// What the system's clock says, or said, at an instant of broker time.
    pub(crate) fn wall_of(&self, at_ms: u64) -> u64 {
        let (broker_ms, wall_ms) = self.anchor;
        (wall_ms + at_ms).saturating_sub(broker_ms)
    }
}
