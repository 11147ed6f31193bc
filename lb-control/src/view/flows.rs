//! Connections and which of them to show.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

/// Flows shown unless asked for more: enough for a screen, few enough to be cheap to ask for.
pub const DEFAULT_FLOW_LIMIT: usize = 100;

/// Everything that `pointsman flows` shows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FlowsView {
    /// The first flows that match, at most as many as asked for.
    pub flows: Vec<FlowView>,
    /// Number of flows that match.
    pub matching: u64,
    /// Number of flows that there are.
    pub total: u64,
    /// Number of matching flows by state.
    pub by_state: BTreeMap<String, u64>,
}

/// One connection, both directions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FlowView {
    /// `TCP` or `UDP`.
    pub protocol: String,
    /// The client.
    pub client: SocketAddr,
    /// The VIP and port that it connected to.
    pub vip: SocketAddr,
    /// The source towards the backend.
    pub snat: SocketAddr,
    /// The backend.
    pub backend: SocketAddr,
    /// `namespace/name` of the Service; empty if its entry is gone.
    pub service: String,
    /// Name of an [`lb_common::abi::FlowState`].
    pub state: String,
    /// Seconds since the last packet in either direction.
    pub idle_seconds: u64,
}

/// Which flows to show; all conditions must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FlowFilter {
    /// `namespace/name` of the Service.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    /// `ADDRESS` or `ADDRESS:PORT` of the backend.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backend: Option<String>,
    /// `ADDRESS` or `ADDRESS:PORT` of the client.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub client: Option<String>,
    /// Name of a flow state.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state: Option<String>,
    /// Number of flows to show; 0 shows them all. Unset: [`DEFAULT_FLOW_LIMIT`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<usize>,
}

/// What an endpoint condition asks for.
enum Endpoint {
    Any,
    Address(IpAddr),
    AddressAndPort(SocketAddr),
}

impl Endpoint {
    fn parse(name: &str, text: Option<&str>) -> Result<Self, String> {
        let Some(text) = text else { return Ok(Self::Any) };
        let bare = text.trim_start_matches('[').trim_end_matches(']');
        bare.parse().map(Self::Address).or_else(|_| text.parse().map(Self::AddressAndPort)).map_err(|_| {
            format!("{name} `{text}` is neither an address nor ADDRESS:PORT (write IPv6 as [2001:db8::1]:80)")
        })
    }

    fn matches(&self, endpoint: &SocketAddr) -> bool {
        match self {
            Self::Any => true,
            Self::Address(address) => *address == endpoint.ip(),
            Self::AddressAndPort(wanted) => wanted == endpoint,
        }
    }
}

impl FlowFilter {
    /// Applies the filter, in the order given.
    ///
    /// # Errors
    /// A sentence that names the condition that cannot be understood.
    pub fn apply(&self, flows: impl IntoIterator<Item = FlowView>) -> Result<FlowsView, String> {
        self.validate()?;
        let backend = Endpoint::parse("backend", self.backend.as_deref())?;
        let client = Endpoint::parse("client", self.client.as_deref())?;
        let limit = match self.limit.unwrap_or(DEFAULT_FLOW_LIMIT) {
            0 => usize::MAX,
            limit => limit,
        };
        let mut view = FlowsView::default();
        for flow in flows {
            view.total += 1;
            let wanted = self.service.as_ref().is_none_or(|service| *service == flow.service)
                && self.state.as_ref().is_none_or(|state| *state == flow.state)
                && backend.matches(&flow.backend)
                && client.matches(&flow.client);
            if !wanted {
                continue;
            }
            view.matching += 1;
            *view.by_state.entry(flow.state.clone()).or_default() += 1;
            if view.flows.len() < limit {
                view.flows.push(flow);
            }
        }
        Ok(view)
    }

    /// Checks the conditions without any flow at hand.
    ///
    /// # Errors
    /// A sentence that names the condition that cannot be understood.
    pub fn validate(&self) -> Result<(), String> {
        Endpoint::parse("backend", self.backend.as_deref())?;
        Endpoint::parse("client", self.client.as_deref())?;
        if let Some(service) = &self.service
            && service.split('/').filter(|part| !part.is_empty()).count() != 2
        {
            return Err(format!("service `{service}` is not NAMESPACE/NAME"));
        }
        let names = lb_common::abi::FlowState::ALL.map(lb_common::abi::FlowState::name);
        match &self.state {
            Some(state) if !names.contains(&state.as_str()) => {
                Err(format!("state `{state}` is not one of {}", names[1..].join(", ")))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn flow(client: &str, backend: &str, service: &str, state: &str) -> FlowView {
        FlowView {
            protocol: "TCP".into(),
            client: client.parse().unwrap(),
            vip: "192.0.2.10:80".parse().unwrap(),
            snat: "10.0.0.1:40000".parse().unwrap(),
            backend: backend.parse().unwrap(),
            service: service.into(),
            state: state.into(),
            idle_seconds: 3,
        }
    }

    fn flows() -> Vec<FlowView> {
        vec![
            flow("198.51.100.1:1000", "10.0.0.2:8080", "default/web", "established"),
            flow("198.51.100.1:1001", "10.0.0.3:8080", "default/web", "time-wait"),
            flow("198.51.100.2:1000", "10.0.0.2:8081", "default/api", "established"),
            flow("[2001:db8::1]:1000", "[2001:db8:1::2]:80", "default/web", "established"),
        ]
    }

    #[test]
    fn conditions_select() {
        let filter = |edit: fn(&mut FlowFilter)| {
            let mut filter = FlowFilter::default();
            edit(&mut filter);
            let view = filter.apply(flows()).unwrap();
            (view.matching, view.flows.len(), view.total)
        };
        assert_eq!(filter(|_| ()), (4, 4, 4));
        assert_eq!(filter(|f| f.service = Some("default/web".into())), (3, 3, 4));
        assert_eq!(filter(|f| f.backend = Some("10.0.0.2".into())), (2, 2, 4));
        assert_eq!(filter(|f| f.backend = Some("10.0.0.2:8081".into())), (1, 1, 4));
        assert_eq!(filter(|f| f.client = Some("2001:db8::1".into())), (1, 1, 4));
        assert_eq!(filter(|f| f.client = Some("[2001:db8::1]:1000".into())), (1, 1, 4));
        assert_eq!(filter(|f| f.state = Some("time-wait".into())), (1, 1, 4));
        assert_eq!(filter(|f| f.limit = Some(1)), (4, 1, 4));
        assert_eq!(filter(|f| f.limit = Some(0)), (4, 4, 4));
    }

    #[test]
    fn summary_counts_what_the_limit_hides() {
        let view = FlowFilter { limit: Some(1), ..FlowFilter::default() }.apply(flows()).unwrap();
        assert_eq!(view.by_state.get("established"), Some(&3));
        assert_eq!(view.by_state.get("time-wait"), Some(&1));
    }

    #[test]
    fn nonsense_is_named() {
        let message = |filter: FlowFilter| filter.apply([]).unwrap_err();
        assert!(
            message(FlowFilter { client: Some("web".into()), ..Default::default() }).contains("client `web`")
        );
        assert!(
            message(FlowFilter { service: Some("web".into()), ..Default::default() }).contains("NAMESPACE")
        );
        assert!(
            message(FlowFilter { state: Some("open".into()), ..Default::default() }).contains("established")
        );
    }
}
