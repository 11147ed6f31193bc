//! Packets as the kernel holds them past XDP: not all that belongs to one lies in its bytes.

use std::cell::Cell;
use std::fmt;

use lb_common::abi::VlanTags;
use lb_common::forward::checksum::{apply, apply_udp, fold, sum};
use lb_common::forward::emit;
use lb_common::forward::parse::{self, Link};
use lb_common::forward::platform::{ChecksumChange, EditFailed, Packet as _, ResizeFailed};
use lb_common::forward::wire::{ETHER_TYPE_IPV4, ETHER_TYPE_IPV6, ETHER_TYPE_SERVICE_VLAN, ETHER_TYPE_VLAN};

use super::view::{Buffer, View};

/// Bytes of both Ethernet addresses.
const ADDRESSES: usize = 12;

/// What lies beside a packet's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Beside {
    /// The outer tag: EtherType and control information.
    pub tag: Option<[u8; 4]>,
    /// If the checksum is unfinished: the offsets of where it begins to cover, and of its field, which
    /// holds the pseudo header's sum (`CHECKSUM_PARTIAL`).
    pub unfinished: Option<(usize, usize)>,
    /// Bytes of payload of each segment of a super-packet (`gso_size`).
    pub segment: Option<u16>,
    /// The sum that a device has taken of the packet (`CHECKSUM_COMPLETE`), from the IP header on.
    pub sum: Option<u16>,
    /// Bytes in the first piece; more are those of all.
    pub in_reach: usize,
}

impl Beside {
    /// Nothing, and all bytes in one piece.
    pub const NOTHING: Self =
        Self { tag: None, unfinished: None, segment: None, sum: None, in_reach: usize::MAX };
}

/// A frame with all that belongs to it.
#[derive(Clone, PartialEq, Eq)]
pub struct Frame {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// The rest.
    pub beside: Beside,
}

/// Bytes of a frame that are shown.
const SHOWN: usize = 160;

impl fmt::Debug for Frame {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{:?}, {} bytes: ", self.beside, self.bytes.len())?;
        self.bytes.iter().take(SHOWN).try_for_each(|byte| write!(out, "{byte:02x}"))
    }
}

fn is_vlan(ether_type: &[u8]) -> bool {
    ether_type == ETHER_TYPE_VLAN || ether_type == ETHER_TYPE_SERVICE_VLAN
}

impl Frame {
    /// A frame with nothing beside its bytes.
    #[must_use]
    pub fn plain(bytes: &[u8]) -> Self {
        Self { bytes: bytes.to_vec(), beside: Beside::NOTHING }
    }

    /// As the kernel receives it: it takes the outer tag out of the bytes (`skb_vlan_untag`). `None` if
    /// the kernel drops it for being cut short there.
    #[must_use]
    pub fn received(mut self) -> Option<Self> {
        if self.bytes.get(ADDRESSES..ADDRESSES + 2).is_some_and(is_vlan) {
            // The tag, and a word of what follows.
            if self.bytes.len() < ADDRESSES + 2 + 4 + 2 {
                return None;
            }
            let tag: Vec<u8> = self.bytes.drain(ADDRESSES..ADDRESSES + 4).collect();
            self.beside.tag = tag.try_into().ok();
            self.beside.unfinished = self.beside.unfinished.map(|(start, field)| (start - 4, field - 4));
        }
        Some(self)
    }

    /// As it goes onto the wire, but for what the device does.
    #[must_use]
    pub fn sent(mut self) -> Self {
        if let Some(tag) = self.beside.tag.take() {
            self.bytes.splice(ADDRESSES..ADDRESSES, tag);
            self.beside.unfinished = self.beside.unfinished.map(|(start, field)| (start + 4, field + 4));
        }
        self.beside.in_reach = usize::MAX;
        self
    }

    /// Whether the sum that a device has taken of the packet is still right; there may be none.
    #[must_use]
    pub fn has_right_sum(&self) -> bool {
        // Zero has two signs.
        let normal = |sum: u16| if sum == 0xffff { 0 } else { sum };
        let l3 = || {
            let tagged = |at: usize| self.bytes.get(at..at + 2).is_some_and(is_vlan);
            if !tagged(12) {
                14
            } else if !tagged(16) {
                18
            } else {
                22
            }
        };
        self.beside.sum.is_none_or(|sum| normal(sum) == normal(fold_bytes(&self.bytes[l3()..])))
    }

    /// The bytes once the device has finished the checksum (`skb_checksum_help`).
    ///
    /// # Panics
    /// When the field lies outside of the frame.
    #[must_use]
    pub fn finished(&self) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        if let Some((start, field)) = self.beside.unfinished {
            let checksum = match !fold_bytes(&bytes[start..]) {
                0 => 0xffff,
                other => other,
            };
            bytes[field..field + 2].copy_from_slice(&checksum.to_ne_bytes());
        }
        bytes
    }
}

/// The folded sum of the words of some bytes.
#[must_use]
pub fn fold_bytes(bytes: &[u8]) -> u16 {
    bytes
        .chunks(2)
        .fold(0, |total, word| fold(u32::from(total) + sum(&[word[0], word.get(1).copied().unwrap_or(0)])))
}

/// A packet in the hands of a program in TC, and what the kernel's helpers do to it.
pub struct Skb {
    buffer: Buffer,
    beside: Cell<Beside>,
}

impl Default for Skb {
    fn default() -> Self {
        Self { buffer: Buffer::default(), beside: Cell::new(Beside::NOTHING) }
    }
}

impl Skb {
    /// Puts a packet in.
    pub fn fill(&mut self, frame: &Frame) {
        self.buffer.fill(&frame.bytes);
        self.beside.set(frame.beside);
    }

    /// The packet as it is now.
    pub fn content(&mut self) -> Frame {
        Frame { bytes: self.buffer.content().to_vec(), beside: self.beside.get() }
    }

    /// A handle to the bytes in reach.
    pub fn view(&self) -> View {
        self.buffer.view().limited(self.beside.get().in_reach)
    }

    fn change(&self, change: impl FnOnce(&mut Beside)) {
        let mut beside = self.beside.get();
        change(&mut beside);
        self.beside.set(beside);
    }

    /// Whether there is a tag beside the packet.
    #[must_use]
    pub fn has_tag_beside(&self) -> bool {
        self.beside.get().tag.is_some()
    }

    /// The tags, wherever they are.
    #[must_use]
    pub fn link(&self) -> Option<Link> {
        let mut link = parse::link(self.view())?;
        if let Some([_, _, high, low]) = self.beside.get().tag
            && (high, low) != (0, 0)
        {
            link.vlan = [high, low, link.vlan[0], link.vlan[1]];
        }
        Some(link)
    }

    /// Replaces the tags.
    ///
    /// # Errors
    /// When there is no room.
    pub fn set_tags(&self, link: &Link, tags: VlanTags) -> Result<(), EditFailed> {
        let has = emit::tags(link) + i32::from(self.has_tag_beside());
        let wants = emit::depth(tags);
        if has == wants && tags == link.vlan {
            return Ok(());
        }
        for _ in 0..has {
            self.pop().map_err(|_| EditFailed)?;
        }
        let [a, b, c, d] = tags;
        if wants == 2 {
            self.push(ETHER_TYPE_VLAN, [c, d]).map_err(|_| EditFailed)?;
            return self.push(ETHER_TYPE_SERVICE_VLAN, [a, b]).map_err(|_| EditFailed);
        }
        if wants == 1 { self.push(ETHER_TYPE_VLAN, [a, b]).map_err(|_| EditFailed) } else { Ok(()) }
    }

    /// `skb_vlan_pop`: an inner tag takes the place of the outer one.
    fn pop(&self) -> Result<(), ResizeFailed> {
        if self.beside.get().tag.is_some() {
            self.change(|beside| beside.tag = None);
        } else if self.take_tag()?.is_none() {
            return Ok(());
        }
        let inner = self.take_tag()?;
        self.change(|beside| beside.tag = inner);
        Ok(())
    }

    /// Takes a tag out of the bytes, if there is one.
    fn take_tag(&self) -> Result<Option<[u8; 4]>, ResizeFailed> {
        let view = self.view();
        let tag = *view.at::<[u8; 4]>(ADDRESSES).ok_or(ResizeFailed)?;
        if !is_vlan(&tag[..2]) {
            return Ok(None);
        }
        let addresses = *view.at::<[u8; ADDRESSES]>(0).ok_or(ResizeFailed)?;
        self.move_head(4)?;
        *self.view().at(0).ok_or(ResizeFailed)? = addresses;
        Ok(Some(tag))
    }

    /// `skb_vlan_push`: what was beside the packet gets into it.
    fn push(&self, ether_type: [u8; 2], control: [u8; 2]) -> Result<(), ResizeFailed> {
        if let Some(tag) = self.beside.get().tag {
            let addresses = *self.view().at::<[u8; ADDRESSES]>(0).ok_or(ResizeFailed)?;
            self.move_head(-4)?;
            *self.view().at(0).ok_or(ResizeFailed)? = addresses;
            *self.view().at(ADDRESSES).ok_or(ResizeFailed)? = tag;
        }
        let [high, low] = control;
        self.change(|beside| beside.tag = Some([ether_type[0], ether_type[1], high, low]));
        Ok(())
    }

    /// `bpf_skb_pull_data`.
    pub fn pull(&self, bytes: u32) {
        let bytes = (bytes as usize).min(self.buffer.view().length());
        self.change(|beside| beside.in_reach = beside.in_reach.max(bytes));
    }

    /// `bpf_l4_csum_replace`, for pseudo header and the rest.
    ///
    /// # Errors
    /// When the field is not there.
    pub fn add_to_checksum(&self, change: ChecksumChange) -> Result<(), EditFailed> {
        self.pull(change.offset as u32 + 2);
        let field = self.view().at::<[u8; 2]>(change.offset).ok_or(EditFailed)?;
        if self.beside.get().unfinished.is_some() {
            let before = u16::from_ne_bytes(*field);
            if !change.is_udp || before != 0 {
                *field = fold(u32::from(before) + u32::from(fold(change.pseudo))).to_ne_bytes();
            }
            return Ok(());
        }
        // The helper takes the pseudo header's change for one that the IPv4 header balances.
        self.add_to_sum(u32::from(!fold(change.pseudo)));
        if change.is_v6 {
            self.add_to_sum(change.pseudo + change.beside);
        }
        // One after the other, as the kernel does it: the two ways may differ in the sign of zero.
        for sum in [change.pseudo, change.covered] {
            if change.is_udp { apply_udp(field, fold(sum)) } else { apply(field, fold(sum)) }
        }
        Ok(())
    }

    /// `bpf_csum_update`.
    pub fn add_to_sum(&self, change: u32) {
        self.change(|beside| {
            beside.sum = beside.sum.map(|sum| fold(u32::from(sum) + u32::from(fold(change))));
        });
    }

    /// Whether the checksum is unfinished.
    #[must_use]
    pub fn is_unfinished(&self) -> bool {
        self.beside.get().unfinished.is_some()
    }

    /// Bytes of the largest IP packet that the packet is on the wire.
    #[must_use]
    pub fn largest_on_wire(&self, l3: usize, headers: usize) -> usize {
        let whole = self.buffer.view().length() - l3;
        self.beside.get().segment.map_or(whole, |payload| headers + usize::from(payload))
    }

    /// Positive cuts off in front, negative adds.
    ///
    /// # Errors
    /// When there is no room.
    pub fn move_head(&self, bytes: i32) -> Result<(), ResizeFailed> {
        self.buffer.move_head(bytes)?;
        let moved = |offset: usize| offset.saturating_add_signed(-bytes as isize);
        self.change(|beside| {
            beside.in_reach = moved(beside.in_reach);
            beside.unfinished = beside.unfinished.map(|(start, field)| (moved(start), moved(field)));
        });
        Ok(())
    }

    /// `bpf_skb_adjust_room`, of a packet without tags in its bytes.
    ///
    /// # Errors
    /// When it has some, or is no IP packet.
    pub fn take_out_options(&self, bytes: u32) -> Result<(), ResizeFailed> {
        match *self.view().at::<[u8; 2]>(ADDRESSES).ok_or(ResizeFailed)? {
            ETHER_TYPE_IPV4 => self.shift::<34>(bytes),
            ETHER_TYPE_IPV6 => self.shift::<54>(bytes),
            _ => Err(ResizeFailed),
        }
    }

    /// Moves the first bytes over those that follow.
    fn shift<const N: usize>(&self, by: u32) -> Result<(), ResizeFailed> {
        let head = *self.view().at::<[u8; N]>(0).ok_or(ResizeFailed)?;
        self.move_head(by as i32)?;
        *self.view().at(0).ok_or(ResizeFailed)? = head;
        Ok(())
    }

    /// `bpf_skb_change_tail`: keeps an unfinished checksum, and makes a super-packet an ordinary one.
    ///
    /// # Errors
    /// When there is no room, or the field of an unfinished checksum would be cut off.
    pub fn move_tail(&self, bytes: i32) -> Result<(), ResizeFailed> {
        let length = self.buffer.view().length().saturating_add_signed(bytes as isize);
        if self.beside.get().unfinished.is_some_and(|(_, field)| field + 2 > length) {
            return Err(ResizeFailed);
        }
        self.buffer.move_tail(bytes)?;
        self.change(|beside| beside.segment = None);
        Ok(())
    }
}
