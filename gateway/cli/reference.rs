//! `infergate reference`: what there is to be looked up, as Markdown, made from what the code itself goes by.

mod commands;
mod headers;
mod metrics;
mod shapes;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, ValueEnum};

use crate::policy;
use crate::settings::Settings;

/// Print a reference.
#[derive(Args)]
pub(super) struct Reference {
    /// Of what
    #[arg(long, value_enum, default_value_t = Of::Policy)]
    of: Of,
    /// The reference of the settings: `--of settings`
    #[arg(long, conflicts_with = "of")]
    settings: bool,
    /// Put it into this file, between the lines `<!-- reference -->` and `<!-- /reference -->`
    #[arg(long, value_name = "FILE")]
    into: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Of {
    Policy,
    Settings,
    Metrics,
    Headers,
    Commands,
}

const BEGIN: &str = "<!-- reference -->\n";
const END: &str = "<!-- /reference -->\n";

impl Reference {
    pub(super) fn run(self) -> Result<ExitCode, String> {
        let of = if self.settings { Of::Settings } else { self.of };
        let text = match of {
            Of::Settings => shapes::markdown(schemars::schema_for!(Settings).as_value()),
            Of::Policy => shapes::markdown(policy::schema().as_value()),
            Of::Metrics => metrics::markdown(),
            Of::Headers => headers::markdown(),
            Of::Commands => commands::markdown(),
        };
        match self.into {
            Some(file) => put(&file, &text)?,
            None => print!("{text}"),
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// Replaces what stands between the two marks.
fn put(file: &Path, text: &str) -> Result<(), String> {
    let told = |error: std::io::Error| format!("{}: {error}", file.display());
    let before = std::fs::read_to_string(file).map_err(told)?;
    let marks = before.split_once(BEGIN).and_then(|(head, rest)| Some((head, behind(rest)?)));
    let Some((head, tail)) = marks else {
        return Err(format!("{} lacks the lines {} and {}", file.display(), BEGIN.trim_end(), END.trim_end()));
    };
    std::fs::write(file, format!("{head}{BEGIN}{text}{END}{tail}")).map_err(told)
}

/// What stands behind the line that is the mark of the end: the reference itself speaks of marks.
fn behind(text: &str) -> Option<&str> {
    let mut ends = text.match_indices(END).filter(|(at, _)| text[..*at].is_empty() || text[..*at].ends_with('\n'));
    ends.next().map(|(at, end)| &text[at + end.len()..])
}

/// A text as a cell of a table.
fn cell(text: &str) -> String {
    text.replace('\n', " ").replace('|', "\\|")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reference_that_names_its_marks_is_put_there_as_often_as_one_likes() {
        let page = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&page, format!("before\n{BEGIN}{END}after\n")).unwrap();
        let text = "| between `<!-- reference -->` and `<!-- /reference -->` |\n";
        for _ in 0..2 {
            put(page.path(), text).unwrap();
            assert_eq!(std::fs::read_to_string(&page).unwrap(), format!("before\n{BEGIN}{text}{END}after\n"));
        }
        std::fs::write(&page, format!("{BEGIN}no end: {END}")).unwrap();
        assert!(
            put(page.path(), text).unwrap_err().contains("lacks the lines <!-- reference --> and <!-- /reference -->")
        );
    }
}
