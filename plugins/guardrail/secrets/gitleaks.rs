//! Rules as gitleaks has them. What a scanner of files knows and a scanner of text does not (paths, commits, baselines,
//! whole lines) does not count; the rest means the same.

use regex_automata::meta;
use serde::Deserialize;

use super::super::patterns::FIRST_GROUP;
use super::{Allow, Pattern, Rule, Wants, expressions};

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct File {
    #[serde(default)]
    rules: Vec<Entry>,
    #[serde(default)]
    allowlist: Option<List>,
    #[serde(default)]
    allowlists: Vec<List>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Entry {
    id: String,
    #[serde(default)]
    regex: Option<String>,
    #[serde(default)]
    secret_group: Option<usize>,
    #[serde(default)]
    entropy: f32,
    #[serde(default)]
    keywords: Vec<String>,
    #[serde(default)]
    allowlist: Option<List>,
    #[serde(default)]
    allowlists: Vec<List>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct List {
    #[serde(default)]
    regexes: Vec<String>,
    #[serde(default)]
    stopwords: Vec<String>,
    #[serde(default)]
    regex_target: String,
    #[serde(default)]
    condition: String,
    #[serde(default)]
    target_rules: Vec<String>,
}

/// The rules of a file, or all that is wrong with it.
pub(super) fn rules(text: &str, rule: usize, window: usize) -> Result<Vec<Rule>, Vec<String>> {
    let file: File = toml::from_str(text).map_err(|error| vec![error.to_string().trim_end().to_owned()])?;
    let (mut rules, mut wrong) = (Vec::new(), Vec::new());
    for entry in &file.rules {
        let Some(expression) = &entry.regex else { continue };
        match one(entry, expression, &file, rule, window) {
            Ok(rule) => rules.push(rule),
            Err(message) => wrong.push(format!("rule {}: {message}", entry.id)),
        }
    }
    if wrong.is_empty() { Ok(rules) } else { Err(wrong) }
}

fn one(entry: &Entry, expression: &str, file: &File, rule: usize, window: usize) -> Result<Rule, String> {
    let group = entry.secret_group.filter(|group| *group > 0).unwrap_or(FIRST_GROUP);
    let expression = without_lead(expression);
    let pattern = Pattern::ascii(rule, &entry.id, &expression, None, group)
        .or_else(|_| Pattern::ascii(rule, &entry.id, &expression, Some(window), group))?;
    let own = entry.allowlist.iter().chain(&entry.allowlists);
    let everywhere = file.allowlist.iter().chain(&file.allowlists);
    let meant = everywhere.filter(|list| list.target_rules.is_empty() || list.target_rules.contains(&entry.id));
    let allow = own.chain(meant).map(allow).collect::<Result<Vec<_>, _>>()?;
    let keywords = entry.keywords.iter().map(|keyword| keyword.to_ascii_lowercase()).collect();
    Ok(Rule { pattern, wants: Wants { keywords, entropy: entry.entropy, allow, check: None } })
}

/// Many rules begin with the word that a name may have before its keyword. It is not part of the secret, and without it
/// a match begins at the keyword.
fn without_lead(expression: &str) -> String {
    const LEADS: [&str; 3] = [r"[\w.-]{0,50}?", r"[\w.-]{0,50}", r"[\w\-.]{0,50}?"];
    let (flags, rest) = match expression.strip_prefix("(?i)") {
        Some(rest) => ("(?i)", rest),
        None => ("", expression),
    };
    let rest = LEADS.iter().find_map(|lead| rest.strip_prefix(lead)).unwrap_or(rest);
    format!("{flags}{rest}")
}

fn allow(list: &List) -> Result<Allow, String> {
    let regexes: Option<meta::Regex> =
        expressions(&list.regexes).map_err(|message| format!("allowlist.regexes{message}"))?;
    Ok(Allow {
        regexes,
        stopwords: list.stopwords.iter().map(|word| word.to_ascii_lowercase()).collect(),
        whole: matches!(list.regex_target.as_str(), "match" | "line"),
        both: list.condition.eq_ignore_ascii_case("and"),
    })
}

#[cfg(test)]
mod tests {
    use super::super::super::tests::{judged_with, same_however_cut_with};
    use super::*;

    const RULES: &str = r#"[{"name":"s","in":["prompt.user"],"verdict":"redact",
        "secrets":{"known":false,"gitleaks":"/rules.toml"}}]"#;

    fn found(text: &str) -> Vec<String> {
        let file = include_str!("../../../tests/fixtures/guardrails/gitleaks.toml");
        same_however_cut_with(RULES, file, "prompt.user", text);
        judged_with(RULES, file, "prompt.user", text).1.found.iter().map(|found| found.label.to_string()).collect()
    }

    #[test]
    fn a_rule_finds_its_secret_and_nothing_around_it() {
        let file = include_str!("../../../tests/fixtures/guardrails/gitleaks.toml");
        let (out, _) = judged_with(RULES, file, "prompt.user", "my acme_token = 'k3yk3y0f9x7b2m5qz1' is here");
        assert_eq!(out, "my acme_token = '[ACME_TOKEN]' is here");
    }

    #[test]
    fn entropy_keywords_and_allow_lists_count() {
        assert_eq!(found("acme_token = 'aaaaaaaaaaaaaaaaa1'"), [""; 0], "not random");
        assert_eq!(found("acme_token = 'k3yk3y0f9x7sample1'"), [""; 0], "a stop word");
        assert_eq!(found("bolt-0a1b2c3d4e5f60718293a4b5c6d7e8f9"), ["bolt"]);
        assert_eq!(found("bolt-0000000000000000000000000000000f"), [""; 0], "an allowed expression");
        assert_eq!(found("code 77-55-33"), [""; 0], "no keyword near");
        assert_eq!(found("the Vault code 77-55-33"), ["numeric"]);
        assert_eq!(found("open:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!"), ["open"], "bounded by the window alone");
    }

    #[test]
    fn what_is_wrong_names_the_rule() {
        let wrong = rules("[[rules]]\nid = \"bad\"\nregex = '''(a'''\n", 0, 100).err().unwrap();
        assert!(wrong[0].starts_with("rule bad: "), "{wrong:?}");
        assert!(rules("rules = 3", 0, 100).is_err());
        assert_eq!(without_lead(r"(?i)[\w.-]{0,50}?(?:acme)x"), "(?i)(?:acme)x");
    }
}
