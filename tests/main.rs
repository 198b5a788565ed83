//! The promises of Infergate, each tried on the real thing.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on has failed")]

mod bytes;
mod capture;
mod cascade;
mod command_line;
mod compatible;
mod dashboards;
mod deploy;
mod disconnect;
mod edge;
mod evidence;
mod failure;
mod fuzz;
mod guardrails;
mod identity;
mod import;
#[cfg(feature = "kafka")]
mod kafka;
mod ledger;
mod lifecycle;
mod limits;
mod logs;
mod metrics;
mod money;
mod nats;
mod overload;
mod prefixes;
mod readme;
mod reload;
mod replicas;
mod routing;
mod semantic_routing;
mod shared;
mod shortlists;
mod simulate;
mod sinks;
mod smoke;
mod streams;
mod support;
mod surfaces;
mod tls;
mod traces;
