//! HTTP requests of plugins, to the servers that were granted.
//!
//! The addresses of a name are looked up once, each is checked against the grant, and those that are allowed are tried
//! in turn: the next one begins when the one before failed or is slow. With TLS, too, the connection goes to a checked
//! address; the certificate must be for the name.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::{Pin, pin};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::Uri;
use http::uri::{Authority, Scheme};
use http_body_util::BodyExt;
use hyper::body::{Body, Frame, Incoming};
use hyper::client::conn::http1;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::{Interval, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::{ClientConfig, RootCertStore, crypto, pki_types::ServerName};
use wasmtime::StoreContextMut;
use wasmtime::component::{Linker, Resource};
use wasmtime_wasi_http::io::TokioIo;
use wasmtime_wasi_http::p2::bindings::http::types::{HostOutgoingRequest as OutgoingRequest, Method};
use wasmtime_wasi_http::p2::types::HostOutgoingRequest;
use wasmtime_wasi_http::{Error, RequestOptions, WasiBody, WasiHttpHooks, WasiHttpView};

use crate::HostError;
use crate::guest::{Denials, Guest};
use crate::held::OpenRequest;
use crate::lookup::Lookups;
use crate::network::{HttpGrant, is_public};
use crate::plugin::Plugin;
use crate::services::Services;
use crate::shadow::linked_name;

/// How long connecting, and waiting for an answer or more of it, may take at most.
const TIMEOUT: Duration = Duration::from_secs(30);
/// How long one address is tried before the next one is tried beside it.
const NEXT_ADDRESS: Duration = Duration::from_millis(250);
/// Addresses of a name that are tried.
const ADDRESSES_MAX: usize = 8;
/// Requests of one instance at a time, and of all instances of a plugin, which have at least one each.
const REQUESTS_MAX: usize = 8;
pub(crate) const PLUGIN_REQUESTS_MAX: usize = 64;
/// Bytes of the head of a response, and header fields in it.
const HEAD_BYTES_MAX: usize = 64 * 1024;
const HEADERS_MAX: usize = 128;
/// Bytes of a request's header fields.
pub(crate) const FIELDS_BYTES_MAX: usize = 16 * 1024;
/// Bytes of a request's body that are taken at once; another piece of that size may wait behind it.
const BODY_BYTES_MAX: usize = 16 * 1024;
/// Bytes of a request's method, and of the name and port of its server. wasmtime bounds scheme and path.
const METHOD_BYTES_MAX: usize = 32;
const AUTHORITY_BYTES_MAX: usize = 512;

type Io = Box<dyn Future<Output = Result<(), Error>> + Send>;
type Sent = Result<(http::Response<WasiBody>, Io), Error>;

/// HTTP as it was granted.
pub(crate) struct Http {
    grants: Arc<[HttpGrant]>,
    denials: Denials,
    plugin: Arc<Plugin>,
    /// Requests of all instances.
    plugin_max: usize,
    /// As many as this instance may have.
    permits: Arc<Semaphore>,
}

impl Http {
    pub(crate) fn new(services: &Services, denials: &Denials) -> Self {
        Self {
            grants: Arc::clone(&services.http),
            denials: denials.clone(),
            plugin: Arc::clone(&services.plugin),
            plugin_max: services.http_requests_max,
            permits: Arc::new(Semaphore::new(REQUESTS_MAX)),
        }
    }

    /// `None`: there are as many already as the instance or the plugin may have.
    fn begin(&self) -> Option<(OwnedSemaphorePermit, OpenRequest)> {
        let permit = Arc::clone(&self.permits).try_acquire_owned().ok()?;
        Some((permit, OpenRequest::begin(&self.plugin, self.plugin_max)?))
    }
}

/// Takes the place of the functions that wasmtime links: a request that is never sent must not be large.
pub(crate) fn add_to_linker(linker: &mut Linker<Guest>) -> Result<(), HostError> {
    let name = linked_name(linker, "wasi:http/types", "[method]outgoing-request.set-method")?;
    linker.allow_shadowing(true);
    let added = shadow(linker, &name);
    linker.allow_shadowing(false);
    added.map_err(|error| HostError::new(format!("{error:#}")))
}

fn shadow(linker: &mut Linker<Guest>, name: &str) -> wasmtime::Result<()> {
    type Set<T> = (Resource<HostOutgoingRequest>, T);
    let mut types = linker.instance(name)?;
    types.func_wrap(
        "[method]outgoing-request.set-method",
        |mut store: StoreContextMut<'_, Guest>, (request, method): Set<Method>| {
            if matches!(&method, Method::Other(name) if name.len() > METHOD_BYTES_MAX) {
                return Ok((Err(()),));
            }
            Ok((OutgoingRequest::set_method(&mut store.data_mut().http(), request, method)?,))
        },
    )?;
    types.func_wrap(
        "[method]outgoing-request.set-authority",
        |mut store: StoreContextMut<'_, Guest>, (request, authority): Set<Option<String>>| {
            if authority.as_ref().is_some_and(|authority| authority.len() > AUTHORITY_BYTES_MAX) {
                return Ok((Err(()),));
            }
            Ok((OutgoingRequest::set_authority(&mut store.data_mut().http(), request, authority)?,))
        },
    )
}

impl WasiHttpHooks for Http {
    fn p2_outgoing_body_chunk_size(&mut self) -> usize {
        BODY_BYTES_MAX
    }

    fn send_request(
        &mut self,
        request: http::Request<WasiBody>,
        options: Option<RequestOptions>,
        _processed: Box<dyn Future<Output = Result<(), Error>> + Send>,
    ) -> Box<dyn Future<Output = Sent> + Send> {
        let (grants, denials) = (Arc::clone(&self.grants), self.denials.clone());
        let (plugin, under_way) = (Arc::clone(&self.plugin), self.begin());
        Box::new(async move {
            let under_way = under_way.ok_or(Error::ConnectionLimitReached)?;
            let to = request.uri().authority().map(ToString::to_string).unwrap_or_default();
            let server =
                permitted(&grants, &plugin.open.lookups, request.uri()).await.inspect_err(|error| match error {
                    Error::HttpRequestDenied => {
                        denials.note(format_args!("HTTP to {to}; grants.http does not name it"));
                    }
                    Error::DestinationIpProhibited => denials.note(format_args!(
                        "HTTP to {to}, a name for a private address; grants.http needs @private for it"
                    )),
                    _ => {}
                })?;
            let (response, io) = send(request, &server, bounded(options)).await?;
            let io: Io = Box::new(async move {
                let _under_way = under_way;
                io.await
            });
            Ok((response, io))
        })
    }
}

/// Times that a guest leaves open are as long as they may be.
struct Times {
    connect: Duration,
    first_byte: Duration,
    between_bytes: Duration,
}

fn bounded(options: Option<RequestOptions>) -> Times {
    let options = options.unwrap_or_default();
    let at_most = |time: Option<Duration>| time.map_or(TIMEOUT, |time| time.min(TIMEOUT));
    Times {
        connect: at_most(options.connect_timeout),
        first_byte: at_most(options.first_byte_timeout),
        // An interval of nothing would be none.
        between_bytes: at_most(options.between_bytes_timeout).max(Duration::from_nanos(1)),
    }
}

/// Where a request goes.
#[derive(Debug)]
struct Server {
    /// Name or address without brackets, for the certificate.
    host: String,
    is_tls: bool,
    addresses: Vec<SocketAddr>,
}

/// The addresses that were looked at and are allowed.
async fn permitted(grants: &[HttpGrant], lookups: &Lookups, uri: &Uri) -> Result<Server, Error> {
    let authority: &Authority = uri.authority().ok_or(Error::HttpRequestUriInvalid)?;
    let is_tls = uri.scheme() == Some(&Scheme::HTTPS);
    let port = authority.port_u16().unwrap_or(if is_tls { 443 } else { 80 });
    let host = authority.host();
    let grant = grants.iter().find(|grant| grant.covers(is_tls, host, port)).ok_or(Error::HttpRequestDenied)?;
    let bare = host.trim_matches(['[', ']']);
    let is_written_out = bare.parse::<IpAddr>().is_ok();
    let found = timeout(TIMEOUT, lookups.find(bare, port)).await;
    let found = found.map_err(|_| Error::DnsTimeout)?.map_err(|_| Error::DnsError { rcode: None, info_code: None })?;
    let is_allowed = |address: &SocketAddr| grant.is_private() || is_written_out || is_public(address.ip());
    let addresses: Vec<_> = found.into_iter().filter(is_allowed).take(ADDRESSES_MAX).collect();
    if addresses.is_empty() {
        return Err(Error::DestinationIpProhibited);
    }
    Ok(Server { host: bare.to_owned(), is_tls, addresses })
}

/// The first connection that comes about.
async fn connect(addresses: &[SocketAddr]) -> Result<TcpStream, Error> {
    let mut attempts = JoinSet::new();
    let mut rest = addresses.iter();
    let mut failed = None;
    loop {
        match rest.next() {
            Some(address) => drop(attempts.spawn(TcpStream::connect(*address))),
            None if attempts.is_empty() => break,
            None => {}
        }
        let ended = if rest.len() > 0 {
            timeout(NEXT_ADDRESS, attempts.join_next()).await.unwrap_or(None)
        } else {
            attempts.join_next().await
        };
        match ended {
            Some(Ok(Ok(stream))) => return Ok(stream),
            Some(Ok(Err(error))) => failed = Some(error),
            Some(Err(_)) | None => {}
        }
    }
    Err(failed.map_or(Error::DestinationUnavailable, Error::Connect))
}

/// A connection whose answer counts though the request was not written to its end: a service may have decided by the head
/// alone, answered and closed. What cannot be written any more counts as written; reading tells how it ended.
struct Heard(TcpStream);

impl Heard {
    fn is_closed(error: &io::Error) -> bool {
        matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
    }
}

impl AsyncRead for Heard {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, to: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(context, to)
    }
}

impl AsyncWrite for Heard {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, bytes).map(|written| match written {
            Err(error) if Self::is_closed(&error) => Ok(bytes.len()),
            written => written,
        })
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(context)
    }
}

fn tls() -> TlsConnector {
    static CONFIG: OnceLock<Arc<ClientConfig>> = OnceLock::new();
    let config = CONFIG.get_or_init(|| {
        let roots = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.into() };
        let provider = Arc::new(crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("the provider has ciphers for them");
        Arc::new(builder.with_root_certificates(roots).with_no_client_auth())
    });
    TlsConnector::from(Arc::clone(config))
}

/// Sends a request. What comes beside the response drives the connection until its body has been read.
async fn send(
    request: http::Request<WasiBody>,
    server: &Server,
    times: Times,
) -> Result<(http::Response<WasiBody>, Pin<Io>), Error> {
    let connecting = async {
        let stream = Heard(connect(&server.addresses).await?);
        if !server.is_tls {
            return exchange_over(TokioIo::new(stream)).await;
        }
        let name = ServerName::try_from(server.host.clone()).map_err(Error::InvalidDnsNameError)?;
        exchange_over(TokioIo::new(tls().connect(name, stream).await.map_err(Error::Tls)?)).await
    };
    let (sender, io) = timeout(times.connect, connecting).await.map_err(|_| Error::ConnectionTimeout)??;
    exchange(request, sender, io, &times).await
}

type Sender = http1::SendRequest<WasiBody>;

async fn exchange_over<T>(stream: T) -> Result<(Sender, Pin<Io>), Error>
where
    T: hyper::rt::Read + hyper::rt::Write + Send + Unpin + 'static,
{
    let mut builder = http1::Builder::new();
    let (sender, connection) =
        builder.max_buf_size(HEAD_BYTES_MAX).max_headers(HEADERS_MAX).handshake::<_, WasiBody>(stream).await?;
    let io: Io = Box::new(async move {
        connection.await.map_err(|error| if error.is_timeout() { Error::HttpResponseTimeout } else { error.into() })
    });
    Ok((sender, Box::into_pin(io)))
}

async fn exchange(
    mut request: http::Request<WasiBody>,
    mut sender: Sender,
    mut io: Pin<Io>,
    times: &Times,
) -> Result<(http::Response<WasiBody>, Pin<Io>), Error> {
    // Scheme and authority are for proxies only.
    let path = request.uri().path_and_query().map_or("/", |path| path.as_str());
    *request.uri_mut() = Uri::builder().path_and_query(path).build().map_err(|_| Error::HttpRequestUriInvalid)?;
    let mut answer = pin!(timeout(times.first_byte, sender.send_request(request)));
    let mut ended = None;
    // The answer does not come unless somebody drives the connection.
    let answer = std::future::poll_fn(|context| {
        if ended.is_none()
            && let Poll::Ready(result) = io.as_mut().poll(context)
        {
            ended = Some(result);
        }
        if let Poll::Ready(answer) = answer.as_mut().poll(context) {
            return Poll::Ready(answer.map_err(|_| Error::ConnectionReadTimeout).and_then(|answer| Ok(answer?)));
        }
        // The connection may have failed after the answer was there, but not before it.
        match ended.take_if(|result| result.is_err()) {
            Some(Err(error)) => Poll::Ready(Err(error)),
            _ => Poll::Pending,
        }
    })
    .await?;
    check_head(answer.headers())?;
    let mut pause = tokio::time::interval(times.between_bytes);
    pause.reset();
    let response = answer.map(|incoming| Answer { incoming, pause }.boxed_unsync());
    let io = if ended.is_some() { Box::pin(std::future::ready(Ok(()))) } else { io };
    Ok((response, io))
}

/// hyper looks at the length of a head while it is not complete, and what comes last may be another buffer's worth.
fn check_head(fields: &http::HeaderMap) -> Result<(), Error> {
    let bytes: usize = fields.iter().map(|(name, value)| name.as_str().len() + value.len() + ": \r\n".len()).sum();
    if bytes > HEAD_BYTES_MAX { Err(Error::HttpResponseHeaderSectionSize(u32::try_from(bytes).ok())) } else { Ok(()) }
}

/// The body of a response, which must go on coming.
struct Answer {
    incoming: Incoming,
    pause: Interval,
}

impl Body for Answer {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        match Pin::new(&mut self.incoming).poll_frame(context) {
            Poll::Ready(None) => Poll::Ready(None),
            Poll::Ready(Some(Ok(frame))) => {
                self.pause.reset();
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(error))) => {
                let error = if error.is_timeout() { Error::HttpResponseTimeout } else { error.into() };
                Poll::Ready(Some(Err(error)))
            }
            Poll::Pending => {
                ready!(self.pause.poll_tick(context));
                Poll::Ready(Some(Err(Error::ConnectionReadTimeout)))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.is_end_stream()
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        self.incoming.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;

    use super::*;

    fn request(uri: &str) -> http::Request<WasiBody> {
        let body =
            http_body_util::Empty::new().map_err(|never: std::convert::Infallible| match never {}).boxed_unsync();
        http::Request::builder().uri(uri).header("host", "service").body(body).expect("a request")
    }

    /// An address at which nobody listens.
    fn dead() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        listener.local_addr().expect("an address")
    }

    fn server(host: &str, is_tls: bool, addresses: &[SocketAddr]) -> Server {
        Server { host: host.into(), is_tls, addresses: addresses.to_vec() }
    }

    /// A name that leads to an address of this machine is refused, whatever the name server says.
    #[tokio::test]
    async fn a_name_cannot_lead_to_this_machine() {
        let ask = async |grant: &str, uri: &str| {
            permitted(&[grant.parse().expect("is right")], &Lookups::default(), &uri.parse().expect("a URI")).await
        };
        let refused = ask("http://localhost:9", "http://localhost:9/x").await;
        assert!(matches!(refused, Err(Error::DestinationIpProhibited)), "{refused:?}");
        let granted = ask("http://localhost:9@private", "http://localhost:9/x").await.expect("is granted");
        assert!(granted.addresses.iter().all(|address| address.ip().is_loopback()), "{granted:?}");
        let written_out = ask("http://127.0.0.1:9", "http://127.0.0.1:9/x").await.expect("is granted");
        assert_eq!(written_out.addresses, ["127.0.0.1:9".parse().expect("an address")]);
        let other = ask("http://127.0.0.1:9", "http://127.0.0.1:8/x").await;
        assert!(matches!(other, Err(Error::HttpRequestDenied)), "{other:?}");
    }

    #[tokio::test]
    async fn all_addresses_are_tried() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let live = listener.local_addr().expect("an address");
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a client");
            let mut head = [0; 4096];
            let count = stream.read(&mut head).expect("a request");
            assert!(head[..count].starts_with(b"GET /x?y HTTP/1.1\r\n"), "{}", String::from_utf8_lossy(&head));
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi").expect("is read");
        });
        let to = server("service", false, &[dead(), dead(), live]);
        let (response, io) = send(request("http://service/x?y"), &to, bounded(None)).await.expect("an answer");
        let reading = response.into_body().collect();
        let (body, _) = tokio::join!(reading, io);
        assert_eq!(body.expect("a body").to_bytes(), "hi");
        let nobody = send(request("http://service/"), &server("service", false, &[dead()]), bounded(None)).await;
        assert!(matches!(nobody, Err(Error::Connect(_))));
    }

    /// Answers one request with this.
    async fn answered(answer: Vec<u8>) -> Result<http::StatusCode, Error> {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let live = listener.local_addr().expect("an address");
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a client");
            let _ = stream.read(&mut [0; 4096]);
            // Nobody reads all of one that is too large.
            let _ = stream.write_all(&answer);
        });
        let (response, _io) =
            send(request("http://service/"), &server("service", false, &[live]), bounded(None)).await?;
        Ok(response.status())
    }

    /// A head that is longer, or has more fields, makes the request fail; it is not collected to its end.
    #[tokio::test]
    async fn the_head_of_a_response_is_bounded() {
        let head = |fields: usize, bytes: usize| {
            let field = |n: usize| format!("x-{n}: {}\r\n", "y".repeat(bytes / fields));
            let fields: String = (0..fields).map(field).collect();
            format!("HTTP/1.1 204 No Content\r\n{fields}\r\n").into_bytes()
        };
        for (fields, bytes) in [(HEADERS_MAX, 0), (10, HEAD_BYTES_MAX - 1000)] {
            let answer = answered(head(fields, bytes)).await;
            assert!(matches!(answer, Ok(http::StatusCode::NO_CONTENT)), "{fields} fields, {bytes} bytes: {answer:?}");
        }
        for (fields, bytes) in [(HEADERS_MAX + 1, 0), (10, HEAD_BYTES_MAX), (1, 100 << 20)] {
            let answer = answered(head(fields, bytes)).await;
            assert!(answer.is_err(), "{fields} fields, {bytes} bytes: {answer:?}");
        }
    }

    /// An address that does not answer holds up the next one for a moment only. 192.0.2.1 is nobody's.
    #[tokio::test]
    async fn a_silent_address_does_not_hold_up_the_next() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let live = listener.local_addr().expect("an address");
        let silent = "192.0.2.1:9".parse().expect("an address");
        let stream = timeout(Duration::from_secs(10), connect(&[silent, live])).await.expect("in time");
        assert_eq!(stream.expect("connects").peer_addr().expect("an address"), live);
    }

    /// The name is not looked up again: it stands in the first message of TLS, at an address that it does not have.
    #[tokio::test]
    async fn tls_goes_to_the_checked_address() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let live = listener.local_addr().expect("an address");
        let hello = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a client");
            let mut hello = vec![0; 4096];
            let count = stream.read(&mut hello).expect("a greeting");
            hello.truncate(count);
            hello
        });
        let to = server("service.invalid", true, &[dead(), live]);
        assert!(send(request("https://service.invalid/"), &to, bounded(None)).await.is_err(), "no certificate comes");
        let hello = hello.join().expect("somebody came");
        assert!(hello.windows(15).any(|bytes| bytes == b"service.invalid"), "{hello:?}");
    }
}
