//! Packets that are larger than their way on takes.

use lb_common::abi::{Backend, Config, DropReason, IPPROTO_TCP, IPPROTO_UDP};

use super::connection::Connection;
use crate::kit::device::Device;
use crate::kit::packet::Spec;
use crate::kit::packet::flags::{ACK, PSH};
use crate::kit::seen::{self, SeenBody};
use crate::kit::world::{DNS, Ip, answered, backend, drops, forwarded, set_up, to_vip, udp};

const MTU: u16 = 1_300;

fn narrow(device: &mut dyn Device) {
    set_up(device, 1);
    for ip in Ip::BOTH {
        for protocol in [IPPROTO_TCP, IPPROTO_UDP] {
            let entry = Backend { mtu: MTU, ..backend(ip, protocol, 0) };
            device.set_backend(ip.backend_index(protocol, 0), entry);
        }
    }
}

/// Bytes of payload that fill an IP packet.
fn fitting(ip: Ip, transport: usize) -> usize {
    usize::from(MTU) - if ip == Ip::V4 { 20 } else { 40 } - transport
}

/// Sends a packet that does not fit; its sender learns what would.
fn too_big(device: &mut dyn Device, ip: Ip, spec: &Spec) {
    let before = drops(device, DropReason::TooBig);
    let answer = answered(device, spec);
    assert_eq!(answer.source, spec.destination);
    let SeenBody::Icmp { kind, code, rest, .. } = answer.body else { panic!("{answer:?}") };
    assert_eq!((kind, code), if ip == Ip::V4 { (3, 4) } else { (2, 0) });
    assert_eq!(rest, u32::from(MTU).to_be_bytes());
    assert_eq!(drops(device, DropReason::TooBig), before + 1);
}

/// What fits goes on, one byte more does not: of established flows, of new ones.
pub fn towards_backends(device: &mut dyn Device) {
    narrow(device);
    for ip in Ip::BOTH {
        let mut connection = Connection::open(device, ip, 1, 40_000);
        connection.from_client(device, PSH | ACK, &vec![1; fitting(ip, 20)]);
        let large = connection.client_segment(PSH | ACK, &vec![2; fitting(ip, 20) + 1]);
        too_big(device, ip, &large);
        // The segment is sent anew, in two.
        connection.talk(device);
        forwarded(device, &to_vip(ip, 1, udp(5_000, DNS, &vec![3; fitting(ip, 8)])));
        too_big(device, ip, &to_vip(ip, 1, udp(5_000, DNS, &vec![3; fitting(ip, 8) + 1])));
        let flows = |device: &mut dyn Device| {
            let all = device.snapshots();
            all.v4.transient.len() + all.v6.transient.len()
        };
        let before = flows(device);
        too_big(device, ip, &to_vip(ip, 2, udp(5_000, DNS, &vec![3; fitting(ip, 8) + 1])));
        assert_eq!(flows(device), before, "nothing was begun");
    }
}

/// The same the other way: the clients' device takes less than the backends'.
pub fn towards_clients(device: &mut dyn Device) {
    set_up(device, 1);
    device.set_config(Config { client_mtu: MTU, ..Config::default() });
    for ip in Ip::BOTH {
        let mut connection = Connection::open(device, ip, 1, 40_000);
        connection.from_backend(device, PSH | ACK, &vec![1; fitting(ip, 20)]);
        let large = connection.backend_segment(PSH | ACK, &vec![2; fitting(ip, 20) + 1]);
        too_big(device, ip, &large);
        connection.talk(device);
    }
}

/// The quote is of the packet as it came, so that its sender knows it again.
pub fn quoted(device: &mut dyn Device) {
    narrow(device);
    let connection = Connection::open(device, Ip::V4, 1, 40_000);
    let large = connection.client_segment(PSH | ACK, &vec![2; 1_400]);
    let (_, bytes) = device.send(&large.build());
    let sent = large.build();
    let seen = seen::read(&bytes).expect("it is well-formed");
    assert!(sent[14..].starts_with(seen.payload()), "{seen:?}");
}
