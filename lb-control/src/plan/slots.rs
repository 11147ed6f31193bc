//! In which order a Service's backends get connections.

/// At most this many slots carry out unequal weights; beyond, weights are rounded.
pub const MAXIMUM_WEIGHTED_SLOTS: usize = 4096;

/// The order in which backends get connections: indices into `weights`, over one cycle.
///
/// Each occurs as often as its weight says, divided by what all weights have in common, and as
/// evenly spread as nginx's smooth weighted round-robin spreads it. A weight of 0 does not occur.
/// Weights whose cycle is longer than `cap` are rounded to fit, each at least 1.
#[must_use]
pub fn slot_order(weights: &[u32], cap: usize) -> Vec<usize> {
    let divisor = weights.iter().copied().fold(0, gcd);
    if divisor == 0 {
        return Vec::new();
    }
    let reduced: Vec<u64> = weights.iter().map(|weight| u64::from(weight / divisor)).collect();
    if reduced.iter().all(|weight| *weight <= 1) {
        return (0..weights.len()).filter(|index| reduced[*index] == 1).collect();
    }
    smooth(&fit(reduced, cap as u64))
}

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Scales weights down to a sum of at most `cap`, the largest remainders first.
fn fit(weights: Vec<u64>, cap: u64) -> Vec<u64> {
    let total: u64 = weights.iter().sum();
    let used = weights.iter().filter(|weight| **weight > 0).count() as u64;
    let cap = cap.max(used);
    if total <= cap {
        return weights;
    }
    // One slot each comes first; the rest is shared by weight.
    let spare = u128::from(cap - used);
    let share = |weight: u64| (u128::from(weight) * spare, u128::from(total));
    let mut scaled: Vec<u64> = weights
        .iter()
        .map(|weight| {
            let (product, total) = share(*weight);
            u64::from(*weight > 0) + u64::try_from(product / total).expect("at most the cap")
        })
        .collect();
    let mut order: Vec<usize> = (0..weights.len()).filter(|index| weights[*index] > 0).collect();
    order.sort_by_key(|index| {
        let (product, total) = share(weights[*index]);
        (std::cmp::Reverse(product % total), *index)
    });
    let missing = cap - scaled.iter().sum::<u64>();
    for index in order.into_iter().take(usize::try_from(missing).unwrap_or(usize::MAX)) {
        scaled[index] += 1;
    }
    scaled
}

/// nginx, src/http/ngx_http_upstream_round_robin.c, `ngx_http_upstream_get_peer`: everybody gains
/// their weight, whoever has most is chosen and pays the total.
fn smooth(weights: &[u64]) -> Vec<usize> {
    let total: u64 = weights.iter().sum();
    let mut current = vec![0i64; weights.len()];
    let mut order = Vec::new();
    for _ in 0..total {
        let mut best = None;
        for (index, weight) in weights.iter().enumerate().filter(|(_, weight)| **weight > 0) {
            current[index] += weight.cast_signed();
            if best.is_none_or(|best: usize| current[index] > current[best]) {
                best = Some(index);
            }
        }
        let Some(best) = best else { break };
        current[best] -= total.cast_signed();
        order.push(best);
    }
    order
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn orders() {
        for (weights, expected) in [
            (&[][..], &[][..]),
            (&[0, 0], &[]),
            (&[1, 1, 1], &[0, 1, 2]),
            (&[7, 7], &[0, 1]),
            (&[3, 0, 3], &[0, 2]),
            (&[5, 1, 1], &[0, 0, 1, 0, 2, 0, 0]),
            (&[10, 2, 2], &[0, 0, 1, 0, 2, 0, 0]),
            (&[2, 1], &[0, 1, 0]),
        ] {
            assert_eq!(slot_order(weights, MAXIMUM_WEIGHTED_SLOTS), expected, "{weights:?}");
        }
    }

    fn count(order: &[usize], index: usize) -> usize {
        order.iter().filter(|other| **other == index).count()
    }

    proptest! {
        #[test]
        fn exact_over_a_cycle(weights in proptest::collection::vec(0u32..40, 1..12)) {
            let order = slot_order(&weights, MAXIMUM_WEIGHTED_SLOTS);
            let divisor = weights.iter().copied().fold(0, gcd).max(1);
            for (index, weight) in weights.iter().enumerate() {
                prop_assert_eq!(count(&order, index), (weight / divisor) as usize);
            }
        }

        #[test]
        fn rounded_to_fit(weights in proptest::collection::vec(0u32..u32::MAX, 1..20), cap in 1usize..100) {
            let order = slot_order(&weights, cap);
            let used = weights.iter().filter(|weight| **weight > 0).count();
            prop_assert!(order.len() <= cap.max(used));
            for (index, weight) in weights.iter().enumerate() {
                prop_assert_eq!(count(&order, index) > 0, *weight > 0);
            }
        }
    }
}
