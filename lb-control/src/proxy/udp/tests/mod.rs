//! UDP on the loopback device, by the proxy's handle. Addresses and ports are the kernel's choice.

mod basic;
mod bulk;
mod errors;

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use crate::{
    model::{ClientAddress, ObjectRef, Protocol, Role, Scheduler, ServiceKey},
    plan::{Frontend, FrontendBackend, Wanted},
    proxy::{FrontendCounts, Proxy, Refusal, Settings},
};

/// Nothing takes so long.
const PATIENCE: Duration = Duration::from_secs(20);

/// An entry at a port that is free at an address.
fn key_at(ip: IpAddr) -> ServiceKey {
    let port = UdpSocket::bind((ip, 0)).unwrap().local_addr().unwrap().port();
    let service = ObjectRef { namespace: "test".into(), name: "dns".into() };
    ServiceKey { service, protocol: Protocol::Udp, vip: ip, port }
}

fn key() -> ServiceKey {
    key_at([127, 0, 0, 1].into())
}

fn vip(key: &ServiceKey) -> SocketAddr {
    SocketAddr::new(key.vip, key.port)
}

/// Backends in turn, each with weight 1.
fn frontend(key: &ServiceKey, backends: &[SocketAddr]) -> Frontend {
    let backend =
        |&address: &SocketAddr| FrontendBackend { address, weight: 1, role: Role::Active, local: false };
    Frontend {
        key: key.clone(),
        backends: backends.iter().map(backend).collect(),
        slots: (0..u32::try_from(backends.len()).unwrap()).collect(),
        scheduler: Scheduler::RoundRobin,
        source_ranges: Arc::default(),
        affinity: None,
        connection_limit: None,
        client_address: ClientAddress::Path,
    }
}

fn serve(proxy: &mut Proxy, frontend: Frontend) {
    let failed = proxy.apply(vec![(frontend.key.clone(), Wanted::Serve(Arc::new(frontend)))]);
    assert!(failed.is_empty(), "{failed:?}");
}

fn start() -> Proxy {
    Proxy::start(Settings { workers: 2, ..Settings::default() }, Vec::new()).unwrap()
}

/// A proxy that serves an entry with these backends.
fn serving(backends: &[SocketAddr]) -> (Proxy, ServiceKey) {
    let (mut proxy, key) = (start(), key());
    serve(&mut proxy, frontend(&key, backends));
    (proxy, key)
}

fn socket(ip: &str) -> UdpSocket {
    let socket = UdpSocket::bind((ip, 0)).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// Answers each datagram as it is told, as long as the process lives.
fn server(ip: &str, answer: impl Fn(&[u8]) -> Vec<u8> + Send + 'static) -> SocketAddr {
    let socket = UdpSocket::bind((ip, 0)).unwrap();
    let address = socket.local_addr().unwrap();
    thread::spawn(move || {
        let mut buffer = vec![0; 1 << 16];
        loop {
            // Errors are those of clients that have gone.
            let Ok((length, from)) = socket.recv_from(&mut buffer) else { continue };
            let _ = socket.send_to(&answer(&buffer[..length]), from);
        }
    });
    address
}

fn echo() -> SocketAddr {
    server("127.0.0.1", <[u8]>::to_vec)
}

/// Answers everything with its name.
fn named(name: &'static str) -> SocketAddr {
    server("127.0.0.1", move |_| name.as_bytes().to_vec())
}

/// A client that hears only what the VIP's port sends.
fn client(key: &ServiceKey) -> UdpSocket {
    let socket = socket(if key.vip.is_ipv4() { "127.0.0.1" } else { "::1" });
    socket.connect(vip(key)).unwrap();
    socket
}

fn exchange(client: &UdpSocket, bytes: &[u8]) -> Vec<u8> {
    client.send(bytes).unwrap();
    receive(client)
}

fn receive(client: &UdpSocket) -> Vec<u8> {
    let mut buffer = vec![0; 1 << 16];
    let length = client.recv(&mut buffer).unwrap();
    buffer.truncate(length);
    buffer
}

/// Which server a client gets.
fn whose(client: &UdpSocket) -> String {
    String::from_utf8(exchange(client, b"who")).unwrap()
}

fn counts(proxy: &Proxy) -> FrontendCounts {
    proxy.counts().pop().unwrap()
}

fn refused(proxy: &Proxy, why: Refusal) -> u64 {
    counts(proxy).refused.into_iter().find(|(one, _)| *one == why).unwrap().1
}

fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !is_so() {
        assert!(begin.elapsed() < PATIENCE, "{what}");
        thread::sleep(Duration::from_millis(2));
    }
}
