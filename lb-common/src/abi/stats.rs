//! Counters. All are per CPU: readers add them up.

use super::plain;

/// Traffic of one Service entry: element of the per-CPU array `service_stats`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(8))]
pub struct ServiceStats {
    /// Packets from clients that were forwarded.
    pub packets_in: u64,
    /// Their bytes, from the Ethernet header on.
    pub bytes_in: u64,
    /// Packets from backends that were forwarded.
    pub packets_out: u64,
    /// Their bytes, from the Ethernet header on.
    pub bytes_out: u64,
    /// Connections (UDP: sessions) that were given a backend.
    pub new_flows: u64,
    /// Connections and packets that were answered with a refusal.
    pub refused: u64,
}
plain!(ServiceStats, size = 48, {
    packets_in: u64, bytes_in: u64, packets_out: u64, bytes_out: u64, new_flows: u64, refused: u64,
});

/// Traffic of one backend: element of the per-CPU array `backend_stats`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(8))]
pub struct BackendStats {
    /// Packets forwarded to it.
    pub packets_in: u64,
    /// Their bytes, from the Ethernet header on.
    pub bytes_in: u64,
    /// Packets that it sent and that were forwarded.
    pub packets_out: u64,
    /// Their bytes, from the Ethernet header on.
    pub bytes_out: u64,
    /// Connections (UDP: sessions) that it was given.
    pub new_flows: u64,
}
plain!(BackendStats, size = 40, {
    packets_in: u64, bytes_in: u64, packets_out: u64, bytes_out: u64, new_flows: u64,
});

/// Packets of one drop reason: element of the per-CPU array `drops`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(8))]
pub struct DropStats {
    /// Packets.
    pub packets: u64,
    /// Their bytes, from the Ethernet header on.
    pub bytes: u64,
}
plain!(DropStats, size = 16, { packets: u64, bytes: u64 });

macro_rules! count_forwarded {
    ($($stats:ty),+) => {$(
        impl $stats {
            /// Counts a packet of a client, or of a backend, that was forwarded.
            #[inline(always)]
            pub fn count_forwarded(&mut self, reply: bool, bytes: u64) {
                let (packets, sum) = if reply {
                    (&mut self.packets_out, &mut self.bytes_out)
                } else {
                    (&mut self.packets_in, &mut self.bytes_in)
                };
                *packets = packets.wrapping_add(1);
                *sum = sum.wrapping_add(bytes);
            }
        }
    )+};
}

count_forwarded!(ServiceStats, BackendStats);
