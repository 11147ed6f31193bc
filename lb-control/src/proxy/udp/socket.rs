//! Sockets at VIPs.

use std::{io, net::SocketAddr, os::fd::OwnedFd};

use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Protocol, Socket, Type};

use crate::proxy::{entry::Entry, source_filter, vip};

/// What waits to be read, and to leave: a burst of all clients goes by one socket. In bytes as the kernel
/// counts them, several hundred for the smallest datagram.
const BUFFER: usize = 8 << 20;

/// A socket of a VIP's port, with others in other workers. The address need not be there yet.
///
/// # Errors
/// Those of the kernel: `EADDRINUSE` if somebody who does not share it has the address.
pub fn open(address: SocketAddr, entry: &Entry) -> io::Result<OwnedFd> {
    let socket = vip::socket(address, Type::DGRAM, Protocol::UDP)?;
    // Beyond the sysctl's limit if that is allowed (CAP_NET_ADMIN), else up to it.
    if setsockopt(&socket, sockopt::RcvBufForce, &BUFFER).is_err() {
        let _ = socket.set_recv_buffer_size(BUFFER);
    }
    if setsockopt(&socket, sockopt::SndBufForce, &BUFFER).is_err() {
        let _ = socket.set_send_buffer_size(BUFFER);
    }
    // A kernel that cannot put datagrams together gives them one by one.
    let _ = setsockopt(&socket, sockopt::UdpGroSegment, &true);
    let socket = OwnedFd::from(socket);
    filter(&socket, entry);
    Socket::from(socket.try_clone()?).bind(&address.into())?;
    Ok(socket)
}

/// One that is bound already.
///
/// # Errors
/// When it cannot be made to fit.
pub fn inherited(socket: OwnedFd, entry: &Entry) -> io::Result<OwnedFd> {
    let socket = Socket::from(socket);
    socket.set_nonblocking(true)?;
    let socket = OwnedFd::from(socket);
    filter(&socket, entry);
    Ok(socket)
}

/// Lets the kernel drop what comes from outside of the source ranges, before it takes room here. Where it
/// does not, sessions are refused.
pub fn filter(socket: &OwnedFd, entry: &Entry) {
    let socket = socket2::SockRef::from(socket);
    let (table, is_v4) = (entry.table(), entry.key.vip.is_ipv4());
    source_filter::apply(&socket, &table.frontend.source_ranges, is_v4);
}
