//! Personal data of known shapes: addresses, numbers and identity papers, told by their form, their check digits and
//! the words before them. Never names, never street addresses: nothing here understands a sentence.

mod checks;
mod countries;

use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use schemars::JsonSchema;
use serde::Deserialize;

use super::patterns::{Candidate, Judge, Pattern, Patterns, Ruling};
use super::stream::look_back;
use super::{Detector, Wrong};
use checks::{Before, digits, luhn, mod97};
pub use countries::Country;

/// Personal data of known shapes.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(rename = "Pii")]
pub struct Config {
    /// What is looked for.
    pub find: Vec<Kind>,
    /// The countries whose identity numbers are looked for.
    pub countries: Vec<Country>,
    /// What is none, written exactly so: the support desk's own address and number.
    pub allow: Vec<String>,
}

impl Default for Config {
    fn default() -> Self {
        let find = vec![Kind::Email, Kind::Phone, Kind::Card, Kind::Iban, Kind::Ip, Kind::BirthDate];
        Self { find, countries: vec![Country::Us], allow: Vec::new() }
    }
}

/// A kind of personal data that is the same everywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize, JsonSchema)]
#[schemars(rename = "PiiKind")]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// E-mail addresses.
    Email,
    /// Phone numbers: international, of a common shape, or behind a word such as "call".
    Phone,
    /// Numbers of payment cards: issuer, length and check digit.
    Card,
    /// Bank accounts: country, length and check digits.
    Iban,
    /// IP addresses, but for those that mean this machine.
    Ip,
    /// Links. Not among the defaults.
    Url,
    /// Dates behind a word such as "born".
    BirthDate,
}

/// Something to look for.
pub(super) struct Entity {
    pub label: &'static str,
    pub expression: &'static str,
    pub check: fn(&Candidate<'_>) -> Ruling,
}

/// In the order of precedence where two begin at the same place.
const ENTITIES: &[(Kind, Entity)] = &[
    (
        Kind::Email,
        Entity {
            label: "email",
            expression: r"(?i)\b[a-z0-9_][a-z0-9._%+\-]{0,63}@(?:[a-z0-9](?:[a-z0-9\-]{0,61}[a-z0-9])?\.){1,6}[a-z]{2,24}\b",
            check: email,
        },
    ),
    (
        Kind::Url,
        Entity {
            label: "url",
            expression: r"(?i)\b(?:https?://|www\.)[a-z0-9\-._~:/?#@!$&*+,;=%]{3,1000}",
            check: url,
        },
    ),
    (
        Kind::Iban,
        Entity { label: "iban", expression: r"(?i)\b[a-z]{2}[0-9]{2}(?:[ -]?[a-z0-9]{2,4}){2,8}\b", check: iban },
    ),
    (Kind::Card, Entity { label: "card", expression: r"\b[0-9](?:[ -]?[0-9]){11,18}\b", check: card }),
    (
        Kind::Ip,
        Entity {
            label: "ip",
            expression: r"\b(?:(?:25[0-5]|2[0-4][0-9]|1?[0-9]?[0-9])\.){3}(?:25[0-5]|2[0-4][0-9]|1?[0-9]?[0-9])\b",
            check: ip4,
        },
    ),
    (Kind::Ip, Entity { label: "ip", expression: r"(?i)\b[0-9a-f]{1,4}(?::[0-9a-f]{0,4}){2,7}", check: ip6 }),
];

/// Behind the identity numbers of countries, which have more of a shape.
const LATER: &[(Kind, Entity)] = &[
    (
        Kind::BirthDate,
        Entity {
            label: "birth_date",
            expression: r"(?i)\b(?:[0-9]{1,2}[./-] ?[0-9]{1,2}[./-] ?[0-9]{4}|[0-9]{4}[./-][0-9]{1,2}[./-][0-9]{1,2}|[0-9]{1,2}(?:st|nd|rd|th|\.)? (?:of )?(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]{0,6},? [0-9]{4}|(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]{0,6} [0-9]{1,2}(?:st|nd|rd|th)?,? [0-9]{4})\b",
            check: birth_date,
        },
    ),
    (
        Kind::Phone,
        Entity {
            label: "phone",
            expression: r"\+?\(?\b[0-9]{1,8}\)?(?:[ .\-/]{0,2}\([0-9]{1,5}\)[ .\-]?[0-9]{1,8}|[ .\-/]{1,2}\(?[0-9]{1,8}\)?){1,6}(?: ?(?:x|ext\.?) ?[0-9]{1,5})?|\+?\b[0-9]{7,15}\b",
            check: phone,
        },
    ),
];

pub(super) fn build(config: &Config, rule: usize) -> Result<Detector, Vec<Wrong>> {
    if config.find.is_empty() && config.countries.is_empty() {
        return Err(vec![(".find".to_owned(), "nothing is looked for: give a kind or a country".to_owned())]);
    }
    let built = entities(config, rule).and_then(|(patterns, checks)| Patterns::new(patterns, checks, true));
    Ok(Detector::Own(vec![Arc::new(built.map_err(|message| vec![(String::new(), message)])?)]))
}

fn entities(config: &Config, rule: usize) -> Result<(Vec<Pattern>, Checks), String> {
    let asked = |list: &'static [(Kind, Entity)]| {
        list.iter().filter(|(kind, _)| config.find.contains(kind)).map(|(_, entity)| entity)
    };
    let national = config.countries.iter().flat_map(|country| country.entities());
    let entities: Vec<&Entity> = asked(ENTITIES).chain(national).chain(asked(LATER)).collect();
    let pattern = |entity: &&Entity| Pattern::ascii(rule, entity.label, entity.expression, None, 0);
    let patterns = entities.iter().map(pattern).collect::<Result<Vec<_>, _>>()?;
    let checks = entities.iter().map(|entity| entity.check).collect();
    Ok((patterns, Checks { checks, allow: config.allow.clone() }))
}

/// The checks of the entities, in their order.
struct Checks {
    checks: Vec<fn(&Candidate<'_>) -> Ruling>,
    allow: Vec<String>,
}

impl std::fmt::Debug for Checks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Checks({})", self.checks.len())
    }
}

impl Judge for Checks {
    fn judge(&self, candidate: &Candidate<'_>) -> Ruling {
        let Some(check) = self.checks.get(candidate.pattern) else { return Ruling::No };
        match check(candidate) {
            Ruling::Yes(start, end) if self.allow.iter().any(|allowed| allowed == candidate.part(start, end)) => {
                Ruling::No
            }
            ruling => ruling,
        }
    }

    /// Most numbers are too short to be anything, or go on with what is before.
    fn may_begin(&self, text: &str, start: usize, last: bool) -> bool {
        let rest = &text.as_bytes()[start..];
        if !rest[0].is_ascii_digit() {
            return true;
        }
        if goes_on(text.as_bytes(), start) {
            return false;
        }
        if is_timestamp(rest) {
            return BORN.stands(look_back(text, start), BORN_WITHIN);
        }
        let (mut count, mut dots, mut dashed, mut spaced) = (0, 0, false, false);
        for byte in rest {
            match byte {
                b'0'..=b'9' if count + 1 == DIGITS_MIN => return true,
                b'0'..=b'9' => count += 1,
                b'.' if dots == 2 && !spaced => return true,
                b'.' => dots += 1,
                b' ' => spaced = true,
                b'-' | b'/' => dashed = true,
                b'(' | b')' => {}
                // A day may be followed by its month; else only the first word may be more than a number.
                b'a'..=b'z' | b'A'..=b'Z' if !spaced || (count <= 2 && MONTHS.contains(&byte.to_ascii_lowercase())) => {
                    return true;
                }
                b':' if !spaced && dots == 0 && !dashed => return may_be_ip6(rest, last),
                b'_' | b'%' | b'@' | b'+' if !spaced => return true,
                _ => return count >= DATE_MIN && (dots > 0 || dashed),
            }
        }
        !last || (count >= DATE_MIN && (dots > 0 || dashed))
    }
}

/// Whether the number that is here is the rest of one that began before: nothing begins in its middle.
fn goes_on(text: &[u8], start: usize) -> bool {
    let before = || b"-.,/:_".contains(&text[start - 1]) && text[start - 2].is_ascii_digit();
    text[start].is_ascii_digit() && start >= 2 && before()
}

/// How months begin, and `of`.
const MONTHS: &[u8] = b"jfmasondo";

/// Nothing with fewer digits is found that begins with one, but dates, IPv4 addresses and what has letters.
const DIGITS_MIN: usize = 7;

/// A date has no fewer.
const DATE_MIN: usize = 6;

/// Whether a day and a time of it stand here, as logs and tables have them. That is no number of any kind, but it may be
/// when somebody was born.
fn is_timestamp(text: &[u8]) -> bool {
    const SHAPE: &[u8; 15] = b"0000-00-00 00:0";
    let fits = |(byte, shape): (&u8, &u8)| match shape {
        b'0' => byte.is_ascii_digit(),
        b'-' => b"-./".contains(byte),
        b' ' => b" T".contains(byte),
        _ => byte == shape,
    };
    matches!(text, [b'2', b'0', ..] | [b'1', b'9', ..])
        && text.first_chunk::<15>().is_some_and(|text| text.iter().zip(SHAPE).all(fits))
}

/// Whether hexadecimal digits and colons are an address: eight groups, or some left out. A time is neither.
fn may_be_ip6(text: &[u8], last: bool) -> bool {
    let (mut colons, mut before) = (0, 0);
    for byte in text {
        match byte {
            b':' if before == b':' => return true,
            b':' => colons += 1,
            _ if !byte.is_ascii_hexdigit() => return colons >= 7,
            _ => {}
        }
        before = *byte;
    }
    colons >= 7 || !last
}

fn email(candidate: &Candidate<'_>) -> Ruling {
    let local = candidate.matched().split('@').next().unwrap_or_default();
    if local.contains("..") { Ruling::No } else { candidate.yes() }
}

/// A sign at the end belongs to the sentence.
fn url(candidate: &Candidate<'_>) -> Ruling {
    let text = candidate.matched();
    candidate.first(text.trim_end_matches(['.', ',', ';', ':', '!', '?', '*']).len())
}

/// What follows an account may look like more of it: only as much as its country wants counts.
fn iban(candidate: &Candidate<'_>) -> Ruling {
    let text = candidate.matched();
    let Some(length) = text.get(..2).and_then(iban_length) else { return Ruling::No };
    let mut signs = text.char_indices().filter(|(_, c)| c.is_ascii_alphanumeric());
    let Some((last, _)) = signs.nth(length - 1) else { return Ruling::No };
    let (account, rest) = text.split_at(last + 1);
    if rest.starts_with(|c: char| c.is_ascii_alphanumeric()) || !mod97(account) {
        return Ruling::No;
    }
    candidate.first(account.len())
}

fn iban_length(country: &str) -> Option<usize> {
    let country = country.to_ascii_uppercase();
    let at = IBAN_LENGTHS.split(' ').find_map(|entry| entry.strip_prefix(&country))?;
    at.parse().ok()
}

/// The registry of ISO 13616.
const IBAN_LENGTHS: &str = "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BI27 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DJ27 \
    DK18 DO28 EE20 EG29 ES24 FI18 FK18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HN28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 \
    JO30 KW30 KZ20 LB28 LC32 LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22 MK19 MN20 MR27 MT31 MU30 NI28 NL18 NO15 OM23 PK24 \
    PL28 PS29 PT25 QA29 RO24 RS22 RU33 SA24 SC31 SD18 SE24 SI19 SK24 SM27 SO23 ST25 SV28 TL23 TN24 TR26 UA29 VA22 VG24 \
    XK20 YE30";

/// The longest part of the number that is a card, ending between groups.
fn card(candidate: &Candidate<'_>) -> Ruling {
    if glued_before(candidate, b"-.,_") {
        return Ruling::No;
    }
    let text = candidate.matched();
    for end in (12..=text.len()).rev().filter(|end| ends_a_group(text, *end)) {
        let number = digits(&text[..end]);
        if is_card(&number) {
            return candidate.first(end);
        }
    }
    Ruling::No
}

/// Whether a digit is the last of its group here.
fn ends_a_group(text: &str, end: usize) -> bool {
    let bytes = text.as_bytes();
    let digit = |at: usize| bytes.get(at).is_some_and(u8::is_ascii_digit);
    digit(end - 1) && !digit(end)
}

/// Issuer, length and check digit.
fn is_card(number: &[u8]) -> bool {
    let head = |count: usize| number.iter().take(count).fold(0u32, |all, digit| all * 10 + u32::from(*digit));
    let issuer = match (head(1), head(2), head(3), head(4)) {
        (4, ..) => matches!(number.len(), 13 | 16 | 19),
        (_, 34 | 37, ..) => number.len() == 15,
        (_, 36 | 38 | 39, ..) | (_, _, 300..=305 | 309, _) => matches!(number.len(), 14..=19),
        (_, 35, ..) => matches!(number.len(), 16..=19),
        (_, _, _, 1800 | 2131) => number.len() == 15,
        (_, 51..=55, ..) | (_, _, _, 2221..=2720) => number.len() == 16,
        (_, 50 | 56..=59, ..) => matches!(number.len(), 12..=19),
        (6, ..) => matches!(number.len(), 12..=19),
        _ => false,
    };
    let same = number.windows(2).all(|pair| pair[0] == pair[1]);
    issuer && !same && luhn(number)
}

/// Whether a digit and one of these signs stand directly before.
fn glued_before(candidate: &Candidate<'_>, signs: &[u8]) -> bool {
    match candidate.before().as_bytes() {
        [.., digit, sign] => digit.is_ascii_digit() && signs.contains(sign),
        _ => false,
    }
}

/// Not a part of a longer row of numbers and dots, and not this machine.
fn ip4(candidate: &Candidate<'_>) -> Ruling {
    let (Some(next), Some(second)) = (candidate.after(0), candidate.after(1)) else { return Ruling::More };
    let goes_on = next == Some(b'.') && second.is_some_and(|byte| byte.is_ascii_digit());
    if goes_on || glued_before(candidate, b".") {
        return Ruling::No;
    }
    let nobody = |ip: Ipv4Addr| ip.is_loopback() || ip.is_unspecified() || ip.is_broadcast();
    if candidate.matched().parse().is_ok_and(|ip| !nobody(ip)) { candidate.yes() } else { Ruling::No }
}

fn ip6(candidate: &Candidate<'_>) -> Ruling {
    let Some(next) = candidate.after(0) else { return Ruling::More };
    let text = candidate.matched().strip_suffix(':').filter(|text| !text.ends_with(':')).unwrap_or(candidate.matched());
    let parts = text.split(':').filter(|part| !part.is_empty()).count();
    let goes_on = next.is_some_and(|byte| byte.is_ascii_alphanumeric() || byte == b':') && text == candidate.matched();
    let number = text.bytes().any(|byte| byte.is_ascii_digit());
    if goes_on || parts < 2 || !number || candidate.before().ends_with(':') {
        return Ruling::No;
    }
    if text.parse::<Ipv6Addr>().is_ok() { candidate.first(text.len()) } else { Ruling::No }
}

static BORN: Before = Before::new(&[
    "born",
    "birth",
    "birthdate",
    "birthday",
    "dob",
    "d.o.b",
    "geboren",
    "geb.",
    "geburts",
    "né le",
    "née le",
    "naissance",
    "nacido",
    "nacida",
    "nacimiento",
    "nato il",
    "nata il",
    "nascita",
    "nascido",
    "nascimento",
    "geboorte",
    "urodz",
]);

const BORN_WITHIN: usize = 40;

fn birth_date(candidate: &Candidate<'_>) -> Ruling {
    if BORN.stands(candidate.before(), BORN_WITHIN) { candidate.yes() } else { Ruling::No }
}

static CALL: Before = Before::new(&[
    "phone",
    "telephone",
    "call",
    "tel",
    "mobile",
    "cell",
    "fax",
    "number",
    "contact",
    "text",
    "sms",
    "dial",
    "reach",
    "ring",
    "whatsapp",
    "hotline",
    "landline",
    "telefon",
    "handy",
    "mobil",
    "rufnummer",
    "téléphone",
    "portable",
    "appel",
    "teléfono",
    "móvil",
    "telefono",
    "cellulare",
    "telefone",
    "celular",
    "telefoon",
]);

/// The longest part of a row of digits that is a phone number.
fn phone(candidate: &Candidate<'_>) -> Ruling {
    let (Some(next), Some(second)) = (candidate.after(0), candidate.after(1)) else { return Ruling::More };
    let text = candidate.matched();
    let before = candidate.before().as_bytes().last().copied().unwrap_or(b' ');
    let glued = before.is_ascii_alphanumeric() || b".$/-_%#=&+".contains(&before);
    if glued || glued_before(candidate, b",:") {
        return Ruling::No;
    }
    let sticks = |byte: u8| byte.is_ascii_alphanumeric() || b"%_$".contains(&byte);
    let goes_on = next.is_some_and(sticks)
        || (next.is_some_and(|byte| b".,:-/".contains(&byte)) && second.is_some_and(|byte| byte.is_ascii_digit()));
    let extension = text.find(['x', 'e']).unwrap_or(text.len());
    let groups: Vec<&str> =
        text[..extension].split(|c: char| !c.is_ascii_digit()).filter(|group| !group.is_empty()).collect();
    let mut groups = &groups[..];
    for end in (7..=text.len()).rev().filter(|end| ends_a_group(text, *end)) {
        // A part that is cut off must be a number by its shape alone.
        let fits = if end == text.len() {
            !goes_on
                && (is_phone(text, groups, false)
                    || (is_phone(text, groups, true) && CALL.stands(candidate.before(), 60)))
        } else {
            shaped(&text[..end], groups) && is_phone(&text[..end], groups, false)
        };
        if fits {
            let close = usize::from(text[end..].starts_with(')') && text[..end].contains('('));
            return candidate.first(end + close);
        }
        if end <= extension {
            groups = groups.split_last().map_or(&[], |(_, before)| before);
        }
    }
    Ruling::No
}

/// Whether a text with these groups of digits, its extension not among them, is a number.
fn is_phone(text: &str, groups: &[&str], called: bool) -> bool {
    let count: usize = groups.iter().map(|group| group.len()).sum();
    let mut digits = groups.iter().flat_map(|group| group.bytes());
    let first = digits.next();
    if !(7..=15).contains(&count) || digits.all(|digit| Some(digit) == first) || is_date(groups) {
        return false;
    }
    let thousands = groups.len() > 1
        && groups[1..].iter().all(|group| group.len() == 3)
        && text.contains([' ', '.'])
        && !text.contains(['-', '(', '/']);
    let even =
        (3..=6).contains(&groups.len()) && groups.iter().all(|group| (2..=4).contains(&group.len())) && count >= 8;
    // Rows of amounts, and what is left of an account, are even too.
    let fours = groups.len() > 2 && groups[..groups.len() - 1].iter().all(|group| group.len() == 4);
    let threes = groups.len() > 4 && groups.iter().all(|group| group.len() == 3);
    let american_id = matches!(groups, [a, b, c] if (a.len(), b.len(), c.len()) == (3, 2, 4));
    let row = (fours && !text.starts_with('0')) || threes || american_id;
    called || shaped(text, groups) || (even && !thousands && !row)
}

/// Whether it is a number wherever it stands: international, or 3-3-4, or in parentheses.
fn shaped(text: &str, groups: &[&str]) -> bool {
    let count: usize = groups.iter().map(|group| group.len()).sum();
    let lengths = |lengths: &[usize]| groups.iter().map(|group| group.len()).eq(lengths.iter().copied());
    let international =
        (text.starts_with('+') || text.starts_with("(+") || text.starts_with("00") && !text.starts_with("000"))
            && count >= 8;
    let american = (lengths(&[3, 3, 4]) || lengths(&[1, 3, 3, 4])) && text.contains(['-', '.', '(', ' ']);
    // Between blanks it may be the number of a house.
    let local = lengths(&[3, 4]) && text.contains(['-', '.']);
    (7..=15).contains(&count) && (international || american || local)
}

/// A date, or a range of years.
fn is_date(groups: &[&str]) -> bool {
    let year = |text: &str| text.len() == 4 && (text.starts_with("19") || text.starts_with("20"));
    let small = |text: &str| text.len() <= 2;
    match groups {
        [a, b, c] => (year(a) && small(b) && small(c)) || (small(a) && small(b) && year(c)),
        [a, b] => year(a) && year(b),
        [a] => a.len() == 8 && (year(&a[..4]) || year(&a[4..])),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, LazyLock};

    use proptest::prelude::*;

    use super::super::Scanner;
    use super::super::patterns::tests::found;
    use super::super::redact::Placeholders;
    use super::super::tests::{built, check_cuts, judged, scanner_of};
    use super::*;

    const COUNTRIES: &str = r#"["au","be","br","ca","ch","de","es","fr","gb","in","it","nl","pl","se","us"]"#;

    fn rule(more: &str) -> String {
        let find = r#"["email","phone","card","iban","ip","url","birth_date"]"#;
        format!(
            r#"[{{"name":"p","in":["prompt.user"],"verdict":"redact","pii":{{"find":{find},"countries":{COUNTRIES}{more}}}}}]"#
        )
    }

    static SCANNER: LazyLock<Arc<Scanner>> = LazyLock::new(|| scanner_of(&rule(""), "", "prompt.user"));

    fn out(text: &str) -> String {
        check_cuts(&SCANNER, text);
        SCANNER.judge(text, &mut Placeholders::default()).apply(text)
    }

    #[test]
    fn what_is_found() {
        for (text, expected) in [
            ("write to Ann.O+x@mail.a-b.example.", "write to [EMAIL]."),
            ("see https://a.example/x?y=1, or www.b.example.", "see [URL], or [URL]."),
            ("IBAN gb82 WEST 1234 5698 7654 32 and more", "IBAN [IBAN] and more"),
            ("DE89370400440532013000;", "[IBAN];"),
            ("card 4111 1111 1111 1111 12/27", "card [CARD] 12/27"),
            ("378282246310005 or 6011-1111-1111-1117", "[CARD] or [CARD]"),
            ("from 192.168.17.4: or 2001:db8::8a2e:370:7334.", "from [IP]: or [IP]."),
            ("+46 (0)179 459 33 fax", "[PHONE] fax"),
            ("(555) 123-4567, 555.123.4567 x12", "[PHONE], [PHONE]"),
            ("call 5551234567 now", "call [PHONE] now"),
            ("I was born on 14 March 1987.", "I was born on [BIRTH_DATE]."),
            ("DOB: 03/14/1987", "DOB: [BIRTH_DATE]"),
            ("he died, but was born on 1.2.1987 in a barn", "he died, but was born on [BIRTH_DATE] in a barn"),
            ("born 1987-03-14 07:30", "born [BIRTH_DATE] 07:30"),
            ("555-123-4567 x12%", "[PHONE] x12%"),
            ("0012-34-56 78:9", "[PHONE] 78:9"),
            ("SSN 078-05-1120", "SSN [US_SSN]"),
            ("passport: C01X00T47", "passport: [DE_ID]"),
            ("DNI 12345678Z", "DNI [ES_ID]"),
            ("AB 12 34 56 C", "[GB_NINO]"),
            ("RSSMRA85T10A562S", "[IT_FISCAL_CODE]"),
            ("CPF 529.982.247-25", "CPF [BR_CPF]"),
            ("Aadhaar 2341 2341 2346", "Aadhaar [IN_AADHAAR]"),
            ("AHV 756.9217.0769.85", "AHV [CH_AHV]"),
            ("BSN: 111222333", "BSN: [NL_BSN]"),
            ("PESEL 44051401359", "PESEL [PL_PESEL]"),
            ("SIN 130 692 544", "SIN [CA_SIN]"),
            ("NHS 943 476 5919", "NHS [GB_NHS]"),
            ("1 84 12 76 451 089 46", "[FR_NIR]"),
            ("Steuer-ID 86 095 742 719", "Steuer-ID [DE_TAX_ID]"),
            ("TFN 123 456 782", "TFN [AU_TFN]"),
            ("85.07.30-033.28", "[BE_NRN]"),
            ("811228-9874", "[SE_PERSONNUMMER]"),
        ] {
            assert_eq!(out(text), expected);
        }
    }

    #[test]
    fn what_only_looks_like_it_stays() {
        for text in [
            "4111 1111 1111 1112 has a wrong check digit",
            "0000 0000 0000 0000",
            "GB82 WEST 1234 5698 7654 33",
            "version 1.2.3.4.5, 300.1.2.3 and localhost 127.0.0.1",
            "at 12:30:45 on 2026-11-22 or 22.11.2026",
            "000-12-3456, 666-12-3456, 900-12-3456",
            "1 000 000 000 people, 10 000 000 more",
            "pi is 3.14159265358979 and e 2.7182818284",
            "years 2019-2020, pages 100-200",
            "std::vec::Vec and a::b",
            "12345678A",
            "X1234567A",
            "the date 14 March 1987 was a Saturday",
            "order 123456789 of 42 items",
            "a@b, @home, x@y.z1",
            "$5551234567 and 5551234567%",
        ] {
            assert_eq!(out(text), text);
        }
    }

    #[test]
    fn what_is_allowed_stays() {
        let json = rule(r#","allow":["help@a.example"]"#);
        let (out, _) = judged(&json, "prompt.user", "help@a.example or ann@a.example");
        assert_eq!(out, "help@a.example or [EMAIL]");
    }

    #[test]
    fn what_is_not_asked_for_is_not_found() {
        let json = r#"[{"name":"p","in":["prompt.user"],"verdict":"redact","pii":{"find":["card"],"countries":[]}}]"#;
        let text = "ann@a.example, 555-123-4567, 078-05-1120";
        assert_eq!(judged(json, "prompt.user", text).0, text);
        let nothing = r#"[{"name":"p","in":["prompt.user"],"verdict":"redact","pii":{"find":[],"countries":[]}}]"#;
        assert!(built(nothing).unwrap_err()[0].1.contains("nothing is looked for"));
    }

    /// The same checks of every place that an expression matches, but where a number goes on.
    #[derive(Debug)]
    struct Everywhere(Checks);

    impl Judge for Everywhere {
        fn judge(&self, candidate: &Candidate<'_>) -> Ruling {
            self.0.judge(candidate)
        }

        fn may_begin(&self, text: &str, start: usize, _last: bool) -> bool {
            !goes_on(text.as_bytes(), start)
        }
    }

    /// All that there is, found as it is and found at every place.
    fn both() -> (Arc<Patterns<Checks>>, Arc<Patterns<Everywhere>>) {
        let countries = serde_json::from_str(COUNTRIES).unwrap();
        let config = Config { countries, ..Config::default() };
        let (patterns, checks) = entities(&config, 0).unwrap();
        let fast = Patterns::new(patterns.clone(), checks, true).unwrap();
        let slow = Patterns::new(patterns, Everywhere(entities(&config, 0).unwrap().1), true).unwrap();
        (Arc::new(fast), Arc::new(slow.everywhere()))
    }

    const PARTS: &[&str] = &[
        " ",
        " ",
        " ",
        "-",
        ".",
        "/",
        ":",
        ", ",
        "; ",
        "\n",
        "(",
        ")",
        "+",
        "@",
        "_",
        "x",
        "=",
        "::",
        "0",
        "1",
        "7",
        "12",
        "19",
        "20",
        "31",
        "123",
        "404",
        "2026",
        "4312",
        "12345",
        "123456",
        "1234567",
        "12345678",
        "555",
        "00",
        "+1 ",
        "T",
        "Z",
        " ms",
        "at ",
        "born ",
        "née le ",
        "call ",
        "phone: ",
        "passport ",
        "jan",
        "March ",
        "of ",
        "2026-11-07 13:17",
        "1.2.1987 ",
        "1987-03-14",
        "1999.12.31 ",
        "2026-11-07T10:17:00",
        "2001:db8::8a2e:370:7334",
        "1:2:3:4:5:6:7:8",
        "192.168.",
        "17.4",
        "4111 1111 1111 1111",
        "555-123-4567",
        "078-05-1120",
        "811228-9874",
        "bob@mail.example",
        "GB82WEST12345698765432",
        "X1234567L",
        "é",
    ];

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1500))]

        #[test]
        fn what_is_passed_over_is_nothing(parts in proptest::collection::vec((0..PARTS.len()).prop_map(|at| PARTS[at]), 1..40)) {
            thread_local!(static BOTH: (Arc<Patterns<Checks>>, Arc<Patterns<Everywhere>>) = both());
            let text = parts.concat();
            let (fast, slow) = BOTH.with(|(fast, slow)| (found(fast, &text), found(slow, &text)));
            prop_assert_eq!(fast, slow, "{}", text);
        }
    }
}
