//! The places that the programs are attached to.

use core::ffi::c_void;

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR};
use aya_ebpf::helpers::generated::{
    bpf_l4_csum_replace, bpf_skb_pull_data, bpf_xdp_adjust_head, bpf_xdp_adjust_tail,
};
use aya_ebpf::programs::{TcContext, XdpContext};
use lb_common::forward::platform::{EditFailed, Outgoing, Packet, ResizeFailed};

use crate::access::{SkbPacket, XdpPacket};
use crate::datapath::{Hook, Kernel};

/// Where packets come in.
pub type Xdp = Kernel<XdpContext>;
/// Where packets leave.
pub type Egress = Kernel<TcContext>;

impl Hook for XdpContext {
    type Packet = XdpPacket;

    #[inline(always)]
    fn packet(&self) -> XdpPacket {
        XdpPacket::of(self)
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

impl Hook for TcContext {
    type Packet = SkbPacket;

    #[inline(always)]
    fn packet(&self) -> SkbPacket {
        SkbPacket::of(self.skb.skb)
    }

    // What leaves is never resized.
    #[inline(always)]
    fn move_head(&self, _bytes: i32) -> Result<(), ResizeFailed> {
        Err(ResizeFailed)
    }

    #[inline(always)]
    fn move_tail(&self, _bytes: i32) -> Result<(), ResizeFailed> {
        Err(ResizeFailed)
    }

    #[inline(always)]
    fn device(&self) -> u32 {
        // SAFETY: the context is the program's own.
        unsafe { (*self.skb.skb).ifindex }
    }

    #[inline(always)]
    fn context(&self) -> *mut c_void {
        self.as_ptr()
    }
}

impl Outgoing for Egress {
    #[inline(always)]
    fn pull(&self, bytes: u32) {
        let length = (self.context.packet().length() as u32).min(bytes);
        // SAFETY: the context is the program's own. If it fails, the packet is passed for being cut
        // short.
        unsafe { bpf_skb_pull_data(self.context.skb.skb, length) };
    }

    #[inline(always)]
    fn add_to_checksum(
        &self,
        offset: usize,
        is_udp: bool,
        pseudo: u32,
        covered: u32,
    ) -> Result<(), EditFailed> {
        // "None" stays "none" in UDP.
        let udp = if is_udp { u64::from(BPF_F_MARK_MANGLED_0) } else { 0 };
        let (skb, offset) = (self.context.skb.skb, offset as u32);
        // The kernel knows whether the field holds the sum of the pseudo header alone: then that is
        // all that counts.
        // SAFETY (both): the context is the program's own.
        let first = unsafe {
            bpf_l4_csum_replace(skb, offset, 0, u64::from(pseudo), udp | u64::from(BPF_F_PSEUDO_HDR))
        };
        let second = unsafe { bpf_l4_csum_replace(skb, offset, 0, u64::from(covered), udp) };
        if first == 0 && second == 0 { Ok(()) } else { Err(EditFailed) }
    }
}
