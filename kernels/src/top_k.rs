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

#[cfg(test)]
mod tests {
    use super::*;

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
