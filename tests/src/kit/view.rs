//! A packet in memory, with room around it as an XDP driver leaves it.

use std::cell::{Cell, UnsafeCell};

use lb_common::forward::platform::{Packet, ResizeFailed};
use lb_common::forward::wire::Wire;

/// XDP_PACKET_HEADROOM.
const HEADROOM: usize = 256;
/// The start of the headroom holds the kernel's `struct xdp_frame`; packets do not grow into it.
const FRAME_HEADER: usize = 40;
/// A page without what `struct skb_shared_info` takes at its end.
const END: usize = 4096 - 320;
/// ETH_HLEN: packets get no shorter.
const MINIMUM: usize = 14;

/// The largest packet that a buffer takes as XDP's.
pub const MAXIMUM_PACKET: usize = END - HEADROOM;

/// Memory for a super-packet, which is in several pages.
const SIZE: usize = 16_384;

/// The memory of one packet.
pub struct Buffer {
    bytes: Box<UnsafeCell<[u8; SIZE]>>,
    start: Cell<usize>,
    end: Cell<usize>,
    limit: usize,
}

impl Default for Buffer {
    fn default() -> Self {
        Self {
            bytes: Box::new(UnsafeCell::new([0; SIZE])),
            start: Cell::new(HEADROOM),
            end: Cell::new(HEADROOM),
            limit: END,
        }
    }
}

impl Buffer {
    /// Puts a packet in.
    pub fn fill(&mut self, packet: &[u8]) {
        let end = HEADROOM + packet.len();
        self.bytes.get_mut()[HEADROOM..end].copy_from_slice(packet);
        self.start.set(HEADROOM);
        self.end.set(end);
        self.limit = if end > END { SIZE } else { END };
    }

    /// The packet as it is now.
    pub fn content(&mut self) -> &[u8] {
        &self.bytes.get_mut()[self.start.get()..self.end.get()]
    }

    /// A handle to the packet as it is now.
    pub fn view(&self) -> View {
        let length = self.end.get() - self.start.get();
        View { start: self.bytes.get().cast::<u8>().wrapping_add(self.start.get()), length, in_reach: length }
    }

    /// bpf_xdp_adjust_head.
    ///
    /// # Errors
    /// When there is no room.
    pub fn move_head(&self, bytes: i32) -> Result<(), ResizeFailed> {
        let start = self.start.get().checked_add_signed(bytes as isize).ok_or(ResizeFailed)?;
        if start < FRAME_HEADER || start + MINIMUM > self.end.get() {
            return Err(ResizeFailed);
        }
        self.start.set(start);
        Ok(())
    }

    /// bpf_xdp_adjust_tail.
    ///
    /// # Errors
    /// When there is no room.
    #[expect(unsafe_code, reason = "new bytes are cleared as the kernel does it")]
    pub fn move_tail(&self, bytes: i32) -> Result<(), ResizeFailed> {
        let old = self.end.get();
        let end = old.checked_add_signed(bytes as isize).ok_or(ResizeFailed)?;
        if end > self.limit || end < self.start.get() + MINIMUM {
            return Err(ResizeFailed);
        }
        for offset in old..end {
            // SAFETY: inside of the buffer; the core holds no view while it resizes.
            unsafe { self.bytes.get().cast::<u8>().add(offset).write(0) };
        }
        self.end.set(end);
        Ok(())
    }
}

/// The packet between two addresses, like `data` and `data_end`.
#[derive(Clone, Copy)]
pub struct View {
    start: *mut u8,
    length: usize,
    in_reach: usize,
}

impl View {
    /// The same with no more than so many bytes in reach.
    #[must_use]
    pub fn limited(self, in_reach: usize) -> Self {
        Self { in_reach: self.length.min(in_reach), ..self }
    }
}

impl Packet for View {
    fn length(self) -> usize {
        self.length
    }

    fn head<'p, T: Wire>(self) -> Option<&'p mut T> {
        self.at(0)
    }

    #[expect(unsafe_code, reason = "the trait hands out views whose lifetime its caller watches")]
    fn at<'p, T: Wire>(self, offset: usize) -> Option<&'p mut T> {
        if offset > 511 || offset + size_of::<T>() > self.in_reach {
            return None;
        }
        // SAFETY: the bytes lie inside of the buffer, which outlives the run of the core; `Wire`
        // allows any bytes at any alignment.
        Some(unsafe { &mut *self.start.add(offset).cast::<T>() })
    }
}
