//! Identity numbers, country by country. Those without a check digit of their own need a word before them.

use schemars::JsonSchema;
use serde::Deserialize;

use super::checks::{context, digits, luhn, mod11_10, value, verhoeff, weighted};
use super::{Candidate, Entity, Ruling, glued_before};

/// A country, and what is looked for there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize, JsonSchema)]
#[schemars(rename = "PiiCountry")]
#[serde(rename_all = "lowercase")]
pub enum Country {
    /// Australia: tax file numbers.
    Au,
    /// Belgium: national register numbers.
    Be,
    /// Brazil: CPF.
    Br,
    /// Canada: social insurance numbers.
    Ca,
    /// Switzerland: AHV numbers.
    Ch,
    /// Germany: tax numbers, identity cards and passports.
    De,
    /// Spain: DNI and NIE.
    Es,
    /// France: numéro de sécurité sociale.
    Fr,
    /// Great Britain: national insurance and NHS numbers, passports.
    Gb,
    /// India: Aadhaar and PAN.
    In,
    /// Italy: codice fiscale.
    It,
    /// The Netherlands: burgerservicenummer.
    Nl,
    /// Poland: PESEL.
    Pl,
    /// Sweden: personnummer.
    Se,
    /// The United States: social security numbers and passports.
    Us,
}

macro_rules! entities {
    ($($label:literal $expression:literal $check:expr;)*) => {
        &[$(Entity { label: $label, expression: $expression, check: $check }),*]
    };
}

impl Country {
    pub(super) fn entities(self) -> &'static [Entity] {
        match self {
            Self::Au => entities! {
                "au_tfn" r"\b[0-9]{3} ?[0-9]{3} ?[0-9]{3}\b" |c| said(c, &["tfn", "tax file"], |n| weighted(n, &[1, 4, 3, 7, 5, 8, 6, 9, 10]).is_multiple_of(11));
            },
            Self::Be => entities! {
                "be_nrn" r"\b[0-9]{2}\.[0-9]{2}\.[0-9]{2}-[0-9]{3}\.[0-9]{2}\b" |c| checked(c, belgian);
            },
            Self::Br => entities! {
                "br_cpf" r"\b[0-9]{3}\.[0-9]{3}\.[0-9]{3}-[0-9]{2}\b" |c| checked(c, cpf);
                "br_cpf" r"\b[0-9]{11}\b" |c| said(c, &["cpf"], cpf);
            },
            Self::Ca => entities! {
                "ca_sin" r"\b[1-9][0-9]{2}[- ][0-9]{3}[- ][0-9]{3}\b" |c| checked(c, luhn);
                "ca_sin" r"\b[1-9][0-9]{8}\b" |c| said(c, &["sin", "social insurance"], luhn);
            },
            Self::Ch => entities! {
                "ch_ahv" r"\b756\.?[0-9]{4}\.?[0-9]{4}\.?[0-9]{2}\b" |c| checked(c, |n| weighted(n, &[1, 3, 1, 3, 1, 3, 1, 3, 1, 3, 1, 3, 1]).is_multiple_of(10));
            },
            Self::De => entities! {
                "de_tax_id" r"\b[1-9][0-9] ?[0-9]{3} ?[0-9]{3} ?[0-9]{3}\b" |c| said(c, &["steuer", "tax", "tin", "idnr", "id-nr"], mod11_10);
                "de_id" r"(?i)\b[cfghjklmnprtvwxyz][cfghjklmnprtvwxyz0-9]{8}[0-9]?d?\b" |c| near(c, &["passport", "reisepass", "pass", "ausweis", "personalausweis", "identity card", "id card"]);
            },
            Self::Es => entities! {
                "es_id" r"(?i)\b(?:[0-9]{8}|[xyz]-?[0-9]{7})-?[a-z]\b" spanish;
            },
            Self::Fr => entities! {
                "fr_nir" r"\b[12] ?[0-9]{2} ?(?:0[1-9]|1[0-2]) ?[0-9]{2} ?[0-9]{3} ?[0-9]{3} ?[0-9]{2}\b" |c| checked(c, |n| n.len() == 15 && 97 - value(&n[..13]) % 97 == value(&n[13..]));
            },
            Self::Gb => entities! {
                "gb_nino" r"(?i)\b[a-ceghj-prstw-z][a-ceghj-npr-tw-z] ?[0-9]{2} ?[0-9]{2} ?[0-9]{2} ?[a-d]\b" british;
                "gb_nhs" r"\b[0-9]{3}[ -]?[0-9]{3}[ -]?[0-9]{4}\b" |c| said(c, &["nhs"], |n| weighted(n, &[10, 9, 8, 7, 6, 5, 4, 3, 2, 1]).is_multiple_of(11));
                "gb_passport" r"\b[0-9]{9}\b" |c| near(c, &["passport"]);
            },
            Self::In => entities! {
                "in_aadhaar" r"\b[2-9][0-9]{3}[ -][0-9]{4}[ -][0-9]{4}\b" |c| checked(c, verhoeff);
                "in_aadhaar" r"\b[2-9][0-9]{11}\b" |c| said(c, &["aadhaar", "aadhar", "uidai"], verhoeff);
                "in_pan" r"\b[A-Z]{3}[ABCFGHJLPT][A-Z][0-9]{4}[A-Z]\b" |c| c.yes();
            },
            Self::It => entities! {
                "it_fiscal_code" r"(?i)\b[a-z]{6}[0-9]{2}[a-ehlmprst][0-9]{2}[a-z][0-9]{3}[a-z]\b" italian;
            },
            Self::Nl => entities! {
                "nl_bsn" r"\b[0-9]{9}\b" |c| said(c, &["bsn", "burgerservice", "sofi"], |n| (weighted(n, &[9, 8, 7, 6, 5, 4, 3, 2]) + 11 * 11 - u32::from(n[8])).is_multiple_of(11));
            },
            Self::Pl => entities! {
                "pl_pesel" r"\b[0-9]{11}\b" |c| checked(c, polish);
            },
            Self::Se => entities! {
                "se_personnummer" r"\b(?:[0-9]{2})?[0-9]{2}[01][0-9][0-3][0-9][-+][0-9]{4}\b" |c| checked(c, |n| luhn(&n[n.len() - 10..]));
            },
            Self::Us => entities! {
                "us_ssn" r"\b[0-9]{3}-[0-9]{2}-[0-9]{4}\b" |c| checked(c, american);
                "us_ssn" r"\b[0-9]{3} [0-9]{2} [0-9]{4}\b" |c| checked(c, american);
                "us_ssn" r"\b[0-9]{9}\b" |c| said(c, &["ssn", "social security"], american);
                "us_passport" r"\b[A-Z]?[0-9]{8,9}\b" |c| near(c, &["passport"]);
            },
        }
    }
}

/// Its check digits are right, and it is not a part of a longer number.
fn checked(candidate: &Candidate<'_>, right: fn(&[u8]) -> bool) -> Ruling {
    let number = digits(candidate.matched());
    let same = number.windows(2).all(|pair| pair[0] == pair[1]);
    let Some(next) = candidate.after(0) else { return Ruling::More };
    let alone = !glued_before(candidate, b"-.,/_") && !matches!(next, Some(b'-' | b'_'));
    if alone && !same && right(&number) { candidate.yes() } else { Ruling::No }
}

/// The same, behind one of these words.
fn said(candidate: &Candidate<'_>, words: &[&str], right: fn(&[u8]) -> bool) -> Ruling {
    if context(candidate, words, 60) { checked(candidate, right) } else { Ruling::No }
}

/// Nothing but a shape, behind one of these words. A word in capitals is none.
fn near(candidate: &Candidate<'_>, words: &[&str]) -> Ruling {
    let number = candidate.matched().bytes().any(|byte| byte.is_ascii_digit());
    if number && context(candidate, words, 60) { candidate.yes() } else { Ruling::No }
}

fn american(number: &[u8]) -> bool {
    let part = |range: std::ops::Range<usize>| number.get(range).map_or(0, value);
    let area = part(0..3);
    area != 0 && area != 666 && area < 900 && part(3..5) != 0 && part(5..9) != 0
}

fn belgian(number: &[u8]) -> bool {
    let (Some(body), Some(check)) = (number.get(..9), number.get(9..11)) else { return false };
    let (body, check) = (value(body), value(check));
    97 - body % 97 == check || 97 - (2_000_000_000 + body) % 97 == check
}

fn british(candidate: &Candidate<'_>) -> Ruling {
    let prefix = candidate.matched().get(..2).unwrap_or_default().to_ascii_uppercase();
    let unused = ["BG", "GB", "NK", "KN", "TN", "NT", "ZZ"].contains(&prefix.as_str());
    if unused { Ruling::No } else { candidate.yes() }
}

fn cpf(number: &[u8]) -> bool {
    let check = |count: usize| {
        let sum: u32 = (0..count).map(|at| u32::from(number[at]) * (count as u32 + 1 - at as u32)).sum();
        let digit = sum * 10 % 11 % 10;
        digit == u32::from(number[count])
    };
    number.len() == 11 && check(9) && check(10)
}

fn polish(number: &[u8]) -> bool {
    let (month, day) = (value(&number[2..4]) % 20, value(&number[4..6]));
    let date = (1..=12).contains(&month) && (1..=31).contains(&day);
    date && weighted(number, &[1, 3, 7, 9, 1, 3, 7, 9, 1, 3, 1]).is_multiple_of(10)
}

/// The letter is the number modulo 23; X, Y and Z stand for 0, 1 and 2.
fn spanish(candidate: &Candidate<'_>) -> Ruling {
    const LETTERS: &[u8; 23] = b"TRWAGMYFPDXBNJZSQVHLCKE";
    let text = candidate.matched().to_ascii_uppercase();
    let mut number = digits(&text);
    match text.as_bytes()[0] {
        b'Y' => number.insert(0, 1),
        b'Z' => number.insert(0, 2),
        _ => {}
    }
    let letter = LETTERS[(value(&number) % 23) as usize];
    if text.as_bytes().last() == Some(&letter) { candidate.yes() } else { Ruling::No }
}

/// Letters and digits count differently in odd places; the last letter is the sum modulo 26.
fn italian(candidate: &Candidate<'_>) -> Ruling {
    const ODD: [u32; 26] =
        [1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 2, 4, 18, 20, 11, 3, 6, 8, 12, 14, 16, 10, 22, 25, 24, 23];
    let text = candidate.matched().to_ascii_uppercase();
    let place = |byte: u8| usize::from(if byte.is_ascii_digit() { byte - b'0' } else { byte - b'A' });
    let value = |(at, byte): (usize, u8)| if at % 2 == 0 { ODD[place(byte)] } else { place(byte) as u32 };
    let sum: u32 = text.bytes().take(15).enumerate().map(value).sum();
    let last = text.as_bytes()[15];
    if u32::from(last.wrapping_sub(b'A')) == sum % 26 { candidate.yes() } else { Ruling::No }
}
