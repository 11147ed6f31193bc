//! TCP connections.

use std::collections::BTreeMap;

use lb_common::abi::{BackendState, Config, DropReason, FlowState, IPPROTO_TCP, ticks_from_seconds};

use super::connection::{Connection, states};
use crate::kit::device::Device;
use crate::kit::packet::flags::{ACK, FIN, PSH, RST, SYN};
use crate::kit::packet::{Body, Tcp};
use crate::kit::world::{
    HTTP, Ip, answered, backend, backend_mac, dropped, drops, forwarded, set_slots, set_up, to_vip,
};

const TRANSIENT: bool = false;
const ESTABLISHED: bool = true;

fn expect(device: &mut dyn Device, connection: &Connection, state: FlowState, place: bool) {
    assert_eq!(states(device, connection), [Some((state as u8, place)); 2], "{state:?}");
}

/// Handshake, data, close from either side; the counters count it.
pub fn whole_life(device: &mut dyn Device) {
    set_up(device, 3);
    for ip in Ip::BOTH {
        let mut connection = Connection::open(device, ip, 1, 40_000);
        assert_eq!(connection.source().0, ip.snat(1));
        assert_eq!(connection.backend(), ip.backend(0));
        assert_eq!(connection.received.as_ref().unwrap().to, backend_mac(0));
        connection.talk(device);
        connection.close(device);
        let stats = device.stats();
        let service = stats.services[&ip.service(IPPROTO_TCP)];
        assert_eq!((service.packets_in, service.packets_out), (6, 3));
        assert_eq!((service.new_flows, service.refused), (1, 0));
        let backend = stats.backends[&ip.backend_index(IPPROTO_TCP, 0)];
        assert_eq!((backend.packets_in, backend.packets_out, backend.new_flows), (6, 3, 1));
        let header = if ip == Ip::V4 { 54 } else { 74 };
        assert_eq!((service.bytes_in, service.bytes_out), (6 * header + 18, 3 * header + 22));
        assert!(stats.drops.is_empty());
    }
}

/// The third packet of the handshake moves both entries to the established table, the second FIN
/// moves them back.
pub fn promotion_and_demotion(device: &mut dyn Device) {
    set_up(device, 2);
    for ip in Ip::BOTH {
        for client_closes_first in [true, false] {
            let mut connection = Connection::new(ip, 1, 40_000 + u16::from(client_closes_first));
            connection.from_client(device, SYN, b"");
            expect(device, &connection, FlowState::SynSent, TRANSIENT);
            connection.from_backend(device, SYN | ACK, b"");
            expect(device, &connection, FlowState::SynReceived, TRANSIENT);
            connection.from_client(device, ACK, b"");
            expect(device, &connection, FlowState::Established, ESTABLISHED);
            connection.talk(device);
            expect(device, &connection, FlowState::Established, ESTABLISHED);
            if client_closes_first {
                connection.from_client(device, FIN | ACK, b"bye");
                expect(device, &connection, FlowState::ClientClosed, ESTABLISHED);
                connection.from_backend(device, FIN | ACK, b"");
            } else {
                connection.from_backend(device, FIN | ACK, b"bye");
                expect(device, &connection, FlowState::BackendClosed, ESTABLISHED);
                connection.from_client(device, FIN | ACK, b"");
            }
            expect(device, &connection, FlowState::TimeWait, TRANSIENT);
            connection.from_backend(device, ACK, b"");
            connection.from_client(device, ACK, b"");
            expect(device, &connection, FlowState::TimeWait, TRANSIENT);
        }
    }
}

/// A SYN that is sent again goes to the same backend from the same port, and takes no turn.
pub fn retransmitted_syn_stays(device: &mut dyn Device) {
    set_up(device, 3);
    for ip in Ip::BOTH {
        let mut connection = Connection::new(ip, 1, 40_000);
        for _ in 0..3 {
            connection.client_sequence = 77;
            connection.from_client(device, SYN, b"");
        }
        connection.from_backend(device, SYN | ACK, b"");
        connection.client_sequence = 77;
        connection.from_client(device, SYN, b"");
        let next = Connection::open(device, ip, 2, 40_000);
        assert_eq!((connection.backend(), next.backend()), (ip.backend(0), ip.backend(1)));
        assert_eq!(device.stats().services[&ip.service(IPPROTO_TCP)].new_flows, 2);
    }
}

/// Only who has seen the SYN-ACK gets into the established table.
pub fn late_acknowledgment_does_not_promote(device: &mut dyn Device) {
    set_up(device, 3);
    for ip in Ip::BOTH {
        let mut connection = Connection::new(ip, 1, 40_000);
        connection.from_client(device, SYN, b"");
        connection.from_client(device, ACK, b"");
        expect(device, &connection, FlowState::SynSent, TRANSIENT);
        connection.from_backend(device, SYN | ACK, b"");
        let next = connection.backend_sequence;
        for wrong in [next.wrapping_sub(1), next.wrapping_add(1 << 17), 0, 1] {
            connection.backend_sequence = wrong;
            connection.from_client(device, ACK, b"");
            expect(device, &connection, FlowState::SynReceived, TRANSIENT);
        }
        connection.backend_sequence = next;
        connection.from_client(device, PSH | ACK, b"data with the third packet");
        expect(device, &connection, FlowState::Established, ESTABLISHED);
    }
}

/// After one side has closed, the other may send for as long as it likes.
pub fn half_close_goes_on(device: &mut dyn Device) {
    set_up(device, 3);
    for ip in Ip::BOTH {
        let mut connection = Connection::open(device, ip, 1, 40_000);
        connection.from_client(device, FIN | ACK, b"");
        for _ in 0..5 {
            device.wait(ticks_from_seconds(600));
            connection.from_backend(device, PSH | ACK, b"and another thing");
            connection.from_client(device, ACK, b"");
        }
        expect(device, &connection, FlowState::ClientClosed, ESTABLISHED);
    }
}

/// A new SYN on the ports of a closed connection is a new connection, with the next backend.
pub fn port_reuse_after_close_begins_anew(device: &mut dyn Device) {
    set_up(device, 3);
    for ip in Ip::BOTH {
        for round in 0..6 {
            let mut connection = Connection::open(device, ip, 1, 40_000);
            assert_eq!(connection.backend(), ip.backend(round % 3));
            connection.talk(device);
            connection.close(device);
        }
    }
}

/// An RST ends the connection, from either side; a new SYN begins another.
pub fn reset_ends(device: &mut dyn Device) {
    set_up(device, 3);
    for ip in Ip::BOTH {
        for from_client in [true, false] {
            let mut connection = Connection::open(device, ip, 1, 40_000);
            if from_client {
                connection.from_client(device, RST, b"");
            } else {
                connection.from_backend(device, RST | ACK, b"");
            }
            expect(device, &connection, FlowState::Reset, TRANSIENT);
            let first = connection.backend();
            let again = Connection::open(device, ip, 1, 40_000);
            assert_ne!(again.backend(), first);
            expect(device, &again, FlowState::Established, ESTABLISHED);
            let mut again = again;
            again.from_client(device, RST, b"");
        }
        // Refused by the backend.
        let mut connection = Connection::new(ip, 1, 41_000);
        connection.from_client(device, SYN, b"");
        connection.from_backend(device, RST | ACK, b"");
        expect(device, &connection, FlowState::Reset, TRANSIENT);
    }
}

/// An RST that is nowhere near what the client has sent is somebody else's guess: the backend gets it
/// and ignores it (RFC 5961), and the flow goes on.
pub fn blind_reset_changes_nothing(device: &mut dyn Device) {
    set_up(device, 1);
    for ip in Ip::BOTH {
        let mut connection = Connection::open(device, ip, 1, 40_000);
        let sequence = connection.client_sequence;
        connection.client_sequence = sequence.wrapping_add(1 << 28);
        connection.from_client(device, RST, b"");
        expect(device, &connection, FlowState::Established, ESTABLISHED);
        connection.client_sequence = sequence;
        connection.from_client(device, ACK, b"still here");
        connection.from_client(device, RST, b"");
        expect(device, &connection, FlowState::Reset, TRANSIENT);
    }
}

/// So it is before the connection is established: a client that waits for a SYN-ACK answers a segment of
/// an earlier connection, too, by an RST with the number that this acknowledges.
pub fn strange_reset_in_the_handshake_changes_nothing(device: &mut dyn Device) {
    set_up(device, 1);
    for ip in Ip::BOTH {
        for (port, flags) in [(40_000, RST), (40_001, RST | ACK)] {
            let mut connection = Connection::new(ip, 1, port);
            connection.from_client(device, SYN, b"");
            let next = connection.client_sequence;
            let strange = |device: &mut dyn Device, connection: &mut Connection, state| {
                for sequence in [0, next - 1, next + (1 << 17), next + (1 << 31)] {
                    connection.client_sequence = sequence;
                    connection.from_client(device, flags, b"");
                    expect(device, connection, state, TRANSIENT);
                }
                connection.client_sequence = next;
            };
            strange(device, &mut connection, FlowState::SynSent);
            connection.from_backend(device, SYN | ACK, b"");
            strange(device, &mut connection, FlowState::SynReceived);
            connection.from_client(device, ACK, b"");
            expect(device, &connection, FlowState::Established, ESTABLISHED);
            connection.talk(device);
            connection.close(device);
        }
        for (port, is_answered) in [(41_000, false), (41_001, true)] {
            let mut connection = Connection::new(ip, 1, port);
            connection.from_client(device, SYN, b"");
            if is_answered {
                connection.from_backend(device, SYN | ACK, b"");
            }
            connection.from_client(device, RST, b"");
            expect(device, &connection, FlowState::Reset, TRANSIENT);
        }
    }
}

/// The client's port has begun a connection with another backend: what the one before still sends, whose
/// entry stays as its port's history, is answered by an RST, and does not reach the client.
pub fn late_segments_of_an_earlier_backend(device: &mut dyn Device) {
    set_up(device, 2);
    for ip in Ip::BOTH {
        let mut earlier = Connection::open(device, ip, 1, 40_000);
        earlier.talk(device);
        earlier.close(device);
        let late = [FIN | ACK, ACK, SYN | ACK].map(|flags| earlier.backend_segment(flags, b""));
        let mut connection = Connection::new(ip, 1, 40_000);
        connection.from_client(device, SYN, b"");
        assert_ne!(connection.backend(), earlier.backend());
        for (state, place) in [(FlowState::SynSent, TRANSIENT), (FlowState::Established, ESTABLISHED)] {
            for spec in &late {
                let before = drops(device, DropReason::NoFlow);
                assert_eq!(answered(device, spec).flags() & RST, RST);
                assert_eq!(drops(device, DropReason::NoFlow), before + 1);
            }
            dropped(device, &earlier.backend_segment(RST, b"").build(), DropReason::ResetWithoutFlow);
            expect(device, &connection, state, place);
            if place == TRANSIENT {
                connection.from_backend(device, SYN | ACK, b"");
                connection.from_client(device, ACK, b"");
                connection.talk(device);
            }
        }
        connection.close(device);
    }
}

/// N·k connections: each of N backends gets exactly k, in turn.
pub fn round_robin_is_exact(device: &mut dyn Device) {
    set_up(device, 1);
    for ip in Ip::BOTH {
        let mut port = 10_000;
        for backends in [1u32, 3, 7, 101] {
            for number in 0..backends.min(30) {
                device.set_backend(ip.backend_index(IPPROTO_TCP, number), backend(ip, IPPROTO_TCP, number));
            }
            set_slots(device, ip, IPPROTO_TCP, backends);
            let mut seen: BTreeMap<_, u32> = BTreeMap::new();
            let mut order = Vec::new();
            for _ in 0..backends * 3 {
                port += 1;
                let mut connection = Connection::new(ip, port.into(), port);
                connection.from_client(device, SYN, b"");
                *seen.entry(connection.backend()).or_default() += 1;
                order.push(connection.backend());
            }
            for number in 0..backends.min(30) {
                let slots = (0..backends).filter(|slot| slot % 30 == number).count() as u32;
                assert_eq!(seen[&ip.backend(number)], slots * 3, "backend {number} of {backends}");
            }
            assert_eq!(order[..backends as usize], order[backends as usize..2 * backends as usize]);
        }
    }
}

/// IPv4 options, TCP options of odd lengths, Ethernet padding.
pub fn options_and_padding(device: &mut dyn Device) {
    set_up(device, 3);
    let options: [&[u8]; 6] =
        [&[], &[1], &[2, 4, 5, 0xb4], &[3, 3, 7], &[1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2], &[253, 5, 1, 2, 3]];
    for (ip, options) in Ip::BOTH.into_iter().flat_map(|ip| options.map(|options| (ip, options))) {
        for padding in [0, 6] {
            let mut spec = to_vip(
                ip,
                1,
                Body::Tcp(Tcp {
                    source: 45_000 + options.len() as u16,
                    destination: HTTP,
                    flags: SYN,
                    options: options.to_vec(),
                    payload: b"fast open".to_vec(),
                    ..Tcp::default()
                }),
            );
            spec.padding = padding;
            spec.options = vec![7, 7, 4, 0, 0, 0, 0];
            forwarded(device, &spec);
        }
    }
}

/// A backend that terminates gets no new connections, and keeps those it has.
pub fn terminating_backend_keeps_flows(device: &mut dyn Device) {
    set_up(device, 2);
    for ip in Ip::BOTH {
        let mut kept = Connection::open(device, ip, 1, 40_000);
        let mut begun = Connection::new(ip, 2, 40_000);
        begun.from_client(device, SYN, b"");
        for number in 0..2 {
            let mut entry = backend(ip, IPPROTO_TCP, number);
            entry.state = BackendState::Terminating as u8;
            device.set_backend(ip.backend_index(IPPROTO_TCP, number), entry);
        }
        set_slots(device, ip, IPPROTO_TCP, 0);
        kept.talk(device);
        begun.from_backend(device, SYN | ACK, b"");
        begun.from_client(device, ACK, b"");
        begun.talk(device);
        kept.close(device);
    }
}

/// When routes change, and nothing better is known, answers go on to take the way of the client's
/// packets.
pub fn route_change_keeps_way_back(device: &mut dyn Device) {
    set_up(device, 2);
    for ip in Ip::BOTH {
        let mut connection = Connection::open(device, ip, 1, 40_000);
        connection.talk(device);
        for route_generation in 2..4 {
            device.set_config(Config { route_generation, ..Config::default() });
            connection.talk(device);
            connection.talk(device);
        }
    }
}
