//! Ways to backends.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use netlink_packet_route::neighbour::{NeighbourMessage, NeighbourState};
use netlink_packet_route::route::RouteType;
use tokio::time::timeout;

use crate::net::next_hops::{Ask, NextHops, Refreshed};
use crate::net::testing::{Lab, PATIENCE, ip, run};
use crate::net::way::Resolution;
use crate::net::{Kernel, Monitor, announce};

/// What the agent does: refreshes whenever something changes.
struct Agent {
    next_hops: NextHops,
    monitor: Monitor,
    backends: BTreeSet<IpAddr>,
    neighbours_changed: bool,
}

impl Agent {
    async fn new(backends: &[&str]) -> Self {
        let mut agent = Self {
            monitor: Monitor::start().unwrap(),
            next_hops: NextHops::new(Kernel::connect().unwrap(), vec!["uplink".into()]),
            backends: backends.iter().map(|backend| ip(backend)).collect(),
            neighbours_changed: false,
        };
        agent.refresh().await;
        agent
    }

    async fn refresh(&mut self) {
        let known: BTreeSet<_> = self.next_hops.ways().map(|(backend, _)| *backend).collect();
        let changed = &known ^ &self.backends;
        let gone = self.next_hops.know(&changed, |backend| self.backends.contains(backend).then_some(false));
        assert_eq!(gone.into_iter().collect::<BTreeSet<_>>(), &known - &self.backends);
        self.neighbours_changed |= self.next_hops.refresh(Ask::Routes).await.unwrap().neighbours;
    }

    /// Waits until the way to a backend is as wanted.
    async fn until(&mut self, backend: &str, what: &str, wanted: impl Fn(&Resolution) -> bool) -> Resolution {
        let reached = async {
            while !wanted(self.next_hops.way(&ip(backend)).unwrap()) {
                self.monitor.next().await.unwrap();
                self.refresh().await;
            }
        };
        if timeout(PATIENCE, reached).await.is_err() {
            panic!("{what}: {:?}", self.next_hops.way(&ip(backend)));
        }
        Resolution::clone(self.next_hops.way(&ip(backend)).unwrap())
    }
}

fn leads_to(mac: Option<[u8; 6]>) -> impl Fn(&Resolution) -> bool {
    move |way| way.next_hop.map(|next_hop| next_hop.destination_mac) == mac
}

async fn pair(lab: &Lab) {
    lab.veth("eth0", &["10.0.0.1/24", "2001:db8:1::1/64"], &["10.0.0.2/24", "2001:db8:1::2/64"]).await;
}

/// Whether the kernel manages a neighbour; absent when it does not know it.
async fn managed(lab: &Lab, address: &str) -> Option<bool> {
    let (index, _) = lab.node.device("eth0").await;
    lab.node.neighbours().await.unwrap().get(&(index, ip(address))).map(|found| found.managed)
}

async fn neighbour_message(lab: &Lab, address: &str) -> NeighbourMessage {
    let (index, _) = lab.node.device("eth0").await;
    lab.node.handle().neighbours().add(index, ip(address)).message_mut().clone()
}

#[test]
fn backends_on_the_link_are_resolved_and_let_go() {
    run(async |lab| {
        pair(lab).await;
        let backends = ["10.0.0.2", "2001:db8:1::2"];
        let mut agent = Agent::new(&backends).await;
        let ((index, node), (_, remote)) = (lab.node.device("eth0").await, lab.remote.device("eth0").await);
        for (backend, source) in backends.iter().zip(["10.0.0.1", "2001:db8:1::1"]) {
            let way = agent.until(backend, "on the link", leads_to(remote.mac)).await;
            let next_hop = way.next_hop.unwrap();
            assert_eq!((next_hop.ifindex, Some(next_hop.source_mac)), (index, node.mac));
            assert_eq!((way.source, way.device), (Some(ip(source)), Some((index, "eth0".to_owned()))));
            assert_eq!((way.mtu, way.problem), (1_500, None));
            assert_eq!(managed(lab, backend).await, Some(true));
        }
        agent.backends.remove(&ip(backends[1]));
        agent.refresh().await;
        assert_eq!(managed(lab, backends[1]).await, Some(false), "let go, and still known");
        agent.next_hops.release().await;
        assert_eq!(managed(lab, backends[0]).await, Some(false), "let go, and still known");
    });
}

#[test]
fn a_changed_link_layer_address_is_followed() {
    run(async |lab| {
        pair(lab).await;
        let backends = ["10.0.0.2", "2001:db8:1::2"];
        let mut agent = Agent::new(&backends).await;
        let (_, remote) = lab.remote.device("eth0").await;
        for backend in backends {
            agent.until(backend, "before", leads_to(remote.mac)).await;
        }
        agent.neighbours_changed = false;
        let new = [2, 0, 0, 0, 0, 0x77];
        lab.remote.edit("eth0", |link| link.address(new.to_vec())).await;
        let (index, link) = lab.remote.device("eth0").await;
        lab.in_remote(|| announce::announce(index, &link, &backends.map(ip))).unwrap();
        for backend in backends {
            agent.until(backend, "after", leads_to(Some(new))).await;
        }
        assert!(agent.neighbours_changed, "flows must look their way up again");
        agent.next_hops.release().await;
    });
}

#[test]
fn routes_are_followed() {
    run(async |lab| {
        pair(lab).await;
        lab.veth("eth1", &["10.0.1.1/24", "2001:db8:2::1/64"], &["10.0.1.2/24", "2001:db8:2::2/64"]).await;
        let backends = ["10.9.0.5", "2001:db8:9::5"];
        let mut agent = Agent::new(&backends).await;
        for backend in backends {
            agent
                .until(backend, "no route", |way| {
                    way.problem.as_ref().is_some_and(|p| p.contains("no route"))
                })
                .await;
        }
        let ways = [("eth0", "10.0.0.2", "2001:db8:1::2"), ("eth1", "10.0.1.2", "2001:db8:2::2")];
        for (device, gateway4, gateway6) in ways {
            if device == "eth1" {
                // IPv6 routes by other gateways are added, not replaced.
                lab.node.delete_route("2001:db8:9::/64").await;
            }
            lab.node.add_route("10.9.0.0/16", gateway4).await;
            lab.node.add_route("2001:db8:9::/64", gateway6).await;
            let (index, remote) = (lab.node.device(device).await.0, lab.remote.device(device).await.1);
            for backend in backends {
                let way = agent.until(backend, device, leads_to(remote.mac)).await;
                assert_eq!(way.device, Some((index, device.to_owned())));
            }
        }
        assert_ne!(managed(lab, "10.0.0.2").await, Some(true), "the old gateway is let go");
        agent.next_hops.release().await;
    });
}

#[test]
fn routes_that_lead_nowhere_are_explained() {
    run(async |lab| {
        pair(lab).await;
        for (number, kind) in
            [RouteType::BlackHole, RouteType::Unreachable, RouteType::Prohibit].into_iter().enumerate()
        {
            lab.node.add_dead_route(&format!("10.{}.0.0/16", 90 + number), kind).await;
            lab.node.add_dead_route(&format!("2001:db8:{}::/64", 90 + number), kind).await;
        }
        let backends =
            ["10.90.0.5", "10.91.0.5", "10.92.0.5", "2001:db8:90::5", "2001:db8:91::5", "2001:db8:92::5"];
        let mut agent = Agent::new(&backends).await;
        for backend in backends {
            let way = agent.until(backend, "dead", |way| way.problem.is_some()).await;
            assert!(way.problem.as_ref().unwrap().contains("no route"), "{backend}: {way:?}");
            assert_eq!(way.neighbour, None, "{backend}");
        }
    });
}

#[test]
fn a_device_that_goes_down_and_comes_back() {
    run(async |lab| {
        pair(lab).await;
        let mut agent = Agent::new(&["10.0.0.2"]).await;
        let (_, remote) = lab.remote.device("eth0").await;
        agent.until("10.0.0.2", "before", leads_to(remote.mac)).await;
        // Without carrier the route stays, and the neighbour may.
        lab.remote.edit("eth0", |link| link.down()).await;
        let cut = agent.until("10.0.0.2", "no carrier", |way| way.next_hop.is_none()).await;
        assert!(cut.problem.unwrap().contains("eth0, which is down"));
        lab.remote.edit("eth0", |link| link.up()).await;
        agent.until("10.0.0.2", "carrier", leads_to(remote.mac)).await;
        lab.node.edit("eth0", |link| link.down()).await;
        agent.until("10.0.0.2", "down", |way| way.next_hop.is_none()).await;
        lab.node.edit("eth0", |link| link.up()).await;
        agent.until("10.0.0.2", "up", leads_to(remote.mac)).await;
        assert_eq!(managed(lab, "10.0.0.2").await, Some(true));
        lab.node.edit("eth0", |link| link.mtu(1_300)).await;
        agent.until("10.0.0.2", "MTU", |way| way.mtu == 1_300).await;
        agent.next_hops.release().await;
    });
}

#[test]
fn a_neighbour_that_somebody_deletes_is_managed_again() {
    run(async |lab| {
        pair(lab).await;
        let mut agent = Agent::new(&["10.0.0.2"]).await;
        let (_, remote) = lab.remote.device("eth0").await;
        agent.until("10.0.0.2", "before", leads_to(remote.mac)).await;
        let message = neighbour_message(lab, "10.0.0.2").await;
        lab.node.handle().neighbours().del(message).execute().await.unwrap();
        agent.refresh().await;
        agent.until("10.0.0.2", "after", leads_to(remote.mac)).await;
        assert_eq!(managed(lab, "10.0.0.2").await, Some(true));
        agent.next_hops.release().await;
    });
}

#[test]
fn local_backends_need_nothing_and_silent_ones_are_explained() {
    run(async |lab| {
        pair(lab).await;
        let mut agent = Agent::new(&["10.0.0.1", "2001:db8:1::1", "10.0.0.99"]).await;
        for own in ["10.0.0.1", "2001:db8:1::1"] {
            // IPv6 has a local route only a moment after the address (`addrconf_dad_work`).
            let way = agent.until(own, "own", |way| way.is_local).await;
            assert_eq!((way.next_hop, way.problem, way.device_behind), (None, None, None));
        }
        agent.until("10.0.0.99", "silent", |way| way.problem.is_some()).await;
        // It comes up later.
        lab.remote.add_address("eth0", "10.0.0.99/24").await;
        agent.until("10.0.0.99", "answers", |way| way.next_hop.is_some()).await;
        agent.next_hops.release().await;
    });
}

/// Packets to clients go by them, and the programs that send those resolve nobody.
#[test]
fn gateways_to_clients_are_resolved_and_told_of_when_they_come() {
    run(async |lab| {
        pair(lab).await;
        lab.node.add_route("0.0.0.0/0", "10.0.0.2").await;
        lab.node.add_route("::/0", "2001:db8:1::2").await;
        let mut agent = Agent::new(&[]).await;
        for gateway in ["10.0.0.2", "2001:db8:1::2"] {
            assert_eq!(managed(lab, gateway).await, Some(true));
        }
        let (index, _) = lab.node.device("eth0").await;
        assert_eq!(agent.next_hops.devices_out(), [(index, "eth0".to_owned())].into());
        // The route fails over to a gateway that nobody has talked to, and that comes up later.
        lab.node.add_route("0.0.0.0/0", "10.0.0.3").await;
        agent.refresh().await;
        assert_eq!(managed(lab, "10.0.0.3").await, Some(true));
        assert!(!managed(lab, "10.0.0.2").await.unwrap_or_default(), "let go");
        // Word of the first ones may have come late.
        agent.neighbours_changed = false;
        lab.remote.add_address("eth0", "10.0.0.3/24").await;
        let is_told = async {
            let key = (index, ip("10.0.0.3"));
            loop {
                agent.neighbours_changed = false;
                agent.refresh().await;
                if lab.node.neighbours().await.unwrap()[&key].mac.is_some() {
                    break;
                }
                agent.monitor.next().await.unwrap();
            }
            while !agent.neighbours_changed {
                agent.refresh().await;
            }
        };
        timeout(PATIENCE, is_told).await.expect("the new gateway is told of");
        agent.neighbours_changed = false;
        agent.refresh().await;
        assert!(!agent.neighbours_changed, "once");
        agent.next_hops.release().await;
    });
}

/// One list of neighbours arrives, the next one, while a new neighbour is waited for, does not.
#[test]
fn an_error_while_new_neighbours_are_met_costs_no_backend_its_way() {
    run(async |lab| {
        pair(lab).await;
        let kernel = Kernel::connect().unwrap();
        let mut next_hops = NextHops::new(kernel.clone(), vec!["uplink".into()]);
        next_hops.know(&[ip("10.0.0.2")].into(), |_| Some(false));
        *kernel.neighbours_fail_after.lock().unwrap() = Some(1);
        let refreshed = next_hops.refresh(Ask::Neighbours).await.unwrap();
        assert_eq!(*kernel.neighbours_fail_after.lock().unwrap(), None, "it has failed");
        assert_eq!(refreshed.backends, [ip("10.0.0.2")].into());
        assert!(next_hops.way(&ip("10.0.0.2")).is_some());
        next_hops.release().await;
    });
}

#[test]
fn a_refresh_that_is_not_finished_is_made_up_for() {
    run(async |lab| {
        pair(lab).await;
        let mut next_hops = NextHops::new(Kernel::connect().unwrap(), vec!["uplink".into()]);
        // Nobody has this address: it is waited for.
        next_hops.know(&[ip("10.0.0.99")].into(), |_| Some(false));
        let abandoned = timeout(Duration::from_millis(60), next_hops.refresh(Ask::Neighbours)).await;
        assert!(abandoned.is_err(), "new neighbours are given longer than that");
        assert_eq!(next_hops.way(&ip("10.0.0.99")), None);
        let refreshed = next_hops.refresh(Ask::Neighbours).await.unwrap();
        assert_eq!(refreshed.backends, [ip("10.0.0.99")].into());
        next_hops.release().await;
    });
}

#[test]
fn an_administrators_permanent_entry_stays() {
    run(async |lab| {
        pair(lab).await;
        let theirs = [2, 0, 0, 0, 0, 0x55];
        let (index, _) = lab.node.device("eth0").await;
        let request =
            lab.node.handle().neighbours().add(index, ip("10.0.0.2")).state(NeighbourState::Permanent);
        request.link_layer_address(&theirs).execute().await.unwrap();
        let mut agent = Agent::new(&["10.0.0.2"]).await;
        agent.until("10.0.0.2", "permanent", leads_to(Some(theirs))).await;
        agent.refresh().await;
        agent.next_hops.release().await;
        let found = lab.node.neighbours().await.unwrap()[&(index, ip("10.0.0.2"))];
        assert_eq!((found.mac, found.managed, found.is_fixed), (Some(theirs), false, true));
    });
}

#[test]
fn a_neighbour_is_resolved_once_where_the_kernel_does_not_manage() {
    run(async |lab| {
        pair(lab).await;
        let (index, _) = lab.node.device("eth0").await;
        let mut monitor = Monitor::start().unwrap();
        lab.node.use_neighbour(index, ip("10.0.0.2")).await.unwrap();
        let resolved = async {
            let key = (index, ip("10.0.0.2"));
            while lab.node.neighbours().await.unwrap().get(&key).is_none_or(|found| found.mac.is_none()) {
                monitor.next().await.unwrap();
            }
        };
        assert!(timeout(PATIENCE, resolved).await.is_ok());
        assert_eq!(managed(lab, "10.0.0.2").await, Some(false));
    });
}

/// 10.9.0.0 and so many after it.
fn many(count: u32) -> BTreeSet<IpAddr> {
    (0..count).map(|number| IpAddr::from((0x0a09_0000 + number).to_be_bytes())).collect()
}

/// Which of these have no route, as far as is known.
fn lost<'a>(next_hops: &NextHops, backends: &[&'a str]) -> Vec<&'a str> {
    let is_lost = |backend: &&&str| {
        let problem = next_hops.way(&ip(backend)).unwrap().problem.as_ref();
        problem.is_some_and(|problem| problem.contains("no route"))
    };
    backends.iter().filter(is_lost).copied().collect()
}

#[test]
fn samples_find_what_nobody_told_of() {
    run(async |lab| {
        pair(lab).await;
        lab.node.add_route("10.9.0.0/16", "10.0.0.2").await;
        let mut next_hops = NextHops::new(Kernel::connect().unwrap(), vec!["uplink".into()]);
        // Three samples of 1024 at most.
        next_hops.know(&many(2_500), |_| Some(false));
        next_hops.refresh(Ask::Neighbours).await.unwrap();
        // Numbers 1,000, 1,029 and 2,400.
        let [first, second, third] = ["10.9.3.232", "10.9.4.5", "10.9.9.96"];
        let all = [first, second, third];
        assert!(lost(&next_hops, &all).is_empty());

        lab.node.add_dead_route(&format!("{second}/32"), RouteType::Unreachable).await;
        next_hops.refresh(Ask::Neighbours).await.unwrap();
        next_hops.refresh(Ask::Sample).await.unwrap();
        assert!(lost(&next_hops, &all).is_empty(), "not its turn yet");
        let refreshed = next_hops.refresh(Ask::Sample).await.unwrap();
        assert_eq!(lost(&next_hops, &all), [second]);
        assert!(refreshed.backends.contains(&ip(second)), "{refreshed:?}");

        // The next sample has the last of the three alone: a difference in it has all asked for.
        for backend in [first, third] {
            lab.node.add_dead_route(&format!("{backend}/32"), RouteType::Unreachable).await;
        }
        next_hops.refresh(Ask::Sample).await.unwrap();
        assert_eq!(lost(&next_hops, &all), all);
        next_hops.release().await;
    });
}

#[test]
fn nothing_is_found_where_nothing_has_changed() {
    run(async |lab| {
        pair(lab).await;
        let mut agent = Agent::new(&["10.0.0.2"]).await;
        let (_, remote) = lab.remote.device("eth0").await;
        agent.until("10.0.0.2", "before", leads_to(remote.mac)).await;
        for ask in [Ask::Neighbours, Ask::Sample, Ask::Routes] {
            let found = agent.next_hops.refresh(ask).await.unwrap();
            assert_eq!(found, Refreshed::default(), "{ask:?}");
        }
        agent.next_hops.release().await;
    });
}
