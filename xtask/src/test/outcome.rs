//! What became of a test, judged from its exit status and its output.

/// A test that cannot run here prints a line that starts with this and gives the reason, then
/// returns.
const SKIP: &str = "SKIP: ";

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Passed,
    Failed(String),
    Skipped(String),
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    pub passed: usize,
    pub failed: usize,
    pub skipped: usize,
}

impl Summary {
    pub fn count(&mut self, outcome: &Outcome) {
        match outcome {
            Outcome::Passed => self.passed += 1,
            Outcome::Failed(_) => self.failed += 1,
            Outcome::Skipped(_) => self.skipped += 1,
        }
    }

    pub fn add(&mut self, other: &Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

/// `status` is `None` when the test was ended for taking too long.
pub fn judge(status: Option<std::process::ExitStatus>, output: &str) -> Outcome {
    match status {
        None => Outcome::Failed("timed out".into()),
        Some(status) if !status.success() => Outcome::Failed(status.to_string()),
        // A test that leaves by `exit(0)` reports nothing: that is no pass.
        Some(_) if !output.contains("test result: ok. 1 passed;") => {
            Outcome::Failed("ended without a result".into())
        }
        Some(_) => skip_reason(output).map_or(Outcome::Passed, Outcome::Skipped),
    }
}

fn skip_reason(output: &str) -> Option<String> {
    output.lines().find_map(|line| {
        // With a single CPU libtest writes the test's name first, on the same line.
        let line = match line.strip_prefix("test ") {
            Some(rest) => rest.split_once(" ... ").map_or(line, |(_, text)| text),
            None => line,
        };
        line.strip_prefix(SKIP).map(|reason| reason.trim().to_owned())
    })
}

/// Sums libtest's closing lines of a `cargo test --doc`.
pub fn doc_summary(output: &str) -> Summary {
    let mut summary = Summary::default();
    for line in output.lines().filter_map(|line| line.strip_prefix("test result: ")) {
        let counts = line.split_once(". ").map_or(line, |(_, counts)| counts);
        for (number, what) in counts.split("; ").filter_map(|part| part.split_once(' ')) {
            let number = number.parse().unwrap_or(0);
            match what {
                "passed" => summary.passed += number,
                "failed" => summary.failed += number,
                "ignored" => summary.skipped += number,
                _ => {}
            }
        }
    }
    summary
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;
    use std::process::ExitStatus;

    const OK: &str = "running 1 test\ntest a ... ok\n\ntest result: ok. 1 passed; 0 failed; 0 ignored\n";

    fn exit(code: i32) -> Option<ExitStatus> {
        Some(ExitStatus::from_raw(code << 8))
    }

    #[test]
    fn success_with_a_result_is_a_pass() {
        assert_eq!(judge(exit(0), OK), Outcome::Passed);
    }

    #[test]
    fn success_without_a_result_is_a_failure() {
        assert_eq!(judge(exit(0), "running 1 test\n"), Outcome::Failed("ended without a result".into()));
    }

    #[test]
    fn a_failure_is_one_whatever_the_output_says() {
        assert!(matches!(judge(exit(101), &format!("SKIP: no root\n{OK}")), Outcome::Failed(_)));
        assert!(matches!(judge(Some(ExitStatus::from_raw(9)), OK), Outcome::Failed(_)));
        assert_eq!(judge(None, OK), Outcome::Failed("timed out".into()));
    }

    #[test]
    fn a_skip_gives_its_reason_wherever_libtest_puts_it() {
        for line in ["SKIP: needs root", "test a::b ... SKIP: needs root"] {
            assert_eq!(judge(exit(0), &format!("{line}\n{OK}")), Outcome::Skipped("needs root".into()));
        }
        assert_eq!(judge(exit(0), &format!("nothing to SKIP: here\n{OK}")), Outcome::Passed);
    }

    #[test]
    fn doc_results_are_summed_over_crates() {
        let output = "test result: ok. 2 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0s\n\
                      test result: FAILED. 1 passed; 3 failed; 0 ignored; 0 measured; 0 filtered out\n";
        assert_eq!(doc_summary(output), Summary { passed: 3, failed: 3, skipped: 1 });
    }
}
