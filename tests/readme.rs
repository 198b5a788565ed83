//! The README says what is true: its reference is the code's, its policy compiles.

use std::process::Command;

const README: &str = include_str!("../README.md");

fn infergate(arguments: &[&str]) -> (bool, String) {
    let done = Command::new(env!("CARGO_BIN_EXE_infergate")).args(arguments).output().unwrap();
    (done.status.success(), String::from_utf8(done.stdout).unwrap())
}

#[test]
fn the_reference_is_what_the_code_says() {
    let (_, reference) = infergate(&["reference"]);
    let told = "the reference is out of date: run `cargo run -- reference --into README.md`";
    assert!(README.contains(&format!("<!-- reference -->\n{reference}<!-- /reference -->")), "{told}");
}

#[test]
fn the_policy_in_it_is_good() {
    let policy = README.split("```yaml\n").nth(1).unwrap().split("```").next().unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), policy).unwrap();
    let (good, told) = infergate(&["check", "--without-secrets", file.path().to_str().unwrap()]);
    assert!(good, "{told}");
}

#[test]
fn every_command_in_it_is_one() {
    let commands = README.split("```sh\n").skip(1).flat_map(|block| block.split("```").next().unwrap().lines());
    let ours = commands.filter_map(|line| line.strip_prefix("infergate ")).collect::<Vec<_>>();
    assert!(ours.len() >= 7);
    for line in ours {
        let words = line.split(" #").next().unwrap().split_whitespace();
        let flags = words.clone().filter(|word| word.starts_with("--"));
        let mut subcommand: Vec<&str> = words.clone().take(1).collect();
        if ["audit", "guard", "key", "prices", "route"].contains(&subcommand[0]) {
            subcommand.extend(words.clone().nth(1));
        }
        let (known, help) = infergate(&[&subcommand[..], &["--help"]].concat());
        assert!(known, "{line}");
        for flag in flags {
            assert!(help.contains(flag), "{line}: {flag}");
        }
    }
}
