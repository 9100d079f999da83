//! One extent: reads its tensors in bounded blocks of rows, converts them to the file's layout, and writes them front to back.

use rayon::prelude::*;
use sluice_format::sectors::{SectorId, Sectors};
use sluice_format::{
    BLOCK, ExtentKind, ExtentRecord, ExtentWriter, Layout, MatrixKey, ROW_GROUP, WeightType, Written, order_len,
};
use sluice_kernels as kernels;

use crate::contents::Contents;
use crate::encoding::{Decoder, Groups, Reader, Rows, Selection};
use crate::error::ConvertError;
use crate::fp8::{self, SCALE_BLOCK};
use crate::layer_file::one_row;
use crate::measure::{Guide, Inputs};
use crate::plan::{Plan, TensorPlan};

/// Elements in memory at once, per thread and tensor. Fixed, because the sums of errors depend on the order of blocks.
const BLOCK_ELEMENTS: usize = 1 << 20;

/// The largest magnitude of `q8`: half a step beyond the last one of the largest f16 scale.
const Q8_LARGEST: f32 = 127.5 * 65504.0;

/// Squared error and squared magnitude, summed over the elements of a tensor.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct ErrorSums {
    pub(crate) error: f64,
    pub(crate) magnitude: f64,
    /// Blocks that became zero although their weights are not zero, because f16 has no scale that small.
    pub(crate) vanished: u64,
}

/// What is known about a written extent; the journal keeps it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Outcome {
    /// Index of the extent.
    pub(crate) extent: usize,
    /// Its place and form in the file.
    pub(crate) written: Written,
    /// xxh3-128 of its source bytes.
    pub(crate) source_digest: u128,
    /// Their number.
    pub(crate) source_bytes: u64,
    /// Per tensor of the extent.
    pub(crate) errors: Vec<ErrorSums>,
}

/// The state of one thread: buffers that are reused from extent to extent.
pub(crate) struct Packer<'a> {
    plan: &'a Plan,
    reader: Reader<'a>,
    values: Vec<f32>,
    packed: Vec<u8>,
}

/// An open source of a tensor.
struct Opened<'a> {
    source: &'a Selection,
    decoder: Box<dyn Decoder + 'a>,
    /// Whether its codes are stored unchanged.
    carries: bool,
}

/// A tensor that is being packed: its plan, its sources, and its errors.
struct Job<'a> {
    tensor: &'a TensorPlan,
    sources: Vec<Opened<'a>>,
    /// How to round, by index in the batch; empty if nothing is known or the type does not use it.
    guides: Vec<Guide>,
    sums: ErrorSums,
}

impl<'a> Packer<'a> {
    pub(crate) fn new(plan: &'a Plan, contents: &'a Contents<'a>) -> Self {
        let reader = Reader::new(&plan.checkpoint, contents);
        Packer { plan, reader, values: Vec::new(), packed: Vec::new() }
    }

    /// Digest and number of the source bytes of an extent, read as in [`Packer::extent`] but without packing.
    pub(crate) fn source_digest(&mut self, extent: usize) -> Result<(u128, u64), ConvertError> {
        let plan = self.plan;
        for tensor in &plan.extents[extent] {
            let sources = self.open(tensor)?;
            for rows in blocks(tensor) {
                for source in &sources {
                    let rows = rows_of(plan, tensor, source.source, rows);
                    source.decoder.skim(rows, source.carries, &mut self.reader)?;
                }
            }
        }
        Ok(self.reader.take_digest())
    }

    /// Opens the sources of a tensor.
    fn open(&mut self, tensor: &'a TensorPlan) -> Result<Vec<Opened<'a>>, ConvertError> {
        let open = |source: &'a Selection| {
            // If the order of columns is stored, codes are carried.
            let carries = source.carrier(tensor.shape) == Some(tensor.weight_type)
                && (tensor.layout.is_ordered() || source.order().is_none());
            Ok(Opened { source, decoder: source.open(&mut self.reader)?, carries })
        };
        tensor.sources.iter().map(open).collect()
    }

    /// Discards what was read for an extent that failed.
    pub(crate) fn reset(&mut self) {
        self.reader.take_digest();
    }

    /// Writes the extent with index `extent`, and reports the bytes as they are written. `inputs`: the measurements of its layer.
    pub(crate) fn extent(
        &mut self,
        extent: usize,
        inputs: Option<&dyn Inputs>,
        mut writer: ExtentWriter<'_>,
        written: &dyn Fn(u64),
    ) -> Result<Outcome, ConvertError> {
        let mut errors = Vec::new();
        let mut reported = 0;
        let plan = self.plan;
        let record = &plan.layout.extents()[extent];
        for tensor in &plan.extents[extent] {
            let guides = guides(plan, inputs, record, tensor);
            let place = (record.layer, record.index);
            errors.push(self.tensor(tensor, place, guides, &mut writer, &mut |bytes| {
                written(bytes);
                reported += bytes;
            })?);
        }
        let became = writer.finish()?;
        // Padding is reported at the end of the extent, so that the sum is the whole file.
        written(record.stored_len - reported);
        let (source_digest, source_bytes) = self.reader.take_digest();
        Ok(Outcome { extent, written: became, source_digest, source_bytes, errors })
    }

    /// Writes the tensors of an extent of a layer that will be executed. `place`: layer and index of the extent there.
    pub(crate) fn reading(
        &mut self,
        tensors: &'a [TensorPlan],
        place: (u32, u32),
        writer: &mut ExtentWriter<'_>,
    ) -> Result<(), ConvertError> {
        for tensor in tensors {
            self.tensor(tensor, place, Vec::new(), writer, &mut |_| ())?;
        }
        self.reset();
        Ok(())
    }

    /// Passes the rows of a tensor from one source to `sink`, with their places in `rows`.
    pub(crate) fn rows(
        &mut self,
        tensor: &'a TensorPlan,
        rows: impl Iterator<Item = usize>,
        mut sink: impl FnMut(usize, &[f32]),
    ) -> Result<(), ConvertError> {
        let sources = self.open(tensor)?;
        for (number, row) in rows.enumerate() {
            self.values(&sources[0], one_row(row, tensor.shape[2]))?;
            sink(number, &self.values);
        }
        self.reset();
        Ok(())
    }

    fn tensor(
        &mut self,
        tensor: &'a TensorPlan,
        (layer, part): (u32, u32),
        guides: Vec<Guide>,
        writer: &mut ExtentWriter<'_>,
        written: &mut dyn FnMut(u64),
    ) -> Result<ErrorSums, ConvertError> {
        let gap = tensor.offset - writer.position();
        writer.write(&vec![0; gap as usize])?;
        let sources = self.open(tensor)?;
        if tensor.layout.is_ordered() {
            let order = column_order(&sources, tensor.shape[2]);
            writer.write(&order)?;
            written(order.len() as u64);
        }
        let mut job = Job { tensor, sources, guides, sums: ErrorSums::default() };
        for rows in blocks(tensor) {
            self.packed.clear();
            match tensor.layout {
                Layout::Plain => self.plain(&mut job, rows)?,
                Layout::Sectors => self.sectors(&mut job, rows, SectorId { layer, part, sector: 0 })?,
                _ => self.tiled(&mut job, rows)?,
            }
            writer.write(&self.packed)?;
            written(self.packed.len() as u64);
        }
        Ok(job.sums)
    }

    /// A block of a row-major tensor: a vector, or part of the embedding.
    fn plain(&mut self, job: &mut Job<'_>, rows: Rows) -> Result<(), ConvertError> {
        for number in 0..job.sources.len() {
            let rows = rows_of(self.plan, job.tensor, job.sources[number].source, rows);
            self.plain_source(job, number, rows)?;
        }
        Ok(())
    }

    /// Rows of a table, in sectors; all sectors but the last are full. `first`: the first sector of the table's part.
    fn sectors(&mut self, job: &mut Job<'_>, rows: Rows, first: SectorId) -> Result<(), ConvertError> {
        self.plain(job, rows)?;
        let sectors = sectors_of(job.tensor);
        let numbers = std::mem::take(&mut self.packed);
        self.packed.resize(sectors.bytes(rows.count).expect("the plan computed the tensor's length from it"), 0);
        let full = numbers.chunks(sectors.rows * sectors.row_len);
        let pieces: Vec<(&mut [u8], &[u8])> = self.packed.chunks_exact_mut(sectors.len).zip(full).collect();
        let before = rows.first / sectors.rows;
        pieces.into_par_iter().enumerate().for_each(|(number, (sector, rows))| {
            // An extent has at most MAX_EXTENT_BYTES, so 32 bits are enough.
            sectors.seal(SectorId { sector: (before + number) as u32, ..first }, rows, sector);
        });
        Ok(())
    }

    /// The contribution of one source to such a block.
    fn plain_source(&mut self, job: &mut Job<'_>, number: usize, rows: Rows) -> Result<(), ConvertError> {
        let ty = job.tensor.weight_type;
        if job.sources[number].carries {
            return job.sources[number].decoder.carry_plain(rows, &mut self.reader, &mut self.packed);
        }
        self.values(&job.sources[number], rows)?;
        match ty {
            WeightType::F32 => self.packed.extend(self.values.iter().flat_map(|v| v.to_le_bytes())),
            WeightType::Bf16 => {
                for &value in &self.values {
                    let bits = kernels::f32_to_bf16(value);
                    job.sums.add(value, kernels::bf16_to_f32(bits));
                    self.packed.extend(bits.to_le_bytes());
                }
            }
            other => unreachable!("the plan stores nothing plain as {other}"),
        }
        self.check_sums(job, job.sources[number].source)
    }

    /// Reads rows of a source into `values`, and checks that all are finite.
    fn values(&mut self, opened: &Opened<'_>, rows: Rows) -> Result<(), ConvertError> {
        let values = &mut self.values;
        opened.decoder.values(rows, &mut self.reader, values)?;
        if opened.source.plus_one {
            values.iter_mut().for_each(|v| *v += 1.0);
        }
        if values.iter().all(|v| v.is_finite()) { Ok(()) } else { Err(self.reader.not_finite(opened.source.tensor)) }
    }

    /// A block of whole row groups; the groups of a pair alternate.
    fn tiled(&mut self, job: &mut Job<'_>, rows: Rows) -> Result<(), ConvertError> {
        let step = job.sources.len();
        let group_len = group_len(job.tensor.weight_type, rows.cols);
        self.packed.resize(group_len * rows.count.div_ceil(ROW_GROUP) * step, 0);
        for first in 0..step {
            if job.sources[first].carries {
                let groups = Groups { packed: &mut self.packed, group_len, first, step };
                job.sources[first].decoder.carry(rows, &mut self.reader, groups)?;
            } else {
                self.convert(job, first, rows, group_len)?;
            }
        }
        Ok(())
    }

    /// Everything that is converted through f32. All idle threads pack pieces of rows.
    fn convert(&mut self, job: &mut Job<'_>, first: usize, rows: Rows, group_len: usize) -> Result<(), ConvertError> {
        let (source, ty) = (job.sources[first].source, job.tensor.weight_type);
        self.values(&job.sources[first], rows)?;
        let (step, height) = (job.sources.len(), piece_rows(ty));
        let guide = job.guides.get(rows.first / job.tensor.shape[1]).unwrap_or(&Guide::Nothing);
        let values = self.values.chunks(height * rows.cols);
        let packed = self.packed.chunks_mut(height / ROW_GROUP * step * group_len);
        let pieces: Vec<(&[f32], &mut [u8])> = values.zip(packed).collect();
        let pack = |scratch: &mut kernels::FeedbackScratch, (values, packed): (&[f32], &mut [u8])| {
            pack_piece(ty, values, rows.cols, guide, Groups { packed, group_len, first, step }, scratch)
        };
        let sums: Vec<ErrorSums> = pieces.into_par_iter().map_init(Default::default, pack).collect();
        sums.iter().for_each(|sums| job.sums.join(sums));
        if ty == WeightType::Q8 && self.values.iter().any(|v| v.abs() > Q8_LARGEST) {
            return Err(self.too_large(job, source));
        }
        self.check_sums(job, source)
    }

    /// Checks that what was finite in the source is finite in the file.
    fn check_sums(&self, job: &Job<'_>, source: &Selection) -> Result<(), ConvertError> {
        if job.sums.error.is_finite() { Ok(()) } else { Err(self.too_large(job, source)) }
    }

    fn too_large(&self, job: &Job<'_>, source: &Selection) -> ConvertError {
        let tensor = self.plan.checkpoint.tensors[source.tensor].name.clone();
        ConvertError::TooLarge { tensor, weight_type: job.tensor.weight_type }
    }
}

/// The part of a source in a block of `rows`. For a vector of several tensors, each source gives all its elements, one after the
/// other.
fn rows_of(plan: &Plan, tensor: &TensorPlan, source: &Selection, rows: Rows) -> Rows {
    if tensor.layout != Layout::Plain || tensor.sources.len() == 1 {
        return rows;
    }
    one_row(0, plan.checkpoint.tensors[source.tensor].shape.iter().product())
}

/// Rows that one thread packs at once: in `fp8` that many share a scale, and multiples of 48 are best for error feedback.
fn piece_rows(ty: WeightType) -> usize {
    if ty == WeightType::Fp8 { SCALE_BLOCK } else { 48 }
}

/// Packs some rows of a matrix, and returns how much they have changed.
fn pack_piece(
    ty: WeightType,
    values: &[f32],
    cols: usize,
    guide: &Guide,
    mut groups: Groups<'_>,
    scratch: &mut kernels::FeedbackScratch,
) -> ErrorSums {
    let mut sums = ErrorSums::default();
    let group_values = ROW_GROUP * cols;
    let importance = if let Guide::Columns(columns) = guide { Some(&columns[..]) } else { None };
    let quantised = (ty == WeightType::Fp8).then(|| fp8::quantise_strip(values, cols));
    let fed_back = match guide {
        Guide::Feedback(feedback) => Some(feedback.quantise(ty, values, scratch)),
        _ => None,
    };
    for (g, values) in values.chunks(group_values).enumerate() {
        let n = values.len() / cols;
        let out = groups.slot(g);
        match (&quantised, &fed_back) {
            (_, Some(rows)) => rows.pack_row_group(g * ROW_GROUP, n, out),
            (Some((codes, scales)), _) => {
                let codes = &codes[g * group_values..][..values.len()];
                kernels::pack_row_group_fp8(codes, n, cols, scales, out);
            }
            (None, None) => kernels::pack_row_group_weighted(ty, values, n, cols, importance, out),
        }
        // Every value fits into f32.
        if ty != WeightType::F32 {
            let matrix = kernels::Matrix::new(ty, n, cols, out);
            let stored = kernels::unpack(matrix.expect("the slot has a row group's length"));
            values.iter().zip(&stored).for_each(|(&value, &stored)| sums.add(value, stored));
            if ty == WeightType::Q8 {
                sums.vanished += vanished(values, &stored, cols);
            }
        }
    }
    sums
}

/// Counts the blocks of rows of `cols` columns that are zero as stored but not in the source.
fn vanished(values: &[f32], stored: &[f32], cols: usize) -> u64 {
    let zero = |block: &[f32]| block.iter().all(|&v| v == 0.0);
    let rows = values.chunks_exact(cols).zip(stored.chunks_exact(cols));
    let blocks = rows.flat_map(|(values, stored)| values.chunks(BLOCK).zip(stored.chunks(BLOCK)));
    blocks.filter(|(values, stored)| zero(stored) && !zero(values)).count() as u64
}

impl ErrorSums {
    fn add(&mut self, value: f32, stored: f32) {
        let (value, stored) = (f64::from(value), f64::from(stored));
        self.error += (value - stored) * (value - stored);
        self.magnitude += value * value;
    }

    fn join(&mut self, other: &ErrorSums) {
        self.error += other.error;
        self.magnitude += other.magnitude;
        self.vanished += other.vanished;
    }
}

/// The matrices of a tensor whose rounding depends on their inputs; for a batch, all of them.
fn guided_of(extent: &ExtentRecord, tensor: &TensorPlan) -> Vec<MatrixKey> {
    if !tensor.weight_type.is_fitted() {
        return Vec::new();
    }
    let key = |index| MatrixKey { kind: extent.kind, layer: extent.layer, name: tensor.name.to_owned(), index };
    match extent.kind {
        ExtentKind::Expert => vec![key(extent.index)],
        // All parts of the head have the same input.
        _ => (0..tensor.shape[0] as u32).map(key).collect(),
    }
}

/// The matrices of an extent whose rounding depends on their inputs.
pub(crate) fn guided(plan: &Plan, extent: usize) -> Vec<MatrixKey> {
    let record = &plan.layout.extents()[extent];
    plan.extents[extent].iter().flat_map(|tensor| guided_of(record, tensor)).collect()
}

/// The order of the columns of a tensor, which is stored before its matrices; all its sources have the same order.
fn column_order(sources: &[Opened<'_>], cols: usize) -> Vec<u8> {
    let len = order_len(cols).expect("the plan computed the tensor's length from it");
    let mut bytes: Vec<u8> = match sources[0].decoder.order() {
        Some(order) => order.iter().flat_map(|column| column.to_le_bytes()).collect(),
        // Other experts of the layer have their columns out of order.
        None => (0..=u16::MAX).take(cols).flat_map(u16::to_le_bytes).collect(),
    };
    bytes.resize(len, 0);
    bytes
}

/// How the matrices of a tensor are rounded, by index in the batch.
fn guides(plan: &Plan, inputs: Option<&dyn Inputs>, extent: &ExtentRecord, tensor: &TensorPlan) -> Vec<Guide> {
    let guide = |key: MatrixKey| match (&plan.importance, inputs) {
        (Some(importance), _) => {
            let columns = importance.columns(key.kind, key.layer, &key.name, key.index);
            columns.map_or(Guide::Nothing, Guide::Columns)
        }
        (None, Some(inputs)) => inputs.guide(&key),
        (None, None) => Guide::Nothing,
    };
    guided_of(extent, tensor).into_iter().map(guide).collect()
}

fn group_len(ty: WeightType, cols: usize) -> usize {
    ty.row_group_len(cols).expect("the plan computed the tensor's length from it")
}

/// The sectors of a table.
fn sectors_of(tensor: &TensorPlan) -> Sectors {
    let element = tensor.weight_type.plain_element_len();
    let sectors = element.and_then(|element| Sectors::of_rows(element * tensor.shape[2]));
    sectors.expect("the plan computed the tensor's length from it")
}

/// The blocks of rows of a tensor, one matrix after the other.
fn blocks(tensor: &TensorPlan) -> impl Iterator<Item = Rows> + use<> {
    let cols = tensor.shape[2];
    let fit = BLOCK_ELEMENTS / cols.max(1);
    if tensor.layout == Layout::Sectors {
        let unit = sectors_of(tensor).rows;
        return blocks_of(tensor.shape, (fit - fit % unit).max(unit));
    }
    // Whole scale blocks if they fit, and always for fp8, which needs them; otherwise whole row groups.
    let unit = if fit >= SCALE_BLOCK || tensor.weight_type == WeightType::Fp8 { SCALE_BLOCK } else { ROW_GROUP };
    blocks_of(tensor.shape, (fit - fit % unit).max(unit))
}

/// Blocks of `height` rows, and one for the rest.
fn blocks_of([batch, rows, cols]: [usize; 3], height: usize) -> impl Iterator<Item = Rows> + use<> {
    let starts = move |batch| (0..rows).step_by(height).map(move |first| (batch, first));
    let block = move |(batch, first): (usize, usize)| Rows {
        first: batch * rows + first,
        count: height.min(rows - first),
        cols,
    };
    (0..batch).flat_map(starts).map(block)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_cover_every_row_once_in_whole_groups() {
        for (cols, weight_type) in [(1, WeightType::F32), (40_000, WeightType::Q8), (1 << 21, WeightType::Fp8)] {
            let (group, layout, offset, sources) = (0, Layout::Tiled, 0, Vec::new());
            let name = "gate_up";
            let tensor = TensorPlan { group, name, weight_type, layout, shape: [2, 1001, cols], offset, sources };
            let mut next = 0;
            for b in blocks(&tensor) {
                assert_eq!(b.first, next);
                let in_matrix = b.first % 1001;
                assert!(in_matrix.is_multiple_of(ROW_GROUP) && in_matrix + b.count <= 1001);
                assert!(weight_type != WeightType::Fp8 || in_matrix.is_multiple_of(SCALE_BLOCK));
                next = b.first + b.count;
            }
            assert_eq!(next, 2 * 1001);
        }
    }
}
