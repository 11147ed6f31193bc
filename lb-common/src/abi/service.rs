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
/// Slots and flags share one aligned 8-byte word, which the kernel copies at once
/// (`bpf_long_memcpy` in kernel/bpf): a reader sees the old ones or the new ones, never a mixture.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(8))]
pub struct Service {
    /// Index of its first element in the array `slots`.
    pub first_slot: u32,
    /// Low 24 bits: the [number of its slots](Self::slot_count). High 8 bits: [`ServiceFlags`].
    pub count_and_flags: u32,
}
plain!(Service, size = 8, { first_slot: u32, count_and_flags: u32 });

/// Bits of [`Service::flags`].
#[derive(Clone, Copy, Debug)]
pub struct ServiceFlags;

impl ServiceFlags {
    /// Only clients that an entry of the source range maps covers may open connections.
    pub const SOURCE_RANGES: u8 = 1;
    /// A client's connections go to the backend that had its last one (session affinity).
    pub const AFFINITY: u8 = 2;
    /// A client may open so many connections as the element of `conn_limits` says.
    pub const CONNECTION_RATE: u8 = 16;
    /// The slots are a lookup table: a hash of the client says which one a connection gets.
    pub const MAGLEV: u8 = 4;
    /// A connection goes to the backend that has the fewest open ones for its weight. Each backend
    /// has one slot.
    pub const LEAST_CONNECTIONS: u8 = 8;
    /// The proxy serves it: packets of no known flow pass to the stack, where it listens. Flows that the
    /// datapath has go on.
    pub const PROXIED: u8 = 32;
    /// The proxy has served it, and has connections left: TCP segments of no known flow that begin none
    /// pass to the stack. What begins a connection is the datapath's.
    pub const PROXY_FINISHES: u8 = 64;
    /// The flags that say how connections are spread. At most one of them is set; none is in turn.
    pub const SCHEDULING: u8 = Self::MAGLEV | Self::LEAST_CONNECTIONS;
}

impl Service {
    /// Bits of the number of slots.
    const COUNT_BITS: u32 = 24;
    /// A Service entry has at most so many slots.
    pub const MAXIMUM_SLOTS: u32 = (1 << Self::COUNT_BITS) - 1;

    /// An entry; of `slot_count`, what exceeds [`Self::MAXIMUM_SLOTS`] is cut off.
    #[inline(always)]
    #[must_use]
    pub const fn new(first_slot: u32, slot_count: u32, flags: u8) -> Self {
        let slot_count = if slot_count > Self::MAXIMUM_SLOTS { Self::MAXIMUM_SLOTS } else { slot_count };
        Self { first_slot, count_and_flags: slot_count | (flags as u32) << Self::COUNT_BITS }
    }

    /// Number of its slots; 0 means that there is no backend, and connections are refused.
    #[inline(always)]
    #[must_use]
    pub const fn slot_count(self) -> u32 {
        self.count_and_flags & Self::MAXIMUM_SLOTS
    }

    /// Its [`ServiceFlags`].
    #[inline(always)]
    #[must_use]
    pub const fn flags(self) -> u8 {
        (self.count_and_flags >> Self::COUNT_BITS) as u8
    }

    /// Whether a flag is set.
    #[inline(always)]
    #[must_use]
    pub const fn has(self, flag: u8) -> bool {
        self.count_and_flags & (flag as u32) << Self::COUNT_BITS != 0
    }
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_and_flags_do_not_mix() {
        let both = ServiceFlags::SOURCE_RANGES | ServiceFlags::AFFINITY;
        for (count, flags) in [(0, 0), (0, both), (Service::MAXIMUM_SLOTS, 0), (7, ServiceFlags::AFFINITY)] {
            let service = Service::new(5, count, flags);
            assert_eq!((service.first_slot, service.slot_count(), service.flags()), (5, count, flags));
            assert_eq!(service.has(ServiceFlags::SOURCE_RANGES), flags & ServiceFlags::SOURCE_RANGES != 0);
            assert_eq!(service.has(ServiceFlags::AFFINITY), flags & ServiceFlags::AFFINITY != 0);
        }
        assert_eq!(Service::new(0, u32::MAX, 0), Service::new(0, Service::MAXIMUM_SLOTS, 0));
    }
}
