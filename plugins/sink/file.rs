//! Lines in a file that something else reads or rotates.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::Deserialize;

use super::{Batch, Delivery, Sink, Way, Wrong, text};

/// Lines in a file. It is opened anew when it was moved away, as logrotate does.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[schemars(rename = "FileSink")]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The file. It is made if it is not there; its directory must be.
    pub path: PathBuf,
}

#[derive(Debug)]
pub(super) struct File {
    path: PathBuf,
}

pub(super) fn build(config: &Config) -> Result<File, Wrong> {
    match config.path.file_name() {
        Some(_) => Ok(File { path: config.path.clone() }),
        None => Err((".path".to_owned(), format!("{} names no file", config.path.display()))),
    }
}

impl Sink for File {
    fn kind(&self) -> &'static str {
        "file"
    }

    fn way(&self) -> Way<'_> {
        Way::File(&self.path)
    }

    fn delivery(&self, batch: &Batch<'_>) -> Delivery {
        Delivery::Text(text(batch.lines))
    }
}

#[cfg(test)]
mod tests {
    use crate::sink::tests::built;

    #[test]
    fn a_directory_is_no_file() {
        let wrong = built(r#"[{"name":"f","file":{"path":"/"}}]"#).unwrap_err().remove(0);
        assert_eq!(wrong, ("[0].file.path".to_owned(), "/ names no file".to_owned()));
    }
}
