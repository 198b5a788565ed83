//! The headers that the gateway reads and writes.

use std::fmt::Write;

use super::cell;
use crate::headers::{ALL, Told};

/// A table for each side.
pub(super) fn markdown() -> String {
    let mut out = String::new();
    for (side, lists) in ALL {
        let _ = writeln!(out, "#### {side}\n\n| header | when | what it says |\n|---|---|---|");
        for Told { name, when, meaning } in lists.iter().flat_map(|list| list.iter()) {
            let _ = writeln!(out, "| `{name}` | {} | {} |", cell(when), cell(meaning.trim()));
        }
        out.push('\n');
    }
    out
}
