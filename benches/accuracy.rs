//! How good the semantic layer is on labelled prompts, in JSON lines.
//!
//! ```text
//! cargo run --release -p infergate-plugins --example accuracy -- --train F --test F [--test F]... [--shots 5,10,20]
//! cargo run --release -p infergate-plugins --example accuracy -- --difficulty F [--difficulty F]...
//! cargo run --release -p infergate-plugins --example accuracy -- --calibrate F [--calibrate F]... [--write F]
//! cargo run --release -p infergate-plugins --example accuracy -- --attacks F [--benign F]...
//! ```
//!
//! A row of the first and the last has `text` and `label`; labels that the training file does not have are out of
//! scope. A row of the others has `text`, `weak_ok` and `strong_ok`.

use std::error::Error;
use std::time::Instant;

use infergate_plugins::router::difficulty::train::recovered;
use infergate_plugins::router::difficulty::{Difficulty, Labelled};
use infergate_plugins::router::evaluation::{Evaluation, Row, auroc, by_label, rows};
use infergate_plugins::semantic::{Embedding, Examples, Injection, prepare};
use serde::de::DeserializeOwned;

type Failure = Box<dyn Error>;

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let given = |flag: &str| -> Vec<&str> {
        arguments.windows(2).filter(|pair| pair[0] == flag).map(|pair| pair[1].as_str()).collect()
    };
    let start = Instant::now();
    prepare();
    println!("the vocabulary was ready after {:.2} ms", start.elapsed().as_secs_f64() * 1e3);
    if !given("--train").is_empty() {
        routes(&read(&given("--train"))?, &read(&given("--test"))?, given("--shots").first().unwrap_or(&"0"))?;
    }
    if !given("--difficulty").is_empty() {
        difficulty(&read(&given("--difficulty"))?);
    }
    if !given("--calibrate").is_empty() {
        calibrate(&read(&given("--calibrate"))?, given("--write").first().copied())?;
    }
    if !given("--attacks").is_empty() {
        injection(&read(&given("--attacks"))?, &given("--benign"))?;
    }
    Ok(())
}

fn read<T: DeserializeOwned>(paths: &[&str]) -> Result<Vec<T>, Failure> {
    let mut all = Vec::new();
    for path in paths {
        all.extend(rows(&std::fs::read_to_string(path)?).map_err(|why| format!("{path}: {why}"))?);
    }
    Ok(all)
}

fn routes(train: &[Row], test: &[Row], shots: &str) -> Result<(), Failure> {
    for shots in shots.split(',') {
        let shots: usize = shots.parse()?;
        let most = by_label(train).iter().map(|(_, texts)| texts.len()).max().unwrap_or(0);
        let draws = if shots == 0 || shots >= most { vec![0] } else { vec![0, (most - shots) / 2, most - shots] };
        let count = draws.len() as f64;
        let (mut accuracy, mut mean, mut area) = (0.0, 0.0, 0.0);
        for from in draws {
            let found = one(train, test, shots, from);
            accuracy += found.accuracy / count;
            mean += found.mean_accuracy / count;
            area += found.auroc.unwrap_or(f64::NAN) / count;
        }
        println!(
            "shots {shots}: accuracy {:.1} (labels alike {:.1}), AUROC {:.1}",
            accuracy * 1e2,
            mean * 1e2,
            area * 1e2
        );
    }
    Ok(())
}

fn one(train: &[Row], test: &[Row], shots: usize, from: usize) -> Evaluation {
    let mut labelled = by_label(train);
    if shots > 0 {
        labelled.iter_mut().for_each(|(_, texts)| *texts = texts.iter().skip(from).take(shots).copied().collect());
    }
    let start = Instant::now();
    let (heads, report) = Examples::of(labelled).trained();
    let trained = start.elapsed();
    let found = Evaluation::of(&heads, heads.least_likeness(), test);
    let start = Instant::now();
    let embedded: usize = test.iter().filter(|row| heads.classify(&Embedding::of(&row.text)).is_some()).count();
    println!(
        "  {} labels, trained in {:.2} s, fingerprint {:016x}, left out {:.1} %, twins {}, few {}; {} + {} rows, in scope taken \
         {:.1} %, out of scope taken {:.1} %, likeness {:.3} (95 %: {:.3}), {:.1} us a row",
        heads.labels().len(),
        trained.as_secs_f64(),
        heads.fingerprint(),
        report.accuracy() * 1e2,
        report.twins.len(),
        report.few.len(),
        found.in_scope,
        found.out_of_scope,
        found.taken.0 * 1e2,
        found.taken.1 * 1e2,
        heads.least_likeness(),
        found.suggested_likeness,
        start.elapsed().as_secs_f64() * 1e6 / embedded.max(1) as f64,
    );
    found
}

const FOLDS: usize = 5;

fn difficulty(prompts: &[Labelled]) {
    let share = |right: fn(&Labelled) -> bool| {
        prompts.iter().filter(|prompt| right(prompt)).count() as f64 * 1e2 / prompts.len() as f64
    };
    println!("{} prompts, weak {:.1}, strong {:.1}", prompts.len(), share(|p| p.weak_ok), share(|p| p.strong_ok));
    let length: Vec<f32> = prompts.iter().map(|prompt| prompt.text.len() as f32).collect();
    println!("  length only: APGR {:.3}", recovered(prompts, &length));
    if let Some(default) = Difficulty::counters_only() {
        let scores: Vec<f32> = prompts.iter().map(|prompt| default.score(&prompt.text)).collect();
        println!("  the default: APGR {:.3}", recovered(prompts, &scores));
    }
    for embedded in [false, true] {
        let name = if embedded { "embedding and counters" } else { "counters" };
        let draws = [1, 7, 13];
        let mean = draws.iter().map(|draw| recovered(prompts, &crossed(prompts, embedded, *draw))).sum::<f64>() / 3.0;
        println!("  {name}: APGR {mean:.3} ({FOLDS}-fold, mean of {} draws)", draws.len());
    }
}

/// The default, with its shares as they are in these prompts.
fn calibrate(prompts: &[Labelled], path: Option<&str>) -> Result<(), Failure> {
    let mut default = Difficulty::counters_only().ok_or("the default is broken")?;
    default.calibrate(prompts.iter().map(|prompt| prompt.text.as_str()));
    let scores: Vec<f32> = prompts.iter().map(|prompt| default.score(&prompt.text)).collect();
    println!("the default: APGR {:.3}", recovered(prompts, &scores));
    if let Some(path) = path {
        std::fs::write(path, serde_json::to_string(&default)? + "\n")?;
    }
    Ok(())
}

/// Each prompt's score from a training that did not see it.
fn crossed(prompts: &[Labelled], embedded: bool, draw: u64) -> Vec<f32> {
    let fold =
        |at: usize| ((at as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_mul(draw) >> 40) as usize % FOLDS;
    let mut scores = vec![0.0; prompts.len()];
    for out in 0..FOLDS {
        let train: Vec<Labelled> =
            (0..prompts.len()).filter(|at| fold(*at) != out).map(|at| prompts[at].clone()).collect();
        let trained = Difficulty::train(&train, embedded);
        for at in (0..prompts.len()).filter(|at| fold(*at) == out) {
            scores[at] = trained.score(&prompts[at].text);
        }
    }
    scores
}

fn injection(attacks: &[Row], benign: &[&str]) -> Result<(), Failure> {
    for (name, score) in [("score", Injection::score as fn(&str) -> f32), ("plain", Injection::plain)] {
        let high: Vec<f32> = attacks.iter().map(|row| score(&row.text)).collect();
        let above = |of: &[f32], least: f32| of.iter().filter(|x| **x > least).count() as f64 * 1e2 / of.len() as f64;
        let (strict, wide) = (Injection::ONE_IN_A_HUNDRED, Injection::MOST_ATTACKS);
        println!("{name}: {} attacks, found {:.1} % and {:.1} %", high.len(), above(&high, strict), above(&high, wide));
        let mut all = Vec::new();
        for path in benign {
            let low: Vec<f32> = read::<Row>(&[path])?.iter().map(|row| score(&row.text)).collect();
            let area = auroc(&high, &low).unwrap_or(f64::NAN);
            let (strict, wide) = (above(&low, strict), above(&low, wide));
            println!("  {path}: {} rows, AUROC {area:.3}, found {strict:.1} % and {wide:.1} %", low.len());
            all.extend(low);
        }
        all.sort_by(f32::total_cmp);
        let one = all.get(all.len() * 99 / 100).copied().unwrap_or(0.0);
        let mut sorted = high.clone();
        sorted.sort_by(f32::total_cmp);
        let most = sorted.get(sorted.len() / 20).copied().unwrap_or(0.0);
        println!(
            "  all: AUROC {:.3}; at 1 % false, {:.1} % found (above {one:.2}); at 95 % found, {:.1} % false (above {most:.2})",
            auroc(&high, &all).unwrap_or(f64::NAN),
            above(&high, one),
            above(&all, most),
        );
    }
    Ok(())
}
