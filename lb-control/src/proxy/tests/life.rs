//! How the proxy ends, and what it does without file descriptors.

use std::io::ErrorKind;
use std::process::Command;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::*;
use crate::proxy::Refusal;

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

#[test]
fn a_drain_waits_for_connections() {
    let (mut proxy, key) = (start(), key());
    serve(&mut proxy, frontend(&key, &[echo()]));
    let mut stream = client(&key);
    assert_eq!(exchange(&mut stream, "a"), "a");
    let of = key.clone();
    let waits = thread::spawn(move || {
        eventually("it listens no more", || TcpStream::connect(vip(&of)).is_err());
        assert_eq!(exchange(&mut stream, "b"), "b");
    });
    let begin = Instant::now();
    assert_eq!(runtime().block_on(proxy.drain(PATIENCE)), 0);
    assert!(begin.elapsed() < PATIENCE);
    waits.join().unwrap();
}

#[test]
fn a_drain_has_a_deadline() {
    let (mut proxy, key) = (start(), key());
    serve(&mut proxy, frontend(&key, &[echo()]));
    let mut streams = [client(&key), client(&key)];
    for stream in &mut streams {
        assert_eq!(exchange(stream, "a"), "a");
    }
    assert_eq!(runtime().block_on(proxy.drain(Duration::from_millis(50))), 2);
    for mut stream in streams {
        assert_eq!(stream.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    }
}

/// No connection is refused or reset while one proxy takes over from another, which then drains.
#[test]
fn sockets_are_handed_over() {
    let (mut old, key) = (start(), key());
    let server = named("a");
    serve(&mut old, frontend(&key, &[server]));
    let is_over = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let (of, over) = (key.clone(), Arc::clone(&is_over));
    let clients = thread::spawn(move || {
        let mut count = 0;
        while !over.load(std::sync::atomic::Ordering::SeqCst) {
            assert_eq!(whose(&of), "a");
            count += 1;
        }
        count
    });
    eventually("it runs", || old.counts()[0].accepted > 20);
    for _ in 0..5 {
        let mut new = Proxy::start(settings(), old.sockets().unwrap()).unwrap();
        serve(&mut new, frontend(&key, &[server]));
        new.forget_inherited();
        assert_eq!(runtime().block_on(old.drain(PATIENCE)), 0);
        eventually("the new one serves", || new.counts()[0].accepted > 20);
        old = new;
    }
    is_over.store(true, std::sync::atomic::Ordering::SeqCst);
    assert!(clients.join().unwrap() > 100);
}

const CHILD: &str = "POINTSMAN_TEST_CHILD";

/// In a process of its own, since the limit is the process's.
#[test]
fn without_file_descriptors_it_waits() {
    if std::env::var_os(CHILD).is_none() {
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", "proxy::tests::life::without_file_descriptors_it_waits"]).env(CHILD, "1");
        let output = child.output().unwrap();
        return assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    }
    let (mut proxy, key) = (start(), key());
    serve(&mut proxy, frontend(&key, &[echo()]));
    let mut first = client(&key);
    assert_eq!(exchange(&mut first, "a"), "a");
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    // A socket made while there was room: its connection waits to be accepted.
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    let open = std::fs::read_dir("/proc/self/fd").unwrap().count() as u64 - 1;
    let fills: Vec<_> = {
        setrlimit(Resource::RLIMIT_NOFILE, open + 8, hard).unwrap();
        std::iter::from_fn(|| std::fs::File::open("/dev/null").ok()).collect()
    };
    socket.connect(&vip(&key).into()).unwrap();
    eventually("it is told", || refused(&proxy, Refusal::Descriptors) > 0);
    let told = refused(&proxy, Refusal::Descriptors);
    assert_eq!(exchange(&mut first, "b"), "b");
    assert!(told < 100, "it spins: {told}");
    drop(fills);
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    let mut stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(exchange(&mut stream, "c"), "c");
}
