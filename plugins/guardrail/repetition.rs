//! Repetition: a model that says the same again and again is cut off.

use std::sync::Arc;

use schemars::JsonSchema;
use serde::Deserialize;

use super::stream::{Finder, Found, Search, Window};
use super::{Detector, Wrong};

/// The same piece of text, again and again without anything between.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(rename = "Repetition")]
pub struct Config {
    /// So many times in a row are too many.
    #[schemars(range(min = 3, max = 10_000))]
    pub times: u64,
    /// The longest piece, in bytes.
    #[schemars(range(min = 1, max = 2_000))]
    pub piece_bytes_max: usize,
    /// All of it together must be so long, in bytes: a ruler or a row of dots is no loop.
    #[schemars(range(min = 16, max = 1_000_000))]
    pub bytes_min: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self { times: 8, piece_bytes_max: 400, bytes_min: 400 }
    }
}

pub(super) fn build(config: &Config, rule: usize) -> Result<Detector, Vec<Wrong>> {
    let mut wrong = Vec::new();
    let mut within = |path: &str, fits: bool, bounds: &str| {
        if !fits {
            wrong.push((path.to_owned(), format!("it must be {bounds}")));
        }
    };
    within(".times", (3..=10_000).contains(&config.times), "3 to 10000");
    within(".piece_bytes_max", (1..=2_000).contains(&config.piece_bytes_max), "1 to 2000");
    within(".bytes_min", (16..=1_000_000).contains(&config.bytes_min), "16 to 1000000");
    if wrong.is_empty() { Ok(Detector::Own(vec![Arc::new(Loops { config: *config, rule })])) } else { Err(wrong) }
}

#[derive(Debug)]
struct Loops {
    config: Config,
    rule: usize,
}

/// A piece is recognised again by so many bytes.
const GRAM: usize = 8;
const SLOTS: usize = 1024;

impl Finder for Loops {
    fn begin(self: Arc<Self>) -> Box<dyn Search> {
        let ring = vec![0; (self.config.piece_bytes_max + GRAM).next_power_of_two()];
        Box::new(Following {
            loops: self,
            ring,
            seen: Box::new([u64::MAX; SLOTS]),
            gram: 0,
            at: 0,
            distance: 0,
            run: 0,
        })
    }

    fn hold_max(&self) -> usize {
        0
    }
}

/// Follows one text byte by byte: is the byte the same as the one a piece's length before?
struct Following {
    loops: Arc<Loops>,
    /// The last bytes.
    ring: Vec<u8>,
    /// Where a gram was seen last.
    seen: Box<[u64; SLOTS]>,
    /// The last bytes as a number.
    gram: u64,
    at: u64,
    /// The length of the piece that is being followed; 0 if none.
    distance: u64,
    /// How many bytes were the same as those a piece before.
    run: u64,
}

impl Search for Following {
    fn advance(&mut self, window: &Window<'_>, found: &mut Vec<Found>) -> u64 {
        let from = (self.at - window.base) as usize;
        for (index, byte) in window.text.as_bytes()[from..].iter().enumerate() {
            if self.loops_with(*byte) {
                // The letter that this byte belongs to; a match is never a part of one.
                let start = window.text.floor_char_boundary(from + index);
                let end = window.text.ceil_char_boundary(from + index + 1);
                let range = window.base + start as u64..window.base + end as u64;
                found.push(Found { rule: self.loops.rule, label: "repetition".into(), range });
            }
        }
        self.at
    }
}

impl Following {
    /// Takes a byte; whether it completes a loop.
    fn loops_with(&mut self, byte: u8) -> bool {
        let mask = self.ring.len() - 1;
        let before = |distance: u64| self.ring[(self.at.wrapping_sub(distance)) as usize & mask];
        if self.distance > 0 && before(self.distance) == byte {
            self.run += 1;
        } else {
            (self.distance, self.run) = (0, 0);
        }
        self.ring[self.at as usize & mask] = byte;
        self.gram = self.gram << 8 | u64::from(byte);
        self.at += 1;
        let slot = &mut self.seen[(self.gram.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 54) as usize];
        let last = std::mem::replace(slot, self.at);
        if self.distance == 0 && self.at >= GRAM as u64 {
            let distance = self.at.wrapping_sub(last);
            if distance <= self.loops.config.piece_bytes_max as u64 {
                // A wrong guess (two grams in one slot) ends with the next byte that differs.
                self.distance = distance;
            }
        }
        self.is_too_much()
    }

    fn is_too_much(&mut self) -> bool {
        let Config { times, bytes_min, .. } = self.loops.config;
        let all = self.run + self.distance;
        let too_much = self.distance > 0 && all >= times * self.distance && all >= bytes_min;
        if too_much {
            (self.distance, self.run) = (0, 0);
        }
        too_much
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{built, judged, same_however_cut};

    const RULES: &str = r#"[{"name":"r","in":["answer.content"],"verdict":"block",
        "repetition":{"times":4,"piece_bytes_max":40,"bytes_min":32}}]"#;

    #[test]
    fn a_loop_is_cut_and_prose_is_not() {
        let text = format!("So I say: {}", "again and again, ".repeat(30));
        let (out, progress) = judged(RULES, "answer.content", &text);
        assert_eq!(progress.blocked, Some(0));
        assert!(out.len() < 10 + 17 * 6, "{out}");
        let rhyme =
            "Row, row, row your boat, gently down the stream. Merrily, merrily, merrily, merrily, life is a dream.";
        assert_eq!(judged(RULES, "answer.content", rhyme).1.blocked, None);
    }

    #[test]
    fn a_list_whose_lines_differ_is_no_loop() {
        let list: String = (10..60).map(|n| format!("item {n} is fine, ")).collect();
        assert_eq!(judged(RULES, "answer.content", &list).1.blocked, None);
    }

    #[test]
    fn where_it_is_cut_does_not_depend_on_the_pieces() {
        let text = format!("a {}", "né, non! ".repeat(9));
        assert!(judged(RULES, "answer.content", &text).1.blocked.is_some());
        same_however_cut(RULES, "answer.content", &text);
    }

    #[test]
    fn a_row_of_stars_is_no_loop_until_it_is_long() {
        assert_eq!(judged(RULES, "answer.content", &"*".repeat(31)).1.blocked, None);
        assert_eq!(judged(RULES, "answer.content", &"*".repeat(60)).1.blocked, Some(0));
    }

    #[test]
    fn bounds_are_checked() {
        let wrong = built(r#"[{"name":"r","in":["answer.content"],"verdict":"block","repetition":{"times":1}}]"#);
        assert_eq!(wrong.unwrap_err()[0].0, "[0].repetition.times");
    }
}
