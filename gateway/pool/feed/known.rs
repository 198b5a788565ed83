//! Which blocks an engine holds, and which blocks of prompts those are.
//!
//! An engine names a block by a hash of tokens, the index names a prompt's by hashes of bytes. Where an engine tells for
//! which session it stored a block, and the session is a request of ours, both name parts of one prompt, and the names of the one are found among those of the other: by their share of the prompt, as if all its tokens had
//! the same length. That is a block or two off where they have not, until a second prompt begins alike: where the two
//! part in tokens, the last block that they share in bytes has to end.
//!
//! What an engine held before anybody listened is not told again. A block that is behind such a one is known from there on:
//! how deep that is follows from how long prompt and answer were together, once all of the answer has been told.
//!
//! Bounded: [`BLOCKS_MAX`] blocks of an engine, about 100 bytes each. What is beyond is not known, and guessed at.

use std::collections::{HashMap, VecDeque};

use smallvec::SmallVec;

use super::events::{Names, Stored};
use crate::pool::prefix::Chain;

/// Blocks of an engine that are known at most: four million tokens in blocks of 16, as many as this in blocks of one.
const BLOCKS_MAX: usize = 1 << 18;
/// Sessions of which it is known which block they stored last.
const SESSIONS_MAX: usize = 1024;
/// Blocks of prompts in one of an engine.
const PLACES_MAX: usize = 8;

/// What a session is called: a request's id.
pub(super) type Session = [u8; 36];

/// A prompt that an engine has read.
#[derive(Debug)]
pub(super) struct Read {
    pub(super) session: Session,
    pub(super) chain: Chain,
    /// How long it was.
    pub(super) tokens: u32,
    /// How long the answer was.
    pub(super) answer: u32,
}

/// What is known of an engine's cache.
#[derive(Debug, Default)]
pub(super) struct Known {
    blocks: HashMap<u64, Block>,
    /// In which of the engine's blocks those of prompts end.
    places: HashMap<u64, u64>,
    sessions: Sessions,
}

#[derive(Debug)]
struct Block {
    before: Before,
    /// Tokens up to its end, from the prompt's beginning or from the end of the block that was there before anybody listened.
    end: u32,
    /// An engine that reads two prompts at once may hold what they share twice, until it has evicted it twice.
    copies: u32,
    /// Blocks of prompts that end here, and how deep they are.
    ours: SmallVec<[(u64, u16); 1]>,
}

/// What is before a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Before {
    /// Nothing: with it a prompt begins.
    Nothing,
    /// Another block.
    Block(u64),
    /// Nobody knows: the engine held it before anybody listened.
    Unknown,
}

/// A block on the way through a prompt.
#[derive(Clone, Copy, Debug)]
struct Step {
    name: u64,
    end: u32,
}

impl Known {
    /// How many of the engine's blocks are known, and how many of prompts in them.
    pub(super) fn sizes(&self) -> (usize, usize) {
        (self.blocks.len(), self.places.len())
    }

    /// The engine stored blocks.
    pub(super) fn stored(&mut self, stored: &Stored<'_>) {
        let Some((mut before, mut end)) = self.end_of(stored.parent) else { return };
        for name in stored.names.each() {
            end = stored.tokens.saturating_add(end);
            if let Some(block) = self.blocks.get_mut(&name) {
                block.copies = block.copies.saturating_add(1);
            } else if !self.holds(name, before, end) {
                return;
            }
            before = Before::Block(name);
        }
        if let (Some(session), Before::Block(last)) = (stored.session.and_then(|id| id.try_into().ok()), before) {
            self.sessions.put(session, last);
        }
    }

    /// Behind what blocks are stored that are behind `parent`, and how far that goes.
    fn end_of(&mut self, parent: Option<u64>) -> Option<(Before, u32)> {
        let Some(name) = parent else { return Some((Before::Nothing, 0)) };
        let known = self.blocks.get(&name).map(|block| block.end);
        let end = known.or_else(|| self.holds(name, Before::Unknown, 0).then_some(0))?;
        Some((Before::Block(name), end))
    }

    /// The engine holds a block that it did not hold. Returns whether there is room to know it.
    fn holds(&mut self, name: u64, before: Before, end: u32) -> bool {
        let has_room = self.blocks.len() < BLOCKS_MAX;
        if has_room {
            self.blocks.insert(name, Block { before, end, copies: 1, ours: SmallVec::new() });
        }
        has_room
    }

    /// The engine evicted blocks. Tells which blocks of prompts went with them.
    pub(super) fn removed(&mut self, names: &Names<'_>, mut gone: impl FnMut(u64)) {
        for name in names.each() {
            let Some(block) = self.blocks.get_mut(&name) else { continue };
            block.copies -= 1;
            if block.copies > 0 {
                continue;
            }
            let Some(block) = self.blocks.remove(&name) else { continue };
            for (ours, _) in block.ours {
                self.places.remove(&ours);
                gone(ours);
            }
        }
    }

    /// Finds a prompt's blocks among the engine's, and tells which they are and how deep. Returns whether it could: the
    /// engine has told of all of the prompt, and, where it did not begin at its beginning, `is_all` that it will tell.
    pub(super) fn place(&mut self, read: &Read, is_all: bool, mut held: impl FnMut(u64, u16)) -> bool {
        let Some((path, skipped)) = self.sessions.last(&read.session).and_then(|last| self.path(last)) else {
            return false;
        };
        let begins = if skipped { begins(&path, read).filter(|_| is_all) } else { Some(0) };
        let Some(begins) = begins else { return false };
        let size = size(&path);
        let last = path.last().map_or(0, |last| begins.saturating_add(last.end));
        if last.saturating_add(size) <= read.tokens {
            return false;
        }
        for (depth, ours) in (0_u16..).zip(read.chain.hashes()) {
            let end = (read.chain.share(depth + 1) * f64::from(read.tokens)) as u32;
            if end.saturating_add(size) <= begins {
                continue;
            }
            let at = path.partition_point(|step| begins.saturating_add(step.end) < end).min(path.len() - 1);
            self.put((*ours, depth), path[at].name, &path);
            held(*ours, depth);
        }
        true
    }

    /// Puts a block of a prompt into one of the engine's; if it is in another that is not on the prompt's path, into the
    /// last that both paths share.
    fn put(&mut self, ours: (u64, u16), into: u64, path: &[Step]) {
        let before = self.places.get(&ours.0).copied();
        let into = before.and_then(|name| self.shared(name, path)).unwrap_or(into);
        if before == Some(into) {
            return;
        }
        if let Some(block) = before.and_then(|name| self.blocks.get_mut(&name)) {
            block.ours.retain(|other| other.0 != ours.0);
        }
        self.places.remove(&ours.0);
        if let Some(block) = self.blocks.get_mut(&into).filter(|block| block.ours.len() < PLACES_MAX) {
            block.ours.push(ours);
            self.places.insert(ours.0, into);
        }
    }

    /// The block, or the first before it, that is on the path.
    fn shared(&self, name: u64, path: &[Step]) -> Option<u64> {
        self.back(name)
            .find(|step| {
                let at = path.partition_point(|other| other.end < step.end);
                path.get(at).is_some_and(|other| other.name == step.name)
            })
            .map(|step| step.name)
    }

    /// From where a prompt begins to the block `last`, if all of it is known; and whether instead it begins with a block
    /// before which there are others.
    fn path(&self, last: u64) -> Option<(Vec<Step>, bool)> {
        let mut path: Vec<Step> = self.back(last).collect();
        path.reverse();
        match self.blocks.get(&path.first()?.name)?.before {
            Before::Nothing => Some((path, false)),
            Before::Unknown => Some((path, true)),
            Before::Block(_) => None,
        }
    }

    /// A block and those before it, as far as they are known. Each ends before the one behind it: whatever an engine
    /// tells, there is an end to this.
    fn back(&self, name: u64) -> impl Iterator<Item = Step> {
        let step = |name: u64| self.blocks.get(&name).map(|block| Step { name, end: block.end });
        std::iter::successors(step(name), move |behind| match self.blocks.get(&behind.name)?.before {
            Before::Block(before) => step(before).filter(|before| before.end < behind.end),
            Before::Nothing | Before::Unknown => None,
        })
    }

    /// All blocks of prompts that the engine holds, and how deep they are.
    pub(super) fn ours(&self) -> impl Iterator<Item = (u64, u16)> {
        self.blocks.values().flat_map(|block| block.ours.iter().copied())
    }
}

/// Tokens of a block on a path.
fn size(path: &[Step]) -> u32 {
    match path {
        [first, second, ..] => second.end - first.end,
        [only] => only.end,
        [] => 0,
    }
}

/// How deep a path begins whose last block is the last that prompt and answer filled: of an answer's last token an engine
/// keeps nothing.
fn begins(path: &[Step], read: &Read) -> Option<u32> {
    let (size, last) = (size(path), path.last()?.end);
    let both = read.tokens.saturating_add(read.answer.saturating_sub(1));
    let filled = both - both.checked_rem(size)?;
    filled.checked_sub(last).filter(|begins| (1..=read.tokens).contains(begins))
}

/// Which block each session stored last; the oldest sessions are forgotten first.
#[derive(Debug, Default)]
struct Sessions {
    last: HashMap<Session, u64>,
    order: VecDeque<Session>,
}

impl Sessions {
    fn put(&mut self, session: Session, block: u64) {
        if self.last.insert(session, block).is_some() {
            return;
        }
        self.order.push_back(session);
        if self.order.len() > SESSIONS_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.last.remove(&oldest);
        }
    }

    fn last(&self, session: &Session) -> Option<u64> {
        self.last.get(session).copied()
    }
}
