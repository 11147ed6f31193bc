//! Much data, many connections, and sides that are slower than others.

use std::{
    io::ErrorKind,
    sync::atomic::{AtomicU64, Ordering::SeqCst},
};

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
    let progress = Arc::new((AtomicU64::new(0), AtomicU64::new(0)));
    let counters = Arc::clone(&progress);
    let server = server(move |mut stream| send_and_tell(&mut stream, &counters.0, &counters.1));
    let (others, (sent, in_vain)) = (key_at([127, 0, 0, 2]), (&progress.0, &progress.1));
    serve(&mut proxy, frontend(&key, &[server]));
    serve(&mut proxy, frontend(&others, &[echo()]));
    let mut stream = client(&key);
    let mut running: Vec<_> = (0..4).map(|_| client(&others)).collect();
    let (mut before, mut rounds) = ((0, 0), 0);
    // The workers do their work, the server finds no room, again and again: so nobody is stalled.
    eventually("it stops", || {
        running.iter_mut().for_each(|stream| assert_eq!(exchange(stream, "a"), "a"));
        let now = (sent.load(SeqCst), in_vain.load(SeqCst));
        rounds = match () {
            () if now.0 != before.0 => 0,
            () if now.1 > before.1 => rounds + 1,
            () => rounds,
        };
        before = now;
        rounds >= 25
    });
    // Four socket buffers of at most 6 MiB each, and a pipe.
    assert!((1..40 << 20).contains(&before.0), "{before:?}");
    assert!(proxy.reader().totals().held_bytes > 0);
    let waits = Arc::clone(&progress);
    let receiver = thread::spawn(move || assert_eq!(receive(&mut stream), MUCH));
    eventually("it goes on", || waits.0.load(SeqCst) == MUCH);
    receiver.join().unwrap();
    eventually("nothing is held", || proxy.reader().totals().held_bytes == 0);
}

/// Sends [`MUCH`]: tells how much, and how often there was no room.
fn send_and_tell(stream: &mut TcpStream, sent: &AtomicU64, in_vain: &AtomicU64) {
    stream.set_nonblocking(true).unwrap();
    let (mut at, mut buffer) = (0, vec![0; 64 * 1024]);
    while at < MUCH {
        pattern(at, &mut buffer);
        let most = buffer.len().min(usize::try_from(MUCH - at).unwrap());
        match stream.write(&buffer[..most]) {
            Ok(count) => at += count as u64,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                in_vain.fetch_add(1, SeqCst);
                thread::sleep(Duration::from_millis(1));
            }
            Err(error) => panic!("{error}"),
        }
        sent.store(at, SeqCst);
    }
}

/// With no memory at all it passes on what fits, and nothing is missing.
#[test]
fn without_memory_it_goes_on() {
    let mut proxy = Proxy::start(Settings { max_buffers: 0, ..settings() }, Vec::new()).unwrap();
    let (key, reader) = (key(), proxy.reader());
    const SOME: u64 = 16 << 20;
    let server = server(|mut stream| {
        let mut sender = stream.try_clone().unwrap();
        let sending = thread::spawn(move || send(&mut sender, SOME));
        // What waits to be read makes the other side wait.
        sending.join().unwrap();
        assert_eq!(receive(&mut stream), SOME);
    });
    serve(&mut proxy, frontend(&key, &[server]));
    let mut stream = client(&key);
    let mut sender = stream.try_clone().unwrap();
    let sending = thread::spawn(move || send(&mut sender, SOME));
    let receiving = thread::spawn(move || assert_eq!(receive(&mut stream), SOME));
    while !receiving.is_finished() || !sending.is_finished() {
        assert_eq!(reader.totals().held_bytes, 0);
        thread::yield_now();
    }
    receiving.join().unwrap();
    sending.join().unwrap();
    eventually("it ends", || proxy.total_connections() == 0);
    let counts = proxy.counts().remove(0);
    assert_eq!((counts.bytes_in, counts.bytes_out), (SOME, SOME));
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
