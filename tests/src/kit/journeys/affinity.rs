//! Session affinity: a client's connections go to the backend that had its last one.

use std::net::IpAddr;

use lb_common::abi::{
    Backend, BackendState, DropReason, IPPROTO_TCP, IPPROTO_UDP, ServiceFlags, ticks_from_seconds,
};

use super::connection::Connection;
use super::udp::ask;
use crate::kit::device::Device;
use crate::kit::world::{DNS, Ip, backend, dropped, set_flags, set_slots, set_up, to_vip, udp};

/// What Kubernetes takes unless told otherwise, in seconds.
const HOURS: u32 = 10_800;

/// Turns affinity on for both Services of both families, with as many backends.
fn turn_on(device: &mut dyn Device, backends: u32, seconds: u32) {
    set_up(device, backends);
    for ip in Ip::BOTH {
        for protocol in [IPPROTO_TCP, IPPROTO_UDP] {
            device.set_affinity_ticks(ip.service(protocol), ticks_from_seconds(seconds));
            set_flags(device, ip, protocol, backends, ServiceFlags::AFFINITY);
        }
    }
}

fn connect(device: &mut dyn Device, ip: Ip, client: u32, port: u16) -> IpAddr {
    Connection::open(device, ip, client, port).backend()
}

/// Whatever the port, a client gets the same backend, and takes no turn from others.
pub fn sticks(device: &mut dyn Device) {
    turn_on(device, 3, HOURS);
    for ip in Ip::BOTH {
        for client in 0..6 {
            let (first, question) = (connect(device, ip, client, 40_000), ask(device, ip, client, 5000));
            assert_eq!(first, ip.backend(client % 3), "clients take turns");
            for port in 1..5 {
                assert_eq!(connect(device, ip, client, 40_000 + port), first);
                assert_eq!(ask(device, ip, client, 5000 + port).destination, question.destination);
            }
        }
    }
}

/// The timeout counts from the begin of the client's last connection.
pub fn expires(device: &mut dyn Device) {
    turn_on(device, 3, 600);
    for ip in Ip::BOTH {
        let first = ask(device, ip, 1, 5000).destination;
        for port in 5001..5004 {
            device.wait(ticks_from_seconds(590));
            assert_eq!(ask(device, ip, 1, port).destination, first, "each connection begins the time anew");
        }
        // Packets of a connection that is there do not.
        for _ in 0..30 {
            device.wait(ticks_from_seconds(25));
            ask(device, ip, 1, 5003);
        }
        let second = ask(device, ip, 1, 5004).destination;
        assert_ne!(second, first, "the next in turn");
        assert_eq!(ask(device, ip, 1, 5005).destination, second);
    }
}

/// Clients do not share a backend, and Services do not share a client.
pub fn is_of_one_client_and_service(device: &mut dyn Device) {
    turn_on(device, 2, HOURS);
    for ip in Ip::BOTH {
        let one = connect(device, ip, 1, 40_000);
        let two = connect(device, ip, 2, 40_000);
        assert_ne!(one, two);
        // The other Service's first turn has nothing to do with it.
        assert_eq!(ask(device, ip, 2, 5000).destination, ip.backend(0));
        assert_eq!(connect(device, ip, 2, 40_001), two);
        assert_eq!(connect(device, ip, 1, 40_001), one);
        assert_eq!(ask(device, ip, 2, 5001).destination, ip.backend(0));
    }
    let snapshots = device.snapshots();
    assert_eq!((snapshots.v4.affinities.len(), snapshots.v6.affinities.len()), (3, 3));
}

/// A backend that takes no new connections, is gone, or whose index is another's by now, is left for
/// the next in turn; the client stays there.
pub fn leaves_backends_that_are_gone(device: &mut dyn Device) {
    for ip in Ip::BOTH {
        for round in 0..4u16 {
            turn_on(device, 2, HOURS);
            let port = 5000 + 10 * round;
            let first = ask(device, ip, 1, port).destination;
            let number = u32::from(first == ip.backend(1));
            let index = ip.backend_index(IPPROTO_UDP, number);
            let mut entry = backend(ip, IPPROTO_UDP, number);
            match round {
                0 => entry.state = BackendState::Terminating as u8,
                1 => entry = Backend { generation: 2, ..Backend::default() },
                2 => entry.generation = 2,
                _ => entry.service = ip.service(IPPROTO_TCP),
            }
            device.set_backend(index, entry);
            // Only the other one has a slot.
            device.set_slot(ip.first_slot(IPPROTO_UDP), ip.backend_index(IPPROTO_UDP, 1 - number));
            set_only(device, ip, 1 - number);
            let second = ask(device, ip, 1, port + 1).destination;
            assert_eq!(second, ip.backend(1 - number));
            // The first one comes back; nobody returns to it.
            turn_on(device, 2, HOURS);
            for more in 2..5 {
                assert_eq!(ask(device, ip, 1, port + more).destination, second);
            }
        }
    }
}

/// Leaves one backend of the UDP Service in the slots.
fn set_only(device: &mut dyn Device, ip: Ip, number: u32) {
    set_flags(device, ip, IPPROTO_UDP, 1, ServiceFlags::AFFINITY);
    device.set_slot(ip.first_slot(IPPROTO_UDP), ip.backend_index(IPPROTO_UDP, number));
}

/// So is a backend that no way is known to.
pub fn leaves_one_out_of_reach(device: &mut dyn Device) {
    turn_on(device, 2, HOURS);
    for ip in Ip::BOTH {
        assert_eq!(connect(device, ip, 1, 40_000), ip.backend(0));
        let mut lost = backend(ip, IPPROTO_TCP, 0);
        lost.next_hop.ifindex = 0;
        device.set_backend(ip.backend_index(IPPROTO_TCP, 0), lost);
        for port in 40_001..40_004 {
            assert_eq!(connect(device, ip, 1, port), ip.backend(1), "the next in turn, and again");
        }
        device.set_backend(ip.backend_index(IPPROTO_TCP, 0), backend(ip, IPPROTO_TCP, 0));
        assert_eq!(connect(device, ip, 1, 40_004), ip.backend(1));
    }
}

/// Clients that come back do not disturb the turns of new ones. A connection that could not be made
/// leaves nothing to stick to.
pub fn keeps_others_in_turn(device: &mut dyn Device) {
    turn_on(device, 3, HOURS);
    for ip in Ip::BOTH {
        for client in 1..=9 {
            assert_eq!(ask(device, ip, client, 5000).destination, ip.backend((client - 1) % 3));
            ask(device, ip, 1, 5000 + client as u16);
        }
        let mut unreachable = backend(ip, IPPROTO_UDP, 0);
        unreachable.next_hop.ifindex = 0;
        device.set_backend(ip.backend_index(IPPROTO_UDP, 0), unreachable);
        let packet = to_vip(ip, 10, udp(5000, DNS, b"question"));
        dropped(device, &packet.build(), DropReason::NoNeighbour);
        assert_eq!(ask(device, ip, 10, 5000).destination, ip.backend(1));
        assert_eq!(ask(device, ip, 10, 5001).destination, ip.backend(1));
    }
}

/// Turned off, connections go in turn; turned on again, what was remembered holds.
pub fn off_and_on(device: &mut dyn Device) {
    turn_on(device, 3, HOURS);
    for ip in Ip::BOTH {
        let first = connect(device, ip, 1, 40_000);
        set_slots(device, ip, IPPROTO_TCP, 3);
        let others: Vec<_> = (1..4).map(|port| connect(device, ip, 1, 40_000 + port)).collect();
        assert_eq!(others, [ip.backend(1), ip.backend(2), ip.backend(0)]);
        set_flags(device, ip, IPPROTO_TCP, 3, ServiceFlags::AFFINITY);
        assert_eq!(connect(device, ip, 1, 40_010), first);
    }
}
