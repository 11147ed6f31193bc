//! Where the programs are attached, and what follows from it for the ways to backends.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use anyhow::{Result, anyhow};
use tracing::debug;

use super::Agent;
use crate::app::trouble::Area;
use crate::dataplane::{Direction, Mode, are_slots_apart, device_name};
use crate::model::Problem;
use crate::net::forwarding;
use crate::net::way::Resolution;
use crate::plan::Path;

impl Agent {
    /// Whether the ways to some backends are by devices that no program is attached to yet.
    pub(super) fn needs_hooks(&self, backends: &BTreeSet<IpAddr>) -> bool {
        backends.iter().filter_map(|backend| self.next_hops.way(backend)).any(|found| {
            let device = found.device.as_ref().map(|(index, _)| *index);
            device.is_some_and(|index| self.devices.mode(index).is_none())
                || found.is_local && self.exits.attached().next().is_none()
        })
    }

    /// Takes over the ways to backends.
    pub(super) fn take_paths<'a>(&mut self, backends: impl IntoIterator<Item = &'a IpAddr>) {
        // By the way, which backends behind the same gateway share.
        let mut known: HashMap<(*const Resolution, bool), Arc<Path>> = HashMap::new();
        for backend in backends {
            match self.next_hops.way(backend) {
                Some(found) => {
                    let new = || Arc::new(self.path(*backend, found));
                    let path = known.entry((Arc::as_ptr(found), backend.is_ipv6())).or_insert_with(new);
                    self.paths.insert(*backend, Arc::clone(path));
                }
                None => drop(self.paths.remove(backend)),
            }
        }
    }

    /// The way to a backend for the compiler.
    fn path(&self, backend: IpAddr, found: &Resolution) -> Path {
        let chosen = self.settings.snat_addresses.iter().filter(|one| one.is_ipv4() == backend.is_ipv4());
        let mut snat: Vec<_> = chosen.copied().collect();
        if snat.is_empty() {
            // Not `extend`, which makes room for four: there is one of these for each backend.
            snat = found.source.into_iter().collect();
        }
        let mode = found.device.as_ref().and_then(|(index, _)| self.devices.mode(*index));
        let is_for_tc = mode == Some(Mode::Tc);
        Path { next_hop: found.next_hop, snat, is_local: found.is_local, mtu: found.mtu, is_for_tc }
    }

    /// Attaches the datapath wherever packets of clients or backends come in. Gives the backends behind
    /// devices where it is attached otherwise than before.
    pub(super) fn attach(&mut self) -> BTreeSet<IpAddr> {
        self.trouble.clear(Area::Devices);
        let links = self.next_hops.links();
        let link = links.values().find(|link| link.name == self.settings.link_device);
        self.config.client_mtu = link.and_then(|link| u16::try_from(link.mtu).ok()).unwrap_or_default();
        // Before other programs: those of TC are loaded when they are first needed.
        self.config.syn_cookies = self.load_cookies().raw();
        let wanted = self.devices_in_use();
        let before = self.modes();
        for (index, name) in &wanted {
            if let Err(error) = self.attach_one(*index, name) {
                self.fail(Area::Devices, name, &error);
            }
        }
        let modes = self.modes();
        // What XDP cannot send by devices of the other kind, TC can.
        let is_mixed = wanted.keys().any(|index| modes.get(index) == Some(&Mode::Tc))
            && wanted.keys().any(|index| modes.get(index).is_some_and(|mode| *mode != Mode::Tc));
        let complemented = is_mixed && {
            let done = self.devices.complement(&mut self.programs);
            done.inspect_err(|error| self.fail(Area::Devices, "TC beside XDP", error)).is_ok()
        };
        self.config.has_tc = complemented.into();
        self.attach_exits(&wanted);
        self.leave_devices(&wanted);
        self.backends_behind(|index| before.get(&index) != modes.get(&index))
    }

    /// Whether nothing may be written, since a program of the previous version would misread it: one that
    /// could not be replaced, and that has its slots in a smaller map.
    pub(super) fn must_wait(&mut self) -> bool {
        let found = self.devices.unreplaced().and_then(|left| {
            let is_read = !left.is_empty() && are_slots_apart(&self.pins)?;
            Ok(is_read.then_some(left))
        });
        let error = match found {
            Ok(None) => return false,
            Ok(Some(left)) => {
                let name = |index: &u32| device_name(*index).unwrap_or_else(|| index.to_string());
                let names: Vec<_> = left.iter().map(name).collect();
                anyhow!(
                    "programs of an earlier agent are still attached to {} and cannot be replaced: they go on with \
                     what they have, and no change of a Service is taken into use before that works",
                    names.join(", ")
                )
            }
            Err(error) => error,
        };
        self.trouble.clear(Area::Maps);
        self.fail(Area::Maps, "upgrade", &error);
        true
    }

    fn modes(&self) -> BTreeMap<u32, Mode> {
        self.devices.attached().map(|found| (found.ifindex, found.mode)).collect()
    }

    fn backends_behind(&self, device: impl Fn(u32) -> bool) -> BTreeSet<IpAddr> {
        let behind = |found: &Resolution| found.device.as_ref().is_some_and(|(index, _)| device(*index));
        self.next_hops.ways().filter(|(_, found)| behind(found)).map(|(backend, _)| *backend).collect()
    }

    /// The devices of clients and backends, by index.
    fn devices_in_use(&mut self) -> BTreeMap<u32, String> {
        let mut wanted = BTreeMap::new();
        let link = self.next_hops.links().iter().find(|(_, link)| link.name == self.settings.link_device);
        match link {
            // Frames of a VLAN device come in by the one below.
            Some((index, link)) => {
                let below = link.vlan.and(link.parent);
                let index = below.unwrap_or(*index);
                if let Some(link) = self.next_hops.links().get(&index) {
                    wanted.insert(index, link.name.clone());
                }
            }
            None => {
                let error = anyhow::anyhow!(
                    "the link device {} is gone; its VIPs come back with it",
                    self.settings.link_device
                );
                self.fail(Area::Devices, "device", &error);
            }
        }
        for (_, found) in self.next_hops.ways() {
            // Whether or not the next hop is known right now: replies of connections come in by it.
            if let Some((index, name)) = &found.device
                && !wanted.contains_key(index)
            {
                wanted.insert(*index, name.clone());
            }
        }
        wanted
    }

    /// Detaches the datapath from all devices that are not wanted any more.
    fn leave_devices(&mut self, wanted: &BTreeMap<u32, String>) {
        let gone: Vec<_> = self
            .devices
            .attached()
            .map(|found| found.ifindex)
            .filter(|index| !wanted.contains_key(index))
            .collect();
        for index in gone {
            if let Err(error) = self.maps.forbid_device(index) {
                self.fail(Area::Devices, "devices", &error);
            }
        }
        let keep: Vec<_> = wanted.keys().copied().collect();
        if let Err(error) = self.devices.keep_only(&keep) {
            self.fail(Area::Devices, "devices", &error);
        }
    }

    /// Attaches the program for replies of backends on this node wherever they may leave it, as long
    /// as there are such backends: it costs every packet that leaves a look into the flow table.
    fn attach_exits(&mut self, devices: &BTreeMap<u32, String>) {
        if !self.next_hops.has_local() {
            return;
        }
        for (index, name) in devices {
            let program = self.programs.egress_program();
            if let Err(error) = program.and_then(|program| self.exits.attach(program, *index, name)) {
                self.fail(Area::Devices, name, &error);
            }
        }
        let keep: Vec<_> = devices.keys().copied().collect();
        if let Err(error) = self.exits.keep_only(&keep) {
            self.fail(Area::Devices, "devices", &error);
        }
        let families = self.next_hops.families_behind_devices();
        let missing: Vec<_> = families.into_iter().filter_map(forwarding::missing).collect();
        self.trouble.extend(Area::Devices, missing.into_iter().map(Problem::warning));
    }

    /// Takes TC off beside XDP, and the program for replies, once the maps rely on neither any more.
    pub(super) fn leave_exits(&mut self) {
        if !self.maps_incomplete
            && self.config.has_tc == 0
            && let Err(error) = self.devices.leave_complement()
        {
            self.fail(Area::Devices, "devices", &error);
        }
        if !self.maps_incomplete
            && !self.next_hops.has_local()
            && let Err(error) = self.exits.keep_only(&[])
        {
            self.fail(Area::Devices, "devices", &error);
        }
    }

    /// Attaches the programs for sockets as long as there are VIPs, once the maps know them.
    ///
    /// What fails is tried again by the resync: nothing else waits for it.
    pub(super) fn attach_sockets(&mut self) {
        let wanted = !self.planner.plan().desired.vips.is_empty();
        if !self.sockets.differ(wanted) {
            return;
        }
        self.trouble.clear(Area::Sockets);
        let done = if wanted { self.sockets.attach(&mut self.programs) } else { self.sockets.leave() };
        if let Err(error) = done {
            let problem = format!("VIPs cannot be reached from this node itself: {error:#}");
            self.trouble.extend(Area::Sockets, [Problem::warning(problem)]);
        }
    }

    /// Looks for our filters of TC, where there are no links (before Linux 6.6): what somebody has taken
    /// away is attached anew with the others, and what an agent has left that was killed is replaced.
    pub(super) async fn find_filters(&mut self) {
        if !self.exits.uses_filters() {
            return;
        }
        let wanted = self.devices_in_use();
        for classifiers in [self.devices.classifiers(), &mut self.exits] {
            let attached: BTreeSet<_> = classifiers.attached().map(|(index, _)| index).collect();
            let leaving = classifiers.direction() == Direction::Egress;
            for index in attached.iter().chain(wanted.keys().filter(|index| !attached.contains(index))) {
                match self.network.filters(*index, leaving).await {
                    Ok(found) if attached.contains(index) => {
                        let found = found.into_iter().map(|filter| (filter.priority, filter.handle));
                        classifiers.forget_missing(*index, found);
                    }
                    Ok(found) => {
                        let found =
                            found.into_iter().map(|filter| (filter.priority, filter.handle, filter.name));
                        classifiers.find_unsigned(*index, found);
                    }
                    // A device that is gone is noticed elsewhere.
                    Err(error) => debug!("{error:#}"),
                }
            }
        }
    }

    /// Removes the pins of the previous layout version when its programs are replaced. Not right after:
    /// a packet that is under way may still call one of them.
    pub(super) fn retire_previous(&mut self) {
        if let Err(error) = self.pins.retire_previous() {
            self.fail(Area::Devices, "pins of the previous version", &error);
        }
    }

    fn attach_one(&mut self, index: u32, name: &str) -> Result<()> {
        let on_device = self.next_hops.links().get(&index).and_then(|link| link.xdp_program);
        self.devices.check(index, on_device);
        // Redirection first: the program may need it with the first packet.
        self.maps.allow_device(index)?;
        let mode = self.devices.attach(&mut self.programs, index, name)?.mode;
        if mode == Mode::Tc {
            // XDP cannot send by it, whatever the routes say.
            self.maps.forbid_device(index)?;
        }
        Ok(())
    }
}
