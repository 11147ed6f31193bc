//! Refusals: an answer at once in place of silence.

use lb_common::abi::{Backend, DropReason, IPPROTO_TCP, IPPROTO_UDP};

use super::connection::Connection;
use super::udp::ask;
use crate::kit::device::{Action, Device};
use crate::kit::packet::flags::{ACK, FIN, PSH, RST, SYN};
use crate::kit::packet::{Body, Spec, Tcp};
use crate::kit::seen::SeenBody;
use crate::kit::world::{DNS, HTTP, Ip, answered, dropped, drops, set_slots, set_up, to_vip, udp};

fn segment(ip: Ip, flags: u8, payload: &[u8]) -> Spec {
    let tcp = Tcp {
        source: 40_000,
        destination: HTTP,
        sequence: 0xffff_fffe,
        acknowledgment: 0x1122_3344,
        flags,
        options: vec![2, 4, 5, 0xb4],
        payload: payload.to_vec(),
    };
    to_vip(ip, 1, Body::Tcp(tcp))
}

/// An RST must have the numbers that RFC 9293, section 3.10.7.1 asks for.
fn expect_reset(device: &mut dyn Device, spec: &Spec) {
    let Body::Tcp(tcp) = &spec.body else { panic!("not TCP") };
    let seen = answered(device, spec);
    let controls = u32::from(tcp.flags & SYN != 0) + u32::from(tcp.flags & FIN != 0);
    let (sequence, acknowledgment, flags) = if tcp.flags & ACK != 0 {
        (tcp.acknowledgment, 0, RST)
    } else {
        (0, tcp.sequence.wrapping_add(tcp.payload.len() as u32).wrapping_add(controls), RST | ACK)
    };
    let expected = SeenBody::Tcp {
        ports: (tcp.destination, tcp.source),
        sequence,
        acknowledgment,
        flags,
        timestamp: None,
        payload: Vec::new(),
    };
    assert_eq!(seen.body, expected);
}

/// An ICMP error that quotes the packet up to eight bytes of its payload.
fn expect_icmp(device: &mut dyn Device, spec: &Spec, kind: u8, code: u8) {
    let seen = answered(device, spec);
    let SeenBody::Icmp { kind: k, code: c, rest, payload } = seen.body else { panic!("{seen:?}") };
    assert_eq!((k, c, rest), (kind, code, [0; 4]));
    let original = spec.build_ip();
    let header = original.len() - spec.transport().len();
    let expected = (header + 8).min(96);
    assert_eq!(payload, original[..expected], "the quote is the packet as it came");
}

/// A Service without backends refuses.
pub fn no_backend(device: &mut dyn Device) {
    set_up(device, 0);
    for ip in Ip::BOTH {
        for (flags, payload) in [(SYN, &b""[..]), (SYN, b"fast open"), (SYN | PSH, b"odd")] {
            for padding in [0, 4] {
                let mut spec = segment(ip, flags, payload);
                spec.padding = padding;
                expect_reset(device, &spec);
            }
        }
        let (kind, code) = if ip == Ip::V4 { (3, 3) } else { (1, 4) };
        for size in [0usize, 1, 8, 9, 700] {
            expect_icmp(device, &to_vip(ip, 1, udp(5000, DNS, &vec![0xa5; size])), kind, code);
        }
        let mut spec = to_vip(ip, 1, udp(5000, DNS, b"with options"));
        spec.options = vec![1; 37];
        spec.extensions = vec![(0, vec![1, 4]), (60, vec![1, 20])];
        expect_icmp(device, &spec, kind, code);
        let stats = device.stats();
        assert_eq!(stats.services[&ip.service(IPPROTO_TCP)].refused, 6);
        assert_eq!(stats.services[&ip.service(IPPROTO_UDP)].refused, 6);
    }
    assert_eq!(drops(device, DropReason::NoBackend), 24);
    assert_eq!(device.snapshots(), Default::default());
}

/// A segment from the middle of nowhere.
pub fn unknown_connection(device: &mut dyn Device) {
    set_up(device, 3);
    for ip in Ip::BOTH {
        for flags in [ACK, PSH | ACK, FIN | ACK, SYN | ACK, FIN, 0, SYN | FIN] {
            expect_reset(device, &segment(ip, flags, b"data"));
        }
        dropped(device, &segment(ip, RST, b"").build(), DropReason::ResetWithoutFlow);
        dropped(device, &segment(ip, RST | ACK, b"").build(), DropReason::ResetWithoutFlow);
        let refused = device.stats().services[&ip.service(IPPROTO_TCP)].refused;
        assert_eq!(refused, 7, "an RST that is dropped was not answered");
    }
}

/// A backend that is gone: its connections are told, whether the entry is free or serves another
/// endpoint by now.
pub fn gone_backend(device: &mut dyn Device) {
    for ip in Ip::BOTH {
        for round in 0..3 {
            set_up(device, 1);
            let mut connection = Connection::open(device, ip, 1, 40_000 + round);
            let mut begun = Connection::new(ip, 2, 40_000 + round);
            begun.from_client(device, SYN, b"");
            begun.from_backend(device, SYN | ACK, b"");
            let index = ip.backend_index(IPPROTO_TCP, 0);
            let mut entry = crate::kit::world::backend(ip, IPPROTO_TCP, 0);
            match round {
                0 => entry = Backend::default(),
                // Free, but with everything else as it was.
                1 => entry.state = 0,
                _ => entry.generation = 9,
            }
            device.set_backend(index, entry);
            set_slots(device, ip, IPPROTO_TCP, 0);
            expect_reset(device, &connection.client_segment(PSH | ACK, b"hello?"));
            expect_reset(device, &begun.client_segment(ACK, b""));
            // Whoever begins anew is told that there is nobody.
            connection.client_sequence = 5;
            expect_reset(device, &connection.client_segment(SYN, b""));
        }
    }
}

/// The TTL ran out.
pub fn hops_run_out(device: &mut dyn Device) {
    set_up(device, 3);
    for ip in Ip::BOTH {
        let kind = if ip == Ip::V4 { 11 } else { 3 };
        let mut connection = Connection::open(device, ip, 1, 40_000);
        for hops in [1, 0] {
            let mut spec = connection.client_segment(ACK, b"ping");
            spec.hops = hops;
            expect_icmp(device, &spec, kind, 0);
            let mut spec = to_vip(ip, 3, udp(5000, DNS, b"new"));
            spec.hops = hops;
            expect_icmp(device, &spec, kind, 0);
            let mut spec = connection.backend_segment(ACK, b"pong");
            spec.hops = hops;
            expect_icmp(device, &spec, kind, 0);
        }
        connection.talk(device);
        ask(device, ip, 3, 5000);
    }
}

/// Answers leave with the tags of the packet.
pub fn vlan_tagged(device: &mut dyn Device) {
    set_up(device, 0);
    for ip in Ip::BOTH {
        for vlan in [vec![5], vec![0x2064, 0x0fff]] {
            let mut spec = segment(ip, SYN, b"");
            spec.vlan.clone_from(&vlan);
            expect_reset(device, &spec);
            let mut spec = to_vip(ip, 1, udp(5000, DNS, b"anybody?"));
            spec.vlan = vlan;
            expect_icmp(device, &spec, if ip == Ip::V4 { 3 } else { 1 }, if ip == Ip::V4 { 3 } else { 4 });
        }
    }
}

/// Nobody answers an address that cannot be one of a host.
pub fn unanswerable(device: &mut dyn Device) {
    set_up(device, 0);
    let sources: [std::net::IpAddr; 8] = [
        [0, 0, 0, 0].into(),
        [127, 0, 0, 1].into(),
        [224, 0, 0, 1].into(),
        [255, 255, 255, 255].into(),
        [0u16; 8].into(),
        [0, 0, 0, 0, 0, 0, 0, 1].into(),
        [0xff02, 0, 0, 0, 0, 0, 0, 1].into(),
        [0xff0e, 0, 0, 0, 0, 0, 0, 1].into(),
    ];
    for source in sources {
        let ip = if source.is_ipv4() { Ip::V4 } else { Ip::V6 };
        for body in [udp(5000, DNS, b"spoofed"), segment(ip, SYN, b"").body, segment(ip, ACK, b"").body] {
            let mut spec = to_vip(ip, 1, body);
            spec.source = source;
            let (action, _) = device.send(&spec.build());
            assert!(matches!(action, Action::Drop | Action::Pass), "{source}: {action:?}");
        }
    }
}
