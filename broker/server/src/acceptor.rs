//! Accepts connections and gives each to the shard with the fewest.

use std::io;
use std::net::IpAddr;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use mio::net::{TcpListener, UnixListener};
use mio::{Events, Interest, Poll, Token, Waker};
use socket2::{Domain, Protocol, Socket, Type};
use tracing::{debug, warn};

use crate::config::{Bind, Listener};
use crate::mailbox::Mail;
use crate::shard::Arrival;
use crate::shared::Shared;
use crate::stream::Stream;

/// Connections the kernel may hold for us.
const BACKLOG: i32 = 4096;
/// Pause after a failed accept (out of file descriptors, say), so as not to spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
const STOP: Token = Token(usize::MAX);

enum Socketed {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// Listening sockets, bound and not yet served.
pub(crate) struct Acceptor {
    poll: Poll,
    sockets: Vec<(Socketed, Arc<str>)>,
    waker: Arc<Waker>,
}

impl Acceptor {
    /// Binds all listeners.
    pub(crate) fn bind(listeners: &[Listener]) -> Result<Self, (String, io::Error)> {
        let failed = |what: &str| {
            let what = what.to_owned();
            move |error| (what, error)
        };
        let poll = Poll::new().map_err(failed("epoll"))?;
        let waker = Arc::new(Waker::new(poll.registry(), STOP).map_err(failed("eventfd"))?);
        let mut sockets = Vec::new();
        for (place, listener) in listeners.iter().enumerate() {
            let token = Token(place);
            let (mut socket, name) = bind(&listener.bind).map_err(failed(&listener.name))?;
            match &mut socket {
                Socketed::Tcp(tcp) => poll.registry().register(tcp, token, Interest::READABLE),
                Socketed::Unix(unix) => poll.registry().register(unix, token, Interest::READABLE),
            }
            .map_err(failed(&listener.name))?;
            sockets.push((socket, name.into()));
        }
        Ok(Self { poll, sockets, waker })
    }

    /// With the ports that were really taken.
    pub(crate) fn names(&self) -> Vec<String> {
        self.sockets.iter().map(|(_, name)| name.to_string()).collect()
    }

    pub(crate) fn waker(&self) -> Arc<Waker> {
        Arc::clone(&self.waker)
    }

    /// Runs until woken while the broker drains.
    pub(crate) fn run(mut self, shared: &Shared) {
        let mut events = Events::with_capacity(64);
        while !shared.draining.load(Ordering::Acquire) {
            if let Err(error) = self.poll.poll(&mut events, None)
                && error.kind() != io::ErrorKind::Interrupted
            {
                warn!(%error, "waiting for connections failed");
                std::thread::sleep(ACCEPT_PAUSE);
            }
            for event in &events {
                if let Some((socket, name)) = self.sockets.get(event.token().0) {
                    accept_all(socket, name, shared);
                }
            }
        }
    }
}

fn accept_all(socket: &Socketed, name: &Arc<str>, shared: &Shared) {
    loop {
        match accept(socket) {
            Ok((stream, address)) => {
                let number = shared.arrivals.fetch_add(1, Ordering::Relaxed);
                place(shared, Arrival { stream, address, listener: Arc::clone(name), number });
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted) => {}
            Err(error) => {
                warn!(listener = %name, %error, "cannot accept a connection; is the limit of open files too low?");
                std::thread::sleep(ACCEPT_PAUSE);
            }
        }
        if shared.draining.load(Ordering::Acquire) {
            return;
        }
    }
}

fn place(shared: &Shared, arrival: Arrival) {
    if shared.connections.fetch_add(1, Ordering::Relaxed) >= shared.config.limits.connections_max {
        shared.connections.fetch_sub(1, Ordering::Relaxed);
        debug!(listener = %arrival.listener, "connection refused: connections_max reached");
        return;
    }
    let least = shared.load.iter().enumerate().min_by_key(|(_, load)| load.load(Ordering::Relaxed));
    let shard = least.map_or(0, |(shard, _)| shard);
    shared.load[shard].fetch_add(1, Ordering::Relaxed);
    shared.mailboxes[shard].send(Mail::Arrived(arrival));
}

fn accept(socket: &Socketed) -> io::Result<(Stream, Option<IpAddr>)> {
    match socket {
        Socketed::Tcp(listener) => {
            let (stream, peer) = listener.accept()?;
            // A small packet would wait for the last one's acknowledgement otherwise.
            stream.set_nodelay(true)?;
            Ok((Stream::Tcp(stream), Some(peer.ip().to_canonical())))
        }
        Socketed::Unix(listener) => Ok((Stream::Unix(listener.accept()?.0), None)),
    }
}

fn bind(bind: &Bind) -> io::Result<(Socketed, String)> {
    match bind {
        Bind::Tcp(address) => {
            let socket = Socket::new(Domain::for_address(*address), Type::STREAM, Some(Protocol::TCP))?;
            socket.set_reuse_address(true)?;
            socket.set_nonblocking(true)?;
            socket.bind(&(*address).into())?;
            socket.listen(BACKLOG)?;
            let listener = TcpListener::from_std(socket.into());
            let name = format!("mqtt://{}", listener.local_addr()?);
            Ok((Socketed::Tcp(listener), name))
        }
        Bind::Unix(path) => {
            remove_stale(path)?;
            let name = format!("unix:{}", path.display());
            Ok((Socketed::Unix(UnixListener::bind(path)?), name))
        }
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
