//! SYN cookies (RFC 4987, section 3.6): under a flood, a SYN leaves nothing behind.
//!
//! The SYN is answered in place of a backend: its answer's sequence number is the cookie, its window is 0,
//! so that the client sends no data that nobody could take yet, and it offers no option but the segment
//! size, so that nothing has to be remembered. The client's acknowledgment brings the cookie back. Only
//! then a flow is made, and the acknowledgment becomes the SYN that the backend gets.
//!
//! The backend's SYN-ACK reaches the client as a segment with the one byte before those that it waits for,
//! as keepalives have it (RFC 1122, section 4.2.3.6): it opens the window, and the client has to answer
//! it, which ends the handshake with the backend also where the server speaks first. From then on the
//! numbers of the backend differ by a constant from those that the client sees.
//!
//! A client that waits for the window asks for it in growing times (RFC 9293, section 3.8.6.1): whatever of
//! the handshake gets lost, these probes do it again.

use super::emit::Parsed;
use super::ip::IpFamily;
use super::parse::{Part, Transport};
use super::platform::{Datapath, Packet, Tables};
use super::scratch::Scratch;
use super::segment::{self, Segment};
use super::tcp_options;
use super::wire::{TCP_ACK, TCP_RST, TCP_SYN, Tcp};
use crate::abi::{DropReason, Flow, FlowFlags, FlowState, Service, SynCookies};

/// What becomes of a packet, as a number for the kernel's verifier. It goes on.
pub const GO_ON: u32 = 0;
/// It was turned into an answer.
pub const ANSWERED: u32 = 1;
/// It is to be refused.
pub const REFUSE: u32 = 2;
/// It begins another connection.
pub const RENEW: u32 = 3;
/// It could not be edited.
pub const FAILED: u32 = 4;
/// The segment in the scratch takes its place.
pub const REPLACE: u32 = 5;

/// What a cookie that came back says of its connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Handshake {
    /// The cookie: the initial sequence number that the client sees; 0 if there is none.
    pub cookie: u32,
    /// The cookie less the client's initial sequence number.
    pub delta: u32,
    /// [`FlowFlags::EDIT_SEQUENCE`], or 0 if there is none.
    pub flag: u32,
}

impl Handshake {
    /// Flags of both entries.
    #[inline(always)]
    #[must_use]
    pub fn edits(&self) -> u8 {
        self.flag as u8
    }
}

/// Segment sizes that a cookie can tell apart: what every host takes, and what fits most tunnels. Two, not
/// the four that the kernel has room for: the lowest bit shows a window probe, see [`accept`].
const V4_SIZES: [u16; 2] = [536, 1_360];
const V6_SIZES: [u16; 2] = [1_220, 1_360];

#[inline(always)]
fn size_of_class<F: IpFamily>(class: u32) -> u16 {
    let sizes = if F::VERSION == 4 { V4_SIZES } else { V6_SIZES };
    if class == 0 { sizes[0] } else { sizes[1] }
}

/// The largest IP packet where nothing else is known: Ethernet's.
const ETHERNET_MTU: u16 = 1_500;

/// Answers a SYN with a cookie, if it is to be.
#[inline(always)]
pub fn answer<D: Tables<F>, F: IpFamily>(
    datapath: &D,
    scratch: &mut Scratch<F::Address>,
    entry: Service,
) -> u32 {
    let mss = offer::<D, F>(datapath, entry);
    if mss == 0 || scratch.parsed.ip.part != Part::Whole {
        return GO_ON;
    }
    let Scratch { parsed, cursor, tcp, segment, .. } = scratch;
    let wanted = tcp_options::maximum_segment(datapath, cursor, parsed.ip.l4, &parsed.transport);
    set_header(tcp, &parsed.transport);
    let Some(cookie) = datapath.cookie(parsed.ip.l3, tcp) else { return GO_ON };
    let class = u32::from(wanted >= size_of_class::<F>(1));
    *segment = Segment {
        sequence: cookie.wrapping_add(2 * class).into(),
        acknowledgment: parsed.transport.sequence.wrapping_add(1).into(),
        mss: mss.into(),
        flags: u64::from(TCP_SYN | TCP_ACK),
        turned: 1,
        ..Segment::default()
    };
    let bytes = datapath.packet().length() as u64;
    if segment::write::<D, F>(datapath, parsed, segment).is_none() {
        return FAILED;
    }
    datapath.count_drop(DropReason::SynCookieSent, bytes);
    ANSWERED
}

/// The segment size to offer a client; 0 if its connection is to begin the usual way: cookies are off, or
/// the Service has no backend, or its first one is on this node.
#[inline(always)]
fn offer<D: Tables<F>, F: IpFamily>(datapath: &D, entry: Service) -> u16 {
    let Some(config) = datapath.config() else { return 0 };
    if config.syn_cookies != SynCookies::ANSWER || entry.slot_count() == 0 {
        return 0;
    }
    let index = datapath.slot(entry.first_slot).unwrap_or(0);
    let Some(backend) = datapath.backend(index) else { return 0 };
    if backend.state == 0 || backend.is_local() {
        return 0;
    }
    // An MTU of 0 is not known: less 1, it is the largest number.
    let known = backend.mtu.wrapping_sub(1).min(config.client_mtu.wrapping_sub(1));
    known.min(ETHERNET_MTU - 1) + 1 - F::HEADER_LENGTH as u16 - size_of::<Tcp>() as u16
}

/// Sets the header that a cookie is made for, or checked with.
#[inline(always)]
fn set_header(tcp: &mut Tcp, transport: &Transport) {
    tcp.source_port = transport.source_port;
    tcp.destination_port = transport.destination_port;
    tcp.sequence = transport.sequence.to_be_bytes();
    tcp.acknowledgment = transport.acknowledgment.to_be_bytes();
    tcp.data_offset = [5 << 4];
    tcp.flags = [transport.flags];
}

/// If a segment brings a cookie back, turns it into the SYN that the backend is to get, and leaves
/// `scratch.handshake`.
///
/// The segment may be the acknowledgment of the handshake, a FIN, a probe with a byte of data, or, if the
/// acknowledgment was lost, a probe of Linux, whose sequence number is one less. The cookie is a sum in
/// which that counts like one more: so that a probe can be told by an odd number.
#[inline(always)]
pub fn accept<D: Tables<F>, F: IpFamily>(datapath: &D, scratch: &mut Scratch<F::Address>) -> u32 {
    let Scratch { parsed, tcp, segment, handshake, .. } = scratch;
    let transport = &mut parsed.transport;
    if transport.flags & (TCP_SYN | TCP_ACK | TCP_RST) != TCP_ACK || parsed.ip.part != Part::Whole {
        return REFUSE;
    }
    let l3 = parsed.ip.l3;
    set_header(tcp, transport);
    if !datapath.is_cookie(l3, tcp) {
        return REFUSE;
    }
    // As long as more can be added, there is less in it.
    let mut rest = 0;
    tcp.acknowledgment = transport.acknowledgment.wrapping_add(2).to_be_bytes();
    if datapath.is_cookie(l3, tcp) {
        rest += 2;
    }
    tcp.acknowledgment = transport.acknowledgment.wrapping_add(rest + 1).to_be_bytes();
    if datapath.is_cookie(l3, tcp) {
        rest += 1;
    }
    let value = 3 - rest;
    let first = transport.sequence.wrapping_sub(1 - (value & 1));
    transport.sequence = first;
    handshake.cookie = transport.acknowledgment.wrapping_sub(1);
    handshake.delta = handshake.cookie.wrapping_sub(first);
    handshake.flag = u32::from(FlowFlags::EDIT_SEQUENCE);
    let Some(header) = datapath.packet().at::<Tcp>(parsed.ip.l4) else { return FAILED };
    *segment = Segment {
        sequence: first.into(),
        window: u16::from_be_bytes(header.window).into(),
        mss: size_of_class::<F>(value >> 1).into(),
        flags: TCP_SYN.into(),
        ..Segment::default()
    };
    if segment::replace::<D, F>(datapath, parsed, segment).is_none() {
        return FAILED;
    }
    GO_ON
}

/// The acknowledgment number of a client's segment as its backend sees it.
#[inline(always)]
pub fn acknowledged<A>(parsed: &Parsed<A>, flow: &Flow<A>) -> u32 {
    let delta = if flow.status.flags & FlowFlags::EDIT_SEQUENCE != 0 { flow.timestamp_delta } else { 0 };
    parsed.transport.acknowledgment.wrapping_sub(delta)
}

/// Until backend and client know of each other, stands in for either. The segment of a flow that began with
/// a cookie goes on as it is, or is replaced by what the other side can understand.
#[inline(never)]
pub fn stand_in<D: Datapath, F: IpFamily>(
    datapath: &D,
    parsed: &Parsed<F::Address>,
    flow: &mut Flow<F::Address>,
    segment: &mut Segment,
) -> u32 {
    let Transport { flags, sequence, acknowledgment, header_length, .. } = parsed.transport;
    let waits = flow.state() == FlowState::SynSent;
    if flow.is_reply() {
        let answers = flags & (TCP_SYN | TCP_ACK | TCP_RST) == TCP_SYN | TCP_ACK;
        if answers && (waits || flow.state() == FlowState::SynReceived) {
            flow.timestamp_delta = flow.mark.wrapping_sub(sequence);
        } else if waits && flags & TCP_RST != 0 {
            // The client takes an RST that has the number that it waits for.
            flow.timestamp_delta = flow.mark.wrapping_add(1).wrapping_sub(sequence);
        } else if waits {
            // Of an earlier connection, which the backend still has. A client that has sent a SYN would
            // answer so, too (RFC 9293, section 3.10.7.3).
            return REFUSE;
        }
        if !answers {
            return GO_ON;
        }
        let (sequence, acknowledgment) = (u64::from(sequence), u64::from(acknowledgment));
        *segment =
            Segment { sequence, acknowledgment, flags: TCP_ACK.into(), payload: 1, ..Segment::default() };
    } else {
        if !waits || flags & TCP_RST != 0 {
            return GO_ON;
        }
        if flags & TCP_SYN != 0 && sequence != flow.mark {
            return RENEW;
        }
        if flags & TCP_SYN != 0 && header_length <= segment::PLAIN_SYN {
            // Our own, which another program has left to this one.
            return GO_ON;
        }
        // The backend has not got the SYN, or we not its answer. What the cookie said of the segment size
        // is forgotten: without the option it is the smallest.
        *segment = Segment { sequence: flow.mark.into(), flags: TCP_SYN.into(), ..Segment::default() };
    }
    let Some(header) = datapath.packet().at::<Tcp>(parsed.ip.l4) else { return FAILED };
    segment.window = u16::from_be_bytes(header.window).into();
    REPLACE
}
