//! Connection rate limits: how many connections one client may open.
//!
//! Kernel time goes on meanwhile, so what is refused is refused for a second at least.

use std::net::{IpAddr, Ipv6Addr};

use lb_common::abi::{
    ConnectionLimit, DropReason, IPPROTO_TCP, IPPROTO_UDP, ServiceFlags, Tick, ticks_from_seconds,
};

use super::connection::Connection;
use super::udp::{ask, reply};
use crate::kit::device::Device;
use crate::kit::packet::Spec;
use crate::kit::packet::flags::{ACK, PSH, SYN};
use crate::kit::world::{DNS, Ip, answered, dropped, forwarded, set_flags, set_slots, set_up, to_vip, udp};

/// Limits both Services of both families to a connection in a second.
fn turn_on(device: &mut dyn Device, burst: u32) {
    set_up(device, 3);
    for ip in Ip::BOTH {
        for protocol in [IPPROTO_TCP, IPPROTO_UDP] {
            device.set_connection_limit(ip.service(protocol), ConnectionLimit { rate: 1, burst });
            set_flags(device, ip, protocol, 3, ServiceFlags::CONNECTION_RATE);
        }
    }
}

fn question(ip: Ip, client: u32, port: u16) -> Spec {
    to_vip(ip, client, udp(port, DNS, b"question"))
}

fn refused(device: &mut dyn Device, spec: &Spec) {
    dropped(device, &spec.build(), DropReason::ConnectionRate);
}

/// After the burst a client waits; then it may open as many as it has waited for.
pub fn burst_then_rate(device: &mut dyn Device) {
    turn_on(device, 5);
    for ip in Ip::BOTH {
        for port in 0..5 {
            ask(device, ip, 1, 5000 + port);
        }
        refused(device, &question(ip, 1, 5005));
        device.wait(ticks_from_seconds(3));
        for port in 5..8 {
            ask(device, ip, 1, 5000 + port);
        }
        refused(device, &question(ip, 1, 5008));
        // No more than the burst, however long the pause.
        device.wait(ticks_from_seconds(1_000));
        for port in 8..13 {
            ask(device, ip, 1, 5000 + port);
        }
        refused(device, &question(ip, 1, 5013));
        let service = ip.service(IPPROTO_UDP);
        assert_eq!(device.stats().services[&service].refused, 3, "counted for the Service");
    }
}

/// Whoever is connected stays so, and so do the first packets of a connection that are sent again.
pub fn known_flows_are_not_counted(device: &mut dyn Device) {
    turn_on(device, 2);
    for ip in Ip::BOTH {
        let mut established = Connection::open(device, ip, 1, 40_000);
        let mut beginning = Connection::new(ip, 1, 40_001);
        let syn = beginning.client_segment(SYN, b"");
        for _ in 0..4 {
            forwarded(device, &syn);
        }
        refused(device, &Connection::new(ip, 1, 40_002).client_segment(SYN, b""));
        beginning.handshake(device);
        beginning.talk(device);
        established.talk(device);
        established.close(device);
        let asked = ask(device, ip, 1, 5000);
        for _ in 0..3 {
            reply(device, ip, 1, 5000, &asked);
            ask(device, ip, 1, 5000);
        }
    }
}

/// Neither clients nor Services share a bucket. Who has an IPv6 network is one client.
pub fn is_of_one_client_and_service(device: &mut dyn Device) {
    turn_on(device, 1);
    for ip in Ip::BOTH {
        ask(device, ip, 1, 5000);
        refused(device, &question(ip, 1, 5001));
        Connection::open(device, ip, 1, 40_000);
        refused(device, &Connection::new(ip, 1, 40_001).client_segment(SYN, b""));
    }
    ask(device, Ip::V4, 2, 5000);
    refused(device, &question(Ip::V6, 2, 5000));
    let IpAddr::V6(first) = Ip::V6.client(1) else { panic!("an IPv6 address") };
    let mut parts = first.segments();
    parts[3] ^= 1;
    let mut neighbour = question(Ip::V6, 1, 5000);
    neighbour.source = Ipv6Addr::from(parts).into();
    forwarded(device, &neighbour);
    let snapshots = device.snapshots();
    assert_eq!((snapshots.v4.rates.len(), snapshots.v6.rates.len()), (3, 3));
    assert!(snapshots.v6.rates.keys().all(|key| key.client[8..] == [0; 8]), "networks");
}

/// Who may not connect at all uses nothing up, nor does what begins no connection. What is
/// refused for want of a backend does: refusals are answers.
pub fn what_counts(device: &mut dyn Device) {
    turn_on(device, 2);
    let both = ServiceFlags::CONNECTION_RATE | ServiceFlags::SOURCE_RANGES;
    for ip in Ip::BOTH {
        set_flags(device, ip, IPPROTO_TCP, 3, both);
        for port in 0..3 {
            let syn = Connection::new(ip, 1, 40_000 + port).client_segment(SYN, b"");
            dropped(device, &syn.build(), DropReason::SourceNotAllowed);
        }
        set_flags(device, ip, IPPROTO_TCP, 0, ServiceFlags::CONNECTION_RATE);
        for flags in [ACK, PSH | ACK, SYN | ACK] {
            answered(device, &Connection::new(ip, 1, 40_000).client_segment(flags, b""));
        }
        for port in 0..2 {
            answered(device, &Connection::new(ip, 1, 40_000 + port).client_segment(SYN, b""));
        }
        refused(device, &Connection::new(ip, 1, 40_002).client_segment(SYN, b""));
    }
}

/// However long a client stays away, its bucket is full when it returns: time wraps in between.
pub fn years_pass(device: &mut dyn Device) {
    turn_on(device, 2);
    let hour = ticks_from_seconds(3_600);
    for ip in Ip::BOTH {
        let pauses = [1 << 30, (1 << 31) - hour, 1 << 31, (1 << 31) + hour, Tick::MAX - hour];
        for (port, pause) in (5000..).step_by(10).zip(pauses) {
            ask(device, ip, 1, port);
            ask(device, ip, 1, port + 1);
            refused(device, &question(ip, 1, port + 2));
            device.wait(pause);
        }
        ask(device, ip, 1, 6000);
    }
}

/// A limit that changes holds at once; one that is taken away and comes back knows its clients.
pub fn off_and_on(device: &mut dyn Device) {
    turn_on(device, 4);
    for ip in Ip::BOTH {
        let service = ip.service(IPPROTO_UDP);
        for port in 0..4 {
            ask(device, ip, 1, 5000 + port);
        }
        refused(device, &question(ip, 1, 5004));
        set_slots(device, ip, IPPROTO_UDP, 3);
        for port in 4..20 {
            ask(device, ip, 1, 5000 + port);
        }
        set_flags(device, ip, IPPROTO_UDP, 3, ServiceFlags::CONNECTION_RATE);
        refused(device, &question(ip, 1, 5020));
        // The burst that was used counts.
        device.set_connection_limit(service, ConnectionLimit { rate: 1, burst: 6 });
        ask(device, ip, 1, 5021);
        ask(device, ip, 1, 5022);
        refused(device, &question(ip, 1, 5023));
        // More than the bucket holds by now cannot be missing from it.
        device.set_connection_limit(service, ConnectionLimit { rate: 1, burst: 1 });
        ask(device, ip, 1, 5024);
        refused(device, &question(ip, 1, 5025));
        // The flag alone limits nothing.
        device.set_connection_limit(service, ConnectionLimit::default());
        for port in 26..40 {
            ask(device, ip, 1, 5000 + port);
        }
    }
}
