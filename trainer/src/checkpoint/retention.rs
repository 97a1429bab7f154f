//! Which checkpoints are kept.

use std::collections::BTreeSet;

/// What is worth its space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retention {
    /// The newest so many.
    pub last: usize,
    /// Those whose step is a multiple of this, for ever; 0 for none.
    pub every: u64,
    /// The best so many by a metric.
    pub best: usize,
}

impl Retention {
    /// The steps that may go, of all complete checkpoints, each with its metric (the lower the better), in ascending
    /// order of steps. The newest is never among them.
    #[must_use]
    pub fn surplus(&self, saved: &[(u64, Option<f64>)]) -> Vec<u64> {
        let newest = saved.iter().rev().take(self.last.max(1)).map(|(step, _)| *step);
        let milestones =
            saved.iter().map(|(step, _)| *step).filter(|step| self.every > 0 && step % self.every == 0);
        let mut ranked: Vec<(f64, u64)> =
            saved.iter().filter_map(|&(step, metric)| Some((metric?, step))).collect();
        // Of equals, the newer one.
        ranked.sort_by(|a, b| a.0.total_cmp(&b.0).then(b.1.cmp(&a.1)));
        let best = ranked.iter().take(self.best).map(|(_, step)| *step);
        let kept: BTreeSet<u64> = newest.chain(milestones).chain(best).collect();
        saved.iter().map(|(step, _)| *step).filter(|step| !kept.contains(step)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_last_the_milestones_and_the_best_are_kept() {
        let saved: Vec<(u64, Option<f64>)> =
            [(10, 0.5), (20, 0.2), (30, 0.9), (40, 0.4), (50, 0.3)].map(|(s, m)| (s, Some(m))).to_vec();
        let surplus = |last, every, best| Retention { last, every, best }.surplus(&saved);
        assert_eq!(surplus(2, 0, 0), [10, 20, 30]);
        assert_eq!(surplus(1, 20, 0), [10, 30]);
        assert_eq!(surplus(1, 0, 2), [10, 30, 40]);
        assert_eq!(surplus(1, 0, 1), [10, 30, 40]);
        assert_eq!(surplus(0, 0, 0), [10, 20, 30, 40], "the newest stays in any case");
    }

    #[test]
    fn what_has_no_metric_is_never_the_best() {
        let saved = [(1, None), (2, Some(5.0)), (3, None)];
        assert_eq!(Retention { last: 1, every: 0, best: 2 }.surplus(&saved), [1]);
    }

    proptest! {
        #[test]
        fn at_least_the_last_are_left_and_nothing_is_invented(
            metrics in prop::collection::vec(prop::option::of(0.0..9.0), 0..20),
            last in 0usize..5, every in 0u64..5, best in 0usize..5,
        ) {
            let saved: Vec<_> = metrics.into_iter().enumerate().map(|(i, m)| (i as u64 + 1, m)).collect();
            let surplus = Retention { last, every, best }.surplus(&saved);
            let most = saved.len() - last.max(1).min(saved.len());
            prop_assert!(surplus.len() <= most);
            prop_assert!(surplus.iter().all(|step| saved.iter().any(|(s, _)| s == step)));
            // Asked again of what is left, there is nothing more to remove.
            let left: Vec<_> = saved.into_iter().filter(|(step, _)| !surplus.contains(step)).collect();
            let again = Retention { last, every, best }.surplus(&left);
            prop_assert!(again.is_empty(), "{:?}", again);
        }
    }
}
