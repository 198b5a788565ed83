//! The public keys that a journal's signatures are checked with.

use std::io;
use std::path::Path;

use aws_lc_rs::signature::{ED25519, UnparsedPublicKey};

use crate::audit::key::key_id;
use crate::hex;

/// An Ed25519 public key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublicKey {
    bytes: [u8; 32],
    /// The first 16 hexadecimal digits of its SHA-256, by which the journal names it.
    pub id: String,
}

impl PublicKey {
    /// The key of these 64 hexadecimal digits.
    pub fn parse(text: &str) -> Option<Self> {
        let bytes: [u8; 32] = hex::bytes(text.trim().as_bytes())?.try_into().ok()?;
        Some(Self { bytes, id: key_id(&bytes) })
    }

    /// The key that is given as its digits or as the name of a file with them.
    pub fn read(file_or_hex: &str) -> io::Result<Self> {
        if let Some(key) = Self::parse(file_or_hex) {
            return Ok(key);
        }
        let wrong = |error: &dyn std::fmt::Display| format!("the key {file_or_hex} cannot be read: {error}");
        let text = std::fs::read_to_string(file_or_hex).map_err(|error| io::Error::new(error.kind(), wrong(&error)))?;
        let what = "64 hexadecimal digits are expected, as in signing.pub";
        Self::parse(&text).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, wrong(&what)))
    }

    /// Whether `signature` (128 hexadecimal digits) is this key's under `message`.
    pub(super) fn signed(&self, message: &[u8], signature: &str) -> bool {
        let key = UnparsedPublicKey::new(&ED25519, &self.bytes);
        hex::bytes(signature.as_bytes()).is_some_and(|signature| key.verify(message, &signature).is_ok())
    }
}

/// The keys that were given, or the directory's own.
pub(super) fn keys(directory: &Path, given: &[PublicKey], notes: &mut Vec<String>) -> io::Result<Vec<PublicKey>> {
    if !given.is_empty() {
        return Ok(given.to_vec());
    }
    let own = PublicKey::read(&directory.join("signing.pub").display().to_string())?;
    notes.push(format!(
        "the key {} is the directory's own: whoever can write there can put another in its place; pin it with --key",
        own.id
    ));
    Ok(vec![own])
}
