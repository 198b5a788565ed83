//! What was said lately and still holds, by what was asked: so much of it and no more, the oldest goes first.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

/// Answers that still hold.
#[derive(Debug)]
pub struct Kept<V> {
    answers: HashMap<[u8; 32], (Instant, V)>,
    order: VecDeque<[u8; 32]>,
    most: usize,
}

impl<V> Kept<V> {
    /// Keeps `most` of them.
    pub fn new(most: usize) -> Self {
        Self { answers: HashMap::new(), order: VecDeque::new(), most }
    }

    /// How much is kept.
    pub fn len(&self) -> usize {
        self.order.len()
    }

    /// Whether nothing is.
    pub fn is_empty(&self) -> bool {
        self.order.is_empty()
    }

    /// What was said about this, if it still holds.
    pub fn get(&self, key: &[u8; 32]) -> Option<&V> {
        self.answers.get(key).filter(|(until, _)| Instant::now() < *until).map(|(_, answer)| answer)
    }

    /// Keeps an answer for so long; not at all where that is no time.
    pub fn keep(&mut self, key: [u8; 32], answer: V, time: Duration) {
        if time.is_zero() {
            return;
        }
        if self.answers.insert(key, (Instant::now() + time, answer)).is_none() {
            self.order.push_back(key);
        }
        while self.order.len() > self.most
            && let Some(oldest) = self.order.pop_front()
        {
            self.answers.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn so_many_are_kept_and_the_oldest_go_first() {
        let mut kept = Kept::new(3);
        (0..5).for_each(|n| kept.keep([n; 32], n, Duration::from_secs(600)));
        let found: Vec<Option<u8>> = (0..5).map(|n| kept.get(&[n; 32]).copied()).collect();
        assert_eq!(found, [None, None, Some(2), Some(3), Some(4)]);
        kept.keep([9; 32], 9, Duration::ZERO);
        assert_eq!((kept.get(&[9; 32]), kept.answers.len(), kept.order.len()), (None, 3, 3));
    }
}
