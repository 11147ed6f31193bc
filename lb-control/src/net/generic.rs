//! What drivers say of their devices, by generic netlink: the families `ethtool` and `netdev`.
//!
//! Messages are put together by hand: there are two of them, and both are a few bytes.

use std::io;

use anyhow::{Context, Result, bail};
use netlink_sys::{Socket, SocketAddr};

const NETLINK_GENERIC: isize = 16;
/// Bytes of the headers of a message: nlmsghdr, then genlmsghdr.
const HEADERS: usize = 16 + 4;

/// include/uapi/linux/genetlink.h: the family that knows the others.
const CONTROL: u16 = 16;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;

/// include/uapi/linux/ethtool_netlink.h.
const ETHTOOL_MSG_FEATURES_GET: u8 = 11;
const ETHTOOL_A_FEATURES_HEADER: u16 = 1;
const ETHTOOL_A_HEADER_DEV_INDEX: u16 = 1;
const ETHTOOL_A_FEATURES_ACTIVE: u16 = 4;
const ETHTOOL_A_BITSET_BITS: u16 = 3;
const ETHTOOL_A_BITSET_BIT_NAME: u16 = 2;

/// include/uapi/linux/netdev.h.
const NETDEV_CMD_DEV_GET: u8 = 1;
const NETDEV_A_DEV_IFINDEX: u16 = 1;
const NETDEV_A_DEV_XDP_FEATURES: u16 = 3;
const NETDEV_XDP_ACT_BASIC: u64 = 1;

/// Asks the kernel; answers come at once.
pub struct Generic {
    socket: Socket,
}

impl Generic {
    /// Opens a socket.
    ///
    /// # Errors
    /// When there are no netlink sockets.
    pub fn connect() -> Result<Self> {
        let mut socket = Socket::new(NETLINK_GENERIC).context("opening a socket of generic netlink")?;
        socket.bind_auto().context("opening a socket of generic netlink")?;
        socket.connect(&SocketAddr::new(0, 0)).context("opening a socket of generic netlink")?;
        Ok(Self { socket })
    }

    /// Names of the features that are on, as `ethtool -k` lists them on newer kernels: `rx-lro`.
    ///
    /// # Errors
    /// When the kernel does not say (before Linux 5.6).
    pub fn features(&self, ifindex: u32) -> Result<Vec<String>> {
        let device = attribute(ETHTOOL_A_HEADER_DEV_INDEX, &ifindex.to_ne_bytes());
        let family = self.family("ethtool")?;
        let request = attribute(ETHTOOL_A_FEATURES_HEADER, &device);
        let answer = self.ask(family, ETHTOOL_MSG_FEATURES_GET, &request).context("asking for features")?;
        let active = find(&answer, ETHTOOL_A_FEATURES_ACTIVE).context("no features in the answer")?;
        Ok(names(active))
    }

    /// Whether the driver says that it has XDP.
    ///
    /// # Errors
    /// When the kernel does not say (before Linux 6.3).
    pub fn has_xdp(&self, ifindex: u32) -> Result<bool> {
        let family = self.family("netdev")?;
        let request = attribute(NETDEV_A_DEV_IFINDEX, &ifindex.to_ne_bytes());
        let answer = self.ask(family, NETDEV_CMD_DEV_GET, &request).context("asking for a device")?;
        let features = find(&answer, NETDEV_A_DEV_XDP_FEATURES).and_then(|value| value.first_chunk());
        let features = u64::from_ne_bytes(*features.context("no XDP features in the answer")?);
        Ok(features & NETDEV_XDP_ACT_BASIC != 0)
    }

    fn family(&self, name: &str) -> Result<u16> {
        let named = attribute(CTRL_ATTR_FAMILY_NAME, &[name.as_bytes(), &[0]].concat());
        let answer = self
            .ask(CONTROL, CTRL_CMD_GETFAMILY, &named)
            .with_context(|| format!("the kernel has no family {name} of generic netlink"))?;
        let id = find(&answer, CTRL_ATTR_FAMILY_ID).and_then(|value| value.first_chunk());
        Ok(u16::from_ne_bytes(*id.context("a family without a number")?))
    }

    /// Sends one request; gives the attributes of the one answer.
    fn ask(&self, family: u16, command: u8, attributes: &[u8]) -> Result<Vec<u8>> {
        self.socket.send(&message(family, command, attributes), 0)?;
        let (answer, _) = self.socket.recv_from_full()?;
        let kind = answer.get(4..6).and_then(|bytes| bytes.first_chunk());
        let kind = u16::from_ne_bytes(*kind.context("a short answer")?);
        if i32::from(kind) == libc::NLMSG_ERROR {
            let code = answer.get(16..20).and_then(|bytes| bytes.first_chunk());
            let code = i32::from_ne_bytes(*code.context("a short answer")?);
            return Err(io::Error::from_raw_os_error(-code).into());
        }
        let length = answer.get(..4).and_then(|bytes| bytes.first_chunk());
        let length = u32::from_ne_bytes(*length.context("a short answer")?) as usize;
        match answer.get(HEADERS..length) {
            Some(attributes) if kind == family => Ok(attributes.to_vec()),
            _ => bail!("an answer of another kind"),
        }
    }
}

fn message(family: u16, command: u8, attributes: &[u8]) -> Vec<u8> {
    const REQUEST: u16 = 1;
    const VERSION: u8 = 1;
    let length = (HEADERS + attributes.len()) as u32;
    let mut message = Vec::with_capacity(length as usize);
    message.extend(length.to_ne_bytes());
    message.extend(family.to_ne_bytes());
    message.extend(REQUEST.to_ne_bytes());
    // Sequence number and port are nobody's business: one request, one answer.
    message.extend([0; 8]);
    message.extend([command, VERSION, 0, 0]);
    message.extend(attributes);
    message
}

/// Length, kind, value, and zeros up to a multiple of four.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(value.len() + 7);
    bytes.extend((value.len() as u16 + 4).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// The attributes in a row of them; what is cut short ends it.
fn each(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    /// Nested, and in network order: marks that are no part of the kind.
    const MARKS: u16 = 0xc000;
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(*bytes.first_chunk()?));
        let kind = u16::from_ne_bytes(*bytes.get(2..)?.first_chunk()?);
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind & !MARKS, value))
    })
}

fn find(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    each(bytes).find(|(kind, _)| *kind == wanted).map(|(_, value)| value)
}

/// Names of the bits of a set without a mask: only those that are on are listed.
fn names(set: &[u8]) -> Vec<String> {
    let bits = find(set, ETHTOOL_A_BITSET_BITS).unwrap_or_default();
    let names = each(bits).filter_map(|(_, bit)| find(bit, ETHTOOL_A_BITSET_BIT_NAME));
    names.map(|name| String::from_utf8_lossy(name).trim_end_matches('\0').to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_come_back() {
        let nested = attribute(7, &[attribute(1, b"odd"), attribute(2 | 0x8000, b"even")].concat());
        let inside = find(&nested, 7).unwrap();
        assert_eq!((find(inside, 1), find(inside, 2)), (Some(&b"odd"[..]), Some(&b"even"[..])));
        assert_eq!(find(inside, 3), None);
        for cut in 0..nested.len() {
            assert!(each(&nested[..cut]).count() <= 1, "{cut}");
        }
        // A length of nothing must not go on for ever.
        assert_eq!(each(&[0; 64]).count(), 0);
    }

    #[test]
    fn names_of_bits() {
        let bit = |name: &[u8]| attribute(1, &attribute(ETHTOOL_A_BITSET_BIT_NAME, name));
        let set = attribute(ETHTOOL_A_BITSET_BITS, &[bit(b"rx-lro\0"), bit(b"rx-gro\0")].concat());
        assert_eq!(names(&set), ["rx-lro", "rx-gro"]);
    }

    #[test]
    fn loopback_has_neither_a_driver_nor_xdp() {
        // Without the families, the kernel is too old to be asked.
        let Ok(generic) = Generic::connect() else { return };
        if let Ok(features) = generic.features(1) {
            assert!(features.iter().any(|name| name == "loopback"), "{features:?}");
        }
        if let Ok(has_xdp) = generic.has_xdp(1) {
            assert!(!has_xdp);
        }
        assert!(generic.features(u32::MAX).is_err());
    }
}
