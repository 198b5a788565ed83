//! Messages to NATS JetStream.

use std::error::Error as _;
use std::time::Duration;

use async_nats::ConnectOptions;
use async_nats::connection::State;
use async_nats::jetstream::context::{Context, ContextBuilder, PublishAckFuture, PublishError, PublishErrorKind};
use async_nats::jetstream::message::PublishMessage;
use async_nats::jetstream::{Error, ErrorCode};
use infergate_plugins::sink::nats::{Login, Servers};
use infergate_plugins::sink::{Failure, Message};

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
            let (mut acks, mut refused) = (Vec::with_capacity(chunk.len()), None);
            for message in chunk {
                match self.send(message).await {
                    Ok(ack) => acks.push((message, ack)),
                    Err(why @ Failure::Later(_)) => return Err(Undelivered { done, why, alone: true }),
                    Err(why) => {
                        refused = Some(why);
                        break;
                    }
                }
            }
            for (message, ack) in acks {
                let acknowledged = self.acknowledged(message, ack).await;
                acknowledged.map_err(|why| Undelivered { done, why, alone: true })?;
                done += 1;
            }
            if let Some(why) = refused {
                return Err(Undelivered { done, why, alone: true });
            }
        }
        Ok(())
    }

    async fn send(&self, message: &Message) -> Result<PublishAckFuture, Failure> {
        let publish = PublishMessage::build().payload(message.payload.clone()).message_id(&message.id);
        let sent = tokio::time::timeout(self.within, self.stream.send_publish(message.subject.clone(), publish)).await;
        match sent {
            Ok(Ok(ack)) => Ok(ack),
            Ok(Err(error)) => Err(failure(&error, message)),
            Err(_) => Err(Failure::Later("the connection takes no message".to_owned())),
        }
    }

    async fn acknowledged(&self, message: &Message, ack: PublishAckFuture) -> Result<(), Failure> {
        tokio::select! {
            acknowledged = async { ack.await } => acknowledged.map(drop).map_err(|error| failure(&error, message)),
            () = self.lost() => Err(Failure::Later("the connection is lost".to_owned())),
        }
    }

    async fn lost(&self) {
        while self.stream.client().connection_state() == State::Connected {
            tokio::time::sleep(LOOK).await;
        }
    }
}

fn failure(error: &PublishError, message: &Message) -> Failure {
    match error.kind() {
        PublishErrorKind::MaxPayloadExceeded => Failure::Refused(error.to_string()),
        _ if too_large_for_stream(error) => Failure::Refused(error.to_string()),
        PublishErrorKind::StreamNotFound => Failure::Later(format!(
            "no stream takes the subject {}: make one, as with `nats stream add`, or wait until it is back",
            message.subject
        )),
        _ => Failure::Later(format!("{} cannot be published: {error}", message.id)),
    }
}

/// Whether the stream's `max_msg_size` is what the message is too large for.
fn too_large_for_stream(error: &PublishError) -> bool {
    let told = error.source().and_then(|source| source.downcast_ref::<Error>());
    told.is_some_and(|told| told.error_code() == ErrorCode::STREAM_MESSAGE_EXCEEDS_MAXIMUM)
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
