//! Address pools.

use std::{fmt, net::IpAddr, str::FromStr};

use ipnet::IpNet;

use super::{Family, Labels, Namespace, Place, Selector, Service};

/// Addresses from the first to the last, both included, of one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct AddressRange {
    first: IpAddr,
    last: IpAddr,
}

/// What is wrong with a range as written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadRange(String);

impl fmt::Display for BadRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for BadRange {}

/// An address as a number, which only means something beside its family.
fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u128::from(address.to_bits()),
        IpAddr::V6(address) => address.to_bits(),
    }
}

impl AddressRange {
    /// The first address.
    #[must_use]
    pub fn first(&self) -> IpAddr {
        self.first
    }

    /// The last address.
    #[must_use]
    pub fn last(&self) -> IpAddr {
        self.last
    }

    /// The family of its addresses.
    #[must_use]
    pub fn family(&self) -> Family {
        Family::of(self.first)
    }

    /// Whether the address is one of its.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        Family::of(address) == self.family()
            && (number(self.first)..=number(self.last)).contains(&number(address))
    }

    /// Whether both have an address in common.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        self.family() == other.family()
            && number(self.first) <= number(other.last)
            && number(other.first) <= number(self.last)
    }

    /// How many addresses it has; `but` leaves out IPv4 addresses that end in one of these.
    fn count(&self, but: &[u8]) -> f64 {
        let (first, last) = (number(self.first), number(self.last));
        let left_out = |end: u8| {
            // Numbers up to `n` that end so.
            let up_to = |n: i128| (n - i128::from(end)).div_euclid(256) + 1;
            (up_to(last as i128) - up_to(first as i128 - 1)) as f64
        };
        let left_out = match self.family() {
            Family::V4 => but.iter().map(|end| left_out(*end)).sum(),
            Family::V6 => 0.0,
        };
        (last - first) as f64 + 1.0 - left_out
    }

    /// The address after this one, if it is still in the range.
    #[must_use]
    pub fn after(&self, address: IpAddr) -> Option<IpAddr> {
        if !self.contains(address) || address == self.last {
            return None;
        }
        match address {
            IpAddr::V4(address) => Some(IpAddr::V4((address.to_bits() + 1).into())),
            IpAddr::V6(address) => Some(IpAddr::V6((address.to_bits() + 1).into())),
        }
    }
}

impl FromStr for AddressRange {
    type Err = BadRange;

    /// `192.0.2.0/24`, `2001:db8::/120`, `192.0.2.10-192.0.2.20`.
    fn from_str(text: &str) -> Result<Self, BadRange> {
        let bad = |why: &str| BadRange(format!("`{text}` {why}"));
        let form = "is no CIDR (192.0.2.0/24) and no range (192.0.2.10-192.0.2.20)";
        if let Some((first, last)) = text.split_once('-') {
            let first: IpAddr = first.trim().parse().map_err(|_| bad(form))?;
            let last: IpAddr = last.trim().parse().map_err(|_| bad(form))?;
            if Family::of(first) != Family::of(last) {
                return Err(bad("mixes IPv4 and IPv6"));
            }
            if number(first) > number(last) {
                return Err(bad("ends before it begins"));
            }
            return Ok(Self { first, last });
        }
        let net: IpNet = text.trim().parse().map_err(|_| bad(form))?;
        // ipnet lets 192.0.2.010 pass, which others read as octal; Kubernetes refuses it too.
        if text.split('/').next().is_none_or(|address| address.trim().parse::<IpAddr>().is_err()) {
            return Err(bad(form));
        }
        if net.addr() != net.network() {
            return Err(bad(&format!("has host bits set; did you mean {}?", net.trunc())));
        }
        Ok(Self { first: net.network(), last: net.broadcast() })
    }
}

impl fmt::Display for AddressRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

/// An AddressPool: where VIPs are taken from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pool {
    /// Name; pools belong to the whole cluster.
    pub name: String,
    /// Where it was written down; `None` if it came from an API server.
    pub place: Option<Place>,
    /// Its identity at the API server; empty if it came from a file.
    pub uid: String,
    /// Its addresses, in the order in which they are used.
    pub ranges: Vec<AddressRange>,
    /// Whether it serves Services that do not name a pool.
    pub auto_assign: bool,
    /// Whether .0 and .255 are left out of automatic choice: some old devices drop them.
    pub avoid_buggy_ips: bool,
    /// Pools with a lower number come first.
    pub priority: i32,
    /// Whose kind it is.
    pub origin: PoolOrigin,
    /// Labels, which advertisements may select it by.
    pub labels: Labels,
    /// Namespaces that it serves. If neither these nor selectors are given, it serves all.
    pub namespaces: Vec<String>,
    /// Labels of namespaces that it serves; any one selector suffices.
    pub namespace_selectors: Vec<Selector>,
    /// Labels of Services that it serves, of the namespaces above; any one selector suffices.
    pub service_selectors: Vec<Selector>,
    /// Whether it gives out nothing more; what is in use stays.
    pub disabled: bool,
}

/// Whose kind a pool is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum PoolOrigin {
    /// An AddressPool.
    #[default]
    Pointsman,
    /// An IPAddressPool of MetalLB in this namespace.
    MetalLb(String),
}

impl PoolOrigin {
    /// [`Pool::key`] of the pool of that name.
    #[must_use]
    pub fn key(&self, name: &str) -> String {
        match self {
            Self::Pointsman => name.to_owned(),
            Self::MetalLb(namespace) => format!("metallb.io/{namespace}/{name}"),
        }
    }
}

impl Pool {
    /// What it goes by among all pools; kinds do not clash.
    #[must_use]
    pub fn key(&self) -> String {
        self.origin.key(&self.name)
    }

    /// Whether it lists who may use it.
    #[must_use]
    pub fn is_restricted(&self) -> bool {
        !self.namespaces.is_empty()
            || !self.namespace_selectors.is_empty()
            || !self.service_selectors.is_empty()
    }

    /// Whether it serves a Service. `namespace` is the Service's; `None` while it is not known.
    #[must_use]
    pub fn serves(&self, service: &Service, namespace: Option<&Namespace>) -> bool {
        let by_namespace = self.namespaces.is_empty() && self.namespace_selectors.is_empty()
            || self.namespaces.contains(&service.object.namespace)
            || namespace.is_some_and(|namespace| {
                self.namespace_selectors.iter().any(|selector| selector.matches(&namespace.labels))
            });
        let by_service = self.service_selectors.is_empty()
            || self.service_selectors.iter().any(|selector| selector.matches(&service.labels));
        by_namespace && by_service
    }

    /// Whether the address is one of its.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        self.ranges.iter().any(|range| range.contains(address))
    }

    /// How many addresses it can give out by itself. Not exact above 2^53.
    #[must_use]
    pub fn size(&self) -> f64 {
        let but: &[u8] = if self.avoid_buggy_ips { &[0, 255] } else { &[] };
        self.ranges.iter().map(|range| range.count(but)).sum()
    }

    /// Whether the address may be chosen automatically.
    #[must_use]
    pub fn may_choose(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(v4) if self.avoid_buggy_ips => !matches!(v4.octets()[3], 0 | 255),
            _ => true,
        }
    }

    /// Whether it has addresses of the family.
    #[must_use]
    pub fn has_family(&self, family: Family) -> bool {
        self.ranges.iter().any(|range| range.family() == family)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_and_refused() {
        for (text, first, last) in [
            ("192.0.2.0/24", "192.0.2.0", "192.0.2.255"),
            ("192.0.2.7/32", "192.0.2.7", "192.0.2.7"),
            ("192.0.2.10-192.0.2.20", "192.0.2.10", "192.0.2.20"),
            ("2001:db8::/126", "2001:db8::", "2001:db8::3"),
            ("0.0.0.0/0", "0.0.0.0", "255.255.255.255"),
        ] {
            let range: AddressRange = text.parse().unwrap();
            assert_eq!((range.first().to_string(), range.last().to_string()), (first.into(), last.into()));
        }
        for (text, why) in [
            ("192.0.2.1/24", "did you mean 192.0.2.0/24?"),
            ("192.0.2.9-192.0.2.1", "ends before"),
            ("192.0.2.9-::1", "mixes"),
            ("192.0.2.0/33", "is no CIDR"),
            ("192.0.2.010/32", "is no CIDR"),
            ("", "is no CIDR"),
        ] {
            let error = text.parse::<AddressRange>().unwrap_err().to_string();
            assert!(error.contains(why), "{text}: {error}");
        }
    }

    #[test]
    fn a_range_ends_at_its_last_address() {
        let range: AddressRange = "255.255.255.254-255.255.255.255".parse().unwrap();
        let second = range.after(range.first()).unwrap();
        assert_eq!(second, range.last());
        assert_eq!(range.after(second), None);
    }
}
