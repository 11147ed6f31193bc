//! The places that the programs are attached to.

use core::ffi::c_void;

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::bpf_adj_room_mode::BPF_ADJ_ROOM_NET;
use aya_ebpf::bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR};
use aya_ebpf::helpers::generated::{
    bpf_csum_update, bpf_l4_csum_replace, bpf_skb_adjust_room, bpf_skb_change_head, bpf_skb_change_tail,
    bpf_skb_pull_data, bpf_skb_vlan_pop, bpf_skb_vlan_push, bpf_xdp_adjust_head, bpf_xdp_adjust_tail,
};
use aya_ebpf::programs::{TcContext, XdpContext};
use lb_common::abi::VlanTags;
use lb_common::forward::emit;
use lb_common::forward::parse::{self, Link};
use lb_common::forward::platform::{ChecksumChange, EditFailed, Packet, ResizeFailed};
use lb_common::forward::wire::{ETHER_TYPE_SERVICE_VLAN, ETHER_TYPE_VLAN};

use crate::access::{SkbPacket, XdpPacket};
use crate::datapath::{Hook, Kernel};

/// Where frames come in, before the kernel has made packets of them.
pub type Xdp = Kernel<XdpContext>;
/// Where packets come in, or leave.
pub type Tc = Kernel<TcContext>;

impl Hook for XdpContext {
    type Packet = XdpPacket;
    const ON_WIRE: bool = true;
    const ANY_DEVICE: bool = false;
    const IS_INTERRUPTED: bool = false;

    #[inline(always)]
    fn packet(&self) -> XdpPacket {
        XdpPacket::of(self)
    }

    #[inline(always)]
    fn pull(&self, _bytes: u32) {}

    #[inline(always)]
    fn add_to_checksum(&self, _change: ChecksumChange) -> Result<(), EditFailed> {
        Err(EditFailed)
    }

    #[inline(always)]
    fn add_to_sum(&self, _change: u32) {}

    #[inline(always)]
    fn take_out_options(&self, _bytes: u32) -> Result<(), ResizeFailed> {
        Err(ResizeFailed)
    }

    #[inline(always)]
    fn is_unfinished(&self, _offset: usize) -> bool {
        false
    }

    #[inline(always)]
    fn link(&self) -> Option<Link> {
        parse::link(self.packet())
    }

    #[inline(always)]
    fn set_tags(datapath: &Xdp, link: &Link, tags: VlanTags) -> Result<(), EditFailed> {
        emit::set_tags_in_packet(datapath, link, tags)
    }

    #[inline(always)]
    fn largest_on_wire(&self, l3: usize, _headers: usize) -> usize {
        self.packet().length() - l3
    }

    #[inline(always)]
    fn move_head(&self, bytes: i32) -> Result<(), ResizeFailed> {
        // SAFETY: the context is the program's own.
        let result = unsafe { bpf_xdp_adjust_head(self.ctx, bytes) };
        if result == 0 { Ok(()) } else { Err(ResizeFailed) }
    }

    #[inline(always)]
    fn move_tail(&self, bytes: i32) -> Result<(), ResizeFailed> {
        // SAFETY: the context is the program's own.
        let result = unsafe { bpf_xdp_adjust_tail(self.ctx, bytes) };
        if result == 0 { Ok(()) } else { Err(ResizeFailed) }
    }

    #[inline(always)]
    fn device(&self) -> u32 {
        self.ingress_ifindex() as u32
    }

    #[inline(always)]
    fn context(&self) -> *mut c_void {
        self.as_ptr()
    }
}

/// A field of the packet's description.
macro_rules! field {
    ($context:expr, $field:ident) => {
        // SAFETY: the context is the program's own. Volatile: helpers change it.
        unsafe { (&raw const (*$context.skb.skb).$field).read_volatile() }
    };
}

/// The EtherTypes of tags as the helpers take them.
const VLAN: u16 = u16::from_ne_bytes(ETHER_TYPE_VLAN);
const SERVICE_VLAN: u16 = u16::from_ne_bytes(ETHER_TYPE_SERVICE_VLAN);

impl Hook for TcContext {
    type Packet = SkbPacket;
    const ON_WIRE: bool = false;
    const ANY_DEVICE: bool = true;
    const IS_INTERRUPTED: bool = false;

    #[inline(always)]
    fn packet(&self) -> SkbPacket {
        SkbPacket::of(self.skb.skb)
    }

    #[inline(always)]
    fn pull(&self, bytes: u32) {
        let packet = self.packet();
        let length = (packet.length() as u32).min(bytes);
        if (packet.in_reach() as u32) < length {
            // SAFETY: the context is the program's own. If it fails, the packet is passed for being
            // cut short.
            unsafe { bpf_skb_pull_data(self.skb.skb, length) };
        }
    }

    #[inline(always)]
    fn add_to_checksum(&self, change: ChecksumChange) -> Result<(), EditFailed> {
        // "None" stays "none" in UDP.
        let udp = if change.is_udp { u64::from(BPF_F_MARK_MANGLED_0) } else { 0 };
        let (skb, offset) = (self.skb.skb, change.offset as u32);
        let (pseudo, covered) = (u64::from(change.pseudo), u64::from(change.covered));
        // The kernel knows whether the field holds the sum of the pseudo header alone: then that is
        // all that counts.
        // SAFETY (all): the context is the program's own.
        let first = unsafe { bpf_l4_csum_replace(skb, offset, 0, pseudo, udp | u64::from(BPF_F_PSEUDO_HDR)) };
        let second = unsafe { bpf_l4_csum_replace(skb, offset, 0, covered, udp) };
        if change.is_v6 {
            // The helper takes the addresses out of the sum that a device has taken of the whole
            // packet, as is right for IPv4. In IPv6 they are still in it, and so is the hop limit. No
            // such sum, no effect.
            unsafe { bpf_csum_update(skb, change.pseudo + change.beside) };
        }
        if first == 0 && second == 0 { Ok(()) } else { Err(EditFailed) }
    }

    #[inline(always)]
    fn add_to_sum(&self, change: u32) {
        if change != 0 {
            // SAFETY: the context is the program's own. Without such a sum it has no effect.
            unsafe { bpf_csum_update(self.skb.skb, change) };
        }
    }

    #[inline(always)]
    fn take_out_options(&self, bytes: u32) -> Result<(), ResizeFailed> {
        // SAFETY: the context is the program's own.
        let result = unsafe { bpf_skb_adjust_room(self.skb.skb, -(bytes as i32), BPF_ADJ_ROOM_NET, 0) };
        if result == 0 { Ok(()) } else { Err(ResizeFailed) }
    }

    #[inline(always)]
    fn is_unfinished(&self, offset: usize) -> bool {
        // No field tells. But a change of what is covered is carried into a finished checksum only.
        let Some(before) = self.packet().at::<[u8; 2]>(offset).map(|field| *field) else { return false };
        // SAFETY: the context is the program's own.
        if unsafe { bpf_l4_csum_replace(self.skb.skb, offset as u32, 0, 1, 0) } != 0 {
            return false;
        }
        let Some(field) = self.packet().at::<[u8; 2]>(offset) else { return false };
        let is_unfinished = *field == before;
        *field = before;
        is_unfinished
    }

    /// The kernel keeps the outer tag beside the packet; an inner one is in it.
    #[inline(always)]
    fn link(&self) -> Option<Link> {
        let mut link = parse::link(self.packet())?;
        if field!(self, vlan_present) != 0 {
            let control = (field!(self, vlan_tci) as u16).to_be_bytes();
            if control != [0; 2] {
                link.vlan = [control[0], control[1], link.vlan[0], link.vlan[1]];
            }
        }
        Some(link)
    }

    #[inline(always)]
    fn set_tags(datapath: &Tc, link: &Link, tags: VlanTags) -> Result<(), EditFailed> {
        let skb = datapath.context.skb.skb;
        let has = emit::tags(link) + i32::from(field!(datapath.context, vlan_present) != 0);
        let wants = emit::depth(tags);
        if has == wants && u32::from_ne_bytes(tags) == u32::from_ne_bytes(link.vlan) {
            return Ok(());
        }
        for tag in 0..3 {
            // SAFETY: the context is the program's own.
            if tag < has && unsafe { bpf_skb_vlan_pop(skb) } != 0 {
                return Err(EditFailed);
            }
        }
        let [outer_high, outer_low, inner_high, inner_low] = tags;
        let mut pushed = 0;
        if wants == 2 {
            // SAFETY (both): the context is the program's own.
            pushed |= unsafe { bpf_skb_vlan_push(skb, VLAN, u16::from_be_bytes([inner_high, inner_low])) };
            pushed |=
                unsafe { bpf_skb_vlan_push(skb, SERVICE_VLAN, u16::from_be_bytes([outer_high, outer_low])) };
        } else if wants == 1 {
            // SAFETY: the context is the program's own.
            pushed |= unsafe { bpf_skb_vlan_push(skb, VLAN, u16::from_be_bytes([outer_high, outer_low])) };
        }
        if pushed == 0 { Ok(()) } else { Err(EditFailed) }
    }

    #[inline(always)]
    fn largest_on_wire(&self, l3: usize, headers: usize) -> usize {
        match field!(self, gso_size) {
            0 => (field!(self, len) as usize).wrapping_sub(l3),
            payload => headers + payload as usize,
        }
    }

    /// Only ever makes room in front: tags are not moved by this.
    #[inline(always)]
    fn move_head(&self, bytes: i32) -> Result<(), ResizeFailed> {
        if bytes > 0 {
            return Err(ResizeFailed);
        }
        // SAFETY: the context is the program's own.
        let result = unsafe { bpf_skb_change_head(self.skb.skb, -bytes as u32, 0) };
        if result == 0 { Ok(()) } else { Err(ResizeFailed) }
    }

    #[inline(always)]
    fn move_tail(&self, bytes: i32) -> Result<(), ResizeFailed> {
        let length = (field!(self, len) as i32).wrapping_add(bytes) as u32;
        // SAFETY: the context is the program's own.
        let result = unsafe { bpf_skb_change_tail(self.skb.skb, length, 0) };
        if result == 0 { Ok(()) } else { Err(ResizeFailed) }
    }

    #[inline(always)]
    fn device(&self) -> u32 {
        field!(self, ifindex)
    }

    #[inline(always)]
    fn context(&self) -> *mut c_void {
        self.as_ptr()
    }
}

/// Whether the kernel keeps a tag beside the packet, be it one that says nothing.
#[inline(always)]
pub fn has_tag_beside(context: &TcContext) -> bool {
    field!(context, vlan_present) != 0
}
