//! A record as JSON, in a fraction of the time that serde_json takes: every request passes here.
//!
//! Only the shapes that records have are known. Whatever else comes is refused, and serde_json writes it instead.

use std::{fmt, io};

use serde::Serialize;
use serde::ser::{Impossible, SerializeSeq, SerializeStruct, Serializer};

use crate::decimal;

/// Appends what serde_json would append. After an error, part of it has been written.
pub(super) fn append(out: &mut Line, value: &impl Serialize) -> Result<(), Unusual> {
    value.serialize(Json(out))
}

/// A line that is being written. Its room is there before it is needed, so that a part whose length is known is a few
/// stores.
#[derive(Debug, Default)]
pub(super) struct Line {
    text: Vec<u8>,
    end: usize,
}

impl Line {
    /// An empty one.
    pub(super) const fn new() -> Self {
        Self { text: Vec::new(), end: 0 }
    }

    /// What has been written.
    pub(super) fn text(&self) -> &[u8] {
        &self.text[..self.end]
    }

    /// Takes back what was written behind the first `end` bytes.
    pub(super) fn truncate(&mut self, end: usize) {
        self.end = self.end.min(end);
    }

    /// Appends a part.
    #[inline(always)]
    pub(super) fn put(&mut self, part: &[u8]) {
        self.room(part.len()).copy_from_slice(part);
    }

    /// Replaces a byte that has been written.
    pub(super) fn set(&mut self, at: usize, byte: u8) {
        if let Some(written) = self.text.get_mut(at) {
            *written = byte;
        }
    }

    /// The next bytes, to be written over.
    #[inline(always)]
    fn room(&mut self, bytes: usize) -> &mut [u8] {
        let begin = self.end;
        self.end = begin + bytes;
        if self.end > self.text.len() {
            self.grow();
        }
        &mut self.text[begin..begin + bytes]
    }

    #[cold]
    #[inline(never)]
    fn grow(&mut self) {
        self.text.resize(self.end.next_power_of_two().max(4096), 0);
    }

    /// Appends text in which nothing is to be escaped.
    #[inline]
    fn quote(&mut self, plain: &str) {
        if let [open, between @ .., close] = self.room(plain.len() + 2) {
            (*open, *close) = (b'"', b'"');
            copy(between, plain.as_bytes());
        }
    }
}

impl io::Write for Line {
    fn write(&mut self, part: &[u8]) -> io::Result<usize> {
        self.put(part);
        Ok(part.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A shape that no record has.
#[derive(Debug)]
pub(super) struct Unusual;

impl fmt::Display for Unusual {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("no record has such a member")
    }
}

impl std::error::Error for Unusual {}

impl serde::ser::Error for Unusual {
    fn custom<T: fmt::Display>(_: T) -> Self {
        Self
    }
}

/// Where the next value goes.
struct Json<'a>(&'a mut Line);

/// An object or a list that begins at a place. Each member has a comma before it; the first one's becomes the bracket.
struct Members<'a>(&'a mut Line, usize);

impl Members<'_> {
    #[inline(always)]
    fn close(self, [open, close]: [u8; 2]) {
        if self.0.end == self.1 {
            self.0.put(&[open]);
        }
        self.0.set(self.1, open);
        self.0.put(&[close]);
    }
}

impl SerializeStruct for Members<'_> {
    type Ok = ();
    type Error = Unusual;

    /// The keys are ours: nothing in them is to be escaped. Inlined, they are constants.
    #[inline(always)]
    fn serialize_field<T: Serialize + ?Sized>(&mut self, key: &'static str, value: &T) -> Result<(), Unusual> {
        if let [comma, open, between @ .., close, colon] = self.0.room(key.len() + 4) {
            (*comma, *open, *close, *colon) = (b',', b'"', b'"', b':');
            between.copy_from_slice(key.as_bytes());
        }
        value.serialize(Json(self.0))
    }

    fn end(self) -> Result<(), Unusual> {
        self.close(*b"{}");
        Ok(())
    }
}

impl SerializeSeq for Members<'_> {
    type Ok = ();
    type Error = Unusual;

    fn serialize_element<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Unusual> {
        self.0.put(b",");
        value.serialize(Json(self.0))
    }

    fn end(self) -> Result<(), Unusual> {
        self.close(*b"[]");
        Ok(())
    }
}

/// Methods for shapes that no record has.
macro_rules! unusual {
    ($($method:ident($($argument:ty),*) -> $made:ty;)*) => {
        $(fn $method(self, $(_: $argument),*) -> Result<$made, Unusual> {
            Err(Unusual)
        })*
    };
}

type Never = Impossible<(), Unusual>;

impl<'a> Serializer for Json<'a> {
    type Ok = ();
    type Error = Unusual;
    type SerializeSeq = Members<'a>;
    type SerializeStruct = Members<'a>;
    type SerializeTuple = Never;
    type SerializeTupleStruct = Never;
    type SerializeTupleVariant = Never;
    type SerializeMap = Never;
    type SerializeStructVariant = Never;

    fn serialize_bool(self, value: bool) -> Result<(), Unusual> {
        self.0.put(if value { b"true" } else { b"false" });
        Ok(())
    }

    fn serialize_u8(self, value: u8) -> Result<(), Unusual> {
        self.serialize_u64(value.into())
    }

    fn serialize_u16(self, value: u16) -> Result<(), Unusual> {
        self.serialize_u64(value.into())
    }

    fn serialize_u32(self, value: u32) -> Result<(), Unusual> {
        self.serialize_u64(value.into())
    }

    fn serialize_u64(self, value: u64) -> Result<(), Unusual> {
        self.0.put(decimal::digits(value, &mut [0; 20]));
        Ok(())
    }

    fn serialize_str(self, text: &str) -> Result<(), Unusual> {
        if is_plain(text.as_bytes()) {
            self.0.quote(text);
            return Ok(());
        }
        serde_json::to_writer(self.0, text).map_err(|_| Unusual)
    }

    fn serialize_unit_variant(self, _: &'static str, _: u32, name: &'static str) -> Result<(), Unusual> {
        self.0.quote(name);
        Ok(())
    }

    fn serialize_none(self) -> Result<(), Unusual> {
        self.0.put(b"null");
        Ok(())
    }

    fn serialize_some<T: Serialize + ?Sized>(self, value: &T) -> Result<(), Unusual> {
        value.serialize(self)
    }

    fn serialize_newtype_struct<T: Serialize + ?Sized>(self, _: &'static str, value: &T) -> Result<(), Unusual> {
        value.serialize(self)
    }

    fn serialize_seq(self, _: Option<usize>) -> Result<Members<'a>, Unusual> {
        let begin = self.0.end;
        Ok(Members(self.0, begin))
    }

    fn serialize_struct(self, _: &'static str, _: usize) -> Result<Members<'a>, Unusual> {
        let begin = self.0.end;
        Ok(Members(self.0, begin))
    }

    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        _: u32,
        _: &'static str,
        _: &T,
    ) -> Result<(), Unusual> {
        Err(Unusual)
    }

    unusual! {
        serialize_i8(i8) -> ();
        serialize_i16(i16) -> ();
        serialize_i32(i32) -> ();
        serialize_i64(i64) -> ();
        serialize_f32(f32) -> ();
        serialize_f64(f64) -> ();
        serialize_char(char) -> ();
        serialize_bytes(&[u8]) -> ();
        serialize_unit() -> ();
        serialize_unit_struct(&'static str) -> ();
        serialize_tuple(usize) -> Never;
        serialize_tuple_struct(&'static str, usize) -> Never;
        serialize_tuple_variant(&'static str, u32, &'static str, usize) -> Never;
        serialize_map(Option<usize>) -> Never;
        serialize_struct_variant(&'static str, u32, &'static str, usize) -> Never;
    }
}

/// Copies a short text as its two ends, which may overlap: most texts of a record are short, and a call costs more.
#[inline(always)]
fn copy(to: &mut [u8], from: &[u8]) {
    match from.len() {
        4..8 => copy_ends::<4>(to, from),
        8..16 => copy_ends::<8>(to, from),
        16..=32 => copy_ends::<16>(to, from),
        _ => to.copy_from_slice(from),
    }
}

#[inline(always)]
fn copy_ends<const N: usize>(to: &mut [u8], from: &[u8]) {
    if let Some((to, from)) = to.first_chunk_mut::<N>().zip(from.first_chunk()) {
        *to = *from;
    }
    if let Some((to, from)) = to.last_chunk_mut::<N>().zip(from.last_chunk()) {
        *to = *from;
    }
}

/// Whether nothing in `text` must be escaped: sixteen bytes at a time, or eight, the last ones once more.
#[inline(always)]
fn is_plain(text: &[u8]) -> bool {
    if let Some(last) = text.last_chunk::<16>() {
        return !any_special(last) && !text.as_chunks::<16>().0.iter().any(any_special);
    }
    if let Some((first, last)) = text.first_chunk::<8>().zip(text.last_chunk::<8>()) {
        return !special(*first) && !special(*last);
    }
    match text.first_chunk::<4>().zip(text.last_chunk::<4>()) {
        Some(([a, b, c, d], [e, f, g, h])) => !special([*a, *b, *c, *d, *e, *f, *g, *h]),
        None => !text.iter().any(is_special),
    }
}

fn is_special(byte: &u8) -> bool {
    *byte < b' ' || *byte == b'"' || *byte == b'\\'
}

/// Without a branch, so that it becomes a few instructions for all sixteen.
fn any_special(sixteen: &[u8; 16]) -> bool {
    sixteen.iter().fold(false, |found, byte| found | is_special(byte))
}

/// Whether one of eight bytes is a quote, a backslash or a control character.
fn special(eight: [u8; 8]) -> bool {
    const ONES: u64 = u64::MAX / 255;
    let word = u64::from_ne_bytes(eight);
    // The highest bit of a byte is set where the byte is less than `bound`, if that is so in any of them.
    let below = |word: u64, bound: u8| word.wrapping_sub(ONES * u64::from(bound)) & !word;
    let same = |byte: u8| below(word ^ (ONES * u64::from(byte)), 1);
    (below(word, b' ') | same(b'"') | same(b'\\')) & (ONES << 7) != 0
}

#[cfg(test)]
mod tests {
    use std::time::{Instant, SystemTime};

    use infergate_plugins::operation::Operation;
    use infergate_plugins::router::score::{Judged, Takes};
    use serde_json::json;

    use super::*;
    use crate::audit::capture::Mark;
    use crate::audit::record::{
        Attempt, AttemptList, BodyBytes, CandidateList, Client, Decision, Ending, Id, Models, Moment, Outcome, Peer,
        PolicyMark, Record, Times, Trace,
    };
    use crate::money::NanoUsd;
    use crate::money::bill::Cost;
    use crate::policy::{Policy, World, compile};
    use crate::pool::Wanted;
    use crate::routers::shortlist::{Out, Weight};
    use crate::settings::Settings;
    use crate::state::State;
    use crate::telemetry::Telemetry;
    use crate::usage::{Source, Usage};

    #[derive(Serialize)]
    struct All<'a> {
        text: &'a str,
        yes: bool,
        number: u64,
        small: Option<u16>,
        list: &'a [Kind],
        none: Option<u64>,
        empty: &'a [Inner],
        inner: Inner,
    }

    #[derive(Clone, Copy, Serialize)]
    #[serde(rename_all = "snake_case")]
    enum Kind {
        OneWord,
        Two,
    }

    #[derive(Serialize)]
    struct Inner {
        #[serde(skip_serializing_if = "Option::is_none")]
        absent: Option<u64>,
    }

    fn same(value: &impl Serialize) {
        let mut line = Line::new();
        line.put(b"before");
        append(&mut line, value).unwrap();
        assert_eq!(
            std::str::from_utf8(line.text()).unwrap(),
            format!("before{}", serde_json::to_string(value).unwrap())
        );
    }

    #[test]
    fn everything_is_spelt_as_serde_json_spells_it() {
        let powers = (0..20).map(|zeros| 10_u64.pow(zeros));
        for number in powers.flat_map(|power| [power - 1, power, power + 7]).chain([65_535, 10_020_003, u64::MAX]) {
            let (list, inner) = (&[Kind::OneWord, Kind::Two], Inner { absent: None });
            let (none, empty, small) = (None, &[], Some(503));
            same(&All { text: "x", yes: number == 0, number, small, list, none, empty, inner });
        }
    }

    /// A policy with one upstream at `url`.
    fn policy(url: &str) -> Policy {
        let (telemetry, state, settings) = (Telemetry::new(), State::new(0), Settings::default());
        let text =
            format!("version: 1\npools:\n  p: {{upstreams: [{{url: '{url}'}}]}}\nmodels: [{{name: m, pool: p}}]\n");
        compile(&text, &World::new(&|_| None, &state, &telemetry, &settings)).unwrap()
    }

    #[test]
    fn a_record_is_spelt_as_serde_json_spells_it() {
        let peers = ["10.1.200.3:4567", "[2001:db8::1]:80"].map(|peer| Some(peer.parse().unwrap()));
        for (url, peer) in
            ["http://127.0.0.1:8000", "http://[::1]:1", "unix:/run/x"].into_iter().zip(peers.into_iter().chain([None]))
        {
            let policy = policy(url);
            let (now, pool) = (Instant::now(), &policy.pools["p"]);
            let mut attempt = Attempt::begin(pool, &pool.pick(&Wanted::of(Operation::Chat), &[], now).unwrap(), 7, 8);
            attempt.end(Ending::Broken, Some("it \"broke\"\n".to_owned().into()));
            let moment = Moment { at: SystemTime::now(), received: now, ended: Instant::now() };
            let decision =
                Decision { stage: "route", rule: "m".into(), verdict: "p".into(), why: "x".repeat(300).into() };
            let sum = "0".repeat(64);
            let takes = Takes { nanousd: Some(1.5e6), first_token_s: None };
            let judged = Judged { terms: [Some(0.5), None, Some(1.0), None], score: 0.75, loss: 0.125 };
            let out = peer.map(|_| Out::Away);
            let weight = Weight { model: "m".into(), out, stays: out.is_none(), held: 7, takes, judged };
            same(&Record {
                id: Id::new(),
                outcome: Outcome::UpstreamError,
                status: peer.map(|_| 502),
                surface: "/v1/chat/completions",
                operation: "chat",
                method: "POST",
                stream: true,
                client: Client { address: Peer(peer), protocol: "h2", request_id: Some("\u{1}\\") },
                trace: Some(Trace { id: u128::MAX - 1, span: 1, parent: peer.map(|_| 0xab), sampled: true }),
                principal: Some("中"),
                tenant: None,
                model: Models { asked: Some("a\tb"), ..Models::default() },
                policy: PolicyMark { revision: u64::MAX, hash: &policy.hash },
                decisions: &[decision],
                candidates: Some(CandidateList(&[weight])),
                attempts: AttemptList {
                    list: &[attempt],
                    moment,
                    bytes: BodyBytes::default(),
                    metered: None,
                    route: None,
                },
                usage: Usage { input_tokens: Some(0), source: Source::Upstream, ..Usage::default() },
                cost: Some(Cost { nanousd: NanoUsd(1_234), prices: "0123456789ab" }),
                unpriced: false,
                guardrails: None,
                limits: None,
                bytes: BodyBytes { request: 1_234_567_890, answer: 0 },
                capture: Some(Mark { request: sum.clone(), answer: sum, cut: false }),
                times: Times { body: Some(1), ended: 10, ..Times::default() },
                code: Some("upstream_closed"),
                message: Some("it broke off"),
                moment,
            });
        }
    }

    #[test]
    fn every_byte_is_escaped_where_it_must_be_wherever_it_stands() {
        for byte in 0..=127u8 {
            let lengths = [(0, 0), (0, 3), (2, 2), (4, 0), (0, 7), (3, 4), (7, 0), (8, 1), (9, 20), (16, 16), (30, 0)];
            for (before, behind) in lengths {
                let text = ["a".repeat(before), char::from(byte).to_string(), "z".repeat(behind)].concat();
                same(&text.as_str());
            }
        }
        same(&"中文, \u{7f}\u{80}\u{2028} and \u{10ffff} pass, 12345678");
    }

    #[test]
    fn a_line_grows_with_what_is_in_it() {
        let (mut line, mut expected) = (Line::new(), Vec::new());
        for length in [0, 1, 4_094, 1, 5_000, 70_000] {
            let text = "x".repeat(length);
            append(&mut line, &&*text).unwrap();
            expected.extend(serde_json::to_vec(&text).unwrap());
            assert_eq!(line.text(), expected);
        }
        line.truncate(2);
        assert_eq!(line.text(), b"\"\"");
    }

    #[test]
    fn what_no_record_has_is_left_to_serde_json() {
        assert!(append(&mut Line::new(), &json!({"a": 1})).is_err());
        assert!(append(&mut Line::new(), &-1).is_err());
        assert!(append(&mut Line::new(), &0.5).is_err());
    }
}
