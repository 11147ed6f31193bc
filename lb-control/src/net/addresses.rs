//! VIPs on the link device.
//!
//! Ours are tagged: they carry an address protocol of our own (`IFA_PROTO`, Linux 5.18) and a
//! lifetime that is renewed, so that a crash leaves nothing that cannot be recognised, or that
//! stays. An address that was there before us is never touched.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use anyhow::{Context, Result};
use futures_util::TryStreamExt;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressMessage, AddressProtocol, AddressScope, CacheInfo,
};
use rtnetlink::Handle;
use tracing::{info, warn};

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

/// What has to be done to the addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// To be put on the device.
    pub add: Vec<IpAddr>,
    /// To be renewed.
    pub renew: Vec<IpAddr>,
    /// To be taken off: address, device, prefix length.
    pub remove: Vec<(IpAddr, u32, u8)>,
    /// There before us: left as they are.
    pub foreign: Vec<IpAddr>,
}

/// Compares the addresses that are wanted on a device with those that are there.
#[must_use]
pub fn compare(wanted: &BTreeSet<IpAddr>, ifindex: u32, found: &[Found]) -> Changes {
    let mut changes = Changes::default();
    let mut places: HashMap<IpAddr, Vec<&Found>> = HashMap::with_capacity(found.len());
    for found in found {
        places.entry(found.address).or_default().push(found);
    }
    for address in wanted {
        let here = places.get(address).map_or(&[][..], Vec::as_slice);
        if here.iter().any(|found| !found.ours) {
            changes.foreign.push(*address);
        } else if let Some(ours) = here.iter().find(|found| found.ifindex == ifindex) {
            // One that an agent has left for us to take over stays for ever.
            if ours.valid_seconds < RENEW_BELOW_SECONDS || ours.valid_seconds > LIFETIME_SECONDS {
                changes.renew.push(*address);
            }
        } else {
            changes.add.push(*address);
        }
    }
    for found in found.iter().filter(|found| found.ours) {
        if found.ifindex != ifindex || !wanted.contains(&found.address) {
            changes.remove.push((found.address, found.ifindex, found.prefix));
        }
    }
    changes
}

/// Puts the wanted addresses on a device, takes ours that are not wanted off all devices, and
/// renews. Gives what was done. New ones are announced to the neighbours of the device, as soon as
/// it can send.
///
/// # Errors
/// When the kernel refuses; names the addresses. All that it does not refuse is done.
pub async fn reconcile(handle: &Handle, ifindex: u32, wanted: &BTreeSet<IpAddr>) -> Result<Changes> {
    let mut changes = compare(wanted, ifindex, &list(handle).await?);
    let mut refused = Vec::new();
    for (address, device, prefix) in &changes.remove {
        refused.extend(remove(handle, *address, *device, *prefix).await.err());
    }
    for address in &changes.renew {
        refused.extend(put(handle, ifindex, *address, Presence::Ours, LIFETIME_SECONDS).await.err());
    }
    let mut added = Vec::new();
    for address in std::mem::take(&mut changes.add) {
        match put(handle, ifindex, address, Presence::Absent, LIFETIME_SECONDS).await {
            Ok(()) => {
                info!(%address, "VIP is on the link device");
                added.push(address);
            }
            Err(error) => refused.push(error),
        }
    }
    changes.add = added;
    if !changes.add.is_empty() {
        announce::announce_and_repeat(handle, ifindex, &changes.add).await;
    }
    match refused.into_iter().reduce(|all, error| all.context(format!("{error:#}"))) {
        Some(error) => Err(error),
        None => Ok(changes),
    }
}

/// Puts addresses that are new on a device and announces them, at no cost for those that are there.
/// Says whether all are there and ours: if not, [`reconcile`] finds out what is in the way.
pub async fn add(handle: &Handle, ifindex: u32, new: &BTreeSet<IpAddr>) -> bool {
    let mut added = Vec::new();
    for address in new {
        if put(handle, ifindex, *address, Presence::Absent, LIFETIME_SECONDS).await.is_ok() {
            info!(%address, "VIP is on the link device");
            added.push(*address);
        }
    }
    if !added.is_empty() {
        announce::announce_and_repeat(handle, ifindex, &added).await;
    }
    added.len() == new.len()
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
            info!(%address, "VIP is off the link device");
            Ok(())
        }
        // Gone already, with its device or by hand.
        Err(rtnetlink::Error::NetlinkError(error))
            if matches!(-error.raw_code(), libc::EADDRNOTAVAIL | libc::ENODEV) =>
        {
            warn!(%address, "VIP was gone from its device already");
            Ok(())
        }
        Err(error) => Err(error).with_context(|| format!("taking the VIP {address} off device {ifindex}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEVICE: u32 = 7;

    fn found(address: &str, ifindex: u32, ours: bool, valid_seconds: u32) -> Found {
        let address: IpAddr = address.parse().expect("an address");
        let prefix = if address.is_ipv4() { 32 } else { 128 };
        Found { address, ifindex, prefix, ours, valid_seconds }
    }

    fn wanted(addresses: &[&str]) -> BTreeSet<IpAddr> {
        addresses.iter().map(|address| address.parse().expect("an address")).collect()
    }

    #[test]
    fn missing_ones_are_added_and_ours_that_nobody_wants_are_removed() {
        let here = [found("192.0.2.1", DEVICE, true, 3_600), found("192.0.2.9", DEVICE, true, 3_600)];
        let changes = compare(&wanted(&["192.0.2.1", "192.0.2.2"]), DEVICE, &here);
        assert_eq!(changes.add, ["192.0.2.2".parse::<IpAddr>().expect("an address")]);
        assert_eq!(changes.remove, [(here[1].address, DEVICE, 32)]);
        assert_eq!((changes.renew.len(), changes.foreign.len()), (0, 0));
    }

    #[test]
    fn one_that_was_there_before_us_is_neither_taken_nor_removed() {
        let here = [found("192.0.2.1", DEVICE, false, u32::MAX), found("192.0.2.2", 3, false, u32::MAX)];
        let changes = compare(&wanted(&["192.0.2.1"]), DEVICE, &here);
        assert_eq!(changes.foreign, [here[0].address]);
        assert_eq!((changes.add.len(), changes.renew.len(), changes.remove.len()), (0, 0, 0));
    }

    #[test]
    fn ours_move_when_the_link_device_changes() {
        let here = [found("2001:db8::1", 3, true, 3_600)];
        let changes = compare(&wanted(&["2001:db8::1"]), DEVICE, &here);
        assert_eq!(changes.add, [here[0].address]);
        assert_eq!(changes.remove, [(here[0].address, 3, 128)]);
    }

    #[test]
    fn ours_are_renewed_in_time() {
        let renewed = |left| {
            compare(&wanted(&["192.0.2.1"]), DEVICE, &[found("192.0.2.1", DEVICE, true, left)]).renew.len()
        };
        assert_eq!(renewed(RENEW_BELOW_SECONDS), 0);
        assert_eq!(renewed(RENEW_BELOW_SECONDS - 1), 1);
    }
}
