//! Values that must never be seen: they cannot be printed, and they come from outside the policy file.

pub use infergate_plugins::secret::{Secret, SecretSource};

/// Reads a secret. The error says what to do and shows no value.
pub fn read(source: &SecretSource, env: &dyn Fn(&str) -> Option<String>) -> Result<Secret, String> {
    let text = match (&source.env, &source.file) {
        // A key that was put where the name belongs is not told.
        (Some(name), None) if !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') => {
            return Err("this is no name of an environment variable".to_owned());
        }
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

/// The shortest pepper that is taken.
const PEPPER_MIN: usize = 32;

/// Whether a secret is long enough to be the pepper of hashes.
pub fn check_pepper(pepper: &Secret) -> Result<(), String> {
    if pepper.reveal().len() >= PEPPER_MIN {
        return Ok(());
    }
    Err(format!("a pepper has at least {PEPPER_MIN} characters: take what `openssl rand -hex 32` prints"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_comes_from_one_place() {
        let env = |name: &str| (name == "KEY").then(|| "k\n".to_owned());
        let from = |env_name: Option<&str>, file: Option<&str>| {
            read(&SecretSource { env: env_name.map(Into::into), file: file.map(Into::into) }, &env)
        };
        assert_eq!(from(Some("KEY"), None).unwrap().reveal(), "k");
        assert!(from(Some("OTHER"), None).unwrap_err().contains("OTHER is not set"));
        assert_eq!(from(Some("sk-canary"), None).unwrap_err(), "this is no name of an environment variable");
        assert!(from(Some("KEY"), Some("/x")).unwrap_err().contains("either"));
        assert!(from(None, Some("/does/not/exist")).unwrap_err().contains("/does/not/exist"));
    }
}
