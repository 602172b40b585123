//! What a plugin may reach over the network: HTTP servers and addresses that the operator lists.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use http::uri::Authority;
use wasmtime_wasi::WasiCtxBuilder;
use wasmtime_wasi::sockets::SocketAddrUse;

use crate::guest::Denials;
use crate::services::Services;

/// HTTP servers: `https://host`, `http://host:port`, `https://*.host`. A name must not lead to an address of this machine
/// or of a private network, unless `@private` follows; an address that is written out may be any.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpGrant {
    is_tls: bool,
    host: String,
    /// `host` is what comes behind the first label.
    any_label: bool,
    port: u16,
    private: bool,
}

impl FromStr for HttpGrant {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong =
            || "must be like \"https://idp.example:8443\", \"https://*.example\" or \"http://idp@private\"".to_owned();
        let (text, private) = text.strip_suffix("@private").map_or((text, false), |text| (text, true));
        let (scheme, rest) = text.split_once("://").ok_or_else(wrong)?;
        let is_tls = match scheme {
            "https" => true,
            "http" => false,
            _ => return Err(wrong()),
        };
        let (any_label, rest) = rest.strip_prefix("*.").map_or((false, rest), |rest| (true, rest));
        let authority: Authority = rest.trim_end_matches('/').parse().map_err(|_| wrong())?;
        let port = match authority.as_str().strip_prefix(authority.host()) {
            Some("") => Some(if is_tls { 443 } else { 80 }),
            Some(port) => port.strip_prefix(':').and_then(|port| port.parse().ok()),
            // There is a user name.
            None => None,
        };
        let port = port.filter(|_| !authority.host().is_empty()).ok_or_else(wrong)?;
        Ok(Self { is_tls, host: authority.host().to_ascii_lowercase(), any_label, port, private })
    }
}

impl std::fmt::Display for HttpGrant {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let scheme = if self.is_tls { "https" } else { "http" };
        let (label, private) = (if self.any_label { "*." } else { "" }, if self.private { "@private" } else { "" });
        write!(f, "{scheme}://{label}{}:{}{private}", self.host, self.port)
    }
}

impl HttpGrant {
    /// Names may lead to private addresses.
    pub(crate) fn is_private(&self) -> bool {
        self.private
    }

    pub(crate) fn covers(&self, is_tls: bool, host: &str, port: u16) -> bool {
        let host = host.to_ascii_lowercase();
        let is_host = if self.any_label {
            host.strip_suffix(&self.host).is_some_and(|label| label.len() > 1 && label.ends_with('.'))
        } else {
            host == self.host
        };
        self.is_tls == is_tls && self.port == port && is_host
    }
}

/// Addresses a plugin may connect to: `10.0.0.0/8:5432`, `[::1]:*`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SocketGrant {
    network: IpAddr,
    prefix: u8,
    /// `None`: any.
    port: Option<u16>,
}

impl FromStr for SocketGrant {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || "must be like \"10.0.0.0/8:5432\", \"127.0.0.1:*\" or \"[::1]/128:80\"".to_owned();
        let (address, port) = text.rsplit_once(':').ok_or_else(wrong)?;
        let port = if port == "*" { None } else { Some(port.parse().map_err(|_| wrong())?) };
        let (address, prefix) =
            address.split_once('/').map_or((address, None), |(address, bits)| (address, Some(bits)));
        let network: IpAddr = address.trim_matches(['[', ']']).parse().map_err(|_| wrong())?;
        let bits_max = if network.is_ipv4() { 32 } else { 128 };
        let prefix = prefix.map_or(Ok(bits_max), |bits| bits.parse().map_err(|_| wrong()))?;
        if prefix > bits_max {
            return Err(wrong());
        }
        Ok(Self { network, prefix, port })
    }
}

impl std::fmt::Display for SocketGrant {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let port = self.port.map_or("*".to_owned(), |port| port.to_string());
        match self.network {
            IpAddr::V4(address) => write!(f, "{address}/{}:{port}", self.prefix),
            IpAddr::V6(address) => write!(f, "[{address}]/{}:{port}", self.prefix),
        }
    }
}

impl SocketGrant {
    pub(crate) fn covers(&self, address: SocketAddr) -> bool {
        let bits = |address: IpAddr| match address {
            IpAddr::V4(address) => u128::from(address.to_bits()) << 96,
            IpAddr::V6(address) => address.to_bits(),
        };
        let ip = address.ip().to_canonical();
        let mask = u128::MAX.checked_shl(128 - u32::from(self.prefix)).unwrap_or(0);
        ip.is_ipv4() == self.network.is_ipv4()
            && bits(ip) & mask == bits(self.network) & mask
            && self.port.is_none_or(|port| port == address.port())
    }
}

/// Not of this machine, this network or nobody. An IPv6 address that carries an IPv4 address, for a translator or a
/// tunnel, is no more public than that one.
pub(crate) fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => is_public_v4(v4),
        IpAddr::V6(v6) => is_public_v6(v6) && carried(v6).is_none_or(is_public_v4),
    }
}

fn is_public_v4(v4: Ipv4Addr) -> bool {
    let [a, b, c, _] = v4.octets();
    let is_shared = a == 100 && (64..128).contains(&b);
    let is_here = v4.is_loopback() || v4.is_private() || v4.is_link_local() || is_shared;
    // This network, multicast, reserved; protocol assignments, documentation, relays of 6to4, benchmarks.
    let is_nobody = a == 0 || a >= 224;
    let is_special =
        matches!((a, b, c), (192, 0, 0 | 2) | (192, 88, 99) | (198, 18..=19, _) | (198, 51, 100) | (203, 0, 113));
    !is_here && !is_nobody && !is_special
}

fn is_public_v6(v6: Ipv6Addr) -> bool {
    let segments = v6.segments();
    let is_here = v6.is_loopback() || v6.is_unique_local() || v6.is_unicast_link_local();
    // Site-local addresses were given up, and some networks have them.
    let is_site_local = segments[0] & 0xffc0 == 0xfec0;
    // A translator inside this network (64:ff9b:1::/48) may embed an address at any of several places.
    let is_local_translator = segments[..3] == [0x64, 0xff9b, 1];
    let is_documentation = segments[..2] == [0x2001, 0xdb8] || segments[0] == 0x3fff && segments[1] < 0x1000;
    let is_discarded = segments[..4] == [0x100, 0, 0, 0];
    let is_nobody = v6.is_unspecified() || v6.is_multicast() || is_documentation || is_discarded;
    !is_here && !is_site_local && !is_local_translator && !is_nobody
}

/// The IPv4 address that an IPv6 address stands for.
fn carried(v6: Ipv6Addr) -> Option<Ipv4Addr> {
    let segments = v6.segments();
    let v4 = |high: u16, low: u16| Ipv4Addr::from_bits(u32::from(high) << 16 | u32::from(low));
    match segments {
        // IPv4-mapped, as SIIT translates it, NAT64, 6to4, and ISATAP.
        [0, 0, 0, 0, 0, 0xffff, high, low]
        | [0, 0, 0, 0, 0xffff, 0, high, low]
        | [0x64, 0xff9b, 0, 0, 0, 0, high, low]
        | [0x2002, high, low, ..]
        | [.., 0 | 0x200, 0x5efe, high, low] => Some(v4(high, low)),
        // Compatible; `::` and `::1` are no IPv4 addresses.
        [0, 0, 0, 0, 0, 0, high, low] if high != 0 => Some(v4(high, low)),
        // Teredo: the client's address, inverted.
        [0x2001, 0, .., high, low] => Some(v4(!high, !low)),
        _ => None,
    }
}

/// Lets a guest connect to the granted addresses, and to no other.
pub(crate) fn allow_addresses(wasi: &mut WasiCtxBuilder, services: &Services, denials: &Denials) {
    let (grants, denials) = (services.grants.sockets.clone(), denials.clone());
    // What is not granted is asked for and refused below, where it is counted.
    // Without any no socket is made, see [`crate::sockets`].
    wasi.allow_tcp(true).allow_udp(true);
    wasi.socket_addr_check(move |address, to| {
        let is_granted = match to {
            // As any client is bound, before it connects.
            SocketAddrUse::TcpBind | SocketAddrUse::UdpBind => address.ip().is_unspecified() && address.port() == 0,
            SocketAddrUse::TcpListen | SocketAddrUse::TcpAccept => false,
            _ => grants.iter().any(|grant| grant.covers(address)),
        };
        if !is_granted {
            denials.note(format_args!("the address {address}; grants.sockets does not name it"));
        }
        Box::pin(std::future::ready(is_granted))
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_are_granted_by_scheme_name_and_port() {
        let grant = |text: &str| text.parse::<HttpGrant>().expect("is right");
        assert!(grant("https://idp.example").covers(true, "IDP.example", 443));
        assert!(!grant("https://idp.example").covers(false, "idp.example", 443));
        assert!(!grant("https://idp.example").covers(true, "idp.example", 8443));
        assert!(!grant("https://idp.example").covers(true, "idp.example.evil", 443));
        assert!(grant("https://*.example:8443").covers(true, "a.example", 8443));
        assert!(!grant("https://*.example").covers(true, "example", 443));
        assert!(!grant("https://*.example").covers(true, "evilexample", 443));
        for wrong in ["idp", "ftp://a", "http://", "http://a@b", "http://a:x"] {
            assert!(wrong.parse::<HttpGrant>().is_err(), "{wrong}");
        }
        assert_eq!(grant("http://a@private").to_string(), "http://a:80@private");
    }

    #[test]
    fn addresses_are_granted_by_network_and_port() {
        let covers = |grant: &str, address: &str| {
            grant.parse::<SocketGrant>().expect("is right").covers(address.parse().expect("an address"))
        };
        assert!(covers("10.0.0.0/8:5432", "10.1.2.3:5432") && !covers("10.0.0.0/8:5432", "11.1.2.3:5432"));
        assert!(!covers("10.0.0.0/8:5432", "10.1.2.3:80") && covers("127.0.0.1:*", "127.0.0.1:9"));
        assert!(covers("10.0.0.0/8:*", "[::ffff:10.0.0.1]:1") && covers("[::1]:80", "[::1]:80"));
        for wrong in ["10.0.0.0/33:1", "a:1", "10.0.0.1", "10.0.0.1:x"] {
            assert!(wrong.parse::<SocketGrant>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn addresses_of_this_machine_and_network_are_not_public() {
        for address in [
            "127.0.0.1",
            "10.0.0.1",
            "169.254.169.254",
            "192.168.1.1",
            "::1",
            "fd00::1",
            "fe80::1",
            "0.0.0.0",
            "100.64.0.1",
            "::ffff:127.0.0.1",
            // The same, carried by IPv6 addresses.
            "::127.0.0.1",
            "::ffff:0:10.0.0.1",
            "64:ff9b::10.0.0.1",
            "64:ff9b::127.0.0.1",
            "64:ff9b:1::1.1.1.1",
            "64:ff9b:1:a00:1::",
            "2002:7f00:1::1",
            "2002:a00:1::1",
            // Teredo carries the inverse of 192.168.1.1.
            "2001:0:1:2:3:4:3f57:fefe",
            "2001:db8::1",
            "fec0::1",
            "100::1",
            "2a00::5efe:10.0.0.1",
            // ISATAP of this network, though what it carries is public.
            "fd00::5efe:1.1.1.1",
            "fe80::5efe:1.1.1.1",
            "fe80::200:5efe:1.1.1.1",
            "192.0.2.1",
            "198.18.0.1",
            "240.0.0.1",
            "255.255.255.255",
        ] {
            assert!(!is_public(address.parse().expect("an address")), "{address}");
        }
        for address in [
            "1.1.1.1",
            "2606:4700::1111",
            "64:ff9b::1.1.1.1",
            "2002:101:101::1",
            "::ffff:1.1.1.1",
            "2001:0:1:2:3:4:fefe:fefe",
        ] {
            assert!(is_public(address.parse().expect("an address")), "{address}");
        }
    }
}
