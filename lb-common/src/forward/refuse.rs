//! Refusals: an answer at once in place of silence.

use super::Verdict;
use super::checksum::{fold, sum};
use super::emit::Parsed;
use super::ip::IpFamily;
use super::parse::{Ip, Link};
use super::platform::{Datapath, Packet};
use super::segment::{self, Segment, is_unfinished, pseudo_header, turn_around};
use super::wire::{Ethernet, Icmp, TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN, Tcp, VlanTag};
use crate::abi::{DropReason, IPPROTO_TCP};

/// What is to be answered, and why, in one number; 0 is nothing. A number, and not an enumeration, for
/// the kernel's verifier: decisions leave it in memory ([`Datapath::forget`]), and it is carried out
/// in one place, on one path.
pub type Refusal = usize;

/// Nothing.
pub const NOTHING: Refusal = 0;

/// An ICMP error, or a TCP RST, or no answer at all.
const ICMP: usize = 1;
const RST: usize = 2;
const SILENCE: usize = 3;

#[inline(always)]
fn refusal(answer: usize, reason: DropReason, kind: u8, code: u8, mtu: u16) -> Refusal {
    answer << 48 | (reason as usize) << 32 | (kind as usize) << 24 | (code as usize) << 16 | mtu as usize
}

/// Refuses a connection to a Service: TCP by a RST, UDP by ICMP "port unreachable".
#[inline(always)]
pub fn connection<D: Datapath, F: IpFamily>(
    datapath: &D,
    parsed: &Parsed<F::Address>,
    service: u32,
    reason: DropReason,
) -> Refusal {
    if parsed.ip.protocol != IPPROTO_TCP {
        datapath.count_refused(service);
        let (kind, code) = if F::VERSION == 4 { (3, 3) } else { (1, 4) };
        return refusal(ICMP, reason, kind, code, 0);
    }
    if parsed.transport.flags & TCP_RST != 0 {
        return refusal(SILENCE, DropReason::ResetWithoutFlow, 0, 0, 0);
    }
    datapath.count_refused(service);
    refusal(RST, reason, 0, 0, 0)
}

/// Answers a packet whose TTL or hop limit ran out: ICMP "time exceeded in transit".
#[inline(always)]
pub fn expired<F: IpFamily>() -> Refusal {
    refusal(ICMP, DropReason::TtlExpired, if F::VERSION == 4 { 11 } else { 3 }, 0, 0)
}

/// Answers a packet that does not fit the way to its next hop: ICMP "fragmentation needed" (RFC 1191,
/// also where the sender would allow fragments: nobody makes them here), ICMPv6 "packet too big".
#[inline(always)]
pub fn too_big<F: IpFamily>(mtu: u16) -> Refusal {
    let (kind, code) = if F::VERSION == 4 { (3, 4) } else { (2, 0) };
    refusal(ICMP, DropReason::TooBig, kind, code, mtu)
}

/// Drops the packet, counts why, and answers it.
#[inline(always)]
pub fn carry_out<D: Datapath, F: IpFamily>(
    datapath: &D,
    parsed: &Parsed<F::Address>,
    refusal: Refusal,
) -> Verdict {
    datapath.count_drop_number((refusal >> 32) as u32 & 0xffff, datapath.packet().length() as u64);
    let answered = match refusal >> 48 {
        RST => reset::<D, F>(datapath, parsed),
        ICMP if F::may_be_answered(&parsed.ip.source) => {
            write_icmp_error::<D, F>(datapath, &parsed.link, &parsed.ip, refusal as u32)
        }
        _ => None,
    };
    answered.map_or(Verdict::Drop, |()| Verdict::Transmit)
}

/// Turns the packet into a RST to its sender (RFC 9293, section 3.10.7.1). The packet gets no
/// longer: what it had was at least a TCP header.
#[inline(always)]
fn reset<D: Datapath, F: IpFamily>(datapath: &D, parsed: &Parsed<F::Address>) -> Option<()> {
    let Parsed { ip, transport, .. } = parsed;
    let (sequence, acknowledgment, flags) = if transport.flags & TCP_ACK != 0 {
        (transport.acknowledgment, 0, TCP_RST)
    } else {
        let payload = ip.end.saturating_sub(ip.l4 + transport.header_length) as u32;
        let controls = u32::from(transport.flags & TCP_SYN != 0) + u32::from(transport.flags & TCP_FIN != 0);
        (0, transport.sequence.wrapping_add(payload).wrapping_add(controls), TCP_RST | TCP_ACK)
    };
    let (sequence, acknowledgment) = (u64::from(sequence), u64::from(acknowledgment));
    let segment = Segment { sequence, acknowledgment, flags: flags.into(), turned: 1, ..Segment::default() };
    segment::write::<D, F>(datapath, parsed, &segment)
}

/// Words of a quote that are summed up at most: IPv4 with all options and eight bytes are 17; IPv6
/// with extension headers may be cut.
const QUOTE_WORDS: usize = 24;

/// Turns the packet into an ICMP error that quotes it up to the first eight bytes of its payload (RFC
/// 792). Its source is the address that the packet was sent to. `message` is type, code and the lower
/// half of the last word of the header, the MTU (RFC 1191, RFC 4443 section 3.2).
#[inline(never)]
fn write_icmp_error<D: Datapath, F: IpFamily>(
    datapath: &D,
    link: &Link,
    ip: &Ip<F::Address>,
    message: u32,
) -> Option<()> {
    let [kind, code, high, low] = message.to_be_bytes();
    let headers = ip.l4 - ip.l3;
    let is_unfinished = is_unfinished(datapath, ip);
    // The kernel does not cut an unfinished checksum off, and that of TCP lies beyond eight bytes.
    let has_more = is_unfinished && ip.protocol == IPPROTO_TCP;
    let quoted = (headers + if has_more { size_of::<Tcp>() } else { 8 }).min(QUOTE_WORDS * 4);
    let unfinished_offset = ip.l4 + if ip.protocol == IPPROTO_TCP { 16 } else { 6 };
    let mut unfinished = [0; 2];
    if is_unfinished {
        unfinished = *datapath.packet().at::<[u8; 2]>(unfinished_offset)?;
    }
    let room = F::HEADER_LENGTH + size_of::<Icmp>();
    datapath.move_tail((link.l3 + quoted) as i32 - datapath.packet().length() as i32).ok()?;
    datapath.move_head(-(room as i32)).ok()?;
    let packet = datapath.packet();
    *packet.head::<Ethernet>()? = *packet.at::<Ethernet>(room)?;
    if link.l3 > 14 {
        *packet.at::<VlanTag>(14)? = *packet.at::<VlanTag>(room + 14)?;
    }
    if link.l3 > 18 {
        *packet.at::<VlanTag>(18)? = *packet.at::<VlanTag>(room + 18)?;
    }
    turn_around(packet.head::<Ethernet>()?);
    let length = (size_of::<Icmp>() + quoted) as u16;
    F::write_header(packet.at(link.l3)?, &ip.destination, &ip.source, F::ICMP, length);
    let l4 = link.l3 + F::HEADER_LENGTH;
    *packet.at::<Icmp>(l4)? = Icmp { kind: [kind], code: [code], checksum: [0; 2], rest: [0, 0, high, low] };
    let mut total = sum(&[kind, code]) + sum(&[high, low]);
    if F::VERSION == 6 {
        total += pseudo_header::<F>(ip, F::ICMP, length);
    }
    // Once its checksum is finished, the quoted payload and pseudo header add up to zero.
    let summed = if is_unfinished { headers } else { quoted };
    total += if is_unfinished { u32::from(!u16::from_ne_bytes(unfinished)) } else { 0 };
    for word in 0..QUOTE_WORDS {
        if word * 4 >= summed {
            break;
        }
        total += sum(packet.at::<[u8; 4]>(l4 + size_of::<Icmp>() + word * 4)?);
    }
    packet.at::<Icmp>(l4)?.checksum = (!fold(total)).to_ne_bytes();
    Some(())
}
