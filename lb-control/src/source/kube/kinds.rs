//! The kinds that are watched: what their objects are called, and how they become `model` types.

use std::{fmt, marker::PhantomData, net::IpAddr, sync::Arc, time::Duration};

use k8s_openapi::{
    api::{coordination::v1::Lease, core::v1 as core, discovery::v1 as discovery},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::core::PartialObjectMeta;
use serde::de::DeserializeOwned;

use super::{
    keep::{self, Kept},
    lenient::Lenient,
    names::Names as SharedNames,
};
use crate::{
    crd::{self, metallb},
    model::{
        Advertisement, AgentLease, Concern, EndpointSlice, LABEL_EXCLUDE, Namespace, Node, ObjectChange,
        ObjectRef, Pool, PoolOrigin, Service, VirtualIp,
    },
    source::{
        convert::{self, FieldError, LABEL_SERVICE_NAME},
        pools,
    },
};

/// Names the Leases of agents.
pub const LABEL_AGENT: &str = "pointsman.dev/agent";
/// Selects them.
pub const LABEL_AGENT_SELECTOR: &str = "pointsman.dev/agent=true";
/// Begins the name of an agent's Lease; the node's name follows.
pub const AGENT_LEASE_PREFIX: &str = "pointsman-agent-";
/// The annotation of an agent's Lease that says which device it puts addresses on.
pub const ANNOTATION_LINK_DEVICE: &str = "pointsman.dev/link-device";
/// The annotation of an agent's Lease that says why it cannot serve; absent while it can.
pub const ANNOTATION_UNFIT: &str = "pointsman.dev/unfit";

/// The annotation of an agent's Lease that says how packets are forwarded, by device:
/// `eth0=xdp-native,vxlan0=tc`.
pub const ANNOTATION_DATAPATH: &str = "pointsman.dev/datapath";
/// The annotation of an agent's Lease that says why so: `vxlan0: …`; absent while the fastest way
/// works on every device.
pub const ANNOTATION_DATAPATH_REASON: &str = "pointsman.dev/datapath-reason";

/// What the API calls a kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Names {
    /// In objects: `Service`.
    pub kind: &'static str,
    /// In paths and RBAC rules: `services`.
    pub plural: &'static str,
    /// API group; empty for the core group.
    pub group: &'static str,
}

impl fmt::Display for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.plural)?;
        if self.group.is_empty() { Ok(()) } else { write!(f, ".{}", self.group) }
    }
}

/// A kind of object that is watched.
pub trait Kind: Send + 'static {
    /// The API's type.
    type Raw: kube::Resource<DynamicType = ()> + Clone + fmt::Debug + DeserializeOwned + Send + Sync + 'static;
    /// What tells objects apart.
    type Key: Ord + Clone + Send + Sync + 'static;
    /// Our type.
    type Value: PartialEq + Send + Sync + 'static;
    /// What it is called.
    const NAMES: Names;

    /// The key of an object; `None` for one that does not concern us.
    fn key(metadata: &ObjectMeta) -> Option<Self::Key>;

    /// The object in our terms.
    ///
    /// # Errors
    /// Every field that cannot be taken as it is.
    fn convert(key: &Self::Key, raw: &Self::Raw) -> Result<Self::Value, Vec<FieldError>>;

    /// What is to stand for an object that cannot be taken, given what stood for it before. `None`:
    /// that stays, or there is nothing.
    fn keep(_: Option<&Self::Value>, _: &Self::Raw) -> Option<Kept<Self::Value>> {
        None
    }

    /// Shares what many objects have in common.
    fn share(_: &mut Self::Value, _: &mut SharedNames) {}

    /// Whom it concerns that an object cannot be converted.
    fn concern(_: &Self::Raw) -> Concern {
        Concern::Always
    }

    /// The change that it is.
    fn change(key: Self::Key, value: Option<Arc<Self::Value>>) -> ObjectChange;
}

fn namespaced(metadata: &ObjectMeta) -> Option<ObjectRef> {
    Some(ObjectRef::new(metadata.namespace.clone()?, metadata.name.clone()?))
}

/// Services.
pub struct Services;

impl Kind for Services {
    type Raw = core::Service;
    type Key = ObjectRef;
    type Value = Service;
    const NAMES: Names = Names { kind: "Service", plural: "services", group: "" };

    fn key(metadata: &ObjectMeta) -> Option<ObjectRef> {
        namespaced(metadata)
    }

    fn convert(_: &ObjectRef, raw: &core::Service) -> Result<Service, Vec<FieldError>> {
        convert::service(raw, None)
    }

    fn keep(old: Option<&Service>, raw: &core::Service) -> Option<Kept<Service>> {
        keep::service(old, raw)
    }

    fn concern(raw: &core::Service) -> Concern {
        match &raw.spec {
            Some(spec) if spec.type_.as_deref() == Some("LoadBalancer") => {
                Concern::Class(spec.load_balancer_class.clone())
            }
            _ => Concern::Never,
        }
    }

    fn change(key: ObjectRef, value: Option<Arc<Service>>) -> ObjectChange {
        ObjectChange::Service(key, value)
    }
}

/// EndpointSlices.
pub struct Slices;

impl Kind for Slices {
    type Raw = discovery::EndpointSlice;
    type Key = ObjectRef;
    type Value = EndpointSlice;
    const NAMES: Names = Names { kind: "EndpointSlice", plural: "endpointslices", group: "discovery.k8s.io" };

    fn key(metadata: &ObjectMeta) -> Option<ObjectRef> {
        namespaced(metadata)
    }

    fn convert(_: &ObjectRef, raw: &discovery::EndpointSlice) -> Result<EndpointSlice, Vec<FieldError>> {
        convert::endpoint_slice(raw, None)
    }

    fn keep(old: Option<&EndpointSlice>, raw: &discovery::EndpointSlice) -> Option<Kept<EndpointSlice>> {
        keep::endpoint_slice(old, raw)
    }

    fn share(slice: &mut EndpointSlice, names: &mut SharedNames) {
        for endpoint in &mut slice.endpoints {
            let hints = endpoint.for_zones.iter_mut().chain(endpoint.for_nodes.iter_mut());
            let places = endpoint.node.iter_mut().chain(endpoint.zone.iter_mut());
            places.chain(hints).for_each(|name| names.share(name));
        }
    }

    fn concern(raw: &discovery::EndpointSlice) -> Concern {
        let service = raw.metadata.labels.as_ref().and_then(|labels| labels.get(LABEL_SERVICE_NAME));
        let namespace = raw.metadata.namespace.clone().unwrap_or_default();
        service.map_or(Concern::Never, |name| Concern::Of(ObjectRef::new(namespace, name)))
    }

    fn change(key: ObjectRef, value: Option<Arc<EndpointSlice>>) -> ObjectChange {
        ObjectChange::Slice(key, value)
    }
}

/// Nodes: names and labels only, which spares what kubelets report every few seconds.
pub struct Nodes;

impl Kind for Nodes {
    type Raw = PartialObjectMeta<core::Node>;
    type Key = String;
    type Value = Node;
    const NAMES: Names = Names { kind: "Node", plural: "nodes", group: "" };

    fn key(metadata: &ObjectMeta) -> Option<String> {
        metadata.name.clone()
    }

    fn convert(key: &String, raw: &Self::Raw) -> Result<Node, Vec<FieldError>> {
        let labels = raw.metadata.labels.clone().unwrap_or_default();
        Ok(Node { name: key.clone(), excluded: labels.contains_key(LABEL_EXCLUDE), labels })
    }

    fn change(key: String, value: Option<Arc<Node>>) -> ObjectChange {
        ObjectChange::Node(key, value)
    }
}

/// Namespaces: names and labels.
pub struct Namespaces;

impl Kind for Namespaces {
    type Raw = PartialObjectMeta<core::Namespace>;
    type Key = String;
    type Value = Namespace;
    const NAMES: Names = Names { kind: "Namespace", plural: "namespaces", group: "" };

    fn key(metadata: &ObjectMeta) -> Option<String> {
        metadata.name.clone()
    }

    fn convert(key: &String, raw: &Self::Raw) -> Result<Namespace, Vec<FieldError>> {
        Ok(Namespace { name: key.clone(), labels: raw.metadata.labels.clone().unwrap_or_default() })
    }

    fn change(key: String, value: Option<Arc<Namespace>>) -> ObjectChange {
        ObjectChange::Namespace(key, value)
    }
}

/// The agents' Leases.
pub struct Agents;

/// The API's default for `leaseDurationSeconds` is none; ours is what agents write.
const DEFAULT_LEASE: Duration = Duration::from_secs(15);

impl Kind for Agents {
    type Raw = Lease;
    type Key = String;
    type Value = AgentLease;
    const NAMES: Names = Names { kind: "Lease", plural: "leases", group: "coordination.k8s.io" };

    fn key(metadata: &ObjectMeta) -> Option<String> {
        metadata.name.as_deref()?.strip_prefix(AGENT_LEASE_PREFIX).map(str::to_owned)
    }

    fn convert(key: &String, raw: &Lease) -> Result<AgentLease, Vec<FieldError>> {
        let spec = raw.spec.clone().unwrap_or_default();
        let seconds = spec.lease_duration_seconds.and_then(|seconds| u64::try_from(seconds).ok());
        let annotation = |name: &str| raw.metadata.annotations.as_ref()?.get(name).cloned();
        Ok(AgentLease {
            node: key.clone(),
            holder: spec.holder_identity.unwrap_or_default(),
            renewed: spec.renew_time.map(|time| time.0.to_string()).unwrap_or_default(),
            duration: seconds.filter(|seconds| *seconds > 0).map_or(DEFAULT_LEASE, Duration::from_secs),
            link_device: annotation(ANNOTATION_LINK_DEVICE),
            unfit: annotation(ANNOTATION_UNFIT),
        })
    }

    fn change(key: String, value: Option<Arc<AgentLease>>) -> ObjectChange {
        ObjectChange::Agent(key, value)
    }
}

/// VirtualIPs.
pub struct VirtualIps;

impl Kind for VirtualIps {
    type Raw = Lenient<crd::VirtualIp>;
    type Key = IpAddr;
    type Value = VirtualIp;
    const NAMES: Names = Names { kind: "VirtualIP", plural: "virtualips", group: crd::GROUP };

    fn key(metadata: &ObjectMeta) -> Option<IpAddr> {
        crd::virtual_ip_address(metadata.name.as_deref()?).ok()
    }

    fn convert(_: &IpAddr, raw: &Self::Raw) -> Result<VirtualIp, Vec<FieldError>> {
        pools::virtual_ip(raw.object()?)
    }

    fn change(key: IpAddr, value: Option<Arc<VirtualIp>>) -> ObjectChange {
        ObjectChange::VirtualIp(key, value)
    }
}

/// AddressPools.
pub struct Pools;

impl Kind for Pools {
    type Raw = Lenient<crd::AddressPool>;
    type Key = String;
    type Value = Pool;
    const NAMES: Names = Names { kind: "AddressPool", plural: "addresspools", group: crd::GROUP };

    fn key(metadata: &ObjectMeta) -> Option<String> {
        metadata.name.clone()
    }

    fn convert(_: &String, raw: &Self::Raw) -> Result<Pool, Vec<FieldError>> {
        pools::address_pool(raw.object()?, None)
    }

    fn change(key: String, value: Option<Arc<Pool>>) -> ObjectChange {
        ObjectChange::Pool(PoolOrigin::Pointsman.key(&key), value)
    }
}

/// MetalLB's IPAddressPools.
pub struct MetalLbPools;

impl Kind for MetalLbPools {
    type Raw = Lenient<metallb::IpAddressPool>;
    type Key = ObjectRef;
    type Value = Pool;
    const NAMES: Names = Names { kind: "IPAddressPool", plural: "ipaddresspools", group: metallb::GROUP };

    fn key(metadata: &ObjectMeta) -> Option<ObjectRef> {
        namespaced(metadata)
    }

    fn convert(_: &ObjectRef, raw: &Self::Raw) -> Result<Pool, Vec<FieldError>> {
        pools::metallb_pool(raw.object()?)
    }

    fn change(key: ObjectRef, value: Option<Arc<Pool>>) -> ObjectChange {
        ObjectChange::Pool(PoolOrigin::MetalLb(key.namespace).key(&key.name), value)
    }
}

/// One of MetalLB's kinds of advertisement.
pub struct Advertisements<T>(PhantomData<fn() -> T>);

/// MetalLB's L2Advertisements.
pub type L2Advertisements = Advertisements<metallb::L2Advertisement>;
/// MetalLB's BGPAdvertisements.
pub type BgpAdvertisements = Advertisements<metallb::BgpAdvertisement>;

impl Kind for L2Advertisements {
    type Raw = Lenient<metallb::L2Advertisement>;
    type Key = ObjectRef;
    type Value = Advertisement;
    const NAMES: Names = Names { kind: "L2Advertisement", plural: "l2advertisements", group: metallb::GROUP };

    fn key(metadata: &ObjectMeta) -> Option<ObjectRef> {
        namespaced(metadata)
    }

    fn convert(_: &ObjectRef, raw: &Self::Raw) -> Result<Advertisement, Vec<FieldError>> {
        pools::l2_advertisement(raw.object()?)
    }

    fn change(key: ObjectRef, value: Option<Arc<Advertisement>>) -> ObjectChange {
        ObjectChange::Advertisement(key, value)
    }
}

impl Kind for BgpAdvertisements {
    type Raw = Lenient<metallb::BgpAdvertisement>;
    type Key = ObjectRef;
    type Value = Advertisement;
    const NAMES: Names =
        Names { kind: "BGPAdvertisement", plural: "bgpadvertisements", group: metallb::GROUP };

    fn key(metadata: &ObjectMeta) -> Option<ObjectRef> {
        namespaced(metadata)
    }

    fn convert(_: &ObjectRef, raw: &Self::Raw) -> Result<Advertisement, Vec<FieldError>> {
        pools::bgp_advertisement(raw.object()?)
    }

    fn change(key: ObjectRef, value: Option<Arc<Advertisement>>) -> ObjectChange {
        // An L2Advertisement may have the same name. No object's name holds a slash.
        ObjectChange::Advertisement(ObjectRef::new(key.namespace, format!("bgp/{}", key.name)), value)
    }
}
