//! Structural schemas of custom kinds: what is pruned, what is filled in, what is refused.

use regex::Regex;
use serde_json::Value;

use super::{failure::Cause, rules};

/// Takes out what the schema does not know, and gives the paths of it.
pub fn prune(schema: &Value, object: &mut Value) -> Vec<String> {
    let mut gone = Vec::new();
    // These are every object's, whatever the schema says.
    let kept: Vec<(&str, Option<Value>)> = ["apiVersion", "kind", "metadata"]
        .into_iter()
        .map(|field| (field, object.as_object_mut().and_then(|fields| fields.remove(field))))
        .collect();
    prune_at(schema, object, "", &mut gone);
    for (field, value) in kept {
        if let Some(value) = value {
            object[field] = value;
        }
    }
    gone
}

fn prune_at(schema: &Value, value: &mut Value, path: &str, gone: &mut Vec<String>) {
    let inside = |name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
    match value {
        Value::Object(fields) => {
            let open = schema["x-kubernetes-preserve-unknown-fields"] == true;
            let others = schema.get("additionalProperties").filter(|any| **any != false);
            fields.retain(|name, value| {
                if let Some(known) = schema["properties"].get(name) {
                    prune_at(known, value, &inside(name), gone);
                } else if let Some(others) = others {
                    prune_at(others, value, &inside(name), gone);
                } else if !open {
                    gone.push(inside(name));
                    return false;
                }
                true
            });
        }
        Value::Array(items) => {
            for (at, item) in items.iter_mut().enumerate() {
                prune_at(&schema["items"], item, &format!("{path}[{at}]"), gone);
            }
        }
        _ => {}
    }
}

/// Fills in what is missing and has a default; what is null, has a default and may not be null, too.
pub fn set_defaults(schema: &Value, value: &mut Value) {
    match value {
        Value::Object(fields) => {
            for (name, known) in schema["properties"].as_object().into_iter().flatten() {
                let null_is_missing = known["nullable"] != true;
                let missing = fields.get(name).is_none_or(|value| value.is_null() && null_is_missing);
                match known.get("default") {
                    Some(default) if missing => drop(fields.insert(name.clone(), default.clone())),
                    _ => {}
                }
            }
            for (name, value) in fields.iter_mut() {
                let known = schema["properties"].get(name).or_else(|| schema.get("additionalProperties"));
                if let Some(known) = known {
                    set_defaults(known, value);
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| set_defaults(&schema["items"], item)),
        _ => {}
    }
}

/// What is wrong with an object; `old` is what it was before, for rules about changes.
#[must_use]
pub fn check(schema: &Value, old: Option<&Value>, object: &Value) -> Vec<Cause> {
    let mut causes = Vec::new();
    check_at(schema, object, "", &mut causes);
    if causes.is_empty() {
        // Rules may count on the types, so they come last.
        rules::check(schema, old, object, "", &mut causes);
    } else if rules::has_any(schema) {
        let why = "some validation rules were not checked because the object was invalid; correct the existing \
                   errors to complete validation";
        causes.push(Cause::invalid("<nil>", &Value::Null, why));
    }
    causes
}

/// The type of a value, as OpenAPI names it.
fn type_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.is_f64() => "number",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

fn has_type(schema: &Value, value: &Value) -> bool {
    if value.is_null() {
        return schema["nullable"] == true;
    }
    let given = type_of(value);
    if schema["x-kubernetes-int-or-string"] == true {
        return matches!(given, "integer" | "string");
    }
    match schema["type"].as_str() {
        None => true,
        Some("number") => matches!(given, "integer" | "number"),
        Some(wanted) => wanted == given,
    }
}

fn check_at(schema: &Value, value: &Value, path: &str, causes: &mut Vec<Cause>) {
    let field = || if path.is_empty() { "<nil>".to_owned() } else { path.to_owned() };
    if !has_type(schema, value) {
        let (wanted, given) = (schema["type"].as_str().unwrap_or("integer or string"), type_of(value));
        let shown = if value.is_string() { value.to_string() } else { format!("\"{given}\"") };
        let message = format!("Invalid value: \"{given}\": {path} in body must be of type {wanted}: {shown}");
        return causes.push(Cause { reason: "FieldValueTypeInvalid", field: field(), message });
    }
    if let Some(choices) = schema["enum"].as_array()
        && !choices.contains(value)
    {
        let choices: Vec<&str> = choices.iter().filter_map(Value::as_str).collect();
        causes.push(Cause::unsupported(field(), value, &choices));
    }
    match value {
        Value::String(text) => check_text(schema, text, path, causes),
        Value::Number(_) => check_number(schema, value, path, causes),
        Value::Array(items) => check_list(schema, items, path, causes),
        Value::Object(_) => check_object(schema, value, path, causes),
        _ => {}
    }
}

fn too(reason: &'static str, path: &str, message: String) -> Cause {
    Cause { reason, field: path.to_owned(), message }
}

fn check_text(schema: &Value, text: &str, path: &str, causes: &mut Vec<Cause>) {
    let length = text.chars().count() as u64;
    if let Some(most) = schema["maxLength"].as_u64().filter(|most| length > *most) {
        causes.push(too("FieldValueTooLong", path, format!("Too long: may not be more than {most} bytes")));
    }
    if let Some(least) = schema["minLength"].as_u64().filter(|least| length < *least) {
        let why = format!("{path} in body should be at least {least} chars long");
        causes.push(Cause::invalid(path, &text.into(), &why));
    }
    if let Some(pattern) = schema["pattern"].as_str() {
        let matches = Regex::new(pattern).is_ok_and(|pattern| pattern.is_match(text));
        if !matches {
            let why = format!("{path} in body should match '{pattern}'");
            causes.push(Cause::invalid(path, &text.into(), &why));
        }
    }
}

fn check_number(schema: &Value, value: &Value, path: &str, causes: &mut Vec<Cause>) {
    let Some(number) = value.as_f64() else { return };
    if let Some(least) = schema["minimum"].as_f64() {
        let strict = schema["exclusiveMinimum"] == true;
        if number < least || (strict && number <= least) {
            let words = if strict { "greater than" } else { "greater than or equal to" };
            let why = format!("{path} in body should be {words} {}", schema["minimum"]);
            causes.push(Cause::invalid(path, value, &why));
        }
    }
    if let Some(most) = schema["maximum"].as_f64() {
        let strict = schema["exclusiveMaximum"] == true;
        if number > most || (strict && number >= most) {
            let words = if strict { "less than" } else { "less than or equal to" };
            let why = format!("{path} in body should be {words} {}", schema["maximum"]);
            causes.push(Cause::invalid(path, value, &why));
        }
    }
    let bounds = match schema["format"].as_str() {
        Some("int32") if value.is_i64() || value.is_u64() => f64::from(i32::MIN)..=f64::from(i32::MAX),
        _ => return,
    };
    if !bounds.contains(&number) {
        let why = format!("{path} in body must be of type int32: {value}");
        causes.push(Cause::invalid(path, value, &why));
    }
}

fn check_list(schema: &Value, items: &[Value], path: &str, causes: &mut Vec<Cause>) {
    let length = items.len() as u64;
    if let Some(most) = schema["maxItems"].as_u64().filter(|most| length > *most) {
        let message = format!("Too many: {length}: must have at most {most} items");
        causes.push(too("FieldValueTooMany", path, message));
    }
    if let Some(least) = schema["minItems"].as_u64().filter(|least| length < *least) {
        let why = format!("{path} in body should have at least {least} items");
        causes.push(Cause::invalid(path, &length.into(), &why));
    }
    let keys: Vec<&str> = match schema["x-kubernetes-list-type"].as_str() {
        Some("map") => schema["x-kubernetes-list-map-keys"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect(),
        Some("set") => Vec::new(),
        _ => vec!["\0"],
    };
    let is_atomic = keys == ["\0"];
    let identity = |item: &Value| match keys.as_slice() {
        [] => item.clone(),
        keys => keys.iter().map(|key| item[*key].clone()).collect(),
    };
    for (at, item) in items.iter().enumerate() {
        let path = format!("{path}[{at}]");
        check_at(&schema["items"], item, &path, causes);
        if !is_atomic && items[..at].iter().any(|other| identity(other) == identity(item)) {
            let shown = match keys.as_slice() {
                [] => item.clone(),
                keys => keys.iter().map(|key| ((*key).to_owned(), item[*key].clone())).collect(),
            };
            causes.push(too("FieldValueDuplicate", &path, format!("Duplicate value: {shown}")));
        }
    }
}

fn check_object(schema: &Value, value: &Value, path: &str, causes: &mut Vec<Cause>) {
    let inside = |name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
    for name in schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        if value.get(name).is_none() {
            causes.push(Cause::required(inside(name), ""));
        }
    }
    let fields = value.as_object().into_iter().flatten();
    if let Some(most) = schema["maxProperties"].as_u64()
        && fields.clone().count() as u64 > most
    {
        let message = format!("Too many: {}: must have at most {most} items", fields.clone().count());
        causes.push(too("FieldValueTooMany", path, message));
    }
    for (name, value) in fields {
        // Metadata has its own rules.
        if path.is_empty() && name == "metadata" {
            continue;
        }
        let known = schema["properties"].get(name);
        let known = known.or_else(|| schema.get("additionalProperties").filter(|any| any.is_object()));
        if let Some(known) = known {
            check_at(known, value, &inside(name), causes);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn schema() -> Value {
        json!({
            "type": "object",
            "properties": { "spec": {
                "type": "object", "required": ["a"],
                "properties": {
                    "a": { "type": "string", "pattern": "^x", "maxLength": 3 },
                    "b": { "type": "integer", "minimum": 1, "maximum": 5, "default": 2 },
                    "c": { "type": "array", "maxItems": 2, "items": { "type": "string", "enum": ["x", "y"] },
                           "x-kubernetes-list-type": "set" },
                    "d": { "type": "object", "additionalProperties": { "type": "integer" } },
                    "e": { "type": "object", "x-kubernetes-preserve-unknown-fields": true },
                    "f": { "x-kubernetes-int-or-string": true },
                },
            } },
        })
    }

    #[test]
    fn the_wrong_is_refused() {
        let cases = [
            (json!({ "a": "x" }), None),
            (json!({}), Some("spec.a: Required value")),
            (
                json!({ "a": 1 }),
                Some("spec.a: Invalid value: \"integer\": spec.a in body must be of type string"),
            ),
            (json!({ "a": "y" }), Some("spec.a in body should match '^x'")),
            (json!({ "a": "xxxx" }), Some("Too long")),
            (json!({ "a": "x", "b": 0 }), Some("greater than or equal to 1")),
            (json!({ "a": "x", "b": 6 }), Some("less than or equal to 5")),
            (json!({ "a": "x", "b": 1.5 }), Some("must be of type integer")),
            (
                json!({ "a": "x", "c": ["x", "z"] }),
                Some("spec.c[1]: Unsupported value: \"z\": supported values: \"x\", \"y\""),
            ),
            (json!({ "a": "x", "c": ["x", "x"] }), Some("spec.c[1]: Duplicate value: \"x\"")),
            (json!({ "a": "x", "c": ["x", "y", "x"] }), Some("Too many: 3: must have at most 2 items")),
            (json!({ "a": "x", "d": { "k": "v" } }), Some("spec.d.k")),
            (json!({ "a": "x", "f": 1 }), None),
            (json!({ "a": "x", "f": true }), Some("spec.f")),
        ];
        for (spec, expected) in cases {
            let causes = check(&schema(), None, &json!({ "spec": spec }));
            let said: Vec<String> =
                causes.iter().map(|cause| format!("{}: {}", cause.field, cause.message)).collect();
            match expected {
                None => assert!(said.is_empty(), "{spec}: {said:?}"),
                Some(expected) => assert!(said.concat().contains(expected), "{spec}: {said:?}"),
            }
        }
    }

    #[test]
    fn the_unknown_goes_and_the_missing_comes() {
        let mut object = json!({
            "apiVersion": "g/v1", "metadata": { "x": 1 }, "other": 1,
            "spec": { "a": "x", "z": 1, "e": { "any": { "thing": 1 } }, "d": { "k": 1 } },
        });
        assert_eq!(prune(&schema(), &mut object), ["other", "spec.z"]);
        set_defaults(&schema(), &mut object);
        assert_eq!(
            object,
            json!({
                "apiVersion": "g/v1", "metadata": { "x": 1 },
                "spec": { "a": "x", "b": 2, "e": { "any": { "thing": 1 } }, "d": { "k": 1 } },
            })
        );
    }
}
