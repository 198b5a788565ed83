//! Messages to a Kafka topic, one a line. The client is only in gateways that were built with the feature `kafka`.

use bytes::Bytes;
use schemars::JsonSchema;
use serde::Deserialize;

use super::line::Line;
use super::{Batch, Delivery, Message, Resolve, Sink, Way, Wrong};
use crate::secret::{Secret, SecretSource};

/// Messages to a Kafka topic, one a line, with the record's id as key. All lines of one run go to one partition, so
/// that they stay in order there.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[schemars(rename = "KafkaSink")]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Some brokers of the cluster: `HOST:9092`.
    #[schemars(length(min = 1))]
    pub brokers: Vec<String>,
    /// The topic. It must be there.
    #[schemars(length(min = 1))]
    pub topic: String,
    /// The partition. Absent: one for each run, chosen by the run's name.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub partition: Option<i32>,
    /// Whether the brokers are spoken to over TLS.
    #[serde(default)]
    pub tls: bool,
    /// The user's name, for SASL PLAIN.
    #[serde(default)]
    pub user: Option<String>,
    /// The user's password.
    #[serde(default)]
    pub password: Option<SecretSource>,
}

/// What is needed to connect.
#[derive(Clone, Debug)]
pub struct Brokers {
    /// Their addresses.
    pub addresses: Vec<String>,
    /// The topic.
    pub topic: String,
    /// The partition, if the policy names one.
    pub partition: Option<i32>,
    /// Whether they are spoken to over TLS.
    pub tls: bool,
    /// Name and password.
    pub login: Option<(String, Secret)>,
}

#[derive(Debug)]
pub(super) struct Kafka(Brokers);

pub(super) fn build(config: &Config, resolve: Resolve<'_>) -> Result<Kafka, Wrong> {
    if !cfg!(feature = "kafka") {
        let message = "this gateway was built without Kafka: build it with `cargo build --release --features kafka`";
        return Err((String::new(), message.to_owned()));
    }
    let login = match (&config.user, &config.password) {
        (None, None) => None,
        (Some(user), Some(source)) => {
            Some((user.clone(), resolve(source).map_err(|message| (".password".to_owned(), message))?))
        }
        _ => return Err((String::new(), "user and password go together".to_owned())),
    };
    let (addresses, topic) = (config.brokers.clone(), config.topic.clone());
    Ok(Kafka(Brokers { addresses, topic, partition: config.partition, tls: config.tls, login }))
}

impl Sink for Kafka {
    fn kind(&self) -> &'static str {
        "kafka"
    }

    fn way(&self) -> Way<'_> {
        Way::Kafka(&self.0)
    }

    fn delivery(&self, batch: &Batch<'_>) -> Delivery {
        let message = |text: &&[u8]| Message {
            subject: self.0.topic.clone(),
            id: Line::read(text).key(batch.run),
            payload: Bytes::copy_from_slice(text),
        };
        Delivery::Messages(batch.lines.iter().map(message).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sink::tests::{LINE, batch, built};

    const CONFIG: &str = r#"[{"name":"k","kafka":{"brokers":["h:9092"],"topic":"audit"}}]"#;

    #[test]
    #[cfg(not(feature = "kafka"))]
    fn a_gateway_without_it_says_how_to_build_one_with_it() {
        let (path, message) = built(CONFIG).unwrap_err().remove(0);
        assert!(path == "[0].kafka" && message.contains("--features kafka"), "{path}: {message}");
    }

    #[test]
    #[cfg(feature = "kafka")]
    fn a_whole_configuration_builds() {
        assert_eq!(built(CONFIG).unwrap()[0].sink.kind(), "kafka");
    }

    #[test]
    fn each_line_is_a_message_with_its_id_as_key() {
        let brokers =
            Brokers { addresses: Vec::new(), topic: "audit".into(), partition: None, tls: false, login: None };
        let Delivery::Messages(messages) = Kafka(brokers).delivery(&batch(&[LINE.as_bytes()])) else { panic!() };
        assert_eq!((messages[0].subject.as_str(), messages[0].id.as_str()), ("audit", "0197-a"));
    }
}
