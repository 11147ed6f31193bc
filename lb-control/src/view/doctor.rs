//! What `pointsman doctor` found on this node.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Everything that was looked at, the worst first.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DoctorView {
    /// One element for each thing that was looked at.
    pub findings: Vec<FindingView>,
}

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// As it should be.
    Ok,
    /// Nothing is wrong; good to know.
    Note,
    /// Something works less well than it could, or stops working under circumstances that it names.
    Warning,
    /// Services are not served, or not as they should be.
    Error,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FindingView {
    /// How bad it is.
    pub severity: Severity,
    /// What was looked at, by a name that stays: `rp-filter`, `xdp-native`.
    pub check: String,
    /// The device, the setting or the capability that it is about; empty if it is the whole node.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub subject: String,
    /// What was found, and what follows from it.
    pub message: String,
    /// What to do; absent where nothing needs to be done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

impl FindingView {
    /// A finding with nothing to do about it, about the whole node.
    #[must_use]
    pub fn new(severity: Severity, check: &str, message: impl Into<String>) -> Self {
        Self {
            severity,
            check: check.to_owned(),
            subject: String::new(),
            message: message.into(),
            remedy: None,
        }
    }

    /// The same about something.
    #[must_use]
    pub fn about(self, subject: impl Into<String>) -> Self {
        Self { subject: subject.into(), ..self }
    }

    /// The same with what to do.
    #[must_use]
    pub fn remedy(self, remedy: impl Into<String>) -> Self {
        Self { remedy: Some(remedy.into()), ..self }
    }
}

impl DoctorView {
    /// The findings, the worst first, otherwise in the order in which they were made.
    #[must_use]
    pub fn new(mut findings: Vec<FindingView>) -> Self {
        findings.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
        Self { findings }
    }

    /// Whether something keeps Services from being served.
    #[must_use]
    pub fn has_errors(&self) -> bool {
        self.count(Severity::Error) > 0
    }

    /// How many findings are so bad.
    #[must_use]
    pub fn count(&self, severity: Severity) -> usize {
        self.findings.iter().filter(|finding| finding.severity == severity).count()
    }
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ok => "ok",
            Self::Note => "note",
            Self::Warning => "warning",
            Self::Error => "error",
        })
    }
}
