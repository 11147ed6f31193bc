//! ICMP errors about forwarded packets.

use std::net::IpAddr;

use lb_common::abi::DropReason;

use super::connection::Connection;
use super::udp::{ask, reply};
use crate::kit::device::Device;
use crate::kit::packet::flags::{ACK, PSH};
use crate::kit::packet::{Body, Spec};
use crate::kit::seen::{SeenBody, quote};
use crate::kit::world::{
    DNS, DNS_BACKEND, HTTP, HTTP_BACKEND, Ip, NODE_MAC, answer, backend_mac, client_mac, dropped, forwarded,
    passed, set_up, udp,
};

/// The errors that are translated: type, code and the word that may hold an MTU.
fn errors(ip: Ip) -> Vec<(u8, u8, [u8; 4])> {
    match ip {
        Ip::V4 => vec![
            (3, 4, [0, 0, 5, 0x14]),
            (3, 1, [0; 4]),
            (3, 3, [0; 4]),
            (11, 0, [0; 4]),
            (12, 0, [20, 0, 0, 0]),
        ],
        Ip::V6 => {
            vec![(2, 0, [0, 0, 5, 0]), (1, 0, [0; 4]), (1, 4, [0; 4]), (3, 0, [0; 4]), (4, 1, [0, 0, 0, 40])]
        }
    }
}

/// An ICMP error of a router's about a packet, which it quotes up to so many bytes.
fn error(ip: Ip, about: &[u8], (kind, code, rest): (u8, u8, [u8; 4]), size: usize, from: [u8; 6]) -> Spec {
    let mut quoted = about[14..].to_vec();
    quoted.truncate(size);
    let to: IpAddr = match ip {
        Ip::V4 => <[u8; 4]>::try_from(&about[26..30]).unwrap().into(),
        Ip::V6 => <[u8; 16]>::try_from(&about[22..38]).unwrap().into(),
    };
    let mut spec = Spec::new(ip.router(), to, Body::Icmp { kind, code, rest, payload: quoted });
    spec.from = from;
    spec.to = NODE_MAC;
    spec
}

fn quoted_tuple(seen: &crate::kit::seen::Seen) -> ((IpAddr, u16), (IpAddr, u16)) {
    let (source, destination, _, ports) = quote(seen.payload()).unwrap();
    ((source, ports.0), (destination, ports.1))
}

fn expect_kind(seen: &crate::kit::seen::Seen, expected: (u8, u8, [u8; 4])) {
    let SeenBody::Icmp { kind, code, rest, .. } = &seen.body else { panic!("{seen:?}") };
    assert_eq!((*kind, *code, *rest), expected);
}

/// A router between the node and a backend complains of a client's packet.
pub fn towards_clients(device: &mut dyn Device) {
    set_up(device, 3);
    for ip in Ip::BOTH {
        let mut connection = Connection::open(device, ip, 1, 40_000);
        let question = ask(device, ip, 1, 5000);
        reply(device, ip, 1, 5000, &question);
        for expected in errors(ip) {
            for size in [60, 76, 128, 1000] {
                let spec = connection.client_segment(PSH | ACK, &[7; 200]);
                let (_, about) = device.send(&spec.build());
                let seen = forwarded(device, &error(ip, &about, expected, size, backend_mac(0)));
                expect_kind(&seen, expected);
                assert_eq!((seen.source, seen.destination), (ip.vip(), ip.client(1)));
                assert_eq!(seen.to, client_mac(1));
                assert_eq!(quoted_tuple(&seen), ((ip.client(1), 40_000), (ip.vip(), HTTP)));
                expect_checksum_of(&seen, &spec, 16);

                let spec = crate::kit::world::to_vip(ip, 1, udp(5000, DNS, &[8; 100]));
                let (_, about) = device.send(&spec.build());
                let seen = forwarded(device, &error(ip, &about, expected, size, backend_mac(0)));
                expect_kind(&seen, expected);
                assert_eq!(quoted_tuple(&seen), ((ip.client(1), 5000), (ip.vip(), DNS)));
                expect_checksum_of(&seen, &spec, 6);
            }
        }
        connection.talk(device);
    }
}

/// If the quote is long enough to have it, the transport checksum in it is that of the packet as the
/// receiver of the error has sent it.
fn expect_checksum_of(seen: &crate::kit::seen::Seen, spec: &Spec, at: usize) {
    let header = if spec.source.is_ipv4() { 20 } else { 40 };
    if let Some(field) = seen.payload().get(header + at..header + at + 2) {
        assert_eq!(field, &spec.transport()[at..at + 2], "the quoted transport checksum");
    }
}

/// A router between the node and a client complains of a backend's packet.
pub fn towards_backends(device: &mut dyn Device) {
    set_up(device, 3);
    for ip in Ip::BOTH {
        let connection = Connection::open(device, ip, 1, 40_000);
        let (snat, snat_port) = connection.source();
        let question = ask(device, ip, 1, 5000);
        for expected in errors(ip) {
            for size in [60, 76, 128, 1000] {
                let spec = connection.backend_segment(PSH | ACK, &[9; 300]);
                let (_, about) = device.send(&spec.build());
                let seen = forwarded(device, &error(ip, &about, expected, size, client_mac(1)));
                expect_kind(&seen, expected);
                assert_eq!((seen.source, seen.destination), (snat, connection.backend()));
                assert_eq!(seen.to, backend_mac(0));
                let backend = (connection.backend(), HTTP_BACKEND);
                assert_eq!(quoted_tuple(&seen), (backend, (snat, snat_port)));
                expect_checksum_of(&seen, &spec, 16);

                let (source, destination) = question.ports();
                let spec = answer(&question, udp(destination, source, &[8; 100]));
                let (_, about) = device.send(&spec.build());
                let seen = forwarded(device, &error(ip, &about, expected, size, client_mac(1)));
                assert_eq!(
                    quoted_tuple(&seen),
                    ((question.destination, DNS_BACKEND), (question.source, source))
                );
                expect_checksum_of(&seen, &spec, 6);
            }
        }
    }
}

/// Quotes of the IP header and eight bytes, and of less.
pub fn short_quotes(device: &mut dyn Device) {
    set_up(device, 3);
    for ip in Ip::BOTH {
        let connection = Connection::open(device, ip, 1, 40_000);
        let header = if ip == Ip::V4 { 20 } else { 40 };
        let expected = errors(ip)[0];
        for (spec, from) in [
            (connection.client_segment(PSH | ACK, &[7; 200]), backend_mac(0)),
            (connection.backend_segment(PSH | ACK, &[7; 200]), client_mac(1)),
        ] {
            let (_, about) = device.send(&spec.build());
            let seen = forwarded(device, &error(ip, &about, expected, header + 8, from));
            expect_kind(&seen, expected);
            assert_eq!(seen.payload().len(), header + 8);
            quote(seen.payload()).unwrap();
            for size in [0, 1, header - 1, header, header + 2, header + 4, header + 7] {
                let mut spec = error(ip, &about, expected, size, from);
                passed(device, &spec.build());
                // The ports lie in the padding, which is not part of the packet.
                spec.padding = 30;
                if size == header + 4 {
                    let mut frame = spec.build();
                    let at = frame.len() - 30;
                    frame[at..].copy_from_slice(&about[14 + size..14 + size + 30]);
                    dropped(device, &frame, DropReason::BadIcmpQuote);
                }
            }
            let mut spec = error(ip, &about, expected, 100, from);
            spec.hops = 1;
            dropped(device, &spec.build(), DropReason::TtlExpired);
        }
    }
}

/// Everything else of ICMP is left to the kernel.
pub fn not_ours(device: &mut dyn Device) {
    set_up(device, 3);
    for ip in Ip::BOTH {
        let connection = Connection::open(device, ip, 1, 40_000);
        let (_, about) = device.send(&connection.client_segment(PSH | ACK, &[7; 200]).build());
        // Echo, and errors of kinds that are none.
        for kind in [0, 5, 8, 13, 128, 129, 135, 136] {
            passed(device, &error(ip, &about, (kind, 0, [0; 4]), 500, backend_mac(0)).build());
        }
        // About an unknown flow; about another protocol; to somebody else than the quoted sender.
        let mut other = about.clone();
        let at = 14 + if ip == Ip::V4 { 20 } else { 40 };
        other[at] ^= 0x55;
        passed(device, &error(ip, &other, errors(ip)[0], 500, backend_mac(0)).build());
        let mut other = about.clone();
        other[14 + if ip == Ip::V4 { 9 } else { 6 }] = 47;
        passed(device, &error(ip, &other, errors(ip)[0], 500, backend_mac(0)).build());
        let mut spec = error(ip, &about, errors(ip)[0], 500, backend_mac(0));
        spec.destination = ip.vip();
        passed(device, &spec.build());
        // A fragment of an error.
        let spec = error(ip, &about, errors(ip)[0], 500, backend_mac(0));
        for frame in spec.fragments(128) {
            passed(device, &frame);
        }
    }
}
