//! Text inside JSON strings.
