//! Sockets of the node itself that turn to a VIP, by the core on the host.

use std::net::IpAddr;

use lb_common::abi::{BackendState, IPPROTO_TCP, IPPROTO_UDP, ServiceFlags, SocketRole, ticks_from_seconds};
use lb_common::forward::socket::{Answer, Caller, mapped};
use pointsman_tests::kit::{
    device::Device,
    host::Host,
    journeys::connection::Connection,
    sockets::Call,
    world::{DNS, DNS_BACKEND, HTTP, HTTP_BACKEND, Ip, backend, set_flags, set_slots, set_up},
};

fn host(backends: u32) -> Host {
    let mut host = Host::default();
    set_up(&mut host, backends);
    host
}

fn caller(socket: u64, protocol: u8) -> Caller {
    Caller { socket, network: 1, protocol }
}

/// The backend that a call is given.
fn given(host: &Host, caller: &Caller, call: Call, ip: Ip) -> IpAddr {
    let (port, target) =
        if caller.protocol == IPPROTO_TCP { (HTTP, HTTP_BACKEND) } else { (DNS, DNS_BACKEND) };
    let (answer, (address, port)) = host.call(caller, call, (ip.vip(), port));
    assert_eq!((answer, port), (Answer::Replaced, target));
    address
}

fn sees(host: &Host, caller: &Caller, end: (IpAddr, u16)) -> (IpAddr, u16) {
    host.call(caller, Call::Look, end).1
}

#[test]
fn connections_of_the_node_take_turns_with_those_of_clients() {
    let mut host = host(3);
    for ip in Ip::BOTH {
        for turn in 0..6 {
            let chosen = match turn % 2 {
                0 => given(&host, &caller(7, IPPROTO_TCP), Call::Connect, ip),
                _ => Connection::open(&mut host, ip, 1, 40_000 + turn as u16).backend(),
            };
            assert_eq!(chosen, ip.backend(turn % 3), "turn {turn}");
        }
        let stats = host.stats().services[&ip.service(IPPROTO_TCP)];
        assert_eq!(stats.new_flows, 6);
    }
}

#[test]
fn the_peer_is_the_vip_of_that_socket_alone() {
    let host = host(1);
    for ip in Ip::BOTH {
        let (one, other) = (caller(1, IPPROTO_TCP), caller(2, IPPROTO_TCP));
        let end = (given(&host, &one, Call::Connect, ip), HTTP_BACKEND);
        assert_eq!(sees(&host, &one, end), (ip.vip(), HTTP));
        assert_eq!(sees(&host, &other, end), end, "who has called the backend itself");
        assert_eq!(sees(&host, &one, (end.0, 1)), (end.0, 1), "another port");
    }
}

#[test]
fn what_is_no_vip_is_left_alone() {
    let host = host(1);
    for ip in Ip::BOTH {
        for remote in [(ip.client(1), HTTP), (ip.vip(), HTTP + 1), (ip.vip(), DNS)] {
            for call in [Call::Connect, Call::Send, Call::Look] {
                assert_eq!(host.call(&caller(1, IPPROTO_TCP), call, remote), (Answer::Pass, remote));
            }
        }
    }
}

/// The proxy listens on this node: whoever turns to it gets there without help.
#[test]
fn what_the_proxy_serves_is_left_alone() {
    let mut host = host(1);
    for ip in Ip::BOTH {
        for (protocol, port) in [(IPPROTO_TCP, HTTP), (IPPROTO_UDP, DNS)] {
            set_flags(&mut host, ip, protocol, 1, ServiceFlags::PROXIED);
            for call in [Call::Connect, Call::Send] {
                let remote = (ip.vip(), port);
                assert_eq!(host.call(&caller(1, protocol), call, remote), (Answer::Pass, remote));
            }
            set_flags(&mut host, ip, protocol, 1, ServiceFlags::PROXY_FINISHES);
        }
        given(&host, &caller(1, IPPROTO_TCP), Call::Connect, ip);
    }
}

#[test]
fn without_a_backend_calls_are_refused_and_counted() {
    let mut host = host(1);
    for ip in Ip::BOTH {
        set_slots(&mut host, ip, IPPROTO_TCP, 0);
        set_slots(&mut host, ip, IPPROTO_UDP, 0);
        let tcp = host.call(&caller(1, IPPROTO_TCP), Call::Connect, (ip.vip(), HTTP));
        let udp = host.call(&caller(1, IPPROTO_UDP), Call::Send, (ip.vip(), DNS));
        assert_eq!((tcp.0, udp.0), (Answer::Refuse, Answer::Refuse));
        for protocol in [IPPROTO_TCP, IPPROTO_UDP] {
            assert_eq!(host.stats().services[&ip.service(protocol)].refused, 1);
        }
    }
}

#[test]
fn a_slot_that_leads_nowhere_is_refused() {
    let mut host = host(1);
    for ip in Ip::BOTH {
        let index = ip.backend_index(IPPROTO_TCP, 0);
        let mut gone = backend(ip, IPPROTO_TCP, 0);
        gone.state = BackendState::Free as u8;
        host.set_backend(index, gone);
        let answer = host.call(&caller(1, IPPROTO_TCP), Call::Connect, (ip.vip(), HTTP)).0;
        assert_eq!(answer, Answer::Refuse);
        // One of the other family.
        gone = backend(ip, IPPROTO_TCP, 0);
        gone.family = 10 - gone.family;
        host.set_backend(index, gone);
        let answer = host.call(&caller(1, IPPROTO_TCP), Call::Connect, (ip.vip(), HTTP)).0;
        assert_eq!(answer, Answer::Refuse);
    }
}

#[test]
fn datagrams_of_a_socket_stay_with_their_backend() {
    let mut host = host(3);
    for ip in Ip::BOTH {
        let socket = caller(5, IPPROTO_UDP);
        let first = given(&host, &socket, Call::Send, ip);
        assert_ne!(given(&host, &caller(6, IPPROTO_UDP), Call::Send, ip), first);
        for _ in 0..3 {
            assert_eq!(given(&host, &socket, Call::Send, ip), first);
            assert_eq!(sees(&host, &socket, (first, DNS_BACKEND)), (ip.vip(), DNS));
            // What the table forgets, the next datagram brings back.
            assert!(host.forget_socket(&socket, SocketRole::Reply, ip, (first, DNS_BACKEND)));
        }
        // It keeps a backend that terminates, and leaves one that is gone: also if its index is used again.
        let index = ip.backend_index(IPPROTO_UDP, (0..3).find(|n| ip.backend(*n) == first).unwrap());
        let mut entry = *host.backends.get(index as usize).unwrap();
        entry.state = BackendState::Terminating as u8;
        host.set_backend(index, entry);
        assert_eq!(given(&host, &socket, Call::Send, ip), first);
        entry.generation += 1;
        entry.address = backend(ip, IPPROTO_UDP, 20).address;
        host.set_backend(index, entry);
        let calls: Vec<_> = (0..2).map(|_| given(&host, &socket, Call::Send, ip)).collect();
        assert!(calls[0] != first && calls[0] == calls[1], "{calls:?}");
    }
}

#[test]
fn a_connected_socket_begins_anew() {
    let host = host(3);
    for ip in Ip::BOTH {
        let socket = caller(5, IPPROTO_UDP);
        let calls: Vec<_> = (0..3).map(|_| given(&host, &socket, Call::Connect, ip)).collect();
        assert_eq!(calls, [ip.backend(0), ip.backend(1), ip.backend(2)]);
    }
}

#[test]
fn affinity_goes_by_the_network_namespace() {
    let mut host = host(3);
    for ip in Ip::BOTH {
        set_flags(&mut host, ip, IPPROTO_TCP, 3, ServiceFlags::AFFINITY);
        host.set_affinity_ticks(ip.service(IPPROTO_TCP), ticks_from_seconds(60));
        let of = |socket, network| Caller { socket, network, protocol: IPPROTO_TCP };
        let first = given(&host, &of(1, 1), Call::Connect, ip);
        assert_ne!(given(&host, &of(2, 2), Call::Connect, ip), first, "another pod");
        for socket in 3..6 {
            host.now += ticks_from_seconds(50);
            assert_eq!(given(&host, &of(socket, 1), Call::Connect, ip), first, "each begins the time anew");
        }
        host.now += ticks_from_seconds(70);
        let next = given(&host, &of(7, 1), Call::Connect, ip);
        assert_ne!(next, first, "after the timeout it takes its turn");
        // A backend that terminates takes nobody new.
        let number = (0..3).find(|n| ip.backend(*n) == next).unwrap();
        let mut entry = backend(ip, IPPROTO_TCP, number);
        entry.state = BackendState::Terminating as u8;
        host.set_backend(ip.backend_index(IPPROTO_TCP, number), entry);
        assert_ne!(given(&host, &of(8, 1), Call::Connect, ip), next);
    }
}

#[test]
fn source_ranges_are_about_others() {
    let mut host = host(1);
    for ip in Ip::BOTH {
        set_flags(&mut host, ip, IPPROTO_TCP, 1, ServiceFlags::SOURCE_RANGES);
        assert_eq!(given(&host, &caller(1, IPPROTO_TCP), Call::Connect, ip), ip.backend(0));
    }
}

#[test]
fn entries_without_a_service_do_nothing() {
    let mut host = host(1);
    host.set_vip(Ip::V4.vip(), HTTP, IPPROTO_TCP, u32::MAX);
    let remote = (Ip::V4.vip(), HTTP);
    assert_eq!(host.call(&caller(1, IPPROTO_TCP), Call::Connect, remote), (Answer::Pass, remote));
}

#[test]
fn addresses_of_ipv4_within_ipv6() {
    let address: std::net::Ipv4Addr = "203.0.113.7".parse().unwrap();
    assert_eq!(mapped(&address.to_ipv6_mapped().octets()), Some(address.octets()));
    for other in ["::1", "2001:db8::ffff:203.0.113.7", "::203.0.113.7"] {
        assert_eq!(mapped(&other.parse::<std::net::Ipv6Addr>().unwrap().octets()), None);
    }
}
