//! Models whose name leaves it open which one answers: what a request asks decides.
//!
//! The routers of the policy are asked in order once the body has been parsed, and before limits count it, so that they
//! count the model that is chosen; the first answer wins, and where there is none the default answers. Not every
//! candidate serves every endpoint: one that cannot do what is asked is passed over.

pub mod conversations;
pub mod second;
pub mod words;

use std::collections::HashMap;
use std::fmt::Write;
use std::sync::Arc;
use std::time::Instant;

use http::{HeaderMap, HeaderName};
use infergate_plugins::operation::Operation;
use infergate_plugins::prompt::{Asker, Prompt, Role};
use infergate_plugins::router::cascade::Cascade;
use infergate_plugins::router::second::Doubt;
use infergate_plugins::router::{Answer, Choice, Router, Why};

use self::conversations::Conversations;
use self::words::Words;
use crate::audit::record::Text;
use crate::cascade::Ladder;
use crate::exchange::Exchange;
use crate::guard::BESIDE;
use crate::house::House;
use crate::pipeline::Planned;
use crate::policy::Route;
use crate::policy::file::Keep;
use crate::refusal::{Code, Refusal};
use crate::relay::Downstream;
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
    /// Whether somebody counts images, tools and the like.
    pub counts: bool,
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
    /// The conversation that it was made for, if that is remembered.
    pub key: Option<u64>,
    /// Whether it was made before, and is kept.
    pub kept: bool,
    /// The two routes that it is between, where another service is to say which.
    pub doubt: Option<Box<Doubt>>,
}

/// Decides which model answers a request that leaves it open.
pub async fn choose(
    house: &House,
    exchange: &mut Exchange,
    downstream: &Downstream,
    planned: &mut Planned,
    reading: &Arc<Reading>,
) -> Result<(), Refusal> {
    let Some(routers) = planned.route.routers.clone() else { return Ok(()) };
    let (operation, reading) = (planned.identified.surface.operation, reading.clone());
    let conversations = house.state.conversations.clone();
    let whose = Whose::of(exchange, &routers, &downstream.head().headers);
    let deciding = routers.clone();
    let decide = move || deciding.decide(&reading, &conversations, &whose);
    let mut decided = if planned.received.body.len() > BESIDE {
        let broke = |_| Refusal::new(Code::Internal, "a router broke");
        tokio::task::spawn_blocking(decide).await.map_err(broke)?
    } else {
        decide()
    };
    if let Some(doubt) = decided.doubt.take() {
        Box::pin(routers.asks_second(house, exchange, &mut decided, (operation, &doubt))).await;
    }
    let route = routers.models.get(&decided.model).filter(|route| serves(route, operation)).cloned();
    let Some(route) = route else {
        let (name, path) = (&decided.model, planned.identified.surface.path);
        return Err(Refusal::new(Code::NotFound, format!("no upstream of the model `{name}` can do {path}")));
    };
    exchange.decide("route", decided.rule.clone(), &decided.model, decided.why.clone());
    exchange.chosen = Some(Chosen { by: routers.name.clone(), model: decided.model.clone() });
    exchange.serve_instead(route.clone(), decided.model.clone());
    planned.goes_to(exchange, route);
    planned.ladder = Ladder::of(&routers, &decided, exchange, planned);
    Ok(())
}

/// Whether somebody who serves a model can do this.
pub fn serves(route: &Route, operation: Operation) -> bool {
    route.stages.iter().any(|stage| stage.pool.serves(operation))
}

/// Whose conversation it is: no tenant is told by another's. And who asks, where, with which headers.
#[derive(Clone, Debug, Default)]
pub struct Whose {
    tenant: Option<Arc<str>>,
    principal: Option<Arc<str>>,
    plans: Option<Arc<[Arc<str>]>>,
    surface: &'static str,
    headers: Vec<(Arc<str>, Box<str>)>,
    /// What the client calls it.
    session: Option<Box<[u8]>>,
}

impl Whose {
    fn of(exchange: &Exchange, routers: &Routers, headers: &HeaderMap) -> Self {
        let named = routers.session_header.as_ref().and_then(|name| headers.get(name));
        let who = exchange.who.as_ref();
        Self {
            tenant: who.map(|who| who.tenant.name.clone()),
            principal: who.map(|who| who.identity.principal.clone()),
            plans: who.map(|who| who.identity.plans.clone()),
            surface: exchange.surface.path,
            headers: routers.headers.iter().filter_map(|name| Some((name.clone(), listed(headers, name)?))).collect(),
            session: named.map(|value| value.as_bytes().into()),
        }
    }

    fn asker(&self) -> Asker<'_> {
        Asker {
            tenant: self.tenant.as_deref().unwrap_or_default(),
            principal: self.principal.as_deref().unwrap_or_default(),
            plans: self.plans.as_deref().unwrap_or_default(),
            surface: self.surface,
            headers: &self.headers,
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
    /// The models that may be chosen, the default first, each once.
    pub fn candidates(&self) -> impl Iterator<Item = &Arc<str>> {
        let mut others: Vec<&Arc<str>> = self.models.keys().filter(|name| **name != self.default).collect();
        others.sort_unstable();
        std::iter::once(&self.default).chain(others)
    }

    /// The model for the request that says this.
    pub fn decide(&self, reading: &Reading, kept: &Conversations, whose: &Whose) -> Decided {
        let Ok(words) = Words::of(reading, self.counts) else {
            return self.by_default("the prompt cannot be read".into());
        };
        let (operation, prompt) = (reading.operation, words.prompt());
        let key = (self.keep != Keep::Never).then(|| self.key(&prompt, kept, whose)).flatten();
        let holds = self.keep == Keep::Conversation || words.in_loop(&prompt);
        let now = Instant::now();
        if let Some(model) = key.filter(|_| holds).and_then(|key| kept.get(key, now))
            && self.can(&model, operation)
        {
            let why = "it was chosen before, and is kept".into();
            return Decided { model, rule: "conversation".into(), why, key, kept: true, doubt: None };
        }
        let decided = Decided { key, ..self.asked(operation, &Prompt { asker: whose.asker(), ..prompt }) };
        if let Some(key) = key {
            kept.put(key, decided.model.clone(), now);
        }
        decided
    }

    /// The first answer.
    fn asked(&self, operation: Operation, prompt: &Prompt<'_>) -> Decided {
        let (mut passed, mut doubt) = (String::new(), None);
        for router in &self.ask {
            let answer = router.ask(prompt);
            let unsure = || router.semantic().and_then(|semantic| semantic.doubt(&answer, prompt)).map(Box::new);
            doubt = doubt.or_else(unsure);
            match answer {
                Answer::Route(choice) if self.can(&choice.model, operation) => {
                    return Decided { doubt, ..decided(router.kind(), choice) };
                }
                Answer::Route(choice) => note(&mut passed, router.kind(), &format!("{} cannot do this", choice.model)),
                Answer::Pass(why) => note(&mut passed, router.kind(), &told(why)),
            }
        }
        Decided { doubt, ..self.by_default(passed.into()) }
    }

    /// Lets another service say which of two routes it is. The first stage's answer is on record whatever comes of that.
    async fn asks_second(
        &self,
        house: &House,
        exchange: &mut Exchange,
        decided: &mut Decided,
        (operation, doubt): (Operation, &Doubt),
    ) {
        exchange.decide("route", decided.rule.clone(), &decided.model, decided.why.clone());
        let (said, why) = second::decides(house, doubt).await;
        match said.filter(|(_, model)| self.can(model, operation)) {
            Some((route, model)) => (decided.rule, decided.model) = ((&route).into(), model),
            None => decided.rule = "second".into(),
        }
        decided.why = why.into();
        if let Some(key) = decided.key {
            house.state.conversations.put(key, decided.model.clone(), Instant::now());
        }
    }

    fn by_default(&self, why: Text) -> Decided {
        Decided { model: self.default.clone(), rule: "default".into(), why, key: None, kept: false, doubt: None }
    }

    fn can(&self, model: &str, operation: Operation) -> bool {
        self.models.get(model).is_some_and(|route| serves(route, operation))
    }

    /// The number of the conversation: by what the client calls it, or by how it begins.
    fn key(&self, prompt: &Prompt<'_>, kept: &Conversations, whose: &Whose) -> Option<u64> {
        let of = (&*self.name, whose.tenant.as_deref());
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

fn decided(kind: &'static str, choice: Choice) -> Decided {
    let why = format!("{kind}: score {:.3}, margin {:.3}", choice.score, choice.margin);
    Decided { model: choice.model, rule: (&choice.route).into(), why: why.into(), key: None, kept: false, doubt: None }
}

fn note(passed: &mut String, kind: &str, why: &str) {
    let between = if passed.is_empty() { "" } else { "; " };
    let _ = write!(passed, "{between}{kind}: {why}");
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
