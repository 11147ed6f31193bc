//! The incremental checksum against the one from the definition.

use lb_common::forward::checksum::{apply, apply_udp, fold, replaced, sum};
use proptest::prelude::*;

/// RFC 1071, from its definition: big-endian words, one's complement.
fn by_definition(bytes: &[u8]) -> u16 {
    let mut total: u64 = bytes.chunks(2).map(|pair| u64::from(pair[0]) << 8 | u64::from(pair[1])).sum();
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    !(total as u16)
}

proptest! {
    #[test]
    fn the_sum_is_that_of_the_definition(bytes: [u8; 32]) {
        prop_assert_eq!((!fold(sum(&bytes))).to_ne_bytes(), by_definition(&bytes).to_be_bytes());
    }

    #[test]
    fn an_update_equals_a_new_calculation(mut packet: [u8; 32], new: [u8; 8], at in 0usize..12) {
        // A packet is never all zeros: it has a version, a protocol, a length.
        packet[0] |= 0x40;
        let mut field = by_definition(&packet).to_be_bytes();
        let at = at * 2;
        let old: [u8; 8] = packet[at..at + 8].try_into().unwrap();
        packet[at..at + 8].copy_from_slice(&new);
        packet[0] |= 0x40;
        let new: [u8; 8] = packet[at..at + 8].try_into().unwrap();
        apply(&mut field, fold(replaced(&old, &new)));
        prop_assert_eq!(field, by_definition(&packet).to_be_bytes());
    }

    #[test]
    fn an_update_and_its_inverse_cancel_out(mut field: [u8; 2], old: [u8; 16], new: [u8; 16]) {
        // All ones is the other way to write zero; no correct header has it.
        prop_assume!(field != [0xff, 0xff]);
        let before = field;
        apply(&mut field, fold(replaced(&old, &new)));
        apply(&mut field, fold(replaced(&new, &old)));
        prop_assert_eq!(field, before);
    }

    #[test]
    fn a_udp_checksum_is_never_lost_and_never_invented(field: [u8; 2], old: [u8; 4], new: [u8; 4]) {
        let mut after = field;
        apply_udp(&mut after, fold(replaced(&old, &new)));
        prop_assert_eq!(after == [0, 0], field == [0, 0]);
    }
}

#[test]
fn a_udp_checksum_that_comes_to_zero_is_sent_as_all_ones() {
    // The sum of the packet goes from 0xfffe to 0xffff, so its complement from 1 to 0.
    let mut field = 1u16.to_be_bytes();
    apply_udp(&mut field, fold(replaced(&[0, 1], &[0, 2])));
    assert_eq!(field, [0xff, 0xff]);
}

#[test]
fn equation_4_of_rfc_1624_is_avoided() {
    // The example of RFC 1624, section 4.
    let mut field = 0xdd2fu16.to_be_bytes();
    apply(&mut field, fold(replaced(&0x5555u16.to_be_bytes(), &0x3285u16.to_be_bytes())));
    assert_eq!(field, 0x0000u16.to_be_bytes());
}
