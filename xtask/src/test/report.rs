//! What the terminal shows.

use std::time::Duration;

use super::discover::Test;
use super::outcome::{Outcome, Summary};

/// One line per test, e.g. `PASS    0.01s  tests::e2e::tcp::echo`.
pub fn line(test: &Test, outcome: &Outcome, took: Duration) -> String {
    named_line(&test.path(), outcome, took)
}

/// The same for what is no test of ours by itself.
pub fn named_line(path: &str, outcome: &Outcome, took: Duration) -> String {
    let (word, reason) = match outcome {
        Outcome::Passed => ("PASS", ""),
        Outcome::Failed(reason) => ("FAIL", reason.as_str()),
        Outcome::Skipped(reason) => ("SKIP", reason.as_str()),
    };
    let separator = if reason.is_empty() { "" } else { ": " };
    format!("{word} {:7.2}s  {path}{separator}{reason}", took.as_secs_f64())
}

/// The output of a failed test, framed so that it can be found in a long log.
pub fn failure(test: &Test, output: &str) -> String {
    let path = test.path();
    format!("--- output of {path}\n{}\n--- end of {path}", output.trim_end())
}

/// `N passed, N failed, N skipped`.
pub fn closing_line(summary: &Summary) -> String {
    format!("{} passed, {} failed, {} skipped", summary.passed, summary.failed, summary.skipped)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_closing_line_is_plain() {
        let summary = Summary { passed: 12, failed: 1, skipped: 0 };
        assert_eq!(closing_line(&summary), "12 passed, 1 failed, 0 skipped");
    }
}
