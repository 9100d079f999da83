//! Whether proposals are worth their time: learned from the time of steps, and from how often proposals come true.
//!
//! A step with proposals takes longer than one without, and gives more tokens if they come true. How much longer depends on model,
//! drive, cache and cores, so it is measured for each number of rows. A step has proposals only if tokens are expected to come
//! faster with them. Attempts that do not pay are charged to a credit, which is a small part of the time of all steps. So, whatever
//! the text and the machine do, proposals cannot cost more than that part.

use std::collections::BTreeMap;

/// Most proposals for one sequence in a step.
pub(super) const DEEPEST: usize = 4;
/// Part of the time of steps that may be lost to proposals that do not pay.
const CREDIT: f64 = 0.005;
/// The credit is never more than the time of this many steps, so that earlier gains cannot be lost again.
const CREDIT_STEPS: f64 = 4.0;
/// How much faster tokens must be expected to come for proposals to be made.
const MARGIN: f64 = 1.03;
/// The assumed time of one more row, as a part of a step with one row for each sequence, before it has been measured. It is half of
/// what two rows need from the drive in the worst case, so that it is tried.
const ROW: f64 = 0.4;
/// Steps after which half of the measurements of a width are forgotten, because caches fill and texts change.
const HALF_LIFE: f64 = 256.0;
/// One step in this many has no proposals, to measure what the others are compared with.
const PLAIN_EVERY: u64 = 32;
/// Number of observations that an average remembers.
const MEMORY: f64 = 24.0;

/// The source of proposals.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// The text itself, if its latest tokens occur earlier.
    Lookup,
    /// The model's prediction layer.
    Prediction,
}

/// The proposals that could be made to one sequence that takes part in a step.
#[derive(Clone, Copy, Debug)]
pub(super) struct Offer {
    pub(super) source: Source,
    /// Most proposals that there are, or for which there is room.
    pub(super) most: usize,
}

/// An average of the latest observations.
#[derive(Clone, Copy, Debug)]
struct Average {
    value: f64,
    count: f64,
    /// The step of the latest observation.
    step: u64,
}

impl Average {
    fn of(value: f64, step: u64) -> Self {
        Average { value, count: 1.0, step }
    }

    /// An assumption before anything was observed; it weighs as much as `count` observations.
    const fn belief(value: f64, count: f64) -> Self {
        Average { value, count, step: 0 }
    }

    fn add(&mut self, value: f64, step: u64) {
        self.count = (self.count + 1.0).min(MEMORY);
        self.value += (value - self.value) / self.count;
        self.step = step;
    }
}

/// What has been learned.
#[derive(Debug)]
pub(super) struct Worth {
    /// Seconds of a step, by number of sequences and of rows.
    steps: BTreeMap<(usize, usize), Average>,
    /// How often a proposal comes true if those before it do, by source and place.
    comes_true: [[Average; DEEPEST]; 2],
    /// Time that the prediction layer takes for one proposal to each sequence, as a part of the time of a step without proposals.
    predicting: Average,
    /// Seconds that may be lost.
    credit: f64,
    /// Number of steps so far, and since the last one without proposals.
    step: u64,
    since_plain: u64,
}

impl Worth {
    pub(super) fn new() -> Self {
        let beliefs = |first: f64| [1.0, 0.9, 0.8, 0.7].map(|part| Average::belief(first * part, 4.0));
        Worth {
            steps: BTreeMap::new(),
            comes_true: [beliefs(0.5), beliefs(0.7)],
            predicting: Average::belief(0.05, 1.0),
            credit: 0.0,
            step: 0,
            since_plain: 0,
        }
    }

    /// The most proposals that each sequence of the next step should have; those with `None` have none in any case.
    pub(super) fn depth(&self, offers: &[Option<Offer>]) -> usize {
        let plain = self.seconds(offers.len(), offers.len());
        let (Some(plain), true) = (plain, self.credit >= 0.0 && self.since_plain < PLAIN_EVERY) else { return 0 };
        let rate = |depth: usize| {
            let rows = offers.iter().flatten().map(|offer| offer.most.min(depth)).sum::<usize>();
            let tokens =
                offers.iter().map(|offer| 1.0 + offer.map_or(0.0, |offer| self.expected(offer, depth))).sum::<f64>();
            let predicts = |offer: &Offer| offer.source == Source::Prediction && offer.most > 0;
            let predicted = if offers.iter().flatten().any(predicts) { depth as f64 } else { 0.0 };
            let seconds = self.seconds(offers.len(), offers.len() + rows).unwrap_or(plain);
            tokens / (seconds + predicted * self.predicting.value * plain)
        };
        let best = (1..=DEEPEST).map(|depth| (depth, rate(depth))).max_by(|a, b| a.1.total_cmp(&b.1));
        best.filter(|best| best.1 > MARGIN * rate(0)).map_or(0, |best| best.0)
    }

    /// Records a step of this many sequences and its time. `rows`: the rows of all of them; `proposing`: seconds that proposals
    /// took before it; `gained`: tokens in addition to one for each sequence.
    pub(super) fn record(&mut self, sequences: usize, rows: usize, seconds: f64, proposing: f64, gained: usize) {
        self.step += 1;
        let plain = self.seconds(sequences, sequences);
        let of_width = self.steps.entry((sequences, rows)).or_insert(Average { count: 0.0, ..Average::of(0.0, 0) });
        of_width.add(seconds, self.step);
        let Some(plain) = plain else { return };
        self.credit += CREDIT * seconds;
        if rows > sequences || proposing > 0.0 {
            self.since_plain += 1;
            self.credit += (1.0 + gained as f64 / sequences as f64) * plain - seconds - proposing;
        } else {
            self.since_plain = 0;
        }
        self.credit = self.credit.min(CREDIT_STEPS * plain);
    }

    /// Records the time of the prediction layer for `proposals` proposals to each of `sequences`.
    pub(super) fn record_predicting(&mut self, sequences: usize, proposals: usize, seconds: f64) {
        if let Some(plain) = self.seconds(sequences, sequences).filter(|_| proposals > 0) {
            self.predicting.add(seconds / proposals as f64 / plain, self.step);
        }
    }

    /// Records that the first `right` of `known` proposals came true; the tokens at their places are known.
    pub(super) fn judge(&mut self, source: Source, right: usize, known: usize) {
        for (place, average) in self.comes_true[source as usize].iter_mut().enumerate().take(known.min(right + 1)) {
            average.add(f64::from(u8::from(place < right)), self.step);
        }
    }

    /// Tokens that are expected from an offer, beyond the first.
    fn expected(&self, offer: Offer, depth: usize) -> f64 {
        let places = self.comes_true[offer.source as usize].iter().take(offer.most.min(depth));
        let both = places.scan(1.0, |all, place| {
            *all *= place.value;
            Some(*all)
        });
        both.sum()
    }

    /// The time of a step; `None` until one without proposals has been measured. Rows beyond those that were measured are assumed
    /// to take as long as those before them, and the measurements of a width fade towards what smaller widths suggest.
    fn seconds(&self, sequences: usize, rows: usize) -> Option<f64> {
        let plain = self.steps.get(&(sequences, sequences))?.value;
        let (mut seconds, mut row) = (plain, ROW * plain / sequences as f64);
        for rows in sequences + 1..=rows {
            seconds += row;
            if let Some(measured) = self.steps.get(&(sequences, rows)) {
                let trust = 0.5f64.powf((self.step - measured.step) as f64 / HALF_LIFE);
                seconds += trust * (measured.value - seconds);
                row = ((seconds - plain) / (rows - sequences) as f64).max(0.0);
            }
        }
        Some(seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOOKUP: Option<Offer> = Some(Offer { source: Source::Lookup, most: DEEPEST });

    /// Steps of one sequence on a machine where `time` gives the time of a step with this many rows; each proposal comes true with
    /// the given chance, according to a fixed sequence of numbers. Returns seconds per token.
    fn run(worth: &mut Worth, tokens: usize, chance: f64, time: impl Fn(usize) -> f64) -> f64 {
        let (mut seconds, mut done, mut number) = (0.0, 0, 0u32);
        while done < tokens {
            let depth = worth.depth(&[LOOKUP]);
            let comes_true = (0..DEEPEST)
                .take_while(|_| {
                    number = number.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    f64::from(number >> 8) / f64::from(1u32 << 24) < chance
                })
                .count();
            let gained = comes_true.min(depth);
            // Proposals are judged whether they were checked or not, as soon as the token at their place is known: look-up costs
            // nothing.
            let known = (1 + gained).min(DEEPEST);
            worth.judge(Source::Lookup, comes_true.min(known), known);
            worth.record(1, 1 + depth, time(1 + depth), 0.0, gained);
            seconds += time(1 + depth);
            done += 1 + gained;
        }
        seconds / done as f64
    }

    #[test]
    fn nothing_is_lost_where_rows_are_dear() {
        for chance in [0.0, 0.3, 0.6, 0.9] {
            // When they are read from the drive, rows share few experts.
            let per_token = run(&mut Worth::new(), 20_000, chance, |rows| rows as f64);
            assert!(per_token < 1.006, "{chance}: {per_token}");
        }
    }

    #[test]
    fn much_is_gained_where_rows_are_cheap_and_proposals_right() {
        let cheap = |rows: usize| 1.0 + 0.1 * (rows - 1) as f64;
        let copying = run(&mut Worth::new(), 5_000, 0.95, cheap);
        assert!(copying < 0.4, "{copying}");
        let prose = run(&mut Worth::new(), 20_000, 0.02, cheap);
        assert!(prose < 1.006, "{prose}");
        let between = run(&mut Worth::new(), 20_000, 0.4, |rows| 1.0 + 0.3 * (rows - 1) as f64);
        assert!(between < 1.0, "{between}");
    }

    #[test]
    fn what_is_learnt_follows_the_text() {
        let mut worth = Worth::new();
        let time = |rows: usize| 1.0 + 0.2 * (rows - 1) as f64;
        for _ in 0..3 {
            assert!(run(&mut worth, 2_000, 0.95, time) < 0.6);
            // Earlier gains cannot be lost again.
            let prose = run(&mut worth, 2_000, 0.0, time);
            assert!(prose < 1.01, "{prose}");
        }
    }

    #[test]
    fn nothing_is_proposed_before_a_step_was_measured() {
        let mut worth = Worth::new();
        assert_eq!(worth.depth(&[LOOKUP]), 0);
        worth.record(1, 1, 1.0, 0.0, 0);
        assert!(worth.depth(&[LOOKUP]) > 0);
        assert_eq!((worth.depth(&[LOOKUP, LOOKUP]), worth.depth(&[None])), (0, 0));
    }
}
