//! stub
pub mod file;
pub mod problem;
