//! The wire of a namespace: frames sent past its stack, and captures.

use std::{
    fs,
    os::fd::AsRawFd,
    path::PathBuf,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use nix::{
    ifaddrs::getifaddrs,
    sys::socket::{AddressFamily, SockFlag, SockType, bind, socket},
    unistd::write,
};

use super::{Lab, Namespace, Process, netns::check, wait_for};

/// The Ethernet address of a device.
///
/// # Errors
/// When there is no such device, or it is no Ethernet device.
pub fn ethernet_address(namespace: &Namespace, device: &str) -> Result<[u8; 6]> {
    namespace.enter(|| link(device))??.addr().with_context(|| format!("{device} is no Ethernet device"))
}

pub(crate) fn link(device: &str) -> Result<nix::sys::socket::LinkAddr> {
    let mut links = getifaddrs().context("cannot list devices")?.filter(|link| link.interface_name == device);
    let link = links.find_map(|link| link.address?.as_link_addr().copied());
    link.with_context(|| format!("no device {device}"))
}

/// Sends an Ethernet frame as it is.
///
/// # Errors
/// When the device does not take it.
pub fn send_frame(namespace: &Namespace, device: &str, frame: &[u8]) -> Result<()> {
    namespace.enter(|| {
        let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)?;
        bind(socket.as_raw_fd(), &link(device)?)?;
        let sent = write(&socket, frame).with_context(|| format!("cannot send a frame on {device}"))?;
        ensure!(sent == frame.len(), "only {sent} of {} bytes were sent", frame.len());
        Ok(())
    })?
}

/// A running tcpdump. Unlike a packet socket of ours it shows VLAN tags, which the kernel takes off
/// received frames (net/core/skbuff.c, `skb_vlan_untag`).
#[derive(Debug)]
pub struct Capture {
    _process: Process,
    file: PathBuf,
}

impl Capture {
    /// Starts to capture what matches a filter (pcap-filter(7)); it captures when this returns.
    ///
    /// # Errors
    /// When tcpdump does not start to listen.
    pub fn start(lab: &Lab, namespace: &Namespace, device: &str, filter: &str) -> Result<Self> {
        let file = lab.directory().join(format!("{}-{device}.pcap", namespace.role()));
        let log = file.with_extension("log");
        let mut command = Command::new("tcpdump");
        // As root: it would give the file to a user who cannot enter the directory.
        command
            .args(["-i", device, "-n", "-U", "--immediate-mode", "-Z", "root", "-w"])
            .arg(&file)
            .arg(filter);
        let stderr = fs::File::create(&log).with_context(|| format!("cannot make {}", log.display()))?;
        let process = namespace.spawn(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr))?;
        wait_for("tcpdump to listen", || {
            Ok(fs::read_to_string(&log)?.contains("listening on").then_some(()))
        })?;
        Ok(Self { _process: process, file })
    }

    /// Waits for a packet whose line, as `tcpdump -e` writes it, contains all of these.
    ///
    /// # Errors
    /// When there is none in time; with what there was.
    pub fn wait_for(&self, parts: &[&str]) -> Result<String> {
        let mut all = String::new();
        let found = wait_for(&format!("a packet with {parts:?}"), || {
            all = check(Command::new("tcpdump").args(["-e", "-n", "-t", "-r"]).arg(&self.file))?;
            Ok(all.lines().find(|line| parts.iter().all(|part| line.contains(part))).map(str::to_owned))
        });
        found.with_context(|| format!("captured:\n{all}"))
    }
}
