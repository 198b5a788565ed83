//! The words by which a request asks a model to think, changed as the decision that chose the model says: by splices,
//! every other byte stays as it came.

use std::ops::Range;

use infergate_plugins::operation::Operation;
use infergate_plugins::router::effort::{Effort, Level};

use super::{Decided, Routers};
use crate::audit::record::Text;
use crate::exchange::Exchange;
use crate::parameters::{self, Members, insert, one};
use crate::pipeline::Planned;
use crate::refusal::Refusal;
use crate::scan::{self, Edit};

/// What becomes of a body, and why.
#[derive(Debug)]
struct Change {
    edits: Vec<Edit>,
    verdict: &'static str,
    why: &'static str,
}

/// A body whose members are known, at an endpoint that has words for thinking.
struct Said<'a> {
    operation: Operation,
    body: &'a [u8],
    members: Members,
    /// Whether the model is to go on from what a tool gave back.
    in_loop: bool,
    /// The most tokens of the answer.
    output_max: Option<u64>,
    /// Whether the tenant's parameters put something in that rules thinking out.
    hindered: bool,
}

/// What Anthropic's API does not take beside thinking; of `tool_choice` only what forces a tool.
const HINDERS: [&str; 3] = ["temperature", "top_k", "tool_choice"];

/// Changes what the request says of thinking as the decision wants it.
pub(super) fn apply(
    exchange: &mut Exchange,
    planned: &mut Planned,
    routers: &Routers,
    decided: &Decided,
) -> Result<(), Refusal> {
    let Some(effort) = routers.effort.get(decided.by.as_str()).copied() else { return Ok(()) };
    says(exchange, planned, effort, (decided.by.clone(), decided.in_loop))
}

/// Changes it as this rule wants it.
pub fn says(
    exchange: &mut Exchange,
    planned: &mut Planned,
    effort: Effort,
    (rule, in_loop): (Text, bool),
) -> Result<(), Refusal> {
    let (surface, body) = (planned.identified.surface, planned.received.body.clone());
    let names = names(surface.operation);
    let Some(members) = scan::members(&body).filter(|_| !names.is_empty()) else { return Ok(()) };
    let asked = planned.scan.output_max(surface.operation, &body).ok().flatten();
    let cap = exchange.who.as_ref().and_then(|who| who.tenant.output_tokens_max);
    let output_max = asked.into_iter().chain(cap).min();
    let hindered = parameters::has_default(exchange, &HINDERS);
    let said = Said { operation: surface.operation, body: &body, members, in_loop, output_max, hindered };
    let by_default = parameters::has_default(exchange, names);
    let change = match effort {
        Effort::Default(_) if by_default => leave("the tenant's parameters say it"),
        effort => said.change(effort)?,
    };
    if by_default && change.verdict != "leave" {
        planned.parameter_edits = parameters::without_defaults(exchange, surface, &body, names)?;
    }
    planned.parameter_edits.extend(change.edits);
    exchange.decide("effort", rule, change.verdict, change.why);
    Ok(())
}

/// The members that ask a model to think; the first one is the endpoint's own.
const fn names(operation: Operation) -> &'static [&'static str] {
    match operation {
        Operation::Chat => &["reasoning_effort", "reasoning", "thinking"],
        Operation::Responses => &["reasoning"],
        Operation::Messages => &["thinking"],
        _ => &[],
    }
}

const fn leave(why: &'static str) -> Change {
    Change { edits: Vec::new(), verdict: "leave", why }
}

impl Said<'_> {
    fn change(&self, effort: Effort) -> Result<Change, Refusal> {
        for name in names(self.operation) {
            one(&self.members, name)?;
        }
        match effort {
            Effort::Strip => Ok(self.stripped()),
            Effort::Default(_) if self.says_something() => Ok(leave("the request says it itself")),
            Effort::Set(level) | Effort::Default(level) => self.set(level),
        }
    }

    fn value(&self, name: &str) -> Option<Range<usize>> {
        let found = self.members.iter().find(|(known, _)| known == name);
        found.map(|(_, span)| span.clone()).filter(|span| self.body.get(span.clone()) != Some(b"null"))
    }

    fn says_something(&self) -> bool {
        names(self.operation).iter().any(|name| self.value(name).is_some()) || self.effort_of_output().is_some()
    }

    /// Messages may ask for it beside the form of the output.
    fn effort_of_output(&self) -> Option<(Range<usize>, Members)> {
        let span = self.value("output_config").filter(|_| self.operation == Operation::Messages)?;
        let inner = scan::members_at(self.body, span.clone())?;
        inner.iter().any(|(name, _)| name == "effort").then_some((span, inner))
    }

    fn stripped(&self) -> Change {
        let mut edits = self.without(names(self.operation));
        if let Some((span, inner)) = self.effort_of_output() {
            let within = without(self.body, span, &inner, &["effort"]);
            edits.extend(if within.is_empty() { self.without(&["output_config"]) } else { within });
        }
        let why = if edits.is_empty() { "the request says nothing of it" } else { "the request asked for it" };
        Change { edits, verdict: "strip", why }
    }

    fn without(&self, names: &[&str]) -> Vec<Edit> {
        let brace = memchr::memchr(b'{', self.body).unwrap_or_default();
        without(self.body, brace..self.body.len(), &self.members, names)
    }

    fn set(&self, level: Level) -> Result<Change, Refusal> {
        let edits = match self.operation {
            Operation::Messages => match self.thinking(level) {
                Ok(value) => self.put("thinking", value),
                Err(why) => return Ok(leave(why)),
            },
            Operation::Responses => self.reasoning(level)?,
            _ => {
                let mut edits = self.put("reasoning_effort", format!("\"{}\"", level.name()));
                edits.extend(self.without(&["reasoning", "thinking"]));
                edits
            }
        };
        Ok(Change { edits, verdict: level.name(), why: "the decision says so" })
    }

    /// The member with this value, in place of another one.
    fn put(&self, name: &str, value: String) -> Vec<Edit> {
        if let Some((_, span)) = self.members.iter().find(|(known, _)| known == name) {
            return vec![Edit { span: span.clone(), text: value }];
        }
        let brace = memchr::memchr(b'{', self.body).unwrap_or_default();
        vec![insert(brace, &format!("\"{name}\":{value}"), self.members.is_empty())]
    }

    /// What else is said of reasoning, such as its summary, stays.
    fn reasoning(&self, level: Level) -> Result<Vec<Edit>, Refusal> {
        let level = format!("\"{}\"", level.name());
        let inner = self.value("reasoning").and_then(|span| Some((span.clone(), scan::members_at(self.body, span)?)));
        let Some((span, inner)) = inner else { return Ok(self.put("reasoning", format!("{{\"effort\":{level}}}"))) };
        Ok(vec![match one(&inner, "effort")? {
            Some(span) => Edit { span, text: level },
            None => insert(span.start, &format!("\"effort\":{level}"), inner.is_empty()),
        }])
    }

    /// What messages say for a level; or why they cannot: Anthropic's API refuses some requests with thinking that it
    /// takes without.
    fn thinking(&self, level: Level) -> Result<String, &'static str> {
        const LEAST: u64 = 1_024;
        let Some(tokens) = level.tokens() else { return Ok(r#"{"type":"disabled"}"#.to_owned()) };
        let room = self.output_max.map_or(tokens, |max| tokens.min(max.saturating_sub(1)));
        if room < LEAST {
            return Err("max_tokens leaves no room to think");
        }
        let enabled = self.value("thinking").is_some();
        if !enabled && self.in_loop {
            return Err("a tool's answer is gone on from, whose call was made without thinking");
        }
        if !enabled && self.hinders() {
            return Err("temperature, top_k or a forced tool_choice rule it out");
        }
        Ok(format!(r#"{{"type":"enabled","budget_tokens":{room}}}"#))
    }

    fn hinders(&self) -> bool {
        let forced = |span: Range<usize>| {
            let inner = scan::members_at(self.body, span).unwrap_or_default();
            let kind = inner.iter().find(|(name, _)| name == "type").and_then(|(_, span)| self.body.get(span.clone()));
            kind.is_some_and(|kind| kind == b"\"any\"" || kind == b"\"tool\"")
        };
        let sampled = HINDERS[..2].iter().any(|name| self.value(name).is_some());
        self.hindered || sampled || self.value("tool_choice").is_some_and(forced)
    }
}

/// The edits that take these members out of the object at `object`. An object is never left empty: it stays as it is.
fn without(body: &[u8], object: Range<usize>, members: &Members, names: &[&str]) -> Vec<Edit> {
    let goes = |at: usize| names.contains(&members[at].0.as_str());
    if (0..members.len()).all(goes) {
        return Vec::new();
    }
    let begins = |at: usize| {
        let from = if at == 0 { object.start + 1 } else { members[at - 1].1.end };
        let gap = body[from..].iter().position(|byte| !byte.is_ascii_whitespace() && *byte != b',');
        from + gap.unwrap_or_default()
    };
    let (mut edits, mut at) = (Vec::new(), 0);
    while let Some(first) = (at..members.len()).find(|at| goes(*at)) {
        at = (first..members.len()).find(|at| !goes(*at)).unwrap_or(members.len());
        let span = match at < members.len() {
            true => begins(first)..begins(at),
            false => members[first - 1].1.end..members[at - 1].1.end,
        };
        edits.push(Edit { span, text: String::new() });
    }
    edits
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use serde_json::{Value, json};

    use super::*;

    fn changed(operation: Operation, effort: Effort, body: &str, in_loop: bool) -> (String, &'static str) {
        let scan = scan::json(body.as_bytes()).unwrap();
        let members = scan::members(body.as_bytes()).unwrap();
        let output_max = scan.output_max(operation, body.as_bytes()).unwrap();
        let said = Said { operation, body: body.as_bytes(), members, in_loop, output_max, hindered: false };
        let mut change = said.change(effort).unwrap();
        let bytes = scan::splice(&Bytes::copy_from_slice(body.as_bytes()), &mut change.edits);
        (String::from_utf8(bytes.to_vec()).unwrap(), change.verdict)
    }

    #[test]
    fn each_dialect_has_its_own_words() {
        use Operation::{Chat, Messages, Responses};
        let (set, strip) = (Effort::Set(Level::High), Effort::Strip);
        for (operation, effort, came, goes) in [
            (Chat, set, r#"{"n":1}"#, r#"{"reasoning_effort":"high","n":1}"#),
            (Chat, set, r#"{ "reasoning_effort" : "low" ,"n":1}"#, r#"{ "reasoning_effort" : "high" ,"n":1}"#),
            (Chat, set, r#"{"n":1, "thinking":{"a":[1]},"x":2.0}"#, r#"{"reasoning_effort":"high","n":1, "x":2.0}"#),
            (Chat, strip, r#"{"n":1.0 , "reasoning_effort":"low"}"#, r#"{"n":1.0}"#),
            (Chat, strip, r#"{"thinking":1,"reasoning":2,"n":1}"#, r#"{"n":1}"#),
            (Chat, strip, r#"{"a":1,"thinking":1 , "b":2,"reasoning_effort":2 }"#, r#"{"a":1,"b":2 }"#),
            (Chat, strip, r#"{"thinking":1}"#, r#"{"thinking":1}"#),
            (Chat, strip, r#"{"r\u0065asoning":1,"n":1}"#, r#"{"n":1}"#),
            (Responses, set, r#"{"n":1}"#, r#"{"reasoning":{"effort":"high"},"n":1}"#),
            (
                Responses,
                set,
                r#"{"reasoning": {"summary":"auto"}}"#,
                r#"{"reasoning": {"effort":"high","summary":"auto"}}"#,
            ),
            (Responses, set, r#"{"reasoning":{"effort" : null}}"#, r#"{"reasoning":{"effort" : "high"}}"#),
            (Responses, set, r#"{"reasoning":null}"#, r#"{"reasoning":{"effort":"high"}}"#),
            (Responses, strip, r#"{"n":1,"reasoning":{"effort":"low"}}"#, r#"{"n":1}"#),
            (
                Messages,
                set,
                r#"{"max_tokens":20000}"#,
                r#"{"thinking":{"type":"enabled","budget_tokens":16384},"max_tokens":20000}"#,
            ),
            (
                Messages,
                set,
                r#"{"max_tokens":2000,"thinking":{"type":"disabled"}}"#,
                r#"{"max_tokens":2000,"thinking":{"type":"enabled","budget_tokens":1999}}"#,
            ),
            (Messages, Effort::Set(Level::None), r#"{"n":1}"#, r#"{"thinking":{"type":"disabled"},"n":1}"#),
            (Messages, strip, r#"{"n":1,"output_config":{"effort":"low"}}"#, r#"{"n":1}"#),
            (
                Messages,
                strip,
                r#"{"thinking":{},"output_config":{"format":1, "effort":"low"}}"#,
                r#"{"output_config":{"format":1}}"#,
            ),
        ] {
            assert_eq!(changed(operation, effort, came, false).0, goes, "{operation:?} {effort:?} {came}");
        }
    }

    #[test]
    fn a_default_is_for_requests_that_say_nothing() {
        let default = Effort::Default(Level::Low);
        for (operation, came, verdict) in [
            (Operation::Chat, r#"{"n":1}"#, "low"),
            (Operation::Chat, r#"{"reasoning_effort":null}"#, "low"),
            (Operation::Chat, r#"{"reasoning_effort":"high"}"#, "leave"),
            (Operation::Chat, r#"{"thinking":{}}"#, "leave"),
            (Operation::Messages, r#"{"output_config":{"effort":"high"}}"#, "leave"),
            (Operation::Messages, r#"{"output_config":{"format":1}}"#, "low"),
        ] {
            let (goes, told) = changed(operation, default, came, false);
            assert_eq!((told, goes == came), (verdict, verdict == "leave"), "{came} {goes}");
        }
    }

    #[test]
    fn messages_that_would_be_refused_with_thinking_are_left_as_they_are() {
        let set = Effort::Set(Level::Medium);
        for (came, in_loop) in [
            (r#"{"max_tokens":1024}"#, false),
            (r#"{"max_tokens":9000,"temperature":0.2}"#, false),
            (r#"{"max_tokens":9000,"tool_choice":{"type":"any"}}"#, false),
            (r#"{"max_tokens":9000}"#, true),
        ] {
            assert_eq!(changed(Operation::Messages, set, came, in_loop), (came.to_owned(), "leave"));
        }
        let auto = r#"{"max_tokens":9000,"tool_choice":{"type":"auto"}}"#;
        assert_eq!(changed(Operation::Messages, set, auto, false).1, "medium");
    }

    #[test]
    fn what_stands_twice_is_refused() {
        let body = r#"{"reasoning_effort":"low","reasoning_effort":"high"}"#;
        let members = scan::members(body.as_bytes()).unwrap();
        let said = Said {
            operation: Operation::Chat,
            body: body.as_bytes(),
            members,
            in_loop: false,
            output_max: None,
            hindered: false,
        };
        assert_eq!(said.change(Effort::Strip).unwrap_err().code, crate::refusal::Code::DuplicateField);
    }

    /// Every order of up to four of these.
    fn orders<'a>(keys: &[&'a str]) -> Vec<Vec<&'a str>> {
        let mut all: Vec<Vec<&str>> = vec![Vec::new()];
        for at in 0.. {
            let Some(begun) = all.get(at).cloned() else { return all };
            let next = keys.iter().filter(|key| begun.len() < 4 && !begun.contains(key));
            all.extend(next.map(|key| [&begun[..], &[*key]].concat()));
        }
        all
    }

    #[test]
    fn whatever_is_taken_out_the_rest_stays_and_is_json() {
        for keys in orders(&["a", "b", "c", "reasoning_effort", "thinking"]) {
            for space in ["", " ", "\n\t"] {
                let member =
                    |(at, key): (usize, &&str)| format!("{space}\"{key}\"{space}:{space}[{at},\"{{,\"]{space}");
                let body = format!("{{{}}}", keys.iter().enumerate().map(member).collect::<Vec<_>>().join(","));
                let mut expected: Value = serde_json::from_str(&body).unwrap();
                let rest = keys.iter().any(|key| key.len() == 1);
                expected.as_object_mut().unwrap().retain(|key, _| key.len() == 1 || !rest);
                let stripped = changed(Operation::Chat, Effort::Strip, &body, false).0;
                assert_eq!(serde_json::from_str::<Value>(&stripped).unwrap(), expected, "{body}");
                let set = changed(Operation::Chat, Effort::Set(Level::Low), &body, false).0;
                let set: Value = serde_json::from_str(&set).unwrap();
                assert_eq!(set["reasoning_effort"], json!("low"), "{body}");
                assert!(set.get("thinking").is_none() || keys == ["thinking"], "{body}");
            }
        }
    }
}
