//! The connection states of RFC 9293 as a middlebox sees them.

use super::wire::{TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN};
use crate::abi::FlowState;

/// What a TCP segment does to a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing changes.
    Stay,
    /// The flow is in this state now.
    To(FlowState),
    /// The client begins a new connection on the same ports.
    Renew,
}

/// The step for a segment with these control bits. `acknowledges_isn` says whether it acknowledges
/// the SYN-ACK of the backend; it matters only for a client's segment in `SynReceived`.
#[inline(always)]
#[must_use]
pub fn step(state: FlowState, flags: u8, from_backend: bool, acknowledges_isn: bool) -> Step {
    use FlowState::{
        BackendClosed, ClientClosed, Established, Free, Reset, SynReceived, SynSent, TimeWait, UdpReplied,
        UdpUnreplied,
    };
    if flags & TCP_RST != 0 {
        return match state {
            Reset => Step::Stay,
            _ => Step::To(Reset),
        };
    }
    if flags & TCP_SYN != 0 {
        return match (state, from_backend, flags & TCP_ACK != 0) {
            (SynSent, true, true) => Step::To(SynReceived),
            // In the other states the backend answers with a challenge (RFC 5961, section 4): if
            // the client has really forgotten the connection, its RST ends the flow, and its next
            // SYN begins a new one.
            (TimeWait | Reset | Free | UdpUnreplied | UdpReplied, false, false) => Step::Renew,
            _ => Step::Stay,
        };
    }
    let confirmed = match state {
        SynReceived if !from_backend && acknowledges_isn => Established,
        other => other,
    };
    if flags & TCP_FIN != 0 {
        return match (confirmed, from_backend) {
            (Established, false) => Step::To(ClientClosed),
            (Established | SynReceived, true) => Step::To(BackendClosed),
            (BackendClosed, false) | (ClientClosed, true) => Step::To(TimeWait),
            _ => Step::Stay,
        };
    }
    if confirmed == state { Step::Stay } else { Step::To(confirmed) }
}

/// Whether a state belongs into the table of established flows. Everything else is short-lived, and
/// must not take room from those.
#[inline(always)]
#[must_use]
pub fn is_established(state: FlowState) -> bool {
    matches!(state, FlowState::Established | FlowState::ClientClosed | FlowState::BackendClosed)
}

/// Whether nothing more is expected of a flow in a state: nobody counts it as open.
#[inline(always)]
#[must_use]
pub fn is_over(state: FlowState) -> bool {
    matches!(state, FlowState::TimeWait | FlowState::Reset | FlowState::Free)
}

/// The largest distance from the backend's initial sequence number that the first acknowledgment
/// of a client may have: the SYN-ACK's, plus what an impatient server may send before it.
const HANDSHAKE_WINDOW: u32 = 1 << 17;

/// Whether an acknowledgment number answers a SYN-ACK with this sequence number. Whoever sends it
/// has seen the SYN-ACK, so its source address is real.
#[inline(always)]
#[must_use]
pub fn acknowledges(acknowledgment: u32, initial_sequence: u32) -> bool {
    acknowledgment.wrapping_sub(initial_sequence).wrapping_sub(1) < HANDSHAKE_WINDOW
}

/// Whether a client's RST may be believed while its handshake lasts: one for a segment that answers the
/// SYN has the number that this acknowledges, the next one; a client that gives up has sent some data at
/// most. What answers a segment of an earlier connection on the same ports has a number of that. `initial`
/// is the SYN's sequence number, 0 if it is not known.
#[inline(always)]
#[must_use]
pub fn is_credible_in_handshake(sequence: u32, initial: u32) -> bool {
    initial == 0 || acknowledges(sequence, initial)
}

/// How far a client's RST may be from a recent segment of it: what a fast sender sends in a tick.
const RESET_WINDOW: u32 = 1 << 26;
/// How far it may be behind.
const RESET_BEHIND: u32 = 1 << 16;

/// Whether a client's RST may be believed. Its backend believes only one that hits the window
/// (RFC 5961, section 3); `recent` is a recent sequence number of the client, 0 if none is known.
#[inline(always)]
#[must_use]
pub fn is_credible_reset(sequence: u32, recent: u32) -> bool {
    recent == 0 || sequence.wrapping_sub(recent).wrapping_add(RESET_BEHIND) < RESET_WINDOW
}
