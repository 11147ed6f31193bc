//! Devices that the program is attached to, by the links that are pinned: what can be known without
//! the agent.

use anyhow::Result;
use aya::programs::links::{FdLink, PinnedLink};

use super::classifiers::ingress_device;
use super::{Mode, PinDirectory};

/// A pinned link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkedDevice {
    /// Index of the device.
    pub ifindex: u32,
    /// Its name; `None` if it is gone, or in another network namespace.
    pub name: Option<String>,
    /// How the program is attached.
    pub mode: Mode,
    /// The kernel's id of the program; `None` if it may not be asked for.
    pub program_id: Option<u32>,
}

/// All pinned links, by the index of their device; none if nothing is pinned.
///
/// # Errors
/// When the directory cannot be read.
pub fn linked_devices(pins: &PinDirectory) -> Result<Vec<LinkedDevice>> {
    let mut all: Vec<LinkedDevice> = Vec::new();
    for path in pins.all_links()? {
        let file = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let in_tc = ingress_device(&file).map(|index| (index, Mode::Tc));
        if let Some((ifindex, mode)) = parse(&file).or(in_tc) {
            let link = PinnedLink::from_pin(&path).map(FdLink::from);
            let program_id = link.and_then(|link| link.info()).ok().map(|info| info.program_id());
            all.push(LinkedDevice { ifindex, name: device_name(ifindex), mode, program_id });
        }
    }
    // TC beside XDP is not how the device is attached: XDP sees the frames first.
    all.sort_by_key(|device| (device.ifindex, device.mode == Mode::Tc));
    all.dedup_by_key(|device| device.ifindex);
    Ok(all)
}

/// The name of the pin of a device's link. Without a dot: the BPF file system keeps those to itself
/// (kernel/bpf/inode.c, `bpf_lookup`).
pub(super) fn pin_name(ifindex: u32, mode: Mode) -> String {
    format!("{ifindex}-{}", mode.name())
}

/// The name of a device of this network namespace.
#[must_use]
pub fn device_name(ifindex: u32) -> Option<String> {
    let name = nix::net::if_::if_indextoname(ifindex).ok()?;
    // nix 0.31 takes the null pointer of if_indextoname(3) for success.
    (!name.is_empty()).then(|| name.to_string_lossy().into_owned())
}

/// The device and mode that a pin is named after: the other way round of [`pin_name`].
pub(super) fn parse(file: &str) -> Option<(u32, Mode)> {
    let (ifindex, mode) = file.split_once('-')?;
    let mode = Mode::ALL.into_iter().find(|known| *known != Mode::Tc && known.name() == mode)?;
    Some((ifindex.parse().ok()?, mode))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_pins() {
        assert_eq!(parse("7-native"), Some((7, Mode::Native)));
        assert_eq!(parse("12-generic"), Some((12, Mode::Generic)));
        for other in ["7", "x-native", "7-tc", "-native", "7.native"] {
            assert_eq!(parse(other), None, "{other}");
        }
    }

    #[test]
    fn nothing_pinned_is_no_error() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(linked_devices(&PinDirectory::new(directory.path())).unwrap(), []);
    }

    #[test]
    fn loopback_has_its_name() {
        assert_eq!(device_name(1).as_deref(), Some("lo"));
        assert_eq!(device_name(u32::MAX), None);
    }
}
