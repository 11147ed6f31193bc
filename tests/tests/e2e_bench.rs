//! The benchmark of the control plane still measures what it says it does.

use std::{fs, process::Command};

use anyhow::{Context, Result, ensure};
use pointsman_tests::lab::is_root;
use serde_json::Value;

/// The only value of a number.
fn value(report: &Value, name: &str) -> Result<f64> {
    let series = report["series"].as_array().context("no numbers")?;
    let found = series.iter().find(|series| series["name"] == name);
    let values = found.and_then(|found| found["values"].as_array()).with_context(|| format!("no {name}"))?;
    ensure!(values.len() == 1, "{name}: {values:?}");
    values[0].as_f64().with_context(|| format!("{name} is no number"))
}

#[test]
fn a_small_cluster_is_measured_from_the_first_address_to_rest() -> Result<()> {
    if !is_root() {
        return Ok(());
    }
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("report.json");
    let sizes = ["--services", "12", "--endpoints", "3", "--changes", "5", "--rest", "2"];
    let output = Command::new(env!("CARGO_BIN_EXE_pointsman-bench"))
        .arg("control")
        .args(sizes)
        .arg("--json")
        .arg(&file)
        .output()
        .context("cannot start the benchmark")?;
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{}\n{stdout}\n{stderr}", output.status);
    let report: Value = serde_json::from_str(&fs::read_to_string(&file)?)?;

    // A Service and a slice of endpoints of each, beside Node, Lease and pool.
    assert!(value(&report, "listing by kube alone: objects")? >= 24.0);
    for memory in ["cold sync", "restart", "after the changes"] {
        let (now, peak) =
            (format!("resident memory, {memory}"), format!("peak of resident memory, {memory}"));
        let (now, peak) = (value(&report, &now)?, value(&report, &peak)?);
        assert!(now > 1.0 && peak >= now, "{memory}: {now} of {peak} MiB");
    }
    let change = |which: &str| value(&report, &format!("change to map, from the request: {which}"));
    let (p50, p99, max) = (change("p50")?, change("p99")?, change("max")?);
    assert!(p50 > 0.0 && p50 <= p99 && p99 <= max, "{p50} {p99} {max}");
    assert_eq!(value(&report, "agent's writes for all changes, without Leases")?, 0.0);
    let share = value(&report, "at rest: agent's CPU")?;
    assert!((0.0..=400.0).contains(&share), "{share} %");

    let expectations = report["expectations"].as_array().context("no expectations")?;
    let bounds = ["cold sync: agent's CPU, s", "change to map: p99 from the request, ms"];
    for what in bounds {
        let found = expectations.iter().find(|one| one["what"] == what).with_context(|| what.to_owned())?;
        assert!(found["bound"].is_number() && found["met"].is_boolean(), "{found}");
    }
    assert!(bounds.iter().all(|what| stdout.contains(what)), "{stdout}");
    Ok(())
}
