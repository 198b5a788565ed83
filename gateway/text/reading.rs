//! What a request says: its texts, found by whoever asks first and undone once, for routers and guardrails alike.

use std::sync::OnceLock;

use bytes::Bytes;
use http::HeaderValue;
use infergate_plugins::operation::Operation;

use super::{Text, Unreadable, extras, form, prompt};

/// The texts of one request.
#[derive(Debug)]
pub struct Reading {
    /// The endpoint that it is for.
    pub operation: Operation,
    /// The bytes as they came.
    pub body: Bytes,
    /// Its content type, if it is a form.
    form: Option<HeaderValue>,
    texts: OnceLock<Result<Texts, Unreadable>>,
    extras: OnceLock<(u64, u64)>,
}

impl Reading {
    /// What `body` says to `operation`.
    pub fn of(operation: Operation, body: impl Into<Bytes>) -> Self {
        Self { operation, body: body.into(), form: None, texts: OnceLock::new(), extras: OnceLock::new() }
    }

    /// The same of a form, whose `Content-Type` this is.
    pub fn in_form(self, content_type: Option<HeaderValue>) -> Self {
        Self { form: content_type, ..self }
    }

    /// Its texts.
    pub fn texts(&self) -> Result<&Texts, Unreadable> {
        let texts = self.texts.get_or_init(|| match &self.form {
            Some(content_type) => form(self.operation, &self.body, content_type.as_bytes()).map(Texts::from),
            None => prompt(self.operation, &self.body).map(Texts::from),
        });
        texts.as_ref().map_err(|unreadable| *unreadable)
    }

    /// How many images and how many tools it has.
    pub fn extras(&self) -> (u64, u64) {
        *self.extras.get_or_init(|| extras(&self.body))
    }
}

/// Texts of one document, in the order in which models read or write them.
#[derive(Debug, Default)]
pub struct Texts {
    /// Where they stand.
    pub all: Vec<Text>,
    undone: Vec<OnceLock<Option<Box<str>>>>,
}

impl From<Vec<Text>> for Texts {
    fn from(all: Vec<Text>) -> Self {
        let undone = all.iter().map(|_| OnceLock::new()).collect();
        Self { all, undone }
    }
}

impl Texts {
    /// What one of them says, with the escapes of a JSON string undone; nothing where they cannot be, since they name no
    /// character.
    pub fn undone<'t>(&'t self, number: usize, document: &'t [u8]) -> Option<&'t str> {
        let text = self.all.get(number)?;
        let written = written(document, text)?;
        if text.is_raw || memchr::memchr(b'\\', written.as_bytes()).is_none() {
            return Some(written);
        }
        self.undone.get(number)?.get_or_init(|| unescaped(document, text)).as_deref()
    }
}

/// A text as it is written.
pub fn written<'t>(document: &'t [u8], text: &Text) -> Option<&'t str> {
    std::str::from_utf8(document.get(text.span.clone())?).ok()
}

/// A text that stands as a JSON string.
pub fn unescaped(document: &[u8], text: &Text) -> Option<Box<str>> {
    let quoted = document.get(text.span.start.checked_sub(1)?..text.span.end.checked_add(1)?)?;
    serde_json::from_slice(quoted).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn undone(body: &'static str) -> Vec<Option<String>> {
        let reading = Reading::of(Operation::Chat, body);
        let texts = reading.texts().unwrap();
        (0..texts.all.len()).map(|number| texts.undone(number, &reading.body).map(str::to_owned)).collect()
    }

    #[test]
    fn texts_are_undone_where_they_can_be() {
        let body = r#"{"messages":[{"content":"plain"},{"content":"a\n\u4e2d"},{"content":"\ud800 lone"}]}"#;
        assert_eq!(undone(body), [Some("plain".to_owned()), Some("a\n中".to_owned()), None]);
    }

    #[test]
    fn what_nobody_can_read_is_so_for_everybody_who_asks() {
        let reading = Reading::of(Operation::Chat, r#"{"messages":"#);
        assert_eq!((reading.texts().err(), reading.texts().err()), (Some(Unreadable), Some(Unreadable)));
    }
}
