//! Looking up names for guests, for HTTP requests and for `wasi:sockets/ip-name-lookup`.
//!
//! The system is asked on a thread that others need, too, and the question cannot be taken back: it goes on when nobody
//! waits for its answer any more. So the instances of a plugin have a few of them under way at a time, those that nobody
//! waits for included; further ones wait.

use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::vec;

use tokio::sync::Semaphore;
use wasmtime::StoreContextMut;
use wasmtime::component::{Linker, Resource, ResourceType};
use wasmtime_wasi::p2::bindings::sockets::network::{ErrorCode, IpAddress};
use wasmtime_wasi::p2::{DynPollable, Network, Pollable, subscribe};
use wasmtime_wasi::runtime::{AbortOnDropJoinHandle, poll_noop, spawn};

use crate::HostError;
use crate::guest::Guest;
use crate::shadow::linked_name;

/// Names that are looked up at a time for one plugin.
const LOOKUPS_MAX: usize = 16;
/// Bytes of a name; there are no longer ones.
const NAME_BYTES_MAX: usize = 255;

/// The lookups of one plugin.
pub(crate) struct Lookups(Arc<Semaphore>);

impl Default for Lookups {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(LOOKUPS_MAX)))
    }
}

impl Lookups {
    /// All addresses of a name, or the one that is written out.
    pub(crate) async fn find(&self, name: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
        if let Ok(written_out) = name.parse::<IpAddr>() {
            return Ok(vec![SocketAddr::new(written_out, port)]);
        }
        if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.is_ascii() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let name = name.to_owned();
        self.run(move || (name.as_str(), port).to_socket_addrs().map(Iterator::collect)).await
    }

    /// Runs what cannot be stopped. It counts until it ends, not until this is dropped.
    async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
        let permit = Arc::clone(&self.0).acquire_owned().await.map_err(io::Error::other)?;
        let counted = move || {
            let _permit = permit;
            work()
        };
        tokio::task::spawn_blocking(counted).await.map_err(io::Error::other)?
    }
}

/// A guest's lookup: `resolve-address-stream`.
enum Stream {
    Asked(AbortOnDropJoinHandle<io::Result<Vec<SocketAddr>>>),
    Answered(Result<vec::IntoIter<SocketAddr>, ErrorCode>),
}

#[wasmtime_wasi::async_trait]
impl Pollable for Stream {
    async fn ready(&mut self) {
        if let Self::Asked(answer) = self {
            *self = Self::Answered(answer.await.map(Vec::into_iter).map_err(|error| code(&error)));
        }
    }
}

impl Stream {
    fn next(&mut self) -> Result<Option<IpAddress>, ErrorCode> {
        let _ = poll_noop(std::pin::pin!(self.ready()));
        match self {
            Self::Asked(_) => Err(ErrorCode::WouldBlock),
            Self::Answered(Ok(addresses)) => Ok(addresses.next().map(|address| address.ip().to_canonical().into())),
            Self::Answered(Err(code)) => Err(*code),
        }
    }
}

fn code(error: &io::Error) -> ErrorCode {
    match error.kind() {
        io::ErrorKind::InvalidInput => ErrorCode::InvalidArgument,
        _ => ErrorCode::NameUnresolvable,
    }
}

/// Takes the place of the functions that wasmtime links.
pub(crate) fn add_to_linker(linker: &mut Linker<Guest>) -> Result<(), HostError> {
    let name = linked_name(linker, "wasi:sockets/ip-name-lookup", "resolve-addresses")?;
    linker.allow_shadowing(true);
    let added = shadow(linker, &name);
    linker.allow_shadowing(false);
    added.map_err(|error| HostError::new(format!("{error:#}")))
}

fn shadow(linker: &mut Linker<Guest>, name: &str) -> wasmtime::Result<()> {
    let mut lookup = linker.instance(name)?;
    lookup.resource(
        "resolve-address-stream",
        ResourceType::host::<Stream>(),
        |mut store: StoreContextMut<'_, Guest>, rep| {
            store.data_mut().table.delete(Resource::<Stream>::new_own(rep))?;
            Ok(())
        },
    )?;
    lookup.func_wrap(
        "resolve-addresses",
        |mut store: StoreContextMut<'_, Guest>, (network, name): (Resource<Network>, String)| {
            Ok((resolve(store.data_mut(), &network, name)?,))
        },
    )?;
    lookup.func_wrap(
        "[method]resolve-address-stream.resolve-next-address",
        |mut store: StoreContextMut<'_, Guest>, (stream,): (Resource<Stream>,)| {
            let guest = store.data_mut();
            guest.count_call();
            Ok((guest.table.get_mut(&stream)?.next(),))
        },
    )?;
    lookup.func_wrap(
        "[method]resolve-address-stream.subscribe",
        |mut store: StoreContextMut<'_, Guest>, (stream,): (Resource<Stream>,)| {
            let guest = store.data_mut();
            guest.count_call();
            Ok((subscribe(&mut guest.table, stream)? as Resource<DynPollable>,))
        },
    )
}

fn resolve(
    guest: &mut Guest,
    network: &Resource<Network>,
    name: String,
) -> wasmtime::Result<Result<Resource<Stream>, ErrorCode>> {
    guest.count_call();
    guest.table.get(network)?;
    if guest.services.grants.sockets.is_empty() {
        return Ok(Err(ErrorCode::PermanentResolverFailure));
    }
    let plugin = Arc::clone(&guest.services.plugin);
    let asked = spawn(async move { plugin.open.lookups.find(name.trim_matches(['[', ']']), 0).await });
    Ok(Ok(guest.table.push(Stream::Asked(asked))?))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// A lookup that nobody waits for any more counts as long as it goes on.
    #[tokio::test]
    async fn what_cannot_be_stopped_counts_until_it_ends() {
        let lookups = Lookups::default();
        let (end, ended) = mpsc::channel::<()>();
        let ended = Arc::new(std::sync::Mutex::new(ended));
        for _ in 0..LOOKUPS_MAX {
            let ended = Arc::clone(&ended);
            let mut lookup = Box::pin(lookups.run(move || {
                let _ = ended.lock().expect("nobody panics").recv();
                Ok(())
            }));
            assert!(poll_noop(lookup.as_mut()).is_none());
        }
        let mut next = Box::pin(lookups.find("localhost", 7));
        assert!(poll_noop(next.as_mut()).is_none());
        assert_eq!(lookups.0.available_permits(), 0);
        end.send(()).expect("somebody waits");
        let found = next.await.expect("the machine has a name");
        assert!(found.iter().all(|address| address.port() == 7 && address.ip().is_loopback()), "{found:?}");
        assert!(lookups.find(&"x".repeat(300), 7).await.is_err());
    }
}
