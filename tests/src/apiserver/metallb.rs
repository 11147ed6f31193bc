//! MetalLB's resource definitions, as far as tests need them.

use serde_json::{Value, json};

/// Plural and kind of what it has.
pub const KINDS: [(&str, &str); 3] = [
    ("ipaddresspools", "IPAddressPool"),
    ("l2advertisements", "L2Advertisement"),
    ("bgpadvertisements", "BGPAdvertisement"),
];

/// Name and definition of one of MetalLB's kinds.
#[must_use]
pub fn definition(plural: &str, kind: &str) -> (String, Value) {
    let name = format!("{plural}.metallb.io");
    let definition = json!({
        "metadata": { "name": name },
        "spec": {
            "group": "metallb.io", "scope": "Namespaced",
            "names": { "plural": plural, "singular": kind.to_lowercase(), "kind": kind },
            "versions": [{
                "name": "v1beta1", "served": true, "storage": true,
                "schema": { "openAPIV3Schema": {
                    "type": "object", "x-kubernetes-preserve-unknown-fields": true,
                } },
            }],
        },
    });
    (name, definition)
}
