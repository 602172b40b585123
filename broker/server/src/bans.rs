//! Who is kept out.

use std::net::IpAddr;
use std::sync::Arc;

use hashbrown::HashMap;
use wasmqtt_protocol::ports::BanPattern;

/// Bans the broker keeps; a plugin that asks for more is refused.
const BANS_MAX: usize = 100_000;

#[derive(Debug)]
struct Ban {
    until_ms: u64,
    note: Box<str>,
}

/// All bans, each until it ends.
#[derive(Debug, Default)]
pub(crate) struct Bans {
    bans: HashMap<BanPattern, Ban, foldhash::fast::RandomState>,
    /// Prefix lengths that are in use, so that an address needs few look-ups.
    prefixes: Vec<u8>,
}

impl Bans {
    /// `false`: there are too many. A ban that ends in the past is lifted.
    pub(crate) fn set(&mut self, now_ms: u64, pattern: BanPattern, until_ms: u64, note: &str) -> bool {
        if until_ms <= now_ms {
            self.bans.remove(&pattern);
            return true;
        }
        if self.bans.len() >= BANS_MAX {
            self.bans.retain(|_, ban| ban.until_ms > now_ms);
        }
        if self.bans.len() >= BANS_MAX && !self.bans.contains_key(&pattern) {
            return false;
        }
        let pattern = match pattern {
            BanPattern::Address { network, prefix } => {
                if !self.prefixes.contains(&prefix) {
                    self.prefixes.push(prefix);
                }
                BanPattern::Address { network: masked(network, prefix), prefix }
            }
            other => other,
        };
        self.bans.insert(pattern, Ban { until_ms, note: note.into() });
        true
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.bans.is_empty()
    }

    /// Why this client is kept out, if it is.
    pub(crate) fn find(
        &self,
        now_ms: u64,
        client_id: &Arc<str>,
        username: Option<&Arc<str>>,
        address: Option<IpAddr>,
    ) -> Option<&str> {
        let name = username.map(|username| BanPattern::Username(Arc::clone(username)));
        let networks = address.into_iter().flat_map(|address| {
            let address = address.to_canonical();
            self.prefixes
                .iter()
                .map(move |prefix| BanPattern::Address { network: masked(address, *prefix), prefix: *prefix })
        });
        std::iter::once(BanPattern::ClientId(Arc::clone(client_id)))
            .chain(name)
            .chain(networks)
            .find_map(|pattern| self.bans.get(&pattern).filter(|ban| ban.until_ms > now_ms))
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
        BanPattern::Address { network: text.parse().unwrap(), prefix }
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
    }
}
