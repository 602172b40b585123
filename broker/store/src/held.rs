//! Changes that the disk refused: in memory until it takes them.

use hashbrown::HashMap;

use super::plan::Write;
use super::rows::Family;

/// What an entry costs beside key and value.
const ENTRY_BYTES: usize = 64;

type Key = (Family, Box<[u8]>);

/// What is known of a row that is not on the disk yet.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Row<'a> {
    /// Nothing: the disk has what counts.
    Unknown,
    /// It is to be deleted.
    Gone,
    /// It is to be this.
    Value(&'a [u8]),
}

/// One entry for each row, however often it changed meanwhile; so there are never more of them than rows in the store.
#[derive(Debug, Default)]
pub(super) struct Held {
    /// `None`: the row is to be deleted. Nothing is left out, even if it was put here: the disk may have taken a part of
    /// what it refused.
    rows: HashMap<Key, Option<Box<[u8]>>, foldhash::fast::RandomState>,
    bytes: usize,
}

impl Held {
    pub(super) fn len(&self) -> usize {
        self.rows.len()
    }

    /// Keys, values and what they cost here.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn add(&mut self, write: Write<'_>) {
        let (family, key, value) = match write {
            Write::Put(family, key, value) => (family, key, Some(value)),
            Write::Delete(family, key) => (family, key, None),
        };
        self.bytes += value.map_or(0, <[u8]>::len);
        match self.rows.insert((family, key.into()), value.map(Into::into)) {
            Some(old) => self.bytes -= old.map_or(0, |value| value.len()),
            None => self.bytes += key.len() + ENTRY_BYTES,
        }
    }

    pub(super) fn writes(&self) -> impl Iterator<Item = Write<'_>> + Clone {
        self.rows.iter().map(|((family, key), value)| match value {
            Some(value) => Write::Put(*family, key, value),
            None => Write::Delete(*family, key),
        })
    }

    pub(super) fn get(&self, family: Family, key: &[u8]) -> Row<'_> {
        // The key of the table owns its bytes; a look-up happens seldom, and only while the disk refuses.
        match self.rows.get(&(family, key.into())) {
            None => Row::Unknown,
            Some(None) => Row::Gone,
            Some(Some(value)) => Row::Value(value),
        }
    }

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_change_of_each_row_counts() {
        let mut held = Held::default();
        held.add(Write::Put(Family::Message, b"1", b"long payload"));
        held.add(Write::Put(Family::Session, b"1", b"a"));
        held.add(Write::Put(Family::Session, b"1", b"b"));
        let with_payload = held.bytes();
        held.add(Write::Delete(Family::Message, b"1"));
        assert_eq!(held.bytes(), with_payload - b"long payload".len());
        assert_eq!(held.get(Family::Message, b"1"), Row::Gone);
        assert_eq!(held.get(Family::Session, b"1"), Row::Value(b"b"));
        assert_eq!(held.get(Family::Session, b"2"), Row::Unknown);
        assert_eq!(held.len(), 2);
        held.clear();
        assert_eq!((held.len(), held.bytes()), (0, 0));
    }
}
