//! The decisions of Infergate: pure, one file each.
//!
//! A plugin opens no socket, reads no file and asks no clock: what it may have of the world is handed to
//! it, so a test hands it fakes. Each kind has one small trait, in the file that holds the list of its
//! built-ins; the name in that list is the word used in `policy.yaml`.
//!
//! | kind | what it decides | trait |
//! |---|---|---|
//! | authenticator | who asks, and who pays | [`authenticator::Authenticator`] |
//! | guardrail | which text may pass, and how it is changed | [`guardrail::Finder`] |
//! | provider | how one family of model servers wants to be spoken to | [`provider::Provider`] |
//! | router | which model answers a request that leaves it open | [`router::Router`] |
//! | sink | what leaves of the audit journal, and in which shape | [`sink::Sink`] |
//!
//! # A whole plugin
//!
//! The modules of the other kinds begin with one each. Adding a provider is one file like this, its `mod` line and one line in [`provider::KINDS`]:
//!
//! ```
//! use infergate_plugins::operation::Operation;
//! use infergate_plugins::provider::{Credential, Provider};
//!
//! /// A server that wants its key in `x-acme-key` and only knows chat.
//! #[derive(Debug)]
//! struct Acme;
//!
//! impl Provider for Acme {
//!     fn kind(&self) -> &'static str {
//!         "acme"
//!     }
//!     fn credential(&self, key: &str) -> Credential {
//!         Credential { name: "x-acme-key", value: key.to_owned() }
//!     }
//!     fn serves(&self, operation: Operation) -> bool {
//!         operation == Operation::Chat
//!     }
//! }
//!
//! assert_eq!(Acme.credential("k").value, "k");
//! assert!(!Acme.serves(Operation::Embeddings));
//! assert_eq!(Acme.health_path(), "/health"); // the default
//! ```

pub mod authenticator;
pub mod claim;
pub mod guardrail;
pub mod language;
pub mod operation;
pub mod prompt;
pub mod provider;
pub mod router;
pub mod secret;
pub mod semantic;
pub mod sink;
