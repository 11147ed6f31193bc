//! What is known of clients: who may connect, and which backend they had.

use super::{Tick, plain};

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

/// Key of the affinity maps: a client of a Service entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(C, align(4))]
pub struct AffinityKey<A> {
    /// The client's address.
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
