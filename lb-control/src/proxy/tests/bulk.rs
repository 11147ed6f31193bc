//! Much data, many connections, and sides that are slower than others.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use super::*;

const MUCH: u64 = 100 << 20;

/// A stream of bytes that shows when some are missing, or in another order.
fn pattern(at: u64, buffer: &mut [u8]) {
    for (byte, place) in buffer.iter_mut().zip(at..) {
        *byte = (place ^ (place >> 8) ^ (place >> 16)) as u8;
    }
}

fn send(stream: &mut TcpStream, count: u64) {
    let (mut sent, mut buffer) = (0, vec![0; 256 * 1024]);
    while sent < count {
        pattern(sent, &mut buffer);
        stream.write_all(&buffer).unwrap();
        sent += buffer.len() as u64;
    }
    stream.shutdown(std::net::Shutdown::Write).unwrap();
}

fn receive(stream: &mut TcpStream) -> u64 {
    let (mut received, mut buffer, mut expected) = (0, vec![0; 256 * 1024], vec![0; 256 * 1024]);
    loop {
        let count = stream.read(&mut buffer).unwrap();
        if count == 0 {
            return received;
        }
        pattern(received, &mut expected[..count]);
        assert!(buffer[..count] == expected[..count], "after {received}");
        received += count as u64;
    }
}

#[test]
fn much_both_ways() {
    let (mut proxy, key) = (start(), key());
    let server = server(|mut stream| {
        let mut sender = stream.try_clone().unwrap();
        let sending = thread::spawn(move || send(&mut sender, MUCH));
        assert_eq!(receive(&mut stream), MUCH);
        sending.join().unwrap();
    });
    serve(&mut proxy, frontend(&key, &[server]));
    let mut stream = client(&key);
    let mut sender = stream.try_clone().unwrap();
    let sending = thread::spawn(move || send(&mut sender, MUCH));
    assert_eq!(receive(&mut stream), MUCH);
    sending.join().unwrap();
    // What was sent may still be on its way to the server.
    eventually("it ends", || proxy.total_connections() == 0);
    let counts = proxy.counts().remove(0);
    assert_eq!((counts.bytes_in, counts.bytes_out), (MUCH, MUCH));
}

/// Whoever does not read makes the other side wait, and not the proxy grow.
#[test]
fn a_slow_reader_makes_the_sender_wait() {
    let (mut proxy, key) = (start(), key());
    let sent = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&sent);
    let server = server(move |mut stream| {
        let (mut at, mut buffer) = (0, vec![0; 64 * 1024]);
        while at < MUCH {
            pattern(at, &mut buffer);
            stream.write_all(&buffer).unwrap();
            at += buffer.len() as u64;
            counter.store(at, SeqCst);
        }
    });
    serve(&mut proxy, frontend(&key, &[server]));
    let mut stream = client(&key);
    let mut before = 0;
    eventually("it stops", || {
        thread::sleep(Duration::from_millis(200));
        let now = sent.load(SeqCst);
        std::mem::replace(&mut before, now) == now && now > 0
    });
    // Four socket buffers of at most 6 MiB each, and a pipe.
    assert!(before < 40 << 20, "{before}");
    assert_eq!(receive(&mut stream), MUCH);
}

#[test]
fn a_slow_writer_is_waited_for() {
    let (mut proxy, key) = (start(), key());
    serve(&mut proxy, frontend(&key, &[echo()]));
    let mut stream = client(&key);
    for byte in 0..50u8 {
        stream.write_all(&[byte]).unwrap();
        let mut answer = [0];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(answer, [byte]);
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn ten_thousand_short_connections() {
    let (mut proxy, key) = (start(), key());
    serve(&mut proxy, frontend(&key, &[named("a"), named("b"), named("c"), named("d")]));
    let clients: Vec<_> = (0..8)
        .map(|_| {
            let key = key.clone();
            thread::spawn(move || (0..1_250).for_each(|_| assert_eq!(whose(&key).len(), 1)))
        })
        .collect();
    clients.into_iter().for_each(|client| client.join().unwrap());
    let counts = proxy.counts().remove(0);
    assert_eq!((counts.accepted, counts.bytes_out), (10_000, 10_000));
    assert!(counts.backends.iter().all(|backend| backend.connections == 2_500), "{counts:?}");
    eventually("all end", || proxy.total_connections() == 0);
}
