//! Backends behind devices that only TC can send by.

use lb_common::abi::{Backend, Config, DropReason, IPPROTO_TCP, Service, ServiceFlags};

use super::connection::Connection;
use crate::kit::device::Device;
use crate::kit::host::Hook;
use crate::kit::packet::flags::{ACK, PSH, SYN};
use crate::kit::world::{Ip, backend, dropped, forwarded, passed, set_up};

fn mark(device: &mut dyn Device, ip: Ip, number: u32, for_tc: bool) {
    let entry = backend(ip, IPPROTO_TCP, number);
    let state = entry.state | if for_tc { Backend::FOR_TC } else { 0 };
    device.set_backend(ip.backend_index(IPPROTO_TCP, number), Backend { state, ..entry });
}

/// XDP makes the entries of a connection and passes its packets untouched; TC sends them.
pub fn handed_over(device: &mut dyn Device) {
    set_up(device, 3);
    device.set_config(Config { has_tc: 1, ..Config::default() });
    for ip in Ip::BOTH {
        (0..3).for_each(|number| mark(device, ip, number, true));
        let mut connection = Connection::new(ip, 1, 40_000);
        if device.hook() == Hook::Xdp {
            let syn = connection.client_segment(SYN, b"").build();
            let before = flows(device);
            passed(device, &syn);
            passed(device, &syn);
            assert_eq!(flows(device) - before, 2, "two entries, however often the SYN comes");
            // The way to them is another now: the connection keeps its backend.
            (0..3).for_each(|number| mark(device, ip, number, false));
        }
        connection.handshake(device);
        connection.talk(device);
        assert_eq!(device.stats().services[&ip.service(IPPROTO_TCP)].new_flows, 1);
    }
}

/// A backend that moves behind such a device in the middle of a connection.
pub fn way_changes(device: &mut dyn Device) {
    set_up(device, 1);
    device.set_config(Config { has_tc: 1, ..Config::default() });
    for ip in Ip::BOTH {
        let mut connection = Connection::open(device, ip, 1, 40_000);
        mark(device, ip, 0, true);
        let request = connection.client_segment(PSH | ACK, b"hello");
        if device.hook() == Hook::Xdp {
            passed(device, &request.build());
        } else {
            forwarded(device, &request);
        }
        // Replies go to the client, whose device is as it was.
        connection.from_backend(device, ACK, b"");
        mark(device, ip, 0, false);
        connection.talk(device);
    }
}

/// A client keeps such a backend like any other.
pub fn sticks(device: &mut dyn Device) {
    set_up(device, 3);
    device.set_config(Config { has_tc: 1, ..Config::default() });
    for ip in Ip::BOTH {
        (0..3).for_each(|number| mark(device, ip, number, true));
        let service = ip.service(IPPROTO_TCP);
        let entry = Service::new(ip.first_slot(IPPROTO_TCP), 3, ServiceFlags::AFFINITY);
        device.set_service(service, entry);
        device.set_affinity_ticks(service, 1_000);
        for port in 40_000..40_006 {
            let syn = Connection::new(ip, 1, port).client_segment(SYN, b"");
            if device.hook() == Hook::Xdp {
                passed(device, &syn.build())
            } else {
                drop(forwarded(device, &syn))
            }
        }
        let stats = device.stats();
        let counts: Vec<_> = (0..3)
            .map(|number| {
                stats.backends.get(&ip.backend_index(IPPROTO_TCP, number)).map_or(0, |it| it.new_flows)
            })
            .collect();
        assert_eq!(counts.iter().max(), Some(&6), "{counts:?}");
    }
}

/// Without TC such packets are dropped: the stack, which has the VIP, would refuse them.
pub fn nobody_to_hand_over_to(device: &mut dyn Device) {
    set_up(device, 1);
    for ip in Ip::BOTH {
        mark(device, ip, 0, true);
        let syn = Connection::new(ip, 1, 40_000).client_segment(SYN, b"");
        if device.hook() == Hook::Xdp {
            dropped(device, &syn.build(), DropReason::NoDevice);
        } else {
            forwarded(device, &syn);
        }
    }
}

fn flows(device: &mut dyn Device) -> usize {
    let all = device.snapshots();
    all.v4.transient.len() + all.v6.transient.len()
}
