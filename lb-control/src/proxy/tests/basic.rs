//! What passes, and how it ends.

use std::io::ErrorKind;
use std::net::Shutdown;

use socket2::SockRef;

use super::*;
use crate::proxy::{Refusal, end::End, way::first_words};

#[test]
fn what_is_sent_comes_back() {
    let (mut proxy, key) = (start(), key());
    serve(&mut proxy, frontend(&key, &[echo()]));
    let mut stream = client(&key);
    for text in ["a", "longer", &"x".repeat(300_000)] {
        assert_eq!(exchange(&mut stream, text), text);
    }
    let counts = proxy.counts().remove(0);
    assert_eq!((counts.accepted, counts.open, counts.bytes_in, counts.bytes_out), (1, 1, 300_007, 300_007));
    assert_eq!((counts.backends[0].connections, counts.backends[0].open), (1, 1));
    drop(stream);
    eventually("it ends", || proxy.total_connections() == 0 && proxy.connections(&key) == 0);
}

#[test]
fn each_side_may_end_first() {
    let (mut proxy, key) = (start(), key());
    let counter = server(|mut stream| {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        stream.write_all(bytes.len().to_string().as_bytes()).unwrap();
    });
    serve(&mut proxy, frontend(&key, &[counter]));
    let mut stream = client(&key);
    stream.write_all(&[7; 100_000]).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert_eq!(text, "100000");

    let late = server(|mut stream| {
        stream.write_all(b"last").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes.len(), 100_000);
    });
    serve(&mut proxy, frontend(&key, &[late]));
    let mut stream = client(&key);
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert_eq!(text, "last");
    stream.write_all(&[7; 100_000]).unwrap();
    drop(stream);
    eventually("both end", || proxy.total_connections() == 0);
}

#[test]
fn resets_are_carried_over() {
    let (mut proxy, key) = (start(), key());
    let (tell, told) = std::sync::mpsc::channel();
    let tell = std::sync::Mutex::new(tell);
    let server = server(move |mut stream| {
        let mut byte = [0];
        while stream.read_exact(&mut byte).is_ok() && byte != *b"r" {
            stream.write_all(&byte).unwrap();
        }
        if byte == *b"r" {
            return SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
        }
        tell.lock().unwrap().send(stream.read(&mut byte).map_err(|error| error.kind())).unwrap();
    });
    serve(&mut proxy, frontend(&key, &[server]));
    let mut stream = client(&key);
    assert_eq!(exchange(&mut stream, "a"), "a");
    stream.write_all(b"r").unwrap();
    assert_eq!(stream.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);

    let mut stream = client(&key);
    assert_eq!(exchange(&mut stream, "a"), "a");
    SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
    drop(stream);
    // The first read has had the error, or this one: after it, a socket has ended.
    told.recv_timeout(PATIENCE).unwrap().unwrap_or_default();
    eventually("both end", || proxy.total_connections() == 0);
}

#[test]
fn the_next_backend_is_tried() {
    let (mut proxy, key) = (start(), key());
    serve(&mut proxy, frontend(&key, &[nobody(), named("b")]));
    for _ in 0..10 {
        assert_eq!(whose(&key), "b");
    }
    let counts = proxy.counts().remove(0);
    assert_eq!((counts.backends[0].connect_failures, counts.backends[0].ejected), (3, true));
    assert!(counts.refused.iter().all(|(_, count)| *count == 0), "{counts:?}");
}

#[test]
fn when_all_fail_the_client_is_reset() {
    let (mut proxy, key) = (start(), key());
    serve(&mut proxy, frontend(&key, &[nobody()]));
    for _ in 0..5 {
        let answer = TcpStream::connect(vip(&key)).and_then(|mut stream| stream.read(&mut [0]));
        assert_eq!(answer.unwrap_err().kind(), ErrorKind::ConnectionReset);
    }
    let counts = proxy.counts().remove(0);
    assert!(counts.refused.contains(&(Refusal::ConnectFailed, 5)), "{counts:?}");
    assert_eq!(counts.accepted, 0, "none got a backend");
    // It is the only one: ejected, but tried nonetheless.
    assert_eq!(counts.backends[0].connect_failures, 5);
}

#[test]
fn connections_take_exact_turns() {
    let (mut proxy, key) = (start(), key());
    serve(&mut proxy, frontend(&key, &[named("a"), named("b"), named("c")]));
    let all: String = (0..30).map(|_| whose(&key)).collect();
    assert_eq!(all, "abc".repeat(10));
}

/// A server that closes with bytes unread resets the connection: what it said before still arrives.
#[test]
fn last_words_come_through() {
    let (mut proxy, key) = (start(), key());
    let server = server(|mut stream| {
        stream.read_exact(&mut [0]).unwrap();
        stream.write_all(b"no").unwrap();
    });
    serve(&mut proxy, frontend(&key, &[server]));
    let mut stream = client(&key);
    // More than it reads: it may notice the reset while it still sends.
    let _ = stream.write_all(&[0; 300_000]);
    let mut words = [0; 2];
    stream.read_exact(&mut words).unwrap();
    assert_eq!(&words, b"no");
    assert_eq!(stream.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    eventually("it ends", || proxy.total_connections() == 0);
}

/// As before, of a client that takes its time.
#[test]
fn a_slow_client_has_the_answer_before_the_reset() {
    const ANSWER: usize = 1 << 20;
    let (mut proxy, key) = (start(), key());
    let (tell, told) = std::sync::mpsc::channel();
    let told = std::sync::Mutex::new(told);
    let server = server(move |mut stream| {
        stream.read_exact(&mut [0]).unwrap();
        stream.write_all(&vec![7; ANSWER]).unwrap();
        // The rest of what the client has sent is there, and not read.
        stream.peek(&mut [0]).unwrap();
        // What it has not sent itself when it closes is lost on any way.
        told.lock().unwrap().recv_timeout(PATIENCE).unwrap();
    });
    serve(&mut proxy, frontend(&key, &[server]));
    let mut stream = client(&key);
    // It takes little at once, so that most of the answer waits in the proxy's socket.
    SockRef::from(&stream).set_recv_buffer_size(16 << 10).unwrap();
    stream.write_all(b"question").unwrap();
    let answered = || proxy.counts().remove(0).bytes_out;
    eventually("the proxy has all", || answered() == ANSWER as u64);
    tell.send(()).unwrap();
    let mut answer = vec![0; ANSWER];
    stream.read_exact(&mut answer).unwrap();
    assert!(answer.iter().all(|byte| *byte == 7));
    assert_eq!(stream.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    eventually("it ends", || proxy.total_connections() == 0);
}

/// Otherwise its backend would take it for a client that has ended without a word.
#[test]
fn a_client_that_has_gone_is_noticed_first() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (accepted, _) = listener.accept().unwrap();
    accepted.set_nonblocking(true).unwrap();
    let accepted = socket2::Socket::from(accepted);
    let mut end = End::accepted(accepted.try_clone().unwrap());
    let count = Default::default();
    assert!(first_words(&mut end, Vec::new(), &count).is_ok_and(|way| !way.has_bytes()), "nothing yet");
    SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
    drop(stream);
    // The error is told once: another descriptor of the socket must not take it.
    eventually("the reset comes", || accepted.peer_addr().is_err());
    assert!(first_words(&mut end, b"header".into(), &count).is_err());
}
