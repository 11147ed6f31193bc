//! Label selectors and field selectors of lists and watches.

use serde_json::Value;

use super::failure::{Failure, Outcome};

/// What a list or watch is limited to.
#[derive(Clone, Debug, Default)]
pub struct Selector {
    labels: Vec<Requirement>,
    fields: Vec<Requirement>,
}

/// One part of a selector.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Requirement {
    In(String, Vec<String>),
    NotIn(String, Vec<String>),
    Exists(String),
    Missing(String),
}

impl Requirement {
    fn holds(&self, value: impl Fn(&str) -> Option<String>) -> bool {
        match self {
            Self::In(key, values) => value(key).is_some_and(|value| values.contains(&value)),
            // An object without the label matches, too: `labels.Requirement.Matches`.
            Self::NotIn(key, values) => value(key).is_none_or(|value| !values.contains(&value)),
            Self::Exists(key) => value(key).is_some(),
            Self::Missing(key) => value(key).is_none(),
        }
    }
}

impl Selector {
    /// Reads the parameters `labelSelector` and `fieldSelector`.
    ///
    /// # Errors
    /// When one is malformed, or the field cannot be selected by.
    pub fn parse(labels: &str, fields: &str, custom: bool) -> Outcome<Self> {
        let labels = parse(labels)
            .map_err(|why| Failure::bad_request(format!("unable to parse requirement: {why}")))?;
        let fields =
            parse(fields).map_err(|why| Failure::bad_request(format!("invalid field selector: {why}")))?;
        for field in &fields {
            let (Requirement::In(key, _)
            | Requirement::NotIn(key, _)
            | Requirement::Exists(key)
            | Requirement::Missing(key)) = field;
            let known = ["metadata.name", "metadata.namespace"].contains(&key.as_str())
                || (!custom && SELECTABLE.contains(&key.as_str()));
            if !known {
                return Err(Failure::bad_request(format!("field label not supported: {key}")));
            }
        }
        Ok(Self { labels, fields })
    }

    /// Whether an object is selected.
    #[must_use]
    pub fn matches(&self, object: &Value) -> bool {
        let label = |key: &str| object["metadata"]["labels"][key].as_str().map(str::to_owned);
        self.labels.iter().all(|requirement| requirement.holds(label))
            && self.fields.iter().all(|requirement| requirement.holds(|key| Some(field(object, key))))
    }
}

/// Fields of built-in kinds by which they can be selected, beside name and namespace.
const SELECTABLE: [&str; 14] = [
    "spec.nodeName",
    "spec.type",
    "spec.clusterIP",
    "spec.unschedulable",
    "status.phase",
    "status.podIP",
    "type",
    "reason",
    "regarding.name",
    "regarding.kind",
    "involvedObject.name",
    "involvedObject.namespace",
    "involvedObject.kind",
    "involvedObject.uid",
];

/// A field that is not there is the empty string.
fn field(object: &Value, path: &str) -> String {
    let mut path = path.to_owned();
    // Events are stored as core/v1 has them.
    if let Some(rest) = path.strip_prefix("regarding.") {
        path = format!("involvedObject.{rest}");
    }
    let found = path.split('.').try_fold(object, |value, step| value.get(step));
    match found {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Null) | None => String::new(),
        Some(other) => other.to_string(),
    }
}

fn parse(text: &str) -> Result<Vec<Requirement>, String> {
    split(text).into_iter().map(|part| requirement(&part)).collect()
}

/// At commas that are not inside parentheses.
fn split(text: &str) -> Vec<String> {
    let (mut parts, mut part, mut depth) = (Vec::new(), String::new(), 0_u32);
    for character in text.chars() {
        match character {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            ',' if depth == 0 => {
                parts.push(std::mem::take(&mut part));
                continue;
            }
            _ => {}
        }
        part.push(character);
    }
    parts.push(part);
    parts.retain(|part| !part.trim().is_empty());
    parts
}

fn requirement(text: &str) -> Result<Requirement, String> {
    let text = text.trim();
    let owned = |text: &str| text.trim().to_owned();
    if let Some((key, value)) = text.split_once("!=") {
        return Ok(Requirement::NotIn(checked(key)?, vec![owned(value)]));
    }
    if let Some((key, value)) = text.split_once("==").or_else(|| text.split_once('=')) {
        return Ok(Requirement::In(checked(key)?, vec![owned(value)]));
    }
    if let Some((head, values)) = text.split_once('(') {
        let values = values.trim().strip_suffix(')').ok_or_else(|| format!("no ')' in {text:?}"))?;
        let values = values.split(',').map(owned).collect();
        let mut words = head.split_whitespace();
        let key = checked(words.next().unwrap_or_default())?;
        return match (words.next(), words.next()) {
            (Some("in"), None) => Ok(Requirement::In(key, values)),
            (Some("notin"), None) => Ok(Requirement::NotIn(key, values)),
            _ => Err(format!("found {head:?}, expected: in, notin")),
        };
    }
    match text.strip_prefix('!') {
        Some(key) => Ok(Requirement::Missing(checked(key)?)),
        None => Ok(Requirement::Exists(checked(text)?)),
    }
}

fn checked(key: &str) -> Result<String, String> {
    let key = key.trim();
    let good = |character: char| character.is_ascii_alphanumeric() || "-_./".contains(character);
    if key.is_empty() || !key.chars().all(good) {
        return Err(format!("{key:?} is no key"));
    }
    Ok(key.to_owned())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn selectors_select() {
        let object = json!({
            "metadata": { "name": "x", "namespace": "n", "labels": { "a": "1", "b/c": "" } },
            "spec": { "nodeName": "edge" },
        });
        let cases = [
            ("", "", true),
            ("a=1", "", true),
            ("a==1,b/c", "", true),
            ("a=2", "", false),
            ("a!=2", "", true),
            ("c!=2", "", true),
            ("a!=1", "", false),
            ("a in (1, 2)", "", true),
            ("a in (2,3),b/c", "", false),
            ("a notin (2,3)", "", true),
            ("d notin (2,3)", "", true),
            ("d in (2,3)", "", false),
            ("!d", "", true),
            ("!a", "", false),
            ("d", "", false),
            ("b/c=", "", true),
            ("", "metadata.name=x", true),
            ("", "metadata.name=y", false),
            ("", "metadata.name=x,metadata.namespace!=m", true),
            ("", "spec.nodeName=edge", true),
            ("", "spec.nodeName!=edge", false),
        ];
        for (labels, fields, expected) in cases {
            let selector = Selector::parse(labels, fields, false).unwrap();
            assert_eq!(selector.matches(&object), expected, "{labels} {fields}");
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for (labels, fields) in
            [("a in 1", ""), ("a in (1", ""), ("a of (1)", ""), ("=1", ""), ("", "spec.x=1")]
        {
            assert_eq!(Selector::parse(labels, fields, false).unwrap_err().code, 400, "{labels} {fields}");
        }
        assert!(Selector::parse("", "spec.nodeName=a", true).is_err());
    }
}
