//! The CustomResourceDefinitions of our resources.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt;

use super::{AddressPool, VirtualIp};

/// The definitions, by name.
#[must_use]
pub fn definitions() -> Vec<CustomResourceDefinition> {
    let mut definitions = vec![AddressPool::crd(), VirtualIp::crd()];
    let schemas = definitions
        .iter_mut()
        .flat_map(|definition| &mut definition.spec.versions)
        .filter_map(|version| version.schema.as_mut()?.open_api_v3_schema.as_mut());
    for schema in schemas {
        // The name of a Rust type, which says nothing to those who read the definition.
        schema.title = None;
    }
    definitions
}

/// A definition as YAML, ready for `kubectl apply`.
///
/// # Errors
/// When it cannot be written, which is a defect.
pub fn yaml(definition: &CustomResourceDefinition) -> Result<String, serde_saphyr::ser::Error> {
    serde_saphyr::to_string(definition)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn yaml_says_what_the_definition_says() {
        for definition in definitions() {
            let text = yaml(&definition).unwrap();
            let read: CustomResourceDefinition = serde_saphyr::from_str(&text).unwrap();
            assert_eq!(read, definition);
        }
    }

    #[test]
    fn rules_only_run_over_what_is_limited() {
        // Where a rule is, and in all that contains it, lists and texts have limits: without, the
        // API server assumes the worst and refuses the definition.
        fn check(schema: &serde_json::Value, path: &str) -> bool {
            let mut has_rule = schema.get("x-kubernetes-validations").is_some();
            for (name, property) in schema["properties"].as_object().into_iter().flatten() {
                has_rule |= check(property, &format!("{path}.{name}"));
            }
            if let Some(items) = schema.get("items") {
                has_rule |= check(items, &format!("{path}[]"));
            }
            match schema["type"].as_str() {
                Some("array") if has_rule => assert!(schema["maxItems"].is_u64(), "{path}"),
                Some("string") if has_rule => assert!(schema["maxLength"].is_u64(), "{path}"),
                _ => {}
            }
            has_rule
        }
        for definition in definitions() {
            let schema = definition.spec.versions[0].schema.clone().unwrap().open_api_v3_schema.unwrap();
            assert!(
                check(&serde_json::to_value(schema).unwrap(), ""),
                "no rules in {:?}",
                definition.metadata.name
            );
        }
    }
}
