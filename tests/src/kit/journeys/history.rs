//! Ports that have a past at the backend, which keeps them in TIME_WAIT.

use lb_common::abi::{Config, ticks_from_seconds};

use super::connection::Connection;
use crate::kit::device::Device;
use crate::kit::packet::flags::{ACK, SYN};
use crate::kit::world::{Ip, set_up};

/// A range of one port: whoever comes next has to take it over.
fn one_port(device: &mut dyn Device) {
    device.set_config(Config { snat_port_first: 2000, snat_port_count: 1, ..Config::default() });
}

/// A connection whose timestamps are shifted, because those of the port's last user were ahead.
pub fn shifted(device: &mut dyn Device, ip: Ip) -> Connection {
    one_port(device);
    let mut old = Connection::new(ip, 1, 40_000);
    old.clocks = Some((1_500_000_000, 500));
    old.handshake(device);
    old.talk(device);
    old.close(device);
    device.wait(ticks_from_seconds(2));
    let mut new = Connection::new(ip, 2, 40_000);
    new.clocks = Some((7, 900));
    new.client_sequence = 5;
    new.handshake(device);
    assert_eq!((new.source(), new.backend()), (old.source(), old.backend()), "the port is taken over");
    assert!(new.last_values.0.wrapping_sub(old.last_values.0) as i32 > 0, "younger than the past");
    assert_ne!(new.last_values.0.wrapping_add(1), new.clocks.unwrap().0, "shifted");
    new
}

/// The backend sees timestamps that only increase; the client gets its own back, which the
/// connection checks with every packet.
pub fn timestamps_are_shifted(device: &mut dyn Device) {
    set_up(device, 1);
    for ip in Ip::BOTH {
        let mut connection = shifted(device, ip);
        let mut last = connection.last_values.0;
        for _ in 0..3 {
            connection.talk(device);
            assert!(connection.last_values.0.wrapping_sub(last) as i32 > 0);
            last = connection.last_values.0;
        }
        connection.close(device);
        // The next one is compared with what the backend saw, not with what the client sent.
        device.wait(ticks_from_seconds(2));
        let mut next = Connection::new(ip, 3, 41_000);
        next.clocks = Some((100, 0));
        next.handshake(device);
        assert!(next.last_values.0.wrapping_sub(connection.last_values.0) as i32 > 0);
        next.talk(device);
        next.close(device);
    }
}

/// A client that re-uses its own port gets the same source port, and its timestamps as they are.
pub fn own_port_again(device: &mut dyn Device) {
    set_up(device, 1);
    for ip in Ip::BOTH {
        let mut first = Connection::new(ip, 1, 40_000);
        first.clocks = Some((1_000, 1_000));
        first.handshake(device);
        first.talk(device);
        first.close(device);
        device.wait(ticks_from_seconds(5));
        let mut second = Connection::new(ip, 1, 40_000);
        second.clocks = Some((50_000, 9));
        second.client_sequence = first.client_sequence.wrapping_sub(1_000_000);
        second.handshake(device);
        assert_eq!(second.source(), first.source());
        assert_eq!(second.last_values.0, 50_001, "untouched");
        second.talk(device);
    }
}

/// The last segments of a connection have some seconds to arrive; its port is not given away before.
pub fn quiet_time(device: &mut dyn Device) {
    set_up(device, 1);
    for ip in Ip::BOTH {
        let mut first = Connection::new(ip, 1, 40_000);
        first.clocks = Some((1_000, 1_000));
        first.handshake(device);
        first.close(device);
        let mut second = Connection::new(ip, 1, 40_000);
        second.clocks = Some((2_000, 9));
        second.handshake(device);
        assert_ne!(second.source(), first.source());
        second.close(device);
    }
}

/// Without timestamps the sequence number decides; when no port fits, one is taken all the same.
pub fn without_timestamps(device: &mut dyn Device) {
    set_up(device, 1);
    for ip in Ip::BOTH {
        one_port(device);
        let mut first = Connection::open(device, ip, 1, 40_000);
        first.close(device);
        device.wait(ticks_from_seconds(2));
        let mut second = Connection::new(ip, 2, 40_000);
        second.client_sequence = first.client_sequence.wrapping_add(100);
        second.handshake(device);
        assert_eq!(second.source(), first.source());
        second.close(device);
        device.wait(ticks_from_seconds(2));
        let mut third = Connection::new(ip, 3, 40_000);
        third.client_sequence = second.client_sequence.wrapping_sub(100);
        third.from_client(device, SYN, b"");
        third.from_backend(device, SYN | ACK, b"");
        third.from_client(device, ACK, b"");
        third.close(device);
        // Past TIME_WAIT, the port is like new.
        device.wait(ticks_from_seconds(62));
        let mut fourth = Connection::new(ip, 4, 40_000);
        fourth.client_sequence = 1;
        fourth.handshake(device);
        fourth.close(device);
        device.set_config(Config::default());
        device.wait(ticks_from_seconds(100));
    }
}
