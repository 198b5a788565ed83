//! The keys of upstreams: where each will come from. None of them stands in a policy.

use std::collections::BTreeMap;

use super::Importer;
use super::cursor::At;

/// Keys that stood in the file itself, and the environment variables that they must move to.
#[derive(Default)]
pub(super) struct Credentials(BTreeMap<String, String>);

/// What people write where a server wants no key.
const NONE: [&str; 12] =
    ["", "none", "null", "empty", "fake", "fake-key", "dummy", "anything", "not-needed", "no-key", "na", "sk-1234"];

impl Importer<'_> {
    /// The environment variable that will hold the key at `at`; None where a server wants none.
    pub(super) fn key(&mut self, at: &At<'_>, group: &str) -> Option<String> {
        if let Some(name) = at.variable() {
            self.taken(at, format!("from the environment variable {name}"));
            return Some(name.to_owned());
        }
        let Some(text) = at.text() else {
            self.not_supported(at, "this is no text");
            return None;
        };
        if text.starts_with("os.environ/") {
            self.not_supported(at, "this is no name of an environment variable");
            return None;
        }
        if NONE.contains(&text.to_ascii_lowercase().as_str()) {
            self.taken(at, "a word in the place of a key: no key is sent");
            return None;
        }
        let name = self.credentials.moved(text, group);
        let told = format!(
            "the key stands in the file, which no policy may have: put it into the environment variable {name}"
        );
        self.changed(at, told);
        Some(name)
    }
}

impl Credentials {
    fn moved(&mut self, key: &str, group: &str) -> String {
        if let Some(name) = self.0.get(key) {
            return name.clone();
        }
        let letter = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' };
        let base: String = format!("KEY_OF_{group}").chars().map(letter).take(80).collect();
        let taken = self.0.values().any(|known| *known == base);
        let name = if taken { format!("{base}_NO_{}", self.0.len() + 1) } else { base };
        self.0.insert(key.to_owned(), name.clone());
        name
    }
}
