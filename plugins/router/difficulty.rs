//! How difficult a prompt is: whether the strong model is likelier right than the weak one, and by how much.
//!
//! The score is `P(strong right) - P(weak right)` from two logistic heads over twelve counters and, where it was
//! trained on prompts of one's own, over the embedding. **It is a weak signal.** It saves 10 to 25 % of the strong
//! model's calls at 95 % of its quality, and only after training on 1,500 labelled prompts or more of the same kind; the
//! counters alone, which are the default, know little more than that long prompts with many numbers are hard.

pub mod train;

use std::path::PathBuf;
use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Answer, Choice, Open, Router, Why, Wrong};
use crate::prompt::Prompt;
use crate::semantic::{DIMENSIONS, Embedding, Regression, exp, ln};

/// One of two models, by how difficult the prompt is.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[schemars(rename = "DifficultyRouter")]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The model for what is easy.
    pub weak: String,
    /// The model for what is difficult.
    pub strong: String,
    /// The share of prompts for the strong model, from 0 to 1, of prompts like exam questions. Yours differ: look at the
    /// metrics, and set the threshold instead.
    #[serde(default = "half")]
    pub strong_share: f32,
    /// The score from which on the strong model answers, from -1 to 1. It stands before the share.
    #[serde(default)]
    pub threshold: Option<f32>,
    /// A file with a score that `infergate route train --into` wrote, beside the policy. Absent: a score by counting alone,
    /// which knows nothing of your prompts.
    #[serde(default)]
    pub trained: Option<PathBuf>,
}

fn half() -> f32 {
    0.5
}

/// How many counters there are.
const COUNTERS: usize = 12;

/// What the counters weigh beside the embedding.
const COUNTER_SCALE: f32 = 0.1;

/// The feature that is always the same. It is large so that its weight is small, and held back little.
const CONSTANT: f32 = 10.0;

/// Half of scikit-learn's `C = 1`, since two classes have two rows of weights here.
const STRENGTH: f64 = 0.5;

/// A prompt, and which models answered it right.
#[derive(Clone, Debug, Deserialize)]
pub struct Labelled {
    /// The prompt.
    pub text: String,
    /// Whether the weak model was right.
    pub weak_ok: bool,
    /// Whether the strong model was right.
    pub strong_ok: bool,
}

/// A trained score.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Difficulty {
    means: [f32; COUNTERS],
    deviations: [f32; COUNTERS],
    strong: Vec<f32>,
    weak: Vec<f32>,
    /// The scores of the prompts it was trained on or calibrated with, at each hundredth.
    hundredths: Vec<f32>,
}

impl Difficulty {
    /// The counters-only default: weights set by hand, so that what is long, and full of numbers, commas, symbols and
    /// repetition, counts as difficult. Its means are those of the questions of MMLU and GSM8K that RouteLLM released.
    /// Nothing if the file in the binary is broken, which a test rules out.
    pub fn counters_only() -> Option<Self> {
        Self::read(include_str!("difficulty/counters.json")).ok()
    }

    /// A score that was written as JSON, or what is wrong with it.
    pub fn read(json: &str) -> Result<Self, String> {
        let read: Self = serde_json::from_str(json).map_err(|error| error.to_string())?;
        let known = [COUNTERS + 1, DIMENSIONS + COUNTERS + 1].contains(&read.strong.len());
        let numbers = [&read.strong, &read.weak, &read.hundredths].into_iter().flatten();
        let is_sound = numbers.chain(&read.means).chain(&read.deviations).all(|number| number.is_finite());
        if !known || !is_sound || read.weak.len() != read.strong.len() || read.hundredths.len() != 101 {
            return Err("this is no difficulty score, or one of another version: train it again".to_owned());
        }
        Ok(read)
    }

    /// Trains a score, always the same for the same prompts; `embedded` on what they are about as well.
    pub fn train(prompts: &[Labelled], embedded: bool) -> Self {
        let counters: Vec<_> = prompts.iter().map(|prompt| counters(&prompt.text)).collect();
        let (means, deviations) = spread(&counters);
        let width = if embedded { DIMENSIONS } else { 0 } + COUNTERS + 1;
        let mut trained =
            Self { means, deviations, strong: vec![0.0; width], weak: vec![0.0; width], hundredths: Vec::new() };
        let features: Vec<f32> = prompts.iter().flat_map(|prompt| trained.features(&prompt.text)).collect();
        trained.strong = head(&features, width, prompts.iter().map(|prompt| prompt.strong_ok));
        trained.weak = head(&features, width, prompts.iter().map(|prompt| prompt.weak_ok));
        trained.calibrate(prompts.iter().map(|prompt| prompt.text.as_str()));
        trained
    }

    /// Makes shares mean those of such texts, one's own traffic for instance. They need no labels.
    pub fn calibrate<'a>(&mut self, texts: impl Iterator<Item = &'a str>) {
        let mut scores: Vec<f32> = texts.map(|text| self.score(text)).collect();
        scores.sort_by(f32::total_cmp);
        let hundredth = |at: usize| scores.get((scores.len().max(1) - 1) * at / 100).copied().unwrap_or(0.0);
        self.hundredths = (0..=100).map(hundredth).collect();
    }

    /// How much likelier the strong model is right, from -1 to 1.
    pub fn score(&self, text: &str) -> f32 {
        self.score_of(&[text])
    }

    /// The same, of texts that stand one after another.
    pub fn score_of<T: AsRef<str>>(&self, parts: &[T]) -> f32 {
        let mut counted = [0.0; COUNTERS];
        self.scaled(&Counts::of(parts).counters(), &mut counted);
        let (mut strong, mut weak) = (0.0, 0.0);
        let about = if self.strong.len() > COUNTERS + 1 { Some(Embedding::of_parts(parts)) } else { None };
        let about = about.iter().flat_map(|embedding| embedding.unit()).copied();
        for ((x, s), w) in about.chain(counted).chain([CONSTANT]).zip(&self.strong).zip(&self.weak) {
            strong += x * s;
            weak += x * w;
        }
        (likely(strong) - likely(weak)) as f32
    }

    /// The score that `share` of the prompts it was calibrated with are above; none is where the share is 0, and all
    /// are where it is 1, others too.
    pub fn threshold(&self, share: f32) -> f32 {
        match share {
            ..=0.0 => f32::MAX,
            1.0.. => f32::MIN,
            _ => self.hundredths.get(((1.0 - share) * 100.0).round() as usize).copied().unwrap_or(f32::MAX),
        }
    }

    fn features(&self, text: &str) -> Vec<f32> {
        let mut counted = [0.0; COUNTERS];
        self.scaled(&counters(text), &mut counted);
        let about = if self.strong.len() > COUNTERS + 1 { Embedding::of(text).unit().to_vec() } else { Vec::new() };
        about.into_iter().chain(counted).chain([CONSTANT]).collect()
    }

    fn scaled(&self, counters: &[f32; COUNTERS], into: &mut [f32; COUNTERS]) {
        // Alone they are all there is, and need no holding back.
        let scale = if self.strong.len() > COUNTERS + 1 { COUNTER_SCALE } else { 1.0 };
        for (((into, x), mean), deviation) in into.iter_mut().zip(counters).zip(&self.means).zip(&self.deviations) {
            *into = scale * ((x - mean) / deviation).clamp(-4.0, 4.0);
        }
    }
}

fn likely(logit: f32) -> f64 {
    1.0 / (1.0 + exp(f64::from(-logit)))
}

/// The mean and the standard deviation of each counter.
fn spread(counters: &[[f32; COUNTERS]]) -> ([f32; COUNTERS], [f32; COUNTERS]) {
    let count = counters.len().max(1) as f64;
    let (mut means, mut deviations) = ([0.0; COUNTERS], [1.0; COUNTERS]);
    for at in 0..COUNTERS {
        let mean = counters.iter().map(|row| f64::from(row[at])).sum::<f64>() / count;
        let variance =
            counters.iter().map(|row| (f64::from(row[at]) - mean) * (f64::from(row[at]) - mean)).sum::<f64>();
        means[at] = mean as f32;
        deviations[at] = ((variance / count).sqrt() as f32).max(1e-3);
    }
    (means, deviations)
}

fn head(features: &[f32], width: usize, right: impl Iterator<Item = bool>) -> Vec<f32> {
    let classes: Vec<usize> = right.map(usize::from).collect();
    let weights = Regression { features, width, classes: &classes, count: 2, strength: STRENGTH }.fit();
    let (wrong, right) = weights.split_at(width);
    right.iter().zip(wrong).map(|(right, wrong)| right - wrong).collect()
}

/// What is counted in a text.
pub fn counters(text: &str) -> [f32; COUNTERS] {
    Counts::of(&[text]).counters()
}

#[derive(Default)]
struct Counts {
    chars: u32,
    words: u32,
    digits: u32,
    lines: u32,
    questions: u32,
    symbols: u32,
    capitals: u32,
    asks: u32,
    commas: u32,
    numbers: u32,
    distinct: u32,
}

/// How much of a long prompt is counted.
const MOST_BYTES: usize = 64 << 10;

impl Counts {
    fn of<T: AsRef<str>>(parts: &[T]) -> Self {
        let mut counts = Self::default();
        let mut seen = [0_u64; 64];
        for part in parts.iter().map(T::as_ref) {
            let part = &part[..part.floor_char_boundary(MOST_BYTES)];
            counts.marks(part);
            part.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()).for_each(|word| {
                counts.word(word, &mut seen);
            });
        }
        counts
    }

    fn marks(&mut self, text: &str) {
        for letter in text.chars() {
            self.chars += 1;
            self.digits += u32::from(letter.is_ascii_digit());
            self.lines += u32::from(letter == '\n');
            self.questions += u32::from(letter == '?');
            self.symbols += u32::from(is_maths(letter));
            self.capitals += u32::from(letter.is_uppercase());
            self.commas += u32::from(letter == ',');
        }
    }

    fn word(&mut self, word: &str, seen: &mut [u64; 64]) {
        self.words += 1;
        self.numbers += u32::from(word.bytes().all(|byte| byte.is_ascii_digit()));
        self.asks += u32::from(ASKS.iter().any(|ask| word.eq_ignore_ascii_case(ask)));
        // A word is known again by 12 bits of its hash: enough for the share, in the hundreds.
        let hash = word.bytes().fold(0x811C_9DC5_u32, |hash, byte| {
            (hash ^ u32::from(byte.to_ascii_lowercase())).wrapping_mul(0x0100_0193)
        });
        let (slot, bit) = ((hash >> 26) as usize, 1 << (hash >> 20 & 63));
        self.distinct += u32::from(seen[slot] & bit == 0);
        seen[slot] |= bit;
    }

    fn counters(&self) -> [f32; COUNTERS] {
        let (chars, words) = (self.chars.max(1) as f32, self.words.max(1) as f32);
        let log = |count: u32| ln(1.0 + f64::from(count)) as f32;
        [
            log(self.chars),
            log(self.words),
            chars / words,
            self.digits as f32 / chars,
            log(self.lines),
            log(self.questions),
            log(self.symbols),
            self.capitals as f32 / chars,
            log(self.asks),
            log(self.commas),
            self.distinct as f32 / words,
            log(self.numbers),
        ]
    }
}

const ASKS: [&str; 12] = [
    "prove",
    "why",
    "how",
    "explain",
    "derive",
    "show",
    "calculate",
    "determine",
    "find",
    "analyze",
    "compare",
    "evaluate",
];

fn is_maths(letter: char) -> bool {
    matches!(letter, '=' | '+' | '*' | '/' | '^' | '\\' | '<' | '>' | '$' | '%' | '∀'..='⋿' | '×' | '÷' | '±')
}

/// Two models and what parts them.
#[derive(Debug)]
pub struct Pair {
    difficulty: Difficulty,
    weak: Arc<str>,
    strong: Arc<str>,
    threshold: f32,
}

pub(super) fn build(config: &Config, open: Open<'_>) -> Result<Pair, Wrong> {
    let told = |message: String| (".trained".to_owned(), message);
    let difficulty = match &config.trained {
        Some(path) => Difficulty::read(&open(path).map_err(told)?).map_err(told)?,
        None => Difficulty::counters_only().ok_or_else(|| (String::new(), "the default score is broken".to_owned()))?,
    };
    Pair::of(config, difficulty)
}

impl Pair {
    /// The two models that a policy names, with a score.
    pub fn of(config: &Config, difficulty: Difficulty) -> Result<Self, Wrong> {
        let wrong = |path: &str, message: &str| Err((path.to_owned(), message.to_owned()));
        for (path, model) in [(".weak", &config.weak), (".strong", &config.strong)] {
            if model.is_empty() {
                return wrong(path, "is empty: name a model");
            }
        }
        if !(0.0..=1.0).contains(&config.strong_share) {
            return wrong(".strong_share", "must be from 0 to 1");
        }
        if !config.threshold.is_none_or(|threshold| (-1.0..=1.0).contains(&threshold)) {
            return wrong(".threshold", "must be from -1 to 1");
        }
        let threshold = config.threshold.unwrap_or_else(|| difficulty.threshold(config.strong_share));
        Ok(Self { difficulty, weak: config.weak.as_str().into(), strong: config.strong.as_str().into(), threshold })
    }
}

impl Router for Pair {
    fn kind(&self) -> &'static str {
        "difficulty"
    }

    fn ask(&self, prompt: &Prompt<'_>) -> Answer {
        let asked = prompt.asked();
        if asked.is_empty() {
            return Answer::Pass(Why::Unknown);
        }
        let score = self.difficulty.score_of(asked);
        let model = if score >= self.threshold { &self.strong } else { &self.weak };
        let (model, route) = (Arc::clone(model), Arc::clone(model));
        Answer::Route(Choice { model, route, score, margin: (score - self.threshold).abs() })
    }

    fn models(&self) -> Vec<Arc<str>> {
        vec![Arc::clone(&self.weak), Arc::clone(&self.strong)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::router::tests::{asked, built, built_with};

    /// Prompts of which the weak model gets the long ones wrong.
    fn labelled() -> Vec<Labelled> {
        let prompt = |n: usize| {
            let hard = n.is_multiple_of(2);
            let text = if hard {
                format!("Prove, for all {n}, that 1 + {n} = {n} + 1, and explain why").repeat(1 + n % 5)
            } else {
                format!("Say hello {n}")
            };
            Labelled { text, weak_ok: !hard, strong_ok: true }
        };
        (0..60).map(prompt).collect()
    }

    #[test]
    fn what_the_weak_model_gets_wrong_scores_higher() {
        for embedded in [false, true] {
            let trained = Difficulty::train(&labelled(), embedded);
            assert_eq!(trained, Difficulty::train(&labelled(), embedded));
            let (hard, easy) = (trained.score("Prove, for all 9, that 1 + 9 = 9 + 1"), trained.score("Say hello 77"));
            assert!(hard > easy + 0.2, "{hard} {easy}");
            let half = trained.threshold(0.5);
            let above = labelled().iter().filter(|prompt| trained.score(&prompt.text) >= half).count();
            assert!((28..=38).contains(&above), "{above}");
            assert_eq!(Difficulty::read(&serde_json::to_string(&trained).unwrap()), Ok(trained));
        }
    }

    #[test]
    fn the_default_is_in_the_binary_and_finds_long_problems_harder() {
        let default = Difficulty::counters_only().unwrap();
        let hard = "A train leaves at 9:40 and travels 120 km at 80 km/h, then 45 km at 30 km/h, waits 12 minutes, and \
                    goes back at 66 km/h. If 3 of 7 such trains are late by 5 minutes, when is the last one back?";
        assert!(
            default.score(hard) > default.score("Say hello."),
            "{} {}",
            default.score(hard),
            default.score("Say hello.")
        );
    }

    #[test]
    fn the_threshold_parts_the_models() {
        let ask = |more: &str| {
            let json = format!(r#"[{{"difficulty": {{"weak": "w", "strong": "s"{more}}}}}]"#);
            asked(built(&json).unwrap()[0].router.as_ref(), "What is the capital of France?")
        };
        let model =
            |answer| if let Answer::Route(Choice { model, .. }) = answer { model.to_string() } else { String::new() };
        assert_eq!(model(ask(r#","threshold": 1"#)), "w");
        assert_eq!(model(ask(r#","threshold": -1"#)), "s");
        assert_eq!(model(ask(r#","strong_share": 1"#)), "s");
        assert_eq!(model(ask(r#","strong_share": 0"#)), "w");
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        for (json, path) in [
            (r#"{"weak": "", "strong": "s"}"#, "[0].difficulty.weak"),
            (r#"{"weak": "w", "strong": "s", "strong_share": 1.5}"#, "[0].difficulty.strong_share"),
            (r#"{"weak": "w", "strong": "s", "threshold": 7}"#, "[0].difficulty.threshold"),
        ] {
            assert_eq!(built(&format!(r#"[{{"difficulty": {json}}}]"#)).unwrap_err()[0].0, path);
        }
        assert!(Difficulty::read("{}").is_err());
    }

    #[test]
    fn a_score_of_ones_own_decides_and_one_that_is_none_is_refused() {
        let json = r#"[{"difficulty": {"weak": "w", "strong": "s", "trained": "own.json"}}]"#;
        let trained = serde_json::to_string(&Difficulty::train(&labelled(), true)).unwrap();
        let router = &built_with(json, &trained).unwrap()[0].router;
        let model = |text: &str| match asked(router.as_ref(), text) {
            Answer::Route(choice) => choice.model.to_string(),
            Answer::Pass(_) => String::new(),
        };
        assert_eq!(
            (model("Say hello 77").as_str(), model("Prove, for all 9, that 1 + 9 = 9 + 1").as_str()),
            ("w", "s")
        );
        for broken in ["", "{}", &trained.replace("0.", "1e99"), &trained[..trained.len() - 9]] {
            let wrong = built_with(json, broken).unwrap_err();
            assert_eq!(wrong[0].0, "[0].difficulty.trained", "{wrong:?}");
        }
    }

    #[test]
    fn scoring_allocates_nothing() {
        let trained = Difficulty::train(&labelled(), true);
        let text = "How do I transfer money to another account? ".repeat(100);
        let count = allocation_counter::measure(|| {
            std::hint::black_box(trained.score(&text));
        });
        assert_eq!(count.count_total, 0);
    }
}
