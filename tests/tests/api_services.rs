//! What users of Services of type LoadBalancer rely on, end to end: objects in the API, packets
//! from a client, and what the API says then. Among it is all that the end-to-end tests of
//! Kubernetes ask of a load balancer (test/e2e/network/loadbalancer.go).

#[path = "api_services/access.rs"]
mod access;
#[path = "api_services/endpoints.rs"]
mod endpoints;
#[path = "api_services/flow_tables.rs"]
mod flow_tables;
#[path = "api_services/kit.rs"]
mod kit;
#[path = "api_services/local.rs"]
mod local;
#[path = "api_services/metallb.rs"]
mod metallb;
#[path = "api_services/ranges.rs"]
mod ranges;
#[path = "api_services/requests.rs"]
mod requests;
#[path = "api_services/restarts.rs"]
mod restarts;
#[path = "api_services/sharing.rs"]
mod sharing;
#[path = "api_services/types.rs"]
mod types;
