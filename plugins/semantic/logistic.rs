//! Multinomial logistic regression, trained to the same bits on every run and every machine.
//!
//! One thread, sums in a fixed order, only additions, multiplications, divisions and square roots, which IEEE 754
//! rounds in one way: the exponential and the logarithm are our own, since every libm has another last bit. Training is
//! L-BFGS from zero: no random numbers and no learning rate.

use std::collections::VecDeque;

/// What is fitted: `features` of `width` numbers each, one row an example; the class of each; the strength of the
/// examples against keeping weights small (scikit-learn's `C`).
pub(crate) struct Regression<'a> {
    /// The examples' numbers, row by row.
    pub(crate) features: &'a [f32],
    /// How many of them are one example's.
    pub(crate) width: usize,
    /// Each example's class.
    pub(crate) classes: &'a [usize],
    /// How many classes there are.
    pub(crate) count: usize,
    /// `C`.
    pub(crate) strength: f64,
}

const MEMORY: usize = 10;
const MOST_STEPS: usize = 200;

/// How steep the slope may be where training ends, for each example.
const TOLERANCE: f64 = 5e-6;

impl Regression<'_> {
    /// The weights, class by class. There is no constant: give a feature that is always 1 for one.
    pub(crate) fn fit(&self) -> Vec<f32> {
        let mut point = Point::at(self, vec![0.0; self.count * self.width]);
        let mut history = VecDeque::with_capacity(MEMORY);
        let flat = TOLERANCE * self.strength * self.classes.len() as f64;
        for _ in 0..MOST_STEPS {
            if largest(&point.slope) <= flat {
                break;
            }
            let Some(next) = self.step(&point, &direction(&point.slope, &history)) else { break };
            remember(&mut history, &point, &next);
            point = next;
        }
        point.weights.iter().map(|weight| *weight as f32).collect()
    }

    /// The next point along `direction`: lower by a part of what the slope promises, and less steep (Wolfe's
    /// conditions, by bisection).
    fn step(&self, from: &Point, direction: &[f64]) -> Option<Point> {
        let promised = inner(&from.slope, direction);
        let (mut low, mut high, mut length) = (0.0, f64::INFINITY, 1.0);
        let mut best = None;
        for _ in 0..40 {
            let to = from.weights.iter().zip(direction).map(|(weight, d)| weight + length * d).collect();
            let to = Point::at(self, to);
            if to.value > from.value + 1e-4 * length * promised {
                high = length;
            } else if inner(&to.slope, direction) < 0.9 * promised {
                (low, best) = (length, Some(to));
            } else {
                return Some(to);
            }
            length = if high.is_finite() { 0.5 * (low + high) } else { 2.0 * low };
        }
        best
    }

    /// The loss, and its slope into `slope`.
    fn loss(&self, weights: &[f64], slope: &mut [f64]) -> f64 {
        let mut loss = 0.0;
        let (mut shares, mut row) = (vec![0.0; self.count], vec![0.0; self.width]);
        for (features, class) in self.features.chunks_exact(self.width).zip(self.classes) {
            row.iter_mut().zip(features).for_each(|(x, feature)| *x = f64::from(*feature));
            for (share, weights) in shares.iter_mut().zip(weights.chunks_exact(self.width)) {
                *share = inner(weights, &row);
            }
            loss += normalise(&mut shares, *class);
            shares[*class] -= 1.0;
            for (share, slope) in shares.iter().zip(slope.chunks_exact_mut(self.width)) {
                add_scaled(slope, *share, &row);
            }
        }
        loss
    }
}

/// Logits into shares that sum to one; the loss of `class`.
fn normalise(logits: &mut [f64], class: usize) -> f64 {
    let most = logits.iter().fold(f64::NEG_INFINITY, |most, x| most.max(*x));
    let own = logits[class] - most;
    let mut sum = 0.0;
    for logit in logits.iter_mut() {
        *logit = exp(*logit - most);
        sum += *logit;
    }
    logits.iter_mut().for_each(|share| *share /= sum);
    ln(sum) - own
}

struct Point {
    weights: Vec<f64>,
    value: f64,
    slope: Vec<f64>,
}

impl Point {
    fn at(regression: &Regression<'_>, weights: Vec<f64>) -> Self {
        let mut slope = vec![0.0; weights.len()];
        let loss = regression.loss(&weights, &mut slope);
        for (slope, weight) in slope.iter_mut().zip(&weights) {
            *slope = regression.strength * *slope + weight;
        }
        let value = regression.strength * loss + 0.5 * inner(&weights, &weights);
        Self { weights, value, slope }
    }
}

/// A step that was made, and how the slope changed with it.
struct Past {
    step: Vec<f64>,
    change: Vec<f64>,
    curvature: f64,
}

fn remember(history: &mut VecDeque<Past>, from: &Point, to: &Point) {
    let difference = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a - b).collect::<Vec<_>>();
    let (step, change) = (difference(&to.weights, &from.weights), difference(&to.slope, &from.slope));
    let curvature = inner(&step, &change);
    if curvature <= 1e-12 {
        return;
    }
    if history.len() == MEMORY {
        history.pop_front();
    }
    history.push_back(Past { step, change, curvature });
}

/// Downhill, bent by what the last steps told of the curvature (Nocedal and Wright, algorithm 7.4).
fn direction(slope: &[f64], history: &VecDeque<Past>) -> Vec<f64> {
    let mut way: Vec<f64> = slope.iter().map(|x| -x).collect();
    let mut shares = [0.0; MEMORY];
    for (past, share) in history.iter().zip(&mut shares).rev() {
        *share = inner(&past.step, &way) / past.curvature;
        add_scaled(&mut way, -*share, &past.change);
    }
    let scale = match history.back() {
        Some(past) => past.curvature / inner(&past.change, &past.change),
        None => 1.0 / inner(slope, slope).sqrt().max(1.0),
    };
    way.iter_mut().for_each(|x| *x *= scale);
    for (past, share) in history.iter().zip(&shares) {
        let back = inner(&past.change, &way) / past.curvature;
        add_scaled(&mut way, *share - back, &past.step);
    }
    way
}

fn add_scaled(to: &mut [f64], by: f64, what: &[f64]) {
    to.iter_mut().zip(what).for_each(|(to, x)| *to += by * x);
}

fn inner(a: &[f64], b: &[f64]) -> f64 {
    let mut lanes = [0.0; 8];
    let ((a, last_a), (b, last_b)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    for (a, b) in a.iter().zip(b) {
        for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += a * b;
        }
    }
    lanes.iter().sum::<f64>() + last_a.iter().zip(last_b).map(|(a, b)| a * b).sum::<f64>()
}

fn largest(slope: &[f64]) -> f64 {
    slope.iter().fold(0.0, |most: f64, x| most.max(x.abs()))
}

/// `e` to the power of `x`: `x = k ln 2 + r`, the series of `e^r`, and `k` into the exponent.
pub(crate) fn exp(x: f64) -> f64 {
    if x < -700.0 {
        return 0.0;
    }
    let x = x.min(700.0);
    let k = (x * std::f64::consts::LOG2_E).round();
    let r = (x - k * 6.931_471_803_691_238e-1) - k * 1.908_214_929_270_587_7e-10;
    let series = (1..=13).rev().fold(1.0, |sum, n| 1.0 + sum * r / f64::from(n));
    series * f64::from_bits(((1023 + k as i64) as u64) << 52)
}

/// The natural logarithm of a positive number: `x = m 2^k` with `m` near 1, and the series of the area tangent.
pub(crate) fn ln(x: f64) -> f64 {
    if x < f64::MIN_POSITIVE {
        return -708.0;
    }
    let bits = x.to_bits();
    let (mut k, mut m) = ((bits >> 52) as i64 - 1023, f64::from_bits(bits & 0x000F_FFFF_FFFF_FFFF | 1023 << 52));
    if m > std::f64::consts::SQRT_2 {
        (k, m) = (k + 1, m * 0.5);
    }
    let s = (m - 1.0) / (m + 1.0);
    let square = s * s;
    let series = (0..=11).rev().fold(0.0, |sum, n| 1.0 / f64::from(2 * n + 1) + sum * square);
    k as f64 * std::f64::consts::LN_2 + 2.0 * s * series
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_exponential_and_logarithm_are_right() {
        for n in -7000..7000 {
            let x = f64::from(n) * 0.1 + 0.0137;
            assert!((exp(x.min(699.0)) / x.min(699.0).exp() - 1.0).abs() < 1e-14, "{x}");
            let y = exp(x.min(699.0));
            if y > 0.0 {
                assert!((ln(y) - y.ln()).abs() < 1e-13 * (1.0 + y.ln().abs()), "{y}");
            }
        }
        assert_eq!((exp(0.0), exp(-1e9), ln(1.0)), (1.0, 0.0, 0.0));
        assert!(exp(f64::INFINITY).is_finite() && ln(0.0).is_finite());
    }

    /// Three classes around three corners, in four dimensions of which one is always 1.
    fn examples() -> (Vec<f32>, Vec<usize>) {
        let mut seed = 7_u32;
        let mut noise = move || {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (seed >> 8) as f32 / (1 << 24) as f32 - 0.5
        };
        let mut features = Vec::new();
        let classes: Vec<usize> = (0..60).map(|n| n % 3).collect();
        for class in &classes {
            let corner = |n: usize| if n == *class { 1.0 } else { 0.0 };
            features.extend([corner(0) + noise(), corner(1) + noise(), corner(2) + noise(), 1.0]);
        }
        (features, classes)
    }

    #[test]
    fn where_training_ends_the_slope_is_flat_and_nothing_near_is_lower() {
        let (features, classes) = examples();
        let regression = Regression { features: &features, width: 4, classes: &classes, count: 3, strength: 20.0 };
        let fitted: Vec<f64> = regression.fit().iter().map(|weight| f64::from(*weight)).collect();
        let end = Point::at(&regression, fitted.clone());
        assert!(largest(&end.slope) < 1e-2, "{}", largest(&end.slope));
        for at in 0..fitted.len() {
            for by in [-0.05, 0.05] {
                let mut moved = fitted.clone();
                moved[at] += by;
                assert!(Point::at(&regression, moved).value > end.value);
            }
        }
    }

    #[test]
    fn the_slope_is_the_loss_change() {
        let (features, classes) = examples();
        let regression = Regression { features: &features, width: 4, classes: &classes, count: 3, strength: 2.0 };
        let start: Vec<f64> = (0..12).map(|n| f64::from(n) * 0.1 - 0.5).collect();
        let here = Point::at(&regression, start.clone());
        for at in 0..12 {
            let mut there = start.clone();
            there[at] += 1e-6;
            let change = (Point::at(&regression, there).value - here.value) / 1e-6;
            assert!((change - here.slope[at]).abs() < 1e-3, "{change} {}", here.slope[at]);
        }
    }
}
