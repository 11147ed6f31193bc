//! How backends learn who the client is, as an annotation says it.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// How backends learn the client's address. Anything but the default needs somebody who speaks with the
/// backends: the proxy serves such a Service, also where the kernel could forward.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ClientAddress {
    /// Not by us: what the path of the packets leaves of it. The proxy connects from an address of the
    /// node.
    #[default]
    Path,
    /// By a line of text ahead of the first byte: PROXY protocol, version 1.
    ProxyV1,
    /// By a binary header ahead of the first byte: PROXY protocol, version 2.
    ProxyV2,
    /// The proxy connects from the client's own address: the backends' way back to clients must be by
    /// this node.
    Transparent,
}

impl ClientAddress {
    /// All.
    pub const ALL: [Self; 4] = [Self::Path, Self::ProxyV1, Self::ProxyV2, Self::Transparent];

    /// As the annotation has it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Path => "path",
            Self::ProxyV1 => "proxy-v1",
            Self::ProxyV2 => "proxy-v2",
            Self::Transparent => "transparent",
        }
    }
}

impl fmt::Display for ClientAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A way to tell the client's address that there is not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownClientAddress(String);

impl fmt::Display for UnknownClientAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = ClientAddress::ALL.map(ClientAddress::name).join(", ");
        write!(f, "`{}` is no way to tell backends the client's address; there are {names}", self.0)
    }
}

impl std::error::Error for UnknownClientAddress {}

impl FromStr for ClientAddress {
    type Err = UnknownClientAddress;

    fn from_str(text: &str) -> Result<Self, UnknownClientAddress> {
        let found = Self::ALL.into_iter().find(|way| way.name() == text);
        found.ok_or_else(|| UnknownClientAddress(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read() {
        for way in ClientAddress::ALL {
            assert_eq!(way.name().parse(), Ok(way));
        }
        let error = "proxy".parse::<ClientAddress>().unwrap_err().to_string();
        assert!(error.ends_with("there are path, proxy-v1, proxy-v2, transparent"), "{error}");
    }
}
