//! The map `slots` of the previous version, where this one wants a larger map.
//!
//! A map keeps its size for life, so entries have to move. Of all maps this is the one that can: only
//! agents write it, and none does while an agent begins. Until that agent has attached its programs, it
//! writes nothing, so what old programs find in the old map stays true.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use aya::maps::{Array, Map, MapData};
use lb_common::abi::maps;

use super::{PinDirectory, batch};

/// The name that the new map has until it is complete. An agent that is killed before leaves one that
/// the next removes.
const UNFINISHED: &str = "slots_unfinished";

/// A larger map in the making.
pub struct Growth {
    from: PathBuf,
    unfinished: PathBuf,
    to: PathBuf,
}

impl Growth {
    /// Decides whether `slots` has to grow to `wanted` elements. If it is large enough, the previous
    /// version's is pinned in our directory, too; nothing to do if ours is there already.
    ///
    /// # Errors
    /// When a pin cannot be read, made or removed.
    pub fn begin(pins: &PinDirectory, wanted: u32) -> Result<Option<Self>> {
        let growth = Self {
            from: pins.previous_map(maps::SLOTS),
            unfinished: pins.path(UNFINISHED),
            to: pins.map(maps::SLOTS),
        };
        if growth.unfinished.exists() {
            fs::remove_file(&growth.unfinished)
                .with_context(|| format!("removing {}", growth.unfinished.display()))?;
        }
        if growth.to.exists() || !growth.from.exists() {
            return Ok(None);
        }
        let old = open(&growth.from)?;
        if old.info()?.max_entries() < wanted {
            return Ok(Some(growth));
        }
        old.pin(&growth.to).with_context(|| format!("pinning {}", growth.to.display()))?;
        Ok(None)
    }

    /// Where the new map is to be pinned when it is made.
    pub fn unfinished(&self) -> &Path {
        &self.unfinished
    }

    /// Copies the elements, and gives the map its name.
    ///
    /// # Errors
    /// When a map cannot be read or written.
    pub fn finish(self) -> Result<()> {
        use std::os::fd::AsFd;
        let old = open(&self.from)?;
        let all = batch::elements::<u32>(old.fd().as_fd(), 0, old.info()?.max_entries());
        let all = all.with_context(|| format!("reading {}", self.from.display()))?;
        let mut new: Array<MapData, u32> = Map::from_map_data(open(&self.unfinished)?)?.try_into()?;
        for (index, backend) in (0..).zip(all).filter(|(_, backend)| *backend != 0) {
            new.set(index, backend, 0).with_context(|| format!("writing {}", self.unfinished.display()))?;
        }
        fs::rename(&self.unfinished, &self.to).with_context(|| format!("naming {}", self.to.display()))
    }
}

/// Whether the programs of the previous version, as far as any are attached, read slots from a smaller
/// map than ours: then what we write there is not what they find.
///
/// # Errors
/// When a pin cannot be read.
pub fn are_slots_apart(pins: &PinDirectory) -> Result<bool> {
    let (old, new) = (pins.previous_map(maps::SLOTS), pins.map(maps::SLOTS));
    Ok(old.exists() && open(&old)?.info()?.id() != open(&new)?.info()?.id())
}

fn open(path: &Path) -> Result<MapData> {
    MapData::from_pin(path).with_context(|| format!("opening the pinned map {}", path.display()))
}
