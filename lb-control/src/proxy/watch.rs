//! Sockets that the runtime watches.

use std::{
    io,
    os::fd::{AsFd, AsRawFd},
};

use tokio::io::{Interest, unix::AsyncFd};

/// Lets the runtime of this thread tell when a socket is ready.
///
/// # Errors
/// When the kernel cannot watch another one.
pub fn watch<S: AsFd + AsRawFd>(socket: S, interest: Interest) -> io::Result<AsyncFd<S>> {
    #[expect(
        deprecated,
        reason = "what replaces it is unsafe, because not every `AsRawFd` owns what it names; `AsFd` is the \
                  promise that this one does"
    )]
    AsyncFd::with_interest(socket, interest)
}

/// Both directions.
#[must_use]
pub fn both() -> Interest {
    Interest::READABLE | Interest::WRITABLE
}
