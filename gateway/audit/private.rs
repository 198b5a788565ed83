//! Files and directories that only the gateway's own user can read, and that are still there after a power cut.

use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Makes a directory, and those above it, where they are not there yet.
pub fn directory(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)?;
    sync(above(path))
}

/// The directory that `path` stands in.
fn above(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Opens a file to append to, which is made if it is not there.
pub fn append(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().create(true).append(true).mode(0o600).open(path)?;
    sync(above(path))?;
    Ok(file)
}

/// Makes an empty file, in place of one that may be there.
pub fn fresh(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(path)
}

/// Puts a file in the place of `path`, with other `permissions` than its owner's alone if there are any. Whoever reads it
/// gets the old one or the new one, also after a power cut.
pub fn replace(path: &Path, text: &str, permissions: Option<Permissions>) -> io::Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let fresh = Fresh(above(path).join(format!(".{name}.{}", uuid::Uuid::now_v7().simple())));
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&fresh.0)?;
    file.write_all(text.as_bytes())?;
    permissions.map_or(Ok(()), |permissions| file.set_permissions(permissions))?;
    file.sync_all()?;
    std::fs::rename(&fresh.0, path)?;
    sync(above(path))
}

/// A file that is not to stay behind when something fails.
struct Fresh(PathBuf);

impl Drop for Fresh {
    fn drop(&mut self) {
        // After the rename it is not there any more.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// The names in a directory survive a crash from here on.
pub fn sync(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn what_is_made_is_its_owners_alone() {
        let place = tempfile::tempdir().unwrap();
        let (inner, file) = (place.path().join("a/b"), place.path().join("a/b/c"));
        directory(&inner).unwrap();
        directory(&inner).unwrap();
        append(&file).unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!([mode(&place.path().join("a")), mode(&inner), mode(&file)], [0o700, 0o700, 0o600]);
        fresh(&inner.join("d")).unwrap();
        assert_eq!(mode(&inner.join("d")), 0o600);
    }

    #[test]
    fn a_name_without_a_slash_stands_where_we_are() {
        assert_eq!([above(Path::new("j")), above(Path::new("j/k"))], [Path::new("."), Path::new("j")]);
    }
}
