//! The TC programs on devices: attached by pinned links, or as filters where the kernel knows no such
//! links (Linux brought them with 6.6, distributions also with earlier ones): what works is found by trying.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::fs;
use std::io;
use std::mem;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use aya::programs::links::{FdLink, Link as _, LinkOrder, PinnedLink};
use aya::programs::tc::{
    NlOptions, SchedClassifier, SchedClassifierLink, TcAttachOptions, TcAttachType, TcHandle,
    qdisc_add_clsact,
};
use tracing::{info, warn};

use super::PinDirectory;
use super::links::device_name;

/// Every network namespace has it.
const LOOPBACK: &str = "lo";

/// Priority and handle of the filter, by which it is found again.
const PRIORITY: u16 = 0x504d;
const HANDLE: TcHandle = TcHandle::new(0, 1);

/// Which packets of a device a program sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Those that come in by it: the datapath in TC.
    Ingress,
    /// Those that leave by it: replies of backends on this node.
    Egress,
}

impl Direction {
    const ALL: [Self; 2] = [Self::Ingress, Self::Egress];

    fn attach_type(self) -> TcAttachType {
        match self {
            Self::Ingress => TcAttachType::Ingress,
            Self::Egress => TcAttachType::Egress,
        }
    }

    /// Where the program stands among others on the device. What is ours is nobody else's to look at.
    fn order(self) -> LinkOrder {
        match self {
            Self::Ingress => LinkOrder::first(),
            Self::Egress => LinkOrder::default(),
        }
    }

    /// For the log.
    fn purpose(self) -> &'static str {
        match self {
            Self::Ingress => "the TC program",
            Self::Egress => "the program for replies of backends on this node",
        }
    }
}

/// How a program is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Link,
    Filter,
}

impl Way {
    const ALL: [Self; 2] = [Self::Link, Self::Filter];

    /// The ending of the name of the pin: of the link, or of the program as a sign that there is a
    /// filter.
    fn name(self, direction: Direction) -> &'static str {
        match (self, direction) {
            (Self::Link, Direction::Ingress) => "ingress",
            (Self::Link, Direction::Egress) => "egress",
            (Self::Filter, Direction::Ingress) => "clsact_in",
            (Self::Filter, Direction::Egress) => "clsact",
        }
    }
}

/// A device that the program is attached to.
#[derive(Clone, Debug)]
struct Attached {
    name: String,
    way: Way,
}

/// All devices that a TC program is attached to, in one direction.
pub struct Classifiers {
    pins: PinDirectory,
    direction: Direction,
    /// The way that is tried first.
    way: Way,
    attached: BTreeMap<u32, Attached>,
    /// Devices with a filter of ours that has no sign.
    unsigned: BTreeSet<u32>,
}

impl Classifiers {
    /// No device yet.
    #[must_use]
    pub fn new(pins: PinDirectory, direction: Direction) -> Self {
        // A kernel without such links does not know the question either; every other answer is left to
        // attaching.
        let asked = SchedClassifier::query_tcx(LOOPBACK, direction.attach_type());
        let has_links = asked.err().is_none_or(|error| !is_unknown(&error));
        let way = if has_links { Way::Link } else { Way::Filter };
        Self { pins, direction, way, attached: BTreeMap::new(), unsigned: BTreeSet::new() }
    }

    /// The same by filters, whatever the kernel knows.
    #[must_use]
    pub fn by_filters(pins: PinDirectory, direction: Direction) -> Self {
        Self { way: Way::Filter, ..Self::new(pins, direction) }
    }

    /// Whether the program is attached by filters anywhere, which others can take away unseen: see
    /// [`Self::forget_missing`].
    #[must_use]
    pub fn uses_filters(&self) -> bool {
        self.way == Way::Filter || self.attached.values().any(|found| found.way == Way::Filter)
    }

    /// How the program is attached to a device, or would be.
    fn way_on(&self, ifindex: u32) -> Way {
        self.attached.get(&ifindex).map_or(self.way, |found| found.way)
    }

    /// Which packets the program sees.
    #[must_use]
    pub fn direction(&self) -> Direction {
        self.direction
    }

    /// Compares with the filters that the kernel lists on a device, by priority and handle: if ours is
    /// not among them, it is to be attached anew.
    pub fn forget_missing(&mut self, ifindex: u32, filters: impl IntoIterator<Item = (u16, u32)>) {
        let is_there = filters.into_iter().any(|found| found == (PRIORITY, HANDLE.into()));
        if self.way_on(ifindex) == Way::Filter && !is_there && self.attached.remove(&ifindex).is_some() {
            warn!(ifindex, "the filter of {} is not on its device any more", self.direction.purpose());
            // Nothing is left that could be replaced.
            if let Err(error) = remove(&self.pin(ifindex, Way::Filter)) {
                warn!("{error:#}");
            }
        }
    }

    /// Looks for a filter of ours among those that the kernel lists on a device, by priority, handle and
    /// name of the program, that no pin is the sign of: of an agent that was killed before it had made
    /// it. The kernel refuses another one there, so it is to be replaced.
    pub fn find_unsigned(&mut self, ifindex: u32, filters: impl IntoIterator<Item = (u16, u32, String)>) {
        let is_ours = |(priority, handle, name): (u16, u32, String)| {
            (priority, handle) == (PRIORITY, HANDLE.into()) && name.starts_with("pointsman")
        };
        let is_there = filters.into_iter().any(is_ours);
        let is_known = self.attached.contains_key(&ifindex) || self.pin(ifindex, Way::Filter).exists();
        if self.uses_filters() && is_there && !is_known {
            self.unsigned.insert(ifindex);
        } else {
            self.unsigned.remove(&ifindex);
        }
    }

    /// The devices that the program is attached to.
    pub fn attached(&self) -> impl Iterator<Item = (u32, &str)> {
        self.attached.iter().map(|(index, found)| (*index, found.name.as_str()))
    }

    /// Attaches the program to a device, or replaces the one that is there from before, without a
    /// packet in between. A link that somebody has detached is made anew.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn attach(&mut self, program: &mut SchedClassifier, ifindex: u32, name: &str) -> Result<()> {
        let purpose = self.direction.purpose();
        let mut way = self.way_on(ifindex);
        let mut done = match way {
            Way::Link => self.attach_link(program, ifindex, name),
            Way::Filter => self.attach_filter(program, ifindex, name),
        };
        let is_new = !self.attached.contains_key(&ifindex);
        if way == Way::Link
            && is_new
            && let Err(error) = &done
            && is_unknown(error.as_ref())
        {
            info!(device = name, "no link for {purpose}, but a filter: {error:#}");
            way = Way::Filter;
            done = self.attach_filter(program, ifindex, name);
        }
        done.with_context(|| format!("attaching {purpose} to {name} (needs CAP_NET_ADMIN)"))?;
        self.attached.insert(ifindex, Attached { name: name.to_owned(), way });
        if is_new {
            info!(device = name, way = way.name(self.direction), "{purpose} is attached");
        }
        Ok(())
    }

    fn attach_link(&self, program: &mut SchedClassifier, ifindex: u32, name: &str) -> Result<()> {
        let path = self.pin(ifindex, Way::Link);
        if path.exists() {
            let replaced = PinnedLink::from_pin(&path)
                .map_err(anyhow::Error::from)
                .and_then(|link| Ok(SchedClassifierLink::try_from(FdLink::from(link))?))
                .and_then(|link| Ok(program.attach_to_link(link)?))
                .and_then(|id| Ok(program.take_link(id)?));
            if replaced.is_ok() {
                return self.pins.keep_link(&path);
            }
            // Of a device that is gone and whose index is used again, or detached by somebody.
            remove(&path)?;
        }
        let path = self.new_pin(ifindex, Way::Link);
        let options = TcAttachOptions::TcxOrder(self.direction.order());
        let id = program.attach_with_options(name, self.direction.attach_type(), options)?;
        let link = FdLink::try_from(program.take_link(id)?)?;
        link.pin(&path).with_context(|| format!("pinning the link as {}", path.display()))?;
        Ok(())
    }

    fn attach_filter(&mut self, program: &mut SchedClassifier, ifindex: u32, name: &str) -> Result<()> {
        let path = self.pin(ifindex, Way::Filter);
        if self.attached.contains_key(&ifindex) {
            return Ok(());
        }
        if path.exists() {
            let replaced = filter(name, self.direction).and_then(|link| Ok(program.attach_to_link(link)?));
            if let Ok(id) = replaced {
                // The filter outlives the handle; that of the earlier program is the same.
                mem::forget(program.take_link(id)?);
                return self.pins.keep_link(&path);
            }
            remove(&path)?;
        }
        if let Err(error) = qdisc_add_clsact(name)
            && !is_there(&error)
        {
            return Err(error).with_context(|| format!("adding the queueing discipline clsact to {name}"));
        }
        let options = NlOptions { priority: PRIORITY, handle: HANDLE, classid: None };
        let direction = self.direction.attach_type();
        let id = if self.unsigned.remove(&ifindex) {
            program.attach_to_link(filter(name, self.direction)?)?
        } else {
            program.attach_with_options(name, direction, TcAttachOptions::Netlink(options))?
        };
        mem::forget(program.take_link(id)?);
        let path = self.new_pin(ifindex, Way::Filter);
        // The sign that the filter is ours, for whoever comes after us.
        program.pin(&path).with_context(|| format!("pinning the program as {}", path.display()))?;
        Ok(())
    }

    /// Detaches the program from all devices but these; also from those that an earlier agent has
    /// left it on.
    ///
    /// # Errors
    /// When a pin or a filter cannot be removed.
    pub fn keep_only(&mut self, wanted: &[u32]) -> Result<()> {
        self.attached.retain(|index, _| wanted.contains(index));
        for path in self.pins.all_links()? {
            let pin = path.file_name().and_then(|name| parse(&name.to_string_lossy()));
            let Some((ifindex, way, direction)) = pin else { continue };
            // One of the previous version that is there beside ours is not the one that is in use.
            let is_old = self.attached.contains_key(&ifindex) && self.pins.is_earlier(&path);
            if direction != self.direction
                || wanted.contains(&ifindex) && way == self.way_on(ifindex) && !is_old
            {
                continue;
            }
            if !is_old {
                detach_filter(&path);
            }
            remove(&path)?;
            info!(device = ifindex, "{} is detached", self.direction.purpose());
        }
        Ok(())
    }

    fn pin_name(&self, ifindex: u32, way: Way) -> String {
        format!("{ifindex}-{}", way.name(self.direction))
    }

    /// Where the pin is, if there is one.
    fn pin(&self, ifindex: u32, way: Way) -> PathBuf {
        self.pins.link(&self.pin_name(ifindex, way))
    }

    fn new_pin(&self, ifindex: u32, way: Way) -> PathBuf {
        self.pins.links().join(self.pin_name(ifindex, way))
    }
}

/// The filter of an earlier agent.
fn filter(name: &str, direction: Direction) -> Result<SchedClassifierLink> {
    Ok(SchedClassifierLink::attached(name, direction.attach_type(), PRIORITY, HANDLE, None)?)
}

/// Takes off the filter that a pin is the sign of; nothing if the pin is another's, as links go with
/// theirs.
pub(super) fn detach_filter(pin: &Path) {
    let parsed = pin.file_name().and_then(|name| parse(&name.to_string_lossy()));
    if let Some((ifindex, Way::Filter, direction)) = parsed
        && let Some(name) = device_name(ifindex)
    {
        // It is no error if somebody was faster.
        let _ = filter(&name, direction).map(|link| link.detach());
    }
}

/// Whether there is a queueing discipline already, of somebody else or of an earlier agent: it stays
/// when filters go, since others may have theirs there.
fn is_there(error: &(dyn Error + 'static)) -> bool {
    os_error(error) == Some(libc::EEXIST)
}

/// Whether the kernel does not know what it was asked for, as those without links for TC answer.
fn is_unknown(error: &(dyn Error + 'static)) -> bool {
    matches!(os_error(error), Some(libc::EINVAL | libc::EOPNOTSUPP))
}

fn os_error(error: &(dyn Error + 'static)) -> Option<i32> {
    let mut causes = std::iter::successors(Some(error), |error| Error::source(*error));
    causes.find_map(|cause| cause.downcast_ref::<io::Error>()?.raw_os_error())
}

fn remove(path: &Path) -> Result<()> {
    fs::remove_file(path).with_context(|| format!("removing the pin {}", path.display()))
}

/// The device of a pin, if it is one of these.
fn parse(file: &str) -> Option<(u32, Way, Direction)> {
    let (ifindex, name) = file.split_once('-')?;
    let mut all = Direction::ALL.into_iter().flat_map(|direction| Way::ALL.map(|way| (way, direction)));
    let (way, direction) = all.find(|(way, direction)| way.name(*direction) == name)?;
    Some((ifindex.parse().ok()?, way, direction))
}

/// The device of a pin in the directory of links, if it is of the datapath in TC.
pub(super) fn ingress_device(file: &str) -> Option<u32> {
    parse(file).filter(|(.., direction)| *direction == Direction::Ingress).map(|(index, ..)| index)
}

/// Whether a pin in the directory of links is one of these.
pub(super) fn is_classifier(file: &str) -> bool {
    parse(file).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_pins() {
        assert_eq!(parse("7-egress"), Some((7, Way::Link, Direction::Egress)));
        assert_eq!(parse("7-ingress"), Some((7, Way::Link, Direction::Ingress)));
        assert_eq!(parse("12-clsact"), Some((12, Way::Filter, Direction::Egress)));
        assert_eq!(parse("12-clsact_in"), Some((12, Way::Filter, Direction::Ingress)));
        assert_eq!(ingress_device("12-clsact_in"), Some(12));
        assert_eq!(ingress_device("12-clsact"), None);
        for other in ["7", "x-egress", "7-native", "-egress"] {
            assert!(!is_classifier(other), "{other}");
        }
    }
}
