//! What a request would take at a pool, without asking it: for those who choose between models.
//!
//! Nothing is counted, taken or allocated: the figures are those by which the pool itself would choose.

use std::time::Instant;

use super::choose::Prompt;
use super::load::{Load, millis};
use super::score::{Asked, Candidate, crowding};
use super::{Pool, Wanted};

/// What is expected of a pool's best endpoint.
#[derive(Clone, Copy, Debug)]
pub struct Outlook<'a> {
    pool: &'a Pool,
    asked: Asked,
    candidate: Candidate,
    /// Requests on each of its endpoints, on average.
    each: f32,
}

impl Pool {
    /// What would become of `wanted` here. `None` where nobody can be asked now.
    pub fn outlook(&self, wanted: &Wanted<'_>, now: Instant) -> Option<Outlook<'_>> {
        let prompt = Prompt::of(self, wanted, now);
        let mut best: Option<(f32, Candidate)> = None;
        let (mut endpoints, mut in_flight) = (0, 0);
        for upstream in self.able(wanted.operation) {
            for endpoint in upstream.origin.endpoints().iter().filter(|endpoint| endpoint.available(now)) {
                let candidate = self.candidate(self.balance, &prompt, upstream, endpoint);
                (endpoints, in_flight) = (endpoints + 1, in_flight + candidate.in_flight);
                let seconds = candidate.first_token_s(&wanted.asked);
                if best.is_none_or(|(least, _)| seconds < least) {
                    best = Some((seconds, candidate));
                }
            }
        }
        let (_, candidate) = best?;
        Some(Outlook { pool: self, asked: wanted.asked, candidate, each: in_flight as f32 / endpoints as f32 })
    }

    /// The same of a server that has nothing to do and is as fast as they usually are here.
    pub fn idle_outlook(&self, wanted: &Wanted<'_>, now: Instant) -> Outlook<'_> {
        let candidate = Load::default().candidate(self.state.paces.usual(), wanted.asked.prompt, millis(now));
        Outlook { pool: self, asked: wanted.asked, candidate, each: 0.0 }
    }
}

impl Outlook<'_> {
    /// Tokens of the prompt that are held there, as far as the pool keeps an index of that.
    pub fn held(&self) -> Option<u32> {
        self.pool.prefixes.is_some().then_some(self.candidate.matched)
    }

    /// Seconds to the first token, where it holds so many tokens of the prompt; `None` where nobody measures that.
    pub fn first_token_s(&self, held: u32) -> Option<f32> {
        let candidate = Candidate { matched: held, ..self.candidate };
        self.pool.balance.weighs().then(|| candidate.first_token_s(&self.asked))
    }

    /// Seconds that a server works for it: its part of all that runs there beside it.
    pub fn works_s(&self, held: u32) -> f32 {
        let candidate = Candidate { matched: held, ..self.candidate };
        let alone = candidate.unread(&self.asked) as f32 * candidate.read_s;
        let beside = candidate.in_flight + 1;
        (alone + candidate.token_s * self.asked.output as f32) * crowding(beside) / beside as f32
    }

    /// The share of the pool that is taken: of its places, or else of so many requests that answers take twice as long.
    pub fn load(&self) -> f32 {
        let queue = &self.pool.state.queue;
        let taken = match self.pool.concurrency.max {
            Some(max) => (queue.in_flight() as usize + queue.waiting()) as f32 / max as f32,
            None => self.each * (crowding(1) - 1.0),
        };
        taken.clamp(0.0, 1.0)
    }
}
