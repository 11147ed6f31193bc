//! What the agent has in the kernel: programs, maps, and where they are attached.

use anyhow::Result;
use lb_common::abi::Config;
use tracing::warn;

use crate::app::start::{Loaded, first_config, load};
use crate::app::{DatapathPolicy, Settings};
use crate::dataplane::{
    Classifiers, Devices, Direction, Kernel as Programs, KernelMaps, PinDirectory, PinLock, SocketHooks,
};
use crate::plan::{Compiler, CookiePhase};

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
    ) -> Result<(Option<Self>, Begin, Option<String>)> {
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
            Err(error) => return Ok((None, without, Some(no_kernel(&error)))),
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
                Ok((None, without, Some(no_kernel(&error))))
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

/// Why the proxy serves a node whose kernel cannot.
fn no_kernel(error: &anyhow::Error) -> String {
    format!("this kernel cannot forward: {error:#}; `pointsman doctor` says what it lacks")
}
