//! Source ranges: who may open connections.

use std::net::IpAddr;

use lb_common::abi::{DropReason, IPPROTO_TCP, IPPROTO_UDP, ServiceFlags};

use super::connection::Connection;
use super::udp::{ask, reply};
use crate::kit::device::Device;
use crate::kit::packet::flags::{ACK, FIN, PSH, RST, SYN};
use crate::kit::packet::{Body, Spec, Tcp};
use crate::kit::world::{
    DNS, HTTP, Ip, dropped, drops, forwarded, set_flags, set_slots, set_up, to_vip, udp,
};

/// Sets the ranges of both Services of a family, and turns the check on.
fn allow(device: &mut dyn Device, ip: Ip, ranges: &[(IpAddr, u32)]) {
    for protocol in [IPPROTO_TCP, IPPROTO_UDP] {
        for range in ranges {
            device.set_source_range(ip.service(protocol), *range, true);
        }
        set_flags(device, ip, protocol, 3, ServiceFlags::SOURCE_RANGES);
    }
}

fn host_bits(ip: Ip) -> u32 {
    if ip == Ip::V4 { 32 } else { 128 }
}

fn from(ip: Ip, source: IpAddr, port: u16) -> Spec {
    let mut spec = to_vip(ip, 1, udp(port, DNS, b"question"));
    spec.source = source;
    spec
}

fn denied(device: &mut dyn Device, spec: &Spec) {
    dropped(device, &spec.build(), DropReason::SourceNotAllowed);
}

/// Only clients that a range covers get in, by TCP and by UDP; others hear nothing.
pub fn only_those_allowed(device: &mut dyn Device) {
    set_up(device, 3);
    for ip in Ip::BOTH {
        allow(device, ip, &[(ip.client(1), host_bits(ip)), (ip.client(0x100), host_bits(ip) - 8)]);
        for client in [1, 0x100, 0x1ff] {
            Connection::open(device, ip, client, 40_000).talk(device);
            let question = ask(device, ip, client, 5000);
            reply(device, ip, client, 5000, &question);
        }
        for client in [0, 2, 0xff, 0x200] {
            denied(device, &Connection::new(ip, client, 40_000).client_segment(SYN, b""));
            denied(device, &to_vip(ip, client, udp(5000, DNS, b"question")));
        }
    }
}

/// A range of length zero lets everybody in, but nobody of the other family and of another Service.
pub fn whole_family(device: &mut dyn Device) {
    set_up(device, 3);
    let service = Ip::V4.service(IPPROTO_UDP);
    device.set_source_range(service, (IpAddr::from([0; 4]), 0), true);
    for ip in Ip::BOTH {
        for protocol in [IPPROTO_TCP, IPPROTO_UDP] {
            set_flags(device, ip, protocol, 3, ServiceFlags::SOURCE_RANGES);
        }
    }
    for source in [[1, 0, 0, 1], [198, 51, 100, 7], [223, 255, 255, 254]] {
        forwarded(device, &from(Ip::V4, source.into(), 5000));
    }
    denied(device, &Connection::new(Ip::V4, 1, 40_000).client_segment(SYN, b""));
    denied(device, &to_vip(Ip::V6, 1, udp(5000, DNS, b"question")));
    device.set_source_range(Ip::V6.service(IPPROTO_UDP), (IpAddr::from([0u16; 8]), 0), true);
    ask(device, Ip::V6, 1, 5000);
    device.set_source_range(service, (IpAddr::from([0; 4]), 0), false);
    denied(device, &from(Ip::V4, [1, 0, 0, 1].into(), 5001));
}

/// Of nested ranges the widest decides: ranges only allow.
pub fn nested(device: &mut dyn Device) {
    set_up(device, 3);
    for ip in Ip::BOTH {
        let all = host_bits(ip);
        allow(device, ip, &[(ip.client(0), all - 16), (ip.client(0), all - 8), (ip.client(7), all)]);
        let inside = |device: &mut dyn Device, port| {
            for client in [7, 8, 0x708] {
                ask(device, ip, client, port);
            }
        };
        inside(device, 5000);
        let service = ip.service(IPPROTO_UDP);
        device.set_source_range(service, (ip.client(0), all - 8), false);
        device.set_source_range(service, (ip.client(7), all), false);
        inside(device, 5001);
        device.set_source_range(service, (ip.client(7), all), true);
        device.set_source_range(service, (ip.client(0), all - 16), false);
        ask(device, ip, 7, 5002);
        for client in [8, 0x708] {
            denied(device, &to_vip(ip, client, udp(5002, DNS, b"question")));
        }
    }
}

/// As many ranges as a list of partners may have.
pub fn thousands(device: &mut dyn Device) {
    set_up(device, 3);
    for ip in Ip::BOTH {
        let service = ip.service(IPPROTO_UDP);
        set_flags(device, ip, IPPROTO_UDP, 3, ServiceFlags::SOURCE_RANGES);
        for number in 0..5_000 {
            device.set_source_range(service, (ip.client(2 * number), host_bits(ip)), true);
        }
        for number in [0, 1, 777, 2_500, 4_999] {
            ask(device, ip, 2 * number, 5000);
            denied(device, &to_vip(ip, 2 * number + 1, udp(5000, DNS, b"question")));
        }
        for number in 0..5_000 {
            device.set_source_range(service, (ip.client(2 * number), host_bits(ip)), false);
        }
        denied(device, &to_vip(ip, 0, udp(5001, DNS, b"question")));
    }
}

/// Nothing tells a client without permission that there is somebody: no refusal of any kind.
pub fn no_answer_to_others(device: &mut dyn Device) {
    set_up(device, 0);
    for ip in Ip::BOTH {
        for protocol in [IPPROTO_TCP, IPPROTO_UDP] {
            set_flags(device, ip, protocol, 0, ServiceFlags::SOURCE_RANGES);
        }
        for flags in [SYN, ACK, PSH | ACK, FIN | ACK, RST, RST | ACK] {
            let tcp = Tcp {
                source: 40_000,
                destination: HTTP,
                sequence: 1,
                acknowledgment: 2,
                flags,
                options: Vec::new(),
                payload: Vec::new(),
            };
            denied(device, &to_vip(ip, 1, Body::Tcp(tcp)));
        }
        let mut last_hop = to_vip(ip, 1, udp(5000, DNS, b"question"));
        denied(device, &last_hop);
        last_hop.hops = 1;
        denied(device, &last_hop);
        assert!(!device.stats().services.contains_key(&ip.service(IPPROTO_TCP)), "none was refused");
    }
    assert_eq!(drops(device, DropReason::NoBackend) + drops(device, DropReason::NoFlow), 0);
}

/// A connection that is under way stays when its client may not open new ones any more.
pub fn connections_outlive_permission(device: &mut dyn Device) {
    set_up(device, 3);
    for ip in Ip::BOTH {
        allow(device, ip, &[(ip.client(1), host_bits(ip))]);
        let mut connection = Connection::open(device, ip, 1, 40_000);
        let question = ask(device, ip, 1, 5000);
        for protocol in [IPPROTO_TCP, IPPROTO_UDP] {
            device.set_source_range(ip.service(protocol), (ip.client(1), host_bits(ip)), false);
        }
        connection.talk(device);
        reply(device, ip, 1, 5000, &question);
        assert_eq!(ask(device, ip, 1, 5000).destination, question.destination);
        denied(device, &to_vip(ip, 1, udp(5001, DNS, b"question")));
        connection.close(device);
        // The same ports again are a new connection.
        connection.client_sequence = connection.client_sequence.wrapping_add(100_000);
        denied(device, &connection.client_segment(SYN, b""));
        // Without the check everybody is let in, whatever the ranges are.
        set_slots(device, ip, IPPROTO_UDP, 3);
        ask(device, ip, 1, 5001);
    }
}
