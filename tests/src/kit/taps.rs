//! The programs of TC on a device, with frames as virtual NICs hand them over: tags beside them,
//! checksums unfinished, super-packets in several pieces. Test runs of programs have none of these.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use super::kernel::Kernel;
use super::offload::{from_tap, to_tap};
use super::skb::Frame;
use super::world::BACKEND_DEVICE;
use crate::lab::xdp_pass::{attach_tcx, load_program};

/// The device that packets come in by.
pub const INGRESS: u32 = 102;
/// The device that gets what the programs pass.
pub const PASSED: u32 = 103;

// include/uapi/linux/if_tun.h
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETIFINDEX: libc::c_ulong = 0x4004_54da;
const IFF_TAP: i16 = 0x0002;
const IFF_NO_PI: i16 = 0x1000;
const IFF_VNET_HDR: i16 = 0x4000;
/// TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN: the reader takes them all.
const OFFLOADS: libc::c_ulong = 1 | 2 | 4 | 8;

const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;

/// Three devices in the network namespace of the calling thread, which the kernel programs are in.
pub struct Taps {
    ingress: File,
    others: [(u32, File); 2],
    _passes: OwnedFd,
}

impl Taps {
    /// Makes the devices and attaches the programs.
    ///
    /// # Errors
    /// When the kernel has no tap devices, or no tcx (Linux 6.6).
    pub fn new(kernel: &mut Kernel) -> Result<Self> {
        std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1")?;
        let ingress = tap("in", INGRESS)?;
        let others = [(BACKEND_DEVICE, tap("out", BACKEND_DEVICE)?), (PASSED, tap("passed", PASSED)?)];
        kernel.attach_to("in")?;
        Ok(Self { ingress, others, _passes: attach_tcx(&redirect_to(PASSED)?, INGRESS)? })
    }

    /// Sends a frame in; gives what comes out, and by which device. All of that happens within the
    /// system call that writes.
    ///
    /// # Panics
    /// When the frame is refused.
    pub fn send(&mut self, frame: &Frame) -> Vec<(u32, Frame)> {
        let bytes = to_tap(frame);
        let written = self.ingress.write(&bytes);
        assert!(matches!(written, Ok(count) if count == bytes.len()), "{written:?}: {bytes:02x?}");
        let mut all = Vec::new();
        receive(&mut self.ingress, INGRESS, &mut all);
        for (device, file) in &mut self.others {
            receive(file, *device, &mut all);
        }
        all
    }
}

fn receive(file: &mut File, device: u32, all: &mut Vec<(u32, Frame)>) {
    let mut bytes = vec![0; 1 << 16];
    loop {
        match file.read(&mut bytes) {
            Ok(length) => all.push((device, from_tap(&bytes[..length]))),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return,
            Err(error) => panic!("device {device}: {error}"),
        }
    }
}

/// A tap device that is up. It goes with its file.
fn tap(name: &str, index: u32) -> Result<File> {
    /// `struct ifreq`, with flags.
    #[repr(C)]
    struct Request {
        name: [u8; 16],
        flags: i16,
        rest: [u8; 22],
    }
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .context("/dev/net/tun")?;
    let mut request = Request { name: [0; 16], flags: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR, rest: [0; 22] };
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    let check = |what: &str, result: libc::c_int| {
        if result == 0 {
            Ok(())
        } else {
            Err(std::io::Error::last_os_error()).context(format!("{what} {name}"))
        }
    };
    let fd = file.as_raw_fd();
    #[expect(unsafe_code, reason = "requests without a wrapper in libc")]
    // SAFETY: the descriptor is open, and both pointers are to what the requests ask for.
    let (numbered, made, offloads) = unsafe {
        (
            libc::ioctl(fd, TUNSETIFINDEX, &raw const index),
            libc::ioctl(fd, TUNSETIFF, &raw mut request),
            libc::ioctl(fd, TUNSETOFFLOAD, OFFLOADS),
        )
    };
    check("cannot number", numbered)?;
    check("cannot make", made)?;
    check("cannot set the offloads of", offloads)?;
    let status = Command::new("ip").args(["link", "set", name, "up"]).status().context("ip")?;
    ensure!(status.success(), "ip link set {name} up: {status}");
    Ok(file)
}

/// A program that sends every packet by a device.
fn redirect_to(device: u32) -> std::io::Result<OwnedFd> {
    let [a, b, c, d] = device.to_ne_bytes();
    let instructions = [
        // r1 = device; r2 = 0; call bpf_redirect; exit
        [0xb7, 1, 0, 0, a, b, c, d],
        [0xb7, 2, 0, 0, 0, 0, 0, 0],
        [0x85, 0, 0, 0, 23, 0, 0, 0],
        [0x95, 0, 0, 0, 0, 0, 0, 0],
    ];
    load_program(BPF_PROG_TYPE_SCHED_CLS, &instructions)
}
