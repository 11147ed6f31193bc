//! What the agent has decided and done, as metrics.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use lb_common::abi::ABI_VERSION;

use super::shared::Published;
use crate::model::{ObjectRef, ServiceReport, ServiceState};
use crate::probe::Counts;
use crate::telemetry::metrics::{Samples, labels, table};

/// Adds everything but what the maps tell. `published` without its reports, which are apart, so
/// that nobody holds the lock while they are counted.
pub fn collect(published: &Published, reports: &[Arc<ServiceReport>], samples: &mut Samples) {
    let build = labels([env!("CARGO_PKG_VERSION"), &format!("v{ABI_VERSION}")]);
    samples.level(&table::BUILD_INFO, &build, 1.0);
    let ready = published.is_ready();
    samples.plain(&table::READY, f64::from(u8::from(ready)));
    samples.plain(&table::SOURCE_SYNCED, f64::from(u8::from(published.generation > 0)));
    if let Some(reloaded) = published.reloaded {
        samples.plain(&table::SOURCE_AGE, reloaded.elapsed().as_secs_f64());
    }
    samples.plain(&table::VIPS_PLACED, published.placed as f64);
    for (area, count) in &published.problem_counts {
        samples.level(&table::PROBLEMS, &labels([area]), *count as f64);
    }
    for device in &published.devices {
        samples.level(
            &table::DEVICE_INFO,
            &labels([&device.device, device.mode.name(), device.reason.as_deref().unwrap_or_default()]),
            1.0,
        );
    }
    samples.plain(&table::SYN_COOKIES, f64::from(published.cookies.raw()));
    if let Some(flows) = &published.flows {
        for (stage, count) in [("established", flows.established), ("transient", flows.transient)] {
            samples.level(&table::FLOWS, &labels([stage]), count as f64);
        }
        samples.plain(&table::UNPROTECTED_FLOWS, flows.unprotected as f64);
        for (map, fill) in &flows.tables {
            samples.level(&table::MAP_ENTRIES, &labels([map]), fill.entries as f64);
        }
    }
    services(published, reports, samples);
}

fn services(published: &Published, reports: &[Arc<ServiceReport>], samples: &mut Samples) {
    let mut vips = BTreeSet::new();
    let mut assigned: BTreeMap<&str, BTreeSet<IpAddr>> = BTreeMap::new();
    let mut problems = 0;
    let mut states = [0usize; STATES.len()];
    for report in reports {
        for (count, (state, _)) in states.iter_mut().zip(STATES) {
            *count += usize::from(report.state == state);
        }
        problems += report.problems.len();
        for vip in &report.vips {
            vips.insert(vip.address);
            if let Some(pool) = &vip.pool {
                assigned.entry(pool).or_default().insert(vip.address);
            }
        }
    }
    // A state that nobody is in is told as 0: a series that comes and goes is hard to alert on.
    for ((_, name), count) in STATES.into_iter().zip(states) {
        samples.level(&table::SERVICES, &labels([name]), count as f64);
    }
    samples.plain(&table::VIPS, vips.len() as f64);
    samples.level(
        &table::PROBLEMS,
        &labels(["services"]),
        f64::from(u32::try_from(problems).unwrap_or(u32::MAX)),
    );
    for (pool, size) in &published.pools {
        let assigned = assigned.get(pool.as_str()).map_or(0, BTreeSet::len);
        samples.level(&table::POOL_ADDRESSES, &labels([pool]), *size);
        samples.level(&table::POOL_ASSIGNED, &labels([pool]), assigned as f64);
    }
}

/// Adds what health checks tell. `per_backend`: of each backend, too.
pub fn health(reports: &[Arc<ServiceReport>], probes: &Counts, per_backend: bool, samples: &mut Samples) {
    for (result, count) in probes.read() {
        samples.count(&table::HEALTH_PROBES, &labels([result]), count);
    }
    for report in reports {
        let Some(health) = &report.health else { continue };
        let ObjectRef { namespace, name } = &report.object;
        for (state, count) in [("healthy", health.healthy), ("unhealthy", health.unhealthy)] {
            samples.level(&table::CHECKED_BACKENDS, &labels([namespace, name, state]), count as f64);
        }
        for port in report.ports.iter().filter(|_| per_backend) {
            // Addresses of one family have the same backends.
            let all = port.backends.iter();
            let healthy = all.filter_map(|one| Some((one.address, one.health.as_ref()?.failure().is_none())));
            for (address, healthy) in healthy.collect::<BTreeMap<_, _>>() {
                let (protocol, number) = (port.protocol.to_string(), port.port.to_string());
                let labels = labels([namespace, name, &protocol, &number, &address.to_string()]);
                samples.level(&table::BACKEND_HEALTHY, &labels, f64::from(u8::from(healthy)));
            }
        }
    }
}

/// All states, with the names that `pointsman status` uses.
const STATES: [(ServiceState, &str); 4] = [
    (ServiceState::Pending, "pending"),
    (ServiceState::Active, "active"),
    (ServiceState::NoBackends, "no-backends"),
    (ServiceState::Failed, "failed"),
];

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::Instant;

    use super::*;
    use crate::app::shared::Flows;
    use crate::inspect::{MapReading, collect_proxied};
    use crate::model::{
        BackendHealth, BackendReport, HealthReport, PortReport, Problem, Protocol, Role, ServiceKey,
        VipReport,
    };
    use crate::plan::{CookiePhase, Fill, testing::pool};
    use crate::proxy::{FrontendCounts, Refusal, Totals};
    use crate::telemetry::metrics::{Outcome, Recorder};
    use crate::view::{AttachMode, DeviceView};

    fn report(name: &str, state: ServiceState, vips: &[&str]) -> Arc<ServiceReport> {
        let vip = |text: &&str| VipReport { address: text.parse().unwrap(), pool: Some("edge".into()) };
        Arc::new(ServiceReport {
            object: ObjectRef::new("default", name),
            state,
            vips: vips.iter().map(vip).collect(),
            ports: Vec::new(),
            health: None,
            problems: vec![Problem::error("x"); vips.len()],
        })
    }

    fn counts() -> FrontendCounts {
        FrontendCounts {
            key: ServiceKey {
                service: ObjectRef::new("default", "web"),
                protocol: Protocol::Tcp,
                vip: IpAddr::from([192, 0, 2, 1]),
                port: 80,
            },
            accepted: 1,
            open: 1,
            refused: vec![(Refusal::NoBackend, 1)],
            bytes_in: 1,
            bytes_out: 1,
            backends: Vec::new(),
        }
    }

    fn agent() -> Samples {
        let published = Published {
            generation: 3,
            reloaded: Some(Instant::now()),
            placed: 2,
            problem_counts: [("maps", 4)].into(),
            pools: [("edge".to_owned(), 254.0), ("spare".to_owned(), 1e30)].into(),
            flows: Some(Flows {
                established: 5,
                transient: 6,
                unprotected: 1,
                tables: [("flows_v4", Fill { entries: 10, room: 20 })].into(),
            }),
            cookies: CookiePhase::Answer,
            devices: vec![DeviceView {
                device: "eth0".into(),
                mode: AttachMode::XdpNative,
                reason: Some("chosen".into()),
                program_id: Some(1),
            }],
            ..Published::default()
        };
        let reports = [
            report("web", ServiceState::Active, &["192.0.2.1", "2001:db8::1"]),
            // It shares an address.
            report("dns", ServiceState::Active, &["192.0.2.1"]),
            report("new", ServiceState::Pending, &[]),
        ];
        let mut samples = Samples::default();
        collect(&published, &reports, &mut samples);
        samples
    }

    #[test]
    fn sizes_of_pools_leave_out_what_is_not_given_out() {
        for (ranges, all, without_buggy) in [
            (&["192.0.2.0/24"][..], 256.0, 254.0),
            (&["192.0.2.1-192.0.2.254"], 254.0, 254.0),
            (&["192.0.2.255-192.0.3.0"], 2.0, 0.0),
            (&["0.0.0.0-0.0.0.1", "10.0.0.0/16"], 65_538.0, 65_025.0),
            (&["2001:db8::/120", "192.0.2.0/32"], 257.0, 256.0),
            (&["::/0"], 2f64.powi(128), 2f64.powi(128)),
        ] {
            let mut pool = pool(&format!("p {}", ranges.join(" ")));
            assert_eq!(pool.size(), all, "{ranges:?}");
            pool.avoid_buggy_ips = true;
            assert_eq!(pool.size(), without_buggy, "{ranges:?}");
        }
    }

    #[test]
    fn what_was_decided_is_told() {
        let text = agent().text().unwrap();
        for line in [
            "pointsman_services{state=\"active\"} 2.0",
            "pointsman_services{state=\"pending\"} 1.0",
            "pointsman_services{state=\"failed\"} 0.0",
            "pointsman_vips 2.0",
            "pointsman_vips_placed 2.0",
            "pointsman_pool_addresses{pool=\"edge\"} 254.0",
            "pointsman_pool_assigned_addresses{pool=\"edge\"} 2.0",
            "pointsman_pool_assigned_addresses{pool=\"spare\"} 0.0",
            "pointsman_problems{area=\"maps\"} 4.0",
            "pointsman_problems{area=\"services\"} 3.0",
            "pointsman_source_synced 1.0",
            "pointsman_ready 1.0",
            "pointsman_syn_cookies 2.0",
            "pointsman_device_info{device=\"eth0\",mode=\"xdp-native\",reason=\"chosen\"} 1.0",
            "pointsman_flows{stage=\"transient\"} 6.0",
            "pointsman_map_entries{map=\"flows_v4\"} 10.0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}:\n{text}");
        }
    }

    /// A Service of which one backend works and another does not, at two addresses.
    fn checked() -> Arc<ServiceReport> {
        let backend = |last: u8, health| BackendReport {
            address: ([10, 0, 0, last], 8080).into(),
            role: Role::Active,
            weight: 1,
            health,
        };
        let healthy = || backend(1, Some(BackendHealth::Healthy));
        let unhealthy = backend(2, Some(BackendHealth::Unhealthy("HTTP 503".into())));
        let unasked = backend(3, None);
        let mut report = report("web", ServiceState::Active, &[]).as_ref().clone();
        report.health = Some(HealthReport { check: "tcp".into(), healthy: 1, unhealthy: 1 });
        let backends = vec![healthy(), unhealthy, unasked, healthy()];
        report.ports = vec![PortReport { name: String::new(), protocol: Protocol::Tcp, port: 80, backends }];
        Arc::new(report)
    }

    #[test]
    fn health_is_told_of_each_backend_if_asked_for() {
        let text = |per_backend| {
            let mut samples = Samples::default();
            health(&[checked()], &Counts::default(), per_backend, &mut samples);
            samples.text().unwrap()
        };
        let (brief, full) = (text(false), text(true));
        let of = r#"{namespace="default",service="web","#;
        for line in [
            format!(r#"pointsman_checked_backends{of}state="healthy"}} 1.0"#),
            format!(r#"pointsman_checked_backends{of}state="unhealthy"}} 1.0"#),
            r#"pointsman_health_probes_total{result="refused"} 0"#.to_owned(),
        ] {
            assert!(brief.lines().any(|found| found == line), "{line}:\n{brief}");
        }
        assert!(!brief.contains("pointsman_backend_healthy{"), "{brief}");
        let lines = full.lines().filter(|line| line.starts_with("pointsman_backend_healthy{"));
        let of = format!(r#"pointsman_backend_healthy{of}protocol="TCP",port="80",backend="10.0.0"#);
        assert_eq!(
            lines.collect::<Vec<_>>(),
            [format!("{of}.1:8080\"}} 1.0"), format!("{of}.2:8080\"}} 0.0")]
        );
    }

    /// The other direction, that nothing else is exported, holds by construction: a value is put
    /// under a metric of the table.
    #[test]
    fn every_metric_of_the_table_is_exported() {
        let mut samples = agent();
        samples.plain(&table::UPTIME, 1.0);
        let recorder = Recorder::default();
        recorder.updated();
        recorder.in_maps(Duration::from_millis(1));
        recorder.api_write("patch", "services/status", Outcome::Done);
        recorder.collect(&mut samples);
        MapReading::sample().collect(&mut samples);
        health(&[checked()], &Counts::default(), true, &mut samples);
        collect_proxied(&[counts()], &Totals::default(), true, &mut samples);
        let text = samples.text().unwrap();
        for metric in table::ALL {
            let name = metric.name;
            let described = format!("# HELP {} {}", name.trim_end_matches("_total"), metric.help);
            assert!(text.lines().any(|line| line == described), "{described}:\n{text}");
            assert!(text.lines().any(|line| line.starts_with(name)), "{name}");
        }
    }
}
