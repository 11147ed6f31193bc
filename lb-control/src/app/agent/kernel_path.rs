//! What the agent has in the kernel: programs, maps, and where they are attached.

use std::time::Duration;

use anyhow::Result;
use lb_common::abi::Config;
use tokio::time::Instant;
use tracing::{info, warn};

use super::Agent;
use crate::app::start::{Loaded, first_config, load};
use crate::app::{DatapathPolicy, Settings};
use crate::dataplane::{
    Classifiers, Devices, Direction, Kernel as Programs, KernelMaps, PinDirectory, PinLock, SocketHooks,
    linked_devices,
};
use crate::plan::{Compiler, CookiePhase, Leaving};

/// How soon the kernel is tried again that could not forward. Each time later, up to [`LATEST`]: what lacks
/// may come soon after a node's start, and a trial may load programs.
const SOONEST: Duration = Duration::from_secs(10);
const LATEST: Duration = Duration::from_secs(600);

/// Programs and maps, and who keeps them.
pub(super) struct KernelPath {
    pub(super) pins: PinDirectory,
    /// Keeps other agents away from the pins.
    pub(super) lock: PinLock,
    pub(super) programs: Programs,
    pub(super) maps: KernelMaps,
    pub(super) devices: Devices,
    pub(super) exits: Classifiers,
    pub(super) sockets: SocketHooks,
    pub(super) compiler: Compiler,
}

/// The settings of the datapath to begin with.
pub(super) struct Begin {
    pub(super) config: Config,
    pub(super) cookies: CookiePhase,
}

impl KernelPath {
    /// What the node has in the kernel to begin with, if anything; and why nothing, if it should.
    ///
    /// The proxy alone needs nothing there, unless an earlier agent has left connections.
    ///
    /// # Errors
    /// When the kernel refuses what only it can do, an earlier agent is at work, or a setting is no good.
    pub(super) fn begin(
        pins: &PinDirectory,
        settings: &Settings,
    ) -> Result<(Option<Self>, Begin, Option<NoKernel>)> {
        // Before anything is touched.
        let without = Begin { config: first_config(settings, None)?, cookies: CookiePhase::Off };
        let has_left = pins.has_left();
        if settings.datapath == DatapathPolicy::Proxy && !has_left {
            return Ok((None, without, None));
        }
        let lock = match pins.occupy() {
            Ok(lock) => lock,
            // What others hold, or have left, is nothing that a proxy could take the place of.
            Err(error) if settings.datapath != DatapathPolicy::Auto || has_left || pins.is_prepared() => {
                return Err(error);
            }
            Err(error) => return Ok((None, without, Some(NoKernel::new(&error)))),
        };
        match Self::start(lock, pins, settings) {
            Ok((path, begin)) => Ok((Some(path), begin, None)),
            // Programs that an earlier agent has left go on with what they have.
            Err(error) if has_left => Err(error),
            Err(error) => {
                // Not only here: the next agent, which may be told to choose, would take it for an earlier one's.
                if let Err(error) = pins.remove() {
                    warn!("{error:#}");
                }
                if settings.datapath != DatapathPolicy::Auto {
                    return Err(error);
                }
                Ok((None, without, Some(NoKernel::new(&error))))
            }
        }
    }

    /// Loads the programs and adopts what an earlier agent has left. Nothing is attached or removed yet.
    fn start(lock: PinLock, pins: &PinDirectory, settings: &Settings) -> Result<(Self, Begin)> {
        let loaded = load(pins, settings).inspect_err(|_| {
            if let Err(error) = lock.give_back() {
                warn!("{error:#}");
            }
        });
        let Loaded { programs, maps, compiler, config, cookies } = loaded?;
        let path = Self {
            pins: pins.clone(),
            lock,
            programs,
            maps,
            devices: Devices::new(pins.clone(), settings.datapath.mode()),
            exits: Classifiers::new(pins.clone(), Direction::Egress),
            sockets: SocketHooks::new(pins.clone(), settings.cgroup.clone()),
            compiler,
        };
        Ok((path, Begin { config, cookies }))
    }

    /// Adds the devices that an earlier agent has left attached: old connections may need them, whatever leads
    /// by them now.
    ///
    /// # Errors
    /// When the pins cannot be read.
    pub(super) fn adopt_devices(&self, mut known: Leaving) -> Result<Leaving> {
        let left = linked_devices(&self.pins)?.into_iter();
        left.filter_map(|device| device.name).for_each(|name| known.adopt(name));
        Ok(known)
    }

    /// Whether the program for replies of backends on this node is attached anywhere.
    pub(super) fn has_exits(&self) -> bool {
        self.exits.attached().next().is_some()
    }

    /// Takes the programs off everywhere. Gives what went wrong; the rest is done all the same.
    pub(super) fn detach(&mut self) -> Vec<anyhow::Error> {
        let done = [self.devices.keep_only(&[]), self.exits.keep_only(&[]), self.sockets.leave()];
        done.into_iter().filter_map(Result::err).collect()
    }
}

/// That the proxy serves a node because its kernel cannot.
#[derive(Debug)]
pub(super) struct NoKernel {
    /// Why, for people.
    pub(super) why: String,
    look_at: Instant,
    pause: Duration,
}

impl NoKernel {
    fn new(error: &anyhow::Error) -> Self {
        let why = format!("this kernel cannot forward: {error:#}; `pointsman doctor` says what it lacks");
        Self { why, look_at: Instant::now() + SOONEST, pause: SOONEST }
    }

    /// After the kernel was tried once more.
    fn still(&mut self, other: Self) {
        let pause = (self.pause * 2).min(LATEST);
        *self = Self { look_at: Instant::now() + pause, pause, ..other };
    }
}

impl Agent {
    /// When to call [`Self::try_kernel`].
    pub fn try_kernel_at(&self) -> Option<Instant> {
        self.proxied.no_kernel.as_ref().map(|no_kernel| no_kernel.look_at)
    }

    /// Looks again whether the kernel can forward by now: its file system for pins may have been mounted
    /// since, or memory may be free. If it can, it takes over from the proxy.
    pub async fn try_kernel(&mut self) {
        let pins = PinDirectory::new(&self.settings.pin_directory);
        // Verifying programs may take seconds.
        let found = tokio::task::block_in_place(|| {
            let (kernel, begin, now) = KernelPath::begin(&pins, &self.settings)?;
            let leaving =
                kernel.as_ref().map(|kernel| kernel.adopt_devices(self.leaving.clone())).transpose()?;
            Ok((kernel.zip(leaving), begin, now))
        });
        let Some(before) = &mut self.proxied.no_kernel else { return };
        let now = match found {
            Ok((Some((kernel, leaving)), Begin { config, cookies }, _)) => {
                info!("the kernel takes the programs by now");
                self.proxied.no_kernel = None;
                self.leaving = leaving;
                (self.kernel, self.config, self.cookies) = (Some(kernel), config, cookies);
                return self.retry().await;
            }
            Ok((None, _, now)) => now,
            Err(error) => Some(NoKernel::new(&error)),
        };
        let Some(now) = now else { return };
        let is_news = now.why != before.why;
        before.still(now);
        if is_news {
            info!("the userspace proxy still serves: {}", before.why);
            self.decide_proxied();
            self.publish();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_is_tried_at_growing_intervals() {
        let mut no_kernel = NoKernel::new(&anyhow::anyhow!("no file system"));
        assert!(no_kernel.why.contains("no file system"));
        let mut pauses = vec![no_kernel.pause.as_secs()];
        for _ in 0..7 {
            no_kernel.still(NoKernel::new(&anyhow::anyhow!("no right")));
            assert!(no_kernel.look_at <= Instant::now() + no_kernel.pause);
            pauses.push(no_kernel.pause.as_secs());
        }
        assert_eq!(pauses, [10, 20, 40, 80, 160, 320, 600, 600]);
        assert!(no_kernel.why.contains("no right"));
    }
}
