//! Access to the packet between `data` and `data_end`: all packet pointers are made here.

use core::arch::asm;

use aya_ebpf::programs::XdpContext;
use lb_common::forward::platform::Packet;
use lb_common::forward::wire::Wire;

/// The bytes of a packet. Must not be kept across a helper that moves them; the verifier rejects a
/// program that does.
#[derive(Clone, Copy)]
pub struct XdpPacket {
    start: usize,
    end: usize,
}

impl XdpPacket {
    #[inline(always)]
    pub fn of(context: &XdpContext) -> Self {
        Self { start: context.data(), end: context.data_end() }
    }
}

/// Offsets are cut to this many bits. The core never reaches beyond.
const OFFSET_MASK: usize = 511;

impl Packet for XdpPacket {
    #[inline(always)]
    fn length(self) -> usize {
        let mut length = self.end - self.start;
        // A barrier: LLVM would fold the difference into sums of its own, and the verifier knows
        // packet pointers only in 64-bit differences of two of them.
        // SAFETY: a move of a register to itself; without an instruction there would be a line without code, which the kernel rejects.
        unsafe { asm!("{0} = {0}", inout(reg) length, options(pure, nomem, nostack)) };
        length
    }

    #[inline(always)]
    fn head<'p, T: Wire>(self) -> Option<&'p mut T> {
        if self.start + size_of::<T>() > self.end {
            return None;
        }
        // SAFETY: the bytes lie between data and data_end; `Wire` allows any bytes at any alignment.
        Some(unsafe { &mut *(self.start as *mut T) })
    }

    #[inline(always)]
    fn at<'p, T: Wire>(self, offset: usize) -> Option<&'p mut T> {
        if offset > OFFSET_MASK {
            return None;
        }
        let mut bounded = offset;
        // The verifier wants to see a bound on the very register that it adds to a packet pointer;
        // LLVM would drop a mask that it knows to change nothing.
        // SAFETY: an AND of a register.
        unsafe { asm!("{0} &= 511", inout(reg) bounded, options(pure, nomem, nostack)) };
        let start = self.start + bounded;
        if start + size_of::<T>() > self.end {
            return None;
        }
        // SAFETY: as in `head`.
        Some(unsafe { &mut *(start as *mut T) })
    }
}
