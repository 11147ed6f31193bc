//! Shares of backends, as an annotation says them.

use std::{fmt, net::IpAddr, str::FromStr};

use super::Endpoint;

/// `10.0.0.9=5, node/big-1=3, zone/a=2, *=1`: the first kind that says something about an endpoint
/// counts, an address before its node before its zone before the rest. 0 takes no new connections.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Weights(Vec<(Whom, u32)>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Whom {
    Address(IpAddr),
    Node(String),
    Zone(String),
    Rest,
}

/// What is wrong with weights as written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadWeights(String);

impl fmt::Display for BadWeights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for BadWeights {}

impl Weights {
    /// The largest weight: as HAProxy's, and enough for every ratio that people ask for.
    pub const MAXIMUM: u32 = 256;

    /// The share of an endpoint, if anything is said about it.
    #[must_use]
    pub fn of(&self, endpoint: &Endpoint) -> Option<u32> {
        let rank = |whom: &Whom| match whom {
            Whom::Address(address) => (*address == endpoint.address).then_some(0),
            Whom::Node(node) => (endpoint.node.as_deref() == Some(node)).then_some(1),
            Whom::Zone(zone) => (endpoint.zone.as_deref() == Some(zone)).then_some(2),
            Whom::Rest => Some(3),
        };
        let matching = self.0.iter().filter_map(|(whom, weight)| Some((rank(whom)?, *weight)));
        matching.min_by_key(|(rank, _)| *rank).map(|(_, weight)| weight)
    }
}

impl FromStr for Weights {
    type Err = BadWeights;

    fn from_str(text: &str) -> Result<Self, BadWeights> {
        let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
        parts.map(one).collect::<Result<_, _>>().map(Self)
    }
}

fn one(part: &str) -> Result<(Whom, u32), BadWeights> {
    let form = "write ADDRESS=WEIGHT, node/NAME=WEIGHT, zone/NAME=WEIGHT or *=WEIGHT";
    let (whom, weight) = part.split_once('=').ok_or_else(|| BadWeights(format!("`{part}`: {form}")))?;
    let weight: u32 =
        weight.trim().parse().ok().filter(|weight| *weight <= Weights::MAXIMUM).ok_or_else(|| {
            BadWeights(format!("`{part}`: a weight is a number from 0 to {}", Weights::MAXIMUM))
        })?;
    let whom = match whom.trim().split_once('/') {
        Some(("node", name)) if !name.is_empty() => Whom::Node(name.to_owned()),
        Some(("zone", name)) if !name.is_empty() => Whom::Zone(name.to_owned()),
        Some(_) => return Err(BadWeights(format!("`{part}`: {form}"))),
        None if whom.trim() == "*" => Whom::Rest,
        None => {
            let address = whom.trim().parse();
            Whom::Address(address.map_err(|_| BadWeights(format!("`{part}`: {form}")))?)
        }
    };
    Ok((whom, weight))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(address: &str, node: &str, zone: &str) -> Endpoint {
        Endpoint {
            address: address.parse().unwrap(),
            node: Some(node.into()),
            zone: Some(zone.into()),
            ..Endpoint::ready([0, 0, 0, 0].into())
        }
    }

    #[test]
    fn the_closest_word_counts() {
        let weights: Weights = "*=1, zone/a=2, node/n1=3, 10.0.0.9=5, fd00::9=0".parse().unwrap();
        for (of, expected) in [
            (endpoint("10.0.0.9", "n1", "a"), 5),
            (endpoint("fd00::9", "n1", "a"), 0),
            (endpoint("10.0.0.8", "n1", "a"), 3),
            (endpoint("10.0.0.8", "n2", "a"), 2),
            (endpoint("10.0.0.8", "n2", "b"), 1),
        ] {
            assert_eq!(weights.of(&of), Some(expected), "{of:?}");
        }
        assert_eq!(Weights::default().of(&endpoint("10.0.0.8", "n", "z")), None);
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (text, why) in [
            ("10.0.0.9", "write"),
            ("10.0.0.9=x", "0 to 256"),
            ("10.0.0.9=257", "0 to 256"),
            ("10.0.0.9=-1", "0 to 256"),
            ("rack/3=2", "write"),
            ("node/=2", "write"),
            ("ten=2", "write"),
        ] {
            let error = text.parse::<Weights>().unwrap_err().to_string();
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}
