//! VIPs on a device.

use std::collections::BTreeSet;
use std::net::{IpAddr, UdpSocket};

use futures_util::TryStreamExt;
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressMessage, AddressProtocol, AddressScope,
};
use netlink_packet_route::neighbour::NeighbourState;
use tokio::time::timeout;

use crate::net::Monitor;
use crate::net::addresses::{Changes, Reconciled, add, reconcile, renew};
use crate::net::testing::{Lab, PATIENCE, ip, run};

const VIP4: &str = "192.0.2.10";
const VIP6: &str = "2001:db8::10";

fn set(addresses: &[&str]) -> BTreeSet<IpAddr> {
    addresses.iter().map(|address| ip(address)).collect()
}

async fn place(lab: &Lab, device: &str, wanted: &[&str]) -> Changes {
    place_on(lab, &[device], wanted).await
}

async fn place_on(lab: &Lab, devices: &[&str], wanted: &[&str]) -> Changes {
    let done = try_place(lab, &indices(lab, devices).await, wanted).await;
    assert_eq!(done.refused, []);
    done.changes
}

async fn try_place(lab: &Lab, devices: &BTreeSet<u32>, wanted: &[&str]) -> Reconciled {
    let listed = lab.node.links().await.unwrap();
    reconcile(lab.node.handle(), devices, &listed, &set(wanted)).await.unwrap()
}

async fn indices(lab: &Lab, devices: &[&str]) -> BTreeSet<u32> {
    let links = lab.node.links().await.unwrap();
    let named = links.iter().filter(|(_, link)| devices.contains(&link.name.as_str()));
    named.map(|(index, _)| *index).collect()
}

async fn messages_of(lab: &Lab, address: &str) -> Vec<AddressMessage> {
    let all: Vec<_> = lab.node.handle().address().get().execute().try_collect().await.unwrap();
    let is_it = |a: &AddressAttribute| matches!(a, AddressAttribute::Address(found) if *found == ip(address));
    all.into_iter().filter(|message: &AddressMessage| message.attributes.iter().any(is_it)).collect()
}

#[test]
fn a_vip_is_tagged_mortal_and_usable_at_once() {
    run(async |lab| {
        lab.veth("eth0", &[], &[]).await;
        let changes = place(lab, "eth0", &[VIP4, VIP6]).await;
        let (eth0, _) = lab.node.device("eth0").await;
        assert_eq!(changes, Changes { add: vec![(ip(VIP4), eth0), (ip(VIP6), eth0)], ..Changes::default() });
        for (vip, prefix, scope) in [(VIP4, 32, AddressScope::Host), (VIP6, 128, AddressScope::Universe)] {
            let messages = messages_of(lab, vip).await;
            let [message] = messages.as_slice() else { panic!("{messages:?}") };
            assert_eq!((message.header.prefix_len, message.header.scope), (prefix, scope));
            let tag = AddressAttribute::Protocol(AddressProtocol::Other(0x50));
            assert!(message.attributes.contains(&tag), "{message:?}");
            let mut seen = 0;
            for attribute in &message.attributes {
                match attribute {
                    AddressAttribute::CacheInfo(info) => {
                        assert_eq!(info.ifa_preferred, 0);
                        assert!((3_590..=3_600).contains(&info.ifa_valid), "{info:?}");
                        seen += 1;
                    }
                    AddressAttribute::Flags(flags) => {
                        assert!(flags.contains(AddressFlags::Noprefixroute), "{flags:?}");
                        assert!(!flags.intersects(AddressFlags::Tentative | AddressFlags::Permanent));
                        seen += 1;
                    }
                    _ => {}
                }
            }
            assert_eq!(seen, 2, "{message:?}");
        }
        assert_eq!(place(lab, "eth0", &[VIP4, VIP6]).await, Changes::default(), "the second time");
    });
}

#[test]
fn new_vips_join_the_others_and_what_is_in_the_way_is_told() {
    run(async |lab| {
        lab.veth("eth0", &["192.0.2.30/24"], &[]).await;
        place(lab, "eth0", &[VIP4]).await;
        let devices = indices(lab, &["eth0"]).await;
        assert!(add(lab.node.handle(), &devices, &set(&[VIP6])).await);
        assert_eq!(place(lab, "eth0", &[VIP4, VIP6]).await, Changes::default(), "both are there, and ours");
        assert!(!add(lab.node.handle(), &devices, &set(&[VIP4, "192.0.2.11"])).await, "one is there already");
        let all = [VIP4, VIP6, "192.0.2.11"];
        assert_eq!(place(lab, "eth0", &all).await, Changes::default(), "the other was added all the same");
    });
}

#[test]
fn a_foreign_address_is_used_and_kept() {
    run(async |lab| {
        lab.veth("eth0", &["192.0.2.10/24"], &[]).await;
        lab.veth("eth1", &["2001:db8::10/64"], &[]).await;
        let before = (messages_of(lab, VIP4).await, messages_of(lab, VIP6).await);
        let changes = place(lab, "eth0", &[VIP4, VIP6]).await;
        assert_eq!(changes, Changes { foreign: vec![ip(VIP4), ip(VIP6)], ..Changes::default() });
        assert_eq!(place(lab, "eth0", &[]).await, Changes::default());
        assert_eq!((messages_of(lab, VIP4).await, messages_of(lab, VIP6).await), before);
    });
}

/// [`add`] does not look what others have put there: IPv4 takes one address with another prefix twice.
#[test]
fn ours_go_where_somebody_has_one_on_another_device() {
    run(async |lab| {
        lab.veth("eth0", &["192.0.2.10/24"], &[]).await;
        lab.veth("eth1", &[], &[]).await;
        let theirs = messages_of(lab, VIP4).await;
        let both = ["eth0", "eth1"];
        let devices = indices(lab, &both).await;
        assert!(add(lab.node.handle(), &devices, &set(&[VIP4])).await);
        assert_eq!(messages_of(lab, VIP4).await.len(), 3);
        let mut changes = place_on(lab, &both, &[VIP4]).await;
        changes.remove.sort_unstable();
        let remove = devices.iter().map(|device| (ip(VIP4), *device, 32)).collect();
        assert_eq!(changes, Changes { remove, foreign: vec![ip(VIP4)], ..Changes::default() });
        assert_eq!(messages_of(lab, VIP4).await, theirs);
    });
}

#[test]
fn a_foreign_address_that_goes_is_replaced_by_ours() {
    run(async |lab| {
        lab.veth("eth0", &["192.0.2.10/24"], &[]).await;
        place(lab, "eth0", &[VIP4]).await;
        let theirs = messages_of(lab, VIP4).await.remove(0);
        lab.node.handle().address().del(theirs).execute().await.unwrap();
        assert_eq!(place(lab, "eth0", &[VIP4]).await.add.len(), 1);
    });
}

/// The agent keeps nothing about addresses in memory: each call is as after a restart.
#[test]
fn ours_are_recognised_moved_and_removed() {
    run(async |lab| {
        lab.veth("eth0", &["10.0.0.1/24"], &[]).await;
        lab.veth("eth1", &[], &[]).await;
        place(lab, "eth0", &[VIP4, VIP6, "192.0.2.11"]).await;
        let (eth0, _) = lab.node.device("eth0").await;
        let changes = place(lab, "eth0", &[VIP4, VIP6]).await;
        assert_eq!(changes, Changes { remove: vec![(ip("192.0.2.11"), eth0, 32)], ..Changes::default() });

        let changes = place(lab, "eth1", &[VIP4, VIP6]).await;
        assert_eq!((changes.add.len(), changes.remove.len()), (2, 2));
        let messages = messages_of(lab, VIP4).await;
        assert_eq!(messages.len(), 1);
        assert_eq!(messages[0].header.index, lab.node.device("eth1").await.0);

        place(lab, "eth1", &[]).await;
        assert!(messages_of(lab, VIP4).await.is_empty() && messages_of(lab, VIP6).await.is_empty());
        assert_eq!(messages_of(lab, "10.0.0.1").await.len(), 1);
    });
}

/// Both addresses have a minute left.
async fn age(lab: &Lab) {
    for vip in [VIP4, VIP6] {
        let mut message = messages_of(lab, vip).await.remove(0);
        for attribute in &mut message.attributes {
            if let AddressAttribute::CacheInfo(info) = attribute {
                info.ifa_valid = 60;
            }
        }
        let mut request =
            lab.node.handle().address().add(message.header.index, ip(vip), message.header.prefix_len);
        *request.message_mut() = message;
        request.replace().execute().await.unwrap();
    }
}

#[test]
fn an_old_lease_is_renewed() {
    run(async |lab| {
        lab.veth("eth0", &[], &[]).await;
        place(lab, "eth0", &[VIP4, VIP6]).await;
        age(lab).await;
        let changes = place(lab, "eth0", &[VIP4, VIP6]).await;
        let (eth0, _) = lab.node.device("eth0").await;
        assert_eq!(
            changes,
            Changes { renew: vec![(ip(VIP4), eth0), (ip(VIP6), eth0)], ..Changes::default() }
        );
        assert_eq!(place(lab, "eth0", &[VIP4, VIP6]).await, Changes::default(), "renewed for long");

        // The same while nobody knows yet which of them are wanted.
        age(lab).await;
        renew(lab.node.handle()).await.unwrap();
        assert_eq!(place(lab, "eth0", &[VIP4, VIP6]).await, Changes::default(), "renewed unseen");
    });
}

#[test]
fn the_node_does_not_call_from_a_vip() {
    run(async |lab| {
        // The VIP first: the order in which the kernel would find it first.
        lab.veth("eth0", &[], &[]).await;
        place(lab, "eth0", &["10.0.0.10", "2001:db8:1::10"]).await;
        for node in ["10.0.0.1/24", "2001:db8:1::1/64"] {
            lab.node.add_address("eth0", node).await;
        }
        // A route without gateway and source: the kernel is free to choose.
        lab.node.add_device_route("10.50.0.0/16", "eth0").await;
        for (remote, any, expected) in [
            ("10.50.0.2:9", "0.0.0.0:0", "10.0.0.1"),
            ("10.0.0.2:9", "0.0.0.0:0", "10.0.0.1"),
            ("[2001:db8:1::2]:9", "[::]:0", "2001:db8:1::1"),
        ] {
            let socket = UdpSocket::bind(any).unwrap();
            socket.connect(remote).unwrap();
            assert_eq!(socket.local_addr().unwrap().ip(), ip(expected), "to {remote}");
        }
    });
}

#[test]
fn a_vip_answers_when_clients_ask_for_it() {
    run(async |lab| {
        lab.veth("eth0", &["10.0.0.1/24", "2001:db8:1::1/64"], &["10.0.0.2/24", "2001:db8:1::2/64"]).await;
        let vips = ["10.0.0.10", "2001:db8:1::10"];
        place(lab, "eth0", &vips).await;
        let (index, _) = lab.remote.device("eth0").await;
        let mac = lab.node.device("eth0").await.1.mac;
        for vip in vips {
            let mut monitor = lab.in_remote(|| Monitor::start().unwrap());
            lab.remote.use_neighbour(index, ip(vip)).await.unwrap();
            let answered = async {
                let key = (index, ip(vip));
                while lab.remote.neighbours().await.unwrap().get(&key).is_none_or(|found| found.mac != mac) {
                    monitor.next().await.unwrap();
                }
            };
            assert!(timeout(PATIENCE, answered).await.is_ok(), "{vip}");
        }
        // And the node's own stack serves what the datapath passes on.
        let server = UdpSocket::bind("10.0.0.10:7").unwrap();
        let client = lab.in_remote(|| UdpSocket::bind("10.0.0.2:0")).unwrap();
        client.send_to(b"hello", "10.0.0.10:7").unwrap();
        let mut buffer = [0; 16];
        server.set_read_timeout(Some(PATIENCE)).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        let (length, from) = server.recv_from(&mut buffer).unwrap();
        server.send_to(&buffer[..length], from).unwrap();
        assert_eq!(client.recv_from(&mut buffer).unwrap(), (5, "10.0.0.10:7".parse().unwrap()));
    });
}

#[test]
fn neighbours_learn_where_a_vip_is_now() {
    run(async |lab| {
        lab.veth("eth0", &["10.0.0.1/24", "2001:db8:1::1/64"], &["10.0.0.2/24", "2001:db8:1::2/64"]).await;
        let (index, _) = lab.remote.device("eth0").await;
        let vips = ["10.0.0.10", "2001:db8:1::10"];
        for vip in vips {
            // Where the VIP was before.
            let request = lab.remote.handle().neighbours().add(index, ip(vip)).state(NeighbourState::Stale);
            request.link_layer_address(&[2, 0, 0, 0, 0, 0x99]).execute().await.unwrap();
        }
        let mac = lab.node.device("eth0").await.1.mac;
        let mut monitor = lab.in_remote(|| Monitor::start().unwrap());
        place(lab, "eth0", &vips).await;
        let heard = async {
            loop {
                let known = lab.remote.neighbours().await.unwrap();
                if vips.iter().all(|vip| known.get(&(index, ip(vip))).is_some_and(|found| found.mac == mac)) {
                    break;
                }
                monitor.next().await.unwrap();
            }
        };
        assert!(timeout(PATIENCE, heard).await.is_ok(), "{:?}", lab.remote.neighbours().await);
    });
}

#[test]
fn a_vip_on_a_device_that_is_down_is_announced_when_it_comes_up() {
    run(async |lab| {
        lab.veth("eth0", &["10.0.0.1/24"], &["10.0.0.2/24"]).await;
        // Learn from announcements alone.
        lab.in_remote(|| std::fs::write("/proc/sys/net/ipv4/conf/all/arp_accept", "1")).unwrap();
        let (index, _) = lab.remote.device("eth0").await;
        let mac = lab.node.device("eth0").await.1.mac;
        lab.node.edit("eth0", |link| link.down()).await;
        place(lab, "eth0", &["10.0.0.10"]).await;
        let mut monitor = lab.in_remote(|| Monitor::start().unwrap());
        lab.node.edit("eth0", |link| link.up()).await;
        let heard = async {
            while lab
                .remote
                .neighbours()
                .await
                .unwrap()
                .get(&(index, ip("10.0.0.10")))
                .is_none_or(|n| n.mac != mac)
            {
                monitor.next().await.unwrap();
            }
        };
        assert!(timeout(PATIENCE, heard).await.is_ok(), "{:?}", lab.remote.neighbours().await);
    });
}

#[test]
fn one_address_that_is_refused_does_not_stop_the_others() {
    run(async |lab| {
        lab.veth("eth0", &[], &[]).await;
        // The kernel refuses multicast addresses; it sorts before the good ones.
        let wanted = ["224.0.0.1", "255.255.255.255", VIP6];
        let devices = indices(lab, &["eth0"]).await;
        let refused = try_place(lab, &devices, &wanted).await.refused;
        let is_named = |(device, why): &(u32, String)| {
            devices.contains(device) && (why.contains("224.0.0.1") || why.contains("255.255.255.255"))
        };
        assert!(!refused.is_empty() && refused.iter().all(is_named), "{refused:?}");
        assert_eq!(messages_of(lab, VIP6).await.len(), 1);
    });
}

/// A device that refuses keeps no other from its VIPs.
#[test]
fn a_vip_is_on_each_device_and_goes_from_each() {
    run(async |lab| {
        for device in ["eth0", "eth1"] {
            lab.veth(device, &[], &[]).await;
        }
        let places = async |vip| {
            let mut all: Vec<_> =
                messages_of(lab, vip).await.iter().map(|found| found.header.index).collect();
            all.sort_unstable();
            all
        };
        let both = ["eth0", "eth1"];
        let devices = indices(lab, &both).await;
        assert_eq!(place_on(lab, &both, &[VIP4, VIP6]).await.add.len(), 4);
        assert_eq!(place_on(lab, &both, &[VIP4, VIP6]).await, Changes::default(), "the second time");
        for vip in [VIP4, VIP6] {
            assert!(places(vip).await.iter().eq(&devices), "{vip}");
        }
        assert!(add(lab.node.handle(), &devices, &set(&["192.0.2.11"])).await);
        assert_eq!(places("192.0.2.11").await.len(), 2);

        // Of what goes from one device, the other keeps its own.
        place(lab, "eth1", &[VIP4, VIP6]).await;
        let (eth1, _) = lab.node.device("eth1").await;
        for vip in [VIP4, VIP6] {
            assert_eq!(places(vip).await, [eth1], "{vip}");
        }
        assert_eq!(UdpSocket::bind((VIP4, 0)).map(drop).map_err(|error| error.kind()), Ok(()));

        std::fs::write("/proc/sys/net/ipv6/conf/eth0/disable_ipv6", "1").unwrap();
        let done = try_place(lab, &devices, &[VIP4, VIP6]).await;
        let (eth0, _) = lab.node.device("eth0").await;
        assert_eq!(done.changes.add, [(ip(VIP4), eth0)]);
        assert!(matches!(&done.refused[..], [(device, why)] if *device == eth0 && why.contains(VIP6)));
        assert!(!add(lab.node.handle(), &devices, &set(&["2001:db8::11"])).await);
        assert_eq!(places("2001:db8::11").await, [eth1]);

        place_on(lab, &[], &[]).await;
        for vip in [VIP4, VIP6, "192.0.2.11", "2001:db8::11"] {
            assert!(messages_of(lab, vip).await.is_empty(), "{vip}");
        }
    });
}
