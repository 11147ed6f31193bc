//! Which source port a connection gets, and when it may have one that has a past.

use std::collections::BTreeSet;

use lb_common::abi::{Config, FlowFlags, FlowState, FlowStatus, V4, V6, ticks_from_seconds};
use lb_common::forward::snat::{ATTEMPTS, Fit, History, candidate, client_hash, fit};
use lb_common::forward::tcp_options::Timestamp;
use proptest::prelude::*;

proptest! {
    #[test]
    fn candidates_lie_in_the_range(first: u16, count in 1u16.., port: [u8; 2], hash: u32, attempt in 0..ATTEMPTS) {
        let count = count.min(u16::MAX - first).max(1);
        let config = Config { snat_port_first: first, snat_port_count: count, ..Config::default() };
        let port = u16::from_be_bytes(candidate(&config, port, hash, attempt));
        prop_assert!(port >= first && port - first < count);
    }

    #[test]
    fn ports_of_one_client_stay_distinct(client: [u8; 16], start: u16) {
        let config = Config::default();
        let hash = client_hash::<V6>(&client);
        // A client's ephemeral ports may wrap around the end of the port space only by its own doing.
        let start = u32::from(start.min(u16::MAX - config.snat_port_count));
        let mut taken = vec![false; 1 << 16];
        for port in start..start + u32::from(config.snat_port_count) {
            let port = usize::from(u16::from_be_bytes(candidate(&config, (port as u16).to_be_bytes(), hash, 0)));
            prop_assert!(!std::mem::replace(&mut taken[port], true), "{} is given twice", port);
        }
    }

    #[test]
    fn attempts_differ(client: [u8; 4], port: [u8; 2]) {
        let hash = client_hash::<V4>(&client);
        let ports: BTreeSet<_> =
            (0..ATTEMPTS).map(|attempt| candidate(&Config::default(), port, hash, attempt)).collect();
        prop_assert!(ports.len() > 8, "{} of {ATTEMPTS} attempts", ports.len());
    }

    #[test]
    fn a_shifted_timestamp_is_younger_than_the_past(mark: u32, value: u32, delta_attempt in 0..ATTEMPTS) {
        let history = closed(FlowFlags::MARK_IS_TIMESTAMP, mark, 5);
        match fit(&history, delta_attempt, Timestamp { is_set: true, value }, 0) {
            Fit::No => prop_assert!(false, "timestamps make any port fit"),
            Fit::Yes => prop_assert!(value.wrapping_sub(mark) as i32 > 0),
            Fit::ShiftTimestamps(delta) => {
                prop_assert_ne!(delta, 0);
                prop_assert!(value.wrapping_add(delta).wrapping_sub(mark) as i32 > 0);
            }
        }
    }
}

fn closed(flags: u8, mark: u32, idle_seconds: u32) -> History {
    History {
        status: FlowStatus { state: FlowState::TimeWait as u8, flags, epoch: 0 },
        idle: ticks_from_seconds(idle_seconds),
        timeout: ticks_from_seconds(60),
        mark,
    }
}

const NO_TIMESTAMP: Timestamp = Timestamp { is_set: false, value: 0 };

#[test]
fn a_range_of_no_ports_is_no_reason_to_divide_by_zero() {
    let config = Config { snat_port_first: 7, snat_port_count: 0, ..Config::default() };
    assert_eq!(candidate(&config, [1, 2], 3, 4), [0, 7]);
}

#[test]
fn time_decides_about_closed_connections() {
    let timestamp = Timestamp { is_set: true, value: 9 };
    assert_eq!(fit(&closed(FlowFlags::MARK_IS_TIMESTAMP, 5, 0), 15, timestamp, 0), Fit::No, "quiet time");
    assert_eq!(fit(&closed(FlowFlags::MARK_IS_TIMESTAMP, 5, 1), 0, timestamp, 0), Fit::No, "last segments");
    assert_eq!(fit(&closed(FlowFlags::MARK_IS_TIMESTAMP, 5, 1), 8, timestamp, 0), Fit::Yes, "in a hurry");
    assert_eq!(fit(&closed(FlowFlags::MARK_IS_TIMESTAMP, 5, 4), 0, timestamp, 0), Fit::Yes);
    assert_eq!(fit(&closed(FlowFlags::MARK_IS_TIMESTAMP, 9, 4), 0, timestamp, 0), Fit::ShiftTimestamps(1));
    assert_eq!(
        fit(&closed(FlowFlags::MARK_IS_TIMESTAMP, 99, 61), 0, timestamp, 0),
        Fit::Yes,
        "past TIME_WAIT"
    );
    assert_eq!(fit(&closed(FlowFlags::MARK_IS_TIMESTAMP, 5, 5), 0, NO_TIMESTAMP, 0), Fit::No);
    assert_eq!(
        fit(&closed(FlowFlags::MARK_IS_TIMESTAMP, 5, 2), 12, NO_TIMESTAMP, 0),
        Fit::Yes,
        "last resort"
    );
}

#[test]
fn sequence_numbers_decide_without_timestamps() {
    assert_eq!(fit(&closed(0, 100, 5), 0, NO_TIMESTAMP, 101), Fit::Yes);
    assert_eq!(fit(&closed(0, 100, 5), 0, NO_TIMESTAMP, 100), Fit::No);
    assert_eq!(fit(&closed(0, 0xffff_fff0, 5), 0, NO_TIMESTAMP, 5), Fit::Yes, "across the wrap");
}

#[test]
fn connections_that_go_on_keep_their_port() {
    for state in FlowState::ALL {
        if matches!(state, FlowState::Free | FlowState::TimeWait | FlowState::Reset) {
            continue;
        }
        let history = |idle| History {
            status: FlowStatus { state: state as u8, flags: 0, epoch: 0 },
            idle,
            timeout: 100,
            mark: 0,
        };
        assert_eq!(fit(&history(100), 15, NO_TIMESTAMP, u32::MAX), Fit::No, "{state:?}");
        assert_eq!(fit(&history(101), 0, NO_TIMESTAMP, 0), Fit::Yes, "{state:?} has timed out");
    }
}

#[test]
fn beginners_give_way_when_ports_are_short() {
    for (state, seconds) in [
        (FlowState::SynSent, 6),
        (FlowState::SynReceived, 6),
        (FlowState::UdpUnreplied, 6),
        (FlowState::UdpReplied, 31),
    ] {
        let history = |idle_seconds| History {
            status: FlowStatus { state: state as u8, flags: 0, epoch: 0 },
            idle: ticks_from_seconds(idle_seconds),
            timeout: ticks_from_seconds(120),
            mark: 0,
        };
        assert_eq!(fit(&history(seconds), 0, NO_TIMESTAMP, 0), Fit::No, "{state:?}, at first");
        assert_eq!(fit(&history(seconds), 8, NO_TIMESTAMP, 0), Fit::Yes, "{state:?}, in a hurry");
        assert_eq!(fit(&history(seconds - 2), 15, NO_TIMESTAMP, 0), Fit::No, "{state:?}, too young");
    }
}
