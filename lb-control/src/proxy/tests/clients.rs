//! Who may connect, and what backends learn of it.

use std::io::ErrorKind;

use ipnet::IpNet;
use lb_common::abi::ConnectionLimit;
use socket2::{Domain, Socket, Type};

use super::*;
use crate::{
    plan::proxy_header::{version_1, version_2},
    proxy::{Limits, Refusal, raise_descriptors, source_filter},
};

/// Gives back all that it got when the client has ended.
fn whole() -> SocketAddr {
    server(|mut stream| {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        stream.write_all(&bytes).unwrap();
    })
}

fn seen_by_backend(key: &ServiceKey, bytes: &[u8]) -> (SocketAddr, Vec<u8>) {
    let mut stream = client(key);
    stream.write_all(bytes).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut seen = Vec::new();
    stream.read_to_end(&mut seen).unwrap();
    (stream.local_addr().unwrap(), seen)
}

#[test]
fn headers_come_first() {
    let (mut proxy, key) = (start(), key());
    let server = whole();
    type Header = fn(SocketAddr, SocketAddr) -> Vec<u8>;
    for (client_address, header) in
        [(ClientAddress::ProxyV1, version_1 as Header), (ClientAddress::ProxyV2, version_2)]
    {
        serve(&mut proxy, Frontend { client_address, ..frontend(&key, &[server]) });
        for bytes in [&b"hello"[..], b"", &[1; 100_000]] {
            let (address, seen) = seen_by_backend(&key, bytes);
            assert_eq!(seen, [&header(address, vip(&key)), bytes].concat());
        }
    }
}

#[test]
fn ipv6() {
    let Ok(free) = TcpListener::bind("[::1]:0") else { return println!("SKIP: no IPv6 here") };
    let vip = free.local_addr().unwrap();
    drop(free);
    let key = ServiceKey { vip: vip.ip(), port: vip.port(), ..key() };
    let mut proxy = start();
    serve(&mut proxy, Frontend { client_address: ClientAddress::ProxyV1, ..frontend(&key, &[whole()]) });
    let (address, seen) = seen_by_backend(&key, b"x");
    assert_eq!(seen, [&version_1(address, vip)[..], b"x"].concat());
}

/// An attempt from an address of the loopback network.
fn attempt(from: [u8; 4], key: &ServiceKey) -> std::io::Result<TcpStream> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::from((from, 0)).into()).unwrap();
    socket.connect_timeout(&vip(key).into(), Duration::from_millis(300))?;
    Ok(socket.into())
}

#[test]
fn who_is_in_no_range_gets_no_answer() {
    let (mut proxy, key) = (start(), key());
    let ranges: Arc<[IpNet]> =
        ["127.0.0.2/32", "127.1.0.0/16", "fd00::/8"].map(|text| text.parse().unwrap()).into();
    let open = frontend(&key, &[echo()]);
    let limited = Frontend { source_ranges: ranges, ..open.clone() };
    for _ in 0..2 {
        serve(&mut proxy, limited.clone());
        for from in [[127, 0, 0, 2], [127, 1, 2, 3]] {
            assert_eq!(exchange(&mut attempt(from, &key).unwrap(), "a"), "a");
        }
        for from in [[127, 0, 0, 1], [127, 0, 0, 3], [127, 2, 0, 0]] {
            assert_eq!(attempt(from, &key).unwrap_err().kind(), ErrorKind::TimedOut, "{from:?}");
        }
        serve(&mut proxy, open.clone());
        assert_eq!(exchange(&mut attempt([127, 0, 0, 3], &key).unwrap(), "a"), "a");
    }
}

#[test]
fn ranges_that_no_filter_holds_are_kept_all_the_same() {
    let (mut proxy, key) = (start(), key());
    // No two of these are one.
    let ranges: Arc<[IpNet]> = (0..4_000u32)
        .map(|number| IpNet::new(std::net::Ipv4Addr::from(number * 2 + (10 << 24)).into(), 32).unwrap())
        .collect();
    assert!(source_filter::program(&ranges, true).is_none());
    serve(&mut proxy, Frontend { source_ranges: ranges, ..frontend(&key, &[echo()]) });
    assert_eq!(refusal(&key), ErrorKind::ConnectionReset);
    assert_eq!(refused(&proxy, Refusal::SourceRange), 1);
}

#[test]
fn a_client_may_open_so_many() {
    let (mut proxy, key) = (start(), key());
    let connection_limit = Some(ConnectionLimit { rate: 1, burst: 3 });
    serve(&mut proxy, Frontend { connection_limit, ..frontend(&key, &[named("a")]) });
    let allowed = (0..10).filter(|_| {
        let mut text = String::new();
        let read = TcpStream::connect(vip(&key)).and_then(|mut stream| stream.read_to_string(&mut text));
        read.is_ok()
    });
    // Others may be added to what is there at once while the test takes its time.
    let allowed = allowed.count() as u64;
    assert!((3..10).contains(&allowed), "{allowed}");
    assert_eq!(refused(&proxy, Refusal::ConnectionRate), 10 - allowed);
    assert_eq!(proxy.counts()[0].accepted, allowed);
    // Another client has a bucket of its own.
    assert!(attempt([127, 0, 0, 9], &key).is_ok());
}

#[test]
fn all_together_may_open_so_many() {
    let settings = Settings { max_connections: Some(2), ..settings() };
    let (mut proxy, key) = (Proxy::start(settings, Vec::new()).unwrap(), key());
    serve(&mut proxy, frontend(&key, &[echo()]));
    let mut streams = [client(&key), client(&key)];
    for stream in &mut streams {
        assert_eq!(exchange(stream, "a"), "a");
    }
    assert_eq!(refusal(&key), ErrorKind::ConnectionReset);
    assert_eq!(refused(&proxy, Refusal::TooMany), 1);
    drop(streams);
    eventually("there is room again", || proxy.total_connections() == 0);
    assert_eq!(exchange(&mut client(&key), "a"), "a");
}

/// Sockets at VIPs leave less to connections, and some to the rest of the agent.
#[test]
fn listening_sockets_count() {
    let usual = Limits::of(raise_descriptors(), &settings()).sockets;
    let reserved_descriptors = settings().reserved_descriptors + usual - 6;
    let settings = Settings { reserved_descriptors, ..settings() };
    let mut proxy = Proxy::start(settings, Vec::new()).unwrap();
    let server = echo();
    let keys = [key(), key(), key()];
    let apply = |proxy: &mut Proxy, key: &ServiceKey| {
        proxy.apply(vec![(key.clone(), Wanted::Serve(Arc::new(frontend(key, &[server]))))])
    };
    for key in &keys[..2] {
        assert_eq!(apply(&mut proxy, key).len(), 0);
    }
    let mut streams: Vec<_> = (0..2).map(|_| client(&keys[0])).collect();
    for stream in &mut streams {
        assert_eq!(exchange(stream, "a"), "a");
    }
    assert_eq!(refusal(&keys[0]), ErrorKind::ConnectionReset);
    assert_eq!(apply(&mut proxy, &keys[2]).len(), 0);
    streams.pop();
    eventually("one ends", || proxy.total_connections() == 1);
    assert_eq!(refusal(&keys[2]), ErrorKind::ConnectionReset);
    proxy.apply(keys[1..].iter().map(|key| (key.clone(), Wanted::Gone)).collect());
    assert_eq!(exchange(&mut client(&keys[0]), "a"), "a");

    let more: Vec<_> = (0..5).map(|_| key()).collect();
    assert!(more.iter().all(|key| apply(&mut proxy, key).is_empty()));
    let failed = apply(&mut proxy, &key());
    assert!(failed[0].1.to_string().contains("raise the limit of open files"), "{failed:?}");
}

#[test]
fn who_is_idle_is_reset() {
    // Long enough for a machine that does much else.
    let settings = Settings { idle_timeout_tcp: Duration::from_secs(2), ..settings() };
    let (mut proxy, key) = (Proxy::start(settings, Vec::new()).unwrap(), key());
    serve(&mut proxy, frontend(&key, &[echo()]));
    let mut stream = client(&key);
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_millis(3_000) {
        assert_eq!(exchange(&mut stream, "a"), "a");
        thread::sleep(Duration::from_millis(20));
    }
    let begin = Instant::now();
    assert_eq!(stream.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert!(begin.elapsed() > Duration::from_millis(1_500), "{:?}", begin.elapsed());
}

/// An answer that the proxy, or the kernel, has whole, and that its client takes slowly, is not idle.
#[test]
fn who_is_slow_is_not_idle() {
    const ANSWER: usize = 1 << 20;
    let idle = Duration::from_millis(300);
    let mut proxy = Proxy::start(Settings { idle_timeout_tcp: idle, ..settings() }, Vec::new()).unwrap();
    let key = key();
    let server = server(|mut stream| {
        // A client that was cut off is seen there.
        let _ = stream.write_all(&[7; ANSWER]);
        let _ = stream.read(&mut [0]);
    });
    serve(&mut proxy, frontend(&key, &[server]));
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.set_recv_buffer_size(8 << 10).unwrap();
    socket.connect(&vip(&key).into()).unwrap();
    let (mut stream, mut buffer) = (TcpStream::from(socket), [0; 16 << 10]);
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let (begin, mut taken) = (Instant::now(), 0);
    while taken < ANSWER {
        let count = stream.read(&mut buffer).unwrap_or_else(|error| panic!("after {taken}: {error}"));
        assert_ne!(count, 0, "after {taken}");
        taken += count;
        // As much as in three idle times and a half, in the end.
        thread::sleep((idle * 7 / 2).mul_f64(taken as f64 / ANSWER as f64).saturating_sub(begin.elapsed()));
    }
    // Then it is.
    assert_eq!(stream.read(&mut buffer).unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[test]
fn backends_may_see_the_client_itself() {
    let probe = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    if probe.set_ip_transparent_v4(true).is_err() {
        return println!("SKIP: connections from others' addresses need CAP_NET_ADMIN or CAP_NET_RAW");
    }
    let (mut proxy, key) = (start(), key());
    let server = server(|mut stream| {
        let peer = stream.peer_addr().unwrap().ip().to_string();
        stream.write_all(peer.as_bytes()).unwrap();
    });
    let client_address = ClientAddress::Transparent;
    serve(&mut proxy, Frontend { client_address, ..frontend(&key, &[server]) });
    for from in [[127, 0, 0, 5], [127, 0, 0, 6]] {
        let mut seen = String::new();
        attempt(from, &key).unwrap().read_to_string(&mut seen).unwrap();
        assert_eq!(seen, std::net::Ipv4Addr::from(from).to_string());
    }
    // There is no way to say it to a backend of the other family.
    let other: SocketAddr = "[::1]:9".parse().unwrap();
    serve(&mut proxy, Frontend { client_address, ..frontend(&key, &[other]) });
    assert_eq!(refusal(&key), ErrorKind::ConnectionReset);
    assert_eq!(refused(&proxy, Refusal::Transparent), 1);
}
