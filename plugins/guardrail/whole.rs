//! What is judged as a whole: a text is read to its end, and then all of it is found or nothing.
//!
//! Nothing of such a text leaves before it was judged, where the rule enforces; so the pieces in which it comes make no
//! difference. Text beyond a bound is judged bound by bound, that nobody has to hold more.

use std::fmt::Debug;
use std::sync::Arc;

use super::stream::{Finder, Found, Search, Window};

/// Has a view of whole texts.
pub(crate) trait Judge: Debug + Send + Sync {
    /// What this text is, if it is what the rule looks for.
    fn judge(&self, text: &str) -> Option<Arc<str>>;
}

/// A rule that judges whole texts.
#[derive(Clone, Debug)]
pub(crate) struct Whole {
    /// What judges.
    pub judge: Arc<dyn Judge>,
    /// The rule: its place in the policy's list.
    pub rule: usize,
}

/// A prompt's text is at hand in any case.
const PROMPT_MAX: usize = 1 << 20;
/// An answer is held until then, in events that are sixty times as long as their texts.
pub(super) const ANSWER_MAX: usize = 16 << 10;

impl Whole {
    /// What looks at the texts of prompts, or of answers.
    pub fn finder(&self, prompt: bool) -> Arc<dyn Finder> {
        let most = if prompt { PROMPT_MAX } else { ANSWER_MAX };
        Arc::new(Bounded { whole: self.clone(), most })
    }
}

#[derive(Debug)]
struct Bounded {
    whole: Whole,
    most: usize,
}

impl Finder for Bounded {
    fn begin(self: Arc<Self>) -> Box<dyn Search> {
        Box::new(Reading { bounded: self, at: 0 })
    }

    fn hold_max(&self) -> usize {
        self.most
    }
}

struct Reading {
    bounded: Arc<Bounded>,
    /// What is before has been judged.
    at: u64,
}

impl Search for Reading {
    fn advance(&mut self, window: &Window<'_>, found: &mut Vec<Found>) -> u64 {
        let most = self.bounded.most;
        let left = |at: u64| &window.text[(at - window.base) as usize..];
        while left(self.at).len() > most {
            let text = left(self.at);
            self.decide(&text[..text.floor_char_boundary(most)], found);
        }
        if window.last {
            self.decide(left(self.at), found);
        }
        self.at
    }
}

impl Reading {
    fn decide(&mut self, text: &str, found: &mut Vec<Found>) {
        let Whole { judge, rule } = &self.bounded.whole;
        let end = self.at + text.len() as u64;
        if !text.is_empty()
            && let Some(label) = judge.judge(text)
        {
            found.push(Found { rule: *rule, label, range: self.at..end });
        }
        self.at = end;
    }
}

#[cfg(test)]
mod tests {
    use super::super::redact::Placeholders;
    use super::super::stream::{Act, Scanner};
    use super::super::tests::check_cuts;
    use super::*;

    /// Finds texts with an `x`.
    #[derive(Debug)]
    struct HasX;

    impl Judge for HasX {
        fn judge(&self, text: &str) -> Option<Arc<str>> {
            text.contains('x').then(|| "x".into())
        }
    }

    fn scanner(most: usize) -> Arc<Scanner> {
        let whole = Whole { judge: Arc::new(HasX), rule: 0 };
        Arc::new(Scanner::new(vec![Act::Block], vec![Arc::new(Bounded { whole, most })], Vec::new()))
    }

    fn left(text: &str, most: usize) -> (String, bool) {
        let progress = scanner(most).judge(text, &mut Placeholders::default());
        (progress.apply(text), progress.blocked.is_some())
    }

    #[test]
    fn nothing_of_what_is_found_leaves_wherever_it_begins_to_be_it() {
        assert_eq!(left("all is well, but x", 100), (String::new(), true));
        assert_eq!(left("all is well", 100), ("all is well".to_owned(), false));
        assert_eq!(left("", 100), (String::new(), false));
    }

    #[test]
    fn a_long_text_is_judged_bound_by_bound_and_no_end_is_left_out() {
        for (text, expected) in
            [("äbcd", None), ("x", Some("")), ("äbcdéfgx", Some("äbcd")), ("äbcdéfghiklmnx", Some("äbcdéfghiklmn"))]
        {
            assert_eq!(left(text, 5), (expected.unwrap_or(text).to_owned(), expected.is_some()), "{text}");
        }
    }

    #[test]
    fn pieces_make_no_difference() {
        for text in ["", "x", "äbcdé fgh ij", "abcdé fghx", "äxö", "abcdefghijklmnopqrstuvwx"] {
            check_cuts(&scanner(5), text);
        }
    }
}
