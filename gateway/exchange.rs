//! One request's owned state, from its head to its end. It settles itself, whatever way it ends.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use http::Method;

use crate::audit::capture::Capture;
use crate::audit::journal::{Journal, Place};
use crate::audit::record::{
    Attempt, AttemptList, Attempts, BodyBytes, CandidateList, Client, Decision, Decisions, Ending, Id, LimitList,
    Metered, Models, Moment, Outcome, Peer, PolicyMark, Record, Text, Times, Trace, clip,
};
use crate::guard::{Blocked, Guard};
use crate::headers::REQUEST_ID;
use crate::house::House;
use crate::identity::{Hold, Who};
use crate::limits::admit::prompt_tokens;
use crate::limits::standing::Standing;
use crate::limits::{Reservation, Used, millis};
use crate::money::bill::{self, Bill, Cost, End as Whole};
use crate::money::{Cached, NanoUsd, Price};
use crate::policy::file::{CaptureText, Durable, OnError};
use crate::policy::{Policy, Route};
use crate::pool::{Picked, Pool, Upstream};
use crate::refusal::{Code, Refusal};
use crate::relay::headers::is_sane_id;
use crate::relay::{Downstream, Tally};
use crate::routers::Chosen;
use crate::routers::shortlist::Weighed;
use crate::surface::{Surface, UNKNOWN};
use crate::telemetry::trace::{self, Context, TRACEPARENT_BYTES, Tracer};
use crate::telemetry::{InFlight, Telemetry};
use crate::usage::{Source, Usage};

/// How long the end of an answer waits for its record to be on disk.
const DURABLE: Duration = Duration::from_secs(30);

/// One request.
#[derive(Debug)]
pub struct Exchange {
    /// Its id, which is ours.
    pub id: Id,
    /// The policy that decides everything about it.
    pub policy: Arc<Policy>,
    /// Its endpoint.
    pub surface: &'static Surface,
    /// When its stages were over.
    pub times: Stages,
    /// Attempts so far.
    pub attempts: Attempts,
    /// Who asks; nobody in particular where the policy asks for no key.
    pub who: Option<Who>,
    /// The model that the client asked for, clipped.
    pub asked: Option<Box<str>>,
    /// The policy's entry for it.
    pub route: Option<Arc<Route>>,
    /// Whether the answer is to be a stream.
    pub streaming: bool,
    /// Bytes of its body.
    pub body_bytes: u64,
    /// Its place in a distributed trace.
    pub trace: Option<Trace>,
    /// The model that answers in place of the one that was asked for.
    pub substitute: Option<Arc<str>>,
    /// The model that was chosen where the one that was asked for left it open.
    pub chosen: Option<Chosen>,
    /// What was weighed where a shortlist chose it.
    pub weighed: Option<Box<Weighed>>,
    /// How the limits stood of which one had too little left.
    pub short: Option<Box<[Standing]>>,
    /// What went to the client, and what it tells.
    pub tally: Tally,
    /// What it comes to, where the policy has prices and a model has begun to answer.
    pub bill: Option<Bill>,
    /// What was used and cost besides the answer. Limits know of it.
    aside: Option<Box<Spent>>,
    /// The same of attempts that were let go before they answered, and of second opinions: limits hear of it with the
    /// next answer.
    let_go: Option<Box<Spent>>,
    /// Of so many attempts, limits know what they did in vain.
    in_vain: usize,
    caller: Caller,
    decisions: Decisions,
    ending: End,
    place: Option<Place>,
    on_record: bool,
    journal: Option<Arc<Journal>>,
    telemetry: Arc<Telemetry>,
    tracer: Arc<Tracer>,
    _in_flight: InFlight,
}

/// How much of an answer was heard.
#[derive(Clone, Copy, Debug)]
pub struct Heard {
    /// Whether it came to its end.
    pub whole: bool,
    /// Bytes of it.
    pub bytes: u64,
}

/// What several answers or attempts used and cost, all together.
#[derive(Clone, Copy, Debug, Default)]
struct Spent {
    usage: Usage,
    nanousd: NanoUsd,
    unpriced: bool,
}

impl Spent {
    /// The same as limits count it.
    fn used(&self, cached: Cached) -> Used {
        let output = self.usage.output_tokens.unwrap_or_default();
        Used { asked: false, input: prompt_tokens(&self.usage, cached), output, nanousd: self.nanousd.0 }
    }

    fn and(self, other: Self) -> Self {
        Self {
            usage: self.usage.and(other.usage),
            nanousd: self.nanousd.plus(other.nanousd),
            unpriced: self.unpriced || other.unpriced,
        }
    }
}

fn add(sum: &mut Option<Box<Spent>>, more: Spent) {
    let sum = sum.get_or_insert_default();
    **sum = sum.and(more);
}

/// Whom it came from.
#[derive(Debug)]
struct Caller {
    peer: Peer,
    protocol: &'static str,
    method: Method,
    request_id: Option<Box<str>>,
}

/// When its stages were over; what has not been reached yet stands at `received`.
#[derive(Clone, Copy, Debug)]
pub struct Stages {
    /// The head had been read, by the clock of the day.
    pub at: SystemTime,
    /// The head had been read.
    pub received: Instant,
    /// The body had been read.
    pub body: Instant,
    /// The request had been parsed and routed.
    pub admitted: Instant,
    /// It had its place in the pool: at once, if the pool has room for all.
    pub queued: Instant,
    /// The first piece of the answer had come.
    pub answered: Instant,
    /// It was about to leave.
    pub first: Instant,
}

/// How it ended, as far as that is known.
#[derive(Debug)]
struct End {
    outcome: Outcome,
    status: Option<u16>,
    code: Option<Code>,
    message: Option<Cow<'static, str>>,
}

impl Exchange {
    /// A request whose head has been read.
    pub fn begin(house: &House, downstream: &Downstream) -> Self {
        let (now, policy) = (Instant::now(), house.policy.get());
        let head = downstream.head();
        let request_id = head.headers.get(REQUEST_ID).map(|id| clip(&String::from_utf8_lossy(id.as_bytes())).into());
        Self {
            id: Id::new(),
            surface: &UNKNOWN,
            times: Stages {
                at: SystemTime::now(),
                received: now,
                body: now,
                admitted: now,
                queued: now,
                answered: now,
                first: now,
            },
            attempts: Attempts::new(),
            who: None,
            asked: None,
            route: None,
            streaming: false,
            body_bytes: 0,
            trace: policy.traces.as_ref().map(|traces| traces.place(Context::of(&head.headers))),
            policy,
            substitute: None,
            chosen: None,
            weighed: None,
            short: None,
            tally: Tally::default(),
            bill: None,
            aside: None,
            let_go: None,
            in_vain: 0,
            caller: Caller {
                peer: downstream.peer(),
                protocol: downstream.protocol(),
                method: head.method.clone(),
                request_id,
            },
            decisions: Decisions::new(),
            ending: End { outcome: Outcome::Aborted, status: None, code: None, message: None },
            place: house.journal.as_ref().and_then(Journal::reserve),
            on_record: false,
            journal: house.journal.clone(),
            telemetry: house.telemetry.clone(),
            tracer: house.tracer.clone(),
            _in_flight: InFlight::enter(&house.telemetry),
        }
    }

    /// The model's name as policy has it after all: the substitute's, or what the client asked for.
    pub fn named(&self) -> Option<&str> {
        self.substitute.as_deref().or(self.asked.as_deref())
    }

    /// How the limits stood that hold for it.
    pub fn standings(&self) -> &[Standing] {
        let reserved = || self.tally.reservation.as_ref().map(|reservation| &*reservation.standings);
        self.short.as_deref().or_else(reserved).unwrap_or_default()
    }

    /// Another model answers than the one that was asked for.
    pub fn serve_instead(&mut self, route: Arc<Route>, name: Arc<str>) {
        self.route = Some(route);
        self.substitute = Some(name);
    }

    /// What the client itself calls it, if that can stand in a header of ours.
    pub fn client_id(&self) -> Option<&str> {
        self.caller.request_id.as_deref().filter(|id| is_sane_id(id))
    }

    /// By what its caller holds the right to go on with it, where anybody is known.
    pub fn hold(&self) -> Option<Hold> {
        self.who.as_ref().map(|who| Hold::of(&who.identity))
    }

    /// Begins to keep its text, if the policy wants this kind of it and the disk keeps up.
    pub fn capture(&mut self, kind: CaptureText, body: impl FnOnce() -> Bytes) {
        if self.policy.audit.capture.text != kind {
            return;
        }
        let body = &body();
        let takes = || self.journal.as_ref().is_some_and(|journal| journal.takes_captures());
        let tenant = self.who.as_ref().map(|who| &*who.tenant.name);
        self.tally.capture = Capture::begin(&self.policy.audit.capture, tenant, body).filter(|_| takes());
    }

    /// Whether its record can be kept, where there is a journal.
    pub fn is_recorded(&self) -> bool {
        self.journal.is_none() || self.place.is_some()
    }

    /// There is no room for its record: it is served all the same, or not.
    pub fn unrecorded(&self, served: bool) {
        if let Some(journal) = &self.journal {
            journal.lose(served);
        }
    }

    /// Somebody decided something about it.
    pub fn decide(
        &mut self,
        stage: &'static str,
        rule: impl Into<Text>,
        verdict: impl Into<Text>,
        why: impl Into<Text>,
    ) {
        self.decisions.push(Decision { stage, rule: rule.into(), verdict: verdict.into(), why: why.into() });
    }

    /// Everything that the gateway does itself before it asks an upstream has been done.
    pub fn admitted(&mut self) {
        self.times.admitted = Instant::now();
    }

    /// An upstream is about to be asked; `bytes` is the length of the body.
    pub fn attempt_begins(&mut self, pool: &Arc<Pool>, picked: &Picked<'_>, bytes: usize) {
        let span = self.trace.map_or(0, |_| trace::new_span());
        let hourly = self.hourly(pool, picked.upstream);
        self.attempts.push(Attempt::begin(pool, picked, bytes, span).asks_for(self.route.clone(), hourly));
    }

    /// What an upstream costs that is paid by the hour.
    fn hourly(&self, pool: &Arc<Pool>, upstream: &Upstream) -> Option<Arc<Price>> {
        self.policy.prices.as_ref().filter(|book| book.by_hour)?;
        let price = self.price(self.model_at(self.route.as_ref()?, pool, upstream)?, pool, upstream)?;
        price.gpu_hour.and(Some(price.clone()))
    }

    /// What the model costs that an upstream of `pool` knows as `model`, at the time of this request.
    pub fn price(&self, model: &str, pool: &Pool, upstream: &Upstream) -> Option<&Arc<Price>> {
        self.policy.prices.as_ref()?.find(model, &pool.name, upstream.provider.kind(), self.times.at)
    }

    /// The `traceparent` for the upstream that is asked now; none where the policy says nothing of traces.
    pub fn traceparent(&self) -> Option<[u8; TRACEPARENT_BYTES]> {
        Some(trace::traceparent(self.trace.as_ref()?, self.attempts.last()?.span))
    }

    /// The head of the running attempt's answer has come.
    pub fn attempt_answers(&mut self, head_at: Instant, status: u16) {
        if let Some(attempt) = self.attempts.last_mut() {
            attempt.head = Some((head_at, status));
        }
    }

    /// The running attempt is over.
    pub fn attempt_ends(&mut self, result: Ending, why: Option<Text>) {
        let received = self.tally.bytes;
        if let Some(attempt) = self.attempts.last_mut().filter(|attempt| attempt.ended.is_none()) {
            attempt.received = received;
            attempt.end(result, why);
        }
    }

    /// The attempt that is over last used this, and its answer was not passed on.
    pub fn attempt_used(&mut self, usage: Usage, cost: Option<NanoUsd>) {
        if let Some(attempt) = self.attempts.last_mut() {
            attempt.metered = Metered::of(&usage, cost.map(|cost| cost.0));
        }
        self.used_besides(usage, cost);
    }

    /// This was used for the request besides its answer, and cost so much, if that is known. Limits hear of it with the
    /// next answer.
    pub fn used_besides(&mut self, usage: Usage, cost: Option<NanoUsd>) {
        let unpriced = cost.is_none() && self.policy.prices.is_some();
        add(&mut self.let_go, Spent { usage, nanousd: cost.unwrap_or_default(), unpriced });
    }

    /// What limits have yet to hear of before the request is asked anywhere.
    pub fn used_before(&self) -> Used {
        let spent = self.let_go.as_deref().copied().unwrap_or_default();
        spent.used(bill::cached(self.surface.operation))
    }

    /// It goes nowhere, and limits have heard of what was used for it before.
    pub fn charged(&mut self, reservation: Box<Reservation>) {
        self.untold();
        self.tally.reservation = Some(reservation);
    }

    /// Of two that run at once, the earlier one is the running attempt now, or the later one again.
    pub fn other_attempt(&mut self) {
        if let Some(at) = self.attempts.len().checked_sub(2) {
            self.attempts.swap(at, at + 1);
        }
    }

    /// How many upstreams have been asked.
    pub fn attempt_count(&self) -> u32 {
        self.attempts.len() as u32
    }

    /// The first piece of the answer came at `first_at` and is about to leave.
    pub fn answering(&mut self, first_at: Instant, status: u16) {
        self.times.answered = first_at;
        self.times.first = Instant::now();
        self.ending.status = Some(status);
    }

    /// We say no: before an answer, or in the middle of one (then `status` has been told already).
    pub fn refused(&mut self, refusal: &Refusal) {
        self.telemetry.refused(refusal.code);
        let verdict = if self.ending.status.is_some() { "break off" } else { "refuse" };
        self.decide("refuse", refusal.code.name(), verdict, refusal.message.clone());
        self.ending.status.get_or_insert(refusal.code.status().as_u16());
        self.ending.code = Some(refusal.code);
        self.ending.message = Some(refusal.message.clone());
        self.ending.outcome = match refusal.code {
            Code::ConnectFailed | Code::UpstreamClosed | Code::UpstreamInvalid => Outcome::UpstreamError,
            Code::ConnectTimeout
            | Code::FirstTokenTimeout
            | Code::AnswerTimeout
            | Code::BetweenTokensTimeout
            | Code::TotalTimeout => Outcome::Timeout,
            Code::ContentFilter | Code::ContentUnread => Outcome::Blocked,
            _ => Outcome::Refused,
        };
    }

    /// The answer was ended where nothing more may be used.
    pub fn limit_cut(&mut self) {
        self.telemetry.limit_cut();
        self.decide("limit", "output", "cut", "the answer has all that is left");
        self.ending.outcome = Outcome::LimitCut;
    }

    /// The answer was ended before what a guardrail found.
    pub fn blocked(&mut self, blocked: &Blocked) {
        let (Blocked::By(rule) | Blocked::Unread(rule)) = blocked;
        self.decide("guard", rule, "block", blocked.why());
        self.ending.code = Some(blocked.code());
        self.ending.outcome = Outcome::Blocked;
    }

    /// What it used is known: the rest is given back. After this, whoever it belongs to may ask again.
    pub fn settle(&mut self) {
        let Some(mut reservation) = self.tally.reservation.take_if(|held| !held.is_settled()) else { return };
        let used = self.used(&reservation, self.passed_on());
        reservation.settle(&used, millis(SystemTime::now()));
        self.tally.reservation = Some(reservation);
    }

    /// The answer that was read is not passed on as things are: what it used is settled, before anything is reserved for
    /// another model.
    pub fn settle_work(&mut self, heard: Heard) {
        let Some(mut reservation) = self.tally.reservation.take() else { return };
        let used = self.used(&reservation, heard);
        reservation.settle_work(&used, millis(SystemTime::now()));
        self.tally.reservation = Some(reservation);
    }

    /// What limits have to hear of: the answer, and whatever was done besides since they heard last.
    fn used(&mut self, reservation: &Reservation, heard: Heard) -> Used {
        let cached = bill::cached(self.surface.operation);
        let (usage, cost, _) = self.answer_spent(heard);
        let cost = cost.map_or(0, |cost| cost.nanousd.0);
        let input = prompt_tokens(&usage, cached);
        let learns = usage.source == Source::Upstream && !reservation.has_heard();
        if let Some(route) = self.route.as_ref().filter(|_| learns) {
            route.density.learn(reservation.text_bytes, input);
            if let Some((attempt, micros)) = self.attempts.last().and_then(|last| Some((last, last.gpu_us()?))) {
                attempt.pool().state.effort.learn(input, usage.output_tokens.unwrap_or_default(), micros);
            }
        }
        let besides = self.untold().unwrap_or_default().used(cached);
        Used {
            asked: !self.attempts.is_empty(),
            input: input + besides.input,
            output: usage.output_tokens.unwrap_or_default() + besides.output,
            nanousd: cost.saturating_add(besides.nanousd),
        }
    }

    /// What was used besides the answer and limits have not heard of. From now on they have.
    fn untold(&mut self) -> Option<Spent> {
        let in_vain = self.worked_in_vain();
        self.in_vain = self.unanswered();
        let untold = [self.let_go.take().map(|let_go| *let_go), in_vain].into_iter().flatten().reduce(Spent::and)?;
        add(&mut self.aside, untold);
        Some(untold)
    }

    /// The answer that was read is not passed on: the running attempt has what it used, and the next model begins anew.
    pub fn set_aside(&mut self, result: Ending, why: Text, heard: Heard) {
        let (usage, cost, unpriced) = self.answer_spent(heard);
        let nanousd = cost.map(|cost| cost.nanousd.0);
        if let Some(attempt) = self.attempts.last_mut() {
            attempt.metered = Metered::of(&usage, nanousd);
        }
        add(&mut self.aside, Spent { usage, nanousd: NanoUsd(nanousd.unwrap_or_default()), unpriced });
        self.attempt_ends(result, Some(why));
        self.unread();
    }

    /// What was read of the answer is forgotten: it is read again when it is passed on, or nobody gets it.
    pub fn unread(&mut self) {
        self.tally.forget();
        self.bill = None;
    }

    /// The answer was given to its end.
    pub fn completed(&mut self) {
        let failed = self.ending.status.is_some_and(|status| status >= 500) && !self.surface.is_local();
        self.ending.outcome = if failed { Outcome::UpstreamError } else { Outcome::Ok };
    }

    /// The client left. Where its record is on disk already, it had all but the end: nothing changes any more.
    pub fn client_closed(&mut self) {
        if !self.on_record {
            self.ending.outcome = Outcome::ClientClosed;
        }
    }

    /// Whether the client may have the end of its answer only when the record is on disk.
    pub fn is_durable(&self) -> bool {
        self.place.is_some() && self.policy.audit.durable == Durable::BeforeResponseEnd
    }

    /// Files the record as it stands and waits until it is on disk, where the policy asks for that. What comes after
    /// is the way to the client. Returns whether the answer may end: not if the disk does not answer.
    pub async fn put_on_record(&mut self) -> bool {
        if !self.is_durable() {
            return true;
        }
        let (Some(journal), Some(place)) = (self.journal.clone(), self.place.take()) else { return true };
        let entry = self.file(&journal, &self.record(Instant::now()), place);
        self.on_record = true;
        self.tally.capture = None;
        let done = tokio::time::timeout(DURABLE, journal.durable(entry)).await.is_ok();
        done || self.policy.audit.on_error == OnError::Allow
    }

    fn file(&self, journal: &Journal, record: &Record<'_>, place: Place) -> u64 {
        if let Some(capture) = &self.tally.capture {
            journal.capture(&capture.line(&self.id));
        }
        journal.file(record, place)
    }

    /// What the gateway itself took until the first piece of the answer, which came at `came`, left at `left`.
    pub fn overhead(&self, came: Instant, left: Instant) -> Duration {
        let admit = self.times.admitted.saturating_duration_since(self.times.body);
        admit + left.saturating_duration_since(came)
    }

    fn record(&self, ended: Instant) -> Record<'_> {
        let times = &self.times;
        let moment = Moment { at: times.at, received: times.received, ended };
        let answer = self.answer_spent(self.passed_on());
        let metered = Metered::of(&answer.0, answer.1.as_ref().map(|cost| cost.nanousd.0));
        let (usage, cost, unpriced) = self.with_besides(answer);
        let model = self.models();
        let reached = |at: Instant| (at > times.received).then(|| moment.micros(at));
        let bytes = BodyBytes { request: self.body_bytes, answer: self.tally.bytes };
        Record {
            id: self.id,
            outcome: self.ending.outcome,
            status: self.ending.status,
            surface: self.surface.path,
            operation: self.surface.operation.name(),
            method: clip(self.caller.method.as_str()),
            stream: self.streaming,
            client: Client {
                address: self.caller.peer,
                protocol: self.caller.protocol,
                request_id: self.caller.request_id.as_deref(),
            },
            trace: self.trace,
            principal: self.who.as_ref().map(|who| &*who.identity.principal),
            tenant: self.who.as_ref().map(|who| &*who.tenant.name),
            model,
            policy: PolicyMark { revision: self.policy.revision, hash: &self.policy.hash },
            decisions: &self.decisions,
            candidates: self.weighed.as_deref().map(|weighed| CandidateList(&weighed.candidates)),
            attempts: AttemptList { list: &self.attempts, moment, bytes, metered, route: model.route },
            usage,
            cost,
            unpriced,
            guardrails: self.tally.guard.as_deref().map(Guard::judged),
            limits: self.tally.reservation.as_deref().map(LimitList),
            bytes,
            capture: self.tally.capture.as_deref().map(Capture::mark),
            times: Times {
                body: reached(times.body),
                admitted: reached(times.admitted),
                queued: reached(times.queued).filter(|_| times.queued > times.admitted),
                first: reached(times.first),
                ended: moment.micros(ended),
                own: self.overhead(times.answered, times.first).as_micros() as u64,
            },
            code: self.ending.code.map(Code::name),
            message: self.ending.message.as_deref().map(clip),
            moment,
        }
    }

    /// What an answer costs that is here as a whole, if that is known.
    pub fn costs(&self, body: &[u8]) -> Option<NanoUsd> {
        let cost = self.bill.as_ref()?.settle_whole(body, self.gpu_us()).1.flatten()?;
        Some(self.besides().map_or(cost, |besides| cost.plus(besides.nanousd)))
    }

    /// What it cost, once it is over.
    pub fn cost(&self) -> Option<NanoUsd> {
        self.with_besides(self.answer_spent(self.passed_on())).1.map(|cost| cost.nanousd)
    }

    fn gpu_us(&self) -> Option<u64> {
        self.attempts.last()?.gpu_us()
    }

    /// What all its answers and attempts used together, what that cost, and whether something of it has no price, where
    /// this is what the `answer` alone did.
    fn with_besides<'a>(&'a self, answer: (Usage, Option<Cost<'a>>, bool)) -> (Usage, Option<Cost<'a>>, bool) {
        let Some(besides) = self.besides() else { return answer };
        let (usage, cost, unpriced) = answer;
        let nanousd = cost.as_ref().map_or(NanoUsd(0), |cost| cost.nanousd).plus(besides.nanousd);
        let book = self.policy.prices.as_ref().filter(|_| cost.is_some() || nanousd.0 > 0);
        let cost = book.map(|book| Cost { nanousd, prices: &book.version });
        (besides.usage.and(usage), cost, unpriced || besides.unpriced)
    }

    /// What was used besides the answer: by answers that were set aside, by attempts that were let go, and by those that
    /// gave none.
    fn besides(&self) -> Option<Spent> {
        let [aside, let_go] = [&self.aside, &self.let_go].map(|spent| spent.as_deref().copied());
        [aside, let_go, self.worked_in_vain()].into_iter().flatten().reduce(Spent::and)
    }

    /// What servers that are paid by the hour did for attempts that gave no answer, as far as limits do not know of it.
    /// An attempt that reached nobody was no work, and one that was metered is counted with that.
    fn worked_in_vain(&self) -> Option<Spent> {
        let counts = |attempt: &&Attempt| attempt.result != Ending::Connect && attempt.metered.is_none();
        let worked = self.attempts.get(self.in_vain..self.unanswered())?.iter().filter(counts).filter_map(|attempt| {
            let usage = Usage { gpu_us: Some(attempt.gpu_us()?), ..Usage::default() };
            let nanousd = attempt.hourly()?.cost(&usage, Cached::Within)?;
            Some(Spent { usage, nanousd, unpriced: false })
        });
        worked.reduce(Spent::and)
    }

    /// How many attempts there were before the one whose answer is read.
    fn unanswered(&self) -> usize {
        self.attempts.len().saturating_sub(usize::from(self.bill.is_some()))
    }

    /// How much of the answer its client has.
    fn passed_on(&self) -> Heard {
        Heard { whole: self.ending.outcome == Outcome::Ok, bytes: self.tally.bytes }
    }

    /// What the answer used that was read last, what that cost, and whether something of it has no price.
    fn answer_spent(&self, Heard { whole, bytes }: Heard) -> (Usage, Option<Cost<'_>>, bool) {
        let told = self.tally.usage(whole);
        let Some(bill) = &self.bill else { return (told, None, false) };
        let (usage, cost) = bill.settle(told, Whole { bytes, events: self.streaming, whole, gpu_us: self.gpu_us() });
        let Some(book) = &self.policy.prices else { return (usage, None, false) };
        let priced = |nanousd| Cost { nanousd, prices: &book.version };
        (usage, cost.flatten().map(priced), cost == Some(None))
    }

    fn models(&self) -> Models<'_> {
        let route = self.route.as_ref().map(|route| route.model.name.as_str());
        let used = self
            .attempts
            .last()
            .and_then(|attempt| self.model_at(self.route.as_ref()?, attempt.pool(), attempt.upstream()?));
        Models { asked: self.asked.as_deref(), route, used }
    }

    /// The model of `route` as an upstream knows it.
    fn model_at<'a>(&'a self, route: &'a Route, pool: &Arc<Pool>, upstream: &'a Upstream) -> Option<&'a str> {
        let stage = route.stages.iter().find(|stage| Arc::ptr_eq(&stage.pool, pool))?;
        stage.other_name(upstream, self.named()).or(self.named()).or(Some(&route.model.name))
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        let place = self.place.take();
        self.settle();
        if let Some(guard) = &self.tally.guard {
            guard.counted();
        }
        let mut record = self.record(Instant::now());
        self.telemetry.finished(&record, self.surface, self.route.as_deref());
        if let Some(who) = &self.who {
            self.telemetry.spent_by(&record, &who.tenant, self.route.as_deref());
        }
        if let Some(traces) = &self.policy.traces
            && !self.tracer.finish(traces, &record)
        {
            record.forget_trace();
        }
        if let (Some(journal), Some(place)) = (&self.journal, place) {
            self.file(journal, &record, place);
        }
        tracing::debug!(
            id = %self.id,
            surface = record.surface,
            outcome = record.outcome.name(),
            attempts = self.attempts.len(),
            policy = %self.policy.hash,
            took_ms = record.times.ended / 1000,
            "request ended"
        );
    }
}
