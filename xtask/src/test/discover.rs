//! Which tests there are: asked of the test executables that cargo built.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::process;
use crate::workspace::{self, Artifact};

/// Unit tests of libraries and binaries.
pub const CORE: &str = "core";
/// Replay of the fuzzers' committed corpora, and whatever else the fuzz crate tests on stable.
pub const FUZZ: &str = "fuzz";

#[derive(Clone, Debug)]
pub struct Test {
    pub suite: String,
    /// Directory name of the package, e.g. `lb-common`.
    pub package: String,
    pub target: String,
    /// As libtest knows it, e.g. `parse::tests::short_header`.
    pub name: String,
    /// Marked `#[ignore]`.
    pub ignored: bool,
    pub binary: PathBuf,
    pub package_dir: PathBuf,
}

impl Test {
    /// Unique over the workspace, e.g. `tests::e2e::tcp::echo`.
    pub fn path(&self) -> String {
        format!("{}::{}::{}", self.package, self.target, self.name)
    }
}

/// Tests of the workspace's executables.
pub fn workspace(built: &[Artifact]) -> Result<Vec<Test>> {
    let mut tests = Vec::new();
    for artifact in built.iter().filter(|artifact| artifact.harness) {
        tests.extend(list(artifact, &suite(artifact))?);
    }
    Ok(tests)
}

/// Tests of the fuzz crate, which is a workspace of its own.
pub fn fuzz() -> Result<Vec<Test>> {
    let mut tests = Vec::new();
    let manifest = workspace::root().join("fuzz/Cargo.toml");
    if manifest.exists() {
        let manifest = manifest.display().to_string();
        let built = workspace::build(workspace::Profile::Dev, &["--tests", "--manifest-path", &manifest])?;
        for artifact in built.iter().filter(|artifact| artifact.harness) {
            tests.extend(list(artifact, FUZZ)?);
        }
    }
    Ok(tests)
}

fn suite(artifact: &Artifact) -> String {
    if !artifact.integration_test {
        return CORE.to_owned();
    }
    let name = &artifact.target;
    name.split('_').next().unwrap_or(name).to_owned()
}

fn list(artifact: &Artifact, suite: &str) -> Result<Vec<Test>> {
    let ask = |more: &[&str]| {
        let mut command = Command::new(&artifact.path);
        command.args(["--list", "--format", "terse"]).args(more).current_dir(&artifact.package_dir);
        process::stdout(&mut command).with_context(|| format!("cannot list the tests of {}", artifact.target))
    };
    let ignored = names(&ask(&["--ignored"])?);
    let tests = names(&ask(&[])?).into_iter().map(|name| Test {
        suite: suite.to_owned(),
        package: file_name(&artifact.package_dir),
        target: artifact.target.clone(),
        ignored: ignored.contains(&name),
        name,
        binary: artifact.path.clone(),
        package_dir: artifact.package_dir.clone(),
    });
    Ok(tests.collect())
}

fn names(list: &str) -> Vec<String> {
    list.lines().filter_map(|line| line.strip_suffix(": test")).map(str::to_owned).collect()
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn artifact(target: &str, integration_test: bool) -> Artifact {
        Artifact {
            package_dir: "/w/tests".into(),
            target: target.into(),
            integration_test,
            harness: true,
            path: "/t/x".into(),
        }
    }

    #[test]
    fn the_suite_is_the_integration_tests_name_up_to_an_underscore() {
        assert_eq!(suite(&artifact("e2e", true)), "e2e");
        assert_eq!(suite(&artifact("e2e_restart", true)), "e2e");
        assert_eq!(suite(&artifact("pointsman_tests", false)), CORE);
    }

    #[test]
    fn names_are_read_from_libtests_list() {
        assert_eq!(names("a::b: test\nc: test\nd: benchmark\n\n2 tests, 1 benchmark\n"), ["a::b", "c"]);
    }

    #[test]
    fn this_very_test_is_found_in_its_own_executable() {
        let own = Artifact { path: std::env::current_exe().unwrap(), ..artifact("xtask", false) };
        let own = Artifact { package_dir: env!("CARGO_MANIFEST_DIR").into(), ..own };
        let tests = list(&own, CORE).unwrap();
        let found =
            tests.iter().find(|test| test.name.ends_with("this_very_test_is_found_in_its_own_executable"));
        assert_eq!(found.map(|test| (test.package.as_str(), test.ignored)), Some(("xtask", false)));
    }
}
