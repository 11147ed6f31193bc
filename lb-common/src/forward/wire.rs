//! Headers as they are on the wire: byte arrays, so that any offset in a packet will do.

/// A header that can be looked at in place.
///
/// # Safety
/// The type has alignment 1, no padding, and every bit pattern is a value of it.
#[expect(unsafe_code, reason = "the marker is the promise that bytes may be read as the type")]
pub unsafe trait Wire: Copy + 'static {}

macro_rules! wire {
    ($(#[doc = $doc:literal] $name:ident, size = $size:literal { $($(#[doc = $field_doc:literal])? $field:ident: $bytes:ty,)+ })+) => {
        $(
            #[doc = $doc]
            #[derive(Clone, Copy, Debug)]
            #[repr(C)]
            pub struct $name { $($(#[doc = $field_doc])? pub $field: $bytes,)+ }
            const _: () = assert!(size_of::<$name>() == $size && align_of::<$name>() == 1);
            #[expect(unsafe_code, reason = "size and alignment are asserted above")]
            // SAFETY: made of byte arrays only, so alignment 1, no padding, no invalid values.
            unsafe impl Wire for $name {}
        )+
    };
}

wire! {
    /// Ethernet II header.
    Ethernet, size = 14 {
        /// Destination address.
        destination: [u8; 6],
        /// Source address.
        source: [u8; 6],
        /// EtherType.
        ether_type: [u8; 2],
    }
    /// A VLAN tag after its EtherType (IEEE 802.1Q).
    VlanTag, size = 4 {
        /// Priority, DEI, VLAN identifier.
        control: [u8; 2],
        /// EtherType of what follows.
        ether_type: [u8; 2],
    }
    /// IPv4 header without options (RFC 791).
    Ipv4, size = 20 {
        /// Version and header length in words.
        version_ihl: [u8; 1],
        /// DSCP and ECN.
        traffic_class: [u8; 1],
        /// Length of header and payload.
        total_length: [u8; 2],
        /// Identification.
        identification: [u8; 2],
        /// Flags and fragment offset.
        fragment: [u8; 2],
        /// Time to live.
        ttl: [u8; 1],
        /// Protocol.
        protocol: [u8; 1],
        /// Header checksum.
        checksum: [u8; 2],
        /// Source address.
        source: [u8; 4],
        /// Destination address.
        destination: [u8; 4],
    }
    /// IPv6 header (RFC 8200).
    Ipv6, size = 40 {
        /// Version, traffic class, flow label.
        version_class_label: [u8; 4],
        /// Length of all that follows this header.
        payload_length: [u8; 2],
        /// Next header.
        next_header: [u8; 1],
        /// Hop limit.
        hop_limit: [u8; 1],
        /// Source address.
        source: [u8; 16],
        /// Destination address.
        destination: [u8; 16],
    }
    /// The first bytes of any IPv6 extension header.
    Ipv6Extension, size = 8 {
        /// Next header.
        next_header: [u8; 1],
        /// Length in 8-byte units, the first not counted; reserved in a fragment header.
        length: [u8; 1],
        /// Fragment header: offset and flags.
        fragment: [u8; 2],
        /// Fragment header: identification.
        identification: [u8; 4],
    }
    /// TCP header without options (RFC 9293).
    Tcp, size = 20 {
        /// Source port.
        source_port: [u8; 2],
        /// Destination port.
        destination_port: [u8; 2],
        /// Sequence number.
        sequence: [u8; 4],
        /// Acknowledgment number.
        acknowledgment: [u8; 4],
        /// Header length in words (high four bits).
        data_offset: [u8; 1],
        /// Control bits.
        flags: [u8; 1],
        /// Window.
        window: [u8; 2],
        /// Checksum.
        checksum: [u8; 2],
        /// Urgent pointer.
        urgent: [u8; 2],
    }
    /// UDP header (RFC 768); its first half is that of TCP too.
    Udp, size = 8 {
        /// Source port.
        source_port: [u8; 2],
        /// Destination port.
        destination_port: [u8; 2],
        /// Length of header and payload.
        length: [u8; 2],
        /// Checksum; 0 is "none" over IPv4.
        checksum: [u8; 2],
    }
    /// ICMP and ICMPv6 header (RFC 792, RFC 4443).
    Icmp, size = 8 {
        /// Type.
        kind: [u8; 1],
        /// Code.
        code: [u8; 1],
        /// Checksum.
        checksum: [u8; 2],
        /// Depends on the type; the MTU of "fragmentation needed" and "packet too big" is here.
        rest: [u8; 4],
    }
    /// TCP timestamp option (RFC 7323).
    TimestampOption, size = 10 {
        /// Option kind and length.
        kind_length: [u8; 2],
        /// Value.
        value: [u8; 4],
        /// Echo reply.
        echo: [u8; 4],
    }
}

#[expect(unsafe_code, reason = "byte arrays are plain bytes of alignment 1")]
// SAFETY: alignment 1, no padding, no invalid values.
unsafe impl<const N: usize> Wire for [u8; N] {}

/// An Ethernet frame with IP and the first eight bytes of TCP or UDP, without tags or options.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Frame<I> {
    /// Ethernet header.
    pub ethernet: Ethernet,
    /// IP header.
    pub ip: I,
    /// Ports, and the UDP checksum.
    pub udp: Udp,
}

/// The same with a whole TCP header.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct TcpFrame<I> {
    /// Ethernet header.
    pub ethernet: Ethernet,
    /// IP header.
    pub ip: I,
    /// TCP header.
    pub tcp: Tcp,
}

#[expect(unsafe_code, reason = "made of wire types only")]
// SAFETY: `repr(C)` of types of alignment 1.
unsafe impl<I: Wire> Wire for Frame<I> {}
#[expect(unsafe_code, reason = "made of wire types only")]
// SAFETY: `repr(C)` of types of alignment 1.
unsafe impl<I: Wire> Wire for TcpFrame<I> {}

/// EtherType of IPv4.
pub const ETHER_TYPE_IPV4: [u8; 2] = [0x08, 0x00];
/// EtherType of IPv6.
pub const ETHER_TYPE_IPV6: [u8; 2] = [0x86, 0xdd];
/// EtherType of a VLAN tag (802.1Q).
pub const ETHER_TYPE_VLAN: [u8; 2] = [0x81, 0x00];
/// EtherType of a service VLAN tag (802.1ad).
pub const ETHER_TYPE_SERVICE_VLAN: [u8; 2] = [0x88, 0xa8];

/// TCP FIN.
pub const TCP_FIN: u8 = 0x01;
/// TCP SYN.
pub const TCP_SYN: u8 = 0x02;
/// TCP RST.
pub const TCP_RST: u8 = 0x04;
/// TCP ACK.
pub const TCP_ACK: u8 = 0x10;

/// Copies a MAC address in two steps: the BPF back end would copy six bytes one by one.
#[inline(always)]
pub fn copy_mac(to: &mut [u8; 6], from: &[u8; 6]) {
    let high = u32::from_ne_bytes([from[0], from[1], from[2], from[3]]).to_ne_bytes();
    let low = u16::from_ne_bytes([from[4], from[5]]).to_ne_bytes();
    [to[0], to[1], to[2], to[3]] = high;
    [to[4], to[5]] = low;
}
