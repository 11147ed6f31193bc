//! The lab itself, by plain routing: what the other suites stand on.

use anyhow::Result;
use pointsman_tests::lab::{Lab, is_root, registry};

#[test]
fn everybody_reaches_everybody_and_nothing_stays() -> Result<()> {
    if !is_root() {
        return Ok(());
    }
    let lab = Lab::routed(2)?;
    for n in [1, 2] {
        for v6 in [false, true] {
            lab.client.run(["ping", "-c1", "-W2", &Lab::backend_address(n, v6).to_string()])?;
        }
    }
    let (directory, edge) = (lab.directory().to_owned(), lab.edge.path());
    assert!(directory.exists() && edge.exists());
    drop(lab);
    assert!(!directory.exists() && !edge.exists());
    Ok(())
}

#[test]
fn processes_end_with_their_lab() -> Result<()> {
    if !is_root() {
        return Ok(());
    }
    let lab = Lab::routed(0)?;
    let process = lab.client.spawn(std::process::Command::new("sleep").arg("1000"))?;
    assert_eq!(registry::processes_in(lab.client.name()), [process.id()]);
    let proc = format!("/proc/{}", process.id());
    drop(process);
    assert!(!std::path::Path::new(&proc).exists());
    Ok(())
}
