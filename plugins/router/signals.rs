//! Cheap signals: what can be counted in a prompt without understanding it. And the router that goes by them.
//!
//! All but the size are of what is asked now (the user's last message), and of a long one of its first and last 16 KiB.

use std::sync::Arc;

use aho_corasick::{AhoCorasick, AhoCorasickBuilder, AhoCorasickKind, MatchKind};
use schemars::JsonSchema;
use serde::Deserialize;

use super::{Answer, Choice, Router, Why, Wrong};
use crate::language;
use crate::prompt::Prompt;

/// What can be counted.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Signals {
    /// Bytes of text in the whole prompt.
    pub bytes: usize,
    /// About how many tokens those are.
    pub tokens: usize,
    /// Messages of the user.
    pub turns: u32,
    /// Images.
    pub images: u32,
    /// Tools that the model may call.
    pub tools: u32,
    /// The language, by its ISO 639-1 code, where it can be guessed.
    pub language: Option<&'static str>,
    /// Whether there is program text in it or it asks for some.
    pub code: bool,
    /// Whether it is about maths that is written as such.
    pub maths: bool,
    /// Whether the answer must have a form: JSON, a schema, a table.
    pub structured: bool,
}

impl Signals {
    /// The signals of a prompt.
    pub fn of(prompt: &Prompt<'_>) -> Self {
        let mut marks = Marks::default();
        let asked = prompt.asked();
        asked.iter().flat_map(|span| ends(span.text)).for_each(|text| marks.count(text));
        let bytes = prompt.bytes();
        Self {
            bytes,
            tokens: marks.tokens(bytes),
            turns: prompt.turns(),
            images: prompt.images,
            tools: prompt.tools,
            language: language::told(asked.iter().flat_map(|span| ends(span.text))).map(|told| told.code),
            code: marks.code(),
            maths: marks.maths(),
            structured: prompt.structured || marks.forms > 0,
        }
    }
}

/// How much of each end of a long text is looked at.
const END: usize = 16 << 10;

/// A text, or the two ends of a long one.
fn ends(text: &str) -> [&str; 2] {
    match text.len() {
        len if len <= 2 * END => [text, ""],
        len => [&text[..text.floor_char_boundary(END)], &text[text.ceil_char_boundary(len - END)..]],
    }
}

/// What was seen of code, maths and forms.
#[derive(Clone, Copy, Debug, Default)]
struct Marks {
    bytes: usize,
    /// Characters that are rare outside program text and data.
    brackets: usize,
    fences: usize,
    keywords: usize,
    symbols: usize,
    asks_maths: usize,
    forms: usize,
}

impl Marks {
    fn count(&mut self, text: &str) {
        self.bytes += text.len();
        self.brackets += text.bytes().filter(|byte| is_bracket(*byte)).count();
        self.symbols += text.chars().filter(|c| is_maths(*c)).count();
        for found in WORDS.find_iter(text) {
            let alone = stands_alone(text, found.start(), found.end());
            match KIND_OF[found.pattern().as_usize()] {
                Kind::Fence => self.fences += 1,
                _ if !alone => {}
                Kind::Code => self.keywords += 1,
                Kind::Maths => self.asks_maths += 1,
                Kind::Form => self.forms += 1,
            }
        }
    }

    /// About four bytes a token in prose, and less than three where it is all brackets and quotes.
    fn tokens(&self, bytes: usize) -> usize {
        if self.brackets * 12 > self.bytes { bytes * 5 / 14 } else { bytes.div_ceil(4) }
    }

    fn code(&self) -> bool {
        self.fences > 0 || self.keywords >= 2 || (self.keywords == 1 && self.brackets * 50 > self.bytes)
    }

    fn maths(&self) -> bool {
        self.symbols >= 2 || self.asks_maths >= 2 || (self.asks_maths == 1 && self.symbols == 1)
    }
}

fn is_bracket(byte: u8) -> bool {
    matches!(byte, b'{' | b'}' | b'[' | b']' | b'<' | b'>' | b'"' | b';' | b'=' | b'\\' | b'_' | b'|')
}

fn is_maths(letter: char) -> bool {
    matches!(letter, '∀'..='⋿' | '×' | '÷' | '±' | '²' | '³' | 'π' | 'θ' | '^' | '⁰'..='ⁿ')
}

/// Whether what was found is not part of a longer word.
fn stands_alone(text: &str, start: usize, end: usize) -> bool {
    let bytes = text.as_bytes();
    let goes_on = |at: Option<&u8>| at.is_some_and(|byte| byte.is_ascii_alphanumeric() || *byte == b'_');
    let word = |at: usize| bytes.get(at).is_some_and(u8::is_ascii_alphanumeric);
    let before = start.checked_sub(1).and_then(|at| bytes.get(at));
    !(word(start) && goes_on(before) || word(end - 1) && goes_on(bytes.get(end)))
}

#[derive(Clone, Copy)]
enum Kind {
    Fence,
    Code,
    Maths,
    Form,
}

#[rustfmt::skip]
const LISTS: [(Kind, &[&str]); 4] = [
    (Kind::Fence, &["```", "#include <", "#!/", "</div>", "</script>", "traceback (most recent call last)"]),
    (Kind::Code, &[
        "def ", "fn ", "class ", "struct ", "import ", "return ", "const ", "public static", "void ", "async ", "await ",
        "function(", "=> {", "();", "select * from", "select count(", "insert into", "create table", "printf(", "print(",
        "console.log", "std::", "lambda ", "python", "javascript", "typescript", "rust", "golang", "c++", "java", "kotlin",
        "sql", "regex", "bash", "dockerfile", "kubernetes", "compile", "compiler", "refactor", "unit test", "unit tests",
        "stack trace", "segfault", "nullpointerexception", "pull request", "api", "bug", "code", "function", "algorithm",
    ]),
    (Kind::Maths, &[
        "\\frac", "\\sum", "\\int", "\\sqrt", "\\begin{equation}", "\\mathbb", "integral", "derivative", "equation",
        "equations", "theorem", "lemma", "prove that", "proof", "matrix", "eigenvalue", "polynomial", "probability",
        "solve for", "calculate", "how many", "modulo", "prime", "triangle", "logarithm", "factorial",
    ]),
    (Kind::Form, &[
        "as json", "in json", "valid json", "json object", "json schema", "json format", "as yaml", "in yaml", "as csv",
        "as xml", "in csv format", "markdown table", "as a table", "in a table", "following schema", "following format",
    ]),
];

static KIND_OF: std::sync::LazyLock<Vec<Kind>> =
    std::sync::LazyLock::new(|| LISTS.iter().flat_map(|(kind, words)| words.iter().map(|_| *kind)).collect());

static WORDS: std::sync::LazyLock<Automaton> = std::sync::LazyLock::new(|| {
    let words = LISTS.iter().flat_map(|(_, words)| words.iter().copied());
    Automaton(builder().kind(Some(AhoCorasickKind::DFA)).build(words).ok())
});

/// An automaton over words, whatever their case. It finds nothing where there is too much to look for, which
/// [`build`] refuses.
#[derive(Debug)]
struct Automaton(Option<AhoCorasick>);

impl Automaton {
    fn of<'a>(words: impl Iterator<Item = &'a str>) -> Self {
        Self(builder().build(words).ok())
    }

    fn find_iter<'a>(&'a self, text: &'a str) -> impl Iterator<Item = aho_corasick::Match> + 'a {
        self.0.iter().flat_map(move |automaton| automaton.find_iter(text))
    }
}

fn builder() -> AhoCorasickBuilder {
    let mut builder = AhoCorasick::builder();
    builder.ascii_case_insensitive(true).match_kind(MatchKind::LeftmostLongest);
    builder
}

/// A rule over signals: all that it names must hold.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[schemars(rename = "SignalsRouter")]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The model that answers where the rule holds.
    pub model: String,
    /// Its name, for the record and the header.
    #[serde(default)]
    pub name: Option<String>,
    /// At least about so many tokens.
    #[serde(default)]
    pub least_tokens: Option<usize>,
    /// At most about so many tokens.
    #[serde(default)]
    pub most_tokens: Option<usize>,
    /// Whether there are images.
    #[serde(default)]
    pub images: Option<bool>,
    /// Whether there are tools.
    #[serde(default)]
    pub tools: Option<bool>,
    /// Whether there is program text, or some is asked for.
    #[serde(default)]
    pub code: Option<bool>,
    /// Whether it is about maths.
    #[serde(default)]
    pub maths: Option<bool>,
    /// Whether the answer must have a form such as JSON.
    #[serde(default)]
    pub structured: Option<bool>,
    /// One of these languages, by their ISO 639-1 codes.
    #[serde(default)]
    pub languages: Option<Vec<String>>,
    /// One of these words or phrases, whatever their case.
    #[serde(default)]
    pub words: Option<Vec<String>>,
}

/// A rule that is ready.
#[derive(Debug)]
pub struct Rule {
    config: Config,
    model: Arc<str>,
    route: Arc<str>,
    words: Option<Automaton>,
}

pub(super) fn build(config: &Config) -> Result<Rule, Wrong> {
    let wrong = |path: &str, message: String| Err((path.to_owned(), message));
    if config.model.is_empty() {
        return wrong(".model", "is empty: name the model that answers".into());
    }
    if !names_something(config) {
        return wrong("", "holds for every prompt: name at least one signal".into());
    }
    if let Some(language) = config.languages.iter().flatten().find(|code| !language::known().contains(code.as_str())) {
        let known = Vec::from_iter(language::known()).join(", ");
        return wrong(".languages", format!("{language} is none that can be guessed; those are {known}"));
    }
    if config.words.as_ref().is_some_and(|words| words.is_empty() || words.iter().any(|word| word.trim().is_empty())) {
        return wrong(".words", "has nothing to look for: give words, none of them empty".into());
    }
    let words = config.words.as_ref().map(|words| Automaton::of(words.iter().map(|word| word.trim())));
    if words.as_ref().is_some_and(|words| words.0.is_none()) {
        return wrong(".words", "are too many to look for".into());
    }
    let route = config.name.as_deref().unwrap_or("signals").into();
    Ok(Rule { config: config.clone(), model: config.model.as_str().into(), route, words })
}

fn names_something(config: &Config) -> bool {
    let Config { least_tokens, most_tokens, images, tools, code, maths, structured, languages, words, .. } = config;
    least_tokens.or(*most_tokens).is_some()
        || images.or(*tools).or(*code).or(*maths).or(*structured).is_some()
        || languages.as_ref().or(words.as_ref()).is_some()
}

impl Rule {
    fn holds(&self, prompt: &Prompt<'_>) -> bool {
        let (config, signals) = (&self.config, Signals::of(prompt));
        let is = |wanted: Option<bool>, found: bool| wanted.is_none_or(|wanted| wanted == found);
        config.least_tokens.is_none_or(|least| signals.tokens >= least)
            && config.most_tokens.is_none_or(|most| signals.tokens <= most)
            && is(config.images, signals.images > 0)
            && is(config.tools, signals.tools > 0)
            && is(config.code, signals.code)
            && is(config.maths, signals.maths)
            && is(config.structured, signals.structured)
            && config
                .languages
                .as_ref()
                .is_none_or(|codes| signals.language.is_some_and(|language| codes.iter().any(|code| code == language)))
            && self.words.as_ref().is_none_or(|words| said(words, prompt))
    }
}

fn said(words: &Automaton, prompt: &Prompt<'_>) -> bool {
    prompt
        .asked()
        .iter()
        .any(|span| words.find_iter(span.text).any(|found| stands_alone(span.text, found.start(), found.end())))
}

impl Router for Rule {
    fn kind(&self) -> &'static str {
        "signals"
    }

    fn ask(&self, prompt: &Prompt<'_>) -> Answer {
        if !self.holds(prompt) {
            return Answer::Pass(Why::Unmatched);
        }
        let (model, route) = (Arc::clone(&self.model), Arc::clone(&self.route));
        Answer::Route(Choice { model, route, score: 1.0, margin: 1.0 })
    }

    fn models(&self) -> Vec<Arc<str>> {
        vec![Arc::clone(&self.model)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prompt::{Role, Span};
    use crate::router::tests::{asked, built};

    fn signals(text: &str) -> Signals {
        let spans = [Span { role: Role::User, turn: 0, text }];
        Signals::of(&Prompt { spans: &spans, ..Prompt::default() })
    }

    #[test]
    fn code_is_known_by_its_marks_and_by_what_is_asked() {
        for text in [
            "```\nx\n```",
            "def add(a, b):\n    return a + b",
            "Write a Python function that reverses a list",
            "refactor this: for (int i = 0; i < n; i++) { sum += a[i]; }",
            "SELECT * FROM users WHERE id = 7; why is this SQL slow?",
        ] {
            assert!(signals(text).code, "{text}");
        }
        for text in
            ["What is the dress code for a wedding?", "My trust in the classroom decoder is gone", "rusty nails"]
        {
            assert!(!signals(text).code, "{text}");
        }
    }

    #[test]
    fn maths_and_forms_are_known_by_their_marks() {
        assert!(signals("Prove that ∑ 1/n² converges").maths);
        assert!(signals("Solve for x: \\frac{x}{2} = 4").maths);
        assert!(!signals("Who will win the match?").maths);
        assert!(signals("List the planets as JSON").structured);
        assert!(!signals("Jason is my friend").structured);
        assert!(Signals::of(&Prompt { structured: true, ..Prompt::default() }).structured);
    }

    #[test]
    fn sizes_are_of_the_whole_prompt() {
        let spans = [
            Span { role: Role::System, turn: 0, text: "twelve bytes" },
            Span { role: Role::User, turn: 1, text: "and some" },
        ];
        let found = Signals::of(&Prompt { spans: &spans, images: 2, tools: 3, ..Prompt::default() });
        assert_eq!((found.bytes, found.tokens, found.turns, found.images, found.tools), (20, 5, 1, 2, 3));
        let json = r#"{"a":"b","c":["d"]}"#.repeat(100);
        assert!(signals(&json).tokens > json.len() / 3);
    }

    #[test]
    fn a_rule_holds_only_where_all_of_it_does() {
        let json = r#"[{"signals": {"model": "m", "name": "big-code", "code": true, "least_tokens": 10, "languages": ["en"],
            "words": ["payments"]}}]"#;
        let router = &built(json).unwrap()[0].router;
        let good = "Please write the Python function for our Payments service, the one that they are waiting for.";
        let Answer::Route(choice) = asked(router.as_ref(), good) else { panic!("it passes") };
        assert_eq!((&*choice.model, &*choice.route), ("m", "big-code"));
        for bad in [
            "Please write the text for our Payments service, the one that they are waiting for.",
            "python function payments",
            "Bitte schreibe die Python function für unsere payments und die anderen, die das nicht haben.",
            "Please write the Python function for our repayments service, the one that they are waiting for.",
        ] {
            assert_eq!(asked(router.as_ref(), bad), Answer::Pass(Why::Unmatched), "{bad}");
        }
    }

    #[test]
    fn a_rule_that_cannot_be_meant_is_refused() {
        for (json, path) in [
            (r#"{"model": "m"}"#, "[0].signals"),
            (r#"{"model": "", "code": true}"#, "[0].signals.model"),
            (r#"{"model": "m", "languages": ["english"]}"#, "[0].signals.languages"),
            (r#"{"model": "m", "words": [" "]}"#, "[0].signals.words"),
        ] {
            assert_eq!(built(&format!(r#"[{{"signals": {json}}}]"#)).unwrap_err()[0].0, path);
        }
    }

    #[test]
    fn of_a_long_text_both_ends_are_looked_at() {
        let text = format!("{}é{} refactor the python code", "é".repeat(20_000), "x ".repeat(20_000));
        let found = signals(&text);
        assert!(found.code);
        assert_eq!(found.bytes, text.len());
    }

    #[test]
    fn counting_allocates_nothing() {
        let _ = signals("warm");
        let text = "What is the capital of France, and how do I get there? ".repeat(100);
        let count = allocation_counter::measure(|| {
            std::hint::black_box(signals(&text));
        });
        assert_eq!(count.count_total, 0);
    }
}
