//! What was found out about tokens, by their hash, as far as there is room: two generations, the older of which goes when
//! the younger is full.

use std::collections::HashMap;
use std::hash::BuildHasherDefault;
use std::sync::{Arc, PoisonError, RwLock};

use super::Mark;
use crate::authenticator::keys::Already;

/// Few threads meet at one of them.
const SHARDS: usize = 16;
/// In each generation of each shard.
const ROOM: usize = 2_048;

type Generation<T> = HashMap<Mark, Arc<T>, BuildHasherDefault<Already>>;

#[derive(Debug)]
pub(super) struct Seen<T> {
    shards: [RwLock<Shard<T>>; SHARDS],
}

#[derive(Debug)]
struct Shard<T> {
    young: Generation<T>,
    old: Generation<T>,
}

impl<T> Default for Seen<T> {
    fn default() -> Self {
        let shard = || RwLock::new(Shard { young: Generation::default(), old: Generation::default() });
        Self { shards: std::array::from_fn(|_| shard()) }
    }
}

impl<T> Seen<T> {
    pub(super) fn get(&self, mark: &Mark) -> Option<Arc<T>> {
        let shard = self.shard(mark).read().unwrap_or_else(PoisonError::into_inner);
        if let Some(young) = shard.young.get(mark) {
            return Some(young.clone());
        }
        let old = shard.old.get(mark).cloned();
        drop(shard);
        // Whoever is still asked for stays.
        old.inspect(|value| self.put(*mark, value.clone()))
    }

    pub(super) fn put(&self, mark: Mark, value: Arc<T>) {
        let mut shard = self.shard(&mark).write().unwrap_or_else(PoisonError::into_inner);
        if shard.young.len() >= ROOM {
            shard.old = std::mem::take(&mut shard.young);
        }
        shard.young.insert(mark, value);
    }

    fn shard(&self, mark: &Mark) -> &RwLock<Shard<T>> {
        &self.shards[usize::from(mark[0]) % SHARDS]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mark(number: usize) -> Mark {
        super::super::hash(&[&number.to_le_bytes()])
    }

    #[test]
    fn there_is_room_for_so_many_and_who_is_asked_for_stays() {
        let seen = Seen::default();
        let most = 2 * SHARDS * ROOM;
        for number in 0..3 * most {
            seen.put(mark(number), Arc::new(number));
            assert_eq!(seen.get(&mark(0)).as_deref(), Some(&0), "after {number}");
        }
        let kept = (0..3 * most).filter(|number| seen.get(&mark(*number)).is_some()).count();
        assert!(kept <= most && kept > most / 4, "{kept}");
        assert_eq!(seen.get(&mark(3 * most)), None);
    }
}
