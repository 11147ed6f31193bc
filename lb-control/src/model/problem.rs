//! What is wrong, said so that it can be mended.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{ObjectRef, Place};

/// How bad a problem is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// What was asked for is done, but not quite as somebody may expect.
    Warning,
    /// What was asked for is not done.
    Error,
}

/// A problem with the file, object and field that it is about, as far as there are such.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Problem {
    /// How bad it is.
    pub severity: Severity,
    /// Where the object was written down.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub place: Option<Place>,
    /// Kind of the object.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub kind: String,
    /// The object.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub object: Option<ObjectRef>,
    /// Path of the field, as in `spec.ports[0].port`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
    /// What is wrong and what to do about it.
    pub message: String,
}

impl Problem {
    /// An error about nothing in particular yet; see the `with_` functions.
    pub fn error(message: impl Into<String>) -> Self {
        Self {
            severity: Severity::Error,
            place: None,
            kind: String::new(),
            object: None,
            field: None,
            message: message.into(),
        }
    }

    /// A warning.
    pub fn warning(message: impl Into<String>) -> Self {
        Self { severity: Severity::Warning, ..Self::error(message) }
    }

    /// Adds where the object was written down.
    #[must_use]
    pub fn at(mut self, place: &Place) -> Self {
        self.place = Some(place.clone());
        self
    }

    /// Adds the object.
    #[must_use]
    pub fn about(mut self, kind: &str, object: &ObjectRef) -> Self {
        kind.clone_into(&mut self.kind);
        self.object = Some(object.clone());
        self
    }

    /// Adds the path of the field.
    #[must_use]
    pub fn field(mut self, path: impl Into<String>) -> Self {
        self.field = Some(path.into());
        self
    }
}

impl fmt::Display for Problem {
    /// `web.yaml: document 2 (line 14): Service default/web: spec.ports[0].port: too large`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(place) = &self.place {
            write!(f, "{place}: ")?;
        }
        if let Some(object) = &self.object {
            write!(f, "{} {object}: ", self.kind)?;
        }
        if let Some(field) = &self.field {
            write!(f, "{field}: ")?;
        }
        f.write_str(&self.message)
    }
}

/// An error with its causes, each once: outer errors tend to repeat the inner ones.
#[must_use]
pub fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        let cause = error.to_string();
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
        next = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_are_told_once_each() {
        let inner = std::io::Error::other("refused");
        let outer = std::io::Error::other(std::io::Error::new(std::io::ErrorKind::NotFound, inner));
        assert_eq!(causes(&outer), "refused");
        let parse = "x".parse::<u8>().unwrap_err();
        assert_eq!(causes(&parse), "invalid digit found in string");
    }
}
