//! The forwarding core on the host takes every journey.

use lb_common::abi::{
    Backend, Config, DropReason, FlowState, IPPROTO_TCP, NextHop, Service, ServiceFlags, ticks_from_seconds,
};
use pointsman_tests::each_journey;
use pointsman_tests::kit::device::Device;
use pointsman_tests::kit::host::Host;
use pointsman_tests::kit::journeys::connection::{Connection, states};
use pointsman_tests::kit::packet::flags::{ACK, SYN};
use pointsman_tests::kit::world::{BACKEND_DEVICE, Ip, NODE_MAC, backend, dropped, forwarded, set_up};

macro_rules! tests {
    ($($module:ident { $($name:ident),+ })+) => {
        $(mod $module {
            use pointsman_tests::kit::host::Host;
            use pointsman_tests::kit::journeys;

            $(#[test]
            fn $name() {
                journeys::$module::$name(&mut Host::default());
            })+
        })+
    };
}

each_journey!(tests);

/// When the table of established flows is full, a connection stays where others begin: it works, and
/// moves as soon as there is room.
#[test]
fn a_full_table_takes_nobody_until_there_is_room() {
    let mut host = Host::default();
    set_up(&mut host, 3);
    (host.v4.capacity, host.v6.capacity) = (5, 5);
    for ip in Ip::BOTH {
        let place = |host: &mut Host, connection: &Connection| states(host, connection);
        let stays = [Some((FlowState::Established as u8, true)); 2];
        let waits = [Some((FlowState::Established as u8, false)); 2];
        let [mut first, second, mut third] =
            [1, 2, 3].map(|client| Connection::open(&mut host, ip, client, 40_000));
        assert_eq!([&first, &second].map(|connection| place(&mut host, connection)), [stays; 2]);
        third.talk(&mut host);
        assert_eq!(place(&mut host, &third), waits, "both halves, or neither");
        first.close(&mut host);
        third.talk(&mut host);
        assert_eq!([&second, &third].map(|connection| place(&mut host, connection)), [stays; 2]);
    }
}

/// The port of a connection that another CPU makes and establishes, right after it was looked for, is not
/// given away.
#[test]
fn a_port_is_not_given_to_two() {
    let mut host = Host::default();
    set_up(&mut host, 1);
    for ip in Ip::BOTH {
        host.config = Config { snat_port_first: 2000, snat_port_count: 1, ..Config::default() };
        let mut first = Connection::open(&mut host, ip, 1, 40_000);
        host.v4.set_aside();
        host.v6.set_aside();
        host.meanwhile.set(Some(|host| {
            host.v4.bring_back();
            host.v6.bring_back();
        }));
        let second = Connection::new(ip, 2, 40_000);
        let syn = second.client_segment(SYN, b"").build();
        dropped(&mut host, &syn, DropReason::SnatPortsExhausted);
        assert_eq!(states(&mut host, &first), [Some((FlowState::Established as u8, true)); 2]);
        let tables = host.snapshots();
        assert!(tables.v4.transient.is_empty() && tables.v6.transient.is_empty(), "nothing is left behind");
        first.talk(&mut host);
    }
}

/// A way from the kernel's routes.
fn way(number: u8) -> NextHop {
    NextHop {
        ifindex: BACKEND_DEVICE,
        destination_mac: [2, 0xee, 0, 0, 0, number],
        source_mac: NODE_MAC,
        vlan: [0; 4],
    }
}

fn set_route(host: &mut Host, to: std::net::IpAddr, hop: NextHop) {
    match to {
        std::net::IpAddr::V4(to) => drop(host.v4.routes.insert(to.octets(), hop)),
        std::net::IpAddr::V6(to) => drop(host.v6.routes.insert(to.octets(), hop)),
    }
}

/// Routes have changed, and the new gateway is not known yet: replies go on as before, on the fast path,
/// and find the new way soon after there is one, of which nobody tells.
#[test]
fn the_way_to_the_client_is_asked_for_again() {
    for (ip, slots) in Ip::BOTH.into_iter().flat_map(|ip| [0, 64].map(|slots| (ip, slots))) {
        let mut host = Host::default();
        host.set_cache(slots);
        set_up(&mut host, 1);
        let mut connection = Connection::open(&mut host, ip, 1, 40_000);
        connection.talk(&mut host);
        let before = forwarded(&mut host, &connection.backend_segment(ACK, b"")).to;
        host.config.route_generation += 1;
        let reply = |host: &mut Host| forwarded(host, &connection.backend_segment(ACK, b"")).to;
        let asked = host.routes_asked.get();
        for _ in 0..600 {
            assert_eq!(reply(&mut host), before);
            host.now += 1;
        }
        let asked = host.routes_asked.get() - asked;
        assert!((5..=12).contains(&asked), "asked {asked} times in ten seconds");
        set_route(&mut host, ip.client(1), way(9));
        let waited = (0..).find(|_| {
            host.now += 1;
            reply(&mut host) == way(9).destination_mac
        });
        assert!(waited.unwrap() <= ticks_from_seconds(2), "{waited:?}");
        let asked = host.routes_asked.get();
        for _ in 0..600 {
            assert_eq!(reply(&mut host), way(9).destination_mac);
            host.now += 1;
        }
        assert_eq!(host.routes_asked.get(), asked, "now it is known");
    }
}

/// Before others stand in for a backend whose way the agent does not know yet, the kernel is asked.
#[test]
fn the_kernel_may_know_the_way_to_a_backend() {
    let mut host = Host::default();
    set_up(&mut host, 2);
    for ip in Ip::BOTH {
        let (service, first_slot) = (ip.service(IPPROTO_TCP), ip.first_slot(IPPROTO_TCP));
        host.set_slot(first_slot + 1, ip.backend_index(IPPROTO_TCP, 0));
        host.set_slot(first_slot + 2, ip.backend_index(IPPROTO_TCP, 1));
        host.set_service(service, Service::new(first_slot, 3, ServiceFlags::MAGLEV));
        let given = |host: &mut Host| {
            (40_000..40_020)
                .map(|port| {
                    forwarded(host, &Connection::new(ip, 1, port).client_segment(SYN, b"")).destination
                })
                .collect::<Vec<_>>()
        };
        let before = given(&mut host);
        host.clear_flows();
        let lost = Backend { next_hop: NextHop::default(), ..backend(ip, IPPROTO_TCP, 0) };
        host.set_backend(ip.backend_index(IPPROTO_TCP, 0), lost);
        set_route(&mut host, ip.backend(0), way(1));
        assert_eq!(given(&mut host), before, "{ip:?}");
    }
}
