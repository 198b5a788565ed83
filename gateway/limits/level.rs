//! The level of one limit for one of those it counts apart: what was taken in this span of time and in the last.
//!
//! A rolling window is two counters: what the span before had counts by the share of it that the window still covers
//! (the sliding window counter that Cloudflare described in "How we built rate limiting capable of scaling to millions
//! of domains"). A bucket that leaks (GCRA) needs one number less, but after a pause it lets twice the limit through in
//! one minute of the clock; here no aligned span ever has more than the limit.

use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};

use super::window::{Span, Window};

/// A level's name among replicas: the same wherever the same is counted, and nobody reads in it whom it counts.
pub type Id = [u8; 16];

/// What is taken, shared by all requests that it counts.
#[derive(Debug, Default)]
pub struct Level {
    /// What the limit calls its levels: its name, with what it counts over which time.
    pub levels: Box<str>,
    /// For whom it counts, for reports; empty where it counts for all.
    pub whose: Box<str>,
    /// What replicas that share it call it.
    pub id: Id,
    count: Mutex<Count>,
}

/// What was taken.
#[derive(Clone, Debug, Default)]
pub struct Count {
    span: Span,
    /// In this span: what was used, and what is reserved.
    taken: u64,
    /// The same in the span before.
    before: u64,
    before_from: Option<u64>,
    /// What a process before this one had used, in this span.
    restored: u64,
    /// Reserved and not settled.
    held: u64,
    /// The same, of what was taken in this span.
    held_here: u64,
    /// The same, of the span before.
    held_before: u64,
    /// What other replicas had taken in this span when the store told, and in the span before.
    elsewhere: u64,
    elsewhere_before: u64,
    /// What the store holds for this replica in this span, and nobody has taken yet.
    pub slice: u64,
    /// When something was taken last, in milliseconds since 1970.
    pub touched: u64,
    /// Whether the store has still to be told of it.
    pub untold: bool,
    /// The highest threshold, in per cent, that was passed.
    warned: u8,
    /// The highest of which somebody was told, from here or from elsewhere.
    announced: u8,
}

/// What this replica has taken of a level that it shares.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Own {
    /// In which span.
    pub span: Span,
    /// Used for good.
    pub used: u64,
    /// Reserved and not settled.
    pub held: u64,
    /// Used in the span before.
    pub used_before: u64,
    /// Reserved in the span before, and not settled.
    pub held_before: u64,
}

/// What one limit allows, at one time.
#[derive(Clone, Copy, Debug)]
pub struct Terms<'a> {
    /// The most.
    pub max: u64,
    /// Over which time.
    pub window: &'a Window,
    /// Now, in milliseconds since 1970.
    pub now: u64,
}

impl Level {
    /// Nothing is taken yet.
    pub fn new(levels: &str, whose: &str, id: Id) -> Self {
        Self { levels: levels.into(), whose: whose.into(), id, count: Mutex::default() }
    }

    /// The count, for whoever holds it.
    pub fn count(&self) -> MutexGuard<'_, Count> {
        self.count.lock()
    }

    /// Whether it says nothing that a new one would not.
    pub fn is_idle(&self, now: u64) -> bool {
        let count = self.count.lock();
        count.held == 0
            && !count.untold
            && (count.taken == 0 || now >= count.span.to.saturating_add(count.span.length()))
    }
}

impl Count {
    /// Goes on to the span that is now. A clock that went back changes nothing.
    pub fn roll(&mut self, terms: &Terms<'_>) {
        if terms.now < self.span.to {
            return;
        }
        self.enter(terms.window.span(terms.now));
    }

    /// Goes on to `span`, unless it is there or beyond.
    pub fn enter(&mut self, span: Span) {
        if span.to <= self.span.to {
            return;
        }
        let follows = self.span.to == span.from;
        let kept = |amount: u64| if follows { amount } else { 0 };
        self.before_from = follows.then_some(self.span.from);
        self.before = kept(self.taken);
        self.held_before = kept(self.held_here);
        self.elsewhere_before = kept(self.elsewhere);
        self.span = span;
        (self.taken, self.held_here, self.elsewhere, self.slice) = (0, 0, 0, 0);
        self.restored = 0;
        (self.warned, self.announced) = (0, 0);
    }

    /// What counts now.
    pub fn used(&self, terms: &Terms<'_>) -> u64 {
        let (here, before) = (self.elsewhere, self.elsewhere_before);
        self.counted(terms, self.taken.saturating_add(here), self.before.saturating_add(before))
    }

    fn counted(&self, terms: &Terms<'_>, here: u64, before: u64) -> u64 {
        if terms.window.is_calendar() {
            return here;
        }
        let rest = self.span.to.saturating_sub(terms.now).min(self.span.length());
        here.saturating_add(share(before, rest, self.span.length()))
    }

    /// What may still be taken if this replica may take one of `parts` of the limit, and no more than the store last
    /// knew to be free.
    pub fn free_of_part(&self, terms: &Terms<'_>, parts: u64) -> u64 {
        // Rounded up: a limit of one place for three replicas does not become none.
        let own = terms.max.div_ceil(parts.max(1)).saturating_sub(self.counted(terms, self.taken, self.before));
        own.min(self.free(terms))
    }

    /// Nobody else counts any more.
    pub fn alone(&mut self) {
        (self.elsewhere, self.elsewhere_before, self.slice) = (0, 0, 0);
    }

    /// A count as the store tells it: what all replicas have taken in `span`, and in the one before.
    pub fn told(span: Span, taken: u64, before: u64) -> Self {
        Self { span, taken, before, ..Self::default() }
    }

    /// What the store is told.
    pub fn own(&self) -> Own {
        Own {
            span: self.span,
            // What was restored, the process before has told.
            used: self.taken.saturating_sub(self.held_here).saturating_sub(self.restored),
            held: self.held_here,
            used_before: self.before.saturating_sub(self.held_before),
            held_before: self.held_before,
        }
    }

    /// What others have taken in the span that is now, as the store tells.
    pub fn set_elsewhere(&mut self, span: Span, here: u64, before: u64) {
        self.enter(span);
        if span == self.span {
            (self.elsewhere, self.elsewhere_before) = (here, before);
        }
    }

    /// What may still be taken.
    pub fn free(&self, terms: &Terms<'_>) -> u64 {
        terms.max.saturating_sub(self.used(terms))
    }

    /// Takes `amount`, whether it is free or not; returns in which span.
    pub fn take(&mut self, amount: u64) -> u64 {
        self.taken = self.taken.saturating_add(amount);
        self.held = self.held.saturating_add(amount);
        self.held_here = self.held_here.saturating_add(amount);
        self.span.from
    }

    /// Takes `more` in the span that began at `from`, if that is not long over.
    pub fn grow(&mut self, from: u64, more: u64) {
        self.held = self.held.saturating_add(more);
        if from == self.span.from {
            self.taken = self.taken.saturating_add(more);
            self.held_here = self.held_here.saturating_add(more);
        } else if Some(from) == self.before_from {
            self.before = self.before.saturating_add(more);
            self.held_before = self.held_before.saturating_add(more);
        }
    }

    /// Of what was taken in the span that began at `from`, so much was used.
    pub fn settle(&mut self, from: u64, reserved: u64, used: u64) {
        self.held = self.held.saturating_sub(reserved);
        let corrected = |taken: u64| taken.saturating_sub(reserved).saturating_add(used);
        if from == self.span.from {
            self.taken = corrected(self.taken);
            self.held_here = self.held_here.saturating_sub(reserved);
        } else if Some(from) == self.before_from {
            self.before = corrected(self.before);
            self.held_before = self.held_before.saturating_sub(reserved);
        }
    }

    /// What was reserved in the span that began at `from` and not used stays with the slice; what was used beyond it
    /// is taken out of it.
    pub fn keep(&mut self, from: u64, reserved: u64, used: u64) {
        if from == self.span.from {
            let kept = self.slice.saturating_add(reserved.saturating_sub(used));
            self.slice = kept.saturating_sub(used.saturating_sub(reserved));
        }
    }

    /// The store was told that the slice of `span` has `told`, and made it `target` if that is more. If it is less,
    /// it goes back, as far as it has not been spent meanwhile: then the store has to be told.
    pub fn resize(&mut self, span: Span, told: u64, target: u64) -> bool {
        if span != self.span {
            return false;
        }
        self.slice = self.slice.saturating_add(target.saturating_sub(told)).saturating_sub(told.saturating_sub(target));
        target < told
    }

    /// Whether the store should know of it.
    pub fn says_something(&self) -> bool {
        self.taken > 0 || self.before > 0 || self.slice > 0
    }

    /// Sets what had been used before the process started.
    pub fn restore(&mut self, terms: &Terms<'_>, used: u64) {
        self.roll(terms);
        self.taken = self.taken.saturating_add(used);
        self.restored = self.restored.saturating_add(used);
    }

    /// What is reserved and not settled.
    pub fn held(&self) -> u64 {
        self.held
    }

    /// How long until `amount` is free; `None` if it never is.
    pub fn wait(&self, terms: &Terms<'_>, amount: u64) -> Option<Duration> {
        let room = terms.max.checked_sub(amount)?;
        match terms.window {
            Window::Total => None,
            Window::Calendar(..) => Some(self.span.rest(terms.now)),
            Window::Rolling(length) => {
                let now = terms.now.clamp(self.span.from, self.span.to);
                let millis = match room.checked_sub(self.taken) {
                    // Still in this span: until the last one weighs little enough.
                    Some(room) => self.span.to.saturating_sub(now).saturating_sub(span_for(self.before, room, *length)),
                    None => self.span.to - now + (length - span_for(self.taken, room, *length)),
                };
                Some(Duration::from_millis(millis.max(1)))
            }
        }
    }

    /// How long this span still lasts.
    pub fn rest(&self, now: u64) -> Duration {
        self.span.rest(now)
    }

    /// The highest threshold that was passed in this span; 0: none.
    pub fn warned(&self) -> u8 {
        self.warned
    }

    /// Somebody is told of a threshold. Returns whether that is news.
    pub fn announces(&mut self, percent: u8) -> bool {
        let is_news = percent > self.announced;
        self.announced = self.announced.max(percent);
        is_news
    }

    /// The highest of `thresholds` (per cent of the limit, ascending) that was passed, if that is new in this span.
    pub fn warns(&mut self, terms: &Terms<'_>, thresholds: &[u8]) -> Option<u8> {
        let used = u128::from(self.used(terms)) * 100;
        let passed = thresholds.iter().rev().find(|at| used >= u128::from(**at) * u128::from(terms.max)).copied()?;
        (passed > self.warned).then(|| {
            self.warned = passed;
            passed
        })
    }
}

/// `amount` × `rest` / `length`, rounded up.
fn share(amount: u64, rest: u64, length: u64) -> u64 {
    (u128::from(amount) * u128::from(rest)).div_ceil(u128::from(length.max(1))) as u64
}

/// The longest rest of a span at which `amount` still weighs at most `room`.
fn span_for(amount: u64, room: u64, length: u64) -> u64 {
    if amount == 0 {
        length
    } else {
        (u128::from(room) * u128::from(length) / u128::from(amount)).min(length.into()) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Window = Window::Rolling(60_000);

    fn terms(max: u64, now: u64) -> Terms<'static> {
        Terms { max, window: &MINUTE, now }
    }

    /// Takes `amount` if it is free.
    fn admit(count: &mut Count, terms: &Terms<'_>, amount: u64) -> Option<u64> {
        count.roll(terms);
        (count.free(terms) >= amount).then(|| count.take(amount))
    }

    #[test]
    fn no_aligned_minute_has_more_than_the_limit_whatever_comes() {
        for seed in 0..200 {
            let mut random = fastrand::Rng::with_seed(seed);
            let (max, mut count, mut now) = (random.u64(1..1000), Count::default(), random.u64(0..120_000));
            let mut minutes = std::collections::BTreeMap::<u64, u64>::new();
            for _ in 0..2_000 {
                now += random.u64(0..1_000);
                let amount = random.u64(1..=max.div_ceil(4));
                let terms = terms(max, now);
                if let Some(from) = admit(&mut count, &terms, amount) {
                    let used = random.u64(0..=amount);
                    count.settle(from, amount, used);
                    *minutes.entry(now / 60_000).or_default() += used;
                }
            }
            assert!(minutes.values().all(|used| *used <= max), "seed {seed}: {minutes:?} above {max}");
            assert_eq!(count.held(), 0);
        }
    }

    #[test]
    fn a_steady_rate_below_the_limit_is_never_refused() {
        let mut count = Count::default();
        for now in (0..3_600_000).step_by(1_000) {
            assert!(admit(&mut count, &terms(61, now), 1).is_some(), "at {now}");
        }
    }

    #[test]
    fn a_wait_is_long_enough_and_hardly_too_long() {
        for seed in 0..500 {
            let mut random = fastrand::Rng::with_seed(seed);
            let (max, mut count, mut now) = (random.u64(1..100), Count::default(), 0);
            for _ in 0..50 {
                now += random.u64(0..20_000);
                admit(&mut count, &terms(max, now), random.u64(1..=max));
            }
            let (at, amount) = (terms(max, now), random.u64(1..=max));
            count.roll(&at);
            if count.free(&at) >= amount {
                continue;
            }
            let wait = count.wait(&at, amount).unwrap().as_millis() as u64;
            let then = |after: u64| {
                let (mut count, terms) = (count.clone(), terms(max, now + after));
                count.roll(&terms);
                count.free(&terms) >= amount
            };
            assert!(then(wait), "seed {seed}: not after {wait}");
            assert!(wait < 2 || !then(wait - 2), "seed {seed}: before {wait}");
        }
    }

    #[test]
    fn what_was_reserved_before_the_span_ended_is_settled_there() {
        let mut count = Count::default();
        let from = admit(&mut count, &terms(100, 59_000), 80).unwrap();
        count.roll(&terms(100, 60_000));
        assert_eq!(count.used(&terms(100, 60_000)), 80);
        count.settle(from, 80, 10);
        assert_eq!((count.used(&terms(100, 60_000)), count.held()), (10, 0));
    }

    #[test]
    fn a_limit_of_nothing_has_nothing_free() {
        let (mut count, none) = (Count::default(), terms(0, 1));
        count.roll(&none);
        assert_eq!((count.free(&none), count.wait(&none, 1)), (0, None));
    }

    #[test]
    fn a_part_of_a_limit_is_never_more_than_was_free_when_the_store_last_told() {
        let (mut count, at) = (Count::default(), terms(10, 1));
        count.roll(&at);
        assert_eq!((count.free_of_part(&at, 3), count.free_of_part(&at, 100)), (4, 1), "rounded up");
        count.take(3);
        assert_eq!(count.free_of_part(&at, 3), 1);
        count.set_elsewhere(MINUTE.span(1), 7, 0);
        assert_eq!((count.free_of_part(&at, 3), count.free(&at)), (0, 0));
        count.alone();
        assert_eq!(count.free(&at), 7);
    }

    #[test]
    fn a_slice_grows_by_the_stores_word_and_shrinks_by_what_is_left_of_it() {
        let (mut count, span) = (Count::default(), MINUTE.span(1));
        count.roll(&terms(100, 1));
        assert!(!count.resize(span, 0, 20));
        count.slice -= 15; // Spent while the store was told of 20.
        assert!(count.resize(span, 20, 10));
        assert_eq!(count.slice, 0);
        count.keep(span.from, 12, 5);
        assert_eq!(count.slice, 7, "what a request did not use is there for the next");
        assert!(!count.resize(MINUTE.span(60_000), 0, 50) && count.slice == 7, "another span is no matter of this one");
        count.roll(&terms(100, 60_000));
        assert_eq!(count.slice, 0, "and none goes on to the next");
    }

    #[test]
    fn the_store_is_told_what_this_process_has_used_and_nothing_that_was_restored() {
        let mut count = Count::default();
        count.restore(&terms(100, 1), 30);
        let from = count.take(20);
        count.take(5);
        count.settle(from, 20, 8);
        let own = count.own();
        assert_eq!((own.used, own.held), (8, 5));
        count.roll(&terms(100, 60_000));
        let own = count.own();
        assert_eq!((own.used, own.held, own.held_before), (0, 0, 5));
    }

    #[test]
    fn each_threshold_is_told_once_in_a_span() {
        let mut count = Count::default();
        let at = |now| terms(100, now);
        let mut told = Vec::new();
        for now in 0..100 {
            admit(&mut count, &at(now), 1);
            told.extend(count.warns(&at(now), &[50, 80, 100]));
        }
        assert_eq!(told, [50, 80, 100]);
    }
}
