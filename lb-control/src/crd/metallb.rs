//! MetalLB's resources, `metallb.io/v1beta1`, as far as they are read.
//!
//! Only read: MetalLB's own installation brings their definitions. `spec` may be missing, as in an
//! L2Advertisement for all pools, which kube's derive does not allow for; hence the traits by hand.

use k8s_openapi::{
    Metadata, NamespaceResourceScope, Resource,
    apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta},
};
use serde::Deserialize;

/// The API group.
pub const GROUP: &str = "metallb.io";
/// The version that is read.
pub const VERSION: &str = "v1beta1";

/// Declares a kind: the object, and what `kube::Api` asks of it.
macro_rules! kind {
    ($(#[$doc:meta])* $name:ident, $spec:ty, $kind:literal, $plural:literal) => {
        $(#[$doc])*
        #[derive(Clone, Debug, Default, PartialEq, Deserialize)]
        pub struct $name {
            /// Name, namespace, labels.
            #[serde(default)]
            pub metadata: ObjectMeta,
            /// What is asked for.
            #[serde(default)]
            pub spec: $spec,
        }

        impl Resource for $name {
            const API_VERSION: &'static str = "metallb.io/v1beta1";
            const GROUP: &'static str = GROUP;
            const KIND: &'static str = $kind;
            const VERSION: &'static str = VERSION;
            const URL_PATH_SEGMENT: &'static str = $plural;
            type Scope = NamespaceResourceScope;
        }

        impl Metadata for $name {
            type Ty = ObjectMeta;

            fn metadata(&self) -> &ObjectMeta {
                &self.metadata
            }

            fn metadata_mut(&mut self) -> &mut ObjectMeta {
                &mut self.metadata
            }
        }
    };
}

kind!(
    /// Addresses for Services.
    IpAddressPool, IpAddressPoolSpec, "IPAddressPool", "ipaddresspools"
);
kind!(
    /// Which nodes announce which pools by ARP and NDP.
    L2Advertisement, L2AdvertisementSpec, "L2Advertisement", "l2advertisements"
);
kind!(
    /// Which nodes announce which pools by BGP.
    BgpAdvertisement, BgpAdvertisementSpec, "BGPAdvertisement", "bgpadvertisements"
);

/// The specification of an IPAddressPool.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct IpAddressPoolSpec {
    /// CIDRs and ranges.
    pub addresses: Vec<String>,
    /// Whether it serves Services that do not name it; unset means yes.
    pub auto_assign: Option<bool>,
    /// Whether .0 and .255 are left out.
    #[serde(rename = "avoidBuggyIPs")]
    pub avoid_buggy_ips: bool,
    /// Whom it serves; unset means everybody, after the pools that say whom.
    pub service_allocation: Option<ServiceAllocation>,
}

/// Whom a pool serves.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ServiceAllocation {
    /// Lower numbers come first; 0 is none, and comes last.
    pub priority: i64,
    /// Namespaces by name.
    pub namespaces: Vec<String>,
    /// Namespaces by label.
    pub namespace_selectors: Vec<LabelSelector>,
    /// Services by label.
    pub service_selectors: Vec<LabelSelector>,
}

/// The specification of an L2Advertisement.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct L2AdvertisementSpec {
    /// Pools by name. Without these and selectors: all pools.
    pub ip_address_pools: Vec<String>,
    /// Pools by label.
    pub ip_address_pool_selectors: Vec<LabelSelector>,
    /// Nodes by label; none means all.
    pub node_selectors: Vec<LabelSelector>,
    /// Devices; none means all.
    pub interfaces: Vec<String>,
    /// Services by label; none means all.
    pub service_selectors: Vec<LabelSelector>,
}

/// The specification of a BGPAdvertisement, without what concerns BGP itself.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct BgpAdvertisementSpec {
    /// Pools by name. Without these and selectors: all pools.
    pub ip_address_pools: Vec<String>,
    /// Pools by label.
    pub ip_address_pool_selectors: Vec<LabelSelector>,
    /// Nodes by label; none means all.
    pub node_selectors: Vec<LabelSelector>,
}
