//! `x-kubernetes-validations`: rules in the Common Expression Language.

use std::{
    collections::HashMap,
    sync::{Arc, LazyLock},
};

use cel::{Context, Env, Program, Value as Cel, objects::Key};
use serde_json::Value;

use super::failure::Cause;

/// The language with the string functions that Kubernetes adds.
static LANGUAGE: LazyLock<Arc<Env>> = LazyLock::new(|| {
    let mut language = Env::stdlib();
    for extension in [cel::extensions::strings, cel::extensions::lists] {
        language.add_extension(extension).expect("an extension that does not clash");
    }
    Arc::new(language)
});

/// Compiles a rule.
///
/// # Errors
/// When it is no expression.
pub fn compile(rule: &str) -> Result<Program, String> {
    LANGUAGE.compile(rule).map_err(|error| format!("compilation failed: {error}"))
}

/// Whether a schema has rules, anywhere.
#[must_use]
pub fn has_any(schema: &Value) -> bool {
    let below = schema["properties"].as_object().into_iter().flatten().map(|(_, schema)| schema);
    schema.get("x-kubernetes-validations").is_some()
        || below.chain(schema.get("items")).chain(schema.get("additionalProperties")).any(has_any)
}

/// Checks the rules of a schema, and of all that is in it.
pub fn check(schema: &Value, old: Option<&Value>, value: &Value, path: &str, causes: &mut Vec<Cause>) {
    for rule in schema["x-kubernetes-validations"].as_array().into_iter().flatten() {
        check_one(rule, old, value, path, causes);
    }
    let inside = |name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                let known = schema["properties"].get(name);
                let known =
                    known.or_else(|| schema.get("additionalProperties").filter(|any| any.is_object()));
                if let Some(known) = known {
                    check(known, old.and_then(|old| old.get(name)), value, &inside(name), causes);
                }
            }
        }
        Value::Array(items) => {
            let keys: Vec<&str> = schema["x-kubernetes-list-map-keys"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(Value::as_str)
                .collect();
            for (at, item) in items.iter().enumerate() {
                // Only items of map lists are known to be the same as before.
                let same =
                    |other: &&Value| !keys.is_empty() && keys.iter().all(|key| other[*key] == item[*key]);
                let before = old.and_then(Value::as_array).and_then(|olds| olds.iter().find(same));
                check(&schema["items"], before, item, &format!("{path}[{at}]"), causes);
            }
        }
        _ => {}
    }
}

fn check_one(rule: &Value, old: Option<&Value>, value: &Value, path: &str, causes: &mut Vec<Cause>) {
    let text = rule["rule"].as_str().unwrap_or_default();
    // A rule about a change is for changes only.
    if text.contains("oldSelf") && old.is_none() {
        return;
    }
    let message = match holds(text, old, value) {
        Ok(true) => return,
        Ok(false) => {
            let given = rule["messageExpression"].as_str().and_then(|expression| {
                match evaluate(expression, old, value) {
                    Ok(Cel::String(text)) => Some(text.to_string()),
                    _ => None,
                }
            });
            given
                .or_else(|| rule["message"].as_str().map(|message| message.trim().to_owned()))
                .unwrap_or_else(|| format!("failed rule: {}", text.trim()))
        }
        Err(why) => format!("{why} evaluating rule: {}", text.trim()),
    };
    let (reason, prefix) = match rule["reason"].as_str() {
        Some("FieldValueForbidden") => ("FieldValueForbidden", "Forbidden"),
        Some("FieldValueRequired") => ("FieldValueRequired", "Required value"),
        Some("FieldValueDuplicate") => ("FieldValueDuplicate", "Duplicate value"),
        _ => ("FieldValueInvalid", "Invalid value"),
    };
    let field = format!("{path}{}", rule["fieldPath"].as_str().unwrap_or_default());
    let field = field.trim_start_matches('.');
    let field = if field.is_empty() { "<nil>".to_owned() } else { field.to_owned() };
    // Objects and lists are not shown.
    let scalar = !value.is_object() && !value.is_array() && prefix == "Invalid value";
    let shown = if scalar { format!("{prefix}: {value}: {message}") } else { format!("{prefix}: {message}") };
    causes.push(Cause { reason, field, message: shown });
}

fn holds(rule: &str, old: Option<&Value>, value: &Value) -> Result<bool, String> {
    match evaluate(rule, old, value)? {
        Cel::Bool(holds) => Ok(holds),
        other => Err(format!("a rule gave {other:?}")),
    }
}

fn evaluate(expression: &str, old: Option<&Value>, value: &Value) -> Result<Cel, String> {
    let program = compile(expression)?;
    let mut context = Context::with_env(LANGUAGE.clone());
    context.add_variable_from_value("self", convert(value));
    if let Some(old) = old {
        context.add_variable_from_value("oldSelf", convert(old));
    }
    program.execute(&context).map_err(|error| error.to_string())
}

fn convert(value: &Value) -> Cel {
    match value {
        Value::Null => Cel::Null,
        Value::Bool(truth) => Cel::Bool(*truth),
        Value::Number(number) => match number.as_i64() {
            Some(number) => Cel::Int(number),
            None => Cel::Float(number.as_f64().unwrap_or_default()),
        },
        Value::String(text) => Cel::String(Arc::new(text.clone())),
        Value::Array(items) => Cel::List(Arc::new(items.iter().map(convert).collect())),
        Value::Object(fields) => {
            let fields: HashMap<Key, Cel> =
                fields.iter().map(|(name, value)| (name.as_str().into(), convert(value))).collect();
            Cel::Map(fields.into())
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn rules_are_evaluated() {
        let cases = [
            ("self.a > 1", json!({ "a": 2 }), true),
            ("self.a > 1", json!({ "a": 1 }), false),
            ("has(self.b) ? self.b == 'x' : true", json!({}), true),
            ("!has(self.b) || self.b == 'x'", json!({ "b": "y" }), false),
            ("self.list.all(x, x.matches('^[0-9]+$'))", json!({ "list": ["1", "22"] }), true),
            ("self.list.exists(x, x.startsWith('a'))", json!({ "list": ["ba"] }), false),
            ("size(self.list) <= 2 && 'a' in self.list", json!({ "list": ["a"] }), true),
            ("self.map.all(key, self.map[key] < 3)", json!({ "map": { "a": 1, "b": 2 } }), true),
            ("'1.2.3'.split('.').map(x, int(x)).all(n, n < 4)", json!({}), true),
            (
                "[self.a.replace('/', '.').split('.').map(x, int(x))].all(n, n[0] * 256 + n[1] == 258)",
                json!({ "a": "1/2" }),
                true,
            ),
            ("self.a.lowerAscii() == 'x' && self.a.indexOf('X') == 0", json!({ "a": "X" }), true),
        ];
        for (rule, value, expected) in cases {
            assert_eq!(holds(rule, None, &value), Ok(expected), "{rule} of {value}");
        }
        assert!(compile("self.a >").is_err());
    }

    #[test]
    fn rules_about_changes_see_what_was() {
        let schema = json!({
            "properties": { "address": {
                "x-kubernetes-validations": [{ "rule": "self == oldSelf", "message": "may not change" }],
            } },
        });
        let said = |old: Option<&Value>, new: &Value| {
            let mut causes = Vec::new();
            check(&schema, old, new, "", &mut causes);
            causes.into_iter().map(|cause| format!("{}: {}", cause.field, cause.message)).collect::<Vec<_>>()
        };
        let (one, two) = (json!({ "address": "1" }), json!({ "address": "2" }));
        assert!(said(None, &one).is_empty() && said(Some(&one), &one).is_empty());
        assert_eq!(said(Some(&one), &two), ["address: Invalid value: \"2\": may not change"]);
        assert!(said(Some(&json!({})), &two).is_empty());
    }
}
