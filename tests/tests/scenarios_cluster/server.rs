//! What an API server makes of people's YAML and of our commands: as much of it as matters to
//! decisions. The suite `api` holds the real requests against a double that does more.

use std::{collections::BTreeMap, net::IpAddr};

use lb_control::{
    crd::virtual_ip_name,
    model::{ANNOTATION_EXTERNAL_IPS, Condition, FIELD_MANAGER, Few, ObjectRef},
    plan::controller::{Command, Outcome},
};
use serde_json::{Value, json};

/// Names an object. Orders as it is to be shown.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    pub kind: String,
    /// Empty for objects of the whole cluster.
    pub namespace: String,
    pub name: String,
}

/// Another controller that writes Services.
pub const RIVAL: &str = "rival";

/// Kinds without a namespace.
const OF_THE_CLUSTER: [&str; 4] = ["AddressPool", "Namespace", "Node", "VirtualIP"];

impl Key {
    pub fn new(kind: &str, namespace: &str, name: &str) -> Self {
        Self { kind: kind.into(), namespace: namespace.into(), name: name.into() }
    }

    /// Of an object; without a namespace it is in `default`, as with kubectl.
    pub fn of(object: &Value) -> Self {
        let kind = object["kind"].as_str().expect("`kind`");
        let name = object["metadata"]["name"].as_str().expect("`metadata.name`");
        let namespace = object["metadata"]["namespace"].as_str().unwrap_or("default");
        Self::new(kind, if OF_THE_CLUSTER.contains(&kind) { "" } else { namespace }, name)
    }

    fn service(service: &ObjectRef) -> Self {
        Self::new("Service", &service.namespace, &service.name)
    }

    fn virtual_ip(address: IpAddr) -> Self {
        Self::new("VirtualIP", "", &virtual_ip_name(address))
    }
}

/// Objects, the log that watches read, and Events.
#[derive(Default)]
pub struct Server {
    pub objects: BTreeMap<Key, Value>,
    pub log: Vec<(Key, Option<Value>)>,
    /// Lines, since they were last shown.
    pub events: Vec<String>,
    /// Objects as the last write of somebody other than us left them.
    written: BTreeMap<Key, Value>,
    version: u64,
}

impl Server {
    /// What people write, by `kubectl apply`: what only others write stays.
    pub fn apply(&mut self, mut object: Value) {
        let key = Key::of(&object);
        object["metadata"]["namespace"] = json!(key.namespace);
        if key.namespace.is_empty() {
            object["metadata"].as_object_mut().expect("metadata").remove("namespace");
        }
        let old = self.objects.get(&key).cloned();
        if let Some(old) = &old {
            keep(old, &mut object);
        }
        if key.kind == "Service" {
            prepare(&mut object);
        }
        self.put(&key, object);
        self.written.insert(key.clone(), self.objects[&key].clone());
    }

    /// Somebody else's controller writes the ingress of a Service.
    pub fn write_ingress(&mut self, name: &ObjectRef, ingress: Value) {
        let key = Key::service(name);
        let mut object = self.objects[&key].clone();
        if object["status"]["loadBalancer"]["ingress"] != ingress {
            // Who changes a field owns it, and nobody else does any more.
            let is_empty = ingress.as_array().is_none_or(Vec::is_empty);
            own(&mut object, FIELD_MANAGER, false);
            own(&mut object, RIVAL, !is_empty);
            object["status"]["loadBalancer"] = if is_empty { json!({}) } else { json!({"ingress": ingress}) };
        }
        self.put(&key, object);
        self.written.insert(key.clone(), self.objects[&key].clone());
    }

    /// Whether an object is to the byte as somebody other than us left it.
    pub fn is_as_written(&self, key: &Key) -> bool {
        self.objects.get(key) == self.written.get(key)
    }

    /// People delete an object.
    pub fn delete(&mut self, key: &Key) {
        let Some(mut object) = self.objects.get(key).cloned() else { return };
        object["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        self.put(key, object);
    }

    /// Stores an object; gone is one that is to be deleted and that nothing holds.
    pub fn put(&mut self, key: &Key, mut object: Value) {
        if self.objects.get(key) == Some(&object) {
            return;
        }
        self.version += 1;
        let metadata = &object["metadata"];
        let is_held = metadata["finalizers"].as_array().is_some_and(|all| !all.is_empty());
        if metadata["deletionTimestamp"].is_string() && !is_held {
            self.objects.remove(key);
            self.written.remove(key);
            self.log.push((key.clone(), None));
            return;
        }
        if metadata["uid"].is_null() {
            object["metadata"]["uid"] = json!(format!("uid-{}", self.version));
        }
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        self.objects.insert(key.clone(), object.clone());
        self.log.push((key.clone(), Some(object)));
    }

    /// Carries out a command as `publish::Requests` has the API server do it.
    pub fn run(&mut self, command: &Command) -> Outcome {
        match command {
            Command::CreateVirtualIp { address, pool, services, node } => {
                let key = Key::virtual_ip(*address);
                if self.objects.contains_key(&key) {
                    return Outcome::Conflict("it exists already".into());
                }
                let object = json!({
                    "apiVersion": "pointsman.dev/v1alpha1", "kind": "VirtualIP", "metadata": {"name": key.name},
                    "spec": {"address": address, "pool": pool, "services": names(services), "node": node},
                });
                self.put(&key, object);
                Outcome::Done
            }
            Command::UpdateVirtualIp { address, resource_version, pool, services, node } => {
                self.edit(&Key::virtual_ip(*address), None, Some(resource_version), |it| {
                    it["spec"] =
                        json!({"address": address, "pool": pool, "services": names(services), "node": node});
                })
            }
            Command::DeleteVirtualIp { address, uid, resource_version } => {
                self.edit(&Key::virtual_ip(*address), Some(uid), Some(resource_version), |it| {
                    it["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
                })
            }
            Command::SetVirtualIpStatus { address, uid, resource_version, node, services } => {
                self.edit(&Key::virtual_ip(*address), Some(uid), Some(resource_version), |it| {
                    it["status"] = json!({"node": node, "services": names(services)});
                })
            }
            // MetalLB's own controller writes the status of its pools.
            Command::SetPoolStatus { pool, .. } if pool.contains('/') => Outcome::Done,
            Command::SetPoolStatus { pool, assigned, available, conditions } => {
                self.edit(&Key::new("AddressPool", "", pool), None, None, |it| {
                    let available = i64::try_from(*available).unwrap_or(i64::MAX);
                    it["status"] = json!({"assigned": assigned, "available": available});
                    it["status"]["conditions"] = shown(conditions);
                })
            }
            Command::Event { about, warning, reason, note } => {
                let kind = if *warning { "Warning" } else { "Normal" };
                self.events
                    .push(format!("Event {kind} {reason} about {} {}: {note}", about.kind, about.object));
                Outcome::Done
            }
            other => self.run_for_service(other),
        }
    }

    fn run_for_service(&mut self, command: &Command) -> Outcome {
        match command {
            Command::AddFinalizers { service, uid, resource_version, finalizers } => {
                self.edit_finalizers(service, (uid, resource_version), |all| {
                    let new = finalizers.iter().filter(|it| !all.contains(it)).cloned().collect::<Vec<_>>();
                    all.extend(new);
                })
            }
            Command::RemoveFinalizers { service, uid, resource_version, finalizers } => {
                let remove = |all: &mut Vec<String>| all.retain(|it| !finalizers.contains(it));
                match self.edit_finalizers(service, (uid, resource_version), remove) {
                    Outcome::Gone => Outcome::Done,
                    other => other,
                }
            }
            Command::SetExternalIps { service, resource_version, all, ours } => {
                self.edit(&Key::service(service), None, Some(resource_version), |it| {
                    set(&mut it["spec"], "externalIPs", (!all.is_empty()).then(|| json!(all)));
                    ensure(&mut it["metadata"]["annotations"]);
                    let ours = (!ours.is_empty()).then(|| json!(ours.join(",")));
                    set(&mut it["metadata"]["annotations"], ANNOTATION_EXTERNAL_IPS, ours);
                })
            }
            Command::ApplyServiceStatus { service, uid, ingress, conditions } => {
                self.apply_status(service, uid, ingress, conditions)
            }
            other => unreachable!("{other:?}"),
        }
    }

    fn edit_finalizers(
        &mut self,
        service: &ObjectRef,
        (uid, version): (&str, &str),
        change: impl FnOnce(&mut Vec<String>),
    ) -> Outcome {
        self.edit(&Key::service(service), Some(uid), Some(version), |it| {
            let mut all = texts(&it["metadata"]["finalizers"]);
            change(&mut all);
            set(&mut it["metadata"], "finalizers", (!all.is_empty()).then(|| json!(all)));
        })
    }

    /// Server-side apply without force: the ingress is one field, conditions are by type.
    fn apply_status(
        &mut self,
        service: &ObjectRef,
        uid: &str,
        addresses: &[IpAddr],
        conditions: &[Condition],
    ) -> Outcome {
        let key = Key::service(service);
        let Some(object) = self.objects.get(&key) else { return Outcome::Gone };
        let wanted: Vec<_> = addresses.iter().map(|ip| json!({"ip": ip, "ipMode": "VIP"})).collect();
        let wanted = json!(wanted);
        let present = &object["status"]["loadBalancer"]["ingress"];
        if !addresses.is_empty() && owns(object, RIVAL) && *present != wanted {
            return Outcome::Conflict("conflict with \"rival\": .status.loadBalancer.ingress".into());
        }
        self.edit(&key, Some(uid), None, |it| {
            if addresses.is_empty() {
                if owns(it, FIELD_MANAGER) && !owns(it, RIVAL) {
                    it["status"]["loadBalancer"] = json!({});
                }
            } else {
                it["status"]["loadBalancer"] = json!({"ingress": wanted});
            }
            own(it, FIELD_MANAGER, !addresses.is_empty());
            let theirs = it["status"]["conditions"].as_array().cloned().unwrap_or_default();
            let is_theirs =
                |it: &Value| !it["type"].as_str().is_some_and(|it| it.starts_with("pointsman.dev/"));
            let mut all: Vec<_> = theirs.into_iter().filter(is_theirs).collect();
            all.extend(shown(conditions).as_array().cloned().unwrap_or_default());
            set(&mut it["status"], "conditions", (!all.is_empty()).then(|| json!(all)));
        })
    }

    fn edit(
        &mut self,
        key: &Key,
        uid: Option<&str>,
        version: Option<&str>,
        change: impl FnOnce(&mut Value),
    ) -> Outcome {
        let Some(mut object) = self.objects.get(key).cloned() else { return Outcome::Gone };
        let metadata = &object["metadata"];
        if uid.is_some_and(|uid| metadata["uid"] != uid)
            || version.is_some_and(|version| metadata["resourceVersion"] != version)
        {
            return Outcome::Conflict("it has changed".into());
        }
        change(&mut object);
        self.put(key, object);
        Outcome::Done
    }
}

/// A list of texts; empty if there is none.
pub fn texts(list: &Value) -> Vec<String> {
    list.as_array().into_iter().flatten().filter_map(|it| it.as_str().map(str::to_owned)).collect()
}

fn ensure(value: &mut Value) {
    if !value.is_object() {
        *value = json!({});
    }
}

fn set(object: &mut Value, field: &str, value: Option<Value>) {
    match value {
        Some(value) => object[field] = value,
        None => drop(object.as_object_mut().and_then(|fields| fields.remove(field))),
    }
}

fn shown(conditions: &[Condition]) -> Value {
    let one = |it: &Condition| {
        json!({"type": it.kind, "status": it.status, "reason": it.reason, "message": it.message,
            "observedGeneration": it.observed_generation, "lastTransitionTime": "2026-01-01T00:00:00Z"})
    };
    conditions.iter().map(one).collect()
}

/// Takes over what `kubectl apply` leaves alone: what the file does not name and did not name before.
fn keep(old: &Value, new: &mut Value) {
    for field in ["uid", "resourceVersion", "finalizers", "managedFields", "deletionTimestamp"] {
        let value = old["metadata"].get(field).cloned();
        set(&mut new["metadata"], field, value);
    }
    if let Some(status) = old.get("status") {
        new["status"] = status.clone();
    }
    if old["metadata"]["annotations"][ANNOTATION_EXTERNAL_IPS].is_string()
        && new["spec"]["externalIPs"].is_null()
    {
        new["spec"]["externalIPs"] = old["spec"]["externalIPs"].clone();
        ensure(&mut new["metadata"]["annotations"]);
        new["metadata"]["annotations"][ANNOTATION_EXTERNAL_IPS] =
            old["metadata"]["annotations"][ANNOTATION_EXTERNAL_IPS].clone();
    }
}

/// Defaults of a cluster with both families, and what goes with the type (after the API server's
/// `pkg/registry/core/service`: `defaultOnReadService`, `initIPFamilyFields`, `PrepareForUpdate`).
fn prepare(service: &mut Value) {
    let spec = &mut service["spec"];
    if spec["ipFamilyPolicy"].is_null() {
        spec["ipFamilyPolicy"] = json!("SingleStack");
    }
    let mut families = texts(&spec["ipFamilies"]);
    if families.is_empty() {
        families.push("IPv4".into());
    }
    if spec["ipFamilyPolicy"] != "SingleStack" && families.len() == 1 {
        families.push(if families[0] == "IPv4" { "IPv6" } else { "IPv4" }.into());
    }
    spec["ipFamilies"] = json!(families);
    if spec["type"] != "LoadBalancer" {
        service["status"]["loadBalancer"] = json!({});
        own(service, FIELD_MANAGER, false);
        own(service, RIVAL, false);
    }
}

/// Whether the ingress belongs to a manager.
pub fn owns(service: &Value, manager: &str) -> bool {
    let entries = service["metadata"]["managedFields"].as_array();
    entries.into_iter().flatten().any(|entry| entry["manager"] == manager)
}

/// Notes whether a manager owns the ingress.
fn own(service: &mut Value, manager: &str, owns: bool) {
    let entries = service["metadata"]["managedFields"].as_array().cloned().unwrap_or_default();
    let mut entries: Vec<_> = entries.into_iter().filter(|entry| entry["manager"] != manager).collect();
    if owns {
        let operation = if manager == FIELD_MANAGER { "Apply" } else { "Update" };
        entries.push(json!({
            "manager": manager, "operation": operation, "apiVersion": "v1", "subresource": "status",
            "fieldsType": "FieldsV1", "fieldsV1": {"f:status": {"f:loadBalancer": {"f:ingress": {}}}},
        }));
    }
    set(&mut service["metadata"], "managedFields", (!entries.is_empty()).then(|| json!(entries)));
}

fn names(services: &Few<ObjectRef>) -> Vec<&ObjectRef> {
    services.iter().collect()
}
