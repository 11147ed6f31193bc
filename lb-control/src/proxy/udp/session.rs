//! A session's socket to its backend.

use std::{
    io::IoSliceMut,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsRawFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use nix::{
    cmsg_space,
    errno::Errno,
    sys::socket::{
        AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, SockaddrStorage, bind, connect,
        recvmsg, setsockopt, socket, sockopt,
    },
};

use super::batch::SIZE;
use crate::{
    plan::unreachable::Unreachable,
    proxy::{backend::Backend, entry::Entry},
};

/// A client, its backend, and the socket between.
#[derive(Debug)]
pub struct Session {
    /// What the client sends to.
    pub entry: Arc<Entry>,
    /// Who gets it.
    pub backend: Arc<Backend>,
    /// Connected to the backend.
    pub socket: OwnedFd,
    /// Since when what is sent to the backend has met no trouble, as far as that says that it is there.
    pub untroubled_since: Duration,
    /// The longest datagrams that go to the backend several at once.
    pub widest: usize,
    /// Bytes of the client's last datagram: what an error would be about.
    pub last_length: u16,
    /// Whether the kernel puts the backend's datagrams together.
    pub is_bulk: bool,
    /// Whether the client's last datagram has not been answered.
    pub is_waiting: bool,
    /// Whether it is known that there may be something to read.
    pub is_queued: bool,
    /// Whether ICMP may have told something.
    pub has_trouble: bool,
}

impl Session {
    /// One that begins.
    #[must_use]
    pub fn new(entry: Arc<Entry>, backend: Arc<Backend>, socket: OwnedFd, now: Duration) -> Self {
        Self {
            entry,
            backend,
            socket,
            untroubled_since: now,
            widest: SIZE,
            last_length: 0,
            is_bulk: false,
            is_waiting: false,
            is_queued: false,
            has_trouble: false,
        }
    }
}

/// What went wrong on the way to a backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// What the client is told.
    pub why: Unreachable,
    /// What it had sent, as far as the one who tells us has quoted it.
    pub payload: Vec<u8>,
}

impl Trouble {
    /// Whether it is over with the backend. For longer datagrams than the way takes, the kernel makes
    /// fragments from then on.
    pub fn ends_session(&self) -> bool {
        !matches!(self.why, Unreachable::TooBig(_))
    }
}

/// Why there is no socket to a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotOpen {
    /// The address that it is to send from is not on this node.
    SourceMissing,
    /// There are no file descriptors.
    Descriptors,
    /// There are no local ports.
    LocalPorts,
    /// There is no way to the backend.
    NoWay,
}

impl From<Errno> for NotOpen {
    fn from(error: Errno) -> Self {
        match error {
            Errno::EMFILE | Errno::ENFILE => Self::Descriptors,
            Errno::EAGAIN | Errno::EADDRNOTAVAIL => Self::LocalPorts,
            _ => Self::NoWay,
        }
    }
}

/// A socket that sends to a backend, from an address of this node if one is named, and gets its datagrams,
/// and no others.
///
/// # Errors
/// Why there is none.
pub fn open(backend: SocketAddr, from: Option<IpAddr>) -> Result<OwnedFd, NotOpen> {
    let family = if backend.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let socket = socket(family, SockType::Datagram, flags, None)?;
    // Without it the kernel keeps to itself that a host cannot be reached (udp_err in net/ipv4/udp.c).
    if backend.is_ipv4() {
        setsockopt(&socket, sockopt::Ipv4RecvErr, &true)?;
    } else {
        setsockopt(&socket, sockopt::Ipv6RecvErr, &true)?;
    }
    if let Some(from) = from {
        setsockopt(&socket, sockopt::IpBindAddressNoPort, &true)?;
        let bound = bind(socket.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(from, 0)));
        bound.map_err(|error| match error {
            // No port is chosen yet: it is about the address.
            Errno::EADDRNOTAVAIL => NotOpen::SourceMissing,
            error => error.into(),
        })?;
    }
    connect(socket.as_raw_fd(), &SockaddrStorage::from(backend))?;
    Ok(socket)
}

/// Has the kernel put a backend's datagrams together, where it can. Never taken back: what has been put
/// together and not been read would be taken for one datagram.
pub fn put_together(socket: &OwnedFd) {
    // A kernel that cannot gives them one by one.
    let _ = setsockopt(socket, sockopt::UdpGroSegment, &true);
}

/// Reads all that ICMP has told about a socket; gives the first that ends the session, else the first.
pub fn trouble(socket: &OwnedFd) -> Option<Trouble> {
    let mut first: Option<Trouble> = None;
    let mut payload = vec![0; 2_048];
    let mut control = cmsg_space!(libc::sock_extended_err, libc::sockaddr_in6);
    // As many as a receive buffer has room for are more than enough.
    for _ in 0..SIZE {
        let mut slices = [IoSliceMut::new(&mut payload)];
        let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
        let Ok(message) =
            recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut slices, Some(&mut control), flags)
        else {
            break;
        };
        let why = message.cmsgs().into_iter().flatten().find_map(|message| match message {
            ControlMessageOwned::Ipv4RecvErr(error, _) | ControlMessageOwned::Ipv6RecvErr(error, _) => {
                verdict(error.ee_origin, error.ee_errno, error.ee_info)
            }
            _ => None,
        });
        let bytes = message.bytes;
        let found = why.map(|why| Trouble { why, payload: payload[..bytes].to_vec() });
        if first.is_none() || found.as_ref().is_some_and(Trouble::ends_session) {
            first = first.filter(Trouble::ends_session).or(found);
        }
    }
    first
}

/// What an error of the error queue means; `info` is the MTU of the way, where it is about that.
fn verdict(origin: u8, error: u32, info: u32) -> Option<Unreachable> {
    let is_icmp = origin == libc::SO_EE_ORIGIN_ICMP || origin == libc::SO_EE_ORIGIN_ICMP6;
    match Errno::from_raw(error.cast_signed()) {
        // What the kernel itself says about a datagram's length says nothing of the way.
        _ if !is_icmp => None,
        Errno::EMSGSIZE => Some(Unreachable::TooBig(info)),
        error => means(error),
    }
}

/// What an error of a connected socket means for the client; `None` if the session goes on.
pub fn means(error: Errno) -> Option<Unreachable> {
    match error {
        // IPv6 has the latter for "administratively prohibited" (icmpv6_err_convert in net/ipv6/icmp.c).
        Errno::ECONNREFUSED => Some(Unreachable::Port),
        Errno::EHOSTUNREACH | Errno::ENETUNREACH | Errno::EHOSTDOWN | Errno::ENONET | Errno::EACCES => {
            Some(Unreachable::Host)
        }
        Errno::ENOPROTOOPT => Some(Unreachable::Port),
        // Too long for the way: the kernel knows the MTU now, and makes fragments of the next.
        _ => None,
    }
}

/// Whether datagrams from an address can be answered: what claims to come from a group, from everybody or
/// from nobody cannot.
pub fn may_be_answered(client: SocketAddr) -> bool {
    let is_odd = match client {
        SocketAddr::V4(v4) => {
            let ip = *v4.ip();
            ip.is_multicast() || ip.is_broadcast() || ip == Ipv4Addr::UNSPECIFIED
        }
        SocketAddr::V6(v6) => v6.ip().is_multicast() || *v6.ip() == Ipv6Addr::UNSPECIFIED,
    };
    client.port() != 0 && !is_odd
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use nix::{
        poll::{PollFd, PollFlags, PollTimeout, poll},
        sys::socket::send,
    };

    use super::*;

    #[test]
    fn a_backend_that_does_not_listen_is_told_with_what_was_sent() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            // A port that was free a moment ago.
            let backend = UdpSocket::bind(address).unwrap().local_addr().unwrap();
            let socket = open(backend, None).unwrap();
            assert_eq!(trouble(&socket), None);
            send(socket.as_raw_fd(), b"hello", MsgFlags::empty()).unwrap();
            let mut waiting = [PollFd::new(std::os::fd::AsFd::as_fd(&socket), PollFlags::POLLIN)];
            assert_eq!(poll(&mut waiting, PollTimeout::from(5_000u16)), Ok(1));
            let expected = Trouble { why: Unreachable::Port, payload: b"hello".to_vec() };
            assert_eq!(trouble(&socket), Some(expected));
            assert_eq!(trouble(&socket), None);
        }
    }

    #[test]
    fn what_ends_a_session() {
        assert_eq!(means(Errno::ECONNREFUSED), Some(Unreachable::Port));
        assert_eq!(means(Errno::EHOSTUNREACH), Some(Unreachable::Host));
        for goes_on in [Errno::EMSGSIZE, Errno::EAGAIN, Errno::ENOBUFS] {
            assert_eq!(means(goes_on), None);
        }
        let verdict = |origin, error: i32| verdict(origin, error.cast_unsigned(), 1_400);
        assert_eq!(verdict(libc::SO_EE_ORIGIN_LOCAL, libc::EHOSTUNREACH), None);
        assert_eq!(verdict(libc::SO_EE_ORIGIN_LOCAL, libc::EMSGSIZE), None);
        for origin in [libc::SO_EE_ORIGIN_ICMP, libc::SO_EE_ORIGIN_ICMP6] {
            assert_eq!(verdict(origin, libc::EMSGSIZE), Some(Unreachable::TooBig(1_400)));
            assert_eq!(verdict(origin, libc::EHOSTUNREACH), Some(Unreachable::Host));
        }
        let ends = |why| Trouble { why, payload: Vec::new() }.ends_session();
        assert!(ends(Unreachable::Port) && ends(Unreachable::Host) && !ends(Unreachable::TooBig(1_400)));
    }

    #[test]
    fn whom_nobody_can_answer() {
        let may = |client: &str| may_be_answered(client.parse().unwrap());
        assert!(may("192.0.2.1:9") && may("[2001:db8::1]:9"));
        for odd in ["192.0.2.1:0", "0.0.0.0:9", "224.0.0.1:9", "255.255.255.255:9", "[::]:9", "[ff02::1]:9"] {
            assert!(!may(odd), "{odd}");
        }
    }
}
