//! Every state, every segment, both directions.

use lb_common::abi::FlowState::{self, *};
use lb_common::forward::tcp_state::{
    Step, acknowledges, is_credible_in_handshake, is_credible_reset, is_established, step,
};
use lb_common::forward::wire::{TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN};

const CLIENT: bool = false;
const BACKEND: bool = true;

/// What a kind of segment does in a state, from the client and from the backend; `-` is "nothing".
/// The columns: SYN, SYN-ACK, ACK that answers no SYN-ACK, ACK that does, FIN, the same with the
/// answer to the SYN-ACK, RST.
const TABLE: [(FlowState, bool, [&str; 7]); 20] = [
    (Free, CLIENT, ["renew", "-", "-", "-", "-", "-", "reset"]),
    (Free, BACKEND, ["-", "-", "-", "-", "-", "-", "reset"]),
    (SynSent, CLIENT, ["-", "-", "-", "-", "-", "-", "reset"]),
    (SynSent, BACKEND, ["-", "syn-received", "-", "-", "-", "-", "reset"]),
    (SynReceived, CLIENT, ["-", "-", "-", "established", "-", "client-closed", "reset"]),
    (SynReceived, BACKEND, ["-", "-", "-", "-", "backend-closed", "backend-closed", "reset"]),
    (Established, CLIENT, ["-", "-", "-", "-", "client-closed", "client-closed", "reset"]),
    (Established, BACKEND, ["-", "-", "-", "-", "backend-closed", "backend-closed", "reset"]),
    (ClientClosed, CLIENT, ["-", "-", "-", "-", "-", "-", "reset"]),
    (ClientClosed, BACKEND, ["-", "-", "-", "-", "time-wait", "time-wait", "reset"]),
    (BackendClosed, CLIENT, ["-", "-", "-", "-", "time-wait", "time-wait", "reset"]),
    (BackendClosed, BACKEND, ["-", "-", "-", "-", "-", "-", "reset"]),
    (TimeWait, CLIENT, ["renew", "-", "-", "-", "-", "-", "reset"]),
    (TimeWait, BACKEND, ["-", "-", "-", "-", "-", "-", "reset"]),
    (Reset, CLIENT, ["renew", "-", "-", "-", "-", "-", "-"]),
    (Reset, BACKEND, ["-", "-", "-", "-", "-", "-", "-"]),
    (UdpUnreplied, CLIENT, ["renew", "-", "-", "-", "-", "-", "reset"]),
    (UdpUnreplied, BACKEND, ["-", "-", "-", "-", "-", "-", "reset"]),
    (UdpReplied, CLIENT, ["renew", "-", "-", "-", "-", "-", "reset"]),
    (UdpReplied, BACKEND, ["-", "-", "-", "-", "-", "-", "reset"]),
];

const SEGMENTS: [(u8, bool); 7] = [
    (TCP_SYN, false),
    (TCP_SYN | TCP_ACK, false),
    (TCP_ACK, false),
    (TCP_ACK, true),
    (TCP_FIN | TCP_ACK, false),
    (TCP_FIN | TCP_ACK, true),
    (TCP_RST | TCP_ACK, false),
];

#[test]
fn every_state_and_segment() {
    for state in FlowState::ALL {
        assert_eq!(TABLE.iter().filter(|row| row.0 == state).count(), 2, "{state:?} is in the table, twice");
    }
    for (state, from_backend, row) in TABLE {
        for ((flags, answers), expected) in SEGMENTS.into_iter().zip(row) {
            let found = match step(state, flags, from_backend, answers) {
                Step::Stay => "-",
                Step::To(next) => next.name(),
                Step::Renew => "renew",
            };
            assert_eq!(found, expected, "{state:?}, flags {flags:#04x}, from backend: {from_backend}");
        }
    }
}

/// RST wins over SYN, SYN over FIN; PSH, URG, ECE and CWR decide nothing.
#[test]
fn other_bits_decide_nothing() {
    for state in FlowState::ALL {
        for from_backend in [CLIENT, BACKEND] {
            for answers in [false, true] {
                for flags in 0..=255u8 {
                    let decisive = if flags & TCP_RST != 0 {
                        TCP_RST
                    } else if flags & TCP_SYN != 0 {
                        flags & (TCP_SYN | TCP_ACK)
                    } else {
                        flags & TCP_FIN
                    };
                    assert_eq!(
                        step(state, flags, from_backend, answers),
                        step(state, decisive, from_backend, answers),
                        "{state:?} {flags:#04x}"
                    );
                }
            }
        }
    }
}

#[test]
fn the_answer_to_a_syn_ack_lies_in_a_window_behind_its_sequence_number() {
    for initial in [0u32, 1, 0x7fff_ffff, 0xffff_fffe, 0xffff_ffff] {
        assert!(!acknowledges(initial, initial));
        assert!(!acknowledges(initial.wrapping_sub(1), initial));
        assert!(acknowledges(initial.wrapping_add(1), initial));
        assert!(acknowledges(initial.wrapping_add(1 << 17), initial));
        assert!(!acknowledges(initial.wrapping_add((1 << 17) + 1), initial));
    }
}

#[test]
fn a_reset_in_the_handshake_follows_the_syn() {
    for initial in [1u32, 0x7fff_ffff, 0xffff_fffe, 0xffff_ffff] {
        for (near, is_credible) in [(0, false), (1, true), (1 << 17, true), ((1 << 17) + 1, false)] {
            assert_eq!(is_credible_in_handshake(initial.wrapping_add(near), initial), is_credible, "{near}");
        }
        assert!(!is_credible_in_handshake(initial.wrapping_sub(65_537), initial), "of the one before");
    }
    assert!(is_credible_in_handshake(12_345, 0), "nothing is known");
}

#[test]
fn only_established_connections_take_room_in_the_established_table() {
    let long_lived: Vec<_> = FlowState::ALL.into_iter().filter(|state| is_established(*state)).collect();
    assert_eq!(long_lived, [Established, ClientClosed, BackendClosed]);
}

#[test]
fn a_reset_has_to_be_near_what_the_client_sent() {
    let recent = 0xffff_ff00_u32;
    for near in [0, 1, 4_000, 1 << 20] {
        assert!(is_credible_reset(recent.wrapping_add(near), recent), "{near}");
    }
    assert!(is_credible_reset(recent - 1, recent), "a keepalive's");
    for far in [1 << 26, 1 << 31, 0u32.wrapping_sub(1 << 17)] {
        assert!(!is_credible_reset(recent.wrapping_add(far), recent), "{far}");
    }
    assert!(is_credible_reset(12_345, 0), "nothing is known");
}
