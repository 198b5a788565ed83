//! The promises of Infergate, each tried on the real thing.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on has failed")]

mod bytes;
mod capture;
mod command_line;
mod dashboards;
mod disconnect;
mod edge;
mod evidence;
mod failure;
mod fuzz;
mod guardrails;
mod identity;
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
mod simulate;
mod sinks;
mod smoke;
mod streams;
mod support;
mod surfaces;
mod tls;
mod traces;
