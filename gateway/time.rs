//! The calendar: times as RFC 3339 spells them, and back.

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::decimal::fill;

/// A time in UTC, with microseconds.
#[derive(Clone, Copy, Debug)]
pub struct Stamp(pub SystemTime);

impl Stamp {
    /// Its text.
    pub fn spelt(self) -> [u8; 27] {
        let since = self.0.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
        let (year, month, day) = date(days);
        let mut text = *b"0000-00-00T00:00:00.000000Z";
        fill(&mut text[..4], year);
        fill(&mut text[5..7], month);
        fill(&mut text[8..10], day);
        fill(&mut text[11..13], second / 3600);
        fill(&mut text[14..16], second / 60 % 60);
        fill(&mut text[17..19], second % 60);
        fill(&mut text[20..26], since.subsec_micros().into());
        text
    }

    /// Its text without fractions of a second.
    pub fn seconds(self) -> [u8; 20] {
        let spelt = self.spelt();
        std::array::from_fn(|at| if at < 19 { spelt[at] } else { b'Z' })
    }
}

/// The longest that something may be given: a hundred years, in seconds.
const LONGEST: u64 = 36_525 * 86_400;

/// When something ends that lasts `12h`, `90d` or `52w` from `now`, or until a time, as RFC 3339 spells it.
pub fn end(when: &str, now: SystemTime) -> Result<String, String> {
    let wrong = || "give 12h, 90d, 52w, or a time like 2027-02-01T00:00:00Z".to_owned();
    let from_now = when.split_at_checked(when.len().saturating_sub(1)).and_then(|(count, unit)| {
        let seconds: u64 = match unit {
            "h" => 3_600,
            "d" => 86_400,
            "w" => 604_800,
            _ => return None,
        };
        let seconds = count.parse::<u64>().ok()?.checked_mul(seconds).filter(|seconds| *seconds <= LONGEST)?;
        now.checked_add(Duration::from_secs(seconds))
    });
    let end = from_now.or_else(|| parse(when)).ok_or_else(wrong)?;
    if end <= now {
        return Err("that is over already".to_owned());
    }
    let stamp = Stamp(end).to_string();
    stamp.split_once('.').map(|(seconds, _)| format!("{seconds}Z")).ok_or_else(wrong)
}

impl fmt::Display for Stamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(std::str::from_utf8(&self.spelt()).unwrap_or_default())
    }
}

/// Year, month and day, so many days after the first of 1970. Howard Hinnant's `civil_from_days`: years that begin in
/// March, so that the leap day comes last.
fn date(days: u64) -> (u64, u64, u64) {
    let (era, of_era) = ((days + 719_468) / 146_097, (days + 719_468) % 146_097);
    let year = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let day_of_year = of_era - (365 * year + year / 4 - year / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (year + era * 400 + u64::from(month <= 2), month, day)
}

/// The way back, if there is such a day.
fn days(&[year, month, day]: &[u64; 3]) -> Option<u64> {
    if !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    let years = if month <= 2 { year.checked_sub(1)? } else { year };
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let days = (years * 365 + years / 4 - years / 100 + years / 400 + of_year).checked_sub(719_468)?;
    (date(days) == (year, month, day)).then_some(days)
}

/// `2026-11-22T14:03:05.123456Z` as a time; the clock and its parts may be absent, the zone may be `+02:00`.
pub fn parse(text: &str) -> Option<SystemTime> {
    micros(text.as_bytes()).map(|micros| UNIX_EPOCH + Duration::from_micros(micros))
}

/// The same as microseconds since 1970.
pub fn micros(time: &[u8]) -> Option<u64> {
    let time = std::str::from_utf8(time).ok()?;
    let (date, rest) = time.split_once(['T', 't', ' ']).unwrap_or((time, ""));
    let (rest, ahead) = zone(rest)?;
    let days = days(&numbers::<3>(date, '-')?)?;
    let (clock, fraction) = rest.split_once('.').unwrap_or((rest, "0"));
    let [hours, minutes, seconds] = match clock.matches(':').count() {
        0 if clock.is_empty() => [0; 3],
        1 => numbers::<2>(clock, ':').map(|[hours, minutes]| [hours, minutes, 0])?,
        _ => numbers::<3>(clock, ':')?,
    };
    if hours > 24 || minutes > 59 || seconds > 60 {
        return None;
    }
    let fraction: u64 = format!("{fraction:0<6}").get(..6)?.parse().ok()?;
    let seconds = (days * 86_400 + hours * 3_600 + minutes * 60 + seconds).checked_add_signed(-ahead)?;
    seconds.checked_mul(1_000_000)?.checked_add(fraction)
}

/// Whole seconds since 1970; a time before counts as that.
pub fn seconds(time: SystemTime) -> i64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

/// Cuts the zone off; how many seconds it is ahead.
fn zone(time: &str) -> Option<(&str, i64)> {
    if let Some(rest) = time.strip_suffix(['Z', 'z']) {
        return Some((rest, 0));
    }
    let Some(at) = time.rfind(['+', '-']) else { return Some((time, 0)) };
    let [hours, minutes] = numbers::<2>(&time[at + 1..], ':')?;
    let ahead = i64::try_from(hours * 3_600 + minutes * 60).ok()?;
    Some((&time[..at], if time[at..].starts_with('-') { -ahead } else { ahead }))
}

fn numbers<const N: usize>(text: &str, between: char) -> Option<[u64; N]> {
    let mut numbers = [0; N];
    let mut parts = text.split(between);
    for number in &mut numbers {
        let part = parts.next()?;
        *number = part.bytes().all(|byte| byte.is_ascii_digit()).then(|| part.parse().ok())??;
    }
    (parts.next().is_none() && numbers.iter().all(|number| *number <= 9_999)).then_some(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_is_told_from_now_or_as_a_time() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_795_356_185);
        assert_eq!(end("90d", now).unwrap(), "2027-02-20T14:03:05Z");
        assert_eq!(end("2027-02-01", now).unwrap(), "2027-02-01T00:00:00Z");
        for wrong in ["", "d", "-1d", "soon", "2020-01-01", "0h", "99999999999999999999w", "9999999999999w", "\u{e4}"] {
            assert!(end(wrong, now).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_time_is_spelled_as_rfc_3339_says() {
        let stamp = |secs, micros: u32| Stamp(UNIX_EPOCH + Duration::new(secs, micros * 1000)).to_string();
        assert_eq!(stamp(0, 0), "1970-01-01T00:00:00.000000Z");
        assert_eq!(stamp(951_782_400, 1), "2000-02-29T00:00:00.000001Z");
        assert_eq!(stamp(1_795_356_185, 123_456), "2026-11-22T14:03:05.123456Z");
        assert_eq!(stamp(4_107_542_399, 999_999), "2100-02-28T23:59:59.999999Z");
    }

    #[test]
    fn times_are_counted_in_microseconds() {
        let counted = |text: &str| micros(text.as_bytes());
        assert_eq!(counted("1970-01-01T00:00:00.000001Z"), Some(1));
        assert_eq!(counted("2026-11-22T14:03:05.123456Z"), Some(1_795_356_185_123_456));
        assert_eq!(counted("2026-11-22T16:03:05.123456+02:00"), Some(1_795_356_185_123_456));
        assert_eq!(counted("2026-11-22T10:33:05.123456-03:30"), Some(1_795_356_185_123_456));
        assert_eq!(counted("2024-02-29"), Some(1_709_164_800_000_000));
        assert_eq!(counted("2024-02-29 00:01"), Some(1_709_164_860_000_000));
        for bad in ["", "2026", "2026-13-01", "2026-01-01T25:00:00Z", "2026-01-01T1", "é", "2026-01-01T00:00:00.éZ"] {
            assert_eq!(counted(bad), None, "{bad}");
        }
        for bad in ["2026-02-29", "2026-04-31", "1969-12-31", "0000-01-01", "1970-01-01T00:00:00+01:00"] {
            assert_eq!(counted(bad), None, "{bad}");
        }
    }

    #[test]
    fn every_day_is_spelled_and_counted_alike() {
        for day in (0..2_900_000).step_by(13) {
            let at = UNIX_EPOCH + Duration::from_secs(day * 86_400);
            assert_eq!(parse(&Stamp(at).to_string()), Some(at));
        }
    }
}
