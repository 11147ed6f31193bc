//! The forwarding core, on traffic that the fuzzer chooses.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| pointsman_tests::kit::fuzz::forward(bytes));
