//! What an agent knows of the API server's objects, by the converters of the Kubernetes source.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use lb_control::{
    model::{ObjectChange, Problem},
    source::kube::{
        Known,
        kinds::{
            Agents, BgpAdvertisements, Kind, L2Advertisements, MetalLbPools, Namespaces, Nodes, Pools,
            Services, Slices, VirtualIps,
        },
    },
};
use serde_json::Value;

use super::server::Key;

/// All kinds that are watched.
#[derive(Default)]
pub struct Source {
    services: Known<Services>,
    slices: Known<Slices>,
    nodes: Known<Nodes>,
    namespaces: Known<Namespaces>,
    agents: Known<Agents>,
    virtual_ips: Known<VirtualIps>,
    pools: Known<Pools>,
    metallb_pools: Known<MetalLbPools>,
    l2_advertisements: Known<L2Advertisements>,
    bgp_advertisements: Known<BgpAdvertisements>,
}

impl Source {
    /// An object came or changed, or went (`None`).
    pub fn take(&mut self, key: &Key, object: Option<&Value>) -> Option<ObjectChange> {
        match key.kind.as_str() {
            "Service" => take(&mut self.services, key, object),
            "EndpointSlice" => take(&mut self.slices, key, object),
            "Node" => take(&mut self.nodes, key, object),
            "Namespace" => take(&mut self.namespaces, key, object),
            "Lease" => take(&mut self.agents, key, object),
            "VirtualIP" => take(&mut self.virtual_ips, key, object),
            "AddressPool" => take(&mut self.pools, key, object),
            "IPAddressPool" => take(&mut self.metallb_pools, key, object),
            "L2Advertisement" => take(&mut self.l2_advertisements, key, object),
            "BGPAdvertisement" => take(&mut self.bgp_advertisements, key, object),
            other => panic!("nobody watches {other}"),
        }
    }

    /// Objects that can be read no longer, or again, since the last call.
    pub fn unreadable(&mut self) -> Vec<ObjectChange> {
        let all = [
            self.services.unreadable(),
            self.slices.unreadable(),
            self.virtual_ips.unreadable(),
            self.pools.unreadable(),
            self.metallb_pools.unreadable(),
            self.l2_advertisements.unreadable(),
            self.bgp_advertisements.unreadable(),
        ];
        all.concat()
    }

    /// What is wrong with objects, if that is other than at the last call.
    pub fn problems(&mut self) -> Vec<Option<Vec<Problem>>> {
        vec![
            self.services.problems(),
            self.slices.problems(),
            self.virtual_ips.problems(),
            self.pools.problems(),
            self.metallb_pools.problems(),
            self.l2_advertisements.problems(),
            self.bgp_advertisements.problems(),
        ]
    }
}

fn take<K: Kind>(known: &mut Known<K>, key: &Key, object: Option<&Value>) -> Option<ObjectChange> {
    let Some(object) = object else {
        let namespace = Some(key.namespace.clone()).filter(|namespace| !namespace.is_empty());
        let name = Some(key.name.clone());
        return known.deleted(&ObjectMeta { name, namespace, ..ObjectMeta::default() });
    };
    let raw = serde_json::from_value(object.clone());
    known.seen(&raw.unwrap_or_else(|error| panic!("an API server would refuse {key:?}: {error}")))
}
