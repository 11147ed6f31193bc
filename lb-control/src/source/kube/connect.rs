//! How to reach the API server.

use std::{fmt, path::PathBuf, time::Duration};

use hyper::header::{HeaderValue, USER_AGENT};
use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};

use crate::model::causes;

/// Where the API server is and who we are there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// A kubeconfig; without one, the ServiceAccount of the pod.
    pub kubeconfig: Option<PathBuf>,
    /// The namespace of our Leases; without one, [`NAMESPACE`].
    pub namespace: Option<String>,
}

/// Where Leases are if nobody says another place. Agents of several installations work as one only if
/// they elect one writer.
pub const NAMESPACE: &str = "pointsman-system";

/// A way to the API server.
#[derive(Clone)]
pub struct Connection {
    /// Speaks with it.
    pub client: Client,
    /// The namespace of our own objects.
    pub namespace: String,
    /// Its URL, for people.
    pub server: String,
}

/// Why there is no way to the API server.
#[derive(Debug)]
pub struct ConnectError(String);

impl fmt::Display for ConnectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ConnectError {}

const CONNECT: Duration = Duration::from_secs(10);

/// Finds the way. Nothing is sent yet.
///
/// # Errors
/// When there is neither a kubeconfig nor a ServiceAccount, or what there is cannot be used.
pub async fn connect(access: &Access) -> Result<Connection, ConnectError> {
    let mut config = match &access.kubeconfig {
        Some(path) => {
            let failed = |error: &dyn std::error::Error| {
                ConnectError(format!("kubeconfig {}: {}", path.display(), causes(error)))
            };
            let file = Kubeconfig::read_from(path).map_err(|error| failed(&error))?;
            let options = KubeConfigOptions::default();
            Config::from_custom_kubeconfig(file, &options).await.map_err(|error| failed(&error))?
        }
        None => Config::incluster().map_err(|error| {
                ConnectError(format!(
                    "no Kubernetes cluster to speak with: neither --kubeconfig (KUBECONFIG) is given, nor is this \
                     a pod with a ServiceAccount ({})",
                    causes(&error)
                ))
            })?,
    };
    config.connect_timeout = Some(CONNECT);
    // Whoever asks has a wait of their own: two on top of each other would multiply.
    config.default_retry = false;
    let agent = concat!("pointsman/", env!("CARGO_PKG_VERSION"));
    config.headers.push((USER_AGENT, HeaderValue::from_static(agent)));
    let server = config.cluster_url.to_string();
    let client = Client::try_from(config)
        .map_err(|error| ConnectError(format!("API server {server}: {}", causes(&error))))?;
    let namespace = access.namespace.clone().unwrap_or_else(|| NAMESPACE.to_owned());
    Ok(Connection { client, namespace, server })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_missing_is_said() {
        let access = Access { kubeconfig: Some("/nonexistent/config".into()), namespace: None };
        let error = connect(&access).await.err().expect("no such file").to_string();
        assert!(error.contains("/nonexistent/config") && error.contains("No such file"), "{error}");
        if std::env::var_os("KUBERNETES_SERVICE_HOST").is_none() {
            let error = connect(&Access::default()).await.err().expect("no pod").to_string();
            assert!(error.contains("--kubeconfig (KUBECONFIG)"), "{error}");
        }
    }
}
