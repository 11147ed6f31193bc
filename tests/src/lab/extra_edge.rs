//! One more edge node, for agents that share a cluster.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use super::{agent::Seat, netns::Namespace, registry, topology::Lab};

/// A node with a link device `uplink` that leads nowhere: an agent there can lead, and own
/// addresses, but gets no traffic. Removed when dropped.
#[derive(Debug)]
pub struct ExtraEdge {
    /// Its network.
    pub namespace: Namespace,
    directory: PathBuf,
    pins: PathBuf,
}

impl ExtraEdge {
    /// With a name that is unique in the lab, e.g. `edge2`.
    ///
    /// # Errors
    /// When not root, or the name is taken.
    pub fn new(lab: &Lab, role: &str) -> Result<Self> {
        let directory = lab.directory().join(role);
        let pins = Path::new(registry::BPF_DIR).join(format!("{}-{role}", lab.id()));
        registry::add_directory(&pins);
        let namespace = Namespace::new(lab.id(), role)?;
        let edge = Self { namespace, directory, pins };
        fs::create_dir(&edge.directory)
            .with_context(|| format!("cannot make {}", edge.directory.display()))?;
        // One end of a pair whose other end stays here, and up: so there is a carrier.
        edge.namespace.ip_batch(
            "link add uplink type veth peer name far\n link set far up\n link set uplink up
             addr add 10.2.0.9/24 dev uplink\n addr add fd02::9/64 dev uplink nodad",
        )?;
        Ok(edge)
    }

    /// For an agent.
    #[must_use]
    pub fn seat(&self) -> Seat<'_> {
        Seat { namespace: &self.namespace, directory: self.directory.clone(), pins: self.pins.clone() }
    }
}

impl Drop for ExtraEdge {
    fn drop(&mut self) {
        // Its directory goes with the lab's.
        registry::remove_directory(&self.pins);
    }
}
