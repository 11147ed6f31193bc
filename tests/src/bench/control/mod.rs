//! What the control plane costs: a whole agent that follows a large cluster, against the API server
//! double. Only the agent's own time and memory are counted as its own.

mod datapath;
mod edge;
mod seed;

use std::{
    collections::BTreeMap,
    net::IpAddr,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

use self::{datapath::Datapath, edge::Edge, seed::Cluster};
use super::{machine, report::Report};
use crate::{
    apiserver::{Request, Verb},
    lab::Lab,
};

/// How much there is.
#[derive(Clone, Copy, Debug)]
pub struct Scale {
    /// Services of type LoadBalancer with one port each.
    pub services: u32,
    /// Endpoints of each, all different.
    pub endpoints: u32,
    /// Endpoints that change, one after another.
    pub changes: u32,
    /// How long the agent is watched while nothing happens.
    pub rest: Duration,
}

impl Scale {
    fn backends(&self) -> usize {
        self.services as usize * self.endpoints as usize
    }
}

/// Bounds of the issue, for 10,000 Services with 10 endpoints each.
const COLD_SYNC_SECONDS: f64 = 5.0;
const CHANGE_MILLISECONDS: f64 = 10.0;
const RESIDENT_MIB: f64 = 300.0;

/// Longer than anything here may take.
const PATIENCE: Duration = Duration::from_secs(600);

/// Measures everything, in the order of an agent's life.
///
/// # Errors
/// When the lab, the double or the agent cannot be had, or the agent does not get there.
pub fn measure(report: &mut Report, scale: Scale) -> Result<()> {
    let cluster = Cluster::new()?;
    let lab = Lab::routed(1)?;
    let mut edge = Edge::new(&lab, &cluster)?;
    eprintln!("{} Services with {} endpoints each", scale.services, scale.endpoints);
    cluster.fill(scale)?;
    first_allocation(report, &cluster, &mut edge, scale)?;
    listing(report, &cluster)?;
    cold_sync(report, &mut edge, scale)?;
    adoption(report, &mut edge, scale)?;
    changes(report, &cluster, &edge, scale)?;
    rest(report, &cluster, &edge, scale)
}

/// From nothing: addresses are given out, programmed, and published.
fn first_allocation(report: &mut Report, cluster: &Cluster, edge: &mut Edge<'_>, scale: Scale) -> Result<()> {
    eprintln!("first allocation");
    cluster.server().forget_requests();
    let begin = Instant::now();
    edge.start()?;
    wait("all Services to be published", || {
        // A rare question: it costs the double as much as a list.
        thread::sleep(Duration::from_secs(1));
        Ok(cluster.vips()?.len() == scale.services as usize)
    })
    .with_context(|| edge.log_end())?;
    report.add("first allocation: wall", "s", begin.elapsed().as_secs_f64());
    report.add("first allocation: agent's CPU", "s", edge.cpu()?.as_secs_f64());
    report.add("first allocation: resident memory", "MiB", edge.memory("VmRSS")?);
    let writes = count_writes(report, "first allocation", &cluster.server().requests(), scale);
    report.expect("writes that change nothing, first allocation", vec![writes], Some(0.0), true);
    Ok(())
}

/// What kube alone takes to list what the agent needs: the baseline of a cold sync.
fn listing(report: &mut Report, cluster: &Cluster) -> Result<()> {
    eprintln!("listing by kube alone");
    let (begin, cpu) = (Instant::now(), machine::thread_time_ns()?);
    let objects = cluster.list_all()?;
    report.add("listing by kube alone: wall", "s", begin.elapsed().as_secs_f64());
    report.add("listing by kube alone: CPU", "s", (machine::thread_time_ns()? - cpu) as f64 / 1e9);
    report.add("listing by kube alone: objects", "", objects as f64);
    Ok(())
}

/// A node that comes up: addresses are given out already, the maps are empty.
fn cold_sync(report: &mut Report, edge: &mut Edge<'_>, scale: Scale) -> Result<()> {
    eprintln!("cold sync");
    edge.forget_everything()?;
    let begin = Instant::now();
    edge.start()?;
    let mut datapath = None;
    wait("all map entries", || {
        if datapath.is_none() {
            datapath = Datapath::open(&edge.pins()).ok();
        }
        datapath.as_ref().map_or(Ok(false), |maps: &Datapath| maps.is_complete(scale))
    })
    .with_context(|| edge.log_end())?;
    let cpu = edge.cpu()?.as_secs_f64();
    report.add("cold sync, to the last map entry: wall", "s", begin.elapsed().as_secs_f64());
    report.add("cold sync, to the last map entry: agent's CPU", "s", cpu);
    report.expect("cold sync: agent's CPU, s", vec![cpu], Some(COLD_SYNC_SECONDS), true);
    wait("the agent to be ready", || Ok(edge.is_ready()))?;
    report.add("cold sync, with addresses on the device: wall", "s", begin.elapsed().as_secs_f64());
    report.add("cold sync, with addresses on the device: CPU", "s", edge.cpu()?.as_secs_f64());
    memory(report, "cold sync", edge)
}

/// A restart with full maps.
fn adoption(report: &mut Report, edge: &mut Edge<'_>, scale: Scale) -> Result<()> {
    eprintln!("restart with full maps");
    edge.settle()?;
    let before = Datapath::open(&edge.pins())?.entries()?;
    edge.kill();
    let begin = Instant::now();
    edge.start()?;
    wait("the agent to be ready", || Ok(edge.is_ready()))?;
    report.add("restart with full maps: wall", "s", begin.elapsed().as_secs_f64());
    report.add("restart with full maps: agent's CPU", "s", edge.cpu()?.as_secs_f64());
    let datapath = Datapath::open(&edge.pins())?;
    ensure!(datapath.is_complete(scale)?, "entries are missing after a restart");
    ensure!(datapath.entries()? == before, "entries moved at a restart");
    memory(report, "restart", edge)
}

/// Endpoints change, each after the one before is in the map.
fn changes(report: &mut Report, cluster: &Cluster, edge: &Edge<'_>, scale: Scale) -> Result<()> {
    eprintln!("{} changes", scale.changes);
    edge.settle()?;
    let datapath = Datapath::open(&edge.pins())?;
    let (vips, entries) = (cluster.vips()?, datapath.entries()?);
    cluster.server().forget_requests();
    let cpu = edge.cpu()?;
    let (mut whole, mut after) = (Vec::new(), Vec::new());
    for number in 0..scale.changes {
        // Spread over the cluster.
        let service = (u64::from(number) * 7_919 % u64::from(scale.services)) as u32;
        let vip = vips.get(&seed::name(service)).with_context(|| format!("no address of {service}"))?;
        let entry = *entries.get(&IpAddr::V4(*vip)).with_context(|| format!("no entry of {vip}"))?;
        let address = seed::new_endpoint(scale, number);
        let begin = Instant::now();
        cluster.replace_endpoint(scale, service, number)?;
        let answered = Instant::now();
        while !datapath.has_backend(entry, address)? {
            ensure!(answered.elapsed() < PATIENCE, "change {number} never came\n{}", edge.log_end());
            thread::sleep(Duration::from_micros(100));
        }
        whole.push(begin.elapsed().as_secs_f64() * 1e3);
        after.push(answered.elapsed().as_secs_f64() * 1e3);
    }
    for (name, values) in [("from the request", &mut whole), ("from the answer", &mut after)] {
        values.sort_by(f64::total_cmp);
        for (which, share) in [("p50", 0.5), ("p99", 0.99), ("max", 1.0)] {
            report.add(&format!("change to map, {name}: {which}"), "ms", quantile(values, share));
        }
    }
    let p99 = quantile(&whole, 0.99);
    report.expect("change to map: p99 from the request, ms", vec![p99], Some(CHANGE_MILLISECONDS), true);
    let per_change = (edge.cpu()? - cpu).as_secs_f64() * 1e3 / f64::from(scale.changes.max(1));
    report.add("agent's CPU for each change", "ms", per_change);
    let requests = cluster.server().requests();
    let theirs = requests.iter().filter(|one| is_write(one) && !is_own(one) && one.resource != "leases");
    report.add("agent's writes for all changes, without Leases", "", theirs.count() as f64);
    memory(report, "after the changes", edge)
}

/// Nothing happens.
fn rest(report: &mut Report, cluster: &Cluster, edge: &Edge<'_>, scale: Scale) -> Result<()> {
    eprintln!("{} s of rest", scale.rest.as_secs());
    edge.settle()?;
    cluster.server().forget_requests();
    let (begin, cpu) = (Instant::now(), edge.cpu()?);
    // Not a wait for something: this long is what is measured.
    thread::sleep(scale.rest);
    let seconds = begin.elapsed().as_secs_f64();
    let share = (edge.cpu()? - cpu).as_secs_f64() / seconds * 100.0;
    report.add("at rest: agent's CPU", "%", share);
    let requests = cluster.server().requests();
    let leases = requests.iter().filter(|one| one.resource == "leases").count();
    report.add("at rest: requests for Leases per second", "", leases as f64 / seconds);
    let others = requests.iter().filter(|one| one.resource != "leases").count() as f64;
    report.add("at rest: all other requests", "", others);
    let writes = requests.iter().filter(|one| is_write(one) && one.resource != "leases").count();
    report.expect("at rest: writes other than Leases", vec![writes as f64], Some(0.0), true);
    Ok(())
}

fn memory(report: &mut Report, when: &str, edge: &Edge<'_>) -> Result<()> {
    let (now, peak) = (edge.memory("VmRSS")?, edge.memory("VmHWM")?);
    report.add(&format!("resident memory, {when}"), "MiB", now);
    report.add(&format!("peak of resident memory, {when}"), "MiB", peak);
    report.expect(&format!("resident memory, {when}, MiB"), vec![now], Some(RESIDENT_MIB), true);
    Ok(())
}

/// Adds how many writes there were of each kind, per Service; gives how many changed nothing.
fn count_writes(report: &mut Report, when: &str, requests: &[Request], scale: Scale) -> f64 {
    let mut kinds: BTreeMap<String, u32> = BTreeMap::new();
    let writes = requests.iter().filter(|one| is_write(one) && !is_own(one) && one.resource != "leases");
    let mut idle = 0;
    for one in writes {
        *kinds.entry(format!("{} {}", one.verb.as_str(), one.full_resource())).or_default() += 1;
        idle += u32::from(!one.changed);
    }
    for (kind, count) in kinds {
        let each = f64::from(count) / f64::from(scale.services);
        report.add(&format!("{when}: {kind} per Service"), "", each);
    }
    f64::from(idle)
}

fn is_write(request: &Request) -> bool {
    !matches!(request.verb, Verb::Get | Verb::List | Verb::Watch)
}

/// Whether the benchmark itself has asked.
fn is_own(request: &Request) -> bool {
    request.field_manager == seed::MANAGER
}

fn quantile(sorted: &[f64], share: f64) -> f64 {
    let last = sorted.len().saturating_sub(1);
    let index = ((sorted.len() as f64 * share).ceil() as usize).saturating_sub(1).min(last);
    sorted.get(index).copied().unwrap_or(f64::NAN)
}

/// Asks again and again until it is so.
fn wait(what: &str, mut is_so: impl FnMut() -> Result<bool>) -> Result<()> {
    let begin = Instant::now();
    while !is_so()? {
        ensure!(begin.elapsed() < PATIENCE, "waited {PATIENCE:?} in vain for {what}");
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::quantile;

    #[test]
    fn quantiles_are_values_that_were_measured() {
        let values: Vec<f64> = (1..=200).map(f64::from).collect();
        assert_eq!([0.5, 0.99, 1.0].map(|share| quantile(&values, share)), [100.0, 198.0, 200.0]);
        assert_eq!(quantile(&[7.0], 0.99), 7.0);
        assert!(quantile(&[], 0.5).is_nan());
    }
}
