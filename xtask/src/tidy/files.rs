//! Rules for any file: size, leftovers, binaries, hosts.

use super::{File, Finding};

const MAX_LINES: usize = 600;
/// A longer file says why in a comment that starts so.
const LONG_BECAUSE: &str = "// long because ";

/// Notes to oneself belong into the issue tracker. Put together, or this file would be a finding.
const LEFTOVERS: [&str; 3] = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X")];

/// Which registry or mirror is used is the business of whoever builds.
const REGISTRY_HOSTS: [&str; 8] = [
    concat!("crates", ".io"),
    concat!("registry.npmjs", ".org"),
    concat!("pypi", ".org"),
    concat!("pythonhosted", ".org"),
    concat!("proxy.golang", ".org"),
    concat!("deb.debian", ".org"),
    concat!("rubygems", ".org"),
    concat!("artifact", "ory"),
];

pub fn check(file: &File) -> Vec<Finding> {
    let finding = |line, text| Finding { path: file.path.clone(), line, text };
    if file.bytes.starts_with(b"\x7fELF") {
        return vec![finding(
            1,
            "a compiled object: the tree holds none, `cargo xtask build-ebpf` makes them".into(),
        )];
    }
    // cargo writes its lock file; a corpus is whatever the fuzzer found.
    let Some(text) = file.text().filter(|_| !is_generated(&file.path)) else { return Vec::new() };
    let mut findings = Vec::new();
    let lines = text.lines().count();
    if file.is_rust() && lines > MAX_LINES && !text.contains(LONG_BECAUSE) {
        findings.push(finding(
            lines,
            format!("{lines} lines: cut it at {MAX_LINES}, or say why not in a comment `{LONG_BECAUSE}…`"),
        ));
    }
    for (number, line) in text.lines().enumerate() {
        for word in LEFTOVERS.iter().filter(|word| has_word(line, word)) {
            findings.push(finding(number + 1, format!("{word}: do it, or open an issue")));
        }
        for host in REGISTRY_HOSTS.iter().filter(|host| line.contains(**host)) {
            findings.push(finding(number + 1, format!("names the package registry {host}")));
        }
    }
    findings
}

fn is_generated(path: &str) -> bool {
    path.ends_with("Cargo.lock") || path.starts_with("fuzz/corpus/")
}

fn has_word(line: &str, word: &str) -> bool {
    let is_letter = |char: Option<char>| char.is_some_and(|char| char.is_alphanumeric() || char == '_');
    line.match_indices(word).any(|(at, _)| {
        !is_letter(line[..at].chars().next_back()) && !is_letter(line[at + word.len()..].chars().next())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: [usize; 0] = [];

    fn findings(path: &str, text: &str) -> Vec<usize> {
        let file = File { path: path.into(), bytes: text.as_bytes().to_vec() };
        check(&file).into_iter().map(|finding| finding.line).collect()
    }

    #[test]
    fn leftovers_and_hosts_are_found_where_they_stand() {
        let text = format!("a\n// {}: later\nhttps://{}/x\n", LEFTOVERS[0], REGISTRY_HOSTS[0]);
        assert_eq!(findings("a.rs", &text), [2, 3]);
        assert_eq!(findings("Cargo.lock", &text), NONE);
        assert_eq!(findings("a.md", &format!("MY{}S", LEFTOVERS[0])), NONE);
    }

    #[test]
    fn a_long_file_needs_a_reason() {
        let long = "x\n".repeat(601);
        assert_eq!(findings("a.rs", &long), [601]);
        assert_eq!(findings("a.rs", &format!("{LONG_BECAUSE}it is one table\n{long}")), NONE);
        assert_eq!(findings("a.yaml", &long), NONE);
    }

    #[test]
    fn compiled_objects_are_found() {
        assert_eq!(findings("a.o", "\x7fELF…"), [1]);
    }
}
