//! What the maps hold, seen from outside.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
    path::Path,
};

use anyhow::{Context, Result};
use aya::maps::{Array, Map, MapData};
use lb_common::abi::{BackendState, Service, maps};
use lb_control::{
    dataplane::{KernelMaps, PinDirectory},
    ports::MapStore,
};

use super::Scale;

/// The pinned maps.
pub struct Datapath {
    all: KernelMaps,
    services: Array<MapData, Service>,
    slots: Array<MapData, u32>,
}

impl Datapath {
    /// Opens them.
    ///
    /// # Errors
    /// When they are not there.
    pub fn open(pins: &Path) -> Result<Self> {
        let pins = PinDirectory::new(pins);
        let open = |map: maps::Map| -> Result<Map> {
            let data = MapData::from_pin(pins.map(map)).with_context(|| map.name)?;
            Ok(Map::Array(data))
        };
        Ok(Self {
            services: Array::try_from(open(maps::SERVICES)?)?,
            slots: Array::try_from(open(maps::SLOTS)?)?,
            all: KernelMaps::from_pins(&pins)?,
        })
    }

    /// Whether every Service has its entry, and every endpoint a backend that can be sent to.
    ///
    /// # Errors
    /// When a map cannot be read.
    pub fn is_complete(&self, scale: Scale) -> Result<bool> {
        // The cheap question first: this is asked again and again.
        if self.all.vips()?.len() < scale.services as usize {
            return Ok(false);
        }
        let usable = self.all.backends()?.into_iter().filter(|(_, backend)| {
            BackendState::from_raw(backend.state) == BackendState::Active && backend.next_hop.ifindex != 0
        });
        if usable.count() < scale.backends() {
            return Ok(false);
        }
        let slots: usize = self.all.services()?.iter().map(|(_, entry)| entry.slot_count() as usize).sum();
        Ok(slots >= scale.backends())
    }

    /// The index of the Service entry of each VIP.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn entries(&self) -> Result<BTreeMap<IpAddr, u32>> {
        Ok(self.all.vips()?.into_iter().map(|(vip, index)| (vip.socket().ip(), index)).collect())
    }

    /// Whether a Service entry leads to a backend.
    ///
    /// # Errors
    /// When a map cannot be read.
    pub fn has_backend(&self, entry: u32, address: Ipv4Addr) -> Result<bool> {
        let service = self.services.get(&entry, 0)?;
        for slot in service.first_slot..service.first_slot + service.slot_count() {
            let backend = self.all.backend(self.slots.get(&slot, 0)?)?;
            if backend.address[..4] == address.octets() && backend.next_hop.ifindex != 0 {
                return Ok(true);
            }
        }
        Ok(false)
    }
}
