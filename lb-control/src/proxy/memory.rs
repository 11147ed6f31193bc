//! What connections may hold in memory of the agent's own.

use std::{
    cell::RefCell,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
};

/// What is read at once.
pub const BUFFER: usize = 64 * 1024;
/// What is read at once when much is held.
pub const SMALL_BUFFER: usize = 4 * 1024;

/// What all connections of all workers hold.
#[derive(Debug)]
pub struct Memory {
    most: usize,
    /// In buffers and in pipes.
    held: AtomicUsize,
    /// In pipes: all that those that are in use could hold.
    in_pipes: AtomicUsize,
    /// How often nothing could be read that might have to be held.
    refused: AtomicU64,
}

thread_local! {
    static MEMORY: RefCell<Option<Arc<Memory>>> = const { RefCell::new(None) };
}

impl Memory {
    /// Up to `most` bytes.
    #[must_use]
    pub fn new(most: usize) -> Self {
        Self { most, held: AtomicUsize::new(0), in_pipes: AtomicUsize::new(0), refused: AtomicU64::new(0) }
    }

    /// Bytes that are held.
    #[must_use]
    pub fn held(&self) -> usize {
        self.held.load(Relaxed)
    }

    /// How often nothing could be read that might have to be held.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.refused.load(Relaxed)
    }

    /// How much may be read at once, since it may have to be held: 0 for nothing.
    fn allows(&self) -> usize {
        let held = self.held();
        let left = self.most.saturating_sub(held);
        match left {
            _ if left < SMALL_BUFFER => {
                self.refused.fetch_add(1, Relaxed);
                0
            }
            // Where receivers are slow, many hold a little rather than a few much.
            _ if held >= self.most / 4 || left < BUFFER => SMALL_BUFFER,
            _ => BUFFER,
        }
    }

    /// Pipes get half of it, so that connections without one have buffers.
    fn take_pipe(&self, capacity: usize) -> bool {
        let most = self.most / 2;
        let is_taken = self.in_pipes.fetch_add(capacity, Relaxed) + capacity <= most
            && self.held() + capacity <= self.most;
        if is_taken {
            self.held.fetch_add(capacity, Relaxed);
        } else {
            self.in_pipes.fetch_sub(capacity, Relaxed);
        }
        is_taken
    }

    fn give_pipe(&self, capacity: usize) {
        self.in_pipes.fetch_sub(capacity, Relaxed);
        self.held.fetch_sub(capacity, Relaxed);
    }
}

/// From now on this thread shares `memory` with others.
pub fn share(memory: Arc<Memory>) {
    MEMORY.set(Some(memory));
}

/// How much may be read at once, since it may have to be held: 0 for nothing.
pub fn allows() -> usize {
    with(Memory::allows).unwrap_or(BUFFER)
}

/// So many bytes are held.
pub fn hold(bytes: usize) {
    if bytes > 0 {
        with(|memory| memory.held.fetch_add(bytes, Relaxed));
    }
}

/// So many bytes are held no longer.
pub fn release(bytes: usize) {
    if bytes > 0 {
        with(|memory| memory.held.fetch_sub(bytes, Relaxed));
    }
}

/// Whether a pipe may be used that may hold so much.
pub fn take_pipe(capacity: usize) -> bool {
    with(|memory| memory.take_pipe(capacity)).unwrap_or(true)
}

/// Such a pipe is used no longer.
pub fn give_pipe(capacity: usize) {
    with(|memory| memory.give_pipe(capacity));
}

/// `None` at the end of the thread, when nobody needs to know.
fn with<T>(what: impl FnOnce(&Memory) -> T) -> Option<T> {
    MEMORY.try_with(|memory| memory.borrow().as_deref().map(what)).ok().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_more_is_held_the_less_is_read() {
        let memory = Memory::new(1 << 20);
        for (held, allowed) in [
            (0, BUFFER),
            ((256 << 10) - 1, BUFFER),
            (256 << 10, SMALL_BUFFER),
            ((1 << 20) - SMALL_BUFFER, SMALL_BUFFER),
            ((1 << 20) - SMALL_BUFFER + 1, 0),
            (2 << 20, 0),
        ] {
            memory.held.store(held, Relaxed);
            assert_eq!(memory.allows(), allowed, "{held}");
        }
        assert_eq!(memory.refused(), 2);
    }

    #[test]
    fn pipes_get_half() {
        let memory = Memory::new(4 << 20);
        let taken = (0..5).filter(|_| memory.take_pipe(1 << 20)).count();
        assert_eq!((taken, memory.held()), (2, 2 << 20));
        memory.give_pipe(1 << 20);
        assert!(memory.take_pipe(1 << 20) && !memory.take_pipe(1 << 20));
        memory.held.fetch_add(2 << 20, Relaxed);
        memory.give_pipe(1 << 20);
        memory.held.fetch_add(1 << 20, Relaxed);
        assert!(!memory.take_pipe(1 << 20), "buffers hold the rest");
    }
}
