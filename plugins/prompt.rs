//! A request's prompt as plugins see it: who says what, borrowed from the body, and what else is asked for.

use std::sync::Arc;

use crate::claim::Claim;

/// Whose words a span is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// The application's: system and developer messages, instructions.
    System,
    /// The user's; also the text of requests that have no roles.
    User,
    /// The model's own, from before.
    Assistant,
    /// What a tool gave back: nobody's words that anybody vouches for.
    Tool,
}

/// Some text of one turn, as it reads: not as JSON writes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span<'a> {
    /// Whose it is.
    pub role: Role,
    /// The number of the message that it is in.
    pub turn: u32,
    /// The text.
    pub text: &'a str,
}

impl AsRef<str> for Span<'_> {
    fn as_ref(&self) -> &str {
        self.text
    }
}

/// Who asks, where, and what the head of the request says: for rules that name them.
#[derive(Clone, Copy, Debug, Default)]
pub struct Asker<'a> {
    /// Who pays; empty where the policy asks for no key.
    pub tenant: &'a str,
    /// Who asks.
    pub principal: &'a str,
    /// The plans that they have.
    pub plans: &'a [Arc<str>],
    /// The endpoint's path.
    pub surface: &'a str,
    /// The headers that a rule may look at.
    pub headers: &'a [(Arc<str>, Box<str>)],
    /// What their token says, as far as a rule may look at it.
    pub claims: &'a [(Arc<str>, Claim)],
}

/// What a request says, in order, and what comes with it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Prompt<'a> {
    /// All text.
    pub spans: &'a [Span<'a>],
    /// How many images there are.
    pub images: u32,
    /// How many tools the model may call.
    pub tools: u32,
    /// Whether the answer must be JSON or follow a schema.
    pub structured: bool,
    /// Who asks.
    pub asker: Asker<'a>,
}

impl<'a> Prompt<'a> {
    /// What is asked now: the user's last message, all its parts. Nothing where the user said nothing.
    pub fn asked(&self) -> &'a [Span<'a>] {
        let of_user = |span: &&Span<'_>| span.role == Role::User;
        let Some(turn) = self.spans.iter().rev().find(of_user).map(|span| span.turn) else { return &[] };
        let asked = |span: &Span<'_>| span.role == Role::User && span.turn == turn;
        let from = self.spans.iter().position(asked).unwrap_or_default();
        let rest = &self.spans[from..];
        &rest[..rest.iter().position(|span| !asked(span)).unwrap_or(rest.len())]
    }

    /// How many bytes of text there are.
    pub fn bytes(&self) -> usize {
        self.spans.iter().map(|span| span.text.len()).sum()
    }

    /// How many messages the user wrote.
    pub fn turns(&self) -> u32 {
        let of_user = self.spans.iter().filter(|span| span.role == Role::User);
        of_user.fold((0, None), |(count, last), span| (count + u32::from(last != Some(span.turn)), Some(span.turn))).0
    }

    /// Whether a tool's answer is what the model is to go on from: the middle of a tool loop.
    pub fn in_tool_loop(&self) -> bool {
        self.spans.last().is_some_and(|span| span.role == Role::Tool)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(role: Role, turn: u32, text: &str) -> Span<'_> {
        Span { role, turn, text }
    }

    #[test]
    fn what_is_asked_is_the_users_last_message_with_all_its_parts() {
        use Role::{Assistant, System, Tool, User};
        let spans = [
            span(System, 0, "be kind"),
            span(User, 1, "one"),
            span(Assistant, 2, "two"),
            span(User, 3, "three"),
            span(User, 3, "four"),
            span(Assistant, 4, "five"),
            span(Tool, 5, "six"),
        ];
        let prompt = Prompt { spans: &spans, ..Prompt::default() };
        assert_eq!(prompt.asked().iter().map(|span| span.text).collect::<Vec<_>>(), ["three", "four"]);
        assert_eq!((prompt.turns(), prompt.bytes(), prompt.in_tool_loop()), (2, 29, true));
        let prompt = Prompt { spans: &spans[..1], ..prompt };
        assert_eq!((prompt.asked().len(), prompt.turns(), prompt.in_tool_loop()), (0, 0, false));
    }
}
