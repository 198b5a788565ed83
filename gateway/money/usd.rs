//! Decimal numbers as people write prices, kept exactly.

use std::borrow::Cow;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, Deserialize, Deserializer, Visitor};
use serde::{Serialize, Serializer};

/// Dollars, or a factor: a decimal number with at most twelve places, from 0 to a million.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Usd(u64);

impl Usd {
    /// 1, in the least place.
    pub const ONE: u64 = 1_000_000_000_000;
    const MAX: u64 = 1_000_000 * Self::ONE;
    const PLACES: i64 = 12;

    /// So many 10⁻¹².
    pub const fn new(pico: u64) -> Self {
        Self(pico)
    }

    /// How many 10⁻¹² it is.
    pub const fn pico(self) -> u64 {
        self.0
    }

    /// As the price of a million: atto-dollars for one of them.
    pub(super) fn atto_of_a_million(self) -> u128 {
        u128::from(self.0)
    }

    /// As the price of one: atto-dollars.
    pub(super) fn atto_each(self) -> u128 {
        u128::from(self.0) * 1_000_000
    }

    /// Reads decimal text, with an exponent or without one, times 10 to the power of `shift`.
    pub fn parse(text: &str, shift: i64) -> Result<Self, &'static str> {
        const NUMBER: &str = "must be a number like 2.50";
        let (mantissa, exponent) = match text.split_once(['e', 'E']) {
            Some((mantissa, exponent)) => (mantissa, exponent.parse::<i16>().map_err(|_| NUMBER)?),
            None => (text, 0),
        };
        let (whole, part) = mantissa.split_once('.').unwrap_or((mantissa, ""));
        let digits: String = [whole, part].concat();
        if whole.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(if text.starts_with('-') { "must not be negative" } else { NUMBER });
        }
        let kept = digits.trim_end_matches('0');
        let dropped = (digits.len() - kept.len()) as i64;
        let kept = kept.trim_start_matches('0');
        if kept.is_empty() {
            return Ok(Self(0));
        }
        // What is kept counts so many places to the left of the least one.
        let left = Self::PLACES + shift + i64::from(exponent) - part.len() as i64 + dropped;
        let left = u32::try_from(left).map_err(|_| "has more than twelve decimal places")?;
        let scaled = kept.parse::<u64>().ok().zip(10u64.checked_pow(left)).and_then(|(n, scale)| n.checked_mul(scale));
        scaled.filter(|value| *value <= Self::MAX).map(Self).ok_or("must not be more than a million dollars")
    }

    /// The same with what is beyond the twelfth place rounded to it, half up.
    pub fn parse_near(text: &str, shift: i64) -> Result<Self, &'static str> {
        let (mantissa, exponent) = text.split_once(['e', 'E']).unwrap_or((text, "0"));
        let places = Self::PLACES + shift + exponent.parse::<i16>().map_or(0, i64::from);
        let point = mantissa.find('.').unwrap_or(mantissa.len());
        // The last digit that is kept stands so far in; with none, all of it is nothing.
        let end = usize::try_from(point as i64 + 1 + places).unwrap_or(0);
        if places < 0 || end >= mantissa.len() {
            return if places < 0 { Ok(Self(0)) } else { Self::parse(text, shift) };
        }
        let (kept, rest) = mantissa.split_at_checked(end).ok_or("must be a number like 2.50")?;
        let cut = Self::parse(&format!("{}e{exponent}", kept.trim_end_matches('.')), shift)?;
        Ok(Self(cut.0 + u64::from(rest.as_bytes()[0] >= b'5')))
    }
}

impl fmt::Display for Usd {
    /// The shortest text that is the same number.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (whole, part) = (self.0 / Self::ONE, format!("{:012}", self.0 % Self::ONE));
        match part.trim_end_matches('0') {
            "" => write!(f, "{whole}"),
            part => write!(f, "{whole}.{part}"),
        }
    }
}

impl Serialize for Usd {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Usd {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Written)
    }
}

/// A price as a file has it. A number comes as the float nearest to what was written, and its shortest text is what
/// was written if that had no more digits than a float can tell apart.
struct Written;

/// What a schema calls such a number, so that a wrong one is told at its line.
pub const FORMAT: &str = "decimal";

/// So many digits survive the way through a float.
const DIGITS: usize = 15;

impl Visitor<'_> for Written {
    type Value = Usd;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a number like 2.50")
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<Usd, E> {
        self.visit_str(&value.to_string())
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<Usd, E> {
        self.visit_str(&value.to_string())
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Usd, E> {
        let text = value.to_string();
        let digits = text.trim_start_matches(['0', '.']).bytes().filter(u8::is_ascii_digit).count();
        if digits > DIGITS {
            return Err(E::custom("has too many digits for a number: put it in quotes"));
        }
        self.visit_str(&text)
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<Usd, E> {
        Usd::parse(value, 0).map_err(|wrong| E::custom(format!("{value} {wrong}")))
    }
}

impl JsonSchema for Usd {
    fn schema_name() -> Cow<'static, str> {
        "Usd".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": ["number", "string"], "format": FORMAT, "minimum": 0, "maximum": 1_000_000 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decimal_text_is_read_exactly() {
        let read = |text, shift| Usd::parse(text, shift).map(|usd| usd.to_string());
        for (text, shift, said) in [
            ("2.50", 0, "2.5"),
            ("0", 0, "0"),
            ("0.000", 0, "0"),
            ("0.000000000001", 0, "0.000000000001"),
            ("0.0000000000010", 0, "0.000000000001"),
            ("1000000", 0, "1000000"),
            ("7.5e-08", 6, "0.075"),
            ("1.25E-6", 6, "1.25"),
            ("3e-06", 6, "3"),
            ("1e3", 0, "1000"),
            ("120.00e-1", 0, "12"),
            ("0e-999", 0, "0"),
        ] {
            assert_eq!(read(text, shift).unwrap(), said, "{text}");
        }
        for text in [
            "",
            ".",
            ".5",
            "-1",
            "1,5",
            "1e",
            "1e99999",
            "x",
            "1000000.1",
            "1e7",
            "0.0000000000001",
            "1.2.3",
            "+1",
            "1_0",
        ] {
            assert!(read(text, 0).is_err(), "{text}");
        }
    }

    #[test]
    fn what_is_beyond_the_last_place_can_be_rounded() {
        let near = |text| Usd::parse_near(text, 6).unwrap().to_string();
        assert_eq!(near("1.4999999999999998e-07"), "0.15");
        assert_eq!(near("1.00000000000049e-06"), "1");
        assert_eq!(near("2.5e-06"), "2.5");
        assert_eq!(near("1e-30"), "0");
        assert_eq!(near("0.00000125"), "1.25");
        assert!(Usd::parse_near("x", 6).is_err());
    }

    #[test]
    fn a_number_in_a_file_is_what_was_written() {
        let from = |json: &str| serde_json::from_str::<serde_json::Value>(json).and_then(serde_json::from_value::<Usd>);
        for text in ["0.1", "0.3", "1.1", "0.075", "2.5", "0.0000001", "123456.789", "3", "0.000000123456"] {
            assert_eq!(from(text).unwrap(), Usd::parse(text, 0).unwrap(), "{text}");
            assert_eq!(from(&format!("\"{text}\"")).unwrap(), Usd::parse(text, 0).unwrap(), "{text}");
        }
        assert!(from("0.12345678901234567").unwrap_err().to_string().contains("quotes"));
        assert!(from("-1").unwrap_err().to_string().contains("negative"));
    }
}
