//! Label selectors.

use std::collections::BTreeMap;

/// Labels of an object.
pub type Labels = BTreeMap<String, String>;

/// A Kubernetes label selector. All of it must hold; the empty one selects everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selector {
    /// Labels that must have just these values.
    pub labels: Labels,
    /// Further requirements.
    pub requirements: Vec<Requirement>,
}

/// One requirement of a selector.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Requirement {
    /// Name of the label.
    pub key: String,
    /// What is asked of its value.
    pub operator: Operator,
}

/// What a requirement asks of a label's value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operator {
    /// It is one of these.
    In(Vec<String>),
    /// It is none of these, or the label is missing.
    NotIn(Vec<String>),
    /// The label is there.
    Exists,
    /// The label is not there.
    DoesNotExist,
}

impl Selector {
    /// Whether an object with these labels is selected.
    #[must_use]
    pub fn matches(&self, labels: &Labels) -> bool {
        self.labels.iter().all(|(key, value)| labels.get(key) == Some(value))
            && self.requirements.iter().all(|requirement| requirement.matches(labels))
    }
}

impl Requirement {
    fn matches(&self, labels: &Labels) -> bool {
        let value = labels.get(&self.key);
        match &self.operator {
            Operator::In(values) => value.is_some_and(|value| values.contains(value)),
            // As in apimachinery's labels.Requirement: an object without the label matches.
            Operator::NotIn(values) => value.is_none_or(|value| !values.contains(value)),
            Operator::Exists => value.is_some(),
            Operator::DoesNotExist => value.is_none(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selects_as_kubernetes_does() {
        let labels = Labels::from([("tier".into(), "edge".into())]);
        let one = |key: &str, operator| Selector {
            requirements: vec![Requirement { key: key.into(), operator }],
            ..Selector::default()
        };
        let values = |value: &str| vec![value.to_owned()];
        for (selector, expected) in [
            (Selector::default(), true),
            (Selector { labels: labels.clone(), ..Selector::default() }, true),
            (Selector { labels: Labels::from([("tier".into(), "x".into())]), ..Selector::default() }, false),
            (one("tier", Operator::In(values("edge"))), true),
            (one("tier", Operator::In(values("core"))), false),
            (one("zone", Operator::In(values("a"))), false),
            (one("tier", Operator::NotIn(values("edge"))), false),
            (one("zone", Operator::NotIn(values("a"))), true),
            (one("tier", Operator::Exists), true),
            (one("zone", Operator::Exists), false),
            (one("tier", Operator::DoesNotExist), false),
            (one("zone", Operator::DoesNotExist), true),
        ] {
            assert_eq!(selector.matches(&labels), expected, "{selector:?}");
        }
    }
}
