//! Infergate: an inference gateway in one process.
#![allow(missing_docs)]
pub mod refusal;
pub mod scan;
pub mod sse;
pub mod surface;
