//! Language: text in another language than those that are allowed, told by its script and its frequent words.

use std::collections::BTreeSet;
use std::sync::Arc;

use schemars::JsonSchema;
use serde::Deserialize;

use super::stream::{Finder, Found, Search, Window};
use super::{Detector, Wrong};

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

/// Fewer letters than this tell nothing.
const LETTERS_MIN: usize = 40;

pub(super) fn build(config: &Config, rule: usize) -> Result<Detector, Vec<Wrong>> {
    let mut wrong = Vec::new();
    if config.allow.is_empty() {
        wrong.push((".allow".to_owned(), "no language is allowed: give at least one, like en".to_owned()));
    }
    for (index, code) in config.allow.iter().enumerate() {
        if !known(code) {
            wrong.push((format!(".allow[{index}]"), format!("{code} is none of {}", codes().join(", "))));
        }
    }
    if !(80..=2_000).contains(&config.stretch) {
        wrong.push((".stretch".to_owned(), "a stretch has 80 to 2000 letters".to_owned()));
    }
    let allowed = config.allow.iter().cloned().collect();
    let speech = Languages { allowed, stretch: config.stretch, rule };
    if wrong.is_empty() { Ok(Detector::Own(vec![Arc::new(speech)])) } else { Err(wrong) }
}

/// Languages that have a script of their own, or share one with few: told by it alone where nothing else fits better.
const SCRIPTS: &[(&str, &[(char, char)])] = &[
    ("el", &[('\u{370}', '\u{3ff}')]),
    ("ru", &[('\u{400}', '\u{4ff}')]),
    ("he", &[('\u{590}', '\u{5ff}')]),
    ("ar", &[('\u{600}', '\u{6ff}')]),
    ("hi", &[('\u{900}', '\u{97f}')]),
    ("bn", &[('\u{980}', '\u{9ff}')]),
    ("ta", &[('\u{b80}', '\u{bff}')]),
    ("th", &[('\u{e00}', '\u{e7f}')]),
    ("ko", &[('\u{1100}', '\u{11ff}'), ('\u{ac00}', '\u{d7af}')]),
    ("ja", &[('\u{3040}', '\u{30ff}')]),
    ("zh", &[('\u{3400}', '\u{4dbf}'), ('\u{4e00}', '\u{9fff}')]),
];

/// Frequent words of languages that share a script.
const WORDS: &[(&str, &str)] = &[
    (
        "en",
        "the and of to in is that for it with as on you this are be not was or have from by an but they which at can will your we if there what all would their has more",
    ),
    (
        "de",
        "der die und das ist nicht ein eine zu den mit von für auf im auch es sich ich des dem wir sie wie aus bei als nach werden oder kann sind dass wird haben einer nur noch über",
    ),
    (
        "fr",
        "le la les et des est une un du que dans pour qui pas au sur avec ne ce il vous plus par sont cette mais nous ou je se ont être aux son comme fait leur elle tout",
    ),
    (
        "es",
        "el la los de que y en un una es por con no para las se del al lo como más su pero sus le ya o este sí porque esta son entre cuando muy sin sobre también hay puede",
    ),
    (
        "it",
        "il di che la e un per non una in sono è del si con le da come della i gli più nel anche alla questo ma ha lo dei dal delle quando se molto essere tutti suo ci può",
    ),
    (
        "pt",
        "o de que e do da em um para com não uma os no se na por mais as dos como mas ao ele das seu sua ou quando muito nos já eu também pelo pela até isso ela entre são você",
    ),
    (
        "nl",
        "de het een en van is dat niet in te op zijn voor met die er aan ook om als maar dan bij nog uit wel naar door over ze hij worden kan heeft deze geen wat je werd zo",
    ),
    (
        "sv",
        "och att det i en som är på av för med till den har de inte om ett var jag men så kan från vi ska han eller när hade sig också där nu detta alla bara",
    ),
    (
        "da",
        "og at det i en er som på af for med til den har de ikke om et var jeg men så kan fra vi skal han eller når havde sig også der nu dette alle blev være",
    ),
    (
        "no",
        "og å det i en er som på av for med til den har de ikke om et var jeg men så kan fra vi skal han eller når hadde seg også der nå dette alle ble være",
    ),
    (
        "fi",
        "ja on ei se että oli hän mutta ovat kun niin myös voi olla sen tai joka kuin mitä vain jos minä tämä ole sitä hyvin siitä kanssa sekä mukaan jonka",
    ),
    (
        "pl",
        "i w nie na się z do to że jest o jak ale po co za od tak przez są dla być czy tym jego już przy można oraz tylko był może ich lub które jako",
    ),
    (
        "cs",
        "a se v na je že o s z do i to jako za ale pro by jsem být jsou které nebo který už tak také po podle při jeho však od ke není jen mezi",
    ),
    (
        "hu",
        "a az és hogy nem is egy van ez meg de csak volt már mint vagy ha még el ki kell lehet minden azt mert nagyon amely azonban pedig majd ezt",
    ),
    (
        "ro",
        "și de la a în nu cu o pe care este un din să mai se pentru ce sunt dar au al fi după ca sau prin fost acest lui ale despre când foarte",
    ),
    (
        "tr",
        "ve bir bu da de için ile olarak çok daha en gibi olan ne var kadar sonra ama ya değil her mi ben şey olduğu tarafından ise veya göre",
    ),
    (
        "vi",
        "và của là có không được cho trong một các với người này đã để những khi từ về như đến tôi ra cũng vào bạn nhưng thì nhiều",
    ),
    (
        "ru",
        "и в не на я что с он а как это по но к из у за от то же для вы так все бы его мы или если она они есть быть было уже только когда",
    ),
    (
        "uk",
        "і в не на що з та до це як у за від є але по він ми ви для або якщо так його про вони вона їх може бути був було цього також через під",
    ),
    (
        "bg",
        "и на да се в не за от е с че по си са като това но до ще които този или при може само след към така още беше бъде има тези",
    ),
    ("ar", "في من على أن إلى ما لا هذا عن مع هو هي كان التي الذي ذلك هذه لم قد كل بعد أو بين عند"),
    ("fa", "و در به از که این است را با برای آن یک خود تا می شود های بر هم نیز شده اما یا هر باید"),
];

/// Languages whose words are looked at where this one's script is.
fn siblings(script: &str) -> &'static [&'static str] {
    match script {
        "ru" => &["ru", "uk", "bg"],
        "ar" => &["ar", "fa"],
        _ => &[],
    }
}

fn codes() -> Vec<&'static str> {
    let all: BTreeSet<&str> =
        SCRIPTS.iter().map(|(code, _)| *code).chain(WORDS.iter().map(|(code, _)| *code)).collect();
    all.into_iter().collect()
}

fn known(code: &str) -> bool {
    codes().contains(&code)
}

/// The language of a text; None if that cannot be told.
fn language(text: &str) -> Option<&'static str> {
    let letters = text.chars().filter(|c| c.is_alphabetic()).count();
    if letters < LETTERS_MIN {
        return None;
    }
    let share = |ranges: &[(char, char)]| text.chars().filter(|c| within(ranges, *c)).count() * 100 / letters;
    let mut scripts: Vec<(&str, usize)> = SCRIPTS.iter().map(|(code, ranges)| (*code, share(ranges))).collect();
    let latin = text.chars().filter(|c| c.is_alphabetic() && (*c < '\u{250}' || within(VIETNAMESE, *c))).count();
    scripts.push(("", latin * 100 / letters));
    // Japanese is told by its syllables, though most of its letters may be Chinese.
    let syllables = scripts.iter().any(|(code, share)| *code == "ja" && *share >= 15);
    let (script, share) = scripts.into_iter().max_by_key(|(_, share)| *share)?;
    match script {
        "zh" | "ja" if syllables => Some("ja"),
        _ if share < 70 => None,
        "" => by_words(text, |code| !matches!(code, "ru" | "uk" | "bg" | "ar" | "fa")),
        _ if siblings(script).is_empty() => Some(script),
        _ => by_words(text, |code| siblings(script).contains(&code)),
    }
}

const VIETNAMESE: &[(char, char)] = &[('\u{1e00}', '\u{1eff}')];

fn within(ranges: &[(char, char)], c: char) -> bool {
    ranges.iter().any(|(low, high)| (*low..=*high).contains(&c))
}

/// The language with the most frequent words in this text, if it leads clearly.
fn by_words(text: &str, eligible: impl Fn(&str) -> bool) -> Option<&'static str> {
    let lower = text.to_lowercase();
    let words: Vec<&str> = lower.split(|c: char| !c.is_alphabetic()).filter(|word| !word.is_empty()).collect();
    let score = |list: &str| words.iter().filter(|word| list.split(' ').any(|frequent| frequent == **word)).count();
    let mut scores: Vec<(usize, &str)> =
        WORDS.iter().filter(|(code, _)| eligible(code)).map(|(code, list)| (score(list), *code)).collect();
    scores.sort_unstable_by(|a, b| b.cmp(a));
    let [(best, code), (second, _), ..] = scores[..] else { return None };
    let clear = best >= 3 && best * 100 >= words.len() * 12 && best > second;
    clear.then_some(code)
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
