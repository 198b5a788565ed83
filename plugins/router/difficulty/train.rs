//! Training a difficulty score on labelled prompts, with figures that say what it is worth: each prompt is scored by a
//! training that has seen neither it nor its like.

use super::{Difficulty, Labelled};
use crate::router::evaluation::auroc;

/// So many prompts are the least that anything can be learned from.
const LEAST: usize = 40;
/// With fewer than these the figures say little.
pub const ENOUGH: usize = 1500;
/// Parts of which each is left out once.
const FOLDS: usize = 5;

/// A score, and what it was worth on prompts that it had not seen.
#[derive(Clone, Debug, PartialEq)]
pub struct Training {
    /// Trained on all prompts.
    pub difficulty: Difficulty,
    /// How many there were.
    pub prompts: usize,
    /// The share of them that each model gets right.
    pub right: (f64, f64),
    /// How well it did.
    pub held_out: Figures,
    /// How well the length alone does.
    pub by_length: Figures,
    /// One standard deviation of the recovered share of an order by chance.
    pub chance: f64,
    /// The score from which on the strong model answers.
    pub threshold: f32,
    /// What that comes to on prompts not seen: the share that is the strong model's, and how many answers are right then.
    pub at_threshold: (f64, f64),
}

/// How well scores order prompts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Figures {
    /// How often a prompt that only the strong model gets right scores above another one; chance is 0.5.
    pub auroc: f64,
    /// The mean share of the quality gap that is recovered, over every share of strong calls (RouteLLM's APGR); chance is
    /// 0.5.
    pub recovered: f64,
}

impl Training {
    /// Trains on prompts, and by their embedding as well where `embedded`; calibrated for `share` of strong calls. Always
    /// the same for the same prompts in the same order.
    pub fn of(prompts: &[Labelled], embedded: bool, share: f32) -> Result<Self, String> {
        suffices(prompts)?;
        let count = |right: fn(&Labelled) -> bool| prompts.iter().filter(|prompt| right(prompt)).count() as f64;
        let all = prompts.len() as f64;
        let (scores, strong) = crossed(prompts, embedded, share);
        let length: Vec<f32> = prompts.iter().map(|prompt| prompt.text.len() as f32).collect();
        let is_right = |(prompt, strong): (&Labelled, &bool)| if *strong { prompt.strong_ok } else { prompt.weak_ok };
        let right = prompts.iter().zip(&strong).filter(|pair| is_right(*pair)).count() as f64;
        let difficulty = Difficulty::train(prompts, embedded);
        Ok(Self {
            prompts: prompts.len(),
            right: (count(|prompt| prompt.weak_ok) / all, count(|prompt| prompt.strong_ok) / all),
            held_out: Figures::of(prompts, &scores),
            by_length: Figures::of(prompts, &length),
            chance: chance(prompts),
            threshold: difficulty.threshold(share),
            at_threshold: (strong.iter().filter(|strong| **strong).count() as f64 / all, right / all),
            difficulty,
        })
    }
}

impl Figures {
    fn of(prompts: &[Labelled], scores: &[f32]) -> Self {
        let of = |helps: bool| -> Vec<f32> {
            let both = prompts.iter().zip(scores).filter(|(prompt, _)| (gain(prompt) > 0.0) == helps);
            both.map(|(_, score)| *score).collect()
        };
        Self { auroc: auroc(&of(true), &of(false)).unwrap_or(0.5), recovered: recovered(prompts, scores) }
    }
}

fn suffices(prompts: &[Labelled]) -> Result<(), String> {
    let count = |gained: f64| prompts.iter().filter(|prompt| gain(prompt) == gained).count();
    let (helps, same, harms) = (count(1.0), count(0.0), count(-1.0));
    if prompts.len() < LEAST {
        return Err(format!(
            "{} prompts are too few: label {LEAST} at least, and {ENOUGH} to rely on it",
            prompts.len()
        ));
    }
    if helps <= harms {
        let told = format!("only the strong model is right on {helps} prompts, only the weak one on {harms}");
        return Err(format!("{told}: there is nothing to gain from the strong model"));
    }
    if same + harms == 0 {
        return Err("only the strong model is ever right: there is nothing to tell apart".to_owned());
    }
    Ok(())
}

/// What the strong model gains on a prompt.
fn gain(prompt: &Labelled) -> f64 {
    f64::from(prompt.strong_ok) - f64::from(prompt.weak_ok)
}

/// Each prompt's score from a training that did not see it, and whether it would have been the strong model's by that
/// training's threshold.
fn crossed(prompts: &[Labelled], embedded: bool, share: f32) -> (Vec<f32>, Vec<bool>) {
    let folds: Vec<usize> = prompts.iter().map(|prompt| fold(&prompt.text)).collect();
    let (mut scores, mut strong) = (vec![0.0; prompts.len()], vec![false; prompts.len()]);
    for out in 0..FOLDS {
        let seen = prompts.iter().zip(&folds).filter(|(_, fold)| **fold != out).map(|(prompt, _)| prompt.clone());
        let trained = Difficulty::train(&seen.collect::<Vec<_>>(), embedded);
        let threshold = trained.threshold(share);
        for at in (0..prompts.len()).filter(|at| folds[*at] == out) {
            scores[at] = trained.score(&prompts[at].text);
            strong[at] = scores[at] >= threshold;
        }
    }
    (scores, strong)
}

/// The part that a prompt is in: the same for what reads the same but for case, digits and spaces, so that no copy of a
/// prompt is trained on while it is left out.
fn fold(text: &str) -> usize {
    let letters = text.bytes().filter(u8::is_ascii_alphabetic).map(|byte| byte.to_ascii_lowercase());
    let hash =
        letters.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    (hash.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40) as usize % FOLDS
}

/// The mean share of the quality gap that is recovered, over every share of strong calls (RouteLLM's APGR).
pub fn recovered(prompts: &[Labelled], scores: &[f32]) -> f64 {
    let mut order: Vec<usize> = (0..prompts.len()).collect();
    order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
    let (mut so_far, mut area) = (0.0, 0.0);
    for gain in order.iter().map(|at| gain(&prompts[*at])) {
        area += so_far + gain / 2.0;
        so_far += gain;
    }
    area / prompts.len() as f64 / so_far
}

/// How far the recovered share of an order by chance is from a half, by its standard deviation: each gain stands at a
/// place drawn without putting back.
fn chance(prompts: &[Labelled]) -> f64 {
    let n = prompts.len() as f64;
    let sum: f64 = prompts.iter().map(gain).sum();
    let variance = prompts.iter().map(|prompt| (gain(prompt) - sum / n).powi(2)).sum::<f64>() / (n - 1.0);
    // The places' weights (n - i - 1/2) / n have the variance (n² - 1) / 12 n².
    let of_places = (n * n - 1.0) / 12.0 / (n * n);
    (variance * of_places * n).sqrt() / sum.abs()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Prompts of which the weak model gets the long ones wrong.
    fn labelled(count: usize) -> Vec<Labelled> {
        let word = |n: usize| ["apple", "river", "stone", "cloud", "paper", "horse", "table"][n % 7].repeat(1 + n % 5);
        let prompt = |n: usize| {
            let hard = n.is_multiple_of(3);
            let text = if hard {
                format!("Prove that {} = {n} + 1, and explain why, {}", word(n), word(n / 7))
            } else {
                format!("Say {} {}", word(n), word(n / 7))
            };
            Labelled { text, weak_ok: !hard, strong_ok: true }
        };
        (0..count).map(prompt).collect()
    }

    #[test]
    fn the_same_prompts_give_the_same_score_bit_by_bit() {
        let (one, two) = (Training::of(&labelled(80), true, 0.3), Training::of(&labelled(80), true, 0.3));
        let json = |training: &Training| serde_json::to_string(&training.difficulty).unwrap();
        let (one, two) = (one.unwrap(), two.unwrap());
        assert_eq!((json(&one), &one), (json(&two), &two));
        assert_eq!(Difficulty::read(&json(&one)), Ok(one.difficulty));
    }

    #[test]
    fn what_can_be_told_is_told_on_prompts_not_seen_and_the_share_is_kept() {
        let found = Training::of(&labelled(300), false, 0.3).unwrap();
        assert!(found.held_out.auroc > 0.9 && found.held_out.recovered > 0.75, "{found:?}");
        let (share, right) = found.at_threshold;
        assert!((0.2..0.4).contains(&share) && right > 0.9, "{found:?}");
        assert!((found.right.0 - 2.0 / 3.0).abs() < 0.01 && found.right.1 == 1.0);
        assert_eq!(found.threshold, found.difficulty.threshold(0.3));
    }

    #[test]
    fn what_cannot_be_told_is_not_said_to_be() {
        // Which are hard has nothing to do with their texts.
        let chance = |n: usize| (n as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 60 < 4;
        let prompts = labelled(400).into_iter().enumerate();
        let prompts = prompts.map(|(n, prompt)| Labelled { weak_ok: !chance(n), ..prompt }).collect::<Vec<_>>();
        let found = Training::of(&prompts, true, 0.5).unwrap();
        assert!((found.held_out.recovered - 0.5).abs() < 4.0 * found.chance, "{found:?}");
        assert!((found.held_out.auroc - 0.5).abs() < 0.15, "{found:?}");
    }

    #[test]
    fn copies_of_a_prompt_are_left_out_together() {
        assert_eq!(fold("What is 2 + 2?"), fold("what is 17+3"));
        let folds: std::collections::BTreeSet<usize> = labelled(100).iter().map(|one| fold(&one.text)).collect();
        assert_eq!(folds.len(), FOLDS);
    }

    #[test]
    fn an_order_by_chance_is_as_far_off_as_is_said() {
        let prompts = labelled(200);
        let mut state = 7_u64;
        let mut draw = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32
        };
        let draws: Vec<f64> =
            (0..400).map(|_| recovered(&prompts, &(0..200).map(|_| draw()).collect::<Vec<_>>())).collect();
        let deviation = (draws.iter().map(|one| (one - 0.5).powi(2)).sum::<f64>() / 400.0).sqrt();
        assert!((deviation / chance(&prompts) - 1.0).abs() < 0.15, "{deviation} {}", chance(&prompts));
    }

    #[test]
    fn too_little_and_nothing_to_gain_is_said() {
        assert!(Training::of(&labelled(9), false, 0.5).unwrap_err().contains("9 prompts are too few"));
        let same: Vec<Labelled> = labelled(60).into_iter().map(|one| Labelled { weak_ok: true, ..one }).collect();
        assert!(Training::of(&same, false, 0.5).unwrap_err().contains("nothing to gain"));
        let hard = |one| Labelled { weak_ok: false, strong_ok: true, ..one };
        let hard: Vec<Labelled> = labelled(60).into_iter().map(hard).collect();
        assert!(Training::of(&hard, false, 0.5).unwrap_err().contains("nothing to tell apart"));
    }
}
