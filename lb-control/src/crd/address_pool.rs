//! AddressPool: where the addresses of Services are taken from.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, LabelSelector};
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::schema;

/// What an AddressPool offers, and to whom.
///
/// A pool that names namespaces or selectors serves the Services that match and no others, also
/// when a Service asks for the pool or for one of its addresses. The namespace has to be listed or
/// match one of the selectors for namespaces, and the Service has to match one of the selectors for
/// Services; what is left out admits all.
#[allow(clippy::duplicated_attributes, reason = "the lint takes all columns for one list")]
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "pointsman.dev",
    version = "v1alpha1",
    kind = "AddressPool",
    plural = "addresspools",
    category = "pointsman",
    status = "AddressPoolStatus",
    derive = "PartialEq",
    doc = "An AddressPool holds addresses for Services of type LoadBalancer.",
    printcolumn(
        name = "Auto-assign",
        type_ = "boolean",
        json_path = ".spec.autoAssign",
        description = "Whether it serves Services that do not ask for it"
    ),
    printcolumn(name = "Addresses", type_ = "string", json_path = ".spec.addresses"),
    printcolumn(
        name = "Assigned",
        type_ = "integer",
        json_path = ".status.assigned",
        description = "Addresses in use"
    ),
    printcolumn(
        name = "Available",
        type_ = "integer",
        json_path = ".status.available",
        description = "Addresses that are free"
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct AddressPoolSpec {
    /// CIDRs (192.0.2.0/24) and ranges (192.0.2.10-192.0.2.20), IPv4 and IPv6, used in this order.
    #[schemars(schema_with = "schema::addresses")]
    pub addresses: Vec<String>,
    /// Whether it serves Services that do not ask for it by name or address.
    #[serde(default = "yes")]
    pub auto_assign: bool,
    /// Whether IPv4 addresses that end in .0 and .255 are left out of automatic choice: some old
    /// devices drop them.
    #[serde(default, rename = "avoidBuggyIPs")]
    pub avoid_buggy_ips: bool,
    /// Pools with a lower number are used first; among equals the name decides.
    #[serde(default)]
    pub priority: i32,
    /// Namespaces that it serves, besides those that namespaceSelectors match.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::namespaces")]
    pub namespaces: Vec<String>,
    /// Selectors of which a namespace's labels have to match one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = schema::MAX_SELECTORS), extend("x-kubernetes-list-type" = "atomic"))]
    pub namespace_selectors: Vec<LabelSelector>,
    /// Selectors of which a Service's labels have to match one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = schema::MAX_SELECTORS), extend("x-kubernetes-list-type" = "atomic"))]
    pub service_selectors: Vec<LabelSelector>,
    /// Whether it gives out nothing new. Services keep the addresses that they have.
    #[serde(default)]
    pub disabled: bool,
}

fn yes() -> bool {
    true
}

/// How much of an AddressPool is used; written by Pointsman.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AddressPoolStatus {
    /// Addresses in use.
    #[serde(default)]
    pub assigned: i64,
    /// Addresses that are free, at most 9223372036854775807.
    #[serde(default)]
    pub available: i64,
    /// What is to be known about it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

impl AddressPoolStatus {
    /// Counts as the API has them: what does not fit 63 bits is as many as fit.
    #[must_use]
    pub fn counting(assigned: u128, available: u128) -> Self {
        let saturate = |count: u128| i64::try_from(count).unwrap_or(i64::MAX);
        Self { assigned: saturate(assigned), available: saturate(available), conditions: Vec::new() }
    }
}
