//! Gives a pinned link another program, for kinds of links that aya does not do this for.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// `BPF_OBJ_GET`.
const GET_PINNED: libc::c_long = 7;
/// `BPF_LINK_UPDATE`.
const UPDATE_LINK: libc::c_long = 29;

/// The part of `union bpf_attr` for pins.
#[repr(C)]
struct Pin {
    path: u64,
    fd: u32,
    flags: u32,
}

/// The part of `union bpf_attr` that is called `link_update`.
#[repr(C)]
struct Update {
    link: u32,
    program: u32,
    flags: u32,
    old_program: u32,
}

/// Opens what is pinned.
///
/// # Errors
/// When it cannot be opened.
pub fn link_of_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let attributes = Pin { path: path.as_ptr() as u64, fd: 0, flags: 0 };
    #[expect(unsafe_code, reason = "a system call that no library wraps")]
    // SAFETY: the path lives through the call; what it gives is a descriptor of our own.
    unsafe {
        let result = libc::syscall(libc::SYS_bpf, GET_PINNED, &raw const attributes, size_of::<Pin>());
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(result as i32)) }
    }
}

/// Replaces the program, atomically.
///
/// # Errors
/// When the kernel refuses: the link was detached, or is of another kind.
pub fn update(link: &OwnedFd, program: impl AsFd) -> io::Result<()> {
    let number = |fd: i32| fd.cast_unsigned();
    let attributes = Update {
        link: number(link.as_raw_fd()),
        program: number(program.as_fd().as_raw_fd()),
        flags: 0,
        old_program: 0,
    };
    #[expect(unsafe_code, reason = "a system call that no library wraps")]
    // SAFETY: numbers of open descriptors only.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, UPDATE_LINK, &raw const attributes, size_of::<Update>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
