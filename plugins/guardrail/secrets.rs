//! Secrets: keys, tokens and passwords, told by their shape, how random they are, and what they are assigned to.

mod gitleaks;
mod known;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use regex_automata::meta;
use schemars::JsonSchema;
use serde::Deserialize;

use super::patterns::{Candidate, Judge, Pattern, Patterns, Ruling};
use super::stream::Finder;
use super::{Detector, World, Wrong};

/// Keys, tokens and passwords.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(rename = "Secrets")]
pub struct Config {
    /// Whether the built-in rules are used.
    pub known: bool,
    /// Built-in or imported rules that are not used, by their names.
    pub skip: Vec<String>,
    /// Whether anything random counts that is assigned to something called a password, secret, token or key. It finds
    /// secrets of no known shape, and now and then something else.
    pub assigned: bool,
    /// A file of rules as gitleaks has them (TOML): regex, keywords, entropy, secretGroup, allow lists. Rules for paths
    /// alone are passed over.
    pub gitleaks: Option<PathBuf>,
    /// The most bytes that a match of an imported rule has which declares no bound.
    #[schemars(range(min = 64, max = 65_536))]
    pub window: usize,
    /// Expressions; what they match is no secret.
    pub allow: Vec<String>,
}

impl Default for Config {
    fn default() -> Self {
        Self { known: true, skip: Vec::new(), assigned: false, gitleaks: None, window: 1024, allow: Vec::new() }
    }
}

/// What a rule wants besides its shape.
#[derive(Clone, Debug, Default)]
struct Wants {
    /// One of these, in the match or shortly before; in lower case. None: nothing.
    keywords: Vec<String>,
    /// Bits a sign.
    entropy: f32,
    /// Lists of what is none.
    allow: Vec<Allow>,
    check: Option<fn(&str) -> bool>,
}

/// What is no secret.
#[derive(Clone, Debug, Default)]
struct Allow {
    regexes: Option<meta::Regex>,
    stopwords: Vec<String>,
    /// Whether the expressions look at the whole match, not only at the secret.
    whole: bool,
    /// Whether expressions and stop words must both agree.
    both: bool,
}

/// A rule that was read.
struct Rule {
    pattern: Pattern,
    wants: Wants,
}

pub(super) fn build(config: &Config, rule: usize, world: &mut World<'_>) -> Result<Detector, Vec<Wrong>> {
    let (mut rules, mut wrong) = (Vec::new(), Vec::new());
    let mut tell = |path: &str, message: String| wrong.push((path.to_owned(), message));
    if config.known {
        known::rules(rule).map_or_else(|message| tell(".known", message), |mut known| rules.append(&mut known));
    }
    if config.assigned {
        known::assigned(rule).map_or_else(|message| tell(".assigned", message), |assigned| rules.push(assigned));
    }
    if let Some(path) = &config.gitleaks {
        let read = (world.file)(path).map_err(|message| vec![message]);
        match read.and_then(|text| gitleaks::rules(&text, rule, config.window)) {
            Ok(mut imported) => rules.append(&mut imported),
            Err(messages) => messages.into_iter().for_each(|message| tell(".gitleaks", message)),
        }
    }
    for (index, name) in config.skip.iter().enumerate() {
        if !rules.iter().any(|rule| &*rule.pattern.label == name.as_str()) {
            tell(&format!(".skip[{index}]"), format!("there is no rule called {name}"));
        }
    }
    rules.retain(|rule| !config.skip.iter().any(|name| *name == *rule.pattern.label));
    let mut shared = Allow::default();
    match expressions(&config.allow) {
        Ok(regexes) => shared.regexes = regexes,
        Err(message) => tell(".allow", message),
    }
    if rules.is_empty() {
        tell("", "no rules are left: use the known ones, `assigned` or a gitleaks file".to_owned());
    }
    if !wrong.is_empty() {
        return Err(wrong);
    }
    finders(rules, &shared).map(Detector::Own).map_err(|message| vec![(String::new(), message)])
}

/// One search for all rules that bound themselves, one for each window of the others; of either, those whose matches
/// are runs without a blank apart, for these are found fastest.
fn finders(rules: Vec<Rule>, shared: &Allow) -> Result<Vec<Arc<dyn Finder>>, String> {
    let mut by_window: BTreeMap<(usize, bool), Vec<Rule>> = BTreeMap::new();
    for mut rule in rules {
        if shared.regexes.is_some() {
            rule.wants.allow.push(shared.clone());
        }
        by_window.entry((rule.pattern.cut(), rule.pattern.is_run())).or_default().push(rule);
    }
    let finder = |rules: Vec<Rule>| {
        let (patterns, wants) = rules.into_iter().map(|rule| (rule.pattern, rule.wants)).unzip();
        Ok(Arc::new(Patterns::new(patterns, Doubts { wants }, true)?) as Arc<dyn Finder>)
    };
    by_window.into_values().map(finder).collect()
}

/// One expression for several, looking anywhere.
fn expressions(list: &[String]) -> Result<Option<meta::Regex>, String> {
    if list.is_empty() {
        return Ok(None);
    }
    meta::Regex::new_many(list).map(Some).map_err(|error| match error.pattern() {
        Some(index) => {
            format!("[{}]: {}", index.as_usize(), error.syntax_error().map_or(error.to_string(), ToString::to_string))
        }
        None => error.to_string(),
    })
}

/// Doubts every candidate.
#[derive(Debug)]
struct Doubts {
    wants: Vec<Wants>,
}

impl Judge for Doubts {
    fn judge(&self, candidate: &Candidate<'_>) -> Ruling {
        let Some(wants) = self.wants.get(candidate.pattern) else { return Ruling::No };
        let secret = candidate.matched();
        let random = wants.entropy <= 0.0 || entropy(secret) >= wants.entropy;
        let checked = wants.check.is_none_or(|check| check(secret));
        if random && checked && wants.keyword(candidate) && !wants.allows(candidate) {
            candidate.yes()
        } else {
            Ruling::No
        }
    }
}

impl Wants {
    fn keyword(&self, candidate: &Candidate<'_>) -> bool {
        if self.keywords.is_empty() {
            return true;
        }
        let near = [candidate.before(), candidate.whole()].concat().to_ascii_lowercase();
        self.keywords.iter().any(|keyword| near.contains(keyword.as_str()))
    }

    fn allows(&self, candidate: &Candidate<'_>) -> bool {
        self.allow.iter().any(|allow| allow.takes(candidate))
    }
}

impl Allow {
    fn takes(&self, candidate: &Candidate<'_>) -> bool {
        let target = if self.whole { candidate.whole() } else { candidate.matched() };
        let matched = self.regexes.as_ref().map(|regex| regex.is_match(target));
        let lower = candidate.matched().to_ascii_lowercase();
        let stopped = self.stopwords.iter().any(|word| lower.contains(word.as_str()));
        match matched {
            Some(matched) if self.both && !self.stopwords.is_empty() => matched && stopped,
            Some(matched) => matched || stopped,
            None => stopped,
        }
    }
}

/// How random a text looks: bits a sign, after Shannon.
fn entropy(text: &str) -> f32 {
    let mut counts = [0u32; 256];
    text.bytes().for_each(|byte| counts[usize::from(byte)] += 1);
    let len = text.len() as f32;
    let share = |count: &u32| {
        let share = *count as f32 / len;
        -share * share.log2()
    };
    counts.iter().filter(|count| **count > 0).map(share).sum()
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::super::tests::{built, check_cuts, judged, scanner_of};
    use super::*;

    const KNOWN: &str = r#"[{"name":"s","in":["answer.content"],"verdict":"redact","secrets":{}}]"#;
    const ASSIGNED: &str = r#"[{"name":"s","in":["answer.content"],"verdict":"redact","secrets":{"assigned":true}}]"#;

    #[derive(Deserialize)]
    struct Row {
        text: String,
        #[serde(default)]
        secret: Option<(u64, u64)>,
        #[serde(default)]
        rule: String,
    }

    fn rows() -> Vec<Row> {
        let file = include_str!("../../tests/fixtures/guardrails/secrets.jsonl");
        let row = |line| Row { ..serde_json::from_str(line).unwrap() };
        let mut rows: Vec<Row> = file.lines().map(row).collect();
        rows.iter_mut().for_each(|row| row.text = row.text.replace('\u{a6}', ""));
        rows
    }

    #[test]
    fn secrets_of_many_providers_are_found_and_what_looks_alike_is_not() {
        let scanner = scanner_of(ASSIGNED, "", "answer.content");
        let (mut missed, mut false_alarms, mut count) = (Vec::new(), Vec::new(), (0, 0));
        for row in rows() {
            let found = scanner.judge(&row.text, &mut Default::default()).found;
            match row.secret {
                Some((start, end)) => {
                    count.0 += 1;
                    let covers = |one: &super::super::Found| one.range.start <= start && one.range.end >= end;
                    if !found.iter().any(covers) {
                        missed.push(format!("{}: {} {found:?}", row.rule, row.text));
                    }
                }
                None => {
                    count.1 += 1;
                    false_alarms.extend(found.iter().map(|one| format!("{}: {}", one.label, row.text)));
                }
            }
        }
        assert_eq!(count, (162, 340));
        assert_eq!((missed, false_alarms), (Vec::<String>::new(), Vec::<String>::new()));
    }

    #[test]
    fn a_secret_is_never_half_released() {
        let scanner = scanner_of(KNOWN, "", "answer.content");
        for row in rows().iter().filter(|row| row.secret.is_some() && row.text.len() < 200).step_by(3) {
            check_cuts(&scanner, &row.text);
        }
    }

    #[test]
    fn the_password_of_an_address_goes_and_the_address_stays() {
        let (out, _) = judged(KNOWN, "answer.content", "see postgres://app:s3cr3t-w0rd@db:5432/x");
        assert_eq!(out, "see postgres://app:[PASSWORD_IN_URL]@db:5432/x");
    }

    #[test]
    fn a_rule_can_be_skipped_and_a_match_allowed() {
        let key = "sk_live_4eC39HqLyjWDarjtT1zdp7dc";
        let with = |more: &str| KNOWN.replace("\"secrets\":{", &format!("\"secrets\":{{{more}"));
        let found = |json: &str| judged(json, "answer.content", key).1.found.len();
        assert_eq!(found(KNOWN), 1);
        assert_eq!(found(&with(r#""skip":["stripe-key"]"#)), 0);
        assert_eq!(found(&with(r#""allow":["^sk_live_4eC3"]"#)), 0);
        assert_eq!(built(&with(r#""skip":["nothing"]"#)).unwrap_err()[0].0, "[0].secrets.skip[0]");
        assert_eq!(built(&with(r#""allow":["("]"#)).unwrap_err()[0].0, "[0].secrets.allow");
    }

    #[test]
    fn a_text_of_one_letter_is_not_random() {
        assert_eq!(entropy("aaaa"), 0.0);
        assert_eq!(entropy("abab"), 1.0);
        assert!(entropy("k3yf0x9z7b2m5qw1") > 3.5);
    }
}
