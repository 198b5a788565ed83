//! Heads: labels that are told by example. Which of them a text is most like, by how much, and whether it is like any.
//!
//! Two questions, two answers. *Which* is a logistic regression over the examples' embeddings, or the nearest centroid
//! where a label has too few of them. *Whether any* is how near the text is to the nearest centroid and to the nearest
//! five examples, against what the examples themselves have when each is left out: a classifier that must choose is
//! sure of itself on anything.

use std::sync::Arc;

use super::embed::{DIMENSIONS, Embedding, Vector, dot, vectorized};
use super::logistic::{Regression, exp};

/// With fewer examples a label is told by its centroid only.
pub const FEW: usize = 5;

/// How strongly the examples count against small weights.
const STRENGTH: f64 = 20.0;

/// Centroids that are nearer to each other than this are called twins.
const TWINS: f32 = 0.9;

/// The share of the examples that would be out of scope, were they not examples.
const LEFT_OUT: f64 = 0.05;

/// Labels and the embeddings of their examples.
#[derive(Clone, Debug)]
pub struct Examples {
    labels: Vec<Arc<str>>,
    embedded: Vec<Embedding>,
    of: Vec<usize>,
}

impl Examples {
    /// Embeds examples by label. Examples of nothing that is known are left out; [`Report::unknown`] tells of them.
    pub fn of<'a, T: AsRef<str>>(labelled: impl IntoIterator<Item = (&'a str, Vec<T>)>) -> Self {
        let mut examples = Self { labels: Vec::new(), embedded: Vec::new(), of: Vec::new() };
        for (label, texts) in labelled {
            let at = examples.labels.iter().position(|known| &**known == label).unwrap_or_else(|| {
                examples.labels.push(label.into());
                examples.labels.len() - 1
            });
            for text in texts {
                examples.embedded.push(Embedding::of(text.as_ref()));
                examples.of.push(at);
            }
        }
        examples
    }

    /// Trains heads on examples; short for [`Examples::of`] and [`Examples::heads`].
    pub fn train<'a, T: AsRef<str>>(labelled: impl IntoIterator<Item = (&'a str, Vec<T>)>) -> Heads {
        Self::of(labelled).heads()
    }

    /// Heads, always the same to the bit for the same examples in the same order.
    pub fn heads(&self) -> Heads {
        self.trained().0
    }

    /// Heads, and what is worth knowing before they are relied on.
    pub fn trained(&self) -> (Heads, Report) {
        let (known, centres) = (self.known(), self.centres());
        let examples: Vec<Whole> = known.iter().map(|at| whole(self.embedded[*at].unit())).collect();
        let judged = self.judged(&known, &examples, &centres);
        let report = self.report(&judged, &centres.units);
        let heads = Heads {
            labels: self.labels.clone(),
            weights: self.weights(&known),
            centroids: centres.units.iter().map(whole).collect(),
            examples,
            of: known.iter().map(|at| self.of[*at]).collect(),
            least: quantile(judged.iter().map(|judged| judged.likeness).collect(), LEFT_OUT),
        };
        (heads, report)
    }

    /// The examples that an embedding says anything of.
    fn known(&self) -> Vec<usize> {
        (0..self.of.len()).filter(|at| self.embedded[*at].is_known()).collect()
    }

    fn count(&self, label: usize) -> usize {
        self.of.iter().zip(&self.embedded).filter(|(of, text)| **of == label && text.is_known()).count()
    }

    /// A row of weights for each label, where there is enough to learn them from.
    fn weights(&self, known: &[usize]) -> Option<Vec<Vector>> {
        if self.labels.len() < 2 || (0..self.labels.len()).any(|label| self.count(label) < FEW) {
            return None;
        }
        let features: Vec<f32> = known.iter().flat_map(|at| self.embedded[*at].unit()).copied().collect();
        let classes: Vec<usize> = known.iter().map(|at| self.of[*at]).collect();
        let (width, count, strength) = (DIMENSIONS, self.labels.len(), STRENGTH);
        let weights = Regression { features: &features, width, classes: &classes, count, strength }.fit();
        Some(weights.as_chunks().0.to_vec())
    }

    fn centres(&self) -> Centres {
        let mut sums = vec![[0.0; DIMENSIONS]; self.labels.len()];
        for (text, of) in self.embedded.iter().zip(&self.of).filter(|(text, _)| text.is_known()) {
            sums[*of].iter_mut().zip(text.unit()).for_each(|(sum, x)| *sum += x);
        }
        Centres { units: sums.iter().map(unit).collect(), sums }
    }
}

/// Where each label's examples are, all of them taken together.
struct Centres {
    sums: Vec<Vector>,
    units: Vec<Vector>,
}

impl Centres {
    /// The centre of a label's examples but one.
    fn without(&self, label: usize, one: &Vector) -> Vector {
        let mut sum = self.sums[label];
        sum.iter_mut().zip(one).for_each(|(sum, x)| *sum -= x);
        unit(&sum)
    }
}

/// Of one example, judged by all the others.
struct LeftOut {
    /// Its number.
    at: usize,
    /// The nearest label.
    nearest: usize,
    /// How near it is to what there is.
    likeness: f32,
}

impl Examples {
    fn judged(&self, known: &[usize], examples: &[Whole], centres: &Centres) -> Vec<LeftOut> {
        let judge = |(own, at): (usize, &usize)| {
            let (nearest, near) = self.nearest_centre(*at, centres);
            let mut five = Five::new();
            for (other, example) in examples.iter().enumerate() {
                if other != own {
                    five.see(cosine(&examples[own], example));
                }
            }
            LeftOut { at: *at, nearest, likeness: near + five.mean() }
        };
        known.iter().enumerate().map(judge).collect()
    }

    fn nearest_centre(&self, at: usize, centres: &Centres) -> (usize, f32) {
        let (own, of) = (self.embedded[at].unit(), self.of[at]);
        let mut nearest = (of, dot(own, &centres.without(of, own)));
        for (label, centre) in centres.units.iter().enumerate().filter(|(label, _)| *label != of) {
            let cosine = dot(own, centre);
            if cosine > nearest.1 {
                nearest = (label, cosine);
            }
        }
        nearest
    }

    fn report(&self, judged: &[LeftOut], centroids: &[Vector]) -> Report {
        let count = self.labels.len();
        let mut confusion = vec![vec![0; count]; count];
        judged.iter().for_each(|example| confusion[self.of[example.at]][example.nearest] += 1);
        let strays = judged.iter().filter(|example| example.nearest != self.of[example.at]);
        let counts = self.labels.iter().enumerate().map(|(at, label)| (Arc::clone(label), self.count(at)));
        Report {
            labels: self.labels.clone(),
            confusion,
            strays: strays.map(|example| (example.at, Arc::clone(&self.labels[example.nearest]))).collect(),
            twins: self.twins(centroids),
            few: counts.filter(|(_, count)| *count < FEW).collect(),
            unknown: (0..self.of.len()).filter(|at| !self.embedded[*at].is_known()).collect(),
        }
    }

    fn twins(&self, centroids: &[Vector]) -> Vec<Twins> {
        let mut twins = Vec::new();
        for (at, a) in centroids.iter().enumerate() {
            for (other, b) in centroids.iter().enumerate().skip(at + 1) {
                let cosine = dot(a, b);
                if cosine > TWINS {
                    let labels = [Arc::clone(&self.labels[at]), Arc::clone(&self.labels[other])];
                    twins.push(Twins { labels, cosine });
                }
            }
        }
        twins
    }
}

/// What the examples tell of themselves, each judged by all the others: by the nearest centroid, which is a little
/// less good than the heads are.
#[derive(Clone, Debug)]
pub struct Report {
    /// The labels, in order.
    pub labels: Vec<Arc<str>>,
    /// How many examples of a label (row) are nearest to which (column).
    pub confusion: Vec<Vec<usize>>,
    /// Examples that are nearer to another label than to their own: their number, and that label.
    pub strays: Vec<(usize, Arc<str>)>,
    /// Labels that are hard to tell apart.
    pub twins: Vec<Twins>,
    /// Labels with too few examples to learn from, and how many those are.
    pub few: Vec<(Arc<str>, usize)>,
    /// Examples of which nothing is known, because they are empty or not English.
    pub unknown: Vec<usize>,
}

impl Report {
    /// The share of the examples that are nearest to their own label.
    pub fn accuracy(&self) -> f64 {
        let all: usize = self.confusion.iter().flatten().sum();
        let right: usize = self.confusion.iter().enumerate().map(|(at, row)| row[at]).sum();
        right as f64 / all.max(1) as f64
    }
}

/// Two labels whose examples are about the same.
#[derive(Clone, Debug, PartialEq)]
pub struct Twins {
    /// The two.
    pub labels: [Arc<str>; 2],
    /// How alike they are.
    pub cosine: f32,
}

/// An embedding in whole numbers, of which a product is exact and quick.
type Whole = [i16; DIMENSIONS];

/// What 1 is in them.
const ONE: f32 = 16_384.0;

fn whole(unit: &Vector) -> Whole {
    unit.map(|x| (x * ONE + 0.5_f32.copysign(x)) as i32 as i16)
}

/// The sum is of two vectors of length one and never wraps; said so, the compiler makes many products at once.
#[inline(always)]
fn cosine(a: &Whole, b: &Whole) -> f32 {
    let products = a.iter().zip(b).map(|(a, b)| i32::from(*a).wrapping_mul(i32::from(*b)));
    products.fold(0, i32::wrapping_add) as f32 / (ONE * ONE)
}

fn unit(vector: &Vector) -> Vector {
    let norm = dot(vector, vector).sqrt();
    if norm > 1e-6 { vector.map(|x| x / norm) } else { [0.0; DIMENSIONS] }
}

/// The five highest of what was seen.
struct Five {
    highest: [f32; FEW],
    seen: usize,
}

impl Five {
    fn new() -> Self {
        Self { highest: [f32::MIN; FEW], seen: 0 }
    }

    fn see(&mut self, x: f32) {
        self.seen += 1;
        if x <= self.highest[FEW - 1] {
            return;
        }
        let at = self.highest.iter().position(|higher| *higher < x).unwrap_or(FEW - 1);
        self.highest[at..].rotate_right(1);
        self.highest[at] = x;
    }

    fn mean(&self) -> f32 {
        let count = self.seen.min(FEW);
        self.highest[..count].iter().sum::<f32>() / count.max(1) as f32
    }
}

/// The value that `share` of the values are below.
fn quantile(mut values: Vec<f32>, share: f64) -> f32 {
    values.sort_by(f32::total_cmp);
    values.get((values.len() as f64 * share) as usize).copied().unwrap_or(f32::MIN)
}

/// Trained: tells texts apart.
#[derive(Clone, Debug)]
pub struct Heads {
    labels: Vec<Arc<str>>,
    weights: Option<Vec<Vector>>,
    centroids: Vec<Whole>,
    examples: Vec<Whole>,
    of: Vec<usize>,
    least: f32,
}

/// What a text is, of the labels there are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Class<'a> {
    /// The likeliest label.
    pub label: &'a Arc<str>,
    /// Its number among [`Heads::labels`].
    pub index: usize,
    /// How likely it is, given that it is one of them.
    pub score: f32,
    /// How much likelier than the second.
    pub margin: f32,
    /// How much the text is like what there are examples of, whichever: 2 where it is one of them, about 0 where it
    /// has nothing in common with any.
    pub likeness: f32,
    /// Whether that is less than what the examples themselves have.
    pub out_of_scope: bool,
}

impl Heads {
    /// What a text is, if anything is known of it and there are any labels.
    pub fn classify(&self, text: &Embedding) -> Option<Class<'_>> {
        if !text.is_known() {
            return None;
        }
        let own = whole(text.unit());
        let (mut best, mut second, mut nearest) = ((f32::MIN, None), f32::MIN, f32::MIN);
        let mut sum = 0.0;
        for (at, centroid) in self.centroids.iter().enumerate() {
            let near = cosine(&own, centroid);
            nearest = nearest.max(near);
            let logit = self.logit(at, text, near);
            if logit > best.0 {
                sum = sum * exp(f64::from(best.0 - logit)) + 1.0;
                (second, best) = (best.0, (logit, Some((at, self.labels.get(at)?))));
            } else {
                sum += exp(f64::from(logit - best.0));
                second = second.max(logit);
            }
        }
        let likeness = nearest + self.nearest_five(&own);
        let score = (1.0 / sum) as f32;
        let margin = score - (exp(f64::from(second - best.0)) / sum) as f32;
        let (index, label) = best.1?;
        Some(Class { label, index, score, margin, likeness, out_of_scope: likeness < self.least })
    }

    /// Labels by how likely they are, the likeliest first: `(label, score)`.
    pub fn ranked(&self, text: &Embedding) -> Vec<(&Arc<str>, f32)> {
        let own = whole(text.unit());
        let logits: Vec<f32> =
            self.centroids.iter().enumerate().map(|(at, c)| self.logit(at, text, cosine(&own, c))).collect();
        let most = logits.iter().copied().fold(f32::MIN, f32::max);
        let shares: Vec<f64> = logits.iter().map(|logit| exp(f64::from(logit - most))).collect();
        let sum: f64 = shares.iter().sum();
        let mut ranked: Vec<_> =
            self.labels.iter().zip(shares).map(|(label, share)| (label, (share / sum) as f32)).collect();
        ranked.sort_by(|a, b| b.1.total_cmp(&a.1));
        ranked
    }

    /// The example that is most like a text: its number among those that are known, its label, and how alike.
    pub fn nearest_example(&self, text: &Embedding) -> Option<(usize, &Arc<str>, f32)> {
        let own = whole(text.unit());
        let near = self.examples.iter().map(|example| cosine(&own, example)).enumerate();
        let (at, cosine) = near.max_by(|a, b| a.1.total_cmp(&b.1))?;
        Some((at, &self.labels[self.of[at]], cosine))
    }

    /// The likeness below which a text is out of scope: what all but one in twenty examples have when they are left
    /// out.
    pub fn least_likeness(&self) -> f32 {
        self.least
    }

    /// The labels, in the order in which they were told.
    pub fn labels(&self) -> &[Arc<str>] {
        &self.labels
    }

    /// Every number that training gave, bit by bit: the same for the same examples, everywhere.
    pub fn fingerprint(&self) -> u64 {
        let weights = self.weights.iter().flatten().flatten().map(|weight| weight.to_bits());
        let rest = self.centroids.iter().flatten().map(|x| *x as u32);
        let all = weights.chain(rest).chain([self.least.to_bits()]);
        all.fold(0xCBF2_9CE4_8422_2325, |hash, bits| (hash ^ u64::from(bits)).wrapping_mul(0x0100_0000_01B3))
    }

    fn logit(&self, label: usize, text: &Embedding, near: f32) -> f32 {
        match &self.weights {
            Some(weights) => dot(&weights[label], text.unit()),
            None => STRENGTH as f32 * near,
        }
    }

    fn nearest_five(&self, own: &Whole) -> f32 {
        let mut five = Five::new();
        vectorized(
            #[inline(always)]
            || self.examples.iter().for_each(|example| five.see(cosine(own, example))),
        );
        five.mean()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WEATHER: [&str; 6] = [
        "what is the weather like today",
        "will it rain tomorrow",
        "how cold is it outside",
        "is there snow in the forecast",
        "do i need an umbrella this afternoon",
        "what's the temperature in boston",
    ];
    const MONEY: [&str; 6] = [
        "transfer fifty dollars to my savings account",
        "what is my account balance",
        "how do i pay my credit card bill",
        "send money to my landlord",
        "show my recent transactions",
        "i want to deposit a check",
    ];
    const CODE: [&str; 6] = [
        "write a python function that sorts a list",
        "fix the bug in this javascript loop",
        "why does my rust program not compile",
        "explain this sql query",
        "refactor this class into smaller functions",
        "write a regular expression for email addresses",
    ];

    fn three() -> Examples {
        Examples::of([("weather", WEATHER.to_vec()), ("money", MONEY.to_vec()), ("code", CODE.to_vec())])
    }

    #[test]
    fn texts_go_where_their_like_is() {
        let heads = three().heads();
        for (text, label) in [
            ("is it going to be sunny in paris", "weather"),
            ("move 20 euros to my checking account", "money"),
            ("implement quicksort in c++", "code"),
        ] {
            let class = heads.classify(&Embedding::of(text)).unwrap();
            assert_eq!(&**class.label, label, "{text}");
            assert!(!class.out_of_scope && class.score > 0.5 && class.margin > 0.0, "{class:?}");
            let ranked = heads.ranked(&Embedding::of(text));
            assert_eq!((&**ranked[0].0, ranked.len()), (label, 3));
            assert!((ranked[0].1 - class.score).abs() < 1e-5);
            assert!((ranked[0].1 - ranked[1].1 - class.margin).abs() < 1e-5);
        }
    }

    #[test]
    fn what_is_like_no_example_is_out_of_scope_however_sure_the_class_is() {
        let heads = three().heads();
        for text in ["who painted the mona lisa", "the mitochondria is the powerhouse of the cell"] {
            let class = heads.classify(&Embedding::of(text)).unwrap();
            assert!(class.out_of_scope, "{text}: {class:?}");
        }
        assert_eq!(heads.classify(&Embedding::of("")), None);
    }

    #[test]
    fn an_example_is_as_like_as_can_be() {
        let heads = three().heads();
        let text = Embedding::of(MONEY[3]);
        let (at, label, cosine) = heads.nearest_example(&text).unwrap();
        assert_eq!((at, &**label), (9, "money"));
        assert!(cosine > 0.999 && !heads.classify(&text).unwrap().out_of_scope);
    }

    #[test]
    fn few_examples_or_one_label_are_told_by_centroid() {
        let few = Examples::train([("weather", WEATHER[..4].to_vec()), ("money", MONEY.to_vec())]);
        assert!(few.weights.is_none() && three().heads().weights.is_some());
        assert_eq!(&**few.classify(&Embedding::of("is it raining")).unwrap().label, "weather");
        let one = Examples::train([("weather", WEATHER.to_vec())]);
        let class = one.classify(&Embedding::of("is it raining")).unwrap();
        assert_eq!((class.score, class.margin), (1.0, 1.0));
        let none = Examples::train::<&str>([]);
        assert_eq!(none.classify(&Embedding::of("is it raining")), None);
    }

    /// Another number means that some machine or some compiler computes other heads: find out why before changing it.
    #[test]
    fn training_gives_the_same_bits_on_every_run_and_machine() {
        assert_eq!(three().heads().fingerprint(), three().heads().fingerprint());
        assert_eq!(three().heads().fingerprint(), 8_459_493_548_508_332_015, "the fingerprint of these examples");
    }

    #[test]
    fn the_report_names_what_will_not_work() {
        let foreign = "Хорошо".repeat(30);
        let mut money = MONEY.to_vec();
        money.extend(["will it rain this evening", &foreign]);
        let examples = Examples::of([
            ("weather", WEATHER[..4].to_vec()),
            ("money", money),
            ("code", CODE.to_vec()),
            ("dev", CODE.to_vec()),
        ]);
        let report = examples.trained().1;
        assert!(report.strays.iter().any(|(at, label)| *at == 10 && &**label == "weather"), "{:?}", report.strays);
        assert_eq!(report.twins.len(), 1);
        assert_eq!(report.twins[0].labels.each_ref().map(|label| &**label), ["code", "dev"]);
        assert_eq!(report.few, [("weather".into(), 4)]);
        assert_eq!(report.unknown, [11]);
        assert!(report.accuracy() < 1.0 && three().trained().1.accuracy() > 0.7);
        assert_eq!(report.confusion.iter().flatten().sum::<usize>(), 23);
    }

    #[test]
    fn the_five_highest_are_kept() {
        let mut five = Five::new();
        assert_eq!(five.mean(), 0.0);
        for x in [3.0, 1.0, 7.0, 2.0, 9.0, 8.0, 4.0, 9.0] {
            five.see(x);
        }
        assert_eq!(five.highest, [9.0, 9.0, 8.0, 7.0, 4.0]);
    }

    #[test]
    fn classifying_allocates_nothing() {
        let heads = three().heads();
        let count = allocation_counter::measure(|| {
            std::hint::black_box(heads.classify(&Embedding::of("is it going to be sunny in paris")));
        });
        assert_eq!(count.count_total, 0);
    }
}
