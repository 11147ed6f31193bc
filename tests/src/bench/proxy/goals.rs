//! What is expected of the proxy, and a table with a column for each peer.

use super::peers::Peer;
use crate::bench::report::{Report, spread};

/// A number that all peers have.
#[derive(Clone, Copy, Debug)]
pub struct Metric {
    /// As reports name it.
    pub name: &'static str,
    /// Its unit.
    pub unit: &'static str,
    /// Less is better.
    pub at_most: bool,
    /// Whether ours is expected to be no worse than the best rival's.
    pub is_goal: bool,
}

const fn metric(name: &'static str, unit: &'static str, at_most: bool, is_goal: bool) -> Metric {
    Metric { name, unit, at_most, is_goal }
}

/// All of them, in the order of the table.
pub const METRICS: [Metric; 27] = [
    metric("bulk down, 1 stream", "Gbit/s", false, true),
    metric("bulk down, 4 streams", "Gbit/s", false, true),
    metric("bulk up, 1 stream", "Gbit/s", false, true),
    metric("bulk up, 4 streams", "Gbit/s", false, true),
    metric("MTU bulk down, 1 stream", "Gbit/s", false, true),
    metric("MTU bulk down, 4 streams", "Gbit/s", false, true),
    metric("LB CPU: bulk down, 1 stream", "s/GB", true, true),
    metric("LB CPU: bulk down, 4 streams", "s/GB", true, true),
    metric("LB CPU: bulk up, 1 stream", "s/GB", true, true),
    metric("LB CPU: bulk up, 4 streams", "s/GB", true, true),
    metric("LB CPU: MTU bulk down, 1 stream", "s/GB", true, true),
    metric("LB CPU: MTU bulk down, 4 streams", "s/GB", true, true),
    metric("all CPU: bulk down, 1 stream", "s/GB", true, false),
    metric("all CPU: MTU bulk down, 1 stream", "s/GB", true, false),
    metric("connections", "conn/s", false, true),
    metric("connections, p99", "µs", true, false),
    metric("LB CPU: connections", "s/10k", true, true),
    metric("all CPU: connections", "s/10k", true, false),
    metric("requests", "req/s", false, true),
    metric("requests, p99", "µs", true, false),
    metric("LB CPU: requests", "s/100k", true, true),
    metric("all CPU: requests", "s/100k", true, false),
    metric("paced, p50", "µs", true, false),
    metric("paced, p99", "µs", true, true),
    metric("LB CPU: paced", "s/100k", true, false),
    metric("idle connection", "bytes", true, true),
    metric(FAILED, "conn", true, false),
];

/// Name of the series of a peer.
#[must_use]
pub fn series(metric: &str, peer: Peer) -> String {
    format!("{metric}, {}", peer.name())
}

/// Adds a value of a peer.
pub fn add(report: &mut Report, name: &str, peer: Peer, value: f64) {
    let unit = METRICS.iter().find(|metric| metric.name == name).map_or("", |metric| metric.unit);
    report.add(&series(name, peer), unit, value);
}

/// The rival with the best median.
fn best_rival(report: &Report, metric: &Metric) -> Option<Peer> {
    let median = |peer: &Peer| spread(report.values(&series(metric.name, *peer))).1;
    let measured = Peer::RIVALS.into_iter().filter(|peer| !median(peer).is_nan());
    let by_median = |a: &Peer, b: &Peer| median(a).total_cmp(&median(b));
    if metric.at_most { measured.min_by(by_median) } else { measured.max_by(by_median) }
}

/// Counted of everybody; there is nothing to compare if all is well.
pub const FAILED: &str = "failed connections";

/// Compares ours with the best rival, and everybody's throughput with the direct path.
pub fn expect(report: &mut Report) {
    let failed = report.values(&series(FAILED, Peer::Ours)).to_vec();
    report.expect("failed connections: ours", failed, Some(0.0), true);
    for metric in METRICS.iter().filter(|metric| metric.name != FAILED) {
        let Some(best) = best_rival(report, metric) else { continue };
        let bound = metric.is_goal.then_some(1.0);
        report.expect_ratio(
            &format!("{}: ours / {}", metric.name, best.name()),
            &series(metric.name, Peer::Ours),
            &series(metric.name, best),
            bound,
            metric.at_most,
        );
    }
    for metric in METRICS.iter().filter(|metric| !metric.at_most) {
        for peer in Peer::ALL.into_iter().filter(|peer| *peer != Peer::Direct) {
            report.expect_ratio(
                &format!("{}: {} / direct", metric.name, peer.name()),
                &series(metric.name, peer),
                &series(metric.name, Peer::Direct),
                None,
                false,
            );
        }
    }
}

/// Medians side by side.
#[must_use]
pub fn table(report: &Report) -> String {
    let measured =
        |peer: &Peer| METRICS.iter().any(|metric| !report.values(&series(metric.name, *peer)).is_empty());
    let peers: Vec<Peer> = Peer::ALL.into_iter().filter(measured).collect();
    let mut text = format!("{:<42}", "medians");
    for peer in &peers {
        text += &format!(" {:>18}", peer.name());
    }
    text.push('\n');
    for metric in &METRICS {
        let values = peers.iter().map(|peer| spread(report.values(&series(metric.name, *peer))).1);
        let values: Vec<f64> = values.collect();
        if values.iter().all(|value| value.is_nan()) {
            continue;
        }
        text += &format!("{:<42}", format!("{} [{}]", metric.name, metric.unit));
        for value in values {
            text += &match value {
                value if value.is_nan() => format!(" {:>18}", "-"),
                value if value.abs() < 100.0 => format!(" {value:>18.3}"),
                value => format!(" {value:>18.0}"),
            };
        }
        text.push('\n');
    }
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::machine::Machine;

    #[test]
    fn ours_is_compared_with_the_best_of_the_rivals() {
        let machine = Machine { processor: "p".into(), cpus: 1, kernel: "k".into() };
        let mut report = Report::new(machine);
        for (peer, rate, time) in [
            (Peer::Direct, 50.0, 1.0),
            (Peer::Ours, 21.0, 5.0),
            (Peer::Haproxy, 10.0, 4.0),
            (Peer::Nginx, 20.0, 6.0),
        ] {
            add(&mut report, "connections", peer, rate);
            add(&mut report, "paced, p99", peer, time);
        }
        expect(&mut report);
        let found = |what: &str| report.expectations.iter().find(|one| one.what == what).cloned();
        let rate = found("connections: ours / nginx").unwrap();
        assert_eq!((rate.values, rate.bound, rate.met), (vec![1.05], Some(1.0), true));
        let time = found("paced, p99: ours / haproxy").unwrap();
        assert_eq!((time.values, time.met), (vec![1.25], false));
        assert_eq!(found("connections: pointsman proxy / direct").unwrap().values, [0.42]);
        let table = table(&report);
        assert!(table.contains("connections [conn/s]") && !table.contains("bulk"), "{table}");
    }
}
