//! The AddressPool resource, `pointsman.dev/v1alpha1`, as it is written.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Deserialize;

/// `apiVersion` of our resources.
pub const API_VERSION: &str = "pointsman.dev/v1alpha1";
/// `kind` of address pools.
pub const KIND: &str = "AddressPool";

/// An AddressPool.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AddressPool {
    /// [`API_VERSION`].
    pub api_version: String,
    /// [`KIND`].
    pub kind: String,
    /// Name, labels, annotations.
    #[serde(default)]
    pub metadata: ObjectMeta,
    /// What is asked for.
    pub spec: AddressPoolSpec,
}

/// The specification of an AddressPool.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AddressPoolSpec {
    /// CIDRs (`192.0.2.0/24`) and ranges (`192.0.2.10-192.0.2.20`), IPv4 and IPv6.
    pub addresses: Vec<String>,
    /// Whether it serves Services that do not name a pool.
    #[serde(default = "yes")]
    pub auto_assign: bool,
    /// Whether .0 and .255 are left out of automatic choice.
    #[serde(default, rename = "avoidBuggyIPs")]
    pub avoid_buggy_ips: bool,
    /// Pools with a lower number come first.
    #[serde(default)]
    pub priority: i32,
}

fn yes() -> bool {
    true
}
