//! Backends.

use super::{NextHop, plain};

/// Whether a backend takes part. Stored as a `u8`; an unknown value counts as [`Self::Free`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum BackendState {
    /// The entry is not in use. Flows that point here are refused.
    Free = 0,
    /// In use: has slots, takes new connections.
    Active = 1,
    /// Has no slots any more, but keeps its established connections.
    Terminating = 2,
}

impl BackendState {
    /// From the stored byte.
    #[must_use]
    pub fn from_raw(raw: u8) -> Self {
        match raw & !Backend::FOR_TC {
            1 => Self::Active,
            2 => Self::Terminating,
            _ => Self::Free,
        }
    }
}

/// Bits of [`Backend::flags`].
pub struct BackendFlags;

impl BackendFlags {
    /// The endpoint is on this node: packets are handed to the node's own stack, with the client's
    /// address, and replies are translated where they leave the node.
    pub const LOCAL: u8 = 1;
}

/// One endpoint of one Service entry: an element of the array `backends`. Element 0 is never used.
///
/// One cache line: a packet from a client to its backend reads this entry and no other for the way
/// out. `generation` changes whenever the entry is given to another endpoint, so that a flow of
/// the earlier one cannot be mistaken for a flow of the later.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(8))]
pub struct Backend {
    /// Address of the endpoint; an IPv4 address is in the first four bytes.
    pub address: [u8; 16],
    /// Port of the endpoint, big-endian.
    pub port: [u8; 2],
    /// A [`BackendState`], and [`Backend::FOR_TC`].
    pub state: u8,
    /// 4 or 6.
    pub family: u8,
    /// Compared with the generation in the flow.
    pub generation: u32,
    /// Index of the Service entry that it belongs to.
    pub service: u32,
    /// Index of the first source address towards this endpoint in the array `snat_addresses`.
    pub snat_first: u16,
    /// Number of source addresses; 0 means that none is known, and new connections are dropped.
    pub snat_count: u16,
    /// Kept current by the agent; `ifindex` 0 until the neighbour is resolved.
    pub next_hop: NextHop,
    /// Share of new connections relative to the Service's other backends. Slots carry it out, but for
    /// least connections, which compares by it.
    pub weight: u32,
    /// [`BackendFlags`].
    pub flags: u8,
    /// Zero.
    pub reserved: u8,
    /// The largest IP packet that the way to the endpoint takes, in bytes; 0 if it is not known.
    pub mtu: u16,
    /// Zero.
    pub reserved_end: [u8; 4],
}
plain!(Backend, size = 64, {
    address: [u8; 16], port: [u8; 2], state: u8, family: u8, generation: u32, service: u32,
    snat_first: u16, snat_count: u16, next_hop: NextHop, weight: u32, flags: u8,
    reserved: u8, mtu: u16, reserved_end: [u8; 4],
});

impl Backend {
    /// In `state`: the endpoint is behind a device that XDP cannot send by. XDP passes its packets,
    /// and the TC program on the same device goes on with them. Not among the flags, so that one
    /// comparison tells whether a packet can go out.
    pub const FOR_TC: u8 = 0x80;

    /// Whether the endpoint is in use, and a program that can, or cannot, send by any device can send
    /// to it.
    #[inline(always)]
    #[must_use]
    pub fn takes_packets(&self, by_any_device: bool) -> bool {
        let limit = if by_any_device { u8::MAX } else { Self::FOR_TC - 1 };
        self.state.wrapping_sub(1) < limit
    }

    /// Whether the endpoint is on this node.
    #[inline(always)]
    #[must_use]
    pub fn is_local(&self) -> bool {
        self.flags & BackendFlags::LOCAL != 0
    }
}
