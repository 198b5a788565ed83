//! Messages to a Kafka topic.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use infergate_plugins::sink::kafka::Brokers;
use infergate_plugins::sink::{Failure, Message};
use rskafka::chrono::DateTime;
use rskafka::client::error::{Error, ProtocolError};
use rskafka::client::partition::{Compression, PartitionClient, UnknownTopicHandling};
use rskafka::client::{Client, ClientBuilder, Credentials, SaslConfig};
use rskafka::record::Record;

use crate::egress::Egress;

/// A connection to the partition that takes the lines of one run.
pub(super) struct Connection {
    run: String,
    partition: PartitionClient,
}

impl Connection {
    pub(super) async fn open(brokers: &Brokers, run: &str, egress: &Egress) -> Result<Self, String> {
        let told = |error: &dyn std::fmt::Display| format!("{}: {error}", brokers.addresses.join(", "));
        let mut builder = ClientBuilder::new(brokers.addresses.clone()).client_id("infergate");
        if brokers.tls {
            builder = builder.tls_config(Arc::new(egress.tls()));
        }
        if let Some((user, password)) = &brokers.login {
            let credentials = Credentials::new(user.clone(), password.reveal().to_owned());
            builder = builder.sasl_config(SaslConfig::Plain(credentials));
        }
        let client = builder.build().await.map_err(|error| told(&error))?;
        let number = match brokers.partition {
            Some(number) => number,
            None => chosen(&client, &brokers.topic, run).await?,
        };
        let partition = client.partition_client(&brokers.topic, number, UnknownTopicHandling::Error).await;
        Ok(Self { run: run.to_owned(), partition: partition.map_err(|error| told(&error))? })
    }

    /// Whether it is the one for the lines of this run.
    pub(super) fn is_for(&self, run: &str) -> bool {
        self.run == run
    }

    pub(super) async fn publish(&self, messages: Vec<Message>) -> Result<(), Failure> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis());
        let timestamp = DateTime::from_timestamp_millis(i64::try_from(now).unwrap_or(0)).unwrap_or_default();
        let record = |message: Message| Record {
            key: Some(message.id.into_bytes()),
            value: Some(message.payload.into()),
            headers: BTreeMap::new(),
            timestamp,
        };
        let records = messages.into_iter().map(record).collect();
        self.partition.produce(records, Compression::NoCompression).await.map(drop).map_err(|error| failure(&error))
    }
}

fn failure(error: &Error) -> Failure {
    use ProtocolError::{MessageTooLarge, RecordListTooLarge};
    match error {
        Error::ServerError { protocol_error: MessageTooLarge | RecordListTooLarge, .. } => {
            Failure::Refused("the broker takes no batch of this size".to_owned())
        }
        error => Failure::Later(error.to_string()),
    }
}

/// One of the topic's partitions, the same one for the same run.
async fn chosen(client: &Client, topic: &str, run: &str) -> Result<i32, String> {
    let topics = client.list_topics().await.map_err(|error| error.to_string())?;
    let found = topics.into_iter().find(|found| found.name == topic);
    let partitions: Vec<i32> = found.map(|topic| topic.partitions.into_iter().collect()).unwrap_or_default();
    let hash = run.bytes().fold(0_usize, |hash, byte| hash.wrapping_mul(31).wrapping_add(usize::from(byte)));
    let index = hash.checked_rem(partitions.len()).ok_or_else(|| format!("there is no topic {topic}: make it"))?;
    Ok(partitions[index])
}
