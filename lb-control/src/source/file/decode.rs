//! Text to objects. Pure.

use std::sync::Arc;

use k8s_openapi::api::{core::v1::Service as KubeService, discovery::v1::EndpointSlice as KubeSlice};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::{
    crd::{self, AddressPool},
    model::{EndpointSlice, ObjectRef, Place, Pool, Problem, Service},
    source::{
        convert::{self, FieldError},
        pools,
    },
};

/// An object that is right.
#[derive(Clone, Debug, PartialEq)]
pub enum Item {
    /// `v1` Service.
    Service(Arc<Service>),
    /// `discovery.k8s.io/v1` EndpointSlice.
    Slice(Arc<EndpointSlice>),
    /// `pointsman.dev/v1alpha1` AddressPool.
    Pool(Arc<Pool>),
}

/// An object that could be told by kind and name.
#[derive(Clone, Debug)]
pub struct Document {
    /// Kind.
    pub kind: &'static str,
    /// Namespace (empty for pools) and name.
    pub object: ObjectRef,
    /// Where it is.
    pub place: Place,
    /// The object, or what is wrong with it.
    pub item: Result<Item, Vec<Problem>>,
}

/// What is in a text.
#[derive(Clone, Debug, Default)]
pub struct Decoded {
    /// Objects of the kinds that matter.
    pub documents: Vec<Document>,
    /// Parts that cannot be told to be any object.
    pub unreadable: Vec<Problem>,
    /// Objects of other kinds.
    pub ignored: Vec<Problem>,
}

const SERVICE: &str = "Service";
const SLICE: &str = "EndpointSlice";
const POOL: &str = "AddressPool";

/// Decodes one file of any number of documents. `file` is its name for messages.
#[must_use]
pub fn decode(file: &str, text: &str) -> Decoded {
    let mut decoded = Decoded::default();
    for (index, (line, document)) in split(text).into_iter().enumerate() {
        let place = Place { file: file.to_owned(), document: index + 1, line, item: None };
        match parse_yaml(document) {
            Ok(Value::Null) => {}
            Ok(value) => decode_value(value, &place, &mut decoded),
            Err(error) => decoded.unreadable.push(Problem::error(shift_line(&error, line)).at(&place)),
        }
    }
    decoded
}

/// Splits at document markers. A line that starts with `---` and then ends or goes on with a
/// blank is nothing else in YAML, not even in a block scalar (YAML 1.2.2, 9.1.2, c-forbidden), so
/// that a document with an error in it does not take along the others.
fn split(text: &str) -> Vec<(usize, &str)> {
    let mut documents = Vec::new();
    let (mut start, mut start_line, mut offset) = (0, 1, 0);
    for (number, line) in text.split_inclusive('\n').enumerate() {
        let is_marker = line
            .strip_prefix("---")
            .is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']));
        if is_marker && number > 0 {
            documents.push((start_line, &text[start..offset]));
            (start, start_line) = (offset, number + 1);
        }
        offset += line.len();
    }
    documents.push((start_line, &text[start..]));
    documents.retain(|(_, document)| {
        document.lines().any(|line| {
            let line = line.trim_start_matches('\u{feff}').trim();
            !(line.is_empty()
                || line.starts_with('#')
                || line.starts_with('%')
                || line == "---"
                || line == "...")
        })
    });
    documents
}

/// serde-saphyr rather than a descendant of serde_yaml: pure Rust (the others carry a
/// transliterated C library), kept up to date, and it refuses duplicate keys. JSON is YAML to it.
fn parse_yaml(document: &str) -> Result<Value, String> {
    // The files are the operator's own. A List of 10,000 Services is far beyond the budget that
    // the crate sets for what strangers send. `n` and `on` are names, not booleans (YAML 1.2).
    let options = serde_saphyr::options! { budget: None, with_snippet: false, strict_booleans: true };
    serde_saphyr::from_str_with_options(document, options).map_err(|error| error.to_string())
}

/// Positions in messages count from the beginning of the document; people look at the file.
fn shift_line(message: &str, first_line: usize) -> String {
    let message = message.lines().next().unwrap_or_default();
    let Some((before, rest)) = message.split_once("line ") else { return message.to_owned() };
    let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
    match rest[..digits].parse::<usize>() {
        Ok(line) => format!("{before}line {}{}", line + first_line - 1, &rest[digits..]),
        Err(_) => message.to_owned(),
    }
}

fn decode_value(mut value: Value, place: &Place, decoded: &mut Decoded) {
    let text = |key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let (api_version, kind) = (text("apiVersion"), text("kind"));
    match (api_version.as_str(), kind.as_str()) {
        ("v1", "List") => decode_list(value, place, decoded),
        ("v1", SERVICE) => {
            let document = decode_object(SERVICE, value, place, |object: &KubeService, place| {
                convert::service(object, Some(place)).map(|service| Item::Service(Arc::new(service)))
            });
            decoded.add(document);
        }
        ("discovery.k8s.io/v1", SLICE) => {
            let document = decode_object(SLICE, value, place, |object: &KubeSlice, place| {
                convert::endpoint_slice(object, Some(place)).map(|slice| Item::Slice(Arc::new(slice)))
            });
            decoded.add(document);
        }
        (crd::API_VERSION, POOL) => {
            // The derived type knows both by itself, and would call them unknown.
            if let Value::Object(fields) = &mut value {
                fields.retain(|name, _| name != "apiVersion" && name != "kind");
            }
            let document = decode_object(POOL, value, place, |object: &AddressPool, place| {
                pools::address_pool(object, Some(place)).map(|pool| Item::Pool(Arc::new(pool)))
            });
            decoded.add(document);
        }
        ("", _) | (_, "") => decoded
            .unreadable
            .push(Problem::error("is no Kubernetes object: `apiVersion` and `kind` are needed").at(place)),
        _ => decoded.ignored.push(ignored(&api_version, &kind, &value, place)),
    }
}

fn ignored(api_version: &str, kind: &str, value: &Value, place: &Place) -> Problem {
    let metadata =
        |key: &str| value.pointer(&format!("/metadata/{key}")).and_then(Value::as_str).unwrap_or_default();
    Problem::warning(format!(
        "{api_version} {kind} is ignored: only v1 Service, v1 List, discovery.k8s.io/v1 EndpointSlice and \
         {} {} are read",
        crd::API_VERSION,
        POOL
    ))
    .at(place)
    .about(kind, &ObjectRef::new(metadata("namespace"), metadata("name")))
}

fn decode_list(mut value: Value, place: &Place, decoded: &mut Decoded) {
    let Some(Value::Array(items)) = value.get_mut("items").map(Value::take) else {
        decoded.unreadable.push(Problem::error("must be a list").at(place).field("items"));
        return;
    };
    for (index, item) in items.into_iter().enumerate() {
        let place = Place { item: Some(index + 1), ..place.clone() };
        decode_value(item, &place, decoded);
    }
}

impl Decoded {
    fn add(&mut self, document: Result<Document, Box<Problem>>) {
        match document {
            Ok(document) => self.documents.push(document),
            Err(problem) => self.unreadable.push(*problem),
        }
    }
}

/// # Errors
/// When it cannot be told which object it is.
fn decode_object<T: DeserializeOwned>(
    kind: &'static str,
    value: Value,
    place: &Place,
    convert: impl FnOnce(&T, Place) -> Result<Item, Vec<FieldError>>,
) -> Result<Document, Box<Problem>> {
    let name = value.pointer("/metadata/name").and_then(Value::as_str).unwrap_or_default();
    let namespace = value.pointer("/metadata/namespace").and_then(Value::as_str).unwrap_or("default");
    let namespace = if kind == POOL { "" } else { namespace };
    let object = ObjectRef::new(namespace, name);
    if name.is_empty() {
        let problem = Problem::error("is missing").at(place).about(kind, &object).field("metadata.name");
        return Err(Box::new(problem));
    }
    let about =
        |error: FieldError| Problem::error(error.message).at(place).about(kind, &object).field(error.field);
    let item = match decode_typed::<T>(value) {
        Ok(typed) => convert(&typed, place.clone()),
        Err(errors) => Err(errors),
    }
    .map_err(|errors| errors.into_iter().map(about).collect());
    Ok(Document { kind, object, place: place.clone(), item })
}

/// A typed value; unknown fields and type errors come with their path.
fn decode_typed<T: DeserializeOwned>(value: Value) -> Result<T, Vec<FieldError>> {
    let mut unknown = Vec::new();
    let mut track = serde_path_to_error::Track::new();
    let tracked = serde_path_to_error::Deserializer::new(value, &mut track);
    let mut note = |path: serde_ignored::Path<'_>| {
        unknown.push(FieldError { field: pretty_path(&path), message: "unknown field".into() });
    };
    let result = T::deserialize(serde_ignored::Deserializer::new(tracked, &mut note));
    match result {
        Err(error) => {
            unknown.push(FieldError { field: track.path().to_string(), message: error.to_string() });
            Err(unknown)
        }
        Ok(_) if !unknown.is_empty() => Err(unknown),
        Ok(typed) => Ok(typed),
    }
}

/// `spec.ports[0].prot`, in the notation of `serde_path_to_error`. Optional fields in between are
/// `?` to `serde_ignored`, and nothing to people.
fn pretty_path(path: &serde_ignored::Path<'_>) -> String {
    use serde_ignored::Path;
    let join = |parent: &Path<'_>, segment: &str| match pretty_path(parent) {
        parent if parent.is_empty() => segment.to_owned(),
        parent => format!("{parent}.{segment}"),
    };
    match path {
        Path::Root => String::new(),
        Path::Map { parent, key } => join(parent, key),
        Path::Seq { parent, index } => format!("{}[{index}]", pretty_path(parent)),
        Path::Some { parent } | Path::NewtypeStruct { parent } | Path::NewtypeVariant { parent } => {
            pretty_path(parent)
        }
    }
}

#[cfg(test)]
mod tests;
