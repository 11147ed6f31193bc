//! Bulk data goes from socket to socket by a pipe, without being copied: splice(2).

use std::{
    cell::RefCell,
    io,
    os::fd::{AsFd, OwnedFd},
};

use nix::{
    fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice},
    unistd::pipe2,
};

use super::memory;

/// What a pipe is made to hold, where that is allowed.
const WANTED_CAPACITY: i32 = 1 << 20;
/// So many empty pipes are kept for later.
const KEPT: usize = 32;

thread_local! {
    static POOL: RefCell<Pool> = const { RefCell::new(Pool { idle: Vec::new(), all: 0, maximum: 0 }) };
}

#[derive(Debug)]
struct Pool {
    idle: Vec<Pipe>,
    /// Also those that are in use.
    all: usize,
    maximum: usize,
}

/// A pipe between two sockets.
#[derive(Debug)]
pub struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    filled: usize,
    capacity: usize,
}

/// Sets how many pipes this thread may have.
pub fn allow(maximum: usize) {
    POOL.with_borrow_mut(|pool| pool.maximum = maximum);
}

impl Pipe {
    /// An empty one, unless there are as many as there may be, or too much is held.
    #[must_use]
    pub fn take() -> Option<Self> {
        let pipe = POOL.with_borrow_mut(|pool| {
            if let Some(pipe) = pool.idle.pop() {
                return Some(pipe);
            }
            if pool.all >= pool.maximum {
                return None;
            }
            let pipe = Self::create()?;
            pool.all += 1;
            Some(pipe)
        })?;
        if memory::take_pipe(pipe.capacity) {
            return Some(pipe);
        }
        pipe.keep();
        None
    }

    fn create() -> Option<Self> {
        let (read, write) = pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).ok()?;
        // Refused beyond what a user may have of it: then it holds what it holds.
        let _ = fcntl(&write, FcntlArg::F_SETPIPE_SZ(WANTED_CAPACITY));
        let capacity = fcntl(&write, FcntlArg::F_GETPIPE_SZ).ok()?;
        Some(Self { read, write, filled: 0, capacity: usize::try_from(capacity).ok()? })
    }

    /// Gives it back. If something is in it, it is closed.
    pub fn give_back(self) {
        memory::give_pipe(self.capacity);
        self.keep();
    }

    fn keep(self) {
        POOL.with_borrow_mut(|pool| {
            if self.filled == 0 && pool.idle.len() < KEPT {
                pool.idle.push(self);
            } else {
                pool.all = pool.all.saturating_sub(1);
            }
        });
    }

    /// Bytes that are in it.
    #[must_use]
    pub fn filled(&self) -> usize {
        self.filled
    }

    /// Bytes that may fit. There may be room for less, since small pieces take as much as large ones.
    #[must_use]
    pub fn room(&self) -> usize {
        self.capacity.saturating_sub(self.filled)
    }

    /// From a socket. 0 is the end.
    ///
    /// # Errors
    /// Those of the socket; that it would block also when the pipe is full.
    pub fn fill(&mut self, source: impl AsFd) -> io::Result<usize> {
        let count = splice(source, None, &self.write, None, self.room(), flags())?;
        self.filled += count;
        Ok(count)
    }

    /// To a socket.
    ///
    /// # Errors
    /// Those of the socket.
    pub fn empty(&mut self, sink: impl AsFd) -> io::Result<usize> {
        let count = splice(&self.read, None, sink, None, self.filled, flags())?;
        self.filled = self.filled.saturating_sub(count);
        Ok(count)
    }
}

fn flags() -> SpliceFFlags {
    SpliceFFlags::SPLICE_F_MOVE | SpliceFFlags::SPLICE_F_NONBLOCK
}
