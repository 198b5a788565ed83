//! What clients do: whole and streamed answers, some that leave in the middle, some that are refused, some that meet a
//! faulty server; under names that come again and names that never do.

use super::world::Turns;
use crate::prompt::{self, Turns as Laid};
use crate::wire::{Head, Wire};
use crate::{Failure, upstream};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::task::{JoinSet, LocalSet};
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

/// What clients may say now.
#[derive(Clone)]
pub struct Names {
    /// Which policy's names are good.
    pub epoch: u32,
    /// The keys.
    pub keys: Vec<String>,
}

/// All clients together.
#[derive(Clone)]
pub struct Client(Rc<Shared>);

struct Shared {
    target: SocketAddr,
    names: RefCell<Names>,
    kept: RefCell<Vec<Wire>>,
    tally: RefCell<Tally>,
    bodies: [String; 2],
    next: Cell<u64>,
}

/// What came of everything.
#[derive(Clone, Default)]
pub struct Tally {
    /// Requests by what was asked and what came.
    pub outcomes: BTreeMap<(Kind, String), u64>,
    /// What should not have come.
    pub errors: u64,
    /// The first few of those.
    pub first_errors: Vec<String>,
    /// Requests that were not sent because too many were under way.
    pub late: u64,
    /// Requests that were sent.
    pub sent: u64,
    /// What the world did meanwhile.
    pub turns: Turns,
}

/// What a client does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// It waits for a whole answer.
    Whole,
    /// It reads a stream to its end.
    Stream,
    /// It leaves after the first event.
    Leaves,
    /// It has no key that is known.
    Stranger,
    /// It asks for a model that is not there.
    Astray,
    /// It says what a guardrail forbids.
    Forbidden,
    /// It asks where a user has two requests a minute.
    Greedy,
    /// It sends what is no JSON.
    Broken,
    /// It is sent to a server that makes a mistake.
    Unlucky,
}

/// Of a hundred requests, in an order without bunches.
const SHARES: [(Kind, u64); 9] = [
    (Kind::Whole, 58),
    (Kind::Stream, 18),
    (Kind::Leaves, 6),
    (Kind::Stranger, 4),
    (Kind::Astray, 2),
    (Kind::Forbidden, 4),
    (Kind::Greedy, 3),
    (Kind::Broken, 2),
    (Kind::Unlucky, 3),
];

/// What the faulty server does.
const FAULTS: [&str; 8] = [
    "status=500",
    "status=429,retry_after=1",
    "cut,after=2",
    "reset",
    "garbage",
    "error-event",
    "no-done",
    "half-utf8",
];

/// Events of a stream, and how far apart they are.
const EVENTS: u64 = 6;
const INTERVAL: Duration = Duration::from_millis(15);
/// The end is an event too; the usage, which nobody here asked for, the gateway keeps.
const END_EVENTS: u64 = 1;
/// So many clients at most are under way.
const AT_ONCE: usize = 1000;
/// Connections that are kept between requests.
const KEPT: usize = 64;
/// Connections of the closed loop.
const LOOPS: usize = 24;
/// How long an answer may take: longer than any time-out of the gateway.
const PATIENCE: Duration = Duration::from_secs(60);
/// Users that come again.
const REGULARS: u64 = 500;

impl Client {
    /// Clients of `target`.
    pub fn new(target: SocketAddr, names: Names) -> Self {
        let bodies =
            [1 << 10, 12 << 10].map(|size| String::from_utf8_lossy(&prompt::chat(size, Laid::One, false)).into());
        Self(Rc::new(Shared {
            target,
            names: RefCell::new(names),
            kept: RefCell::default(),
            tally: RefCell::default(),
            bodies,
            next: Cell::new(0),
        }))
    }

    /// From now on these names are said.
    pub fn say(&self, names: Names) {
        *self.0.names.borrow_mut() = names;
    }

    /// What came so far.
    pub fn tally(&self) -> Tally {
        self.0.tally.borrow().clone()
    }

    /// The same, and counting begins anew.
    pub fn take_tally(&self) -> Tally {
        self.0.tally.take()
    }

    /// Asks one after the other until `end`; says how often.
    pub async fn closed_loop(&self, end: Instant) -> Result<u64, Failure> {
        let local = LocalSet::new();
        let before = self.tally().sent;
        for _ in 0..LOOPS {
            let client = self.clone();
            local.spawn_local(async move {
                while Instant::now() < end {
                    client.one().await;
                }
            });
        }
        local.await;
        Ok(self.tally().sent - before)
    }

    /// Asks so many times a second until `end`, whatever comes back.
    pub async fn open_loop(&self, rate: f64, end: Instant) -> Result<(), Failure> {
        let local = LocalSet::new();
        local.run_until(self.at_a_rate(rate, end)).await
    }

    async fn at_a_rate(&self, rate: f64, end: Instant) -> Result<(), Failure> {
        // A tick is at least a millisecond: as many requests as are due leave with each.
        let mut ticks = interval(Duration::from_secs_f64((1.0 / rate).max(0.002)));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let (began, mut due, mut running) = (Instant::now(), 0.0, JoinSet::new());
        while Instant::now() < end {
            ticks.tick().await;
            while running.try_join_next().is_some() {}
            while due < began.elapsed().as_secs_f64() * rate {
                due += 1.0;
                match running.len() < AT_ONCE {
                    true => drop(running.spawn_local({
                        let client = self.clone();
                        async move { client.one().await }
                    })),
                    false => self.0.tally.borrow_mut().late += 1,
                }
            }
        }
        while running.join_next().await.is_some() {}
        Ok(())
    }

    /// What a burst has opened is closed again.
    fn keep(&self, wire: Wire) {
        let mut kept = self.0.kept.borrow_mut();
        if kept.len() < KEPT {
            kept.push(wire);
        }
    }

    /// One request of one client.
    async fn one(&self) {
        let number = self.0.next.replace(self.0.next.get() + 1);
        let visit = Visit::of(number, &self.0.names.borrow(), &self.0.bodies);
        self.0.tally.borrow_mut().sent += 1;
        let came = match timeout(PATIENCE, visit.make(self)).await {
            Ok(came) => came,
            Err(_) => Err(format!("nothing in {PATIENCE:?}").into()),
        };
        self.0.tally.borrow_mut().count(&visit, came);
    }
}

/// One request.
struct Visit {
    number: u64,
    kind: Kind,
    request: String,
}

impl Visit {
    fn of(number: u64, names: &Names, bodies: &[String; 2]) -> Self {
        let kind = kind(number);
        let body = body(number, kind, names, bodies);
        let lines = lines(number, kind);
        let key = match kind {
            Kind::Stranger => format!("ig_{number:06}{}", "x".repeat(49)),
            _ => names.keys[number as usize % names.keys.len()].clone(),
        };
        let length = body.len();
        let request = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {key}\r\ncontent-type: application/json\r\n{lines}content-length: {length}\r\n\r\n{body}"
        );
        Self { number, kind, request }
    }

    /// Sends it and says what came.
    async fn make(&self, client: &Client) -> Result<String, Failure> {
        let kept = client.0.kept.borrow_mut().pop();
        let mut wire = match kept {
            // A few connections are new, so that none lives for ever.
            Some(wire) if !self.number.is_multiple_of(64) => wire,
            _ => Wire::new(TcpStream::connect(client.0.target).await?)?,
        };
        wire.socket.write_all(self.request.as_bytes()).await?;
        let head = wire.head().await?.ok_or("closed instead of an answer")?;
        if self.kind == Kind::Leaves && head.word(1) == "200" {
            wire.piece(&mut head.framing(), &mut |_| {}).await?;
            // Some leave at once, some in the middle of what follows.
            sleep(INTERVAL * u32::try_from(self.number % 4)?).await;
            return Ok("left".to_owned());
        }
        let outcome = self.read(&mut wire, &head).await?;
        if !head.closes() && outcome != BROKEN_OFF {
            client.keep(wire);
        }
        Ok(outcome)
    }

    /// Reads the answer to its end: its status, or that there was no end.
    async fn read(&self, wire: &mut Wire, head: &Head) -> Result<String, Failure> {
        let (status, mut text) = (head.word(1).to_owned(), Vec::new());
        let whole = wire.body(head.framing(), |piece| text.extend_from_slice(piece)).await;
        match (self.kind, whole) {
            (Kind::Unlucky, Err(_)) => return Ok(BROKEN_OFF.to_owned()),
            (_, whole) => whole?,
        }
        let is_right = match self.kind {
            Kind::Whole => status != "200" || text == upstream::COMPLETION.as_bytes(),
            Kind::Stream => {
                status != "200" || text.ends_with(b"data: [DONE]\n\n") && events(&text) == EVENTS + END_EVENTS
            }
            _ => true,
        };
        match is_right {
            true => Ok(status),
            false => Err(format!("a wrong answer: {}", beginning(&text)).into()),
        }
        .and_then(|status| match self.kind.expects(&status) {
            true => Ok(status),
            false => Err(format!("{status}: {}", beginning(&text)).into()),
        })
    }
}

const BROKEN_OFF: &str = "broken off";

impl Kind {
    /// Whether this status is no surprise.
    fn expects(self, status: &str) -> bool {
        match self {
            Self::Whole | Self::Stream | Self::Leaves => status == "200",
            Self::Stranger => status == "401",
            Self::Astray => status == "404",
            Self::Forbidden | Self::Broken => status == "400",
            Self::Greedy => matches!(status, "200" | "429"),
            Self::Unlucky => true,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Whole => "whole answers",
            Self::Stream => "streams",
            Self::Leaves => "clients that leave",
            Self::Stranger => "unknown keys",
            Self::Astray => "unknown models",
            Self::Forbidden => "forbidden words",
            Self::Greedy => "a tight limit",
            Self::Broken => "broken JSON",
            Self::Unlucky => "a faulty server",
        })
    }
}

impl Tally {
    fn count(&mut self, visit: &Visit, came: Result<String, Failure>) {
        let outcome = came.unwrap_or_else(|failure| {
            self.errors += 1;
            if self.first_errors.len() < 10 {
                self.first_errors.push(format!("request {} ({}): {failure}", visit.number, visit.kind));
            }
            "ERROR".to_owned()
        });
        *self.outcomes.entry((visit.kind, outcome)).or_default() += 1;
    }
}

/// Neighbours are of different kinds, and every kind comes as often as it should.
fn kind(number: u64) -> Kind {
    let mut place = number * 37 % 100;
    for (kind, share) in SHARES {
        match place.checked_sub(share) {
            Some(rest) => place = rest,
            None => return kind,
        }
    }
    Kind::Whole
}

/// A conversation that begins like no other, or like one of a few; of a user that comes again, or never.
fn body(number: u64, kind: Kind, names: &Names, bodies: &[String; 2]) -> String {
    let text = &bodies[usize::from(number.is_multiple_of(29))];
    let (epoch, is_new) = (names.epoch, number.is_multiple_of(2));
    let model = match (kind, number % 5) {
        (Kind::Astray, _) => format!("nobody-{number}"),
        (Kind::Greedy, _) => "tight".to_owned(),
        (Kind::Unlucky, _) => "faulty".to_owned(),
        (_, 0) => "auto".to_owned(),
        (_, 1) => format!("router-{epoch}"),
        (_, 2) => format!("model-{epoch}"),
        _ => "steady".to_owned(),
    };
    let user = match (kind, is_new) {
        (Kind::Greedy, _) => number / 100 % 40,
        (_, true) => REGULARS + number,
        (_, false) => number % REGULARS,
    };
    let begins = match (kind, is_new) {
        (Kind::Forbidden, _) => format!("{number} Project Bluebird, say"),
        (_, true) => format!("{number:013}"),
        (_, false) => format!("{:013}", number % REGULARS),
    };
    let stream = match kind {
        Kind::Stream | Kind::Leaves => ",\"stream\":true",
        Kind::Unlucky if number.is_multiple_of(2) => ",\"stream\":true",
        _ => "",
    };
    let body = text.replacen("The committee", &begins, 1);
    let mut body = body.replacen("\"load-model\"", &format!("\"{model}\",\"user\":\"user-{user}\"{stream}"), 1);
    if kind == Kind::Broken {
        body.truncate(body.len() - 2);
    }
    body
}

fn lines(number: u64, kind: Kind) -> String {
    let micros = INTERVAL.as_micros();
    match kind {
        Kind::Stream | Kind::Leaves => format!("x-load-events: {EVENTS}\r\nx-load-interval-us: {micros}\r\n"),
        Kind::Unlucky => format!("x-simulate-fault: {}\r\n", FAULTS[number as usize / 100 % FAULTS.len()]),
        _ => String::new(),
    }
}

fn events(text: &[u8]) -> u64 {
    let lines = text.split(|byte| *byte == b'\n');
    lines.filter(|line| line.starts_with(b"data:")).count() as u64
}

fn beginning(text: &[u8]) -> String {
    String::from_utf8_lossy(&text[..text.len().min(300)]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_its_share() {
        assert_eq!(SHARES.iter().map(|(_, share)| share).sum::<u64>(), 100);
        for (wanted, share) in SHARES {
            assert_eq!((0..1000).filter(|number| kind(*number) == wanted).count() as u64, share * 10, "{wanted}");
        }
    }

    #[test]
    fn a_request_is_json_under_the_names_of_its_policy_unless_it_should_not_be() {
        let names = Names { epoch: 7, keys: vec!["key".to_owned()] };
        let bodies =
            [1 << 10, 12 << 10].map(|size| String::from_utf8_lossy(&prompt::chat(size, Laid::One, false)).into_owned());
        for number in 0..200 {
            let kind = kind(number);
            let json = serde_json::from_str::<serde_json::Value>(&body(number, kind, &names, &bodies));
            assert_eq!(json.is_err(), kind == Kind::Broken, "{number}: {kind:?}: {json:?}");
            if let Ok(json) = json {
                assert_eq!(
                    json["stream"] == true,
                    matches!(kind, Kind::Stream | Kind::Leaves) || kind == Kind::Unlucky && number.is_multiple_of(2)
                );
                assert!(json["user"].is_string());
            }
        }
    }
}
