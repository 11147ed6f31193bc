//! Parts of the schemas that attributes cannot say: limits, list types and CEL rules.
//!
//! The API server estimates what a CEL rule can cost from the limits (`maxItems`, `maxLength`) and
//! refuses a definition above its budget (KEP-2876), so everything that a rule runs over has one.
//! Only functions that Kubernetes 1.25 has are used, the first where CEL is on by default: a
//! definition with a function that is not known is refused as a whole, which rules out `ip()` and
//! `cidr()` (1.30).

use schemars::{Schema, SchemaGenerator, json_schema};
use serde_json::{Value, json};

/// The longest text of a range: two IPv6 addresses, a dash, a blank on either side.
const RANGE_LENGTH: usize = 39 + 3 + 39;
/// Ranges of a pool.
pub const MAX_RANGES: usize = 64;
/// Names and selectors of a pool.
pub const MAX_SELECTORS: usize = 64;
/// Services that share an address.
pub const MAX_SERVICES: usize = 256;

const OCTET: &str = "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])";

const BITS_V4: &str = "(3[0-2]|[12]?[0-9])";
const BITS_V6: &str = "(12[0-8]|1[01][0-9]|[1-9]?[0-9])";

fn v4() -> String {
    format!("({OCTET}[.]){{3}}{OCTET}")
}

/// IPv6 as in RFC 4291, 2.2, forms 1 and 2. Form 3, with an IPv4 address at the end, is left out:
/// nobody writes pools so, and Kubernetes refuses IPv4-mapped addresses elsewhere.
fn v6() -> String {
    let hex = "[0-9a-fA-F]{1,4}";
    let mut forms = vec![format!("({hex}:){{7}}{hex}"), format!("({hex}:){{1,7}}:")];
    // `before` groups, `::`, up to 7 - `before` groups: together at most 7.
    forms.extend((1..=6).map(|before| format!("({hex}:){{1,{before}}}(:{hex}){{1,{}}}", 7 - before)));
    forms.push(format!(":((:{hex}){{1,7}}|:)"));
    format!("({})", forms.join("|"))
}

fn rule(rule: String, message: &str) -> Value {
    json!({ "rule": rule, "message": message })
}

/// What the API server checks of one range.
fn range_rules() -> [Value; 3] {
    let (v4, v6) = (v4(), v6());
    let number = |at: usize| {
        let octets = (0..4).map(|octet| format!("n[{}] * {}", at + octet, 1 << (24 - 8 * octet)));
        octets.collect::<Vec<_>>().join(" + ")
    };
    // CEL has no powers; element n is the number of addresses in a network of n bits.
    let sizes = (0..=32).map(|bits| (1_u64 << (32 - bits)).to_string()).collect::<Vec<_>>().join(", ");
    // All numbers of a text as one list: lists in lists exceed the budget. A list of that one
    // element and `all` give it a name; `cel.bind` came later.
    [
        rule(
            format!("self.matches('^({v4}(/{BITS_V4}| *- *{v4})|{v6}(/{BITS_V6}| *- *{v6}))$')"),
            "must be a CIDR (192.0.2.0/24, 2001:db8::/120) or the first and the last address of a range \
             (192.0.2.10-192.0.2.20)",
        ),
        rule(
            format!(
                "!self.matches('^{v4}/{BITS_V4}$') || \
                 [self.replace('/', '.').split('.').map(x, int(x))].all(n, ({}) % [{sizes}][n[4]] == 0)",
                number(0)
            ),
            "has host bits set: a CIDR begins with the first address of its network (192.0.2.0/24)",
        ),
        rule(
            format!(
                "!self.matches('^{v4} *- *{v4}$') || \
                 [self.replace(' ', '').replace('-', '.').split('.').map(x, int(x))].all(n, {} <= {})",
                number(0),
                number(4)
            ),
            "ends before it begins: write FIRST-LAST",
        ),
    ]
}

/// The addresses of a pool. That ranges do not overlap is the agent's to check: comparing all with
/// all is beyond the budget.
pub fn addresses(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "minItems": 1,
        "maxItems": MAX_RANGES,
        "x-kubernetes-list-type": "atomic",
        "items": {
            "type": "string",
            "minLength": 1,
            "maxLength": RANGE_LENGTH,
            "x-kubernetes-validations": range_rules(),
        },
    })
}

/// Names of namespaces.
pub fn namespaces(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "maxItems": MAX_SELECTORS,
        "x-kubernetes-list-type": "set",
        "items": { "type": "string", "minLength": 1, "maxLength": 63, "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$" },
    })
}

/// The address of a VirtualIP. Another address has another name, so it never changes.
pub fn address(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "string",
        "minLength": 2,
        "maxLength": 39,
        "x-kubernetes-validations": [
            rule(format!("self.matches('^({}|{})$')", v4(), v6()), "must be an IPv4 or IPv6 address"),
            rule("self == oldSelf".into(), "cannot be changed: a VirtualIP is created for one address"),
        ],
    })
}
