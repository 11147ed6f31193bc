//! A request, read: what `RequestInfo` is in `k8s.io/apiserver/pkg/endpoints/request`.

use std::collections::BTreeMap;

use hyper::{HeaderMap, Method, Uri, body::Bytes, header};
use serde::Serialize;
use serde_json::Value;

use super::failure::{Failure, Outcome};

/// A request for objects.
#[derive(Clone, Debug)]
pub struct Call {
    /// What is to be done.
    pub verb: Verb,
    /// Empty for the core group.
    pub group: String,
    /// E.g. `v1`.
    pub version: String,
    /// E.g. `services`.
    pub plural: String,
    /// Empty for cluster-scoped objects and for all namespaces.
    pub namespace: String,
    /// Empty for lists.
    pub name: String,
    /// E.g. `status`; empty for the object itself.
    pub subresource: String,
    /// Parameters.
    pub query: Query,
    /// What was sent.
    pub body: Bytes,
    /// `Content-Type` without its parameters.
    pub content_type: String,
    /// `Accept`.
    pub accept: String,
    /// `User-Agent`.
    pub user_agent: String,
}

/// A verb, as RBAC names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs, reason = "each is the word")]
pub enum Verb {
    Get,
    List,
    Watch,
    Create,
    Update,
    Patch,
    Delete,
    DeleteCollection,
}

impl Verb {
    /// The word.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Get => "get",
            Self::List => "list",
            Self::Watch => "watch",
            Self::Create => "create",
            Self::Update => "update",
            Self::Patch => "patch",
            Self::Delete => "delete",
            Self::DeleteCollection => "deletecollection",
        }
    }

    /// Whether it is meant to change something.
    #[must_use]
    pub fn writes(self) -> bool {
        !matches!(self, Self::Get | Self::List | Self::Watch)
    }
}

/// The parameters after the question mark.
#[derive(Clone, Debug, Default)]
pub struct Query(BTreeMap<String, String>);

impl Query {
    /// Reads `a=b&c=d`.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let pairs = text.split('&').filter(|pair| !pair.is_empty()).map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            (decode(&key.replace('+', " ")), decode(&value.replace('+', " ")))
        });
        Self(pairs.collect())
    }

    /// A parameter; the empty string when it is not there.
    #[must_use]
    pub fn get(&self, key: &str) -> &str {
        self.0.get(key).map_or("", String::as_str)
    }

    /// Whether a parameter is `true` (or `1`).
    #[must_use]
    pub fn is(&self, key: &str) -> bool {
        matches!(self.get(key), "true" | "1")
    }

    /// A number; `None` when it is not there.
    ///
    /// # Errors
    /// When it is no number.
    pub fn number(&self, key: &str) -> Outcome<Option<u64>> {
        match self.get(key) {
            "" => Ok(None),
            text => text
                .parse()
                .map(Some)
                .map_err(|_| Failure::bad_request(format!("{key}: Invalid value: {text:?}: not a number"))),
        }
    }
}

/// Undoes `%41`.
fn decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let (mut out, mut at) = (Vec::with_capacity(bytes.len()), 0);
    while at < bytes.len() {
        let code = bytes.get(at + 1..at + 3).and_then(|hex| std::str::from_utf8(hex).ok());
        match (bytes[at], code.and_then(|hex| u8::from_str_radix(hex, 16).ok())) {
            (b'%', Some(byte)) => {
                out.push(byte);
                at += 3;
            }
            (byte, _) => {
                out.push(byte);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

impl Call {
    /// Reads a request; `None` when its path is none of objects.
    ///
    /// # Errors
    /// When the method does not fit the path.
    pub fn parse(method: &Method, uri: &Uri, headers: &HeaderMap, body: Bytes) -> Outcome<Option<Self>> {
        let steps: Vec<String> = uri.path().split('/').filter(|step| !step.is_empty()).map(decode).collect();
        let steps: Vec<&str> = steps.iter().map(String::as_str).collect();
        let (group, version, rest) = match steps.as_slice() {
            ["api", version, rest @ ..] => ("", *version, rest),
            ["apis", group, version, rest @ ..] => (*group, *version, rest),
            _ => return Ok(None),
        };
        // `namespaces/x` and `namespaces/x/status` are the namespace itself.
        let (namespace, rest) = match rest {
            ["namespaces", _, "status" | "finalize"] => ("", rest),
            ["namespaces", namespace, rest @ ..] if !rest.is_empty() => (*namespace, rest),
            _ => ("", rest),
        };
        let (plural, name, subresource) = match rest {
            [plural] => (*plural, "", ""),
            [plural, name] => (*plural, *name, ""),
            [plural, name, subresource] => (*plural, *name, *subresource),
            _ => return Ok(None),
        };
        let query = Query::parse(uri.query().unwrap_or_default());
        let header = |name: header::HeaderName| {
            headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
        };
        let content_type = header(header::CONTENT_TYPE).split(';').next().unwrap_or_default().trim();
        Ok(Some(Self {
            verb: verb(method, name, &query)?,
            group: group.to_owned(),
            version: version.to_owned(),
            plural: plural.to_owned(),
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            subresource: subresource.to_owned(),
            content_type: content_type.to_owned(),
            accept: header(header::ACCEPT).to_owned(),
            user_agent: header(header::USER_AGENT).to_owned(),
            query,
            body,
        }))
    }

    /// The body as an object: JSON, or YAML where that is allowed.
    ///
    /// # Errors
    /// When it is neither.
    pub fn object(&self) -> Outcome<Value> {
        if self.content_type.contains("protobuf") || self.content_type.contains("cbor") {
            // kubectl's commands that take no file send it: `kubectl create namespace`.
            return Err(Failure::unsupported_media(&self.content_type));
        }
        if self.content_type.ends_with("yaml") {
            let text = String::from_utf8_lossy(&self.body);
            return serde_saphyr::from_str(&text)
                .map_err(|error| Failure::bad_request(format!("error converting YAML to JSON: {error}")));
        }
        serde_json::from_slice(&self.body)
            .map_err(|error| Failure::bad_request(format!("the object provided is unrecognized: {error}")))
    }

    /// Who is written down as the manager of what is changed: the parameter `fieldManager`, or the
    /// first part of the user agent, as Kubernetes does.
    #[must_use]
    pub fn manager(&self) -> String {
        match self.query.get("fieldManager") {
            "" => {
                let name = self.user_agent.split(['/', ' ']).next().unwrap_or_default();
                if name.is_empty() { "unknown".to_owned() } else { name.chars().take(128).collect() }
            }
            manager => manager.to_owned(),
        }
    }
}

fn verb(method: &Method, name: &str, query: &Query) -> Outcome<Verb> {
    match (method.as_str(), name.is_empty()) {
        ("GET", _) if query.is("watch") => Ok(Verb::Watch),
        ("GET", true) => Ok(Verb::List),
        ("GET", false) => Ok(Verb::Get),
        ("POST", _) => Ok(Verb::Create),
        ("PUT", false) => Ok(Verb::Update),
        ("PATCH", false) => Ok(Verb::Patch),
        ("DELETE", true) => Ok(Verb::DeleteCollection),
        ("DELETE", false) => Ok(Verb::Delete),
        _ => Err(Failure::method_not_allowed()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(method: &Method, uri: &str) -> Option<Call> {
        Call::parse(method, &uri.parse().unwrap(), &HeaderMap::new(), Bytes::new()).unwrap()
    }

    #[test]
    fn paths_are_read() {
        let cases = [
            (Method::GET, "/api/v1/services", "list  v1 services / "),
            (Method::GET, "/api/v1/services?watch=1", "watch  v1 services / "),
            (Method::GET, "/api/v1/namespaces/a/services/b", "get  v1 services a/b "),
            (Method::PATCH, "/api/v1/namespaces/a/services/b/status", "patch  v1 services a/b status"),
            (Method::GET, "/api/v1/namespaces", "list  v1 namespaces / "),
            (Method::DELETE, "/api/v1/namespaces/a", "delete  v1 namespaces /a "),
            (Method::PUT, "/api/v1/namespaces/a/status", "update  v1 namespaces /a status"),
            (Method::POST, "/apis/g.io/v1/things", "create g.io v1 things / "),
            (Method::DELETE, "/apis/g.io/v1/namespaces/n/things", "deletecollection g.io v1 things n/ "),
            (Method::GET, "/apis/g.io/v1/things/a%3Ab", "get g.io v1 things /a:b "),
        ];
        for (method, uri, expected) in cases {
            let call = call(&method, uri).unwrap();
            let Call { verb, group, version, plural, namespace, name, subresource, .. } = call;
            let verb = verb.as_str();
            let read = format!("{verb} {group} {version} {plural} {namespace}/{name} {subresource}");
            assert_eq!(read, expected, "{uri}");
        }
        for uri in ["/", "/version", "/api", "/api/v1", "/apis", "/apis/g.io", "/apis/g.io/v1"] {
            assert!(call(&Method::GET, uri).is_none(), "{uri}");
        }
    }

    #[test]
    fn parameters_are_decoded() {
        let query = Query::parse("labelSelector=a%3Db%2Cc+in+%28d%29&limit=5&watch");
        assert_eq!(query.get("labelSelector"), "a=b,c in (d)");
        assert_eq!((query.number("limit").unwrap(), query.number("x").unwrap()), (Some(5), None));
        assert!(!query.is("watch") && Query::parse("limit=x").number("limit").is_err());
    }
}
