//! The audit journal: one record for every request, and the proof that nobody changed any.

pub mod fanout;
pub mod journal;
mod keep;
pub mod key;
pub mod read;
pub mod record;
pub mod search;
pub mod story;
mod tip;
pub mod verify;
#[cfg(test)]
mod made;
