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

/// Scales weights down to a sum of `cap`, or as many as there are to be used. Who would get nothing gets
/// one, off the others' part; that is shared by weight, rounded, the largest remainders first.
fn fit(weights: Vec<u64>, cap: u64) -> Vec<u64> {
    let mut total: u64 = weights.iter().sum();
    let mut order: Vec<usize> = (0..weights.len()).filter(|index| weights[*index] > 0).collect();
    let mut cap = cap.max(order.len() as u64);
    if total <= cap {
        return weights;
    }
    let mut scaled = vec![0; weights.len()];
    let share = |weight: u64, cap: u64, total: u64| {
        let product = u128::from(weight) * u128::from(cap);
        (u64::try_from(product / u128::from(total)).expect("at most the cap"), product % u128::from(total))
    };
    // From the lightest on: each that takes more than its share leaves the others less.
    order.sort_by_key(|index| weights[*index]);
    let mut few = 0;
    while let Some(index) = order.get(few).filter(|index| share(weights[**index], cap, total).0 == 0) {
        scaled[*index] = 1;
        (cap, total) = (cap - 1, total - weights[*index]);
        few += 1;
    }
    let mut rest = order.split_off(few);
    for index in &rest {
        scaled[*index] = share(weights[*index], cap, total).0;
    }
    let missing = cap - rest.iter().map(|index| scaled[*index]).sum::<u64>();
    rest.sort_by_key(|index| (std::cmp::Reverse(share(weights[*index], cap, total).1), *index));
    for index in rest.into_iter().take(usize::try_from(missing).unwrap_or(usize::MAX)) {
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

    #[test]
    fn what_is_rounded_keeps_its_share() {
        let counts = |weights: &[u32], cap| {
            let order = slot_order(weights, cap);
            (0..weights.len()).map(|index| count(&order, index)).collect::<Vec<_>>()
        };
        // A slow start among many.
        let mut weights = vec![10; 1_000];
        weights.push(1);
        let slots = counts(&weights, MAXIMUM_WEIGHTED_SLOTS);
        assert!(slots[..1_000].iter().all(|slots| (4..=5).contains(slots)) && slots[1_000] == 1);
        // Twice as much is twice as much, also where there is hardly more than a slot for each.
        let weights: Vec<u32> = (0..60).map(|index| if index < 30 { 1_001 } else { 2_002 - index }).collect();
        assert_eq!(counts(&weights, 90), [[1; 30], [2; 30]].concat());
        // The light one has its share, and no more.
        assert_eq!(counts(&[101, 899], 10), [1, 9]);
        // The light ones take theirs from the heavy one.
        assert_eq!(counts(&[1, 1, 1_000_000], 10), [1, 1, 8]);
        assert_eq!(counts(&[7, 1_000_000, 900], 2), [1, 1, 1]);
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
            // Rounded by less than one, unless somebody has to be raised to one.
            let total: u64 = weights.iter().copied().map(u64::from).sum();
            let exact = |weight: u32| f64::from(weight) * cap as f64 / total as f64;
            if weights.iter().all(|weight| *weight == 0 || exact(*weight) >= 1.0) && order.len() == cap {
                for (index, weight) in weights.iter().enumerate() {
                    let slots = count(&order, index) as f64;
                    prop_assert!((slots - exact(*weight)).abs() < 1.0, "{weight}: {slots}");
                }
            }
            for (a, b) in (0..weights.len()).flat_map(|a| (0..weights.len()).map(move |b| (a, b))) {
                prop_assert!(weights[a] <= weights[b] || count(&order, a) >= count(&order, b));
            }
        }
    }
}
