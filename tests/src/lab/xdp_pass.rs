//! An XDP program that passes everything, for the far ends of the edge's devices.
//!
//! What a program answers with `XDP_TX` on a veth device lies in a queue of the peer until
//! something else wakes it, unless the peer has a program too (drivers/net/veth.c, `veth_xdp_flush`;
//! NAPI alone, by GRO, is enough for redirects only).

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

use anyhow::{Context, Result};
use nix::net::if_::if_nametoindex;

use super::netns::Namespace;

// include/uapi/linux/bpf.h and if_link.h
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_PROG_TYPE_XDP: u32 = 6;
const BPF_XDP: u32 = 37;
const BPF_TCX_INGRESS: u32 = 46;
const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;

/// `r0 = XDP_PASS; exit`.
const PASS: [[u8; 8]; 2] = [[0xb7, 0, 0, 0, 2, 0, 0, 0], [0x95, 0, 0, 0, 0, 0, 0, 0]];

/// The program on one device; gone when dropped.
#[derive(Debug)]
pub struct XdpPass {
    _link: OwnedFd,
}

impl XdpPass {
    /// Loads the program and attaches it to a device, in the driver.
    ///
    /// # Errors
    /// When not root, or the device has a program already.
    pub fn attach(namespace: &Namespace, device: &str) -> Result<Self> {
        let attached = namespace.enter(|| {
            let index = if_nametoindex(device)?;
            let program = load_program(BPF_PROG_TYPE_XDP, &PASS)?;
            let program_fd = program.as_raw_fd().cast_unsigned();
            let mut attributes = [program_fd, index, BPF_XDP, XDP_FLAGS_DRV_MODE];
            bpf(BPF_LINK_CREATE, &mut attributes)
        })?;
        let link =
            attached.with_context(|| format!("cannot attach XDP to {device} in {}", namespace.name()))?;
        Ok(Self { _link: link })
    }
}

/// `union bpf_attr` of `BPF_PROG_LOAD`, up to `log_buf`.
#[repr(C)]
struct Load {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log: [u64; 2],
}

/// Loads a program of a kind that is given as instructions.
pub(crate) fn load_program(kind: u32, instructions: &[[u8; 8]]) -> io::Result<OwnedFd> {
    let license = c"Apache-2.0";
    let mut attributes = Load {
        kind,
        count: instructions.len() as u32,
        instructions: instructions.as_ptr() as u64,
        license: license.as_ptr() as u64,
        log: [0; 2],
    };
    bpf(BPF_PROG_LOAD, &mut attributes)
}

/// Attaches a classifier to packets that come in by a device, after those that are there.
pub(crate) fn attach_tcx(program: &OwnedFd, device: u32) -> io::Result<OwnedFd> {
    let mut attributes = [program.as_raw_fd().cast_unsigned(), device, BPF_TCX_INGRESS, 0];
    bpf(BPF_LINK_CREATE, &mut attributes)
}

/// The system call, for commands that give a file descriptor.
#[expect(unsafe_code, reason = "there is no safe way to load instructions that are in no object file")]
fn bpf<T>(command: libc::c_int, attributes: &mut T) -> io::Result<OwnedFd> {
    // SAFETY: the kernel reads and writes `size_of::<T>()` bytes of a value that is borrowed
    // mutably; pointers in it are to what lives as long. Both commands give a new file descriptor.
    unsafe {
        let fd = libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<T>());
        if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(fd as libc::c_int)) }
    }
}
