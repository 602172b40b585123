//! Who is kept out.
//!
//! Looking costs one look-up for each name and for each prefix length in use, however many bans there are. Rows of the
//! store follow: [`Bans::take_changed`] gives what one shard has to write, however often it changed meanwhile.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use hashbrown::{HashMap, HashSet};
use wasmqtt_protocol::ports::BanPattern;

/// Bans the broker keeps; a plugin that asks for more is refused.
const BANS_MAX: usize = 100_000;
/// Bytes of their names and notes; beyond that a plugin is refused.
const BANS_BYTES_MAX: usize = 32 << 20;
/// Bytes of one note that are kept.
const NOTE_BYTES_MAX: usize = 1024;

#[derive(Debug)]
struct Ban {
    until_ms: u64,
    note: Box<str>,
}

/// Until when, and the note.
type BanRow = (u64, Box<str>);
type Hasher = foldhash::fast::RandomState;

/// All bans, each until it ends.
#[derive(Debug, Default)]
pub(crate) struct Bans {
    found: HashMap<BanPattern, Ban, Hasher>,
    /// The same, those that end first in front.
    ends: BTreeSet<(u64, BanPattern)>,
    /// Prefix lengths that are in use, of IPv6 (`true`) and IPv4, and by how many bans.
    prefixes: BTreeMap<(bool, u8), usize>,
    bytes: usize,
    /// Whose rows in the store are not as they should be.
    changed: HashSet<BanPattern, Hasher>,
    /// How many of them are no bans any more, and the bytes of their names: as many as there may be bans.
    ended: (usize, usize),
}

/// The one spelling of a pattern: an address is the first of its network, and IPv4 inside IPv6 is IPv4.
pub(crate) fn canonical(pattern: BanPattern) -> BanPattern {
    let BanPattern::Address { network, prefix } = pattern else { return pattern };
    let (network, prefix) = match network {
        IpAddr::V6(address) if prefix >= 96 && address.to_ipv4_mapped().is_some() => {
            (IpAddr::V6(address).to_canonical(), prefix - 96)
        }
        other => (other, prefix),
    };
    BanPattern::Address { network: masked(network, prefix), prefix }
}

fn name_bytes(pattern: &BanPattern) -> usize {
    match pattern {
        BanPattern::ClientId(name) | BanPattern::Username(name) => name.len(),
        BanPattern::Address { .. } => size_of::<Ipv6Addr>(),
    }
}

impl Bans {
    /// Bans until then, or (a time in the past) lifts the ban; `false`: there are too many, or too many have ended whose
    /// rows are still there. `pattern` is canonical.
    pub(crate) fn set(&mut self, now_ms: u64, pattern: BanPattern, until_ms: u64, note: &str) -> bool {
        let note = &note[..note.floor_char_boundary(NOTE_BYTES_MAX)];
        let before = self.remove(&pattern);
        if until_ms <= now_ms {
            if before.is_some() {
                self.row_goes(pattern);
            }
            return true;
        }
        if self.found.len() >= BANS_MAX {
            self.end(now_ms, usize::MAX);
        }
        let has_room = self.found.len() < BANS_MAX
            && self.bytes + name_bytes(&pattern) + note.len() <= BANS_BYTES_MAX
            && self.ended.0 < BANS_MAX
            && self.ended.1 < BANS_BYTES_MAX;
        if !has_room {
            if let Some(ban) = before {
                self.insert(pattern, ban.until_ms, &ban.note);
            }
            return false;
        }
        if before.is_none() && self.changed.contains(&pattern) {
            self.ended = (self.ended.0 - 1, self.ended.1 - name_bytes(&pattern));
        }
        self.insert(pattern.clone(), until_ms, note);
        self.changed.insert(pattern);
        true
    }

    /// It is no ban any more.
    fn row_goes(&mut self, pattern: BanPattern) {
        self.ended = (self.ended.0 + 1, self.ended.1 + name_bytes(&pattern));
        self.changed.insert(pattern);
    }

    /// Those that still end then end earlier. The store knows that of its rows.
    pub(crate) fn age(&mut self, bans: &[(BanPattern, u64)], by_ms: u64) {
        for (pattern, until_ms) in bans {
            let known = canonical(pattern.clone());
            if self.found.get(&known).is_some_and(|ban| ban.until_ms == *until_ms)
                && let Some(ban) = self.remove(&known)
            {
                self.insert(known, until_ms.saturating_sub(by_ms), &ban.note);
            }
        }
    }

    /// As the store has it, perhaps in another spelling, and perhaps ended meanwhile.
    pub(crate) fn restore(&mut self, pattern: BanPattern, until_ms: u64, note: &str) {
        let known = canonical(pattern.clone());
        if known != pattern {
            self.row_goes(pattern);
            self.changed.insert(known.clone());
        }
        if self.found.get(&known).is_none_or(|ban| ban.until_ms < until_ms) {
            self.remove(&known);
            self.insert(known, until_ms, note);
        }
    }

    fn insert(&mut self, pattern: BanPattern, until_ms: u64, note: &str) {
        if let BanPattern::Address { network, prefix } = &pattern {
            *self.prefixes.entry((network.is_ipv6(), *prefix)).or_default() += 1;
        }
        self.bytes += name_bytes(&pattern) + note.len();
        self.ends.insert((until_ms, pattern.clone()));
        self.found.insert(pattern, Ban { until_ms, note: note.into() });
    }

    fn remove(&mut self, pattern: &BanPattern) -> Option<Ban> {
        let (pattern, ban) = self.found.remove_entry(pattern)?;
        self.bytes -= name_bytes(&pattern) + ban.note.len();
        if let BanPattern::Address { network, prefix } = &pattern
            && let Some(count) = self.prefixes.get_mut(&(network.is_ipv6(), *prefix))
        {
            *count -= 1;
            if *count == 0 {
                self.prefixes.remove(&(network.is_ipv6(), *prefix));
            }
        }
        self.ends.remove(&(ban.until_ms, pattern));
        Some(ban)
    }

    /// Forgets those that have ended, at most so many.
    pub(crate) fn end(&mut self, now_ms: u64, most: usize) {
        for _ in 0..most {
            let Some((_, pattern)) = self.ends.first().filter(|(until_ms, _)| *until_ms <= now_ms).cloned() else {
                return;
            };
            self.remove(&pattern);
            self.row_goes(pattern);
        }
    }

    /// Rows to write since the last time: until when, and the note; `None`: the row goes.
    pub(crate) fn take_changed(&mut self) -> Vec<(BanPattern, Option<BanRow>)> {
        let changed = std::mem::take(&mut self.changed);
        self.ended = (0, 0);
        let row = |pattern: BanPattern| {
            let ban = self.found.get(&pattern).map(|ban| (ban.until_ms, ban.note.clone()));
            (pattern, ban)
        };
        changed.into_iter().map(row).collect()
    }

    pub(crate) fn has_changed(&self) -> bool {
        !self.changed.is_empty()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.found.is_empty()
    }

    /// Why this client is kept out, if it is. `names`: the User Name, and what authentication made of it.
    pub(crate) fn find<'n>(
        &self,
        now_ms: u64,
        client_id: &Arc<str>,
        names: impl IntoIterator<Item = &'n Arc<str>>,
        address: Option<IpAddr>,
    ) -> Option<&str> {
        let names = names.into_iter().map(|name| BanPattern::Username(Arc::clone(name)));
        let networks = address.into_iter().flat_map(|address| {
            let address = address.to_canonical();
            self.prefixes
                .keys()
                .filter(move |(is_v6, _)| *is_v6 == address.is_ipv6())
                .map(move |(_, prefix)| BanPattern::Address { network: masked(address, *prefix), prefix: *prefix })
        });
        std::iter::once(BanPattern::ClientId(Arc::clone(client_id)))
            .chain(names)
            .chain(networks)
            .find_map(|pattern| self.found.get(&pattern).filter(|ban| ban.until_ms > now_ms))
            .map(|ban| &*ban.note)
    }
}

/// The first address of the network with that prefix.
fn masked(address: IpAddr, prefix: u8) -> IpAddr {
    match address {
        IpAddr::V4(address) => {
            let mask = u32::MAX.checked_shl(32_u32.saturating_sub(prefix.into())).unwrap_or(0);
            IpAddr::V4((address.to_bits() & mask).into())
        }
        IpAddr::V6(address) => {
            let mask = u128::MAX.checked_shl(128_u32.saturating_sub(prefix.into())).unwrap_or(0);
            IpAddr::V6((address.to_bits() & mask).into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(text: &str, prefix: u8) -> BanPattern {
        canonical(BanPattern::Address { network: text.parse().unwrap(), prefix })
    }

    fn is_banned(bans: &Bans, now_ms: u64, id: &str, name: Option<&str>, address: &str) -> bool {
        let name = name.map(Arc::from);
        bans.find(now_ms, &id.into(), name.as_ref(), Some(address.parse().unwrap())).is_some()
    }

    #[test]
    fn bans_are_by_client_name_and_network_and_end() {
        let mut bans = Bans::default();
        assert!(bans.set(0, BanPattern::ClientId("c".into()), 10, ""));
        assert!(bans.set(0, BanPattern::Username("u".into()), 10, ""));
        assert!(bans.set(0, network("10.1.2.3", 8), 10, ""));
        assert!(bans.set(0, network("2001:db8::1", 32), 10, ""));
        assert!(is_banned(&bans, 9, "c", None, "1.1.1.1"));
        assert!(is_banned(&bans, 9, "x", Some("u"), "1.1.1.1"));
        assert!(is_banned(&bans, 9, "x", None, "10.200.0.1"));
        assert!(is_banned(&bans, 9, "x", None, "::ffff:10.200.0.1"));
        assert!(is_banned(&bans, 9, "x", None, "2001:db8:7::"));
        assert!(!is_banned(&bans, 9, "x", Some("c"), "11.0.0.1"));
        assert!(!is_banned(&bans, 10, "c", None, "1.1.1.1"), "has ended");
        assert!(bans.set(5, BanPattern::ClientId("c".into()), 5, ""));
        assert!(!is_banned(&bans, 6, "c", None, "1.1.1.1"), "was lifted");
    }

    #[test]
    fn whole_address_space_and_single_addresses() {
        let mut bans = Bans::default();
        bans.set(0, network("1.2.3.4", 32), 10, "");
        assert!(is_banned(&bans, 1, "x", None, "1.2.3.4"));
        assert!(!is_banned(&bans, 1, "x", None, "1.2.3.5"));
        bans.set(0, network("0.0.0.0", 0), 10, "");
        assert!(is_banned(&bans, 1, "x", None, "9.9.9.9"));
    }

    #[test]
    fn bans_are_bounded() {
        let mut bans = Bans::default();
        for n in 0..BANS_MAX {
            assert!(bans.set(0, BanPattern::ClientId(n.to_string().into()), 10, ""));
        }
        assert!(!bans.set(0, BanPattern::ClientId("more".into()), 10, ""));
        assert!(bans.set(0, BanPattern::ClientId("0".into()), 20, ""), "a ban that exists can be changed");
        assert!(bans.set(10, BanPattern::ClientId("more".into()), 20, ""), "those that ended make room");
        assert_eq!(bans.found.len(), 2);
    }

    /// A ban of a network is lifted by the words it was made with, or any others that mean the same.
    #[test]
    fn a_network_is_lifted_however_it_is_written() {
        for (made, lifted) in [(("10.1.2.3", 8), ("10.9.9.9", 8)), (("::ffff:10.1.2.3", 104), ("10.0.0.0", 8))] {
            let mut bans = Bans::default();
            assert!(bans.set(0, network(made.0, made.1), 10, ""));
            assert!(is_banned(&bans, 1, "x", None, "10.200.0.1"));
            assert!(bans.set(1, network(lifted.0, lifted.1), 0, ""));
            assert!(!is_banned(&bans, 1, "x", None, "10.200.0.1"));
            assert_eq!(bans.take_changed(), [(network("10.0.0.0", 8), None)], "its row goes");
            assert!(bans.prefixes.is_empty() && bans.ends.is_empty() && bans.bytes == 0);
        }
    }

    /// What has ended leaves memory and store, also what ended while the broker did not run or was written otherwise.
    #[test]
    fn rows_of_bans_go_when_they_end() {
        let mut bans = Bans::default();
        bans.restore(BanPattern::ClientId("old".into()), 5, "");
        let unmasked = BanPattern::Address { network: "10.1.2.3".parse().unwrap(), prefix: 8 };
        bans.restore(unmasked.clone(), 20, "note");
        bans.end(10, 100);
        let mut rows = bans.take_changed();
        rows.sort();
        let row = Some((20, "note".into()));
        assert_eq!(rows, [(BanPattern::ClientId("old".into()), None), (network("10.0.0.0", 8), row), (unmasked, None)]);
        bans.end(20, 100);
        assert_eq!(bans.take_changed(), [(network("10.0.0.0", 8), None)]);
        assert!(bans.is_empty() && bans.bytes == 0);
    }

    /// However often a ban changes, the store writes it once.
    #[test]
    fn changes_of_a_ban_are_one_row() {
        let mut bans = Bans::default();
        for n in 1..1000 {
            assert!(bans.set(0, BanPattern::Username("u".into()), n, "again"));
        }
        assert_eq!(bans.take_changed().len(), 1);
        assert!(!bans.has_changed());
    }

    #[test]
    fn bans_are_bounded_in_bytes() {
        let mut bans = Bans::default();
        let long = |n: usize| BanPattern::ClientId(format!("{n:060000}").into());
        let fits = BANS_BYTES_MAX / (60_000 + NOTE_BYTES_MAX);
        for n in 0..fits {
            assert!(bans.set(0, long(n), 10, &"é".repeat(4000)));
        }
        assert!(!bans.set(0, long(fits), 10, &"é".repeat(4000)));
        assert!(bans.bytes <= BANS_BYTES_MAX);
        assert!(bans.set(0, long(0), 20, ""), "one that exists can be changed");
        assert!(bans.set(0, long(0), 0, ""), "and lifted");
    }

    /// A plugin that bans and lifts without end does not fill the memory while the store waits for its turn.
    #[test]
    fn bans_that_were_lifted_count_until_the_store_knows() {
        let long = |n: usize| BanPattern::ClientId(format!("{n:060000}").into());
        let mut bans = Bans::default();
        let made = (0..10_000).take_while(|n| bans.set(0, long(*n), 10, "") && bans.set(0, long(*n), 0, "")).count();
        assert_eq!(made, BANS_BYTES_MAX.div_ceil(60_000));
        assert!(bans.set(0, long(0), 0, "") && bans.set(0, long(20_000), 0, ""), "there is nothing to lift");
        assert_eq!((bans.changed.len(), bans.ended), (made, (made, made * 60_000)));
        assert_eq!(bans.take_changed().len(), made);
        assert!(bans.set(0, long(0), 10, "") && bans.set(0, long(0), 0, "") && bans.set(0, long(0), 20, ""));
        assert_eq!((bans.changed.len(), bans.ended), (1, (0, 0)), "it is a ban again");
        let mut bans = Bans::default();
        let short = |n: usize| BanPattern::Username(n.to_string().into());
        assert!((0..BANS_MAX).all(|n| bans.set(0, short(n), 10, "") && bans.set(0, short(n), 0, "")));
        assert!(!bans.set(0, short(BANS_MAX), 10, ""), "so many rows are to go");
    }

    /// Milliseconds for a hundred thousand looks among a hundred thousand bans; a walk would take minutes.
    #[test]
    fn looking_does_not_walk() {
        let mut bans = Bans::default();
        for n in 0..BANS_MAX as u32 {
            let address = IpAddr::from(n.to_be_bytes());
            assert!(bans.set(0, canonical(BanPattern::Address { network: address, prefix: 32 }), 10, ""));
        }
        let begun = std::time::Instant::now();
        let found = (0..100_000_u32).filter(|n| is_banned(&bans, 1, "x", Some("u"), &format!("9.0.{}.1", n % 200)));
        assert_eq!(found.count(), 0);
        assert!(begun.elapsed() < std::time::Duration::from_secs(20), "{:?}", begun.elapsed());
    }
}
