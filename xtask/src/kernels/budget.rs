//! What the programs may cost the verifier of each kernel: `tests/kernel_budget.txt`.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};

use super::console::Transcript;

/// What is allowed, or known not to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Entry {
    Limit { instructions: u32, stack: u32 },
    Refused,
}

/// The file, by kernel and program.
#[derive(Debug)]
pub struct Budget(BTreeMap<(String, String), Entry>);

impl Budget {
    /// Reads lines `KERNEL PROGRAM INSTRUCTIONS STACK`, or `KERNEL PROGRAM refused`.
    pub fn parse(text: &str) -> Result<Self> {
        let mut budget = BTreeMap::new();
        for line in text.lines().filter(|line| !line.starts_with('#') && !line.trim().is_empty()) {
            let words: Vec<_> = line.split_whitespace().collect();
            let (kernel, program, entry) = match words[..] {
                [kernel, program, "refused"] => (kernel, program, Entry::Refused),
                [kernel, program, instructions, stack] => {
                    let number = |text: &str| text.parse().with_context(|| format!("no number in `{line}`"));
                    let entry = Entry::Limit { instructions: number(instructions)?, stack: number(stack)? };
                    (kernel, program, entry)
                }
                _ => bail!("a line of the budget that is none: `{line}`"),
            };
            if budget.insert((kernel.to_owned(), program.to_owned()), entry).is_some() {
                bail!("the budget has two lines for {program} on {kernel}");
            }
        }
        Ok(Self(budget))
    }

    /// Whether no program is known to be refused.
    pub fn loads_all(&self, kernel: &str) -> bool {
        !self.0.iter().any(|((of, _), entry)| of == kernel && *entry == Entry::Refused)
    }

    /// What is not as the budget says; each complaint names a program and what to do.
    pub fn complaints(&self, kernel: &str, transcript: &Transcript) -> Vec<String> {
        let mut complaints = Vec::new();
        let entry = |program: &str| self.0.get(&(kernel.to_owned(), program.to_owned()));
        for found in &transcript.verified {
            let (program, instructions, stack) = (&found.program, found.instructions, found.stack);
            match entry(program) {
                None => complaints.push(format!(
                    "{program} has no budget: add `{kernel} {program} {} {stack}`, a third more than it takes",
                    with_room(instructions)
                )),
                Some(Entry::Refused) => complaints.push(format!(
                    "{program} is taken, which was refused before: give it a budget, \
                     `{kernel} {program} {} {stack}`",
                    with_room(instructions)
                )),
                Some(Entry::Limit { instructions: limit, stack: stack_limit }) => {
                    if instructions > *limit {
                        complaints.push(format!("{program}: {instructions} instructions, {limit} are allowed"));
                    }
                    if stack > *stack_limit {
                        complaints.push(format!("{program}: {stack} bytes of stack, {stack_limit} are allowed"));
                    }
                }
            }
        }
        for (program, reason) in &transcript.refused {
            if entry(program) != Some(&Entry::Refused) {
                complaints.push(format!("{program} is refused: {reason}"));
            }
        }
        let seen = |program: &str| {
            transcript.verified.iter().any(|found| found.program == program)
                || transcript.refused.iter().any(|(refused, _)| refused == program)
        };
        let absent = self.0.keys().filter(|(of, program)| of == kernel && !seen(program));
        complaints.extend(absent.map(|(_, program)| format!("{program} has a budget, and was not loaded")));
        complaints
    }
}

/// A third more, in round numbers; the kernel itself allows a million.
fn with_room(instructions: u32) -> u32 {
    let wanted = instructions + instructions / 3;
    let unit = 10u32.pow(wanted.max(1).ilog10().saturating_sub(1));
    wanted.next_multiple_of(unit).min(1_000_000)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::console::Verified;

    const TEXT: &str = "# kernel program\n6.1 slow 1000 64\n6.1 fast 100 64\n\n5.10 slow refused\n";

    fn transcript(instructions: u32, stack: u32) -> Transcript {
        let verified =
            |program: &str, instructions| Verified { program: program.into(), instructions, stack };
        Transcript {
            verified: vec![verified("slow", instructions), verified("fast", 1)],
            ..Transcript::default()
        }
    }

    #[test]
    fn growth_is_complained_about_and_less_is_not() {
        let budget = Budget::parse(TEXT).unwrap();
        assert_eq!(budget.complaints("6.1", &transcript(1000, 64)), [""; 0]);
        assert_eq!(
            budget.complaints("6.1", &transcript(1001, 64)),
            ["slow: 1001 instructions, 1000 are allowed"]
        );
        let complaints = budget.complaints("6.1", &transcript(1, 72));
        assert_eq!(complaints[0], "slow: 72 bytes of stack, 64 are allowed");
    }

    #[test]
    fn a_program_without_budget_gets_a_line_to_add() {
        let budget = Budget::parse(TEXT).unwrap();
        let complaints = budget.complaints("6.12", &transcript(3_000, 8));
        assert!(complaints[0].contains("`6.12 slow 4000 8`"), "{complaints:?}");
        assert_eq!(with_room(80_149), 110_000);
        assert_eq!(with_room(0), 0);
        assert_eq!(with_room(951_769), 1_000_000);
    }

    #[test]
    fn refusals_are_expected_or_complained_about() {
        let budget = Budget::parse(TEXT).unwrap();
        let refused = Transcript { refused: vec![("slow".into(), "no".into())], ..Transcript::default() };
        assert_eq!(budget.complaints("5.10", &refused), [""; 0]);
        assert!(budget.loads_all("6.1") && !budget.loads_all("5.10"));
        let complaints = budget.complaints("6.1", &refused);
        assert_eq!(complaints, ["slow is refused: no", "fast has a budget, and was not loaded"]);
        let complaints = budget.complaints("5.10", &transcript(9, 8));
        assert!(complaints[0].contains("was refused before"), "{complaints:?}");
    }

    #[test]
    fn lines_that_are_none_are_errors() {
        for text in ["6.1 slow", "6.1 slow many 64", "6.1 slow 1 2 3", "6.1 slow 1 2\n6.1 slow 3 4"] {
            assert!(Budget::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_committed_budget_can_be_read() {
        let path = crate::workspace::root().join(crate::kernels::BUDGET);
        Budget::parse(&std::fs::read_to_string(path).unwrap()).unwrap();
    }
}
