//! Maps for tests.

use std::net::SocketAddr;

use lb_common::abi::{Backend, BackendState, NextHop, Service};

use crate::model::{ObjectRef, Protocol, ServiceKey};
use crate::plan::name;
use crate::ports::{FakeMaps, Limits, MapOp, MapStore, Vip};

/// Maps after these operations.
pub(crate) fn maps_with(ops: &[MapOp]) -> FakeMaps {
    let mut maps = FakeMaps::new(Limits::default());
    for op in ops {
        maps.apply(op).unwrap();
    }
    maps
}

/// A TCP Service entry; without slots no VIP leads to it.
pub(crate) fn service(index: u32, object: &str, vip: &str, slots: Option<u32>) -> Vec<MapOp> {
    let (namespace, object) = object.split_once('/').unwrap();
    let vip: SocketAddr = vip.parse().unwrap();
    let service = ObjectRef::new(namespace, object);
    let key = ServiceKey { service, protocol: Protocol::Tcp, vip: vip.ip(), port: vip.port() };
    let mut ops = vec![MapOp::SetServiceName { index, value: Box::new(name::service_name(&key, "http")) }];
    if let Some(slot_count) = slots {
        ops.push(MapOp::SetService { index, value: Service::new(8 * index, slot_count, 0) });
        ops.push(MapOp::SetVip { vip: Vip::new(vip.ip(), vip.port(), 6), service: index });
    }
    ops
}

/// An active backend behind device 3, changed by `edit`.
pub(crate) fn backend(index: u32, service: u32, socket: &str, edit: fn(&mut Backend)) -> Vec<MapOp> {
    let socket: SocketAddr = socket.parse().unwrap();
    let mut value = Backend {
        address: name::wide(socket.ip()),
        port: socket.port().to_be_bytes(),
        state: BackendState::Active as u8,
        family: name::version(socket.ip()),
        generation: 1,
        service,
        snat_first: 0,
        snat_count: 1,
        next_hop: NextHop {
            ifindex: 3,
            destination_mac: [2, 0, 0, 0, 0, 10],
            source_mac: [2, 0, 0, 0, 0, 1],
            vlan: [0; 4],
        },
        weight: 1,
        flags: 0,
        reserved: 0,
        mtu: 0,
        reserved_end: [0; 4],
    };
    edit(&mut value);
    vec![MapOp::SetBackend { index, value }]
}
