//! Rules that ask another service: asked from the background, in time, so many at once, and not twice about the same.
//!
//! A request hands its questions over and waits for what is said; where it stops waiting nobody goes on.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use infergate_plugins::guardrail::remote::{Call, Finds, Question, Remote};
use infergate_plugins::guardrail::{Outcome, Verdict};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout_at;

use super::channel::{Channel, decoded};
use super::{Blocked, Guard, Rails};
use crate::egress::Egress;
use crate::handover::Handover;
use crate::house::House;
use crate::kept::Kept;
use crate::scan::{self, Edit};
use crate::telemetry::Table;
use crate::text::Text;

/// So many requests may wait for the background to take their questions.
const WAITING_MAX: usize = 4_096;
/// Longer than any deadline of a rule.
const LONG: Duration = Duration::from_secs(3_600);
/// So many verdicts are kept, of all rules together.
const KEPT_MAX: usize = 20_000;

/// The way from requests to the background, and what was said lately.
#[derive(Debug)]
pub struct Remotes {
    jobs: Handover<Job>,
    kept: Mutex<Kept<Finds>>,
}

impl Default for Remotes {
    fn default() -> Self {
        Self { jobs: Handover::of(WAITING_MAX), kept: Mutex::new(Kept::new(KEPT_MAX)) }
    }
}

/// What one request asks of one rule's service.
#[derive(Debug)]
struct Job {
    rails: Arc<Rails>,
    asked: Vec<(usize, Vec<Question>)>,
    said: watch::Sender<Option<Arc<[Said]>>>,
}

/// What became of one rule.
#[derive(Debug)]
pub struct Said {
    rule: usize,
    /// What it found in each text.
    finds: Result<Vec<Finds>, Fault>,
}

/// Why a service said nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Fault {
    TimedOut,
    Failed(String),
}

impl Remotes {
    /// What was said lately.
    pub fn table(&self) -> Table {
        Table { name: "guard_answers", entries: self.kept.lock().len(), room: Some(KEPT_MAX) }
    }

    /// Hands questions over.
    fn ask(&self, rails: &Arc<Rails>, asked: Vec<(usize, Vec<Question>)>) -> watch::Receiver<Option<Arc<[Said]>>> {
        let (said, hears) = watch::channel(None);
        // Where there is no room nobody says anything, which is heard at once.
        self.jobs.give(Job { rails: rails.clone(), asked, said });
        hears
    }
}

/// Asks for all requests, until the process ends.
pub async fn run(house: Arc<House>, egress: Arc<Egress>) {
    house.remotes.jobs.each(usize::MAX, |job| work(house.clone(), egress.clone(), job)).await;
}

async fn work(house: Arc<House>, egress: Arc<Egress>, job: Job) {
    let Job { rails, asked, said } = job;
    let asking = async {
        let mut rules = JoinSet::new();
        for (rule, questions) in asked {
            let (house, egress, rails) = (house.clone(), egress.clone(), rails.clone());
            rules.spawn(async move { Said { rule, finds: of_rule(&house, &egress, &rails, rule, questions).await } });
        }
        rules.join_all().await
    };
    tokio::select! {
        all = asking => drop(said.send(Some(all.into()))),
        // Nobody waits for it any more.
        () = said.closed() => {}
    }
}

/// What one rule's service says of these texts, or said lately.
async fn of_rule(
    house: &Arc<House>,
    egress: &Arc<Egress>,
    rails: &Arc<Rails>,
    rule: usize,
    questions: Vec<Question>,
) -> Result<Vec<Finds>, Fault> {
    let Some(remote) = rails.rules.remote(rule).cloned() else { return Err(Fault::Failed("no service".to_owned())) };
    if questions.iter().any(|question| question.text.len() > remote.bytes_max()) {
        return Err(Fault::Failed(format!("a text is longer than {} bytes", remote.bytes_max())));
    }
    let until = Instant::now() + remote.deadline();
    let keys: Vec<[u8; 32]> = questions.iter().map(|question| remote.key(question)).collect();
    let mut finds: Vec<Option<Finds>> = {
        let kept = house.remotes.kept.lock();
        keys.iter().map(|key| kept.get(key).cloned()).collect()
    };
    let missing: Vec<usize> = (0..finds.len()).filter(|at| finds[*at].is_none()).collect();
    let asked: Arc<[Question]> = missing.iter().map(|at| questions[*at].clone()).collect();
    let mut calls = JoinSet::new();
    for call in remote.calls(&asked) {
        calls.spawn(of_call(egress.clone(), rails.clone(), rule, remote.clone(), asked.clone(), call, until));
    }
    while let Some(done) = calls.join_next().await {
        let (range, said) = done.map_err(|_| Fault::Failed("a call broke".to_owned()))??;
        for (at, found) in range.zip(said) {
            house.remotes.kept.lock().keep(keys[missing[at]], found.clone(), remote.kept());
            finds[missing[at]] = Some(found);
        }
    }
    Ok(finds.into_iter().map(Option::unwrap_or_default).collect())
}

async fn of_call(
    egress: Arc<Egress>,
    rails: Arc<Rails>,
    rule: usize,
    remote: Arc<Remote>,
    asked: Arc<[Question]>,
    call: Call,
    until: Instant,
) -> Result<(Range<usize>, Vec<Finds>), Fault> {
    let _permit = match &rails.permits[rule] {
        Some(permits) => Some(timeout_at(until.into(), permits.acquire()).await.map_err(|_| Fault::TimedOut)?),
        None => None,
    };
    // The deadline here cuts first, however late somebody looks.
    let answer = timeout_at(until.into(), egress.post(call.post, LONG)).await.map_err(|_| Fault::TimedOut)?;
    let answer = answer.map_err(Fault::Failed)?;
    let finds = remote.read(&asked[call.questions.clone()], &answer).map_err(Fault::Failed)?;
    Ok((call.questions, finds))
}

/// Questions that are on their way, and the texts that they are about.
#[derive(Debug)]
pub struct Asked {
    rails: Arc<Rails>,
    rules: Vec<usize>,
    texts: Vec<Text>,
    hears: watch::Receiver<Option<Arc<[Said]>>>,
}

impl Asked {
    /// Waits until all is said, or nobody will.
    pub async fn said(&self) {
        let _ = self.hears.clone().wait_for(Option::is_some).await;
    }

    /// Whether all is said.
    pub fn is_said(&self) -> bool {
        self.hears.borrow().is_some()
    }

    /// What ends a wait for an upstream: it resolves only if something does not pass.
    pub fn stops(&self) -> Stops {
        Stops { rails: self.rails.clone(), hears: self.hears.clone() }
    }
}

/// Whether a prompt turned out not to pass.
#[derive(Clone, Debug)]
pub struct Stops {
    rails: Arc<Rails>,
    hears: watch::Receiver<Option<Arc<[Said]>>>,
}

impl Stops {
    /// Resolves when it does not pass.
    pub async fn stopped(&mut self) {
        let rails = &self.rails;
        let blocks =
            |said: &Option<Arc<[Said]>>| said.iter().flat_map(|all| all.iter()).any(|said| blocks(rails, said));
        if self.hears.wait_for(blocks).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

fn blocks(rails: &Rails, said: &Said) -> bool {
    let rule = &rails.rules.rules()[said.rule];
    match &said.finds {
        Ok(finds) => rule.enforces() && rule.verdict == Verdict::Block && finds.iter().any(|finds| !finds.is_empty()),
        Err(_) => rule.insists(),
    }
}

impl Guard {
    /// Whether some rule asks another service about answers: a stream is held for it.
    pub fn holds(&self) -> bool {
        self.rails.rules.remotes(false).next().is_some()
    }

    /// Asks about texts of `document`, as `edits` leave them: all rules of this side that are asked now, or all that are
    /// asked beside. None where nobody asks anything.
    pub fn ask(
        &self,
        house: &House,
        texts: &[Text],
        document: &[u8],
        edits: &[Edit],
        (prompts, beside): (bool, bool),
    ) -> Option<Asked> {
        let rules: Vec<(usize, &Arc<Remote>)> =
            self.rails.rules.remotes(prompts).filter(|(_, remote)| remote.is_beside() == beside).collect();
        if rules.is_empty() {
            return None;
        }
        let left: Vec<Question> = texts.iter().map(|text| question(document, text, edits)).collect();
        let of_rule = |rule: usize| {
            let places = &self.rails.rules.rules()[rule].places;
            left.iter().filter(|question| places.contains(&question.place)).cloned().collect::<Vec<_>>()
        };
        let asked: Vec<(usize, Vec<Question>)> = rules.iter().map(|(rule, _)| (*rule, of_rule(*rule))).collect();
        let rules = asked.iter().map(|(rule, _)| *rule).collect();
        let hears = house.remotes.ask(&self.rails, asked);
        Some(Asked { rails: self.rails.clone(), rules, texts: texts.to_vec(), hears })
    }

    /// Takes what was said about texts of `document`, and adds to `edits` what that changes there.
    pub fn hear(&mut self, asked: &Asked, document: &[u8], edits: &mut Vec<Edit>, prompt: bool) -> Result<(), Blocked> {
        let all = asked.hears.borrow().clone();
        let mut passes = Ok(());
        for rule in &asked.rules {
            let said = all.iter().flat_map(|all| all.iter()).find(|said| said.rule == *rule);
            let heard = match said.map(|said| &said.finds) {
                Some(Ok(finds)) => self.found(*rule, asked, finds, document, edits, prompt),
                Some(Err(fault)) => self.unheard(*rule, fault, prompt),
                None => self.unheard(*rule, &Fault::Failed("too many wait for it".to_owned()), prompt),
            };
            passes = passes.and(heard);
        }
        passes
    }

    /// A rule found this.
    fn found(
        &mut self,
        rule: usize,
        asked: &Asked,
        finds: &[Finds],
        document: &[u8],
        edits: &mut Vec<Edit>,
        prompt: bool,
    ) -> Result<(), Blocked> {
        let rules = self.rails.clone();
        let described = &rules.rules.rules()[rule];
        let outcome = described.outcome();
        if let Some(judged) = self.judgement(rule, prompt) {
            judged.waits = false;
            if judged.outcome == Outcome::Skipped {
                judged.outcome = Outcome::Passed;
            }
        }
        let texts = asked.texts.iter().filter(|text| described.places.contains(&text.place));
        let mut blocked = None;
        for (text, finds) in texts.zip(finds) {
            if let Some(judged) = self.judgement(rule, prompt) {
                judged.read(text.span.len() as u64);
                finds.iter().for_each(|(label, _)| judged.find(label, outcome));
            }
            if finds.is_empty() {
                continue;
            }
            let channel = Channel::of_rules(&rules.rules.heard(rule, finds), text.is_json);
            let mut channel = channel.written_like(text);
            let encoded = left(document, text, edits);
            let (progress, changes) = channel.whole(&encoded, &mut self.placeholders);
            blocked = blocked.or(progress.blocked);
            for change in changes {
                merge(edits, text, change.0);
            }
        }
        blocked.map_or(Ok(()), |_| Err(Blocked::By(described.name.clone())))
    }

    /// A rule's service said nothing: whoever must know stops it.
    fn unheard(&mut self, rule: usize, fault: &Fault, prompt: bool) -> Result<(), Blocked> {
        let described = &self.rails.rules.rules()[rule];
        let (name, insists) = (described.name.clone(), described.insists());
        let outcome = match fault {
            Fault::TimedOut => Outcome::TimedOut,
            Fault::Failed(why) => {
                tracing::warn!(rule = &*name, %why, "a guardrail's service could not be asked");
                Outcome::Failed
            }
        };
        if let Some(judged) = self.judgement(rule, prompt) {
            judged.outcome = outcome;
        }
        if insists { Err(Blocked::Unread(name)) } else { Ok(()) }
    }
}

/// A text as it is after these edits, decoded.
fn question(document: &[u8], text: &Text, edits: &[Edit]) -> Question {
    let (left, mut room) = (left(document, text, edits), String::new());
    Question { place: text.place, text: decoded(&left, text, &mut room).into() }
}

/// The edits within a text, counted from its beginning, in order.
fn within(text: &Text, edits: &[Edit]) -> Vec<Edit> {
    let inside = edits.iter().filter(|edit| edit.span.start >= text.span.start && edit.span.end <= text.span.end);
    let mut own: Vec<Edit> = inside
        .map(|edit| Edit {
            span: edit.span.start - text.span.start..edit.span.end - text.span.start,
            text: edit.text.clone(),
        })
        .collect();
    own.sort_by_key(|edit| (edit.span.start, edit.span.end));
    own
}

/// A text as it is after these edits, encoded.
fn left(document: &[u8], text: &Text, edits: &[Edit]) -> bytes::Bytes {
    let encoded = bytes::Bytes::copy_from_slice(&document[text.span.clone()]);
    scan::splice(&encoded, &mut within(text, edits))
}

/// Adds a change of a text that was edited before: as one edit of the document with those that it covers.
fn merge(edits: &mut Vec<Edit>, text: &Text, change: infergate_plugins::guardrail::Edit) {
    let before = within(text, edits);
    let (start, end) = (change.range.start as usize, change.range.end as usize);
    let from = text.span.start + original(&before, start, false);
    let to = (text.span.start + original(&before, end, true)).max(from);
    edits.retain(|edit| edit.span.end <= from || edit.span.start >= to);
    edits.push(Edit { span: from..to, text: change.replacement });
}

/// Where a place in the edited text stands in the text before. One within a replacement stands where that begins, or
/// ends.
fn original(before: &[Edit], at: usize, is_end: bool) -> usize {
    // What the text has grown by before this place, and shrunk by.
    let (mut grown, mut shrunk) = (0, 0);
    for edit in before {
        let start = edit.span.start + grown - shrunk;
        let end = start + edit.text.len();
        if at < end && at > start {
            return if is_end { edit.span.end } else { edit.span.start };
        }
        if at < end || (is_end && at <= start) {
            break;
        }
        grown += edit.text.len();
        shrunk += edit.span.len();
    }
    at + shrunk - grown
}

#[cfg(test)]
mod tests {
    use infergate_plugins::guardrail::Place;

    use super::*;

    fn text(document: &str) -> Text {
        Text {
            place: Place::PromptUser,
            channel: 0,
            turn: 0,
            span: 1..document.len() - 1,
            is_json: false,
            is_raw: false,
        }
    }

    #[test]
    fn a_change_of_an_edited_text_takes_what_it_covers_with_it() {
        let document = "\"0123456789\"";
        let text = text(document);
        let before = vec![Edit { span: 3..5, text: "XXXX".to_owned() }, Edit { span: 8..9, text: String::new() }];
        let left = String::from_utf8(left(document.as_bytes(), &text, &before).to_vec()).unwrap();
        assert_eq!(left, "01XXXX45689");
        for start in 0..left.len() {
            for end in start + 1..=left.len() {
                let mut edits = before.clone();
                merge(
                    &mut edits,
                    &text,
                    infergate_plugins::guardrail::Edit { range: start as u64..end as u64, replacement: "_".to_owned() },
                );
                let out = scan::splice(&bytes::Bytes::from(document), &mut edits);
                let out = String::from_utf8(out.to_vec()).unwrap();
                let whole = |at: usize| (3..6).contains(&at);
                // What stands in part of a replacement takes the rest of it along.
                let from = if whole(start) { 2 } else { start };
                let to = if whole(end) { 6 } else { end };
                let expected = format!("\"{}_{}\"", &left[..from], &left[to..]);
                assert_eq!(out, expected, "{start} to {end}");
            }
        }
    }
}
