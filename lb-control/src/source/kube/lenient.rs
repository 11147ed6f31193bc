//! An object of which one field of the wrong type does not spoil the list that it came in.

use std::borrow::Cow;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::{Deserialize, Deserializer, de};

use crate::source::convert::FieldError;

/// An object, or its metadata and why the rest cannot be read.
///
/// For custom resources: their definitions may be older or newer than we are. It costs a second
/// representation while the object is read, so kinds of which there are many and which the API
/// server itself keeps in shape go without.
#[derive(Clone, Debug)]
pub struct Lenient<K> {
    metadata: ObjectMeta,
    object: Result<K, String>,
}

impl<K> Lenient<K> {
    /// The object.
    ///
    /// # Errors
    /// What cannot be read.
    pub fn object(&self) -> Result<&K, Vec<FieldError>> {
        self.object.as_ref().map_err(|message| {
            let field = message.split(": ").next().unwrap_or_default();
            let rest = message.get(field.len() + 2..).unwrap_or(message);
            vec![FieldError { field: field.to_owned(), message: rest.to_owned() }]
        })
    }
}

impl<'de, K: de::DeserializeOwned> Deserialize<'de> for Lenient<K> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let value = serde_json::Value::deserialize(from)?;
        let metadata = value.get("metadata").cloned().unwrap_or_default();
        let metadata = ObjectMeta::deserialize(metadata).map_err(de::Error::custom)?;
        // The error's display is `path: message`.
        let object = serde_path_to_error::deserialize(value).map_err(|error| error.to_string());
        Ok(Self { metadata, object })
    }
}

impl<K: kube::Resource> kube::Resource for Lenient<K> {
    type DynamicType = K::DynamicType;
    type Scope = K::Scope;

    fn kind(of: &K::DynamicType) -> Cow<'_, str> {
        K::kind(of)
    }

    fn group(of: &K::DynamicType) -> Cow<'_, str> {
        K::group(of)
    }

    fn version(of: &K::DynamicType) -> Cow<'_, str> {
        K::version(of)
    }

    fn plural(of: &K::DynamicType) -> Cow<'_, str> {
        K::plural(of)
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::crd::AddressPool;

    #[test]
    fn a_field_of_the_wrong_type_leaves_the_name() {
        let list: Vec<Lenient<AddressPool>> = serde_json::from_value(json!([
            { "metadata": { "name": "good" }, "spec": { "addresses": ["192.0.2.0/24"] } },
            { "metadata": { "name": "bad" }, "spec": { "addresses": "192.0.2.0/24" } },
        ]))
        .unwrap();
        assert_eq!(list[0].object().unwrap().spec.addresses, ["192.0.2.0/24"]);
        assert_eq!(kube::Resource::meta(&list[1]).name.as_deref(), Some("bad"));
        let errors = list[1].object().unwrap_err();
        assert_eq!(errors[0].field, "spec.addresses");
        assert!(errors[0].message.contains("expected a sequence"), "{errors:?}");
    }
}
