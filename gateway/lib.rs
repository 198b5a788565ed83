//! Infergate: an inference gateway in one process.
//!
//! A request's whole way is on one page, [`pipeline`]; the rest is called from there.
//!
//! | room | what is in it |
//! |---|---|
//! | [`pipeline`], [`failover`], [`hedge`], [`answering`], [`local`] | the life of a request: identify, read, admit, ask, relay, settle |
//! | [`identity`], [`parameters`], [`issuers`], [`certificate`] | who asks, what they may use and send; the keys of identity providers; a client's certificate |
//! | [`exchange`], [`refusal`], [`surface`] | one request's state; every way we say no; the table of endpoints |
//! | [`scan`], [`sse`], [`usage`], [`tokens`] | the one look at a body; the frame of an event stream; the tokens that an answer used, as it says and as they are counted |
//! | `stored` | what a response leaves at the server that answers it |
//! | `handover`, [`egress`] | what requests leave to the background, and its way out |
//! | [`limits`] | how much: reserved before anybody is asked, settled whatever way it ends |
//! | [`guard`], [`text`], [`ending`] | what may pass; where the texts stand in each dialect; how a stream ends early |
//! | [`policy`], [`settings`], [`secret`], [`discover`] | what the YAML means; what needs a restart; what is never printed |
//! | [`routers`], [`cascade`] | models that are chosen by what is asked, or by what was answered |
//! | [`pool`], [`weighing`], [`state`], [`house`] | upstreams and their levels; what a request is to them; what outlives a reload; what lives as long as the process |
//! | [`relay`] | the only room that names Pingora: sessions, connections, the way of an answer |
//! | [`money`] | what a request cost: prices, usage, whole nano-dollars |
//! | [`ledger`] | what was spent, by whom and when: folded from the journal |
//! | [`telemetry`], [`logging`], [`admin`], [`memory`] | what is measured and shown to operators |
//! | [`hex`], [`time`] | digits, and the calendar |
//! | `compatible` | paths and headers of another gateway, where the policy wants them |
//! | [`import`] | another gateway's configuration becomes a policy |
//! | [`simulate`] | the embedded model server; nothing else here knows it |
//! | [`cli`] | one file a subcommand |

pub mod admin;
pub mod answering;
pub mod audit;
pub mod cascade;
pub mod certificate;
pub mod cli;
mod compatible;
pub mod decimal;
pub mod discover;
pub mod egress;
pub mod ending;
pub mod exchange;
pub mod failover;
pub mod guard;
mod handover;
pub mod headers;
pub mod hedge;
pub mod hex;
pub mod house;
pub mod identity;
pub mod import;
pub mod issuers;
pub mod judging;
pub mod kept;
pub mod ledger;
pub mod limits;
pub mod local;
pub mod logging;
pub mod memory;
pub mod money;
pub mod parameters;
pub mod pipeline;
pub mod policy;
pub mod pool;
pub mod refusal;
pub mod relay;
pub mod routers;
pub mod scan;
pub mod secret;
pub mod settings;
pub mod simulate;
pub mod sse;
pub mod state;
mod stored;
pub mod surface;
pub mod telemetry;
pub mod text;
pub mod time;
pub mod tokens;
pub mod usage;
pub mod weighing;
