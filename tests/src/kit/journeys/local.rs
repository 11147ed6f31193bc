//! Backends on this node: the client's address stays, the stack carries the packets, and replies are
//! translated where they leave the node.

use lb_common::abi::{
    Backend, BackendFlags, BackendState, DropReason, FlowFlags, FlowState, IPPROTO_TCP, IPPROTO_UDP, NextHop,
    ticks_from_seconds,
};

use super::connection::{Connection, states};
use crate::kit::device::{Action, Device};
use crate::kit::packet::flags::{ACK, FIN, PSH, RST, SYN};
use crate::kit::packet::{Body, Spec};
use crate::kit::seen::{self, Seen, SeenBody};
use crate::kit::world::{
    DNS, DNS_BACKEND, HTTP, HTTP_BACKEND, Ip, answer, answered, backend, dropped, drops, forwarded, passed,
    set_up, to_vip, udp,
};

const ESTABLISHED: bool = true;
const TRANSIENT: bool = false;

/// The entry of a backend on this node.
fn local_backend(ip: Ip, protocol: u8, number: u32) -> Backend {
    Backend {
        flags: BackendFlags::LOCAL,
        snat_first: 0,
        snat_count: 0,
        next_hop: NextHop::default(),
        ..backend(ip, protocol, number)
    }
}

/// The world, with all backends on this node.
pub fn set_up_local(device: &mut dyn Device, backends: u32) {
    set_up(device, backends);
    for ip in Ip::BOTH {
        for protocol in [IPPROTO_TCP, IPPROTO_UDP] {
            for number in 0..backends {
                device.set_backend(ip.backend_index(protocol, number), local_backend(ip, protocol, number));
            }
        }
    }
}

fn edited(spec: &Spec, (action, bytes): (Action, Vec<u8>)) -> Seen {
    assert_eq!(action, Action::Pass, "of {spec:?}");
    assert_ne!(bytes, spec.build(), "edited: {spec:?}");
    let seen = seen::read(&bytes).unwrap_or_else(|error| panic!("{error} in {bytes:02x?}, of {spec:?}"));
    assert_eq!(seen.hops, spec.hops, "the hop is the stack's");
    assert_eq!((seen.from, seen.to), (spec.from, spec.to), "so is the Ethernet header");
    seen
}

/// Sends a packet that must be edited and left to the stack.
fn delivered(device: &mut dyn Device, spec: &Spec) -> Seen {
    edited(spec, device.send(&spec.build()))
}

/// Lets a packet leave that must be edited.
fn left(device: &mut dyn Device, spec: &Spec) -> Seen {
    edited(spec, device.leave(&spec.build()))
}

/// Lets a packet leave that must not be touched.
fn left_alone(device: &mut dyn Device, frame: &[u8]) {
    let (action, bytes) = device.leave(frame);
    assert_eq!(action, Action::Pass);
    assert_eq!(bytes, frame, "untouched");
}

/// A connection to a backend on this node.
pub struct Local(Connection);

impl Local {
    /// Both ends.
    #[must_use]
    pub fn connection(&self) -> &Connection {
        &self.0
    }

    fn new(ip: Ip, client: u32, port: u16) -> Self {
        Self(Connection::new(ip, client, port))
    }

    /// After its handshake.
    pub fn open(device: &mut dyn Device, ip: Ip, client: u32, port: u16) -> Self {
        let mut local = Self::new(ip, client, port);
        local.handshake(device);
        local
    }

    fn handshake(&mut self, device: &mut dyn Device) {
        self.client_sends(device, SYN, b"");
        self.backend_sends(device, SYN | ACK, b"");
        self.client_sends(device, ACK, b"");
    }

    fn client_sends(&mut self, device: &mut dyn Device, flags: u8, payload: &[u8]) -> Seen {
        let seen = delivered(device, &self.0.client_segment(flags, payload));
        assert_eq!(seen.source, self.0.ip.client(self.0.client), "the client's own address");
        assert_eq!(seen.ports().1, HTTP_BACKEND);
        assert_eq!((seen.flags(), seen.payload()), (flags, payload));
        self.0.client_sequence = advance(self.0.client_sequence, flags, payload);
        self.0.received = Some(seen.clone());
        seen
    }

    fn backend_sends(&mut self, device: &mut dyn Device, flags: u8, payload: &[u8]) -> Seen {
        let spec = self.0.backend_segment(flags, payload);
        // On its way into the node nothing happens to it.
        passed(device, &spec.build());
        let seen = left(device, &spec);
        assert_eq!((seen.source, seen.destination), (self.0.ip.vip(), self.0.ip.client(self.0.client)));
        assert_eq!(seen.ports(), (HTTP, self.0.port));
        assert_eq!((seen.flags(), seen.payload()), (flags, payload));
        self.0.backend_sequence = advance(self.0.backend_sequence, flags, payload);
        seen
    }

    fn expect(&self, device: &mut dyn Device, state: FlowState, place: bool) {
        assert_eq!(states(device, &self.0), [Some((state as u8, place)); 2], "{state:?}");
    }
}

fn advance(sequence: u32, flags: u8, payload: &[u8]) -> u32 {
    let controls = u32::from(flags & SYN != 0) + u32::from(flags & FIN != 0);
    sequence.wrapping_add(payload.len() as u32).wrapping_add(controls)
}

/// Handshake, data, half-close, close: the entries go through the same states and places as those of
/// other flows, and the counters count both directions.
pub fn whole_life(device: &mut dyn Device) {
    set_up_local(device, 1);
    for ip in Ip::BOTH {
        let mut local = Local::new(ip, 1, 40_000);
        let seen = local.client_sends(device, SYN, b"");
        assert_eq!((seen.destination, seen.ports().0), (ip.backend(0), 40_000), "its own port");
        local.expect(device, FlowState::SynSent, TRANSIENT);
        local.backend_sends(device, SYN | ACK, b"");
        local.expect(device, FlowState::SynReceived, TRANSIENT);
        local.client_sends(device, ACK, b"");
        local.expect(device, FlowState::Established, ESTABLISHED);
        local.client_sends(device, PSH | ACK, b"request");
        local.backend_sends(device, PSH | ACK, b"odd answer.");
        local.client_sends(device, FIN | ACK, b"");
        local.expect(device, FlowState::ClientClosed, ESTABLISHED);
        local.backend_sends(device, PSH | ACK, b"goes on");
        local.backend_sends(device, FIN | ACK, b"");
        local.expect(device, FlowState::TimeWait, TRANSIENT);
        local.client_sends(device, ACK, b"");
        let stats = device.stats();
        let service = stats.services[&ip.service(IPPROTO_TCP)];
        assert_eq!((service.packets_in, service.packets_out, service.new_flows), (5, 4, 1));
        let header = if ip == Ip::V4 { 54 } else { 74 };
        assert_eq!((service.bytes_in, service.bytes_out), (5 * header + 7, 4 * header + 18));
        assert!(stats.drops.is_empty());
    }
}

/// Local and remote backends of one Service take turns; each gets what it needs.
pub fn mixed_with_remote(device: &mut dyn Device) {
    set_up(device, 2);
    for ip in Ip::BOTH {
        device.set_backend(ip.backend_index(IPPROTO_TCP, 0), local_backend(ip, IPPROTO_TCP, 0));
        for turn in 0..4 {
            let mut local = Local::open(device, ip, 1, 40_000 + turn);
            assert_eq!(local.0.backend(), ip.backend(0));
            let mut remote = Connection::open(device, ip, 1, 50_000 + turn);
            assert_eq!((remote.backend(), remote.source().0), (ip.backend(1), ip.snat(1)));
            remote.talk(device);
            local.client_sends(device, PSH | ACK, b"still there");
            // What leaves the node for a remote backend's client by the stack is not ours.
            left_alone(device, &remote.backend_segment(ACK, b"").build());
        }
    }
}

/// A packet whose hops are used up is the stack's to answer, except for one that begins a connection.
pub fn last_hop(device: &mut dyn Device) {
    set_up_local(device, 1);
    for ip in Ip::BOTH {
        let local = Local::open(device, ip, 1, 40_000);
        for flags in [ACK, FIN | ACK] {
            let mut spec = local.0.client_segment(flags, b"");
            spec.hops = 1;
            assert_eq!(delivered(device, &spec).destination, ip.backend(0));
        }
        let mut spec = local.0.backend_segment(RST | ACK, b"");
        spec.hops = 1;
        assert_eq!(left(device, &spec).source, ip.vip());
        local.expect(device, FlowState::Reset, TRANSIENT);
    }
}

/// The backend is gone: its clients are told so, and its replies still get through.
pub fn gone_backend(device: &mut dyn Device) {
    set_up_local(device, 1);
    for ip in Ip::BOTH {
        let mut local = Local::open(device, ip, 1, 40_000);
        let index = ip.backend_index(IPPROTO_TCP, 0);
        let free = Backend { generation: 2, state: BackendState::Free as u8, ..Backend::default() };
        device.set_backend(index, free);
        local.backend_sends(device, ACK, b"last words");
        let refusal = answered(device, &local.0.client_segment(ACK, b"more"));
        assert_eq!(refusal.flags() & RST, RST);
        assert_eq!(refusal.source, ip.vip());
        device.set_backend(index, local_backend(ip, IPPROTO_TCP, 0));
    }
}

/// An entry that the LRU has forgotten is made again from the other one, whichever it was.
pub fn lost_half_is_rebuilt(device: &mut dyn Device) {
    set_up_local(device, 1);
    for ip in Ip::BOTH {
        let mut local = Local::new(ip, 1, 40_000);
        local.client_sends(device, SYN, b"");
        assert!(device.evict(local.0.key()));
        local.backend_sends(device, SYN | ACK, b"");
        local.expect(device, FlowState::SynReceived, TRANSIENT);
        assert!(device.evict(local.0.reply_key()));
        local.client_sends(device, ACK, b"");
        local.expect(device, FlowState::Established, ESTABLISHED);
        local.backend_sends(device, ACK, b"data");
        local.client_sends(device, ACK, b"data");
    }
}

/// One client port to two VIPs with the same backend: the second gets another port, the first goes on.
pub fn same_tuple_by_another_vip(device: &mut dyn Device) {
    const OTHER: u16 = 8_888;
    set_up_local(device, 1);
    for ip in Ip::BOTH {
        let mut first = Local::open(device, ip, 1, 40_000);
        device.set_vip(ip.vip(), OTHER, IPPROTO_TCP, ip.service(IPPROTO_TCP));
        let mut spec = Local::new(ip, 1, 40_000).0.client_segment(SYN, b"");
        let Body::Tcp(tcp) = &mut spec.body else { panic!("TCP") };
        tcp.destination = OTHER;
        let seen = delivered(device, &spec);
        assert_eq!((seen.source, seen.destination), (ip.client(1), ip.backend(0)));
        assert_ne!(seen.ports().0, 40_000);
        let Body::Tcp(mut tcp) = first.0.backend_segment(SYN | ACK, b"").body else { panic!("TCP") };
        tcp.destination = seen.ports().0;
        let reply = left(device, &answer(&seen, Body::Tcp(tcp)));
        assert_eq!((reply.source, reply.ports()), (ip.vip(), (OTHER, 40_000)));
        first.client_sends(device, PSH | ACK, b"first");
        first.backend_sends(device, PSH | ACK, b"first");
    }
}

/// The client has a connection to the backend directly, from the port that it now uses for the VIP:
/// that connection goes on, and the new one gets another port with its second SYN.
pub fn same_tuple_directly(device: &mut dyn Device) {
    set_up_local(device, 1);
    for ip in Ip::BOTH {
        let mut local = Local::new(ip, 1, 40_000);
        local.client_sends(device, SYN, b"");
        let direct = local.0.backend_segment(PSH | ACK, b"of the other connection").build();
        left_alone(device, &direct);
        left_alone(device, &direct);
        local.0.client_sequence = 1_000_000;
        let seen = local.client_sends(device, SYN, b"");
        assert_ne!(seen.ports().0, 40_000);
        local.backend_sends(device, SYN | ACK, b"");
        local.client_sends(device, ACK, b"");
        local.expect(device, FlowState::Established, ESTABLISHED);
        left_alone(device, &direct);
    }
}

/// A port that was used for a VIP is used for the backend directly later on.
pub fn direct_connection_afterwards(device: &mut dyn Device) {
    set_up_local(device, 1);
    for ip in Ip::BOTH {
        let mut local = Local::open(device, ip, 1, 40_000);
        local.client_sends(device, FIN | ACK, b"");
        local.backend_sends(device, FIN | ACK, b"");
        local.client_sends(device, ACK, b"");
        local.expect(device, FlowState::TimeWait, TRANSIENT);
        for flags in [SYN | ACK, ACK, PSH | ACK] {
            left_alone(device, &local.0.backend_segment(flags, b"").build());
        }
        let snapshots = device.snapshots();
        let flags = match local.0.reply_key() {
            crate::kit::device::AnyKey::V4(key) => snapshots.v4.find(&key).map(|(flow, _)| flow.status.flags),
            crate::kit::device::AnyKey::V6(key) => snapshots.v6.find(&key).map(|(flow, _)| flow.status.flags),
        };
        assert_eq!(flags, Some(FlowFlags::LOCAL | FlowFlags::REPLY | FlowFlags::FOREIGN));
    }
}

/// A client that uses its port again soon after closing gets another towards the backend, later its
/// own.
pub fn port_reuse(device: &mut dyn Device) {
    set_up_local(device, 1);
    for ip in Ip::BOTH {
        for (wait, own) in [(1, false), (120, true)] {
            let mut local = Local::open(device, ip, 1, 40_000);
            local.client_sends(device, FIN | ACK, b"");
            local.backend_sends(device, FIN | ACK, b"");
            local.client_sends(device, ACK, b"");
            device.wait(ticks_from_seconds(wait));
            let mut again = Local::new(ip, 1, 40_000);
            again.0.client_sequence = 9_000_000;
            let seen = again.client_sends(device, SYN, b"");
            assert_eq!(seen.ports().0 == 40_000, own, "after {wait} s: {}", seen.ports().0);
            again.backend_sends(device, SYN | ACK, b"");
            again.client_sends(device, ACK, b"");
            again.expect(device, FlowState::Established, ESTABLISHED);
            again.client_sends(device, RST | ACK, b"");
            device.wait(ticks_from_seconds(120));
        }
    }
}

fn question(device: &mut dyn Device, ip: Ip, checksum: bool) -> Seen {
    let mut body = udp(5_000, DNS, b"question");
    if let Body::Udp { checksum: has, .. } = &mut body {
        *has = checksum;
    }
    let seen = delivered(device, &to_vip(ip, 1, body));
    assert_eq!((seen.source, seen.destination), (ip.client(1), ip.backend(0)));
    assert_eq!(seen.ports(), (5_000, DNS_BACKEND));
    seen
}

/// UDP with and without a checksum; an answer that comes too late is no answer.
pub fn datagrams(device: &mut dyn Device) {
    set_up_local(device, 1);
    for ip in Ip::BOTH {
        for checksum in [true, false] {
            if ip == Ip::V6 && !checksum {
                continue;
            }
            let asked = question(device, ip, checksum);
            let mut body = udp(DNS_BACKEND, 5_000, b"answer");
            if let Body::Udp { checksum: has, .. } = &mut body {
                *has = checksum;
            }
            let reply = answer(&asked, body);
            let seen = left(device, &reply);
            assert_eq!((seen.source, seen.ports()), (ip.vip(), (DNS, 5_000)));
            let SeenBody::Udp { checksum: field, .. } = seen.body else { panic!("UDP") };
            assert_eq!(field != 0, checksum, "none stays none");
            device.wait(ticks_from_seconds(130));
            left_alone(device, &reply.build());
        }
    }
}

/// A session that goes on becomes a stream.
pub fn stream(device: &mut dyn Device) {
    set_up_local(device, 1);
    for ip in Ip::BOTH {
        for _ in 0..3 {
            let asked = question(device, ip, true);
            left(device, &answer(&asked, udp(DNS_BACKEND, 5_000, b"answer")));
            device.wait(ticks_from_seconds(3));
        }
        let snapshots = device.snapshots();
        let established = match ip {
            Ip::V4 => snapshots.v4.established.len(),
            Ip::V6 => snapshots.v6.established.len(),
        };
        assert_eq!(established, 2);
    }
}

/// Fragments follow their first one, both ways, and keep their identification.
pub fn fragments(device: &mut dyn Device) {
    set_up_local(device, 1);
    for ip in Ip::BOTH {
        let request = to_vip(ip, 1, udp(5_000, DNS, &[7; 1_000]));
        let reply = {
            let mut spec = Spec::new(ip.backend(0), ip.client(1), udp(DNS_BACKEND, 5_000, &[8; 1_000]));
            spec.identification = 0x4321;
            spec
        };
        for (number, fragment) in request.fragments(400).iter().enumerate() {
            let (action, bytes) = device.send(fragment);
            assert_eq!(action, Action::Pass, "{number}");
            let seen = seen::read(&bytes).unwrap();
            assert_eq!((seen.source, seen.destination), (ip.client(1), ip.backend(0)));
            assert_eq!(seen.identification, 0x1234);
        }
        for (number, fragment) in reply.fragments(400).iter().enumerate() {
            passed(device, fragment);
            let (action, bytes) = device.leave(fragment);
            assert_eq!(action, Action::Pass, "{number}");
            let seen = seen::read(&bytes).unwrap();
            assert_eq!((seen.source, seen.destination), (ip.vip(), ip.client(1)));
            assert_eq!(seen.identification, 0x4321);
        }
    }
}

/// An ICMP error that quotes `quoted`.
fn error(ip: Ip, source: std::net::IpAddr, quoted: &[u8]) -> Spec {
    // Packet too big, fragmentation needed.
    let (kind, code) = if ip == Ip::V4 { (3, 4) } else { (2, 0) };
    let rest = [0, 0, 5, 0x14];
    let destination = match ip {
        Ip::V4 => std::net::IpAddr::from(<[u8; 4]>::try_from(&quoted[26..30]).unwrap()),
        Ip::V6 => std::net::IpAddr::from(<[u8; 16]>::try_from(&quoted[22..38]).unwrap()),
    };
    let length = quoted.len().min(14 + 60);
    let payload = quoted[14..length].to_vec();
    Spec::new(source, destination, Body::Icmp { kind, code, rest, payload })
}

/// ICMP errors about either direction are translated; whoever sends one keeps its address, but the
/// backend itself goes by the VIP.
pub fn icmp_errors(device: &mut dyn Device) {
    set_up_local(device, 1);
    for ip in Ip::BOTH {
        let mut local = Local::open(device, ip, 1, 40_000);
        // A router on the way to the client cannot pass a packet of the VIP's on.
        let reply = local.0.backend_segment(PSH | ACK, b"large, say");
        let (_, translated) = device.leave(&reply.build());
        let seen = delivered(device, &error(ip, ip.router(), &translated));
        assert_eq!((seen.source, seen.destination), (ip.router(), ip.backend(0)));
        quotes(ip, seen.payload(), (ip.backend(0), HTTP_BACKEND), (ip.client(1), 40_000));
        // The node, and the backend, cannot take a packet of the client's.
        let request = local.0.client_segment(PSH | ACK, b"large, say");
        let (_, translated) = device.send(&request.build());
        for (sender, shown) in [(ip.router(), ip.router()), (ip.backend(0), ip.vip())] {
            let spec = error(ip, sender, &translated);
            passed(device, &spec.build());
            let seen = left(device, &spec);
            assert_eq!((seen.source, seen.destination), (shown, ip.client(1)));
            quotes(ip, seen.payload(), (ip.client(1), 40_000), (ip.vip(), HTTP));
        }
        local.0.client_sequence += 10;
        // About somebody else's packet.
        let foreign = to_vip(ip, 9, udp(1, 2, b"x")).build();
        left_alone(device, &error(ip, ip.router(), &foreign).build());
    }
}

fn quotes(ip: Ip, quote: &[u8], source: (std::net::IpAddr, u16), destination: (std::net::IpAddr, u16)) {
    let (addresses, header) = if ip == Ip::V4 { (12..20, 20) } else { (8..40, 40) };
    let octets = |address| match address {
        std::net::IpAddr::V4(address) => address.octets().to_vec(),
        std::net::IpAddr::V6(address) => address.octets().to_vec(),
    };
    assert_eq!(quote[addresses], [octets(source.0), octets(destination.0)].concat());
    let ports = [source.1.to_be_bytes(), destination.1.to_be_bytes()].concat();
    assert_eq!(quote[header..header + 4], ports);
}

/// What a backend still sends of a connection that its client has replaced by one with another backend
/// does not reach the client.
pub fn late_segments_of_an_earlier_backend(device: &mut dyn Device) {
    set_up_local(device, 2);
    for ip in Ip::BOTH {
        let mut earlier = Local::open(device, ip, 1, 40_000);
        earlier.client_sends(device, FIN | ACK, b"");
        earlier.backend_sends(device, FIN | ACK, b"");
        let late = earlier.0.backend_segment(FIN | ACK, b"").build();
        let mut local = Local::new(ip, 1, 40_000);
        local.client_sends(device, SYN, b"");
        assert_ne!(local.0.backend(), earlier.0.backend());
        let before = drops(device, DropReason::NoFlow);
        assert_eq!(device.leave(&late).0, Action::Drop);
        assert_eq!(drops(device, DropReason::NoFlow), before + 1);
        local.expect(device, FlowState::SynSent, TRANSIENT);
        local.backend_sends(device, SYN | ACK, b"");
        local.client_sends(device, ACK, b"");
        local.expect(device, FlowState::Established, ESTABLISHED);
    }
}

/// What leaves the node and is not a reply of a backend on it passes untouched.
pub fn others_leave_untouched(device: &mut dyn Device) {
    set_up_local(device, 1);
    for ip in Ip::BOTH {
        let local = Local::open(device, ip, 1, 40_000);
        let reply = local.0.backend_segment(ACK, b"").build();
        // A test run in the kernel wants an IP header.
        for end in if ip == Ip::V4 { 34..reply.len() - 1 } else { 54..reply.len() - 1 } {
            left_alone(device, &reply[..end]);
        }
        for body in [udp(HTTP_BACKEND, 40_000, b"not TCP"), udp(1, 2, b"")] {
            left_alone(device, &Spec::new(ip.backend(0), ip.client(1), body).build());
        }
        left_alone(device, &local.0.client_segment(ACK, b"to the VIP").build());
        let echo = Body::Icmp { kind: 8, code: 0, rest: [0; 4], payload: b"ping".to_vec() };
        left_alone(device, &Spec::new(ip.backend(0), ip.client(1), echo).build());
    }
}

/// A remote backend without a neighbour drops, a local one needs none.
pub fn needs_no_neighbour(device: &mut dyn Device) {
    set_up_local(device, 1);
    for ip in Ip::BOTH {
        Local::open(device, ip, 1, 40_000);
        let remote = Backend { next_hop: NextHop::default(), ..backend(ip, IPPROTO_TCP, 0) };
        device.set_backend(ip.backend_index(IPPROTO_TCP, 0), remote);
        let syn = Local::new(ip, 2, 40_000).0.client_segment(SYN, b"").build();
        dropped(device, &syn, DropReason::NoNeighbour);
        device.set_backend(ip.backend_index(IPPROTO_TCP, 0), backend(ip, IPPROTO_TCP, 0));
        forwarded(device, &Local::new(ip, 3, 40_000).0.client_segment(SYN, b""));
    }
}
