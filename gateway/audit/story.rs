//! A record told in a few lines, for somebody who has never seen one.

use serde_json::Value;

/// Attempts that are told one by one; the ones between the first and the last few are counted.
const ATTEMPTS: usize = 4;

/// Tells what happened to a request, in ten lines at most.
pub fn tell(record: &Value) -> String {
    let record = Record(record);
    let mut story = vec![record.heading(), record.ending()];
    story.extend(record.model());
    story.extend(record.decided());
    story.extend(record.attempts());
    story.extend(record.usage());
    story.extend(record.next());
    story.join("\n") + "\n"
}

/// A record, or a part of one.
#[derive(Clone, Copy)]
struct Record<'a>(&'a Value);

impl<'a> Record<'a> {
    fn at(self, path: &str) -> &'a Value {
        path.split('.').fold(self.0, |value, name| &value[name])
    }

    /// A text in the record, without what could upset a terminal: clients wrote some of it.
    fn text(self, path: &str) -> Option<String> {
        let text = self.at(path).as_str()?;
        let end = text.char_indices().nth(300).map_or(text.len(), |(at, _)| at);
        Some(plain(&text[..end], &[]))
    }

    fn number(self, path: &str) -> Option<u64> {
        self.at(path).as_u64()
    }

    fn is(self, path: &str, text: &str) -> bool {
        self.at(path).as_str() == Some(text)
    }

    fn list(self, path: &str) -> &'a [Value] {
        self.at(path).as_array().map_or(&[], Vec::as_slice)
    }

    fn ms(self, path: &str) -> Option<String> {
        self.number(path).map(ms)
    }

    /// Who asked what, when and from where.
    fn heading(self) -> String {
        let mut line = self.text("id").unwrap_or_else(|| "A request".to_owned());
        if let Some(at) = self.text("at") {
            line.push_str(&format!(" on {} UTC", at.get(..19).unwrap_or(&at).replacen('T', " ", 1)));
        }
        let method = self.text("method").unwrap_or_default();
        line.push_str(&format!(": {method} {}", self.text("surface").unwrap_or_default()));
        if self.at("stream") == &Value::Bool(true) {
            line.push_str(" (stream)");
        }
        match self.text("client.address") {
            Some(address) if address == "unix" => line.push_str(" from a Unix socket"),
            Some(address) => line.push_str(&format!(" from {address}")),
            None => {}
        }
        let over = self.text("client.protocol").map(|protocol| format!(" over {protocol}"));
        let by = self.text("principal").map(|principal| format!(", by {principal}"));
        let tenant = self.text("tenant").map(|tenant| format!(" of {tenant}"));
        let own = self.text("client.request_id").map(|id| format!("; the client calls it {id}"));
        [over, by, tenant, own].into_iter().flatten().for_each(|part| line.push_str(&part));
        line
    }

    /// How it ended.
    fn ending(self) -> String {
        let after = self.ms("times.ended").map(|ms| format!(" after {ms}")).unwrap_or_default();
        let status = self.number("status").map(|status| format!(" {status}")).unwrap_or_default();
        let because = self.because();
        let passed = self.passed();
        let mut line = match self.at("outcome").as_str().unwrap_or("unknown") {
            "ok" => format!("Answered:{status}{after}"),
            "upstream_error" if self.is_upstreams_own() => format!("Failed:{status}{after}: the upstream's own error"),
            "refused" => format!("Refused by the gateway:{status}{after}{because}"),
            "upstream_error" if self.begun() => format!("Cut: the upstream broke off{after}{passed}{because}"),
            "upstream_error" => format!("Failed:{status}{after}: no upstream could answer{because}"),
            "timeout" if self.begun() => format!("Cut: a time-out ended the answer{after}{passed}{because}"),
            "timeout" => format!("Timed out:{status}{after}{because}"),
            "client_closed" => format!("Cut: the client left{after}{passed}{because}"),
            "blocked" => format!("Blocked by a guardrail:{status}{after}{passed}{because}"),
            "limit_cut" => format!("Cut: a limit ended the answer{after}{passed}{because}"),
            "aborted" => format!("Aborted: the gateway stopped or failed{after}{passed}{because}"),
            other => format!("Ended as {other}:{status}{after}{because}"),
        };
        if let Some(first) = self.ms("times.first") {
            let what = if self.at("stream") == &Value::Bool(true) { "first piece" } else { "answer begun" };
            line.push_str(&format!("; {what} after {first}"));
        }
        let own = self
            .number("times.self")
            .filter(|own| *own > 0)
            .map(ms)
            .map(|own| format!("; {own} of it in the gateway itself"));
        line.push_str(&own.unwrap_or_default());
        line
    }

    /// Whether the client got an error answer as the upstream gave it.
    fn is_upstreams_own(self) -> bool {
        self.is("outcome", "upstream_error") && self.at("code").is_null() && self.number("status") >= Some(500)
    }

    /// Whether the client got a piece of an answer.
    fn begun(self) -> bool {
        self.number("times.first").is_some()
    }

    fn passed(self) -> String {
        match self.number("bytes.answer") {
            Some(0) => ", before the first byte of the answer".to_owned(),
            Some(bytes) if self.begun() => format!(", when {} had been passed on", counted(bytes, "byte")),
            _ => String::new(),
        }
    }

    fn because(self) -> String {
        let code = self.text("code").map(|code| format!(" ({code})")).unwrap_or_default();
        let message = self.text("message").map(|message| format!(": {message}")).unwrap_or_default();
        format!("{code}{message}")
    }

    /// Which model was asked for, and which one answered.
    fn model(self) -> Option<String> {
        let asked = self.text("model.asked");
        let mut line = match &asked {
            Some(asked) => format!("Asked for model {asked}"),
            None => "Named no model".to_owned(),
        };
        match self.text("model.route") {
            Some(route) if asked.as_ref() == Some(&route) => {}
            Some(route) => line.push_str(&format!(", which the policy takes as {route}")),
            None if self.is("code", "model_not_found") => line.push_str(", which the policy does not have"),
            None if asked.is_some() => line.push_str(", which was not looked up"),
            None => return None,
        }
        let used = self.text("model.used").filter(|used| asked.as_ref() != Some(used));
        let used = used.map(|used| format!("; the upstream knows it as {used}"));
        line.push_str(&used.unwrap_or_default());
        Some(line)
    }

    /// The policy, and what it decided.
    fn decided(self) -> Option<String> {
        let revision = self.number("policy.revision")?;
        let hash = self.text("policy.hash").unwrap_or_default();
        let mut line = format!("Policy revision {revision} (hash {})", hash.get(..12).unwrap_or(&hash));
        // A refusal has been told with the ending.
        let decisions = self.list("decisions").iter().map(Record).filter(|decision| !decision.is("stage", "refuse"));
        let decisions: Vec<String> = decisions.map(Self::decision).collect();
        if !decisions.is_empty() {
            let told = decisions.len().min(6);
            line.push_str(&format!(" decided: {}", decisions[..told].join("; ")));
            if decisions.len() > told {
                line.push_str(&format!("; and {} more", decisions.len() - told));
            }
        }
        Some(line)
    }

    fn decision(self) -> String {
        let part = |name: &str| self.text(name).unwrap_or_default();
        let why = self.text("why").filter(|why| !why.is_empty()).map(|why| format!(" ({why})")).unwrap_or_default();
        format!("{} {}: {}{why}", part("stage"), part("rule"), part("verdict"))
    }

    /// The attempts, one a line, as many as there is room for.
    fn attempts(self) -> Vec<String> {
        let attempts = self.list("attempts");
        let line = |at: usize| format!("{}. {}", at + 1, Self(&attempts[at]).attempt(self, at + 1 < attempts.len()));
        if attempts.is_empty() {
            return vec!["No upstream was asked".to_owned()];
        }
        if attempts.len() <= ATTEMPTS {
            return (0..attempts.len()).map(line).collect();
        }
        let left_out = format!("   … {} more attempts, none of which could answer", attempts.len() - (ATTEMPTS - 1));
        vec![line(0), line(1), left_out, line(attempts.len() - 1)]
    }

    /// One attempt of `whole`, and whether another came behind it.
    fn attempt(self, whole: Self, more: bool) -> String {
        let mut line = format!(
            "{}/{}",
            self.text("pool").unwrap_or_default(),
            self.text("upstream").unwrap_or_else(|| "unknown".to_owned())
        );
        let of =
            [self.text("address"), self.text("provider"), self.text("model").map(|model| format!("model {model}"))];
        let of: Vec<String> = of.into_iter().flatten().collect();
        if !of.is_empty() {
            line.push_str(&format!(" ({})", of.join(", ")));
        }
        line.push_str(&format!(": {}", self.came(whole)));
        let why = self.text("why").filter(|why| !why.is_empty() && !line.contains(why.as_str()));
        why.iter().for_each(|why| line.push_str(&format!(" ({why})")));
        if more {
            line.push_str("; so the next was tried");
        }
        line
    }

    /// What an attempt came to. Its times count from the request's beginning, what is told from its own. What it does
    /// not say of its bytes, the request does.
    fn came(self, whole: Self) -> String {
        let began = self.number("began").unwrap_or(0);
        let after = |name: &str| self.number(name).map(|at| format!(" after {}", ms(at.saturating_sub(began))));
        let ended = after("ended").unwrap_or_default();
        let status = self.number("status").map_or_else(|| "an answer".to_owned(), |status| format!("status {status}"));
        let head = after("head").unwrap_or_else(|| ended.clone());
        let received = self.number("received").or_else(|| whole.number("bytes.answer"));
        let received = received.map(|bytes| format!(", {}", counted(bytes, "byte"))).unwrap_or_default();
        match self.at("result").as_str().unwrap_or_default() {
            "answered" => format!("{status}{head}{received}, complete{ended}"),
            "status" => format!("{status}{head}"),
            "connect" => format!("no connection{ended}"),
            "reset" => format!("the connection was lost{ended}, before an answer"),
            "timeout" if self.number("head").is_some() => {
                format!("{status}{head}, then silent: timed out{ended}{received}")
            }
            "timeout" => format!("no answer in time{ended}"),
            "cancelled" if self.number("head").is_some() => format!("{status}{head}, given up{ended}{received}"),
            "cancelled" => format!("given up{ended}, before an answer"),
            "broken" => format!("{status}{head}, broke off{ended}{received}"),
            _ => format!("{status}{ended}{received}"),
        }
    }

    /// What was used and what it cost.
    fn usage(self) -> Option<String> {
        let (input, output) = (self.number("usage.input_tokens"), self.number("usage.output_tokens"));
        let mut line = match (input, output) {
            (Some(input), Some(output)) => format!("{} in, {} out", counted(input, "token"), grouped(output)),
            (Some(input), None) => format!("{} in", counted(input, "token")),
            (None, Some(output)) => format!("{} out", counted(output, "token")),
            // Servers that are paid by the hour worked for nothing.
            (None, None) => format!("{} ms of servers' work", grouped(self.number("usage.gpu_us")? / 1_000)),
        };
        let also =
            [("usage.cached_tokens", "of the input cached"), ("usage.reasoning_tokens", "of the output reasoning")];
        for (path, what) in also {
            let tokens = self.number(path).filter(|tokens| *tokens > 0);
            tokens.iter().for_each(|tokens| line.push_str(&format!(", {} {what}", grouped(*tokens))));
        }
        match self.at("usage.source").as_str() {
            Some("upstream") => line.push_str(" (the upstream's own count)"),
            Some("estimated") => line.push_str(" (counted from the text, or its events: the upstream did not say)"),
            Some("partial") => line.push_str(" (counted as far as the answer came: it did not come to its end)"),
            _ => {}
        }
        let cost = self.number("cost.nanousd").or_else(|| self.number("cost_nanousd"));
        cost.iter()
            .for_each(|cost| line.push_str(&format!("; cost ${}.{:09}", cost / 1_000_000_000, cost % 1_000_000_000)));
        if self.at("unpriced") == &Value::Bool(true) {
            line.push_str("; unpriced: the policy has no price for it");
        }
        Some(line)
    }

    /// What whoever asks can do about it.
    fn next(self) -> Option<String> {
        if self.is("outcome", "ok") || self.is_upstreams_own() {
            return self.number("status").filter(|status| *status >= 400).map(|status| {
                format!("The status {status} is the upstream's own answer; the gateway passed it on as it was")
            });
        }
        let code = self.at("code").as_str().unwrap_or_default();
        if let Some(limit) = self.short() {
            return Some(limit);
        }
        let hint = match (code, self.at("outcome").as_str().unwrap_or_default()) {
            ("queue_full" | "queue_timeout" | "overloaded", _) => {
                "try again later, as Retry-After told the client, or give the pool more room or upstreams"
            }
            ("audit_unavailable", _) => "the journal's disk does not keep up: see its free space and the journal's lag",
            ("model_not_found", _) => "ask for a model that GET /v1/models lists, or add it to the policy",
            ("no_upstream", _) => "see GET /admin/upstreams on the admin port: no upstream of the pool is healthy",
            (_, "upstream_error") => "see the attempts above, and the upstreams' own logs at that time",
            (_, "timeout") => "see which step took the time above; the time-outs are in the policy",
            (_, "client_closed") => "nothing here: the client or something before the gateway ended the connection",
            (_, "aborted") => "see the gateway's log at that time: it was stopped, or a fault was logged",
            (_, "refused") => "the request did not pass the policy or is not well formed: the message says which",
            _ => return None,
        };
        Some(format!("What to do: {hint}"))
    }
}

impl Record<'_> {
    /// Which limit had too little left for it: what it asked for, what was free, when there is room again.
    fn short(self) -> Option<String> {
        let decisions = self.list("decisions").iter().map(Record);
        let mut refusals =
            decisions.filter(|decision| decision.is("stage", "limit") && decision.is("verdict", "refuse"));
        let decision = refusals.next_back().filter(|_| self.is("outcome", "refused"))?;
        let (limit, why) = (decision.text("rule")?, decision.text("why")?);
        let hint = match self.at("code").as_str()? {
            "rate_limit_exceeded" => "ask again when there is room, or give the limit more in the policy",
            "insufficient_quota" => "wait for the budget's next period, or give it more in the policy",
            "request_exceeds_limit" => "ask for less, or give the limit more in the policy: it never has room for this",
            _ => return None,
        };
        Some(format!("What to do: the limit {limit} has too little left ({why}): {hint}"))
    }
}

/// `text` without control characters, except those to be `kept`: they could upset a terminal.
pub fn plain(text: &str, kept: &[char]) -> String {
    text.replace(|c: char| c.is_control() && !kept.contains(&c), "\u{fffd}")
}

/// Microseconds as milliseconds, three digits' worth.
fn ms(micros: u64) -> String {
    let (whole, rest) = (micros / 1_000, micros % 1_000);
    match whole {
        0 => format!("0.{:02} ms", rest.div_ceil(10).min(99)),
        1..100 => format!("{whole}.{} ms", rest / 100),
        _ => format!("{} ms", grouped(whole)),
    }
}

/// `4,711`.
pub(crate) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `1 line`, `2,000 lines`.
pub(crate) fn counted(number: u64, what: &str) -> String {
    format!("{} {what}{}", grouped(number), if number == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn record() -> Value {
        json!({
            "v": 1, "seq": 7, "kind": "request", "at": "2026-11-22T14:03:05.123456Z",
            "id": "0197a000-0000-7000-8000-000000000001", "outcome": "ok", "status": 200,
            "surface": "/v1/chat/completions", "operation": "chat", "method": "POST", "stream": true,
            "client": {"address": "10.1.2.3:4567", "protocol": "http/1.1", "request_id": "their-7"},
            "model": {"asked": "gpt-4o", "route": "llama-3", "used": "meta-llama/Llama-3-70B"},
            "policy": {"revision": 3, "hash": "abcdef0123456789"},
            "decisions": [
                {"stage": "route", "rule": "llama-3", "verdict": "gpus, cloud", "why": "alias gpt-4o"},
                {"stage": "queue", "rule": "gpus", "verdict": "enter", "why": "waited 12 ms"}],
            "attempts": [
                {"pool": "gpus", "upstream": "gpu-1", "address": "10.0.0.1:8000", "provider": "vllm",
                 "began": 210, "head": 5310, "ended": 5400, "status": 503, "result": "status", "why": "overloaded"},
                {"pool": "cloud", "upstream": "openai", "address": "api:443", "provider": "openai",
                 "began": 5500, "head": 12500, "ended": 99000, "status": 200, "result": "answered", "received": 4711}],
            "usage": {"input_tokens": 12, "output_tokens": 40, "cached_tokens": 0, "source": "upstream"},
            "bytes": {"request": 812, "answer": 4711},
            "times": {"first": 12600, "ended": 99000, "self": 75},
        })
    }

    #[test]
    fn a_failover_is_told_as_it_went() {
        let expected = "\
0197a000-0000-7000-8000-000000000001 on 2026-11-22 14:03:05 UTC: POST /v1/chat/completions (stream) from \
10.1.2.3:4567 over http/1.1; the client calls it their-7
Answered: 200 after 99.0 ms; first piece after 12.6 ms; 0.08 ms of it in the gateway itself
Asked for model gpt-4o, which the policy takes as llama-3; the upstream knows it as meta-llama/Llama-3-70B
Policy revision 3 (hash abcdef012345) decided: route llama-3: gpus, cloud (alias gpt-4o); queue gpus: enter (waited 12 ms)
1. gpus/gpu-1 (10.0.0.1:8000, vllm): status 503 after 5.1 ms (overloaded); so the next was tried
2. cloud/openai (api:443, openai): status 200 after 7.0 ms, 4,711 bytes, complete after 93.5 ms
12 tokens in, 40 out (the upstream's own count)
";
        assert_eq!(tell(&record()), expected);
    }

    #[test]
    fn a_refusal_says_why_and_what_to_do() {
        let mut record = record();
        record["outcome"] = json!("refused");
        record["status"] = json!(503);
        record["code"] = json!("queue_full");
        record["message"] = json!("the queue of pool gpus is full");
        record["attempts"] = json!([]);
        record["usage"] = Value::Null;
        record["times"] = json!({"ended": 140, "self": 75});
        let story = tell(&record);
        let expected = "Refused by the gateway: 503 after 0.14 ms (queue_full): the queue of pool gpus is full;";
        assert!(story.contains(expected), "{story}");
        assert!(story.contains("No upstream was asked\nWhat to do: try again later"), "{story}");
    }

    #[test]
    fn a_refusal_by_a_limit_says_which_one_what_was_asked_what_was_free_and_when_again() {
        let mut record = record();
        record["outcome"] = json!("refused");
        record["attempts"] = json!([]);
        let why = "812 tokens needed, 40 tokens left, free again in 12s";
        let limit = json!({"stage": "limit", "rule": "team-a/tokens/1m", "verdict": "refuse", "why": why});
        record["decisions"].as_array_mut().unwrap().push(limit);
        for (code, hint) in [
            ("rate_limit_exceeded", "ask again when there is room"),
            ("insufficient_quota", "wait for the budget's next period"),
            ("request_exceeds_limit", "ask for less"),
        ] {
            record["code"] = json!(code);
            let story = tell(&record);
            let expected = format!("What to do: the limit team-a/tokens/1m has too little left ({why}): {hint}");
            assert!(story.contains(&expected) && !story.contains("did not pass the policy"), "{story}");
        }
    }

    #[test]
    fn a_cut_answer_says_who_broke_off_and_when() {
        let mut record = record();
        record["outcome"] = json!("client_closed");
        record["attempts"] = json!([{"pool": "gpus", "upstream": "gpu-1", "began": 0, "head": 900, "ended": 99000,
            "status": 200, "result": "cancelled", "received": 4711}]);
        let story = tell(&record);
        let expected = "Cut: the client left after 99.0 ms, when 4,711 bytes had been passed on; first piece after";
        assert!(story.contains(expected), "{story}");
        assert!(
            story.contains("1. gpus/gpu-1: status 200 after 0.90 ms, given up after 99.0 ms, 4,711 bytes"),
            "{story}"
        );
        record["outcome"] = json!("upstream_error");
        record["attempts"][0]["result"] = json!("broken");
        let story = tell(&record);
        assert!(story.contains("Cut: the upstream broke off after 99.0 ms, when 4,711 bytes"), "{story}");
    }

    #[test]
    fn a_story_has_ten_lines_at_most_whatever_stands_in_the_record() {
        let mut long = record();
        let attempt = long["attempts"][0].clone();
        long["attempts"] = vec![attempt; 40].into();
        long["decisions"] = vec![long["decisions"][0].clone(); 40].into();
        long["outcome"] = json!("upstream_error");
        long["client"]["request_id"] = json!("a\nb\u{1b}[31m\n\n\n\n\n");
        for record in [long, json!({}), json!([]), json!(7), json!({"attempts": [1, null], "decisions": {"a": 1}})] {
            let story = tell(&record);
            assert!(story.lines().count() <= 10, "{story}");
            assert!(!story.contains('\u{1b}'), "{story}");
        }
    }

    #[test]
    fn times_are_told_in_milliseconds() {
        let told: Vec<String> = [0, 75, 999, 1_000, 5_310, 99_000, 1_234_567].map(ms).to_vec();
        assert_eq!(told, ["0.00 ms", "0.08 ms", "0.99 ms", "1.0 ms", "5.3 ms", "99.0 ms", "1,234 ms"]);
    }
}
