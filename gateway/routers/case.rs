//! What a request asks of whoever answers it: what it needs, however good a model is otherwise.

use std::fmt;
use std::time::Instant;

use infergate_plugins::operation::Operation;
use infergate_plugins::prompt::Prompt;

use crate::money::bill;
use crate::policy::{Route, Tenant};
use crate::scan::Scan;
use crate::text::Reading;

/// A request for a model that is left open.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// What is asked of the model.
    pub operation: Operation,
    /// The body.
    pub body: &'a [u8],
    /// Where its deciding fields stand.
    pub scan: &'a Scan,
}

impl<'a> Request<'a> {
    /// The request that says this.
    pub fn of(reading: &'a Reading, scan: &'a Scan) -> Self {
        Self { operation: reading.operation, body: &reading.body, scan }
    }
}

/// The same, with all that a choice goes by.
#[derive(Clone, Copy, Debug)]
pub struct Case<'a> {
    /// The request.
    pub request: Request<'a>,
    /// Who pays, where anybody is known.
    pub tenant: Option<&'a Tenant>,
    /// Bytes of its text; 0 where nobody measures.
    pub text_bytes: u64,
    /// The time.
    pub now: Instant,
    images: bool,
    tools: bool,
    structured: bool,
}

/// Why a model cannot answer a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unfit {
    /// None of its upstreams serves the endpoint.
    Operation,
    /// It is nowhere where the tenant's requests may go.
    Region,
    /// It reads no images.
    Images,
    /// It calls no tools.
    Tools,
    /// It answers in no form.
    Structured,
    /// Its context is too short: what it has, and what is needed.
    Context(u64, u64),
}

impl<'a> Case<'a> {
    /// The case of a request with this prompt; `measures`: whether anybody asks how long it is.
    pub fn of(request: Request<'a>, prompt: &Prompt<'_>, tenant: Option<&'a Tenant>, measures: bool) -> Self {
        Self {
            request,
            tenant,
            text_bytes: if measures { bill::text_bytes(request.body) } else { 0 },
            now: Instant::now(),
            images: prompt.images > 0,
            tools: prompt.tools > 0,
            structured: prompt.structured,
        }
    }

    /// Why `route` cannot answer it, if it cannot.
    pub fn unfit(&self, route: &Route) -> Option<Unfit> {
        let (can, operation) = (&route.model.can, self.request.operation);
        if !route.stages.iter().any(|stage| stage.pool.serves(operation)) {
            return Some(Unfit::Operation);
        }
        if self.tenant.is_some_and(|tenant| !tenant.reaches(route, operation)) {
            return Some(Unfit::Region);
        }
        let lacks = [
            (self.images && !can.images, Unfit::Images),
            (self.tools && !can.tools, Unfit::Tools),
            (self.structured && !can.structured, Unfit::Structured),
        ];
        let lack = lacks.into_iter().find_map(|(lacks, unfit)| lacks.then_some(unfit));
        lack.or_else(|| self.too_long(route, can.context_tokens?))
    }

    fn too_long(&self, route: &Route, most: u64) -> Option<Unfit> {
        let needs = route.density.estimate(self.text_bytes).saturating_add(self.output_max().unwrap_or(1));
        (needs > most).then_some(Unfit::Context(most, needs))
    }

    /// The most tokens that an answer may have, if the request says so.
    pub fn output_max(&self) -> Option<u64> {
        self.request.scan.output_max(self.request.operation, self.request.body).ok().flatten()
    }

    /// How many answers are asked for.
    pub fn choices(&self) -> u64 {
        self.request.scan.choices(self.request.body).unwrap_or(1)
    }
}

impl fmt::Display for Unfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Operation => f.write_str("cannot do this"),
            Self::Region => f.write_str("is in no region that this key may use"),
            Self::Images => f.write_str("reads no images"),
            Self::Tools => f.write_str("calls no tools"),
            Self::Structured => f.write_str("answers in no form"),
            Self::Context(most, needs) => write!(f, "has room for {most} tokens of {needs}"),
        }
    }
}
