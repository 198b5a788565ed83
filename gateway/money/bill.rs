//! The bill of one request: opened when its answer begins, settled when it is over.

use std::sync::{Arc, LazyLock};

use bytes::Bytes;
use infergate_plugins::operation::Operation;
use memchr::{memchr, memmem::Finder};
use schemars::JsonSchema;
use serde::Serialize;

use super::{Cached, NanoUsd, Price};
use crate::usage::{Meter, Source, Usage};

/// What a request cost.
#[derive(Clone, Copy, Debug, Serialize, JsonSchema)]
pub struct Cost<'a> {
    /// In nano-dollars (10⁻⁹ US dollars).
    pub nanousd: NanoUsd,
    /// The version of the prices: the first twelve hex digits of their SHA-256.
    pub prices: &'a str,
}

/// What is known of a request's cost while its answer comes.
#[derive(Clone, Debug)]
pub struct Bill {
    price: Option<Arc<Price>>,
    operation: Operation,
    /// What the prompt may have in tokens, should nobody say it.
    prompt: u64,
    /// How many images were asked for.
    images: Option<u64>,
    succeeded: bool,
}

/// How an answer ended, as far as a bill must know.
#[derive(Clone, Copy, Debug)]
pub struct End {
    /// Bytes of it.
    pub bytes: u64,
    /// Whether it was a stream of events.
    pub events: bool,
    /// Whether it came to its end.
    pub whole: bool,
    /// Microseconds that its server worked for it, where that was measured.
    pub gpu_us: Option<u64>,
}

/// Bytes of text for each token, near enough where nobody counts.
const BYTES_A_TOKEN: u64 = 4;

/// Whether an operation is work that models are paid for.
pub fn is_paid(operation: Operation) -> bool {
    use Operation::{CountTokens, Models, Status, Tokenize};
    !matches!(operation, CountTokens | Models | Status | Tokenize)
}

impl Bill {
    /// For an answer to `operation`, whose request had this `body` and asked for so many images.
    pub fn open(price: Option<Arc<Price>>, operation: Operation, body: &Bytes, images: u64, succeeded: bool) -> Self {
        let images = (operation == Operation::Images && succeeded).then_some(images);
        Self { price, operation, prompt: text_bytes(body).div_ceil(BYTES_A_TOKEN), images, succeeded }
    }

    /// For what passes unread: it has no price.
    pub fn unknown() -> Self {
        Self { price: None, operation: Operation::Passthrough, prompt: 0, images: None, succeeded: true }
    }

    /// Whether it matters which class of service the answer had.
    pub fn asks_service_tier(&self) -> bool {
        self.price.as_ref().is_some_and(|price| price.asks_service_tier())
    }

    /// What was used all told, and what that cost: `None` if nothing was used; an inner `None` if that has no price.
    pub fn settle(&self, told: Usage, end: End) -> (Usage, Option<Option<NanoUsd>>) {
        if told.is_unknown() && !self.succeeded {
            // An error of the upstream's.
            return (told, None);
        }
        let usage = self.completed(told, end);
        (usage, Some(self.price.as_ref().and_then(|price| price.cost(&usage, cached(self.operation)))))
    }

    /// The same of an answer that is here as a whole, and tells itself what it used.
    pub fn settle_whole(&self, body: &[u8], gpu_us: Option<u64>) -> (Usage, Option<Option<NanoUsd>>) {
        let mut meter = Meter::new(self.operation, false);
        if self.asks_service_tier() {
            meter = meter.with_service_tier();
        }
        meter.push(body);
        self.settle(meter.usage(), End { bytes: body.len() as u64, events: false, whole: true, gpu_us })
    }

    /// What the answer told, and what must have been used besides.
    fn completed(&self, told: Usage, end: End) -> Usage {
        let by_hour = self.price.as_ref().is_some_and(|price| price.gpu_hour.is_some());
        let gpu_us = end.gpu_us.filter(|_| by_hour);
        let mut usage = Usage { images: self.images.or(told.images), gpu_us, ..told };
        let (reads, writes) = work(self.operation);
        let is_guess = usage.source != Source::Upstream;
        if is_guess && reads && usage.input_tokens.is_none() {
            usage.input_tokens = Some(self.prompt);
        }
        if is_guess && writes && usage.output_tokens.is_none() && !end.events {
            usage.output_tokens = Some(end.bytes.div_ceil(BYTES_A_TOKEN));
        }
        if usage.is_unknown() && (usage.input_tokens, usage.output_tokens, usage.images) != (None, None, None) {
            usage.source = if end.whole { Source::Estimated } else { Source::Partial };
        }
        usage
    }
}

/// How the answers to an operation count what the prompt cache had.
pub fn cached(operation: Operation) -> Cached {
    if operation == Operation::Messages { Cached::Beside } else { Cached::Within }
}

/// Whether an operation reads a text of the request's as tokens, and whether it writes one.
pub fn work(operation: Operation) -> (bool, bool) {
    match operation {
        Operation::Chat | Operation::Completions | Operation::Responses | Operation::Messages | Operation::Generate => {
            (true, true)
        }
        Operation::Embeddings
        | Operation::Rerank
        | Operation::Score
        | Operation::Pooling
        | Operation::Moderation
        | Operation::Speech => (true, false),
        _ => (false, false),
    }
}

/// How much of a body may be text: images and sound in it are no text.
pub fn text_bytes(body: &[u8]) -> u64 {
    static ENCODED: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(";base64,"));
    let (mut text, mut rest) = (body.len(), body);
    while let Some(at) = ENCODED.find(rest) {
        rest = &rest[at..];
        let end = memchr(b'"', rest).unwrap_or(rest.len());
        text -= end;
        rest = &rest[end..];
    }
    text as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::money::Rates;
    use crate::money::usd::Usd;

    fn bill(operation: Operation, body: &'static str, succeeded: bool) -> Bill {
        let rates = Rates { input: Some(Usd::new(Usd::ONE)), output: Some(Usd::new(Usd::ONE)), ..Rates::default() };
        let price = Price { base: rates, ..Price::default() };
        Bill::open(Some(Arc::new(price)), operation, &Bytes::from_static(body.as_bytes()), 2, succeeded)
    }

    const END: End = End { bytes: 41, events: false, whole: true, gpu_us: None };

    #[test]
    fn what_nobody_counted_is_estimated_and_costs_something() {
        let (usage, cost) = bill(Operation::Chat, "twelve bytes", true).settle(Usage::default(), END);
        assert_eq!((usage.input_tokens, usage.output_tokens, usage.source), (Some(3), Some(11), Source::Estimated));
        assert_eq!(cost, Some(Some(NanoUsd(14_000))));
        let counted = Usage { output_tokens: Some(5), source: Source::Partial, ..Usage::default() };
        let (usage, cost) = bill(Operation::Chat, "twelve bytes", true).settle(counted, END);
        assert_eq!((usage.input_tokens, usage.source, cost), (Some(3), Source::Partial, Some(Some(NanoUsd(8_000)))));
    }

    #[test]
    fn an_upstreams_error_costs_nothing_and_what_cannot_be_counted_has_no_price() {
        assert_eq!(bill(Operation::Chat, "x", false).settle(Usage::default(), END).1, None);
        assert_eq!(bill(Operation::Transcription, "x", true).settle(Usage::default(), END).1, Some(None));
        assert_eq!(Bill::unknown().settle(Usage::default(), END).1, Some(None));
        let unknown = Bill { price: None, ..bill(Operation::Chat, "x", true) };
        assert_eq!(unknown.settle(Usage::default(), END).1, Some(None));
    }

    #[test]
    fn what_is_encoded_in_a_body_is_no_text() {
        let image = "x".repeat(10_000);
        let body = format!(r#"{{"a":"data:image/png;base64,{image}","b":"data:audio/wav;base64,{image}"}}"#);
        assert_eq!(text_bytes(body.as_bytes()), r#"{"a":"data:image/png","b":"data:audio/wav"}"#.len() as u64);
        assert_eq!(text_bytes(b";base64,no end"), 0);
    }
}
