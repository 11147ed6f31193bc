//! Commands as requests.

use std::net::IpAddr;

use k8s_openapi::{
    api::{
        core::v1::{ObjectReference, Service},
        events::v1::Event,
    },
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta, Time},
    jiff::Timestamp,
};
use kube::{
    Api, Client, Error,
    api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions},
    core::Status,
};
use serde_json::{Value, json};

use crate::{
    crd::{self, ServiceName, virtual_ip_name},
    model::{ANNOTATION_EXTERNAL_IPS, Condition, FIELD_MANAGER, Few, ObjectRef},
    plan::controller::{Command, EventTarget},
};

/// A write, in words of RBAC.
pub struct Call {
    /// As in `patch`.
    pub verb: &'static str,
    /// As in `services/status`.
    pub resource: &'static str,
}

impl Call {
    /// What a command writes.
    #[must_use]
    pub fn of(command: &Command) -> Self {
        let (verb, resource) = match command {
            Command::CreateVirtualIp { .. } => ("create", "virtualips"),
            Command::UpdateVirtualIp { .. } => ("patch", "virtualips"),
            Command::DeleteVirtualIp { .. } => ("delete", "virtualips"),
            Command::SetVirtualIpStatus { .. } => ("patch", "virtualips/status"),
            Command::AddFinalizers { .. }
            | Command::RemoveFinalizers { .. }
            | Command::SetExternalIps { .. } => ("patch", "services"),
            Command::ApplyServiceStatus { .. } => ("patch", "services/status"),
            Command::SetPoolStatus { .. } => ("patch", "addresspools/status"),
            Command::Event { .. } => ("create", "events"),
        };
        Self { verb, resource }
    }
}

/// Why a command was not carried out.
#[derive(Debug)]
pub enum Failure {
    /// The API server's error, or one of the way to it.
    Request(Error),
    /// It is not ours to write any more.
    NotAllowed,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Request(error)
    }
}

/// Says whether a command may still be written: asked before each write, however long what comes
/// before it has taken.
pub type MayWrite<'a> = &'a (dyn Fn() -> bool + Send + Sync);

fn ask(may_write: MayWrite<'_>) -> Result<(), Failure> {
    if may_write() { Ok(()) } else { Err(Failure::NotAllowed) }
}

/// Bytes of an Event's note; the API server refuses longer ones (`NoteLengthLimit` of its
/// validation of events.k8s.io/v1).
const NOTE: usize = 1_024;

/// Speaks with the API server.
pub struct Requests {
    client: Client,
    instance: String,
}

impl Requests {
    /// `instance` is who Events say that they come from.
    #[must_use]
    pub fn new(client: Client, instance: String) -> Self {
        Self { client, instance }
    }

    /// Carries a command out.
    ///
    /// # Errors
    /// The API server's, of the way to it, or that it may not be written any more.
    pub async fn send(&self, command: &Command, may_write: MayWrite<'_>) -> Result<(), Failure> {
        match command {
            Command::AddFinalizers { .. }
            | Command::RemoveFinalizers { .. }
            | Command::ApplyServiceStatus { .. }
            | Command::SetPoolStatus { .. } => self.read_and_write(command, may_write).await,
            _ => {
                ask(may_write)?;
                Ok(self.write(command).await?)
            }
        }
    }

    /// Commands that look at the object first.
    async fn read_and_write(&self, command: &Command, may_write: MayWrite<'_>) -> Result<(), Failure> {
        match command {
            Command::AddFinalizers { service, uid, resource_version, finalizers } => {
                let seen = (uid.as_str(), resource_version.as_str());
                let add = |all: &mut Vec<String>| {
                    let missing: Vec<_> =
                        finalizers.iter().filter(|one| !all.contains(one)).cloned().collect();
                    all.extend(missing);
                };
                self.finalizers(service, seen, add, may_write).await
            }
            Command::RemoveFinalizers { service, uid, resource_version, finalizers } => {
                let seen = (uid.as_str(), resource_version.as_str());
                let remove = |all: &mut Vec<String>| all.retain(|one| !finalizers.contains(one));
                match self.finalizers(service, seen, remove, may_write).await {
                    // It is gone, and its finalizers with it.
                    Err(Failure::Request(Error::Api(status))) if status.code == 404 => Ok(()),
                    other => other,
                }
            }
            Command::ApplyServiceStatus { service, uid, ingress, conditions } => {
                let patch = self.service_status(service, uid, ingress, conditions).await?;
                ask(may_write)?;
                let api = self.services(service);
                let parameters = PatchParams::apply(FIELD_MANAGER);
                api.patch_status(&service.name, &parameters, &Patch::Apply(patch)).await?;
                Ok(())
            }
            Command::SetPoolStatus { pool, assigned, available, conditions } => {
                self.pool_status(pool, (*assigned, *available), conditions, may_write).await
            }
            _ => Ok(()),
        }
    }

    /// Commands that are one request.
    async fn write(&self, command: &Command) -> Result<(), Error> {
        match command {
            Command::CreateVirtualIp { address, pool, services, node } => {
                let mut object =
                    crd::VirtualIp::new(&virtual_ip_name(*address), crd::VirtualIpSpec::default());
                object.spec.address = address.to_string();
                object.spec.pool.clone_from(pool);
                object.spec.services = services.iter().map(ServiceName::from).collect();
                object.spec.node.clone_from(node);
                self.virtual_ips().create(&PostParams::default(), &object).await.map(drop)
            }
            Command::UpdateVirtualIp { address, resource_version, pool, services, node } => {
                let patch = json!({
                    "metadata": {"resourceVersion": resource_version},
                    "spec": {"pool": pool, "services": names(services), "node": node},
                });
                self.merge(&self.virtual_ips(), *address, &patch).await
            }
            Command::DeleteVirtualIp { address, uid, resource_version } => {
                let preconditions = Preconditions {
                    uid: Some(uid.clone()),
                    resource_version: Some(resource_version.clone()),
                };
                let parameters = DeleteParams::default().preconditions(preconditions);
                self.virtual_ips().delete(&virtual_ip_name(*address), &parameters).await.map(drop)
            }
            Command::SetVirtualIpStatus { address, uid, resource_version, node, services } => {
                // The server compares the version of a patch that names one, for the subresource too:
                // what a former owner sends late is a conflict.
                let patch = json!({
                    "metadata": {"uid": uid, "resourceVersion": resource_version},
                    "status": {"node": node, "services": names(services)},
                });
                let name = virtual_ip_name(*address);
                let api = self.virtual_ips();
                api.patch_status(&name, &PatchParams::default(), &Patch::Merge(patch)).await.map(drop)
            }
            Command::SetExternalIps { service, resource_version, all, ours } => {
                let ours = if ours.is_empty() { Value::Null } else { json!(ours.join(",")) };
                let all = if all.is_empty() { Value::Null } else { json!(all) };
                let patch = json!({
                    "metadata": {
                        "resourceVersion": resource_version,
                        "annotations": {ANNOTATION_EXTERNAL_IPS: ours},
                    },
                    "spec": {"externalIPs": all},
                });
                let api = self.services(service);
                api.patch(&service.name, &PatchParams::default(), &Patch::Merge(patch)).await.map(drop)
            }
            Command::Event { about, warning, reason, note } => {
                self.event(about, *warning, reason, note).await
            }
            _ => Ok(()),
        }
    }

    fn virtual_ips(&self) -> Api<crd::VirtualIp> {
        Api::all(self.client.clone())
    }

    fn services(&self, service: &ObjectRef) -> Api<Service> {
        Api::namespaced(self.client.clone(), &service.namespace)
    }

    async fn merge(&self, api: &Api<crd::VirtualIp>, address: IpAddr, patch: &Value) -> Result<(), Error> {
        let name = virtual_ip_name(address);
        api.patch(&name, &PatchParams::default(), &Patch::Merge(patch)).await.map(drop)
    }

    /// Changes the list of finalizers, which a merge patch can only replace as a whole. `seen` is
    /// uid and version of the Service that this was decided about.
    async fn finalizers(
        &self,
        service: &ObjectRef,
        seen: (&str, &str),
        change: impl Fn(&mut Vec<String>),
        may_write: MayWrite<'_>,
    ) -> Result<(), Failure> {
        let (uid, resource_version) = seen;
        let api = self.services(service);
        let found = api.get_metadata(&service.name).await?.metadata;
        if found.uid.as_deref() != Some(uid) {
            return Err(conflict(&format!("the Service {service} was deleted and created again")).into());
        }
        if found.resource_version.as_deref() != Some(resource_version) {
            return Err(conflict(&format!("the Service {service} has been modified")).into());
        }
        let before = found.finalizers.unwrap_or_default();
        let mut after = before.clone();
        change(&mut after);
        if after == before {
            return Ok(());
        }
        let patch = json!({
            "metadata": {"resourceVersion": resource_version, "uid": uid, "finalizers": after},
        });
        ask(may_write)?;
        api.patch_metadata(&service.name, &PatchParams::default(), &Patch::Merge(patch)).await?;
        Ok(())
    }

    /// What to apply as a Service's status. A condition that says the same keeps its time.
    async fn service_status(
        &self,
        service: &ObjectRef,
        uid: &str,
        ingress: &[IpAddr],
        conditions: &[Condition],
    ) -> Result<Value, Error> {
        let mut status = json!({});
        if !ingress.is_empty() {
            let ingress: Vec<_> = ingress.iter().map(|ip| json!({"ip": ip, "ipMode": "VIP"})).collect();
            status["loadBalancer"] = json!({"ingress": ingress});
        }
        if !conditions.is_empty() {
            // The object has it too, and reading the subresource would be one more right to grant.
            let found = self.services(service).get(&service.name).await?;
            let old = found.status.and_then(|status| status.conditions).unwrap_or_default();
            let now = Time(Timestamp::now());
            let since = |one: &Condition| {
                let same = old.iter().find(|old| old.type_ == one.kind && old.status == one.status);
                same.map_or_else(|| now.clone(), |old| old.last_transition_time.clone())
            };
            status["conditions"] = conditions.iter().map(|one| condition(one, since(one))).collect();
        }
        Ok(json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": service.name, "namespace": service.namespace, "uid": uid},
            "status": status,
        }))
    }

    async fn pool_status(
        &self,
        pool: &str,
        (assigned, available): (u64, u64),
        conditions: &[Condition],
        may_write: MayWrite<'_>,
    ) -> Result<(), Failure> {
        // Another's kind: MetalLB's own controller writes its status.
        if pool.contains('/') {
            return Ok(());
        }
        let api: Api<crd::AddressPool> = Api::all(self.client.clone());
        let found = api.get(pool).await?;
        let old = found.status.map(|status| status.conditions).unwrap_or_default();
        let (uid, resource_version) = (found.metadata.uid, found.metadata.resource_version);
        let now = Time(Timestamp::now());
        let since = |one: &Condition| {
            let same = old.iter().find(|old| old.type_ == one.kind && old.status == one.status);
            same.map_or_else(|| now.clone(), |old| old.last_transition_time.clone())
        };
        let mut status = json!(crd::AddressPoolStatus::counting(assigned.into(), available.into()));
        status["conditions"] = conditions.iter().map(|one| condition(one, since(one))).collect();
        let patch = json!({"metadata": {"uid": uid, "resourceVersion": resource_version}, "status": status});
        ask(may_write)?;
        api.patch_status(pool, &PatchParams::default(), &Patch::Merge(patch)).await?;
        Ok(())
    }

    async fn event(&self, about: &EventTarget, warning: bool, reason: &str, note: &str) -> Result<(), Error> {
        // Events of objects without a namespace are kept in `default`, as client-go does.
        let namespace =
            Some(about.object.namespace.as_str()).filter(|it| !it.is_empty()).unwrap_or("default");
        let event = Event {
            metadata: ObjectMeta {
                // Not with a dot, as client-go's names have: a prefix has to be a name itself, or one
                // that ends in a dash.
                generate_name: Some(format!("{}-", about.object.name)),
                ..ObjectMeta::default()
            },
            action: Some(reason.to_owned()),
            event_time: Some(MicroTime(Timestamp::now())),
            note: Some(note[..note.floor_char_boundary(NOTE)].to_owned()),
            reason: Some(reason.to_owned()),
            regarding: Some(ObjectReference {
                api_version: Some(about.api_version.clone().into_owned()),
                kind: Some(about.kind.to_owned()),
                name: Some(about.object.name.clone()),
                namespace: Some(about.object.namespace.clone()).filter(|namespace| !namespace.is_empty()),
                uid: Some(about.uid.clone()).filter(|uid| !uid.is_empty()),
                ..ObjectReference::default()
            }),
            reporting_controller: Some("pointsman.dev/pointsman".to_owned()),
            reporting_instance: Some(self.instance.chars().take(128).collect()),
            type_: Some(if warning { "Warning" } else { "Normal" }.to_owned()),
            ..Event::default()
        };
        let api: Api<Event> = Api::namespaced(self.client.clone(), namespace);
        api.create(&PostParams::default(), &event).await.map(drop)
    }
}

fn names(services: &Few<ObjectRef>) -> Vec<ServiceName> {
    services.iter().map(ServiceName::from).collect()
}

fn condition(from: &Condition, since: Time) -> Value {
    json!({
        "type": from.kind,
        "status": from.status,
        "reason": from.reason,
        "message": from.message,
        "observedGeneration": from.observed_generation,
        "lastTransitionTime": since,
    })
}

/// An object is there, but not the one that was meant, or other than it was then.
fn conflict(message: &str) -> Error {
    Error::Api(Box::new(Status::failure(message, "Conflict").with_code(409)))
}
