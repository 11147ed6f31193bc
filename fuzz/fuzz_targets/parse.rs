//! The parser, on any bytes.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| pointsman_tests::kit::fuzz::parse(bytes));
