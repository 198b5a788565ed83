//! Resident memory of the proxies: after the start, and with many open streams that say nothing.

use crate::children::Running;
use crate::client::{Answer, Load, Transport};
use crate::prompt::Turns;
use crate::{Failure, cpu};
use std::time::Duration;

/// Each stream sends one event and then nothing for the rest of the measurement.
const SILENCE: Duration = Duration::from_secs(600);

/// Time for a proxy to come to rest before it is looked at.
const REST: Duration = Duration::from_millis(500);

/// What a proxy holds, in KiB.
pub struct Memory {
    /// After the start, before any request.
    pub idle: f64,
    /// With the streams open.
    pub open: f64,
    /// The difference, for one stream.
    pub stream: f64,
}

/// Looks at a proxy that has just been started. It is of no use for another measurement.
pub async fn measure(proxy: &Running, bytes: usize, streams: usize) -> Result<Memory, Failure> {
    let load = Load {
        connections: streams,
        bytes,
        turns: Turns::One,
        answer: Answer::Stream { events: 2, interval: SILENCE },
        transport: Transport::Kept,
        apart: false,
    };
    tokio::time::sleep(REST).await;
    let idle = cpu::resident(proxy.pid())? as f64;
    let held = load.hold(proxy.address, streams).await?;
    tokio::time::sleep(REST).await;
    let open = cpu::resident(proxy.pid())? as f64;
    drop(held);
    Ok(Memory { idle, open, stream: (open - idle) / streams as f64 })
}
