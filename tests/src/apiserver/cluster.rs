//! The cluster that a test runs against: the double, or a real one.

use std::{
    env,
    path::PathBuf,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result};
use k8s_openapi::{
    api::core::v1::Namespace, apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kube::{
    Api, Client, Config,
    api::{DeleteParams, ObjectMeta, PostParams},
    config::{KubeConfigOptions, Kubeconfig},
    runtime::{conditions, wait::await_condition},
};
use tokio::time::timeout;

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
    namespaces: Mutex<Vec<String>>,
    definitions: Mutex<Vec<String>>,
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
        Ok(Self {
            double,
            kubeconfig,
            prefix,
            client,
            namespaces: Mutex::default(),
            definitions: Mutex::default(),
        })
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
        lock(&self.namespaces).push(name.clone());
        Ok(name)
    }

    /// Installs a CustomResourceDefinition, which `clean_up` deletes, and waits until its kind is
    /// served.
    ///
    /// # Errors
    /// When it is refused, or not served in time.
    pub async fn install(&self, definition: &CustomResourceDefinition) -> Result<()> {
        let api = Api::<CustomResourceDefinition>::all(self.client());
        // One that another test has deleted stays until all of its objects are gone.
        let created = async {
            loop {
                match api.create(&PostParams::default(), definition).await {
                    Err(kube::Error::Api(status)) if status.message.contains("being deleted") => {
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                    other => return other,
                }
            }
        };
        let name = definition.metadata.name.clone().context("a definition without a name")?;
        let created = timeout(PATIENCE, created).await.context("an older definition does not go")?;
        created.with_context(|| {
            format!(
                "cannot install {name}; if it exists already, it is of an installation, which tests would \
                 disturb, or of a test that was killed: then `kubectl delete crd {name}`"
            )
        })?;
        lock(&self.definitions).push(name.clone());
        let established = await_condition(api, &name, conditions::is_crd_established());
        timeout(PATIENCE, established).await.with_context(|| format!("{name} is not established"))??;
        // A real API server begins to serve it a little later than it says.
        let spec = &definition.spec;
        for version in spec.versions.iter().filter(|version| version.served) {
            let path = format!("/apis/{}/{}/{}?limit=1", spec.group, version.name, spec.names.plural);
            let served = async {
                loop {
                    let request = http::Request::get(&path).body(Vec::new())?;
                    match self.client.request_text(request).await {
                        Ok(_) => return anyhow::Ok(()),
                        Err(kube::Error::Api(status)) if status.code == 404 || status.code == 429 => {
                            tokio::time::sleep(Duration::from_millis(20)).await;
                        }
                        Err(error) => return Err(error.into()),
                    }
                }
            };
            timeout(PATIENCE, served).await.with_context(|| format!("{path} is not served"))??;
        }
        Ok(())
    }

    /// Deletes the namespaces and definitions that were made, with all that is in them.
    ///
    /// # Errors
    /// When one cannot be deleted.
    pub async fn clean_up(&self) -> Result<()> {
        let namespaces = std::mem::take(&mut *lock(&self.namespaces));
        for name in namespaces {
            gone(Api::<Namespace>::all(self.client()).delete(&name, &DeleteParams::background()).await)?;
        }
        let definitions = std::mem::take(&mut *lock(&self.definitions));
        for name in definitions {
            let api = Api::<CustomResourceDefinition>::all(self.client());
            // What uid it has, so that one that another test makes next is not waited for.
            let Some(found) = api.get_opt(&name).await? else { continue };
            let uid = found.metadata.uid.unwrap_or_default();
            gone(api.delete(&name, &DeleteParams::background()).await)?;
            let deleted = await_condition(api, &name, conditions::is_deleted(&uid));
            timeout(PATIENCE, deleted).await.with_context(|| format!("{name} does not go"))??;
        }
        Ok(())
    }
}

/// What is not there need not be deleted.
fn gone<T>(deleted: kube::Result<T>) -> Result<()> {
    match deleted {
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        other => Ok(other.map(drop)?),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How long anything may take: machines under test are busy.
const PATIENCE: Duration = Duration::from_secs(30);

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
