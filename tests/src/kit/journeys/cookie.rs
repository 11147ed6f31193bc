//! SYN cookies.

use lb_common::abi::{
    Backend, BackendFlags, Config, DropReason, FlowFlags, FlowState, IPPROTO_TCP, NextHop, SynCookies,
};

use crate::kit::device::{AnyKey, Device};
use crate::kit::journeys::connection::{Connection, states};
use crate::kit::packet::flags::{ACK, FIN, PSH, RST, SYN};
use crate::kit::packet::{Body, Spec, Tcp};
use crate::kit::seen::{Seen, SeenBody};
use crate::kit::tables::Snapshots;
use crate::kit::world::{
    self, HTTP, HTTP_BACKEND, Ip, answer, answered, backend, dropped, drops, forwarded, set_up, to_vip,
};

/// The client's initial sequence number.
const CLIENT: u32 = u32::MAX - 5;
/// The backend's.
const BACKEND: u32 = 77;

fn set_up_cookies(device: &mut dyn Device, backends: u32) {
    set_up(device, backends);
    device.set_config(Config { syn_cookies: SynCookies::ANSWER, ..Config::default() });
}

/// A connection that begins with a cookie, and what its ends have said.
struct Guest {
    ip: Ip,
    client: u32,
    port: u16,
    cookie: u32,
    /// The next sequence numbers of both ends: that of the backend as the client sees it.
    next: (u32, u32),
    received: Option<Seen>,
}

fn numbers(seen: &Seen) -> (u32, u32) {
    match seen.body {
        SeenBody::Tcp { sequence, acknowledgment, .. } => (sequence, acknowledgment),
        _ => panic!("no TCP: {seen:?}"),
    }
}

impl Guest {
    /// A SYN with these options that was answered with a cookie.
    fn greet(device: &mut dyn Device, ip: Ip, port: u16, options: &[u8]) -> Self {
        let mut guest = Self { ip, client: 1, port, cookie: 0, next: (CLIENT, 0), received: None };
        let mut spec = guest.segment(SYN, b"");
        let Body::Tcp(tcp) = &mut spec.body else { panic!("a segment") };
        tcp.options = options.to_vec();
        let before = (device.snapshots(), drops(device, DropReason::SynCookieSent));
        let seen = answered(device, &spec);
        assert_eq!(seen.flags(), SYN | ACK);
        assert_eq!(seen.ports(), (HTTP, port));
        assert_eq!(seen.timestamp(), None, "nothing is offered that had to be remembered");
        assert_eq!(numbers(&seen).1, CLIENT.wrapping_add(1));
        let entries = |snapshots: &Snapshots| snapshots.v4.flows().count() + snapshots.v6.flows().count();
        assert!(entries(&device.snapshots()) <= entries(&before.0), "a SYN leaves nothing behind");
        assert_eq!(drops(device, DropReason::SynCookieSent), before.1 + 1);
        guest.cookie = numbers(&seen).0;
        guest.next = (CLIENT.wrapping_add(1), guest.cookie.wrapping_add(1));
        guest
    }

    fn segment(&self, flags: u8, payload: &[u8]) -> Spec {
        let body = Body::Tcp(Tcp {
            source: self.port,
            destination: HTTP,
            sequence: self.next.0,
            acknowledgment: if flags & ACK == 0 { 0 } else { self.next.1 },
            flags,
            options: Vec::new(),
            payload: payload.to_vec(),
        });
        to_vip(self.ip, self.client, body)
    }

    /// Sends a segment of the client's that has to reach a backend as a SYN.
    fn becomes_syn(&mut self, device: &mut dyn Device, spec: &Spec) -> Seen {
        let (_, bytes) = device.send(&spec.build());
        let seen = crate::kit::seen::read(&bytes).expect("a segment");
        assert_eq!(seen.flags(), SYN, "{seen:?}, counters {:?}", device.stats());
        assert_eq!(numbers(&seen), (CLIENT, 0));
        assert_eq!(seen.ports().1, HTTP_BACKEND);
        assert!(seen.payload().is_empty());
        self.received = Some(seen.clone());
        seen
    }

    fn reply(&self, sequence: u32, acknowledgment: u32, flags: u8, payload: &[u8]) -> Spec {
        let received = self.received.as_ref().expect("the client begins");
        let (source, destination) = received.ports();
        let tcp = Tcp {
            source: destination,
            destination: source,
            sequence,
            acknowledgment,
            flags,
            options: if flags & SYN == 0 { Vec::new() } else { vec![2, 4, 5, 0xb4] },
            payload: payload.to_vec(),
        };
        answer(received, Body::Tcp(tcp))
    }

    /// Sends the backend's SYN-ACK, which has to reach the client as a segment that it answers.
    fn opens(&self, device: &mut dyn Device) {
        let spec = self.reply(BACKEND, CLIENT.wrapping_add(1), SYN | ACK, b"");
        let (_, bytes) = device.send(&spec.build());
        let seen = crate::kit::seen::read(&bytes).expect("a segment");
        assert_eq!(seen.flags(), ACK);
        assert_eq!(numbers(&seen), (self.cookie, CLIENT.wrapping_add(1)), "the byte before those awaited");
        assert_eq!(seen.payload(), [0]);
        assert_eq!((seen.source, seen.ports()), (self.ip.vip(), (HTTP, self.port)));
    }

    /// A segment of the client's that passes, with the backend's own numbers in it.
    fn says(&mut self, device: &mut dyn Device, flags: u8, payload: &[u8]) {
        let seen = forwarded(device, &self.segment(flags, payload));
        assert_eq!(seen.flags(), flags);
        let delta = self.cookie.wrapping_sub(BACKEND);
        assert_eq!(numbers(&seen), (self.next.0, self.next.1.wrapping_sub(delta)));
        self.next.0 = self.next.0.wrapping_add(payload.len() as u32 + u32::from(flags & FIN));
    }

    /// A segment of the backend's that passes, with the numbers that the client waits for.
    fn hears(&mut self, device: &mut dyn Device, flags: u8, payload: &[u8]) {
        let delta = self.cookie.wrapping_sub(BACKEND);
        let spec = self.reply(self.next.1.wrapping_sub(delta), self.next.0, flags, payload);
        let seen = forwarded(device, &spec);
        assert_eq!(numbers(&seen), (self.next.1, self.next.0));
        assert_eq!(seen.flags(), flags);
        self.next.1 = self.next.1.wrapping_add(payload.len() as u32 + u32::from(flags & FIN));
    }

    fn states(&self, device: &mut dyn Device) -> [Option<(u8, bool)>; 2] {
        let mut connection = Connection::new(self.ip, self.client, self.port);
        connection.received.clone_from(&self.received);
        states(device, &connection)
    }
}

const LARGE: [u8; 4] = [2, 4, 5, 0xb4];

/// An RST ends such a connection, too, if it has the number that the backend waits for.
pub fn strange_reset(device: &mut dyn Device) {
    set_up_cookies(device, 1);
    for ip in Ip::BOTH {
        let mut guest = Guest::greet(device, ip, 40_000, &LARGE);
        let acknowledgment = guest.segment(ACK, b"");
        guest.becomes_syn(device, &acknowledgment);
        for state in [FlowState::SynSent, FlowState::SynReceived] {
            let next = guest.next.0;
            guest.next.0 = next.wrapping_add(1 << 20);
            forwarded(device, &guest.segment(RST, b""));
            guest.next.0 = next;
            assert_eq!(guest.states(device), [Some((state as u8, false)); 2]);
            if state == FlowState::SynSent {
                guest.opens(device);
            }
        }
        forwarded(device, &guest.segment(RST, b""));
        assert_eq!(guest.states(device), [Some((FlowState::Reset as u8, false)); 2]);
    }
}

/// Handshake, data both ways, close; the server or the client speaks first.
pub fn whole_life(device: &mut dyn Device) {
    set_up_cookies(device, 2);
    for ip in Ip::BOTH {
        for (port, server_first) in [(40_000, false), (40_001, true)] {
            let mut guest = Guest::greet(device, ip, port, &LARGE);
            let acknowledgment = guest.segment(ACK, b"");
            guest.becomes_syn(device, &acknowledgment);
            guest.opens(device);
            let state = Some((FlowState::SynReceived as u8, false));
            assert_eq!(guest.states(device), [state; 2]);
            if server_first {
                guest.says(device, ACK, b"");
                guest.hears(device, PSH | ACK, b"220 hello\r\n");
            }
            guest.says(device, PSH | ACK, b"GET / HTTP/1.1\r\n\r\n");
            let state = Some((FlowState::Established as u8, true));
            assert_eq!(guest.states(device), [state; 2]);
            guest.hears(device, PSH | ACK, &[7; 1_001]);
            guest.hears(device, ACK, b"");
            guest.says(device, ACK, b"");
            guest.says(device, FIN | ACK, b"");
            guest.hears(device, FIN | ACK, b"");
            guest.says(device, ACK, b"");
            let state = Some((FlowState::TimeWait as u8, false));
            assert_eq!(guest.states(device), [state; 2]);
        }
        assert_eq!(device.stats().services[&ip.service(IPPROTO_TCP)].new_flows, 2);
    }
}

/// The segment size that a SYN names reaches the backend, as far as a cookie can say it.
pub fn segment_sizes(device: &mut dyn Device) {
    set_up_cookies(device, 2);
    for ip in Ip::BOTH {
        let small = if ip == Ip::V4 { 536 } else { 1_220 };
        for (port, (named, told)) in (40_000..).zip([
            (None, small),
            (Some(1_359u16), small),
            (Some(1_360), 1_360),
            (Some(9_000), 1_360),
        ]) {
            let options = named.map_or_else(Vec::new, |size| {
                [[1, 1, 2, 4], [0, 0, 0, 0]].concat()[..4].iter().copied().chain(size.to_be_bytes()).collect()
            });
            let mut guest = Guest::greet(device, ip, port, &options);
            let (_, bytes) = device.send(&guest.segment(ACK, b"").build());
            let [.., kind, length, high, low] = bytes[..] else { panic!("no segment") };
            assert_eq!([kind, length], [2, 4]);
            assert_eq!(u16::from_be_bytes([high, low]), told, "of {named:?}");
            guest.received = Some(crate::kit::seen::read(&bytes).unwrap());
        }
    }
}

/// Whatever is lost, the client's probes do it again.
pub fn losses(device: &mut dyn Device) {
    set_up_cookies(device, 2);
    for ip in Ip::BOTH {
        // The acknowledgment is lost; a probe of Linux, one of others, or a FIN comes first.
        for (port, (back, flags, payload)) in (40_000..).zip([
            (1, ACK, &b""[..]),
            (0, ACK, b"G"),
            (0, FIN | ACK, b""),
            (0, PSH | ACK, b"GET /"),
        ]) {
            let mut guest = Guest::greet(device, ip, port, &LARGE);
            let next = guest.next;
            guest.next.0 = next.0.wrapping_sub(back);
            let probe = guest.segment(flags, payload);
            let first = guest.becomes_syn(device, &probe);
            // The SYN, or its answer, is lost: the same comes again, to the same backend.
            let again = guest.becomes_syn(device, &probe);
            assert_eq!((first.destination, first.ports()), (again.destination, again.ports()));
            guest.opens(device);
            // The segment that opens the window is lost: the backend repeats itself.
            guest.opens(device);
            guest.next = next;
            guest.says(device, ACK, b"");
            guest.opens(device);
            guest.says(device, PSH | ACK, b"GET /");
        }
    }
}

/// Whoever has no cookie gets an RST: made up, of another port or client, or spoilt.
pub fn forgeries(device: &mut dyn Device) {
    set_up_cookies(device, 2);
    for ip in Ip::BOTH {
        device.set_vip(ip.vip(), HTTP + 1, IPPROTO_TCP, ip.service(IPPROTO_TCP));
        let guest = Guest::greet(device, ip, 40_000, &LARGE);
        let edit = |change: fn(&mut Spec, &mut Tcp)| {
            let mut spec = guest.segment(ACK, b"");
            let Body::Tcp(mut tcp) = spec.body.clone() else { panic!("a segment") };
            change(&mut spec, &mut tcp);
            spec.body = Body::Tcp(tcp);
            spec
        };
        let forged = [
            edit(|_, tcp| tcp.acknowledgment ^= 0x0100_0000),
            edit(|_, tcp| tcp.acknowledgment = tcp.acknowledgment.wrapping_add(4)),
            edit(|_, tcp| tcp.acknowledgment = tcp.acknowledgment.wrapping_sub(3)),
            edit(|_, tcp| tcp.sequence = tcp.sequence.wrapping_add(1_000)),
            edit(|_, tcp| tcp.source += 1),
            edit(|_, tcp| tcp.destination += 1),
            edit(|_, tcp| tcp.flags = SYN | ACK),
        ];
        for spec in forged {
            let before = drops(device, DropReason::SynCookieInvalid);
            let seen = answered(device, &spec);
            assert_eq!(seen.flags(), RST);
            let Body::Tcp(tcp) = &spec.body else { panic!("a segment") };
            assert_eq!(numbers(&seen).0, tcp.acknowledgment, "{tcp:?}");
            assert_eq!(drops(device, DropReason::SynCookieInvalid), before + 1);
        }
        dropped(device, &edit(|_, tcp| tcp.flags = RST | ACK).build(), DropReason::ResetWithoutFlow);
        let snapshots = device.snapshots();
        assert!(snapshots.v4.flows().next().is_none() && snapshots.v6.flows().next().is_none());
    }
}

/// A segment that brought a cookie back and comes again makes no second connection.
pub fn replay(device: &mut dyn Device) {
    set_up_cookies(device, 3);
    for ip in Ip::BOTH {
        let mut guest = Guest::greet(device, ip, 40_000, &LARGE);
        let acknowledgment = guest.segment(ACK, b"");
        guest.becomes_syn(device, &acknowledgment);
        guest.opens(device);
        guest.says(device, PSH | ACK, b"GET /");
        for _ in 0..3 {
            let seen = forwarded(device, &acknowledgment);
            assert_eq!(seen.flags(), ACK);
        }
        assert_eq!(device.stats().services[&ip.service(IPPROTO_TCP)].new_flows, 1);
    }
}

/// The backend refuses, or still has an earlier connection.
pub fn backend_says_no(device: &mut dyn Device) {
    set_up_cookies(device, 2);
    for ip in Ip::BOTH {
        let mut guest = Guest::greet(device, ip, 40_000, &LARGE);
        let acknowledgment = guest.segment(ACK, b"");
        guest.becomes_syn(device, &acknowledgment);
        let challenge = guest.reply(123_456, 654_321, ACK, b"");
        let seen = answered(device, &challenge);
        assert_eq!((seen.flags(), numbers(&seen).0), (RST, 654_321));
        guest.becomes_syn(device, &acknowledgment);
        let refusal = guest.reply(0, CLIENT.wrapping_add(1), RST | ACK, b"");
        let seen = forwarded(device, &refusal);
        assert_eq!(seen.flags(), RST | ACK);
        assert_eq!(numbers(&seen), guest_numbers(&guest), "what the client believes");
        assert_eq!(guest.states(device)[0], Some((FlowState::Reset as u8, false)));
    }
}

fn guest_numbers(guest: &Guest) -> (u32, u32) {
    (guest.next.1, guest.next.0)
}

/// Another SYN on the same ports: the client has given up, or repeats itself.
pub fn syn_again(device: &mut dyn Device) {
    set_up_cookies(device, 2);
    for ip in Ip::BOTH {
        let mut guest = Guest::greet(device, ip, 40_000, &LARGE);
        let acknowledgment = guest.segment(ACK, b"");
        guest.becomes_syn(device, &acknowledgment);
        let mut late = guest.segment(SYN, b"");
        let Body::Tcp(tcp) = &mut late.body else { panic!("a segment") };
        tcp.sequence = CLIENT;
        tcp.options = crate::kit::packet::tcp_options(true, 1, 0);
        // The options of the client's own SYN must not reach the backend.
        let seen = guest.becomes_syn(device, &late);
        assert_eq!(seen.timestamp(), None);
        tcp_of(&mut late).sequence = 5_000;
        let seen = answered(device, &late);
        assert_eq!(seen.flags(), SYN | ACK, "a new connection has a new cookie");
        let cookie = numbers(&seen).0;
        let mut spec = guest.segment(ACK, b"");
        tcp_of(&mut spec).sequence = 5_001;
        tcp_of(&mut spec).acknowledgment = cookie.wrapping_add(1);
        let (_, bytes) = device.send(&spec.build());
        let seen = crate::kit::seen::read(&bytes).expect("a segment");
        assert_eq!((seen.flags(), numbers(&seen).0), (SYN, 5_000));
    }
}

/// A client uses its port again soon after it has closed.
pub fn port_reuse(device: &mut dyn Device) {
    set_up_cookies(device, 2);
    for ip in Ip::BOTH {
        for _ in 0..2 {
            let mut guest = Guest::greet(device, ip, 40_000, &LARGE);
            let acknowledgment = guest.segment(ACK, b"");
            guest.becomes_syn(device, &acknowledgment);
            guest.opens(device);
            guest.says(device, FIN | ACK, b"GET /");
            guest.hears(device, FIN | ACK, b"200");
            guest.says(device, ACK, b"");
        }
    }
}

fn tcp_of(spec: &mut Spec) -> &mut Tcp {
    let Body::Tcp(tcp) = &mut spec.body else { panic!("a segment") };
    tcp
}

/// Either half of a flow that is being made gets lost.
pub fn lost_halves(device: &mut dyn Device) {
    set_up_cookies(device, 2);
    for ip in Ip::BOTH {
        let mut guest = Guest::greet(device, ip, 40_000, &LARGE);
        let acknowledgment = guest.segment(ACK, b"");
        guest.becomes_syn(device, &acknowledgment);
        let seen = guest.received.clone().expect("a SYN");
        let reply = AnyKey::new((seen.destination, seen.ports().1), (seen.source, seen.ports().0), 6);
        let client = AnyKey::new((ip.client(1), 40_000), (ip.vip(), HTTP), 6);
        assert!(device.evict(reply));
        guest.becomes_syn(device, &acknowledgment);
        guest.opens(device);
        assert!(device.evict(client));
        guest.opens(device);
        assert!(device.evict(reply));
        guest.says(device, PSH | ACK, b"GET /");
        guest.hears(device, PSH | ACK, b"200");
    }
}

/// What the backend sends later is found in quotes, with the numbers that it knows.
pub fn quoted(device: &mut dyn Device) {
    set_up_cookies(device, 2);
    for ip in Ip::BOTH {
        let mut guest = Guest::greet(device, ip, 40_000, &LARGE);
        let acknowledgment = guest.segment(ACK, b"");
        guest.becomes_syn(device, &acknowledgment);
        guest.opens(device);
        guest.says(device, PSH | ACK, b"GET /");
        let delta = guest.cookie.wrapping_sub(BACKEND);
        let own = guest.next.1.wrapping_sub(delta);
        let (_, bytes) = device.send(&guest.reply(own, guest.next.0, PSH | ACK, &[1; 100]).build());
        let (kind, code) = if ip == Ip::V4 { (3, 4) } else { (2, 0) };
        let quote = bytes[14..14 + if ip == Ip::V4 { 28 } else { 48 }].to_vec();
        let body = Body::Icmp { kind, code, rest: [0, 0, 5, 0], payload: quote };
        let mut spec = Spec::new(ip.client(1), ip.vip(), body);
        (spec.from, spec.to) = (world::client_mac(1), world::NODE_MAC);
        let seen = forwarded(device, &spec);
        let quote = seen.payload();
        let start = if ip == Ip::V4 { 20 } else { 40 };
        assert_eq!(quote[start + 4..start + 8], own.to_be_bytes());
    }
}

/// Cookies are accepted, but no longer given out; and not even that.
pub fn off_again(device: &mut dyn Device) {
    set_up_cookies(device, 2);
    for ip in Ip::BOTH {
        let mut guest = Guest::greet(device, ip, 40_000, &LARGE);
        let other = Guest::greet(device, ip, 40_001, &LARGE);
        device.set_config(Config { syn_cookies: SynCookies::ACCEPT, ..Config::default() });
        let mut connection = Connection::open(device, ip, 2, 40_000);
        connection.talk(device);
        let acknowledgment = guest.segment(ACK, b"");
        guest.becomes_syn(device, &acknowledgment);
        device.set_config(Config::default());
        guest.opens(device);
        guest.says(device, PSH | ACK, b"GET /");
        let before = drops(device, DropReason::NoFlow);
        assert_eq!(answered(device, &other.segment(ACK, b"")).flags(), RST);
        assert_eq!(drops(device, DropReason::NoFlow), before + 1);
        device.set_config(Config { syn_cookies: SynCookies::ANSWER, ..Config::default() });
    }
}

/// No backend, all gone since, one on this node: a connection begins as without cookies.
pub fn the_usual_way(device: &mut dyn Device) {
    set_up_cookies(device, 2);
    for ip in Ip::BOTH {
        let guest = Guest::greet(device, ip, 40_000, &LARGE);
        world::set_slots(device, ip, IPPROTO_TCP, 0);
        let refused = guest.segment(SYN, b"");
        assert_eq!(answered(device, &refused).flags(), RST | ACK);
        let seen = answered(device, &guest.segment(ACK, b""));
        assert_eq!(seen.flags(), RST, "whoever has a cookie believes the number that he waits for");
        assert_eq!(numbers(&seen).0, guest.cookie.wrapping_add(1));
        world::set_slots(device, ip, IPPROTO_TCP, 2);
        for number in 0..2 {
            let remote = backend(ip, IPPROTO_TCP, number);
            let local = Backend { flags: BackendFlags::LOCAL, next_hop: NextHop::default(), ..remote };
            device.set_backend(ip.backend_index(IPPROTO_TCP, number), local);
        }
        let (action, _) = device.send(&guest.segment(SYN, b"").build());
        assert_eq!(action, crate::kit::device::Action::Pass, "delivered");
        let edits = |flags: u8| flags & FlowFlags::EDIT_SEQUENCE != 0;
        let snapshots = device.snapshots();
        assert!(!snapshots.v4.flows().any(|(_, flow)| edits(flow.status.flags)));
        assert!(!snapshots.v6.flows().any(|(_, flow)| edits(flow.status.flags)));
    }
}
