//! Listening sockets: made, given their options, and taken down.

use std::fs::{File, Permissions};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use mio::event::Source;
use mio::net::{TcpListener, UnixListener};
use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, TcpKeepalive, Type};
use tracing::debug;

use crate::config::{Bind, Listener};
use crate::stream::Stream;

/// Connections the kernel may hold for us.
const BACKLOG: i32 = 4096;
/// Probes without an answer after which the system gives a connection up.
const KEEPALIVE_PROBES: u32 = 5;

/// A socket that listens, and is not served yet.
pub(crate) struct Listening {
    socket: Socketed,
    pub(crate) listener: Listener,
    /// Its name with the port it really has.
    pub(crate) shown: String,
}

enum Socketed {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// Why a listener could not be bound, and its name.
pub(crate) type BindError = (String, io::Error);

/// Binds `wanted`, which are some of `all`. An address of a host name that this machine lacks is left out, if another
/// address of that name could be bound.
pub(crate) fn bind_all(wanted: &[Listener], all: &[Listener]) -> Result<Vec<Listening>, BindError> {
    let mut bound: Vec<Listening> = Vec::new();
    let mut missing: Vec<(&Listener, io::Error)> = Vec::new();
    for listener in wanted {
        match bind(listener, all) {
            Ok(listening) => bound.push(listening),
            Err(NotBound::Lacking(error)) if listener.optional => missing.push((listener, error)),
            Err(NotBound::Lacking(error) | NotBound::Failed(error)) => return Err((listener.name.to_string(), error)),
        }
    }
    for (listener, error) in missing {
        if !bound.iter().any(|other| other.listener.written == listener.written) {
            return Err((listener.name.to_string(), error));
        }
        debug!(listener = %listener.name, %error, "this machine has no such address, the others of the name serve");
    }
    Ok(bound)
}

enum NotBound {
    /// The machine has no such family of addresses, or no such address.
    Lacking(io::Error),
    Failed(io::Error),
}

impl From<io::Error> for NotBound {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::AddrNotAvailable => Self::Lacking(error),
            _ => Self::Failed(error),
        }
    }
}

fn bind(listener: &Listener, all: &[Listener]) -> Result<Listening, NotBound> {
    let (socket, shown) = match &listener.bind {
        Bind::Tcp(address) => {
            let tcp = bind_tcp(*address, listener, all)?;
            let shown = format!("mqtt://{}", tcp.local_addr()?);
            (Socketed::Tcp(tcp), shown)
        }
        Bind::Unix(path) => (Socketed::Unix(bind_unix(path, listener)?), format!("unix:{}", path.display())),
    };
    Ok(Listening { socket, listener: listener.clone(), shown })
}

fn bind_tcp(address: SocketAddr, listener: &Listener, all: &[Listener]) -> Result<TcpListener, NotBound> {
    let socket =
        Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP)).map_err(NotBound::Lacking)?;
    socket.set_reuse_address(true)?;
    if let IpAddr::V6(v6) = address.ip() {
        // Whatever the system's own default is: `[::]` alone has both families.
        socket.set_only_v6(v6.is_unspecified() && shares_port_with_v4(address, all))?;
    }
    set_keepalive(&SockRef::from(&socket), listener.keepalive)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(TcpListener::from_std(socket.into()))
}

/// Another listener has the IPv4 clients of this port, or some of them.
fn shares_port_with_v4(address: SocketAddr, all: &[Listener]) -> bool {
    address.port() != 0
        && all.iter().any(|other| match other.bind {
            Bind::Tcp(other) => other.is_ipv4() && other.port() == address.port(),
            Bind::Unix(_) => false,
        })
}

/// Accepted connections inherit this from the listening socket.
fn set_keepalive(socket: &SockRef<'_>, silence: Option<Duration>) -> io::Result<()> {
    socket.set_keepalive(silence.is_some())?;
    let Some(silence) = silence else { return Ok(()) };
    let interval = (silence / 10).clamp(Duration::from_secs(1), Duration::from_secs(75));
    let keepalive = TcpKeepalive::new().with_time(silence).with_interval(interval).with_retries(KEEPALIVE_PROBES);
    socket.set_tcp_keepalive(&keepalive)
}

fn bind_unix(path: &Path, listener: &Listener) -> io::Result<UnixListener> {
    remove_stale(path)?;
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    let restricted = listener.socket_mode.is_some() || listener.socket_group.is_some();
    // Linux makes the file with the permissions of the socket: until they are final nobody else may connect.
    let socket = if restricted { with_mode(socket, 0o600)? } else { socket };
    socket.set_nonblocking(true)?;
    socket.bind(&SockAddr::unix(path)?)?;
    set_access(path, listener)?;
    socket.listen(BACKLOG)?;
    let listener: std::os::unix::net::UnixListener = OwnedFd::from(socket).into();
    Ok(UnixListener::from_std(listener))
}

fn with_mode(socket: Socket, mode: u32) -> io::Result<Socket> {
    let file = File::from(OwnedFd::from(socket));
    file.set_permissions(Permissions::from_mode(mode))?;
    Ok(OwnedFd::from(file).into())
}

fn set_access(path: &Path, listener: &Listener) -> io::Result<()> {
    if let Some(group) = listener.socket_group {
        let group = Some(group);
        std::os::unix::fs::chown(path, None, group)
            .map_err(|error| io::Error::new(error.kind(), format!("give it to group {group:?}: {error}")))?;
    }
    match listener.socket_mode {
        Some(mode) => std::fs::set_permissions(path, Permissions::from_mode(mode)),
        // A group without permission would be of no use.
        None if listener.socket_group.is_some() => std::fs::set_permissions(path, Permissions::from_mode(0o660)),
        None => Ok(()),
    }
}

/// Removes a socket file that nobody listens on; anything else at that path is left alone.
fn remove_stale(path: &Path) -> io::Result<()> {
    let Ok(meta) = std::fs::symlink_metadata(path) else { return Ok(()) };
    if meta.file_type().is_socket() && std::os::unix::net::UnixStream::connect(path).is_err() {
        std::fs::remove_file(path)?;
    }
    Ok(())
}

impl Listening {
    pub(crate) fn source(&mut self) -> &mut dyn Source {
        match &mut self.socket {
            Socketed::Tcp(listener) => listener,
            Socketed::Unix(listener) => listener,
        }
    }

    pub(crate) fn accept(&self) -> io::Result<(Stream, Option<IpAddr>)> {
        match &self.socket {
            Socketed::Tcp(listener) => {
                let (stream, peer) = listener.accept()?;
                // A small packet would wait for the last one's acknowledgement otherwise.
                stream.set_nodelay(true)?;
                Ok((Stream::Tcp(stream), Some(peer.ip().to_canonical())))
            }
            Socketed::Unix(listener) => Ok((Stream::Unix(listener.accept()?.0), None)),
        }
    }

    /// Other settings for the same address.
    pub(crate) fn update(&mut self, listener: Listener) -> io::Result<()> {
        match (&self.socket, &listener.bind) {
            (Socketed::Tcp(socket), _) => set_keepalive(&SockRef::from(socket), listener.keepalive)?,
            (Socketed::Unix(_), Bind::Unix(path)) => set_access(path, &listener)?,
            (Socketed::Unix(_), Bind::Tcp(_)) => {}
        }
        self.listener = listener;
        Ok(())
    }
}

/// Nobody listens there any more; those who are connected stay.
impl Drop for Listening {
    fn drop(&mut self) {
        if let (Socketed::Unix(_), Bind::Unix(path)) = (&self.socket, &self.listener.bind) {
            let _ = std::fs::remove_file(path);
        }
    }
}
