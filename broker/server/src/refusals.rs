//! Which refused logins become a line of the log. Tools such as fail2ban count these lines by address, so every address
//! gets some; nobody fills the log with them.

use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Mutex, PoisonError};

use hashbrown::HashMap;

/// Lines that an address may cause at once.
const LINES_MAX: u64 = 10;
/// Milliseconds after which it may cause one more.
const REFILL_MS: u64 = 10_000;
/// Addresses that are remembered; the others share one place.
const ADDRESSES_MAX: usize = 4_096;
/// Milliseconds between two searches of a full table for addresses that have been quiet.
const SWEEP_MS: u64 = 1_000;

/// A refused login and its address, for all shards: refusals are rare, and a lock is taken for each.
#[derive(Debug, Default)]
pub(crate) struct Refusals(Mutex<Table>);

#[derive(Debug, Default)]
struct Table {
    /// By address; `None` is for Unix sockets.
    addresses: HashMap<Option<IpAddr>, Seen, foldhash::fast::RandomState>,
    others: Seen,
    swept_ms: u64,
}

#[derive(Debug, Default)]
struct Seen {
    /// Lines it caused, less what has been forgiven since.
    lines: u64,
    forgiven_ms: u64,
    left_out: u64,
}

impl Seen {
    fn forgive(&mut self, now_ms: u64) {
        let steps = now_ms.saturating_sub(self.forgiven_ms) / REFILL_MS;
        self.lines = self.lines.saturating_sub(steps);
        self.forgiven_ms = if self.lines == 0 { now_ms } else { self.forgiven_ms + steps * REFILL_MS };
    }

    fn count(&mut self, now_ms: u64) -> Option<u64> {
        self.forgive(now_ms);
        if self.lines >= LINES_MAX {
            self.left_out += 1;
            return None;
        }
        self.lines += 1;
        Some(std::mem::take(&mut self.left_out))
    }
}

impl Refusals {
    /// `Some` if this refusal is to be logged, with the number of those from the same address that were not.
    pub(crate) fn count(&self, address: Option<IpAddr>, now_ms: u64) -> Option<u64> {
        let address = address.map(owner);
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(seen) = table.addresses.get_mut(&address) {
            return seen.count(now_ms);
        }
        if table.addresses.len() >= ADDRESSES_MAX && now_ms.saturating_sub(table.swept_ms) >= SWEEP_MS {
            table.swept_ms = now_ms;
            table.addresses.retain(|_, seen| {
                seen.forgive(now_ms);
                seen.lines > 0
            });
        }
        if table.addresses.len() >= ADDRESSES_MAX {
            return table.others.count(now_ms);
        }
        let seen = Seen { forgiven_ms: now_ms, ..Seen::default() };
        table.addresses.entry(address).or_insert(seen).count(now_ms)
    }
}

/// One host has 2^64 IPv6 addresses to choose from.
fn owner(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => address,
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v4(number: u32) -> IpAddr {
        std::net::Ipv4Addr::from_bits(number).into()
    }

    #[test]
    fn an_address_gets_ten_lines_and_then_one_each_ten_seconds() {
        let refusals = Refusals::default();
        for _ in 0..LINES_MAX {
            assert_eq!(refusals.count(Some(v4(1)), 1_000_000), Some(0));
        }
        assert_eq!(refusals.count(Some(v4(1)), 1_000_000), None);
        assert_eq!(refusals.count(Some(v4(1)), 1_009_999), None);
        assert_eq!(refusals.count(Some(v4(1)), 1_010_000), Some(2), "says how many were left out");
        assert_eq!(refusals.count(Some(v4(1)), 1_010_001), None);
        assert_eq!(refusals.count(Some(v4(2)), 1_010_001), Some(0), "others have their own");
        assert_eq!(refusals.count(None, 1_010_001), Some(0));
    }

    #[test]
    fn an_attack_from_everywhere_is_bounded_in_lines_and_memory() {
        let refusals = Refusals::default();
        let logged = (0..100_000).filter(|number| refusals.count(Some(v4(*number)), 1_000).is_some()).count();
        assert_eq!(logged, ADDRESSES_MAX + LINES_MAX as usize);
        assert_eq!(refusals.0.lock().expect("table").addresses.len(), ADDRESSES_MAX);
        // Once those have been quiet, there is room again.
        assert_eq!(refusals.count(Some(v4(200_000)), 1_000 + REFILL_MS), Some(0));
        assert!(refusals.0.lock().expect("table").addresses.len() < ADDRESSES_MAX);
    }

    #[test]
    fn addresses_of_one_ipv6_network_are_one() {
        let refusals = Refusals::default();
        let address = |last: u16| Some(IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 1, 2, 3, 4, 5, last)));
        let logged = (0..50).filter(|last| refusals.count(address(*last), 0).is_some()).count();
        assert_eq!(logged, LINES_MAX as usize);
    }
}
