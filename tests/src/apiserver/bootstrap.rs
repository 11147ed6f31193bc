//! What every cluster has from the start.

use std::sync::Arc;

use serde_json::{Value, json};

use super::{
    kinds::Kind,
    managed::Manager,
    objects::{self, Write},
    store::Store,
    strategy::Part,
};

/// Makes the namespaces and the API server's own Service.
pub fn fill(store: &mut Store) {
    for name in ["default", "kube-system", "kube-public", "kube-node-lease"] {
        add(store, "", "namespaces", "", json!({ "metadata": { "name": name } }));
    }
    // A Service that is nobody's business.
    let labels = json!({ "component": "apiserver", "provider": "kubernetes" });
    let service = json!({
        "metadata": { "name": "kubernetes", "labels": labels },
        "spec": {
            "clusterIP": "10.96.0.1",
            "ports": [{ "name": "https", "port": 443, "protocol": "TCP", "targetPort": 6443 }],
        },
    });
    add(store, "", "services", "default", service);
    // How the cluster came about is nothing that can be watched.
    store.compact();
}

fn add(store: &mut Store, group: &str, plural: &str, namespace: &str, object: Value) {
    let found: Option<Arc<Kind>> = store.registry.find(group, "v1", plural);
    let kind = found.expect("a kind that is built in");
    let manager = Manager { name: "kube-apiserver".into(), ..Manager::default() };
    let write = Write { kind, part: Part::Main, manager, dry_run: false, strict: false };
    let key = (namespace.to_owned(), String::new());
    objects::create(store, &write, &key, object).expect("an object that is valid in an empty cluster");
}
