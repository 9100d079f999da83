//! The outputs of the experts of a pass, and their sum for each row.
//!
//! Outputs are computed before it is known whether the bytes of their expert are right, because the threads that multiply also
//! compute the checksum. Such an output is [`Unsettled`]. Only [`Settled`] outputs are summed. There are two ways to get one: from
//! an unsettled output, by comparing the checksum with the table's, or from an expert that has been settled already. So this
//! compiles,
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
//! but this, which forgets to settle, does not, and neither does inventing a settled output:
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
//!     Settled { expert: 0, values }
//! }
//! ```

use sluice_checksum::xxh3_64;
use sluice_storage::pool::{self, Damaged};

use super::compute::{Compute, sized};
use super::router::Choice;
use super::tally::{Tallied, Tally};

/// Columns whose sums over the experts are formed together.
const COLUMNS_TOGETHER: usize = 32;

/// One use of an expert: the row, and which of the row's choices it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Use {
    /// The expert within its layer.
    pub expert: u32,
    /// The row of the pass.
    pub row: u32,
    /// Place of the choice among those of all rows.
    pub choice: u32,
}

/// How the outputs of a row's experts are summed. Both ways give the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Combining {
    /// Experts are computed as they arrive; every output is kept, and all are summed at the end. Nothing waits for a particular
    /// expert.
    Kept,
    /// Experts are computed in ascending order and added at once: memory does not grow with the number of choices.
    InOrder,
}

/// The output `[its rows, hidden]` of an expert, computed from bytes that have not been verified.
#[derive(Debug)]
pub struct Unsettled<'a> {
    expert: u32,
    /// The xxh3-64 of the bytes, if it was computed.
    sum: Option<u64>,
    values: &'a [f32],
}

impl<'a> Unsettled<'a> {
    /// Lets `compute` make `values` from the bytes of an expert and tally them; `None` if it reports that it has not done all of
    /// it.
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

    /// The output of an expert that was computed while it was being read.
    pub(super) fn of_parts(expert: u32, sum: Option<u64>, values: &'a [f32]) -> Self {
        Unsettled { expert, sum, values }
    }

    /// Compares the checksum of the bytes that this was computed from with the table's. The expert is released.
    ///
    /// # Errors
    /// [`Damaged`]: the bytes are wrong. The expert is handed out a second time.
    ///
    /// # Panics
    /// If this is the output of another expert.
    pub fn settle(self, expert: pool::Unsettled<'_>) -> Result<Settled<'a>, Damaged> {
        let sum = self.sum.unwrap_or_else(|| xxh3_64(expert.bytes()));
        expert.settle(sum).map(|expert| self.settled_by(&expert))
    }

    /// The settled output, for an expert that has been settled since.
    ///
    /// # Panics
    /// If this is the output of another expert.
    pub fn settled_by(self, expert: &pool::Expert<'_>) -> Settled<'a> {
        assert_eq!(self.expert, expert.expert(), "the output of another expert");
        Settled { expert: self.expert, values: self.values }
    }
}

/// The output `[its rows, hidden]` of an expert, computed from verified bytes.
#[derive(Debug)]
pub struct Settled<'a> {
    expert: u32,
    values: &'a [f32],
}

impl<'a> Settled<'a> {
    /// Lets `compute` make `values` from the bytes of an expert.
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
    /// Whether weights multiplied the inputs of experts, so that they do not multiply the outputs.
    weighted_input: bool,
    /// [`Combining::Kept`]: every expert's output, `[rows, top_k, hidden]`; [`Combining::InOrder`]: the sums so far, `[rows,
    /// hidden]`.
    values: Vec<f32>,
    /// Choices whose output has been added.
    added: usize,
}

impl Outputs {
    /// Empty; it grows to the size that the first pass needs.
    pub(super) fn new(most_kept: u64) -> Self {
        Outputs {
            combining: Combining::Kept,
            most_kept,
            hidden: 0,
            weighted_input: false,
            values: Vec::new(),
            added: 0,
        }
    }

    /// Bytes of outputs that may be kept.
    pub(super) fn most_kept(&self) -> u64 {
        self.most_kept
    }

    /// Changes how many bytes of outputs may be kept, from the next pass on.
    pub(super) fn keep_at_most(&mut self, bytes: u64) {
        self.most_kept = bytes;
    }

    /// How outputs of `bytes` will be combined: they are kept if there is room, because then nothing has to wait.
    pub(super) fn combine(&mut self, bytes: u64) -> Combining {
        self.combining = if bytes <= self.most_kept { Combining::Kept } else { Combining::InOrder };
        self.combining
    }

    pub(super) fn combining(&self) -> Combining {
        self.combining
    }

    /// Forgets the last pass. `weighted_input`: outputs are added without weights.
    pub(super) fn begin(&mut self, rows: usize, top_k: usize, hidden: usize, weighted_input: bool) {
        (self.hidden, self.added, self.weighted_input) = (hidden, 0, weighted_input);
        match self.combining {
            Combining::Kept => _ = sized(&mut self.values, rows * top_k * hidden),
            Combining::InOrder => sized(&mut self.values, rows * hidden).fill(0.0),
        }
    }

    /// The factor of a choice's output.
    fn weight(&self, choice: Choice) -> f32 {
        if self.weighted_input { 1.0 } else { choice.weight }
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
                    let weight = self.weight(choices[used.choice as usize]);
                    // The operations are those of the other way, one by one: a fused multiply-add would give different bits.
                    let sums = &mut self.values[used.row as usize * hidden..][..hidden];
                    sums.iter_mut().zip(row).for_each(|(sum, o)| *sum += weight * o);
                }
            }
        }
    }

    /// Adds the weighted outputs in ascending order of expert to `out` `[rows, hidden]`, which holds the dense part's output.
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
                // Some columns at a time, so that their sums stay in registers and compilers turn the loops into vector instructions.
                for (columns, out) in out.chunks_mut(COLUMNS_TOGETHER).enumerate() {
                    let mut sums = [0.0; COLUMNS_TOGETHER];
                    for (choice, row) in choices.iter().zip(rows.chunks_exact(hidden)) {
                        let (weight, row) = (self.weight(*choice), &row[columns * COLUMNS_TOGETHER..][..out.len()]);
                        sums.iter_mut().zip(row).for_each(|(sum, o)| *sum += weight * o);
                    }
                    out.iter_mut().zip(&sums).for_each(|(out, sum)| *out += sum);
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use sluice_kernels::{Kernels, Precision, ThreadPool};
    use sluice_storage::io::{
        DataFile, DirectMode, EngineKind, IoConfig, PAGE_BYTES, ReadError, Scheduler, open_engine,
    };
    use sluice_storage::pool::{Arrival, ExpertDirectory, ExtentLocation, PolicyKind, Pool, PoolError, Routing};

    use super::*;

    const HIDDEN: usize = 3;

    /// A pool of experts of one layer, whose bytes are their numbers plus one. The checksum of `damaged` in the table is wrong.
    fn pool(file: &tempfile::NamedTempFile, experts: u8, damaged: Option<u8>) -> Pool {
        let extent = |id: u8| vec![id + 1; 2 * PAGE_BYTES];
        std::fs::write(file.path(), (0..experts).flat_map(extent).collect::<Vec<u8>>()).unwrap();
        let locate = |id: u8| ExtentLocation {
            file: 0,
            offset: u64::from(id) * 2 * PAGE_BYTES as u64,
            len: 2 * PAGE_BYTES as u64,
            checksum: xxh3_64(&extent(id)) ^ u64::from(damaged == Some(id)),
            packed: None,
            stripes: None,
        };
        let directory = ExpertDirectory::new(&[(0..experts).map(locate).collect()]).unwrap();
        let arena = Pool::reserve(&directory, &directory.uniform_slots(experts.into())).unwrap();
        let (config, data) = (IoConfig::default(), DataFile::open(file.path(), DirectMode::Never).unwrap());
        let engine = open_engine(EngineKind::Pread, vec![data], &[arena.region()], &config).unwrap();
        let io = Arc::new(Scheduler::start(engine, config).unwrap());
        let policy = PolicyKind::Lru.build(directory.shape()).unwrap();
        let staging = Pool::reserve_staging(&directory, 0).unwrap();
        Pool::new(io, arena, staging, directory, policy)
    }

    /// Two rows that use every expert with weight 1, and one pass over them. An expert's output is its first byte.
    fn sum(pool: &mut Pool, experts: u8, combining: Combining) -> Result<Vec<f32>, PoolError> {
        let kernels = Kernels::detect().unwrap();
        let compute = Compute::new(kernels, ThreadPool::new(2).into(), Precision::Exact);
        let top_k = usize::from(experts);
        let choices: Vec<Choice> = (0..2 * u32::from(experts))
            .map(|choice| Choice { expert: choice % u32::from(experts), weight: 1.0 })
            .collect();
        let mut uses: Vec<Use> = (0..)
            .zip(&choices)
            .map(|(choice, c)| Use { expert: c.expert, row: choice / u32::from(experts), choice })
            .collect();
        uses.sort_unstable();
        let ids: Vec<u32> = (0..experts.into()).collect();
        let (mut outputs, mut tally, mut values) = (Outputs::new(0), Tally::default(), vec![0.0; 2 * HIDDEN]);
        outputs.combining = combining;
        outputs.begin(2, top_k, HIDDEN, false);
        let in_order = combining == Combining::InOrder;
        let mut pass = pool.begin_layer(0, &ids, &Routing { tokens: 2, prefill: true, in_order, choices: &choices })?;
        while let Some(arrival) = pass.arrival(None)? {
            let output = match arrival {
                Arrival::Settled(expert) => {
                    Ok(Settled::compute(&expert, &mut values, |bytes, out| out.fill(f32::from(bytes[0]))))
                }
                Arrival::Unsettled(expert) => {
                    let output = Unsettled::compute(&expert, &mut tally, &mut values, |extent, out| {
                        extent.add(0..extent.bytes.len());
                        out.fill(f32::from(extent.bytes[0]));
                        true
                    });
                    output.expect("complete").settle(expert)
                }
                Arrival::Part(_) => unreachable!("parts were not asked for"),
            };
            if let Ok(output) = output {
                let expert = output.expert;
                let own: Vec<Use> = uses.iter().copied().filter(|used| used.expert == expert).collect();
                outputs.add(output, &own, &choices);
            }
        }
        drop(pass);
        let mut out = vec![0.5; 2 * HIDDEN];
        outputs.sum(&compute, &choices, &mut out);
        Ok(out)
    }

    #[test]
    fn verified_outputs_are_added_whether_they_are_kept_or_not() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut pool = pool(&file, 4, None);
        // First read and then settled, then settled before it is used.
        for combining in [Combining::Kept, Combining::InOrder, Combining::Kept] {
            assert_eq!(sum(&mut pool, 4, combining).unwrap(), [10.5; 2 * HIDDEN]);
        }
    }

    #[test]
    fn what_was_made_of_a_damaged_expert_is_never_added() {
        for combining in [Combining::Kept, Combining::InOrder] {
            let file = tempfile::NamedTempFile::new().unwrap();
            let mut pool = pool(&file, 4, Some(2));
            match sum(&mut pool, 4, combining) {
                Err(PoolError::Read(error @ ReadError::Checksum { .. })) => {
                    assert!(error.to_string().contains("layer 0 expert 2"), "{error}");
                }
                other => panic!("not named: {other:?}"),
            }
        }
    }

    #[test]
    #[should_panic(expected = "outputs are missing")]
    fn a_sum_without_one_of_its_outputs_is_a_panic() {
        let kernels = Kernels::detect().unwrap();
        let compute = Compute::new(kernels, ThreadPool::new(1).into(), Precision::Exact);
        let mut outputs = Outputs::new(u64::MAX);
        outputs.begin(1, 1, HIDDEN, false);
        outputs.sum(&compute, &[Choice { expert: 0, weight: 1.0 }], &mut [0.0; HIDDEN]);
    }
}
