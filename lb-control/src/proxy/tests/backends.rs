//! Which backend a connection gets, and what becomes of it when backends change.

use std::collections::BTreeMap;
use std::io::ErrorKind;

use lb_common::abi::{FlowKey, Service, ServiceFlags, V4};
use lb_common::forward::schedule::by_client;

use super::*;

fn with_role(mut frontend: Frontend, index: usize, role: Role) -> Frontend {
    frontend.backends[index].role = role;
    frontend.slots.retain(|slot| *slot as usize != index);
    frontend
}

#[test]
fn connections_of_a_backend_that_is_removed_are_reset() {
    let (mut proxy, key, stays, goes) = (start(), key(), echo(), echo());
    serve(&mut proxy, frontend(&key, &[stays, goes]));
    let [mut first, mut second] = [client(&key), client(&key)];
    // The turns are taken in the order of these.
    assert_eq!(exchange(&mut first, "a"), "a");
    assert_eq!(exchange(&mut second, "b"), "b");
    serve(&mut proxy, frontend(&key, &[stays]));
    let mut results = [&mut first, &mut second].map(|stream| {
        stream.write_all(b"c").and_then(|()| stream.read_exact(&mut [0])).map_err(|error| error.kind())
    });
    results.sort_by_key(Result::is_ok);
    assert_eq!(results[1], Ok(()));
    let error = results[0].unwrap_err();
    assert!(matches!(error, ErrorKind::ConnectionReset | ErrorKind::BrokenPipe), "{error:?}");
    eventually("one is left", || proxy.connections(&key) == 1);
}

#[test]
fn a_terminating_backend_keeps_what_it_has() {
    let (mut proxy, key, old) = (start(), key(), echo());
    serve(&mut proxy, frontend(&key, &[old]));
    let mut stream = client(&key);
    assert_eq!(exchange(&mut stream, "a"), "a");
    let new = named("new");
    serve(&mut proxy, with_role(frontend(&key, &[old, new]), 0, Role::Terminating));
    assert_eq!((whose(&key), whose(&key)), ("new".into(), "new".into()));
    assert_eq!(exchange(&mut stream, "b"), "b");
}

#[test]
fn without_backends_the_kernel_refuses() {
    let (mut proxy, key, old) = (start(), key(), echo());
    serve(&mut proxy, frontend(&key, &[old]));
    let mut stream = client(&key);
    assert_eq!(exchange(&mut stream, "a"), "a");
    serve(&mut proxy, with_role(frontend(&key, &[old]), 0, Role::Terminating));
    assert_eq!(refusal(&key), ErrorKind::ConnectionRefused);
    assert_eq!(exchange(&mut stream, "b"), "b");
    serve(&mut proxy, frontend(&key, &[named("back")]));
    assert_eq!(whose(&key), "back");
}

#[test]
fn finish_keeps_and_gone_resets() {
    let (mut proxy, key, server) = (start(), key(), echo());
    let wanted = Arc::new(frontend(&key, &[server]));
    serve(&mut proxy, frontend(&key, &[server]));
    let mut stream = client(&key);
    assert_eq!(exchange(&mut stream, "a"), "a");
    assert!(proxy.apply(vec![(key.clone(), Wanted::Finish(wanted))]).is_empty());
    assert_eq!(exchange(&mut stream, "b"), "b");
    assert_eq!(proxy.connections(&key), 1);
    assert!(proxy.apply(vec![(key.clone(), Wanted::Gone)]).is_empty());
    assert_eq!(stream.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    eventually("none is left", || proxy.total_connections() == 0);
    assert_eq!((proxy.counts()[0].open, proxy.counts()[0].accepted), (0, 1), "what was counted stays");
}

#[test]
fn an_address_in_use_is_told() {
    let mut proxy = start();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let key = ServiceKey { port: taken.local_addr().unwrap().port(), ..key() };
    let wanted = Wanted::Serve(Arc::new(frontend(&key, &[echo()])));
    let failed = proxy.apply(vec![(key.clone(), wanted.clone())]);
    assert_eq!(failed.len(), 1);
    assert!(format!("{:#}", failed[0].1).contains("listening on"), "{:#}", failed[0].1);
    drop(taken);
    assert!(proxy.apply(vec![(key.clone(), wanted)]).is_empty());
    assert_eq!(exchange(&mut client(&key), "a"), "a");
}

#[test]
fn turns_are_exact_when_workers_share_them() {
    exact_turns(settings());
}

#[test]
fn turns_are_exact_when_each_worker_listens() {
    exact_turns(Settings { own_listeners: true, ..settings() });
}

fn exact_turns(settings: Settings) {
    let (mut proxy, key) = (Proxy::start(settings, Vec::new()).unwrap(), key());
    serve(&mut proxy, frontend(&key, &[named("a"), named("b"), named("c")]));
    let clients: Vec<_> = (0..6)
        .map(|_| {
            let key = key.clone();
            thread::spawn(move || (0..50).map(|_| whose(&key)).collect::<Vec<_>>())
        })
        .collect();
    let mut counts = BTreeMap::new();
    for name in clients.into_iter().flat_map(|client| client.join().unwrap()) {
        *counts.entry(name).or_insert(0) += 1;
    }
    assert_eq!(counts.into_values().collect::<Vec<_>>(), [100, 100, 100]);
}

#[test]
fn weights_are_slots() {
    let (mut proxy, key) = (start(), key());
    let frontend = Frontend { slots: vec![0, 1, 0], ..frontend(&key, &[named("a"), named("b")]) };
    serve(&mut proxy, frontend);
    assert_eq!((0..9).map(|_| whose(&key)).collect::<String>(), "abaabaaba");
}

#[test]
fn the_fewest_connections_for_the_weight() {
    let (mut proxy, key) = (start(), key());
    let scheduler = Scheduler::LeastConnections;
    let mut frontend = Frontend { scheduler, ..frontend(&key, &[echo(), echo()]) };
    frontend.backends[0].weight = 2;
    serve(&mut proxy, frontend);
    let streams: Vec<_> = (0..9)
        .map(|_| {
            let mut stream = client(&key);
            exchange(&mut stream, "a");
            stream
        })
        .collect();
    let open = || proxy.counts().remove(0).backends.iter().map(|backend| backend.open).collect::<Vec<_>>();
    assert_eq!(open(), [6, 3]);
    drop(streams);
    eventually("all end", || open() == [0, 0]);
}

#[test]
fn a_client_stays_with_its_backend() {
    let (mut proxy, key) = (start(), key());
    let servers = [named("a"), named("b"), named("c")];
    let affinity = |servers| Frontend { affinity: Some(Duration::from_secs(60)), ..frontend(&key, servers) };
    serve(&mut proxy, affinity(&servers));
    let mine = whose(&key);
    for _ in 0..5 {
        assert_eq!(whose(&key), mine);
    }
    // When it goes, there is another one, and that stays.
    let rest: Vec<_> = servers.into_iter().zip(["a", "b", "c"]).filter(|(_, name)| *name != mine).collect();
    let rest: Vec<_> = rest.into_iter().map(|(address, _)| address).collect();
    serve(&mut proxy, affinity(&rest));
    let next = whose(&key);
    assert_ne!(next, mine);
    for _ in 0..5 {
        assert_eq!(whose(&key), next);
    }
}

#[test]
fn a_lookup_table_is_read_as_the_kernel_reads_it() {
    let (mut proxy, key) = (start(), key());
    let names = ["a", "b", "c"];
    let slots: Vec<u32> = (0..1_021).map(|slot| slot % 3).collect();
    let scheduler = Scheduler::Maglev;
    let frontend = Frontend { slots: slots.clone(), scheduler, ..frontend(&key, &names.map(named)) };
    serve(&mut proxy, frontend);
    let mut seen = BTreeMap::new();
    for _ in 0..20 {
        let mut stream = client(&key);
        let flow = FlowKey {
            source_port: stream.local_addr().unwrap().port().to_be_bytes(),
            destination_port: key.port.to_be_bytes(),
            protocol: 6,
            source: [127, 0, 0, 1],
            destination: [127, 0, 0, 1],
        };
        let slot = by_client::<V4>(&flow, Service::new(0, 1_021, ServiceFlags::MAGLEV));
        let mut name = String::new();
        stream.read_to_string(&mut name).unwrap();
        assert_eq!(name, names[slots[slot as usize] as usize]);
        *seen.entry(name).or_insert(0) += 1;
    }
    assert!(seen.len() > 1, "{seen:?}");
}

#[test]
fn one_that_does_not_answer_is_given_up() {
    // Its queue is full, so that the kernel drops what comes: nobody else makes a connect wait that long.
    let silent = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    silent.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    silent.listen(0).unwrap();
    let address = silent.local_addr().unwrap().as_socket().unwrap();
    let _fills = TcpStream::connect(address).unwrap();
    let settings = Settings { connect_timeout: Duration::from_millis(200), ..settings() };
    let (mut proxy, key) = (Proxy::start(settings, Vec::new()).unwrap(), key());
    serve(&mut proxy, frontend(&key, &[address, named("b")]));
    assert_eq!((whose(&key), whose(&key)), ("b".into(), "b".into()));
    let counts = proxy.counts().remove(0);
    assert_eq!((counts.backends[0].connect_failures, counts.backends[0].open), (2, 0));
}

#[test]
fn backends_see_the_address_that_was_chosen() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let key = key();
    let sources = vec!["127.0.0.77".parse().unwrap(), "::1".parse().unwrap()];
    let mut proxy = Proxy::start(Settings { sources, ..settings() }, Vec::new()).unwrap();
    serve(&mut proxy, frontend(&key, &[listener.local_addr().unwrap()]));
    let _client = client(&key);
    assert_eq!(listener.accept().unwrap().1.ip().to_string(), "127.0.0.77");
}

/// It is not for want of ports, and says nothing of the backend.
#[test]
fn an_address_that_is_not_here_is_told() {
    let key = key();
    // For documentation (RFC 5737): nobody has it.
    let sources = vec!["192.0.2.77".parse().unwrap()];
    let mut proxy = Proxy::start(Settings { sources, ..settings() }, Vec::new()).unwrap();
    serve(&mut proxy, frontend(&key, &[echo()]));
    assert_eq!(refusal(&key), ErrorKind::ConnectionReset);
    assert_eq!(refused(&proxy, crate::proxy::Refusal::SourceMissing), 1);
    assert_eq!(proxy.counts()[0].backends[0].connect_failures, 0);
}
