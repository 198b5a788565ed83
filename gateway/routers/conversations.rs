//! Which model a conversation has, so that it does not change in the middle.
//!
//! Bounded: each of 16 shards has a young half and an old one of `HALF` conversations; when the young half is full it
//! becomes the old one, which is forgotten. Whoever is forgotten is decided again, by the same rules.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, Hasher, RandomState};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::audit::record::Text;

const SHARDS: usize = 16;
/// Conversations in half a shard: 65,536 in all at least, twice as many at most.
const HALF: usize = 4096;
/// The most that are known.
pub const MOST: usize = SHARDS * 2 * HALF;
/// How long a choice is kept after its model was last asked.
pub const KEPT: Duration = Duration::from_secs(3600);
/// How much of each end of a long text tells conversations apart, beside its length.
const END: usize = 2048;

/// The models of conversations.
#[derive(Debug)]
pub struct Conversations {
    shards: [Mutex<Shard>; SHARDS],
    /// Keyed for this process, so that nobody can make two conversations meet.
    hasher: RandomState,
}

#[derive(Debug, Default)]
struct Shard {
    young: HashMap<u64, Kept>,
    old: HashMap<u64, Kept>,
}

/// What is known of a conversation.
#[derive(Clone, Debug)]
pub struct Kept {
    /// Its model.
    pub model: Arc<str>,
    /// The decision that chose it.
    pub by: Text,
    /// Tokens of its last prompt, where somebody measures them.
    pub tokens: u32,
    /// When the model was last asked.
    pub at: Instant,
}

impl Default for Conversations {
    fn default() -> Self {
        Self { shards: std::array::from_fn(|_| Mutex::default()), hasher: RandomState::new() }
    }
}

impl Conversations {
    /// The number of a conversation, by whose it is and by these texts.
    pub fn key(&self, of: (&str, Option<&str>), texts: &[&[u8]]) -> u64 {
        let mut hasher = self.hasher.build_hasher();
        of.hash(&mut hasher);
        for text in texts {
            text.len().hash(&mut hasher);
            hasher.write(&text[..text.len().min(END)]);
            hasher.write(&text[text.len().saturating_sub(END)..]);
        }
        hasher.finish()
    }

    /// What is known of a conversation, if its model was asked within the last hour.
    pub fn get(&self, key: u64, now: Instant) -> Option<Kept> {
        let shard = self.shard(key).lock();
        let kept = shard.young.get(&key).or_else(|| shard.old.get(&key));
        kept.filter(|kept| now.saturating_duration_since(kept.at) < KEPT).cloned()
    }

    /// This is known of a conversation from now on.
    pub fn put(&self, key: u64, kept: Kept) {
        self.shard(key).lock().put(key, kept);
    }

    /// This conversation has another model from now on, by another decision if there is one.
    pub fn goes_to(&self, key: u64, model: &Arc<str>, by: Option<&Text>, now: Instant) {
        if let Some(kept) = self.get(key, now) {
            let by = by.unwrap_or(&kept.by).clone();
            self.put(key, Kept { model: model.clone(), by, at: now, ..kept });
        }
    }

    /// How many are known; those that stand in both halves count twice.
    pub fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().len()).sum()
    }

    /// Whether none is known.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn shard(&self, key: u64) -> &Mutex<Shard> {
        &self.shards[key as usize % SHARDS]
    }
}

impl Shard {
    fn len(&self) -> usize {
        self.young.len() + self.old.len()
    }

    fn put(&mut self, key: u64, kept: Kept) {
        self.young.insert(key, kept);
        if self.young.len() >= HALF {
            self.old = std::mem::take(&mut self.young);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(at: Instant) -> Kept {
        Kept { model: "m".into(), by: "default".into(), tokens: 0, at }
    }

    #[test]
    fn a_conversation_keeps_its_model_for_an_hour_after_it_was_last_asked() {
        let (kept, now) = (Conversations::default(), Instant::now());
        let key = kept.key(("auto", None), &[b"hello"]);
        let at = |share: f64| now + KEPT.mul_f64(share);
        kept.put(key, known(at(0.0)));
        assert!(kept.get(key, at(0.9)).is_some() && kept.get(key, at(1.1)).is_none());
        kept.put(key, known(at(0.9)));
        assert!(kept.get(key, at(1.8)).is_some() && kept.get(key, at(2.0)).is_none());
    }

    #[test]
    fn conversations_meet_only_where_name_tenant_and_beginning_are_the_same() {
        let kept = Conversations::default();
        let keys = [
            kept.key(("auto", None), &[b"ab"]),
            kept.key(("auto", Some("t")), &[b"ab"]),
            kept.key(("other", None), &[b"ab"]),
            kept.key(("auto", None), &[b"a", b"b"]),
            kept.key(("auto", None), &[&[b'x'; 3 * END]]),
            kept.key(("auto", None), &[&[b'x'; 3 * END + 1]]),
        ];
        let distinct: std::collections::HashSet<u64> = keys.into_iter().collect();
        assert_eq!(distinct.len(), keys.len());
        assert_eq!(kept.key(("auto", None), &[b"ab"]), keys[0]);
    }

    #[test]
    fn there_is_an_end_to_what_is_remembered_and_the_newest_is() {
        let (kept, now) = (Conversations::default(), Instant::now());
        let many = 4 * SHARDS * HALF;
        (0..many as u64).for_each(|key| kept.put(key, known(now)));
        assert!(kept.len() <= MOST, "{}", kept.len());
        assert!(kept.get(many as u64 - 1, now).is_some() && kept.get(0, now).is_none());
    }
}
