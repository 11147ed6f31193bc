//! Whether addresses were taken off the edge in the meantime.

use std::{
    fs::{self, File},
    path::PathBuf,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use pointsman_tests::{
    cluster_world::ClusterWorld,
    lab::{Process, wait_for},
};

/// `ip monitor address` on the edge.
pub struct AddressWatch<'a> {
    world: &'a ClusterWorld,
    path: PathBuf,
    _process: Process,
}

impl<'a> AddressWatch<'a> {
    /// From now on.
    pub fn start(world: &'a ClusterWorld) -> Result<Self> {
        let path = world.lab.directory().join("addresses.log");
        let file = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
        let mut command = Command::new("ip");
        command.args(["-o", "monitor", "address"]).stdin(Stdio::null()).stdout(file);
        let process = world.lab.edge.spawn(&mut command)?;
        let watch = Self { world, path, _process: process };
        watch.wait_mark("127.0.0.101")?;
        Ok(watch)
    }

    /// Waits until everything up to now has been seen.
    fn wait_mark(&self, mark: &str) -> Result<()> {
        let mark_of = |what| self.world.lab.edge.run(["ip", "addr", what, mark, "dev", "lo"]);
        wait_for("ip monitor", || {
            mark_of("add")?;
            mark_of("del")?;
            Ok(self.text()?.contains(mark).then_some(()))
        })
    }

    fn text(&self) -> Result<String> {
        fs::read_to_string(&self.path).context("the log of addresses")
    }

    /// Fails when a VIP was taken off since the start.
    pub fn none_left(self) -> Result<()> {
        self.wait_mark("127.0.0.102")?;
        let text = self.text()?;
        let is_vip = |line: &str| line.contains(" 192.0.2.") || line.contains(" 2001:db8:1:");
        let gone: Vec<_> = text.lines().filter(|line| line.starts_with("Deleted") && is_vip(line)).collect();
        ensure!(gone.is_empty(), "{gone:#?}");
        Ok(())
    }
}
