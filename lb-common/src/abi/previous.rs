//! What an agent of the previous layout version has pinned, as far as the next one goes on with it.
//!
//! A map goes on as it is, shared by the programs of both versions for as long as both are attached: so
//! no entry is lost or made twice, however many packets come meanwhile. That asks for the same layout,
//! which is frozen here. Whoever changes a layout is told at compile time, or by the test of the built
//! object, and has to convert that map's entries or to do without them; and moves this file one version
//! on with every [`ABI_VERSION`](super::ABI_VERSION).

use core::mem::offset_of;

use super::{
    ABI_VERSION, Affinity, AffinityKey, Backend, BackendStats, Config, DropStats, Flow, FlowKey, FlowStatus,
    Fragment, FragmentKey, NextHop, Service, ServiceName, ServiceStats, SourceRangeKey, VipKey, maps,
};

/// The version.
pub const VERSION: u32 = 3;
const _: () = assert!(VERSION + 1 == ABI_VERSION, "freeze the layouts of the version before");

/// Types of maps, by the kernel's numbers (`enum bpf_map_type`, include/uapi/linux/bpf.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// Hash.
    Hash = 1,
    /// Array.
    Array = 2,
    /// Array with a value for each CPU.
    PerCpuArray = 6,
    /// Hash that forgets what was used longest ago.
    LruHash = 9,
    /// Longest prefix match.
    LpmTrie = 11,
    /// Devices to redirect to, by index.
    DeviceHash = 25,
}

/// A map of the previous version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Carried {
    /// Name, in both versions.
    pub name: &'static str,
    /// Type.
    pub kind: Kind,
    /// Bytes of a key.
    pub key_size: u32,
    /// Bytes of a value.
    pub value_size: u32,
}

const fn carried(map: maps::Map, kind: Kind, key_size: u32, value_size: u32) -> Carried {
    Carried { name: map.name, kind, key_size, value_size }
}

/// The maps that the next version goes on with. The others (program arrays, scratch memory) are what
/// programs of one version have among themselves.
pub const CARRIED: &[Carried] = &[
    carried(maps::FLOWS_V4, Kind::Hash, 16, 64),
    carried(maps::FLOWS_V6, Kind::Hash, 40, 88),
    carried(maps::TRANSIENT_V4, Kind::LruHash, 16, 64),
    carried(maps::TRANSIENT_V6, Kind::LruHash, 40, 88),
    carried(maps::VIPS_V4, Kind::Hash, 8, 4),
    carried(maps::VIPS_V6, Kind::Hash, 20, 4),
    carried(maps::SERVICES, Kind::Array, 4, 8),
    carried(maps::SERVICE_NAMES, Kind::Array, 4, 212),
    carried(maps::ROUND_ROBIN, Kind::Array, 4, 8),
    // Copied where the next version wants a larger one: only agents write it.
    carried(maps::SLOTS, Kind::Array, 4, 4),
    carried(maps::BACKENDS, Kind::Array, 4, 64),
    carried(maps::SNAT_ADDRESSES, Kind::Array, 4, 16),
    carried(maps::SERVICE_STATS, Kind::PerCpuArray, 4, 48),
    carried(maps::BACKEND_STATS, Kind::PerCpuArray, 4, 40),
    carried(maps::DROPS, Kind::PerCpuArray, 4, 16),
    carried(maps::FRAGMENTS_V4, Kind::LruHash, 16, 24),
    carried(maps::FRAGMENTS_V6, Kind::LruHash, 40, 48),
    carried(maps::SOURCE_RANGES_V4, Kind::LpmTrie, 12, 4),
    carried(maps::SOURCE_RANGES_V6, Kind::LpmTrie, 24, 4),
    carried(maps::AFFINITY_V4, Kind::LruHash, 8, 12),
    carried(maps::AFFINITY_V6, Kind::LruHash, 20, 12),
    carried(maps::AFFINITY_TICKS, Kind::Array, 4, 4),
    carried(maps::DEVICES, Kind::DeviceHash, 4, 8),
    // Last: with it the new version's maps count as complete.
    carried(maps::CONFIG, Kind::Array, 4, 80),
];

/// Asserts that the fields of the previous version are where they were.
macro_rules! frozen {
    ($type:ty, $size:literal, { $($field:ident at $offset:literal),+ $(,)? }) => {
        const _: () = {
            assert!(size_of::<$type>() == $size, concat!("the size differs: ", stringify!($type)));
            $(assert!(offset_of!($type, $field) == $offset, concat!("another place: ", stringify!($field)));)+
        };
    };
}

frozen!(NextHop, 20, { ifindex at 0, destination_mac at 4, source_mac at 10, vlan at 16 });
frozen!(FlowStatus, 4, { state at 0, flags at 1, epoch at 2 });
frozen!(FlowKey<[u8; 4]>, 16, {
    source_port at 0, destination_port at 2, protocol at 4, source at 8, destination at 12,
});
frozen!(FlowKey<[u8; 16]>, 40, {
    source_port at 0, destination_port at 2, protocol at 4, source at 8, destination at 24,
});
frozen!(Flow<[u8; 4]>, 64, {
    new_source at 0, new_destination at 4, new_source_port at 8, new_destination_port at 10,
    l3_checksum_delta at 12, l4_checksum_delta at 14, next_hop at 16, backend at 36, service at 40,
    last_seen at 44, status at 48, generation at 52, timestamp_delta at 56, mark at 60,
});
frozen!(Flow<[u8; 16]>, 88, {
    new_source at 0, new_destination at 16, new_source_port at 32, new_destination_port at 34,
    l3_checksum_delta at 36, l4_checksum_delta at 38, next_hop at 40, backend at 60, service at 64,
    last_seen at 68, status at 72, generation at 76, timestamp_delta at 80, mark at 84,
});
frozen!(FragmentKey<[u8; 4]>, 16, { source at 0, destination at 4, identification at 8, protocol at 12 });
frozen!(FragmentKey<[u8; 16]>, 40, { source at 0, destination at 16, identification at 32, protocol at 36 });
frozen!(Fragment<[u8; 4]>, 24, { flow at 0, created at 16 });
frozen!(Fragment<[u8; 16]>, 48, { flow at 0, created at 40 });
frozen!(VipKey<[u8; 4]>, 8, { address at 0, port at 4, protocol at 6, reserved at 7 });
frozen!(VipKey<[u8; 16]>, 20, { address at 0, port at 16, protocol at 18, reserved at 19 });
frozen!(Service, 8, { first_slot at 0, count_and_flags at 4 });
frozen!(ServiceName, 212, {
    namespace at 0, name at 64, port_name at 128, address at 192, port at 208, protocol at 210, family at 211,
});
frozen!(Backend, 64, {
    address at 0, port at 16, state at 18, family at 19, generation at 20, service at 24, snat_first at 28,
    snat_count at 30, next_hop at 32, weight at 52, flags at 56, mtu at 58,
});
frozen!(Config, 80, {
    route_generation at 0, snat_port_first at 4, snat_port_count at 6, timeouts at 8, client_mtu at 72,
    has_tc at 74,
});
frozen!(AffinityKey<[u8; 4]>, 8, { client at 0, service at 4 });
frozen!(AffinityKey<[u8; 16]>, 20, { client at 0, service at 16 });
frozen!(Affinity, 12, { backend at 0, generation at 4, last_used at 8 });
frozen!(SourceRangeKey<[u8; 4]>, 12, { prefix_length at 0, range at 4 });
frozen!(SourceRangeKey<[u8; 16]>, 24, { prefix_length at 0, range at 4 });
frozen!(ServiceStats, 48, {
    packets_in at 0, bytes_in at 8, packets_out at 16, bytes_out at 24, new_flows at 32, refused at 40,
});
frozen!(BackendStats, 40, {
    packets_in at 0, bytes_in at 8, packets_out at 16, bytes_out at 24, new_flows at 32,
});
frozen!(DropStats, 16, { packets at 0, bytes at 8 });
