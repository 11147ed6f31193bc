//! What the agent tells: what its addresses serve, what is decided, what is wrong.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::Agent;
use crate::app::live::{Forwarding, Lack};
use crate::dataplane::Attachment;
use crate::model::{Few, ObjectRef};
use crate::plan::{CookiePhase, Effects};
use crate::view::DeviceView;

/// Which of the wanted VIPs are on the link device.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Placed {
    None,
    These(BTreeSet<IpAddr>),
    All,
}

impl Placed {
    /// How many of so many that are wanted.
    pub(super) fn count(&self, wanted: usize) -> usize {
        match self {
            Self::None => 0,
            Self::These(addresses) => addresses.len().min(wanted),
            Self::All => wanted,
        }
    }

    pub(super) fn has(&self, address: &IpAddr) -> bool {
        match self {
            Self::None => false,
            Self::These(addresses) => addresses.contains(address),
            Self::All => true,
        }
    }
}

/// How packets are forwarded, for the agent's Lease.
fn forwarding(devices: &[Way]) -> Forwarding {
    let (mut ways, mut reasons) = (Vec::new(), Vec::new());
    for Way { view, is_fastest } in devices {
        ways.push(format!("{}={}", view.device, view.mode));
        if !is_fastest && let Some(reason) = &view.reason {
            reasons.push(format!("{}: {reason}", view.device));
        }
    }
    let joined = |all: Vec<String>, between: &str| (!all.is_empty()).then(|| all.join(between));
    Forwarding { ways: joined(ways, ","), reason: joined(reasons, "; ") }
}

/// How what a device brings is served.
struct Way {
    view: DeviceView,
    /// Whether it is the fastest way there is, chosen by us: then the reason is not worth telling.
    is_fastest: bool,
}

impl From<&Attachment> for Way {
    fn from(attachment: &Attachment) -> Self {
        let view = DeviceView {
            device: attachment.name.clone(),
            mode: attachment.mode.view(),
            reason: Some(attachment.reason.clone()),
            program_id: attachment.program_id,
        };
        Self { view, is_fastest: attachment.is_fastest }
    }
}

impl Agent {
    /// Says what each address serves by now, as far as that may be other than before.
    pub(super) fn report_live(&mut self, effects: &Effects) {
        for address in &effects.holders {
            self.live.is_now(*address, self.served(address));
        }
        if self.unserved.is_empty() {
            self.live.lacks(BTreeMap::new());
        } else {
            self.report_all_live();
        }
    }

    pub(super) fn report_all_live(&mut self) {
        let addresses: BTreeSet<_> =
            self.live.addresses().chain(self.planner.plan().desired.vips.keys()).copied().collect();
        for address in addresses {
            self.live.is_now(address, self.served(&address));
        }
        self.report_lacking();
    }

    /// Says which Services this node should serve, but cannot. Other nodes may lack them, too; but
    /// they are not asked for them.
    fn report_lacking(&mut self) {
        let vips = &self.planner.plan().desired.vips;
        let services = &self.planner.objects().services;
        // Once over the addresses, however many Services there are that cannot be served.
        let lacking = vips.values().flatten().filter_map(|service| {
            let why = self.unserved.get(service)?;
            let uid = services.get(service)?.api.uid.clone();
            Some((service.clone(), Lack { uid, why: why.clone() }))
        });
        self.live.lacks(lacking.collect());
    }

    /// The Services that an address of this node serves right now.
    fn served(&self, address: &IpAddr) -> Few<ObjectRef> {
        // Packets for it have to come by the program, and somebody has to answer for it.
        if !self.placed.has(address) || !self.is_met() {
            return Few::default();
        }
        let holders = self.planner.plan().desired.vips.get(address);
        let served = holders.into_iter().flatten().filter(|service| !self.unserved.contains_key(*service));
        served.cloned().collect()
    }

    /// Whether what comes in by the link device meets the program, or the proxy.
    pub(super) fn is_met(&self) -> bool {
        self.is_proxied() || self.link_is_attached()
    }

    /// Whether the program meets what comes in by the link device.
    fn link_is_attached(&self) -> bool {
        self.link_index().is_some_and(|index| self.mode(index).is_some())
    }

    /// Why this node cannot serve any address, however many it is given; `None` if it can. To be asked
    /// when the network is known: until then what was said last holds. Only what holds without any address of its own counts: else a node from
    /// which all were moved would seem mended.
    fn unfit(&self) -> Option<String> {
        let name = &self.settings.link_device;
        let Some((_, link)) = self.next_hops.links().iter().find(|(_, link)| link.name == *name) else {
            return Some(format!("the link device {name} is gone"));
        };
        if !link.is_up {
            return Some(format!("the link device {name} is down or has no carrier"));
        }
        if !self.is_met() {
            return Some(format!("the program could not be attached to the link device {name}"));
        }
        let mut entries = self.planner.plan().desired.entries.keys();
        let none_in_maps =
            !self.unserved.is_empty() && entries.all(|key| self.unserved.contains_key(&key.service));
        let who = if self.is_proxied() { "the proxy serves" } else { "the maps take" };
        none_in_maps.then(|| format!("{who} none of the Services"))
    }

    /// The devices that a program is attached to, and the one that the proxy serves.
    fn ways(&self) -> Vec<Way> {
        let proxied = self.proxied_device();
        let attached = self.kernel.iter().flat_map(|kernel| kernel.devices.attached());
        let others = attached.filter(|found| proxied.as_ref().is_none_or(|one| one.device != found.name));
        let mut ways: Vec<_> = others.map(Way::from).collect();
        ways.extend(proxied.map(|view| Way { view, is_fastest: false }));
        ways
    }

    /// Whether there is nothing that a next agent could go on with.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.generation > 0 && self.planner.plan().desired.entries.is_empty()
    }

    /// Tells the log and whoever asks about Services.
    fn tell(&mut self) {
        let services = std::mem::take(&mut self.untold);
        let reports = &self.planner.plan().reports;
        for service in &services {
            let problems = reports.get(service).map(|report| report.problems.as_slice()).unwrap_or_default();
            self.trouble.of_service(service, problems);
        }
        for service in &services {
            self.tell_health(service);
        }
        let reports = &self.planner.plan().reports;
        self.shared.tell(services.iter().map(|service| (service, reports.get(service))));
    }

    /// Tells the log and whoever asks about everything else.
    pub(super) fn publish(&mut self) {
        let problems = self.trouble.news();
        let ways = self.ways();
        self.shared.publish(|published| {
            if let Some(problems) = problems {
                published.problems = problems;
            }
            published.devices = ways.iter().map(|way| way.view.clone()).collect();
            published.generation = self.generation;
            published.reloaded = self.reloaded;
            published.cookies = CookiePhase::from_raw(self.config.syn_cookies);
            published.problem_counts = self.trouble.counts();
            published.placed = self.placed.count(self.planner.plan().desired.vips.len());
            let troubled = self.next_hops.troubled();
            published.unreachable.retain(|address, text| troubled.get(address) == Some(text));
            for (address, text) in troubled {
                published.unreachable.entry(*address).or_insert_with(|| text.clone());
            }
        });
        self.live.forwards(forwarding(&ways));
        if self.generation > 0 && self.network_known {
            let unfit = self.unfit();
            self.live.is_unfit(unfit);
        }
        // Last: whoever hears of a Service finds it done, as far as it can be.
        self.tell();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataplane::Mode;

    #[test]
    fn the_ways_of_all_devices_and_why_not_the_fastest() {
        let device = |name: &str, mode, reason: &str, is_fastest| Attachment {
            ifindex: 1,
            name: name.into(),
            mode,
            reason: reason.into(),
            is_fastest,
            program_id: None,
        };
        let fast = device("eth0", Mode::Native, "the fastest way works", true);
        let slow = device("vxlan0", Mode::Tc, "no support", false);
        let told = |devices: &[Attachment]| {
            let ways: Vec<_> = devices.iter().map(Way::from).collect();
            let Forwarding { ways, reason } = forwarding(&ways);
            (ways.unwrap_or_default(), reason.unwrap_or_default())
        };
        assert_eq!(told(&[]), (String::new(), String::new()));
        assert_eq!(told(std::slice::from_ref(&fast)), ("eth0=xdp-native".into(), String::new()));
        assert_eq!(told(&[fast, slow]), ("eth0=xdp-native,vxlan0=tc".into(), "vxlan0: no support".into()));
    }
}
