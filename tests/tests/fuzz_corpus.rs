//! Replays the fuzzers' committed corpora through the very functions that they run.

use std::path::PathBuf;

use pointsman_tests::kit::fuzz;

fn replay(target: &str, run: fn(&[u8])) {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target);
    let mut inputs: Vec<_> = std::fs::read_dir(&directory)
        .unwrap_or_else(|error| panic!("{}: {error}", directory.display()))
        .map(|entry| entry.unwrap().path())
        .collect();
    inputs.sort();
    assert!(inputs.len() >= 10, "{} holds {} inputs", directory.display(), inputs.len());
    for input in inputs {
        let bytes = std::fs::read(&input).unwrap();
        // Shown when the run panics.
        println!("{}", input.display());
        run(&bytes);
    }
}

#[test]
fn parse() {
    replay("parse", fuzz::parse);
}

#[test]
fn classify() {
    replay("classify", fuzz::classify);
}

#[test]
fn forward() {
    replay("forward", fuzz::forward);
}
