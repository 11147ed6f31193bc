//! Backends that do not take what they get.

use std::io::ErrorKind;

use nix::sys::socket::{setsockopt, sockopt};

use super::*;
use crate::proxy::IcmpErrors;

/// Where nobody listens.
fn nobody() -> SocketAddr {
    vip(&key())
}

/// The error that a client of these backends gets.
fn error_of(ip: &str, backends: &[SocketAddr]) -> (Proxy, UdpSocket, ErrorKind) {
    let (mut proxy, key) = (start(), key_at(ip.parse().unwrap()));
    serve(&mut proxy, frontend(&key, backends));
    let client = client(&key);
    client.send(b"hello").unwrap();
    let error = client.recv(&mut [0; 9]).unwrap_err().kind();
    (proxy, client, error)
}

#[test]
fn a_refusal_reaches_the_client_and_the_next_backend_is_tried() {
    let (proxy, client, error) = error_of("127.0.0.1", &[nobody(), named("b")]);
    assert_eq!(error, ErrorKind::ConnectionRefused);
    assert_eq!(proxy.total_connections(), 0);
    assert_eq!(whose(&client), "b");
    let counts = counts(&proxy);
    assert_eq!((counts.accepted, counts.backends[0].connect_failures), (2, 1));
    // The count goes on when another proxy follows.
    let reader = proxy.reader();
    let expected = IcmpErrors { told: 1, untold: 0 };
    assert_eq!(reader.totals().icmp_errors, expected);
    drop(proxy);
    assert_eq!(reader.totals().icmp_errors, expected);
}

#[test]
fn a_refusal_reaches_clients_of_ipv6() {
    let nobody = vip(&key_at("::1".parse().unwrap()));
    let (_proxy, client, error) = error_of("::1", &[nobody, server("::1", <[u8]>::to_vec)]);
    assert_eq!(error, ErrorKind::ConnectionRefused);
    assert_eq!(exchange(&client, b"again"), b"again");
}

#[test]
fn also_with_a_lookup_table_and_with_affinity() {
    let backends = [nobody(), named("b")];
    for scheduler in [Scheduler::Maglev, Scheduler::RoundRobin] {
        let (mut proxy, key) = (start(), key());
        let affinity = Some(Duration::from_secs(60));
        // The first is in all slots but one.
        let slots = (0..50).map(|slot| u32::from(slot == 49)).collect();
        serve(&mut proxy, Frontend { scheduler, affinity, slots, ..frontend(&key, &backends) });
        let client = client(&key);
        client.send(b"hello").unwrap();
        // Whoever got the other one at once has been served.
        if client.recv(&mut [0; 9]).is_err() {
            assert_eq!(whose(&client), "b", "{scheduler:?}");
        }
    }
}

#[test]
fn a_backend_that_keeps_refusing_is_avoided() {
    let (proxy, key) = serving(&[nobody(), named("b")]);
    let mut errors = 0;
    for _ in 0..30 {
        let client = client(&key);
        client.send(b"who").unwrap();
        errors += u32::from(client.recv(&mut [0; 9]).is_err());
    }
    // Three until it is known, one more for each second that the test takes.
    assert!((3..15).contains(&errors), "{errors}");
    assert!(counts(&proxy).backends[0].connect_failures >= 3);
}

#[test]
fn the_only_backend_is_tried_again() {
    let gone = nobody();
    let (_proxy, client, error) = error_of("127.0.0.1", &[gone]);
    assert_eq!(error, ErrorKind::ConnectionRefused);
    let backend = UdpSocket::bind(gone).unwrap();
    client.send(b"again").unwrap();
    backend.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(receive(&backend), b"again");
}

#[test]
fn where_no_way_leads_is_told_as_such() {
    let (mut proxy, key) = (start(), key());
    // The kernel lets nobody send there who did not ask for it.
    serve(&mut proxy, frontend(&key, &["255.255.255.255:9".parse().unwrap()]));
    let client = client(&key);
    // Else hosts that cannot be reached are not told to sockets (RFC 1122, section 4.1.3.3).
    setsockopt(&client, sockopt::Ipv4RecvErr, &true).unwrap();
    client.send(b"hello").unwrap();
    assert_eq!(client.recv(&mut [0; 9]).unwrap_err().kind(), ErrorKind::HostUnreachable);
    assert_eq!(refused(&proxy, Refusal::ConnectFailed), 1);
}

#[test]
fn an_address_that_is_not_here_costs_no_session() {
    let sources = vec!["192.0.2.77".parse().unwrap()];
    let mut proxy = Proxy::start(Settings { sources, ..Settings::default() }, Vec::new()).unwrap();
    let key = key();
    serve(&mut proxy, frontend(&key, &[echo()]));
    client(&key).send(b"hello").unwrap();
    eventually("it is told", || refused(&proxy, Refusal::SourceMissing) == 1);
    assert_eq!(counts(&proxy).backends[0].connect_failures, 0);
}

#[test]
fn too_many_sessions_push_out_those_that_may_be_made_up() {
    let settings = Settings { workers: 1, max_connections: Some(1), ..Settings::default() };
    let mut proxy = Proxy::start(settings, Vec::new()).unwrap();
    let key = key();
    serve(&mut proxy, frontend(&key, &[named("a"), named("b"), named("c")]));
    let steady = client(&key);
    assert_eq!((whose(&steady), whose(&steady)), ("a".into(), "a".into()));
    // All at a time, so that none has the port of another.
    let others: Vec<_> = (0..200).map(|_| client(&key)).collect();
    for other in &others {
        other.send(b"x").unwrap();
    }
    eventually("all have begun", || counts(&proxy).accepted == 201);
    assert!(proxy.connections(&key) <= 16, "{}", proxy.connections(&key));
    assert_eq!(refused(&proxy, Refusal::Displaced), 201 - proxy.connections(&key));
    assert_eq!(whose(&steady), "a");
    assert_eq!(counts(&proxy).accepted, 201, "it was never pushed out");
}
