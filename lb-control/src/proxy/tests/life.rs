//! How the proxy ends, and what it does without file descriptors.

use std::io::ErrorKind;
use std::process::Command;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::*;
use crate::proxy::{Refusal, SeqCst};

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

fn exchanging(proxy: &mut Proxy, key: &ServiceKey) -> Vec<TcpStream> {
    serve(proxy, frontend(key, &[echo()]));
    let mut streams: Vec<_> = (0..30).map(|_| client(key)).collect();
    streams.iter_mut().for_each(|stream| assert_eq!(exchange(stream, "a"), "a"));
    streams
}

fn are_reset(streams: Vec<TcpStream>) {
    for mut stream in streams {
        assert_eq!(stream.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    }
}

/// An end would make half an answer look like all of it.
#[test]
fn who_is_dropped_is_reset() {
    let (mut proxy, key) = (start(), key());
    let streams = exchanging(&mut proxy, &key);
    drop(proxy);
    are_reset(streams);
    // As the agent does when the last entry goes.
    let mut proxy = start();
    let streams = exchanging(&mut proxy, &key);
    proxy.apply(vec![(key, Wanted::Gone)]);
    drop(proxy);
    are_reset(streams);
}

#[test]
fn a_drain_that_is_interrupted_resets() {
    let (mut proxy, key) = (start(), key());
    let streams = exchanging(&mut proxy, &key);
    let interrupted = async { tokio::time::timeout(Duration::from_millis(50), proxy.drain(PATIENCE)).await };
    assert!(runtime().block_on(interrupted).is_err());
    are_reset(streams);
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
        let mut new = Proxy::start(settings(), handed_over(&old)).unwrap();
        serve(&mut new, frontend(&key, &[server]));
        new.forget_inherited();
        assert_eq!(runtime().block_on(old.drain(PATIENCE)), 0);
        eventually("the new one serves", || new.counts()[0].accepted > 20);
        old = new;
    }
    is_over.store(true, std::sync::atomic::Ordering::SeqCst);
    assert!(clients.join().unwrap() > 100);
}

/// Sockets that a proxy has not come to use are the next one's all the same: clients are waiting there.
#[test]
fn what_is_not_used_yet_is_handed_on() {
    let (mut first, key) = (start(), key());
    serve(&mut first, frontend(&key, &[echo()]));
    let second = Proxy::start(settings(), handed_over(&first)).unwrap();
    let mut third = Proxy::start(settings(), handed_over(&second)).unwrap();
    for before in [first, second] {
        assert_eq!(runtime().block_on(before.drain(PATIENCE)), 0);
    }
    let mut waiting = client(&key);
    serve(&mut third, frontend(&key, &[echo()]));
    assert_eq!(exchange(&mut waiting, "a"), "a");
}

/// Who closes a port before it knows of its heir shuts the socket down, the heir's too.
#[test]
fn what_no_longer_listens_is_opened_anew() {
    let (mut old, key) = (start(), key());
    serve(&mut old, frontend(&key, &[echo()]));
    let inherited = duplicates(&old);
    assert!(!inherited.is_empty());
    serve(&mut old, frontend(&key, &[]));
    let mut new = Proxy::start(settings(), inherited).unwrap();
    serve(&mut new, frontend(&key, &[echo()]));
    assert_eq!(exchange(&mut client(&key), "a"), "a");
}

const CHILD: &str = "POINTSMAN_TEST_CHILD";

/// Whether this is the process of a test's own, since the limit of open files is the process's. Else it has
/// been run.
fn is_child(test: &str) -> bool {
    if std::env::var_os(CHILD).is_some() {
        return true;
    }
    let mut child = Command::new(std::env::current_exe().unwrap());
    let name = format!("proxy::tests::life::{test}");
    let output = child.args(["--exact", &name]).env(CHILD, "1").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    false
}

/// Takes all file descriptors.
fn fill() -> Vec<std::fs::File> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let open = std::fs::read_dir("/proc/self/fd").unwrap().count() as u64 - 1;
    setrlimit(Resource::RLIMIT_NOFILE, open + 8, hard).unwrap();
    std::iter::from_fn(|| std::fs::File::open("/dev/null").ok()).collect()
}

/// A client made while there was room: its connection waits to be accepted.
fn waiting(socket: socket2::Socket, key: &ServiceKey) -> TcpStream {
    socket.connect(&vip(key).into()).unwrap();
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

fn new_socket() -> socket2::Socket {
    socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap()
}

#[test]
fn without_file_descriptors_it_waits() {
    if !is_child("without_file_descriptors_it_waits") {
        return;
    }
    let (mut proxy, key) = (start(), key());
    serve(&mut proxy, frontend(&key, &[echo()]));
    let mut first = client(&key);
    assert_eq!(exchange(&mut first, "a"), "a");
    let socket = new_socket();
    let mut fills = fill();
    let mut stream = waiting(socket, &key);
    let shortages = || proxy.reader().totals().shortages;
    eventually("it is told", || shortages() > 2);
    assert_eq!(exchange(&mut first, "b"), "b");
    let (before, begin) = (shortages(), Instant::now());
    eventually("it tries again", || shortages() > before + 2);
    let pause = begin.elapsed() / u32::try_from(shortages() - before).unwrap();
    assert!(pause > Duration::from_millis(5), "it spins: {pause:?}");
    // One is enough to accept it, and not for the socket to its backend.
    fills.pop();
    eventually("it is accepted", || proxy.total_connections() == 2);
    let before = shortages();
    eventually("it waits for the other one", || shortages() > before + 2);
    assert_eq!(refused(&proxy, Refusal::Descriptors), 0, "it waits, and is not refused");
    drop(fills);
    assert_eq!(exchange(&mut stream, "c"), "c");
}

#[test]
fn without_file_descriptors_what_waits_at_the_end_is_accepted_nonetheless() {
    if !is_child("without_file_descriptors_what_waits_at_the_end_is_accepted_nonetheless") {
        return;
    }
    let (mut proxy, key, runtime) = (start(), key(), runtime());
    serve(&mut proxy, frontend(&key, &[echo()]));
    assert_eq!(exchange(&mut client(&key), "a"), "a");
    eventually("it has ended", || proxy.total_connections() == 0);
    let (socket, reader, shared) = (new_socket(), proxy.reader(), Arc::clone(&proxy.shared));
    let fills = fill();
    let mut stream = waiting(socket, &key);
    let shortages = move || reader.totals().shortages;
    eventually("it is told", || shortages() > 2);
    let client = thread::spawn(move || {
        eventually("the drain has begun", || shared.is_draining.load(SeqCst));
        // Workers accept no more then, and count once more each at most: this is the one who closes.
        let before = shortages();
        eventually("it tries again", || shortages() > before + 20);
        drop(fills);
        assert_eq!(exchange(&mut stream, "b"), "b");
    });
    assert_eq!(runtime.block_on(proxy.drain(PATIENCE)), 0);
    client.join().unwrap();
}

/// What was counted stays when an entry is served no more, and goes on when it is served again.
#[test]
fn counts_never_fall() {
    let (mut proxy, key) = (start(), key());
    let (server, gone) = (named("a"), |proxy: &mut Proxy| {
        proxy.apply(vec![(key.clone(), crate::plan::Wanted::Gone)]);
    });
    let reader = proxy.reader();
    let told = |accepted: u64, refused: u64| {
        let counts = reader.counts();
        assert_eq!(counts.len(), 1, "{counts:?}");
        let sum: u64 = counts[0].refused.iter().map(|(_, count)| count).sum();
        let backend = counts[0].backends.iter().find(|backend| backend.address == server).unwrap();
        assert_eq!((counts[0].accepted, sum, backend.connections), (accepted, refused, accepted));
    };
    serve(&mut proxy, frontend(&key, &[server]));
    assert_eq!(whose(&key), "a");
    gone(&mut proxy);
    told(1, 0);
    assert_eq!(reader.counts()[0].open, 0);
    serve(&mut proxy, frontend(&key, &[server]));
    told(1, 0);
    assert_eq!(whose(&key), "a");
    serve(&mut proxy, frontend(&key, &[server, nobody()]));
    drop(proxy);
    told(2, 0);

    let mut proxy = Proxy::start_counting(settings(), reader.clone()).unwrap();
    let ranges = vec!["192.0.2.0/24".parse().unwrap()];
    let mut closed = frontend(&key, &[nobody()]);
    serve(&mut proxy, closed.clone());
    refusal(&key);
    closed.backends = frontend(&key, &[server]).backends;
    closed.source_ranges = ranges.into();
    serve(&mut proxy, closed);
    told(2, 1);
    reader.forget(|_| true);
    assert_eq!(reader.counts()[0].accepted, 2, "it is served");
    gone(&mut proxy);
    told(2, 1);
    reader.forget(|forgotten| *forgotten == key);
    assert_eq!(reader.counts(), []);
    assert!(reader.totals().refused.contains(&(Refusal::ConnectFailed, 1)), "{:?}", reader.totals());
}
