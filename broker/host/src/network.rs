//! What a plugin may reach over the network: HTTP servers and addresses that the operator lists.
//!
//! A name is resolved here and the address that is connected to is the one that was looked at, so that a name server
//! cannot lead a plugin to an address that is refused. With TLS the name is checked once more by the certificate.

use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use http::Uri;
use http::uri::{Authority, Scheme};
use http_body_util::BodyExt;
use wasmtime_wasi::WasiCtxBuilder;
use wasmtime_wasi::sockets::SocketAddrUse;
use wasmtime_wasi_http::{Error, RequestOptions, WasiBody, WasiHttpHooks, default_send_request};

use crate::guest::Denials;
use crate::services::Services;

/// How long connecting, and waiting for an answer or more of it, may take at most.
const TIMEOUT: Duration = Duration::from_secs(30);

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
    fn covers(&self, is_tls: bool, host: &str, port: u16) -> bool {
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

/// Not of this machine, this network or nobody.
fn is_public(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(v4) => {
            let [a, b, ..] = v4.octets();
            let is_shared = a == 100 && (64..128).contains(&b);
            let is_here = v4.is_loopback() || v4.is_private() || v4.is_link_local() || is_shared;
            // This network, multicast, reserved.
            let is_nobody = a == 0 || a >= 224;
            !is_here && !is_nobody
        }
        IpAddr::V6(v6) => {
            let is_here = v6.is_loopback() || v6.is_unique_local() || v6.is_unicast_link_local();
            let is_nobody = v6.is_unspecified() || v6.is_multicast();
            !is_here && !is_nobody
        }
    }
}

/// Lets a guest connect to the granted addresses, and to no other.
pub(crate) fn allow_addresses(wasi: &mut WasiCtxBuilder, services: &Services, denials: &Denials) {
    let (grants, denials) = (services.grants.sockets.clone(), denials.clone());
    // What is not granted is asked for and refused below, where it is counted.
    wasi.allow_ip_name_lookup(!grants.is_empty()).allow_tcp(true).allow_udp(true);
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

/// HTTP as it was granted.
pub(crate) struct Http {
    pub(crate) grants: Arc<[HttpGrant]>,
    pub(crate) denials: Denials,
}

type Sent = Result<(http::Response<WasiBody>, Box<dyn Future<Output = Result<(), Error>> + Send>), Error>;

impl WasiHttpHooks for Http {
    fn send_request(
        &mut self,
        request: http::Request<WasiBody>,
        options: Option<RequestOptions>,
        _processed: Box<dyn Future<Output = Result<(), Error>> + Send>,
    ) -> Box<dyn Future<Output = Sent> + Send> {
        let (grants, denials) = (Arc::clone(&self.grants), self.denials.clone());
        Box::new(async move {
            let to = request.uri().authority().map(ToString::to_string).unwrap_or_default();
            let request = permitted(&grants, request).await.inspect_err(|error| match error {
                Error::HttpRequestDenied => denials.note(format_args!("HTTP to {to}; grants.http does not name it")),
                Error::DestinationIpProhibited => denials.note(format_args!(
                    "HTTP to {to}, a name for a private address; grants.http needs @private for it"
                )),
                _ => {}
            })?;
            let (response, io) = default_send_request(request, Some(bounded(options))).await?;
            Ok((response.map(BodyExt::boxed_unsync), Box::new(io) as Box<dyn Future<Output = _> + Send>))
        })
    }
}

fn bounded(options: Option<RequestOptions>) -> RequestOptions {
    let options = options.unwrap_or_default();
    let at_most = |time: Option<Duration>| Some(time.map_or(TIMEOUT, |time| time.min(TIMEOUT)));
    RequestOptions {
        connect_timeout: at_most(options.connect_timeout),
        first_byte_timeout: at_most(options.first_byte_timeout),
        between_bytes_timeout: at_most(options.between_bytes_timeout),
    }
}

/// The request, to the address that was looked at.
async fn permitted(
    grants: &[HttpGrant],
    mut request: http::Request<WasiBody>,
) -> Result<http::Request<WasiBody>, Error> {
    let uri = request.uri().clone();
    let authority = uri.authority().ok_or(Error::HttpRequestUriInvalid)?;
    let is_tls = uri.scheme() == Some(&Scheme::HTTPS);
    let port = authority.port_u16().unwrap_or(if is_tls { 443 } else { 80 });
    let host = authority.host();
    let grant = grants.iter().find(|grant| grant.covers(is_tls, host, port)).ok_or(Error::HttpRequestDenied)?;
    let bare = host.trim_matches(['[', ']']);
    let is_written_out = bare.parse::<IpAddr>().is_ok();
    let found = tokio::time::timeout(TIMEOUT, tokio::net::lookup_host((bare, port))).await;
    let found = found.map_err(|_| Error::DnsTimeout)?.map_err(|_| Error::DnsError { rcode: None, info_code: None })?;
    let allowed = |address: &SocketAddr| grant.private || is_written_out || is_public(address.ip());
    let address = found.into_iter().find(allowed).ok_or(Error::DestinationIpProhibited)?;
    if !is_tls {
        let mut parts = uri.into_parts();
        parts.authority = Some(address.to_string().parse().map_err(|_| Error::HttpRequestUriInvalid)?);
        *request.uri_mut() = Uri::from_parts(parts).map_err(|_| Error::HttpRequestUriInvalid)?;
    }
    Ok(request)
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
        ] {
            assert!(!is_public(address.parse().expect("an address")), "{address}");
        }
        for address in ["1.1.1.1", "2606:4700::1111"] {
            assert!(is_public(address.parse().expect("an address")), "{address}");
        }
    }

    /// A name that leads to an address of this machine is refused, whatever the name server says.
    #[tokio::test]
    async fn a_name_cannot_lead_to_this_machine() {
        let ask = async |grant: &str, uri: &str| {
            let body =
                http_body_util::Empty::new().map_err(|never: std::convert::Infallible| match never {}).boxed_unsync();
            let request = http::Request::builder().uri(uri).body(body).expect("a request");
            permitted(&[grant.parse().expect("is right")], request).await.map(|request| request.uri().to_string())
        };
        let refused = ask("http://localhost:9", "http://localhost:9/x").await;
        assert!(matches!(refused, Err(Error::DestinationIpProhibited)), "{refused:?}");
        let granted = ask("http://localhost:9@private", "http://localhost:9/x").await.expect("is granted");
        assert!(granted == "http://127.0.0.1:9/x" || granted == "http://[::1]:9/x", "{granted}");
        assert_eq!(
            ask("http://127.0.0.1:9", "http://127.0.0.1:9/x").await.expect("is granted"),
            "http://127.0.0.1:9/x"
        );
        let other = ask("http://127.0.0.1:9", "http://127.0.0.1:8/x").await;
        assert!(matches!(other, Err(Error::HttpRequestDenied)), "{other:?}");
    }
}
