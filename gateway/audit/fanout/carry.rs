//! The way from here to a sink: one delivery at a time, over a connection that is kept while it works.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::Request;
use infergate_plugins::sink::kafka::Brokers;
use infergate_plugins::sink::nats::Servers;
use infergate_plugins::sink::{Delivery, Message, Outlet, Post, Sink, Way};

#[cfg(feature = "kafka")]
use super::kafka;
use super::{file, nats};
use crate::egress::Egress;

/// Carries deliveries to one sink.
pub(super) struct Carrier {
    egress: Arc<Egress>,
    nats: Option<nats::Connection>,
    #[cfg(feature = "kafka")]
    kafka: Option<kafka::Connection>,
}

/// A delivery that was not acknowledged, or only in part.
#[derive(Debug)]
pub(super) struct Undelivered {
    /// How many of its messages were.
    pub(super) done: usize,
    /// What happened.
    pub(super) why: String,
}

impl From<String> for Undelivered {
    fn from(why: String) -> Self {
        Self { done: 0, why }
    }
}

/// Delivered, perhaps with a warning.
pub(super) type Carried = Result<Option<String>, Undelivered>;

impl Carrier {
    pub(super) fn new(egress: Arc<Egress>) -> Self {
        Self {
            egress,
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
            (Way::Stdout, Delivery::Text(text)) => print(text).await,
            (Way::File(path), Delivery::Text(text)) => append(path, text).await,
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
    ) -> Result<(), String> {
        let (egress, kept) = (self.egress.clone(), self.kafka.take().filter(|connection| connection.is_for(run)));
        let work = async {
            let connection = match kept {
                Some(connection) => connection,
                None => kafka::Connection::open(brokers, run, &egress).await?,
            };
            connection.publish(messages).await.map(|()| connection)
        };
        // Its client tries again by itself and says nothing meanwhile.
        let done = tokio::time::timeout(within, work).await;
        self.kafka = Some(done.map_err(|_| format!("no answer within {} ms", within.as_millis()))??);
        Ok(())
    }

    #[cfg(not(feature = "kafka"))]
    async fn publish_to_kafka(&mut self, _: &Brokers, _: &str, _: Vec<Message>, _: Duration) -> Result<(), String> {
        Err("this gateway was built without Kafka".to_owned())
    }
}

/// However long it takes: a second writer beside one that is stuck would only be stuck as well.
async fn print(text: Bytes) -> Carried {
    blocking(move || file::print(&text)).await
}

async fn append(path: &Path, text: Bytes) -> Carried {
    let path = path.to_owned();
    blocking(move || file::append(&path, &text).map_err(|error| format!("{}: {error}", path.display()))).await
}

async fn blocking<E: ToString>(work: impl FnOnce() -> Result<(), E> + Send + 'static) -> Carried {
    let work = move || work().map_err(|error| error.to_string());
    match tokio::task::spawn_blocking(work).await {
        Ok(Ok(())) => Ok(None),
        Ok(Err(why)) => Err(why.into()),
        Err(error) => Err(error.to_string().into()),
    }
}
