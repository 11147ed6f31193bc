//! Fragments.

use lb_common::abi::{DropReason, ticks_from_seconds};

use super::udp::ask;
use crate::kit::device::{Action, Device};
use crate::kit::packet::flags::{ACK, PSH};
use crate::kit::packet::{Body, Spec, Tcp, checksum};
use crate::kit::seen::{self, Seen, SeenBody};
use crate::kit::world::{DNS, Ip, answer, dropped, passed, set_up, to_vip, udp};

/// Sends all fragments, which must all go the same way; gives the datagram that their receiver puts
/// together, whose checksum it verifies.
fn reassembled(device: &mut dyn Device, spec: &Spec, size: usize) -> (Seen, Vec<u8>) {
    let mut whole = Vec::new();
    let mut first: Option<Seen> = None;
    for frame in spec.fragments(size) {
        let (action, bytes) = device.send(&frame);
        assert!(matches!(action, Action::Redirect | Action::Transmit), "{action:?} {:?}", device.stats());
        let seen = seen::read(&bytes).unwrap();
        assert!(seen.fragmented);
        assert_eq!(seen.hops, spec.hops - 1);
        if let Some(first) = &first {
            assert_eq!((seen.source, seen.destination), (first.source, first.destination));
            assert_eq!((seen.from, seen.to), (first.from, first.to));
            assert_eq!(seen.identification, first.identification, "one datagram, one identification");
        }
        let SeenBody::Other(part) = &seen.body else { panic!("a fragment: {seen:?}") };
        whole.extend(part);
        first.get_or_insert(seen);
    }
    let first = first.unwrap();
    let protocol = if matches!(spec.body, Body::Tcp(_)) { 6 } else { 17 };
    let mut pseudo = match (first.source, first.destination) {
        (std::net::IpAddr::V4(a), std::net::IpAddr::V4(b)) => [a.octets(), b.octets()].concat(),
        (std::net::IpAddr::V6(a), std::net::IpAddr::V6(b)) => [a.octets(), b.octets()].concat(),
        _ => panic!("mixed families"),
    };
    pseudo.extend([0, protocol]);
    pseudo.extend((whole.len() as u16).to_be_bytes());
    assert_eq!(checksum(&[&pseudo, &whole]), 0, "the checksum over the whole datagram");
    (first, whole)
}

/// A large datagram, both ways; first fragments decide, later ones follow.
pub fn datagram(device: &mut dyn Device) {
    set_up(device, 3);
    for ip in Ip::BOTH {
        let payload: Vec<u8> = (0..3000u32).map(|number| number as u8).collect();
        let mut question = to_vip(ip, 1, udp(5000, DNS, &payload));
        let mut identifications = Vec::new();
        for (identification, size) in [(1, 1480), (2, 8), (3, 1024)] {
            question.identification = identification;
            let mut small = question.clone();
            if size == 8 {
                small.body = udp(5000, DNS, &payload[..40]);
            }
            let (first, whole) = reassembled(device, &small, size);
            assert_eq!(whole[8..], small.transport()[8..]);
            identifications.push(first.identification);
        }
        identifications.dedup();
        assert_eq!(identifications.len(), 3, "datagrams stay apart");
        let whole = ask(device, ip, 1, 5000);
        let (source, destination) = whole.ports();
        let reply = answer(&whole, udp(destination, source, &payload));
        let (first, _) = reassembled(device, &reply, 1200);
        assert_eq!((first.source, first.destination), (ip.vip(), ip.client(1)));
        // Two clients with the same identification do not meet at the backend.
        let mut spec = to_vip(ip, 2, udp(5000, DNS, &payload));
        spec.identification = 1;
        let (second, _) = reassembled(device, &spec, 1480);
        question.identification = 1;
        let (first, _) = reassembled(device, &question, 1480);
        assert_ne!(first.identification, second.identification);
    }
}

/// A later fragment without its first one, or long after it.
pub fn without_first(device: &mut dyn Device) {
    set_up(device, 3);
    for ip in Ip::BOTH {
        let spec = to_vip(ip, 1, udp(5000, DNS, &[1; 2000]));
        let fragments = spec.fragments(1024);
        passed(device, &fragments[1]);
        let (action, _) = device.send(&fragments[0]);
        assert_eq!(action, Action::Redirect);
        let (action, _) = device.send(&fragments[1]);
        assert_eq!(action, Action::Redirect);
        device.wait(ticks_from_seconds(31));
        dropped(device, &fragments[1], DropReason::FragmentWithoutFirst);
    }
}

/// A later fragment has a TTL, too.
pub fn hops_run_out(device: &mut dyn Device) {
    set_up(device, 3);
    for ip in Ip::BOTH {
        let mut spec = to_vip(ip, 1, udp(5000, DNS, &[1; 2000]));
        let (action, _) = device.send(&spec.fragments(1024)[0]);
        assert_eq!(action, Action::Redirect);
        for hops in [0, 1] {
            spec.hops = hops;
            dropped(device, &spec.fragments(1024)[1], DropReason::TtlExpired);
        }
    }
}

/// The later fragments of a TCP segment have no options, whatever their bytes look like.
pub fn fragmented_tcp_with_shifted_timestamps(device: &mut dyn Device) {
    set_up(device, 1);
    for ip in Ip::BOTH {
        let mut connection = super::history::shifted(device, ip);
        connection.talk(device);
        // Bytes that would be a TCP header with a timestamp.
        let looks_like = [&[1u8; 12][..], &[0x80, 0x10, 0, 0, 0, 0, 0, 0, 1, 1, 8, 10], &[5; 8]].concat();
        let mut spec = connection.client_segment(PSH | ACK, &looks_like.repeat(40));
        spec.hops = 9;
        let before = spec.transport();
        // The first fragment is just the header, so that the second begins with that.
        let Body::Tcp(Tcp { options, .. }) = &spec.body else { panic!("not TCP") };
        let header = 20 + options.len();
        assert_eq!(header % 8, 0);
        let (_, whole) = reassembled(device, &spec, header);
        assert_eq!(whole[header..], before[header..], "payload");
    }
}
