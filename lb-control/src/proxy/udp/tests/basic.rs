//! Who is served by whom, and for how long.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::ErrorKind,
};

use lb_common::abi::ConnectionLimit;

use super::*;
use crate::proxy::tests::handed_over;

#[test]
fn echoes_come_from_the_vip() {
    for (ip, server_ip) in [("127.0.0.1", "127.0.0.1"), ("127.7.7.7", "127.0.0.1"), ("::1", "::1")] {
        let (mut proxy, key) = (start(), key_at(ip.parse().unwrap()));
        let backend = server(server_ip, <[u8]>::to_vec);
        serve(&mut proxy, frontend(&key, &[backend]));
        let client = socket(server_ip);
        client.send_to(b"hello", vip(&key)).unwrap();
        let mut buffer = [0; 9];
        assert_eq!(client.recv_from(&mut buffer).unwrap(), (5, vip(&key)));
        assert_eq!(&buffer[..5], b"hello");
        // Counted when it has been sent.
        eventually("the answer is counted", || counts(&proxy).bytes_out == 5);
        let counts = counts(&proxy);
        assert_eq!((counts.accepted, counts.open, counts.bytes_in), (1, 1, 5));
        assert_eq!((counts.backends[0].connections, counts.backends[0].open), (1, 1));
        assert_eq!((proxy.connections(&key), proxy.total_connections()), (1, 1));
    }
}

#[test]
fn a_session_stays_with_its_backend_and_new_ones_take_exact_turns() {
    let (proxy, key) = serving(&[named("a"), named("b"), named("c")]);
    let clients: Vec<_> = (0..60).map(|_| client(&key)).collect();
    let mut count = BTreeMap::<_, u32>::new();
    for (number, client) in clients.iter().enumerate() {
        let whose = whose(client);
        assert_eq!(whose, ["a", "b", "c"][number % 3]);
        *count.entry(whose).or_default() += 1;
    }
    assert_eq!(count.into_values().collect::<Vec<_>>(), [20, 20, 20]);
    for (number, client) in clients.iter().enumerate() {
        assert_eq!(whose(client), ["a", "b", "c"][number % 3]);
    }
    assert_eq!((counts(&proxy).accepted, counts(&proxy).open), (60, 60));
}

#[test]
fn a_backend_that_is_removed_loses_its_sessions_at_once() {
    let [a, b] = [named("a"), named("b")];
    let (mut proxy, key) = serving(&[a, b]);
    let clients: Vec<_> = (0..10).map(|_| client(&key)).collect();
    assert_eq!(clients.iter().map(whose).collect::<String>(), "ababababab");
    serve(&mut proxy, frontend(&key, &[b]));
    assert_eq!(proxy.connections(&key), 5);
    assert_eq!(clients.iter().map(whose).collect::<String>(), "bbbbbbbbbb");
    assert_eq!(counts(&proxy).accepted, 15);
}

#[test]
fn a_terminating_backend_keeps_its_sessions_and_gets_no_more() {
    let [a, b] = [named("a"), named("b")];
    let (mut proxy, key) = serving(&[a, b]);
    let clients: Vec<_> = (0..4).map(|_| client(&key)).collect();
    assert_eq!(clients.iter().map(whose).collect::<String>(), "abab");
    let mut leaving = frontend(&key, &[a, b]);
    leaving.backends[0].role = Role::Terminating;
    leaving.slots = vec![1];
    serve(&mut proxy, leaving.clone());
    assert_eq!(clients.iter().map(whose).collect::<String>(), "abab");
    assert_eq!(whose(&client(&key)), "b");
    // Also when nobody takes new ones: who has none is refused.
    leaving.backends[1].role = Role::Terminating;
    leaving.slots = Vec::new();
    serve(&mut proxy, leaving);
    assert_eq!(clients.iter().map(whose).collect::<String>(), "abab");
    let other = client(&key);
    other.send(b"who").unwrap();
    eventually("a client is refused", || refused(&proxy, Refusal::NoBackend) == 1);
    // As long as there are sessions.
    assert_eq!(proxy.sockets().len(), 2);
    assert!(proxy.apply(vec![(key.clone(), Wanted::Serve(Arc::new(frontend(&key, &[]))))]).is_empty());
    assert_eq!((proxy.connections(&key), proxy.sockets().len()), (0, 0));
}

#[test]
fn without_backends_nobody_listens() {
    let (mut proxy, key) = serving(&[]);
    let client = client(&key);
    client.send(b"hello").unwrap();
    assert_eq!(client.recv(&mut [0; 9]).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    serve(&mut proxy, frontend(&key, &[named("a")]));
    assert_eq!(whose(&client), "a");
    for wanted in [Wanted::Finish(Arc::new(frontend(&key, &[echo()]))), Wanted::Gone] {
        assert!(proxy.apply(vec![(key.clone(), wanted)]).is_empty());
        assert_eq!((proxy.connections(&key), proxy.sockets().len()), (0, 0));
        client.send(b"hello").unwrap();
        assert_eq!(client.recv(&mut [0; 9]).unwrap_err().kind(), ErrorKind::ConnectionRefused);
        serve(&mut proxy, frontend(&key, &[named("a")]));
        assert_eq!(whose(&client), "a");
    }
}

#[test]
fn an_address_that_somebody_else_has_is_told() {
    let mut proxy = start();
    let other = socket("127.0.0.1");
    let key = ServiceKey { port: other.local_addr().unwrap().port(), ..key() };
    let wanted = Wanted::Serve(Arc::new(frontend(&key, &[echo()])));
    let failed = proxy.apply(vec![(key.clone(), wanted.clone())]);
    let text = format!("{:#}", failed[0].1);
    assert!(text.contains(&format!("listening on {}", vip(&key))) && text.contains("in use"), "{text}");
    drop(other);
    assert!(proxy.apply(vec![(key.clone(), wanted)]).is_empty());
    assert_eq!(exchange(&client(&key), b"x"), b"x");
}

#[test]
fn affinity_goes_by_the_address_and_maglev_by_the_kernels_function() {
    let backends = [named("a"), named("b"), named("c")];
    let (mut proxy, key) = (start(), key());
    let sticky = Frontend { affinity: Some(Duration::from_secs(60)), ..frontend(&key, &backends) };
    serve(&mut proxy, sticky);
    let all: BTreeSet<_> = (0..9).map(|_| whose(&client(&key))).collect();
    assert_eq!(all.len(), 1);
    let slots = (0..1_021).map(|slot| slot % 3).collect();
    serve(&mut proxy, Frontend { scheduler: Scheduler::Maglev, slots, ..frontend(&key, &backends) });
    for _ in 0..20 {
        let client = client(&key);
        let by_kernel = {
            use lb_common::{
                abi::{FlowKey, Service, ServiceFlags, V4},
                forward::schedule::by_client,
            };
            let flow = FlowKey {
                source_port: client.local_addr().unwrap().port().to_be_bytes(),
                destination_port: key.port.to_be_bytes(),
                protocol: 17,
                source: [127, 0, 0, 1],
                destination: [127, 0, 0, 1],
            };
            by_client::<V4>(&flow, Service::new(0, 1_021, ServiceFlags::MAGLEV))
        };
        assert_eq!(whose(&client), ["a", "b", "c"][by_kernel as usize % 3]);
    }
}

#[test]
fn least_connections_counts_sessions_of_all_workers() {
    let backends = [named("a"), named("b")];
    let (mut proxy, key) = (start(), key());
    let least = |weights: [u32; 2]| {
        let mut least = Frontend { scheduler: Scheduler::LeastConnections, ..frontend(&key, &backends) };
        weights.into_iter().enumerate().for_each(|(index, weight)| least.backends[index].weight = weight);
        least
    };
    serve(&mut proxy, least([1, 3]));
    let clients: Vec<_> = (0..40).map(|_| client(&key)).collect();
    let count = clients.iter().filter(|client| whose(client) == "a").count();
    assert_eq!(count, 10);
}

#[test]
fn who_may_not_connect_hears_nothing() {
    let (mut proxy, key) = (start(), key());
    let backend = named("a");
    let ranges = ["127.0.0.2/32".parse().unwrap()];
    serve(&mut proxy, Frontend { source_ranges: ranges.into(), ..frontend(&key, &[backend]) });
    let [inside, outside] = ["127.0.0.2", "127.0.0.3"].map(socket);
    for one in [&inside, &outside] {
        one.connect(vip(&key)).unwrap();
        one.send(b"who").unwrap();
    }
    // The one that may is served after the one that may not.
    assert_eq!(whose(&outside_then(&inside, &outside)), "a");
    outside.set_nonblocking(true).unwrap();
    assert_eq!(outside.recv(&mut [0; 9]).unwrap_err().kind(), ErrorKind::WouldBlock);
    assert_eq!(counts(&proxy).accepted, 1);
    serve(&mut proxy, frontend(&key, &[backend]));
    outside.set_nonblocking(false).unwrap();
    assert_eq!(whose(&outside), "a");
}

fn outside_then(inside: &UdpSocket, outside: &UdpSocket) -> UdpSocket {
    outside.send(b"who").unwrap();
    // What it sent before has an answer, too.
    assert_eq!(receive(inside), b"a");
    inside.try_clone().unwrap()
}

#[test]
fn a_client_begins_no_more_sessions_than_it_may() {
    let (mut proxy, key) = (start(), key());
    let limit = ConnectionLimit { rate: 1, burst: 3 };
    serve(&mut proxy, Frontend { connection_limit: Some(limit), ..frontend(&key, &[echo()]) });
    let clients: Vec<_> = (0..10).map(|_| client(&key)).collect();
    for client in &clients {
        client.send(b"x").unwrap();
    }
    eventually("all have been looked at", || {
        refused(&proxy, Refusal::ConnectionRate) + counts(&proxy).accepted == 10
    });
    // Another one if a second has passed.
    assert!((3..=4).contains(&counts(&proxy).accepted), "{}", counts(&proxy).accepted);
}

#[test]
fn idle_sessions_end() {
    let settings =
        Settings { workers: 1, idle_timeout_udp: Duration::from_millis(300), ..Settings::default() };
    let mut proxy = Proxy::start(settings, Vec::new()).unwrap();
    let key = key();
    serve(&mut proxy, frontend(&key, &[named("a"), named("b")]));
    let client = client(&key);
    assert_eq!(whose(&client), "a");
    assert_eq!(proxy.connections(&key), 1);
    eventually("the session ends", || proxy.connections(&key) == 0);
    assert_eq!(whose(&client), "b");
}

#[test]
fn datagrams_of_a_vip_of_ours_go_nowhere() {
    let (mut proxy, first, second) = (start(), key(), key());
    serve(&mut proxy, frontend(&first, &[echo()]));
    serve(&mut proxy, frontend(&second, &[echo()]));
    // Beside the proxy at its address: what this sends looks as if the other Service did.
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::DGRAM, None).unwrap();
    socket.set_reuse_address(true).unwrap();
    socket.set_reuse_port(true).unwrap();
    socket.bind(&vip(&second).into()).unwrap();
    let loops = UdpSocket::from(socket);
    loops.send_to(b"ping", vip(&first)).unwrap();
    let own = |proxy: &Proxy| {
        let counts = proxy.counts().into_iter().find(|counts| counts.key == first).unwrap();
        counts.refused.into_iter().find(|(why, _)| *why == Refusal::OwnAddress).unwrap().1
    };
    eventually("it is dropped", || own(&proxy) == 1);
    assert_eq!(proxy.total_connections(), 0);
}

#[test]
fn another_agent_takes_over_the_sockets() {
    let (backend, key) = (echo(), key());
    let mut before = start();
    serve(&mut before, frontend(&key, &[backend]));
    let clients: Vec<_> = (0..20).map(|_| client(&key)).collect();
    clients.iter().for_each(|client| assert_eq!(exchange(client, b"x"), b"x"));
    let inherited = handed_over(&before);
    assert_eq!(inherited.len(), 2);
    // With fewer workers than there are sockets.
    let mut after = Proxy::start(Settings { workers: 1, ..Settings::default() }, inherited).unwrap();
    serve(&mut after, frontend(&key, &[backend]));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    assert_eq!(runtime.block_on(before.drain(PATIENCE)), 0);
    clients.iter().for_each(|client| assert_eq!(exchange(client, b"y"), b"y"));
    assert_eq!(after.connections(&key), 20);
}

#[test]
fn draining_waits_for_answers_until_the_deadline() {
    let silent = socket("127.0.0.1");
    let (proxy, key) = serving(&[silent.local_addr().unwrap()]);
    let clients = [client(&key), client(&key)];
    let mut buffer = [0; 9];
    let from = clients.each_ref().map(|client| {
        client.send(b"question").unwrap();
        silent.recv_from(&mut buffer).unwrap().1
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let answers = thread::spawn(move || {
        silent.send_to(b"answer", from[0]).unwrap();
        silent
    });
    assert_eq!(runtime.block_on(proxy.drain(Duration::from_millis(400))), 0, "datagrams are not counted");
    assert_eq!(receive(&clients[0]), b"answer");
    drop(answers.join().unwrap());
}
