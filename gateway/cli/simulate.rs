//! `infergate simulate`: the embedded model server alone.

use std::process::ExitCode;

use clap::Args;

use super::Logging;
use crate::simulate::{Options, Simulated};

/// Run the embedded model server.
#[derive(Args)]
pub(super) struct Simulate {
    #[command(flatten)]
    options: Options,
    #[command(flatten)]
    logging: Logging,
}

impl Simulate {
    pub(super) fn run(self) -> Result<ExitCode, String> {
        self.logging.start()?;
        let listen = self.options.listen;
        let runtime =
            tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(|error| error.to_string())?;
        runtime.block_on(async {
            let server =
                Simulated::start(self.options).await.map_err(|error| format!("cannot listen on {listen}: {error}"))?;
            println!("a simulated model server listens on {}", server.url());
            tokio::select! {
                () = server.stopped() => {}
                _ = tokio::signal::ctrl_c() => {}
            }
            Ok(ExitCode::SUCCESS)
        })
    }
}
