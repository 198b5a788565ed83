//! `infergate schema`: the JSON Schema of the policy or the settings, for editors, and of the record, for readers.

use std::process::ExitCode;

use clap::Args;

use crate::audit::record;
use crate::policy;
use crate::settings::Settings;

/// Print a schema.
#[derive(Args)]
pub(super) struct Schema {
    /// The schema of the settings instead
    #[arg(long, conflicts_with = "record")]
    settings: bool,
    /// The schema of a request's record in the journal instead
    #[arg(long)]
    record: bool,
    /// The schema of a file of prices instead
    #[arg(long, conflicts_with_all = ["settings", "record"])]
    prices: bool,
}

impl Schema {
    pub(super) fn run(self) -> Result<ExitCode, String> {
        let schema = match (self.settings, self.record) {
            (true, _) => schemars::schema_for!(Settings),
            (_, true) => record::schema(),
            _ if self.prices => policy::prices::schema(),
            _ => policy::schema(),
        };
        let text = serde_json::to_string_pretty(&schema).map_err(|error| error.to_string())?;
        println!("{text}");
        Ok(ExitCode::SUCCESS)
    }
}
