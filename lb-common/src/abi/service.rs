//! VIPs and Services.

use super::plain;

/// Key of the VIP maps: what a client connects to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C, align(4))]
pub struct VipKey<A> {
    /// Destination address on the wire.
    pub address: A,
    /// Destination port on the wire.
    pub port: [u8; 2],
    /// [`IPPROTO_TCP`](super::IPPROTO_TCP) or [`IPPROTO_UDP`](super::IPPROTO_UDP).
    pub protocol: u8,
    /// Zero.
    pub reserved: u8,
}
plain!(VipKey<[u8; 4]>, size = 8, { address: [u8; 4], port: [u8; 2], protocol: u8, reserved: u8 });
plain!(VipKey<[u8; 16]>, size = 20, { address: [u8; 16], port: [u8; 2], protocol: u8, reserved: u8 });

impl<A> VipKey<A> {
    /// The key for an address, port and protocol.
    #[inline(always)]
    pub fn new(address: A, port: [u8; 2], protocol: u8) -> Self {
        Self { address, port, protocol, reserved: 0 }
    }
}

/// One port of one VIP of a Kubernetes Service: an element of the array `services`. The VIP maps
/// give its index.
///
/// `first_slot` and `slot_count` share one aligned 8-byte word, which the kernel copies at once
/// (`bpf_long_memcpy` in kernel/bpf): a reader sees the old slots or the new ones, never a mixture.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(8))]
pub struct Service {
    /// Index of its first element in the array `slots`.
    pub first_slot: u32,
    /// Number of its slots; 0 means that there is no backend, and connections are refused.
    pub slot_count: u32,
}
plain!(Service, size = 8, { first_slot: u32, slot_count: u32 });

/// Who a Service entry belongs to, for people and for the agent after its restart: element of the
/// array `service_names`, which the kernel never reads. An entry with an empty name is free.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(4))]
pub struct ServiceName {
    /// Namespace, NUL-padded.
    pub namespace: [u8; 64],
    /// Name, NUL-padded.
    pub name: [u8; 64],
    /// Name of the Service's port (may be empty), NUL-padded.
    pub port_name: [u8; 64],
    /// The VIP; an IPv4 address is in the first four bytes.
    pub address: [u8; 16],
    /// The VIP's port, big-endian.
    pub port: [u8; 2],
    /// IANA protocol number.
    pub protocol: u8,
    /// 4 or 6.
    pub family: u8,
}
plain!(ServiceName, size = 212, {
    namespace: [u8; 64], name: [u8; 64], port_name: [u8; 64],
    address: [u8; 16], port: [u8; 2], protocol: u8, family: u8,
});

impl Default for ServiceName {
    fn default() -> Self {
        Self {
            namespace: [0; 64],
            name: [0; 64],
            port_name: [0; 64],
            address: [0; 16],
            port: [0; 2],
            protocol: 0,
            family: 0,
        }
    }
}
