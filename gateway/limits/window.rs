//! The spans of time over which limits count: any minute, a calendar month in somebody's zone, all time.

use std::time::Duration;

use jiff::civil::Weekday;
use jiff::tz::TimeZone;
use jiff::{RoundMode, Timestamp, ToSpan, Unit, Zoned, ZonedRound};

/// How a limit counts over time.
#[derive(Clone, Debug, PartialEq)]
pub enum Window {
    /// Over any span of so many milliseconds, as near as two counters tell: what the last span had still counts, less
    /// and less, until this one is over. No span that begins at a multiple of its length has more than the limit.
    Rolling(u64),
    /// Over a day, a week or a month of the calendar.
    Calendar(Period, TimeZone),
    /// Over all time; for what is held at once, over no time at all.
    Total,
}

/// What the calendar is cut into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Period {
    /// From midnight.
    Day,
    /// From Monday.
    Week,
    /// From the first.
    Month,
}

/// One span: from its first millisecond since 1970 to the first one that is not in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Span {
    /// Its first millisecond.
    pub from: u64,
    /// The first one behind it.
    pub to: u64,
}

/// The shortest and the longest rolling window: a second, and 31 days.
const ROLLING_MS: std::ops::RangeInclusive<u64> = 1_000..=31 * 86_400_000;

impl Window {
    /// Reads `1m`, `24h`, `day`, `month`, `total`. `zone` is a name of the IANA's list; UTC if there is none.
    pub fn parse(text: &str, zone: Option<&str>) -> Result<Self, String> {
        let period = match text {
            "day" => Period::Day,
            "week" => Period::Week,
            "month" => Period::Month,
            "total" => return Ok(Self::Total),
            _ => return rolling(text),
        };
        let zone = match zone {
            Some(name) => {
                TimeZone::get(name).map_err(|_| format!("{name} is no time zone: write it like Europe/Berlin"))?
            }
            None => TimeZone::UTC,
        };
        Ok(Self::Calendar(period, zone))
    }

    /// Whether it is a period that a budget is given for.
    pub fn is_calendar(&self) -> bool {
        !matches!(self, Self::Rolling(_))
    }

    /// The span that has the millisecond `now`.
    pub fn span(&self, now: u64) -> Span {
        match self {
            Self::Rolling(length) => {
                let from = now - now % length;
                Span { from, to: from.saturating_add(*length) }
            }
            Self::Total => Span { from: 0, to: u64::MAX },
            Self::Calendar(period, zone) => calendar(*period, zone, now).unwrap_or(Span { from: 0, to: u64::MAX }),
        }
    }
}

fn rolling(text: &str) -> Result<Window, String> {
    let wrong = || format!("{text} is no window: write it like 30s, 1m, 1h or 7d, or day, week, month, total");
    let at = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
    let unit = match &text[at..] {
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return Err(wrong()),
    };
    let length = text[..at].parse::<u64>().ok().and_then(|count| count.checked_mul(unit)).ok_or_else(wrong)?;
    if ROLLING_MS.contains(&length) {
        Ok(Window::Rolling(length))
    } else {
        Err("a window has 1 second to 31 days".into())
    }
}

fn calendar(period: Period, zone: &TimeZone, now: u64) -> Option<Span> {
    let now = Timestamp::from_millisecond(i64::try_from(now).ok()?).ok()?.to_zoned(zone.clone());
    let midnight = now.round(ZonedRound::new().smallest(Unit::Day).mode(RoundMode::Trunc)).ok()?;
    let (from, to) = match period {
        Period::Day => (midnight.clone(), midnight.checked_add(1.day()).ok()?),
        Period::Week => {
            let since = midnight.weekday().since(Weekday::Monday);
            let monday = midnight.checked_sub(i64::from(since).days()).ok()?;
            (monday.clone(), monday.checked_add(7.days()).ok()?)
        }
        Period::Month => {
            let first = midnight.first_of_month().ok()?;
            (first.clone(), first.checked_add(1.month()).ok()?)
        }
    };
    Some(Span { from: millis(&from)?, to: millis(&to)? })
}

fn millis(at: &Zoned) -> Option<u64> {
    u64::try_from(at.timestamp().as_millisecond()).ok()
}

impl Span {
    /// How long it is.
    pub fn length(self) -> u64 {
        self.to - self.from
    }

    /// How long it still lasts.
    pub fn rest(self, now: u64) -> Duration {
        Duration::from_millis(self.to.saturating_sub(now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(window: &str, zone: Option<&str>, now: &str) -> (String, String) {
        let now = now.parse::<Timestamp>().unwrap().as_millisecond() as u64;
        let span = Window::parse(window, zone).unwrap().span(now);
        assert!(span.from <= now && now < span.to);
        let spelt = |at: u64| Timestamp::from_millisecond(at as i64).unwrap().to_string();
        (spelt(span.from), spelt(span.to))
    }

    fn both(from: &str, to: &str) -> (String, String) {
        (from.to_owned(), to.to_owned())
    }

    #[test]
    fn days_weeks_and_months_begin_where_people_live() {
        let now = "2026-03-29T12:00:00Z";
        assert_eq!(span("day", None, now), both("2026-03-29T00:00:00Z", "2026-03-30T00:00:00Z"));
        // The night in which the clocks go forward: a day of 23 hours.
        let berlin = Some("Europe/Berlin");
        assert_eq!(span("day", berlin, now), both("2026-03-28T23:00:00Z", "2026-03-29T22:00:00Z"));
        assert_eq!(span("week", berlin, now), both("2026-03-22T23:00:00Z", "2026-03-29T22:00:00Z"));
        assert_eq!(span("month", berlin, now), both("2026-02-28T23:00:00Z", "2026-03-31T22:00:00Z"));
    }

    #[test]
    fn a_rolling_window_begins_at_a_multiple_of_its_length() {
        assert_eq!(span("1m", None, "2026-01-01T10:20:59Z"), both("2026-01-01T10:20:00Z", "2026-01-01T10:21:00Z"));
    }

    #[test]
    fn what_is_no_window_is_told() {
        for text in ["", "m", "1", "1y", "-1m", "0s", "32d", "minute", "99999999999999999999s"] {
            assert!(Window::parse(text, None).is_err(), "{text}");
        }
        assert!(Window::parse("day", Some("Mars/Base")).is_err());
    }
}
