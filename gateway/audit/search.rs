//! Looking for lines in the journal, by time and by what stands in their members.

use std::collections::VecDeque;
use std::io;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use memchr::memmem;
use serde_json::Value;

use super::read;
use crate::time::micros;

/// Which lines are wanted. All conditions must hold.
#[derive(Default)]
pub struct Filter {
    since: Option<u64>,
    until: Option<u64>,
    members: Vec<Member>,
}

/// A value that one of a few members must have.
struct Member {
    paths: Vec<Vec<String>>,
    value: String,
    /// The value as it stands in a line: most lines do not have it, and need no closer look.
    text: memmem::Finder<'static>,
}

impl Filter {
    /// Lines not before `since` and not after `until`, in microseconds since 1970.
    pub fn between(since: Option<u64>, until: Option<u64>) -> Self {
        Self { since, until, members: Vec::new() }
    }

    /// One of the members at `paths` (`model.asked`; a list's elements are tried one after the other) must be `value`.
    pub fn with(&mut self, paths: &[&str], value: &str) {
        let paths = paths.iter().map(|path| path.split('.').map(str::to_owned).collect()).collect();
        let text = Value::from(value).to_string();
        let text = memmem::Finder::new(&text.as_bytes()[1..text.len() - 1]).into_owned();
        self.members.push(Member { paths, value: value.to_owned(), text });
    }

    /// Whether `line` is wanted.
    pub fn wants(&self, line: &[u8]) -> bool {
        if !self.in_time(line) || !self.members.iter().all(|member| member.text.find(line).is_some()) {
            return false;
        }
        if self.members.is_empty() {
            return true;
        }
        let Ok(value) = serde_json::from_slice::<Value>(line) else { return false };
        self.members.iter().all(|member| member.paths.iter().any(|path| has(&value, path, &member.value)))
    }

    fn in_time(&self, line: &[u8]) -> bool {
        if self.since.is_none() && self.until.is_none() {
            return true;
        }
        micros(read::at(line))
            .is_some_and(|at| self.since.is_none_or(|since| at >= since) && self.until.is_none_or(|until| at <= until))
    }
}

fn has(value: &Value, path: &[String], wanted: &str) -> bool {
    match (value, path) {
        (Value::Array(elements), _) => elements.iter().any(|element| has(element, path, wanted)),
        (value, [name, rest @ ..]) => value.get(name).is_some_and(|value| has(value, rest, wanted)),
        (Value::String(text), []) => text == wanted,
        (Value::Number(number), []) => number.to_string() == wanted,
        (Value::Bool(flag), []) => wanted == if *flag { "true" } else { "false" },
        (Value::Null | Value::Object(_), []) => false,
    }
}

/// Calls `found` with every wanted line, run by run and oldest first, until it breaks off.
pub fn each(directory: &Path, filter: &Filter, mut found: impl FnMut(&[u8]) -> ControlFlow<()>) -> io::Result<()> {
    for run in read::runs(directory)? {
        for segment in run.segments_between(filter.since, filter.until)? {
            let mut lines = match segment.open() {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue, // retention was faster
                lines => lines?,
            };
            while lines.advance()? {
                if filter.wants(lines.line()) && found(lines.line()).is_break() {
                    return Ok(());
                }
            }
        }
    }
    Ok(())
}

/// The newest `limit` wanted lines, oldest first, and how many there are in all.
pub fn newest(directory: &Path, filter: &Filter, limit: usize) -> io::Result<(VecDeque<Vec<u8>>, u64)> {
    let (mut lines, mut count) = (VecDeque::new(), 0);
    each(directory, filter, |line| {
        count += 1;
        lines.push_back(line.to_vec());
        if lines.len() > limit {
            lines.pop_front();
        }
        ControlFlow::Continue(())
    })?;
    Ok((lines, count))
}

/// A time as people give it: `90s`, `15m`, `2h`, `3d`, `1w` ago, or `2026-11-22T14:03:05Z`, or a part of that.
pub fn time(text: &str) -> Result<u64, String> {
    let ago = text.char_indices().last().and_then(|(at, unit)| {
        let seconds = match unit {
            's' => 1,
            'm' => 60,
            'h' => 3_600,
            'd' => 86_400,
            'w' => 604_800,
            _ => return None,
        };
        text[..at].parse::<u64>().ok()?.checked_mul(seconds * 1_000_000)
    });
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_micros() as u64);
    let wrong = || format!("{text} is no time: give 90s, 15m, 2h or 3d (ago), or a time like 2026-11-22T14:03:05Z");
    ago.map(|ago| now().saturating_sub(ago)).or_else(|| micros(text.as_bytes())).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::audit::made::{Made, pack};

    fn count(made: &Made, filter: &Filter) -> u64 {
        newest(made.path(), filter, 1).unwrap().1
    }

    fn with(paths: &[&str], value: &str) -> Filter {
        let mut filter = Filter::default();
        filter.with(paths, value);
        filter
    }

    fn journal() -> Made {
        let mut made = Made::new();
        let mut run = made.run(1);
        run.records(5).rotate();
        run.record_with(&json!({"id": Made::id(70), "outcome": "refused", "code": "queue_full", "status": 503,
            "attempts": [{"upstream": "a"}, {"upstream": "b \"x\""}], "stream": true, "z": 0}));
        run.close();
        made.run(2).records(3);
        pack(&made.file(1, 1));
        made
    }

    #[test]
    fn lines_are_found_by_their_members() {
        let made = journal();
        assert_eq!(count(&made, &Filter::default()), 14);
        assert_eq!(count(&made, &with(&["kind"], "request")), 9);
        assert_eq!(count(&made, &with(&["outcome"], "ok")), 8);
        assert_eq!(count(&made, &with(&["status"], "503")), 1);
        assert_eq!(count(&made, &with(&["stream"], "true")), 1);
        assert_eq!(count(&made, &with(&["attempts.upstream"], "b \"x\"")), 1);
        assert_eq!(count(&made, &with(&["outcome", "code"], "queue_full")), 1);
        assert_eq!(count(&made, &with(&["code"], "refused")), 0, "the text stands in another member");
    }

    #[test]
    fn lines_are_found_by_their_time() {
        let made = journal();
        let at = |text: &str| Some(micros(text.as_bytes()).unwrap());
        let since = Filter::between(at("2026-11-22T14:00:08Z"), None);
        assert_eq!(count(&made, &since), 3);
        let until = Filter::between(None, at("2026-11-22T14:00:02Z"));
        assert_eq!(count(&made, &until), 2);
        let past = Filter::between(at("2030-01-01"), None);
        assert_eq!(count(&made, &past), 0);
    }

    #[test]
    fn lines_are_found_by_their_time_whatever_the_name_of_their_run_tells() {
        let made = journal();
        let run = made.file(1, 1).parent().unwrap().to_owned();
        std::fs::rename(&run, run.with_file_name("20300101T000000Z-00000001")).unwrap();
        let until = micros(b"2026-11-22T14:00:02Z");
        assert_eq!(count(&made, &Filter::between(None, until)), 2);
    }

    #[test]
    fn the_newest_come_last() {
        let (lines, count) = newest(journal().path(), &with(&["kind"], "request"), 2).unwrap();
        let seqs: Vec<_> = lines.iter().map(|line| read::seq(line).unwrap()).collect();
        assert_eq!((seqs, count), (vec![3, 4], 9));
    }

    #[test]
    fn times_are_taken_as_people_give_them() {
        let now = time("0s").unwrap();
        assert!((now - time("2h").unwrap()).abs_diff(7_200_000_000) < 1_000_000);
        assert_eq!(time("1970-01-02"), Ok(86_400_000_000));
        assert!(time("yesterday").unwrap_err().contains("yesterday is no time"));
        assert!(time("99999999999999999999d").is_err() && time("").is_err() && time("é").is_err());
    }
}
