//! Sockets at VIPs.

use std::{io, net::SocketAddr};

use socket2::{Domain, Protocol, Socket, Type};

/// A socket for a VIP's port, not bound yet. The address need not be there yet; and others may have the
/// port, at the VIP (other workers, the agent that is followed) or at all addresses, if they allow it.
///
/// # Errors
/// Those of the kernel.
pub(super) fn socket(address: SocketAddr, kind: Type, protocol: Protocol) -> io::Result<Socket> {
    let kind = kind.nonblocking().cloexec();
    let socket = Socket::new(Domain::for_address(address), kind, Some(protocol))?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    if address.is_ipv4() {
        socket.set_freebind_v4(true)?;
    } else {
        socket.set_only_v6(true)?;
        socket.set_freebind_v6(true)?;
    }
    Ok(socket)
}
