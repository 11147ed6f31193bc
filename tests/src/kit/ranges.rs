//! Source ranges as a trie of the kernel finds them, done the plain way.

use std::collections::BTreeSet;

use lb_common::abi::{SourceRange, SourceRangeKey};

/// Prefixes of an index and an address: their length in bits and the bits, the rest zero.
#[derive(Debug)]
pub struct Ranges<A> {
    prefixes: BTreeSet<(u32, u32, u128)>,
    family: std::marker::PhantomData<A>,
}

impl<A> Default for Ranges<A> {
    fn default() -> Self {
        Self { prefixes: BTreeSet::new(), family: std::marker::PhantomData }
    }
}

/// The first bits of an address.
fn cut(wide: &[u8; 16], length: u32) -> u128 {
    match length {
        0 => 0,
        _ => u128::from_be_bytes(*wide) & (u128::MAX << (128 - length)),
    }
}

impl<A> Ranges<A> {
    /// Adds a range; `wide` is its address.
    pub fn insert(&mut self, service: u32, wide: &[u8; 16], length: u32) {
        self.prefixes.insert((service, length, cut(wide, length)));
    }

    /// Removes a range, if it is there.
    pub fn remove(&mut self, service: u32, wide: &[u8; 16], length: u32) {
        self.prefixes.remove(&(service, length, cut(wide, length)));
    }

    /// Whether one covers a client with this address.
    ///
    /// # Panics
    /// When the key is not one of a client: shorter than an address.
    #[must_use]
    pub fn cover(&self, wide: &[u8; 16], client: &SourceRangeKey<A>) -> bool {
        assert_eq!(client.prefix_length, SourceRange::<A>::ALL_BITS, "a client is a whole address");
        let service = u32::from_be_bytes(client.range.service);
        (0..=size_of::<A>() as u32 * 8)
            .any(|length| self.prefixes.contains(&(service, length, cut(wide, length))))
    }
}
