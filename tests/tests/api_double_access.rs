//! Roles, of the double and of real clusters alike.

use anyhow::{Context, Result};
use k8s_openapi::api::{
    authorization::v1::SelfSubjectAccessReview,
    core::v1::{ConfigMap, Service, ServiceAccount},
    rbac::v1::{Role, RoleBinding},
};
use kube::{
    Api, Client, Config, Error,
    api::{ListParams, Patch, PatchParams, PostParams},
    config::{KubeConfigOptions, Kubeconfig},
};
use pointsman_tests::apiserver::cluster::{TestCluster, with_cluster};
use serde_json::json;

/// A client with a token that the API server gives to a ServiceAccount.
async fn client_of(cluster: &TestCluster, namespace: &str, name: &str) -> Result<Client> {
    let accounts: Api<ServiceAccount> = Api::namespaced(cluster.client(), namespace);
    let account = serde_json::from_value(json!({ "metadata": { "name": name } }))?;
    accounts.create(&PostParams::default(), &account).await?;
    let request = serde_json::from_value(json!({ "spec": { "audiences": [] } }))?;
    let token = accounts.create_token_request(name, &PostParams::default(), &request).await?;
    let token = token.status.context("a token")?.token;
    let read = Kubeconfig::read_from(cluster.kubeconfig())?;
    let mut config = Config::from_custom_kubeconfig(read, &KubeConfigOptions::default()).await?;
    config.auth_info = serde_json::from_value(json!({ "token": token }))?;
    Ok(Client::try_from(config)?)
}

fn refused<T: std::fmt::Debug>(result: Result<T, Error>) -> String {
    match result.expect_err("refused") {
        Error::Api(status) if status.code == 403 => status.message,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_service_account_may_do_what_its_role_says() -> Result<()> {
    with_cluster(async |cluster| {
        if let Some(double) = cluster.double() {
            double.enforce_rbac(true);
        }
        let namespace = cluster.namespace("access").await?;
        let client = client_of(&cluster, &namespace, "agent").await?;
        let maps: Api<ConfigMap> = Api::namespaced(client.clone(), &namespace);
        let user = format!("system:serviceaccount:{namespace}:agent");
        let said = refused(maps.list(&ListParams::default()).await);
        assert_eq!(
            said,
            format!(
                "configmaps is forbidden: User \"{user}\" cannot list resource \"configmaps\" in API group \
                 \"\" in the namespace \"{namespace}\""
            )
        );
        let everywhere: Api<Service> = Api::all(client.clone());
        assert_eq!(
            refused(everywhere.list(&ListParams::default()).await),
            format!(
                "services is forbidden: User \"{user}\" cannot list resource \"services\" in API group \"\" \
                 at the cluster scope"
            )
        );
        let role: Role = serde_json::from_value(json!({
            "metadata": { "name": "reader" },
            "rules": [{ "apiGroups": [""], "resources": ["configmaps"], "verbs": ["get", "list"] }],
        }))?;
        let binding: RoleBinding = serde_json::from_value(json!({
            "metadata": { "name": "reader" },
            "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "reader" },
            "subjects": [{ "kind": "ServiceAccount", "name": "agent", "namespace": namespace }],
        }))?;
        let create = PostParams::default();
        Api::<Role>::namespaced(cluster.client(), &namespace).create(&create, &role).await?;
        Api::<RoleBinding>::namespaced(cluster.client(), &namespace).create(&create, &binding).await?;
        // A real API server learns of a new role by a watch of its own.
        let review = || async {
            let question: SelfSubjectAccessReview = serde_json::from_value(json!({
                "spec": { "resourceAttributes": { "verb": "list", "resource": "configmaps", "namespace": namespace } },
            }))?;
            let asked: Api<SelfSubjectAccessReview> = Api::all(client.clone());
            let answer = asked.create(&PostParams::default(), &question).await?;
            anyhow::Ok(answer.status.is_some_and(|status| status.allowed))
        };
        while !review().await? {
            tokio::task::yield_now().await;
        }
        maps.list(&ListParams::default()).await?;
        let patch = Patch::Merge(json!({ "data": { "a": "b" } }));
        let said = refused(maps.patch("one", &PatchParams::default(), &patch).await);
        assert!(said.starts_with("configmaps \"one\" is forbidden: User"), "{said}");
        Ok(())
    })
}

#[test]
fn a_token_that_is_nobodys_is_refused() -> Result<()> {
    with_cluster(async |cluster| {
        let read = Kubeconfig::read_from(cluster.kubeconfig())?;
        let mut config = Config::from_custom_kubeconfig(read, &KubeConfigOptions::default()).await?;
        config.auth_info = serde_json::from_value(json!({ "token": "nobody" }))?;
        let api: Api<ConfigMap> = Api::namespaced(Client::try_from(config)?, "default");
        let Err(Error::Api(status)) = api.list(&ListParams::default()).await else {
            panic!("a token of nobody was taken");
        };
        assert_eq!((status.code, status.reason.as_str()), (401, "Unauthorized"));
        Ok(())
    })
}
