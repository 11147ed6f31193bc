//! The cluster that a test runs against: the double, or a real one.

use std::{
    env,
    path::PathBuf,
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Namespace;
use kube::{
    Api, Client, Config,
    api::{DeleteParams, ObjectMeta, PostParams},
    config::{KubeConfigOptions, Kubeconfig},
};

use super::ApiServer;

/// Names a kubeconfig; tests run against its cluster instead of the double.
pub const KUBECONFIG: &str = "POINTSMAN_TEST_KUBECONFIG";

/// Whether tests run against a real cluster, where no faults can be made.
#[must_use]
pub fn is_real() -> bool {
    env::var_os(KUBECONFIG).is_some_and(|path| !path.is_empty())
}

/// A cluster, and names in it that are this test's own.
#[allow(missing_debug_implementations, reason = "kube's client has none")]
pub struct TestCluster {
    double: Option<ApiServer>,
    kubeconfig: PathBuf,
    prefix: String,
    client: Client,
    namespaces: std::sync::Mutex<Vec<String>>,
}

/// Distinguishes the names of one process.
static COUNT: AtomicU32 = AtomicU32::new(0);

impl TestCluster {
    /// The cluster of `POINTSMAN_TEST_KUBECONFIG`, or a double of its own.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn from_env() -> Result<Self> {
        let real = env::var_os(KUBECONFIG).filter(|path| !path.is_empty()).map(PathBuf::from);
        let double = if real.is_none() { Some(ApiServer::start()?) } else { None };
        let kubeconfig = match (&double, real) {
            (Some(double), _) => double.kubeconfig(),
            (None, path) => path.unwrap_or_default(),
        };
        let read = Kubeconfig::read_from(&kubeconfig)
            .with_context(|| format!("cannot read {}", kubeconfig.display()))?;
        let config = Config::from_custom_kubeconfig(read, &KubeConfigOptions::default()).await?;
        let client = Client::try_from(config)?;
        let version = client.apiserver_version().await.context("the cluster does not answer")?;
        anyhow::ensure!(version.major == "1", "a cluster of version {}", version.git_version);
        // Unique over time and between machines that share a cluster.
        let now = jiff::Timestamp::now().as_microsecond();
        let prefix = format!(
            "pt{:x}{:x}{:x}",
            now & 0xfff_ffff,
            std::process::id(),
            COUNT.fetch_add(1, Ordering::Relaxed)
        );
        Ok(Self { double, kubeconfig, prefix, client, namespaces: std::sync::Mutex::default() })
    }

    /// For the administrator.
    #[must_use]
    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// For processes.
    #[must_use]
    pub fn kubeconfig(&self) -> &PathBuf {
        &self.kubeconfig
    }

    /// The double, when it is one.
    #[must_use]
    pub fn double(&self) -> Option<&ApiServer> {
        self.double.as_ref()
    }

    /// A name that no other test has: for cluster-scoped objects, API groups, labels.
    #[must_use]
    pub fn name(&self, what: &str) -> String {
        format!("{}-{what}", self.prefix)
    }

    /// Makes a namespace, which `clean_up` deletes.
    ///
    /// # Errors
    /// When it cannot be made.
    pub async fn namespace(&self, what: &str) -> Result<String> {
        let name = self.name(what);
        let metadata = ObjectMeta { name: Some(name.clone()), ..ObjectMeta::default() };
        let namespace = Namespace { metadata, ..Namespace::default() };
        Api::<Namespace>::all(self.client()).create(&PostParams::default(), &namespace).await?;
        self.namespaces.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(name.clone());
        Ok(name)
    }

    /// Deletes the namespaces that were made, with all that is in them.
    ///
    /// # Errors
    /// When one cannot be deleted.
    pub async fn clean_up(&self) -> Result<()> {
        let made =
            std::mem::take(&mut *self.namespaces.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
        let api = Api::<Namespace>::all(self.client());
        for name in made {
            api.delete(&name, &DeleteParams::background()).await?;
        }
        Ok(())
    }
}

/// Runs a test against the cluster and cleans up after it, also when it fails.
///
/// # Errors
/// Those of the test, or of cleaning up.
///
/// # Panics
/// When the test does.
pub fn with_cluster<F, T>(test: F) -> Result<()>
where
    F: FnOnce(std::sync::Arc<TestCluster>) -> T,
    T: Future<Output = Result<()>> + Send + 'static,
{
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let cluster = std::sync::Arc::new(TestCluster::from_env().await?);
        // A task, so that a failed assertion does not keep it from being cleaned up.
        let outcome = tokio::spawn(test(cluster.clone())).await;
        let cleaned = cluster.clean_up().await;
        match outcome {
            Ok(outcome) => outcome.and(cleaned),
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    })
}
