//! Messages to NATS JetStream, one a line; the server drops what it has seen already.

use std::fmt;
use std::path::PathBuf;

use bytes::Bytes;
use schemars::JsonSchema;
use serde::Deserialize;

use super::line::Line;
use super::{Batch, Delivery, Message, Resolve, Sink, Way, Wrong};
use crate::secret::{Secret, SecretSource};

/// Messages to NATS JetStream, one a line, with the record's id as `Nats-Msg-Id`. A stream must take their subjects;
/// its duplicate window decides how long the server drops what it has seen already.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[schemars(rename = "NatsSink")]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The servers of one cluster: `nats://HOST:4222`, or `tls://HOST:4222`.
    #[schemars(length(min = 1))]
    pub servers: Vec<String>,
    /// The subject. `{kind}`, `{outcome}`, `{tenant}` and `{run}` stand for what the line has there.
    #[serde(default = "Config::subject")]
    pub subject: String,
    /// How many messages may wait for their acknowledgement at once. With 1 the stream has every run's lines in
    /// order whatever breaks; with more it is faster, and lines around a failure may change places.
    #[serde(default = "Config::in_flight")]
    #[schemars(range(min = 1, max = 1024))]
    pub in_flight: usize,
    /// The user's name.
    #[serde(default)]
    pub user: Option<String>,
    /// The user's password.
    #[serde(default)]
    pub password: Option<SecretSource>,
    /// A token instead of user and password.
    #[serde(default)]
    pub token: Option<SecretSource>,
    /// A `.creds` file instead of user and password, read at each connection.
    #[serde(default)]
    pub credentials_file: Option<PathBuf>,
}

impl Config {
    fn subject() -> String {
        "infergate.audit.{kind}".to_owned()
    }

    fn in_flight() -> usize {
        1
    }
}

/// What is needed to connect.
#[derive(Clone, Debug)]
pub struct Servers {
    /// Their addresses.
    pub addresses: Vec<String>,
    /// How they know us.
    pub login: Login,
    /// How many messages may wait for their acknowledgement at once.
    pub in_flight: usize,
}

/// How a server knows us.
#[derive(Clone, Debug)]
pub enum Login {
    /// It does not ask.
    None,
    /// By name and password.
    User(String, Secret),
    /// By a token.
    Token(Secret),
    /// By the key and the token in a file.
    File(PathBuf),
}

#[derive(Debug)]
pub(super) struct Nats {
    servers: Servers,
    subject: Vec<Piece>,
}

/// A piece of a subject.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Piece {
    Text(String),
    Kind,
    Outcome,
    Tenant,
    Run,
}

pub(super) fn build(config: &Config, resolve: Resolve<'_>) -> Result<Nats, Wrong> {
    for (index, address) in config.servers.iter().enumerate() {
        check_address(address).map_err(|message| (format!(".servers[{index}]"), message.to_owned()))?;
    }
    let subject = pieces(&config.subject).map_err(|message| (".subject".to_owned(), message))?;
    let login = login(config, resolve)?;
    let servers = Servers { addresses: config.servers.clone(), login, in_flight: config.in_flight };
    Ok(Nats { servers, subject })
}

fn check_address(address: &str) -> Result<(), &'static str> {
    let host = address.strip_prefix("nats://").or_else(|| address.strip_prefix("tls://"));
    match host {
        Some(host) if host.contains('@') => Err("no user and password in here: use user and password, or token"),
        Some(host) if !host.is_empty() && !host.contains(|c: char| c.is_whitespace() || c == '/') => Ok(()),
        _ => Err("give nats://HOST:PORT or tls://HOST:PORT"),
    }
}

fn login(config: &Config, resolve: Resolve<'_>) -> Result<Login, Wrong> {
    let mut read = |key: &str, source: &SecretSource| resolve(source).map_err(|message| (format!(".{key}"), message));
    match (&config.user, &config.password, &config.token, &config.credentials_file) {
        (None, None, None, None) => Ok(Login::None),
        (Some(user), Some(source), None, None) => Ok(Login::User(user.clone(), read("password", source)?)),
        (None, None, Some(source), None) => Ok(Login::Token(read("token", source)?)),
        (None, None, None, Some(path)) => Ok(Login::File(path.clone())),
        _ => Err((String::new(), "give user and password, or token, or credentials_file, or none of them".to_owned())),
    }
}

fn pieces(subject: &str) -> Result<Vec<Piece>, String> {
    let mut pieces = Vec::new();
    let mut rest = subject;
    while let Some((before, behind)) = rest.split_once('{') {
        let (name, after) = behind.split_once('}').ok_or("a { has no }")?;
        pieces.push(Piece::Text(before.to_owned()));
        pieces.push(
            Piece::named(name)
                .ok_or_else(|| format!("{{{name}}} is none of {{kind}}, {{outcome}}, {{tenant}}, {{run}}"))?,
        );
        rest = after;
    }
    pieces.push(Piece::Text(rest.to_owned()));
    pieces.retain(|piece| *piece != Piece::Text(String::new()));
    let sample = filled(&pieces, &Line::default(), "run");
    let token = |token: &str| !token.is_empty() && !token.contains(|c: char| c.is_whitespace() || "*>".contains(c));
    if sample.split('.').all(token) {
        Ok(pieces)
    } else {
        Err(format!("{subject} is no subject: words with dots between"))
    }
}

impl Piece {
    fn named(name: &str) -> Option<Self> {
        match name {
            "kind" => Some(Self::Kind),
            "outcome" => Some(Self::Outcome),
            "tenant" => Some(Self::Tenant),
            "run" => Some(Self::Run),
            _ => None,
        }
    }
}

fn filled(pieces: &[Piece], line: &Line<'_>, run: &str) -> String {
    let mut subject = String::new();
    for piece in pieces {
        match piece {
            Piece::Text(text) => subject.push_str(text),
            Piece::Kind => push_token(&mut subject, &line.kind),
            Piece::Outcome => push_token(&mut subject, line.outcome.as_deref().unwrap_or_default()),
            Piece::Tenant => push_token(&mut subject, line.tenant.as_deref().unwrap_or_default()),
            Piece::Run => push_token(&mut subject, run),
        }
    }
    subject
}

/// A value as one word of a subject: what has a meaning there, or none everywhere, becomes `_`.
fn push_token(subject: &mut String, value: &str) {
    let plain = |c: char| if c.is_ascii_graphic() && !".*>".contains(c) { c } else { '_' };
    match value {
        "" => subject.push_str("none"),
        value => subject.extend(value.chars().take(64).map(plain)),
    }
}

impl Sink for Nats {
    fn kind(&self) -> &'static str {
        "nats"
    }

    fn way(&self) -> Way<'_> {
        Way::Nats(&self.servers)
    }

    fn delivery(&self, batch: &Batch<'_>) -> Delivery {
        let message = |text: &&[u8]| {
            let line = Line::read(text);
            let subject = filled(&self.subject, &line, batch.run);
            Message { subject, id: line.key(batch.run), payload: Bytes::copy_from_slice(text) }
        };
        Delivery::Messages(batch.lines.iter().map(message).collect())
    }
}

impl fmt::Display for Servers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.addresses.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sink::tests::{LINE, OPEN, batch, built};

    #[test]
    fn each_line_is_a_message_known_by_its_id() {
        let json = r#"[{"name":"n","nats":{"servers":["nats://h:4222"],"subject":"a.{tenant}.{kind}.{outcome}"}}]"#;
        let sink = built(json).unwrap().remove(0).sink.clone();
        let Delivery::Messages(messages) = sink.delivery(&batch(&[OPEN.as_bytes(), LINE.as_bytes()])) else { panic!() };
        let seen: Vec<_> = messages.iter().map(|m| (m.subject.as_str(), m.id.as_str())).collect();
        assert_eq!(seen, [("a.none.open.none", "R:1"), ("a.red_team.request.ok", "0197-a")]);
        assert_eq!(messages[1].payload, LINE);
    }

    #[test]
    fn what_cannot_work_is_told_at_its_place() {
        let place = |nats: &str| built(&format!(r#"[{{"name":"n","nats":{nats}}}]"#)).unwrap_err().remove(0).0;
        assert_eq!(place(r#"{"servers":["nats://h:1","h:4222"]}"#), "[0].nats.servers[1]");
        assert_eq!(place(r#"{"servers":["nats://u:p@h:4222"]}"#), "[0].nats.servers[0]");
        for subject in ["a.{model}", "a..b", "a b", "a.>", "{kind", ""] {
            assert_eq!(place(&format!(r#"{{"servers":["nats://h:1"],"subject":"{subject}"}}"#)), "[0].nats.subject");
        }
        assert_eq!(place(r#"{"servers":["nats://h:1"],"user":"u"}"#), "[0].nats");
        assert_eq!(place(r#"{"servers":["nats://h:1"],"token":{"file":"/none"}}"#), "[0].nats.token");
    }
}
