//! Making sockets. Without a grant none is made, so a plugin cannot use up the broker's file descriptors; with one their
//! number has a bound. Which addresses they reach is decided in [`crate::network`].

use wasmtime::StoreContextMut;
use wasmtime::component::{Linker, Resource, ResourceType};
use wasmtime_wasi::p2::bindings::sockets::network::{ErrorCode, IpAddressFamily};
use wasmtime_wasi::p2::bindings::sockets::{tcp_create_socket, udp_create_socket};
use wasmtime_wasi::p2::{TcpSocket, UdpSocket};
use wasmtime_wasi::sockets::WasiSocketsView;

use crate::HostError;
use crate::guest::Guest;
use crate::shadow::linked_name;

type Made<T> = wasmtime::Result<(Result<Resource<T>, ErrorCode>,)>;

/// Takes the place of the functions that wasmtime links.
pub(crate) fn add_to_linker(linker: &mut Linker<Guest>) -> Result<(), HostError> {
    let names = [
        linked_name(linker, "wasi:sockets/tcp-create-socket", "create-tcp-socket")?,
        linked_name(linker, "wasi:sockets/udp-create-socket", "create-udp-socket")?,
        linked_name(linker, "wasi:sockets/tcp", "[method]tcp-socket.start-bind")?,
        linked_name(linker, "wasi:sockets/udp", "[method]udp-socket.start-bind")?,
    ];
    linker.allow_shadowing(true);
    let added = shadow(linker, &names);
    linker.allow_shadowing(false);
    added.map_err(|error| HostError::new(format!("{error:#}")))
}

fn shadow(linker: &mut Linker<Guest>, [make_tcp, make_udp, tcp, udp]: &[String; 4]) -> wasmtime::Result<()> {
    linker.instance(make_tcp)?.func_wrap_async(
        "create-tcp-socket",
        |mut store: StoreContextMut<'_, Guest>, (family,): (IpAddressFamily,)| {
            Box::new(async move {
                let guest = store.data_mut();
                if let Err(code) = guest.may_make_socket() {
                    return Ok((Err(code),));
                }
                let made = tcp_create_socket::Host::create_tcp_socket(&mut guest.sockets(), family);
                settled::<TcpSocket>(guest, made.map_err(wasmtime_wasi::TrappableError::downcast))
            })
        },
    )?;
    linker.instance(make_udp)?.func_wrap_async(
        "create-udp-socket",
        |mut store: StoreContextMut<'_, Guest>, (family,): (IpAddressFamily,)| {
            Box::new(async move {
                let guest = store.data_mut();
                if let Err(code) = guest.may_make_socket() {
                    return Ok((Err(code),));
                }
                let made = udp_create_socket::Host::create_udp_socket(&mut guest.sockets(), family).await;
                settled::<UdpSocket>(guest, made.map_err(wasmtime_wasi::TrappableError::downcast))
            })
        },
    )?;
    linker.instance(tcp)?.resource(
        "tcp-socket",
        ResourceType::host::<TcpSocket>(),
        |mut store: StoreContextMut<'_, Guest>, rep| store.data_mut().close_socket(Resource::<TcpSocket>::new_own(rep)),
    )?;
    linker.instance(udp)?.resource(
        "udp-socket",
        ResourceType::host::<UdpSocket>(),
        |mut store: StoreContextMut<'_, Guest>, rep| store.data_mut().close_socket(Resource::<UdpSocket>::new_own(rep)),
    )
}

fn settled<T: 'static>(guest: &mut Guest, made: Result<Resource<T>, wasmtime::Result<ErrorCode>>) -> Made<T> {
    match made {
        Ok(socket) => Ok((Ok(socket),)),
        Err(code) => {
            guest.socket_not_made();
            Ok((Err(code?),))
        }
    }
}
