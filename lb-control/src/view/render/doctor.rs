//! `pointsman doctor`.

use std::fmt::Write;

use super::Render;
use super::table::one_line;
use super::units::plural;
use crate::view::{DoctorView, Severity};

impl Render for DoctorView {
    /// A paragraph for each finding: they are sentences, too long for cells. What is well takes a
    /// line; `wide` lists each of those too.
    fn table(&self, wide: bool) -> String {
        let mut text = String::new();
        for finding in &self.findings {
            if finding.severity == Severity::Ok && !wide {
                continue;
            }
            let about = match finding.subject.as_str() {
                "" => String::new(),
                subject => format!(" {subject}"),
            };
            let head = format!("{} {}{about}: {}", finding.severity, finding.check, finding.message);
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{}", one_line(&head));
            if let Some(remedy) = &finding.remedy {
                let _ = writeln!(text, "    do: {}", one_line(remedy));
            }
        }
        let well = self.findings.iter().filter(|finding| finding.severity == Severity::Ok);
        let mut names: Vec<_> = well.map(|finding| finding.check.as_str()).collect();
        names.dedup();
        if !names.is_empty() && !wide {
            let _ = writeln!(text, "ok {}", names.join(", "));
        }
        let _ = writeln!(
            text,
            "\n{}, {}, {}, {} in order.",
            plural(self.count(Severity::Error) as u64, "error"),
            plural(self.count(Severity::Warning) as u64, "warning"),
            plural(self.count(Severity::Note) as u64, "note"),
            self.count(Severity::Ok)
        );
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::FindingView;
    use crate::view::render::{Format, render};

    fn example() -> DoctorView {
        DoctorView::new(vec![
            FindingView::new(Severity::Ok, "kernel", "Linux 6.18"),
            FindingView::new(Severity::Warning, "rp-filter", "it is strict")
                .about("eth0")
                .remedy("set it to 2"),
            FindingView::new(Severity::Error, "capabilities", "one\tlacks").about("CAP_BPF"),
        ])
    }

    #[test]
    fn the_worst_comes_first_and_what_is_well_last() {
        assert_eq!(
            render(&example(), Format::Table).unwrap(),
            "error capabilities CAP_BPF: one lacks\nwarning rp-filter eth0: it is strict\n    do: set it to 2\n\
             ok kernel\n\n1 error, 1 warning, 0 notes, 1 in order.\n"
        );
        assert!(render(&example(), Format::Wide).unwrap().contains("ok kernel: Linux 6.18\n"));
        assert!(example().has_errors() && !DoctorView::default().has_errors());
    }

    #[test]
    fn json_comes_back_equal() {
        let json = render(&example(), Format::Json).unwrap();
        assert_eq!(serde_json::from_str::<DoctorView>(&json).unwrap(), example());
        assert!(json.contains("\"severity\": \"warning\""), "{json}");
    }
}
