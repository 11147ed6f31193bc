//! VLAN tags.

use lb_common::abi::IPPROTO_TCP;

use super::connection::Connection;
use crate::kit::device::Device;
use crate::kit::packet::flags::{ACK, PSH, SYN};
use crate::kit::world::{Ip, backend, set_up};

fn tag_backends(device: &mut dyn Device, ip: Ip, vlan: [u8; 4]) {
    let mut entry = backend(ip, IPPROTO_TCP, 0);
    entry.next_hop.vlan = vlan;
    device.set_backend(ip.backend_index(IPPROTO_TCP, 0), entry);
}

/// A connection of a client with these tags to a backend behind those; answers come back with the
/// client's.
fn connect(device: &mut dyn Device, ip: Ip, port: u16, client: &[u16], backend: &[u16]) {
    let mut connection = Connection::new(ip, 1, port);
    connection.vlan = client.to_vec();
    let seen = connection.from_client(device, SYN, b"");
    assert_eq!(seen.vlan, backend, "towards the backend");
    // What comes from the backend carries the backend's tags.
    let segments = [(SYN | ACK, &b""[..]), (ACK, b"hello"), (ACK | PSH, b"odd")];
    for (flags, payload) in segments {
        let mut spec = connection.backend_segment(flags, payload);
        spec.vlan = backend.to_vec();
        let seen = crate::kit::world::forwarded(device, &spec);
        assert_eq!(seen.vlan, client, "towards the client");
        assert_eq!((seen.source, seen.destination), (ip.vip(), ip.client(1)));
        if flags & SYN != 0 {
            connection.backend_sequence = connection.backend_sequence.wrapping_add(1);
        }
        let seen = connection.from_client(device, ACK, b"");
        assert_eq!(seen.vlan, backend);
    }
}

/// Tags on one side only.
pub fn pop_and_push(device: &mut dyn Device) {
    set_up(device, 1);
    for ip in Ip::BOTH {
        connect(device, ip, 40_000, &[5], &[]);
        connect(device, ip, 40_001, &[0xefff], &[]);
        connect(device, ip, 40_002, &[5, 6], &[]);
        tag_backends(device, ip, [0, 9, 0, 0]);
        connect(device, ip, 40_003, &[], &[9]);
        tag_backends(device, ip, [0, 9, 0, 8]);
        connect(device, ip, 40_004, &[], &[9, 8]);
    }
}

/// One tag on either side, the same and different.
pub fn keep(device: &mut dyn Device) {
    set_up(device, 1);
    for ip in Ip::BOTH {
        tag_backends(device, ip, [0, 9, 0, 0]);
        connect(device, ip, 40_000, &[9], &[9]);
        connect(device, ip, 40_001, &[5], &[9]);
    }
}

/// Two tags on either side, and unequal numbers of them.
pub fn two_tags(device: &mut dyn Device) {
    set_up(device, 1);
    for ip in Ip::BOTH {
        tag_backends(device, ip, [0, 9, 0, 8]);
        connect(device, ip, 40_000, &[9, 8], &[9, 8]);
        connect(device, ip, 40_001, &[3, 4], &[9, 8]);
        connect(device, ip, 40_002, &[3], &[9, 8]);
        tag_backends(device, ip, [0, 9, 0, 0]);
        connect(device, ip, 40_003, &[3, 4], &[9]);
    }
}

/// A tag of VLAN 0 is a priority, not a VLAN (IEEE 802.1Q, 6.9): it ends here.
pub fn priority_tag(device: &mut dyn Device) {
    set_up(device, 1);
    for ip in Ip::BOTH {
        for (port, tags, back) in [(40_000, vec![0], vec![]), (40_001, vec![0, 5], vec![5])] {
            let mut connection = Connection::new(ip, 1, port);
            connection.vlan = tags;
            assert!(connection.from_client(device, SYN, b"").vlan.is_empty());
            let seen = crate::kit::world::forwarded(device, &connection.backend_segment(SYN | ACK, b""));
            assert_eq!(seen.vlan, back);
        }
    }
}
