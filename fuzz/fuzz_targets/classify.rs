//! The forwarding core as TC runs it: what belongs to a packet is not all in its bytes.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| pointsman_tests::kit::fuzz::classify(bytes));
