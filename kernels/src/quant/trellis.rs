//! Chooses the bytes and codes of `q2`, whose levels depend on two codes each.
//!
//! The sixteen codes of a block form a ring: the weight at place `p` has level `C[c_p + 4·c_{p+1}]`, and the first place follows
//! the last. So each code takes part in two weights, and each weight can have any of sixteen levels, at two bits. This is trellis
//! coded quantisation (M. Marcellin, T. Fischer, IEEE Transactions on Communications 38, 1990) with four states and joined ends;
//! the best codes are found by dynamic programming over states (Viterbi), once for each code with which the ring can begin.

use super::codebook::{Codebook, SCALE_MAX, place, scale_over_unit};
use super::search::{Row, normalising};

/// Places of a ring.
const PLACES: usize = 16;

/// A cost for each code and the next one, or for the first code of a path and the one after its end.
type Costs = [[f32; 4]; 4];

/// A block scale is tried if it scales the largest magnitude of a block to between these numbers; levels end at 64.
const REACH: (f32, f32) = (50.0, 105.0);

/// A codebook in the form that the search reads.
pub(super) struct Trellis {
    book: &'static Codebook,
    /// Levels by code and next code.
    levels: Costs,
    /// The integer that the low five bits of a byte stand for.
    scales: [f32; 32],
}

/// The numbers that a block should be rounded to, by place.
pub(super) struct Ring {
    /// Numbers and the weights of their errors; zero where there is no column.
    x: [f32; PLACES],
    weight: [f32; PLACES],
    exists: [bool; PLACES],
}

/// The numbers that a block has been rounded to, by place.
pub(super) struct Codes {
    pub(super) codes: [u8; PLACES],
    /// Zero where there is no column.
    pub(super) values: [f32; PLACES],
}

/// How the error at one place affects later ones, and the weights without that effect.
pub(super) struct RingFeedback {
    /// In row `j`, the share of an error at place `j` that is subtracted from the number at place `k > j`.
    pub(super) within: [[f32; PLACES]; PLACES],
    pub(super) exact: [f32; PLACES],
}

impl Ring {
    /// A ring from numbers: the place, the number and the weight of its error.
    pub(super) fn new(numbers: impl IntoIterator<Item = (usize, f32, f32)>) -> Ring {
        let mut ring = Ring { x: [0.0; PLACES], weight: [0.0; PLACES], exists: [false; PLACES] };
        for (place, x, weight) in numbers {
            (ring.x[place], ring.weight[place], ring.exists[place]) = (x, weight, true);
        }
        if ring.weight.iter().all(|&w| w == 0.0) {
            ring.weight = ring.exists.map(|exists| if exists { 1.0 } else { 0.0 });
        }
        ring
    }

    /// The largest magnitude, in which columns with less than the mean weight count for less.
    fn reach(&self) -> f32 {
        let mean = self.weight.iter().sum::<f32>() / PLACES as f32;
        let counts = |weight: f32| if weight < mean { (weight / mean).sqrt() } else { 1.0 };
        self.x.iter().zip(self.weight).fold(0.0, |m, (x, weight)| m.max(x.abs() * counts(weight)))
    }

    /// Costs of the codes at a place, for numbers in units of the step from which the offset has been subtracted. A place without a
    /// column has code 0.
    #[inline(always)]
    fn costs(&self, levels: &Costs, place: usize, y: f32) -> Costs {
        let mut costs = [[0.0; 4]; 4];
        if !self.exists[place] {
            costs[1..].fill([f32::INFINITY; 4]);
            return costs;
        }
        for own in 0..4 {
            for next in 0..4 {
                let distance = y - levels[own][next];
                costs[own][next] = self.weight[place] * distance * distance;
            }
        }
        costs
    }
}

impl Trellis {
    pub(super) fn new(book: &'static Codebook) -> Trellis {
        Trellis {
            book,
            levels: std::array::from_fn(|own| std::array::from_fn(|next| f32::from(book.levels[own + 4 * next]))),
            scales: std::array::from_fn(|code| scale_over_unit(code as u8) * super::UNIT),
        }
    }

    /// Quantises a row whose errors have the weights `weight`, or equal weights, and writes the code of each column.
    pub(super) fn row(&self, x: &[f32], weight: Option<&[f32]>, codes: &mut [u8]) -> Row {
        codes.fill(0);
        let mut bytes = vec![0; x.len().div_ceil(PLACES)];
        let (absmax, exponent) = match normalising(x) {
            Ok(found) => found,
            Err(scale) => return Row { scale, bytes },
        };
        let power = |e: i64| f64::from_bits(((1023 + e) as u64) << 52);
        let reach = f32::from(self.book.levels[self.book.levels.len() - 1]);
        let scale = (f64::from(absmax) * power(-exponent)) as f32 / (reach * SCALE_MAX);
        let (mut xv, mut vv, mut largest) = (0.0, 0.0, 1.0f32);
        for (b, (x, codes)) in x.chunks(PLACES).zip(codes.chunks_mut(PLACES)).enumerate() {
            let number = |(k, &x): (usize, &f32)| {
                (
                    place(k),
                    (f64::from(x) * power(-exponent)) as f32,
                    weight.map_or(1.0, |weight| weight[b * PLACES + k]),
                )
            };
            let ring = Ring::new(x.iter().enumerate().map(number));
            bytes[b] = self.byte(&ring, scale);
            let found = self.codes(&ring, scale, bytes[b], None);
            codes.iter_mut().enumerate().for_each(|(k, code)| *code = found.codes[place(k)]);
            for ((x, weight), value) in ring.x.iter().zip(ring.weight).zip(found.values) {
                xv += f64::from(weight * x * value);
                vv += f64::from(weight * value * value);
                largest = largest.max(value.abs() / scale);
            }
        }
        // The row scale with the least error for the chosen codes; its products must stay finite.
        let scale = if xv > 0.0 && vv > 0.0 { f64::from(scale) * (xv / vv) } else { f64::from(scale) };
        let scale = (scale * power(exponent)).min(f64::from(f32::MAX) / f64::from(largest));
        let rounded = scale as f32;
        let fits = f64::from(rounded) * f64::from(largest) <= f64::from(f32::MAX);
        Row { scale: if fits { rounded } else { rounded.next_down() }, bytes }
    }

    /// The byte with the least error for a given row scale; 0 if nothing is better.
    ///
    /// The cost of an open chain, which need not return to its first code, is a lower bound at a quarter of the work. Bytes are
    /// tried in the order of this bound, until it shows that no other can be better.
    pub(super) fn byte(&self, ring: &Ring, scale: f32) -> u8 {
        let reach = ring.reach();
        let zero: f32 = ring.x.iter().zip(ring.weight).map(|(x, weight)| weight * x * x).sum();
        if reach == 0.0 {
            return 0;
        }
        let first = (1..31).find(|&code| self.scales[code] * scale * REACH.1 >= reach).unwrap_or(31);
        let (mut bounds, mut count) = ([(0.0f32, 0u8); 256], 0);
        for code in first..32 {
            let step = scale * self.scales[code];
            if code > first && step * REACH.0 > reach {
                break;
            }
            for k in 0..8 {
                let byte = k << 5 | code as u8;
                bounds[count] = (step * step * self.least_open(ring, 1.0 / step, self.book.offset(byte) as f32), byte);
                count += 1;
            }
        }
        let bounds = &mut bounds[..count];
        bounds.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        let mut best = (zero, 0);
        for &(bound, byte) in bounds.iter() {
            if bound >= best.0 {
                break;
            }
            let step = scale * self.scales[usize::from(byte & 31)];
            let cost = step * step * self.least(ring, 1.0 / step, self.book.offset(byte) as f32).0;
            if cost < best.0 {
                best = (cost, byte);
            }
        }
        best.1
    }

    /// Like [`Trellis::least`], except that the code after the last place may differ from the first. The result is never more,
    /// since both add the same sums in the same order.
    fn least_open(&self, ring: &Ring, inverse: f32, offset: f32) -> f32 {
        let mut way = [0.0f32; 4];
        for place in 0..PLACES {
            let step = ring.costs(&self.levels, place, ring.x[place] * inverse - offset);
            let mut next = [f32::INFINITY; 4];
            for (way, step) in way.iter().zip(&step) {
                for (next, step) in next.iter_mut().zip(step) {
                    let cost = way + step;
                    *next = if cost < *next { cost } else { *next };
                }
            }
            way = next;
        }
        way.into_iter().fold(f32::INFINITY, f32::min)
    }

    /// The least sum of weighted square errors for any codes, in units of the step, and the first of these codes.
    fn least(&self, ring: &Ring, inverse: f32, offset: f32) -> (f32, usize) {
        let costs = |place: usize| ring.costs(&self.levels, place, ring.x[place] * inverse - offset);
        let mut ways = costs(0);
        for place in 1..PLACES {
            let step = costs(place);
            let mut next = [[f32::INFINITY; 4]; 4];
            for (next, way) in next.iter_mut().zip(&ways) {
                for (own, step) in step.iter().enumerate() {
                    for (next, step) in next.iter_mut().zip(step) {
                        let cost = way[own] + step;
                        *next = if cost < *next { cost } else { *next };
                    }
                }
            }
            ways = next;
        }
        let cheaper = |best: (f32, usize), first: usize| {
            if ways[first][first] < best.0 { (ways[first][first], first) } else { best }
        };
        (0..4).fold((f32::INFINITY, 0), cheaper)
    }

    /// The codes with the least error in a block with this byte, in a row of scale `scale`.
    ///
    /// With feedback, the error of each place changes the targets of later ones, so each of the four paths that lead to a place has
    /// its own numbers there.
    pub(super) fn codes(&self, ring: &Ring, scale: f32, byte: u8, feedback: Option<&RingFeedback>) -> Codes {
        let step = scale * self.scales[usize::from(byte & 31)];
        if step == 0.0 {
            return Codes { codes: [0; PLACES], values: [0.0; PLACES] };
        }
        let offset = self.book.offset(byte) as f32;
        let codes = match feedback {
            None => self.way(ring, step, offset, None, self.least(ring, 1.0 / step, offset).1).1,
            Some(_) => {
                let ways = (0..4).map(|first| self.way(ring, step, offset, feedback, first));
                ways.min_by(|a, b| a.0.total_cmp(&b.0)).expect("there are four").1
            }
        };
        let value = |place: usize| {
            let level = self.levels[usize::from(codes[place])][usize::from(codes[(place + 1) % PLACES])];
            if ring.exists[place] { step * (level + offset) } else { 0.0 }
        };
        Codes { codes, values: std::array::from_fn(value) }
    }

    /// The best codes that begin with `first`, and their cost.
    fn way(
        &self,
        ring: &Ring,
        step: f32,
        offset: f32,
        feedback: Option<&RingFeedback>,
        first: usize,
    ) -> (f32, [u8; PLACES]) {
        let mut cost = [f32::INFINITY; 4];
        cost[first] = 0.0;
        // For each of the four paths, one for each code at the next place: its code at each place, and its errors so far.
        let mut codes = [[0u8; 4]; PLACES];
        let mut errors = [[0.0f32; 4]; PLACES];
        for place in 0..PLACES {
            let mut x = [ring.x[place]; 4];
            if let Some(feedback) = feedback {
                for (errors, within) in errors[..place].iter().zip(&feedback.within) {
                    x.iter_mut().zip(errors).for_each(|(x, error)| *x -= within[place] * error);
                }
            }
            let (mut next, mut from) = ([f32::INFINITY; 4], [0; 4]);
            for own in 0..4 {
                let costs = ring.costs(&self.levels, place, x[own] * (1.0 / step) - offset)[own];
                for to in 0..4 {
                    let sum = cost[own] + costs[to];
                    if sum < next[to] {
                        (next[to], from[to]) = (sum, own);
                    }
                }
            }
            (codes[place], cost) = (from.map(|own| own as u8), next);
            if let Some(feedback) = feedback {
                errors[..place].iter_mut().for_each(|errors| *errors = from.map(|own| errors[own]));
                if ring.exists[place] {
                    let value = |to: usize| step * (self.levels[from[to]][to] + offset);
                    errors[place] = std::array::from_fn(|to| value(to) - feedback.exact[place]);
                }
            }
        }
        let (mut chosen, mut last) = ([0; PLACES], first);
        for place in (0..PLACES).rev() {
            chosen[place] = codes[place][last];
            last = usize::from(chosen[place]);
        }
        (cost[first], chosen)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// With few columns, all codes can be tried.
    #[test]
    fn no_codes_are_better() {
        let trellis = Trellis::new(&Codebook::Q2);
        let mut state = 7u64;
        let mut random = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        for columns in [1usize, 2, 4, 6] {
            for _ in 0..20 {
                let numbers: Vec<_> = (0..columns).map(|p| (p, random(), 0.1 + random().abs())).collect();
                let ring = Ring::new(numbers.iter().copied());
                let scale = 1.0 / (64.0 * SCALE_MAX);
                let byte = trellis.byte(&ring, scale);
                let found = trellis.codes(&ring, scale, byte, None);
                let (step, offset) = (scale * trellis.scales[usize::from(byte & 31)], Codebook::Q2.offset(byte) as f32);
                let error = |codes: &dyn Fn(usize) -> usize| -> f32 {
                    let value = |p: usize| step * (trellis.levels[codes(p)][codes((p + 1) % PLACES)] + offset);
                    numbers.iter().map(|&(p, x, weight)| weight * (x - value(p)).powi(2)).sum()
                };
                let got = error(&|p| usize::from(found.codes[p]));
                let of = |all: usize, p: usize| if p < columns { all >> (2 * p) & 3 } else { 0 };
                let least = (0..1 << (2 * columns)).map(|all| error(&|p| of(all, p))).fold(f32::INFINITY, f32::min);
                assert!(got <= least * 1.000_1 + 1e-9, "{columns}: {got} {least}");
                assert!(found.codes[columns..].iter().all(|&code| code == 0));
            }
        }
    }
}
