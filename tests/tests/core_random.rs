//! Random traffic through the forwarding core on the host.

use pointsman_tests::kit::host::Host;
use pointsman_tests::kit::random::{Source, Traffic};

#[test]
fn what_is_passed_is_untouched_and_what_is_sent_is_sound() {
    for seed in 0..40 {
        let mut host = Host::default();
        let mut traffic = Traffic::new(&mut host, Source::Seed(seed));
        for _ in 0..2_000 {
            traffic.step(&mut host);
        }
    }
}
