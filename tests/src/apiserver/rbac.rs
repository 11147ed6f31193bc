//! Role-based access control, after `plugin/pkg/auth/authorizer/rbac`.

use serde_json::Value;

use super::{
    access::User,
    call::{Call, Verb},
    failure::{Failure, Outcome},
    server::Server,
    store::{Object, Store},
};

const ROLES: &str = "rbac.authorization.k8s.io/roles";
const CLUSTER_ROLES: &str = "rbac.authorization.k8s.io/clusterroles";
const ROLE_BINDINGS: &str = "rbac.authorization.k8s.io/rolebindings";
const CLUSTER_ROLE_BINDINGS: &str = "rbac.authorization.k8s.io/clusterrolebindings";

/// What is asked for, in the words of roles.
#[derive(Clone, Debug)]
pub struct Attributes {
    /// E.g. `list`.
    pub verb: String,
    /// Empty for the core group.
    pub group: String,
    /// E.g. `services`, or `services/status`.
    pub resource: String,
    /// Empty for cluster-scoped objects and for all namespaces.
    pub namespace: String,
    /// Empty for lists.
    pub name: String,
}

impl Attributes {
    fn of(call: &Call) -> Self {
        let resource = match call.subresource.as_str() {
            "" => call.plural.clone(),
            subresource => format!("{}/{subresource}", call.plural),
        };
        // A list or watch of one object by its name counts as naming it.
        let selected = call.query.get("fieldSelector").strip_prefix("metadata.name=");
        let name = match (&call.name, selected) {
            (name, Some(selected)) if name.is_empty() && !selected.contains(',') => selected.to_owned(),
            (name, _) => name.clone(),
        };
        // A namespace lies in itself.
        let namespace = match call.plural.as_str() {
            "namespaces" if call.group.is_empty() => call.name.clone(),
            _ => call.namespace.clone(),
        };
        Self { verb: call.verb.as_str().to_owned(), group: call.group.clone(), resource, namespace, name }
    }
}

/// Fails unless a user may do what is asked.
///
/// # Errors
/// When no rule of a role that is bound to the user allows it.
pub fn check(server: &Server, store: &Store, call: &Call, user: &User) -> Outcome<()> {
    if !server.access.is_enforced() || user.is_admin() {
        return Ok(());
    }
    let asked = Attributes::of(call);
    if is_allowed(store, user, &asked) {
        return Ok(());
    }
    let place = match asked.namespace.as_str() {
        "" => "at the cluster scope".to_owned(),
        namespace => format!("in the namespace \"{namespace}\""),
    };
    let why = format!(
        "User \"{}\" cannot {} resource \"{}\" in API group \"{}\" {place}",
        user.name, asked.verb, asked.resource, asked.group
    );
    let name = if call.verb == Verb::Create { "" } else { &call.name };
    Err(Failure::forbidden(&call.group, &call.plural, name, &why))
}

/// Whether a rule of a role that is bound to a user allows something.
#[must_use]
pub fn is_allowed(store: &Store, user: &User, asked: &Attributes) -> bool {
    if user.is_admin() {
        return true;
    }
    let everywhere = store.list(CLUSTER_ROLE_BINDINGS, None);
    let here = match asked.namespace.as_str() {
        "" => Vec::new(),
        namespace => store.list(ROLE_BINDINGS, Some(namespace)),
    };
    everywhere
        .iter()
        .chain(&here)
        .filter(|binding| binds(binding, user))
        .filter_map(|binding| role(store, binding))
        .any(|role| rules(&role).any(|rule| allows(rule, asked)))
}

fn binds(binding: &Value, user: &User) -> bool {
    let namespace = &binding["metadata"]["namespace"];
    binding["subjects"].as_array().into_iter().flatten().any(|subject| {
        let name = subject["name"].as_str().unwrap_or_default();
        match subject["kind"].as_str() {
            Some("User") => name == user.name,
            Some("Group") => user.groups.iter().any(|group| group == name),
            Some("ServiceAccount") => {
                let namespace = subject["namespace"].as_str().or(namespace.as_str()).unwrap_or_default();
                user.name == format!("system:serviceaccount:{namespace}:{name}")
            }
            _ => false,
        }
    })
}

fn role(store: &Store, binding: &Value) -> Option<Object> {
    let reference = &binding["roleRef"];
    let name = reference["name"].as_str()?.to_owned();
    if reference["kind"] == "ClusterRole" {
        return store.get(CLUSTER_ROLES, &(String::new(), name));
    }
    store.get(ROLES, &(binding["metadata"]["namespace"].as_str()?.to_owned(), name))
}

fn rules(role: &Value) -> impl Iterator<Item = &Value> {
    role["rules"].as_array().into_iter().flatten()
}

fn allows(rule: &Value, asked: &Attributes) -> bool {
    let lists = |field: &str, wanted: &[&str]| {
        let mut values = rule[field].as_array().into_iter().flatten().filter_map(Value::as_str);
        values.any(|value| value == "*" || wanted.contains(&value))
    };
    let any = asked.resource.split_once('/').map(|(_, subresource)| format!("*/{subresource}"));
    let resources = [asked.resource.as_str(), any.as_deref().unwrap_or(&asked.resource)];
    let names = rule["resourceNames"].as_array().filter(|names| !names.is_empty());
    lists("verbs", &[&asked.verb])
        && lists("apiGroups", &[&asked.group])
        && lists("resources", &resources)
        && names.is_none_or(|names| names.iter().any(|name| *name == asked.name.as_str()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn rules_allow_what_they_say() {
        let rule = json!({
            "verbs": ["get", "patch"], "apiGroups": ["", "x.io"], "resources": ["services", "*/status"],
        });
        let named = json!({
            "verbs": ["*"], "apiGroups": ["*"], "resources": ["*"], "resourceNames": ["one"],
        });
        let cases = [
            (&rule, "get", "", "services", "", true),
            (&rule, "list", "", "services", "", false),
            (&rule, "get", "y.io", "services", "", false),
            (&rule, "patch", "x.io", "things/status", "", true),
            (&rule, "patch", "x.io", "things", "", false),
            (&rule, "patch", "", "services/proxy", "", false),
            (&named, "delete", "y.io", "things", "one", true),
            (&named, "delete", "y.io", "things", "two", false),
            (&named, "create", "y.io", "things", "", false),
        ];
        for (rule, verb, group, resource, name, expected) in cases {
            let asked = Attributes {
                verb: verb.into(),
                group: group.into(),
                resource: resource.into(),
                namespace: String::new(),
                name: name.into(),
            };
            assert_eq!(allows(rule, &asked), expected, "{asked:?}");
        }
    }
}
