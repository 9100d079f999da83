//! Whether proposals are worth their time: learnt from the time of steps, and from how often proposals come true.
//!
//! A step with proposals takes longer than one without, and gives more tokens if they come true. How much longer depends on model, drive,
//! cache and cores, so it is measured, for each number of rows. A step has proposals only if the tokens that are expected of it come faster
//! with them.
//!
//! What was tried and did not pay is paid out of a credit, a small part of the time of all steps, and what could be lost must be there before it
//! is tried. As long as nobody has measured what rows take, a row is feared to take as long as a step of its own: then proposals lose nothing
//! only if nearly all of them come true. So whatever text and machine do, proposals cost no more than that part of the time, and a step or two
//! in all. Both times change while caches fill, contexts grow and others use the drive, so what is old counts little, and the less proposals
//! gain, the more often steps without them are measured.

use std::collections::BTreeMap;

/// Most proposals for one sequence in a step.
pub(super) const DEEPEST: usize = 4;
/// Part of the time of steps that may be lost by proposals that do not pay.
const CREDIT: f64 = 0.004;
/// The credit is never more than so many steps take: what has been gained is not there to be lost.
const CREDIT_STEPS: f64 = 8.0;
/// What may be lost before any time has passed, in steps: so that texts that end soon gain something too.
const FIRST_CREDIT: f64 = 0.4;
/// How much faster tokens must be expected to come.
const MARGIN: f64 = 1.03;
/// The same where tokens are read again: then few steps have one row for each sequence, and what they take is known less well.
const MARGIN_REREADING: f64 = 1.12;
/// What a row more is believed to take, of a step with one row for each sequence, before it was measured. Half of what two rows need from
/// the drive in the worst case, so that it is tried.
const ROW: f64 = 0.4;
/// What it is feared to take then: what is lost must not depend on the belief.
const WORST_ROW: f64 = 1.0;
/// Steps after which half of what was measured of a width is forgotten.
const HALF_LIFE: f64 = 256.0;
/// Of so many steps one is without proposals, to measure what these are compared with: where they gain much, and where little.
const PLAIN_EVERY: (u64, u64) = (32, 8);
/// How much faster tokens come where proposals gain much.
const MUCH: f64 = 1.25;
/// Observations that an average remembers.
const MEMORY: f64 = 24.0;

/// Who proposes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// The text itself, where the latest tokens occur earlier.
    Lookup,
    /// The model's prediction layer.
    Prediction,
}

/// What could be proposed to one sequence that takes part in a step.
#[derive(Clone, Copy, Debug)]
pub(super) struct Offer {
    pub(super) source: Source,
    /// Most proposals that there are, or that there is room for.
    pub(super) most: usize,
    /// Tokens that the prediction layer has to be given first.
    pub(super) waiting: usize,
    /// Whether a proposal that does not come true has the tokens of its step read again: recurrent states cannot give tokens back.
    pub(super) rereads: bool,
}

/// An average of the latest observations.
#[derive(Clone, Copy, Debug)]
struct Average {
    value: f64,
    count: f64,
    /// The step of the latest one.
    step: u64,
}

impl Average {
    fn of(value: f64, step: u64) -> Self {
        Average { value, count: 1.0, step }
    }

    /// What is believed before anything was observed, as if so many observations had said it.
    const fn belief(value: f64, count: f64) -> Self {
        Average { value, count, step: 0 }
    }

    /// Takes what was observed in a step. Times change, so that earlier ones count the less the older they are.
    fn add_time(&mut self, value: f64, step: u64) {
        self.count *= 0.5f64.powf(step.saturating_sub(self.step) as f64 / HALF_LIFE);
        self.add(value, step);
    }

    fn add(&mut self, value: f64, step: u64) {
        self.count = (self.count + 1.0).min(MEMORY);
        self.value += (value - self.value) / self.count;
        self.step = step;
    }
}

/// What has been learnt.
#[derive(Debug)]
pub(super) struct Worth {
    /// Seconds of a step, by sequences and rows.
    steps: BTreeMap<(usize, usize), Average>,
    /// How often a proposal comes true if those before it do, by source and place.
    comes_true: [[Average; DEEPEST]; 2],
    /// Seconds that the prediction layer takes for a proposal to each of the sequences, of the time of a step without proposals.
    predicting: Average,
    /// The same for each token that it has to be given before.
    catching_up: Average,
    /// How much faster tokens came with proposals.
    gain: Average,
    /// Seconds that may be lost.
    credit: f64,
    /// Steps so far, and those since the last one without proposals.
    step: u64,
    since_plain: u64,
}

impl Worth {
    pub(super) fn new() -> Self {
        let beliefs = |first: f64| [1.0, 0.9, 0.8, 0.7].map(|part| Average::belief(first * part, 4.0));
        Worth {
            steps: BTreeMap::new(),
            comes_true: [beliefs(0.35), beliefs(0.7)],
            predicting: Average::belief(0.05, 1.0),
            catching_up: Average::belief(0.01, 1.0),
            gain: Average::belief(1.0, 1.0),
            credit: 0.0,
            step: 0,
            since_plain: 0,
        }
    }

    /// How many proposals the sequences of the next step should have at most; those with `None` have none in any case.
    pub(super) fn depth(&self, offers: &[Option<Offer>]) -> usize {
        let Some(plain) = self.seconds(offers.len(), offers.len(), ROW).filter(|_| self.is_time()) else { return 0 };
        let tokens = |depth: usize| {
            offers.iter().map(|offer| 1.0 + offer.map_or(0.0, |offer| self.expected(offer, depth))).sum::<f64>()
        };
        let rows = |depth: usize| offers.iter().flatten().map(|offer| offer.most.min(depth)).sum::<usize>();
        let predicts = |offer: &&Offer| offer.source == Source::Prediction && offer.most > 0;
        let asked = || offers.iter().flatten().filter(predicts);
        let predicting =
            |depth: usize| if asked().next().is_some() { depth as f64 * self.predicting.value * plain } else { 0.0 };
        // What is read again is read by the next step, beside its own token. Where that happens, few steps have one row for each sequence, and
        // the others may seem faster only because steps have become faster since one was measured: no row makes a step faster.
        let rereads = offers.iter().flatten().any(|offer| offer.rereads);
        let again = |depth: usize| offers.iter().flatten().map(|offer| self.read_again(*offer, depth)).sum::<f64>();
        let seconds = |depth: usize, row: f64| {
            let step = |rows: usize| self.seconds(offers.len(), offers.len() + rows, row).unwrap_or(plain);
            let (step, next) = (step(rows(depth)), (step(1) - plain).max(0.0));
            step.max(if rereads { plain } else { 0.0 }) + again(depth) * next + predicting(depth)
        };
        let rate = |depth: usize| tokens(depth) / seconds(depth, ROW);
        let behind = asked().map(|offer| offer.waiting.saturating_sub(1)).max().unwrap_or(0) as f64;
        // What is expected to be lost if rows take what they are feared to take.
        let risk = |depth: usize| {
            seconds(depth, WORST_ROW) + behind * self.catching_up.value * plain
                - tokens(depth) / offers.len() as f64 * plain
        };
        let affordable = (1..=DEEPEST).filter(|&depth| risk(depth) <= self.credit);
        let best = affordable.map(|depth| (depth, rate(depth))).max_by(|a, b| a.1.total_cmp(&b.1));
        let is_known = self.steps.contains_key(&(offers.len(), offers.len() + 1));
        let margin = if is_known && rereads { MARGIN_REREADING } else { MARGIN };
        best.filter(|best| best.1 > margin * tokens(0) / plain).map_or(0, |best| best.0)
    }

    /// Whether the next step may have proposals: nothing is owed, and steps without have been measured lately.
    fn is_time(&self) -> bool {
        let every = if self.gain.value > MUCH { PLAIN_EVERY.0 } else { PLAIN_EVERY.1 };
        self.credit >= 0.0 && self.since_plain + 1 < every
    }

    /// A step of so many sequences took so long. `rows`: theirs together; `proposing`: seconds that went into proposals before it; `gained`:
    /// tokens more than one for each sequence.
    pub(super) fn record(&mut self, sequences: usize, rows: usize, seconds: f64, proposing: f64, gained: usize) {
        self.step += 1;
        let plain = self.seconds(sequences, sequences, ROW);
        let of_width = self.steps.entry((sequences, rows)).or_insert(Average { count: 0.0, ..Average::of(0.0, 0) });
        of_width.add_time(seconds, self.step);
        let Some(plain) = plain else {
            if rows == sequences && self.step == 1 {
                self.credit = FIRST_CREDIT * seconds;
            }
            return;
        };
        self.credit += CREDIT * seconds;
        if rows > sequences || proposing > 0.0 {
            self.since_plain += 1;
            let worth = (1.0 + gained as f64 / sequences as f64) * plain;
            self.gain.add_time(worth / (seconds + proposing), self.step);
            self.credit += worth - seconds - proposing;
        } else {
            self.since_plain = 0;
        }
        self.credit = self.credit.min(CREDIT_STEPS * plain);
    }

    /// Before a step of so many sequences, the prediction layer took so long for `proposals` proposals to those that it proposes to, before which
    /// it was given `waiting` tokens; both of one sequence at most.
    pub(super) fn record_predicting(&mut self, sequences: usize, (waiting, proposals): (usize, usize), seconds: f64) {
        let Some(plain) = self.seconds(sequences, sequences, ROW).filter(|_| proposals > 0) else { return };
        let (of_plain, behind) = (seconds / plain, waiting.saturating_sub(1) as f64);
        // A few tokens more than the latest one, which come of proposals that came true, belong to what proposals cost.
        if behind <= DEEPEST as f64 {
            self.predicting.add_time(of_plain / proposals as f64, self.step);
        } else {
            let rest = of_plain - proposals as f64 * self.predicting.value;
            self.catching_up.add_time(rest.max(0.0) / behind, self.step);
        }
    }

    /// Of `known` proposals whose places are taken by now, the first `right` came true.
    pub(super) fn judge(&mut self, source: Source, right: usize, known: usize) {
        for (place, average) in self.comes_true[source as usize].iter_mut().enumerate().take(known.min(right + 1)) {
            average.add(f64::from(u8::from(place < right)), self.step);
        }
    }

    /// Tokens that are expected to come of an offer beyond the first.
    fn expected(&self, offer: Offer, depth: usize) -> f64 {
        let places = self.comes_true[offer.source as usize].iter().take(offer.most.min(depth));
        let both = places.scan(1.0, |all, place| {
            *all *= place.value;
            Some(*all)
        });
        both.sum()
    }

    /// Tokens that are expected to be read again.
    fn read_again(&self, offer: Offer, depth: usize) -> f64 {
        if !offer.rereads {
            return 0.0;
        }
        // One that does not come true behind `place` others: those, and the token before them.
        let (mut all, mut again) = (1.0, 0.0);
        for (place, average) in self.comes_true[offer.source as usize].iter().enumerate().take(offer.most.min(depth)) {
            again += all * (1.0 - average.value) * (place + 1) as f64;
            all *= average.value;
        }
        again
    }

    /// What a step takes; `None` until one without proposals has been measured. Rows beyond what was measured are believed to take as much as
    /// those before them, and what is known of a width fades to what fewer rows make believe; where nothing is known, to `row` of a step.
    fn seconds(&self, sequences: usize, rows: usize, row: f64) -> Option<f64> {
        let plain = self.steps.get(&(sequences, sequences))?.value;
        let (mut seconds, mut row) = (plain, row * plain / sequences as f64);
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

    /// A machine and a text. Times are in steps of one row, at the beginning.
    #[derive(Clone, Copy, Debug)]
    struct Regime {
        source: Source,
        /// What a row more takes, of a step.
        row: f64,
        /// With what chance a proposal comes true, if those before it have.
        chance: f64,
        /// What a step takes once the program has run for long: caches fill, or contexts grow.
        later: f64,
        /// By how much the time of a step differs from step to step: bursts of misses.
        noise: f64,
        /// Whether the model has recurrent states.
        rereads: bool,
    }

    const STEADY: Regime =
        Regime { source: Source::Lookup, row: 0.3, chance: 0.5, later: 1.0, noise: 0.0, rereads: false };

    /// What the prediction layer takes for a proposal, and for a token that it has to catch up with.
    const PREDICTING: (f64, f64) = (0.06, 0.01);
    /// Most tokens that it has to catch up with.
    const WAITING: usize = 32;

    /// Numbers between 0 and 1 that look random and are always the same.
    struct Numbers(u64);

    impl Numbers {
        fn next(&mut self) -> f64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            (self.0 >> 11) as f64 / (1u64 << 53) as f64
        }
    }

    impl Regime {
        /// Seconds of a step of so many rows, after so many tokens.
        fn step(&self, rows: usize, tokens: usize) -> f64 {
            let drift = self.later + (1.0 - self.later) * (-(tokens as f64) / 300.0).exp();
            drift * (1.0 + self.row * (rows - 1) as f64)
        }

        /// Seconds of so many tokens, ÷ seconds without proposals.
        fn cost(&self, worth: &mut Worth, tokens: usize, seed: u64) -> f64 {
            let mut numbers = Numbers(seed | 1);
            let (mut seconds, mut done, mut waiting) = (0.0, 0, WAITING);
            while done < tokens {
                let offer = Offer { source: self.source, most: DEEPEST, waiting, rereads: self.rereads };
                let depth = worth.depth(&[Some(offer)]);
                let right = (0..DEEPEST).take_while(|_| numbers.next() < self.chance).count();
                let gained = right.min(depth);
                let noise = 1.0 + self.noise * (2.0 * numbers.next() - 1.0);
                let step = self.step(1 + depth, done);
                let proposing = if self.source == Source::Prediction && depth > 0 {
                    let (proposal, token) = PREDICTING;
                    let proposing = depth as f64 * proposal + (waiting - 1) as f64 * token;
                    worth.record_predicting(1, (waiting, depth), proposing);
                    waiting = 0;
                    proposing
                } else {
                    0.0
                };
                // What the text proposes is judged whether it was checked or not, as soon as the token in its place is there.
                let checked = if self.source == Source::Lookup { DEEPEST } else { depth };
                let known = (1 + gained).min(checked);
                worth.judge(self.source, right.min(known), known);
                worth.record(1, 1 + depth, noise * step, proposing, gained);
                // What it takes in the mean: luck is no gain.
                seconds += step + proposing;
                done += 1 + gained;
                waiting = (waiting + 1 + gained).min(WAITING);
                if self.rereads && gained < depth {
                    // The next step has the tokens of this one, and gives one token.
                    let step = self.step(2 + gained, done);
                    worth.record(1, 2 + gained, (1.0 + self.noise * (2.0 * numbers.next() - 1.0)) * step, 0.0, 0);
                    seconds += step;
                    done += 1;
                }
            }
            let without: f64 = (0..done).map(|token| self.step(1, token)).sum();
            seconds / without
        }

        /// The least cost of proposals that are always as many.
        fn best(&self) -> f64 {
            let of_depth = |depth: usize| {
                let tokens: f64 = (0..=depth).map(|place| self.chance.powi(place as i32)).sum();
                let proposing = if self.source == Source::Prediction { depth as f64 * PREDICTING.0 } else { 0.0 };
                let step = 1.0 + self.row * depth as f64 + proposing;
                if !self.rereads {
                    return step / tokens;
                }
                let wrong = |place: usize| self.chance.powi(place as i32) * (1.0 - self.chance);
                let again: f64 = (0..depth).map(|place| wrong(place) * (1.0 + self.row * (place + 1) as f64)).sum();
                let more: f64 = (0..depth).map(wrong).sum();
                (step + again) / (tokens + more)
            };
            (0..=DEEPEST).map(of_depth).fold(f64::INFINITY, f64::min)
        }

        /// The mean cost over some texts: the shorter they are, the more.
        fn mean(&self, tokens: usize) -> f64 {
            let texts = (4096 / tokens).max(1) as u64;
            let cost = |seed: u64| self.cost(&mut Worth::new(), tokens, seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            (1..=texts).map(cost).sum::<f64>() / texts as f64
        }
    }

    /// In memory, where the arithmetic limits, where both do, and from the drive; texts that never repeat themselves and such that are copied.
    fn regimes() -> impl Iterator<Item = Regime> {
        let sources = [Source::Lookup, Source::Prediction];
        let rows = [0.05, 0.3, 0.6, 0.85, 1.0];
        let chances = [0.0, 0.1, 0.3, 0.5, 0.7, 0.85, 0.97];
        let drifts = [(1.0, 0.0), (1.0, 0.4), (0.4, 0.2), (2.0, 0.2)];
        sources
            .into_iter()
            .flat_map(move |source| {
                rows.into_iter().flat_map(move |row| {
                    let drifting = move |chance| {
                        drifts.map(|(later, noise)| Regime { source, row, chance, later, noise, rereads: false })
                    };
                    chances.into_iter().flat_map(drifting)
                })
            })
            .flat_map(|regime| [regime, Regime { rereads: true, ..regime }])
    }

    #[test]
    fn proposals_never_lose() {
        for regime in regimes() {
            for (tokens, most) in [(256, 1.01), (2048, 1.006)] {
                let cost = regime.mean(tokens);
                assert!(cost < most, "{tokens} tokens: {cost} in {regime:?}");
            }
        }
    }

    #[test]
    fn what_can_be_gained_is_gained() {
        for regime in regimes() {
            let (cost, best) = (regime.mean(2048), regime.best());
            // Of what the best fixed number of proposals gains; while steps become faster, what they are compared with is measured too slow or
            // too seldom for more.
            if best < 0.8 {
                let seldom = regime.later < 1.0 || regime.rereads;
                let (part, least) = ((1.0 - cost) / (1.0 - best), if seldom { 0.25 } else { 0.5 });
                assert!(part > least, "{part} of {best} in {regime:?}");
            }
        }
        let copying = Regime { row: 0.1, chance: 0.95, ..STEADY }.mean(256);
        assert!(copying < 0.5, "{copying}");
    }

    #[test]
    fn what_is_learnt_follows_the_text() {
        let mut worth = Worth::new();
        for seed in 1..4 {
            assert!(Regime { row: 0.2, chance: 0.95, ..STEADY }.cost(&mut worth, 2_000, seed) < 0.6);
            // What was gained before is not there to be lost.
            let prose = Regime { row: 0.2, chance: 0.0, ..STEADY }.cost(&mut worth, 2_000, seed);
            assert!(prose < 1.01, "{prose}");
        }
    }

    #[test]
    fn nothing_is_proposed_before_a_step_was_measured() {
        let offer = Some(Offer { source: Source::Lookup, most: DEEPEST, waiting: 0, rereads: false });
        let mut worth = Worth::new();
        assert_eq!(worth.depth(&[offer]), 0);
        worth.record(1, 1, 1.0, 0.0, 0);
        assert_eq!(worth.depth(&[offer]), 0, "what may be lost is more than the credit");
        // Two have come true that nobody checked.
        (0..3).for_each(|_| worth.judge(Source::Lookup, 1, 1));
        assert!(worth.depth(&[offer]) > 0);
        assert_eq!((worth.depth(&[offer, offer]), worth.depth(&[None])), (0, 0));
    }

    #[test]
    fn a_layer_that_is_far_behind_must_be_worth_that_too() {
        let offer = |waiting| [Some(Offer { source: Source::Prediction, most: DEEPEST, waiting, rereads: false })];
        let mut worth = Worth::new();
        worth.record(1, 1, 1.0, 0.0, 0);
        assert!(worth.depth(&offer(1)) > 0);
        assert_eq!(worth.depth(&offer(WAITING)), 0);
        (0..100).for_each(|_| worth.record(1, 1, 1.0, 0.0, 0));
        assert!(worth.depth(&offer(WAITING)) > 0);
        // It took half a step for each: no credit pays that.
        worth.record_predicting(1, (WAITING, 1), 15.0);
        worth.record_predicting(1, (WAITING, 1), 15.0);
        assert_eq!(worth.depth(&offer(WAITING)), 0);
    }
}
