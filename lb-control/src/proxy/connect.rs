//! A connection to a backend.

use std::{
    future::poll_fn,
    io::{self, ErrorKind},
    net::{IpAddr, SocketAddr},
    task::Poll,
};

use nix::{
    errno::Errno,
    sys::socket::{setsockopt, sockopt::IpBindAddressNoPort},
};
use socket2::{Domain, Protocol, Socket, Type};

use super::{clock, counts::Refusal, end::End, registry::Registration};

/// What a connection is to be like.
#[derive(Clone, Copy, Debug)]
pub struct Wish {
    /// The address that it is to come from.
    pub from: Option<IpAddr>,
    /// Whether that is the client's, and not one of this node.
    pub is_transparent: bool,
    /// Whether bytes wait to be sent: then the handshake's last segment carries them.
    pub has_bytes: bool,
    /// Until when it must have come about, in milliseconds of [`clock`].
    pub deadline: u64,
}

/// Why there is none.
#[derive(Debug)]
pub enum Failed {
    /// The backend, or the way there, is to blame.
    Backend,
    /// This node is.
    Here(Refusal),
    /// It is not wanted any more.
    Unwanted,
}

/// Connects. `is_wanted` is asked now and then.
///
/// # Errors
/// Why that failed.
pub async fn connect(
    to: SocketAddr,
    wish: Wish,
    registration: &mut Registration,
    is_wanted: impl Fn() -> bool,
) -> Result<End, Failed> {
    let mut end = begin(to, wish)?;
    let connected = poll_fn(|cx| {
        if let Poll::Ready(result) = end.poll_connected(cx) {
            return Poll::Ready(result.map_err(|error| here(&error).map_or(Failed::Backend, Failed::Here)));
        }
        if !is_wanted() {
            return Poll::Ready(Err(Failed::Unwanted));
        }
        if clock::milliseconds() >= wish.deadline {
            return Poll::Ready(Err(Failed::Backend));
        }
        registration.wake_at(cx, wish.deadline);
        Poll::Pending
    });
    connected.await?;
    Ok(end)
}

fn begin(to: SocketAddr, wish: Wish) -> Result<End, Failed> {
    let failed = |error: io::Error| here(&error).map_or(Failed::Backend, Failed::Here);
    let kind = Type::STREAM.nonblocking().cloexec();
    let socket = Socket::new(Domain::for_address(to), kind, Some(Protocol::TCP)).map_err(failed)?;
    if let Some(from) = wish.from {
        let refused = |error: io::Error| match error.raw_os_error().map(Errno::from_raw) {
            _ if wish.is_transparent => Failed::Here(Refusal::Transparent),
            // No port is chosen yet: it is about the address.
            Some(Errno::EADDRNOTAVAIL) => Failed::Here(Refusal::SourceMissing),
            _ => failed(error),
        };
        bind(&socket, from, to, wish.is_transparent).map_err(refused)?;
    }
    // Without it there is one more segment on the way.
    let acks_wait = wish.has_bytes && socket.set_tcp_quickack(false).is_ok();
    match socket.connect(&to.into()) {
        Err(error) if error.raw_os_error() != Some(Errno::EINPROGRESS as i32) => return Err(failed(error)),
        _ => {}
    }
    End::connecting(socket, acks_wait).map_err(failed)
}

/// Lets a connection come from an address, which need not be this node's.
fn bind(socket: &Socket, from: IpAddr, to: SocketAddr, is_transparent: bool) -> io::Result<()> {
    if from.is_ipv4() != to.is_ipv4() {
        return Err(ErrorKind::Unsupported.into());
    }
    match from {
        _ if !is_transparent => {}
        IpAddr::V4(_) => socket.set_ip_transparent_v4(true)?,
        IpAddr::V6(_) => socket.set_ip_transparent_v6(true)?,
    }
    // The port is chosen with the connection: then it need not differ from those of other backends.
    setsockopt(socket, IpBindAddressNoPort, &true)?;
    socket.bind(&SocketAddr::new(from, 0).into())
}

/// Errors that say nothing of the backend.
fn here(error: &io::Error) -> Option<Refusal> {
    match Errno::from_raw(error.raw_os_error()?) {
        Errno::EMFILE | Errno::ENFILE | Errno::ENOBUFS | Errno::ENOMEM | Errno::ENOSPC => {
            Some(Refusal::Descriptors)
        }
        Errno::EADDRNOTAVAIL | Errno::EAGAIN => Some(Refusal::LocalPorts),
        _ => None,
    }
}
