//! Tables of n-grams: the last tokens select rows, which enter the residual before a layer (formulas at [`NgramSpec`]).
//!
//! Token ids alone determine the rows. So the first rows are requested before the first layer of a pass, and while the rows of some
//! tokens are used, those of the next ones are read.

use std::ops::Range;

use sluice_format::sectors::Sectors;
use sluice_format::{ExtentRecord, ModelFile, ModelSpec, NgramHead, NgramSpec, TensorRecord, WeightType};
use sluice_kernels::{Activations, ThreadPool, rms_norm, sigmoid, silu};
use sluice_storage::io::Class;
use sluice_storage::pool::{SectorCache, TableLocation};

use super::ModelError;
use super::compute::{Compute, Step, sized};
use super::embedding::widen;
use super::rows::{Caches, Rows, Span, SpanRows, SpanTokens};
use super::weights::{ExtentTensors, MatrixRef, VectorRef};

/// Rows of a pass that are processed together, which bounds the scratch, whatever the size of the pass.
const ROWS_TOGETHER: usize = 64;
/// Bytes of sectors that stay in memory, if there are so many; text repeats its n-grams.
const CACHED_BYTES: u64 = 4 << 20;
/// Fewest sectors that stay in memory for each head: some rows are read while others are used.
const SECTORS_PER_HEAD: usize = 4;
/// Least magnitude of a gate's argument (`Qwen4ExpPLE.forward` of transformers).
const LEAST_GATE: f32 = 1e-6;

/// The parts that bring the rows of one layer's table into the residual.
#[derive(Debug)]
pub struct Ngrams {
    spec: NgramSpec,
    /// Number of the table among those of the model.
    table: usize,
    ty: WeightType,
    hidden: usize,
    /// Numbers of a row's residual.
    width: usize,
    norm_eps: f32,
    key: MatrixRef,
    value: MatrixRef,
    key_norm: VectorRef,
    query_norm: VectorRef,
    conv_norm: VectorRef,
    conv: VectorRef,
}

/// Buffers that tables of n-grams reuse from layer to layer.
#[derive(Debug)]
pub struct NgramScratch {
    activations: Activations,
    /// Numbers of the table rows that each token selects, `[rows, heads]`.
    wanted: Vec<u64>,
    /// The rows of all heads, `[rows, total width of the table rows]`.
    gathered: Vec<f32>,
    /// `[rows, width]`.
    key: Vec<f32>,
    /// `[rows, hidden]`.
    value: Vec<f32>,
    /// The value after its gates, `[rows, width]`.
    gated: Vec<f32>,
    /// Inputs of the convolution, including those before the first row: `[conv_reach + rows, width]`.
    inputs: Vec<f32>,
    norms: [Vec<f32>; 3],
    taps: Vec<f32>,
}

impl NgramScratch {
    /// Empty buffers; they grow to the size that the first call needs.
    pub fn new(compute: &Compute) -> Self {
        NgramScratch {
            activations: Activations::new(compute.precision),
            wanted: Vec::new(),
            gathered: Vec::new(),
            key: Vec::new(),
            value: Vec::new(),
            gated: Vec::new(),
            inputs: Vec::new(),
            norms: [const { Vec::new() }; 3],
            taps: Vec::new(),
        }
    }
}

/// Bytes of scratch for passes of `rows` rows.
pub fn scratch_memory(spec: &ModelSpec, rows: usize) -> u64 {
    let width = spec.residual_width() as u64;
    let of = |ngrams: &NgramSpec| {
        // Table rows, their copy as activations, and their numbers; key, gated value and input of the convolution.
        let row = 2 * ngrams.width as u64 + 2 * ngrams.heads.len() as u64 + 3 * width + spec.hidden_size as u64;
        let once = (ngrams.conv_reach() + ngrams.conv_width + 3) as u64 * width;
        4 * (row * ROWS_TOGETHER.min(rows) as u64 + once)
    };
    spec.ngrams.iter().map(of).max().unwrap_or(0)
}

/// Sectors that stay in memory, and the most bytes that they can take: a table may be f32.
pub fn cached_sectors(spec: &ModelSpec) -> (usize, u64) {
    let sectors = spec.ngrams.iter().filter_map(|ngrams| Sectors::of_rows(size_of::<f32>() * ngrams.row_width()));
    let Some(longest) = sectors.map(|sectors| sectors.len as u64).max() else { return (0, 0) };
    let heads: usize = spec.ngrams.iter().map(|ngrams| ngrams.heads.len()).sum();
    let count = (CACHED_BYTES / longest).max((SECTORS_PER_HEAD * heads) as u64);
    (count as usize, count * longest)
}

/// The places of a file's tables, in the order of layers.
pub fn tables(file: &ModelFile) -> Vec<TableLocation> {
    let location = |ngrams: &NgramSpec| {
        let layer = ngrams.layer as u32;
        let parts: Vec<(&ExtentRecord, &TensorRecord)> = file.table_parts(layer).collect();
        let (_, first) = *parts.first().expect("the file's reader has compared the parts with the spec");
        let element = first.weight_type.plain_element_len().expect("the file's reader has compared length and type");
        TableLocation {
            layer,
            sectors: Sectors::of_rows(element * ngrams.row_width()).expect("a row has numbers"),
            part_rows: first.shape[1],
            parts: parts.iter().map(|(extent, tensor)| (extent.volume, extent.offset + tensor.offset)).collect(),
        }
    };
    file.spec().ngrams.iter().map(location).collect()
}

impl Ngrams {
    /// The n-grams of a layer, if it has any. `tensors`: those of its attention extent.
    pub(super) fn new(spec: &ModelSpec, layer: usize, tensors: &ExtentTensors<'_>) -> Result<Option<Self>, ModelError> {
        let Some(table) = spec.ngrams.iter().position(|ngrams| ngrams.layer == layer) else { return Ok(None) };
        let part = tensors.file.table_parts(layer as u32).next();
        let ty = part.map_or(WeightType::F32, |(_, tensor)| tensor.weight_type);
        Ok(Some(Ngrams {
            spec: spec.ngrams[table].clone(),
            table,
            ty,
            hidden: spec.hidden_size,
            width: spec.residual_width(),
            norm_eps: spec.norm_eps,
            key: tensors.matrix("ngram_key")?,
            value: tensors.matrix("ngram_value")?,
            key_norm: tensors.vector("ngram_key_norm")?,
            query_norm: tensors.vector("ngram_query_norm")?,
            conv_norm: tensors.vector("ngram_conv_norm")?,
            conv: tensors.vector("ngram_conv")?,
        }))
    }

    /// Starts to read the sectors that the first rows of a pass will need, as far as there is memory for `most` of them.
    ///
    /// # Errors
    /// [`ModelError::Pool`] if a read cannot be queued.
    pub fn read_ahead(
        &self,
        (rows, spans): (&Rows, &[Span<'_>]),
        most: usize,
        tables: &mut SectorCache,
        scratch: &mut NgramScratch,
    ) -> Result<(), ModelError> {
        let NgramScratch { wanted, .. } = scratch;
        let mut left = most;
        for part in rows.spans() {
            for row in 0..part.count.min(left / self.spec.heads.len()) {
                wanted.clear();
                rows_of(&self.spec, SpanTokens::of(spans, *part), part.start + row, wanted);
                left -= wanted.len();
                wanted.iter().try_for_each(|&row| tables.want(self.table, row, Class::Prefetch))?;
            }
        }
        Ok(())
    }

    /// Adds the table's contribution for the rows of a pass to their residual `x` `[n, width]`, and keeps in `caches` what later
    /// tokens need.
    ///
    /// # Errors
    /// [`ModelError::Pool`] when a row of the table cannot be read or is damaged; [`ModelError::Cancelled`].
    pub fn forward(
        &self,
        step: Step<'_>,
        caches: &mut Caches<'_, '_>,
        tables: &mut SectorCache,
        x: &mut [f32],
        scratch: &mut NgramScratch,
    ) -> Result<(), ModelError> {
        let NgramScratch { norms: [key, query, conv], taps, .. } = scratch;
        for (vector, out) in [(&self.key_norm, key), (&self.query_norm, query), (&self.conv_norm, conv)] {
            step.read(vector, out);
        }
        step.read(&self.conv, taps);
        for part in step.rows.spans() {
            self.span(step, caches, tables, *part, x, scratch)?;
        }
        Ok(())
    }

    /// Processes the rows of one sequence, some at a time.
    fn span(
        &self,
        step: Step<'_>,
        caches: &mut Caches<'_, '_>,
        tables: &mut SectorCache,
        part: SpanRows,
        x: &mut [f32],
        scratch: &mut NgramScratch,
    ) -> Result<(), ModelError> {
        let (width, before) = (self.width, self.spec.conv_reach() * self.width);
        sized(&mut scratch.inputs, before + ROWS_TOGETHER.min(part.count) * width);
        if before > 0 {
            let (from, _) = caches.last_mut(part.span).state_mut();
            scratch.inputs[..before].copy_from_slice(from.inputs());
        }
        for first in (0..part.count).step_by(ROWS_TOGETHER) {
            let rows = first..part.count.min(first + ROWS_TOGETHER);
            let count = rows.len();
            self.gather(caches.tokens_of(part), part.start, rows.clone(), tables, scratch)?;
            let x = &mut x[(part.first + rows.start) * width..(part.first + rows.end) * width];
            self.project(step, count, scratch);
            if step.is_cancelled() {
                return Err(ModelError::Cancelled);
            }
            let threads = &step.compute.threads;
            self.gate(threads, count, x, scratch);
            self.convolve(threads, count, x, scratch);
            scratch.inputs.copy_within(count * width..count * width + before, 0);
        }
        if before > 0 {
            let (_, to) = caches.last_mut(part.span).state_mut();
            to.inputs().copy_from_slice(&scratch.inputs[..before]);
        }
        Ok(())
    }

    /// Leaves the table rows of these rows of a sequence, counted from position `start`, in `scratch.gathered`.
    fn gather(
        &self,
        tokens: SpanTokens<'_>,
        start: usize,
        rows: Range<usize>,
        tables: &mut SectorCache,
        scratch: &mut NgramScratch,
    ) -> Result<(), ModelError> {
        let NgramScratch { wanted, gathered, .. } = scratch;
        wanted.clear();
        for row in rows.clone() {
            rows_of(&self.spec, tokens, start + row, wanted);
        }
        let (row_width, ahead) = (self.spec.row_width(), tables.ahead());
        let gathered = sized(gathered, rows.len() * self.spec.width);
        let mut asked = 0;
        for (i, out) in gathered.chunks_exact_mut(row_width).enumerate() {
            while asked < wanted.len().min(i + ahead) {
                tables.want(self.table, wanted[asked], Class::Demand)?;
                asked += 1;
            }
            widen(self.ty, tables.row(self.table, wanted[i])?, out);
        }
        Ok(())
    }

    /// Leaves key and value of the gathered rows in the scratch.
    fn project(&self, step: Step<'_>, count: usize, scratch: &mut NgramScratch) {
        let NgramScratch { activations, gathered, key, value, .. } = scratch;
        activations.set(&gathered[..count * self.spec.width], count, self.spec.width);
        step.multiply(&self.key, activations, sized(key, count * self.width));
        step.multiply(&self.value, activations, sized(value, count * self.hidden));
    }

    /// Leaves the gated value in `scratch.gated`, and the convolution's new inputs after the earlier ones.
    fn gate(&self, threads: &ThreadPool, count: usize, x: &[f32], scratch: &mut NgramScratch) {
        let (width, hidden, eps) = (self.width, self.hidden, self.norm_eps);
        let NgramScratch { key, value, gated, inputs, norms: [key_norm, query_norm, conv_norm], .. } = scratch;
        let (key, value, key_norm, query_norm) = (&*key, &*value, &*key_norm, &*query_norm);
        let gated = sized(gated, count * width);
        threads.for_each_piece(gated, hidden, &|i, gated| {
            // Numbers of this stream in the residual of its own row, and in that of any row.
            let (here, of_stream) = (i * hidden..(i + 1) * hidden, stream_of(i, width, hidden));
            let scale = |x: &[f32]| 1.0 / (x.iter().map(|v| v * v).sum::<f32>() / hidden as f32 + eps).sqrt();
            let (key, query) = (&key[here.clone()], &x[here]);
            let (key_scale, query_scale) = (scale(key), scale(query));
            let weights = key_norm[of_stream.clone()].iter().zip(&query_norm[of_stream]);
            let products = key.iter().zip(query).zip(weights);
            let sum: f32 = products.map(|((k, q), (kw, qw))| (k * key_scale * kw) * (q * query_scale * qw)).sum();
            let gate = sigmoid(signed_root(sum / (hidden as f32).sqrt()));
            let value = &value[i * hidden / width * hidden..][..hidden];
            gated.iter_mut().zip(value).for_each(|(g, v)| *g = gate * v);
        });
        let before = self.spec.conv_reach() * width;
        let (gated, conv_norm) = (&*gated, &*conv_norm);
        threads.for_each_piece(&mut inputs[before..before + count * width], hidden, &|i, input| {
            rms_norm(&gated[i * hidden..][..hidden], &conv_norm[stream_of(i, width, hidden)], eps, input);
        });
    }

    /// Adds the gated value and the result of its convolution to the residual.
    fn convolve(&self, threads: &ThreadPool, count: usize, x: &mut [f32], scratch: &NgramScratch) {
        let (width, taps, apart) = (self.width, self.spec.conv_width, self.spec.tokens());
        let NgramScratch { gated, inputs, taps: weights, .. } = scratch;
        let (gated, inputs) = (&gated[..count * width], &inputs[..]);
        threads.for_each_piece(x, width, &|row, x| {
            let gated = &gated[row * width..][..width];
            for (c, (x, gated)) in x.iter_mut().zip(gated).enumerate() {
                let seen = weights[c * taps..][..taps].iter().enumerate();
                let sum = seen.fold(0.0, |sum, (i, w)| sum + w * inputs[(row + i * apart) * width + c]);
                *x += gated + silu(sum);
            }
        });
    }
}

/// The numbers of stream `i` in the residual of any row.
fn stream_of(i: usize, width: usize, hidden: usize) -> Range<usize> {
    let first = i * hidden % width;
    first..first + hidden
}

/// `sign(x) · sqrt(max(|x|, LEAST_GATE))`; 0 for 0.
fn signed_root(x: f32) -> f32 {
    let root = x.abs().max(LEAST_GATE).sqrt();
    if x > 0.0 {
        root
    } else if x < 0.0 {
        -root
    } else {
        0.0 * x
    }
}

/// Appends the numbers of the table rows that the heads select at a position.
fn rows_of(spec: &NgramSpec, tokens: SpanTokens<'_>, position: usize, out: &mut Vec<u64>) {
    let each = spec.heads.len() / (spec.tokens() - 1);
    let mut heads = spec.heads.chunks_exact(each);
    let (mut hash, mut ended) = (0i64, false);
    for (back, multiplier) in spec.multipliers.iter().enumerate() {
        let token = match position.checked_sub(back) {
            Some(position) if !ended => tokens.at(position),
            _ => spec.separator,
        };
        // The token itself may be a separator: it separates only tokens after it.
        ended |= back > 0 && token == spec.separator;
        hash ^= i64::from(token).wrapping_mul(*multiplier);
        if back > 0 {
            let row = |head: &NgramHead| head.first + hash.rem_euclid(head.rows as i64) as u64;
            out.extend(heads.next().unwrap_or_default().iter().map(row));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(multipliers: &[i64], rows: &[u64]) -> NgramSpec {
        let mut first = 0;
        let head = |&rows: &u64| {
            first += rows;
            NgramHead { first: first - rows, rows }
        };
        let heads: Vec<NgramHead> = rows.iter().map(head).collect();
        let (width, table_rows) = (heads.len(), rows.iter().sum());
        NgramSpec { layer: 0, width, multipliers: multipliers.to_vec(), heads, table_rows, separator: 1, conv_width: 1 }
    }

    fn rows(spec: &NgramSpec, before: &[u32], new: &[u32]) -> Vec<Vec<u64>> {
        let at = |position| {
            let mut out = Vec::new();
            rows_of(spec, SpanTokens { before, new }, position, &mut out);
            out
        };
        (0..before.len() + new.len()).map(at).collect()
    }

    #[test]
    fn rows_follow_the_formula_and_do_not_reach_across_a_separator() {
        let spec = spec(&[3, 5, 7], &[1000, 100, 1000, 100]);
        let hashed = |t: [i64; 3]| {
            let (two, three) = ((t[0] * 3) ^ (t[1] * 5), (t[0] * 3) ^ (t[1] * 5) ^ (t[2] * 7));
            vec![two % 1000, 1000 + two % 100, 1100 + three % 1000, 2100 + three % 100].into_iter().map(|v| v as u64)
        };
        let tokens = [9, 40, 1, 50, 60, 1, 1, 70];
        let seen = [[9, 1, 1], [40, 9, 1], [1, 40, 9], [50, 1, 1], [60, 50, 1], [1, 60, 50], [1, 1, 1], [70, 1, 1]];
        let expected: Vec<Vec<u64>> = seen.map(|t| hashed(t).collect()).to_vec();
        for split in 0..=tokens.len() {
            assert_eq!(rows(&spec, &tokens[..split], &tokens[split..]), expected, "split at {split}");
        }
    }

    #[test]
    fn products_wrap_and_rows_are_never_negative() {
        let spec = spec(&[i64::MAX, -3], &[7]);
        for (row, token) in rows(&spec, &[], &[5, u32::MAX, 2]).iter().zip([5i64, u32::MAX.into(), 2]) {
            assert!(row[0] < 7, "token {token}: {row:?}");
        }
        let hash = 5i64.wrapping_mul(i64::MAX) ^ -3;
        assert_eq!(rows(&spec, &[], &[5])[0], [hash.rem_euclid(7) as u64]);
    }

    #[test]
    fn a_gate_of_nothing_is_open_by_half() {
        assert_eq!([0.0, 4.0, -9.0].map(signed_root), [0.0, 2.0, -3.0]);
        assert_eq!(signed_root(-1e-12), -1e-3);
        assert!(signed_root(f32::NAN).is_nan());
    }
}
