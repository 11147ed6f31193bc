//! Sizes, boundaries, and many datagrams.

use std::{io::IoSlice, os::fd::AsRawFd};

use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrStorage, sendmsg, setsockopt, sockopt};

use super::*;

/// How soon whoever has no answer asks again.
const AGAIN: Duration = Duration::from_millis(200);

#[test]
fn every_size_is_kept() {
    let (_proxy, key) = serving(&[echo()]);
    let client = client(&key);
    for length in [0, 1, 1_472, 1_473, 9_000, 65_507] {
        let bytes: Vec<u8> = (0..length).map(|at: u32| (at % 251) as u8).collect();
        assert_eq!(exchange(&client, &bytes), bytes, "{length}");
    }
}

/// Sends several as one packet.
fn send_at_once(client: &UdpSocket, bytes: &[u8], segment: u16) {
    let control = [ControlMessage::UdpGsoSegments(&segment)];
    let slices = [IoSlice::new(bytes)];
    let to: Option<&SockaddrStorage> = None;
    assert_eq!(sendmsg(client.as_raw_fd(), &slices, &control, MsgFlags::empty(), to), Ok(bytes.len()));
}

#[test]
fn boundaries_are_kept_where_the_kernel_puts_datagrams_together() {
    let (proxy, key) = serving(&[echo()]);
    let client = client(&key);
    let bytes: Vec<u8> = (0..20_500u32).map(|at| (at % 251) as u8).collect();
    // Once the backend's bulk is put together, too.
    for round in 0..10 {
        send_at_once(&client, &bytes, 1_000);
        client.send(b"between").unwrap();
        client.send(b"").unwrap();
        for expected in bytes.chunks(1_000).chain([&b"between"[..], &b""[..]]) {
            assert_eq!(receive(&client), expected, "{round}");
        }
    }
    // Counted when they have been sent.
    eventually("all is counted", || counts(&proxy).bytes_out == 205_070);
    assert_eq!(counts(&proxy).bytes_in, 205_070);
}

#[test]
fn bulk_of_a_backend_keeps_its_boundaries() {
    let backend = socket("127.0.0.1");
    let (_proxy, key) = serving(&[backend.local_addr().unwrap()]);
    let client = client(&key);
    setsockopt(&client, sockopt::RcvBuf, &(1 << 20)).unwrap();
    client.send(b"begin").unwrap();
    let (_, to) = backend.recv_from(&mut [0; 9]).unwrap();
    backend.connect(to).unwrap();
    for round in 0..50u8 {
        let bytes: Vec<u8> = (0..30_000u32).map(|at| (at % 251) as u8 ^ round).collect();
        send_at_once(&backend, &bytes, 1_400);
        for expected in bytes.chunks(1_400) {
            assert_eq!(receive(&client), expected);
        }
        for length in [3, 3, 3, 2, 0, 3] {
            backend.send(&bytes[..length]).unwrap();
        }
        for length in [3, 3, 3, 2, 0, 3] {
            assert_eq!(receive(&client), bytes[..length]);
        }
    }
}

#[test]
fn fifty_thousand_datagrams_at_a_bounded_rate_arrive() {
    let (proxy, key) = serving(&[echo(), echo(), echo()]);
    let clients: Vec<_> = (0..50).map(|_| client(&key)).collect();
    // Five of each client are on their way at a time: what the servers' buffers have room for.
    for round in 0..200u32 {
        for client in &clients {
            for number in 0..5u32 {
                client.send(&(round * 5 + number).to_be_bytes()).unwrap();
            }
        }
        for client in &clients {
            for number in 0..5u32 {
                assert_eq!(receive(client), (round * 5 + number).to_be_bytes());
            }
        }
    }
    eventually("all is counted", || counts(&proxy).bytes_out == 200_000);
    assert_eq!((counts(&proxy).accepted, counts(&proxy).bytes_in), (50, 200_000));
}

#[test]
fn ten_thousand_clients_get_an_answer_each() {
    let (proxy, key) = serving(&[named("a"), named("b")]);
    for _ in 0..100 {
        let clients: Vec<_> = (0..100).map(|_| client(&key)).collect();
        for client in &clients {
            client.send(b"who").unwrap();
        }
        clients.iter().for_each(|client| assert_eq!(receive(client).len(), 1));
    }
    let open = proxy.connections(&key);
    let counts = counts(&proxy);
    // Some have a port that another one had before, whose session goes on.
    assert!(counts.accepted > 5_000, "{}", counts.accepted);
    assert!(counts.backends[0].connections.abs_diff(counts.backends[1].connections) <= 1);
    assert!(open <= proxy.limits().descriptors as u64 / 4, "{open}");
}

#[test]
fn established_traffic_goes_on_during_a_flood_of_new_clients() {
    let (proxy, key) = serving(&[echo()]);
    let steady = client(&key);
    assert_eq!(exchange(&steady, b"x"), b"x");
    let to = vip(&key);
    let flood = thread::spawn(move || {
        for _ in 0..5_000 {
            let one = socket("127.0.0.1");
            // An ephemeral port of its own each time.
            let _ = one.send_to(b"flood", to);
        }
    });
    let mut exchanges = 0;
    while !flood.is_finished() {
        // What finds the queues of a flooded socket full is lost, as any datagram may be.
        let begin = Instant::now();
        steady.set_read_timeout(Some(AGAIN)).unwrap();
        loop {
            steady.send(b"y").unwrap();
            match steady.recv(&mut [0; 8]) {
                Ok(_) => break,
                Err(error) => assert!(begin.elapsed() < PATIENCE, "{error}"),
            }
        }
        exchanges += 1;
    }
    flood.join().unwrap();
    assert!(exchanges > 0);
    assert!(counts(&proxy).accepted > 1);
}
