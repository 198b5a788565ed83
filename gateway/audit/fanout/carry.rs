//! The way from here to a sink: one delivery at a time, over a connection that is kept while it works.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use http::Request;
use infergate_plugins::sink::kafka::Brokers;
use infergate_plugins::sink::nats::Servers;
use infergate_plugins::sink::{Delivery, Failure, Message, Outlet, Post, Rejected, Sink, Way};
use tokio::task::JoinHandle;

#[cfg(feature = "kafka")]
use super::kafka;
use super::{file, nats};
use crate::egress::Egress;

/// Carries deliveries to one sink.
pub(super) struct Carrier {
    egress: Arc<Egress>,
    /// A write that is stuck. Its text comes again until it is written.
    writing: Option<Writing>,
    nats: Option<nats::Connection>,
    #[cfg(feature = "kafka")]
    kafka: Option<kafka::Connection>,
}

type Writing = JoinHandle<Result<(), String>>;

/// A delivery that was not acknowledged, or only in part.
#[derive(Debug)]
pub(super) struct Undelivered {
    /// How many of its messages were.
    pub(super) done: usize,
    /// What happened to the others.
    pub(super) why: Failure,
    /// Whether it is known to be about the next message alone.
    pub(super) alone: bool,
}

impl From<Failure> for Undelivered {
    fn from(why: Failure) -> Self {
        Self { done: 0, why, alone: false }
    }
}

impl From<String> for Undelivered {
    fn from(why: String) -> Self {
        Failure::Later(why).into()
    }
}

/// Delivered, perhaps without some lines.
pub(super) type Carried = Result<Option<Rejected>, Undelivered>;

impl Carrier {
    pub(super) fn new(egress: Arc<Egress>) -> Self {
        Self {
            egress,
            writing: None,
            nats: None,
            #[cfg(feature = "kafka")]
            kafka: None,
        }
    }

    /// Carries lines of `run` and waits until they are acknowledged.
    pub(super) async fn carry(&mut self, outlet: &Outlet, run: &str, delivery: Delivery) -> Carried {
        let within = Duration::from_millis(outlet.config.timeout_ms);
        let sink = outlet.sink.as_ref();
        match (sink.way(), delivery) {
            (Way::Stdout, Delivery::Text(text)) => self.write(within, move || print(&text)).await,
            (Way::File(path), Delivery::Text(text)) => {
                let path = path.to_owned();
                self.write(within, move || append(&path, &text)).await
            }
            (Way::Http, Delivery::Http(post)) => self.post(sink, post, within).await,
            (Way::Nats(servers), Delivery::Messages(messages)) => {
                self.publish_to_nats(servers, &messages, within).await
            }
            (Way::Kafka(brokers), Delivery::Messages(messages)) => {
                self.publish_to_kafka(brokers, run, messages, within).await?;
                Ok(None)
            }
            _ => Err(format!("a sink of the kind {} packs for another way than it goes", sink.kind()).into()),
        }
    }

    /// Nobody can take a write back, and a second one beside one that is stuck would only be stuck as well: what is
    /// sent again is not written again, the first writing of it is waited for.
    async fn write(&mut self, within: Duration, work: impl FnOnce() -> Result<(), String> + Send + 'static) -> Carried {
        let mut writing = self.writing.take().unwrap_or_else(|| tokio::task::spawn_blocking(work));
        match tokio::time::timeout(within, &mut writing).await {
            Ok(Ok(done)) => Ok(done.map(|()| None)?),
            Ok(Err(error)) => Err(error.to_string().into()),
            Err(_) => {
                self.writing = Some(writing);
                Err(format!("not written within {} ms", within.as_millis()).into())
            }
        }
    }

    async fn post(&self, sink: &dyn Sink, post: Post, within: Duration) -> Carried {
        let mut request = Request::new(post.body);
        *request.method_mut() = http::Method::POST;
        *request.uri_mut() = post.url;
        request.headers_mut().extend(post.headers);
        let answer = self.egress.send(request, within).await?;
        Ok(sink.judge(answer.status().as_u16(), answer.body())?)
    }

    async fn publish_to_nats(&mut self, servers: &Servers, messages: &[Message], within: Duration) -> Carried {
        let connection = match self.nats.take() {
            Some(connection) => connection,
            None => nats::Connection::open(servers, &self.egress, within).await?,
        };
        connection.publish(messages).await?;
        self.nats = Some(connection);
        Ok(None)
    }

    #[cfg(feature = "kafka")]
    async fn publish_to_kafka(
        &mut self,
        brokers: &Brokers,
        run: &str,
        messages: Vec<Message>,
        within: Duration,
    ) -> Result<(), Failure> {
        let (egress, kept) = (self.egress.clone(), self.kafka.take().filter(|connection| connection.is_for(run)));
        let work = async {
            let connection = match kept {
                Some(connection) => connection,
                None => kafka::Connection::open(brokers, run, &egress).await.map_err(Failure::Later)?,
            };
            connection.publish(messages).await.map(|()| connection)
        };
        // Its client tries again by itself and says nothing meanwhile.
        let done = tokio::time::timeout(within, work).await;
        let late = |_| Failure::Later(format!("no answer within {} ms", within.as_millis()));
        self.kafka = Some(done.map_err(late)??);
        Ok(())
    }

    #[cfg(not(feature = "kafka"))]
    async fn publish_to_kafka(&mut self, _: &Brokers, _: &str, _: Vec<Message>, _: Duration) -> Result<(), Failure> {
        Err(Failure::Later("this gateway was built without Kafka".to_owned()))
    }
}

fn print(text: &[u8]) -> Result<(), String> {
    file::print(text).map_err(|error| error.to_string())
}

fn append(path: &Path, text: &[u8]) -> Result<(), String> {
    file::append(path, text).map_err(|error| format!("{}: {error}", path.display()))
}
