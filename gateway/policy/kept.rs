//! The last good policy on disk, so that a process that is started beside a broken file serves all the same.

use std::fs::Permissions;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::audit::private;
use crate::hex;
use crate::house::House;
use crate::settings::StartWith;

/// The place of the last good text of one policy file.
#[derive(Debug)]
pub struct Kept(PathBuf);

impl Kept {
    /// That of the policy at `path`, if the settings ask for one and there is a journal to keep it beside. Gateways that
    /// share a journal may serve different files.
    pub fn of(house: &House, path: &Path) -> Option<Self> {
        let journal = house.journal.as_ref().filter(|_| house.settings.start_with == StartWith::LastGood)?;
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let name = hex::text(&Sha256::digest(path.as_os_str().as_encoded_bytes())[..8]);
        Some(Self(journal.directory().join("policies").join(format!("{name}.yaml"))))
    }

    /// The text, if one was kept.
    pub fn text(&self) -> io::Result<String> {
        std::fs::read_to_string(&self.0)
    }

    /// Keeps `text` in place of the one before: whole or not at all, and for nobody else's eyes.
    pub fn keep(&self, text: &str) -> io::Result<()> {
        if let Some(directory) = self.0.parent() {
            private::directory(directory)?;
            std::fs::set_permissions(directory, Permissions::from_mode(0o700))?;
        }
        private::replace(&self.0, text, None)
    }
}
