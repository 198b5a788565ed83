//! Models whose name leaves it open which one answers: what a request asks decides.
//!
//! The routers of the policy are asked in order once the body has been parsed, and before limits count it, so that they
//! count the model that is chosen; the first answer wins, and where there is none the default answers. Not every
//! candidate serves every endpoint: one that cannot do what is asked is passed over. Where a decision names a shortlist,
//! the best on it answers.

pub mod case;
pub mod conversations;
pub mod effort;
pub mod second;
pub mod shortlist;
pub mod words;

use std::collections::HashMap;
use std::fmt::Write;
use std::sync::Arc;
use std::time::Instant;

use http::{HeaderMap, HeaderName};
use infergate_plugins::claim::{self, Claims};
use infergate_plugins::prompt::{Asker, Prompt, Role};
use infergate_plugins::router::cascade::Cascade;
use infergate_plugins::router::effort::Effort;
use infergate_plugins::router::second::Doubt;
use infergate_plugins::router::{Answer, Choice, Router, Why};
use serde_json::{Map, Value};
use smallvec::SmallVec;

use self::case::{Case, Request, Unfit};
use self::conversations::{Conversations, Kept};
use self::shortlist::{Shortlist, Weighed};
use self::words::Words;
use crate::audit::record::Text;
use crate::cascade::Ladder;
use crate::exchange::Exchange;
use crate::guard::BESIDE;
use crate::house::House;
use crate::pipeline::Planned;
use crate::policy::file::Keep;
use crate::policy::{Route, Tenant};
use crate::refusal::{Code, Refusal};
use crate::relay::Downstream;
use crate::scan::Scan;
use crate::text::Reading;

/// A virtual model.
#[derive(Debug)]
pub struct Routers {
    /// Its name.
    pub name: Arc<str>,
    /// Who is asked, in order.
    pub ask: Vec<Arc<dyn Router>>,
    /// Who answers where nobody has an answer.
    pub default: Arc<str>,
    /// Where the candidates are served.
    pub models: HashMap<Arc<str>, Arc<Route>>,
    /// How long a choice holds.
    pub keep: Keep,
    /// The header that names a conversation.
    pub session_header: Option<HeaderName>,
    /// The models that are asked one after another, where answers decide.
    pub cascade: Option<Arc<Cascade>>,
    /// The headers that somebody looks at.
    pub headers: Vec<Arc<str>>,
    /// The claims of tokens that some router of the policy looks at; none, if nobody here looks at any.
    pub claims: Vec<Arc<str>>,
    /// Whether somebody counts images, tools and the like.
    pub counts: bool,
    /// Whether somebody asks how long a prompt is.
    pub measures: bool,
    /// Models of which the best answers, by the names that stand for them.
    pub shortlists: HashMap<Arc<str>, Shortlist>,
    /// How much models think, by the decision.
    pub effort: HashMap<Box<str>, Effort>,
}

/// What was chosen, for the header.
#[derive(Clone, Debug)]
pub struct Chosen {
    /// The virtual model.
    pub by: Arc<str>,
    /// The model.
    pub model: Arc<str>,
}

/// A decision, as it goes on record.
#[derive(Debug)]
pub struct Decided {
    /// The model.
    pub model: Arc<str>,
    /// The name of the route or the rule.
    pub rule: Text,
    /// How it came to that.
    pub why: Text,
    /// The decision that chose the model in the first place: `rule`, unless the conversation keeps it.
    pub by: Text,
    /// What was weighed, where a shortlist decided.
    pub weighed: Option<Box<Weighed>>,
    /// Who was asked and had no answer, and why.
    pub passes: Passes,
    /// Why nobody can answer, if so.
    pub unfit: Option<Box<(Unfit, String)>>,
    /// Whether the model is to go on from what a tool gave back.
    pub in_loop: bool,
    /// The conversation that it was made for, if that is remembered.
    pub key: Option<u64>,
    /// Whether it was made before, and is kept.
    pub kept: bool,
    /// The two routes that it is between, where another service is to say which.
    pub doubt: Option<Box<Unsure>>,
    /// The models that a cascade has behind it and that can answer this.
    pub able: Vec<Arc<str>>,
}

impl Decided {
    fn of(model: &Arc<str>, rule: Text, why: Text) -> Self {
        Self {
            model: model.clone(),
            by: rule.clone(),
            rule,
            why,
            weighed: None,
            passes: Passes::new(),
            unfit: None,
            in_loop: false,
            key: None,
            kept: false,
            doubt: None,
            able: Vec::new(),
        }
    }
}

/// Routers that had no answer, by their kind, and why.
pub type Passes = SmallVec<[(&'static str, &'static str); 4]>;

/// Decides which model answers a request that leaves it open.
pub async fn choose(
    house: &House,
    exchange: &mut Exchange,
    downstream: &Downstream,
    planned: &mut Planned,
    reading: &Arc<Reading>,
) -> Result<(), Refusal> {
    let Some(routers) = planned.route.routers.clone() else { return Ok(()) };
    let began = Instant::now();
    let conversations = house.state.conversations.clone();
    let whose = Whose::of(exchange, &routers, &downstream.head().headers);
    let mut decided = if planned.received.body.len() > BESIDE {
        let (deciding, reading, scan) = (routers.clone(), reading.clone(), planned.scan.clone());
        let decide = move || deciding.decide(&reading, &scan, &conversations, &whose);
        let broke = |_| Refusal::new(Code::Internal, "a router broke");
        tokio::task::spawn_blocking(decide).await.map_err(broke)?
    } else {
        routers.decide(reading, &planned.scan, &conversations, &whose)
    };
    if let Some(unsure) = decided.doubt.take() {
        Box::pin(asks_second(house, exchange, &mut decided, *unsure)).await;
    }
    house.telemetry.decided(&routers.name, &decided, began.elapsed());
    let route = routers.models.get(&decided.model).filter(|_| decided.unfit.is_none()).cloned();
    let Some(route) = route else { return Err(nobody(&routers, planned, decided.unfit)) };
    exchange.decide("route", decided.rule.clone(), &decided.model, decided.why.clone());
    exchange.chosen = Some(Chosen { by: routers.name.clone(), model: decided.model.clone() });
    exchange.serve_instead(route.clone(), decided.model.clone());
    planned.goes_to(exchange, route);
    let unthought = routers.cascade.as_ref().map(|_| planned.parameter_edits.clone()).unwrap_or_default();
    effort::apply(exchange, planned, &routers, &decided)?;
    planned.ladder = Ladder::of(&routers, &decided, exchange, planned, unthought);
    exchange.weighed = decided.weighed;
    Ok(())
}

/// Lets another service say which of two routes it is. The first stage's answer is on record whatever comes of that.
async fn asks_second(house: &House, exchange: &mut Exchange, decided: &mut Decided, unsure: Unsure) {
    let Unsure { doubt, mut found } = unsure;
    exchange.decide("route", decided.rule.clone(), &decided.model, decided.why.clone());
    let (said, why) = second::decides(house, exchange, &doubt).await;
    let chosen = said.and_then(|route| found.iter().position(|(name, ..)| *name == route));
    match chosen.map(|at| found.swap_remove(at)) {
        Some((route, found, able)) => {
            (decided.rule, decided.by) = ((&route).into(), (&route).into());
            (decided.model, decided.weighed, decided.able) = (found.model, found.weighed, able);
            decided.unfit = None;
            if let Some(key) = decided.key {
                house.state.conversations.goes_to(key, &decided.model, Some(&decided.by), Instant::now());
            }
        }
        None => decided.rule = "second".into(),
    }
    decided.why = why.into();
}

/// No candidate can answer this.
fn nobody(routers: &Routers, planned: &Planned, unfit: Option<Box<(Unfit, String)>>) -> Refusal {
    let (name, path) = (&routers.name, planned.identified.surface.path);
    let (unfit, why) = unfit.map_or((Unfit::Operation, String::new()), |unfit| *unfit);
    let code = match unfit {
        Unfit::Operation => Code::NotFound,
        Unfit::Region => Code::ModelNotAllowed,
        _ => Code::InvalidBody,
    };
    Refusal::new(code, format!("no model of `{name}` can answer this at {path}: {why}")).param("model")
}

/// Whose conversation it is: no tenant is told by another's. And who asks, where, with which headers.
#[derive(Clone, Debug, Default)]
pub struct Whose {
    tenant: Option<Arc<Tenant>>,
    principal: Option<Arc<str>>,
    plans: Option<Arc<[Arc<str>]>>,
    surface: &'static str,
    headers: Vec<(Arc<str>, Box<str>)>,
    claims: Option<Claims>,
    /// What the client calls it.
    session: Option<Box<[u8]>>,
}

impl Whose {
    fn of(exchange: &Exchange, routers: &Routers, headers: &HeaderMap) -> Self {
        let who = exchange.who.as_ref();
        let tenant = who.map(|who| who.tenant.clone());
        let whose = Self::of_tenant(tenant, exchange.surface.path, routers, headers);
        match who.map(|who| &who.identity) {
            Some(identity) => Self {
                principal: Some(identity.principal.clone()),
                plans: Some(identity.plans.clone()),
                claims: (!routers.claims.is_empty()).then(|| identity.claims.clone()),
                ..whose
            },
            None => whose,
        }
    }

    /// The same, of somebody with this name, these plans, and a token that says this, as far as rules look at it.
    pub fn named(
        self,
        principal: Option<&str>,
        plans: &[String],
        says: &Map<String, Value>,
        routers: &Routers,
    ) -> Self {
        Self {
            principal: principal.map(Into::into),
            plans: Some(plans.iter().map(|plan| plan.as_str().into()).collect()),
            claims: Some(claim::kept(says, &routers.claims)),
            ..self
        }
    }

    /// Somebody for whom this tenant pays, who asks there with these headers, and of whom no more is known.
    pub fn of_tenant(
        tenant: Option<Arc<Tenant>>,
        surface: &'static str,
        routers: &Routers,
        headers: &HeaderMap,
    ) -> Self {
        let named = routers.session_header.as_ref().and_then(|name| headers.get(name));
        Self {
            tenant,
            surface,
            headers: routers.headers.iter().filter_map(|name| Some((name.clone(), listed(headers, name)?))).collect(),
            session: named.map(|value| value.as_bytes().into()),
            ..Self::default()
        }
    }

    /// The same for rules that name them.
    pub fn asker(&self) -> Asker<'_> {
        Asker {
            tenant: self.tenant.as_ref().map_or("", |tenant| &tenant.name),
            principal: self.principal.as_deref().unwrap_or_default(),
            plans: self.plans.as_deref().unwrap_or_default(),
            surface: self.surface,
            headers: &self.headers,
            claims: self.claims.as_deref().unwrap_or_default(),
        }
    }
}

/// The value of a header that is there once and is text: of two nobody can say which is meant.
fn listed(headers: &HeaderMap, name: &str) -> Option<Box<str>> {
    let mut values = headers.get_all(name).iter();
    let value = values.next()?.to_str().ok()?;
    values.next().is_none().then(|| value.into())
}

impl Routers {
    /// The models that may be chosen, the default first, or those of its shortlist, each once.
    pub fn candidates(&self) -> impl Iterator<Item = &Arc<str>> {
        let listed = self.shortlists.get(&self.default).map(|list| list.models.iter().map(|listed| &listed.model));
        let first: Vec<&Arc<str>> = listed.map_or_else(|| vec![&self.default], Iterator::collect);
        let mut others: Vec<&Arc<str>> = self.models.keys().filter(|name| !first.contains(name)).collect();
        others.sort_unstable();
        first.into_iter().chain(others)
    }

    /// The model for the request that says this, whose deciding fields stand where `scan` says.
    pub fn decide(&self, reading: &Reading, scan: &Scan, conversations: &Conversations, whose: &Whose) -> Decided {
        let (tenant, request) = (whose.tenant.as_deref(), Request::of(reading, scan));
        let Ok(words) = Words::of(reading, self.counts) else {
            let case = Case::of(request, &Prompt::default(), tenant, self.measures);
            let passed = Passed { why: "the prompt cannot be read".into(), ..Passed::default() };
            return self.by_default(&case, None, passed);
        };
        let prompt = words.prompt();
        let case = Case::of(request, &prompt, tenant, self.measures);
        let key = (self.keep != Keep::Never).then(|| self.key(&prompt, conversations, whose)).flatten();
        let in_loop = words.in_loop(&prompt);
        let holds = self.keep == Keep::Conversation || in_loop;
        let asks = |_: &u64| holds || !self.shortlists.is_empty();
        let kept = key.filter(asks).and_then(|key| conversations.get(key, case.now));
        let decided = kept.as_ref().filter(|_| holds).and_then(|kept| self.kept(&case, kept));
        let decided =
            decided.unwrap_or_else(|| self.asked(&case, &Prompt { asker: whose.asker(), ..prompt }, kept.as_ref()));
        let decided = Decided { key, in_loop, able: self.able(&case, &decided.model), ..decided };
        if let Some(key) = key.filter(|_| decided.unfit.is_none()) {
            conversations.put(key, self.to_keep(&case, &decided));
        }
        decided
    }

    /// The model that the conversation has, if it can do this too.
    fn kept(&self, case: &Case<'_>, kept: &Kept) -> Option<Decided> {
        let route = self.models.get(&kept.model)?;
        let decided = || Decided::of(&kept.model, "conversation".into(), "it was chosen before, and is kept".into());
        case.unfit(route).is_none().then(|| Decided { by: kept.by.clone(), kept: true, ..decided() })
    }

    /// The models that a cascade has behind this one and that can answer.
    fn able(&self, case: &Case<'_>, model: &str) -> Vec<Arc<str>> {
        let behind = self.cascade.iter().flat_map(|cascade| cascade.after(model));
        let fits = |model: &&Arc<str>| self.models.get(*model).is_some_and(|route| case.unfit(route).is_none());
        behind.filter(fits).cloned().collect()
    }

    fn to_keep(&self, case: &Case<'_>, decided: &Decided) -> Kept {
        let route = self.models.get(&decided.model).filter(|_| self.measures);
        let tokens = route.map_or(0, |route| u32::try_from(route.density.likely(case.text_bytes)).unwrap_or(u32::MAX));
        Kept { model: decided.model.clone(), by: decided.by.clone(), tokens, at: case.now }
    }

    /// The first answer.
    fn asked(&self, case: &Case<'_>, prompt: &Prompt<'_>, kept: Option<&Kept>) -> Decided {
        let (mut passed, mut doubt) = (Passed::default(), None);
        for router in &self.ask {
            let answer = router.ask(prompt);
            let unsure = || router.semantic()?.doubt(&answer, prompt).map(|doubt| self.unsure(doubt, case, kept));
            doubt = doubt.or_else(unsure);
            match answer {
                Answer::Route(choice) => match self.found(&choice.model, case, kept) {
                    Ok(found) => return Decided { doubt, ..decided(router.kind(), choice, found, passed.routers) },
                    Err(unable) => passed.note(router.kind(), "unfit", &unable.1),
                },
                Answer::Pass(why) => passed.note(router.kind(), word(why), &told(why)),
            }
        }
        Decided { doubt, ..self.by_default(case, kept, passed) }
    }

    /// What the two routes come to, as far as anybody there can answer.
    fn unsure(&self, doubt: Doubt, case: &Case<'_>, kept: Option<&Kept>) -> Box<Unsure> {
        let found = |(route, model): &(Arc<str>, Arc<str>)| {
            let found = self.found(model, case, kept).ok()?;
            let able = self.able(case, &found.model);
            Some((route.clone(), found, able))
        };
        Box::new(Unsure { found: doubt.routes.iter().filter_map(found).collect(), doubt })
    }

    fn by_default(&self, case: &Case<'_>, kept: Option<&Kept>, passed: Passed) -> Decided {
        let Passed { why, routers: passes } = passed;
        let decided =
            |model: &Arc<str>, why: String| Decided { passes, ..Decided::of(model, "default".into(), why.into()) };
        match self.found(&self.default, case, kept) {
            Ok(Found { model, weighed: None }) => decided(&model, why),
            Ok(Found { model, weighed: Some(weighed) }) => {
                let between = if why.is_empty() { "" } else { "; " };
                let why = format!("{}{between}{why}", weighed.why());
                Decided { weighed: Some(weighed), ..decided(&model, why) }
            }
            Err(unfit) => Decided { unfit: Some(Box::new(unfit)), ..decided(&self.default, why) },
        }
    }

    /// The model that a decision names, or the best of the shortlist; where it cannot answer, why.
    fn found(&self, name: &Arc<str>, case: &Case<'_>, kept: Option<&Kept>) -> Result<Found, (Unfit, String)> {
        if let Some(shortlist) = self.shortlists.get(name) {
            let weighed = shortlist.weigh(case, kept)?;
            return Ok(Found { model: weighed.model().clone(), weighed: Some(Box::new(weighed)) });
        }
        match self.models.get(name).map_or(Some(Unfit::Operation), |route| case.unfit(route)) {
            Some(unfit) => Err((unfit, format!("{name} {unfit}"))),
            None => Ok(Found { model: name.clone(), weighed: None }),
        }
    }

    /// The number of the conversation: by what the client calls it, or by how it begins.
    fn key(&self, prompt: &Prompt<'_>, kept: &Conversations, whose: &Whose) -> Option<u64> {
        let of = (&*self.name, whose.tenant.as_ref().map(|tenant| &*tenant.name));
        if let Some(session) = &whose.session {
            return Some(kept.key(of, &[session]));
        }
        let first = prompt.spans.iter().position(|span| span.role == Role::User)?;
        let turn = prompt.spans[first].turn;
        let goes_on = |span: &&infergate_plugins::prompt::Span<'_>| span.role == Role::User && span.turn == turn;
        let end = first + prompt.spans[first..].iter().take_while(goes_on).count();
        let texts: Vec<&[u8]> = prompt.spans[..end].iter().map(|span| span.text.as_bytes()).collect();
        Some(kept.key(of, &texts))
    }
}

/// Two routes that another service is to choose from, with what each comes to and a cascade's models behind that.
#[derive(Debug)]
pub struct Unsure {
    doubt: Doubt,
    found: Vec<(Arc<str>, Found, Vec<Arc<str>>)>,
}

/// The model that a name came to.
#[derive(Debug)]
struct Found {
    model: Arc<str>,
    weighed: Option<Box<Weighed>>,
}

fn decided(kind: &'static str, choice: Choice, found: Found, passes: Passes) -> Decided {
    let mut why = format!("{kind}: score {:.3}, margin {:.3}", choice.score, choice.margin);
    if let Some(weighed) = &found.weighed {
        let _ = write!(why, "; {}", weighed.why());
    }
    Decided { weighed: found.weighed, passes, ..Decided::of(&found.model, (&choice.route).into(), why.into()) }
}

/// Who had no answer.
#[derive(Default)]
struct Passed {
    why: String,
    routers: Passes,
}

impl Passed {
    fn note(&mut self, kind: &'static str, word: &'static str, why: &str) {
        let between = if self.why.is_empty() { "" } else { "; " };
        let _ = write!(self.why, "{between}{kind}: {why}");
        self.routers.push((kind, word));
    }
}

/// The same in a word, for metrics.
fn word(why: Why) -> &'static str {
    match why {
        Why::Unknown => "unknown",
        Why::OutOfScope(..) => "out_of_scope",
        Why::Unsure(..) => "unsure",
        Why::Unmatched => "unmatched",
        Why::Failed(_) => "failed",
    }
}

/// Why a router has no answer, for people.
pub fn told(why: Why) -> String {
    match why {
        Why::Unknown => "nothing is asked that it knows".to_owned(),
        Why::OutOfScope(is, least) => format!("like none of its examples, likeness {is:.3} of {least:.3}"),
        Why::Unsure(is, least) => format!("two routes are alike, margin {is:.3} of {least:.3}"),
        Why::Unmatched => "its conditions do not hold".to_owned(),
        Why::Failed(why) => format!("its condition fails: {why}"),
    }
}
