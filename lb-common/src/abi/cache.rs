//! The flow cache: what a packet in the middle of an established connection needs, in one place that
//! is found without a search.

use super::{Tick, plain};

/// A direction of an established flow: element of the arrays `flow_cache_v4` and `flow_cache_v6`, of
/// which each CPU has a part of its own. `P` pads it to whole cache lines: one for IPv4, two for IPv6.
///
/// All bytes zero is nobody's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(8))]
pub struct CachedFlow<A, P> {
    /// Source address as it comes in.
    pub source: A,
    /// Destination address as it comes in.
    pub destination: A,
    /// Source port as it comes in.
    pub source_port: [u8; 2],
    /// Destination port as it comes in.
    pub destination_port: [u8; 2],
    /// Source address that the packet leaves with.
    pub new_source: A,
    /// Destination address that the packet leaves with.
    pub new_destination: A,
    /// Source port that the packet leaves with.
    pub new_source_port: [u8; 2],
    /// Destination port that the packet leaves with.
    pub new_destination_port: [u8; 2],
    /// As in [`Flow`](super::Flow).
    pub l3_checksum_delta: u16,
    /// As in [`Flow`](super::Flow).
    pub l4_checksum_delta: u16,
    /// As in [`Flow`](super::Flow): of the backend, or of the routes.
    pub generation: u32,
    /// Replies: Ethernet destination address. In the other direction the backend's entry has the way.
    pub destination_mac: [u8; 6],
    /// Replies: Ethernet source address.
    pub source_mac: [u8; 6],
    /// Replies: index of the device.
    pub ifindex: u32,
    /// Index in the array `backends`.
    pub backend: u32,
    /// Index in the array `services`.
    pub service: u32,
    /// When it was copied from the flow table, in jiffies.
    pub copied: u32,
    /// The low bits of the element of `flow_versions` then.
    pub version: u16,
    /// TCP, to the backend: the highest byte of a sequence number of about then.
    pub sequence: u8,
    /// IANA protocol number, [`CachedFlow::REPLY`] and [`CachedFlow::HELD`].
    pub kind: u8,
    /// Zero.
    pub pad: P,
}
plain!(CachedFlow<[u8; 4], [u8; 0]>, size = 64, {
    source: [u8; 4], destination: [u8; 4], source_port: [u8; 2], destination_port: [u8; 2],
    new_source: [u8; 4], new_destination: [u8; 4], new_source_port: [u8; 2], new_destination_port: [u8; 2],
    l3_checksum_delta: u16, l4_checksum_delta: u16, generation: u32, destination_mac: [u8; 6],
    source_mac: [u8; 6], ifindex: u32, backend: u32, service: u32, copied: u32, version: u16,
    sequence: u8, kind: u8, pad: [u8; 0],
});
plain!(CachedFlow<[u8; 16], [u8; 16]>, size = 128, {
    source: [u8; 16], destination: [u8; 16], source_port: [u8; 2], destination_port: [u8; 2],
    new_source: [u8; 16], new_destination: [u8; 16], new_source_port: [u8; 2], new_destination_port: [u8; 2],
    l3_checksum_delta: u16, l4_checksum_delta: u16, generation: u32, destination_mac: [u8; 6],
    source_mac: [u8; 6], ifindex: u32, backend: u32, service: u32, copied: u32, version: u16,
    sequence: u8, kind: u8, pad: [u8; 16],
});

impl<A, P> CachedFlow<A, P> {
    /// In `kind`: the packets come from the backend.
    pub const REPLY: u8 = 0x80;

    /// In `kind`, a number of two bits: as many packets of other flows that come to the place leave the copy
    /// there.
    pub const HELD: u8 = 0x60;

    /// One of [`Self::HELD`].
    pub const HELD_ONCE: u8 = 0x20;

    /// In `kind`: the protocol number, TCP's or UDP's.
    pub const PROTOCOL: u8 = 0x1f;

    /// A copy of no flow; `address` is any address.
    pub const fn nobodys(address: A, pad: P) -> Self
    where
        A: Copy,
        P: Copy,
    {
        Self {
            source: address,
            destination: address,
            source_port: [0; 2],
            destination_port: [0; 2],
            new_source: address,
            new_destination: address,
            new_source_port: [0; 2],
            new_destination_port: [0; 2],
            l3_checksum_delta: 0,
            l4_checksum_delta: 0,
            generation: 0,
            destination_mac: [0; 6],
            source_mac: [0; 6],
            ifindex: 0,
            backend: 0,
            service: 0,
            copied: 0,
            version: 0,
            sequence: 0,
            kind: 0,
            pad,
        }
    }
}

/// Binary logarithm of the number of elements of `flow_versions`: a flow's is named by the highest
/// bits of its hash.
pub const FLOW_VERSION_BITS: u32 = 11;

/// For how many jiffies a copy is good, and so for how long the flow table may not hear of a flow's
/// packets: 0.1 to 1 s, depending on the kernel's `CONFIG_HZ` (1000 to 100).
pub const CACHE_JIFFIES: u32 = 100;

/// The same in ticks, for the slowest kernel.
pub const CACHE_TICKS: Tick = super::ticks_from_seconds(1);
