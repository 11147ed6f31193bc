//! What is known of clients: who may connect, how often, and which backend they had.

use super::{TICK_SHIFT, Tick, plain};

/// The part of a source range's key that prefixes are prefixes of. All of it is big-endian, so that
/// a prefix covers the whole index, and a Service's ranges are never those of another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(C)]
pub struct SourceRange<A> {
    /// Index of the Service entry, big-endian.
    pub service: [u8; 4],
    /// Address of the range, or of a client.
    pub address: A,
}
plain!(SourceRange<[u8; 4]>, size = 8, { service: [u8; 4], address: [u8; 4] });
plain!(SourceRange<[u8; 16]>, size = 20, { service: [u8; 4], address: [u8; 16] });

impl<A> SourceRange<A> {
    /// Bits of the index, which every prefix has in full.
    pub const INDEX_BITS: u32 = 32;
    /// The longest prefix: a single address.
    pub const ALL_BITS: u32 = size_of::<Self>() as u32 * 8;

    /// The range of a Service entry's index at an address.
    #[inline(always)]
    pub fn new(service: u32, address: A) -> Self {
        Self { service: service.to_be_bytes(), address }
    }
}

/// Key of the source range maps (longest prefix match). The value is a `u32` that nobody reads:
/// a client that an entry covers may connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(C, align(4))]
pub struct SourceRangeKey<A> {
    /// Length of the prefix in bits, [`SourceRange::INDEX_BITS`] included; native order.
    pub prefix_length: u32,
    /// What it is a prefix of.
    pub range: SourceRange<A>,
}
plain!(SourceRangeKey<[u8; 4]>, size = 12, { prefix_length: u32, range: SourceRange<[u8; 4]> });
plain!(SourceRangeKey<[u8; 16]>, size = 24, { prefix_length: u32, range: SourceRange<[u8; 16]> });

/// Key of the affinity maps and of the connection rate maps: a client of a Service entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(C, align(4))]
pub struct AffinityKey<A> {
    /// The client's address; in the connection rate maps without what
    /// [`IpFamily::keep_network`](crate::forward::ip::IpFamily::keep_network) takes away.
    pub client: A,
    /// Index of the Service entry.
    pub service: u32,
}
plain!(AffinityKey<[u8; 4]>, size = 8, { client: [u8; 4], service: u32 });
plain!(AffinityKey<[u8; 16]>, size = 20, { client: [u8; 16], service: u32 });

/// Which backend a client's last connection went to: value of the affinity maps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(4))]
pub struct Affinity {
    /// Index of the backend.
    pub backend: u32,
    /// Its generation then: another endpoint that has the index by now is not meant.
    pub generation: u32,
    /// The time of that connection's first packet.
    pub last_used: Tick,
}
plain!(Affinity, size = 12, { backend: u32, generation: u32, last_used: Tick });

/// How many connections one client may open to a Service entry: element of the array `conn_limits`.
/// One aligned word, which the kernel copies at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(8))]
pub struct ConnectionLimit {
    /// New connections in a second; 0 for no limit.
    pub rate: u32,
    /// New connections at once, after a pause.
    pub burst: u32,
}
plain!(ConnectionLimit, size = 8, { rate: u32, burst: u32 });

/// What a client has used up of a [`ConnectionLimit`]: value of the connection rate maps.
///
/// A token bucket as one number, so that it can be compared and swapped: the time at which the
/// bucket is full again (the "theoretical arrival time" of ITU-T I.371's generic cell rate algorithm).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(8))]
pub struct ConnectionRate {
    /// That time: a [`Tick`] in the high 32 bits, the fraction of it in the low ones. It wraps as ticks do.
    pub full_at: u64,
}
plain!(ConnectionRate, size = 8, { full_at: u64 });

impl ConnectionRate {
    /// A tick as a time of this kind.
    #[inline(always)]
    #[must_use]
    pub const fn time(tick: Tick) -> u64 {
        (tick as u64) << 32
    }
}

impl ConnectionLimit {
    /// The highest rate, and the largest burst: with them, a full bucket is far from half of the
    /// time after which ticks wrap.
    pub const MAXIMUM: u32 = 1_000_000;

    /// A second, as a [`ConnectionRate`] counts time: exact, since 10^9 ns * 2^32 / 2^24 ns is whole.
    const SECOND: u64 = 1_000_000_000 << (32 - TICK_SHIFT);

    /// The least burst that does not cut the rate: what a tick fills in and the bucket does not hold
    /// is lost, while there is always up to a connection's worth left over.
    #[must_use]
    pub const fn least_burst(rate: u32) -> u32 {
        1 + (((rate as u64) << 32).div_ceil(Self::SECOND)) as u32
    }

    /// Takes a connection out of the bucket of a client: gives when it is full again, or `full_at` itself
    /// when there is none in it.
    ///
    /// Rounded so that the rate is never exceeded, and missed by less than a 250,000th of itself.
    /// A bucket that owes more than it can hold is full: time has wrapped since (after 2.3 years), or
    /// the limit has changed. The rate must not be 0.
    #[inline(always)]
    #[must_use]
    pub const fn take(self, full_at: u64, now: Tick) -> u64 {
        let rate = self.rate as u64;
        #[expect(clippy::manual_div_ceil, reason = "its remainder would be another division on BPF")]
        let interval = (Self::SECOND + rate - 1) / rate;
        let capacity = interval.wrapping_mul(self.burst as u64);
        let now = ConnectionRate::time(now);
        let mut missing = full_at.wrapping_sub(now);
        // What lies in the past is a large number.
        if missing > capacity {
            missing = 0;
        }
        if missing + interval > capacity {
            return full_at;
        }
        now.wrapping_add(missing + interval)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::ticks_from_seconds;

    /// Tries so many connections at each of so many ticks; gives how many were allowed.
    fn allowed(limit: ConnectionLimit, full_at: &mut u64, first: Tick, ticks: u32, tries: u32) -> u32 {
        let mut allowed = 0;
        for tick in 0..ticks {
            for _ in 0..tries {
                let after = limit.take(*full_at, first.wrapping_add(tick));
                allowed += u32::from(after != *full_at);
                *full_at = after;
            }
        }
        allowed
    }

    #[test]
    fn the_rate_is_exact_over_any_time() {
        for rate in [1, 3, 59, 60, 100, 1000, 4321, 100_000, ConnectionLimit::MAXIMUM] {
            let limit = ConnectionLimit { rate, burst: ConnectionLimit::least_burst(rate) };
            // Across the wrap, too.
            for first in [0, 77, u32::MAX - 20] {
                let mut full_at = ConnectionRate::time(first);
                let ticks = ticks_from_seconds(40);
                let count = allowed(limit, &mut full_at, first, ticks, limit.burst + 1);
                let seconds = f64::from(ticks - 1) * (f64::from(1 << TICK_SHIFT) / 1e9);
                let expected = f64::from(limit.burst) + seconds * f64::from(rate);
                let short = expected - f64::from(count);
                assert!(
                    (0.0..=1.0 + expected / 250_000.0).contains(&short),
                    "{rate}: {count}, not {expected}"
                );
            }
        }
    }

    #[test]
    fn a_smaller_burst_would_cut_the_rate() {
        let limit = ConnectionLimit { rate: 1000, burst: ConnectionLimit::least_burst(1000) - 2 };
        let count = allowed(limit, &mut 0, 0, ticks_from_seconds(10), 100);
        assert!(count < 9_700, "{count}");
    }

    #[test]
    fn a_burst_comes_back_with_the_time() {
        let limit = ConnectionLimit { rate: 10, burst: 30 };
        let mut full_at = ConnectionRate::time(5);
        assert_eq!(allowed(limit, &mut full_at, 5, 1, 40), 30);
        assert_eq!(allowed(limit, &mut full_at, 5 + ticks_from_seconds(1), 1, 40), 10);
        assert_eq!(allowed(limit, &mut full_at, 5 + ticks_from_seconds(60), 1, 40), 30);
        // Years later, at any phase of the wrap.
        for later in [1 << 30, 1 << 31, u32::MAX - 5, u32::MAX, 5] {
            let mut full_at = full_at;
            assert_eq!(allowed(limit, &mut full_at, later, 1, 40), 30, "{later}");
        }
    }

    #[test]
    fn a_limit_that_is_lowered_counts_at_once() {
        let mut full_at = 0;
        assert_eq!(allowed(ConnectionLimit { rate: 1, burst: 1000 }, &mut full_at, 9, 1, 1001), 1000);
        let lower = ConnectionLimit { rate: 2, burst: 3 };
        assert_eq!(allowed(lower, &mut full_at, 9, 1, 10), 3);
        assert_eq!(allowed(lower, &mut full_at, 9 + ticks_from_seconds(1), 1, 10), 2);
    }

    #[test]
    fn the_largest_numbers_do_not_overflow() {
        let limit = ConnectionLimit { rate: 1, burst: ConnectionLimit::MAXIMUM };
        let mut full_at = ConnectionRate::time(u32::MAX);
        assert_eq!(allowed(limit, &mut full_at, u32::MAX, 1, ConnectionLimit::MAXIMUM + 5), limit.burst);
    }
}
