//! The agent as one of those compared.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::lab::{BACKEND_PORT, PORT, Site, UPLINK};
use crate::lab::registry;

/// The binary that `POINTSMAN_BIN` names.
fn binary() -> Result<OsString> {
    std::env::var_os("POINTSMAN_BIN")
        .context("POINTSMAN_BIN is not set: `cargo xtask bench proxy` builds the agent and sets it")
}

/// Whether it can be told to serve as a proxy.
///
/// # Errors
/// When it cannot be run.
pub fn has_proxy() -> Result<bool> {
    let output =
        Command::new(binary()?).args(["run", "--datapath", "?"]).output().context("running the agent")?;
    // clap names what it would have taken.
    let said = String::from_utf8_lossy(&output.stderr);
    Ok(said.split(|c: char| !c.is_alphanumeric() && c != '-').any(|word| word == "proxy"))
}

/// Name of the directories of this benchmark: the next lab removes those of owners that are gone.
fn own_name() -> String {
    format!("pm-{}-bench", std::process::id())
}

/// A directory for files of all peers; removed by [`remove_directories`].
///
/// # Errors
/// When it cannot be made.
pub fn directory() -> Result<PathBuf> {
    registry::sweep_dead_owners();
    let directory = std::env::temp_dir().join(own_name());
    registry::add_directory(&directory);
    registry::add_directory(&pin_root());
    fs::create_dir_all(&directory).with_context(|| format!("making {}", directory.display()))?;
    Ok(directory)
}

/// Removes all that is left.
pub fn remove_directories(directory: &Path) {
    registry::remove_directory(directory);
    registry::remove_directory(&pin_root());
}

fn pin_root() -> PathBuf {
    Path::new(registry::BPF_DIR).join(own_name())
}

/// The agent's command line on a node; `datapath` is what `--datapath` takes.
///
/// # Errors
/// When its configuration cannot be written.
pub fn line(site: &Site, directory: &Path, datapath: &str) -> Result<Vec<OsString>> {
    let config = directory.join("services");
    fs::create_dir_all(&config)
        .and_then(|()| fs::write(config.join("services.yaml"), manifest(site)))
        .with_context(|| format!("writing to {}", config.display()))?;
    // Only what the flags say is to count.
    let mut line: Vec<OsString> = vec!["env".into()];
    for variable in ["LINKDEVICE", "KUBERNETES", "DATAPATH", "SYN_COOKIES", "DEBUG", "HTTP_ADDRESS"] {
        line.extend(["-u".into(), variable.into()]);
    }
    line.push(binary()?);
    line.extend(
        ["run", "--kubernetes=false", "--cgroup", "off", "--max-flows", "262144"].map(OsString::from),
    );
    line.extend(["--link-device", UPLINK, "--datapath", datapath, "--config"].map(OsString::from));
    line.extend([config.into_os_string(), "--socket".into(), directory.join("socket").into_os_string()]);
    line.extend(["--pin-dir".into(), pins(site).into_os_string()]);
    Ok(line)
}

/// Where it pins.
#[must_use]
pub fn pins(site: &Site) -> PathBuf {
    pin_root().join(site.vip().ip().to_string().replace('.', "-"))
}

fn manifest(site: &Site) -> String {
    let vip = site.vip();
    let mut yaml = format!(
        "apiVersion: pointsman.dev/v1alpha1\nkind: AddressPool\nmetadata: {{name: bench}}\n\
         spec:\n  addresses: ['{0}-{0}']\n---\n\
         apiVersion: v1\nkind: Service\nmetadata: {{name: bench}}\nspec:\n  type: LoadBalancer\n  \
         ports:\n  - {{name: bench, protocol: TCP, port: {PORT}, targetPort: {BACKEND_PORT}}}\n---\n\
         apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: bench-ipv4\n  \
         labels: {{kubernetes.io/service-name: bench}}\naddressType: IPv4\n\
         ports:\n- {{name: bench, protocol: TCP, port: {BACKEND_PORT}}}\nendpoints:\n",
        vip.ip()
    );
    for backend in site.backends() {
        yaml += &format!(
            "- addresses: ['{}']\n  conditions: {{ready: true, serving: true, terminating: false}}\n",
            backend.ip()
        );
    }
    yaml
}
