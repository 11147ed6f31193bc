//! Map keys, values, limits and names: the one source of truth for the kernel programs, the agent,
//! the CLI and the documentation.
//!
//! Wire fields are big-endian byte arrays, so that neither padding nor byte order can be wrong;
//! everything else is in native order. Any change of a layout bumps [`ABI_VERSION`].

mod addr;
mod backend;
mod cache;
mod client;
mod config;
mod drop_reason;
mod flow;
pub mod maps;
#[cfg(feature = "agent")]
pub mod previous;
mod service;
mod socket;
mod stats;

pub use addr::{AddressFamily, NextHop, V4, V6, VlanTags};
pub use backend::{Backend, BackendFlags, BackendState};
pub use cache::{CACHE_JIFFIES, CACHE_TICKS, CachedFlow, FLOW_VERSION_BITS};
pub use client::{Affinity, AffinityKey, ConnectionLimit, ConnectionRate, SourceRange, SourceRangeKey};
pub use config::{Config, SynCookies, TICK_SHIFT, Tick, idle_ticks, ticks_from_seconds};
pub use drop_reason::DropReason;
pub use flow::{Flow, FlowFlags, FlowKey, FlowState, FlowStatus, Fragment, FragmentKey};
pub use service::{Service, ServiceFlags, ServiceName, VipKey};
pub use socket::{SocketKey, SocketPeer, SocketRole};
pub use stats::{BackendStats, DropStats, ServiceStats};

/// Version of every layout below; part of the path under which maps are pinned.
pub const ABI_VERSION: u32 = 4;

/// IANA protocol number of ICMP.
pub const IPPROTO_ICMP: u8 = 1;
/// IANA protocol number of TCP.
pub const IPPROTO_TCP: u8 = 6;
/// IANA protocol number of UDP.
pub const IPPROTO_UDP: u8 = 17;
/// IANA protocol number of ICMPv6.
pub const IPPROTO_ICMPV6: u8 = 58;

/// Types that consist of plain bytes without padding: they may be copied to and from maps.
///
/// # Safety
/// The type is `#[repr(C)]`, has no padding, and every bit pattern is a value of it.
#[expect(unsafe_code, reason = "the marker is the promise that a layout is plain bytes")]
pub unsafe trait Plain: Copy + 'static {}

#[expect(unsafe_code, reason = "integers have no padding and no invalid values")]
mod primitives {
    use super::Plain;
    // SAFETY: integers and arrays of them are plain bytes.
    unsafe impl Plain for u32 {}
    // SAFETY: as above.
    unsafe impl Plain for u64 {}
    // SAFETY: as above.
    unsafe impl<const N: usize> Plain for [u8; N] {}
}

/// Declares that a `#[repr(C)]` type is [`Plain`], and asserts its size and the absence of padding
/// at compile time: the sizes of the fields must add up to the size of the type.
macro_rules! plain {
    ($type:ty, size = $size:literal, { $($field:ident: $field_type:ty),+ $(,)? }) => {
        const _: () = {
            assert!(size_of::<$type>() == $size, concat!(stringify!($type), " changed its size: bump ABI_VERSION"));
            let mut end = 0;
            $(
                assert!(core::mem::offset_of!($type, $field) == end, concat!("padding before ", stringify!($field)));
                end += size_of::<$field_type>();
            )+
            assert!(end == $size, concat!(stringify!($type), " has trailing padding"));
        };
        #[expect(unsafe_code, reason = "size and padding are asserted above")]
        // SAFETY: `#[repr(C)]`, no padding (asserted), fields are integers and arrays of them.
        unsafe impl $crate::abi::Plain for $type {}
        #[cfg(feature = "agent")]
        #[expect(unsafe_code, reason = "size and padding are asserted above")]
        // SAFETY: as for `Plain`.
        unsafe impl aya::Pod for $type {}
    };
}
pub(crate) use plain;
