//! What the experts of a pass give, and its sum for each row.
//!
//! Outputs are computed before anyone knows whether the bytes of their expert are right, because the threads that multiply form
//! the checksum as well. Such an output is [`Unsettled`]. What is summed is [`Settled`], and there are two ways to that: out of an
//! unsettled one, by comparing the checksum with the table's, or out of an expert that has been settled before. So this compiles,
//!
//! ```
//! use sluice_model::outputs::{Outputs, Settled, Unsettled, Use};
//! use sluice_model::router::Choice;
//! use sluice_storage::pool;
//!
//! fn arrived(sums: &mut Outputs, uses: &[Use], choices: &[Choice], output: Unsettled<'_>, expert: pool::Unsettled<'_>) {
//!     if let Ok(output) = output.settle(expert) {
//!         sums.add(output, uses, choices);
//!     }
//! }
//! ```
//!
//! and this, which forgets to settle, does not, nor does a settled output that is made up:
//!
//! ```compile_fail,E0308
//! # use sluice_model::outputs::{Outputs, Settled, Unsettled, Use};
//! # use sluice_model::router::Choice;
//! # use sluice_storage::pool;
//! fn arrived(sums: &mut Outputs, uses: &[Use], choices: &[Choice], output: Unsettled<'_>, expert: pool::Unsettled<'_>) {
//!     sums.add(output, uses, choices);
//! }
//! ```
//!
//! ```compile_fail,E0451
//! # use sluice_model::outputs::Settled;
//! fn made_up(values: &[f32]) -> Settled<'_> {
//!     Settled { values }
//! }
//! ```

use sluice_checksum::xxh3_64;
use sluice_storage::pool::{self, Damaged};

use super::compute::{Compute, sized};
use super::router::Choice;
use super::tally::{Tallied, Tally};

/// One use of an expert: which row, and which of its choices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Use {
    /// The expert within its layer.
    pub expert: u32,
    /// The row of the pass.
    pub row: u32,
    /// Place of the choice among those of all rows.
    pub choice: u32,
}

/// How the outputs of a row's experts become their sum. The bits are the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Combining {
    /// Experts come as they arrive; every output is kept, and summed in the end. Nothing waits for a particular expert.
    Kept,
    /// Experts come in ascending order and are added at once: memory does not grow with the number of choices.
    InOrder,
}

/// The output `[its rows, hidden]` of an expert, made of bytes that nobody has verified.
#[derive(Debug)]
pub struct Unsettled<'a> {
    expert: u32,
    /// The xxh3-64 of the bytes, unless it was not formed.
    sum: Option<u64>,
    values: &'a [f32],
}

impl<'a> Unsettled<'a> {
    /// Lets `compute` make `values` of the bytes of an expert and tally them; `None` if it says that it has not done all of it.
    pub(super) fn compute(
        expert: &pool::Unsettled<'_>,
        tally: &mut Tally,
        values: &'a mut [f32],
        compute: impl FnOnce(Tallied<'_>, &mut [f32]) -> bool,
    ) -> Option<Self> {
        let tally = tally.begin(expert.bytes().len());
        let complete = compute(Tallied { bytes: expert.bytes(), tally: Some(tally) }, values);
        complete.then(|| Unsettled { expert: expert.expert(), sum: Some(tally.checksum()), values })
    }

    /// What was made of an expert while it was being read.
    pub(super) fn of_parts(expert: u32, sum: Option<u64>, values: &'a [f32]) -> Self {
        Unsettled { expert, sum, values }
    }

    /// Compares the checksum of the bytes that this was made of with the table's. The expert is released.
    ///
    /// # Errors
    /// [`Damaged`]: the bytes are others. The expert comes once more.
    ///
    /// # Panics
    /// If this is the output of another expert.
    pub fn settle(self, expert: pool::Unsettled<'_>) -> Result<Settled<'a>, Damaged> {
        let sum = self.sum.unwrap_or_else(|| xxh3_64(expert.bytes()));
        expert.settle(sum).map(|expert| self.settled_by(&expert))
    }

    /// For an expert that has been settled since.
    ///
    /// # Panics
    /// If this is the output of another expert.
    pub fn settled_by(self, expert: &pool::Expert<'_>) -> Settled<'a> {
        assert_eq!(self.expert, expert.expert(), "the output of another expert");
        Settled { expert: self.expert, values: self.values }
    }
}

/// The output `[its rows, hidden]` of an expert, made of the bytes that the file's table promises.
#[derive(Debug)]
pub struct Settled<'a> {
    expert: u32,
    values: &'a [f32],
}

impl<'a> Settled<'a> {
    /// Lets `compute` make `values` of the bytes of an expert.
    pub(super) fn compute(
        expert: &pool::Expert<'_>,
        values: &'a mut [f32],
        compute: impl FnOnce(&[u8], &mut [f32]),
    ) -> Self {
        compute(expert.bytes(), values);
        Settled { expert: expert.expert(), values }
    }
}

/// The outputs of a pass.
#[derive(Debug)]
pub struct Outputs {
    combining: Combining,
    /// Bytes of outputs that may be kept.
    most_kept: u64,
    hidden: usize,
    /// [`Combining::Kept`]: every expert's output, `[rows, top_k, hidden]`; [`Combining::InOrder`]: the sums so far, `[rows,
    /// hidden]`.
    values: Vec<f32>,
    /// Choices whose output has come.
    added: usize,
}

impl Outputs {
    /// Empty; grows to what the first pass needs.
    pub(super) fn new(most_kept: u64) -> Self {
        Outputs { combining: Combining::Kept, most_kept, hidden: 0, values: Vec::new(), added: 0 }
    }

    /// Bytes of outputs that may be kept.
    pub(super) fn most_kept(&self) -> u64 {
        self.most_kept
    }

    /// How outputs of `bytes` are to be combined: kept as long as there is room, because nothing has to wait then.
    pub(super) fn combine(&mut self, bytes: u64) -> Combining {
        self.combining = if bytes <= self.most_kept { Combining::Kept } else { Combining::InOrder };
        self.combining
    }

    pub(super) fn combining(&self) -> Combining {
        self.combining
    }

    /// Forgets the last pass.
    pub(super) fn begin(&mut self, rows: usize, top_k: usize, hidden: usize) {
        (self.hidden, self.added) = (hidden, 0);
        match self.combining {
            Combining::Kept => _ = sized(&mut self.values, rows * top_k * hidden),
            Combining::InOrder => sized(&mut self.values, rows * hidden).fill(0.0),
        }
    }

    /// Takes the output of an expert. `uses`: those of this expert, in the order of its rows; `choices` `[rows, top_k]`.
    ///
    /// # Panics
    /// If these are the uses of another expert.
    pub fn add(&mut self, output: Settled<'_>, uses: &[Use], choices: &[Choice]) {
        let hidden = self.hidden;
        self.added += uses.len();
        for (used, row) in uses.iter().zip(output.values.chunks_exact(hidden)) {
            assert_eq!(used.expert, output.expert, "the uses of another expert");
            match self.combining {
                Combining::Kept => self.values[used.choice as usize * hidden..][..hidden].copy_from_slice(row),
                Combining::InOrder => {
                    let weight = choices[used.choice as usize].weight;
                    // The operations of the other way, one by one: a fused multiply-add would give other bits.
                    let sums = &mut self.values[used.row as usize * hidden..][..hidden];
                    sums.iter_mut().zip(row).for_each(|(sum, o)| *sum += weight * o);
                }
            }
        }
    }

    /// Adds the weighted outputs in ascending order of expert to `out` `[rows, hidden]`, which holds the dense part.
    ///
    /// # Panics
    /// If the output of a choice is missing.
    pub(super) fn sum(&self, compute: &Compute, choices: &[Choice], out: &mut [f32]) {
        assert_eq!(self.added, choices.len(), "outputs are missing");
        let hidden = self.hidden;
        let top_k = choices.len() / (out.len() / hidden);
        compute.threads.for_each_piece(out, hidden, &|row, out| match self.combining {
            Combining::InOrder => {
                let sums = &self.values[row * hidden..][..hidden];
                out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum);
            }
            Combining::Kept => {
                let choices = &choices[row * top_k..][..top_k];
                let rows = &self.values[row * top_k * hidden..][..top_k * hidden];
                for (i, out) in out.iter_mut().enumerate() {
                    let sum = choices.iter().enumerate().fold(0.0, |sum, (j, c)| sum + c.weight * rows[j * hidden + i]);
                    *out += sum;
                }
            }
        });
    }
}
