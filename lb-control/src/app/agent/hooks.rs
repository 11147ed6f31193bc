//! Where the programs are attached, and what follows from it for the ways to backends.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use anyhow::{Result, anyhow, bail};
use tracing::{debug, info};

use super::Agent;
use super::kernel_path::KernelPath;
use crate::app::trouble::Area;
use crate::dataplane::{Direction, Mode, are_slots_apart, device_name};
use crate::model::Problem;
use crate::net::forwarding;
use crate::net::way::Resolution;
use crate::plan::Path;

impl Agent {
    /// Whether the ways to some backends are by devices that no program is attached to yet.
    pub(super) fn needs_hooks(&self, backends: &BTreeSet<IpAddr>) -> bool {
        let Some(kernel) = &self.kernel else { return false };
        backends.iter().filter_map(|backend| self.next_hops.way(backend)).any(|found| {
            let device = found.device.as_ref().map(|(index, _)| *index);
            device.is_some_and(|index| kernel.devices.mode(index).is_none())
                || found.is_local && !kernel.has_exits()
        })
    }

    /// Takes over the ways to backends.
    pub(super) fn take_paths<'a>(&mut self, backends: impl IntoIterator<Item = &'a IpAddr>) {
        // By the way, which backends behind the same gateway share.
        let mut known: HashMap<(*const Resolution, bool), Arc<Path>> = HashMap::new();
        let mut given = Vec::new();
        for backend in backends {
            match self.next_hops.way(backend) {
                Some(found) => {
                    let new = || {
                        let path = self.path(*backend, found);
                        if let Some((_, device)) = &found.device {
                            given.push((device.clone(), path.snat.clone()));
                        }
                        Arc::new(path)
                    };
                    let path = known.entry((Arc::as_ptr(found), backend.is_ipv6())).or_insert_with(new);
                    self.paths.insert(*backend, Arc::clone(path));
                }
                None => drop(self.paths.remove(backend)),
            }
        }
        for (device, sources) in given {
            self.leaving.give(&device, &sources);
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
        let mode = found.device.as_ref().and_then(|(index, _)| self.mode(*index));
        let is_for_tc = mode == Some(Mode::Tc);
        Path { next_hop: found.next_hop, snat, is_local: found.is_local, mtu: found.mtu, is_for_tc }
    }

    /// Attaches the datapath wherever packets of clients or backends come in. Gives the backends behind
    /// devices where it is attached otherwise than before.
    pub(super) fn attach(&mut self) -> BTreeSet<IpAddr> {
        self.trouble.clear(Area::Devices);
        let links = self.next_hops.links();
        let mtus = links.values().filter(|link| self.settings.is_of_clients(&link.name)).map(|link| link.mtu);
        self.config.client_mtu = mtus.min().and_then(|mtu| u16::try_from(mtu).ok()).unwrap_or_default();
        let gone = self.settings.client_devices.iter().filter(|name| self.index_of(name).is_none());
        let gone = gone.map(|name| {
            format!("the client device {name} is gone: who comes in by it is not served until it is back")
        });
        let gone: Vec<_> = gone.map(Problem::warning).collect();
        self.trouble.extend(Area::Devices, gone);
        // Before other programs: those of TC are loaded when they are first needed.
        self.config.syn_cookies = self.load_cookies().raw();
        let wanted = self.look_at_devices();
        let before = self.modes();
        let Some(mut kernel) = self.kernel.take() else { return BTreeSet::new() };
        let link = self.link_index();
        for (index, name) in &wanted {
            let is_link = Some(*index) == link;
            if is_link && !self.proxied.may_attach(*index) {
                self.leave_to_proxy(name, *index, None);
                continue;
            }
            match self.attach_one(&mut kernel, *index, name) {
                Err(error) if is_link && self.settings.datapath.mode().is_none() => {
                    self.leave_to_proxy(name, *index, Some(&error));
                }
                Err(error) => self.fail(Area::Devices, name, &error),
                Ok(()) if is_link => self.proxied.link_refused = None,
                Ok(()) => {}
            }
        }
        let modes = modes(&kernel);
        // What XDP cannot send by devices of the other kind, TC can.
        let is_mixed = wanted.keys().any(|index| modes.get(index) == Some(&Mode::Tc))
            && wanted.keys().any(|index| modes.get(index).is_some_and(|mode| *mode != Mode::Tc));
        let complemented = is_mixed && {
            let done = kernel.devices.complement(&mut kernel.programs);
            done.inspect_err(|error| self.fail(Area::Devices, "TC beside XDP", error)).is_ok()
        };
        self.config.has_tc = complemented.into();
        self.attach_exits(&mut kernel, &wanted);
        self.leave_devices(&mut kernel, &wanted);
        self.kernel = Some(kernel);
        self.backends_behind(|index| before.get(&index) != modes.get(&index))
    }

    /// The device that frames of the link device come in by: those of a VLAN device by the one below.
    pub(super) fn link_index(&self) -> Option<u32> {
        self.index_of(&self.settings.link_device)
    }

    fn index_of(&self, name: &str) -> Option<u32> {
        let (index, link) = self.next_hops.links().iter().find(|(_, link)| link.name == name)?;
        Some(link.vlan.and(link.parent).unwrap_or(*index))
    }

    /// Whether nothing may be written, since a program of the previous version would misread it: one that
    /// could not be replaced, and that has its slots in a smaller map.
    pub(super) fn must_wait(&mut self) -> bool {
        let Some(kernel) = &self.kernel else { return false };
        let found = kernel.devices.unreplaced().and_then(|left| {
            let is_read = !left.is_empty() && are_slots_apart(&kernel.pins)?;
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

    /// How the datapath is attached to a device, if it is.
    pub(super) fn mode(&self, index: u32) -> Option<Mode> {
        self.kernel.as_ref()?.devices.mode(index)
    }

    fn modes(&self) -> BTreeMap<u32, Mode> {
        self.kernel.as_ref().map(modes).unwrap_or_default()
    }

    fn backends_behind(&self, device: impl Fn(u32) -> bool) -> BTreeSet<IpAddr> {
        let behind = |found: &Resolution| found.device.as_ref().is_some_and(|(index, _)| device(*index));
        self.next_hops.ways().filter(|(_, found)| behind(found)).map(|(backend, _)| *backend).collect()
    }

    /// Decides which devices are to have the datapath, by index: see [`Self::devices_wanted`].
    fn look_at_devices(&mut self) -> BTreeMap<u32, String> {
        if self.link_index().is_none() {
            let error =
                anyhow!("the link device {} is gone; its VIPs come back with it", self.settings.link_device);
            self.fail(Area::Devices, "device", &error);
        }
        let in_use = self.devices_in_use();
        for device in self.leaving.look(&in_use.values().map(String::as_str).collect()) {
            info!(device, "no backend is behind it any more; it is left once no connection needs it");
        }
        self.devices_wanted()
    }

    /// The devices of clients and backends, and those by which replies may still come in.
    fn devices_wanted(&self) -> BTreeMap<u32, String> {
        let mut wanted = self.devices_in_use();
        let kept = self.next_hops.links().iter().filter(|(_, link)| self.leaving.keeps(&link.name));
        wanted.extend(kept.map(|(index, link)| (*index, link.name.clone())));
        wanted
    }

    /// The devices of clients and backends, by index.
    fn devices_in_use(&self) -> BTreeMap<u32, String> {
        let mut wanted = BTreeMap::new();
        if let Some(index) = self.link_index()
            && let Some(link) = self.next_hops.links().get(&index)
        {
            wanted.insert(index, link.name.clone());
        }
        for index in self.settings.client_devices.iter().filter_map(|name| self.index_of(name)) {
            if let Some(link) = self.next_hops.links().get(&index) {
                wanted.insert(index, link.name.clone());
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

    /// Detaches the datapath from devices by which nothing comes in any more.
    pub(super) fn leave_unused(&mut self) {
        let wanted = self.devices_wanted();
        let Some(mut kernel) = self.kernel.take() else { return };
        self.leave_devices(&mut kernel, &wanted);
        let keep: Vec<_> = self.exits_wanted(&wanted).into_keys().collect();
        if let Err(error) = kernel.exits.keep_only(&keep) {
            self.fail(Area::Devices, "devices", &error);
        }
        self.kernel = Some(kernel);
    }

    /// Detaches the datapath from all devices that are not wanted any more.
    fn leave_devices(&mut self, kernel: &mut KernelPath, wanted: &BTreeMap<u32, String>) {
        let gone: Vec<_> = kernel
            .devices
            .attached()
            .map(|found| found.ifindex)
            .filter(|index| !wanted.contains_key(index))
            .collect();
        for index in gone {
            if let Err(error) = kernel.maps.forbid_device(index) {
                self.fail(Area::Devices, "devices", &error);
            }
        }
        let keep: Vec<_> = wanted.keys().copied().collect();
        if let Err(error) = kernel.devices.keep_only(&keep) {
            self.fail(Area::Devices, "devices", &error);
        }
    }

    /// Attaches the program for replies of backends on this node wherever they may leave it, as long
    /// as there are such backends: it costs every packet that leaves a look into the flow table.
    fn attach_exits(&mut self, kernel: &mut KernelPath, devices: &BTreeMap<u32, String>) {
        if !self.next_hops.has_local() {
            return;
        }
        let devices = self.exits_wanted(devices);
        for (index, name) in &devices {
            let program = kernel.programs.egress_program();
            if let Err(error) = program.and_then(|program| kernel.exits.attach(program, *index, name)) {
                self.fail(Area::Devices, name, &error);
            }
        }
        let keep: Vec<_> = devices.keys().copied().collect();
        if let Err(error) = kernel.exits.keep_only(&keep) {
            self.fail(Area::Devices, "devices", &error);
        }
        let families = self.next_hops.families_behind_devices();
        let missing: Vec<_> = families.into_iter().filter_map(forwarding::missing).collect();
        self.trouble.extend(Area::Devices, missing.into_iter().map(Problem::warning));
    }

    /// Where the program for replies of backends on this node is to be: on the devices that have the
    /// datapath, since clients may come in by each, and on those that routes to clients leave by.
    fn exits_wanted(&self, devices: &BTreeMap<u32, String>) -> BTreeMap<u32, String> {
        let mut all = self.next_hops.devices_out();
        all.extend(devices.iter().map(|(index, name)| (*index, name.clone())));
        all
    }

    /// Takes TC off beside XDP, and the program for replies, once the maps rely on neither any more.
    pub(super) fn leave_exits(&mut self) {
        let Some(kernel) = self.kernel.as_mut().filter(|_| !self.maps_incomplete) else { return };
        let mut done = Vec::new();
        if self.config.has_tc == 0 {
            done.push(kernel.devices.leave_complement());
        }
        if !self.next_hops.has_local() {
            done.push(kernel.exits.keep_only(&[]));
        }
        for error in done.into_iter().filter_map(Result::err) {
            self.fail(Area::Devices, "devices", &error);
        }
    }

    /// Attaches the programs for sockets as long as there are VIPs, once the maps know them.
    ///
    /// What fails is tried again by the resync: nothing else waits for it.
    pub(super) fn attach_sockets(&mut self) {
        let wanted = !self.planner.plan().desired.vips.is_empty();
        let Some(kernel) = &mut self.kernel else { return };
        if !kernel.sockets.differ(wanted) {
            return;
        }
        self.trouble.clear(Area::Sockets);
        let done = if wanted { kernel.sockets.attach(&mut kernel.programs) } else { kernel.sockets.leave() };
        if let Err(error) = done {
            let problem = format!("VIPs cannot be reached from this node itself: {error:#}");
            self.trouble.extend(Area::Sockets, [Problem::warning(problem)]);
        }
    }

    /// Looks for our filters of TC, where there are no links: what somebody has taken
    /// away is attached anew with the others, and what an agent has left that was killed is replaced.
    pub(super) async fn find_filters(&mut self) {
        let wanted = self.exits_wanted(&self.devices_wanted());
        let Some(kernel) = &mut self.kernel else { return };
        if !kernel.exits.uses_filters() && !kernel.devices.classifiers().uses_filters() {
            return;
        }
        for classifiers in [kernel.devices.classifiers(), &mut kernel.exits] {
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
        let Some(kernel) = &self.kernel else { return };
        if let Err(error) = kernel.pins.retire_previous() {
            self.fail(Area::Devices, "pins of the previous version", &error);
        }
    }

    fn attach_one(&mut self, kernel: &mut KernelPath, index: u32, name: &str) -> Result<()> {
        let link = self.next_hops.links().get(&index);
        if link.is_some_and(|link| link.mac.is_none() && !link.is_loopback) {
            bail!("it is no Ethernet device: the programs cannot read its packets");
        }
        let on_device = link.and_then(|link| link.xdp_program);
        kernel.devices.check(index, on_device);
        // XDP cannot send by a device in TC, whatever the routes say: not for a moment, either, since a
        // flow would keep that for its way to the client.
        let may_redirect = kernel.devices.mode(index) != Some(Mode::Tc);
        if may_redirect {
            // First: the program may need it with the first packet.
            kernel.maps.allow_device(index)?;
        }
        let mode = kernel.devices.attach(&mut kernel.programs, index, name)?.mode;
        if mode == Mode::Tc && may_redirect {
            kernel.maps.forbid_device(index)?;
            // What flows have found in between is asked for anew, once the maps have this.
            self.config.route_generation = self.config.route_generation.wrapping_add(1).max(1);
        }
        Ok(())
    }
}

fn modes(kernel: &KernelPath) -> BTreeMap<u32, Mode> {
    kernel.devices.attached().map(|found| (found.ifindex, found.mode)).collect()
}
