//! Files and directories that only the gateway's own user can read, and that are still there after a power cut.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

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
