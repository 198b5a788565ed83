//! What records count, handed to the ledger beside their lines: what has just been written need not be read again.
//!
//! A group of lines comes when it is on disk, with the facts of all its records. One without, or one that the ledger
//! had no time for, it reads where the others stand that it was not there for: in the journal.

use std::collections::VecDeque;

use parking_lot::Mutex;

use super::fold::{GRAINS, begin, clipped};
use super::{Position, Spent, bounded};
use crate::audit::journal::Chain;
use crate::audit::record::{Outcome, Record};
use crate::money::NanoUsd;
use crate::time::seconds;
use crate::usage::Source;

/// The most that may wait, facts and groups together. A ledger that is further behind reads.
const HELD: usize = 32_768;

/// What one record counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fact<'a> {
    /// The minute in which its head had been read, in seconds since 1970.
    pub(super) minute: i64,
    /// Whose it is: tenant, model and principal, clipped. Absent names are empty.
    pub(super) names: [&'a str; 3],
    /// What is added.
    pub(super) spent: Spent,
}

impl<'a> Fact<'a> {
    /// What `record` counts.
    pub(crate) fn of(record: &Record<'a>) -> Self {
        let names = [record.tenant, record.model.route, record.principal];
        Self {
            minute: begin(seconds(record.moment.at), GRAINS[0]),
            names: names.map(|name| clipped(name.unwrap_or_default())),
            spent: spent(record),
        }
    }
}

fn spent(record: &Record<'_>) -> Spent {
    // What a record does not say it does not count.
    let usage = Some(&record.usage).filter(|usage| !usage.says_nothing()).copied().unwrap_or_default();
    let tokens = |tokens: Option<u64>| bounded(tokens.unwrap_or(0));
    Spent {
        requests: 1,
        ok: (record.outcome == Outcome::Ok).into(),
        input_tokens: tokens(usage.input_tokens),
        output_tokens: tokens(usage.output_tokens),
        cached_tokens: tokens(usage.cached_tokens),
        reasoning_tokens: tokens(usage.reasoning_tokens),
        cost: NanoUsd(record.cost.map_or(0, |cost| bounded(cost.nanousd.0))),
        unpriced: record.unpriced.into(),
        estimated: matches!(usage.source, Source::Estimated | Source::Partial).into(),
        asked: (!record.attempts.list.is_empty()).into(),
    }
}

/// The facts of records that follow each other.
#[derive(Debug, Default)]
pub(crate) struct Facts {
    each: Vec<Unnamed>,
    /// The names of all, one behind the other.
    names: String,
}

/// A fact whose names stand elsewhere.
#[derive(Debug)]
struct Unnamed {
    minute: i64,
    lengths: [u16; 3],
    spent: Spent,
}

impl Facts {
    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.each.len()
    }

    /// One more.
    pub(crate) fn push(&mut self, fact: &Fact<'_>) {
        let Fact { minute, names, spent } = *fact;
        names.iter().for_each(|name| self.names.push_str(name));
        self.each.push(Unnamed { minute, lengths: names.map(|name| name.len() as u16), spent });
    }

    /// Takes those of `newer` behind its own, and leaves it the room that they had.
    pub(crate) fn append(&mut self, newer: &mut Self) {
        if self.each.is_empty() {
            let room = (Vec::with_capacity(newer.each.len()), String::with_capacity(newer.names.len()));
            *self = std::mem::replace(newer, Self { each: room.0, names: room.1 });
        } else {
            self.each.append(&mut newer.each);
            self.names.push_str(&newer.names);
            newer.names.clear();
        }
    }

    /// Every fact with its names.
    pub(super) fn iter(&self) -> impl Iterator<Item = Fact<'_>> {
        let mut rest = self.names.as_str();
        self.each.iter().map(move |one| {
            let names = one.lengths.map(|length| {
                let (name, others) = rest.split_at_checked(length.into()).unwrap_or_default();
                rest = others;
                name
            });
            Fact { minute: one.minute, names, spent: one.spent }
        })
    }
}

/// Lines of this process's run that are on disk, and what their records count.
#[derive(Debug)]
pub(super) struct Group {
    /// The `seq` of the first.
    first: u64,
    /// What is behind the last.
    pub(super) to: Position,
    pub(super) facts: Facts,
}

/// The groups that the ledger has still to take.
#[derive(Debug)]
pub(crate) struct Feed {
    is_taken: bool,
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    groups: VecDeque<Group>,
    /// The facts in them, and themselves.
    count: usize,
}

impl Feed {
    /// Nothing yet. Where it is not taken, there never is anything: the ledger wants more of a record than its sums.
    pub(crate) fn new(is_taken: bool) -> Self {
        Self { is_taken, held: Mutex::default() }
    }

    /// Whether somebody takes what is told.
    pub(crate) fn is_taken(&self) -> bool {
        self.is_taken
    }

    /// Lines `first` to `last` are on disk, whose last has this chain and whose records count this. What there is no
    /// room for is read in the journal.
    pub(crate) fn add(&self, first: u64, last: u64, chain: &Chain, facts: Facts) {
        let chain = String::from_utf8_lossy(chain).into_owned();
        let mut held = self.held.lock();
        let count = held.count + 1 + facts.len();
        if self.is_taken && count <= HELD {
            held.count = count;
            held.groups.push_back(Group { first, to: Position { next: last + 1, chain }, facts });
        }
    }

    /// The groups that go on from line `next`. Where there are none: the line before which it is to be read.
    pub(super) fn take(&self, next: u64) -> (Vec<Group>, u64) {
        let (mut held, mut taken) = (self.held.lock(), Vec::new());
        let wanted = |taken: &Vec<Group>| taken.last().map_or(next, |group| group.to.next);
        while let Some(group) = held.groups.pop_front_if(|group| group.first <= wanted(&taken)) {
            held.count -= 1 + group.facts.len();
            // One that was read to its middle is read to its end.
            if group.first == wanted(&taken) {
                taken.push(group);
            }
        }
        (taken, held.groups.front().map_or(u64::MAX, |group| group.first))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::{Duration, Instant, SystemTime};

    use infergate_plugins::operation::Operation;

    use super::*;
    use crate::audit::journal::Journal;
    use crate::audit::read;
    use crate::audit::record::{Attempt, AttemptList, Models, Moment};
    use crate::ledger::fold::Batch;
    use crate::ledger::{Ledger, Place, Scope};
    use crate::money::bill::Cost;
    use crate::policy::file::Audit;
    use crate::policy::{World, compile};
    use crate::pool::Wanted;
    use crate::settings::{self, Settings};
    use crate::state::State;
    use crate::telemetry::Telemetry;
    use crate::usage::Usage;

    /// A journal that commits when it is asked to.
    fn journal() -> (tempfile::TempDir, Arc<Journal>) {
        let directory = tempfile::tempdir().unwrap();
        let audit = Audit { commit_ms: 3_600_000, ..Audit::default() };
        let journal = Journal::open(directory.path(), None, audit, Telemetry::new().journal).unwrap();
        (directory, journal)
    }

    fn file(journal: &Arc<Journal>, record: &Record<'_>) {
        journal.file(record, journal.reserve().unwrap());
    }

    fn moment(at: SystemTime) -> Moment {
        Moment { at, received: Instant::now(), ended: Instant::now() }
    }

    /// What the lines of the journal's only run come to.
    fn read(journal: &Journal) -> Batch {
        let (run, mut batch) = (journal.run(), Batch::new(journal.run(), Position::start(), false));
        let mut lines = read::runs(journal.directory()).unwrap().remove(0).lines(1);
        while let Some(line) = lines.next().unwrap() {
            batch.add(line).unwrap_or_else(|error| panic!("{run}: {error}"));
        }
        batch
    }

    #[tokio::test]
    async fn what_is_told_is_what_the_lines_say() {
        let (_directory, journal) = journal();
        let feed = journal.feed_ledger(true);
        let (telemetry, state, settings) = (Telemetry::new(), State::new(0), Settings::default());
        let text =
            "version: 1\npools:\n  p: {upstreams: [{url: 'http://127.0.0.1:1'}]}\nmodels: [{name: m, pool: p}]\n";
        let policy = compile(text, &World::new(&|_| None, &state, &telemetry, &settings)).unwrap();
        let (pool, now) = (&policy.pools["p"], Instant::now());
        let attempts = [Attempt::begin(pool, &pool.pick(&Wanted::of(Operation::Chat), &[], now).unwrap(), 7, 8)];
        let names = ["m".to_owned(), "a\0b".to_owned(), "\u{4e2d}".repeat(200), "\"}\\,\u{1}".to_owned()];
        let minutes = [0, 59_999_999, 60_000_000, 1_795_356_185_123_456].map(Duration::from_micros);
        let sources = [Source::None, Source::Estimated, Source::Partial, Source::Upstream];
        // More than the writer takes at once.
        for n in 0..512_usize {
            let (which, odd) = (n % 4, n % 3 == 0);
            let sample = Record::sample(moment(SystemTime::UNIX_EPOCH + minutes[n / 4 % 4]));
            let tokens = Some(if odd { u64::MAX } else { n as u64 });
            let usage = Usage {
                input_tokens: tokens,
                cached_tokens: tokens.filter(|_| odd),
                reasoning_tokens: tokens,
                source: sources[n / 16 % 4],
                ..Usage::default()
            };
            let list = if odd { &attempts[..] } else { &[] };
            let cost = Cost { nanousd: NanoUsd(if n == 60 { u64::MAX } else { 7 }), prices: "v" };
            file(
                &journal,
                &Record {
                    outcome: if odd { Outcome::Refused } else { Outcome::Ok },
                    tenant: Some(names[which].as_str()).filter(|_| !odd),
                    principal: Some(&names[n / 4 % 4]),
                    model: Models { route: Some(&names[n / 16 % 4]), ..sample.model },
                    usage,
                    cost: Some(cost).filter(|_| n % 5 > 0),
                    unpriced: n % 5 == 0,
                    attempts: AttemptList { list, ..sample.attempts },
                    ..sample
                },
            );
        }
        journal.flush().await;
        let (groups, _) = feed.take(feed.take(1).1);
        let told = Batch::told(journal.run(), Position::start(), &groups);
        let read = read(&journal);
        assert_eq!((told.sums(), told.to, told.records), (read.sums(), read.to, 512));
    }

    #[tokio::test]
    async fn a_group_is_told_once_it_is_on_disk_and_whole_or_not_at_all() {
        let (_directory, journal) = journal();
        let record = Record::sample(moment(SystemTime::now()));
        file(&journal, &record);
        let feed = journal.feed_ledger(true);
        file(&journal, &record);
        journal.flush().await;
        let before = *journal.committed().borrow();
        let (told, rest) = feed.take(before - 1);
        assert!(told.is_empty() && rest == u64::MAX, "of one record nothing is known: both are read");
        file(&journal, &record);
        assert!(feed.take(before + 1).0.is_empty(), "it is not on disk");
        journal.flush().await;
        let (groups, rest) = feed.take(before + 1);
        assert_eq!((groups.len(), groups[0].facts.len(), rest), (1, 1, u64::MAX));
        assert_eq!(groups[0].to, read(&journal).to);
        assert!(feed.take(before + 1).0.is_empty(), "nothing is told twice");
    }

    #[tokio::test]
    async fn a_ledger_that_wants_more_than_sums_is_told_nothing() {
        let (_directory, journal) = journal();
        let feed = journal.feed_ledger(false);
        file(&journal, &Record::sample(moment(SystemTime::now())));
        journal.flush().await;
        let (told, rest) = feed.take(*journal.committed().borrow());
        assert!(told.is_empty() && rest == u64::MAX);
    }

    #[tokio::test]
    async fn what_was_just_written_is_not_read_again() {
        let (directory, journal) = journal();
        let place = Place::File(directory.path().join("l.sqlite3"));
        let soon = || Instant::now() + Duration::from_secs(60);
        let meters = Telemetry::new().ledger;
        let ledger = Ledger::start(place, &settings::Ledger::default(), &journal, meters).unwrap();
        ledger.catch_up(soon()).unwrap();
        // The writer goes on at the end, which is not where a reader thinks that it is.
        let run = read::runs(journal.directory()).unwrap().remove(0);
        std::fs::write(&run.segments().unwrap()[0].path, "").unwrap();
        let record = Record { tenant: Some("t"), ..Record::sample(moment(SystemTime::now())) };
        for _ in 0..3 {
            file(&journal, &record);
            journal.flush().await;
        }
        ledger.catch_up(soon()).unwrap();
        let spent = ledger.spent(&Scope { tenants: vec!["t".to_owned()], ..Scope::default() }, 0, None).unwrap();
        assert_eq!((spent.requests, spent.input_tokens), (3, 3 * 211));
        ledger.close(Duration::from_secs(60));
    }

    fn add(feed: &Feed, first: u64, last: u64, facts: usize) {
        let mut all = Facts::default();
        let spent = Spent::default();
        (0..facts).for_each(|_| all.push(&Fact { minute: 0, names: ["a", "", "c"], spent }));
        feed.add(first, last, &[b'0'; 64], all);
    }

    #[test]
    fn groups_go_on_where_the_ledger_is_and_what_is_between_is_read() {
        let feed = Feed::new(true);
        let firsts = |(groups, before): (Vec<Group>, u64)| (groups.iter().map(|g| g.first).collect::<Vec<_>>(), before);
        for (first, last) in [(3, 4), (5, 5), (8, 9), (10, 12), (13, 13)] {
            add(&feed, first, last, 1);
        }
        assert_eq!(firsts(feed.take(1)), (vec![], 3), "lines 1 and 2 are read");
        assert_eq!(firsts(feed.take(3)), (vec![3, 5], 8));
        assert_eq!(firsts(feed.take(9)), (vec![], 10), "one that was read to its middle is read to its end");
        assert_eq!(firsts(feed.take(10)), (vec![10, 13], u64::MAX));
        assert_eq!(feed.held.lock().count, 0);
    }

    #[test]
    fn a_ledger_that_takes_nothing_makes_nothing_grow() {
        let feed = Feed::new(true);
        add(&feed, 1, 5, HELD - 1);
        add(&feed, 6, 7, 1);
        assert_eq!(feed.take(1).0.len(), 1);
        (8..).take(HELD + 5).for_each(|line| add(&feed, line, line, 0));
        assert_eq!(feed.held.lock().groups.len(), HELD);
    }
}
