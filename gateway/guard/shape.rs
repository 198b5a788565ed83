//! The shape of answers: by the policy's schemas, or by those that the request brought along.

use std::sync::Arc;

use infergate_plugins::guardrail::redact::Placeholders;
use infergate_plugins::guardrail::schema::Asked;
use infergate_plugins::guardrail::stream::{Progress, Scanner};
use infergate_plugins::guardrail::{Outcome, Place};
use infergate_plugins::operation::Operation;

use super::channel::Channel;
use super::{Blocked, Guard};
use crate::text::asked::Schema;
use crate::text::{self, Text, Tool};

/// What is wrong with a request's schema, in words, and whom that stops.
type Unasked = (String, Option<Blocked>);

impl Guard {
    /// Keeps the schemas of a request, where a rule judges by them.
    pub(super) fn asks(&mut self, operation: Operation, body: &[u8]) -> Result<(), Unasked> {
        let (of_answers, of_tools) = self.rails.rules.asks_schemas();
        if !of_answers && !of_tools {
            return Ok(());
        }
        match asked(operation, body, of_answers, of_tools) {
            Ok(asked) => {
                for judged in self.judged.iter_mut().filter(|judged| !judged.prompt) {
                    judged.waits |= self.rails.rules.is_unasked(judged.rule, &asked);
                }
                self.asked = asked;
                Ok(())
            }
            Err(message) => Err((message, self.unasked())),
        }
    }

    /// Nobody can judge by the request's schemas: whoever must stops it.
    fn unasked(&mut self) -> Option<Blocked> {
        let mut blocked = None;
        for judged in self.judged.iter_mut().filter(|judged| !judged.prompt) {
            if self.rails.rules.is_unasked(judged.rule, &Asked::default()) {
                judged.outcome = Outcome::Failed;
                let rule = &self.rails.rules.rules()[judged.rule];
                let stops = rule.insists().then(|| Blocked::Unread(rule.name.clone()));
                blocked = blocked.or(stops);
            }
        }
        blocked
    }

    /// Whether somebody wants to know which tools are called.
    pub(super) fn shapes_tools(&self) -> bool {
        self.rails.rules.has_shapes(Place::AnswerToolArguments)
    }

    /// What judges a text; none if nobody looks at it. `tool` gets it, if it is the arguments of one.
    pub(super) fn channel(&self, text: &Text, tool: Option<&str>) -> Option<Channel> {
        let shapes = self.shapes(text, tool);
        let channel = Channel::with_shapes(self.rails.rules.scanner(text.place), text.is_json, shapes.as_ref());
        channel.map(|channel| channel.written_like(text))
    }

    /// The shapes that a text has to have.
    pub(super) fn shapes(&self, text: &Text, tool: Option<&str>) -> Option<Arc<Scanner>> {
        // What a tool gets that takes any text, and parts of what stands as JSON itself, have no shape.
        let has_shape = text.is_json || text.place == Place::AnswerContent;
        if has_shape { self.rails.rules.shapes(text.place, tool, &self.asked) } else { None }
    }

    /// Judges the arguments that stand as JSON in `document`, and not as a text.
    pub(super) fn inputs(&mut self, tools: &[Tool], document: &[u8]) -> Result<(), Blocked> {
        if !self.shapes_tools() {
            return Ok(());
        }
        for (tool, input) in tools.iter().filter_map(|tool| Some((tool, tool.input.clone()?))) {
            let name = named(document, tool);
            let shapes = self.rails.rules.shapes(Place::AnswerToolArguments, Some(&name), &self.asked);
            let Some(shapes) = shapes else { continue };
            let text = String::from_utf8_lossy(&document[input]);
            let progress = shapes.judge(&text, &mut Placeholders::default());
            self.noted(Place::AnswerToolArguments, &Progress { edits: Vec::new(), ..progress.clone() }, 0);
            if let Some(rule) = progress.blocked {
                return Err(Blocked::By(self.rails.rules.rules()[rule].name.clone()));
            }
        }
        Ok(())
    }
}

fn asked(operation: Operation, body: &[u8], of_answers: bool, of_tools: bool) -> Result<Asked, String> {
    let found = text::schemas(operation, body).map_err(|_| "the request's schema".to_owned())?;
    let answer = found.answer.filter(|_| of_answers).map(|schema| match schema {
        Schema::Object => br#"{"type":"object"}"#.as_slice(),
        Schema::At(span) => &body[span],
    });
    let tools = found.tools.filter(|_| of_tools);
    let schema = |(name, span): (String, Option<std::ops::Range<usize>>)| (name, span.map(|span| &body[span]));
    Asked::of(answer, tools.map(|tools| tools.into_iter().map(schema).collect()))
}

/// The name of a tool that is called.
pub(super) fn named(document: &[u8], tool: &Tool) -> String {
    let quoted = &document[tool.name.start - 1..tool.name.end + 1];
    serde_json::from_slice(quoted).unwrap_or_default()
}
