//! The name of a VirtualIP, which is its address.
//!
//! Because the API server keeps names unique, an address belongs to one VirtualIP, whoever
//! creates it. For that, one address must have one name: the canonical text.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

/// A name that is not the name of an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadName(String);

impl fmt::Display for BadName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "`{}` is no name of a VirtualIP: write IPv4 as 192.0.2.1, IPv6 in full with dashes as \
             2001-0db8-0000-0000-0000-0000-0000-0001",
            self.0
        )
    }
}

impl std::error::Error for BadName {}

/// The name of the VirtualIP of an address.
///
/// IPv4 as it is. IPv6 in full, with dashes: names of objects may hold no colons (RFC 1123), and
/// `::` would leave a name that begins or ends with a dash.
#[must_use]
pub fn virtual_ip_name(address: IpAddr) -> String {
    match address {
        IpAddr::V4(address) => address.to_string(),
        IpAddr::V6(address) => address.segments().map(|segment| format!("{segment:04x}")).join("-"),
    }
}

/// The address that a VirtualIP is named after.
///
/// # Errors
/// When the name is not what [`virtual_ip_name`] gives for any address.
pub fn virtual_ip_address(name: &str) -> Result<IpAddr, BadName> {
    let address = if name.contains('-') {
        name.replace('-', ":").parse::<Ipv6Addr>().map(IpAddr::from)
    } else {
        name.parse::<Ipv4Addr>().map(IpAddr::from)
    };
    match address {
        Ok(address) if virtual_ip_name(address) == name => Ok(address),
        _ => Err(BadName(name.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_are_as_documented() {
        for (address, name) in [
            ("192.0.2.1", "192.0.2.1"),
            ("2001:db8::1", "2001-0db8-0000-0000-0000-0000-0000-0001"),
            ("::", "0000-0000-0000-0000-0000-0000-0000-0000"),
            ("::ffff:192.0.2.1", "0000-0000-0000-0000-0000-ffff-c000-0201"),
        ] {
            assert_eq!(virtual_ip_name(address.parse().unwrap()), name);
            assert_eq!(virtual_ip_address(name).unwrap().to_string(), address);
        }
    }

    #[test]
    fn an_address_has_one_name_only() {
        for name in [
            "",
            "a",
            "192.0.2",
            "192.0.2.01",
            "2001:db8::1",
            "2001-db8-0-0-0-0-0-1",
            "2001-0DB8-0000-0000-0000-0000-0000-0001",
            "2001-0db8--0001",
            "0000-0000-0000-0000-0000-ffff-192.0.2.1",
        ] {
            assert!(virtual_ip_address(name).unwrap_err().to_string().contains(name), "{name}");
        }
    }

    proptest! {
        #[test]
        fn names_lead_back_and_are_names_of_objects(bits: u128, v4: bool) {
            let address = if v4 {
                IpAddr::from(Ipv4Addr::from((bits % (1 << 32)) as u32))
            } else {
                IpAddr::from(Ipv6Addr::from(bits))
            };
            let name = virtual_ip_name(address);
            prop_assert_eq!(virtual_ip_address(&name), Ok(address));
            // A DNS subdomain, as apimachinery's NameIsDNSSubdomain asks.
            prop_assert!(name.len() <= 253);
            for label in name.split('.') {
                prop_assert!(!label.is_empty() && !label.starts_with('-') && !label.ends_with('-'));
                prop_assert!(label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-'));
            }
        }
    }
}
