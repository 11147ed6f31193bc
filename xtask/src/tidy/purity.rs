//! Decisions are pure: they take state, event and time, and name no outside world.

use super::Finding;
use super::source::{find_path, line_of};

const PURE: [&str; 7] = [
    "lb-common/src/",
    "lb-control/src/model/",
    "lb-control/src/model.rs",
    "lb-control/src/plan/",
    "lb-control/src/plan.rs",
    "lb-control/src/ports/",
    "lb-control/src/ports.rs",
];

const OUTSIDE: [&str; 8] =
    ["kube", "aya", "aya_ebpf", "tokio", "rtnetlink", "Instant::now", "SystemTime::now", "UNIX_EPOCH"];

/// Where a word is allowed all the same, and why.
const EXCEPTIONS: [(&str, &str, &str); 1] = [(
    "lb-common/src/abi/mod.rs",
    "aya",
    "only where a layout is defined can it be promised to be plain bytes (aya::Pod, feature `agent`)",
)];

pub fn check(path: &str, code: &str) -> Vec<Finding> {
    if !PURE.iter().any(|pure| path.starts_with(pure)) {
        return Vec::new();
    }
    let mut findings: Vec<_> = OUTSIDE
        .iter()
        .filter(|word| !EXCEPTIONS.iter().any(|(file, allowed, _)| path == *file && *word == allowed))
        .flat_map(|word| find_path(code, word).map(move |at| (at, word)))
        .map(|(at, word)| Finding {
            path: path.to_owned(),
            line: line_of(code, at),
            text: format!("a pure module names `{word}`: take what it gives as an argument"),
        })
        .collect();
    findings.sort_by_key(|finding| finding.line);
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: [usize; 0] = [];

    #[test]
    fn pure_modules_name_no_outside_world() {
        let code = "use kube::Api;\nfn f(now: Instant) {}\nlet x = std::time::Instant::now();";
        let lines = |path| check(path, code).iter().map(|finding| finding.line).collect::<Vec<_>>();
        assert_eq!(lines("lb-control/src/plan/ipam.rs"), [1, 3]);
        assert_eq!(lines("lb-common/src/forward/mod.rs"), [1, 3]);
        assert_eq!(lines("lb-control/src/source/kube/mod.rs"), NONE);
        assert_eq!(lines("lb-control/src/planet.rs"), NONE);
    }
}
