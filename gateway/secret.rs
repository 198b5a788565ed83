//! Values that must never be seen: they cannot be printed, and they come from outside the policy file.

use std::fmt;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::Deserialize;

/// A secret's text. `Debug` and `Display` show nothing of it.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Keeps `text` out of sight.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text itself, for the one place that sends it.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// Where a secret is: `{env: NAME}` or `{file: PATH}`, never in the policy itself.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SecretSource {
    /// The environment variable that holds it.
    #[serde(default)]
    pub env: Option<String>,
    /// The file that holds it, read again at every reload. A line end at its end does not count.
    #[serde(default)]
    pub file: Option<PathBuf>,
}

impl SecretSource {
    /// Reads the secret. The error says what to do and shows no value.
    pub fn read(&self, env: &dyn Fn(&str) -> Option<String>) -> Result<Secret, String> {
        let text = match (&self.env, &self.file) {
            (Some(name), None) => env(name).ok_or_else(|| format!("the environment variable {name} is not set"))?,
            (None, Some(path)) => {
                std::fs::read_to_string(path).map_err(|error| format!("{} cannot be read: {error}", path.display()))?
            }
            _ => return Err("give either env or file".to_owned()),
        };
        let text = text.trim_end_matches(['\r', '\n']);
        match text {
            "" => Err("the secret is empty".to_owned()),
            text if text.bytes().any(|byte| byte.is_ascii_control()) => {
                Err("the secret has control characters, which no header may carry".to_owned())
            }
            text => Ok(Secret::new(text)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_shows_nothing_of_itself() {
        assert_eq!(format!("{:?}", Secret::new("canary")), "***");
    }

    #[test]
    fn a_secret_comes_from_one_place() {
        let env = |name: &str| (name == "KEY").then(|| "k\n".to_owned());
        let from = |env_name: Option<&str>, file: Option<&str>| {
            SecretSource { env: env_name.map(Into::into), file: file.map(Into::into) }.read(&env)
        };
        assert_eq!(from(Some("KEY"), None).unwrap().reveal(), "k");
        assert!(from(Some("OTHER"), None).unwrap_err().contains("OTHER is not set"));
        assert!(from(Some("KEY"), Some("/x")).unwrap_err().contains("either"));
        assert!(from(None, Some("/does/not/exist")).unwrap_err().contains("/does/not/exist"));
    }
}
