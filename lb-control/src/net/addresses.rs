//! VIPs on the devices that clients come in by.
//!
//! Each VIP is on all of them, because the kernel answers a neighbour solicitation for the addresses of the
//! device that it came in by alone (`ndisc_recv_ns`), as it does an ARP request where `arp_ignore` is 1. To
//! have one address on several devices is legal; routes of the table `local` lead to it by each.
//!
//! Ours are tagged: they carry an address protocol of our own (`IFA_PROTO`, Linux 5.18) and a
//! lifetime that is renewed, so that a crash leaves nothing that cannot be recognised, or that
//! stays. An address that was there before us is never touched.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use anyhow::{Context, Result};
use futures_util::TryStreamExt;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressMessage, AddressProtocol, AddressScope, CacheInfo,
};
use rtnetlink::Handle;
use tracing::{info, warn};

use super::kernel::Links;
use super::way::LinkKind;
use super::{announce, local_address};

/// The address protocol of ours; those below 4 are the kernel's (include/uapi/linux/if_addr.h).
const OURS: AddressProtocol = AddressProtocol::Other(0x50);

/// How long an address stays when nobody renews it, in seconds.
const LIFETIME_SECONDS: u32 = 3_600;

/// `INFINITY_LIFE_TIME` (include/net/addrconf.h).
const FOR_EVER: u32 = u32::MAX;

/// Renewed when less than this is left.
const RENEW_BELOW_SECONDS: u32 = LIFETIME_SECONDS / 2;

/// An address as it is found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// The address.
    pub address: IpAddr,
    /// Index of its device.
    pub ifindex: u32,
    /// Length of its prefix.
    pub prefix: u8,
    /// Whether it is tagged as ours.
    pub ours: bool,
    /// Seconds that it will stay.
    pub valid_seconds: u32,
}

/// An address on a device, by the device's index.
pub type Placement = (IpAddr, u32);

/// What has to be done to the addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// To be put on devices.
    pub add: Vec<Placement>,
    /// To be renewed.
    pub renew: Vec<Placement>,
    /// To be taken off: address, device, prefix length.
    pub remove: Vec<(IpAddr, u32, u8)>,
    /// There before us: left as they are.
    pub foreign: Vec<IpAddr>,
}

/// What was done, and what was not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reconciled {
    /// What was tried; of the addresses to be put on devices, those that were.
    pub changes: Changes,
    /// What the kernel refused: device, and why.
    pub refused: Vec<(u32, String)>,
}

/// The devices that VIPs are put on: the link device, and those further ones of clients on which somebody
/// may ask for them. Not those without Ethernet address, and no ports of a bridge or a bond, whose frames
/// are the upper device's.
#[must_use]
pub fn devices(link_device: &str, client_devices: &[String], links: &Links) -> BTreeSet<u32> {
    let is_vrf = |master: u32| links.get(&master).is_some_and(|found| found.kind == LinkKind::Vrf);
    let takes = links.iter().filter(|(_, link)| {
        let is_end = link.mac.is_some() && !link.is_loopback && link.master.is_none_or(is_vrf);
        link.name == link_device || is_end && client_devices.contains(&link.name)
    });
    takes.map(|(index, _)| *index).collect()
}

/// Compares the addresses that are wanted on each of some devices with those that are there. `listed`: all
/// devices that the kernel told of.
#[must_use]
pub fn compare(
    wanted: &BTreeSet<IpAddr>,
    devices: &BTreeSet<u32>,
    listed: &Links,
    found: &[Found],
) -> Changes {
    let mut changes = Changes::default();
    let mut places: HashMap<IpAddr, Vec<&Found>> = HashMap::with_capacity(found.len());
    for found in found {
        places.entry(found.address).or_default().push(found);
    }
    for address in wanted {
        let here = places.get(address).map_or(&[][..], Vec::as_slice);
        if here.iter().any(|found| !found.ours) {
            changes.foreign.push(*address);
            continue;
        }
        for device in devices {
            let place = (*address, *device);
            match here.iter().find(|found| found.ifindex == *device) {
                None => changes.add.push(place),
                // One that an agent has left for us to take over stays for ever.
                Some(ours)
                    if ours.valid_seconds < RENEW_BELOW_SECONDS || ours.valid_seconds > LIFETIME_SECONDS =>
                {
                    changes.renew.push(place);
                }
                Some(_) => {}
            }
        }
    }
    for found in found.iter().filter(|found| found.ours) {
        // Others decide where it is: it came after ours, or ours came before anybody looked.
        let is_foreign = changes.foreign.binary_search(&found.address).is_ok();
        // The kernel's list may lack a device that is there (NLM_F_DUMP_INTR): its name, and so whether it is
        // one of clients, is not known. One that is gone has no addresses.
        let is_elsewhere = !devices.contains(&found.ifindex) && listed.contains_key(&found.ifindex);
        if is_elsewhere || is_foreign || !wanted.contains(&found.address) {
            changes.remove.push((found.address, found.ifindex, found.prefix));
        }
    }
    changes
}

/// Puts the wanted addresses on each of some devices, takes ours that are not wanted off all devices, those
/// that are wanted off the others that are `listed`, and renews. Gives what was done: all that the kernel does not refuse. New ones are announced to the neighbours
/// of each device, as soon as it can send.
///
/// # Errors
/// When the kernel does not say which addresses there are.
pub async fn reconcile(
    handle: &Handle,
    devices: &BTreeSet<u32>,
    listed: &Links,
    wanted: &BTreeSet<IpAddr>,
) -> Result<Reconciled> {
    let mut changes = compare(wanted, devices, listed, &list(handle).await?);
    let mut refused = Vec::new();
    let mut refuse = |device: u32, error: anyhow::Error| refused.push((device, format!("{error:#}")));
    for (address, device, prefix) in &changes.remove {
        if let Err(error) = remove(handle, *address, *device, *prefix).await {
            refuse(*device, error);
        }
    }
    for (address, device) in &changes.renew {
        if let Err(error) = put(handle, *device, *address, Presence::Ours, LIFETIME_SECONDS).await {
            refuse(*device, error);
        }
    }
    let mut added = Vec::new();
    for (address, device) in std::mem::take(&mut changes.add) {
        match put(handle, device, address, Presence::Absent, LIFETIME_SECONDS).await {
            Ok(()) => added.push((address, device)),
            Err(error) => refuse(device, error),
        }
    }
    welcome(handle, &added).await;
    changes.add = added;
    Ok(Reconciled { changes, refused })
}

/// Puts addresses that are new on each of some devices and announces them, at no cost for those that are
/// there. Says whether all are there and ours: if not, [`reconcile`] finds out what is in the way.
pub async fn add(handle: &Handle, devices: &BTreeSet<u32>, new: &BTreeSet<IpAddr>) -> bool {
    let mut added = Vec::new();
    for address in new {
        for device in devices {
            if put(handle, *device, *address, Presence::Absent, LIFETIME_SECONDS).await.is_ok() {
                added.push((*address, *device));
            }
        }
    }
    welcome(handle, &added).await;
    added.len() == new.len() * devices.len()
}

/// Tells the log, and the neighbours of each device, of addresses that have come to it.
async fn welcome(handle: &Handle, added: &[Placement]) {
    let mut by_device: BTreeMap<u32, Vec<IpAddr>> = BTreeMap::new();
    for (address, device) in added {
        info!(%address, device, "VIP is on the device");
        by_device.entry(*device).or_default().push(*address);
    }
    for (device, addresses) in by_device {
        announce::announce_and_repeat(handle, device, &addresses).await;
    }
}

/// Renews all addresses of ours, wherever they are: for as long as it is not known which of them
/// are wanted, none may lapse.
///
/// # Errors
/// When the kernel refuses.
pub async fn renew(handle: &Handle) -> Result<()> {
    let due = |found: &&Found| found.ours && found.valid_seconds < RENEW_BELOW_SECONDS;
    for found in list(handle).await?.iter().filter(due) {
        put(handle, found.ifindex, found.address, Presence::Ours, LIFETIME_SECONDS).await?;
    }
    Ok(())
}

/// Makes those of the addresses that are ours stay without renewal.
///
/// # Errors
/// When the kernel refuses.
pub async fn keep(handle: &Handle, addresses: &[IpAddr]) -> Result<()> {
    for found in list(handle).await?.iter().filter(|found| found.ours && addresses.contains(&found.address)) {
        put(handle, found.ifindex, found.address, Presence::Ours, FOR_EVER).await?;
    }
    Ok(())
}

/// The addresses of ours on a device.
///
/// # Errors
/// When the kernel does not say.
pub async fn ours(handle: &Handle, ifindex: u32) -> Result<BTreeSet<IpAddr>> {
    let found = list(handle).await?;
    Ok(found
        .iter()
        .filter(|found| found.ours && found.ifindex == ifindex)
        .map(|found| found.address)
        .collect())
}

/// Whether the kernel tells of an address of ours.
pub(super) fn is_ours(message: &AddressMessage) -> bool {
    read(message).is_some_and(|found| found.ours)
}

/// All addresses of the node.
async fn list(handle: &Handle) -> Result<Vec<Found>> {
    let messages: Vec<AddressMessage> =
        handle.address().get().execute().try_collect().await.context("listing addresses")?;
    Ok(messages.iter().filter_map(read).collect())
}

fn read(message: &AddressMessage) -> Option<Found> {
    let mut found = Found {
        address: local_address(&message.attributes)?,
        ifindex: message.header.index,
        prefix: message.header.prefix_len,
        ours: false,
        valid_seconds: u32::MAX,
    };
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Protocol(protocol) => found.ours = *protocol == OURS,
            AddressAttribute::CacheInfo(cache) => found.valid_seconds = cache.ifa_valid,
            _ => {}
        }
    }
    Some(found)
}

/// What is known of an address before it is put on a device.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Presence {
    /// It was not there. Should somebody be faster, it is theirs: replacing it would put our tag on
    /// it (`inet_rtm_newaddr`).
    Absent,
    /// It is there and ours.
    Ours,
}

async fn put(handle: &Handle, ifindex: u32, address: IpAddr, presence: Presence, seconds: u32) -> Result<()> {
    let prefix = if address.is_ipv4() { 32 } else { 128 };
    let mut request = handle.address().add(ifindex, address, prefix);
    if presence == Presence::Ours {
        request = request.replace();
    }
    let mut lifetime = CacheInfo::default();
    lifetime.ifa_valid = seconds;
    // Never the source of the node's own connections. IPv6 avoids what is deprecated (RFC 6724,
    // rule 3). IPv4 does not know that rule, but never chooses an address of host scope for what
    // leaves the node; one of link scope it does for routes without gateway (`inet_select_addr`).
    lifetime.ifa_preferred = 0;
    let message = request.message_mut();
    if address.is_ipv4() {
        message.header.scope = AddressScope::Host;
    }
    let attributes = &mut message.attributes;
    // A broadcast address makes no sense for a single address.
    attributes.retain(|attribute| !matches!(attribute, AddressAttribute::Broadcast(_)));
    attributes.push(AddressAttribute::CacheInfo(lifetime));
    attributes.push(AddressAttribute::Protocol(OURS));
    attributes.push(AddressAttribute::Flags(AddressFlags::Nodad | AddressFlags::Noprefixroute));
    request.execute().await.with_context(|| {
        format!("putting the VIP {address} on device {ifindex} (needs CAP_NET_ADMIN; for IPv6, IPv6 must be enabled there)")
    })
}

async fn remove(handle: &Handle, address: IpAddr, ifindex: u32, prefix: u8) -> Result<()> {
    let mut message = AddressMessage::default();
    message.header.family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    message.header.index = ifindex;
    message.header.prefix_len = prefix;
    message.attributes.push(AddressAttribute::Local(address));
    message.attributes.push(AddressAttribute::Address(address));
    match handle.address().del(message).execute().await {
        Ok(()) => {
            info!(%address, device = ifindex, "VIP is off the device");
            Ok(())
        }
        // Gone already, with its device or by hand.
        Err(rtnetlink::Error::NetlinkError(error))
            if matches!(-error.raw_code(), libc::EADDRNOTAVAIL | libc::ENODEV) =>
        {
            warn!(%address, device = ifindex, "VIP was gone from the device already");
            Ok(())
        }
        Err(error) => Err(error).with_context(|| format!("taking the VIP {address} off device {ifindex}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::way::Link;

    const DEVICE: u32 = 7;
    const SECOND: u32 = 8;

    fn found(address: &str, ifindex: u32, ours: bool, valid_seconds: u32) -> Found {
        let address: IpAddr = address.parse().expect("an address");
        let prefix = if address.is_ipv4() { 32 } else { 128 };
        Found { address, ifindex, prefix, ours, valid_seconds }
    }

    fn wanted(addresses: &[&str]) -> BTreeSet<IpAddr> {
        addresses.iter().map(|address| address.parse().expect("an address")).collect()
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    fn on(devices: &[u32], wanted_ones: &[&str], found: &[Found]) -> Changes {
        let listed = found.iter().map(|found| found.ifindex).chain(devices.iter().copied());
        let listed = listed.map(|index| (index, Link::default())).collect();
        compare(&wanted(wanted_ones), &devices.iter().copied().collect(), &listed, found)
    }

    #[test]
    fn missing_ones_are_added_and_ours_that_nobody_wants_are_removed() {
        let here = [found("192.0.2.1", DEVICE, true, 3_600), found("192.0.2.9", DEVICE, true, 3_600)];
        let changes = on(&[DEVICE], &["192.0.2.1", "192.0.2.2"], &here);
        assert_eq!(changes.add, [(ip("192.0.2.2"), DEVICE)]);
        assert_eq!(changes.remove, [(here[1].address, DEVICE, 32)]);
        assert_eq!((changes.renew.len(), changes.foreign.len()), (0, 0));
    }

    #[test]
    fn one_that_was_there_before_us_is_neither_taken_nor_removed() {
        let here = [found("192.0.2.1", DEVICE, false, u32::MAX), found("192.0.2.2", 3, false, u32::MAX)];
        for devices in [&[DEVICE][..], &[DEVICE, SECOND]] {
            let changes = on(devices, &["192.0.2.1"], &here);
            assert_eq!(changes.foreign, [here[0].address]);
            assert_eq!((changes.add.len(), changes.renew.len(), changes.remove.len()), (0, 0, 0));
        }
    }

    #[test]
    fn ours_make_way_for_one_that_somebody_has_put_on_another_device() {
        for elsewhere in [SECOND, 3] {
            let here = [
                found("192.0.2.1", DEVICE, true, 60),
                found("192.0.2.1", elsewhere, false, u32::MAX),
                found("192.0.2.2", DEVICE, true, 3_600),
                found("192.0.2.2", SECOND, true, 3_600),
            ];
            let changes = on(&[DEVICE, SECOND], &["192.0.2.1", "192.0.2.2"], &here);
            let expected = Changes {
                remove: vec![(ip("192.0.2.1"), DEVICE, 32)],
                foreign: vec![ip("192.0.2.1")],
                ..Changes::default()
            };
            assert_eq!(changes, expected);
        }
    }

    #[test]
    fn a_device_that_was_not_listed_keeps_the_vips_that_are_wanted() {
        let here = [
            found("192.0.2.1", DEVICE, true, 3_600),
            found("192.0.2.1", SECOND, true, 3_600),
            found("192.0.2.9", SECOND, true, 3_600),
        ];
        let (wanted, devices) = (wanted(&["192.0.2.1"]), BTreeSet::from([DEVICE]));
        let removed = |listed: &[u32]| {
            let listed = listed.iter().map(|index| (*index, Link::default())).collect();
            compare(&wanted, &devices, &listed, &here).remove
        };
        let unwanted = (ip("192.0.2.9"), SECOND, 32);
        assert_eq!(removed(&[DEVICE]), [unwanted]);
        assert_eq!(removed(&[DEVICE, SECOND]), [(ip("192.0.2.1"), SECOND, 32), unwanted]);
        // Who leaves wants none, and needs no list.
        let leaving = compare(&BTreeSet::new(), &BTreeSet::new(), &Links::new(), &here);
        assert_eq!(leaving.remove.len(), here.len());
    }

    #[test]
    fn ours_move_when_the_link_device_changes() {
        let here = [found("2001:db8::1", 3, true, 3_600)];
        let changes = on(&[DEVICE], &["2001:db8::1"], &here);
        assert_eq!(changes.add, [(here[0].address, DEVICE)]);
        assert_eq!(changes.remove, [(here[0].address, 3, 128)]);
    }

    #[test]
    fn each_device_has_each_and_is_looked_at_by_itself() {
        let here = [
            found("192.0.2.1", DEVICE, true, 60),
            found("192.0.2.1", SECOND, true, 3_600),
            found("192.0.2.2", DEVICE, true, 3_600),
            found("192.0.2.9", SECOND, true, 3_600),
        ];
        let changes = on(&[DEVICE, SECOND], &["192.0.2.1", "192.0.2.2"], &here);
        let expected = Changes {
            add: vec![(ip("192.0.2.2"), SECOND)],
            renew: vec![(ip("192.0.2.1"), DEVICE)],
            remove: vec![(ip("192.0.2.9"), SECOND, 32)],
            foreign: Vec::new(),
        };
        assert_eq!(changes, expected);
        // A device that clients do not come in by any more gives back what is ours.
        let removed = on(&[DEVICE], &["192.0.2.1", "192.0.2.2"], &here).remove;
        assert_eq!(removed, [(ip("192.0.2.1"), SECOND, 32), (ip("192.0.2.9"), SECOND, 32)]);
    }

    #[test]
    fn ours_are_renewed_in_time() {
        let renewed =
            |left| on(&[DEVICE], &["192.0.2.1"], &[found("192.0.2.1", DEVICE, true, left)]).renew.len();
        assert_eq!(renewed(RENEW_BELOW_SECONDS), 0);
        assert_eq!(renewed(RENEW_BELOW_SECONDS - 1), 1);
    }

    #[test]
    fn vips_are_on_ends_of_links_alone() {
        let link =
            |name: &str, master| Link { name: name.into(), mac: Some([2; 6]), master, ..Link::default() };
        let kind = |name: &str, kind| Link { kind, ..link(name, None) };
        let links = Links::from([
            (1, Link { is_loopback: true, ..link("lo", None) }),
            (2, link("eth0", None)),
            (3, link("eth1", None)),
            (4, kind("br0", LinkKind::Bridge)),
            (5, link("port", Some(4))),
            (6, kind("red", LinkKind::Vrf)),
            (7, link("eth2", Some(6))),
            (8, Link { mac: None, ..link("tun0", None) }),
            (9, link("other", None)),
            (10, link("elsewhere", Some(99))),
        ]);
        let on = |link: &str, clients: &[&str]| {
            let clients: Vec<_> = clients.iter().map(ToString::to_string).collect();
            devices(link, &clients, &links).into_iter().collect::<Vec<_>>()
        };
        assert_eq!(on("eth0", &[]), [2]);
        assert_eq!(on("eth0", &["eth1", "eth0", "eth1", "gone"]), [2, 3], "each once");
        assert_eq!(on("eth0", &["br0", "port", "eth2", "tun0", "lo", "elsewhere"]), [2, 4, 7]);
        assert_eq!(on("tun0", &["eth1"]), [3, 8], "the link device is what it was said to be");
        assert_eq!(on("gone", &["eth1"]), [3]);
    }
}
