//! Kinds that are asked and not stored: SelfSubjectAccessReview, TokenRequest.

use serde_json::{Value, json};

use super::{
    access::User,
    call::{Call, Verb},
    failure::{Failure, Outcome},
    rbac::{self, Attributes},
    server::Server,
    store::Store,
};

/// The answer to a question; `None` when the request is none.
///
/// # Errors
/// When the question is malformed, or may not be asked.
pub fn answer(server: &Server, store: &Store, call: &Call, user: &User) -> Outcome<Option<Value>> {
    if call.verb != Verb::Create {
        return Ok(None);
    }
    match (call.group.as_str(), call.plural.as_str(), call.subresource.as_str()) {
        // Everybody may ask what they may do.
        ("authorization.k8s.io", "selfsubjectaccessreviews", "") => {
            Ok(Some(review(server, store, &call.object()?, user)))
        }
        ("", "serviceaccounts", "token") => {
            rbac::check(server, store, call, user)?;
            token(server, store, call).map(Some)
        }
        _ => Ok(None),
    }
}

fn review(server: &Server, store: &Store, question: &Value, user: &User) -> Value {
    let asked = &question["spec"]["resourceAttributes"];
    let text = |field: &str| asked[field].as_str().unwrap_or_default().to_owned();
    let resource = match text("subresource") {
        subresource if subresource.is_empty() => text("resource"),
        subresource => format!("{}/{subresource}", text("resource")),
    };
    let attributes = Attributes {
        verb: text("verb"),
        group: text("group"),
        resource,
        namespace: text("namespace"),
        name: text("name"),
    };
    let allowed = !server.access.is_enforced() || rbac::is_allowed(store, user, &attributes);
    json!({
        "kind": "SelfSubjectAccessReview", "apiVersion": "authorization.k8s.io/v1", "metadata": {},
        "spec": question["spec"], "status": { "allowed": allowed },
    })
}

fn token(server: &Server, store: &Store, call: &Call) -> Outcome<Value> {
    let key = (call.namespace.clone(), call.name.clone());
    if store.get("serviceaccounts", &key).is_none() {
        return Err(Failure::not_found("", "serviceaccounts", &call.name));
    }
    let mut question = if call.body.is_empty() { json!({}) } else { call.object()? };
    let seconds = question["spec"]["expirationSeconds"].as_i64().unwrap_or(3600);
    let expires = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(seconds);
    question["kind"] = "TokenRequest".into();
    question["apiVersion"] = "authentication.k8s.io/v1".into();
    question["status"] = json!({
        "token": server.access.token(&call.namespace, &call.name),
        "expirationTimestamp": expires.strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
    });
    Ok(question)
}
