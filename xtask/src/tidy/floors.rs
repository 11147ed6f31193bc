//! The floors of `lb-control`: a module imports only from floors below its own.

use super::Finding;
use super::source::{find_path, is_identifier, line_of};

const SRC: &str = "lb-control/src/";

/// Top-level modules and their floors, as in ARCHITECTURE.md.
const FLOORS: [(&str, u32); 16] = [
    ("model", 2),
    ("view", 2),
    ("ports", 3),
    ("plan", 4),
    ("crd", 4),
    ("source", 5),
    ("dataplane", 5),
    ("net", 5),
    ("probe", 5),
    ("proxy", 5),
    ("publish", 5),
    ("telemetry", 5),
    ("http", 5),
    ("inspect", 6),
    ("app", 7),
    ("cli", 8),
];

/// `code` is the file without comments and strings.
pub fn check(path: &str, code: &str) -> Vec<Finding> {
    let Some(inside) = path.strip_prefix(SRC) else { return Vec::new() };
    // The roots only declare modules and start the program.
    if inside == "lib.rs" || inside == "main.rs" {
        return Vec::new();
    }
    let module = inside.split(['/', '.']).next().unwrap_or(inside);
    let Some(floor) = floor_of(module) else {
        let text = format!(
            "module `{module}` has no floor: give it one in ARCHITECTURE.md and in \
             xtask/src/tidy/floors.rs"
        );
        return vec![Finding { path: path.to_owned(), line: 1, text }];
    };
    let finding = |at: usize, text: String| Finding { path: path.to_owned(), line: line_of(code, at), text };
    let mut findings = Vec::new();
    for (at, target) in imports(code, is_top_file(inside)) {
        if target == module {
            continue;
        }
        match floor_of(&target) {
            Some(other) if other < floor => {}
            Some(other) => findings.push(finding(
                at,
                format!(
                    "`{module}` (floor {floor}) may not import `{target}` (floor {other}): pass it in from \
                     above, or move what both need to a lower floor"
                ),
            )),
            None => findings.push(finding(
                at,
                format!("`crate::{target}` is outside of the floors: import from the module that defines it"),
            )),
        }
    }
    for at in find_path(code, "super::super") {
        findings.push(finding(at, "write `crate::…` instead of climbing, so that floors can be seen".into()));
    }
    findings
}

fn floor_of(module: &str) -> Option<u32> {
    FLOORS.iter().find(|(name, _)| *name == module).map(|(_, floor)| *floor)
}

/// `plan.rs` and `plan/mod.rs`: there, `super::` is the crate's root.
fn is_top_file(inside: &str) -> bool {
    !inside.contains('/') || (inside.ends_with("/mod.rs") && inside.matches('/').count() == 1)
}

/// Top-level modules that the code names, with where.
fn imports(code: &str, is_top_file: bool) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for at in find_path(code, "crate") {
        let Some(rest) = after_colons(code, at + "crate".len()) else { continue };
        found.extend(first_segments(&code[rest..]).into_iter().map(|name| (at, name)));
    }
    if is_top_file {
        for at in find_path(code, "super") {
            let Some(rest) = after_colons(code, at + "super".len()) else { continue };
            // In a module inside the file `super::` is the file itself: only names of floors count.
            let names = first_segments(&code[rest..]).into_iter();
            found.extend(names.filter(|name| floor_of(name).is_some()).map(|name| (at, name)));
        }
    }
    found
}

fn after_colons(code: &str, at: usize) -> Option<usize> {
    let rest = code[at..].trim_start();
    let rest = rest.strip_prefix("::")?.trim_start();
    Some(code.len() - rest.len())
}

/// The first segment of a path, or of every path in a group: `a::b` gives a, `{a::b, c::{d, e}}`
/// gives a and c.
fn first_segments(rest: &str) -> Vec<String> {
    let Some(group) = rest.strip_prefix('{') else {
        return identifier(rest).into_iter().collect();
    };
    let mut names = Vec::new();
    let (mut depth, mut expects_name) = (0, true);
    for (at, char) in group.char_indices() {
        match char {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => expects_name = true,
            _ if expects_name && !char.is_whitespace() => {
                names.extend(identifier(&group[at..]));
                expects_name = false;
            }
            _ => {}
        }
    }
    names
}

fn identifier(text: &str) -> Option<String> {
    let text = text.strip_prefix("r#").unwrap_or(text);
    let end = text.bytes().position(|byte| !is_identifier(byte)).unwrap_or(text.len());
    (end > 0).then(|| text[..end].to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: [usize; 0] = [];

    fn lines(path: &str, code: &str) -> Vec<usize> {
        check(path, code).into_iter().map(|finding| finding.line).collect()
    }

    #[test]
    fn lower_floors_and_the_own_module_may_be_imported() {
        let code = "use crate::{model::Service, ports::{Clock, Net}};\nuse crate::dataplane::object;\n\
                    use super::maps;\nfn f() -> crate::plan::Delta {}";
        assert_eq!(check("lb-control/src/dataplane/loader.rs", code), []);
    }

    #[test]
    fn neighbours_and_higher_floors_may_not() {
        let code = "use crate::net::Link;\nuse crate::{\n    model::Service,\n    app::App,\n};\n\
                    fn f() { crate::cli::run() }";
        assert_eq!(lines("lb-control/src/dataplane/loader.rs", code), [1, 2, 6]);
        assert_eq!(lines("lb-control/src/ports/mod.rs", "use crate::plan::Plan;"), [1]);
        assert_eq!(lines("lb-control/src/model/mod.rs", "pub(crate) fn f(x: crate :: plan::X) {}"), [1]);
    }

    #[test]
    fn climbing_does_not_hide_an_import() {
        assert_eq!(lines("lb-control/src/plan/mod.rs", "use super::{net, model};"), [1]);
        assert_eq!(lines("lb-control/src/plan/ipam.rs", "use super::super::net::Link;"), [1]);
        assert_eq!(lines("lb-control/src/plan/ipam.rs", "use super::net_of;"), NONE);
        assert_eq!(lines("lb-control/src/plan.rs", "mod tests { use super::*; use super::Delta; }"), NONE);
    }

    #[test]
    fn a_module_without_a_floor_is_a_finding() {
        assert_eq!(lines("lb-control/src/util.rs", ""), [1]);
        assert_eq!(lines("lb-control/src/plan.rs", "use crate::util::x;"), [1]);
    }

    #[test]
    fn roots_and_other_crates_are_left_alone() {
        for path in ["lb-control/src/lib.rs", "lb-control/src/main.rs", "xtask/src/tidy/mod.rs"] {
            assert_eq!(lines(path, "use crate::cli::run;"), NONE);
        }
    }
}
