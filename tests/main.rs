//! The promises of Infergate, each tried on the real thing.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on has failed")]

mod simulate;
mod smoke;
mod support;
