//! Who asks, and whether they may.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use hyper::{HeaderMap, header};

use super::failure::{Failure, Outcome};

/// Who asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// E.g. `system:serviceaccount:kube-system:pointsman`.
    pub name: String,
    /// E.g. `system:authenticated`.
    pub groups: Vec<String>,
}

/// May do everything.
const MASTERS: &str = "system:masters";

impl User {
    /// Who asks without a token: as on the insecure port that Kubernetes once had, an administrator.
    /// (kubectl sends no token over plain HTTP.)
    #[must_use]
    pub fn admin() -> Self {
        Self { name: "system:admin".into(), groups: vec![MASTERS.into(), "system:authenticated".into()] }
    }

    /// A ServiceAccount.
    #[must_use]
    pub fn service_account(namespace: &str, name: &str) -> Self {
        Self {
            name: format!("system:serviceaccount:{namespace}:{name}"),
            groups: vec![
                "system:serviceaccounts".into(),
                format!("system:serviceaccounts:{namespace}"),
                "system:authenticated".into(),
            ],
        }
    }

    /// Whether no rule applies.
    #[must_use]
    pub fn is_admin(&self) -> bool {
        self.groups.iter().any(|group| group == MASTERS)
    }
}

/// The tokens that were given out, and whether roles are enforced.
#[derive(Debug, Default)]
pub struct Access {
    tokens: Mutex<BTreeMap<String, User>>,
    enforced: AtomicBool,
}

impl Access {
    fn tokens(&self) -> MutexGuard<'_, BTreeMap<String, User>> {
        self.tokens.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A token of a ServiceAccount: the same at each call.
    #[must_use]
    pub fn token(&self, namespace: &str, name: &str) -> String {
        let token = format!("token.{namespace}.{name}");
        self.tokens().insert(token.clone(), User::service_account(namespace, name));
        token
    }

    /// Makes a token worthless.
    pub fn revoke(&self, token: &str) {
        self.tokens().remove(token);
    }

    /// Switches the enforcement of roles on or off.
    pub fn enforce(&self, on: bool) {
        self.enforced.store(on, Ordering::Relaxed);
    }

    /// Whether roles are enforced.
    #[must_use]
    pub fn is_enforced(&self) -> bool {
        self.enforced.load(Ordering::Relaxed)
    }

    /// Who sent a request.
    ///
    /// # Errors
    /// When the token is nobody's.
    pub fn user(&self, headers: &HeaderMap) -> Outcome<User> {
        let Some(value) = headers.get(header::AUTHORIZATION) else { return Ok(User::admin()) };
        let token = value.to_str().ok().and_then(|value| value.strip_prefix("Bearer "));
        token.and_then(|token| self.tokens().get(token.trim()).cloned()).ok_or_else(Failure::unauthorized)
    }
}
