//! What a tenant may ask of a model besides the model: fields that it may not send, the end user that it speaks for, and
//! what holds where it says nothing. What is added is spliced in; every other byte stays as it came.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use http::header::CONTENT_TYPE;
use http::{HeaderValue, request};
use infergate_plugins::operation::Operation;

use crate::exchange::Exchange;
use crate::pipeline::Identified;
use crate::policy::Tenant;
use crate::refusal::{Code, Refusal};
use crate::scan::{self, Edit};
use crate::surface::{Body, Surface};

/// What holds for a tenant, with all that those above it say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parameters {
    /// Fields that it may not send.
    pub forbid: BTreeSet<String>,
    /// The end user of all its requests.
    pub user: Option<User>,
    /// JSON for fields that a request does not have.
    pub defaults: BTreeMap<String, String>,
}

/// Whom a request is sent for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum User {
    /// Whoever asks.
    Caller,
    /// Always this one.
    Fixed(String),
}

/// The members of an object: their names, and where their values stand.
pub type Members = Vec<(String, Range<usize>)>;

/// Refuses what the caller's tenant may not send; returns the edits that make the rest what it is to be.
pub fn admit(
    exchange: &mut Exchange,
    identified: &Identified,
    head: &request::Parts,
    body: &[u8],
) -> Result<Vec<Edit>, Refusal> {
    let Some(tenant) = exchange.who.as_ref().map(|who| who.tenant.clone()) else { return Ok(Vec::new()) };
    let Some(parameters) = &tenant.parameters else { return Ok(Vec::new()) };
    let surface = identified.surface;
    match surface.body {
        Body::Json => {
            let Some(members) = scan::members(body) else { return Ok(Vec::new()) };
            parameters.check(exchange, &tenant, &names(surface, &members, body))?;
            let caller = exchange.who.as_ref().map(|who| who.identity.principal.clone());
            let edits = parameters.edits(surface, &members, body, &caller.unwrap_or_default())?;
            if !edits.is_empty() {
                exchange.decide("parameters", &tenant.name, "edit", "what the tenant's parameters say was put in");
            }
            Ok(edits)
        }
        Body::Multipart if !parameters.forbid.is_empty() => {
            let content_type = head.headers.get(CONTENT_TYPE).map_or(b"".as_slice(), HeaderValue::as_bytes);
            let names = scan::part_names(body, content_type)
                .map_err(|fault| Refusal::new(Code::InvalidBody, fault.to_string()))?;
            parameters.check(exchange, &tenant, &names).map(|()| Vec::new())
        }
        // What is not read cannot be held to anything.
        Body::Opaque | Body::None if !parameters.forbid.is_empty() && passes_unread(identified) => {
            exchange.decide("parameters", &tenant.name, "refuse", "what passes here is not read");
            let message = "this key may not send every parameter, and what passes through here is not read";
            Err(Refusal::new(Code::SurfaceNotAllowed, message))
        }
        _ => Ok(Vec::new()),
    }
}

/// Whether the caller's tenant has a default for one of these fields.
pub fn has_default(exchange: &Exchange, names: &[&str]) -> bool {
    let parameters = exchange.who.as_ref().and_then(|who| who.tenant.parameters.as_ref());
    parameters.is_some_and(|parameters| names.iter().any(|name| parameters.defaults.contains_key(*name)))
}

/// The edits without the defaults for these fields: somebody else has said what becomes of them.
pub fn without_defaults(
    exchange: &Exchange,
    surface: &Surface,
    body: &[u8],
    names: &[&str],
) -> Result<Vec<Edit>, Refusal> {
    let Some((who, members)) = exchange.who.as_ref().zip(scan::members(body)) else { return Ok(Vec::new()) };
    let Some(mut parameters) = who.tenant.parameters.clone() else { return Ok(Vec::new()) };
    parameters.defaults.retain(|name, _| !names.contains(&name.as_str()));
    parameters.edits(surface, &members, body, &who.identity.principal)
}

fn passes_unread(identified: &Identified) -> bool {
    identified.surface.body == Body::Opaque || identified.upgrade.is_some()
}

/// The names of all fields; TGI has its parameters in an object of that name.
fn names(surface: &Surface, members: &Members, body: &[u8]) -> Vec<String> {
    let inner = members.iter().filter(|(name, _)| surface.operation == Operation::Generate && name == "parameters");
    let inner = inner.filter_map(|(_, span)| scan::members_at(body, span.clone())).flatten();
    members.iter().cloned().chain(inner).map(|(name, _)| name).collect()
}

impl Parameters {
    /// Whether none of these fields is forbidden.
    fn check(&self, exchange: &mut Exchange, tenant: &Tenant, names: &[String]) -> Result<(), Refusal> {
        // A form may send a list as `name[]`.
        let plain = |name: &String| name.strip_suffix("[]").unwrap_or(name).to_owned();
        let Some(name) = names.iter().map(plain).find(|name| self.forbid.contains(name)) else { return Ok(()) };
        exchange.decide("parameters", &tenant.name, "refuse", format!("{name} is forbidden"));
        let message = format!("this key may not send the parameter `{name}`: leave it out");
        Err(Refusal::new(Code::ParameterNotAllowed, message).param(name))
    }

    fn edits(
        &self,
        surface: &Surface,
        members: &Members,
        body: &[u8],
        caller: &Arc<str>,
    ) -> Result<Vec<Edit>, Refusal> {
        let (mut edits, mut added) = (Vec::new(), Vec::new());
        if let Some(user) = &self.user {
            let name = match user {
                User::Caller => caller,
                User::Fixed(name) => name.as_str(),
            };
            force(surface, members, body, &json(name), &mut edits, &mut added)?;
        }
        if takes_defaults(surface.operation) {
            let lacks = |name: &&String| members.iter().all(|(known, _)| known != *name);
            let lacking = self.defaults.keys().filter(lacks).filter_map(|name| self.defaults.get_key_value(name));
            added.extend(lacking.map(|(name, value)| format!("{}:{value}", json(name))));
        }
        if !added.is_empty() {
            let brace = memchr::memchr(b'{', body).unwrap_or_default();
            edits.push(insert(brace, &added.join(","), members.is_empty()));
        }
        Ok(edits)
    }
}

/// The answers of models are what defaults are for.
fn takes_defaults(operation: Operation) -> bool {
    use Operation::{Chat, Completions, Messages, Responses};
    matches!(operation, Chat | Completions | Responses | Messages)
}

/// Puts the end user where the endpoint wants it, and replaces the one that was sent.
fn force(
    surface: &Surface,
    members: &Members,
    body: &[u8],
    user: &str,
    edits: &mut Vec<Edit>,
    added: &mut Vec<String>,
) -> Result<(), Refusal> {
    use Operation::{Chat, Completions, Embeddings, Images, Messages, Responses};
    match one(members, "user")? {
        Some(span) => edits.push(Edit { span, text: user.to_owned() }),
        None if matches!(surface.operation, Chat | Completions | Embeddings | Images | Responses) => {
            added.push(format!("\"user\":{user}"));
        }
        None => {}
    }
    if surface.operation != Messages {
        return Ok(());
    }
    let whole = format!("{{\"user_id\":{user}}}");
    let Some(span) = one(members, "metadata")? else {
        added.push(format!("\"metadata\":{whole}"));
        return Ok(());
    };
    edits.push(match scan::members_at(body, span.clone()) {
        None => Edit { span, text: whole },
        Some(inner) => match one(&inner, "user_id")? {
            Some(span) => Edit { span, text: user.to_owned() },
            None => insert(span.start, &format!("\"user_id\":{user}"), inner.is_empty()),
        },
    });
    Ok(())
}

/// Where the only member of this name has its value. Of two, nobody knows which one counts.
pub fn one(members: &Members, name: &str) -> Result<Option<Range<usize>>, Refusal> {
    let mut found = members.iter().filter(|(known, _)| known == name);
    let first = found.next().map(|(_, span)| span.clone());
    if found.next().is_none() {
        return Ok(first);
    }
    let message = format!("the field `{name}` stands twice in the body: send it once");
    Err(Refusal::new(Code::DuplicateField, message).param(name.to_owned()))
}

/// Members put in front of those of the object that begins at `brace`.
pub fn insert(brace: usize, members: &str, alone: bool) -> Edit {
    let comma = if alone { "" } else { "," };
    Edit { span: brace + 1..brace + 1, text: format!("{members}{comma}") }
}

fn json(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::surface;

    fn parameters(user: Option<User>, defaults: &[(&str, &str)]) -> Parameters {
        let defaults = defaults.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Parameters { forbid: BTreeSet::new(), user, defaults }
    }

    fn edited(parameters: &Parameters, path: &str, body: &str) -> Result<String, Code> {
        let (surface, members) = (surface::find(path).unwrap(), scan::members(body.as_bytes()).unwrap());
        let edits = parameters.edits(surface, &members, body.as_bytes(), &"corp:\"a\"".into());
        let mut edits = edits.map_err(|refusal| refusal.code)?;
        let bytes = scan::splice(&Bytes::copy_from_slice(body.as_bytes()), &mut edits);
        Ok(String::from_utf8(bytes.to_vec()).unwrap())
    }

    #[test]
    fn the_end_user_is_put_where_the_endpoint_wants_it() {
        let (caller, fixed) = (parameters(Some(User::Caller), &[]), parameters(Some(User::Fixed("app".into())), &[]));
        for (parameters, path, came, goes) in [
            (&caller, "/v1/chat/completions", r#"{ "model" : 1.0 }"#, r#"{"user":"corp:\"a\"", "model" : 1.0 }"#),
            (&fixed, "/v1/embeddings", r#"{"us\u0065r": "x" ,"n":1}"#, r#"{"us\u0065r": "app" ,"n":1}"#),
            (&fixed, "/v1/responses", "\n{}", "\n{\"user\":\"app\"}"),
            (&fixed, "/v1/rerank", r#"{"a":1}"#, r#"{"a":1}"#),
            (&fixed, "/v1/rerank", r#"{"user":null}"#, r#"{"user":"app"}"#),
            (&fixed, "/v1/messages", r#"{"a":1}"#, r#"{"metadata":{"user_id":"app"},"a":1}"#),
            (&fixed, "/v1/messages", r#"{"metadata":{}}"#, r#"{"metadata":{"user_id":"app"}}"#),
            (&fixed, "/v1/messages", r#"{"metadata":{"x":1}}"#, r#"{"metadata":{"user_id":"app","x":1}}"#),
            (&fixed, "/v1/messages", r#"{"metadata": { "user_id":"x"}}"#, r#"{"metadata": { "user_id":"app"}}"#),
            (&fixed, "/v1/messages", r#"{"metadata":null}"#, r#"{"metadata":{"user_id":"app"}}"#),
        ] {
            assert_eq!(edited(parameters, path, came).as_deref(), Ok(goes));
        }
        for twice in [r#"{"metadata":{},"metadata":{}}"#, r#"{"metadata":{"user_id":1,"user_id":2}}"#] {
            assert_eq!(edited(&fixed, "/v1/messages", twice), Err(Code::DuplicateField), "{twice}");
        }
    }

    #[test]
    fn a_default_is_put_in_only_where_there_is_nothing() {
        let all = parameters(Some(User::Fixed("u".into())), &[("seed", "7"), ("temperature", "0.2")]);
        for (path, came, goes) in [
            ("/v1/chat/completions", r#"{"seed":null}"#, r#"{"user":"u","temperature":0.2,"seed":null}"#),
            ("/v1/chat/completions", "{}", r#"{"user":"u","seed":7,"temperature":0.2}"#),
            ("/v1/completions", r#"{"x":{"seed":1}}"#, r#"{"user":"u","seed":7,"temperature":0.2,"x":{"seed":1}}"#),
            ("/v1/embeddings", "{}", r#"{"user":"u"}"#),
            ("/tokenize", "{}", "{}"),
        ] {
            let edited = edited(&all, path, came).unwrap();
            assert_eq!(edited, goes);
            assert!(serde_json::from_str::<serde_json::Value>(&edited).is_ok());
        }
    }

    #[test]
    fn tgi_has_its_parameters_inside() {
        let (surface, body) = (surface::find("/generate").unwrap(), br#"{"inputs":"a","parameters":{"seed":1}}"#);
        assert_eq!(names(surface, &scan::members(body).unwrap(), body), ["inputs", "parameters", "seed"]);
        let chat = surface::find("/v1/chat/completions").unwrap();
        assert_eq!(names(chat, &scan::members(body).unwrap(), body), ["inputs", "parameters"]);
    }
}
