//! Lines to the end of a file, and to the standard output. Both block.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Appends `text` and waits until it is on disk. The file is opened each time, so whoever moves it away gets nothing
/// more, and a new one begins.
pub(super) fn append(path: &Path, text: &[u8]) -> io::Result<()> {
    let mut file = File::options().create(true).append(true).read(true).mode(0o640).open(path)?;
    if !file.metadata()?.is_file() {
        return file.write_all(text);
    }
    if half_line(&mut file)? {
        file.write_all(b"\n")?;
    }
    file.write_all(text)?;
    file.sync_data()
}

/// Whether a crash or a full disk left a part of a line at the end. The whole line comes again.
fn half_line(file: &mut File) -> io::Result<bool> {
    if file.seek(SeekFrom::End(0))? == 0 {
        return Ok(false);
    }
    let mut last = [0];
    file.seek(SeekFrom::End(-1))?;
    file.read_exact(&mut last)?;
    Ok(last != *b"\n")
}

/// Writes `text` to the standard output.
pub(super) fn print(text: &[u8]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text)?;
    out.flush()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_file_that_was_moved_away_begins_anew() {
        let directory = tempfile::tempdir().unwrap();
        let (path, moved) = (directory.path().join("audit"), directory.path().join("audit.1"));
        append(&path, b"1\n").unwrap();
        fs::rename(&path, &moved).unwrap();
        append(&path, b"2\n").unwrap();
        assert_eq!((fs::read(&moved).unwrap(), fs::read(&path).unwrap()), (b"1\n".to_vec(), b"2\n".to_vec()));
    }

    #[test]
    fn a_half_line_that_a_crash_left_stands_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("audit");
        fs::write(&path, "1\nhal").unwrap();
        append(&path, b"2\n").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "1\nhal\n2\n");
    }
}
