//! What is answered when a request cannot be done: `meta/v1.Status` with the reasons and messages of
//! `k8s.io/apimachinery/pkg/api/errors`, because clients decide by `code` and `reason`, and people
//! read `message`.

use serde_json::{Value, json};

/// A request that failed.
#[derive(Clone, Debug)]
pub struct Failure {
    /// HTTP status.
    pub code: u16,
    /// `Status.reason`, e.g. `AlreadyExists`.
    pub reason: &'static str,
    /// For people.
    pub message: String,
    /// `Status.details`.
    pub details: Value,
    /// Seconds, for the header `Retry-After`.
    pub retry_after: Option<u32>,
}

/// Of anything that a request may fail at.
pub type Outcome<T> = Result<T, Failure>;

/// One thing that is wrong with an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cause {
    /// `FieldValueInvalid`, `FieldValueRequired`, …
    pub reason: &'static str,
    /// E.g. `spec.ports[0].port`.
    pub field: String,
    /// E.g. `Invalid value: 0: must be between 1 and 65535, inclusive`.
    pub message: String,
}

impl Cause {
    /// A value that may not be.
    pub fn invalid(field: impl Into<String>, value: &Value, why: &str) -> Self {
        let message = format!("Invalid value: {}: {why}", shown(value));
        Self { reason: "FieldValueInvalid", field: field.into(), message }
    }

    /// A value that is missing.
    pub fn required(field: impl Into<String>, why: &str) -> Self {
        let colon = if why.is_empty() { "" } else { ": " };
        let message = format!("Required value{colon}{why}");
        Self { reason: "FieldValueRequired", field: field.into(), message }
    }

    /// A value that may not be set here.
    pub fn forbidden(field: impl Into<String>, why: &str) -> Self {
        Self { reason: "FieldValueForbidden", field: field.into(), message: format!("Forbidden: {why}") }
    }

    /// A value that is none of those which may be.
    pub fn unsupported(field: impl Into<String>, value: &Value, supported: &[&str]) -> Self {
        let supported: Vec<String> = supported.iter().map(|value| format!("\"{value}\"")).collect();
        let message =
            format!("Unsupported value: {}: supported values: {}", shown(value), supported.join(", "));
        Self { reason: "FieldValueNotSupported", field: field.into(), message }
    }
}

/// As Go's field errors show a value: lists and objects as JSON.
fn shown(value: &Value) -> String {
    value.to_string()
}

/// `services`, or `leases.coordination.k8s.io`.
fn resource(group: &str, plural: &str) -> String {
    if group.is_empty() { plural.to_owned() } else { format!("{plural}.{group}") }
}

impl Failure {
    fn new(code: u16, reason: &'static str, message: impl Into<String>) -> Self {
        Self { code, reason, message: message.into(), details: Value::Null, retry_after: None }
    }

    fn about(mut self, group: &str, kind: &str, name: &str) -> Self {
        let mut details = json!({ "kind": kind });
        if !group.is_empty() {
            details["group"] = group.into();
        }
        if !name.is_empty() {
            details["name"] = name.into();
        }
        self.details = details;
        self
    }

    /// There is no such object.
    #[must_use]
    pub fn not_found(group: &str, plural: &str, name: &str) -> Self {
        let message = format!("{} \"{name}\" not found", resource(group, plural));
        Self::new(404, "NotFound", message).about(group, plural, name)
    }

    /// There is no such path.
    #[must_use]
    pub fn no_such_path() -> Self {
        Self::new(404, "NotFound", "")
    }

    /// Whether it is that there is no such path.
    #[must_use]
    pub fn is_no_path(&self) -> bool {
        self.code == 404 && self.message.is_empty()
    }

    /// The path is right, the method is not.
    #[must_use]
    pub fn method_not_allowed() -> Self {
        Self::new(405, "MethodNotAllowed", "the server does not allow this method on the requested resource")
    }

    /// The name is taken.
    #[must_use]
    pub fn already_exists(group: &str, plural: &str, name: &str) -> Self {
        let message = format!("{} \"{name}\" already exists", resource(group, plural));
        Self::new(409, "AlreadyExists", message).about(group, plural, name)
    }

    /// Somebody else was faster.
    #[must_use]
    pub fn conflict(group: &str, plural: &str, name: &str, why: &str) -> Self {
        let resource = resource(group, plural);
        let message = format!("Operation cannot be fulfilled on {resource} \"{name}\": {why}");
        Self::new(409, "Conflict", message).about(group, plural, name)
    }

    /// The object was changed since it was read.
    #[must_use]
    pub fn modified(group: &str, plural: &str, name: &str) -> Self {
        let why =
            "the object has been modified; please apply your changes to the latest version and try again";
        Self::conflict(group, plural, name, why)
    }

    /// Server-side apply: others own what would change. One cause for each field:
    /// `(manager, path)`.
    #[must_use]
    pub fn apply_conflict(conflicts: &[(String, String)]) -> Self {
        let causes: Vec<Value> = conflicts
            .iter()
            .map(|(manager, field)| {
                let message = format!("conflict with {manager}");
                json!({ "reason": "FieldManagerConflict", "message": message, "field": field })
            })
            .collect();
        let message = match conflicts {
            [(manager, field)] => format!("Apply failed with 1 conflict: conflict with {manager}: {field}"),
            _ => {
                let lines: Vec<String> = conflicts
                    .iter()
                    .map(|(manager, field)| format!("conflict with {manager}: {field}"))
                    .collect();
                format!("Apply failed with {} conflicts: {}", conflicts.len(), lines.join("\n"))
            }
        };
        let mut failure = Self::new(409, "Conflict", message);
        failure.details = json!({ "causes": causes });
        failure
    }

    /// The request makes no sense.
    #[must_use]
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(400, "BadRequest", message)
    }

    /// The object may not be like this.
    #[must_use]
    pub fn invalid(group: &str, kind: &str, name: &str, causes: &[Cause]) -> Self {
        let lines: Vec<String> =
            causes.iter().map(|cause| format!("{}: {}", cause.field, cause.message)).collect();
        let all = if lines.len() == 1 { lines.concat() } else { format!("[{}]", lines.join(", ")) };
        let shown = if group.is_empty() { kind.to_owned() } else { format!("{kind}.{group}") };
        let message = format!("{shown} \"{name}\" is invalid: {all}");
        let mut failure = Self::new(422, "Invalid", message).about(group, kind, name);
        let causes = causes
            .iter()
            .map(|cause| json!({ "reason": cause.reason, "message": cause.message, "field": cause.field }));
        failure.details["causes"] = causes.collect();
        failure
    }

    /// Not allowed to do this.
    #[must_use]
    pub fn forbidden(group: &str, plural: &str, name: &str, why: &str) -> Self {
        let resource = resource(group, plural);
        // Kubernetes leaves the name out where there is none, with the space that would precede it.
        let named = if name.is_empty() { String::new() } else { format!(" \"{name}\"") };
        let message = format!("{resource}{named} is forbidden: {why}");
        Self::new(403, "Forbidden", message).about(group, plural, name)
    }

    /// A token that is nobody's.
    #[must_use]
    pub fn unauthorized() -> Self {
        Self::new(401, "Unauthorized", "Unauthorized")
    }

    /// The resource version is too old to go on from.
    #[must_use]
    pub fn expired(message: impl Into<String>) -> Self {
        Self::new(410, "Expired", message)
    }

    /// The resource version lies in the future.
    #[must_use]
    pub fn too_large_version(asked: u64, current: u64) -> Self {
        let message = format!("Too large resource version: {asked}, current: {current}");
        let mut failure = Self::new(504, "Timeout", format!("Timeout: {message}"));
        failure.details = json!({
            "causes": [{ "reason": "ResourceVersionTooLarge", "message": "Too large resource version" }],
            "retryAfterSeconds": 1,
        });
        failure.retry_after = Some(1);
        failure
    }

    /// A body of a type that is not understood.
    #[must_use]
    pub fn unsupported_media(given: &str) -> Self {
        let message = format!(
            "the body of the request was in an unknown format - accepted media types include: \
             application/json, application/yaml, application/json-patch+json, application/merge-patch+json, \
             application/strategic-merge-patch+json, application/apply-patch+yaml (not {given})"
        );
        Self::new(415, "UnsupportedMediaType", message)
    }

    /// What fault injection asks for.
    #[must_use]
    pub fn injected(code: u16, retry_after: Option<u32>) -> Self {
        let (reason, message) = match code {
            401 => ("Unauthorized", "Unauthorized"),
            403 => ("Forbidden", "forbidden: injected"),
            409 => ("Conflict", "Operation cannot be fulfilled: injected conflict"),
            410 => ("Expired", "The resourceVersion for the provided watch is too old."),
            429 => ("TooManyRequests", "Too many requests, please try again later."),
            503 => ("ServiceUnavailable", "the server is currently unable to handle the request"),
            504 => ("Timeout", "Timeout: request did not complete within the allotted timeout"),
            _ => ("InternalError", "Internal error occurred: injected"),
        };
        let mut failure = Self::new(code, reason, message);
        if let Some(seconds) = retry_after {
            failure.details = json!({ "retryAfterSeconds": seconds });
        }
        failure.retry_after = retry_after;
        failure
    }

    /// As it is sent.
    #[must_use]
    pub fn to_status(&self) -> Value {
        let mut status = json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": self.message, "reason": self.reason, "code": self.code,
        });
        if !self.details.is_null() {
            status["details"] = self.details.clone();
        }
        status
    }
}
