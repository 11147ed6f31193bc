//! What differs between IPv4 and IPv6 in the forwarding core.

use super::checksum::{self, Delta, TTL_DECREMENT};
use super::schedule::mix;
use super::wire::{Ipv4, Ipv6, Wire};
use crate::abi::{AddressFamily, IPPROTO_ICMP, IPPROTO_ICMPV6, V4, V6};

/// An address family with its header.
pub trait IpFamily: AddressFamily {
    /// The fixed part of the header.
    type Header: IpHeader<Self::Address>;
    /// Length of the fixed part in bytes.
    const HEADER_LENGTH: usize;
    /// Protocol number of the ICMP of this family.
    const ICMP: u8;

    /// The sum of the words of an address.
    fn sum(address: &Self::Address) -> u32;
    /// A hash of an address: the same on every machine.
    fn hash(address: &Self::Address) -> u32;
    /// All bits of an address in one word, for hashing.
    fn word(address: &Self::Address) -> u64;
    /// What replacing one address with another adds to a sum.
    fn replaced(old: &Self::Address, new: &Self::Address) -> u32;
    /// What a hop adds to the sum of a packet: nothing in IPv4, whose header checksum balances it.
    fn hop_in_sum() -> u32;
    /// Whether an address is one that an error may be sent to (RFC 1122, section 3.2.2).
    fn may_be_answered(source: &Self::Address) -> bool;
    /// Takes from an address what one client has many of: for IPv6, the interface identifier, since
    /// whoever has a network of 64 bits has all of its addresses (RFC 4291, section 2.5.1).
    fn keep_network(address: &mut Self::Address);
    /// Writes a whole header for a packet of our own. `payload` is the number of bytes after it.
    fn write_header(
        header: &mut Self::Header,
        source: &Self::Address,
        destination: &Self::Address,
        protocol: u8,
        payload: u16,
    );
}

/// TTL and hop limit of packets of our own: the default of Linux.
const OWN_HOPS: u8 = 64;

/// The fixed part of an IP header.
pub trait IpHeader<A>: Wire {
    /// Version, length and fragment fields are those of a packet without options or extension
    /// headers that is no fragment, and whose length fits into `available` bytes and has room for
    /// `payload` bytes after the header.
    fn is_plain(&self, available: usize, payload: usize) -> bool;
    /// Protocol, or next header.
    fn protocol(&self) -> u8;
    /// TTL, or hop limit.
    fn hops_left(&self) -> u8;
    /// Source address.
    fn source(&self) -> A;
    /// Destination address.
    fn destination(&self) -> A;
    /// Replaces the addresses, and nothing else.
    fn readdress(&mut self, source: &A, destination: &A);
    /// Replaces the addresses, and adds a delta that counts a hop to the header checksum, without
    /// the hop: the node's own stack takes it off.
    fn deliver(&mut self, source: &A, destination: &A, checksum_delta: Delta);
    /// Takes hops off, and adds a delta to the header checksum.
    fn spend(&mut self, hops: u8, checksum_delta: Delta);
    /// Replaces the addresses, takes one hop off, and adds a delta to the header checksum.
    fn forward(&mut self, source: &A, destination: &A, checksum_delta: Delta);
}

impl IpFamily for V4 {
    type Header = Ipv4;
    const HEADER_LENGTH: usize = 20;
    const ICMP: u8 = IPPROTO_ICMP;

    #[inline(always)]
    fn sum(address: &[u8; 4]) -> u32 {
        checksum::sum(address)
    }

    #[inline(always)]
    fn hash(address: &[u8; 4]) -> u32 {
        mix(0, u32::from_be_bytes(*address))
    }

    #[inline(always)]
    fn word(address: &[u8; 4]) -> u64 {
        u32::from_ne_bytes(*address).into()
    }

    #[inline(always)]
    fn replaced(old: &[u8; 4], new: &[u8; 4]) -> u32 {
        checksum::replaced(old, new)
    }

    #[inline(always)]
    fn hop_in_sum() -> u32 {
        0
    }

    #[inline(always)]
    fn may_be_answered(source: &[u8; 4]) -> bool {
        !matches!(source[0], 0 | 127 | 224..=255)
    }

    #[inline(always)]
    fn keep_network(_address: &mut [u8; 4]) {}

    #[inline(always)]
    fn write_header(header: &mut Ipv4, source: &[u8; 4], destination: &[u8; 4], protocol: u8, payload: u16) {
        *header = Ipv4 {
            version_ihl: [0x45],
            traffic_class: [0],
            total_length: (payload + 20).to_be_bytes(),
            identification: [0; 2],
            // Do not fragment: so an identification of 0 is allowed (RFC 6864).
            fragment: [0x40, 0],
            ttl: [OWN_HOPS],
            protocol: [protocol],
            checksum: [0; 2],
            source: *source,
            destination: *destination,
        };
        let total = checksum::sum(&[0x45, 0])
            + checksum::sum(&header.total_length)
            + checksum::sum(&header.fragment)
            + checksum::sum(&[OWN_HOPS, protocol])
            + checksum::sum(source)
            + checksum::sum(destination);
        header.checksum = (!checksum::fold(total)).to_ne_bytes();
    }
}

impl IpFamily for V6 {
    type Header = Ipv6;
    const HEADER_LENGTH: usize = 40;
    const ICMP: u8 = IPPROTO_ICMPV6;

    #[inline(always)]
    fn sum(address: &[u8; 16]) -> u32 {
        checksum::sum(address)
    }

    #[inline(always)]
    fn hash(address: &[u8; 16]) -> u32 {
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = *address;
        let upper = mix(mix(0, u32::from_be_bytes([a, b, c, d])), u32::from_be_bytes([e, f, g, h]));
        mix(mix(upper, u32::from_be_bytes([i, j, k, l])), u32::from_be_bytes([m, n, o, p]))
    }

    #[inline(always)]
    fn word(address: &[u8; 16]) -> u64 {
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = *address;
        let high = u64::from_ne_bytes([a, b, c, d, e, f, g, h]);
        let low = u64::from_ne_bytes([i, j, k, l, m, n, o, p]);
        // Both halves in all bits: networks differ in the one, hosts in the other.
        (high ^ low.rotate_right(29)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }

    #[inline(always)]
    fn replaced(old: &[u8; 16], new: &[u8; 16]) -> u32 {
        // In words of 32 bits, whose sum is the same one (RFC 1071, section 2 C): LLVM keeps all words of
        // both addresses on the stack, and there is not enough of it for sixteen.
        let total = words(new) + (4 * u64::from(u32::MAX) - words(old));
        ((total & 0xffff) + (total >> 16 & 0xffff) + (total >> 32)) as u32
    }

    #[inline(always)]
    fn hop_in_sum() -> u32 {
        // The hop limit is the second byte of its word.
        u32::from(!u16::from_ne_bytes([0, 1]))
    }

    #[inline(always)]
    fn may_be_answered(source: &[u8; 16]) -> bool {
        // Neither multicast nor of ::/64, which holds the unspecified and the loopback address.
        let [a, b, c, d, e, f, g, h, ..] = *source;
        a != 0xff && u64::from_ne_bytes([a, b, c, d, e, f, g, h]) != 0
    }

    #[inline(always)]
    fn keep_network(address: &mut [u8; 16]) {
        address[8..].fill(0);
    }

    #[inline(always)]
    fn write_header(
        header: &mut Ipv6,
        source: &[u8; 16],
        destination: &[u8; 16],
        protocol: u8,
        payload: u16,
    ) {
        *header = Ipv6 {
            version_class_label: [0x60, 0, 0, 0],
            payload_length: payload.to_be_bytes(),
            next_header: [protocol],
            hop_limit: [OWN_HOPS],
            source: *source,
            destination: *destination,
        };
    }
}

/// The sum of an address' words of 32 bits.
#[inline(always)]
fn words(address: &[u8; 16]) -> u64 {
    let (words, _) = address.as_chunks::<4>();
    let [a, b, c, d] = words else { return 0 };
    let word = |bytes: &[u8; 4]| u64::from(u32::from_ne_bytes(*bytes));
    word(a) + word(b) + word(c) + word(d)
}

/// More fragments, or a fragment offset, in native order of the loaded field.
const FRAGMENT_BITS: u16 = u16::from_ne_bytes([0x3f, 0xff]);

impl IpHeader<[u8; 4]> for Ipv4 {
    #[inline(always)]
    fn is_plain(&self, available: usize, payload: usize) -> bool {
        let total = usize::from(u16::from_be_bytes(self.total_length));
        self.version_ihl == [0x45]
            && u16::from_ne_bytes(self.fragment) & FRAGMENT_BITS == 0
            && total <= available
            && total >= 20 + payload
    }

    #[inline(always)]
    fn protocol(&self) -> u8 {
        self.protocol[0]
    }

    #[inline(always)]
    fn hops_left(&self) -> u8 {
        self.ttl[0]
    }

    #[inline(always)]
    fn source(&self) -> [u8; 4] {
        self.source
    }

    #[inline(always)]
    fn destination(&self) -> [u8; 4] {
        self.destination
    }

    #[inline(always)]
    fn readdress(&mut self, source: &[u8; 4], destination: &[u8; 4]) {
        self.source = *source;
        self.destination = *destination;
    }

    #[inline(always)]
    fn deliver(&mut self, source: &[u8; 4], destination: &[u8; 4], checksum_delta: Delta) {
        self.readdress(source, destination);
        let without_hop = checksum::fold(u32::from(checksum_delta) + u32::from(!TTL_DECREMENT));
        checksum::apply(&mut self.checksum, without_hop);
    }

    #[inline(always)]
    fn spend(&mut self, hops: u8, checksum_delta: Delta) {
        self.ttl = [self.ttl[0].wrapping_sub(hops)];
        checksum::apply(&mut self.checksum, checksum_delta);
    }

    #[inline(always)]
    fn forward(&mut self, source: &[u8; 4], destination: &[u8; 4], checksum_delta: Delta) {
        self.ttl = [self.ttl[0].wrapping_sub(1)];
        self.source = *source;
        self.destination = *destination;
        checksum::apply(&mut self.checksum, checksum_delta);
    }
}

impl IpHeader<[u8; 16]> for Ipv6 {
    #[inline(always)]
    fn is_plain(&self, available: usize, payload: usize) -> bool {
        let length = usize::from(u16::from_be_bytes(self.payload_length));
        self.version_class_label[0] >> 4 == 6 && length + 40 <= available && length >= payload
    }

    #[inline(always)]
    fn protocol(&self) -> u8 {
        self.next_header[0]
    }

    #[inline(always)]
    fn hops_left(&self) -> u8 {
        self.hop_limit[0]
    }

    #[inline(always)]
    fn source(&self) -> [u8; 16] {
        self.source
    }

    #[inline(always)]
    fn destination(&self) -> [u8; 16] {
        self.destination
    }

    #[inline(always)]
    fn readdress(&mut self, source: &[u8; 16], destination: &[u8; 16]) {
        self.source = *source;
        self.destination = *destination;
    }

    #[inline(always)]
    fn deliver(&mut self, source: &[u8; 16], destination: &[u8; 16], _checksum_delta: Delta) {
        self.readdress(source, destination);
    }

    #[inline(always)]
    fn spend(&mut self, hops: u8, _checksum_delta: Delta) {
        self.hop_limit = [self.hop_limit[0].wrapping_sub(hops)];
    }

    #[inline(always)]
    fn forward(&mut self, source: &[u8; 16], destination: &[u8; 16], _checksum_delta: Delta) {
        self.hop_limit = [self.hop_limit[0].wrapping_sub(1)];
        self.source = *source;
        self.destination = *destination;
    }
}
