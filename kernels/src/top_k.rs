//! The largest scores of a row.

/// A number that orders as the score does, with −0 equal to +0 and NaN below everything.
fn rank(score: f32) -> u32 {
    let bits = (score + 0.0).to_bits();
    match bits {
        _ if score.is_nan() => 0,
        b if b >> 31 == 1 => !b,
        b => b | 0x8000_0000,
    }
}

/// Writes the indices of the `k` largest scores to `out`, best first; ties go to the lower index, NaN comes last.
///
/// `out` is cleared first and gets `min(k, scores.len())` indices; nothing is allocated if its capacity holds them.
///
/// # Panics
/// If there are more than `u32::MAX` scores.
pub fn top_k(scores: &[f32], k: usize, out: &mut Vec<u32>) {
    assert!(u32::try_from(scores.len()).is_ok(), "indices are 32 bits wide");
    out.clear();
    if k == 0 {
        return;
    }
    for (i, &score) in scores.iter().enumerate() {
        let rank_i = rank(score);
        if out.len() == k {
            let worst = scores[out[k - 1] as usize];
            if rank_i <= rank(worst) {
                continue;
            }
            out.pop();
        }
        let at = out.partition_point(|&j| rank(scores[j as usize]) >= rank_i);
        out.insert(at, i as u32);
    }
}

/// Finds the largest of many scores that come one by one, as [`top_k`] would choose them, in memory that depends on how many are
/// wanted, not on how many come.
#[derive(Debug, Default)]
pub struct TopK {
    k: usize,
    /// Rank and index of scores that may be among the best, up to twice as many as are wanted.
    kept: Vec<(u32, u32)>,
    /// Once so many have come, a score needs a rank above this one.
    least: Option<u32>,
}

impl TopK {
    /// Starts again, for the `k` largest.
    pub fn begin(&mut self, k: usize) {
        (self.k, self.least) = (k, None);
        self.kept.clear();
        self.kept.reserve(2 * k);
    }

    /// Takes the next score; indices ascend.
    pub fn offer(&mut self, index: u32, score: f32) {
        let rank = rank(score);
        if self.k == 0 || self.least.is_some_and(|least| rank <= least) {
            return;
        }
        self.kept.push((rank, index));
        if self.kept.len() == 2 * self.k {
            self.shrink();
        }
    }

    /// Writes the indices to `out`, ascending, after clearing it.
    pub fn finish(&mut self, out: &mut Vec<u32>) {
        if self.kept.len() > self.k {
            self.shrink();
        }
        out.clear();
        out.extend(self.kept.iter().map(|&(_, index)| index));
        out.sort_unstable();
    }

    fn shrink(&mut self) {
        // No two are equal in this order, so the choice does not depend on the algorithm that finds it.
        self.kept.select_nth_unstable_by(self.k - 1, |a, b| b.0.cmp(&a.0).then(a.1.cmp(&b.1)));
        self.kept.truncate(self.k);
        self.least = Some(self.kept[self.k - 1].0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_that_come_one_by_one_give_the_same_choice_in_bounded_memory() {
        let scores: Vec<f32> = (0..1000u32)
            .map(|i| match i.wrapping_mul(2_654_435_761) >> 20 {
                n if n % 97 == 0 => f32::NAN,
                n if n % 89 == 0 => -0.0,
                n => (n % 61) as f32 - 30.0,
            })
            .collect();
        let (mut best, mut out) = (TopK::default(), Vec::new());
        for k in [0, 1, 2, 7, 64, 999, 1000, 1001] {
            for count in [0, 1, 5, 129, 1000] {
                best.begin(k);
                let room = best.kept.capacity();
                scores[..count].iter().enumerate().for_each(|(i, &score)| best.offer(i as u32, score));
                best.finish(&mut out);
                let mut want = of(&scores[..count], k);
                want.sort_unstable();
                assert_eq!(out, want, "{k} of {count}");
                assert_eq!(best.kept.capacity(), room, "no allocation");
            }
        }
    }

    fn of(scores: &[f32], k: usize) -> Vec<u32> {
        let mut out = Vec::new();
        top_k(scores, k, &mut out);
        out
    }

    #[test]
    fn ties_and_nan() {
        assert_eq!(of(&[1.0, 3.0, 3.0, 2.0], 3), [1, 2, 3]);
        assert_eq!(of(&[-0.0, 0.0], 1), [0]);
        assert_eq!(of(&[f32::NAN, f32::NEG_INFINITY, f32::NAN], 3), [1, 0, 2]);
        assert_eq!(of(&[1.0], 5), [0]);
        assert_eq!(of(&[1.0], 0), []);
        assert_eq!(of(&[], 2), []);
    }

    #[test]
    fn agrees_with_a_stable_sort() {
        let scores: Vec<f32> = (0..257u32).map(|i| ((i * 7919) % 101) as f32 - 50.0).collect();
        let mut want: Vec<u32> = (0..257).collect();
        want.sort_by(|&a, &b| scores[b as usize].total_cmp(&scores[a as usize]));
        for k in [1, 8, 100, 257] {
            let mut out = Vec::with_capacity(k);
            let before = out.as_ptr();
            top_k(&scores, k, &mut out);
            assert_eq!(out, want[..k]);
            assert_eq!(before, out.as_ptr(), "no allocation");
        }
    }
}
