//! What is known of sockets on this node that were connected to a VIP: they talk to a backend, and
//! believe that they talk to the VIP.

use super::{Tick, plain};

/// What an entry of the map `sockets` tells. Stored as a `u8`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum SocketRole {
    /// Backend to VIP: what a socket is to take for the sender, or its peer.
    Reply = 0,
    /// VIP to backend: where a datagram socket's next datagram goes.
    Session = 1,
    /// VIP to backend: what the last connection of a network namespace had (session affinity). The
    /// number is the namespace's, not a socket's: a pod has one of its own.
    Affinity = 2,
}

/// Key of the map `sockets`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(C, align(8))]
pub struct SocketKey {
    /// The kernel's number of the socket (`bpf_get_socket_cookie`), or of the network namespace
    /// (`bpf_get_netns_cookie`); neither is used twice until the machine restarts.
    pub cookie: u64,
    /// A backend's address, or a VIP, as [`SocketRole`] says; an IPv4 address is in the first four
    /// bytes.
    pub address: [u8; 16],
    /// Its port, big-endian.
    pub port: [u8; 2],
    /// 4 or 6.
    pub family: u8,
    /// A [`SocketRole`].
    pub role: u8,
    /// IANA protocol number.
    pub protocol: u8,
    /// Zero.
    pub reserved: [u8; 3],
}
plain!(SocketKey, size = 32, {
    cookie: u64, address: [u8; 16], port: [u8; 2], family: u8, role: u8, protocol: u8, reserved: [u8; 3],
});

/// Value of the map `sockets`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(4))]
pub struct SocketPeer {
    /// The backend's address in a session, the VIP otherwise; an IPv4 address is in the first four bytes.
    pub address: [u8; 16],
    /// Its port, big-endian.
    pub port: [u8; 2],
    /// Zero.
    pub reserved: [u8; 2],
    /// Index of the Service entry.
    pub service: u32,
    /// Index of the backend.
    pub backend: u32,
    /// Its generation then: another endpoint that has the index by now is not meant.
    pub generation: u32,
    /// When the connection began: of affinity, the last one.
    pub last_used: Tick,
}
plain!(SocketPeer, size = 36, {
    address: [u8; 16], port: [u8; 2], reserved: [u8; 2], service: u32, backend: u32, generation: u32,
    last_used: Tick,
});
