//! The audit journal: one record for every request, and the proof that nobody changed any.
//!
//! [`record`] says what is in a record, [`journal`] writes it, `keep` compresses and retires, [`read`], [`search`],
//! [`verify`] and [`story`] are for those who look at it later, [`fanout`] carries it to other systems.

pub mod capture;
pub mod fanout;
pub mod journal;
mod json;
mod keep;
pub mod key;
#[cfg(test)]
mod made;
pub(crate) mod private;
pub mod read;
pub mod record;
pub mod search;
pub mod story;
mod tip;
pub mod verify;
