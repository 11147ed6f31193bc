//! What names, labels and annotations may look like: `k8s.io/apimachinery/pkg/util/validation`.

use serde_json::Value;

use super::{failure::Cause, kinds::Kind};

const SUBDOMAIN: &str = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, \
     '-' or '.', and must start and end with an alphanumeric character (e.g. 'example.com', regex used for \
     validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')";
const LABEL: &str = "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and \
     must start and end with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for \
     validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?')";
const LABEL_VALUE: &str = "a valid label must be an empty string or consist of alphanumeric characters, '-', \
     '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or \
     '12345', regex used for validation is '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')";
const QUALIFIED: &str = "name part must consist of alphanumeric characters, '-', '_' or '.', and must start \
     and end with an alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for \
     validation is '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')";
/// Of all annotations together.
const ANNOTATIONS: usize = 256 * 1024;

fn is_lower(character: char) -> bool {
    character.is_ascii_lowercase() || character.is_ascii_digit()
}

/// Whether it is a DNS label of at most 63 characters.
#[must_use]
pub fn is_label(text: &str) -> bool {
    text.len() <= 63 && is_any_label(text)
}

fn is_any_label(text: &str) -> bool {
    text.starts_with(is_lower)
        && text.ends_with(is_lower)
        && text.chars().all(|character| is_lower(character) || character == '-')
}

/// Whether it is a DNS subdomain of at most 253 characters.
#[must_use]
pub fn is_subdomain(text: &str) -> bool {
    text.len() <= 253 && text.split('.').all(is_any_label)
}

fn is_word(text: &str) -> bool {
    let alphanumeric = |character: char| character.is_ascii_alphanumeric();
    text.len() <= 63
        && text.starts_with(alphanumeric)
        && text.ends_with(alphanumeric)
        && text.chars().all(|character| alphanumeric(character) || "-_.".contains(character))
}

fn is_qualified(text: &str) -> bool {
    match text.split_once('/') {
        Some((prefix, name)) => is_subdomain(prefix) && is_word(name),
        None => is_word(text),
    }
}

/// What is wrong with an object's metadata.
#[must_use]
pub fn check_metadata(kind: &Kind, object: &Value) -> Vec<Cause> {
    let metadata = &object["metadata"];
    let name = metadata["name"].as_str().unwrap_or_default();
    let mut causes = Vec::new();
    let field = "metadata.name";
    if name.is_empty() {
        causes.push(Cause::required(field, "name or generateName is required"));
    } else if let Some(why) = wrong_name(kind, name) {
        causes.push(Cause::invalid(field, &metadata["name"], why));
    }
    // As `maskTrailingDash` (apimachinery, pkg/api/validation/generic.go): a dash may end it.
    let prefix = metadata["generateName"].as_str().unwrap_or_default();
    let whole = prefix.strip_suffix('-').map(|rest| format!("{rest}a"));
    if let Some(why) =
        (!prefix.is_empty()).then(|| wrong_name(kind, whole.as_deref().unwrap_or(prefix))).flatten()
    {
        causes.push(Cause::invalid("metadata.generateName", &metadata["generateName"], why));
    }
    let pairs = |field: &str| metadata[field].as_object().into_iter().flatten();
    for (key, value) in pairs("labels") {
        if !is_qualified(key) {
            causes.push(Cause::invalid("metadata.labels", &key.as_str().into(), QUALIFIED));
        }
        let text = value.as_str().unwrap_or_default();
        if !text.is_empty() && !is_word(text) {
            causes.push(Cause::invalid("metadata.labels", value, LABEL_VALUE));
        }
    }
    let mut size = 0;
    for (key, value) in pairs("annotations") {
        size += key.len() + value.as_str().map_or(0, str::len);
        if !is_qualified(&key.to_lowercase()) {
            causes.push(Cause::invalid("metadata.annotations", &key.as_str().into(), QUALIFIED));
        }
    }
    if size > ANNOTATIONS {
        let message = format!("Too long: may not be more than {ANNOTATIONS} bytes");
        causes.push(Cause { reason: "FieldValueTooLong", field: "metadata.annotations".into(), message });
    }
    for finalizer in metadata["finalizers"].as_array().into_iter().flatten() {
        let text = finalizer.as_str().unwrap_or_default();
        if !is_qualified(text) {
            causes.push(Cause::invalid("metadata.finalizers", finalizer, QUALIFIED));
        }
    }
    causes
}

fn wrong_name(kind: &Kind, name: &str) -> Option<&'static str> {
    match &*kind.storage {
        // Before Kubernetes 1.36, a Service's name had to begin with a letter.
        "services" | "namespaces" => (!is_label(name)).then_some(LABEL),
        // Roles may be called anything that can be part of a path.
        storage if storage.starts_with("rbac.") => {
            (name.contains(['/', '%']) || name == "." || name == "..").then_some("may not contain '/' or '%'")
        }
        _ => (!is_subdomain(name)).then_some(SUBDOMAIN),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::apiserver::kinds::Registry;

    #[test]
    fn names_are_checked_by_kind() {
        let registry = Registry::default();
        let cases = [
            ("services", "a-b", true),
            ("services", "1a", true),
            ("services", "a.b", false),
            ("configmaps", "1.2.3.4", true),
            ("configmaps", "a..b", false),
            ("configmaps", "2001:db8::1", false),
            ("configmaps", "2001-0db8-0000-0000-0000-0000-0000-0001", true),
            ("configmaps", "A", false),
            ("namespaces", "a.b", false),
            ("namespaces", "a-", false),
        ];
        for (plural, name, good) in cases {
            let kind = registry.find("", "v1", plural).unwrap();
            let causes = check_metadata(&kind, &json!({ "metadata": { "name": name } }));
            assert_eq!(causes.is_empty(), good, "{plural} {name}");
        }
    }

    #[test]
    fn the_beginning_of_a_generated_name_is_checked() {
        let kind = Registry::default().find("", "v1", "configmaps").unwrap();
        for (prefix, good) in [("web-", true), ("a.b-", true), ("web", true), ("web.", false), ("A-", false)]
        {
            let metadata = json!({ "name": "web-x7k2p", "generateName": prefix });
            assert_eq!(check_metadata(&kind, &json!({ "metadata": metadata })).is_empty(), good, "{prefix}");
        }
    }

    #[test]
    fn labels_annotations_and_finalizers_are_checked() {
        let kind = Registry::default().find("", "v1", "configmaps").unwrap();
        let cases = [
            (json!({ "labels": { "a.b/c": "" } }), true),
            (json!({ "labels": { "a": "b c" } }), false),
            (json!({ "labels": { "a/b/c": "x" } }), false),
            (json!({ "annotations": { "a": "any thing" } }), true),
            (json!({ "annotations": { "a": "x".repeat(ANNOTATIONS) } }), false),
            (json!({ "finalizers": ["pointsman.dev/cleanup"] }), true),
            (json!({ "finalizers": ["a b"] }), false),
        ];
        for (metadata, good) in cases {
            let mut object = json!({ "metadata": metadata });
            object["metadata"]["name"] = "x".into();
            assert_eq!(check_metadata(&kind, &object).is_empty(), good, "{}", object["metadata"]);
        }
    }
}
