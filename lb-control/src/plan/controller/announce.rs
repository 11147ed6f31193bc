//! The agent's side: what it says about the addresses that it serves.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use super::Command;
use crate::model::{Few, ObjectRef, VirtualIp};

/// VirtualIPs by address.
type VirtualIps = BTreeMap<IpAddr, Arc<VirtualIp>>;
/// Services that a node serves right now, by address: their maps are programmed, and the address is
/// on the link device.
type Live = BTreeMap<IpAddr, Few<ObjectRef>>;

/// What a node has to write so that the statuses of all VirtualIPs say what it serves.
#[must_use]
pub fn agent_status(node: &str, virtual_ips: &VirtualIps, live: &Live) -> Vec<Command> {
    agent_status_of(node, virtual_ips.keys(), virtual_ips, live)
}

/// The same for some addresses: those whose VirtualIP or service has changed.
#[must_use]
pub fn agent_status_of<'a>(
    node: &str,
    dirty: impl IntoIterator<Item = &'a IpAddr>,
    virtual_ips: &VirtualIps,
    live: &Live,
) -> Vec<Command> {
    let statuses = dirty.into_iter().filter_map(|address| {
        let virtual_ip = virtual_ips.get(address)?;
        status(node, virtual_ip, live.get(address))
    });
    statuses.collect()
}

/// Only the node that an address is given to speaks about it, and the one that did so last when it
/// has let go.
fn status(node: &str, virtual_ip: &VirtualIp, live: Option<&Few<ObjectRef>>) -> Option<Command> {
    let address = virtual_ip.address;
    let services = live.cloned().unwrap_or_default();
    let say = |node: Option<&str>, services| Command::SetVirtualIpStatus {
        address,
        uid: virtual_ip.uid.clone(),
        resource_version: virtual_ip.resource_version.clone(),
        node: node.map(str::to_owned),
        services,
    };
    let said_last = virtual_ip.live_node.as_deref() == Some(node);
    if virtual_ip.node.as_deref() == Some(node) {
        // Before it serves anything there is nothing to say: another node may serve it still.
        let is_right = if said_last { virtual_ip.live == services } else { services.is_empty() };
        return (!is_right).then(|| say(Some(node), services));
    }
    let has_let_go = said_last && services.is_empty();
    has_let_go.then(|| say(None, Few::default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(names: &str) -> Few<ObjectRef> {
        names.split_whitespace().map(|name| ObjectRef::new("default", name)).collect()
    }

    /// `(given to, said by, services said)`, what `me` serves, and what it has to write.
    #[test]
    fn a_node_speaks_about_what_is_its() {
        let some = |services: &str| Some((Some("me"), set(services)));
        let none = Some((None, set("")));
        for (owner, said_by, said, serves, expected) in [
            (Some("me"), None, "", "web", some("web")),
            (Some("me"), None, "", "", None),
            (Some("me"), Some("me"), "web", "web", None),
            (Some("me"), Some("me"), "web", "", some("")),
            (Some("me"), Some("me"), "web", "web dns", some("web dns")),
            (Some("me"), Some("other"), "web", "", None),
            (Some("me"), Some("other"), "web", "web", some("web")),
            (Some("other"), Some("me"), "web", "web", None),
            (Some("other"), Some("me"), "web", "", none.clone()),
            (Some("other"), Some("other"), "web", "web", None),
            (None, Some("me"), "", "", none),
            (None, Some("me"), "web", "web", None),
            (None, None, "", "web", None),
        ] {
            let address = IpAddr::from([192, 0, 2, 1]);
            let virtual_ip = VirtualIp {
                address,
                pool: None,
                services: set("web"),
                node: owner.map(str::to_owned),
                live_node: said_by.map(str::to_owned),
                live: set(said),
                uid: "u".into(),
                resource_version: "7".into(),
                deleting: false,
            };
            let virtual_ips = [(address, Arc::new(virtual_ip))].into();
            let live = if serves.is_empty() { Live::new() } else { [(address, set(serves))].into() };
            let expected: Vec<_> = expected
                .map(|(node, services): (Option<&str>, _)| Command::SetVirtualIpStatus {
                    address,
                    uid: "u".into(),
                    resource_version: "7".into(),
                    node: node.map(str::to_owned),
                    services,
                })
                .into_iter()
                .collect();
            assert_eq!(
                agent_status("me", &virtual_ips, &live),
                expected,
                "{owner:?} {said_by:?} `{said}` `{serves}`"
            );
        }
    }
}
