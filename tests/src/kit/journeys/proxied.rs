//! Services that the proxy serves: the datapath leaves them to the stack, and goes on with what it has.

use lb_common::abi::{DropReason, IPPROTO_TCP, IPPROTO_UDP, ServiceFlags};

use super::connection::Connection;
use super::udp::{ask, reply};
use crate::kit::device::{Action, Device};
use crate::kit::packet::Spec;
use crate::kit::packet::flags::{ACK, FIN, PSH, RST, SYN};
use crate::kit::world::{DNS, Ip, answered, dropped, passed, set_flags, set_up, to_vip, udp};

fn flag(device: &mut dyn Device, flags: u8) {
    for ip in Ip::BOTH {
        for protocol in [IPPROTO_TCP, IPPROTO_UDP] {
            set_flags(device, ip, protocol, 3, flags);
        }
    }
}

/// Segments of a connection that the datapath does not know, other than a SYN.
fn strangers(ip: Ip, client: u32) -> Vec<Vec<u8>> {
    let connection = Connection::new(ip, client, 41_000);
    [ACK, ACK | PSH, FIN | ACK, RST]
        .into_iter()
        .map(|flags| connection.client_segment(flags, if flags & PSH == 0 { b"" } else { b"data" }))
        .map(|segment: Spec| segment.build())
        .collect()
}

/// What begins is the stack's, and so is what it has begun; what the datapath has begun goes on.
pub fn new_ones_pass(device: &mut dyn Device) {
    set_up(device, 3);
    for ip in Ip::BOTH {
        let mut before = Connection::open(device, ip, 1, 40_000);
        let asked = ask(device, ip, 1, 5000);
        flag(device, ServiceFlags::PROXIED | ServiceFlags::SOURCE_RANGES);
        passed(device, &Connection::new(ip, 1, 40_001).client_segment(SYN, b"").build());
        for segment in strangers(ip, 1) {
            passed(device, &segment);
        }
        passed(device, &to_vip(ip, 1, udp(5001, DNS, b"question")).build());
        let big = to_vip(ip, 1, udp(5002, DNS, &[1; 2000])).fragments(1024);
        passed(device, &big[0]);
        passed(device, &big[1]);
        before.talk(device);
        reply(device, ip, 1, 5000, &asked);
        before.close(device);
        // Its port was the datapath's, but begins anew, and nothing leads to the old backend any more.
        let anew = Connection::new(ip, 1, 40_000);
        for flags in [SYN, ACK, ACK | PSH] {
            passed(device, &anew.client_segment(flags, b"").build());
        }
        flag(device, 0);
        let service = ip.service(IPPROTO_TCP);
        assert_eq!(device.stats().services[&service].refused, 0);
    }
}

/// When the datapath takes over again, what the proxy has begun still reaches the stack.
pub fn old_ones_finish(device: &mut dyn Device) {
    set_up(device, 3);
    flag(device, ServiceFlags::PROXY_FINISHES);
    for ip in Ip::BOTH {
        for segment in strangers(ip, 1) {
            passed(device, &segment);
        }
        let mut new = Connection::open(device, ip, 1, 40_000);
        new.talk(device);
        new.close(device);
        ask(device, ip, 1, 5000);
        // Nobody's twice: the hop limit is the stack's to judge, as for all it has.
        let mut late = Connection::new(ip, 2, 41_000).client_segment(ACK, b"");
        late.hops = 1;
        assert_ne!(device.send(&late.build()).0, Action::Redirect);
    }
    flag(device, 0);
    for ip in Ip::BOTH {
        let segment = Connection::new(ip, 1, 41_000).client_segment(ACK, b"");
        answered(device, &segment);
    }
}

/// Source ranges hold for what begins while the proxy finishes.
pub fn ranges_hold_again(device: &mut dyn Device) {
    set_up(device, 3);
    flag(device, ServiceFlags::PROXY_FINISHES | ServiceFlags::SOURCE_RANGES);
    for ip in Ip::BOTH {
        let syn = Connection::new(ip, 1, 40_000).client_segment(SYN, b"");
        dropped(device, &syn.build(), DropReason::SourceNotAllowed);
        let spec = to_vip(ip, 1, udp(5000, DNS, b"question"));
        dropped(device, &spec.build(), DropReason::SourceNotAllowed);
        for segment in strangers(ip, 1) {
            passed(device, &segment);
        }
    }
}
