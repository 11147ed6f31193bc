//! Which backend a connection gets, other than in turn.

use std::collections::BTreeMap;
use std::net::IpAddr;

use lb_common::abi::{
    DropReason, FlowKey, IPPROTO_TCP, IPPROTO_UDP, Service, ServiceFlags, V4, V6, ticks_from_seconds,
};
use lb_common::forward::schedule;

use super::connection::Connection;
use super::udp::ask;
use crate::kit::device::{AnyKey, Device};
use crate::kit::packet::flags::SYN;
use crate::kit::world::{DNS, HTTP, Ip, backend, dropped, set_flags, set_up};

/// Places of the lookup tables here.
const PLACES: u32 = 251;
/// Backends here.
const BACKENDS: u32 = 5;

/// Whose a place is: any pattern will do.
fn owner(place: u32) -> u32 {
    (place * 7 + place / 11) % BACKENDS
}

/// Gives a Service a lookup table, from a slot on, whose backends have the indices that `index` says.
fn set_table(
    device: &mut dyn Device,
    (ip, protocol): (Ip, u8),
    first: u32,
    index: impl Fn(u32) -> u32,
    flags: u8,
) {
    for number in 0..BACKENDS {
        device.set_backend(index(number), backend(ip, protocol, number));
    }
    for place in 0..PLACES {
        device.set_slot(first + place, index(owner(place)));
    }
    let service = Service::new(first, PLACES, ServiceFlags::MAGLEV | flags);
    device.set_service(ip.service(protocol), service);
}

/// Whom the lookup table gives a tuple.
fn expected(ip: Ip, protocol: u8, client: u32, port: u16, flags: u8) -> IpAddr {
    let to = if protocol == IPPROTO_TCP { HTTP } else { DNS };
    let entry = Service::new(0, PLACES, ServiceFlags::MAGLEV | flags);
    let place = match AnyKey::new((ip.client(client), port), (ip.vip(), to), protocol) {
        AnyKey::V4(key) => place_v4(&key, entry),
        AnyKey::V6(key) => schedule::by_client::<V6>(&key, entry),
    };
    ip.backend(owner(place))
}

fn place_v4(key: &FlowKey<[u8; 4]>, entry: Service) -> u32 {
    schedule::by_client::<V4>(key, entry)
}

/// Nodes number backends and slots as they like; a client gets the same backend from all of them.
pub fn same_backend_in_any_layout(device: &mut dyn Device) {
    set_up(device, BACKENDS);
    for ip in Ip::BOTH {
        let index = |number: u32| ip.backend_index(IPPROTO_UDP, number);
        let first = ip.first_slot(IPPROTO_UDP);
        set_table(device, (ip, IPPROTO_UDP), first, index, 0);
        let tuples = || (0..4u32).flat_map(|client| (5_000..5_010u16).map(move |port| (client, port)));
        let mut used: BTreeMap<IpAddr, u32> = BTreeMap::new();
        for (client, port) in tuples() {
            let seen = ask(device, ip, client, port).destination;
            assert_eq!(seen, expected(ip, IPPROTO_UDP, client, port, 0));
            *used.entry(seen).or_default() += 1;
        }
        assert_eq!(used.len(), BACKENDS as usize, "all take part: {used:?}");
        device.wait(ticks_from_seconds(200));
        set_table(device, (ip, IPPROTO_UDP), first + 256, |number| index(BACKENDS - 1 - number), 0);
        for (client, port) in tuples() {
            let seen = ask(device, ip, client, port).destination;
            assert_eq!(seen, expected(ip, IPPROTO_UDP, client, port, 0), "client {client} port {port}");
        }
    }
}

/// With affinity the address decides alone, and nothing is remembered.
pub fn hashed_clients_stick(device: &mut dyn Device) {
    set_up(device, BACKENDS);
    for ip in Ip::BOTH {
        let index = |number: u32| ip.backend_index(IPPROTO_TCP, number);
        let first = ip.first_slot(IPPROTO_TCP);
        set_table(device, (ip, IPPROTO_TCP), first, index, ServiceFlags::AFFINITY);
        for client in 0..8 {
            for port in 40_000..40_004 {
                let seen = Connection::open(device, ip, client, port).backend();
                assert_eq!(seen, expected(ip, IPPROTO_TCP, client, port, ServiceFlags::AFFINITY));
                assert_eq!(seen, expected(ip, IPPROTO_TCP, client, 1, ServiceFlags::AFFINITY));
            }
        }
    }
    let snapshots = device.snapshots();
    assert_eq!((snapshots.v4.affinities.len(), snapshots.v6.affinities.len()), (0, 0));
}

/// Gives both Services of a family as many backends, by least connections.
fn set_least(device: &mut dyn Device, ip: Ip, backends: u32) {
    for protocol in [IPPROTO_TCP, IPPROTO_UDP] {
        set_flags(device, ip, protocol, backends, ServiceFlags::LEAST_CONNECTIONS);
    }
}

/// The open flows of each of a Service's first backends.
fn open(device: &mut dyn Device, ip: Ip, protocol: u8, backends: u32) -> Vec<u32> {
    let open = device.stats().open;
    let of = |number| open.get(&ip.backend_index(protocol, number)).copied().unwrap_or_default();
    (0..backends).map(of).collect()
}

/// Of backends that have as many, the next in turn.
pub fn idle_backends_take_turns(device: &mut dyn Device) {
    set_up(device, 3);
    for ip in Ip::BOTH {
        set_least(device, ip, 3);
        for round in 0..7u16 {
            let mut connection = Connection::open(device, ip, 1, 40_000 + round);
            assert_eq!(connection.backend(), ip.backend(u32::from(round) % 3));
            connection.close(device);
            assert_eq!(open(device, ip, IPPROTO_TCP, 3), [0; 3]);
        }
    }
}

/// Whoever has closed most gets the next ones.
pub fn fewest_open_connections(device: &mut dyn Device) {
    set_up(device, 3);
    for ip in Ip::BOTH {
        set_least(device, ip, 3);
        let mut connections: Vec<_> =
            (0..9).map(|round| Connection::open(device, ip, 1, 40_000 + round)).collect();
        assert_eq!(open(device, ip, IPPROTO_TCP, 3), [3; 3]);
        for connection in connections.iter_mut().filter(|connection| connection.backend() == ip.backend(1)) {
            connection.close(device);
        }
        assert_eq!(open(device, ip, IPPROTO_TCP, 3), [3, 0, 3]);
        for port in 50_000..50_003 {
            assert_eq!(Connection::open(device, ip, 1, port).backend(), ip.backend(1));
        }
        assert_eq!(open(device, ip, IPPROTO_TCP, 3), [3; 3]);
    }
}

/// Open connections are as many as weights are to each other.
pub fn weights_divide(device: &mut dyn Device) {
    set_up(device, 3);
    for ip in Ip::BOTH {
        set_least(device, ip, 3);
        for (number, weight) in [(0, 1), (1, 2), (2, 5)] {
            let entry = lb_common::abi::Backend { weight, ..backend(ip, IPPROTO_TCP, number) };
            device.set_backend(ip.backend_index(IPPROTO_TCP, number), entry);
        }
        for round in 0..40 {
            Connection::open(device, ip, 1, 40_000 + round);
        }
        assert_eq!(open(device, ip, IPPROTO_TCP, 3), [5, 10, 25]);
    }
}

/// A backend that no way is known to never has a connection, and still does not get them all.
pub fn out_of_reach_comes_last(device: &mut dyn Device) {
    set_up(device, 2);
    for ip in Ip::BOTH {
        set_least(device, ip, 2);
        let mut lost = backend(ip, IPPROTO_TCP, 0);
        lost.next_hop.ifindex = 0;
        device.set_backend(ip.backend_index(IPPROTO_TCP, 0), lost);
        for round in 0..5 {
            assert_eq!(Connection::open(device, ip, 1, 40_000 + round).backend(), ip.backend(1));
        }
    }
}

/// A backend of a lookup table that no way is known to leaves its clients to others: each to the same one
/// every time. Nobody else moves.
pub fn others_stand_in_for_one_out_of_reach(device: &mut dyn Device) {
    const FLAGS: u8 = ServiceFlags::AFFINITY;
    set_up(device, BACKENDS);
    for ip in Ip::BOTH {
        let index = |number: u32| ip.backend_index(IPPROTO_TCP, number);
        set_table(device, (ip, IPPROTO_TCP), ip.first_slot(IPPROTO_TCP), index, FLAGS);
        let mut lost = backend(ip, IPPROTO_TCP, 0);
        lost.next_hop.ifindex = 0;
        device.set_backend(index(0), lost);
        let mut moved = 0;
        for client in 0..20 {
            let first = expected(ip, IPPROTO_TCP, client, 1, FLAGS);
            let found = Connection::open(device, ip, client, 40_000).backend();
            assert_eq!(Connection::open(device, ip, client, 40_001).backend(), found);
            assert_eq!(found == first, first != ip.backend(0));
            moved += u32::from(found != first);
        }
        assert!(moved > 0, "somebody had it");
        for number in 0..BACKENDS {
            lost = backend(ip, IPPROTO_TCP, number);
            lost.next_hop.ifindex = 0;
            device.set_backend(index(number), lost);
        }
        let syn = Connection::new(ip, 1, 40_002).client_segment(SYN, b"").build();
        dropped(device, &syn, DropReason::NoNeighbour);
    }
}

/// Of more backends than are compared each time, those that have fewer still get nearly all.
pub fn many_backends(device: &mut dyn Device) {
    const MANY: u32 = 30;
    set_up(device, MANY);
    for ip in Ip::BOTH {
        set_least(device, ip, MANY);
        for round in 0..MANY as u16 {
            assert_eq!(Connection::open(device, ip, 1, 40_000 + round).backend(), ip.backend(round.into()));
        }
        // Half of them get ahead: the others catch up.
        for number in 0..MANY {
            device.set_slot(ip.first_slot(IPPROTO_TCP) + number, ip.backend_index(IPPROTO_TCP, number % 15));
        }
        for round in 0..15 {
            Connection::open(device, ip, 2, 40_000 + round);
        }
        set_least(device, ip, MANY);
        for round in 0..15 {
            Connection::open(device, ip, 3, 40_000 + round);
        }
        let open = open(device, ip, IPPROTO_TCP, MANY);
        let caught_up = open[15..].iter().filter(|flows| **flows == 2).count();
        assert!(caught_up >= 13, "{open:?}");
    }
}

/// Whatever ends a flow is counted once: both FINs, an RST, a UDP session that ran out.
pub fn endings_are_counted(device: &mut dyn Device) {
    use crate::kit::packet::flags::{ACK, FIN, RST, SYN};
    set_up(device, 1);
    for ip in Ip::BOTH {
        set_least(device, ip, 1);
        let count = |device: &mut dyn Device, protocol| open(device, ip, protocol, 1)[0];
        let mut closed = Connection::open(device, ip, 1, 40_000);
        let mut reset = Connection::open(device, ip, 1, 40_001);
        let mut beginner = Connection::new(ip, 1, 40_002);
        beginner.from_client(device, SYN, b"");
        beginner.client_sequence -= 1;
        beginner.from_client(device, SYN, b"");
        assert_eq!(count(device, IPPROTO_TCP), 3, "a SYN that is sent again is no connection");
        closed.from_client(device, FIN | ACK, b"");
        assert_eq!(count(device, IPPROTO_TCP), 3);
        closed.from_backend(device, FIN | ACK, b"");
        closed.from_client(device, ACK, b"");
        closed.from_backend(device, RST, b"");
        assert_eq!(count(device, IPPROTO_TCP), 2);
        reset.from_backend(device, RST | ACK, b"");
        reset.from_client(device, RST, b"");
        assert_eq!(count(device, IPPROTO_TCP), 1);
        beginner.from_backend(device, RST | ACK, b"");
        assert_eq!(count(device, IPPROTO_TCP), 0);

        ask(device, ip, 1, 5_000);
        ask(device, ip, 1, 5_000);
        assert_eq!(count(device, IPPROTO_UDP), 1);
        device.wait(ticks_from_seconds(200));
        ask(device, ip, 1, 5_000);
        assert_eq!(count(device, IPPROTO_UDP), 1, "one that has run out is replaced");
    }
}
