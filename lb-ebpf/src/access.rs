//! Access to the packet between `data` and `data_end`: all packet pointers are made here.

use core::arch::asm;

use aya_ebpf::bindings::__sk_buff;
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

/// The bytes of a packet in TC: those that lie in its first piece. The pointers are
/// read from the context each time, because helpers move them.
#[derive(Clone, Copy)]
pub struct SkbPacket {
    context: *mut __sk_buff,
}

impl SkbPacket {
    #[inline(always)]
    pub fn of(context: *mut __sk_buff) -> Self {
        Self { context }
    }

    #[inline(always)]
    fn bounds(self) -> (usize, usize) {
        // SAFETY: the context is the program's own. Volatile, so that both are read as they are,
        // anew after each helper that moves them.
        unsafe {
            (
                (&raw const (*self.context).data).read_volatile() as usize,
                (&raw const (*self.context).data_end).read_volatile() as usize,
            )
        }
    }

    /// The number of bytes in the first piece.
    #[inline(always)]
    pub fn in_reach(self) -> usize {
        let (start, end) = self.bounds();
        let mut length = end - start;
        // SAFETY: as in `XdpPacket::length`.
        unsafe { asm!("{0} = {0}", inout(reg) length, options(pure, nomem, nostack)) };
        length
    }
}

impl Packet for SkbPacket {
    #[inline(always)]
    fn length(self) -> usize {
        // SAFETY: the context is the program's own.
        unsafe { (&raw const (*self.context).len).read_volatile() as usize }
    }

    #[inline(always)]
    fn head<'p, T: Wire>(self) -> Option<&'p mut T> {
        let (start, end) = self.bounds();
        if start + size_of::<T>() > end {
            return None;
        }
        // SAFETY: the bytes lie between data and data_end; `Wire` allows any bytes at any alignment.
        Some(unsafe { &mut *(start as *mut T) })
    }

    #[inline(always)]
    fn at<'p, T: Wire>(self, offset: usize) -> Option<&'p mut T> {
        if offset > OFFSET_MASK {
            return None;
        }
        let mut bounded = offset;
        // SAFETY: an AND of a register; see `XdpPacket::at`.
        unsafe { asm!("{0} &= 511", inout(reg) bounded, options(pure, nomem, nostack)) };
        let (start, end) = self.bounds();
        let start = start + bounded;
        if start + size_of::<T>() > end {
            return None;
        }
        // SAFETY: as in `head`.
        Some(unsafe { &mut *(start as *mut T) })
    }
}
