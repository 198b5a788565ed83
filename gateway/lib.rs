//! Infergate: an inference gateway in one process.
#![allow(missing_docs)]
pub mod policy;
pub mod refusal;
pub mod scan;
pub mod secret;
pub mod sse;
pub mod surface;
