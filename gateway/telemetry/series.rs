//! Series whose labels are names of the policy: they leave the page with the name, however many names come and go.

use std::collections::HashSet;
use std::fmt;
use std::hash::Hash;

use parking_lot::Mutex;
use prometheus_client::metrics::family::Family;

/// A family that knows its labels.
pub(super) struct Series<L, M> {
    family: Family<L, M, fn() -> M>,
    /// Held while a series is made or goes, so that none is on the page that is not known here.
    known: Mutex<HashSet<L>>,
}

impl<L: Clone + Eq + Hash, M: Clone> Series<L, M> {
    /// No series yet; each begins as `fresh` says.
    pub(super) fn new(fresh: fn() -> M) -> Self {
        Self { family: Family::new_with_constructor(fresh), known: Mutex::default() }
    }

    /// What is registered.
    pub(super) fn family(&self) -> Family<L, M, fn() -> M> {
        self.family.clone()
    }

    /// The metric with these labels, old or new.
    pub(super) fn of(&self, labels: &L) -> M {
        if let Some(known) = self.family.get(labels) {
            return known.clone();
        }
        let mut known = self.known.lock();
        known.insert(labels.clone());
        self.family.get_or_create_owned(labels)
    }

    /// Whether there is one with these labels.
    pub(super) fn has(&self, labels: &L) -> bool {
        self.family.get(labels).is_some()
    }

    /// Only these stay on the page. Who still counts on one of the others counts for nobody.
    pub(super) fn keep(&self, stays: impl Fn(&L) -> bool) {
        self.known.lock().retain(|labels| {
            let stays = stays(labels);
            if !stays {
                self.family.remove(labels);
            }
            stays
        });
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.known.lock().len()
    }
}

impl<L, M: Default> Default for Series<L, M>
where
    L: Clone + Eq + Hash,
    M: Clone,
{
    fn default() -> Self {
        Self::new(M::default)
    }
}

impl<L, M> fmt::Debug for Series<L, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Series")
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::metrics::counter::Counter;

    use super::*;

    #[test]
    fn what_is_not_kept_begins_anew_and_what_is_goes_on() {
        let series = Series::<Vec<(String, String)>, Counter>::default();
        let [stays, goes] = ["stays", "goes"].map(|name| vec![("name".to_owned(), name.to_owned())]);
        let counters = [&stays, &goes].map(|labels| series.of(labels));
        counters.iter().for_each(|counter| _ = counter.inc());
        series.keep(|labels| *labels == stays);
        assert!(series.len() == 1 && series.family.get(&goes).is_none());
        assert_eq!((series.of(&stays).get(), series.of(&goes).get()), (1, 0));
        assert_eq!(counters[1].get(), 1);
    }
}
