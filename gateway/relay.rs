//! Our app on Pingora's server: one session in, the pipeline called, one answer out.
//!
//! Only this file and its folder name Pingora. Inference requests run on an [`HttpServerApp`] of our own rather
//! than on Pingora's stock proxy, which loses bodies over 64 KiB, cannot wait between two pieces of an answer
//! and cannot end a stream cleanly.

mod attempt;
mod connection;
mod downstream;
pub mod headers;
mod hide;
pub mod server;
mod stream;
mod tls;
mod upgrade;
mod waiting;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use pingora::apps::{HttpServerApp, HttpServerOptions, ReusedHttpStream};
use pingora::protocols::http::ServerSession;
use pingora::protocols::http::v2::server::{H2Options, default_h2_options};
use pingora::server::ShutdownWatch;

use crate::house::House;
use crate::pipeline;

pub use attempt::{Answer, Failure, Order, Rest, ask, fetch, fetch_until};
pub use connection::{Connections, Target};
pub use downstream::{BodyFault, Downstream, Gone};
pub use stream::{Pace, Passed, Reading, Tally, WholeFault, pass_on, redacted};
pub use upgrade::{Parting, Tunnel, Tunnelled, carry, part, tunnel};
pub use waiting::{Interrupted, Waiting};

/// What is heard of Pingora in the log.
pub const LOG_LEVELS: &str = "pingora_core=warn,pingora=warn";

/// The head of an answer, on its way from an upstream to the client.
pub type AnswerHead = pingora::http::ResponseHeader;

/// One listener's app.
pub struct App {
    house: Arc<House>,
    options: HttpServerOptions,
    idle: Duration,
}

impl App {
    /// The app for a listener on which idle connections live for `idle`.
    pub fn new(house: Arc<House>, h2c: bool, idle: Duration) -> Self {
        let mut options = HttpServerOptions::default();
        options.h2c = h2c;
        options.h2_idle_timeout = Some(idle);
        Self { house, options, idle }
    }
}

#[async_trait]
impl HttpServerApp for App {
    /// Serves every request of a connection. Given its connection back after each, Pingora would make and move a new
    /// future of kilobytes for the next.
    async fn process_new_http(
        self: &Arc<Self>,
        mut session: ServerSession,
        shutdown: &ShutdownWatch,
    ) -> Option<ReusedHttpStream> {
        self.house.telemetry.runtimes.on("requests");
        loop {
            let closing = &self.house.connections_closing;
            let mut downstream = Downstream::read(session, self.idle, shutdown, closing).await?;
            pipeline::serve(&self.house, &mut downstream).await;
            session = downstream.into_next().await?;
        }
    }

    fn server_options(&self) -> Option<&HttpServerOptions> {
        Some(&self.options)
    }

    /// Bounds against floods of streams and headers (R53): Pingora's defaults, named here so that they are seen.
    fn h2_options(&self) -> Option<H2Options> {
        let mut options = default_h2_options();
        options.max_concurrent_streams(256).max_header_list_size(64 << 10).max_pending_accept_reset_streams(20);
        Some(options)
    }
}
