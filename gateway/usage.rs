//! What an answer says of the tokens it used, read from its bytes as they pass.
//!
//! Nothing is held back and nothing is changed. Most pieces carry no usage and cost one search for the key. A key
//! inside text is spelt with backslashes and so is never found; one inside a tool's arguments or an echoed request
//! stands deeper than the real one. How deep a find stands shows at the end of its JSON text, without a look at
//! what came before: every brace that is open there is closed behind it.

mod report;
mod service;
mod tally;
#[cfg(test)]
mod tests;
mod walk;

use std::ops::RangeInclusive;
use std::sync::LazyLock;

use infergate_plugins::operation::Operation;
use memchr::memmem::Finder;
use memchr::{memchr2, memrchr};
use schemars::JsonSchema;
use serde::Serialize;

use service::Service;
use tally::Tally;
use walk::Walk;

/// Tokens of one answer, as far as they are known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Usage {
    /// Of the prompt, as reported: `cached_tokens` are among them in OpenAI's dialects and beside them in Anthropic's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub input_tokens: Option<u64>,
    /// Of the answer, reasoning included.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output_tokens: Option<u64>,
    /// Of the prompt, found in the prefix cache.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cached_tokens: Option<u64>,
    /// Of the prompt, added to the prefix cache.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache_write_tokens: Option<u64>,
    /// Of those added, the ones that stay for an hour instead of five minutes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache_write_1h_tokens: Option<u64>,
    /// Of the answer, spent on reasoning.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning_tokens: Option<u64>,
    /// Of the prompt, sound.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub audio_input_tokens: Option<u64>,
    /// Of the answer, sound.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub audio_output_tokens: Option<u64>,
    /// Of the prompt, images.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_input_tokens: Option<u64>,
    /// Of the answer, images.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_output_tokens: Option<u64>,
    /// Milliseconds of sound that was heard.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub audio_ms: Option<u64>,
    /// Images that were made. Told only where the policy has prices.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub images: Option<u64>,
    /// Microseconds that the upstream's server worked for it, where its price is by the hour.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpu_us: Option<u64>,
    /// The class of service, where the upstream says it beside its numbers or the price depends on it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service_tier: Option<ServiceTier>,
    /// Where the numbers come from.
    pub source: Source,
}

impl Usage {
    /// Whether nothing was used.
    pub fn says_nothing(&self) -> bool {
        self.is_unknown() && self.gpu_us.is_none()
    }

    /// Whether no tokens are known, nor anything else that an answer tells.
    pub fn is_unknown(&self) -> bool {
        self.source == Source::None
    }

    /// What both used together, known as well as the worse of them.
    pub fn and(self, other: Self) -> Self {
        let both = self.is_unknown() == other.is_unknown();
        let source = if both { self.source.min(other.source) } else { self.source.max(other.source) };
        let service_tier = other.service_tier.or(self.service_tier);
        Self { source, service_tier, ..self.plus(other) }
    }

    /// Whether any number of tokens is known.
    pub fn has_tokens(&self) -> bool {
        let counts = [self.input_tokens, self.output_tokens, self.cached_tokens, self.cache_write_tokens];
        counts.iter().any(Option::is_some)
    }
}

/// The class of service that an answer had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ServiceTier {
    /// The usual one: `default`, `standard`, `auto`.
    Default,
    /// Slower and cheaper.
    Flex,
    /// Much slower and cheaper.
    Batch,
    /// Faster and dearer.
    Priority,
    /// Bought ahead.
    Scale,
    /// One that we do not know.
    Other,
}

impl ServiceTier {
    /// The class that an upstream's word means.
    fn named(word: &[u8]) -> Self {
        match word {
            b"default" | b"standard" | b"auto" => Self::Default,
            b"flex" => Self::Flex,
            b"batch" => Self::Batch,
            b"priority" => Self::Priority,
            b"scale" => Self::Scale,
            _ => Self::Other,
        }
    }
}

/// Where the numbers of a [`Usage`] come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// There are none.
    #[default]
    None,
    /// The upstream did not say them all: the answer's are those of its text, or the events of its stream, or follow
    /// from its length.
    Estimated,
    /// The same, of an answer that did not come to its end.
    Partial,
    /// The upstream reported them.
    Upstream,
}

impl Source {
    /// Its name in records.
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Estimated => "estimated",
            Self::Partial => "partial",
            Self::Upstream => "upstream",
        }
    }
}

/// The longest report that is read. Real ones have a few hundred bytes.
const REPORT_MAX: usize = 16 << 10;

/// Reads one answer's usage. Small until an answer says what it used.
#[derive(Clone, Debug)]
pub struct Meter {
    dialect: Dialect,
    events: bool,
    stage: Stage,
    /// The byte before the next piece.
    last: u8,
    tail: Tail,
    tally: Tally,
    keys: &'static [Key],
    finds: Option<Box<Finds>>,
    service: Option<Box<Service>>,
}

/// Where the next byte stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// At the start of an answer in one piece of JSON.
    Start,
    /// Anywhere: a key is looked for.
    Search,
    /// Behind a key.
    Colon,
    /// Behind a key's colon.
    Value,
    /// Inside the object that may be the report.
    Report,
    /// Nothing more is to be read.
    Over,
}

/// How an answer reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Dialect {
    /// `usage` of the answer, or of the events of a stream that have it.
    OpenAi,
    /// The same; a stream's first event has `usage` in its `message`.
    Messages,
    /// The same; a stream's last event has `usage` in its `response`.
    Responses,
    /// `details` (TGI) or `meta_info` (SGLang).
    Generate,
    /// The whole answer is the report.
    Count,
    /// It does not.
    Silent,
}

impl Meter {
    /// For the answer to `operation`; `events` if it is a stream of events.
    pub fn new(operation: Operation, events: bool) -> Self {
        let dialect = Dialect::of(operation);
        Self {
            dialect,
            events,
            stage: match (dialect, events) {
                (Dialect::Silent, _) | (Dialect::Count, true) => Stage::Over,
                (_, true) => Stage::Search,
                (_, false) => Stage::Start,
            },
            last: b' ',
            tail: Tail::default(),
            tally: if events { Tally::of(operation) } else { Tally::default() },
            keys: dialect.keys(),
            finds: None,
            service: None,
        }
    }

    /// Looks for the class of service too, which OpenAI's dialects tell beside the report and not in it.
    pub fn with_service_tier(mut self) -> Self {
        let level = match (self.dialect, self.events) {
            (Dialect::OpenAi, _) | (Dialect::Responses, false) => 1,
            (Dialect::Responses, true) => 2,
            _ => return self,
        };
        self.service = Some(Box::new(Service::at(level, self.events)));
        self
    }

    /// The next bytes of the answer, however they are cut.
    pub fn push(&mut self, piece: &[u8]) {
        if !self.is_complete() {
            self.tally.push(piece);
        }
        if let Some(service) = &mut self.service {
            service.push(piece);
        }
        let (mut at, mut line) = (0, LineEnd(0));
        while at < piece.len() && self.stage != Stage::Over {
            let end = if self.is_in_line() { line.behind(at, piece) } else { piece.len() };
            let used = self.step(&piece[at..end], end < piece.len());
            if used > 0 {
                at += used;
                self.last = piece[at - 1];
            }
        }
    }

    /// Takes a part of `text`, or all of it; `ends` says that a line ends behind it, which may be taken as well.
    fn step(&mut self, text: &[u8], ends: bool) -> usize {
        match self.stage {
            Stage::Start => self.start(text),
            Stage::Search => self.search(text, ends),
            Stage::Colon => self.punctuation(text, b':', ends),
            Stage::Value => self.punctuation(text, b'{', ends),
            Stage::Report => self.report(text, ends),
            Stage::Over => text.len(),
        }
    }

    /// Whether something is being read that ends with its line, as an event's JSON text does.
    fn is_in_line(&self) -> bool {
        self.events && (self.stage != Stage::Search || self.follows())
    }

    /// What is known so far; after the last piece, what is known at all.
    pub fn usage(&self) -> Usage {
        let (reported, complete) = self.finds.as_ref().map_or((None, false), |finds| finds.judged(self.depths()));
        let mut usage = reported.unwrap_or_default();
        if reported.is_some() {
            usage.source = Source::Upstream;
        }
        if !complete && self.tally.counted > 0 {
            usage.output_tokens = usage.output_tokens.max(Some(self.tally.counted));
            usage.source = Source::Estimated;
        }
        let service = self.service.as_ref().and_then(|service| service.found);
        usage.service_tier = usage.service_tier.or(service);
        usage
    }

    /// The same for an answer that did not come to its end.
    pub fn usage_of_a_part(&self) -> Usage {
        let usage = self.usage();
        let complete = self.finds.as_ref().is_some_and(|finds| finds.judged(self.depths()).1);
        let source = if complete || usage.is_unknown() { usage.source } else { Source::Partial };
        Usage { source, ..usage }
    }

    /// How many events of a stream carried a part of the answer so far, or how many tokens it says that it has.
    pub fn counted(&self) -> u64 {
        self.tally.counted.max(self.told_output().unwrap_or_default())
    }

    /// How many tokens it says that it has so far.
    pub fn told_output(&self) -> Option<u64> {
        self.finds.as_ref().and_then(|finds| finds.reported).and_then(|usage| usage.output_tokens)
    }

    /// Whether events need not be counted any more.
    fn is_complete(&self) -> bool {
        self.finds.as_ref().is_some_and(|finds| finds.complete)
    }

    /// Only JSON reports: anything else (sound, plain text, compressed bytes) is not looked at.
    fn start(&mut self, text: &[u8]) -> usize {
        let spaces = text.iter().take_while(|byte| byte.is_ascii_whitespace()).count();
        match text.get(spaces) {
            None => {}
            Some(b'{') if self.dialect == Dialect::Count => self.open(),
            Some(b'{' | b'[') => self.stage = Stage::Search,
            Some(_) => self.stage = Stage::Over,
        }
        spaces
    }

    /// Goes behind the next key, or to the end.
    fn search(&mut self, text: &[u8], ends: bool) -> usize {
        if let Some((key, end)) = self.resumed(text).or_else(|| self.found(text)) {
            // An upstream that uses one of the keys does not use the others.
            self.keys = &self.keys[key..=key];
            self.tail = Tail::default();
            self.stage = Stage::Colon;
            self.follow(&text[..end]);
            return end;
        }
        self.follow(text);
        if ends {
            self.tail = Tail::default();
            self.settle();
            return text.len() + 1;
        }
        self.keep_tail(text);
        text.len()
    }

    /// The first key in `text`: which one, and where it ends.
    fn found(&self, text: &[u8]) -> Option<(usize, usize)> {
        let keys = self.keys.iter().enumerate();
        keys.filter_map(|(index, key)| Some((index, key.find(text, self.last)?))).min_by_key(|(_, end)| *end)
    }

    /// The same for a key that the last piece began.
    fn resumed(&self, text: &[u8]) -> Option<(usize, usize)> {
        let begun = self.tail.bytes();
        if begun.is_empty() {
            return None;
        }
        let missing =
            |key: &Key| key.0.needle().strip_prefix(begun).filter(|rest| text.starts_with(rest)).map(<[u8]>::len);
        self.keys.iter().enumerate().find_map(|(index, key)| Some((index, missing(key)?)))
    }

    /// Remembers a key that `text` begins and does not end.
    fn keep_tail(&mut self, text: &[u8]) {
        let begins = |tail: &Tail| self.keys.iter().any(|key| key.0.needle().starts_with(tail.bytes()));
        let tail = self.tail.grown(text).filter(begins).or_else(|| Tail::of(text, self.last).filter(begins));
        self.tail = tail.unwrap_or_default();
    }

    /// Goes over white space to `expected`. If something else is there, the key was none, or its value is null.
    fn punctuation(&mut self, text: &[u8], expected: u8, ends: bool) -> usize {
        let spaces = text.iter().take_while(|byte| byte.is_ascii_whitespace()).count();
        match text.get(spaces) {
            None if !ends => {}
            Some(b':') if expected == b':' => {
                self.stage = Stage::Value;
                return spaces + 1;
            }
            Some(b'{') if expected == b'{' => self.open(),
            _ => self.stage = Stage::Search,
        }
        spaces
    }

    fn open(&mut self) {
        self.stage = Stage::Report;
        self.finds.get_or_insert_default().open();
    }

    /// Goes behind the object that may be the report, or to the end.
    fn report(&mut self, text: &[u8], ends: bool) -> usize {
        let cut_short = self.dialect == Dialect::Generate;
        let finds = self.finds.get_or_insert_default();
        let Some(end) = finds.walk.close(text, finds.opened) else {
            finds.hold(text);
            if ends {
                finds.held = Vec::new();
                self.stage = Stage::Search;
            }
            return text.len();
        };
        finds.take(&text[..end], cut_short);
        self.stage = if self.dialect == Dialect::Count { Stage::Over } else { Stage::Search };
        end
    }

    /// Whether a find waits for the end of its JSON text.
    fn follows(&self) -> bool {
        self.finds.as_ref().is_some_and(|finds| finds.candidate.is_some())
    }

    fn follow(&mut self, text: &[u8]) {
        if let Some(finds) = self.finds.as_mut().filter(|finds| finds.candidate.is_some()) {
            finds.walk.over(text);
        }
    }

    /// The event's JSON text is over: what was found in it is the report, or it is not.
    fn settle(&mut self) {
        let depths = self.depths();
        if let Some(finds) = &mut self.finds {
            (finds.reported, finds.complete) = finds.judged(depths);
            finds.candidate = None;
        }
    }

    /// How many braces are open around a report.
    fn depths(&self) -> RangeInclusive<i64> {
        match (self.dialect, self.events) {
            (Dialect::Count, _) => 0..=0,
            (Dialect::Messages, true) => 1..=2,
            (Dialect::Responses, true) => 2..=2,
            _ => 1..=1,
        }
    }
}

/// Where the line ends that was looked at last, so that its end is looked for once.
struct LineEnd(usize);

impl LineEnd {
    /// Where the line ends that goes on at `at`; the end of `piece` if it does not end there.
    fn behind(&mut self, at: usize, piece: &[u8]) -> usize {
        if at >= self.0 {
            self.0 = memchr2(b'\n', b'\r', &piece[at..]).map_or(piece.len(), |length| at + length);
        }
        self.0
    }
}

/// The beginning of a key at the end of a piece.
#[derive(Clone, Copy, Debug, Default)]
struct Tail {
    bytes: [u8; Self::MAX],
    length: u8,
}

impl Tail {
    /// All but the last byte of the longest key.
    const MAX: usize = br#""meta_info""#.len() - 1;

    fn bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.length)]
    }

    /// What begins with the last quote of `text`, unless that is escaped. `before` is the byte before `text`.
    fn of(text: &[u8], before: u8) -> Option<Self> {
        let from = text.len().saturating_sub(Self::MAX);
        let quote = from + memrchr(b'"', &text[from..])?;
        let before = quote.checked_sub(1).map_or(before, |at| text[at]);
        if before == b'\\' { None } else { Self::default().with(&text[quote..]) }
    }

    /// What the last piece began, and `text`.
    fn grown(&self, text: &[u8]) -> Option<Self> {
        if self.length == 0 { None } else { self.with(text) }
    }

    fn with(mut self, text: &[u8]) -> Option<Self> {
        let length = usize::from(self.length) + text.len();
        self.bytes.get_mut(usize::from(self.length)..length)?.copy_from_slice(text);
        self.length = length as u8;
        Some(self)
    }
}

/// A key that a report stands under, in its quotes.
#[derive(Debug)]
struct Key(Finder<'static>);

/// Built once.
static KEYS: LazyLock<[Key; 3]> =
    LazyLock::new(|| [r#""usage""#, r#""details""#, r#""meta_info""#].map(|key| Key(Finder::new(key))));

impl Key {
    /// Where the key ends in `text`. `before` is the byte before `text`: behind a backslash it is no key.
    fn find(&self, text: &[u8], before: u8) -> Option<usize> {
        let escaped = |at: usize| at.checked_sub(1).map_or(before, |at| text[at]) == b'\\';
        let mut at = self.0.find(text)?;
        while escaped(at) {
            at += 1 + self.0.find(&text[at + 1..])?;
        }
        Some(at + self.0.needle().len())
    }
}

impl Dialect {
    fn of(operation: Operation) -> Self {
        match operation {
            Operation::Chat
            | Operation::Completions
            | Operation::Embeddings
            | Operation::Rerank
            | Operation::Score
            | Operation::Pooling
            | Operation::Transcription
            | Operation::Speech
            | Operation::Images
            | Operation::Moderation
            | Operation::Passthrough => Self::OpenAi,
            Operation::Messages => Self::Messages,
            Operation::Responses => Self::Responses,
            Operation::Generate => Self::Generate,
            Operation::CountTokens => Self::Count,
            Operation::Tokenize | Operation::Realtime | Operation::Models | Operation::Status => Self::Silent,
        }
    }

    fn keys(self) -> &'static [Key] {
        match self {
            Self::OpenAi | Self::Messages | Self::Responses => &KEYS[..1],
            Self::Generate => &KEYS[1..],
            Self::Count | Self::Silent => &[],
        }
    }
}

/// What was found so far.
#[derive(Clone, Debug, Default)]
struct Finds {
    /// What the stream's events before this one reported.
    reported: Option<Usage>,
    /// Whether that includes the answer's tokens, and not just those at its start.
    complete: bool,
    /// What this JSON text may report.
    candidate: Option<Candidate>,
    /// Follows the JSON text from its first candidate on.
    walk: Walk,
    /// The level at which the object stands that is being read.
    opened: i64,
    /// The beginning of that object, if a piece ended inside it.
    held: Vec<u8>,
}

/// An object that says how many tokens were used, whoever wrote it.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    usage: Usage,
    /// How deep it stands, counted from the first candidate.
    level: i64,
}

impl Finds {
    fn open(&mut self) {
        if self.candidate.is_none() {
            self.walk = Walk::default();
        }
        self.opened = self.walk.level;
    }

    /// Keeps what is worth keeping of an object that goes on in the next piece; one byte too many tells that it is
    /// too long.
    fn hold(&mut self, text: &[u8]) {
        let room = (REPORT_MAX + 1).saturating_sub(self.held.len());
        self.held.extend_from_slice(&text[..room.min(text.len())]);
    }

    /// Takes the object that ends with `text`. `cut_short`: of one that is too long, its beginning counts.
    fn take(&mut self, text: &[u8], cut_short: bool) {
        let usage = if self.held.is_empty() {
            report::read(text, cut_short)
        } else {
            self.hold(text);
            report::read(&std::mem::take(&mut self.held), cut_short)
        };
        if let Some(usage) = usage {
            self.consider(usage);
        }
    }

    /// The shallowest candidate of a JSON text is the likeliest, among equals the last.
    fn consider(&mut self, usage: Usage) {
        let level = self.opened;
        let usage = match &self.candidate {
            Some(known) if level > known.level => return,
            // The object around the last one has been closed in between: a list of answers, each with its own.
            Some(known) if level == known.level && self.walk.lowest < level => known.usage.plus(usage),
            _ => usage,
        };
        self.candidate = Some(Candidate { usage, level });
        self.walk.lowest = level;
    }

    /// What is reported if the JSON text ends here, and whether that is complete.
    fn judged(&self, depths: RangeInclusive<i64>) -> (Option<Usage>, bool) {
        let found = self.candidate.map(|candidate| (candidate.usage, candidate.level - self.walk.level));
        match found.filter(|(_, depth)| depths.contains(depth)) {
            None => (self.reported, self.complete),
            Some((usage, depth)) => {
                // Where two depths are allowed, the deeper one is that of an answer's start.
                let complete = depth == *depths.start() && usage.output_tokens.is_some();
                (Some(self.reported.unwrap_or_default().followed_by(usage)), self.complete || complete)
            }
        }
    }
}

impl Usage {
    /// Reports of one stream are cumulative: a later number replaces an earlier one, but nothing was un-used: a zero
    /// replaces nothing.
    fn followed_by(self, later: Self) -> Self {
        self.zip(later, |earlier, later| match later {
            None | Some(0) => earlier.or(later),
            later => later,
        })
    }

    fn plus(self, other: Self) -> Self {
        self.zip(other, |one, other| match (one, other) {
            (Some(one), Some(other)) => Some(one.saturating_add(other)),
            (one, other) => one.or(other),
        })
    }

    fn zip(self, other: Self, join: impl Fn(Option<u64>, Option<u64>) -> Option<u64>) -> Self {
        Self {
            input_tokens: join(self.input_tokens, other.input_tokens),
            output_tokens: join(self.output_tokens, other.output_tokens),
            cached_tokens: join(self.cached_tokens, other.cached_tokens),
            cache_write_tokens: join(self.cache_write_tokens, other.cache_write_tokens),
            cache_write_1h_tokens: join(self.cache_write_1h_tokens, other.cache_write_1h_tokens),
            reasoning_tokens: join(self.reasoning_tokens, other.reasoning_tokens),
            audio_input_tokens: join(self.audio_input_tokens, other.audio_input_tokens),
            audio_output_tokens: join(self.audio_output_tokens, other.audio_output_tokens),
            image_input_tokens: join(self.image_input_tokens, other.image_input_tokens),
            image_output_tokens: join(self.image_output_tokens, other.image_output_tokens),
            audio_ms: join(self.audio_ms, other.audio_ms),
            images: join(self.images, other.images),
            gpu_us: join(self.gpu_us, other.gpu_us),
            service_tier: other.service_tier.or(self.service_tier),
            source: self.source,
        }
    }
}
