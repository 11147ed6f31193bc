//! Address families and next hops.

use super::{Plain, plain};

/// What differs between IPv4 and IPv6 in the layouts.
pub trait AddressFamily: Copy + 'static {
    /// An address as it is on the wire.
    type Address: Plain + Eq + core::fmt::Debug;
    /// What pads a [`CachedFlow`](super::CachedFlow) to whole cache lines.
    type Pad: Plain;
    /// 4 or 6, as in the version field of the IP header.
    const VERSION: u8;

    /// Reads an address from a 16-byte field; an IPv4 address is in its first four bytes.
    fn from_wide(wide: &[u8; 16]) -> Self::Address;
    /// Writes an address to a 16-byte field, the rest is zero.
    fn to_wide(address: &Self::Address) -> [u8; 16];
}

/// IPv4.
#[derive(Clone, Copy, Debug)]
pub struct V4;
/// IPv6.
#[derive(Clone, Copy, Debug)]
pub struct V6;

impl AddressFamily for V4 {
    type Address = [u8; 4];
    type Pad = [u8; 0];
    const VERSION: u8 = 4;

    #[inline(always)]
    fn from_wide(wide: &[u8; 16]) -> [u8; 4] {
        [wide[0], wide[1], wide[2], wide[3]]
    }

    #[inline(always)]
    fn to_wide(address: &[u8; 4]) -> [u8; 16] {
        let [a, b, c, d] = *address;
        [a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    }
}

impl AddressFamily for V6 {
    type Address = [u8; 16];
    type Pad = [u8; 16];
    const VERSION: u8 = 6;

    #[inline(always)]
    fn from_wide(wide: &[u8; 16]) -> [u8; 16] {
        *wide
    }

    #[inline(always)]
    fn to_wide(address: &[u8; 16]) -> [u8; 16] {
        *address
    }
}

/// Up to two VLAN tags as tag control information (IEEE 802.1Q), outer one first, big-endian each.
/// Zero is "no tag".
pub type VlanTags = [u8; 4];

/// Where a frame goes next: the device that it leaves by and its Ethernet addresses.
///
/// `ifindex` 0 means "not known".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(4))]
pub struct NextHop {
    /// Index of the device to send by; 0 if there is none yet.
    pub ifindex: u32,
    /// Ethernet destination address.
    pub destination_mac: [u8; 6],
    /// Ethernet source address.
    pub source_mac: [u8; 6],
    /// Tags that the frame carries when it leaves.
    pub vlan: VlanTags,
}
plain!(NextHop, size = 20, { ifindex: u32, destination_mac: [u8; 6], source_mac: [u8; 6], vlan: VlanTags });
