//! What runs on an endpoint, in tokens, and how fast it has shown itself to be.
//!
//! Every dispatch, first token and end passes through here, so the counts are exact for this gateway. A [`Work`] holds
//! its share of them and gives it back whatever way the request ends.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, LazyLock};
use std::time::Instant;

use super::origin::{Endpoint, InFlight};
use super::score::{Candidate, READ_S, TOKEN_S, crowding};
use super::told::Telling;

/// One endpoint's load. Outlives reloads, with its endpoint.
#[derive(Debug, Default)]
pub struct Load {
    /// Prompt tokens of streams that have not begun.
    prefill: AtomicU32,
    /// Prompt tokens of answers whose first token nobody sees, and when that was so: they run off at the learned rate.
    unseen: AtomicU64,
    /// Prompt tokens of the answers that come as a whole and have not come: no more than these can be unread.
    unanswered: AtomicU32,
    /// Streams that have not begun.
    waiting: AtomicU32,
    /// Answers that come as a whole.
    wholes: AtomicU32,
    /// Answers that are being written, whole ones among them.
    streams: AtomicU32,
    /// Tokens that were expected of those.
    decode: AtomicU32,
    /// When something last came of it, or it got work after having none, in [`millis`].
    moved: AtomicU64,
    /// How fast it is.
    pub paces: Paces,
    /// What it tells of itself.
    pub told: Telling,
}

/// How fast somebody is, as far as it has been seen.
#[derive(Debug, Default)]
pub struct Paces {
    /// Seconds for a token of a prompt: what is learned are times, because times are what is compared.
    read_s: Learned,
    /// Seconds for a token of an answer that is alone.
    token_s: Learned,
    /// Seconds for a whole answer.
    answer_s: Learned,
    /// Tokens of an answer.
    output: Learned,
}

/// How fast endpoints of a pool usually are: what is taken of one that has shown nothing yet.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Usual {
    read_s: f32,
    token_s: f32,
    answer_s: f32,
}

/// A positive number that is learned from samples of any quality: each moves it by a bounded factor.
#[derive(Debug, Default)]
struct Learned {
    /// The value as an `f32`, and how many samples it has seen.
    value: AtomicU64,
    /// When the last one came, in seconds.
    at: AtomicU32,
}

/// How much a sample weighs once there were some.
const WEIGHT: f32 = 0.15;
/// A sample counts as if it were off by this factor at most, as a power of e: by 55 while there are few, by 2 later.
const STEP: (f32, f32) = (4.0, 0.7);
const FEW: u32 = 4;
/// After so many seconds without a sample, what was learned counts for half and what is usual in the pool for the
/// other: one that was slow once is tried again.
const HALF_S: f32 = 60.0;
/// Whoever is within a quarter of what is usual in the pool is as fast as that: the difference is what happened to run
/// beside its last answers, and would outweigh a prefix.
const ALIKE: std::ops::Range<f32> = 0.778_800_8..1.284_025_4; // a quarter as a power of e
/// Work of so many tokens tells half as much as work without end: the rest of its time is the way there and back.
const TELLING_TOKENS: f32 = 256.0;
/// An answer of fewer tokens tells nothing of the time between them.
const TOKENS_MIN: u64 = 8;

/// What one request asks of an endpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Job {
    /// Prompt tokens that it has to read.
    pub unread: u32,
    /// Tokens that are expected of the answer.
    pub output: u32,
    /// Whether the answer comes as a whole, so that its first token cannot be seen.
    pub whole: bool,
}

/// One request on an endpoint, with its share of the load; given back when dropped.
#[derive(Debug)]
pub struct Work {
    in_flight: InFlight,
    job: Job,
    phase: Phase,
    begun: Instant,
    /// Prompt tokens that were before it.
    ahead: u32,
    /// When its first token came, and how many answers were being written then.
    first: Option<(Instant, u32)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Nobody weighs this pool's work.
    Uncounted,
    Reading,
    Writing,
    Whole,
}

/// A time as loads count it: milliseconds from one moment on, the same for all of them, so that a choice among many
/// reckons once.
pub fn millis(now: Instant) -> u64 {
    static BEGAN: LazyLock<Instant> = LazyLock::new(Instant::now);
    let since = now.saturating_duration_since(*BEGAN);
    since.as_secs() * 1000 + u64::from(since.subsec_millis())
}

impl Load {
    /// The endpoint as it stands at `at`, for a request of `prompt` tokens. What is known elsewhere (weight, prefix,
    /// price) is for the caller to add.
    #[inline(always)] // See `Pool::candidate`.
    pub fn candidate(&self, usual: Usual, prompt: u32, at: u64) -> Candidate {
        let read_s = self.paces.read_s.of(usual.read_s, at);
        let answer_s = self.paces.answer_s.of(usual.answer_s, at);
        Candidate {
            prefill: self.prefill.load(Relaxed).saturating_add(self.unseen(read_s, at)),
            streams: self.streams.load(Relaxed),
            decode: self.decode.load(Relaxed),
            read_s,
            token_s: self.paces.token_s.of(usual.token_s, at),
            answer_s,
            silent_s: self.silent_s(answer_s, at),
            told: self.told.at(at, prompt),
            ..Candidate::default()
        }
    }

    /// How many requests of this gateway an engine may call waiting at this moment.
    pub fn may_wait(&self) -> u32 {
        self.waiting.load(Relaxed) + self.wholes.load(Relaxed)
    }

    /// Prompt tokens to be read, answers being written, prompt tokens a second: for those who watch.
    pub fn levels(&self, now: Instant) -> (u32, u32, f32) {
        let read_s = self.paces.read_s.or(READ_S);
        let prefill = self.prefill.load(Relaxed).saturating_add(self.unseen(read_s, millis(now)));
        (prefill, self.streams.load(Relaxed), 1.0 / read_s)
    }

    /// How long nothing has come of it though something should have. Of whole answers, nothing comes for as long as
    /// they take.
    fn silent_s(&self, answer_s: f32, at: u64) -> f32 {
        let patience = match (self.waiting.load(Relaxed), self.wholes.load(Relaxed)) {
            (0, 0) => return 0.0,
            (0, _) => 2.0 * answer_s,
            _ => 0.0,
        };
        let silent = at.saturating_sub(self.moved.load(Relaxed)) as f32 / 1e3;
        (silent - patience).max(0.0)
    }

    fn unseen(&self, read_s: f32, at: u64) -> u32 {
        let most = self.unanswered.load(Relaxed);
        if most == 0 {
            return 0;
        }
        let (tokens, then) = unpacked(self.unseen.load(Relaxed));
        let passed = (at as u32).wrapping_sub(then) as f32 / 1e3;
        ((tokens - passed / read_s).max(0.0) as u32).min(most)
    }

    fn moves(&self, at: u64) {
        self.moved.store(at, Relaxed);
    }

    /// Takes a job on. Returns how many prompt tokens are before it.
    fn begin(&self, job: Job, usual: Usual, at: u64) -> u32 {
        if self.may_wait() == 0 {
            self.moves(at);
        }
        let unseen = self.unseen(self.paces.read_s.of(usual.read_s, at), at);
        if job.whole {
            let tokens = unseen.saturating_add(job.unread) as f32;
            self.unseen.store(packed(tokens, at as u32), Relaxed);
            self.unanswered.fetch_add(job.unread, Relaxed);
            self.wholes.fetch_add(1, Relaxed);
            self.writes(job);
            return self.prefill.load(Relaxed).saturating_add(unseen);
        }
        self.waiting.fetch_add(1, Relaxed);
        self.prefill.fetch_add(job.unread, Relaxed).saturating_add(unseen)
    }

    fn writes(&self, job: Job) {
        self.decode.fetch_add(job.output, Relaxed);
        self.streams.fetch_add(1, Relaxed);
    }

    fn has_read(&self, job: Job) {
        self.prefill.fetch_sub(job.unread, Relaxed);
        self.waiting.fetch_sub(1, Relaxed);
    }

    fn has_written(&self, job: Job) {
        self.decode.fetch_sub(job.output, Relaxed);
        self.streams.fetch_sub(1, Relaxed);
    }
}

impl Work {
    /// A request on `endpoint`; `job` is `None` where nobody weighs the pool's work.
    pub fn begin(endpoint: &Arc<Endpoint>, job: Option<Job>, usual: &Paces, now: Instant) -> Self {
        let (in_flight, load) = (endpoint.enter(), &endpoint.load);
        let phase = match job {
            None => Phase::Uncounted,
            Some(job) if job.whole => Phase::Whole,
            Some(_) => Phase::Reading,
        };
        let ahead = job.map_or(0, |job| load.begin(job, usual.usual(), millis(now)));
        Self { in_flight, job: job.unwrap_or_default(), phase, begun: now, ahead, first: None }
    }

    /// The first token came. Returns after how many seconds, where that tells how fast such an endpoint is.
    pub fn first_token(&mut self, usual: &Paces, now: Instant) -> Option<f32> {
        let load = &self.in_flight.endpoint().load;
        if self.phase == Phase::Uncounted {
            return None;
        }
        let at = millis(now);
        load.moves(at);
        if self.phase != Phase::Reading {
            return None;
        }
        self.phase = Phase::Writing;
        load.has_read(self.job);
        load.writes(self.job);
        self.first = Some((now, load.streams.load(Relaxed)));
        let (took, tokens) = (seconds(self.begun, now), self.ahead.saturating_add(self.job.unread) as f32);
        let telling = tokens / (tokens + TELLING_TOKENS);
        for paces in [&load.paces, usual] {
            paces.read_s.learn(took / tokens.max(1.0), telling, READ_S, at);
        }
        Some(took)
    }

    /// The answer came to its end, with so many tokens.
    pub fn answered(&mut self, tokens: u64, usual: &Paces, now: Instant) {
        let load = &self.in_flight.endpoint().load;
        if self.phase == Phase::Uncounted {
            return;
        }
        let at = millis(now);
        load.moves(at);
        let whole_s = seconds(self.begun, now);
        for paces in [&load.paces, usual] {
            paces.answer_s.learn(whole_s, 1.0, whole_s, at);
        }
        if tokens > 0 {
            usual.output.learn(tokens as f32, 1.0, tokens as f32, at);
        }
        let beside = load.streams.load(Relaxed);
        match self.first {
            Some((first, before)) if tokens >= TOKENS_MIN => {
                let each = seconds(first, now) / (tokens - 1) as f32;
                let alone = each / crowding((before + beside) / 2);
                let telling = tokens as f32 / (tokens as f32 + TELLING_TOKENS / 8.0);
                for paces in [&load.paces, usual] {
                    paces.token_s.learn(alone, telling, TOKEN_S, at);
                }
            }
            None if self.phase == Phase::Whole => self.learn_from_whole(tokens, whole_s, usual, at),
            _ => {}
        }
    }

    /// Of an answer that came as a whole only the sum of both times is seen: both are wrong by the same factor.
    fn learn_from_whole(&self, tokens: u64, took: f32, usual: &Paces, at: u64) {
        let load = &self.in_flight.endpoint().load;
        let Usual { read_s, token_s, .. } = usual.usual();
        let (read_s, token_s) = (load.paces.read_s.of(read_s, at), load.paces.token_s.of(token_s, at));
        let read = self.ahead.saturating_add(self.job.unread) as f32 * read_s;
        let expected = read + tokens as f32 * token_s * crowding(load.streams.load(Relaxed));
        let factor = took / expected.max(1e-6);
        for paces in [&load.paces, usual] {
            paces.read_s.learn(read_s * factor, 0.5, READ_S, at);
            paces.token_s.learn(token_s * factor, 0.5, TOKEN_S, at);
        }
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        let load = &self.in_flight.endpoint().load;
        match self.phase {
            Phase::Uncounted => {}
            Phase::Reading => load.has_read(self.job),
            Phase::Writing => load.has_written(self.job),
            Phase::Whole => {
                load.unanswered.fetch_sub(self.job.unread, Relaxed);
                load.wholes.fetch_sub(1, Relaxed);
                load.has_written(self.job);
            }
        }
    }
}

impl Paces {
    /// Tokens of an answer, as far as is known.
    pub fn output(&self) -> u32 {
        // What OpenAI's own answers to chats have, about.
        const USUAL: f32 = 200.0;
        self.output.or(USUAL) as u32
    }

    /// What is usual.
    pub fn usual(&self) -> Usual {
        Usual { read_s: self.read_s.or(READ_S), token_s: self.token_s.or(TOKEN_S), answer_s: self.answer_s.or(0.0) }
    }
}

impl Learned {
    /// The value at `at`, where those of its kind usually have `usual`.
    #[inline(always)]
    fn of(&self, usual: f32, at: u64) -> f32 {
        let (value, samples) = unpacked(self.value.load(Relaxed));
        if samples == 0 {
            return usual;
        }
        if (ALIKE.start * usual..ALIKE.end * usual).contains(&value) {
            return usual;
        }
        let age = (at / 1000).saturating_sub(u64::from(self.at.load(Relaxed))) as f32;
        usual + (value - usual) * HALF_S / (HALF_S + age)
    }

    /// The value, or `usual` if nothing has been seen.
    fn or(&self, usual: f32) -> f32 {
        match unpacked(self.value.load(Relaxed)) {
            (_, 0) => usual,
            (value, _) => value,
        }
    }

    /// Takes a sample that tells so much, 0 to 1. Two at once: one of them is not learned from.
    fn learn(&self, seen: f32, telling: f32, usual: f32, at: u64) {
        if !(seen.is_finite() && seen > 0.0) {
            return;
        }
        let (value, samples) = unpacked(self.value.load(Relaxed));
        let (value, most) = (if samples == 0 { usual } else { value }, if samples < FEW { STEP.0 } else { STEP.1 });
        let weight = telling * WEIGHT.max(1.0 / (samples + 1) as f32);
        let step = weight * (seen / value).ln().clamp(-most, most);
        self.value.store(packed(value * step.exp(), samples.saturating_add(1)), Relaxed);
        self.at.store((at / 1000) as u32, Relaxed);
    }
}

fn packed(value: f32, other: u32) -> u64 {
    u64::from(value.to_bits()) << 32 | u64::from(other)
}

fn unpacked(both: u64) -> (f32, u32) {
    (f32::from_bits((both >> 32) as u32), both as u32)
}

fn seconds(from: Instant, to: Instant) -> f32 {
    to.saturating_duration_since(from).as_secs_f32().max(1e-4)
}

/// How long first tokens of a pool take: a histogram that forgets.
#[derive(Debug)]
pub struct FirstTokens {
    /// The n-th counts those below `LEAST_S * GROWTH^n` seconds.
    counts: [AtomicU32; BUCKETS],
    samples: AtomicU32,
}

const BUCKETS: usize = 96;
const LEAST_S: f32 = 1e-3;
const GROWTH: f32 = 1.15;
/// After so many samples all counts are halved.
const TURN: u32 = 1024;
/// Fewer samples tell nothing of the slowest twentieth.
const SAMPLES_MIN: u32 = 20;

impl Default for FirstTokens {
    fn default() -> Self {
        Self { counts: std::array::from_fn(|_| AtomicU32::new(0)), samples: AtomicU32::new(0) }
    }
}

impl FirstTokens {
    /// One took so many seconds.
    pub fn took(&self, seconds: f32) {
        let bucket = ((seconds / LEAST_S).ln() / GROWTH.ln()).ceil().clamp(0.0, (BUCKETS - 1) as f32) as usize;
        self.counts[bucket].fetch_add(1, Relaxed);
        if self.samples.fetch_add(1, Relaxed) + 1 == TURN {
            let halve = |count: &AtomicU32| {
                let half = count.load(Relaxed) / 2;
                count.store(half, Relaxed);
                half
            };
            self.samples.store(self.counts.iter().map(halve).sum(), Relaxed);
        }
    }

    /// The seconds within which nineteen of twenty came; `None` as long as too few came at all.
    pub fn p95_s(&self) -> Option<f32> {
        let whole: u32 = self.counts.iter().map(|count| count.load(Relaxed)).sum();
        let (mut left, mut bound) = (whole - whole / 20, LEAST_S);
        for count in self.counts.iter().filter(|_| whole >= SAMPLES_MIN) {
            let count = count.load(Relaxed);
            if count >= left {
                return Some(bound);
            }
            left -= count;
            bound *= GROWTH;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::origin::{Origin, OriginState};
    use super::*;
    use crate::policy::file::Http2;

    fn endpoint(now: Instant) -> Arc<Endpoint> {
        let (origin, _) = Origin::parse("http://127.0.0.1:1", Http2::Tls).unwrap();
        OriginState::new(origin, now).endpoints()[0].clone()
    }

    const STREAM: Job = Job { unread: 1_000, output: 100, whole: false };
    const WHOLE: Job = Job { whole: true, ..STREAM };

    fn counts(endpoint: &Endpoint, now: Instant) -> [u32; 4] {
        let one = endpoint.load.candidate(Paces::default().usual(), 1, millis(now));
        [endpoint.in_flight(), one.prefill, one.streams, one.decode]
    }

    #[test]
    fn work_moves_from_reading_to_writing_and_every_way_out_gives_all_of_it_back() {
        let (now, usual) = (Instant::now(), Paces::default());
        let endpoint = endpoint(now);
        let mut work = Work::begin(&endpoint, Some(STREAM), &usual, now);
        assert_eq!(counts(&endpoint, now), [1, 1_000, 0, 0]);
        let second = Work::begin(&endpoint, Some(STREAM), &usual, now);
        assert_eq!((second.ahead, counts(&endpoint, now)), (1_000, [2, 2_000, 0, 0]));
        drop(second);
        let later = now + Duration::from_millis(100);
        assert!(work.first_token(&usual, later).is_some_and(|took| (took - 0.1).abs() < 1e-3));
        assert!(work.first_token(&usual, later).is_none(), "there is one first token");
        assert_eq!(counts(&endpoint, later), [1, 0, 1, 100]);
        drop(work);
        assert_eq!(counts(&endpoint, later), [0; 4]);
        drop(Work::begin(&endpoint, Some(WHOLE), &usual, later));
        drop(Work::begin(&endpoint, None, &usual, later));
        assert_eq!(counts(&endpoint, later), [0; 4]);
    }

    #[test]
    fn a_prompt_whose_answer_has_come_is_not_waited_for_however_slow_its_reader_was_taken_to_be() {
        let (now, usual) = (Instant::now(), Paces::default());
        let endpoint = endpoint(now);
        let kept = Work::begin(&endpoint, Some(WHOLE), &usual, now);
        for _ in 0..10_000 {
            drop(Work::begin(&endpoint, Some(Job { unread: 1_000_000, ..WHOLE }), &usual, now));
        }
        assert_eq!(counts(&endpoint, now), [1, 1_000, 1, 100]);
        drop(kept);
        assert_eq!(counts(&endpoint, now), [0; 4]);
    }

    #[test]
    fn more_prompts_than_can_be_counted_are_many_and_no_panic() {
        let (now, usual) = (Instant::now(), Paces::default());
        let endpoint = endpoint(now);
        let long = |whole| Work::begin(&endpoint, Some(Job { unread: 2_000_000_000, output: 1, whole }), &usual, now);
        let mut heap = [long(false), long(false), long(true), long(true)];
        let one = endpoint.load.candidate(usual.usual(), 1, millis(now));
        assert_eq!(one.prefill, u32::MAX);
        assert!(one.first_token_s(&super::super::score::Asked { prompt: 4_000_000, ..Default::default() }) > 500_000.0);
        for work in &mut heap {
            work.first_token(&usual, now);
            work.answered(100, &usual, now);
        }
    }

    #[test]
    fn what_nobody_sees_being_read_runs_off_at_the_learned_rate() {
        let (now, usual) = (Instant::now(), Paces::default());
        let endpoint = endpoint(now);
        let _work = Work::begin(&endpoint, Some(Job { unread: 8_000, ..WHOLE }), &usual, now);
        assert_eq!(counts(&endpoint, now), [1, 8_000, 1, 100]);
        assert_eq!(counts(&endpoint, now + Duration::from_millis(500)), [1, 4_000, 1, 100]);
        assert_eq!(counts(&endpoint, now + Duration::from_secs(2)), [1, 0, 1, 100]);
    }

    /// Lets an endpoint that reads `rate` tokens a second and writes one in `token_s` answer `times` streams.
    fn serve(endpoint: &Arc<Endpoint>, usual: &Paces, (rate, token_s): (f32, f32), times: u64) -> Instant {
        let mut now = Instant::now();
        for _ in 0..times {
            let mut work = Work::begin(endpoint, Some(STREAM), usual, now);
            now += Duration::from_secs_f32(1_000.0 / rate);
            work.first_token(usual, now);
            now += Duration::from_secs_f32(99.0 * token_s * crowding(1));
            work.answered(100, usual, now);
        }
        now
    }

    #[test]
    fn rates_are_learned_within_some_requests_and_one_outlier_moves_them_little() {
        let usual = Paces::default();
        let endpoint = endpoint(Instant::now());
        let now = serve(&endpoint, &usual, (2_000.0, 0.03), 12);
        let seen = endpoint.load.candidate(usual.usual(), 1, millis(now));
        assert!((1_700.0..2_400.0).contains(&seen.read_s.recip()), "{seen:?}");
        assert!((0.025..0.035).contains(&seen.token_s), "{seen:?}");
        let mut work = Work::begin(&endpoint, Some(STREAM), &usual, now);
        let late = now + Duration::from_secs(300);
        work.first_token(&usual, late);
        let after = endpoint.load.candidate(usual.usual(), 1, millis(late)).read_s;
        assert!(after < seen.read_s / 0.9, "{after}");
    }

    #[test]
    fn whole_answers_tell_how_fast_one_is_too() {
        let (base, usual) = (Instant::now(), Paces::default());
        let (fast, slow) = (endpoint(base), endpoint(base));
        for (endpoint, seconds) in [(&fast, 0.5), (&slow, 4.0)] {
            let mut now = base;
            for _ in 0..10 {
                let mut work = Work::begin(endpoint, Some(WHOLE), &usual, now);
                now += Duration::from_secs_f32(seconds);
                work.answered(100, &usual, now);
            }
        }
        let rate = |endpoint: &Endpoint| endpoint.load.candidate(usual.usual(), 1, millis(base)).read_s.recip();
        assert!(rate(&fast) > 4.0 * rate(&slow), "{} {}", rate(&fast), rate(&slow));
    }

    #[test]
    fn what_was_learned_long_ago_gives_way_to_what_is_usual() {
        let usual = Paces::default();
        let slow = endpoint(Instant::now());
        let now = serve(&slow, &Paces::default(), (100.0, 0.1), 10);
        let rate = |now| slow.load.candidate(usual.usual(), 1, millis(now)).read_s.recip();
        assert!(rate(now) < 200.0);
        assert!(rate(now + Duration::from_secs(3_600)) > 0.4 / READ_S);
    }

    #[test]
    fn silence_counts_from_the_first_that_waits_and_ends_with_whatever_comes() {
        let (now, usual) = (Instant::now(), Paces::default());
        let endpoint = endpoint(now);
        let silent = |at| endpoint.load.candidate(usual.usual(), 1, millis(at)).silent_s;
        let late = now + Duration::from_secs(50);
        assert_eq!(silent(late), 0.0, "nobody waits");
        let mut one = Work::begin(&endpoint, Some(STREAM), &usual, late);
        let _other = Work::begin(&endpoint, Some(STREAM), &usual, late + Duration::from_secs(1));
        assert_eq!(silent(late + Duration::from_secs(3)), 3.0);
        one.first_token(&usual, late + Duration::from_secs(4));
        assert_eq!(silent(late + Duration::from_secs(5)), 1.0);
    }

    #[test]
    fn nothing_is_learned_from_nonsense() {
        let learned = Learned::default();
        for nonsense in [0.0, -1.0, f32::NAN, f32::INFINITY] {
            learned.learn(nonsense, 1.0, 5.0, 0);
        }
        assert_eq!(learned.or(7.0), 7.0);
    }

    #[test]
    fn the_slowest_twentieth_is_found_within_a_sixth_and_the_past_is_forgotten() {
        let first = FirstTokens::default();
        assert_eq!(first.p95_s(), None);
        for n in 0..1_000 {
            first.took(if n % 50 == 0 { 5.0 } else { 0.1 });
        }
        assert!(first.p95_s().is_some_and(|p95| (0.1..0.12).contains(&p95)), "{:?}", first.p95_s());
        (0..9_000).for_each(|_| first.took(1.0));
        assert!(first.p95_s().is_some_and(|p95| (1.0..1.2).contains(&p95)), "{:?}", first.p95_s());
    }
}
