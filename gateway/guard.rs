//! Guardrails at work: a prompt is judged before an upstream is asked, an answer before or while it goes to the client.
//! What they read and what they found is on record.

mod channel;
mod filter;
mod judged;
pub mod remote;
mod shape;

use std::borrow::Cow;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use infergate_plugins::guardrail::redact::Placeholders;
use infergate_plugins::guardrail::schema::Asked;
use infergate_plugins::guardrail::stream::{Progress, Scanner};
use infergate_plugins::guardrail::{Guardrails, Measure, Mode, Outcome, Place};
use infergate_plugins::operation::Operation;
use tokio::sync::Semaphore;

use self::channel::Channel;
pub(crate) use self::channel::decoded;
use self::filter::Filter;
pub(crate) use self::judged::word;
pub use self::judged::{Judged, JudgedList, JudgedRecord};
use self::shape::named;
use crate::refusal::{Code, Refusal};
use crate::scan::{Edit, splice};
use crate::telemetry::GuardMeters;
use crate::text::{self, Reading, Text, Texts, Tool};

/// The guardrails of a policy, with where they count.
#[derive(Debug)]
pub struct Rails {
    /// The rules.
    pub rules: Guardrails,
    /// The metrics of each.
    pub meters: Vec<GuardMeters>,
    /// How many calls the service of each may still have under way, where it has one.
    permits: Vec<Option<Arc<Semaphore>>>,
}

/// Bodies above this are judged beside the threads that carry requests.
pub const BESIDE: usize = 128 << 10;

/// The same where some rule has to think about them.
const BESIDE_THINKING: usize = 16 << 10;

/// The longest answer in one piece that is judged: it is held until then.
pub const WHOLE_MAX: usize = 32 << 20;

/// The guardrails of one exchange.
#[derive(Debug)]
pub struct Guard {
    rails: Arc<Rails>,
    placeholders: Placeholders,
    judged: Vec<Judged>,
    rules: Option<Filter>,
    restorer: Option<Filter>,
    /// The schemas that the request brought along.
    asked: Asked,
}

/// Why a text does not pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Blocked {
    /// A rule found something.
    By(Arc<str>),
    /// A rule that must read it could not.
    Unread(Arc<str>),
}

impl Blocked {
    /// Its code on the wire.
    pub const fn code(&self) -> Code {
        match self {
            Self::By(_) => Code::ContentFilter,
            Self::Unread(_) => Code::ContentUnread,
        }
    }

    /// Why, for the record.
    pub const fn why(&self) -> &'static str {
        match self {
            Self::By(_) => "it found something",
            Self::Unread(_) => "it must read what it cannot read",
        }
    }

    /// What the client gets to hear of a whole request, or of a whole answer.
    pub fn refusal(&self, what: &str) -> Refusal {
        let message = match self {
            Self::By(rule) => format!("{what} does not pass the guardrail {rule}"),
            Self::Unread(rule) => format!("{what} cannot be read by the guardrail {rule}, which must read it"),
        };
        Refusal::new(self.code(), message)
    }
}

impl Rails {
    /// The rules and their metrics.
    pub fn new(rules: Guardrails, meters: Vec<GuardMeters>) -> Self {
        let permits = |rule| rules.remote(rule).map(|remote| Arc::new(Semaphore::new(remote.calls_max())));
        let permits = (0..rules.rules().len()).map(permits).collect();
        Self { rules, meters, permits }
    }

    /// Whether any rule looks at prompts, or at answers.
    pub fn looks_at(&self, prompts: bool) -> bool {
        self.rules.rules().iter().any(|rule| rule.places.iter().any(|place| place.is_prompt() == prompts))
    }

    /// Bodies above this are judged beside the threads that carry requests.
    pub fn beside(&self) -> usize {
        if self.rules.thinks() { BESIDE_THINKING } else { BESIDE }
    }

    /// A rule that must read what nobody can read, if there is one.
    pub fn insists(&self, prompts: bool) -> Option<&Arc<str>> {
        let looks = |places: &[Place]| places.iter().any(|place| place.is_prompt() == prompts);
        self.rules.rules().iter().find(|rule| rule.insists() && looks(&rule.places)).map(|rule| &rule.name)
    }
}

/// A whole request, judged.
#[derive(Debug)]
pub struct Prompt {
    /// The guardrails, as far as they have come.
    pub guard: Guard,
    /// What changes in the body.
    pub edits: Vec<Edit>,
    /// Why it goes nowhere.
    pub blocked: Option<Blocked>,
    /// What does not pass, in words.
    pub what: Cow<'static, str>,
}

impl Prompt {
    fn new(guard: Guard) -> Self {
        Self { guard, edits: Vec::new(), blocked: None, what: Cow::Borrowed("the prompt") }
    }
}

impl Guard {
    /// Judges what a request says. `tokens` is what is known of its length.
    pub fn prompt(rails: Arc<Rails>, reading: &Reading, tokens: Option<u64>) -> Prompt {
        let mut prompt = Prompt::new(Self::new(rails));
        if let Err((message, blocked)) = prompt.guard.asks(reading.operation, &reading.body) {
            (prompt.what, prompt.blocked) = (Cow::Owned(message), blocked);
        }
        if !prompt.guard.rails.looks_at(true) {
            return prompt;
        }
        let guard = &mut prompt.guard;
        let Ok(texts) = reading.texts() else {
            let unread = guard.unread(true);
            return Prompt { blocked: prompt.blocked.or(unread), ..prompt };
        };
        let exceeded = guard.exceeded(reading, &texts.all, tokens);
        let found = guard.judge(texts, &[], &reading.body, &mut prompt.edits);
        guard.passed(true);
        Prompt { blocked: prompt.blocked.or(exceeded).or(found.err()), ..prompt }
    }

    fn new(rails: Arc<Rails>) -> Self {
        let judged = Judged::of(&rails.rules);
        let placeholders = Placeholders::default();
        Self { rails, placeholders, judged, rules: None, restorer: None, asked: Asked::default() }
    }

    /// An answer to `operation` begins. Returns whether anything is done about it.
    pub fn answers(&mut self, operation: Operation) -> bool {
        let looks = self.rails.looks_at(false);
        self.rules = looks.then(|| Filter::of_rules(operation));
        self.restorer = (!self.placeholders.is_empty()).then(|| Filter::of_originals(operation));
        looks || self.restorer.is_some()
    }

    /// Judges an answer that is here as a whole; returns it as the rules leave it, before originals come back.
    pub fn whole(&mut self, operation: Operation, body: Bytes) -> Result<Bytes, Blocked> {
        let Ok((texts, tools)) = text::answer_with_tools(operation, &body) else {
            return self.unread(false).map_or(Ok(body), Err);
        };
        let mut edits = Vec::new();
        self.judge(&texts.into(), &tools, &body, &mut edits)?;
        self.passed(false);
        text::forget_tokens(operation, &body, &mut edits);
        Ok(splice(&body, &mut edits))
    }

    /// What the rules that read here would change in texts of an answer that they have yet to read. Nothing is noted.
    pub fn foreseen(&self, texts: &Texts, document: &[u8]) -> Result<Vec<Edit>, Blocked> {
        let mut edits = Vec::new();
        Self::new(self.rails.clone()).judge(texts, &[], document, &mut edits).map(|()| edits)
    }

    /// Notes what the rules find in texts of an answer of which nothing leaves.
    pub fn note(&mut self, texts: &Texts, document: &[u8]) {
        let _known = self.judge(texts, &[], document, &mut Vec::new());
    }

    /// Brings originals back into an answer that is here as a whole.
    pub fn restored(&mut self, operation: Operation, body: Bytes) -> Bytes {
        if self.placeholders.is_empty() {
            return body;
        }
        let texts = text::answer(operation, &body).unwrap_or_default();
        let mut edits = Vec::new();
        for text in &texts {
            let mut channel = Channel::of_originals(text.is_json);
            let encoded = &body[text.span.clone()];
            edits.extend(channel.whole(encoded, &mut self.placeholders).1.into_iter().map(|edit| edit.at(text)));
        }
        splice(&body, &mut edits)
    }

    /// Whether it does anything about the answer that has begun.
    pub fn is_reading(&self) -> bool {
        self.rules.is_some() || self.restorer.is_some()
    }

    /// Whether the answer is so long that it is judged beside the threads that carry requests.
    pub fn is_long(&self, body: &[u8]) -> bool {
        body.len() > self.rails.beside()
    }

    /// Takes whole events of a stream and leaves in `events` what may leave now. `seen` gets them as the rules left
    /// them, before originals come back.
    pub fn events(&mut self, events: &mut BytesMut, seen: &mut impl FnMut(&[u8])) -> Result<(), Blocked> {
        let judged = match self.rules.take() {
            None => Ok(()),
            Some(mut filter) => {
                let judged = filter.take(events, self);
                self.rules = Some(filter);
                judged
            }
        };
        seen(events);
        if let Some(mut filter) = self.restorer.take() {
            // Originals are the client's own: nothing is said of them.
            let _ = filter.take(events, self);
            self.restorer = Some(filter);
        }
        judged
    }

    /// The stream is at its end: what is left of it, and whether that may leave.
    pub fn rest(&mut self, seen: &mut impl FnMut(&[u8])) -> (BytesMut, Result<(), Blocked>) {
        let mut events = BytesMut::new();
        let mut judged = Ok(());
        if let Some(mut filter) = self.rules.take() {
            judged = filter.finish(&mut events, self);
            if judged.is_ok() {
                self.passed(false);
            }
        }
        seen(&events);
        if let Some(mut filter) = self.restorer.take() {
            let _ = filter.take(&mut events, self);
            let mut last = BytesMut::new();
            let _ = filter.finish(&mut last, self);
            events.extend_from_slice(&last);
        }
        (events, judged)
    }

    /// What the rules read and found, for the record.
    pub fn judged(&self) -> JudgedList<'_> {
        JudgedList(&self.rails.rules, &self.judged)
    }

    /// The rules that found something and let it pass: for a header.
    pub fn flagged(&self) -> Option<String> {
        let rules = self.rails.rules.rules();
        let found = self.judged.iter().filter(|judged| judged.found > 0 && judged.outcome != Outcome::Blocked);
        let told = found.filter(|judged| rules[judged.rule].mode == Mode::Enforce);
        let names: Vec<String> =
            told.map(|judged| format!("{}={}", rules[judged.rule].name, judged::word(judged.outcome))).collect();
        (!names.is_empty()).then(|| names.join(", "))
    }

    /// The exchange is over: what became of each rule is counted.
    pub fn counted(&self) {
        for judged in &self.judged {
            self.rails.meters[judged.rule].count(judged.outcome);
        }
    }

    /// Judges texts one after another, with the tools that they are for; the edits are of `document`.
    fn judge(&mut self, texts: &Texts, tools: &[Tool], document: &[u8], edits: &mut Vec<Edit>) -> Result<(), Blocked> {
        self.inputs(tools, document)?;
        for text in &texts.all {
            let encoded = &document[text.span.clone()];
            // Only what has such a sign can look like a placeholder.
            if memchr::memchr(b'<', encoded).is_some() {
                self.placeholders.avoid(&String::from_utf8_lossy(encoded));
            }
        }
        let mut room = String::new();
        for (number, text) in texts.all.iter().enumerate() {
            let tool = tools.iter().find(|tool| tool.channel == text.channel).map(|tool| named(document, tool));
            let (rules, shapes) = (self.rails.rules.scanner(text.place), self.shapes(text, tool.as_deref()));
            let encoded = &document[text.span.clone()];
            // Nearly always, and at half the cost.
            let undone = || if text.is_json { None } else { texts.undone(number, document) };
            let finds_nothing = |rules: &Arc<Scanner>| {
                rules.finds_nothing(undone().unwrap_or_else(|| decoded(encoded, text, &mut room)))
            };
            if shapes.is_none() && rules.is_none_or(finds_nothing) {
                self.noted(text.place, &Progress::default(), encoded.len());
                continue;
            }
            let channel = Channel::with_shapes(rules, text.is_json, shapes.as_ref());
            let Some(mut channel) = channel.map(|channel| channel.written_like(text)) else { continue };
            let (progress, edited) = channel.whole(encoded, &mut self.placeholders);
            self.noted(text.place, &progress, encoded.len());
            if let Some(rule) = progress.blocked {
                return Err(Blocked::By(self.rails.rules.rules()[rule].name.clone()));
            }
            edits.extend(edited.into_iter().map(|edit| edit.at(text)));
        }
        Ok(())
    }

    /// What was read of a place, and what was found there.
    fn noted(&mut self, place: Place, progress: &Progress, bytes: usize) {
        for judged in self.judged.iter_mut().filter(|judged| judged.prompt == place.is_prompt() && !judged.waits) {
            let rule = &self.rails.rules.rules()[judged.rule];
            if rule.places.contains(&place) {
                judged.read(bytes as u64);
            }
        }
        for found in &progress.found {
            let outcome = self.rails.rules.rules()[found.rule].outcome();
            if let Some(judged) = self.judgement(found.rule, place.is_prompt()) {
                judged.find(&found.label, outcome);
            }
        }
    }

    fn judgement(&mut self, rule: usize, prompt: bool) -> Option<&mut Judged> {
        self.judged.iter_mut().find(|judged| judged.rule == rule && judged.prompt == prompt)
    }

    /// What is beyond the bounds of a whole prompt.
    fn exceeded(&mut self, reading: &Reading, texts: &[Text], tokens: Option<u64>) -> Option<Blocked> {
        let bounds = self.rails.rules.rules().iter().any(|rule| rule.kind == "size");
        if !bounds {
            return None;
        }
        let measure = measure(reading, texts, tokens);
        let exceeded: Vec<(usize, &'static str)> = self.rails.rules.exceeded(&measure).collect();
        let mut blocked = None;
        for (rule, what) in exceeded {
            let outcome = self.rails.rules.rules()[rule].outcome();
            if let Some(judged) = self.judgement(rule, true) {
                judged.find(what, outcome);
            }
            if outcome == Outcome::Blocked {
                blocked.get_or_insert_with(|| Blocked::By(self.rails.rules.rules()[rule].name.clone()));
            }
        }
        blocked
    }

    /// Nobody could read it: whoever must stops it.
    pub fn unread(&mut self, prompt: bool) -> Option<Blocked> {
        for judged in self.judged.iter_mut().filter(|judged| judged.prompt == prompt) {
            judged.outcome = judged.outcome.max(Outcome::Failed);
        }
        self.rails.insists(prompt).cloned().map(Blocked::Unread)
    }

    /// Everything has been read.
    fn passed(&mut self, prompt: bool) {
        for judged in self.judged.iter_mut().filter(|judged| judged.prompt == prompt && !judged.waits) {
            if judged.outcome == Outcome::Skipped {
                judged.outcome = Outcome::Passed;
            }
        }
    }
}

/// How much a prompt has of what rules bound.
fn measure(reading: &Reading, texts: &[Text], tokens: Option<u64>) -> Measure {
    let characters = |text: &Text| String::from_utf8_lossy(&reading.body[text.span.clone()]).chars().count() as u64;
    let (images, tools) = reading.extras();
    Measure { characters: texts.iter().map(characters).sum(), tokens, images, tools }
}
