//! From lines of the journal to sums.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::sync::LazyLock;

use foldhash::fast::RandomState;
use memchr::memmem::Finder;
use serde::Deserialize;

use super::facts::Group;
use super::{Position, Spent, bounded};
use crate::audit::read;
use crate::money::NanoUsd;
use crate::time::micros;

/// The seconds of a minute, an hour and a day: what sums are kept for.
pub(super) const GRAINS: [i64; 3] = [60, 3_600, 86_400];
/// The longest name that is kept, in bytes.
const NAME_MAX: usize = 256;

/// Lines of one run that are folded together.
#[derive(Debug)]
pub(super) struct Batch {
    /// The run.
    pub(super) run: String,
    /// Where they begin.
    pub(super) from: Position,
    /// What is behind them.
    pub(super) to: Position,
    /// What they add, by minute.
    minutes: BTreeMap<Key, Spent>,
    /// The minute of the last record, as it is spelt there.
    minute: (Vec<u8>, i64),
    /// The records, where rows of requests are kept.
    pub(super) rows: Option<Vec<Row>>,
    /// How many records they are.
    pub(super) records: u64,
}

/// Whose sum it is. Absent names are empty.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    /// The seconds that it is for.
    pub(super) grain: i64,
    /// When they begin, in seconds since 1970.
    pub(super) at: i64,
    pub(super) tenant: String,
    pub(super) model: String,
    pub(super) principal: String,
}

/// One request.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) id: String,
    /// In microseconds since 1970.
    pub(super) at: i64,
    pub(super) tenant: String,
    pub(super) model: String,
    pub(super) principal: String,
    /// The model's name at the upstream.
    pub(super) used: String,
    pub(super) outcome: String,
    pub(super) status: i64,
    pub(super) source: String,
    pub(super) prices: String,
    pub(super) spent: Spent,
}

/// What of a record is summed up.
struct Record<'a> {
    at: &'a [u8],
    id: Cow<'a, str>,
    outcome: Cow<'a, str>,
    status: Option<u16>,
    tenant: Option<String>,
    principal: Option<String>,
    model: Models,
    usage: Tokens,
    cost: Option<Cost>,
    unpriced: bool,
    asked: bool,
}

#[derive(Default, Deserialize)]
struct Models {
    route: Option<String>,
    used: Option<String>,
}

#[derive(Default, Deserialize)]
struct Tokens {
    input_tokens: Option<u64>,
    output_tokens: Option<u64>,
    cached_tokens: Option<u64>,
    reasoning_tokens: Option<u64>,
    source: Option<Source>,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Source {
    Upstream,
    Estimated,
    Partial,
    #[serde(other)]
    None,
}

#[derive(Deserialize)]
struct Cost {
    nanousd: u64,
    prices: String,
}

/// Where members of a record begin, in its order. Records are sought through for them: to read all of each takes four
/// times as long, and that CPU is the requests'. Inside of a text every quote has a backslash before it, so what a
/// client wrote is never found; that no other member has a name of these, a test asks the record's schema.
struct Finders {
    id: Finder<'static>,
    outcome: Finder<'static>,
    status: Finder<'static>,
    surface: Finder<'static>,
    principal: Finder<'static>,
    tenant: Finder<'static>,
    model: Finder<'static>,
    attempt: Finder<'static>,
    usage: Finder<'static>,
    cost: Finder<'static>,
    unpriced: Finder<'static>,
}

static FINDERS: LazyLock<Finders> = LazyLock::new(|| {
    let finder = |needle: &'static str| Finder::new(needle);
    Finders {
        id: finder(",\"id\":"),
        outcome: finder(",\"outcome\":"),
        status: finder(",\"status\":"),
        surface: finder(",\"surface\":"),
        principal: finder(",\"principal\":"),
        tenant: finder(",\"tenant\":"),
        model: finder(",\"model\":"),
        attempt: finder(",\"attempts\":[{"),
        usage: finder(",\"usage\":"),
        cost: finder(",\"cost\":"),
        unpriced: finder(",\"unpriced\":"),
    }
});

/// The value of a member, if it is there.
fn member<'a, T: Deserialize<'a>>(text: &'a [u8], finder: &Finder<'_>) -> Result<Option<T>, String> {
    let Some(at) = finder.find(text) else { return Ok(None) };
    let value = serde_json::Deserializer::from_slice(&text[at + finder.needle().len()..]).into_iter().next();
    value.transpose().map_err(|error| error.to_string())
}

impl<'a> Record<'a> {
    fn read(line: &'a [u8]) -> Result<Self, String> {
        let find = &*FINDERS;
        let missing = |what: &str| format!("it has no {what}");
        // What it begins with, who it was, and the rest: each has names that the others have, too.
        let (head, rest) = line.split_at(find.surface.find(line).ok_or_else(|| missing("surface"))?);
        let (who, rest) = rest.split_at(find.model.find(rest).ok_or_else(|| missing("model"))?);
        Ok(Self {
            at: read::at(line),
            id: member(head, &find.id)?.ok_or_else(|| missing("id"))?,
            outcome: member(head, &find.outcome)?.ok_or_else(|| missing("outcome"))?,
            status: member(head, &find.status)?,
            principal: member(who, &find.principal)?,
            tenant: member(who, &find.tenant)?,
            model: member(rest, &find.model)?.unwrap_or_default(),
            usage: member(rest, &find.usage)?.unwrap_or_default(),
            cost: member(rest, &find.cost)?,
            unpriced: member(rest, &find.unpriced)?.unwrap_or_default(),
            asked: find.attempt.find(rest).is_some(),
        })
    }
}

impl Batch {
    /// Nothing yet, from here on.
    pub(super) fn new(run: &str, from: Position, rows: bool) -> Self {
        let to = from.clone();
        Self {
            run: run.to_owned(),
            from,
            to,
            minutes: BTreeMap::new(),
            minute: (Vec::new(), 0),
            rows: rows.then(Vec::new),
            records: 0,
        }
    }

    /// What these groups tell, which go on from here one after the other.
    pub(super) fn told(run: &str, from: Position, groups: &[Group]) -> Self {
        let mut batch = Self::new(run, from, false);
        let mut sums = HashMap::<_, Spent, RandomState>::default();
        for fact in groups.iter().flat_map(|group| group.facts.iter()) {
            let sum = sums.entry((fact.minute, fact.names)).or_default();
            *sum = sum.plus(&fact.spent);
            batch.records += 1;
        }
        for ((at, names), spent) in sums {
            let [tenant, model, principal] = names.map(|text| name(Some(text.to_owned())));
            batch.sum(Key { grain: GRAINS[0], at, tenant, model, principal }, &spent);
        }
        batch.to = groups.last().map_or(batch.to, |group| group.to.clone());
        batch
    }

    /// Adds a line of the journal. A record that cannot be read counts nothing: `audit verify` names it.
    pub(super) fn add(&mut self, line: &[u8]) -> Result<(), String> {
        self.to.next = read::seq(line).unwrap_or(self.to.next) + 1;
        self.to.chain.clear();
        let chain = read::chain(line).and_then(|(chain, _)| str::from_utf8(chain).ok());
        self.to.chain.push_str(chain.unwrap_or_default());
        if read::kind(line) != b"request" {
            return Ok(());
        }
        let record = Record::read(line)?;
        self.count(record).ok_or_else(|| "it has no time".to_owned())
    }

    fn count(&mut self, record: Record<'_>) -> Option<()> {
        let (spent, at) = (record.spent(), self.minute(record.at)?);
        let (tenant, model, principal) = (name(record.tenant), name(record.model.route), name(record.principal));
        if let Some(rows) = &mut self.rows {
            rows.push(Row {
                id: name(Some(record.id.into_owned())),
                at: i64::try_from(micros(record.at)?).ok()?,
                tenant: tenant.clone(),
                model: model.clone(),
                principal: principal.clone(),
                used: name(record.model.used),
                outcome: name(Some(record.outcome.into_owned())),
                status: record.status.unwrap_or(0).into(),
                source: record.usage.source.map(Source::name).unwrap_or_default().to_owned(),
                prices: name(record.cost.map(|cost| cost.prices)),
                spent,
            });
        }
        self.records += 1;
        self.sum(Key { grain: GRAINS[0], at, tenant, model, principal }, &spent);
        Some(())
    }

    fn sum(&mut self, key: Key, spent: &Spent) {
        let sum = self.minutes.entry(key).or_default();
        *sum = sum.plus(spent);
    }

    /// The minute that a time is in: mostly that of the one before.
    fn minute(&mut self, at: &[u8]) -> Option<i64> {
        let spelt = at.get(..b"2026-11-22T14:03".len())?;
        if self.minute.0 != spelt || at.last() != Some(&b'Z') {
            let seconds = i64::try_from(micros(at)?).ok()? / 1_000_000;
            self.minute = (spelt.to_vec(), begin(seconds, GRAINS[0]));
        }
        Some(self.minute.1)
    }

    /// What is added to the tables, always in the same order: two that add the same sums at once wait for each other
    /// and never in a circle.
    pub(super) fn sums(&self) -> BTreeMap<Key, Spent> {
        let mut sums = BTreeMap::<Key, Spent>::new();
        for (key, spent) in &self.minutes {
            for grain in GRAINS {
                let key = Key { grain, at: begin(key.at, grain), ..key.clone() };
                let sum = sums.entry(key).or_default();
                *sum = sum.plus(spent);
            }
        }
        sums
    }
}

impl Source {
    fn name(self) -> &'static str {
        match self {
            Self::Upstream => "upstream",
            Self::Estimated => "estimated",
            Self::Partial => "partial",
            Self::None => "none",
        }
    }
}

impl Record<'_> {
    fn spent(&self) -> Spent {
        let tokens = |tokens: Option<u64>| bounded(tokens.unwrap_or(0));
        Spent {
            requests: 1,
            ok: (self.outcome == "ok").into(),
            input_tokens: tokens(self.usage.input_tokens),
            output_tokens: tokens(self.usage.output_tokens),
            cached_tokens: tokens(self.usage.cached_tokens),
            reasoning_tokens: tokens(self.usage.reasoning_tokens),
            cost: NanoUsd(self.cost.as_ref().map_or(0, |cost| bounded(cost.nanousd))),
            unpriced: self.unpriced.into(),
            estimated: matches!(self.usage.source, Some(Source::Estimated | Source::Partial)).into(),
            asked: self.asked.into(),
        }
    }
}

/// When the `grain` begins that `at` is in.
pub(super) fn begin(at: i64, grain: i64) -> i64 {
    at - at.rem_euclid(grain)
}

/// A name as the tables keep it: not too long, and without NUL, which PostgreSQL does not take.
fn name(text: Option<String>) -> String {
    let mut text = text.unwrap_or_default();
    text.truncate(clipped(&text).len());
    if text.contains('\0') { text.replace('\0', "\u{fffd}") } else { text }
}

/// As much of a name as is kept.
pub(super) fn clipped(name: &str) -> &str {
    &name[..name.floor_char_boundary(NAME_MAX)]
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::json;

    use super::*;

    /// A line with these members, in the order of a record.
    pub(crate) fn line(seq: u64, members: &serde_json::Value) -> Vec<u8> {
        let order = ["id", "outcome", "status", "surface", "principal", "tenant", "model", "decisions", "candidates"];
        let mut all = json!({"surface": "/v1/chat/completions", "model": {}});
        all.as_object_mut().unwrap().extend(members.as_object().unwrap().clone());
        let told = order
            .into_iter()
            .chain(["attempts", "usage", "cost", "unpriced"])
            .filter_map(|name| all.get(name).map(|value| format!(",\"{name}\":{value}")));
        let (members, chain) = (told.collect::<String>(), "ab".repeat(32));
        let at = r#""at":"2026-11-22T14:03:05.5Z""#;
        format!(r#"{{"v":1,"seq":{seq},"kind":"request",{at}{members},"chain":"{chain}"}}"#).into_bytes()
    }

    /// Records of a tenant that cost 7 nano-dollars each.
    pub(crate) fn batch_of(run: &str, from: Position, seqs: std::ops::RangeInclusive<u64>) -> Batch {
        let mut batch = Batch::new(run, from, true);
        for seq in seqs {
            let record = json!({"id": format!("{seq}"), "outcome": "ok", "tenant": "t", "cost": {"nanousd": 7, "prices": ""},
                "usage": {"input_tokens": 3, "output_tokens": 4, "source": "upstream"}});
            batch.add(&line(seq, &record)).unwrap();
        }
        batch
    }

    fn batch() -> Batch {
        Batch::new("r", Position::start(), true)
    }

    #[test]
    fn a_record_counts_in_its_minute_its_hour_and_its_day() {
        let mut batch = batch();
        let record = json!({"id": "x", "outcome": "ok", "status": 200, "tenant": "t", "principal": "p",
            "model": {"asked": "a", "route": "m", "used": "u"}, "cost": {"nanousd": 7, "prices": "v"},
            "attempts": [{"pool": "p"}],
            "usage": {"input_tokens": 3, "output_tokens": 4, "cached_tokens": 1, "source": "upstream"}});
        batch.add(&line(1, &record)).unwrap();
        batch.add(&line(2, &record)).unwrap();
        let cut = json!({"id": "y", "outcome": "client_closed", "attempts": [], "usage": {"source": "partial"}, "unpriced": true});
        batch.add(&line(3, &cut)).unwrap();
        let sums = batch.sums();
        let begins: Vec<_> = sums.keys().filter(|key| key.tenant == "t").map(|key| (key.grain, key.at)).collect();
        assert_eq!(begins, [(60, 1_795_356_180), (3_600, 1_795_356_000), (86_400, 1_795_305_600)]);
        for (key, spent) in sums {
            let expected = match key.tenant.as_str() {
                "t" => [2, 2, 6, 8, 2, 0, 14, 0, 0, 2],
                _ => [1, 0, 0, 0, 0, 0, 0, 1, 1, 0],
            };
            assert_eq!(spent.numbers(), expected, "{key:?}");
        }
        assert_eq!((batch.to.next, batch.to.chain.len(), batch.records), (4, 64, 3));
        let row = &batch.rows.unwrap()[0];
        assert_eq!((row.model.as_str(), row.used.as_str(), row.prices.as_str()), ("m", "u", "v"));
    }

    #[test]
    fn lines_of_other_kinds_and_damaged_ones_count_nothing_and_are_behind_us() {
        let mut batch = batch();
        batch.add(br#"{"v":1,"seq":5,"kind":"checkpoint","at":"2026-11-22T14:03:05Z"}"#).unwrap();
        batch.add(br#"{"v":1,"seq":6,"kind":"request","at":"2026-11-22T14:03:05Z","#).unwrap_err();
        assert_eq!((batch.to.next, batch.records, batch.sums().len()), (7, 0, 0));
    }

    #[test]
    fn numbers_from_outside_stay_within_a_tables_bounds_and_names_within_its_letters() {
        let mut batch = batch();
        let record = json!({"id": "x", "outcome": "ok", "principal": format!("a\0{}", "\u{4e2d}".repeat(200)),
            "usage": {"output_tokens": u64::MAX, "source": "upstream"}, "cost": {"nanousd": u64::MAX, "prices": "v"}});
        (1..=2).for_each(|seq| batch.add(&line(seq, &record)).unwrap());
        let (key, spent) = batch.sums().pop_first().unwrap();
        assert_eq!((spent.output_tokens, spent.cost.0), (i64::MAX as u64, i64::MAX as u64));
        assert!(key.principal.starts_with("a\u{fffd}") && key.principal.len() <= 258, "{key:?}");
    }

    #[test]
    fn nothing_that_a_client_wrote_and_nothing_further_inside_is_taken_for_the_records_own() {
        let evil = r#"x","usage":{"output_tokens":9},"cost":{"nanousd":9,"prices":""},"unpriced":true,"tenant":"evil"#;
        let record = json!({"id": "x", "outcome": "refused", "model": {"asked": evil, "route": "m"},
            "decisions": [{"why": evil, "rule": "\\\",\"cost\":{\"nanousd\":9}"}],
            "candidates": [{"name": "c", "model": {"route": "evil"}}],
            "attempts": [{"pool": "p", "status": 503, "model": "evil", "why": evil}]});
        let mut batch = batch();
        batch.add(&line(1, &record)).unwrap();
        let row = &batch.rows.as_ref().unwrap()[0];
        assert_eq!((row.status, row.tenant.as_str(), row.outcome.as_str()), (0, "", "refused"));
        assert_eq!(row.model, "m");
        assert_eq!(row.spent.numbers(), [1, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    }

    #[test]
    fn no_member_inside_of_a_record_has_the_name_of_one_that_is_sought() {
        let schema = serde_json::to_value(crate::audit::record::schema()).unwrap();
        let names = |value: &serde_json::Value| -> Vec<String> {
            value["properties"].as_object().map(|all| all.keys().cloned().collect()).unwrap_or_default()
        };
        let (own, sought) = (names(&schema), ["usage", "cost", "unpriced"]);
        assert!(
            sought
                .iter()
                .chain(&["principal", "tenant", "surface", "model"])
                .all(|name| own.contains(&(*name).to_owned()))
        );
        for (kind, inside) in schema["$defs"].as_object().unwrap() {
            let found: Vec<_> = names(inside).into_iter().filter(|name| sought.contains(&name.as_str())).collect();
            assert!(found.is_empty(), "{kind} has {found:?}: the ledger would take it for the record's");
        }
        // Before `surface` and before `model` stand only these; others have a `model` inside, behind the record's own.
        for early in ["Client", "Trace"] {
            let found = names(&schema["$defs"][early]);
            assert!(!found.iter().any(|name| name == "principal" || name == "tenant" || name == "model"), "{found:?}");
        }
    }
}
