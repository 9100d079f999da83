//! One feed-forward network inside an extent: the dense part of a layer, or an expert. Most have a gate.
//!
//! Rows are stored in file order and never added to each other. So an extent that is still being read can be computed as far as it
//! has arrived: first rows of gate and up, then rows of down. The result has the same bits.

use std::ops::Range;

use sluice_format::ActivationSpec;
use sluice_kernels::{Activation, Activations, ROW_GROUP, Watch, Work, Works};

use super::ModelError;
use super::compute::{Compute, sized};
use super::tally::Tallied;
use super::weights::{ExtentTensors, MatrixRef, VectorRef};

/// A feed-forward network inside an extent: the dense part or one expert.
#[derive(Clone, Copy, Debug)]
pub struct GatedFfn {
    gate_up: GateUp,
    down: MatrixRef,
    bias: Option<FfnBias>,
    width: usize,
    activation: Activation,
}

/// Gate and up projection, or up alone.
#[derive(Clone, Copy, Debug)]
enum GateUp {
    /// One matrix, in which their row groups alternate.
    Pair(MatrixRef),
    /// Two matrices, one after the other, each with its own type and order of columns.
    Apart([MatrixRef; 2]),
    /// Up alone, if there is no gate.
    Up(MatrixRef),
}

impl GateUp {
    fn new(gated: bool, tensors: &ExtentTensors<'_>) -> Result<Self, ModelError> {
        if !gated {
            return Ok(GateUp::Up(tensors.matrix("up")?));
        }
        if tensors.has("gate") {
            let part = |name| tensors.part_of("gate_up", name);
            return Ok(GateUp::Apart([part("gate")?, part("up")?]));
        }
        Ok(GateUp::Pair(tensors.matrix("gate_up")?))
    }

    /// The matrices, in the order in which they are stored.
    fn matrices(&self) -> &[MatrixRef] {
        match self {
            GateUp::Pair(one) | GateUp::Up(one) => std::slice::from_ref(one),
            GateUp::Apart(both) => both,
        }
    }

    /// Row groups of each matrix that one row group of the network's hidden layer needs.
    fn groups_each(&self) -> usize {
        match self {
            GateUp::Pair(_) => 2,
            GateUp::Apart(_) | GateUp::Up(_) => 1,
        }
    }
}

/// Biases of gate, up and down projection.
#[derive(Clone, Copy, Debug)]
struct FfnBias {
    gate: VectorRef,
    up: VectorRef,
    down: VectorRef,
}

/// How much of a network has been computed.
#[derive(Clone, Copy, Debug, Default)]
struct Progress {
    /// Row groups of the hidden layer that have been computed, for each matrix of gate and up.
    gate_up: [usize; 2],
    /// Row groups of down that have been computed.
    down: usize,
    /// Whether the bias of down has been added, so that nothing is left to do.
    done: bool,
}

/// A network that is computed for one row while its extent is being read.
#[derive(Debug)]
pub(super) struct Begun {
    progress: Progress,
    scratch: GatedScratch,
    /// The input of the matrix that was begun last, if its columns have an order of their own.
    reordered: Activations,
    /// `[hidden]`, or longer.
    output: Vec<f32>,
}

impl Begun {
    pub fn new(compute: &Compute) -> Self {
        let (scratch, reordered) = (GatedScratch::new(compute), Activations::new(compute.precision));
        Begun { progress: Progress::default(), scratch, reordered, output: Vec::new() }
    }

    /// Restarts for another network or another row.
    pub fn restart(&mut self) {
        self.progress = Progress::default();
    }

    /// Whether the output is complete.
    pub fn is_done(&self) -> bool {
        self.progress.done
    }

    /// Gives away the output, `[hidden]` or longer, once it is complete; the next one is written to `with`.
    pub fn swap_output(&mut self, with: &mut Vec<f32>) {
        std::mem::swap(&mut self.output, with);
    }
}

/// Buffers of one network.
#[derive(Debug)]
pub(super) struct GatedScratch {
    hidden: Vec<f32>,
    pair: Vec<f32>,
    gate_bias: Vec<f32>,
    up_bias: Vec<f32>,
    activations: Activations,
}

impl GatedScratch {
    pub fn new(compute: &Compute) -> Self {
        GatedScratch {
            hidden: Vec::new(),
            pair: Vec::new(),
            gate_bias: Vec::new(),
            up_bias: Vec::new(),
            activations: Activations::new(compute.precision),
        }
    }
}

impl GatedFfn {
    pub(super) fn new(
        width: usize,
        spec: ActivationSpec,
        bias: bool,
        tensors: &ExtentTensors<'_>,
    ) -> Result<Self, ModelError> {
        let activation = match spec {
            ActivationSpec::Silu => Activation::Silu,
            ActivationSpec::SwigluOai { alpha, limit } => Activation::SwigluOai { alpha, limit },
            ActivationSpec::SiluClamped { limit } => Activation::SiluClamped { limit },
            ActivationSpec::GeluTanh => Activation::GeluTanh,
            ActivationSpec::SiluBounded { limit } => Activation::SiluBounded { limit },
            ActivationSpec::ReluSquared => Activation::ReluSquared,
        };
        let vector = |name| tensors.vector(name);
        let bias = match bias {
            true => Some(FfnBias { gate: vector("gate_bias")?, up: vector("up_bias")?, down: vector("down_bias")? }),
            false => None,
        };
        let gate_up = GateUp::new(spec.is_gated(), tensors)?;
        Ok(GatedFfn { gate_up, down: tensors.matrix("down")?, bias, width, activation })
    }

    /// `out` `[n, hidden]` = down · act(gate · x, up · x), or without a gate down · act(up · x). `index`: the number of the expert,
    /// if it is one.
    pub(super) fn forward(
        &self,
        compute: &Compute,
        extent: Tallied<'_>,
        index: u32,
        x: &Activations,
        s: &mut GatedScratch,
        out: &mut [f32],
    ) {
        // Every byte is tallied once, although some rows may meet the weights after the others.
        let of_rows = |rows: &Range<usize>| if rows.start == 0 { extent } else { Tallied::not(extent.bytes) };
        compute.observe(&self.gate_up.matrices()[0], index, x);
        self.make_room(x.n(), s);
        let groups = self.width.div_ceil(ROW_GROUP);
        for (which, matrix) in self.gate_up.matrices().iter().enumerate() {
            compute.inputs(matrix, extent.bytes, x, |rows, x| {
                self.gate_up_rows(compute, of_rows(&rows), (which, 0..groups), x, rows.start, s);
            });
        }
        self.activate(extent.bytes, x.n(), s);
        compute.observe(&self.down, index, &s.activations);
        compute.inputs(&self.down, extent.bytes, &s.activations, |rows, x| {
            let out = &mut out[rows.start * self.down.rows()..rows.end * self.down.rows()];
            self.down_rows(compute, of_rows(&rows), 0..self.down.groups(), x, out);
        });
        self.add_down_bias(extent.bytes, s, out);
        self.tally_rest(extent);
    }

    /// Whether [`GatedFfn::forward_each`] can be called: no matrix has an order of its columns of its own.
    pub(super) fn takes_inputs_as_they_are(&self) -> bool {
        !self.gate_up.matrices().iter().chain([&self.down]).any(MatrixRef::is_ordered)
    }

    /// Like [`GatedFfn::forward`], for one row `x` and the networks in several `extents`, as two jobs: gate and up of all, then down of
    /// all. The bits are the same. `s`: one for each; `out` `[extents, hidden]`. Tells no observer.
    ///
    /// # Panics
    /// If there is more than one row, or a matrix has an order of its columns of its own.
    pub(super) fn forward_each<'e>(
        &self,
        compute: &Compute,
        extents: impl Iterator<Item = &'e [u8]> + Clone,
        x: &Activations,
        s: &mut [GatedScratch],
        out: &mut [f32],
    ) {
        assert!(x.n() == 1 && self.takes_inputs_as_they_are(), "one row, as it is");
        let mut works = Works::new();
        for (extent, s) in extents.clone().zip(&mut *s) {
            self.make_room(1, s);
            self.gate_up_works(extent, x, s, &mut |work| compute_when_full(compute, work, &mut works));
        }
        compute.kernels.products(&compute.threads, &works);
        for (extent, s) in extents.clone().zip(&mut *s) {
            self.activate(extent, 1, s);
        }
        let mut works = Works::new();
        let outs = out.chunks_exact_mut(self.down.rows());
        for ((extent, s), out) in extents.clone().zip(&*s).zip(outs) {
            let work = Work::matmul(self.down.view(extent), &s.activations, out);
            compute_when_full(compute, work, &mut works);
        }
        compute.kernels.products(&compute.threads, &works);
        for ((extent, s), out) in extents.zip(s).zip(out.chunks_exact_mut(self.down.rows())) {
            self.add_down_bias(extent, s, out);
        }
    }

    /// The first of two halves of [`GatedFfn::forward`], for one row: gives `add` the products of gate and up, to be computed with others.
    ///
    /// # Panics
    /// Like [`GatedFfn::forward_each`].
    pub(super) fn begin_works<'w>(
        &self,
        extent: &'w [u8],
        x: &'w Activations,
        s: &'w mut GatedScratch,
        add: &mut dyn FnMut(Work<'w>),
    ) {
        assert!(x.n() == 1 && self.takes_inputs_as_they_are(), "one row, as it is");
        self.make_room(1, s);
        self.gate_up_works(extent, x, s, add);
    }

    /// The second half of [`GatedFfn::forward`], after the products of [`GatedFfn::begin_works`] have been computed.
    pub(super) fn finish(&self, compute: &Compute, extent: &[u8], s: &mut GatedScratch, out: &mut [f32]) {
        self.activate(extent, 1, s);
        compute.kernels.matmul(&compute.threads, self.down.view(extent), &s.activations, out);
        self.add_down_bias(extent, s, out);
    }

    /// Gives `add` the products of gate and up for one row, with results where [`GatedFfn::activate`] looks for them.
    fn gate_up_works<'w>(
        &self,
        extent: &'w [u8],
        x: &'w Activations,
        s: &'w mut GatedScratch,
        add: &mut dyn FnMut(Work<'w>),
    ) {
        let GatedScratch { hidden, pair, .. } = s;
        let hidden = &mut hidden[..self.width];
        match (&self.gate_up, &self.bias) {
            (GateUp::Pair(matrix), None) => {
                add(Work::gate_up(matrix.view(extent), self.width, self.activation, x, hidden));
            }
            (GateUp::Pair(matrix), Some(_)) => add(Work::matmul(matrix.view(extent), x, &mut pair[..matrix.rows()])),
            (GateUp::Apart([gate, up]), _) => {
                add(Work::matmul(gate.view(extent), x, &mut pair[..self.width]));
                add(Work::matmul(up.view(extent), x, hidden));
            }
            (GateUp::Up(up), _) => add(Work::matmul(up.view(extent), x, hidden)),
        }
    }

    /// Adds the bytes that belong to no matrix to the tally of a whole extent, which then has every byte.
    fn tally_rest(&self, extent: Tallied<'_>) {
        // The file's reader has checked that they are stored in this order.
        let mut end = 0;
        for matrix in self.gate_up.matrices().iter().chain([&self.down]) {
            extent.add(end..matrix.group_start(0));
            end = matrix.end();
        }
        extent.add(end..extent.bytes.len());
    }

    /// Continues with `begun`, for the one row `x`, as far as `prefix`, the first bytes of an extent of `len` bytes, allows. Tells
    /// no observer, because the bytes may turn out to be damaged.
    pub(super) fn advance(
        &self,
        compute: &Compute,
        prefix: Tallied<'_>,
        len: usize,
        x: &Activations,
        begun: &mut Begun,
    ) {
        assert_eq!(x.n(), 1, "the rows of several tokens do not lie together");
        let Begun { progress, scratch: s, reordered, output } = begun;
        let out = sized(output, self.down.rows());
        let bytes = prefix.bytes;
        if progress.done || self.biases_end() > bytes.len() {
            return;
        }
        let matrices = self.gate_up.matrices();
        for (which, matrix) in matrices.iter().enumerate() {
            let (before, all) = (progress.gate_up[which], self.width.div_ceil(ROW_GROUP));
            let there = matrix.groups_within(bytes.len()) / self.gate_up.groups_each();
            if there > before {
                let x = if before == 0 { matrix.input(bytes, x, reordered) } else { matrix.same_input(x, reordered) };
                self.make_room(1, s);
                self.gate_up_rows(compute, prefix, (which, before..there), x, 0, s);
                progress.gate_up[which] = there;
                if there == all && which + 1 == matrices.len() {
                    self.activate(bytes, 1, s);
                }
            }
            if there < all {
                return;
            }
        }
        let there = self.down.groups_within(bytes.len());
        if there > progress.down {
            let x = match progress.down {
                0 => self.down.input(bytes, &s.activations, reordered),
                _ => self.down.same_input(&s.activations, reordered),
            };
            self.down_rows(compute, prefix, progress.down..there, x, out);
            progress.down = there;
        }
        if there == self.down.groups() && bytes.len() == len {
            self.add_down_bias(bytes, s, out);
            self.tally_rest(prefix);
            progress.done = true;
        }
    }

    /// Makes room in `begun` for one row of `cols` numbers, so that a later call allocates nothing.
    pub(super) fn reserve(&self, cols: usize, begun: &mut Begun) {
        let output = sized(&mut begun.output, cols);
        if self.gate_up.matrices().iter().any(MatrixRef::is_ordered) {
            begun.reordered.set(output, 1, cols);
        }
        self.reserve_row(&mut begun.scratch);
        if self.down.is_ordered() {
            begun.reordered.set(&begun.scratch.hidden[..self.width], 1, self.width);
        }
    }

    /// Makes room for one row, so that a later call allocates nothing.
    pub(super) fn reserve_row(&self, s: &mut GatedScratch) {
        self.make_room(1, s);
        s.activations.set(&s.hidden[..self.width], 1, self.width);
        if let Some(bias) = &self.bias {
            s.gate_bias.reserve(bias.gate.count().max(bias.down.count()));
            s.up_bias.reserve(bias.up.count());
        }
    }

    /// Byte of the extent at which the last bias ends.
    fn biases_end(&self) -> usize {
        self.bias.map_or(0, |bias| bias.gate.end().max(bias.up.end()).max(bias.down.end()))
    }

    /// Makes room for the results of `gate_up_rows` for `n` tokens.
    fn make_room(&self, n: usize, s: &mut GatedScratch) {
        sized(&mut s.hidden, n * self.width);
        match &self.gate_up {
            GateUp::Pair(pair) if self.bias.is_some() => _ = sized(&mut s.pair, n * pair.rows()),
            GateUp::Pair(_) | GateUp::Up(_) => (),
            GateUp::Apart(_) => _ = sized(&mut s.pair, n * self.width),
        }
    }

    /// Computes the rows of these groups of the hidden layer, for one matrix of gate and up: all groups, or any groups if there is
    /// one token. `x`: the tokens from `first` on, in the form that the matrix takes.
    ///
    /// A pair leaves the hidden layer in `s.hidden`, or, if there are biases, both products in `s.pair`, with alternating row
    /// groups. Of two matrices, the product of gate is left in `s.pair` and that of up in `s.hidden`. If there is only up, its
    /// product is left in `s.hidden` too.
    fn gate_up_rows(
        &self,
        compute: &Compute,
        extent: Tallied<'_>,
        (which, groups): (usize, Range<usize>),
        x: &Activations,
        first: usize,
        s: &mut GatedScratch,
    ) {
        let (kernels, threads) = (&compute.kernels, &compute.threads);
        let (matrix, each) = (&self.gate_up.matrices()[which], self.gate_up.groups_each());
        let stored = each * groups.start..each * groups.end;
        let watch = extent.watch(matrix.group_start(stored.start));
        let view = matrix.view_of_groups(extent.bytes, stored.clone());
        let view = view.watched_by(watch.as_ref().map(|watch| watch as &dyn Watch));
        match (&self.gate_up, &self.bias) {
            (GateUp::Pair(_), None) => {
                let hidden = &mut s.hidden[first * self.width..][..x.n() * self.width];
                let (rows, hidden) = rows_of(hidden, x.n(), &groups, self.width);
                kernels.gate_up(threads, view, rows, self.activation, x, hidden);
            }
            (GateUp::Pair(_), Some(_)) => {
                let pair = &mut s.pair[first * matrix.rows()..][..x.n() * matrix.rows()];
                let (_, pair) = rows_of(pair, x.n(), &stored, matrix.rows());
                kernels.matmul(threads, view, x, pair);
            }
            (GateUp::Apart(_) | GateUp::Up(_), _) => {
                let gate = which == 0 && matches!(self.gate_up, GateUp::Apart(_));
                let product = if gate { &mut s.pair } else { &mut s.hidden };
                let product = &mut product[first * self.width..][..x.n() * self.width];
                let (_, product) = rows_of(product, x.n(), &groups, self.width);
                kernels.matmul(threads, view, x, product);
            }
        }
    }

    /// Turns the results of `gate_up_rows` into the input of `down`.
    fn activate(&self, extent: &[u8], n: usize, s: &mut GatedScratch) {
        let hidden = sized(&mut s.hidden, n * self.width);
        if let Some(bias) = &self.bias {
            bias.gate.read(extent, &mut s.gate_bias);
            bias.up.read(extent, &mut s.up_bias);
        }
        let hidden_rows = hidden.chunks_exact_mut(self.width);
        match (&self.gate_up, &self.bias) {
            (GateUp::Pair(_), None) => (),
            (GateUp::Up(_), _) => hidden_rows.flatten().for_each(|h| *h = self.activation.apply(0.0, *h)),
            (GateUp::Pair(matrix), Some(_)) => {
                for (pair, hidden) in s.pair.chunks_exact(matrix.rows()).zip(hidden_rows) {
                    for (i, h) in hidden.iter_mut().enumerate() {
                        // Row groups alternate: gate, up, gate, up.
                        let gate = pair[i / ROW_GROUP * 2 * ROW_GROUP + i % ROW_GROUP] + s.gate_bias[i];
                        let up = pair[(i / ROW_GROUP * 2 + 1) * ROW_GROUP + i % ROW_GROUP] + s.up_bias[i];
                        *h = self.activation.apply(gate, up);
                    }
                }
            }
            (GateUp::Apart(_), bias) => {
                for (gates, hidden) in s.pair.chunks_exact(self.width).zip(hidden_rows) {
                    for (i, (h, &gate)) in hidden.iter_mut().zip(gates).enumerate() {
                        let biased = || (gate + s.gate_bias[i], *h + s.up_bias[i]);
                        let (gate, up) = if bias.is_some() { biased() } else { (gate, *h) };
                        *h = self.activation.apply(gate, up);
                    }
                }
            }
        }
        s.activations.set(hidden, n, self.width);
    }

    /// Computes the rows of these groups of `down`: all groups, or any groups if there is one token.
    fn down_rows(
        &self,
        compute: &Compute,
        extent: Tallied<'_>,
        groups: Range<usize>,
        x: &Activations,
        out: &mut [f32],
    ) {
        let watch = extent.watch(self.down.group_start(groups.start));
        let matrix = self.down.view_of_groups(extent.bytes, groups.clone());
        let matrix = matrix.watched_by(watch.as_ref().map(|watch| watch as &dyn Watch));
        let (_, out) = rows_of(out, x.n(), &groups, self.down.rows());
        compute.kernels.matmul(&compute.threads, matrix, x, out);
    }

    fn add_down_bias(&self, extent: &[u8], s: &mut GatedScratch, out: &mut [f32]) {
        let Some(bias) = &self.bias else { return };
        bias.down.read(extent, &mut s.gate_bias);
        for row in out.chunks_exact_mut(s.gate_bias.len()) {
            row.iter_mut().zip(&s.gate_bias).for_each(|(o, b)| *o += b);
        }
    }
}

/// Adds a product to others; when there are as many as fit, computes them.
fn compute_when_full<'w>(compute: &Compute, work: Work<'w>, works: &mut Works<'w>) {
    if works.is_full() {
        compute.kernels.products(&compute.threads, works);
        works.clear();
    }
    works.push(work);
}

/// The part of `out` `[n, rows]` that these row groups compute, and the number of its rows: all of them, unless `n` is 1.
fn rows_of<'a>(out: &'a mut [f32], n: usize, groups: &Range<usize>, rows: usize) -> (usize, &'a mut [f32]) {
    let (first, end) = (groups.start * ROW_GROUP, (groups.end * ROW_GROUP).min(rows));
    if n == 1 {
        return (end - first, &mut out[first..end]);
    }
    assert_eq!((first, end), (0, rows), "the rows of several tokens do not lie together");
    (rows, out)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use sluice_format::{ExtentKind, Layout, TensorRecord, WeightType as Stored, order_len, pack_tensors};
    use sluice_kernels::{Kernels, Precision, ThreadPool, pack_row_group, row_group_len};

    use xxhash_rust::xxh3::xxh3_64;

    use super::super::tally::Tally;
    use super::super::weights::MatrixPlace;
    use super::*;

    fn record(name: &str, weight_type: Stored, layout: Layout, rows: usize, cols: usize) -> TensorRecord {
        TensorRecord {
            kind: ExtentKind::Expert,
            weight_type,
            layout,
            layer: 0,
            index: 0,
            shape: [1, rows as u64, cols as u64],
            offset: 0,
            len: 0,
            name: name.to_owned(),
        }
    }

    fn compute() -> Compute {
        let kernels = Kernels::detect().expect("an instruction set");
        Compute::new(kernels, ThreadPool::new(2).into(), Precision::Int8)
    }

    /// Numbers from -1 to 1, the same every time.
    fn numbers(count: usize) -> impl Iterator<Item = f32> {
        (0..count as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 23) as f32 - 1.0)
    }

    /// Row groups that are multiples of each other, after an order that reverses the columns.
    fn fill_matrix(extent: &mut [u8], record: &TensorRecord) {
        let (ty, cols) = (record.weight_type, record.shape[2] as usize);
        let values: Vec<f32> = numbers(ROW_GROUP * cols).collect();
        let bytes = &mut extent[record.offset as usize..][..record.len as usize];
        let order_len = if record.layout.is_ordered() { order_len(cols).expect("few") } else { 0 };
        let (order, bytes) = bytes.split_at_mut(order_len);
        let columns = (0..cols as u16).rev().map(u16::to_le_bytes);
        order.as_chunks_mut().0.iter_mut().zip(columns).for_each(|(to, column)| *to = column);
        for (i, group) in bytes.chunks_exact_mut(row_group_len(ty, cols).expect("small")).enumerate() {
            let scaled: Vec<f32> = values.iter().map(|v| v * (i + 1) as f32).collect();
            pack_row_group(ty, &scaled, ROW_GROUP, cols, group);
        }
    }

    /// An expert and the bytes of its extent, whole pages. `up`: the type of up, if it is a matrix of its own.
    fn network(
        stored: Stored,
        up: Option<Stored>,
        (width, hidden): (usize, usize),
        bias: bool,
        ordered: bool,
    ) -> (GatedFfn, Vec<u8>) {
        let tiled = |layout: Layout| if ordered { layout.ordered().expect("tiled") } else { layout };
        let vector = |name, n| record(name, Stored::F32, Layout::Plain, 1, n);
        let mut records = match bias {
            true => vec![vector("gate_bias", width), vector("up_bias", width), vector("down_bias", hidden)],
            false => Vec::new(),
        };
        let biases = records.len();
        match up {
            None => records.push(record("gate_up", stored, tiled(Layout::TiledPair), width, hidden)),
            Some(up) => {
                records.push(record("gate", stored, tiled(Layout::Tiled), width, hidden));
                records.push(record("up", up, tiled(Layout::Tiled), width, hidden));
            }
        }
        records.push(record("down", stored, tiled(Layout::Tiled), hidden, width));
        let len = pack_tensors(&mut records).expect("possible") as usize;
        let mut extent = vec![0; len.next_multiple_of(4096)];
        let (biases, matrices) = records.split_at(biases);
        for record in biases {
            let bytes = &mut extent[record.offset as usize..][..record.len as usize];
            bytes.chunks_exact_mut(4).zip(numbers(usize::MAX)).for_each(|(b, v)| b.copy_from_slice(&v.to_le_bytes()));
        }
        let matrix = |record: &TensorRecord, name| {
            let place = MatrixPlace { kind: ExtentKind::Expert, layer: 0, name };
            MatrixRef::from_record(place, record).expect("a matrix")
        };
        matrices.iter().for_each(|record| fill_matrix(&mut extent, record));
        let bias = bias.then(|| FfnBias {
            gate: VectorRef::from_record(&biases[0]),
            up: VectorRef::from_record(&biases[1]),
            down: VectorRef::from_record(&biases[2]),
        });
        let gate_up = match matrices {
            [pair, _] => GateUp::Pair(matrix(pair, "gate_up")),
            [gate, up, _] => GateUp::Apart([matrix(gate, "gate_up"), matrix(up, "gate_up")]),
            _ => unreachable!("two or three"),
        };
        let down = matrix(&matrices[matrices.len() - 1], "down");
        (GatedFfn { gate_up, down, bias, width, activation: Activation::Silu }, extent)
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

        /// The bits and the checksum are the same in whatever portions an extent arrives, and whatever the buffers held before.
        #[test]
        fn portions_give_what_the_whole_gives(
            stored in prop_oneof![Just(Stored::F32), Just(Stored::Bf16), Just(Stored::Q8), Just(Stored::Q4)],
            up in prop_oneof![Just(None), Just(Some(Stored::Bf16)), Just(Some(Stored::Q8))],
            (width, hidden) in (1usize..100, 1usize..100),
            (bias, ordered) in any::<(bool, bool)>(),
            cuts in proptest::collection::vec(0.0f64..1.0, 0..8),
        ) {
            let compute = compute();
            let (network, extent) = network(stored, up, (width, hidden), bias, ordered);
            let mut x = Activations::new(compute.precision);
            x.set(&numbers(hidden).collect::<Vec<_>>(), 1, hidden);
            let mut whole = vec![f32::NAN; hidden];
            let mut scratch = GatedScratch::new(&compute);
            let mut tally = Tally::default();
            let tallied = Tallied { bytes: &extent, tally: Some(tally.begin(extent.len())) };
            network.forward(&compute, tallied, 0, &x, &mut scratch, &mut whole);
            prop_assert!(whole.iter().all(|v| v.is_finite()));
            prop_assert_eq!(tally.checksum(), xxh3_64(&extent));

            let pages = extent.len() / 4096;
            let mut ends: Vec<usize> = cuts.iter().map(|cut| (cut * pages as f64) as usize * 4096).collect();
            ends.sort_unstable();
            ends.push(extent.len());
            // These hold what an earlier network left.
            let (reordered, output) = (Activations::new(compute.precision), vec![f32::NAN; hidden + 3]);
            let mut begun = Begun { progress: Progress::default(), scratch, reordered, output };
            let tally = tally.begin(extent.len());
            for end in ends {
                prop_assert!(!begun.is_done());
                let prefix = Tallied { bytes: &extent[..end], tally: Some(tally) };
                network.advance(&compute, prefix, extent.len(), &x, &mut begun);
            }
            prop_assert_eq!(tally.checksum(), xxh3_64(&extent));
            prop_assert!(begun.is_done());
            let bits = |v: &[f32]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            let mut output = Vec::new();
            begun.swap_output(&mut output);
            prop_assert_eq!(bits(&output[..hidden]), bits(&whole));
        }
    }

    /// More networks than are computed as one job have the bits of each alone, and so has one that is computed in two halves.
    #[test]
    fn networks_that_are_computed_together_give_what_each_gives() {
        let compute = compute();
        let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        let hidden = 70;
        let mut x = Activations::new(compute.precision);
        x.set(&numbers(hidden).collect::<Vec<_>>(), 1, hidden);
        for (up, bias) in [(None, false), (None, true), (Some(Stored::Bf16), false), (Some(Stored::Q8), true)] {
            let (network, extent) = network(Stored::Q8, up, (90, hidden), bias, false);
            // Their row groups of down are in other orders.
            let extents: Vec<Vec<u8>> = (0..Works::MOST + 3)
                .map(|number| {
                    let (mut extent, down) = (extent.clone(), &network.down);
                    let len = down.group_start(1) - down.group_start(0);
                    extent[down.group_start(0)..down.end()].rotate_left(number % down.groups() * len);
                    extent
                })
                .collect();
            let mut scratch: Vec<GatedScratch> = extents.iter().map(|_| GatedScratch::new(&compute)).collect();
            let mut together = vec![f32::NAN; extents.len() * hidden];
            let bytes = extents.iter().map(|extent| &extent[..]);
            network.forward_each(&compute, bytes, &x, &mut scratch, &mut together);
            for (extent, together) in extents.iter().zip(together.chunks_exact(hidden)) {
                let (mut alone, mut halves) = (vec![f32::NAN; hidden], vec![f32::NAN; hidden]);
                network.forward(&compute, Tallied::not(extent), 0, &x, &mut scratch[0], &mut alone);
                assert!(alone.iter().all(|v| v.is_finite()));
                assert_eq!(bits(together), bits(&alone), "{up:?}, {bias}");
                let mut works = Works::new();
                network.begin_works(extent, &x, &mut scratch[1], &mut |work| works.push(work));
                compute.kernels.products(&compute.threads, &works);
                network.finish(&compute, extent, &mut scratch[1], &mut halves);
                assert_eq!(bits(&halves), bits(&alone), "{up:?}, {bias}");
            }
        }
    }

    /// A network without a gate, of which more arrives each time, gives the bits of the whole: the squares of the positive numbers
    /// of up.
    #[test]
    fn without_a_gate_portions_give_what_the_whole_gives() {
        let compute = compute();
        let (pair, extent) = network(Stored::F32, Some(Stored::F32), (30, 70), false, false);
        let GateUp::Apart([_, up]) = pair.gate_up else { unreachable!("they are apart") };
        let network = GatedFfn { gate_up: GateUp::Up(up), activation: Activation::ReluSquared, ..pair };
        let mut x = Activations::new(compute.precision);
        x.set(&numbers(70).collect::<Vec<_>>(), 1, 70);
        let (mut whole, mut scratch) = (vec![f32::NAN; 70], GatedScratch::new(&compute));
        network.forward(&compute, Tallied::not(&extent), 0, &x, &mut scratch, &mut whole);
        let mut hidden = vec![f32::NAN; 30];
        compute.kernels.matmul(&compute.threads, up.view(&extent), &x, &mut hidden);
        hidden.iter_mut().for_each(|h| *h = h.max(0.0) * h.max(0.0));
        assert!(hidden.contains(&0.0) && hidden.iter().any(|h| *h > 0.0));
        let (mut joined, mut expected) = (Activations::new(compute.precision), vec![f32::NAN; 70]);
        joined.set(&hidden, 1, 30);
        compute.kernels.matmul(&compute.threads, network.down.view(&extent), &joined, &mut expected);
        assert_eq!(whole, expected);
        let mut begun = Begun::new(&compute);
        for end in (4096..=extent.len()).step_by(4096) {
            network.advance(&compute, Tallied::not(&extent[..end]), extent.len(), &x, &mut begun);
        }
        assert!(begun.is_done());
        let mut output = Vec::new();
        begun.swap_output(&mut output);
        assert_eq!(&output[..70], whole);
    }

    /// Gate and up as two matrices give the bits of the pair.
    #[test]
    fn apart_gives_what_the_pair_gives() {
        let compute = compute();
        for (bias, ordered) in [(false, false), (true, false), (false, true)] {
            let outputs = [None, Some(Stored::Q4)].map(|up| {
                let (network, extent) = network(Stored::Q4, up, (30, 70), bias, ordered);
                let mut extent = extent;
                if up.is_none() {
                    alternate(&network, &mut extent);
                }
                let mut x = Activations::new(compute.precision);
                x.set(&numbers(140).collect::<Vec<_>>(), 2, 70);
                let mut out = vec![f32::NAN; 140];
                let mut scratch = GatedScratch::new(&compute);
                network.forward(&compute, Tallied::not(&extent), 0, &x, &mut scratch, &mut out);
                out.iter().map(|v| v.to_bits()).collect::<Vec<_>>()
            });
            assert_eq!(outputs[0], outputs[1], "bias: {bias}, ordered: {ordered}");
        }
    }

    /// Makes the row groups of a pair equal to those of two equal matrices: the first of each, then the second of each.
    fn alternate(network: &GatedFfn, extent: &mut [u8]) {
        let GateUp::Pair(pair) = network.gate_up else { unreachable!("it is a pair") };
        let group = |i| pair.group_start(i)..pair.group_start(i + 1);
        let groups: Vec<Vec<u8>> = (0..pair.groups()).map(|i| extent[group(i)].to_vec()).collect();
        for i in 0..groups.len() {
            extent[group(i)].copy_from_slice(&groups[i / 2]);
        }
    }
}
