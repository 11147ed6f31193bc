//! UDP sessions.

use lb_common::abi::{Backend, BackendState, Config, DropReason, FlowState, IPPROTO_UDP, ticks_from_seconds};

use crate::kit::device::{AnyKey, Device};
use crate::kit::packet::Body;
use crate::kit::seen::{Seen, SeenBody};
use crate::kit::world::{
    DNS, DNS_BACKEND, Ip, answer, backend, dropped, forwarded, set_slots, set_up, to_vip, udp,
};

/// A client's datagram.
pub fn ask(device: &mut dyn Device, ip: Ip, client: u32, port: u16) -> Seen {
    let seen = forwarded(device, &to_vip(ip, client, udp(port, DNS, b"question")));
    assert_eq!(seen.ports().1, DNS_BACKEND);
    seen
}

/// The backend's answer to it.
pub fn reply(device: &mut dyn Device, ip: Ip, client: u32, port: u16, question: &Seen) -> Seen {
    let (source, destination) = question.ports();
    let seen = forwarded(device, &answer(question, udp(destination, source, b"odd answer.")));
    assert_eq!((seen.source, seen.destination), (ip.vip(), ip.client(client)));
    assert_eq!(seen.ports(), (DNS, port));
    seen
}

fn state(device: &mut dyn Device, ip: Ip, client: u32, port: u16) -> Option<(u8, bool)> {
    let snapshots = device.snapshots();
    match AnyKey::new((ip.client(client), port), (ip.vip(), DNS), IPPROTO_UDP) {
        AnyKey::V4(key) => snapshots.v4.find(&key).map(|(flow, place)| (flow.status.state, place)),
        AnyKey::V6(key) => snapshots.v6.find(&key).map(|(flow, place)| (flow.status.state, place)),
    }
}

/// One question, one answer: no place in the established table.
pub fn question_and_answer(device: &mut dyn Device) {
    set_up(device, 3);
    for ip in Ip::BOTH {
        for round in 0..3 {
            let question = ask(device, ip, 1, 5000 + round);
            assert_eq!(question.destination, ip.backend(round.into()));
            assert_eq!(state(device, ip, 1, 5000 + round), Some((FlowState::UdpUnreplied as u8, false)));
            reply(device, ip, 1, 5000 + round, &question);
            assert_eq!(state(device, ip, 1, 5000 + round), Some((FlowState::UdpReplied as u8, false)));
        }
    }
}

/// A session of more than two seconds is a stream.
pub fn becomes_a_stream(device: &mut dyn Device) {
    set_up(device, 3);
    for ip in Ip::BOTH {
        let question = ask(device, ip, 1, 5000);
        reply(device, ip, 1, 5000, &question);
        device.wait(ticks_from_seconds(1));
        ask(device, ip, 1, 5000);
        assert_eq!(state(device, ip, 1, 5000), Some((FlowState::UdpReplied as u8, false)));
        device.wait(ticks_from_seconds(1));
        ask(device, ip, 1, 5000);
        assert_eq!(state(device, ip, 1, 5000), Some((FlowState::UdpReplied as u8, true)));
        for _ in 0..3 {
            let again = ask(device, ip, 1, 5000);
            assert_eq!(again.destination, question.destination);
            reply(device, ip, 1, 5000, &again);
        }
    }
}

/// Who gets no answer takes no place among the established, however long it goes on: a flood of
/// datagrams evicts its like.
pub fn unanswered_stays_transient(device: &mut dyn Device) {
    set_up(device, 3);
    for ip in Ip::BOTH {
        for port in 0..20 {
            ask(device, ip, 1, 5000 + port);
        }
        for _ in 0..5 {
            device.wait(ticks_from_seconds(4));
            ask(device, ip, 1, 5000);
            assert_eq!(state(device, ip, 1, 5000), Some((FlowState::UdpUnreplied as u8, false)));
        }
    }
    let snapshots = device.snapshots();
    assert_eq!((snapshots.v4.established.len(), snapshots.v6.established.len()), (0, 0));
    assert_eq!((snapshots.v4.transient.len(), snapshots.v6.transient.len()), (40, 40));
}

/// After its idle time a session begins anew, with the next backend.
pub fn expires(device: &mut dyn Device) {
    set_up(device, 3);
    for ip in Ip::BOTH {
        let first = ask(device, ip, 1, 5000);
        device.wait(ticks_from_seconds(29));
        assert_eq!(ask(device, ip, 1, 5000).destination, first.destination);
        device.wait(ticks_from_seconds(31));
        let second = ask(device, ip, 1, 5000);
        assert_ne!(second.destination, first.destination);
        reply(device, ip, 1, 5000, &second);
        device.wait(ticks_from_seconds(122));
        assert_ne!(ask(device, ip, 1, 5000).destination, second.destination);
    }
}

/// A client that sends and sends without an answer keeps its source port, though the reply entry
/// never sees a packet.
pub fn one_way_session_keeps_its_port(device: &mut dyn Device) {
    set_up(device, 1);
    for ip in Ip::BOTH {
        let first = ask(device, ip, 1, 5000);
        for _ in 0..4 {
            device.wait(ticks_from_seconds(20));
            ask(device, ip, 1, 5000);
        }
        // All other ports of the range are taken in turn; none may come upon the first.
        for port in 5001..5200 {
            let other = ask(device, ip, 1, port);
            assert_ne!(other.ports().0, first.ports().0, "port {port}");
        }
        device.set_config(Config {
            snat_port_first: first.ports().0,
            snat_port_count: 1,
            ..Config::default()
        });
        let packet = to_vip(ip, 2, udp(6000, DNS, b"question")).build();
        dropped(device, &packet, DropReason::SnatPortsExhausted);
        device.set_config(Config::default());
    }
}

/// "No checksum" stays so over IPv4.
pub fn without_checksum(device: &mut dyn Device) {
    set_up(device, 3);
    let body = Body::Udp { source: 5000, destination: DNS, payload: vec![1; 31], checksum: false };
    let seen = forwarded(device, &to_vip(Ip::V4, 1, body));
    assert!(matches!(seen.body, SeenBody::Udp { checksum: 0, .. }));
}

/// A session whose backend is gone goes on with another one.
pub fn moves_on_from_a_gone_backend(device: &mut dyn Device) {
    set_up(device, 2);
    for ip in Ip::BOTH {
        // One of each kind: a lone question, and a stream.
        let lone = ask(device, ip, 1, 5000);
        let stream = ask(device, ip, 2, 5000);
        assert_ne!(lone.destination, stream.destination);
        reply(device, ip, 2, 5000, &stream);
        device.wait(ticks_from_seconds(3));
        ask(device, ip, 2, 5000);
        for number in 0..2 {
            device.set_backend(ip.backend_index(IPPROTO_UDP, number), Backend::default());
        }
        let mut entry = backend(ip, IPPROTO_UDP, 5);
        entry.state = BackendState::Active as u8;
        device.set_backend(ip.backend_index(IPPROTO_UDP, 0), Backend { generation: 2, ..entry });
        set_slots(device, ip, IPPROTO_UDP, 1);
        assert_eq!(ask(device, ip, 1, 5000).destination, ip.backend(5));
        let moved = ask(device, ip, 2, 5000);
        assert_eq!(moved.destination, ip.backend(5));
        reply(device, ip, 2, 5000, &moved);
    }
}

/// IPv6 extension headers are walked, as many as RFC 8200 recommends.
pub fn extension_headers(device: &mut dyn Device) {
    set_up(device, 3);
    for count in 0..5usize {
        let mut spec = to_vip(Ip::V6, 1, udp(5000, DNS, b"question"));
        let all =
            [(0, vec![1, 4, 0, 0, 0, 0]), (60, vec![1, 12]), (43, vec![253, 0, 0, 0, 0, 0]), (60, vec![])];
        spec.extensions = all[..count.min(4)].to_vec();
        forwarded(device, &spec);
        // With a fragment header that says "whole" (RFC 6946) in its place behind the routing header.
        if count == 4 {
            let mut frame = spec.build();
            let (action, bytes) = device.send(&frame);
            assert_ne!(action, crate::kit::device::Action::Pass);
            assert_eq!(bytes.len(), frame.len());
            atomic(&mut frame, 14 + 40 + 8 + 16 + 8);
            let (action, bytes) = device.send(&frame);
            assert_ne!(action, crate::kit::device::Action::Pass, "five extension headers");
            assert_eq!(bytes.len(), frame.len());
        }
    }
}

/// Inserts a fragment header of a whole datagram at an offset where a routing header has ended.
fn atomic(frame: &mut Vec<u8>, at: usize) {
    // The routing header before it is 8 bytes long; its first byte names what follows.
    let next = std::mem::replace(&mut frame[at - 8], 44);
    frame.splice(at..at, [next, 0, 0, 0, 0, 0, 0, 9]);
    let length = u16::from_be_bytes([frame[18], frame[19]]) + 8;
    frame[18..20].copy_from_slice(&length.to_be_bytes());
}
