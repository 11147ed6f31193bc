//! The Internet checksum (RFC 1071) and its incremental update (RFC 1624).
//!
//! Sums are over 16-bit words loaded in native order: the one's complement sum does not depend on
//! byte order as long as it is stored the way it was loaded (RFC 1071, section 2 B).

/// A folded one's complement sum.
pub type Delta = u16;

/// What one step of TTL or hop limit adds to the IPv4 header checksum: the TTL is the first byte of
/// its word.
pub const TTL_DECREMENT: Delta = !u16::from_ne_bytes([1, 0]);

/// Folds a sum of fewer than 65,536 words.
#[inline(always)]
#[must_use]
pub const fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    (sum + (sum >> 16)) as u16
}

/// The sum of the words of some bytes of even number.
#[inline(always)]
#[must_use]
pub fn sum<const N: usize>(bytes: &[u8; N]) -> u32 {
    let mut total = 0;
    let mut index = 0;
    while index + 1 < N {
        total += u32::from(u16::from_ne_bytes([bytes[index], bytes[index + 1]]));
        index += 2;
    }
    total
}

/// What replacing bytes with others adds to a sum: folded `~old + new` (RFC 1624, equation 3).
#[inline(always)]
#[must_use]
pub fn replaced<const N: usize>(old: &[u8; N], new: &[u8; N]) -> u32 {
    sum(new) + (0xffff * (N as u32 / 2) - sum(old))
}

/// Applies a delta to a checksum field.
#[inline(always)]
pub fn apply(field: &mut [u8; 2], delta: Delta) {
    let sum = u32::from(!u16::from_ne_bytes(*field)) + u32::from(delta);
    *field = (!fold(sum)).to_ne_bytes();
}

/// Applies a delta to a UDP checksum: "none" stays, and a computed zero is sent as all ones
/// (RFC 768).
#[inline(always)]
pub fn apply_udp(field: &mut [u8; 2], delta: Delta) {
    if u16::from_ne_bytes(*field) == 0 {
        return;
    }
    apply(field, delta);
    if u16::from_ne_bytes(*field) == 0 {
        *field = [0xff, 0xff];
    }
}
