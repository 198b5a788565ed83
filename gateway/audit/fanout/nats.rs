//! Messages to NATS JetStream.

use std::time::Duration;

use async_nats::ConnectOptions;
use async_nats::connection::State;
use async_nats::jetstream::context::{Context, ContextBuilder, PublishAckFuture, PublishErrorKind};
use async_nats::jetstream::message::PublishMessage;
use infergate_plugins::sink::Message;
use infergate_plugins::sink::nats::{Login, Servers};

use super::carry::Undelivered;
use crate::egress::Egress;

/// Until a connection stands.
const CONNECT: Duration = Duration::from_secs(5);
/// How often it is looked whether the connection still stands while an acknowledgement is awaited.
const LOOK: Duration = Duration::from_millis(100);

/// A connection to a JetStream. After a failure it is not used again: what its client still holds back must not come
/// after what is sent anew.
pub(super) struct Connection {
    stream: Context,
    in_flight: usize,
    within: Duration,
}

impl Connection {
    pub(super) async fn open(servers: &Servers, egress: &Egress, within: Duration) -> Result<Self, String> {
        let options = login(&servers.login).await?;
        let client = options
            .name("infergate")
            .connection_timeout(CONNECT)
            .max_reconnects(servers.addresses.len())
            .tls_client_config(egress.tls())
            .connect(&servers.addresses)
            .await
            .map_err(|error| format!("{servers}: {error}"))?;
        let stream = ContextBuilder::new().timeout(within).build(client);
        Ok(Self { stream, in_flight: servers.in_flight, within })
    }

    /// Publishes in order. What was acknowledged before a failure counts as done.
    pub(super) async fn publish(&self, messages: &[Message]) -> Result<(), Undelivered> {
        let mut done = 0;
        for chunk in messages.chunks(self.in_flight) {
            let mut acks = Vec::with_capacity(chunk.len());
            for message in chunk {
                acks.push((message, self.send(message).await.map_err(|why| Undelivered { done, why })?));
            }
            for (message, ack) in acks {
                self.acknowledged(message, ack).await.map_err(|why| Undelivered { done, why })?;
                done += 1;
            }
        }
        Ok(())
    }

    async fn send(&self, message: &Message) -> Result<PublishAckFuture, String> {
        let publish = PublishMessage::build().payload(message.payload.clone()).message_id(&message.id);
        let sent = tokio::time::timeout(self.within, self.stream.send_publish(message.subject.clone(), publish)).await;
        match sent {
            Ok(Ok(ack)) => Ok(ack),
            Ok(Err(error)) => Err(format!("{} cannot be published: {error}", message.id)),
            Err(_) => Err("the connection takes no message".to_owned()),
        }
    }

    async fn acknowledged(&self, message: &Message, ack: PublishAckFuture) -> Result<(), String> {
        let acknowledged = tokio::select! {
            acknowledged = async { ack.await } => acknowledged,
            () = self.lost() => return Err("the connection is lost".to_owned()),
        };
        match acknowledged {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == PublishErrorKind::StreamNotFound => Err(format!(
                "no stream takes the subject {}: make one, as with `nats stream add`, or wait until it is back",
                message.subject
            )),
            Err(error) => Err(error.to_string()),
        }
    }

    async fn lost(&self) {
        while self.stream.client().connection_state() == State::Connected {
            tokio::time::sleep(LOOK).await;
        }
    }
}

async fn login(login: &Login) -> Result<ConnectOptions, String> {
    let options = ConnectOptions::new();
    Ok(match login {
        Login::None => options,
        Login::User(user, password) => options.user_and_password(user.clone(), password.reveal().to_owned()),
        Login::Token(token) => options.token(token.reveal().to_owned()),
        Login::File(path) => {
            options.credentials_file(path).await.map_err(|error| format!("{}: {error}", path.display()))?
        }
    })
}
