//! `pointsman cleanup`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use super::show;
use crate::{
    app::LEADER_LEASE,
    publish::Cleanup,
    source::kube::{
        Access, connect,
        kinds::{AGENT_LEASE_PREFIX, LABEL_AGENT_SELECTOR},
    },
    telemetry,
};

/// Arguments of `pointsman cleanup`.
#[derive(Clone, Debug, Args)]
pub struct CleanupArgs {
    /// Credentials for the Kubernetes API; without them those of the Pod
    #[arg(long, env = "KUBECONFIG", value_name = "PATH")]
    pub kubeconfig: Option<PathBuf>,
    /// Namespace of our Leases, as with `pointsman run`. Without: pointsman-system
    #[arg(long, env = "LEASE_NAMESPACE", value_name = "NAME")]
    pub namespace: Option<String>,
}

/// Does it, and says what was done.
pub(super) async fn run(args: &CleanupArgs) -> Result<()> {
    telemetry::init(false)?;
    let access = Access {
        kubeconfig: args.kubeconfig.clone().filter(|path| !path.as_os_str().is_empty()),
        namespace: args.namespace.clone().filter(|name| !name.is_empty()),
    };
    let connection = connect(&access).await?;
    let cleanup =
        Cleanup::new(connection.namespace, LEADER_LEASE, (LABEL_AGENT_SELECTOR, AGENT_LEASE_PREFIX));
    let removed = cleanup.run(&connection.client).await?;
    show::write(&format!(
        "freed {} Services; deleted {} VirtualIPs and the Leases of {} agents\n",
        removed.services, removed.virtual_ips, removed.leases
    ))?;
    if removed.unheard.is_empty() {
        return Ok(());
    }
    let nodes = removed.unheard.into_iter().collect::<Vec<_>>().join(", ");
    show::write(&format!(
        "the agents of these nodes did not say that they have let go of their addresses and programs: {nodes}; those \
         that still run do so once they reach the API server again, nodes without an agent have to be restarted\n"
    ))
}
