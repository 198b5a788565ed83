//! Waiting for an upstream while minding the client: has it left, does it need a sign of life, is the time up?

use std::future::Future;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::{CACHE_CONTROL, CONTENT_TYPE};
use tokio::time::sleep_until;

use super::{AnswerHead, Downstream};
use crate::audit::record::Id;
use crate::headers::{ACCEL_BUFFERING, REQUEST_ID, set};

/// The comment that a silent stream gets. It is no event, so no parser hands it on.
pub const HEARTBEAT: Bytes = Bytes::from_static(b": keep-alive\n\n");

/// Why a wait ended without its result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interrupted {
    /// The client left.
    Gone,
    /// The wait's own limit passed.
    Limit,
    /// The whole request's limit passed.
    Total,
}

/// A client that waits for an answer.
pub struct Waiting<'a> {
    /// The client; `None` where somebody else minds it.
    downstream: Option<&'a mut Downstream>,
    /// When the whole request must be over.
    pub total: Instant,
    /// How often a stream's client gets a sign of life.
    pub heartbeat: Option<Duration>,
    /// How long the upstream is waited for after the client left; `None`: it is left too.
    pub drain: Option<Duration>,
    /// The request's id, for the head that the first heartbeat must send.
    pub request_id: Id,
    /// Since when the client has waited for one; nobody asks where there is none to be given.
    last_sign: Option<Instant>,
}

impl<'a> Waiting<'a> {
    /// Waits for no longer than `total`, with a sign of life every `heartbeat`, without draining.
    pub fn new(downstream: &'a mut Downstream, total: Instant, request_id: Id, heartbeat: Option<Duration>) -> Self {
        let last_sign = heartbeat.map(|_| Instant::now());
        Self { downstream: Some(downstream), total, heartbeat, drain: None, request_id, last_sign }
    }

    /// Waits for no longer than `total`, while somebody else minds the client.
    pub fn beside(total: Instant, request_id: Id) -> Self {
        Self { downstream: None, total, heartbeat: None, drain: None, request_id, last_sign: None }
    }

    /// Waits for `work` until `limit`.
    pub async fn until<T>(&mut self, limit: Instant, work: impl Future<Output = T>) -> Result<T, Interrupted> {
        tokio::pin!(work);
        loop {
            let sign = self.heartbeat.zip(self.last_sign).map(|(every, last)| last + every);
            let alarm = [Some(limit), Some(self.total), sign].into_iter().flatten().min().unwrap_or(limit);
            tokio::select! {
                biased;
                done = &mut work => return Ok(done),
                () = departure(&mut self.downstream) => self.departed()?,
                () = sleep_until(alarm.into()) => {}
            }
            let now = Instant::now();
            match () {
                () if now >= self.total => return Err(Interrupted::Total),
                () if now >= limit => return Err(Interrupted::Limit),
                () => self.give_sign(now).await?,
            }
        }
    }

    /// The client left: the upstream is waited for all the same, or not.
    fn departed(&mut self) -> Result<(), Interrupted> {
        let drain = self.drain.ok_or(Interrupted::Gone)?;
        if let Some(downstream) = &mut self.downstream {
            downstream.mute();
        }
        self.heartbeat = None;
        self.total = self.total.min(Instant::now() + drain);
        Ok(())
    }

    /// Sends a comment, and before the first one the head of an event stream. What comes after can only be events.
    async fn give_sign(&mut self, now: Instant) -> Result<(), Interrupted> {
        self.last_sign = Some(now);
        let Some(downstream) = &mut self.downstream else { return Ok(()) };
        if !downstream.head_sent()
            && let Some(head) = event_stream_head(&self.request_id)
        {
            downstream.write_head(head).await.map_err(|_| Interrupted::Gone)?;
        }
        downstream.write(HEARTBEAT).await.map_err(|_| Interrupted::Gone)
    }
}

/// The client leaves.
async fn departure(downstream: &mut Option<&mut Downstream>) {
    match downstream {
        Some(downstream) => _ = downstream.departed().await,
        None => std::future::pending().await,
    }
}

/// The head of an event stream whose upstream has not answered yet.
fn event_stream_head(request_id: &Id) -> Option<Box<AnswerHead>> {
    let (mut head, ()) = http::Response::new(()).into_parts();
    set(&mut head.headers, CONTENT_TYPE, "text/event-stream; charset=utf-8").ok()?;
    set(&mut head.headers, CACHE_CONTROL, "no-cache").ok()?;
    set(&mut head.headers, ACCEL_BUFFERING, "no").ok()?;
    set(&mut head.headers, REQUEST_ID, request_id.as_str()).ok()?;
    Some(Box::new(head.into()))
}
