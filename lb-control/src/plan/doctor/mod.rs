//! What is wrong with a node, judged by facts that were collected elsewhere.
//!
//! Facts say what was tried and what was read; a version of the kernel is shown, never relied on.

mod device;
mod facts;
mod host;
mod setting;
#[cfg(test)]
mod tests;
mod trial;

pub use facts::{
    Ability, Attached, BpfFs, Capability, Device, Facts, KubeProxy, Outcome, Process, Program, Role, Trial,
};
pub use setting::keys;

use crate::view::{DoctorView, FindingView, Severity};

/// Judges a node.
#[must_use]
pub fn diagnose(facts: &Facts) -> DoctorView {
    let mut findings = Vec::new();
    host::judge(facts, &mut findings);
    trial::judge(facts, &mut findings);
    device::judge(facts, &mut findings);
    setting::judge(facts, &mut findings);
    DoctorView::new(findings)
}

/// Shorthands for the judges.
fn ok(check: &str, message: impl Into<String>) -> FindingView {
    FindingView::new(Severity::Ok, check, message)
}

fn note(check: &str, message: impl Into<String>) -> FindingView {
    FindingView::new(Severity::Note, check, message)
}

fn warning(check: &str, message: impl Into<String>) -> FindingView {
    FindingView::new(Severity::Warning, check, message)
}

fn error(check: &str, message: impl Into<String>) -> FindingView {
    FindingView::new(Severity::Error, check, message)
}
