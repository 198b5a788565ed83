//! Check digits, and words that stand before something.

use std::sync::OnceLock;

use super::super::marks::{Table, places};
use super::super::triggers::ByteSet;
use super::Candidate;

/// The digits of a text as numbers.
pub fn digits(text: &str) -> Vec<u8> {
    text.bytes().filter(u8::is_ascii_digit).map(|byte| byte - b'0').collect()
}

/// The check digit of cards and of some identity numbers (ISO/IEC 7812).
pub fn luhn(number: &[u8]) -> bool {
    let doubled = |digit: u8| if digit > 4 { digit * 2 - 9 } else { digit * 2 };
    let value = |(place, digit): (usize, &u8)| u32::from(if place % 2 == 1 { doubled(*digit) } else { *digit });
    number.iter().rev().enumerate().map(value).sum::<u32>() % 10 == 0
}

/// The check digits of accounts (ISO 7064, MOD 97-10; the first four signs count last).
pub fn mod97(account: &str) -> bool {
    let signs: Vec<u8> = account.bytes().filter(u8::is_ascii_alphanumeric).collect();
    let Some((head, rest)) = signs.split_at_checked(4) else { return false };
    let step = |all: u32, byte: &u8| match byte {
        b'0'..=b'9' => (all * 10 + u32::from(byte - b'0')) % 97,
        _ => (all * 100 + u32::from(byte.to_ascii_uppercase() - b'A') + 10) % 97,
    };
    rest.iter().chain(head).fold(0, step) == 1
}

/// The sum of the digits, each times its weight.
pub fn weighted(number: &[u8], weights: &[u32]) -> u32 {
    number.iter().zip(weights).map(|(digit, weight)| u32::from(*digit) * weight).sum()
}

/// A number's value; none of ours has more digits than fit.
pub fn value(number: &[u8]) -> u64 {
    number.iter().fold(0u64, |all, digit| all.wrapping_mul(10).wrapping_add(u64::from(*digit)))
}

/// The check digit of Aadhaar numbers: multiplication in the dihedral group of ten elements (Verhoeff).
pub fn verhoeff(number: &[u8]) -> bool {
    const TIMES: [&[u8; 10]; 10] = [
        b"0123456789",
        b"1234067895",
        b"2340178956",
        b"3401289567",
        b"4012395678",
        b"5987604321",
        b"6598710432",
        b"7659821043",
        b"8765932104",
        b"9876543210",
    ];
    const TURN: [&[u8; 10]; 8] = [
        b"0123456789",
        b"1576283094",
        b"5803796142",
        b"8916043527",
        b"9453126870",
        b"4286573901",
        b"2793806415",
        b"7046913258",
    ];
    let at = |table: &[u8; 10], index: u8| table.get(usize::from(index)).map_or(0, |byte| byte - b'0');
    let step = |all: u8, (place, digit): (usize, &u8)| at(TIMES[usize::from(all % 10)], at(TURN[place % 8], *digit));
    number.iter().rev().enumerate().fold(0, step) == 0
}

/// A check digit of ISO 7064, MOD 11,10.
pub fn mod11_10(number: &[u8]) -> bool {
    let Some((check, body)) = number.split_last() else { return false };
    let step = |product: u32, digit: &u8| {
        let sum = (u32::from(*digit) + product) % 10;
        (if sum == 0 { 10 } else { sum }) * 2 % 11
    };
    (11 - body.iter().fold(10, step)) % 10 == u32::from(*check)
}

/// Words that stand before something, in either case.
pub struct Before {
    words: &'static [&'static str],
    /// The bytes that they begin with.
    firsts: OnceLock<Table>,
}

impl Before {
    /// Words of a list, in lower case.
    pub const fn new(words: &'static [&'static str]) -> Self {
        Self { words, firsts: OnceLock::new() }
    }

    /// Whether one of them begins within the last `within` bytes of what is before, at most 64.
    pub fn stands(&self, before: &str, within: usize) -> bool {
        let near = near(before, within);
        let mut places = places(near.as_bytes(), self.firsts.get_or_init(|| firsts(self.words)));
        while places != 0 {
            if one_begins(near, places.trailing_zeros() as usize, self.words) {
                return true;
            }
            places &= places - 1;
        }
        false
    }
}

fn firsts(words: &[&str]) -> Table {
    let mut set = ByteSet::EMPTY;
    for first in words.iter().filter_map(|word| word.as_bytes().first()) {
        set.add(first.to_ascii_lowercase());
        set.add(first.to_ascii_uppercase());
    }
    Table::new(&set)
}

/// Whether one of a few words begins within the last `within` bytes before the match.
pub fn context(candidate: &Candidate<'_>, words: &[&str], within: usize) -> bool {
    let near = near(candidate.before(), within);
    (0..near.len()).any(|at| one_begins(near, at, words))
}

fn near(before: &str, within: usize) -> &str {
    &before[before.ceil_char_boundary(before.len().saturating_sub(within))..]
}

fn one_begins(text: &str, at: usize, words: &[&str]) -> bool {
    let here = |word: &&str| {
        text.as_bytes().get(at..at + word.len()).is_some_and(|bytes| bytes.eq_ignore_ascii_case(word.as_bytes()))
    };
    begins_a_word(text, at) && words.iter().any(here)
}

fn begins_a_word(text: &str, at: usize) -> bool {
    text.get(..at).is_some_and(|before| !before.chars().next_back().is_some_and(char::is_alphabetic))
}
