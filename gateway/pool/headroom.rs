//! Which endpoints have room for work that nobody waits for: batch fills what the others leave.
//!
//! Room is measured and not promised: requests on an endpoint, what it told of others', the time that the prompts in its
//! line take, its KV cache. It is measured when a request of such a class comes and some twenty times a second while one
//! waits; requests of other classes pay nothing for it.

use std::time::Instant;

use schemars::JsonSchema;
use serde::Deserialize;

use super::Pool;
use super::load::millis;
use super::origin::Endpoint;
use super::score::Asked;

/// When an endpoint has room for requests of a class that is `batch`. All of it must be so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Headroom {
    /// Fewer requests than this are on it, whatever their class, with those of others as far as it tells of them.
    #[schemars(range(min = 1))]
    pub in_flight: u32,
    /// The prompts that wait there are read within so many milliseconds. Measured where the pool's `balance` weighs work.
    pub wait_ms: u64,
    /// No more of its KV cache is taken, in percent. Known where the pool's `load` is asked for.
    #[schemars(range(max = 100))]
    pub kv_percent: u32,
    /// Of the pool's places (`concurrency.max`) no more are taken, in percent.
    #[schemars(range(min = 1, max = 100))]
    pub places_percent: u32,
}

/// Beside 32 answers each one takes a third longer than alone (`score.rs`).
impl Default for Headroom {
    fn default() -> Self {
        Self { in_flight: 32, wait_ms: 100, kv_percent: 70, places_percent: 80 }
    }
}

/// Tokens of a prompt of others, of which only the number is told.
const OTHERS_PROMPT: u32 = 1_000;

impl Pool {
    /// Measures, and lets in as many of those that wait as there is room for.
    pub fn lets_batch_in(&self, now: Instant) {
        let share = |max: u32| (u64::from(max) * u64::from(self.headroom.places_percent) / 100) as u32;
        let below = self.concurrency.max.map(|max| share(max).max(1));
        self.state.queue.measure(self.concurrency, below, || self.room(now));
    }

    /// Whether an endpoint has room for batch.
    pub fn has_room(&self, endpoint: &Endpoint, now: Instant) -> bool {
        self.room_at(endpoint, now) > 0
    }

    /// How many requests there is room for.
    fn room(&self, now: Instant) -> u32 {
        let mut room = 0_u32;
        for upstream in self.upstreams.iter().filter(|upstream| upstream.weight > 0) {
            for endpoint in upstream.origin.endpoints().iter().filter(|endpoint| endpoint.available(now)) {
                room = room.saturating_add(self.room_at(endpoint, now));
            }
        }
        room
    }

    fn room_at(&self, endpoint: &Endpoint, now: Instant) -> u32 {
        let (most, ours) = (self.headroom.in_flight, endpoint.in_flight());
        if !self.balance.weighs() {
            return most.saturating_sub(ours);
        }
        let one = endpoint.load.candidate(self.state.paces.usual(), OTHERS_PROMPT, millis(now));
        let waits = one.first_token_s(&Asked::default()) * 1e3 > self.headroom.wait_ms as f32;
        let full = one.told.trust * one.told.kv * 100.0 > self.headroom.kv_percent as f32;
        let others = (one.told.trust * one.told.streams) as u32;
        if waits || full { 0 } else { most.saturating_sub(ours).saturating_sub(others) }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use infergate_plugins::operation::Operation;

    use super::super::Wanted;
    use super::super::load::{Job, Work};
    use super::super::told::Report;
    use super::*;
    use crate::policy::{World, compile};
    use crate::settings::Settings;
    use crate::state::State;
    use crate::telemetry::Telemetry;

    fn pool(extra: &str) -> Arc<Pool> {
        let urls = "[{url: \"http://127.0.0.1:10001\"}, {url: \"http://127.0.0.1:10002\"}]";
        let text = format!("version: 1\npools: {{p: {{upstreams: {urls}, {extra}}}}}\n");
        let (state, telemetry, settings) = (State::new(0), Telemetry::new(), Settings::default());
        let policy = compile(&text, &World::new(&|_| None, &state, &telemetry, &settings)).unwrap();
        policy.pools["p"].clone()
    }

    fn first(pool: &Pool) -> Arc<Endpoint> {
        pool.upstreams[0].origin.endpoints()[0].clone()
    }

    const WEIGHS: &str = "balance: expected_time, load: {metrics_ms: 1000}, batch: {in_flight: 4}";

    #[test]
    fn requests_of_whatever_class_take_room() {
        let (pool, now) = (pool("batch: {in_flight: 4}"), Instant::now());
        assert_eq!(pool.room(now), 8);
        let held = [first(&pool).enter(), first(&pool).enter(), first(&pool).enter()];
        assert_eq!((pool.room(now), pool.has_room(&first(&pool), now)), (5, true));
        let last = first(&pool).enter();
        assert_eq!((pool.room(now), pool.has_room(&first(&pool), now)), (4, false));
        drop((held, last));
        assert_eq!(pool.room(now), 8);
    }

    #[test]
    fn prompts_that_wait_a_full_cache_and_others_requests_leave_none() {
        let (pool, now) = (pool(WEIGHS), Instant::now());
        let endpoint = first(&pool);
        // Eight thousand tokens a second, before anything is learned.
        let job = |unread| Some(Job { unread, output: 10, whole: false });
        let short = Work::begin(&endpoint, job(600), &pool.state.paces, now);
        assert_eq!(pool.room_at(&endpoint, now), 3);
        let long = Work::begin(&endpoint, job(600), &pool.state.paces, now);
        assert_eq!(pool.room_at(&endpoint, now), 0, "more than a tenth of a second");
        drop((short, long));
        let tells = |running, kv| Report { running: Some(running), kv: Some(kv), ..Report::default() };
        for (told, room) in [(tells(0.0, 0.5), 4), (tells(0.0, 0.8), 0), (tells(3.0, 0.1), 1), (tells(90.0, 0.1), 0)] {
            endpoint.hears(told.clone(), now);
            assert_eq!(pool.room_at(&endpoint, now), room, "{told:?}");
        }
        assert_eq!(pool.room_at(&endpoint, now + Duration::from_secs(20)), 4, "what was told long ago counts no more");
    }

    #[test]
    fn batch_goes_where_there_is_room_whatever_else_speaks_for_another() {
        for extra in [WEIGHS, "batch: {in_flight: 4}", "balance: round_robin, batch: {in_flight: 4}"] {
            let (pool, now) = (pool(extra), Instant::now());
            let _busy: Vec<_> = (0..4).map(|_| first(&pool).enter()).collect();
            let batch = Wanted { batch: true, ..Wanted::of(Operation::Chat) };
            for _ in 0..4 {
                assert_eq!(pool.pick(&batch, &[], now).map(|picked| picked.upstream.index), Some(1), "{extra}");
            }
        }
    }
}
