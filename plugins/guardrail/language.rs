//! Language: text in another language than those that are allowed, told by its script and its frequent words.

use std::collections::BTreeSet;
use std::sync::Arc;

use schemars::JsonSchema;
use serde::Deserialize;

use super::stream::{Finder, Found, Search, Window};
use super::{Detector, Wrong};
use crate::language::{known, told};

/// Text in a language that is not allowed. It is judged in stretches; one that is too short or too mixed to tell passes.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "LanguageRule")]
pub struct Config {
    /// The languages that are allowed, as ISO 639-1 has them: ar, bg, bn, cs, da, de, el, en, es, fa, fi, fr, he, hi, hu,
    /// it, ja, ko, nl, no, pl, pt, ro, ru, sv, ta, th, tr, uk, vi, zh.
    #[schemars(length(min = 1))]
    pub allow: Vec<String>,
    /// The letters of a stretch. An answer is held back by no more.
    #[serde(default = "stretch")]
    #[schemars(range(min = 80, max = 2_000))]
    pub stretch: usize,
}

fn stretch() -> usize {
    160
}

pub(super) fn build(config: &Config, rule: usize) -> Result<Detector, Vec<Wrong>> {
    let mut wrong = Vec::new();
    if config.allow.is_empty() {
        wrong.push((".allow".to_owned(), "no language is allowed: give at least one, like en".to_owned()));
    }
    for (index, code) in config.allow.iter().enumerate() {
        if !known().contains(code.as_str()) {
            wrong.push((
                format!(".allow[{index}]"),
                format!("{code} is none of {}", Vec::from_iter(known()).join(", ")),
            ));
        }
    }
    if !(80..=2_000).contains(&config.stretch) {
        wrong.push((".stretch".to_owned(), "a stretch has 80 to 2000 letters".to_owned()));
    }
    let allowed = config.allow.iter().cloned().collect();
    let speech = Languages { allowed, stretch: config.stretch, rule };
    if wrong.is_empty() { Ok(Detector::Own(vec![Arc::new(speech)])) } else { Err(wrong) }
}

/// The language of a text; None if that cannot be told.
fn language(text: &str) -> Option<&'static str> {
    told(std::iter::once(text)).filter(|told| told.is_sure).map(|told| told.code)
}

#[derive(Debug)]
struct Languages {
    allowed: BTreeSet<String>,
    stretch: usize,
    rule: usize,
}

impl Languages {
    fn wrong(&self, text: &str) -> Option<&'static str> {
        let code = language(text)?;
        // Danish and Norwegian differ too little to tell one from the other in a stretch.
        let alike = matches!(code, "da" | "no") && (self.allowed.contains("da") || self.allowed.contains("no"));
        (!alike && !self.allowed.contains(code)).then_some(code)
    }
}

impl Finder for Languages {
    fn begin(self: Arc<Self>) -> Box<dyn Search> {
        Box::new(Listening { languages: self, at: 0, seen: 0, letters: 0 })
    }

    fn hold_max(&self) -> usize {
        self.stretch * 4 * 8
    }
}

struct Listening {
    languages: Arc<Languages>,
    /// Where the stretch begins.
    at: u64,
    /// How far it was counted.
    seen: u64,
    letters: usize,
}

impl Search for Listening {
    fn advance(&mut self, window: &Window<'_>, found: &mut Vec<Found>) -> u64 {
        let offset = |at: u64| (at - window.base) as usize;
        for c in window.text[offset(self.seen)..].chars() {
            self.seen += c.len_utf8() as u64;
            self.letters += usize::from(c.is_alphabetic());
            let length = (self.seen - self.at) as usize;
            // A stretch ends between words, and without any letters too.
            let full = self.letters >= self.languages.stretch && !c.is_alphabetic();
            if full || length >= self.languages.stretch * 4 * 8 - 4 {
                self.decide(&window.text[offset(self.at)..offset(self.seen)], found);
            }
        }
        if window.last {
            self.decide(&window.text[offset(self.at)..], found);
        }
        self.at
    }
}

impl Listening {
    fn decide(&mut self, stretch: &str, found: &mut Vec<Found>) {
        if let Some(code) = self.languages.wrong(stretch) {
            found.push(Found { rule: self.languages.rule, label: code.into(), range: self.at..self.seen });
        }
        (self.at, self.letters) = (self.seen, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{built, judged, same_however_cut};
    use super::*;

    const SAMPLES: &[(&str, &str)] = &[
        (
            "en",
            "The committee will meet on Thursday to discuss what has to be done about the budget and the new building.",
        ),
        ("de", "Der Ausschuss wird sich am Donnerstag treffen, um über den Haushalt und das neue Gebäude zu sprechen."),
        (
            "fr",
            "Le comité se réunira jeudi pour discuter du budget et de ce qui doit être fait pour le nouveau bâtiment.",
        ),
        (
            "es",
            "El comité se reunirá el jueves para hablar del presupuesto y de lo que hay que hacer con el nuevo edificio.",
        ),
        (
            "it",
            "Il comitato si riunirà giovedì per discutere del bilancio e di quello che si deve fare per il nuovo edificio.",
        ),
        (
            "pt",
            "O comitê se reunirá na quinta-feira para discutir o orçamento e o que deve ser feito com o novo edifício.",
        ),
        (
            "nl",
            "Het comité komt donderdag bijeen om te praten over de begroting en wat er met het nieuwe gebouw moet gebeuren.",
        ),
        (
            "pl",
            "Komitet spotka się w czwartek, aby omówić budżet i to, co należy zrobić z nowym budynkiem, który jest już gotowy.",
        ),
        (
            "ru",
            "Комитет соберётся в четверг, чтобы обсудить бюджет и то, что нужно сделать для нового здания, если оно уже готово.",
        ),
        (
            "uk",
            "Комітет збереться в четвер, щоб обговорити бюджет і те, що потрібно зробити для нової будівлі, якщо вона є.",
        ),
        (
            "ja",
            "委員会は木曜日に集まり、予算と新しい建物のために何をしなければならないかについて話し合います。それから昼食をとります。",
        ),
        (
            "zh",
            "委员会将于星期四开会讨论预算以及新大楼需要做的事情会议预计持续两个小时之后大家将一起吃午饭并继续交流关于明年计划的意见",
        ),
        (
            "ko",
            "위원회는 목요일에 모여 예산과 새 건물을 위해 무엇을 해야 하는지 논의할 것입니다. 그 후에 점심을 먹고 다시 이야기를 나눌 예정입니다.",
        ),
        (
            "ar",
            "ستجتمع اللجنة يوم الخميس لمناقشة الميزانية وما يجب القيام به في المبنى الجديد الذي كان من المقرر أن يفتح بعد ذلك",
        ),
    ];

    #[test]
    fn languages_are_told_apart() {
        for (code, text) in SAMPLES {
            assert_eq!(language(text), Some(*code), "{text}");
        }
        assert_eq!(language("too short to tell"), None);
        assert_eq!(language(&"fn main() { println!(\"{}\", x0[i] + y); } ".repeat(3)), None);
    }

    #[test]
    fn another_language_is_blocked_and_an_allowed_one_passes() {
        let rules =
            r#"[{"name":"l","in":["answer.content"],"verdict":"block","language":{"allow":["en"],"stretch":80}}]"#;
        for (code, text) in SAMPLES {
            assert_eq!(judged(rules, "answer.content", text).1.blocked.is_none(), *code == "en", "{text}");
        }
    }

    #[test]
    fn where_it_ends_does_not_depend_on_the_pieces() {
        let rules =
            r#"[{"name":"l","in":["answer.content"],"verdict":"block","language":{"allow":["en"],"stretch":80}}]"#;
        let text = format!("{} {}", SAMPLES[0].1, SAMPLES[1].1);
        assert_eq!(judged(rules, "answer.content", &text).1.found[0].label.as_ref(), "de");
        same_however_cut(rules, "answer.content", &text);
    }

    #[test]
    fn an_unknown_language_is_an_error() {
        let rules = r#"[{"name":"l","in":["prompt.user"],"verdict":"flag","language":{"allow":["xx"]}}]"#;
        assert!(built(rules).unwrap_err()[0].1.contains("none of ar, bg"));
    }
}
