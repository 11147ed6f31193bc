//! Reading objects: one, or a list, whole or page by page, of now or of an earlier time.

use std::sync::Arc;

use serde::{Serialize, Serializer, ser::SerializeMap};
use serde_json::{Value, json};

use super::{
    call::Call,
    failure::{Cause, Failure, Outcome},
    kinds::Kind,
    selector::Selector,
    store::{Object, Store},
    versions,
};

/// A list, ready to be sent.
#[derive(Debug)]
pub struct List {
    /// Of what.
    pub kind: Arc<Kind>,
    /// When.
    pub revision: u64,
    /// Where the next page begins.
    pub next: Option<String>,
    /// How many are left after this page, where that is known.
    pub remaining: Option<usize>,
    /// What.
    pub items: Vec<Object>,
}

/// One object of a list. Those of built-in kinds come without `apiVersion` and `kind`, as Kubernetes
/// sends them; clients that rely on them would be found out.
struct Item<'a>(&'a Kind, &'a Value);

impl Serialize for Item<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let object = versions::served(self.0, self.1);
        let Some(fields) = object.as_object() else { return object.serialize(serializer) };
        let mut map = serializer.serialize_map(None)?;
        for (field, value) in fields {
            if self.0.custom.is_some() || !matches!(field.as_str(), "apiVersion" | "kind") {
                map.serialize_entry(field, value)?;
            }
        }
        map.end()
    }
}

impl Serialize for List {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut metadata = json!({ "resourceVersion": self.revision.to_string() });
        if let Some(next) = &self.next {
            metadata["continue"] = next.clone().into();
        }
        if let Some(remaining) = self.remaining {
            metadata["remainingItemCount"] = remaining.into();
        }
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("kind", &self.kind.list_kind)?;
        map.serialize_entry("apiVersion", &self.kind.api_version())?;
        map.serialize_entry("metadata", &metadata)?;
        let items: Vec<Item<'_>> = self.items.iter().map(|object| Item(&self.kind, object)).collect();
        map.serialize_entry("items", &items)?;
        map.end()
    }
}

/// One object, in the version that is asked for.
///
/// # Errors
/// When it is not there.
pub fn get(store: &Store, kind: &Kind, call: &Call) -> Outcome<Value> {
    let key = (call.namespace.clone(), call.name.clone());
    let object = store
        .get(&kind.storage, &key)
        .ok_or_else(|| Failure::not_found(&kind.group, &kind.plural, &call.name))?;
    let asked = call.query.number("resourceVersion")?.unwrap_or_default();
    if asked > store.revision() {
        return Err(Failure::too_large_version(asked, store.revision()));
    }
    Ok(versions::served(kind, &object).into_owned())
}

/// What a list or watch is limited to.
///
/// # Errors
/// When a selector is malformed.
pub fn selector(kind: &Kind, call: &Call) -> Outcome<Selector> {
    Selector::parse(call.query.get("labelSelector"), call.query.get("fieldSelector"), kind.custom.is_some())
}

/// The namespace that a list or watch is limited to.
#[must_use]
pub fn namespace(call: &Call) -> Option<&str> {
    (!call.namespace.is_empty()).then_some(call.namespace.as_str())
}

/// A resource version that is none.
pub fn bad_version(text: &str) -> Failure {
    Failure::bad_request(format!(
        "invalid resource version: resourceVersion: Invalid value: {text:?}: strconv.ParseUint: parsing \
         {text:?}: invalid syntax"
    ))
}

/// An error in the parameters of a list or watch.
pub fn bad_options(cause: Cause) -> Failure {
    Failure::invalid("meta.k8s.io", "ListOptions", "", &[cause])
}

/// A list.
///
/// # Errors
/// When a parameter is malformed, or the time that is asked for is forgotten or has not come.
pub fn list(store: &mut Store, kind: &Arc<Kind>, call: &Call) -> Outcome<List> {
    let selector = selector(kind, call)?;
    let limit = usize::try_from(call.query.number("limit")?.unwrap_or_default()).unwrap_or(usize::MAX);
    let next = call.query.get("continue");
    check_match(call, next)?;
    let (revision, matching, skip) = if next.is_empty() {
        let (revision, all) = whole(store, kind, call, limit)?;
        (revision, all.into_iter().filter(|object| selector.matches(object)).collect(), 0)
    } else {
        let (revision, skip) = token(next)?;
        let page = store.page(&kind.storage, revision).ok_or_else(|| {
            Failure::expired(
                "The provided continue parameter is too old to display a consistent list result. You must \
                 start a new list without the continue parameter.",
            )
        })?;
        (revision, page.to_vec(), skip)
    };
    let total = matching.len();
    let take = if limit == 0 { total } else { limit };
    let items: Vec<Object> = matching.iter().skip(skip).take(take).cloned().collect();
    let after = skip + items.len();
    let mut page = List { kind: kind.clone(), revision, next: None, remaining: None, items };
    if after < total {
        if next.is_empty() {
            store.keep_page(&kind.storage, revision, matching);
        }
        page.next = Some(format!("{revision}.{after}"));
        let selects =
            ["labelSelector", "fieldSelector"].iter().any(|field| !call.query.get(field).is_empty());
        page.remaining = (!selects).then_some(total - after);
    }
    Ok(page)
}

/// All objects at the time that a list asks for, and that time.
fn whole(store: &Store, kind: &Kind, call: &Call, limit: usize) -> Outcome<(u64, Vec<Object>)> {
    let asked: u64 = match call.query.get("resourceVersion") {
        "" => 0,
        text => text.parse().map_err(|_| bad_version(text))?,
    };
    let matching = call.query.get("resourceVersionMatch");
    // Without a match, a limit makes it exact, for reasons of history.
    let exact = asked > 0 && (matching == "Exact" || (matching.is_empty() && limit > 0));
    if asked > store.revision() {
        return Err(Failure::too_large_version(asked, store.revision()));
    }
    if !exact {
        return Ok((store.revision(), store.list(&kind.storage, namespace(call))));
    }
    let all = store
        .list_at(&kind.storage, namespace(call), asked)
        .map_err(|_| Failure::expired("The resourceVersion for the provided list is too old."))?;
    Ok((asked, all))
}

fn check_match(call: &Call, next: &str) -> Outcome<()> {
    let (version, matching) = (call.query.get("resourceVersion"), call.query.get("resourceVersionMatch"));
    let field = "resourceVersionMatch";
    if !next.is_empty() && !matching.is_empty() {
        return Err(bad_options(Cause::forbidden(
            field,
            "resourceVersionMatch is forbidden when continue is provided",
        )));
    }
    if !next.is_empty() && !version.is_empty() && version != "0" {
        return Err(Failure::bad_request("specifying resource version is not allowed when using continue"));
    }
    match matching {
        "" => Ok(()),
        "Exact" | "NotOlderThan" if version.is_empty() => {
            let why = "resourceVersionMatch is forbidden unless resourceVersion is provided";
            Err(bad_options(Cause::forbidden(field, why)))
        }
        "Exact" if version == "0" => {
            let why = "resourceVersionMatch \"exact\" is forbidden for resourceVersion \"0\"";
            Err(bad_options(Cause::forbidden(field, why)))
        }
        "Exact" | "NotOlderThan" => Ok(()),
        other => {
            let supported = ["Exact", "NotOlderThan", ""];
            Err(bad_options(Cause::unsupported(field, &other.into(), &supported)))
        }
    }
}

/// Revision and number of objects before the page.
fn token(text: &str) -> Outcome<(u64, usize)> {
    let parts =
        text.split_once('.').and_then(|(revision, skip)| Some((revision.parse().ok()?, skip.parse().ok()?)));
    parts.ok_or_else(|| Failure::bad_request("continue key is not valid"))
}
