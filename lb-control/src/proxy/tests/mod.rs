//! The proxy on the loopback device. Each test has a process of its own with `cargo xtask test`, and
//! addresses and ports that the kernel chose in any case.

mod backends;
mod basic;
mod bulk;
mod clients;
mod life;

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::AsFd,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use super::{Inherited, Lent, Proxy, Settings};
use crate::{
    model::{ClientAddress, ObjectRef, Protocol, Role, Scheduler, ServiceKey},
    plan::{Frontend, FrontendBackend, Wanted},
};

/// Nothing takes so long.
const PATIENCE: Duration = Duration::from_secs(20);

/// A port at which nothing listens, at an address.
fn free_port(ip: [u8; 4]) -> u16 {
    TcpListener::bind(SocketAddr::from((ip, 0))).unwrap().local_addr().unwrap().port()
}

fn key_at(ip: [u8; 4]) -> ServiceKey {
    let service = ObjectRef { namespace: "test".into(), name: "web".into() };
    ServiceKey { service, protocol: Protocol::Tcp, vip: ip.into(), port: free_port(ip) }
}

fn key() -> ServiceKey {
    key_at([127, 0, 0, 1])
}

fn vip(key: &ServiceKey) -> SocketAddr {
    SocketAddr::new(key.vip, key.port)
}

/// Backends in turn, each with weight 1.
fn frontend(key: &ServiceKey, backends: &[SocketAddr]) -> Frontend {
    let backend = |address: &SocketAddr| FrontendBackend {
        address: *address,
        weight: 1,
        role: Role::Active,
        local: false,
    };
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

/// What another process gets that takes over.
pub fn handed_over(proxy: &Proxy) -> Vec<Inherited> {
    proxy.has_heir();
    duplicates(proxy)
}

/// Its sockets, without its knowing.
fn duplicates(proxy: &Proxy) -> Vec<Inherited> {
    let duplicate = |one: &Lent| Inherited {
        address: one.address,
        protocol: one.protocol,
        socket: Arc::new(one.socket.as_fd().try_clone_to_owned().unwrap()),
    };
    proxy.sockets().iter().map(duplicate).collect()
}

fn serve(proxy: &mut Proxy, frontend: Frontend) {
    let failed = proxy.apply(vec![(frontend.key.clone(), Wanted::Serve(Arc::new(frontend)))]);
    assert!(failed.is_empty(), "{failed:?}");
}

fn settings() -> Settings {
    Settings { workers: 2, ..Settings::default() }
}

fn start() -> Proxy {
    Proxy::start(settings(), Vec::new()).unwrap()
}

/// Serves each connection on a thread of its own, as long as the process lives.
fn server(serve: impl Fn(TcpStream) + Send + Sync + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let serve = Arc::new(serve);
    thread::spawn(move || {
        for stream in listener.incoming() {
            let (stream, serve) = (stream.unwrap(), Arc::clone(&serve));
            thread::spawn(move || serve(stream));
        }
    });
    address
}

/// Gives back what it gets.
fn echo() -> SocketAddr {
    server(|mut stream| {
        let mut buffer = [0; 16 * 1024];
        while let Ok(count @ 1..) = stream.read(&mut buffer) {
            stream.write_all(&buffer[..count]).unwrap();
        }
    })
}

/// Says its name, waits for the client to end, and ends.
fn named(name: &'static str) -> SocketAddr {
    server(move |mut stream| {
        // A client that has gone is not the server's trouble.
        let _ = stream.write_all(name.as_bytes());
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let _ = stream.read_to_end(&mut Vec::new());
    })
}

fn client(key: &ServiceKey) -> TcpStream {
    let stream = TcpStream::connect_timeout(&vip(key), PATIENCE).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Which server a connection gets.
fn whose(key: &ServiceKey) -> String {
    let mut text = String::new();
    client(key).read_to_string(&mut text).unwrap();
    text
}

fn exchange(stream: &mut TcpStream, text: &str) -> String {
    stream.write_all(text.as_bytes()).unwrap();
    let mut answer = vec![0; text.len()];
    stream.read_exact(&mut answer).unwrap();
    String::from_utf8(answer).unwrap()
}

fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !is_so() {
        assert!(begin.elapsed() < PATIENCE, "{what}");
        thread::sleep(Duration::from_millis(2));
    }
}

fn nobody() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], free_port([127, 0, 0, 1])))
}

/// Connects and reads: an error, at whichever of the two it comes.
fn refusal(key: &ServiceKey) -> std::io::ErrorKind {
    let answer = TcpStream::connect_timeout(&vip(key), PATIENCE).and_then(|mut stream| {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.read(&mut [0])
    });
    answer.unwrap_err().kind()
}

fn refused(proxy: &Proxy, why: super::Refusal) -> u64 {
    let counts = proxy.counts().remove(0);
    counts.refused.iter().find(|(reason, _)| *reason == why).unwrap().1
}
