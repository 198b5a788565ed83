//! What goes wrong on purpose: the grammar of a fault, and what the faults of one request add up to.

use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use http::{HeaderMap, Method};

/// One thing that goes wrong, as text: `KIND[=VALUE][,times=N][,path=/v1/...][,after=EVENTS]`.
///
/// | kind | what happens |
/// |---|---|
/// | `status=503` | this status with the engine's error body; with `,retry_after=SECONDS` that header too |
/// | `slow-first=MS` | the head comes late |
/// | `slow-first-token=MS` | the head comes at once, the first event late |
/// | `stall` | after `after` events (2) nothing more comes, the connection stays open |
/// | `cut` | after `after` events (2) the connection is closed; other answers: after half the body |
/// | `reset` | the connection is reset before any byte of the answer |
/// | `drip=MS` | the body comes in small pieces, `MS` apart, split anywhere |
/// | `half-utf8` | the text is emoji and CJK, pieces end within characters |
/// | `gzip` | the body is gzip, with `content-encoding: gzip` |
/// | `crlf` | events end with CRLF |
/// | `no-usage` | no usage anywhere |
/// | `hang` | the request is read and never answered |
/// | `close-after` | the connection is closed after the answer, unannounced |
/// | `context` | 400, the context is too long |
/// | `content-filter` | streams and 200s end with `finish_reason: content_filter`; `content-filter=400` refuses |
/// | `garbage` | bytes that are no HTTP |
/// | `big=BYTES` | the answer's text has this many bytes |
/// | `error-event` | after `after` events (2) an error event, and the end |
/// | `delay-between=MS` | events come `MS` apart |
/// | `no-done` | the stream ends without `[DONE]` or its equivalent |
/// | `redirect=URL` | 307 to there |
///
/// A fault without `path` strikes every POST except those below `/simulate/`; with `path` it strikes every
/// method on paths that begin so. `times=N` ends it after N requests.
#[derive(Clone, Debug, PartialEq)]
pub struct Fault {
    kind: Kind,
    times: Option<u64>,
    path: Option<String>,
    after: Option<u32>,
    retry_after: Option<u64>,
}

#[derive(Clone, Debug, PartialEq)]
enum Kind {
    Status(u16),
    SlowFirst(Duration),
    SlowFirstToken(Duration),
    Stall,
    Cut,
    Reset,
    Drip(Duration),
    HalfUtf8,
    Gzip,
    Crlf,
    NoUsage,
    Hang,
    CloseAfter,
    Context,
    ContentFilter(bool),
    Garbage,
    Big(usize),
    ErrorEvent,
    DelayBetween(Duration),
    NoDone,
    Redirect(String),
}

const KINDS: &str = "status, slow-first, slow-first-token, stall, cut, reset, drip, half-utf8, gzip, crlf, no-usage, \
                     hang, close-after, context, content-filter, garbage, big, error-event, delay-between, no-done, \
                     redirect";

/// More would not fit in memory next to what quotes it.
const BIG_MAX: u64 = 64 << 20;

impl FromStr for Fault {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(',').map(str::trim);
        let first = parts.next().unwrap_or_default();
        let mut fault = Self { kind: kind(first)?, times: None, path: None, after: None, retry_after: None };
        for part in parts {
            fault.set(part)?;
        }
        Ok(fault)
    }
}

impl Fault {
    fn set(&mut self, option: &str) -> Result<(), String> {
        let (name, value) = option.split_once('=').unwrap_or((option, ""));
        match name {
            "times" => self.times = Some(number(name, value, 1, u64::MAX)?),
            "after" => self.after = Some(number(name, value, 0, u64::from(u32::MAX))? as u32),
            "retry_after" if matches!(self.kind, Kind::Status(_)) => {
                self.retry_after = Some(number(name, value, 0, 1_000_000)?);
            }
            "path" if value.starts_with('/') => self.path = Some(value.to_owned()),
            "path" => return Err(format!("fault option path={value}: must begin with /")),
            _ => {
                let allowed = "must be times=N, path=/..., after=EVENTS or (with status) retry_after=SECONDS";
                return Err(format!("unknown fault option `{option}`: {allowed}"));
            }
        }
        Ok(())
    }

    fn strikes(&self, method: &Method, path: &str) -> bool {
        match &self.path {
            Some(prefix) => path.starts_with(prefix.as_str()),
            None => method == Method::POST && !path.starts_with("/simulate/"),
        }
    }
}

fn kind(text: &str) -> Result<Kind, String> {
    let (name, value) = match text.split_once('=') {
        Some((name, value)) => (name, Some(value)),
        None => (text, None),
    };
    let needed = || value.unwrap_or_default();
    let wait = || number(name, needed(), 0, 86_400_000).map(Duration::from_millis);
    let bare = |kind: Kind| match value {
        None => Ok(kind),
        Some(value) => Err(format!("fault {name}={value}: {name} takes no value")),
    };
    match name {
        "status" => Ok(Kind::Status(number(name, needed(), 200, 599)? as u16)),
        "slow-first" => Ok(Kind::SlowFirst(wait()?)),
        "slow-first-token" => Ok(Kind::SlowFirstToken(wait()?)),
        "stall" => bare(Kind::Stall),
        "cut" => bare(Kind::Cut),
        "reset" => bare(Kind::Reset),
        "drip" => Ok(Kind::Drip(wait()?)),
        "half-utf8" => bare(Kind::HalfUtf8),
        "gzip" => bare(Kind::Gzip),
        "crlf" => bare(Kind::Crlf),
        "no-usage" => bare(Kind::NoUsage),
        "hang" => bare(Kind::Hang),
        "close-after" => bare(Kind::CloseAfter),
        "context" => bare(Kind::Context),
        "content-filter" if value == Some("400") => Ok(Kind::ContentFilter(true)),
        "content-filter" => bare(Kind::ContentFilter(false)),
        "garbage" => bare(Kind::Garbage),
        "big" => Ok(Kind::Big(number(name, needed(), 1, BIG_MAX)? as usize)),
        "error-event" => bare(Kind::ErrorEvent),
        "delay-between" => Ok(Kind::DelayBetween(wait()?)),
        "no-done" => bare(Kind::NoDone),
        "redirect" => redirect(needed()),
        _ => Err(format!("unknown fault `{name}`: must be one of {KINDS}")),
    }
}

fn redirect(url: &str) -> Result<Kind, String> {
    if url.is_empty() || http::HeaderValue::from_str(url).is_err() {
        return Err(format!("fault redirect={url}: must be a URL, such as redirect=http://127.0.0.1:9/"));
    }
    Ok(Kind::Redirect(url.to_owned()))
}

fn number(name: &str, value: &str, least: u64, most: u64) -> Result<u64, String> {
    let parsed = value.parse().ok().filter(|number| (least..=most).contains(number));
    parsed.ok_or_else(|| format!("fault {name}={value}: must be a whole number from {least} to {most}"))
}

/// The server's faults with what is left of their `times`.
#[derive(Debug, Default)]
pub(super) struct Faults(Vec<(Fault, AtomicU64)>);

impl Faults {
    pub(super) fn new(faults: Vec<Fault>) -> Self {
        let left = |fault: &Fault| AtomicU64::new(fault.times.unwrap_or(u64::MAX));
        Self(faults.into_iter().map(|fault| (left(&fault), fault)).map(|(left, fault)| (fault, left)).collect())
    }

    /// What goes wrong with this request: the server's faults, then those it asks for itself.
    pub(super) fn strike(&self, method: &Method, path: &str, headers: &HeaderMap) -> Trouble {
        let mut trouble = Trouble::default();
        for (fault, left) in &self.0 {
            if fault.strikes(method, path) && trouble.has_room(fault) && take_one(left) {
                trouble.add(fault);
            }
        }
        for asked in headers.get_all("x-simulate-fault") {
            trouble.add_asked(&String::from_utf8_lossy(asked.as_bytes()), method, path);
        }
        trouble
    }
}

fn take_one(left: &AtomicU64) -> bool {
    let fewer = |left: u64| if left == u64::MAX { Some(left) } else { left.checked_sub(1) };
    left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fewer).is_ok()
}

/// How an exchange ends that has no proper answer.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Instead {
    Status(u16, Option<u64>),
    Reset,
    Hang,
    Context,
    ContentFilter,
    Garbage,
    Redirect(String),
    /// The request asked for a fault that does not exist.
    Unknown(String),
}

/// How a stream ends before its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    Stall,
    Cut,
    Error,
}

/// What goes wrong with one request.
#[derive(Clone, Debug, Default)]
pub(super) struct Trouble {
    pub(super) instead: Option<Instead>,
    pub(super) ending: Option<(Ending, u32)>,
    pub(super) slow_first: Option<Duration>,
    pub(super) slow_first_token: Option<Duration>,
    pub(super) delay_between: Option<Duration>,
    pub(super) drip: Option<Duration>,
    pub(super) big: Option<usize>,
    pub(super) half_utf8: bool,
    pub(super) gzip: bool,
    pub(super) crlf: bool,
    pub(super) no_usage: bool,
    pub(super) no_done: bool,
    pub(super) close_after: bool,
    pub(super) filtered: bool,
}

impl Trouble {
    /// The first fault of a sort wins, so that the `times` of the next one are kept for the next request.
    fn has_room(&self, fault: &Fault) -> bool {
        match fault.kind {
            Kind::SlowFirst(_) => self.slow_first.is_none(),
            Kind::SlowFirstToken(_) => self.slow_first_token.is_none(),
            Kind::Drip(_) => self.drip.is_none(),
            Kind::HalfUtf8 => !self.half_utf8,
            Kind::Gzip => !self.gzip,
            Kind::Crlf => !self.crlf,
            Kind::NoUsage => !self.no_usage,
            Kind::CloseAfter => !self.close_after,
            Kind::ContentFilter(false) => !self.filtered,
            Kind::Big(_) => self.big.is_none(),
            Kind::DelayBetween(_) => self.delay_between.is_none(),
            Kind::NoDone => !self.no_done,
            Kind::Stall | Kind::Cut | Kind::ErrorEvent => self.ending.is_none() && self.instead.is_none(),
            _ => self.instead.is_none() && self.ending.is_none(),
        }
    }

    fn add_asked(&mut self, asked: &str, method: &Method, path: &str) {
        for text in asked.split(';').map(str::trim).filter(|text| !text.is_empty()) {
            match text.parse::<Fault>() {
                Ok(fault) if fault.path.is_some() && !fault.strikes(method, path) => {}
                Ok(fault) if self.has_room(&fault) => self.add(&fault),
                Ok(_) => {}
                Err(why) => self.instead = Some(Instead::Unknown(why)),
            }
        }
    }

    fn add(&mut self, fault: &Fault) {
        let after = fault.after.unwrap_or(2);
        match &fault.kind {
            Kind::Status(status) => self.instead = Some(Instead::Status(*status, fault.retry_after)),
            Kind::Reset => self.instead = Some(Instead::Reset),
            Kind::Hang => self.instead = Some(Instead::Hang),
            Kind::Context => self.instead = Some(Instead::Context),
            Kind::ContentFilter(true) => self.instead = Some(Instead::ContentFilter),
            Kind::ContentFilter(false) => self.filtered = true,
            Kind::Garbage => self.instead = Some(Instead::Garbage),
            Kind::Redirect(url) => self.instead = Some(Instead::Redirect(url.clone())),
            Kind::Stall => self.ending = Some((Ending::Stall, after)),
            Kind::Cut => self.ending = Some((Ending::Cut, after)),
            Kind::ErrorEvent => self.ending = Some((Ending::Error, after)),
            Kind::SlowFirst(wait) => self.slow_first = Some(*wait),
            Kind::SlowFirstToken(wait) => self.slow_first_token = Some(*wait),
            Kind::DelayBetween(wait) => self.delay_between = Some(*wait),
            Kind::Drip(wait) => self.drip = Some(*wait),
            Kind::Big(bytes) => self.big = Some(*bytes),
            Kind::HalfUtf8 => self.half_utf8 = true,
            Kind::Gzip => self.gzip = true,
            Kind::Crlf => self.crlf = true,
            Kind::NoUsage => self.no_usage = true,
            Kind::NoDone => self.no_done = true,
            Kind::CloseAfter => self.close_after = true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strike(faults: &Faults, path: &str) -> Trouble {
        faults.strike(&Method::POST, path, &HeaderMap::new())
    }

    #[test]
    fn a_fault_with_times_ends_and_the_next_of_its_sort_takes_over() {
        let parse = |text: &str| text.parse::<Fault>().unwrap();
        let faults =
            Faults::new(vec![parse("status=503,times=1,retry_after=2"), parse("reset,times=1"), parse("crlf")]);
        assert_eq!(strike(&faults, "/v1/x").instead, Some(Instead::Status(503, Some(2))));
        assert_eq!(strike(&faults, "/v1/x").instead, Some(Instead::Reset));
        let third = strike(&faults, "/v1/x");
        assert_eq!((third.instead, third.crlf), (None, true));
    }

    #[test]
    fn a_path_limits_a_fault_and_extends_it_to_every_method() {
        let faults = Faults::new(vec!["hang,path=/health".parse().unwrap()]);
        assert_eq!(strike(&faults, "/v1/x").instead, None);
        let health = faults.strike(&Method::GET, "/health", &HeaderMap::new());
        assert_eq!(health.instead, Some(Instead::Hang));
    }

    #[test]
    fn a_request_may_ask_for_several_faults() {
        let mut headers = HeaderMap::new();
        headers.insert("x-simulate-fault", "stall,after=7; gzip".parse().unwrap());
        let trouble = Faults::default().strike(&Method::POST, "/v1/x", &headers);
        assert_eq!((trouble.ending, trouble.gzip), (Some((Ending::Stall, 7)), true));
    }

    #[test]
    fn a_bad_fault_says_what_is_allowed() {
        for (text, expected) in [
            ("status", "from 200 to 599"),
            ("status=9", "from 200 to 599"),
            ("cut=3", "takes no value"),
            ("cut,when=3", "after=EVENTS"),
            ("gzip,retry_after=3", "(with status)"),
            ("cut,path=v1", "must begin with /"),
            ("redirect", "must be a URL"),
            ("boom", "must be one of status"),
        ] {
            let said = text.parse::<Fault>().unwrap_err();
            assert!(said.contains(expected), "{text}: {said}");
        }
    }
}
