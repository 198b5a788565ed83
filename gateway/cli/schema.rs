//! `infergate schema`: the JSON Schema of the policy or the settings, for editors.

use std::process::ExitCode;

use clap::Args;

use crate::policy;
use crate::settings::Settings;

/// Print a schema.
#[derive(Args)]
pub(super) struct Schema {
    /// The schema of the settings instead
    #[arg(long)]
    settings: bool,
}

impl Schema {
    pub(super) fn run(self) -> Result<ExitCode, String> {
        let schema = if self.settings { schemars::schema_for!(Settings) } else { policy::schema() };
        let text = serde_json::to_string_pretty(&schema).map_err(|error| error.to_string())?;
        println!("{text}");
        Ok(ExitCode::SUCCESS)
    }
}
