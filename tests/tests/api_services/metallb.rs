//! MetalLB's objects, whose definitions come after the agent.

use std::net::SocketAddr;

use anyhow::Result;
use pointsman_tests::{apiserver::metallb, cluster_world::ClusterWorld};
use serde_json::{Value, json};

use super::kit::{HTTP, addresses, ask, cluster, eventually, serve, wait_addresses, wait_condition};

/// The agent looks for the definitions twice a minute: longer than is waited for anything else.
fn patiently<T>(mut wait: impl FnMut() -> Result<T>) -> Result<T> {
    wait().or_else(|_| wait())
}

fn advertised_by(world: &ClusterWorld, selectors: &Value) -> Result<()> {
    world.apply("L2Advertisement", "all", &json!({"spec": {"nodeSelectors": selectors}}))
}

#[test]
fn definitions_that_come_later_are_noticed() -> Result<()> {
    cluster(1, |world, _| {
        let spec = json!({"ipFamilyPolicy": "SingleStack", "ipFamilies": ["IPv4"]});
        serve(world, "web", &[HTTP], &spec, &[1])?;
        wait_condition(world, "web", "Allocated", ("False", "FamilyUnavailable"))?;
        for (plural, kind) in metallb::KINDS {
            let definition = serde_json::from_value(metallb::definition(plural, kind).1)?;
            world.block(world.cluster.install(&definition))?;
        }
        let only_here = json!({"namespaces": [world.namespace]});
        let pool = json!({"spec": {"addresses": ["192.0.2.4-192.0.2.5"], "serviceAllocation": only_here}});
        world.apply("IPAddressPool", "theirs", &pool)?;
        // An address, but nobody is asked to announce it yet.
        patiently(|| wait_condition(world, "web", "Allocated", ("True", "AddressAllocated")))?;
        wait_condition(world, "web", "Announced", ("False", "NoNode"))?;
        wait_addresses(world, "web", &[])?;

        advertised_by(world, &json!([{"matchLabels": {"edge": "no"}}]))?;
        world.node(&world.node, &json!({"edge": "yes"}))?;
        wait_condition(world, "web", "Announced", ("False", "NoNode"))?;
        advertised_by(world, &json!([{"matchLabels": {"edge": "yes"}}]))?;
        wait_addresses(world, "web", &["192.0.2.4"])?;
        let vip = SocketAddr::new(addresses(world, "web", 1)?[0], 80);
        eventually("an answer", || ask(world, vip))?;

        // As with pools of ours: what it has it keeps, and nobody else gets an address.
        world.delete("IPAddressPool", "theirs")?;
        wait_condition(world, "web", "Allocated", ("True", "Draining"))?;
        serve(world, "late", &[HTTP], &spec, &[1])?;
        wait_condition(world, "late", "Allocated", ("False", "FamilyUnavailable"))?;
        ask(world, vip).map(drop)
    })
}
