//! A device that was served by TC, and is by XDP.

use lb_common::abi::Config;
use pointsman_tests::kit::{
    device::Device,
    host::{Hook, Host},
    journeys::connection::Connection,
    packet::flags::ACK,
    world::{Ip, passed, set_up},
};

/// Replies of connections that came in by TC are TC's for as long as it is there; then they go on.
#[test]
fn connections_go_on_when_tc_is_taken_off() {
    let mut host = Host::default();
    host.hook = Hook::Tc;
    set_up(&mut host, 1);
    for ip in Ip::BOTH {
        host.hook = Hook::Tc;
        let mut connection = Connection::open(&mut host, ip, 1, 40_000);
        connection.talk(&mut host);
        host.hook = Hook::Xdp;
        host.set_config(Config { has_tc: 1, ..Config::default() });
        passed(&mut host, &connection.backend_segment(ACK, b"x").build());
        host.set_config(Config::default());
        connection.talk(&mut host);
    }
}
