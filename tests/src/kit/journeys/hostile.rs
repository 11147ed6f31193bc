//! What is not ours, and what nobody should send.

use lb_common::abi::{Backend, DropReason, IPPROTO_TCP, Service};

use super::connection::Connection;
use crate::kit::device::Device;
use crate::kit::host::Hook;
use crate::kit::packet::flags::SYN;
use crate::kit::packet::{Body, Spec, Tcp};
use crate::kit::world::{DNS, HTTP, Ip, backend, dropped, passed, set_slots, set_up, to_vip, udp};

fn syn(ip: Ip) -> Spec {
    to_vip(ip, 1, Body::Tcp(Tcp { source: 40_000, destination: HTTP, flags: SYN, ..Tcp::default() }))
}

/// Other addresses, ports, protocols, EtherTypes: untouched, and nothing is remembered.
pub fn not_ours(device: &mut dyn Device) {
    set_up(device, 3);
    for ip in Ip::BOTH {
        let mut spec = syn(ip);
        spec.destination = ip.router();
        passed(device, &spec.build());
        passed(device, &to_vip(ip, 1, udp(5000, HTTP, b"UDP to a TCP port")).build());
        passed(device, &to_vip(ip, 1, udp(5000, 54, b"another port")).build());
        for protocol in [0, 2, 41, 47, 50, 51, 59, 132, 255] {
            if protocol == 0 && ip == Ip::V6 {
                continue;
            }
            passed(device, &to_vip(ip, 1, Body::Raw { protocol, bytes: vec![0; 64] }).build());
        }
        for kind in [[0x08, 0x06], [0x88, 0xcc], [0x00, 0x26], [0x88, 0x47]] {
            let mut frame = syn(ip).build();
            frame[12..14].copy_from_slice(&kind);
            passed(device, &frame);
        }
        // The EtherType says one family, the header the other.
        let mut frame = syn(ip).build();
        frame[12..14].copy_from_slice(if ip == Ip::V4 { &[0x86, 0xdd] } else { &[8, 0] });
        passed(device, &frame);
        // Three tags.
        let mut spec = syn(ip);
        spec.vlan = vec![1, 2, 3];
        passed(device, &spec.build());
    }
    assert_eq!(device.snapshots(), Default::default());
    assert_eq!(device.stats(), Default::default());
}

/// Packets that end too early, and headers that lie about lengths.
pub fn malformed(device: &mut dyn Device) {
    set_up(device, 3);
    for ip in Ip::BOTH {
        for spec in [syn(ip), to_vip(ip, 1, udp(5000, DNS, b"12345678"))] {
            let whole = spec.build();
            for length in 14..whole.len() {
                passed(device, &whole[..length]);
            }
            let mut tagged = spec.clone();
            tagged.vlan = vec![5, 6];
            let whole = tagged.build();
            for length in 14..whole.len() {
                passed(device, &whole[..length]);
            }
        }
        let l4 = if ip == Ip::V4 { 34 } else { 54 };
        // Version; header length; total length; TCP data offset; UDP length.
        let mut edits: Vec<(Spec, usize, u8)> = vec![
            (syn(ip), 14, 0x05),
            (syn(ip), 14, 0xf5),
            (syn(ip), l4 + 12, 0x40),
            (syn(ip), l4 + 12, 0x60),
            (syn(ip), l4 + 12, 0xf0),
            (to_vip(ip, 1, udp(5000, DNS, b"")), l4 + 5, 7),
            (to_vip(ip, 1, udp(5000, DNS, b"")), l4 + 5, 9),
            (to_vip(ip, 1, udp(5000, DNS, b"")), l4 + 4, 1),
        ];
        match ip {
            Ip::V4 => edits.extend([
                (syn(ip), 14, 0x44),
                (syn(ip), 14, 0x4f),
                (syn(ip), 17, 19),
                (syn(ip), 17, 39),
                (syn(ip), 16, 1),
            ]),
            Ip::V6 => edits.extend([(syn(ip), 19, 19), (syn(ip), 19, 21), (syn(ip), 18, 1)]),
        }
        for (spec, at, value) in edits {
            let mut frame = spec.build();
            assert_ne!(frame[at], value);
            frame[at] = value;
            passed(device, &frame);
        }
    }
    // An extension header that leads beyond the packet, and more of them than anyone needs.
    let mut spec = to_vip(Ip::V6, 1, udp(5000, DNS, b""));
    spec.extensions = vec![(60, vec![1, 4])];
    let mut frame = spec.build();
    frame[55] = 255;
    passed(device, &frame);
    spec.extensions = vec![(60, vec![1, 4]); 9];
    passed(device, &spec.build());
    // A fragment header that lies in the padding.
    let mut spec = to_vip(Ip::V6, 1, Body::Raw { protocol: 44, bytes: vec![] });
    spec.padding = 40;
    passed(device, &spec.build());
    assert_eq!(device.snapshots(), Default::default());
    assert_eq!(device.stats(), Default::default());
}

/// Maps that contradict themselves: a reason, no harm.
pub fn misconfigured(device: &mut dyn Device) {
    set_up(device, 1);
    for ip in Ip::BOTH {
        let index = ip.backend_index(IPPROTO_TCP, 0);
        let good = backend(ip, IPPROTO_TCP, 0);
        let wrong_family = if ip == Ip::V4 { 6 } else { 4 };
        for entry in
            [Backend::default(), Backend { state: 0, ..good }, Backend { family: wrong_family, ..good }]
        {
            device.set_backend(index, entry);
            dropped(device, &syn(ip).build(), DropReason::BadSlot);
        }
        device.set_backend(index, good);
        for slot in [0, 1_000_000] {
            device.set_slot(ip.first_slot(IPPROTO_TCP), slot);
            dropped(device, &syn(ip).build(), DropReason::BadSlot);
        }
        set_slots(device, ip, IPPROTO_TCP, 1);
        device.set_service(ip.service(IPPROTO_TCP), Service::new(u32::MAX, 9, 0));
        dropped(device, &syn(ip).build(), DropReason::BadSlot);
        device.set_vip(ip.router(), HTTP, IPPROTO_TCP, 1_000_000);
        let mut spec = syn(ip);
        spec.destination = ip.router();
        dropped(device, &spec.build(), DropReason::BadSlot);
        set_slots(device, ip, IPPROTO_TCP, 1);
        let mut entry = good;
        entry.next_hop.ifindex = 0;
        device.set_backend(index, entry);
        dropped(device, &syn(ip).build(), DropReason::NoNeighbour);
        if device.hook() == Hook::Xdp {
            entry.next_hop.ifindex = 99;
            device.set_backend(index, entry);
            dropped(device, &syn(ip).build(), DropReason::NoDevice);
        }
        device.set_backend(index, good);
        Connection::open(device, ip, 2, 40_000).talk(device);
    }
}
