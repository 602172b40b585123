//! What a group of batches comes to: rows to put and rows to delete, without those that only came to go.

use std::collections::BTreeMap;

use hashbrown::HashMap;

use super::batch::{Kind, Row};
use super::rows::{Family, Take};

/// Messages that are gone, after whose number their rows of [`Family::Done`] are deleted together.
const GONE_MAX: usize = 1024;

/// Messages for several receivers, and how many of these still need each.
#[derive(Default)]
pub(super) struct Counts {
    left: BTreeMap<u64, u32>,
    /// Messages that all have, while rows of [`Family::Done`] still say who had them.
    gone: Vec<u64>,
}

impl Counts {
    pub(super) fn new(left: BTreeMap<u64, u32>, gone: Vec<u64>) -> Self {
        Self { left, gone }
    }

    /// Ranges of messages of whose rows of [`Family::Done`] none is needed any more; empty: it is not worth it yet.
    ///
    /// Each range costs every later read something, so one ends only where a message lies that somebody still needs.
    pub(super) fn ranges(&mut self, at_last: bool) -> Vec<(u64, u64)> {
        if self.gone.is_empty() || (self.gone.len() < GONE_MAX && !at_last) {
            return Vec::new();
        }
        self.gone.sort_unstable();
        let end_of_all = self.gone.last().map_or(0, |id| id.saturating_add(1));
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        for id in &self.gone {
            if ranges.last().is_some_and(|(_, end)| id < end) {
                continue;
            }
            let start = self.left.range(..id).next_back().map_or(0, |(id, _)| id + 1);
            let end = self.left.range(id..).next().map_or(end_of_all, |(id, _)| *id);
            if start < end {
                ranges.push((start, end));
            }
        }
        ranges
    }

    /// A message is not kept after all.
    pub(super) fn drop_message(&mut self, key: &[u8]) {
        let id = id_of(key);
        if self.left.remove(&id).is_some() {
            self.gone.push(id);
        }
    }

    /// The ranges are deleted.
    pub(super) fn forget_gone(&mut self) {
        self.gone.clear();
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Write<'a> {
    Put(Family, &'a [u8], &'a [u8]),
    Delete(Family, &'a [u8]),
}

/// The rows of a group. What is put and not needed any more within it is left out.
#[derive(Default)]
pub(super) struct Plan<'a> {
    writes: Vec<Option<Write<'a>>>,
    /// Nothing in the group removes a row, so that none can be left out.
    is_final: bool,
    /// Rows that did not exist before, and their places.
    fresh: HashMap<(Family, &'a [u8]), usize, foldhash::fast::RandomState>,
}

impl<'a> Plan<'a> {
    pub(super) fn new(rows: usize, removes: bool) -> Self {
        Self { writes: Vec::with_capacity(rows), is_final: !removes, fresh: HashMap::default() }
    }

    pub(super) fn writes(&self) -> impl Iterator<Item = Write<'a>> + Clone {
        self.writes.iter().flatten().copied()
    }

    pub(super) fn add(&mut self, row: Row<'a>, counts: &mut Counts) {
        match row.kind {
            Kind::Message(receivers) => {
                if receivers > 1 {
                    counts.left.insert(id_of(row.key), receivers);
                } else {
                    self.note_fresh(row);
                }
                self.put(row);
            }
            Kind::Done => self.done(row, counts),
            Kind::Put => {
                let is_new = match row.family {
                    Family::Received => true,
                    // The first of its rows; or one whose first was left out.
                    Family::Inflight => row.value[0] <= 2 || self.forget((row.family, row.key)),
                    _ => false,
                };
                if is_new {
                    self.note_fresh(row);
                }
                self.put(row);
            }
            Kind::Delete => {
                if !self.forget((row.family, row.key)) {
                    self.writes.push(Some(Write::Delete(row.family, row.key)));
                }
            }
        }
    }

    fn note_fresh(&mut self, row: Row<'a>) {
        if !self.is_final {
            self.fresh.insert((row.family, row.key), self.writes.len());
        }
    }

    fn put(&mut self, row: Row<'a>) {
        self.writes.push(Some(Write::Put(row.family, row.key, row.value)));
    }

    /// Leaves out what would only be put to be deleted; `false`: it is in the store already.
    fn forget(&mut self, row: (Family, &'a [u8])) -> bool {
        let Some(place) = self.fresh.remove(&row) else { return false };
        self.writes[place] = None;
        true
    }

    /// One of its receivers has it.
    fn done(&mut self, row: Row<'a>, counts: &mut Counts) {
        let (message, id) = (&row.key[..8], id_of(row.key));
        match counts.left.get_mut(&id) {
            Some(left) if *left > 1 => {
                *left -= 1;
                self.writes.push(Some(Write::Put(Family::Done, row.key, row.value)));
            }
            _ => self.gone(row.family, message, counts),
        }
    }

    /// Nobody needs it any more.
    fn gone(&mut self, family: Family, message: &'a [u8], counts: &mut Counts) {
        let id = id_of(message);
        if counts.left.remove(&id).is_some() {
            counts.gone.push(id);
            self.writes.push(Some(Write::Delete(family, message)));
        } else if !self.forget((family, message)) {
            self.writes.push(Some(Write::Delete(family, message)));
        }
    }
}

fn id_of(key: &[u8]) -> u64 {
    Take(key).u64().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::super::rows::Put;
    use super::*;

    fn row<'a>(family: Family, kind: Kind, key: &'a [u8], value: &'a [u8]) -> Row<'a> {
        Row { family, kind, key, value }
    }

    fn done_key(id: u64, session: u64) -> Vec<u8> {
        let mut to = Vec::new();
        to.put_u64(id);
        to.put_u64(session);
        to
    }

    fn key(id: u64) -> [u8; 8] {
        id.to_be_bytes()
    }

    fn left<'a>(plan: &Plan<'a>) -> Vec<Write<'a>> {
        plan.writes().collect()
    }

    #[test]
    fn what_is_acknowledged_before_it_is_written_is_not_written() {
        let (id, done, handshake) = (key(7), done_key(7, 1), [1; 10]);
        let (mut plan, mut counts) = (Plan::default(), Counts::default());
        plan.add(row(Family::Message, Kind::Message(1), &id, b"m"), &mut counts);
        plan.add(row(Family::Inflight, Kind::Put, &handshake, &[1]), &mut counts);
        plan.add(row(Family::Inflight, Kind::Delete, &handshake, &[]), &mut counts);
        plan.add(row(Family::Message, Kind::Done, &done, &[]), &mut counts);
        assert_eq!(left(&plan), []);
    }

    #[test]
    fn a_row_of_an_earlier_group_is_deleted() {
        let (id, done, handshake) = (key(7), done_key(7, 1), [1; 10]);
        let (mut plan, mut counts) = (Plan::default(), Counts::default());
        // PUBREC and PUBCOMP of a message that was sent before.
        plan.add(row(Family::Inflight, Kind::Put, &handshake, &[3]), &mut counts);
        plan.add(row(Family::Message, Kind::Done, &done, &[]), &mut counts);
        plan.add(row(Family::Inflight, Kind::Delete, &handshake, &[]), &mut counts);
        let expected = [
            Write::Put(Family::Inflight, &handshake, &[3]),
            Write::Delete(Family::Message, &id),
            Write::Delete(Family::Inflight, &handshake),
        ];
        assert_eq!(left(&plan), expected);
    }

    #[test]
    fn a_message_goes_when_its_last_receiver_has_it() {
        let id = key(7);
        let keys = [done_key(7, 1), done_key(7, 2), done_key(7, 3)];
        let (mut plan, mut counts) = (Plan::default(), Counts::default());
        plan.add(row(Family::Message, Kind::Message(3), &id, b"m"), &mut counts);
        for key in &keys {
            plan.add(row(Family::Message, Kind::Done, key, &[]), &mut counts);
        }
        let expected = [
            Write::Put(Family::Message, &id, b"m"),
            Write::Put(Family::Done, &keys[0], &[]),
            Write::Put(Family::Done, &keys[1], &[]),
            Write::Delete(Family::Message, &id),
        ];
        assert_eq!(left(&plan), expected);
        assert!(counts.left.is_empty());
        assert_eq!((counts.ranges(false), counts.ranges(true)), (vec![], vec![(0, 8)]));
    }

    /// One range for many messages that are gone, and none over one that somebody still needs.
    #[test]
    fn rows_of_messages_that_all_have_are_deleted_together() {
        let live = BTreeMap::from([(10, 1), (20, 2)]);
        let mut counts = Counts::new(live, vec![25, 3, 4, 11, 19, 30]);
        assert_eq!(counts.ranges(true), [(0, 10), (11, 20), (21, 31)]);
        let mut counts = Counts::new(BTreeMap::new(), (0..GONE_MAX as u64).collect());
        assert_eq!(counts.ranges(false), [(0, GONE_MAX as u64)]);
        counts.forget_gone();
        assert!(counts.ranges(true).is_empty());
    }

    /// What a plan says of messages that are not written is forgotten.
    #[test]
    fn a_message_that_is_refused_is_not_waited_for() {
        let (id, done) = (key(7), done_key(7, 1));
        let (mut plan, mut counts) = (Plan::default(), Counts::default());
        plan.add(row(Family::Message, Kind::Message(3), &id, b"m"), &mut counts);
        counts.drop_message(&id);
        plan.add(row(Family::Message, Kind::Done, &done, &[]), &mut counts);
        assert_eq!(left(&plan), [Write::Put(Family::Message, &id, b"m"), Write::Delete(Family::Message, &id)]);
        assert_eq!(counts.ranges(true), [(0, 8)]);
    }
}
