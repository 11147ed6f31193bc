//! What is under construction while a packet takes the slow path.

use super::cookie::Handshake;
use super::emit::Parsed;
use super::parse::{Ip, Link, Part, Transport};
use super::schedule::Best;
use super::segment::Segment;
use super::tcp_options::Timestamp;
use super::wire::Tcp;
use crate::abi::{
    Affinity, AffinityKey, ConnectionRate, Flow, FlowKey, FlowStatus, Fragment, FragmentKey, NextHop,
    Service, SourceRange, SourceRangeKey, VipKey,
};

/// Everything that is too large for the stack of a kernel program. All bytes zero is a valid value.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
pub struct Scratch<A> {
    /// The packet.
    pub parsed: Parsed<A>,
    /// The packet that an ICMP error quotes.
    pub quote: Ip<A>,
    /// The packet's tuple.
    pub key: FlowKey<A>,
    /// The tuple of the other direction as it comes in.
    pub peer_key: FlowKey<A>,
    /// The tuple as it goes out.
    pub out: FlowKey<A>,
    /// An entry to be inserted.
    pub flow: Flow<A>,
    /// Key of a note for fragments.
    pub fragment_key: FragmentKey<A>,
    /// The note.
    pub fragment: Fragment<A>,
    /// What the client connects to.
    pub vip: VipKey<A>,
    /// The client, as the source ranges name it.
    pub source: SourceRangeKey<A>,
    /// The client, as the affinity maps and the connection rate maps name it.
    pub affinity_key: AffinityKey<A>,
    /// What is to be remembered of it; nothing if the backend is 0.
    pub affinity: Affinity,
    /// What a new client has used of its limit.
    pub connection_rate: ConnectionRate,
    /// The best backend so far, where they are compared.
    pub best: Best,
    /// The Service entry of a new flow.
    pub service: Service,
    /// The TCP timestamp of the packet.
    pub timestamp: Timestamp,
    /// What a SYN cookie that came back says of the connection; all zero without one.
    pub handshake: Handshake,
    /// A TCP header to make or check a cookie for.
    pub tcp: Tcp,
    /// A segment to be written over the packet.
    pub segment: Segment,
    /// A slot for [`Datapath::forget`](super::platform::Datapath::forget).
    pub cursor: usize,
    /// How the packet is refused, if it is.
    pub refusal: usize,
    /// What is to happen to the packet, while its flow is being looked after.
    pub verdict: usize,
    /// Where the packet goes.
    pub hop: NextHop,
    /// The largest IP packet that can go there; 0 if that is not known.
    pub mtu: u16,
}

impl<A: Copy> Scratch<A> {
    /// An empty one; `address` is any address.
    #[expect(clippy::too_many_lines, reason = "one field after the other")]
    pub fn new(address: A) -> Self {
        let key = FlowKey {
            source: address,
            destination: address,
            source_port: [0; 2],
            destination_port: [0; 2],
            protocol: 0,
        };
        let ip = Ip {
            l3: 0,
            l4: 0,
            end: 0,
            fragment_header: 0,
            source: address,
            destination: address,
            protocol: 0,
            hops_left: 0,
            part: Part::Whole,
        };
        Self {
            parsed: Parsed {
                link: Link { ether_type: [0; 2], l3: 0, vlan: [0; 4] },
                ip,
                transport: Transport::default(),
            },
            quote: ip,
            key,
            peer_key: key,
            out: key,
            flow: Flow {
                new_source: address,
                new_destination: address,
                new_source_port: [0; 2],
                new_destination_port: [0; 2],
                l3_checksum_delta: 0,
                l4_checksum_delta: 0,
                next_hop: NextHop::default(),
                backend: 0,
                service: 0,
                last_seen: 0,
                status: FlowStatus::default(),
                generation: 0,
                timestamp_delta: 0,
                mark: 0,
            },
            fragment_key: FragmentKey {
                source: address,
                destination: address,
                identification: [0; 4],
                protocol: 0,
            },
            fragment: Fragment { flow: key, created: 0, reserved: [0; 4] },
            vip: VipKey::new(address, [0; 2], 0),
            source: SourceRangeKey { prefix_length: 0, range: SourceRange::new(0, address) },
            affinity_key: AffinityKey { client: address, service: 0 },
            affinity: Affinity::default(),
            connection_rate: ConnectionRate::default(),
            best: Best::default(),
            service: Service::default(),
            timestamp: Timestamp::default(),
            handshake: Handshake::default(),
            tcp: Tcp {
                source_port: [0; 2],
                destination_port: [0; 2],
                sequence: [0; 4],
                acknowledgment: [0; 4],
                data_offset: [0],
                flags: [0],
                window: [0; 2],
                checksum: [0; 2],
                urgent: [0; 2],
            },
            segment: Segment::default(),
            cursor: 0,
            refusal: 0,
            verdict: 0,
            hop: NextHop::default(),
            mtu: 0,
        }
    }
}
