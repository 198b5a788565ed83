//! Requests without a pause on both protocols, streams among them, until told to stop: what was lost meanwhile?

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::task::JoinSet;

use super::{Client, chat, http};

/// Requests that are being sent.
pub struct Load {
    stop: Arc<AtomicBool>,
    tasks: JoinSet<Tally>,
}

/// What became of them.
#[derive(Debug, Default)]
pub struct Tally {
    /// Answered whole.
    pub whole: u64,
    /// No connection: nobody listened any more.
    pub unconnected: u64,
    /// Everything else.
    pub lost: Vec<String>,
}

impl Load {
    /// Starts `tasks` of them for each protocol.
    pub fn start(address: SocketAddr, tasks: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let mut load = Self { stop, tasks: JoinSet::new() };
        for client in Client::both() {
            for _ in 0..tasks {
                load.tasks.spawn(ask(client.clone(), address, load.stop.clone()));
            }
        }
        load
    }

    /// Stops them; what became of all of them together.
    pub async fn stop(mut self) -> Tally {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = Tally::default();
        while let Some(tally) = self.tasks.join_next().await {
            let tally = tally.unwrap();
            all.whole += tally.whole;
            all.unconnected += tally.unconnected;
            all.lost.extend(tally.lost);
        }
        all
    }
}

async fn ask(client: Client, address: SocketAddr, stop: Arc<AtomicBool>) -> Tally {
    let mut tally = Tally::default();
    while !stop.load(Ordering::Relaxed) {
        let stream = (tally.whole + tally.unconnected).is_multiple_of(2);
        match client.try_send(http::post(address, "/v1/chat/completions", &[], chat(stream, 4))).await {
            Ok(answer)
                if answer.status == 200 && answer.whole && (!stream || answer.text().ends_with("data: [DONE]\n\n")) =>
            {
                tally.whole += 1;
            }
            Ok(answer) => tally.lost.push(format!("{} {} {}", answer.status, answer.whole, answer.text())),
            Err(error) if error.is_connect() => {
                tally.unconnected += 1;
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
            Err(error) => tally.lost.push(format!("{error:?}")),
        }
    }
    tally
}
