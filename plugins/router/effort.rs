//! How much a model may think before it answers, as a decision says: a level that is set, or no word of it at all.

use schemars::JsonSchema;
use serde::Deserialize;

/// What a decision makes of the words by which requests ask a model to think: `reasoning_effort` of chats, `reasoning` of
/// responses, `thinking` of messages. Exactly one of the three is given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[schemars(rename = "Effort")]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// This level, whatever the request says.
    pub set: Option<Level>,
    /// This level where the request says nothing.
    pub default: Option<Level>,
    /// No level: what the request says of it is taken out, for models that know no such thing.
    pub strip: bool,
}

/// How much.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Not at all.
    None,
    /// Hardly.
    Minimal,
    /// A little. On messages: 1,024 tokens.
    Low,
    /// As models usually do. On messages: 4,096 tokens.
    Medium,
    /// Much. On messages: 16,384 tokens.
    High,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effort {
    /// It is this level.
    Set(Level),
    /// It is this level where nothing is said.
    Default(Level),
    /// Nothing is said.
    Strip,
}

impl Level {
    /// Its word.
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Minimal => "minimal",
            Self::Low => "low",
            Self::Medium => "medium",
            Self::High => "high",
        }
    }

    /// Tokens to think with, where those are what is asked for.
    pub const fn tokens(self) -> Option<u64> {
        match self {
            Self::None => None,
            Self::Minimal | Self::Low => Some(1_024),
            Self::Medium => Some(4_096),
            Self::High => Some(16_384),
        }
    }
}

/// What the policy means, or what is wrong with it.
pub fn build(config: &Config) -> Result<Effort, &'static str> {
    match *config {
        Config { set: Some(level), default: None, strip: false } => Ok(Effort::Set(level)),
        Config { set: None, default: Some(level), strip: false } => Ok(Effort::Default(level)),
        Config { set: None, default: None, strip: true } => Ok(Effort::Strip),
        _ => Err("give exactly one of: set, default, strip: true"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exactly_one_of_the_three_is_given() {
        let built = |json: &str| build(&serde_json::from_str(json).unwrap());
        assert_eq!(built(r#"{"set": "high"}"#), Ok(Effort::Set(Level::High)));
        assert_eq!(built(r#"{"default": "none"}"#), Ok(Effort::Default(Level::None)));
        assert_eq!(built(r#"{"strip": true}"#), Ok(Effort::Strip));
        for wrong in ["{}", r#"{"set": "low", "strip": true}"#, r#"{"set": "low", "default": "low"}"#] {
            assert!(built(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn levels_are_called_as_they_are_written() {
        for level in [Level::None, Level::Minimal, Level::Low, Level::Medium, Level::High] {
            let written = format!("\"{}\"", level.name());
            assert_eq!(serde_json::from_str::<Level>(&written).unwrap(), level);
        }
    }
}
