//! Source ports towards backends.
//!
//! A port that was used a moment ago may still be in TIME_WAIT at the backend. Its kernel accepts a
//! new SYN there only if its timestamp is younger than the last one it saw or, without timestamps,
//! if its sequence number is higher (RFC 6191; Linux: `tcp_timewait_state_process`). A client that
//! re-uses its own port fulfils that by itself, so it is given the same port again wherever
//! possible; when another client follows, its timestamps are shifted until they are younger.

use super::ip::IpFamily;
use super::tcp_options::Timestamp;
use crate::abi::{Config, FlowFlags, FlowState, FlowStatus, Tick, ticks_from_seconds};

/// Ports that are tried for a connection before it is dropped.
pub const ATTEMPTS: u32 = 16;

/// From this attempt on, a port is taken even if the backend's TIME_WAIT may answer the first SYN
/// with a challenge: the client's second SYN gets through.
const LAST_RESORT: u32 = 12;

/// From this attempt on, ports are taken that would better be left alone for longer.
const HURRY: u32 = 8;

/// How long a closed connection is left alone, for its last segments and their retransmissions; and
/// in a hurry.
const QUIET: [Tick; 2] = [ticks_from_seconds(4), ticks_from_seconds(1)];

/// In a hurry, how long somebody who has not answered, or has been answered once, keeps a port. What
/// he holds is a half-open connection, or a question: whoever floods us must not hold all of them.
const BEGINNER: Tick = ticks_from_seconds(5);
const ANSWERED: Tick = ticks_from_seconds(30);

/// TCP_TIMEWAIT_LEN of Linux, and a second.
const TIME_WAIT: Tick = ticks_from_seconds(61);

/// Mixes the bits of a sum of address words (the finalizer of a multiplicative hash).
#[inline(always)]
#[must_use]
pub fn client_hash<F: IpFamily>(client: &F::Address) -> u32 {
    let mixed = F::sum(client).wrapping_mul(0x9e37_79b1);
    mixed ^ (mixed >> 15)
}

/// The port to try, in wire order. The first attempt is a shift of the client's own port by an
/// amount that depends on its address only: distinct ports of one client stay distinct as far as
/// the range allows. Later attempts stride through the range.
#[inline(always)]
#[must_use]
pub fn candidate(config: &Config, client_port: [u8; 2], hash: u32, attempt: u32) -> [u8; 2] {
    let count = u32::from(config.snat_port_count);
    if count == 0 {
        return config.snat_port_first.to_be_bytes();
    }
    let wanted = u32::from(u16::from_be_bytes(client_port)) + (hash >> 16);
    // An odd stride that is not small, so that neighbouring ports of a busy client do not
    // lead to each other.
    let stride = 2 * (hash & 0x0fff) + 4_097;
    let offset = wanted.wrapping_add(stride.wrapping_mul(attempt)) % count;
    (config.snat_port_first.wrapping_add(offset as u16)).to_be_bytes()
}

/// Whether and how a port can be used whose last flow has this history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fit {
    /// Busy, or the backend would not accept the connection.
    No,
    /// As it is.
    Yes,
    /// If this is added to the client's timestamps.
    ShiftTimestamps(u32),
}

/// What is left of the last flow on a port.
#[derive(Clone, Copy, Debug)]
pub struct History {
    /// State and flags.
    pub status: FlowStatus,
    /// Ticks since its last packet.
    pub idle: Tick,
    /// The timeout of its state.
    pub timeout: Tick,
    /// The client's last timestamp or sequence number as the backend saw it.
    pub mark: u32,
}

/// Decides whether a new flow may take over the port of an old one. `timestamp` and `sequence` are
/// those of the new SYN.
#[inline(always)]
#[must_use]
pub fn fit(history: &History, attempt: u32, timestamp: Timestamp, sequence: u32) -> Fit {
    let in_hurry = attempt >= HURRY;
    let quiet = QUIET[usize::from(in_hurry)];
    match FlowState::from_raw(history.status.state) {
        FlowState::Free => Fit::Yes,
        FlowState::Reset if history.idle >= quiet => Fit::Yes,
        FlowState::TimeWait if history.idle >= TIME_WAIT => Fit::Yes,
        FlowState::TimeWait if history.idle >= quiet => {
            let by_timestamp = history.status.flags & FlowFlags::MARK_IS_TIMESTAMP != 0;
            match (by_timestamp, timestamp.is_set) {
                (true, true) if is_after(timestamp.value, history.mark) => Fit::Yes,
                (true, true) => {
                    Fit::ShiftTimestamps(history.mark.wrapping_add(1).wrapping_sub(timestamp.value))
                }
                (false, _) if is_after(sequence, history.mark) => Fit::Yes,
                _ if attempt >= LAST_RESORT => Fit::Yes,
                _ => Fit::No,
            }
        }
        FlowState::TimeWait | FlowState::Reset => Fit::No,
        _ if history.idle > history.timeout => Fit::Yes,
        FlowState::SynSent | FlowState::SynReceived | FlowState::UdpUnreplied
            if in_hurry && history.idle > BEGINNER =>
        {
            Fit::Yes
        }
        FlowState::UdpReplied if in_hurry && history.idle > ANSWERED => Fit::Yes,
        _ => Fit::No,
    }
}

/// Serial number comparison (RFC 1982).
#[inline(always)]
fn is_after(new: u32, old: u32) -> bool {
    (new.wrapping_sub(old) as i32) > 0
}
