//! Flows: the two directions of a connection are two entries that name each other.
//!
//! The key of an entry is the tuple as it comes in; its value is the tuple as it goes out, and all
//! that the rewrite needs. The key of the other direction follows from the value: outgoing
//! destination first, outgoing source second ([`FlowKey::reverse_of`]).

use super::{NextHop, Tick, plain};

/// A packet's tuple as seen on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(C, align(8))]
pub struct FlowKey<A> {
    /// Source port.
    pub source_port: [u8; 2],
    /// Destination port.
    pub destination_port: [u8; 2],
    /// IANA protocol number. A whole word, so that the key has no padding.
    pub protocol: u32,
    // Not in wire order: a compiler that copies the neighbours on the wire as one word would store it
    // across the alignment of the stack, which the verifier forbids.
    /// Source address.
    pub source: A,
    /// Destination address.
    pub destination: A,
}
plain!(FlowKey<[u8; 4]>, size = 16, {
    source_port: [u8; 2], destination_port: [u8; 2], protocol: u32, source: [u8; 4], destination: [u8; 4],
});
plain!(FlowKey<[u8; 16]>, size = 40, {
    source_port: [u8; 2], destination_port: [u8; 2], protocol: u32, source: [u8; 16], destination: [u8; 16],
});

impl<A: Copy> FlowKey<A> {
    /// The key of the packets that answer the ones a flow sends out.
    #[inline(always)]
    pub fn reverse_of(flow: &Flow<A>, protocol: u32) -> Self {
        Self {
            source: flow.new_destination,
            destination: flow.new_source,
            source_port: flow.new_destination_port,
            destination_port: flow.new_source_port,
            protocol,
        }
    }
}

/// Where a connection stands. Stored as a `u8`; an unknown value counts as [`Self::Free`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum FlowState {
    /// No connection: the entry may be taken over.
    Free = 0,
    /// TCP: the client's SYN was seen.
    SynSent = 1,
    /// TCP: the backend's SYN-ACK was seen.
    SynReceived = 2,
    /// TCP: the client's answer to the SYN-ACK was seen.
    Established = 3,
    /// TCP: the client has sent a FIN, the backend has not.
    ClientClosed = 4,
    /// TCP: the backend has sent a FIN, the client has not.
    BackendClosed = 5,
    /// TCP: both sides have sent a FIN.
    TimeWait = 6,
    /// TCP: one side has sent an RST.
    Reset = 7,
    /// UDP: only the client has sent.
    UdpUnreplied = 8,
    /// UDP: both sides have sent.
    UdpReplied = 9,
}

impl FlowState {
    /// Number of states.
    pub const COUNT: usize = 10;
    /// All states, in the order of their numbers.
    pub const ALL: [Self; Self::COUNT] = [
        Self::Free,
        Self::SynSent,
        Self::SynReceived,
        Self::Established,
        Self::ClientClosed,
        Self::BackendClosed,
        Self::TimeWait,
        Self::Reset,
        Self::UdpUnreplied,
        Self::UdpReplied,
    ];

    /// From the stored byte.
    #[inline(always)]
    #[must_use]
    pub fn from_raw(raw: u8) -> Self {
        match raw {
            1 => Self::SynSent,
            2 => Self::SynReceived,
            3 => Self::Established,
            4 => Self::ClientClosed,
            5 => Self::BackendClosed,
            6 => Self::TimeWait,
            7 => Self::Reset,
            8 => Self::UdpUnreplied,
            9 => Self::UdpReplied,
            _ => Self::Free,
        }
    }

    /// The name shown to people and used in metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Free => "free",
            Self::SynSent => "syn-sent",
            Self::SynReceived => "syn-received",
            Self::Established => "established",
            Self::ClientClosed => "client-closed",
            Self::BackendClosed => "backend-closed",
            Self::TimeWait => "time-wait",
            Self::Reset => "reset",
            Self::UdpUnreplied => "udp-unreplied",
            Self::UdpReplied => "udp-replied",
        }
    }

    /// Idle time in seconds after which a flow in this state may be forgotten, unless configured.
    #[must_use]
    pub const fn default_timeout_seconds(self) -> u32 {
        match self {
            Self::Free => 0,
            Self::SynSent => 120,
            Self::SynReceived | Self::TimeWait => 60,
            Self::Established => 86_400,
            // RFC 9293 lets the other direction send for as long as it likes.
            Self::ClientClosed | Self::BackendClosed => 3_600,
            Self::Reset => 10,
            Self::UdpUnreplied => 30,
            Self::UdpReplied => 120,
        }
    }
}

/// Bits of [`FlowStatus::flags`].
pub struct FlowFlags;

impl FlowFlags {
    /// The entry is for packets from the backend to the client.
    pub const REPLY: u8 = 1;
    /// `timestamp_delta` is not 0: every packet needs its TCP timestamp edited.
    pub const EDIT_TIMESTAMPS: u8 = 2;
    /// `mark` of a reply entry holds a TCP timestamp (otherwise a sequence number).
    pub const MARK_IS_TIMESTAMP: u8 = 4;
    /// The backend is on this node: its stack gets the packets, and replies are translated where
    /// they leave the node.
    pub const LOCAL: u8 = 8;
    /// Reply entries of local backends: the backend was seen to use the tuple for a connection of
    /// which we know nothing. Its packets pass untouched, and no other flow gets the tuple.
    pub const FOREIGN: u8 = 16;
    /// Reply entries: the client's packets come in by TC, and XDP may not be able to send by the device
    /// that they come in by: it leaves the replies to TC, too.
    pub const TC: u8 = 32;
    /// The client was answered with a SYN cookie, before there was a backend: every packet needs its
    /// TCP sequence or acknowledgment number edited. `timestamp_delta` is what is added to the
    /// backend's sequence numbers; such flows have no timestamps.
    pub const EDIT_SEQUENCE: u8 = 64;
    /// Reply entries: when the kernel was asked for the way to the client last, it knew none, and packets
    /// go on by the one before. It is asked again once a second.
    pub const OLD_WAY: u8 = 128;
}

/// State and flags of a flow in one word, so that it can be compared and swapped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(4))]
pub struct FlowStatus {
    /// A [`FlowState`].
    pub state: u8,
    /// [`FlowFlags`].
    pub flags: u8,
    /// Changes whenever the entry is taken over, so that two takers cannot both succeed.
    pub epoch: u16,
}
plain!(FlowStatus, size = 4, { state: u8, flags: u8, epoch: u16 });

/// One direction of a connection: value of the flow maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(8))]
pub struct Flow<A> {
    /// Source address that the packet leaves with.
    pub new_source: A,
    /// Destination address that the packet leaves with.
    pub new_destination: A,
    /// Source port that the packet leaves with.
    pub new_source_port: [u8; 2],
    /// Destination port that the packet leaves with.
    pub new_destination_port: [u8; 2],
    /// What the edit adds to the IPv4 header checksum, TTL included: a folded one's complement sum
    /// of 16-bit words loaded in native order (RFC 1624). 0 for IPv6.
    pub l3_checksum_delta: u16,
    /// The same for the TCP or UDP checksum.
    pub l4_checksum_delta: u16,
    /// Reply entries: the way to the client. In the other direction, where the backend's entry holds
    /// the way, its `vlan` is [`Self::initial_sequence`], and all else is unused.
    pub next_hop: NextHop,
    /// Index in the array `backends`.
    pub backend: u32,
    /// Index in the array `services`.
    pub service: u32,
    /// The time of the last packet.
    pub last_seen: Tick,
    /// State, flags, epoch.
    pub status: FlowStatus,
    /// To the backend: the backend's generation. Reply entries: the route generation under which
    /// `next_hop` was found; 0 if it was not looked up yet.
    pub generation: u32,
    /// What is added to the client's TCP timestamps (and subtracted from their echo). With
    /// [`FlowFlags::EDIT_SEQUENCE`], what is added to the backend's sequence numbers (and subtracted
    /// from their acknowledgment); until the backend has one, its initial number counts as the client's.
    pub timestamp_delta: u32,
    /// To the backend: the backend's initial sequence number until the connection is established,
    /// then a recent sequence number of the client (TCP); the time of the first packet (UDP). With a SYN cookie, the client's initial sequence number until the
    /// backend's is known; the cookie is `mark + timestamp_delta` until the connection is established, and
    /// the `mark` of the reply entry. Reply entries: the client's last timestamp or
    /// sequence number as the backend saw it, for whoever uses the port next.
    pub mark: u32,
}
plain!(Flow<[u8; 4]>, size = 64, {
    new_source: [u8; 4], new_destination: [u8; 4], new_source_port: [u8; 2], new_destination_port: [u8; 2],
    l3_checksum_delta: u16, l4_checksum_delta: u16, next_hop: NextHop, backend: u32, service: u32,
    last_seen: Tick, status: FlowStatus, generation: u32, timestamp_delta: u32, mark: u32,
});
plain!(Flow<[u8; 16]>, size = 88, {
    new_source: [u8; 16], new_destination: [u8; 16], new_source_port: [u8; 2], new_destination_port: [u8; 2],
    l3_checksum_delta: u16, l4_checksum_delta: u16, next_hop: NextHop, backend: u32, service: u32,
    last_seen: Tick, status: FlowStatus, generation: u32, timestamp_delta: u32, mark: u32,
});

impl<A> Flow<A> {
    /// The state.
    #[inline(always)]
    pub fn state(&self) -> FlowState {
        FlowState::from_raw(self.status.state)
    }

    /// To the backend: the initial sequence number that the client's connection began with; 0 if it is
    /// not known. Of use until the connection is established.
    #[inline(always)]
    pub fn initial_sequence(&self) -> u32 {
        u32::from_ne_bytes(self.next_hop.vlan)
    }

    /// Sets [`Self::initial_sequence`].
    #[inline(always)]
    pub fn set_initial_sequence(&mut self, sequence: u32) {
        self.next_hop.vlan = sequence.to_ne_bytes();
    }

    /// Whether the backend is on this node.
    #[inline(always)]
    pub fn is_local(&self) -> bool {
        self.status.flags & FlowFlags::LOCAL != 0
    }

    /// Whether the entry is for packets from the backend to the client.
    #[inline(always)]
    pub fn is_reply(&self) -> bool {
        self.status.flags & FlowFlags::REPLY != 0
    }
}

/// What the fragments of one datagram have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C, align(8))]
pub struct FragmentKey<A> {
    /// Source address.
    pub source: A,
    /// Destination address.
    pub destination: A,
    /// Identification as on the wire; 16 bits (zero-extended) for IPv4, 32 for IPv6.
    pub identification: [u8; 4],
    /// IANA protocol number.
    pub protocol: u32,
}
plain!(FragmentKey<[u8; 4]>, size = 16, {
    source: [u8; 4], destination: [u8; 4], identification: [u8; 4], protocol: u32,
});
plain!(FragmentKey<[u8; 16]>, size = 40, {
    source: [u8; 16], destination: [u8; 16], identification: [u8; 4], protocol: u32,
});

/// What the first fragment of a datagram left for the others: value of the fragment maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(8))]
pub struct Fragment<A> {
    /// Key of the flow that the datagram belongs to.
    pub flow: FlowKey<A>,
    /// The time of the first fragment.
    pub created: Tick,
    /// Zero.
    pub reserved: [u8; 4],
}
plain!(Fragment<[u8; 4]>, size = 24, { flow: FlowKey<[u8; 4]>, created: Tick, reserved: [u8; 4] });
plain!(Fragment<[u8; 16]>, size = 48, { flow: FlowKey<[u8; 16]>, created: Tick, reserved: [u8; 4] });
