//! Service entries' names in the maps.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use lb_common::abi::ServiceName;

use crate::model::{ObjectRef, Protocol, ServiceKey};

/// An address in 16 bytes; an IPv4 address is in the first four.
pub fn wide(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V6(address) => address.octets(),
        IpAddr::V4(address) => {
            let mut wide = [0; 16];
            wide[..4].copy_from_slice(&address.octets());
            wide
        }
    }
}

/// 4 or 6.
pub fn version(address: IpAddr) -> u8 {
    if address.is_ipv4() { 4 } else { 6 }
}

/// An address from 16 bytes; `None` if the family is neither 4 nor 6.
#[must_use]
pub fn narrow(wide: [u8; 16], family: u8) -> Option<IpAddr> {
    match family {
        4 => Some(Ipv4Addr::new(wide[0], wide[1], wide[2], wide[3]).into()),
        6 => Some(Ipv6Addr::from(wide).into()),
        _ => None,
    }
}

/// NUL-padded. Names that come from the API have at most 63 characters; longer ones are cut.
fn pad(text: &str) -> [u8; 64] {
    let mut padded = [0; 64];
    let length = text.len().min(63);
    padded[..length].copy_from_slice(&text.as_bytes()[..length]);
    padded
}

fn unpad(padded: &[u8; 64]) -> Option<String> {
    let length = padded.iter().position(|byte| *byte == 0)?;
    String::from_utf8(padded[..length].to_vec()).ok()
}

/// The name of a Service entry.
pub fn service_name(key: &ServiceKey, port_name: &str) -> ServiceName {
    ServiceName {
        namespace: pad(&key.service.namespace),
        name: pad(&key.service.name),
        port_name: pad(port_name),
        address: wide(key.vip),
        port: key.port.to_be_bytes(),
        protocol: key.protocol.number(),
        family: version(key.vip),
    }
}

/// The Service entry that a name stands for, unless it is damaged.
#[must_use]
pub fn parse(name: &ServiceName) -> Option<ServiceKey> {
    let service = ObjectRef::new(unpad(&name.namespace)?, unpad(&name.name)?);
    let key = ServiceKey {
        service,
        protocol: Protocol::from_number(name.protocol)?,
        vip: narrow(name.address, name.family)?,
        port: u16::from_be_bytes(name.port),
    };
    (!key.service.name.is_empty()).then_some(key)
}

/// The name of the Service's port; empty if it has none.
#[must_use]
pub fn port_name(name: &ServiceName) -> String {
    unpad(&name.port_name).unwrap_or_default()
}
