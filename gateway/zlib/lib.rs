//! zlib under the name of libz-ng-sys.
//!
//! Pingora asks flate2 for zlib-ng, whose crate can only be built with cmake. The gateway compresses nothing; this
//! gives flate2 the same functions from zlib itself, so that a fresh machine needs a C compiler and no more.
//! `[patch.crates-io]` in the top `Cargo.toml` puts it in place.

pub use libz_sys::*;
