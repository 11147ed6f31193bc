//! VIPs on the devices that clients come in by.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use anyhow::anyhow;

use super::Agent;
use super::telling::Placed;
use crate::app::trouble::Area;
use crate::model::Problem;
use crate::net::addresses::{self, Reconciled};

impl Agent {
    /// Puts the VIPs on the devices of clients, and takes those off that nobody needs: as far as they changed.
    pub(super) async fn place_addresses(&mut self, changed: Option<&BTreeSet<IpAddr>>) {
        let links = self.next_hops.links();
        let devices = addresses::devices(&self.settings.link_device, &self.settings.client_devices, links);
        let wanted = &self.planner.plan().desired.vips;
        if let Some(new) = changed.filter(|_| self.placed == Placed::All)
            && new.iter().all(|address| wanted.contains_key(address))
            && addresses::add(self.network.handle(), &devices, new).await
        {
            return;
        }
        let wanted: BTreeSet<_> = wanted.keys().copied().collect();
        let done = addresses::reconcile(self.network.handle(), &devices, links, &wanted).await;
        self.trouble.clear(Area::Addresses);
        let is_all = match done {
            Ok(done) => self.take_stock(&devices, done),
            Err(error) => {
                self.fail(Area::Addresses, "addresses", &error);
                false
            }
        };
        self.placed = match self.link_of_vips() {
            // On others, they may well be: but whether the node has an address goes by the link device.
            None => Placed::None,
            Some(_) if is_all => Placed::All,
            // One that is refused says nothing about the others.
            Some(link) => {
                let there = addresses::ours(self.network.handle(), link).await;
                there.map_or(Placed::None, Placed::These)
            }
        };
    }

    /// Says what is wrong with the addresses. Gives whether all are where it matters: on the link device, and
    /// on no device that is not one of clients.
    fn take_stock(&mut self, devices: &BTreeSet<u32>, done: Reconciled) -> bool {
        let foreign = done.changes.foreign.into_iter().map(|address| {
            Problem::warning(format!(
                "the VIP {address} is on this node already, and not by us: it is served, and stays when we leave"
            ))
        });
        self.trouble.extend(Area::Addresses, foreign);
        let link = self.link_of_vips();
        let mut elsewhere: BTreeMap<u32, Vec<String>> = BTreeMap::new();
        let mut in_the_way = Vec::new();
        for (device, why) in done.refused {
            if Some(device) != link && devices.contains(&device) {
                elsewhere.entry(device).or_default().push(why);
            } else {
                in_the_way.push(why);
            }
        }
        // The others are served, so it is not worth going over everything every other second.
        let links = self.next_hops.links();
        let warnings = elsewhere.into_iter().map(|(device, why)| {
            let name = links.get(&device).map_or("", |link| link.name.as_str());
            Problem::warning(format!(
                "the client device {name} does not have all VIPs: who asks for them on that link may get no answer, \
                 and they are not announced there; tried again every minute: {}{}",
                why[0],
                if why.len() > 1 { format!("; and {} more", why.len() - 1) } else { String::new() }
            ))
        });
        let warnings: Vec<_> = warnings.collect();
        self.trouble.extend(Area::Addresses, warnings);
        let is_all = in_the_way.is_empty();
        if !is_all {
            self.fail(Area::Addresses, "addresses", &anyhow!(in_the_way.join("; ")));
        }
        is_all
    }

    /// The link device itself, whose VIPs count.
    fn link_of_vips(&self) -> Option<u32> {
        let mut links = self.next_hops.links().iter();
        links.find(|(_, link)| link.name == self.settings.link_device).map(|(index, _)| *index)
    }
}
