//! What the agent may do, and API servers that lack something.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use k8s_openapi::{
    api::rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding},
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kube::{
    Api,
    api::{Patch, PatchParams, PostParams},
};
use pointsman_tests::{
    apiserver::{ApiServer, Options, cluster::is_real},
    cluster_world::ClusterWorld,
    lab::{Agent, Lab, is_root},
};
use serde_json::{Value, json};

use super::{ask, double, problems, wait_problem, world};

const MANIFEST: &str = include_str!("../../../deploy/base/pointsman.yaml");
const SYSTEM: &str = "pointsman-system";
const ACCOUNT: &str = "pointsman";

/// `verb group/resource`
type Right = String;

/// The roles that are shipped, with our Leases in the namespace of the test.
fn roles(world: &ClusterWorld) -> Result<Vec<Value>> {
    let text = MANIFEST.replace(&format!("namespace: {SYSTEM}"), &format!("namespace: {}", world.namespace));
    let all: Vec<Value> = serde_saphyr::from_multiple(&text)?;
    let is_role = |it: &Value| it["apiVersion"] == "rbac.authorization.k8s.io/v1";
    Ok(all.into_iter().filter(is_role).collect())
}

fn install(world: &ClusterWorld, roles: &[Value]) -> Result<()> {
    let client = world.cluster.client();
    let namespace = &world.namespace;
    let parameters = PatchParams::apply("test").force();
    for role in roles {
        let name = role["metadata"]["name"].as_str().context("a name")?;
        let patch = Patch::Apply(role);
        match role["kind"].as_str() {
            Some("ClusterRole") => {
                drop(world.block(Api::<ClusterRole>::all(client.clone()).patch(name, &parameters, &patch))?)
            }
            Some("ClusterRoleBinding") => {
                drop(world.block(Api::<ClusterRoleBinding>::all(client.clone()).patch(
                    name,
                    &parameters,
                    &patch,
                ))?)
            }
            Some("Role") => drop(world.block(Api::<Role>::namespaced(client.clone(), namespace).patch(
                name,
                &parameters,
                &patch,
            ))?),
            _ => drop(world.block(Api::<RoleBinding>::namespaced(client.clone(), namespace).patch(
                name,
                &parameters,
                &patch,
            ))?),
        }
    }
    double(world)?.enforce_rbac(true);
    Ok(())
}

fn granted(roles: &[Value]) -> BTreeSet<Right> {
    let mut rights = BTreeSet::new();
    let list = |value: &Value| -> Vec<String> {
        value.as_array().into_iter().flatten().filter_map(|it| it.as_str().map(str::to_owned)).collect()
    };
    for rule in roles.iter().flat_map(|role| role["rules"].as_array().into_iter().flatten()) {
        for group in list(&rule["apiGroups"]) {
            for resource in list(&rule["resources"]) {
                rights.extend(list(&rule["verbs"]).iter().map(|verb| format!("{verb} {group}/{resource}")));
            }
        }
    }
    rights
}

fn used(world: &ClusterWorld) -> Result<BTreeSet<Right>> {
    let all = double(world)?.requests();
    let ours: Vec<_> = all.iter().filter(|it| it.user.starts_with("system:serviceaccount:")).collect();
    let refused: Vec<_> = ours.iter().filter(|it| it.code == 403).collect();
    ensure!(refused.is_empty(), "{refused:#?}");
    Ok(ours.iter().map(|it| format!("{} {}/{}", it.verb.as_str(), it.group, it.full_resource())).collect())
}

#[test]
fn the_shipped_roles_are_what_is_needed() -> Result<()> {
    let Some(world) = world(1)? else { return Ok(()) };
    let roles = roles(&world)?;
    install(&world, &roles)?;
    let account = (world.namespace.as_str(), ACCOUNT);
    let mut agent = world.agent_as(account, &[])?;
    world.service("web", &json!({}), &[1])?;
    ask(&world, world.published("web", 2)?[0])?;
    world.service("dns", &json!({}), &[1])?;
    world.published("dns", 2)?;
    world.delete("Service", "web")?;
    world.wait("the Service to go", ("Service", "web"), |found| found.is_none())?;
    agent.sigterm()?;
    let config = double(&world)?.write_kubeconfig("cleanup", world.relay.address(), Some(account))?;
    let config = config.display().to_string();
    let clean = || {
        let binary = std::env::var("POINTSMAN_BIN")?;
        world.lab.edge.run([&binary, "cleanup", "--kubeconfig", &config, "--namespace", &world.namespace])
    };
    let said = clean()?;
    ensure!(said.contains("freed 1 Services"), "{said}");
    let again = clean()?;
    ensure!(again.contains("freed 0 Services; deleted 0 VirtualIPs"), "{again}");
    ensure!(world.list("VirtualIP")?.is_empty(), "{:#?}", world.list("VirtualIP")?);
    // No agent is left to begin again, so nobody has to wait.
    // But for the leader's, by which nobody leads who is started too early.
    let leases = world.list("Lease")?;
    let names: Vec<_> = leases.iter().filter_map(|lease| lease["metadata"]["name"].as_str()).collect();
    ensure!(names == ["pointsman-controller"], "{names:?}");
    let left = world.get("Service", "dns")?.unwrap_or_default();
    ensure!(left["metadata"]["finalizers"].is_null(), "{left:#}");
    ensure!(left["status"]["loadBalancer"]["ingress"].is_null(), "{left:#}");

    let (granted, used) = (granted(&roles), used(&world)?);
    let missing: Vec<_> = used.difference(&granted).collect();
    ensure!(missing.is_empty(), "used, and not granted: {missing:?}");
    let spare: Vec<_> =
        granted.difference(&used).map(String::as_str).filter(|it| !may_be_spare(it)).collect();
    ensure!(spare.is_empty(), "granted, and never used: {spare:?}");
    Ok(())
}

/// What a short life does not need.
fn may_be_spare(right: &str) -> bool {
    // MetalLB is not installed here.
    right.contains("metallb.io/")
        // Only servers that cannot stream a list are asked for one; cleanup asks for some.
        || right.starts_with("list ")
        // Only after a conflict.
        || right == "get /services"
}

/// The shipped roles without a resource.
fn without(world: &ClusterWorld, resource: &str) -> Result<Vec<Value>> {
    let mut roles = roles(world)?;
    let rules = roles.iter_mut().filter_map(|role| role["rules"].as_array_mut()).flatten();
    for list in rules.filter_map(|rule| rule["resources"].as_array_mut()) {
        list.retain(|it| it != resource);
    }
    Ok(roles)
}

#[test]
fn a_rule_that_is_missing_is_named() -> Result<()> {
    for (resource, verb) in [("endpointslices", "watch"), ("services/status", "patch")] {
        let Some(world) = world(1)? else { return Ok(()) };
        install(&world, &without(&world, resource)?)?;
        let agent = world.agent_as((&world.namespace, ACCOUNT), &[])?;
        world.service("web", &json!({}), &[1])?;
        wait_problem(&agent, &format!("RBAC does not let Pointsman {verb}"))?;
        ensure!(agent.log().contains(resource), "{}", agent.log());
        // It goes on where it stopped once it may.
        install(&world, &roles(&world)?)?;
        ask(&world, world.published("web", 2)?[0])?;
        agent.wait_status("no problem any more", |status| !problems(status).contains(resource))?;
    }
    Ok(())
}

#[test]
fn an_old_kubernetes_is_refused() -> Result<()> {
    if is_real() || !is_root() {
        return Ok(());
    }
    let lab = Lab::routed(1)?;
    let double = ApiServer::start_with(&Options { minor: 20, ..Options::default() })?;
    let there = double.listen(([127, 0, 0, 1], 0).into(), Some(&lab.edge.path()))?;
    let kubeconfig = double.write_kubeconfig("edge", there.address(), None)?;
    let mut agent = Agent::start_in_cluster(&lab, lab.seat(), &kubeconfig, &["--node-name", "edge"])?;
    let status = agent.ended()?;
    ensure!(!status.success(), "{status}");
    ensure!(agent.log().contains("Pointsman needs 1.21 or newer"), "{}", agent.log());
    Ok(())
}

#[test]
fn definitions_that_come_later_are_waited_for() -> Result<()> {
    if is_real() || !is_root() {
        return Ok(());
    }
    let lab = Lab::routed(1)?;
    let double = ApiServer::start()?;
    let there = double.listen(([127, 0, 0, 1], 0).into(), Some(&lab.edge.path()))?;
    let kubeconfig = double.write_kubeconfig("edge", there.address(), None)?;
    let flags = ["--node-name", "edge", "--http-address", "none"];
    let agent = Agent::start_in_cluster(&lab, lab.seat(), &kubeconfig, &flags)?;
    wait_problem(&agent, "pointsman-crds")?;
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async {
        let api = Api::<CustomResourceDefinition>::all(double.client()?);
        for definition in lb_control::crd::definitions() {
            api.create(&PostParams::default(), &definition).await?;
        }
        anyhow::Ok(())
    })?;
    agent.wait_status("no problem any more", |status| !problems(status).contains("pointsman-crds"))?;
    Ok(())
}
