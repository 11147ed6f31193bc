//! Agents with the rights that are shipped, and no others.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use k8s_openapi::api::{
    authentication::v1::TokenRequest,
    authorization::v1::{ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec},
    core::v1::ServiceAccount,
};
use kube::{
    Api, Client, Config,
    api::PostParams,
    config::{KubeConfigOptions, Kubeconfig},
};
use serde_json::{Value, json};

use super::ClusterWorld;
use crate::lab::wait_for;

const MANIFEST: &str = include_str!("../../../deploy/base/pointsman.yaml");
/// The namespace that is shipped; the names of cluster-scoped rights begin with it, too.
const SYSTEM: &str = "pointsman-system";
/// The ServiceAccount that is shipped.
const ACCOUNT: &str = "pointsman";
/// What the rights of an agent consist of.
const RIGHTS: [&str; 5] = ["ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding"];

impl ClusterWorld {
    /// The ServiceAccount, roles and bindings as they are shipped, but in the namespace of the test, and
    /// cluster-scoped ones named after it: an installation in the same cluster is not touched.
    ///
    /// # Errors
    /// When what is shipped cannot be read.
    pub fn shipped_rights(&self) -> Result<Vec<Value>> {
        let text = MANIFEST.replace(SYSTEM, &self.namespace);
        let mut all: Vec<Value> = serde_saphyr::from_multiple(&text)?;
        all.retain(|object| RIGHTS.into_iter().any(|kind| object["kind"] == kind));
        Ok(all)
    }

    /// Installs rights, and on the double has them enforced.
    ///
    /// # Errors
    /// When the API server refuses.
    pub fn grant(&self, rights: &[Value]) -> Result<()> {
        for object in rights {
            let kind = RIGHTS.into_iter().find(|kind| object["kind"] == *kind).context("not a right")?;
            self.apply(kind, object["metadata"]["name"].as_str().context("no name")?, object)?;
        }
        if let Some(double) = self.cluster.double() {
            double.enforce_rbac(true);
        }
        Ok(())
    }

    /// Agents that are started from now on, and cleanups, are the ServiceAccount, whose rights have
    /// been granted.
    ///
    /// # Errors
    /// When there is no token for it, or its rights do not come into force.
    pub fn act_as_account(&mut self) -> Result<()> {
        let tokens = Api::<ServiceAccount>::namespaced(self.cluster.client(), &self.namespace);
        let (parameters, question) = (PostParams::default(), TokenRequest::default());
        let answer = self.block(tokens.create_token_request(ACCOUNT, &parameters, &question));
        let answer = answer.context("no token for the ServiceAccount")?;
        let token = answer.status.and_then(|status| status.token).context("no token in the answer")?;
        let directory = self.lab.directory();
        self.cleaner = with_token(&self.cleaner, &token, directory.join("account-cleaner"))?;
        self.kubeconfig = with_token(&self.kubeconfig, &token, directory.join("account"))?;
        for other in &mut self.others {
            let path = directory.join(format!("account-{}", other.node));
            other.kubeconfig = with_token(&other.kubeconfig, &token, path)?;
        }
        // The double reads them anew for each request.
        if self.cluster.double().is_none() {
            self.wait_in_force()?;
        }
        Ok(())
    }

    /// A real API server's authorizer follows roles and bindings a little later than they are written:
    /// one question for each binding.
    fn wait_in_force(&self) -> Result<()> {
        let config = Kubeconfig::read_from(&self.cleaner)?;
        let config = self.block(Config::from_custom_kubeconfig(config, &KubeConfigOptions::default()))?;
        let client = self.block(async { Client::try_from(config) })?;
        let reviews = Api::<SelfSubjectAccessReview>::all(client);
        let text = |text: &str| Some(text.to_owned());
        for (verb, group, resource) in [("list", "", "services"), ("create", "coordination.k8s.io", "leases")]
        {
            let attributes = ResourceAttributes {
                verb: text(verb),
                group: text(group),
                resource: text(resource),
                namespace: text(&self.namespace),
                ..ResourceAttributes::default()
            };
            let question = SelfSubjectAccessReview {
                spec: SelfSubjectAccessReviewSpec {
                    resource_attributes: Some(attributes),
                    ..SelfSubjectAccessReviewSpec::default()
                },
                ..SelfSubjectAccessReview::default()
            };
            wait_for(&format!("the right to {verb} {resource}"), || {
                let answer = self.block(reviews.create(&PostParams::default(), &question))?;
                Ok(answer.status.is_some_and(|status| status.allowed).then_some(()))
            })?;
        }
        Ok(())
    }
}

/// Writes a copy of a kubeconfig whose user has this token and nothing else.
fn with_token(kubeconfig: &Path, token: &str, path: PathBuf) -> Result<PathBuf> {
    let mut config: Value = serde_saphyr::from_str(&fs::read_to_string(kubeconfig)?)?;
    for user in config["users"].as_array_mut().into_iter().flatten() {
        user["user"] = json!({ "token": token });
    }
    // YAML is a superset of JSON.
    fs::write(&path, config.to_string()).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}
