//! The forwarding core: what happens to a packet. Pure: it sees the packet, the maps and the time
//! only through [`platform`], so the code that tests and fuzzers run is the code that the kernel
//! runs.
//!
//! Three steps, each a kernel program of its own: [`fast`] for packets of established flows, [`slow`]
//! for what it declines, [`unknown`] for packets of no known flow, or, while SYN cookies are in use,
//! [`cookie`](cookie()) for those of TCP. Replies of backends on this node meet [`egress`] instead, where
//! they leave the node. Connections that begin on this node need no step: [`socket`] gives them their
//! backend before there is a packet.

pub mod cache;
pub mod checksum;
mod client;
pub mod cookie;
mod egress;
pub mod emit;
mod fast;
mod fragment;
mod icmp;
pub mod ip;
mod new_flow;
mod pair;
pub mod parse;
pub mod platform;
mod progress;
mod refuse;
pub mod schedule;
pub mod scratch;
pub mod segment;
mod slow;
pub mod snat;
pub mod socket;
pub mod tcp_options;
pub mod tcp_state;
mod unknown;
pub mod wire;

pub use egress::egress;
pub use fast::{Fast, fast};
pub use slow::{Slow, follow_cookie, slow};
pub use unknown::{cookie, unknown};

use crate::abi::DropReason;
use platform::Datapath;

/// What is to happen to the packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Not ours, and untouched: the kernel goes on with it.
    Pass,
    /// For a backend on this node: edited, the node's own stack goes on with it.
    Deliver,
    /// Send it back by the device that it came in by.
    Transmit,
    /// Send it by another device, given by its index.
    Redirect(u32),
    /// Drop it; the reason was counted.
    Drop,
}

impl Verdict {
    /// Sends by a device.
    #[inline(always)]
    pub(crate) fn send<D: Datapath>(datapath: &D, ifindex: u32) -> Self {
        if ifindex == datapath.ingress_device() { Self::Transmit } else { Self::Redirect(ifindex) }
    }

    /// As a number other than 0. The index of a device is a value on some ways of a program only: LLVM
    /// would keep it on the stack on those, but read it on all, which the verifier does not allow.
    #[inline(always)]
    pub(crate) fn pack(self) -> usize {
        match self {
            Self::Pass => 1 << 32,
            Self::Deliver => 2 << 32,
            Self::Transmit => 3 << 32,
            Self::Redirect(ifindex) => 4 << 32 | ifindex as usize,
            Self::Drop => 5 << 32,
        }
    }

    /// Whether a packed verdict is to send or deliver the packet.
    #[inline(always)]
    pub(crate) fn goes_out(packed: usize) -> bool {
        matches!(packed >> 32, 2..=4)
    }

    /// The other way round.
    #[inline(always)]
    pub(crate) fn unpack(packed: usize) -> Self {
        match packed >> 32 {
            2 => Self::Deliver,
            3 => Self::Transmit,
            4 => Self::Redirect(packed as u32),
            5 => Self::Drop,
            _ => Self::Pass,
        }
    }

    /// Drops the packet at hand and counts it.
    #[inline(always)]
    pub(crate) fn drop<D: Datapath>(datapath: &D, reason: DropReason) -> Self {
        use platform::Packet;
        datapath.count_drop(reason, datapath.packet().length() as u64);
        Self::Drop
    }
}
