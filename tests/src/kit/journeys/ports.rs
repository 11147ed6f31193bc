//! Source ports towards backends, and entries that the LRU has taken.

use std::collections::BTreeSet;

use lb_common::abi::{Config, DropReason, IPPROTO_TCP};

use super::connection::{Connection, states};
use super::udp::{ask, reply};
use crate::kit::device::{AnyKey, Device};
use crate::kit::packet::flags::{ACK, SYN};
use crate::kit::world::{DNS, Ip, backend, dropped, set_up};

/// All ports of one client, as many as there are source ports, get one each.
pub fn one_client_never_collides(device: &mut dyn Device) {
    set_up(device, 1);
    let config = Config { snat_port_first: 2000, snat_port_count: 500, ..Config::default() };
    device.set_config(config);
    for ip in Ip::BOTH {
        let mut taken = BTreeSet::new();
        for port in 0..500 {
            let mut connection = Connection::new(ip, 1, 33_000 + port);
            connection.from_client(device, SYN, b"");
            let (address, port) = connection.source();
            assert_eq!(address, ip.snat(1));
            assert!((2000..2500).contains(&port));
            assert!(taken.insert(port), "{port} is given twice");
        }
    }
}

/// The ports of fifty clients do not collide, and everyone's answers come back to them.
pub fn fifty_clients(device: &mut dyn Device) {
    set_up(device, 1);
    for ip in Ip::BOTH {
        let mut taken = BTreeSet::new();
        let mut connections = Vec::new();
        for number in 0..400u32 {
            let mut connection = Connection::new(ip, number % 50, 40_000 + (number / 50) as u16);
            connection.from_client(device, SYN, b"");
            assert!(taken.insert(connection.source()), "{:?} is given twice", connection.source());
            connections.push(connection);
        }
        for connection in &mut connections {
            connection.from_backend(device, SYN | ACK, b"");
            connection.from_client(device, ACK, b"");
        }
    }
}

/// When all ports are taken, new connections are dropped for that reason; a second source address
/// makes room.
pub fn exhaustion(device: &mut dyn Device) {
    set_up(device, 1);
    device.set_config(Config { snat_port_first: 2000, snat_port_count: 8, ..Config::default() });
    for ip in Ip::BOTH {
        let mut connections: Vec<_> = (0..8).map(|port| Connection::new(ip, 1, 33_000 + port)).collect();
        for connection in &mut connections {
            connection.from_client(device, SYN, b"");
        }
        let mut more = Connection::new(ip, 1, 34_000);
        dropped(device, &more.client_segment(SYN, b"").build(), DropReason::SnatPortsExhausted);
        let mut entry = backend(ip, IPPROTO_TCP, 0);
        entry.snat_count = 2;
        device.set_backend(ip.backend_index(IPPROTO_TCP, 0), entry);
        more.from_client(device, SYN, b"");
        assert_eq!(more.source().0, ip.snat(2));
        for connection in &mut connections {
            connection.from_backend(device, SYN | ACK, b"");
        }
        entry.snat_count = 0;
        device.set_backend(ip.backend_index(IPPROTO_TCP, 0), entry);
        let spec = Connection::new(ip, 1, 35_000).client_segment(SYN, b"");
        dropped(device, &spec.build(), DropReason::NoSnatAddress);
    }
}

/// A flow whose reply entry was forgotten, and whose port somebody else has got since: its packets
/// must not get into the other one's connection.
pub fn lost_port_of_another(device: &mut dyn Device) {
    set_up(device, 1);
    device.set_config(Config { snat_port_first: 2000, snat_port_count: 1, ..Config::default() });
    for ip in Ip::BOTH {
        for is_open in [false, true] {
            let mut lost = Connection::new(ip, 1, 40_000 + u16::from(is_open));
            lost.from_client(device, SYN, b"");
            assert!(device.evict(lost.reply_key()));
            let mut other = Connection::new(ip, 2, 40_000 + u16::from(is_open));
            other.from_client(device, SYN, b"");
            assert_eq!(other.source(), lost.source());
            if is_open {
                other.from_backend(device, SYN | ACK, b"");
                other.from_client(device, ACK, b"");
            }
            crate::kit::world::answered(device, &lost.client_segment(ACK, b"stray"));
            let again = lost.client_segment(SYN, b"");
            dropped(device, &again.build(), DropReason::SnatPortsExhausted);
            if !is_open {
                other.from_backend(device, SYN | ACK, b"");
                other.from_client(device, ACK, b"");
            }
            other.talk(device);
            other.close(device);
            assert!(device.evict(other.reply_key()));
        }
    }
}

/// A flow that has lost one of its entries does not limp.
pub fn lost_half_is_rebuilt(device: &mut dyn Device) {
    set_up(device, 2);
    for ip in Ip::BOTH {
        // The reply entry, lost before and after the SYN-ACK: the client's packet brings it back.
        let mut connection = Connection::new(ip, 1, 40_000);
        connection.from_client(device, SYN, b"");
        assert!(device.evict(connection.reply_key()));
        connection.client_sequence -= 1;
        connection.from_client(device, SYN, b"");
        connection.from_backend(device, SYN | ACK, b"");
        assert!(device.evict(connection.reply_key()));
        connection.from_client(device, ACK, b"");
        connection.talk(device);
        assert_eq!(states(device, &connection).map(|found| found.map(|(_, place)| place)), [Some(true); 2]);
        // The client's entry: the backend's packet brings it back.
        let mut connection = Connection::new(ip, 1, 40_001);
        connection.from_client(device, SYN, b"");
        assert!(device.evict(connection.key()));
        connection.from_backend(device, SYN | ACK, b"");
        connection.from_client(device, ACK, b"");
        connection.talk(device);
        assert_eq!(states(device, &connection).map(|found| found.map(|(_, place)| place)), [Some(true); 2]);
        // Of a closed connection nothing is rebuilt.
        connection.close(device);
        assert!(device.evict(connection.reply_key()));
        connection.from_client(device, ACK, b"");
        assert_eq!(states(device, &connection)[1], None);
        // UDP, both halves.
        let question = ask(device, ip, 1, 5000);
        let key = AnyKey::new((ip.client(1), 5000), (ip.vip(), DNS), 17);
        let (source, destination) = question.ports();
        let reply_key = AnyKey::new((question.destination, destination), (question.source, source), 17);
        assert!(device.evict(reply_key));
        assert_eq!(ask(device, ip, 1, 5000).ports(), question.ports());
        reply(device, ip, 1, 5000, &question);
        assert!(device.evict(key));
        reply(device, ip, 1, 5000, &question);
        assert_eq!(ask(device, ip, 1, 5000).ports(), question.ports());
    }
}

/// A backend whose index was given to another one still answers: the client's entry that this brings
/// back must not lead to the other one's generation.
pub fn rebuilt_half_of_a_reused_backend_index(device: &mut dyn Device) {
    set_up(device, 1);
    for ip in Ip::BOTH {
        let mut connection = Connection::new(ip, 1, 40_000);
        connection.from_client(device, SYN, b"");
        assert!(device.evict(connection.key()));
        let mut entry = backend(ip, IPPROTO_TCP, 4);
        entry.generation = 2;
        device.set_backend(ip.backend_index(IPPROTO_TCP, 0), entry);
        connection.from_backend(device, SYN | ACK, b"");
        crate::kit::world::answered(device, &connection.client_segment(ACK, b""));
    }
}
