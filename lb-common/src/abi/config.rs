//! Settings of the datapath that the agent may change while it runs.

use super::{FlowState, plain};

/// Time in the datapath: `CLOCK_MONOTONIC_COARSE` in nanoseconds, shifted right by [`TICK_SHIFT`].
/// It wraps after 2.3 years; compare with wrapping arithmetic.
pub type Tick = u32;

/// A tick is 2^24 ns, about 16.8 ms.
pub const TICK_SHIFT: u32 = 24;

/// The number of ticks in a number of seconds, rounded up.
#[must_use]
pub const fn ticks_from_seconds(seconds: u32) -> Tick {
    ((seconds as u64 * 1_000_000_000).div_ceil(1 << TICK_SHIFT)) as Tick
}

/// Ticks from `seen` to `now`; 0 if another CPU has seen something since `now` was read.
#[inline(always)]
#[must_use]
pub const fn idle_ticks(now: Tick, seen: Tick) -> Tick {
    let idle = now.wrapping_sub(seen);
    if (idle as i32) < 0 { 0 } else { idle }
}

/// The one element of the array `config`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(8))]
pub struct Config {
    /// Changes with every change of routes or neighbours; flows compare it with theirs and look
    /// the way back to the client up again. Never 0.
    pub route_generation: u32,
    /// First source port used towards backends, in native order.
    pub snat_port_first: u16,
    /// Number of source ports used towards backends.
    pub snat_port_count: u16,
    /// Idle time in ticks after which a flow may be forgotten, by [`FlowState`]. A power of two of
    /// them, so that a mask bounds the index.
    pub timeouts: [Tick; Self::TIMEOUTS],
    /// The largest IP packet that the device towards clients takes, in bytes; 0 if it is not known.
    pub client_mtu: u16,
    /// Not zero if TC is attached beside XDP.
    pub has_tc: u8,
    /// Numbers of [`SynCookies`].
    pub syn_cookies: u8,
    /// Zero.
    pub reserved: [u8; 4],
}
plain!(Config, size = 80, {
    route_generation: u32, snat_port_first: u16, snat_port_count: u16, timeouts: [Tick; Config::TIMEOUTS],
    client_mtu: u16, has_tc: u8, syn_cookies: u8, reserved: [u8; 4],
});

/// Values of [`Config::syn_cookies`].
#[derive(Clone, Copy, Debug)]
pub struct SynCookies;

impl SynCookies {
    /// Nobody looks for cookies, and the programs for them need not be there.
    pub const OFF: u8 = 0;
    /// Connections begin the usual way; cookies that were given out before are accepted.
    pub const ACCEPT: u8 = 1;
    /// SYNs are answered with cookies.
    pub const ANSWER: u8 = 2;
}

impl Config {
    /// Number of timeouts there is room for.
    pub const TIMEOUTS: usize = 16;
}

const _: () = assert!(FlowState::COUNT <= Config::TIMEOUTS);

impl Default for Config {
    /// Timeouts as in nf_conntrack (net/netfilter/nf_conntrack_proto_tcp.c, _udp.c), but for
    /// established connections: 24 hours in place of five days. Source ports lie below Linux's
    /// default ephemeral range (32768 to 60999), so that the node's own connections never meet them.
    fn default() -> Self {
        let mut timeouts = [0; Self::TIMEOUTS];
        let mut index = 0;
        while index < FlowState::COUNT {
            timeouts[index] = ticks_from_seconds(FlowState::ALL[index].default_timeout_seconds());
            index += 1;
        }
        Self {
            route_generation: 1,
            snat_port_first: 1024,
            snat_port_count: 31_744,
            timeouts,
            client_mtu: 0,
            has_tc: 0,
            syn_cookies: SynCookies::OFF,
            reserved: [0; 4],
        }
    }
}
