//! The devices that the datapath is attached to, by links that are pinned: they outlive the agent.
//!
//! On each device it is the first of these that works: XDP in the driver, TC, XDP in the kernel's
//! core. What works is found by trying: versions and names of drivers tell too little.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use aya::programs::ProgramError;
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::xdp::{Xdp, XdpLink, XdpMode};
use tracing::{info, warn};

use super::classifiers::{Classifiers, Direction, ingress_device, is_classifier};
use super::links::{parse, pin_name};
use super::sockets::is_socket_hook;
use super::{Kernel, PinDirectory};
use crate::view::AttachMode;

/// The reason for XDP in the driver.
const FASTEST: &str = "the fastest way works";

/// How the datapath is attached to a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// XDP in the driver, before the kernel has made an skb of the frame.
    Native,
    /// TC: any device, with super-packets as they are.
    Tc,
    /// XDP in the kernel's core: any device; segments are taken apart first.
    Generic,
}

impl Mode {
    /// All, the preferred ones first.
    pub const ALL: [Self; 3] = [Self::Native, Self::Tc, Self::Generic];

    /// The name shown to people; also the ending of the pin's name, of XDP.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Tc => "tc",
            Self::Generic => "generic",
        }
    }

    /// As `--datapath` takes it and `pointsman status` shows it.
    #[must_use]
    pub fn view(self) -> AttachMode {
        match self {
            Self::Native => AttachMode::XdpNative,
            Self::Tc => AttachMode::Tc,
            Self::Generic => AttachMode::XdpGeneric,
        }
    }

    fn long_name(self) -> &'static str {
        match self {
            Self::Native => "XDP native",
            Self::Tc => "TC",
            Self::Generic => "XDP generic",
        }
    }

    fn xdp(self) -> Option<XdpMode> {
        match self {
            Self::Native => Some(XdpMode::Driver),
            Self::Tc => None,
            Self::Generic => Some(XdpMode::Skb),
        }
    }
}

/// A device that the datapath is attached to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// Index of the device.
    pub ifindex: u32,
    /// Its name.
    pub name: String,
    /// How.
    pub mode: Mode,
    /// Why so: what was better and did not work, or who has chosen.
    pub reason: String,
    /// Whether it is the fastest way there is, chosen by us: then the reason is not worth telling.
    pub is_fastest: bool,
    /// The kernel's number of the program.
    pub program_id: Option<u32>,
}

/// All devices.
pub struct Devices {
    pins: PinDirectory,
    /// `None`: the first that works.
    forced: Option<Mode>,
    attached: BTreeMap<u32, Attachment>,
    classifiers: Classifiers,
}

impl Devices {
    /// No device yet.
    #[must_use]
    pub fn new(pins: PinDirectory, forced: Option<Mode>) -> Self {
        let classifiers = Classifiers::new(pins.clone(), Direction::Ingress);
        Self { pins, forced, attached: BTreeMap::new(), classifiers }
    }

    /// The devices that the datapath is attached to.
    pub fn attached(&self) -> impl Iterator<Item = &Attachment> {
        self.attached.values()
    }

    /// How the datapath is attached to a device, if it is.
    #[must_use]
    pub fn mode(&self, ifindex: u32) -> Option<Mode> {
        self.attached.get(&ifindex).map(|found| found.mode)
    }

    /// Attaches the datapath to a device, or replaces the program that an earlier agent has left there,
    /// without a packet in between.
    ///
    /// # Errors
    /// When no way works; says what each lacks.
    pub fn attach(&mut self, programs: &mut Kernel, ifindex: u32, name: &str) -> Result<&Attachment> {
        if self.mode(ifindex) == Some(Mode::Tc) {
            // What somebody has detached is made anew.
            self.classifiers.attach(programs.ingress_program()?, ifindex, name)?;
        }
        if !self.attached.contains_key(&ifindex) {
            let (mode, reason) = match self.replace(programs, ifindex)? {
                Some(mode) => {
                    info!(device = name, mode = mode.name(), "XDP program is replaced in place");
                    (mode, self.reason(&[]))
                }
                None => self.choose(programs, ifindex, name)?,
            };
            let program_id = match mode {
                Mode::Tc => programs.ingress_program()?.info(),
                Mode::Native | Mode::Generic => programs.entry_program()?.info(),
            };
            let program_id = program_id.ok().map(|info| info.id());
            let name = name.to_owned();
            let is_fastest = reason == FASTEST;
            self.attached.insert(ifindex, Attachment { ifindex, name, mode, reason, is_fastest, program_id });
        }
        Ok(&self.attached[&ifindex])
    }

    /// Attaches the TC program beside XDP: it sends what XDP cannot send. What fails on one device keeps
    /// it from no other.
    ///
    /// # Errors
    /// What the kernel refused first.
    pub fn complement(&mut self, programs: &mut Kernel) -> Result<()> {
        let mut result = Ok(());
        for (ifindex, found) in self.attached.iter().filter(|(_, found)| found.mode != Mode::Tc) {
            let program = programs.ingress_program();
            let done = program.and_then(|program| self.classifiers.attach(program, *ifindex, &found.name));
            result = result.and(done);
        }
        result
    }

    /// Takes TC off where it is beside XDP. To be called when nothing relies on it any more.
    ///
    /// # Errors
    /// When a pin or a filter cannot be removed.
    pub fn leave_complement(&mut self) -> Result<()> {
        let in_tc = self.attached.values().filter(|found| found.mode == Mode::Tc);
        let in_tc: Vec<_> = in_tc.map(|found| found.ifindex).collect();
        self.classifiers.keep_only(&in_tc)
    }

    /// Compares with what the kernel says is on a device: if it is not our program, because somebody
    /// has detached it or the device is another, it is to be attached anew.
    pub fn check(&mut self, ifindex: u32, on_device: Option<u32>) {
        let ours = self.attached.get(&ifindex).filter(|found| found.mode != Mode::Tc);
        let ours = ours.and_then(|found| found.program_id);
        if ours.is_some() && ours != on_device {
            warn!(ifindex, "the XDP program is not on its device any more");
            self.attached.remove(&ifindex);
        }
    }

    /// The TC programs of devices, where they are attached.
    pub fn classifiers(&mut self) -> &mut Classifiers {
        &mut self.classifiers
    }

    fn pin(&self, ifindex: u32, mode: Mode) -> PathBuf {
        self.pins.link(&pin_name(ifindex, mode))
    }

    /// Gives a link of XDP that is pinned already the new program.
    fn replace(&self, programs: &mut Kernel, ifindex: u32) -> Result<Option<Mode>> {
        for mode in [Mode::Native, Mode::Generic] {
            let path = self.pin(ifindex, mode);
            if !path.exists() {
                continue;
            }
            let program = programs.entry_program()?;
            // A device that had to do with the slowest way once may have a better one now.
            let wanted = self.forced.map_or(mode == Mode::Native, |forced| forced == mode);
            if wanted && update(program, &path).is_ok() {
                self.pins.keep_link(&path)?;
                return Ok(Some(mode));
            }
            if !wanted && self.forced.is_none_or(|forced| forced == Mode::Tc) {
                // It goes when TC is in place (`keep_only`), or stays when nothing else works (`choose`).
                continue;
            }
            // Of a device that is gone and whose index is used again, or of another mode.
            fs::remove_file(&path).with_context(|| format!("removing the pin {}", path.display()))?;
        }
        Ok(None)
    }

    /// Gives a link in generic mode the new program: a second link is refused beside it, and taking it
    /// off first would leave the device without.
    fn keep_generic(&self, programs: &mut Kernel, ifindex: u32) -> Result<bool> {
        let path = self.pin(ifindex, Mode::Generic);
        if !path.exists() {
            return Ok(false);
        }
        if update(programs.entry_program()?, &path).is_ok() {
            self.pins.keep_link(&path)?;
            return Ok(true);
        }
        // Of a device that is gone and whose index is used again.
        fs::remove_file(&path).with_context(|| format!("removing the pin {}", path.display()))?;
        Ok(false)
    }

    /// The devices on which a program of the previous version is still at work, since it could not be
    /// replaced.
    ///
    /// # Errors
    /// When the pins cannot be read.
    pub fn unreplaced(&self) -> Result<Vec<u32>> {
        let mut all = Vec::new();
        for path in self.pins.all_links()?.iter().filter(|path| self.pins.is_earlier(path)) {
            let file = path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
            let device = parse(&file).map(|(index, _)| index).or_else(|| ingress_device(&file));
            all.extend(device.filter(|index| self.mode(*index).is_none() && !all.contains(index)));
        }
        Ok(all)
    }

    /// Tries one way after the other. Gives the one that works, and why none of the better ones.
    fn choose(&mut self, programs: &mut Kernel, ifindex: u32, name: &str) -> Result<(Mode, String)> {
        let candidates = match self.forced {
            Some(mode) => vec![mode],
            None => Mode::ALL.to_vec(),
        };
        let mut refused: Vec<String> = Vec::new();
        for mode in candidates {
            let done = match mode.xdp() {
                None => programs
                    .ingress_program()
                    .and_then(|program| self.classifiers.attach(program, ifindex, name)),
                Some(_) if mode == Mode::Generic && self.keep_generic(programs, ifindex)? => Ok(()),
                Some(xdp) => {
                    let program = programs.entry_program()?;
                    self.attach_xdp(program, ifindex, (mode, xdp)).map_err(|error| explain(error, name, mode))
                }
            };
            let error = match done {
                Ok(()) => {
                    info!(device = name, mode = mode.name(), "the datapath is attached");
                    return Ok((mode, self.reason(&refused)));
                }
                Err(error) => error,
            };
            if os_error(&error) == Some(libc::ENODEV) {
                return Err(error);
            }
            if self.forced.is_none() && mode != Mode::Generic {
                warn!(device = name, "{error:#}; trying the next way, which is slower");
            }
            refused.push(format!("{error:#}"));
        }
        Err(anyhow!(no_way(self.forced, &refused)))
    }

    /// Why a device has the way that works after these did not. One that is pinned already stands for the
    /// first that was tried.
    fn reason(&self, refused: &[String]) -> String {
        match (self.forced, refused) {
            (Some(_), _) => "by --datapath".to_owned(),
            (None, []) => FASTEST.to_owned(),
            (None, refused) => refused.join("; "),
        }
    }

    fn attach_xdp(&self, program: &mut Xdp, ifindex: u32, (mode, xdp): (Mode, XdpMode)) -> Result<()> {
        let id = program.attach_to_if_index(ifindex, xdp)?;
        let link = FdLink::try_from(program.take_link(id)?)
            .map_err(|_| anyhow!("the kernel lacks BPF links for XDP (Linux 5.9 or later has them)"))?;
        let path = self.pins.links().join(pin_name(ifindex, mode));
        link.pin(&path).with_context(|| format!("pinning the link as {}", path.display()))?;
        Ok(())
    }

    /// Detaches the datapath from all devices but these; also from those that an earlier agent has
    /// left it on. Where it could not be attached, what was there before stays; and TC stays beside XDP
    /// until [`Self::leave_complement`].
    ///
    /// # Errors
    /// When a pin cannot be removed.
    pub fn keep_only(&mut self, wanted: &[u32]) -> Result<()> {
        for (_, gone) in self.attached.extract_if(.., |index, _| !wanted.contains(index)) {
            info!(device = gone.name, "the datapath is detached");
        }
        for path in self.pins.all_links()? {
            let file = path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
            if is_classifier(&file) || is_socket_hook(&file) {
                continue;
            }
            let pin = parse(&file);
            let stays = |(index, mode)| match self.mode(index) {
                Some(attached) => attached == mode && !self.pins.is_earlier(&path),
                None => wanted.contains(&index),
            };
            if !pin.is_some_and(stays) {
                fs::remove_file(&path).with_context(|| format!("removing the pin {}", path.display()))?;
            }
        }
        self.classifiers.keep_only(wanted)
    }
}

/// Puts a program in the place of the one that a pinned link has.
fn update(program: &mut Xdp, pin: &Path) -> Result<()> {
    let link = XdpLink::try_from(FdLink::from(PinnedLink::from_pin(pin)?))?;
    let id = program.attach_to_link(link)?;
    // The pin holds it.
    program.take_link(id)?;
    Ok(())
}

/// Why a device has no datapath in the kernel, and what to do.
fn no_way(forced: Option<Mode>, refused: &[String]) -> String {
    let refused = refused.join("; ");
    match forced {
        Some(mode) => {
            format!("--datapath {} does not work here: {refused}; choose another, or auto", mode.view())
        }
        None => format!(
            "no datapath in the kernel works here: {refused}; `pointsman doctor` says what this node lacks"
        ),
    }
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
        Some(libc::EOPNOTSUPP) => "the driver lacks support",
        Some(libc::EPERM) => "CAP_NET_ADMIN and CAP_BPF are needed",
        Some(libc::EINVAL) => "the driver refuses; often the MTU is too large for XDP, see `dmesg`",
        Some(libc::ERANGE) => "the MTU is too large for XDP without multi-buffer support",
        Some(libc::ENODEV) => "the device is gone",
        _ => return error.context(format!("{} attach on {name}", mode.long_name())),
    };
    error.context(format!("{} attach on {name}: {hint}", mode.long_name()))
}

#[cfg(test)]
mod tests {
    use lb_common::abi::previous::VERSION;

    use super::*;

    #[test]
    fn programs_of_the_version_before_that_are_still_at_work() {
        let root = tempfile::tempdir().unwrap();
        let links = root.path().join(format!("v{VERSION}/links"));
        fs::create_dir_all(&links).unwrap();
        for name in ["7-native", "8-ingress", "9-native", "9-ingress", "10-egress"] {
            fs::write(links.join(name), "").unwrap();
        }
        let mut devices = Devices::new(PinDirectory::new(root.path()), None);
        let left = |devices: &Devices| {
            let mut left = devices.unreplaced().unwrap();
            left.sort_unstable();
            left
        };
        assert_eq!(left(&devices), [7, 8, 9]);
        // What is beside XDP goes when nothing relies on it any more.
        let (name, reason) = (String::new(), String::new());
        let new =
            Attachment { ifindex: 9, name, mode: Mode::Native, reason, is_fastest: true, program_id: None };
        devices.attached.insert(9, new);
        assert_eq!(left(&devices), [7, 8]);
    }

    #[test]
    fn a_device_without_a_way_says_what_to_do() {
        let refused = ["XDP native attach on eth0: the driver lacks support".to_owned(), "TC: no".to_owned()];
        let chosen = no_way(None, &refused);
        assert!(
            chosen.contains("no datapath in the kernel works") && chosen.contains("pointsman doctor"),
            "{chosen}"
        );
        assert!(chosen.contains(&refused[0]) && chosen.contains(&refused[1]), "{chosen}");
        let forced = no_way(Some(Mode::Generic), &refused[..1]);
        assert!(forced.starts_with("--datapath xdp-generic does not work here: XDP native"), "{forced}");
        assert!(forced.ends_with("choose another, or auto"), "{forced}");
    }
}
