//! Random traffic through the forwarding core on the host.

use std::collections::BTreeSet;

use lb_common::abi::{DropReason, FlowState};
use pointsman_tests::kit::device::Device as _;
use pointsman_tests::kit::host::Host;
use pointsman_tests::kit::random::{Source, Traffic};

/// Reasons that this traffic cannot bring about: tables never fill on the host, nothing fails to be
/// edited, the slow path is always there, quotes that are cut end the packet, and SYN cookies are off.
const OUT_OF_REACH: [DropReason; 6] = [
    DropReason::TableFull,
    DropReason::EditFailed,
    DropReason::BadIcmpQuote,
    DropReason::NoSlowPath,
    DropReason::SynCookieSent,
    DropReason::SynCookieInvalid,
];

/// What is passed is untouched and what is sent is sound (the traffic itself sees to that), and the
/// traffic gets everywhere.
#[test]
fn anything_may_come() {
    let (mut reasons, mut states, mut shifted) = (BTreeSet::new(), BTreeSet::new(), 0);
    for seed in 0..40 {
        let mut host = Host::default();
        let mut traffic = Traffic::new(&mut host, Source::Seed(seed));
        for step in 0..2_000 {
            traffic.step(&mut host);
            if step % 10 == 0 {
                let snapshots = host.snapshots();
                states.extend(snapshots.v4.flows().map(|(_, flow)| flow.status.state));
                shifted += snapshots.v6.flows().filter(|(_, flow)| flow.timestamp_delta != 0).count();
            }
        }
        reasons.extend(host.stats().drops.into_keys());
    }
    for reason in DropReason::ALL {
        assert!(
            OUT_OF_REACH.contains(reason) || reasons.contains(&(*reason as u32)),
            "{reason:?} never came up"
        );
    }
    for state in &FlowState::ALL[1..] {
        assert!(states.contains(&(*state as u8)), "{state:?} never came up");
    }
    assert!(shifted > 100, "timestamps were shifted in {shifted} entries");
}

/// The same as TC sees it, with all that may lie beside a packet.
#[test]
fn anything_may_lie_beside() {
    for seed in 0..20 {
        let mut host = Host::with_offloads(Source::Seed(!seed));
        let mut traffic = Traffic::new(&mut host, Source::Seed(seed));
        for _ in 0..2_000 {
            traffic.step(&mut host);
        }
        assert!(host.stats().services.values().any(|service| service.packets_out > 100));
    }
}
