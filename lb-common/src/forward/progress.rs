//! What is kept of a decision while the packet is edited, each in one number.
//!
//! A truth value or a state in a register of its own would have the kernel's verifier follow the edit once
//! for each combination of them; those before Linux 6.12 give up at that. Numbers that have been in memory
//! ([`Datapath::forget`]) say nothing: there is one path through the edit, and they are looked at after it.

use core::marker::PhantomData;

use super::platform::Datapath;
use crate::abi::FlowState;

/// One of the types below, as a number of which the verifier knows nothing.
pub struct Packed<T>(usize, PhantomData<T>);

/// Where a flow is, and where the packet takes it.
pub struct Progress {
    /// Whether the entry is in the table of established flows.
    pub established: bool,
    /// Its state before the packet.
    pub state: FlowState,
    /// Its state after it.
    pub next: FlowState,
}

impl Progress {
    /// As a number, which was in `slot`.
    #[inline(always)]
    pub fn forget<D: Datapath>(self, datapath: &D, slot: &mut usize) -> Packed<Self> {
        let number = self.next as usize | (self.state as usize) << 8 | usize::from(self.established) << 16;
        Packed(datapath.forget(slot, number), PhantomData)
    }
}

impl Packed<Progress> {
    /// Whether the entry is in the table of established flows.
    #[inline(always)]
    pub fn established(&self) -> bool {
        self.0 >> 16 != 0
    }

    /// The state after the packet.
    #[inline(always)]
    pub fn next(&self) -> FlowState {
        FlowState::from_raw(self.0 as u8)
    }

    /// Whether the packet takes the flow to another state.
    #[inline(always)]
    pub fn changes(&self) -> bool {
        self.0 as u8 != (self.0 >> 8) as u8
    }

    /// Whether the other half of the flow needs to know: of an established one, only of a change.
    #[inline(always)]
    pub fn matters(&self) -> bool {
        !self.established() || self.changes()
    }
}

/// What a segment leaves in the entry of the other direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// Whether it leaves anything. Not an `Option` around the others: its unset half would be an
    /// uninitialized register, which the verifier does not let a program save.
    pub is_set: bool,
    /// A flag of the entry.
    pub flag: u8,
    /// The mark of the entry.
    pub value: u32,
}

impl Mark {
    /// Nothing.
    pub const NONE: Self = Self { is_set: false, flag: 0, value: 0 };

    /// As a number, which was in `slot`.
    #[inline(always)]
    pub fn forget<D: Datapath>(self, datapath: &D, slot: &mut usize) -> Packed<Self> {
        let number = usize::from(self.is_set) << 40 | usize::from(self.flag) << 32 | self.value as usize;
        Packed(datapath.forget(slot, number), PhantomData)
    }
}

impl Packed<Mark> {
    /// The mark.
    #[inline(always)]
    pub fn unpack(&self) -> Mark {
        Mark { is_set: self.0 >> 40 != 0, flag: (self.0 >> 32) as u8, value: self.0 as u32 }
    }
}
