//! What the agent may do, and API servers that lack something.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::{Api, api::PostParams};
use pointsman_tests::{
    apiserver::{ApiServer, Options, cluster::is_real},
    cluster_world::ClusterWorld,
    lab::{Agent, Lab, is_root},
};
use serde_json::{Value, json};

use super::{ask, double, problems, wait_problem, world};

/// `verb group/resource`
type Right = String;

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
    let Some(mut world) = world(1)? else { return Ok(()) };
    let roles = world.shipped_rights()?;
    world.grant(&roles)?;
    world.act_as_account()?;
    let mut agent = world.agent(&[])?;
    world.service("web", &json!({}), &[1])?;
    ask(&world, world.published("web", 2)?[0])?;
    world.service("dns", &json!({}), &[1])?;
    world.published("dns", 2)?;
    world.delete("Service", "web")?;
    world.wait("the Service to go", ("Service", "web"), |found| found.is_none())?;
    agent.sigterm()?;
    let said = world.clean_up()?;
    ensure!(said.contains("freed 1 Services"), "{said}");
    let again = world.clean_up()?;
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
