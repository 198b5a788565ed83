//! The README and the guides say what is true: the reference is the code's, the policy compiles, commands are commands.

use std::process::Command;

const README: &str = include_str!("../README.md");
const REFERENCE: &str = include_str!("../config/reference.md");

/// The README, then every guide.
fn pages() -> Vec<String> {
    let guides = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/config/guides")).unwrap();
    let guides = guides.map(|guide| std::fs::read_to_string(guide.unwrap().path()).unwrap());
    std::iter::once(README.to_owned()).chain(guides).collect()
}

fn infergate(arguments: &[&str]) -> (bool, String) {
    let done = Command::new(env!("CARGO_BIN_EXE_infergate")).args(arguments).output().unwrap();
    (done.status.success(), String::from_utf8(done.stdout).unwrap())
}

#[test]
fn the_reference_is_what_the_code_says() {
    let (_, reference) = infergate(&["reference"]);
    let told = "the reference is out of date: run `cargo run -- reference --into config/reference.md`";
    assert!(REFERENCE.contains(&format!("<!-- reference -->\n{reference}<!-- /reference -->")), "{told}");
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
    let pages = pages();
    let blocks = pages.iter().flat_map(|page| page.split("```sh\n").skip(1));
    let commands = blocks.flat_map(|block| block.split("```").next().unwrap().lines());
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
