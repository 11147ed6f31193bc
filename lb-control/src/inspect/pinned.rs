//! What the pinned maps tell while no agent runs.

use anyhow::{Result, bail};
use lb_common::abi::Config;

use super::{flow_views, service_refs, service_views, traffic};
use crate::dataplane::flows::FlowTables;
use crate::dataplane::{KernelMaps, PinDirectory, clock, device_name, linked_devices};
use crate::http::Inspect;
use crate::plan::CookiePhase;
use crate::ports::MapStore;
use crate::view::{DeviceView, DropView, DropsView, FlowView, StatusView};

/// The pinned maps; opened anew for each question, so that nothing stale is told.
#[derive(Clone, Debug)]
pub struct PinnedMaps {
    pins: PinDirectory,
}

impl PinnedMaps {
    /// Names the pins; nothing is opened.
    #[must_use]
    pub fn new(pins: PinDirectory) -> Self {
        Self { pins }
    }

    /// Whether maps are pinned: the proxy does without.
    #[must_use]
    pub fn is_there(&self) -> bool {
        self.pins.is_populated()
    }

    fn maps(&self) -> Result<KernelMaps> {
        self.require()?;
        KernelMaps::from_pins(&self.pins)
    }

    fn require(&self) -> Result<()> {
        if !nix::unistd::geteuid().is_root() && !self.pins.is_populated() {
            bail!(
                "nothing can be seen in {}: run as root, or choose the agent's --pin-dir",
                self.pins.display()
            );
        }
        if !self.pins.is_populated() {
            bail!(
                "no maps are pinned in {}: `pointsman run` has not run here, or took its maps down when it ended",
                self.pins.display()
            );
        }
        Ok(())
    }
}

impl Inspect for PinnedMaps {
    fn status(&self) -> Result<StatusView> {
        let maps = self.maps()?;
        Ok(StatusView {
            agent: None,
            devices: device_views(&self.pins)?,
            flow_tables: Vec::new(),
            syn_cookies: syn_cookies(maps.config()?).to_owned(),
            services: service_views(&maps, &traffic(&maps)?, &device_name)?,
            problems: Vec::new(),
        })
    }

    fn flows(&self) -> Result<Vec<FlowView>> {
        let names = service_refs(&self.maps()?.service_names()?);
        let records = FlowTables::open(&self.pins)?.all()?;
        Ok(flow_views(records, &names, clock::now()))
    }

    fn drops(&self) -> Result<Vec<DropView>> {
        drop_views(&self.maps()?)
    }

    /// Packets are forwarded by what the last agent has set up, as far as it has.
    fn ready(&self) -> bool {
        self.pins.is_populated() && linked_devices(&self.pins).is_ok_and(|devices| !devices.is_empty())
    }
}

/// What the datapath does about SYN cookies, as [`StatusView::syn_cookies`] has it.
fn syn_cookies(config: Option<Config>) -> &'static str {
    match config.map_or(CookiePhase::Off, |config| CookiePhase::from_raw(config.syn_cookies)) {
        CookiePhase::Off => "",
        CookiePhase::Accept => "accept",
        CookiePhase::Answer => "answer",
    }
}

/// The devices that carry the datapath, by their pinned links.
///
/// # Errors
/// When the pins cannot be read.
pub fn device_views(pins: &PinDirectory) -> Result<Vec<DeviceView>> {
    let devices = linked_devices(pins)?.into_iter().map(|device| DeviceView {
        device: device.name.unwrap_or_else(|| format!("device {} (gone)", device.ifindex)),
        mode: device.mode.view(),
        reason: None,
        program_id: device.program_id,
    });
    Ok(devices.collect())
}

/// All drop reasons with their counters.
///
/// # Errors
/// When the map cannot be read.
pub fn drop_views(maps: &KernelMaps) -> Result<Vec<DropView>> {
    Ok(maps.drops()?.into_iter().collect::<DropsView>().drops)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_pins_the_way_out_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let maps = PinnedMaps::new(PinDirectory::new(directory.path()));
        for error in [maps.status().err(), maps.flows().err(), maps.drops().err()] {
            let text = error.unwrap().to_string();
            assert!(text.contains(directory.path().to_str().unwrap()), "{text}");
            assert!(text.contains("pointsman run") || text.contains("root"), "{text}");
        }
        assert!(!maps.ready());
    }
}
