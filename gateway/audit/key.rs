//! The key that signs checkpoints: Ed25519, made at the first start, kept beside the journal or where settings say.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
use sha2::{Digest, Sha256};

use super::private;
use crate::hex;

/// A key pair.
pub struct SigningKey {
    pair: Ed25519KeyPair,
    /// The first 16 hexadecimal digits of SHA-256 over the public key.
    pub id: String,
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SigningKey({})", self.id)
    }
}

impl SigningKey {
    /// Reads the key from `file`, or from the journal's directory; makes it if it is not there. The public half is
    /// written beside the journal for those who verify it.
    pub fn load(directory: &Path, file: Option<&Path>) -> Result<Self, String> {
        let own = directory.join("signing.key");
        let path = file.unwrap_or(&own);
        let told =
            |what: &str, error: &dyn fmt::Display| format!("the journal's key {}: {what}: {error}", path.display());
        private::directory(directory).map_err(|error| told("its directory cannot be made", &error))?;
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                make(path).map_err(|error| told("it cannot be made", &error))?
            }
            Err(error) => return Err(told("it cannot be read", &error)),
        };
        let wrong = || told("it is no Ed25519 key", &"PKCS#8 in hexadecimal digits is expected");
        let document = hex::bytes(text.trim().as_bytes()).ok_or_else(wrong)?;
        let pair = Ed25519KeyPair::from_pkcs8(&document).map_err(|_| wrong())?;
        let key = Self { id: key_id(pair.public_key().as_ref()), pair };
        let (public, text) = (directory.join("signing.pub"), format!("{}\n", key.public()));
        if std::fs::read_to_string(&public).ok().as_ref() != Some(&text) {
            std::fs::write(public, text).map_err(|error| told("its public half cannot be written", &error))?;
        }
        Ok(key)
    }

    /// The public key in hexadecimal digits.
    pub fn public(&self) -> String {
        hex::text(self.pair.public_key().as_ref())
    }

    /// Signs `message`: 128 hexadecimal digits.
    pub fn sign(&self, message: &[u8]) -> String {
        hex::text(self.pair.sign(message).as_ref())
    }
}

/// The id of a public key.
pub fn key_id(public: &[u8]) -> String {
    hex::text(&Sha256::digest(public)[..8])
}

/// Makes a key that only its owner can read. Gateways that start at the same moment agree on one, and none is left with
/// half a key if it is killed.
fn make(path: &Path) -> std::io::Result<String> {
    let broken = |_| std::io::Error::other("no random numbers");
    let pair = Ed25519KeyPair::generate().map_err(broken)?;
    let document = pair.to_pkcs8().map_err(broken)?;
    let digits = hex::text(document.as_ref());
    let fresh = path.with_extension(format!("{:08x}.new", fastrand::u32(..)));
    let mut file: File = OpenOptions::new().create_new(true).write(true).mode(0o600).open(&fresh)?;
    file.write_all(digits.as_bytes())?;
    file.sync_all()?;
    let linked = std::fs::hard_link(&fresh, path);
    std::fs::remove_file(&fresh)?;
    match linked {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => std::fs::read_to_string(path),
        linked => linked.map(|()| digits),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_key_is_made_once_and_only_its_owner_can_read_it() {
        let directory = tempfile::tempdir().unwrap();
        let first = SigningKey::load(directory.path(), None).unwrap();
        let again = SigningKey::load(directory.path(), None).unwrap();
        assert_eq!(first.public(), again.public());
        assert_eq!(first.sign(b"x"), again.sign(b"x"));
        let mode = std::fs::metadata(directory.path().join("signing.key")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(std::fs::read_to_string(directory.path().join("signing.pub")).unwrap().trim(), first.public());
    }

    #[test]
    fn what_is_no_key_is_told_and_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("signing.key"), "canary").unwrap();
        let error = SigningKey::load(directory.path(), None).unwrap_err();
        assert!(error.contains("no Ed25519 key") && !error.contains("canary"), "{error}");
    }
}
