//! Batches of lines to a URL, signed so that the receiver knows who sent them and that nobody changed them.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use aws_lc_rs::hmac;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use http::{HeaderName, HeaderValue, Uri};
use schemars::JsonSchema;
use serde::Deserialize;

use super::line::Line;
use super::{Batch, Delivery, Post, Resolve, Sink, Way, Wrong, headers, text, url};
use crate::secret::SecretSource;

/// Batches of lines to a URL: POST, `application/x-ndjson`. An answer of 2xx acknowledges the whole batch.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[schemars(rename = "WebhookSink")]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where they go.
    pub url: String,
    /// The secret of the signature, as Standard Webhooks define it: `webhook-id`, `webhook-timestamp` and
    /// `webhook-signature: v1,base64(HMAC-SHA256(secret, "id.timestamp.body"))`. `whsec_` in front means base64.
    /// Absent: batches are not signed.
    #[serde(default)]
    pub secret: Option<SecretSource>,
    /// More headers.
    #[serde(default)]
    pub headers: BTreeMap<String, String>,
    /// More headers whose values are secrets.
    #[serde(default)]
    pub secret_headers: BTreeMap<String, SecretSource>,
}

#[derive(Debug)]
pub(super) struct Webhook {
    url: Uri,
    headers: Vec<(HeaderName, HeaderValue)>,
    key: Option<hmac::Key>,
}

pub(super) fn build(config: &Config, resolve: Resolve<'_>) -> Result<Webhook, Wrong> {
    let wrong = |message: String| (".secret".to_owned(), message);
    let key = match &config.secret {
        Some(source) => Some(key(resolve(source).map_err(wrong)?.reveal()).map_err(wrong)?),
        None => None,
    };
    let headers = headers(&config.headers, &config.secret_headers, resolve)?;
    Ok(Webhook { url: url(&config.url)?, headers, key })
}

fn key(secret: &str) -> Result<hmac::Key, String> {
    let bytes = match secret.strip_prefix("whsec_") {
        Some(encoded) => BASE64_STANDARD.decode(encoded).map_err(|_| "what follows whsec_ is no base64".to_owned())?,
        None => secret.as_bytes().to_vec(),
    };
    Ok(hmac::Key::new(hmac::HMAC_SHA256, &bytes))
}

impl Sink for Webhook {
    fn kind(&self) -> &'static str {
        "webhook"
    }

    fn way(&self) -> Way<'_> {
        Way::Http
    }

    fn delivery(&self, batch: &Batch<'_>) -> Delivery {
        let body = text(batch.lines);
        let mut headers = vec![(http::header::CONTENT_TYPE, HeaderValue::from_static("application/x-ndjson"))];
        headers.extend(self.signature(batch, &body));
        headers.extend(self.headers.iter().cloned());
        Delivery::Http(Post { url: self.url.clone(), headers, body })
    }
}

impl Webhook {
    fn signature(&self, batch: &Batch<'_>, body: &Bytes) -> Vec<(HeaderName, HeaderValue)> {
        let (id, timestamp) = (id(batch), seconds(batch.now).to_string());
        let mut signature = None;
        if let Some(key) = &self.key {
            let mut context = hmac::Context::with_key(key);
            for part in [id.as_bytes(), b".", timestamp.as_bytes(), b".", body] {
                context.update(part);
            }
            signature = Some(format!("v1,{}", BASE64_STANDARD.encode(context.sign())));
        }
        let named =
            [("webhook-id", Some(id)), ("webhook-timestamp", Some(timestamp)), ("webhook-signature", signature)];
        let header = |(name, value): (&'static str, Option<String>)| {
            Some((HeaderName::from_static(name), HeaderValue::try_from(value?).ok()?))
        };
        named.into_iter().filter_map(header).collect()
    }
}

/// The same again where the same batch is sent again.
fn id(batch: &Batch<'_>) -> String {
    let seq = |line: Option<&&[u8]>| line.map_or(0, |line| Line::read(line).seq);
    format!("{}:{}-{}", batch.run, seq(batch.lines.first()), seq(batch.lines.last()))
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use sha2::{Digest, Sha256};

    use super::*;
    use crate::secret::Secret;
    use crate::sink::tests::{LINE, OPEN, batch};

    fn webhook(secret: &str) -> Webhook {
        let source = Some(SecretSource { env: Some("S".to_owned()), file: None });
        let none = BTreeMap::new();
        let config =
            Config { url: "https://x/hook".to_owned(), secret: source, headers: none, secret_headers: BTreeMap::new() };
        build(&config, &mut |_| Ok(Secret::new(secret))).unwrap()
    }

    fn sent(webhook: &Webhook) -> (BTreeMap<String, String>, Bytes) {
        let Delivery::Http(post) = webhook.delivery(&batch(&[OPEN.as_bytes(), LINE.as_bytes()])) else { panic!() };
        let text = |(name, value): &(HeaderName, HeaderValue)| (name.to_string(), value.to_str().unwrap().to_owned());
        (post.headers.iter().map(text).collect(), post.body)
    }

    /// RFC 2104, from SHA-256 up.
    fn hmac_sha256(secret: &[u8], message: &[u8]) -> Vec<u8> {
        let mut block = secret.to_vec();
        block.resize(64, 0);
        let keyed = |with: u8, message: &[u8]| {
            let key: Vec<u8> = block.iter().map(|byte| byte ^ with).collect();
            Sha256::new().chain_update(key).chain_update(message).finalize().to_vec()
        };
        keyed(0x5c, &keyed(0x36, message))
    }

    #[test]
    fn a_batch_is_signed_as_standard_webhooks_are() {
        for (secret, bytes) in [("plain", b"plain".as_slice()), ("whsec_AAEC", &[0, 1, 2])] {
            let (headers, body) = sent(&webhook(secret));
            assert_eq!(headers["webhook-id"], "R:1-7");
            assert_eq!(headers["webhook-timestamp"], "1700000000");
            let message = [b"R:1-7.1700000000.", body.as_ref()].concat();
            let signature = BASE64_STANDARD.encode(hmac_sha256(bytes, &message));
            assert_eq!(headers["webhook-signature"], format!("v1,{signature}"));
        }
    }

    #[test]
    fn the_body_is_the_lines_themselves() {
        let (headers, body) = sent(&webhook("s"));
        assert_eq!(body, format!("{OPEN}\n{LINE}\n"));
        assert_eq!(headers["content-type"], "application/x-ndjson");
    }

    #[test]
    fn a_secret_that_is_no_base64_is_told_without_showing_it() {
        let error = key("whsec_canary!").unwrap_err();
        assert!(error.contains("base64") && !error.contains("canary"));
    }
}
