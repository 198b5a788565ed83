//! `guardrails`: what can be found without asking another service becomes a rule here.

use super::Importer;
use super::cursor::At;
use super::yaml::Yaml;

/// What Presidio calls it, and what it is called here.
const PII: [(&str, &str); 6] = [
    ("CREDIT_CARD", "card"),
    ("EMAIL_ADDRESS", "email"),
    ("PHONE_NUMBER", "phone"),
    ("IBAN_CODE", "iban"),
    ("IP_ADDRESS", "ip"),
    ("URL", "url"),
];

/// Identity numbers of countries.
const COUNTRIES: [(&str, &str); 14] = [
    ("US_", "us"),
    ("UK_", "gb"),
    ("ES_", "es"),
    ("IT_", "it"),
    ("PL_", "pl"),
    ("AU_", "au"),
    ("IN_", "in"),
    ("DE_", "de"),
    ("FR_", "fr"),
    ("NL_", "nl"),
    ("BE_", "be"),
    ("CA_", "ca"),
    ("SE_", "se"),
    ("BR_", "br"),
];

/// Stands for the identity numbers of one country.
const SSN: &str = "ssn";

/// The patterns of LiteLLM's content filter that are known here.
const PREBUILT: [(&str, &str); 8] = [
    ("us_ssn", SSN),
    ("email", "email"),
    ("credit_card", "card"),
    ("visa", "card"),
    ("mastercard", "card"),
    ("us_phone", "phone"),
    ("phone", "phone"),
    ("ipv4", "ip"),
];

const PROMPT: [&str; 3] = ["prompt.system", "prompt.user", "prompt.tool"];

/// Where a rule looks, and whether it only tells.
struct Frame {
    name: String,
    places: Vec<&'static str>,
    monitor: bool,
}

impl Frame {
    fn rule(&self, behind: &str, verdict: &str, kind: &str, config: Yaml) -> Yaml {
        let name: String = format!("{}{behind}", self.name).chars().take(64).collect();
        Yaml::map([
            ("name", Some(Yaml::text(&name))),
            ("in", Some(Yaml::texts(self.places.iter().copied()))),
            ("verdict", Some(Yaml::word(verdict))),
            ("mode", self.monitor.then(|| Yaml::word("monitor"))),
            (kind, Some(config)),
        ])
    }
}

/// What a content filter looks for.
#[derive(Default)]
struct Wanted<'v> {
    words: Vec<&'v str>,
    find: Vec<&'static str>,
    expressions: Vec<&'v str>,
}

impl<'v> Wanted<'v> {
    /// One of its `patterns`.
    fn add(&mut self, at: &At<'v>) -> Result<(), String> {
        let part = |key: &str| at.value.get(key).and_then(|value| value.as_str());
        match (part("pattern"), part("pattern_name")) {
            (Some(expression), _) => self.expressions.push(expression),
            (None, Some(name)) => {
                let known = PREBUILT
                    .iter()
                    .find(|(theirs, _)| name == *theirs || name.starts_with("us_ssn") && *theirs == "us_ssn");
                let (_, ours) = known.ok_or_else(|| format!("the pattern {name} is not known here"))?;
                if !self.find.contains(ours) {
                    self.find.push(ours);
                }
            }
            (None, None) => return Err("it has neither `pattern` nor `pattern_name`".to_owned()),
        }
        Ok(())
    }

    /// A rule's kind and its configuration, for each kind that there is something of.
    fn configs(&self) -> Vec<(&'static str, Yaml)> {
        let list = |texts: &[&str]| Some(Yaml::texts(texts.iter().copied()));
        let countries = self.find.contains(&SSN).then_some("us");
        let kinds = self.find.iter().copied().filter(|kind| *kind != SSN);
        let pii = Yaml::map([("find", Some(Yaml::texts(kinds))), ("countries", Some(Yaml::texts(countries)))]);
        let regex = Yaml::map([("list", list(&self.expressions)), ("window", Some(Yaml::number(1024)))]);
        let words = Yaml::map([("list", list(&self.words))]);
        let all = [
            ("words", words, self.words.is_empty()),
            ("pii", pii, self.find.is_empty()),
            ("regex", regex, self.expressions.is_empty()),
        ];
        all.into_iter().filter(|(_, _, empty)| !empty).map(|(kind, config, _)| (kind, config)).collect()
    }
}

impl<'a> Importer<'a> {
    pub(super) fn guardrails(&mut self, root: &At<'a>) {
        let of_litellm = root.get("litellm_settings").and_then(|litellm| litellm.get("guardrails"));
        let lists = [root.get("guardrails"), of_litellm];
        for entry in lists.iter().flatten().flat_map(At::items) {
            self.guardrail(&entry);
        }
    }

    fn guardrail(&mut self, entry: &At<'_>) {
        self.told.insert(entry.path.clone());
        let named = entry.get("guardrail_name").and_then(|name| name.text());
        let (Some(name), Some(params)) = (named.filter(|name| !name.is_empty()), entry.get("litellm_params")) else {
            return self.not_supported(entry, "it has no `guardrail_name` or no `litellm_params`: left out");
        };
        let kind = params.get("guardrail");
        let frame = self.frame(name, &params);
        let before = self.draft.guardrails.len();
        match kind.as_ref().and_then(|kind| kind.text()).unwrap_or_default() {
            "presidio" => self.presidio(&frame, entry, &params),
            "hide-secrets" | "hide_secrets" => {
                self.changed(entry, "known shapes of secrets are taken out; what has no shape is not found");
                self.rule(entry, frame.rule("", "redact", "secrets", Yaml::Map(Vec::new())));
            }
            "litellm_content_filter" | "content_filter" => self.content_filter(&frame, entry, &params),
            other => {
                return self.not_supported(
                    entry,
                    format!("{other} asks another service or runs code: nothing of it is in the policy"),
                );
            }
        }
        if frame.monitor && self.draft.guardrails.len() > before {
            self.changed(entry, "`mode: monitor`: a rule holds for every request here, and this one only did where a request asked for it, or for the log");
        }
    }

    fn frame(&self, name: &str, params: &At<'_>) -> Frame {
        let modes: Vec<&str> =
            params.get("mode").map(|mode| mode.texts()).unwrap_or_default().into_iter().map(|(mode, _)| mode).collect();
        let prompts =
            modes.is_empty() || modes.iter().any(|mode| ["pre_call", "during_call", "logging_only"].contains(mode));
        let answers = modes.contains(&"post_call");
        let mut places = if prompts { PROMPT.to_vec() } else { Vec::new() };
        if answers {
            places.push("answer.content");
        }
        let always = params.get("default_on").is_some_and(|at| at.is_true());
        let taken = self.draft.guardrails.len();
        // Two of one name would not be told apart.
        let name = if self.has_rule(name) { format!("{name}-{taken}") } else { name.to_owned() };
        Frame { name: name.chars().take(40).collect(), places, monitor: !always || modes == ["logging_only"] }
    }

    fn has_rule(&self, name: &str) -> bool {
        let begin = format!("{{name: {}", Yaml::text(name).flow());
        self.draft.guardrails.iter().any(|rule| rule.flow().starts_with(&begin))
    }

    fn presidio(&mut self, frame: &Frame, entry: &At<'_>, params: &At<'_>) {
        let Some(config) = params.get("pii_entities_config") else {
            self.changed(
                entry,
                "the personal data that is known here is redacted; names, places and dates are not found",
            );
            return self.rule(entry, frame.rule("", "redact", "pii", Yaml::Map(Vec::new())));
        };
        for (action, verdict, behind) in [("MASK", "redact", ""), ("BLOCK", "block", "-block")] {
            let (mut find, mut countries, mut lost) = (Vec::new(), Vec::new(), Vec::new());
            let wanted = config.members().into_iter().filter(|(_, at)| at.text() == Some(action));
            for (entity, _) in wanted {
                match (
                    PII.iter().find(|(theirs, _)| *theirs == entity),
                    COUNTRIES.iter().find(|(begin, _)| entity.starts_with(begin)),
                ) {
                    (Some((_, ours)), _) => find.push(*ours),
                    (None, Some((_, country))) if !countries.contains(country) => countries.push(*country),
                    (None, Some(_)) => {}
                    (None, None) => lost.push(entity),
                }
            }
            if !lost.is_empty() {
                self.not_supported(&config, format!("{} cannot be found here", lost.join(", ")));
            }
            if find.is_empty() && countries.is_empty() {
                continue;
            }
            self.changed(
                entry,
                format!(
                    "found by shape and check digit, not by Presidio ({verdict}): {}",
                    [&find[..], &countries[..]].concat().join(", ")
                ),
            );
            let pii = Yaml::map([("find", Some(Yaml::texts(find))), ("countries", Some(Yaml::texts(countries)))]);
            self.rule(entry, frame.rule(behind, verdict, "pii", pii));
        }
    }

    fn content_filter(&mut self, frame: &Frame, entry: &At<'_>, params: &At<'_>) {
        for (action, verdict, behind) in [("BLOCK", "block", ""), ("MASK", "redact", "-mask")] {
            let wanted = self.wanted(params, action);
            let count = wanted.words.len() + wanted.find.len() + wanted.expressions.len();
            if count > 0 {
                self.changed(entry, format!("{count} of its words and patterns are found here ({verdict})"));
            }
            for (kind, config) in wanted.configs() {
                let name = if kind == "pii" { "known" } else { kind };
                self.rule(entry, frame.rule(&format!("{behind}-{name}"), verdict, kind, config));
            }
        }
        for key in ["blocked_words_file", "categories"] {
            if let Some(at) = params.get(key) {
                self.not_supported(&at, "it is not read: `words: {file: PATH}` takes a file with one word a line");
            }
        }
    }

    /// What a content filter does `action` with.
    fn wanted<'v>(&mut self, params: &At<'v>, action: &str) -> Wanted<'v> {
        let is_meant = |at: &At<'_>| at.get("action").and_then(|at| at.text()).unwrap_or("BLOCK") == action;
        let listed =
            |key: &str| params.get(key).map(|list| list.items()).unwrap_or_default().into_iter().filter(is_meant);
        let words = listed("blocked_words").filter_map(|at| at.value.get("keyword")?.as_str());
        let words = words.filter(|word| !word.is_empty()).collect();
        let mut wanted = Wanted { words, ..Wanted::default() };
        for at in listed("patterns") {
            if let Err(why) = wanted.add(&at) {
                self.not_supported(&at, why);
            }
        }
        wanted
    }

    /// Adds a rule if it is one: an expression of Python's may be none here.
    pub(super) fn rule(&mut self, entry: &At<'_>, rule: Yaml) {
        let alone = format!("version: 1\nguardrails:\n  - {}\n", rule.flow());
        match super::check(&alone) {
            Ok(()) => self.draft.guardrails.push(rule),
            Err(why) => {
                let why: String = why.chars().take(300).collect();
                self.not_supported(entry, format!("left out: {why}"));
            }
        }
    }
}
