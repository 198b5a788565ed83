//! The talk of one replica with the store: one call of the script at a time, each with all that there is to tell and to
//! ask by then.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use redis::aio::MultiplexedConnection;
use redis::io::tcp::TcpSettings;
use redis::{AsyncConnectionConfig, IntoConnectionInfo};
use serde::Serialize;
use tokio::sync::mpsc;

use super::super::level::{Count, Level};
use super::super::window::{Span, Window};
use super::super::{Few, Hold, Limit, Reservation, Unit, Way, millis};
use super::{Answer, Ask, Counts, Entry, Parameters, STALE, Shared};
use crate::hex;
use crate::house::House;
use crate::policy::file::OnStoreError;
use crate::secret::Secret;
use crate::telemetry::StoreMeters;

/// So many questions travel together.
const ASKS_IN_CALL: usize = 128;
/// Of so many levels a call tells, beside those that are asked for.
const LEVELS_IN_CALL: usize = 256;
/// How often the store is told what has been used: without slices, and with them.
const TELL: Duration = Duration::from_millis(5);
const TELL_LEASES: Duration = Duration::from_millis(50);
/// How often the store hears from a replica that has nothing to say, and how often slices are looked through.
const BEAT: Duration = Duration::from_millis(500);
/// A replica that was silent for so long is taken for dead: what it holds does not count.
const DEAD: Duration = Duration::from_secs(5);
/// A replica that was silent for so long does not come back.
const FORGET: Duration = Duration::from_secs(3600);
/// A slice that nobody has spent of for so long goes back.
const IDLE_MS: u64 = 1000;
/// How soon the store is tried again.
const AGAIN: Duration = Duration::from_millis(200);
/// How long a new connection may take, and at least its first calls.
const CONNECT: Duration = Duration::from_millis(500);
const FIRST: Duration = Duration::from_millis(100);

/// Lua's numbers are exact up to here: nine million dollars.
const MOST: u64 = 1 << 53;

const SCRIPT: &str = include_str!("script.lua");

/// One call of the script.
#[derive(Serialize)]
struct Call<'a> {
    me: &'a str,
    number: u64,
    dead_ms: u64,
    forget_ms: u64,
    levels: Vec<Told>,
    /// For each request: the number of a level, what is wanted of it, and so on.
    requests: Vec<Vec<u64>>,
}

/// What a call tells of one level.
#[derive(Clone, Copy, Serialize)]
struct Told {
    from: u64,
    to: u64,
    used: u64,
    held: u64,
    slice: u64,
    used_before: u64,
    held_before: u64,
    max: u64,
    /// Whether the span before still counts, less and less.
    rolls: bool,
    /// A slice may have one of so many parts of what is free. 0: there is to be none.
    parts: u64,
    /// When it may be forgotten; 0: never.
    expire_ms: u64,
    /// The highest threshold, in per cent, that this replica has seen passed.
    warned: u8,
}

impl Told {
    fn of(limit: &Limit, count: &Count, parts: u64, now: u64) -> Self {
        let (own, of) = (count.own(), |number: u64| number.min(MOST));
        Self {
            from: own.span.from,
            to: of(own.span.to),
            used: of(own.used),
            held: of(own.held),
            slice: of(count.slice),
            used_before: of(own.used_before),
            held_before: of(own.held_before),
            max: of(limit.max),
            rolls: matches!(limit.window, Window::Rolling(_)),
            parts,
            expire_ms: expire_ms(limit, own.span, now),
            warned: count.warned(),
        }
    }
}

/// How long a level says anything.
fn expire_ms(limit: &Limit, span: Span, now: u64) -> u64 {
    const DAY: u64 = 86_400_000;
    match limit.window {
        Window::Rolling(length) => 2 * length + 60_000,
        Window::Calendar(..) => span.to.saturating_sub(now).saturating_add(DAY),
        Window::Total if limit.unit == Unit::Concurrency => 7 * DAY,
        Window::Total => 0,
    }
}

/// Takes numbers off a reply of the script. All of them are whole and none is negative.
struct Reply(std::vec::IntoIter<i64>);

impl Reply {
    fn next(&mut self) -> Result<u64, String> {
        let number = self.0.next().and_then(|number| u64::try_from(number).ok());
        number.ok_or_else(|| "its answer is not what the script says".to_owned())
    }

    fn span(&mut self) -> Result<Span, String> {
        let (from, to) = (self.next()?, self.next()?);
        Ok(Span { from, to: if to >= MOST { u64::MAX } else { to } })
    }
}

/// How one level stands at the store.
struct Stand {
    span: Span,
    taken: u64,
    own: u64,
    before: u64,
    own_before: u64,
    /// What this replica's slice should have.
    target: u64,
    /// The threshold, in per cent, of which somebody is told; 0: none.
    warned: u8,
    /// Whether it is this replica that tells it.
    tells: bool,
}

impl Stand {
    fn read(reply: &mut Reply) -> Result<Self, String> {
        Ok(Self {
            span: reply.span()?,
            taken: reply.next()?,
            own: reply.next()?,
            before: reply.next()?,
            own_before: reply.next()?,
            target: reply.next()?,
            warned: u8::try_from(reply.next()?).unwrap_or(0),
            tells: reply.next()? == 1,
        })
    }
}

/// Keeps up the talk with the store, as long as the process lives and whenever the policy names one. For the
/// background runtime.
pub async fn run(house: Arc<House>) {
    let shared = house.state.limits.shared.clone();
    let Some(mut asks) = shared.heard.lock().take() else { return };
    let mut changes = house.policy.changes();
    loop {
        match house.policy.get().shared.clone() {
            Some(parameters) => Talk::new(house.clone(), shared.clone(), parameters).keep_up(&mut asks).await,
            None => {
                // Whoever holds a level may want the list: never both the other way round.
                let untold = std::mem::take(&mut *shared.untold.lock());
                untold.iter().for_each(|(_, level)| level.count().untold = false);
                if changes.changed().await.is_err() {
                    return;
                }
            }
        }
        shared.up.store(false, Ordering::Relaxed);
        shared.denies.store(false, Ordering::Relaxed);
    }
}

/// The talk with one store.
struct Talk {
    house: Arc<House>,
    shared: Arc<Shared>,
    parameters: Arc<Parameters>,
    link: Option<Link>,
    meters: StoreMeters,
    /// The levels of which the store holds a slice for us.
    leased: HashMap<usize, Entry>,
    looked: Instant,
    /// Whether the store is known to be away, so that it is said once.
    told: bool,
}

/// A connection, and the script's name there.
struct Link {
    connection: MultiplexedConnection,
    script: String,
}

/// What goes with one call.
#[derive(Default)]
struct Batch {
    entries: Vec<Entry>,
    places: HashMap<usize, usize>,
    told: Vec<Told>,
    asks: Vec<Ask>,
}

impl Batch {
    fn add(&mut self, limit: &Arc<Limit>, level: &Arc<Level>) -> usize {
        *self.places.entry(address(level)).or_insert_with(|| {
            self.entries.push((limit.clone(), level.clone()));
            self.entries.len() - 1
        })
    }
}

fn address(level: &Arc<Level>) -> usize {
    Arc::as_ptr(level) as usize
}

impl Talk {
    fn new(house: Arc<House>, shared: Arc<Shared>, parameters: Arc<Parameters>) -> Self {
        let meters = house.telemetry.store();
        meters.up.set(0);
        Self {
            house,
            shared,
            parameters,
            link: None,
            meters,
            leased: HashMap::new(),
            looked: Instant::now(),
            told: false,
        }
    }

    /// Takes what the policy says now. Returns whether it is still about this store.
    fn follows(&mut self) -> bool {
        let policy = self.house.policy.get();
        let Some(now) = policy.shared.as_ref().filter(|now| now.is_same_store(&self.parameters)) else { return false };
        self.parameters = now.clone();
        self.shared.leases.store(now.leases, Ordering::Relaxed);
        self.shared.denies.store(now.on_error == OnStoreError::Deny, Ordering::Relaxed);
        true
    }

    /// Until the policy names another store, or none.
    async fn keep_up(mut self, asks: &mut mpsc::Receiver<Ask>) {
        while self.follows() {
            let tell = if self.parameters.leases { TELL_LEASES } else { TELL };
            if self.link.is_none() && !self.begins().await {
                while asks.try_recv().is_ok() {}
                tokio::time::sleep(AGAIN).await;
                continue;
            }
            if self.link.is_some() && self.silent() >= STALE {
                // The process was frozen: others have taken it for dead.
                self.everything_is_untold();
            }
            let mut batch = Batch::default();
            if let Ok(Some(ask)) = tokio::time::timeout(tell, asks.recv()).await {
                batch.asks.push(ask);
            }
            while batch.asks.len() < ASKS_IN_CALL
                && let Ok(ask) = asks.try_recv()
            {
                batch.asks.push(ask);
            }
            self.look_through_slices();
            if batch.asks.is_empty() && self.shared.untold.lock().is_empty() && !self.beats() {
                continue;
            }
            if let Err(error) = self.call(batch, self.parameters.timeout).await {
                self.is_away(&error);
            }
        }
        self.meters.up.set(0);
    }

    /// Whether it is time to show that we live.
    fn beats(&self) -> bool {
        self.silent() >= BEAT
    }

    /// For how long the store has not answered.
    fn silent(&self) -> Duration {
        Duration::from_millis(self.shared.silent())
    }

    /// Connects, and tells the store all that it should know of us. Returns whether it answers.
    async fn begins(&mut self) -> bool {
        let began = self.greets().await;
        match &began {
            Ok(()) => {
                self.shared.up.store(true, Ordering::Relaxed);
                self.meters.up.set(1);
                tracing::info!(namespace = self.parameters.namespace, "the store of shared limits answers");
                self.told = false;
            }
            Err(error) => self.is_away(error),
        }
        began.is_ok()
    }

    async fn greets(&mut self) -> Result<(), String> {
        let link = tokio::time::timeout(CONNECT, Link::new(&self.parameters.url));
        self.link = Some(link.await.map_err(|_| "it takes no connection in time".to_owned())??);
        let patience = self.parameters.timeout.max(FIRST);
        self.everything_is_untold();
        // The last call has nothing to tell any more, and has to be answered as soon as any.
        loop {
            let last = self.shared.untold.lock().is_empty();
            self.call(Batch::default(), if last { self.parameters.timeout } else { patience }).await?;
            if last {
                return Ok(());
            }
        }
    }

    /// The store may have forgotten what it was told, and what has been used since it went away it was not told. What
    /// it held for us in advance, it may have given to others.
    fn everything_is_untold(&self) {
        let policy = self.house.policy.get();
        let limits: HashMap<&str, &Arc<Limit>> = policy.all_limits().map(|limit| (&*limit.levels, limit)).collect();
        for level in self.house.state.limits.all() {
            let Some(limit) = limits.get(&*level.levels) else { continue };
            let mut count = level.count();
            count.slice = 0;
            if count.says_something() {
                self.shared.has_to_tell(limit, &level, &mut count);
            }
        }
    }

    fn is_away(&mut self, error: &str) {
        self.link = None;
        self.shared.up.store(false, Ordering::Relaxed);
        self.meters.up.set(0);
        self.meters.errors.inc();
        if !std::mem::replace(&mut self.told, true) {
            let on_store_error = self.parameters.on_error;
            tracing::error!(error, ?on_store_error, "the store of shared limits does not answer");
        }
    }

    /// Slices that nobody spends of go back; what is out is measured.
    fn look_through_slices(&mut self) {
        if self.looked.elapsed() < BEAT {
            return;
        }
        self.looked = Instant::now();
        let now = self.shared.now();
        let mut held: HashMap<&str, u64> = HashMap::new();
        self.leased.retain(|_, (limit, level)| {
            let mut count = level.count();
            count.roll(&limit.terms(now));
            if count.slice > 0 && now.saturating_sub(count.touched) > IDLE_MS {
                self.shared.has_to_tell(limit, level, &mut count);
            }
            count.slice > 0
        });
        for (limit, level) in self.leased.values() {
            *held.entry(&limit.name).or_default() += level.count().slice;
        }
        self.house.telemetry.lease_held(held.into_iter());
    }

    /// One call: tells, asks, and hands out the answers.
    async fn call(&mut self, mut batch: Batch, timeout: Duration) -> Result<(), String> {
        let Some(link) = &mut self.link else { return Err("there is no connection".to_owned()) };
        let now = self.shared.now();
        let requests = collect(&self.shared, &self.parameters, &mut batch, now);
        let number = self.shared.number.fetch_add(1, Ordering::Relaxed) + 1;
        let (dead_ms, forget_ms) = (DEAD.as_millis() as u64, FORGET.as_millis() as u64);
        let call = Call { me: &self.shared.me, number, dead_ms, forget_ms, levels: batch.told.clone(), requests };
        let (sent, began) = (millis(SystemTime::now()), Instant::now());
        let answered = match tokio::time::timeout(timeout, link.send(&self.parameters.namespace, &batch, &call)).await {
            Ok(answered) => answered.and_then(|reply| read(reply, &batch)),
            Err(_) => Err(format!("no answer within {} ms", timeout.as_millis())),
        };
        self.meters.duration.observe(began.elapsed().as_secs_f64());
        let reply = answered.inspect_err(|_| self.has_not_told(&batch))?;
        self.shared.contact.store(self.shared.elapsed(), Ordering::Relaxed);
        self.shared.set_clock(sent, began.elapsed(), reply.now);
        for (index, stand) in reply.stands.iter().enumerate() {
            self.stands(&batch.entries[index], &batch.told[index], stand);
        }
        if !reply.knew_us && number > 1 {
            self.everything_is_untold();
        }
        hand_out(&self.shared, batch, reply);
        Ok(())
    }

    /// The store may have heard or not: it has to be told again.
    fn has_not_told(&self, batch: &Batch) {
        for (limit, level) in &batch.entries {
            self.shared.has_to_tell(limit, level, &mut level.count());
        }
    }

    /// What the store says of a level.
    fn stands(&mut self, (limit, level): &Entry, told: &Told, stand: &Stand) {
        let mut count = level.count();
        let (here, before) = (stand.taken.saturating_sub(stand.own), stand.before.saturating_sub(stand.own_before));
        count.set_elsewhere(stand.span, here, before);
        if stand.span == count.own().span && count.announces(stand.warned) && stand.tells {
            limit.warned(&level.whose, stand.warned);
        }
        if count.resize(stand.span, told.slice, stand.target) {
            self.shared.has_to_tell(limit, level, &mut count);
        }
        if count.slice > 0 {
            self.leased.entry(address(level)).or_insert_with(|| (limit.clone(), level.clone()));
        }
    }
}

/// What a call tells and asks: the levels that requests want, and others that the store has not been told of.
fn collect(shared: &Shared, parameters: &Parameters, batch: &mut Batch, now: u64) -> Vec<Vec<u64>> {
    batch.asks.retain(|ask| !ask.answer.is_closed());
    let asks = std::mem::take(&mut batch.asks);
    let wants =
        |batch: &mut Batch, hold: &Hold| [batch.add(&hold.limit, &hold.level) as u64 + 1, hold.reserved.min(MOST)];
    let requests = asks.iter().map(|ask| ask.holds.iter().flat_map(|hold| wants(batch, hold)).collect()).collect();
    batch.asks = asks;
    let mut untold = shared.untold.lock();
    let most = untold.len().min(LEVELS_IN_CALL);
    let told: Vec<Entry> = untold.drain(..most).collect();
    drop(untold);
    for (limit, level) in &told {
        level.count().untold = false;
        batch.add(limit, level);
    }
    let parts = |touched: u64| {
        let spends = parameters.leases && now.saturating_sub(touched) <= IDLE_MS;
        if spends { 2 * parameters.replicas.max(1) } else { 0 }
    };
    for (limit, level) in &batch.entries {
        let mut count = level.count();
        count.roll(&limit.terms(now));
        batch.told.push(Told::of(limit, &count, parts(count.touched), now));
    }
    requests
}

/// A reply that has been read whole.
struct Heard {
    knew_us: bool,
    now: u64,
    stands: Vec<Stand>,
    /// For each request: whether it has what it asked for, and how its levels stood.
    answers: Vec<(bool, Taken)>,
}

/// What is taken of each of a request's levels, in this span and in the one before.
type Taken = Few<(u64, u64)>;

fn read(numbers: Vec<i64>, batch: &Batch) -> Result<Heard, String> {
    let mut reply = Reply(numbers.into_iter());
    let (knew_us, now) = (reply.next()? == 1, reply.next()?);
    let stands = batch.entries.iter().map(|_| Stand::read(&mut reply)).collect::<Result<_, _>>()?;
    let mut answer = |ask: &Ask| {
        let fits = reply.next()? == 1;
        let levels = ask.holds.iter().map(|_| Ok((reply.next()?, reply.next()?)));
        Ok((fits, levels.collect::<Result<_, String>>()?))
    };
    let answers = batch.asks.iter().map(&mut answer).collect::<Result<_, String>>()?;
    Ok(Heard { knew_us, now, stands, answers })
}

/// Gives each request its answer. What it has, it has from now on here too; if it has not waited, that goes back.
fn hand_out(shared: &Arc<Shared>, mut batch: Batch, heard: Heard) {
    let spans: HashMap<usize, Span> =
        batch.places.iter().map(|(level, index)| (*level, heard.stands[*index].span)).collect();
    let span = |hold: &Hold| spans.get(&address(&hold.level)).copied().unwrap_or_default();
    for (Ask { mut holds, answer }, (fits, levels)) in batch.asks.drain(..).zip(heard.answers) {
        let counts: Counts =
            holds.iter().zip(levels).map(|(hold, (taken, before))| Count::told(span(hold), taken, before)).collect();
        if !fits {
            let _gone = answer.send(Answer::Short(Box::new(holds), counts));
            continue;
        }
        for hold in &mut holds {
            let mut count = hold.level.count();
            count.enter(span(hold));
            hold.from = count.take(hold.reserved);
            count.touched = heard.now;
            if hold.from != span(hold).from {
                shared.has_to_tell(&hold.limit, &hold.level, &mut count);
            }
        }
        let mut reservation = Reservation::new(holds, Few::new(), Way::Asked);
        reservation.shared = Some(shared.clone());
        let _dropped_it_settles = answer.send(Answer::Taken(Box::new(reservation), counts));
    }
}

impl Shared {
    fn set_clock(&self, sent: u64, took: Duration, store: u64) {
        let half = took.as_millis() as i64 / 2;
        let ahead = store as i64 - sent as i64 - half;
        // What the way there and back explains is no difference. A slow answer says little of the time.
        if took < Duration::from_millis(100) {
            self.ahead.store(if ahead.abs() <= half + 2 { 0 } else { ahead }, Ordering::Relaxed);
        }
    }
}

impl Link {
    async fn new(url: &Secret) -> Result<Self, String> {
        let no_address = |_| "its address is none".to_owned();
        let address = url.reveal().into_connection_info().map_err(no_address)?;
        let address = address.set_tcp_settings(TcpSettings::default().set_nodelay(true));
        let client = redis::Client::open(address).map_err(no_address)?;
        let config = AsyncConnectionConfig::new().set_connection_timeout(Some(CONNECT)).set_response_timeout(None);
        let connection = client.get_multiplexed_async_connection_with_config(&config);
        let mut connection = connection.await.map_err(|error| error.to_string())?;
        let load = redis::cmd("SCRIPT").arg("LOAD").arg(SCRIPT).to_owned();
        let script = load.query_async::<String>(&mut connection).await.map_err(|error| error.to_string())?;
        Ok(Self { connection, script })
    }

    async fn send(&mut self, namespace: &str, batch: &Batch, call: &Call<'_>) -> Result<Vec<i64>, String> {
        let text = serde_json::to_string(call).map_err(|error| error.to_string())?;
        let mut command = redis::cmd("EVALSHA");
        command.arg(&self.script).arg(1 + batch.entries.len());
        // One hash tag: all keys are in one slot of a cluster.
        command.arg(format!("{{{namespace}}}:alive"));
        for (_, level) in &batch.entries {
            command.arg(format!("{{{namespace}}}:{}", hex::text(&level.id)));
        }
        command.arg(text);
        command.query_async(&mut self.connection).await.map_err(|error| error.to_string())
    }
}
