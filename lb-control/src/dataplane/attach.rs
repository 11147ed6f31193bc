//! The devices that the entry program is attached to, by links that are pinned: they outlive the
//! agent.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow};
use aya::programs::ProgramError;
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::xdp::{Xdp, XdpLink, XdpMode};
use tracing::{info, warn};

use super::PinDirectory;
use super::exits::is_exit;
use super::links::{parse, pin_name};

/// How the program is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// In the driver, before the kernel has made an skb of the frame.
    Native,
    /// In the kernel's core, for drivers without support: slower.
    Generic,
}

impl Mode {
    /// The name shown to people; also the ending of the pin's name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Generic => "generic",
        }
    }

    fn xdp(self) -> XdpMode {
        match self {
            Self::Native => XdpMode::Driver,
            Self::Generic => XdpMode::Skb,
        }
    }
}

/// A device that the program is attached to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// Index of the device.
    pub ifindex: u32,
    /// Its name.
    pub name: String,
    /// How.
    pub mode: Mode,
    /// The kernel's number of the program.
    pub program_id: Option<u32>,
}

/// All devices.
pub struct Devices {
    pins: PinDirectory,
    /// `None`: native where the driver can, else generic.
    forced: Option<Mode>,
    attached: BTreeMap<u32, Attachment>,
}

impl Devices {
    /// No device yet.
    #[must_use]
    pub fn new(pins: PinDirectory, forced: Option<Mode>) -> Self {
        Self { pins, forced, attached: BTreeMap::new() }
    }

    /// The devices that the program is attached to.
    pub fn attached(&self) -> impl Iterator<Item = &Attachment> {
        self.attached.values()
    }

    /// Whether the program is attached to a device.
    #[must_use]
    pub fn is_attached(&self, ifindex: u32) -> bool {
        self.attached.contains_key(&ifindex)
    }

    /// Attaches the program to a device, or replaces the one that an earlier agent has left there,
    /// without a packet in between.
    ///
    /// # Errors
    /// When the driver or the kernel refuses, or somebody else's program is there.
    pub fn attach(&mut self, program: &mut Xdp, ifindex: u32, name: &str) -> Result<&Attachment> {
        if !self.attached.contains_key(&ifindex) {
            let mode = match self.replace(program, ifindex)? {
                Some(mode) => {
                    info!(device = name, mode = mode.name(), "XDP program is replaced in place");
                    mode
                }
                None => self.attach_anew(program, ifindex, name)?,
            };
            let program_id = program.info().ok().map(|info| info.id());
            self.attached.insert(ifindex, Attachment { ifindex, name: name.to_owned(), mode, program_id });
        }
        Ok(&self.attached[&ifindex])
    }

    /// Compares with what the kernel says is on a device: if it is not our program, because somebody
    /// has detached it or the device is another, it is to be attached anew.
    pub fn check(&mut self, ifindex: u32, on_device: Option<u32>) {
        let ours = self.attached.get(&ifindex).and_then(|found| found.program_id);
        if ours.is_some() && ours != on_device {
            warn!(ifindex, "the XDP program is not on its device any more");
            self.attached.remove(&ifindex);
        }
    }

    fn pin(&self, ifindex: u32, mode: Mode) -> PathBuf {
        self.pins.links().join(pin_name(ifindex, mode))
    }

    /// Gives a link that is pinned already the new program.
    fn replace(&self, program: &mut Xdp, ifindex: u32) -> Result<Option<Mode>> {
        for mode in [Mode::Native, Mode::Generic] {
            let path = self.pin(ifindex, mode);
            if !path.exists() {
                continue;
            }
            let wanted = self.forced.is_none_or(|forced| forced == mode);
            let replaced = wanted
                && PinnedLink::from_pin(&path)
                    .map_err(anyhow::Error::from)
                    .and_then(|link| Ok(XdpLink::try_from(FdLink::from(link))?))
                    .and_then(|link| Ok(program.attach_to_link(link)?))
                    .and_then(|id| Ok(program.take_link(id)?))
                    .is_ok();
            if replaced {
                return Ok(Some(mode));
            }
            // Of a device that is gone and whose index is used again, or of another mode.
            fs::remove_file(&path).with_context(|| format!("removing the pin {}", path.display()))?;
        }
        Ok(None)
    }

    fn attach_anew(&self, program: &mut Xdp, ifindex: u32, name: &str) -> Result<Mode> {
        let first = self.forced.unwrap_or(Mode::Native);
        match self.attach_as(program, ifindex, first) {
            Ok(()) => {
                info!(device = name, mode = first.name(), "XDP program is attached");
                Ok(first)
            }
            Err(error) if self.forced.is_none() && is_unsupported(&error) => {
                warn!(
                    device = name,
                    "XDP native attach: the driver lacks support ({error:#}); using generic mode, slower"
                );
                self.attach_as(program, ifindex, Mode::Generic)
                    .map_err(|error| explain(error, name, Mode::Generic))?;
                Ok(Mode::Generic)
            }
            Err(error) => Err(explain(error, name, first)),
        }
    }

    fn attach_as(&self, program: &mut Xdp, ifindex: u32, mode: Mode) -> Result<()> {
        let id = program.attach_to_if_index(ifindex, mode.xdp())?;
        let link = FdLink::try_from(program.take_link(id)?)
            .map_err(|_| anyhow!("the kernel lacks BPF links for XDP (Linux 5.9 or later has them)"))?;
        let path = self.pin(ifindex, mode);
        link.pin(&path).with_context(|| format!("pinning the link as {}", path.display()))?;
        Ok(())
    }

    /// Detaches the program from a device.
    ///
    /// # Errors
    /// When the pin cannot be removed.
    pub fn detach(&mut self, ifindex: u32) -> Result<()> {
        if let Some(attachment) = self.attached.remove(&ifindex) {
            let path = self.pin(ifindex, attachment.mode);
            fs::remove_file(&path).with_context(|| format!("removing the pin {}", path.display()))?;
            info!(device = attachment.name, "XDP program is detached");
        }
        Ok(())
    }

    /// Detaches the program from all devices but these; also from those that an earlier agent has
    /// left it on.
    ///
    /// # Errors
    /// When a pin cannot be removed.
    pub fn keep_only(&mut self, wanted: &[u32]) -> Result<()> {
        let unwanted: Vec<_> =
            self.attached.keys().copied().filter(|index| !wanted.contains(index)).collect();
        for ifindex in unwanted {
            self.detach(ifindex)?;
        }
        let links = self.pins.links();
        for entry in fs::read_dir(&links).with_context(|| format!("reading {}", links.display()))? {
            let path = entry?.path();
            if path.file_name().is_some_and(|name| is_exit(&name.to_string_lossy())) {
                continue;
            }
            let pin = path.file_name().and_then(|name| parse(&name.to_string_lossy()));
            if pin
                .is_none_or(|(index, mode)| self.attached.get(&index).is_none_or(|found| found.mode != mode))
            {
                fs::remove_file(&path).with_context(|| format!("removing the pin {}", path.display()))?;
            }
        }
        Ok(())
    }
}

/// Whether the driver said that it cannot, rather than that something else is in the way.
fn is_unsupported(error: &anyhow::Error) -> bool {
    os_error(error) == Some(libc::EOPNOTSUPP)
}

fn os_error(error: &anyhow::Error) -> Option<i32> {
    match error.downcast_ref::<ProgramError>() {
        Some(ProgramError::SyscallError(error)) => error.io_error.raw_os_error(),
        _ => None,
    }
}

fn explain(error: anyhow::Error, name: &str, mode: Mode) -> anyhow::Error {
    let hint = match os_error(&error) {
        Some(libc::EBUSY | libc::EEXIST) => {
            "another XDP program is attached there; see `ip link show` and detach it"
        }
        Some(libc::EOPNOTSUPP) => "the driver lacks support; use --xdp-mode auto or generic",
        Some(libc::EPERM) => "CAP_NET_ADMIN and CAP_BPF are needed",
        Some(libc::EINVAL) => "the driver refuses; often the MTU is too large for XDP, see `dmesg`",
        Some(libc::ERANGE) => "the MTU is too large for XDP without multi-buffer support",
        Some(libc::ENODEV) => "the device is gone",
        _ => return error.context(format!("XDP {} attach on {name}", mode.name())),
    };
    error.context(format!("XDP {} attach on {name}: {hint}", mode.name()))
}
