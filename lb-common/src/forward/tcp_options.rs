//! The TCP timestamp option (RFC 7323).

use super::checksum;
use super::parse::Transport;
use super::platform::{ChecksumChange, Datapath, Packet};
use super::wire::{TCP_ACK, Tcp, TimestampOption};

const END: u8 = 0;
const NO_OPERATION: u8 = 1;
const TIMESTAMP: [u8; 2] = [8, 10];
const MSS: [u8; 2] = [2, 4];
/// Kinds of options that are looked for.
const KIND_MSS: u8 = MSS[0];
const KIND_TIMESTAMP: u8 = TIMESTAMP[0];

/// More options than fit are never there: 40 bytes, and stacks pad with at most a few
/// no-operations. The limit keeps the loop short for the verifier.
const MAXIMUM_OPTIONS: usize = 12;

/// Offset of the option `KIND` of a TCP header at `l4`; 0 if it has none.
///
/// The packet is an argument of its own: LLVM would pass the words of the context in its place, and
/// cut the pointers in them to 32 bits.
#[inline(never)]
fn find<D: Datapath, const KIND: u8>(
    datapath: &D,
    packet: D::Packet,
    cursor: &mut usize,
    l4: usize,
    header_length: usize,
) -> usize {
    let wanted = if KIND == KIND_MSS { MSS } else { TIMESTAMP };
    let end = l4 + header_length;
    let mut offset = l4 + 20;
    let mut found = 0;
    for _ in 0..MAXIMUM_OPTIONS {
        offset = datapath.forget(cursor, offset);
        if offset + 2 > end {
            break;
        }
        let Some(option) = packet.at::<[u8; 2]>(offset) else { break };
        if *option == wanted {
            found = if offset + usize::from(wanted[1]) <= end { offset } else { 0 };
            break;
        }
        offset += match *option {
            [END, _] => break,
            [NO_OPERATION, _] => 1,
            [_, 0 | 1] => break,
            [_, length] => usize::from(length),
        };
    }
    datapath.forget(cursor, found)
}

/// A timestamp value, if there is one. Not an `Option`: its unset half would be an uninitialized
/// register, which the verifier does not let a program save.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timestamp {
    /// Whether there is one.
    pub is_set: bool,
    /// The value; 0 if there is none.
    pub value: u32,
}

/// The timestamp value that a segment carries.
#[inline(always)]
pub fn timestamp<D: Datapath>(
    datapath: &D,
    cursor: &mut usize,
    l4: usize,
    transport: &Transport,
) -> Timestamp {
    let offset = find::<_, KIND_TIMESTAMP>(datapath, datapath.packet(), cursor, l4, transport.header_length);
    match datapath.packet().at::<TimestampOption>(offset) {
        Some(option) if offset != 0 => Timestamp { is_set: true, value: u32::from_be_bytes(option.value) },
        _ => Timestamp { is_set: false, value: 0 },
    }
}

/// The maximum segment size that a SYN names; 0 if it names none.
#[inline(always)]
pub fn maximum_segment<D: Datapath>(
    datapath: &D,
    cursor: &mut usize,
    l4: usize,
    transport: &Transport,
) -> u16 {
    let offset = find::<_, KIND_MSS>(datapath, datapath.packet(), cursor, l4, transport.header_length);
    match datapath.packet().at::<[u8; 4]>(offset) {
        Some([_, _, high, low]) if offset != 0 => u16::from_be_bytes([*high, *low]),
        _ => 0,
    }
}

/// Adds `delta` to the timestamp of a client's segment, or subtracts it from the echo in a
/// backend's segment, and corrects the checksum. Nothing happens to a segment without timestamps.
#[inline(always)]
pub fn shift<D: Datapath>(
    datapath: &D,
    cursor: &mut usize,
    l4: usize,
    transport: &Transport,
    (delta, from_backend): (u32, bool),
) {
    let packet = datapath.packet();
    let offset = find::<_, KIND_TIMESTAMP>(datapath, datapath.packet(), cursor, l4, transport.header_length);
    if offset == 0 {
        return;
    }
    let Some(option) = packet.at::<TimestampOption>(offset) else { return };
    let (old, new);
    if from_backend {
        if transport.flags & TCP_ACK == 0 {
            // The echo is valid only with ACK (RFC 7323, section 3.2).
            return;
        }
        old = option.echo;
        new = u32::from_be_bytes(old).wrapping_sub(delta).to_be_bytes();
        option.echo = new;
    } else {
        old = option.value;
        new = u32::from_be_bytes(old).wrapping_add(delta).to_be_bytes();
        option.value = new;
    }
    let change = checksum::fold(checksum::replaced(&old, &new));
    // The words of the option straddle those of the checksum if it starts at an odd offset
    // (RFC 1071, section 2 B: swap the bytes of the sum).
    let change = if (offset - l4) & 1 == 0 { change } else { change.swap_bytes() };
    cover(datapath, l4, change);
}

/// Carries what an edit adds to a sum over to the checksum of a TCP header at `l4`.
#[inline(always)]
fn cover<D: Datapath>(datapath: &D, l4: usize, change: checksum::Delta) {
    if !datapath.is_on_wire() {
        let (offset, covered) = (l4 + 16, u32::from(change));
        let change = ChecksumChange { offset, is_udp: false, is_v6: false, pseudo: 0, covered, beside: 0 };
        // The kernel has looked at the field's neighbours already: this cannot fail.
        let _ = datapath.add_to_checksum(change);
    } else if let Some(tcp) = datapath.packet().at::<Tcp>(l4) {
        checksum::apply(&mut tcp.checksum, change);
    }
}

/// Adds `delta` to the sequence number of a backend's segment, or subtracts it from the acknowledgment
/// number of a client's, and corrects the checksum.
#[inline(always)]
pub fn shift_sequence<D: Datapath>(datapath: &D, l4: usize, (delta, from_backend): (u32, bool)) {
    let Some(tcp) = datapath.packet().at::<Tcp>(l4) else { return };
    let (old, new);
    if from_backend {
        old = tcp.sequence;
        new = u32::from_be_bytes(old).wrapping_add(delta).to_be_bytes();
        tcp.sequence = new;
    } else {
        if tcp.flags[0] & TCP_ACK == 0 {
            return;
        }
        old = tcp.acknowledgment;
        new = u32::from_be_bytes(old).wrapping_sub(delta).to_be_bytes();
        tcp.acknowledgment = new;
    }
    cover(datapath, l4, checksum::fold(checksum::replaced(&old, &new)));
}
