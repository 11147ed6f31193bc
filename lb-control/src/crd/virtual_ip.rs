//! VirtualIP: one address, the Services that hold it and the node that announces it.

use std::net::IpAddr;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, ObjectMeta};
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{name, schema};
use crate::model::ObjectRef;

/// Who holds the address; written by the elected agent.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "pointsman.dev",
    version = "v1alpha1",
    kind = "VirtualIP",
    root = "VirtualIp",
    plural = "virtualips",
    singular = "virtualip",
    shortname = "vip",
    category = "pointsman",
    status = "VirtualIpStatus",
    derive = "PartialEq",
    doc = "A VirtualIP is an address that Services hold. Its name is the address (IPv6 in full, with dashes), \
           so that an address exists once. Pointsman creates and deletes them.",
    validation = Rule::new(
        "self.spec.address.contains(':') ? self.metadata.name.matches('^[0-9a-f]{4}(-[0-9a-f]{4}){7}$') : \
         self.metadata.name == self.spec.address"
    )
    .message("must be named after its address: IPv4 as it is, IPv6 in full with dashes instead of colons"),
    printcolumn(name = "Address", type_ = "string", json_path = ".spec.address"),
    printcolumn(name = "Pool", type_ = "string", json_path = ".spec.pool"),
    printcolumn(
        name = "Namespace",
        type_ = "string",
        json_path = ".spec.services[0].namespace",
        description = "Namespace of the first Service that holds it"
    ),
    printcolumn(
        name = "Service",
        type_ = "string",
        json_path = ".spec.services[0].name",
        description = "The first Service that holds it"
    ),
    printcolumn(
        name = "Node",
        type_ = "string",
        json_path = ".spec.node",
        description = "The node that is to announce it"
    ),
    printcolumn(
        name = "Live",
        type_ = "string",
        json_path = ".status.node",
        description = "The node that announces it"
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct VirtualIpSpec {
    /// The address.
    #[schemars(schema_with = "schema::address")]
    pub address: String,
    /// The AddressPool that it was taken from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub pool: Option<String>,
    /// The Services that hold it, the first of them first; more than one share it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = schema::MAX_SERVICES),
        extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["namespace", "name"])
    )]
    pub services: Vec<ServiceName>,
    /// The node that is to announce it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub node: Option<String>,
}

/// What is served now; written by the node's agent.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct VirtualIpStatus {
    /// The node that announces the address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub node: Option<String>,
    /// The Services that this node serves at the address.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = schema::MAX_SERVICES),
        extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["namespace", "name"])
    )]
    pub services: Vec<ServiceName>,
    /// What is to be known about it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// Names a Service.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
pub struct ServiceName {
    /// Its namespace.
    #[schemars(length(min = 1, max = 63))]
    pub namespace: String,
    /// Its name.
    #[schemars(length(min = 1, max = 63))]
    pub name: String,
}

impl From<&ObjectRef> for ServiceName {
    fn from(object: &ObjectRef) -> Self {
        Self { namespace: object.namespace.clone(), name: object.name.clone() }
    }
}

impl From<&ServiceName> for ObjectRef {
    fn from(service: &ServiceName) -> Self {
        Self::new(service.namespace.clone(), service.name.clone())
    }
}

impl VirtualIp {
    /// The VirtualIP of an address, under the name that it has to have, held by nobody.
    #[must_use]
    pub fn of(address: IpAddr) -> Self {
        let spec = VirtualIpSpec { address: address.to_string(), ..VirtualIpSpec::default() };
        let metadata = ObjectMeta { name: Some(name::virtual_ip_name(address)), ..ObjectMeta::default() };
        Self { metadata, spec, status: None }
    }

    /// The address, if name and `spec.address` agree on it.
    ///
    /// # Errors
    /// Says what is wrong. The name is what the API server keeps unique, so an object whose address
    /// is another must not be served: its address may have a second object.
    pub fn address(&self) -> Result<IpAddr, String> {
        let named = name::virtual_ip_address(self.metadata.name.as_deref().unwrap_or_default())
            .map_err(|error| error.to_string())?;
        match self.spec.address.parse::<IpAddr>() {
            Ok(address) if address == named => Ok(address),
            Ok(address) => Err(format!(
                "spec.address is {address}, but the name says {named}: delete this VirtualIP, Pointsman creates \
                 what is needed"
            )),
            Err(_) => Err(format!("spec.address: `{}` is no IP address", self.spec.address)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_and_address_must_agree() {
        for address in ["192.0.2.1", "2001:db8::1"] {
            let address: IpAddr = address.parse().unwrap();
            let mut vip = VirtualIp::of(address);
            assert_eq!(vip.address(), Ok(address));
            vip.spec.address = "192.0.2.2".into();
            assert!(vip.address().unwrap_err().contains("the name says"));
            vip.spec.address = "nothing".into();
            assert!(vip.address().unwrap_err().contains("`nothing` is no IP address"));
            vip.metadata.name = None;
            assert!(vip.address().unwrap_err().contains("no name of a VirtualIP"));
        }
    }

    #[test]
    fn it_is_written_as_documented() {
        let mut vip = VirtualIp::of("192.0.2.1".parse().unwrap());
        vip.spec.services.push(ServiceName::from(&ObjectRef::new("a", "b")));
        let expected = serde_json::json!({
            "apiVersion": "pointsman.dev/v1alpha1",
            "kind": "VirtualIP",
            "metadata": { "name": "192.0.2.1" },
            "spec": { "address": "192.0.2.1", "services": [{ "namespace": "a", "name": "b" }] },
        });
        assert_eq!(serde_json::to_value(&vip).unwrap(), expected);
    }
}
