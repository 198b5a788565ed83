//! The file of keys beside the policy, as the admin port changes it: whole, at once, or not at all.

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use infergate_plugins::authenticator::keys::Entry;
use rustix::fs::{FlockOperation, flock};
use serde_json::{Value, json};

use super::Problems;
use super::problem::Document;
use crate::audit::private;

/// How long another process may be at it.
const PATIENCE: Duration = Duration::from_secs(2);

/// Lets `change` change the entries of the file at `path` and writes them. If the change says no, or nothing can be
/// written, the file stays as it is.
pub fn change<T, E: From<String>>(path: &Path, change: impl FnOnce(&mut Vec<Entry>) -> Result<T, E>) -> Result<T, E> {
    let told = |error: &dyn std::fmt::Display| E::from(format!("{}: {error}", path.display()));
    // Behind a symbolic link, the link stays.
    let path = path.canonicalize().map_err(|error| told(&error))?;
    let directory = path.parent().unwrap_or(Path::new("/")).to_owned();
    let _alone = lock(&directory).map_err(|error| told(&error))?;
    let text = std::fs::read_to_string(&path).map_err(|error| told(&error))?;
    let mut entries = read(&text).map_err(|error| told(&error))?;
    let changed = change(&mut entries)?;
    let permissions = std::fs::metadata(&path).map_err(|error| told(&error))?.permissions();
    private::replace(&path, &written(&text, &entries), Some(permissions)).map_err(|error| told(&error))?;
    Ok(changed)
}

fn read(text: &str) -> Result<Vec<Entry>, String> {
    let lines = |problems| Problems::in_order(problems).lines("line").join("; ");
    let document = Document::parse(text).map_err(|problem| lines(vec![problem]))?;
    if document.value.is_null() { Ok(Vec::new()) } else { document.read().map_err(lines) }
}

/// The comment that the file began with, and the entries, each on a line.
fn written(before: &str, entries: &[Entry]) -> String {
    let comment = before.lines().take_while(|line| line.is_empty() || line.starts_with('#'));
    let comment = comment.map(|line| format!("{line}\n"));
    comment.chain(entries.iter().map(|entry| format!("- {}\n", flow(&json!(entry))))).collect()
}

/// Nobody else changes a file in this directory by way of us while this lives.
fn lock(directory: &Path) -> Result<File, String> {
    let locked = File::open(directory).map_err(|error| error.to_string())?;
    let begun = Instant::now();
    while let Err(error) = flock(&locked, FlockOperation::NonBlockingLockExclusive) {
        match error {
            rustix::io::Errno::WOULDBLOCK if begun.elapsed() < PATIENCE => {
                std::thread::sleep(Duration::from_millis(5));
            }
            rustix::io::Errno::WOULDBLOCK => return Err("another process is changing it: try again".to_owned()),
            // Not every file system can.
            _ => break,
        }
    }
    Ok(locked)
}

/// An entry on one line of YAML.
pub fn flow(entry: &Value) -> String {
    let members = entry.as_object().into_iter().flatten();
    // JSON's strings are YAML's too. The order is the one in which people look.
    let rank =
        |name: &str| ["name", "tenant", "role", "prefix", "hash", "expires"].iter().position(|known| *known == name);
    let mut members: Vec<_> = members.map(|(name, value)| (rank(name), format!("{name}: {value}"))).collect();
    members.sort();
    format!("{{{}}}", members.into_iter().map(|(_, text)| text).collect::<Vec<_>>().join(", "))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn entry(name: &str) -> Entry {
        let (prefix, hash) = ("ig_aaaaaa".to_owned(), "0".repeat(64));
        Entry { name: Some(name.to_owned()), tenant: "t".to_owned(), prefix, hash, expires: None }
    }

    fn add(path: &Path, name: &str) -> Result<(), String> {
        change(path, |entries| {
            entries.push(entry(name));
            Ok(())
        })
    }

    #[test]
    fn an_entry_is_a_line_of_yaml() {
        let entry = json!({"hash": "00", "tenant": "a: \"b\"", "name": "no", "prefix": "ig_x"});
        let text = flow(&entry);
        assert!(text.starts_with("{name: \"no\", tenant: \"a: \\\"b\\\"\", prefix: "), "{text}");
        let back: Value = serde_saphyr::from_str(&text).unwrap();
        assert_eq!(back, entry);
    }

    #[test]
    fn what_is_there_stays_with_its_comment_its_permissions_and_its_link() {
        let directory = tempfile::tempdir().unwrap();
        let (path, link) = (directory.path().join("keys.yaml"), directory.path().join("link.yaml"));
        std::fs::write(&path, "# ours\n\n# really\n- name: old\n  tenant: t\n  prefix: ig_bbbbbb # x\n  hash: '1'\n")
            .unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        std::os::unix::fs::symlink(&path, &link).unwrap();
        add(&link, "new: \"{}\"").unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("# ours\n\n# really\n- {name: \"old\", tenant: \"t\", "), "{text}");
        let names: Vec<_> = read(&text).unwrap().into_iter().map(|entry| entry.name.unwrap()).collect();
        assert_eq!(names, ["old", "new: \"{}\""]);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
        assert!(std::fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 2, "nothing stays behind");
    }

    #[test]
    fn a_change_that_fails_changes_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keys.yaml");
        std::fs::write(&path, "# none\n").unwrap();
        let refused: Result<(), String> = change(&path, |entries| {
            entries.push(entry("x"));
            Err("no".to_owned())
        });
        assert_eq!(refused, Err("no".to_owned()));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "# none\n");
        std::fs::write(&path, "- {tenant: t}\n").unwrap();
        assert!(add(&path, "x").unwrap_err().contains("`prefix` is missing"));
        assert!(add(&directory.path().join("none.yaml"), "x").is_err());
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn of_many_who_change_it_at_once_nobody_is_lost() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keys.yaml");
        std::fs::write(&path, "").unwrap();
        std::thread::scope(|scope| {
            for worker in 0..8 {
                let path = &path;
                scope.spawn(move || (0..5).for_each(|n| add(path, &format!("{worker}-{n}")).unwrap()));
            }
        });
        assert_eq!(read(&std::fs::read_to_string(&path).unwrap()).unwrap().len(), 40);
    }
}
