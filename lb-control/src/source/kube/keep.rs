//! What stands for objects that cannot be taken as they are. What is served must not end because
//! somebody mistyped an annotation, nor when an agent starts that never saw the object in order.

use std::collections::BTreeMap;

use k8s_openapi::api::{core::v1 as core, discovery::v1 as discovery};

use crate::{
    model::{
        ANNOTATION_ADDRESSES, ANNOTATION_HEALTH_CHECK, ANNOTATION_SCHEDULER, ANNOTATION_SLICE_WEIGHT,
        ANNOTATION_SLOW_START, ANNOTATION_WEIGHTS, EndpointSlice, METALLB_PREFIXES, Service,
    },
    source::convert,
};

/// What stands for an object, and what that is called.
pub type Kept<T> = (T, &'static str);

/// Annotations that a Service does as well without: they say how it is served, not what.
const DISPENSABLE: [&str; 3] = [ANNOTATION_SCHEDULER, ANNOTATION_SLOW_START, ANNOTATION_HEALTH_CHECK];

/// A Service that only asks for ways to be served that there are not is served in the usual way. Any
/// other is as it last was, with what the API server has about it now: what we wrote ourselves has
/// to be seen. If it was never seen in order but has addresses, it keeps these and does without
/// what cannot be read.
pub fn service(old: Option<&Service>, raw: &core::Service) -> Option<Kept<Service>> {
    let mut plain = raw.clone();
    forget(&mut plain.metadata.annotations, DISPENSABLE.map(str::to_owned));
    if let Ok(service) = convert::service(&plain, None) {
        return Some((service, "it is served as if that were not there"));
    }
    Some((last(old, plain)?, "it keeps what it has"))
}

fn last(old: Option<&Service>, mut raw: core::Service) -> Option<Service> {
    let raw = &mut raw;
    let api = convert::api_state(raw);
    if let Some(old) = old {
        return Some(Service { api, ..old.clone() });
    }
    if !api.ingress_is_ours || api.ingress.is_empty() {
        return None;
    }
    let metallb = METALLB_PREFIXES.iter().map(|prefix| format!("{prefix}loadBalancerIPs"));
    let requests = metallb.chain([ANNOTATION_ADDRESSES, ANNOTATION_WEIGHTS].map(str::to_owned));
    forget(&mut raw.metadata.annotations, requests);
    raw.spec.as_mut()?.load_balancer_ip = None;
    let service = convert::service(raw, None).ok()?;
    let requested_addresses = api.ingress.iter().filter_map(|ingress| ingress.ip).collect();
    let requested_by = "status.loadBalancer.ingress".to_owned();
    Some(Service { requested_addresses, requested_by, ..service })
}

/// An EndpointSlice that was never seen in order keeps its endpoints, and does without its weight.
pub fn endpoint_slice(
    old: Option<&EndpointSlice>,
    raw: &discovery::EndpointSlice,
) -> Option<Kept<EndpointSlice>> {
    const EFFECT: &str = "it keeps what it has";
    if let Some(old) = old {
        return Some((old.clone(), EFFECT));
    }
    let mut raw = raw.clone();
    forget(&mut raw.metadata.annotations, [ANNOTATION_SLICE_WEIGHT.to_owned()]);
    Some((convert::endpoint_slice(&raw, None).ok()?, EFFECT))
}

fn forget(annotations: &mut Option<BTreeMap<String, String>>, names: impl IntoIterator<Item = String>) {
    for name in names {
        annotations.as_mut().and_then(|all| all.remove(&name));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::model::Scheduler;

    #[test]
    fn an_unknown_scheduler_costs_nothing_else() {
        let mut raw = raw(&json!({}), &json!([]));
        let annotations = raw.metadata.annotations.as_mut().unwrap();
        annotations.clear();
        annotations.insert(ANNOTATION_SCHEDULER.into(), "fastest".into());
        annotations.insert(ANNOTATION_HEALTH_CHECK.into(), "ask".into());
        annotations.insert(ANNOTATION_WEIGHTS.into(), "*=3".into());
        raw.spec.as_mut().unwrap().load_balancer_ip = None;
        assert!(convert::service(&raw, None).is_err());
        let (new, _) = service(None, &raw).expect("served all the same");
        assert_eq!((new.scheduler, new.weights), (Scheduler::RoundRobin, "*=3".parse().unwrap()));
    }

    fn raw(status: &serde_json::Value, managed: &serde_json::Value) -> core::Service {
        let annotations = json!({ ANNOTATION_ADDRESSES: "192.0.2.300", ANNOTATION_WEIGHTS: "=" });
        serde_json::from_value(json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {
                "name": "web", "namespace": "default", "resourceVersion": "7", "managedFields": managed,
                "annotations": annotations,
            },
            "spec": { "type": "LoadBalancer", "loadBalancerIP": "x", "ports": [{ "port": 80 }] },
            "status": status,
        }))
        .unwrap()
    }

    #[test]
    fn a_service_keeps_what_it_has() {
        let status = json!({ "loadBalancer": { "ingress": [{ "ip": "192.0.2.1" }] } });
        let managed = json!([{
            "manager": "pointsman", "operation": "Apply", "fieldsType": "FieldsV1",
            "fieldsV1": { "f:status": { "f:loadBalancer": { "f:ingress": {} } } },
        }]);
        let ours = raw(&status, &managed);
        assert!(convert::service(&ours, None).is_err());
        let (kept, _) = service(None, &ours).expect("it has an address");
        assert_eq!(kept.requested_addresses, ["192.0.2.1".parse::<std::net::IpAddr>().unwrap()]);

        assert_eq!(service(None, &raw(&status, &json!([]))), None, "another's address");
        let old = Service { pool: Some("p".into()), api: crate::model::ApiState::default(), ..kept };
        let (kept, _) = service(Some(&old), &ours).unwrap();
        assert_eq!((kept.pool, kept.api.resource_version.as_str()), (Some("p".into()), "7"));
    }
}
