//! The public keys that a journal's signatures are checked with.

use std::io;
use std::path::Path;

use aws_lc_rs::signature::{ED25519, UnparsedPublicKey};
use sha2::{Digest, Sha256};

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
        let bytes = unhex(text.trim().as_bytes())?;
        let id = Sha256::digest(bytes).iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        Some(Self { bytes, id })
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
        unhex::<64>(signature.as_bytes()).is_some_and(|signature| key.verify(message, &signature).is_ok())
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

fn unhex<const N: usize>(digits: &[u8]) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    if digits.len() != 2 * N {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let digit = |at: usize| char::from(pair[at]).to_digit(16);
        *byte = u8::try_from(digit(0)? * 16 + digit(1)?).ok()?;
    }
    Some(bytes)
}
