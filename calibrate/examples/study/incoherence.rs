//! Whether rotating columns before they are quantised is worth the cost of rotating the activations.

use std::collections::BTreeMap;
use std::error::Error;
use std::hint::black_box;
use std::path::Path;
use std::time::Instant;

use sluice_format::WeightType;
use sluice_kernels::{Activations, Kernels, Matrix, Precision, ThreadPool, packed_len};

use crate::model::{Inputs, Model, Packed, built_in, feedback, pack_by, pack_q8, record};
use crate::rotation::Rotation;
use crate::score::{score, tokens};

const TYPES: [WeightType; 3] = [WeightType::Q2, WeightType::Q3, WeightType::Q4];

/// Columns that are rotated together; 0: none.
const BLOCKS: [usize; 6] = [0, 32, 64, 128, 256, 512];

/// Number of layers whose matrices are examined one by one.
const LAYERS: usize = 3;

/// Tokens of the text on which errors are measured, and on which the whole model is scored.
const TOKENS: usize = 1024;
const SCORED: usize = 4096;

/// For the matrices of a few layers: the square error of their outputs by type and block, on the measured text and on another.
pub fn matrices(path: &Path, text: &str) -> Result<(), Box<dyn Error>> {
    let (kernels, model) = (Kernels::detect()?, Model::open(path)?);
    let last = model.file.spec().layers.len() as u32 - 1;
    let wanted = move |layer: u32| (0..LAYERS as u32).any(|i| i * last / (LAYERS as u32 - 1) == layer);
    let measured = record(path, &built_in(path, 0)?, wanted)?;
    let ids = tokens(path, text)?;
    let other = record(path, &ids[..ids.len().min(TOKENS)], wanted)?;
    // Sums of both errors, and number of matrices, by name, type and block.
    let mut sums: BTreeMap<(String, WeightType, usize), ([f64; 2], u32)> = BTreeMap::new();
    for number in model.matrices().into_iter().filter(|&number| wanted(model.tensor(number).layer)) {
        for block in BLOCKS.into_iter().filter(|&block| block == 0 || model.shape(number).1.is_multiple_of(block)) {
            let found = errors(kernels, &model, number, [&measured, &other], block)?;
            for (ty, found) in found {
                for name in [model.tensor(number).name.as_str(), "all"] {
                    let (sum, count) = sums.entry((name.to_owned(), ty, block)).or_default();
                    (0..2).for_each(|i| sum[i] += found[i]);
                    *count += 1;
                }
            }
        }
    }
    println!(
        "matrix, type, block: square error of the outputs in percent on the measured text and on the other, matrices"
    );
    for ((name, ty, block), (sum, count)) in &sums {
        let [measured, other] = sum.map(|sum| 100.0 * sum / f64::from(*count));
        println!("{name:8} {ty} {block:4}: {measured:.4} {other:.4} {count}");
    }
    Ok(())
}

/// Errors on the measured text, and on another, by type.
type Errors = Vec<(WeightType, [f64; 2])>;

/// The square errors of a matrix's outputs, divided by the square of the outputs, in each type with its columns rotated in blocks.
fn errors(
    kernels: Kernels,
    model: &Model,
    number: usize,
    inputs: [&Inputs; 2],
    block: usize,
) -> Result<Errors, Box<dyn Error>> {
    let (tensor, (_, cols)) = (model.tensor(number), model.shape(number));
    let pool = ThreadPool::new(std::thread::available_parallelism()?.get());
    let rotation = (block > 0).then(|| Rotation::new(cols, block));
    let turned = |rows: &[f32]| {
        let mut rows = rows.to_vec();
        rotation.iter().for_each(|rotation| rotation.apply(&mut rows));
        rows
    };
    let key =
        inputs[0].keys().find(|key| key.0 == tensor.layer && key.1 == tensor.name).ok_or("a matrix was not met")?;
    let (weights, inputs) = (turned(&model.weights(number)), inputs.map(|inputs| turned(&inputs[key])));
    let feedback = feedback(kernels, &pool, &inputs[0], cols).ok_or("nothing was measured")?;
    let outputs = inputs.each_ref().map(|inputs| energy(kernels, &pool, &weights, inputs, cols));
    let of_type = |ty| {
        let packed = pack_by(&feedback, ty, &weights, cols);
        let found = model.unpacked(number, ty, &packed.bytes);
        let difference: Vec<f32> = found.iter().zip(&weights).map(|(a, b)| a - b).collect();
        let errors = inputs.each_ref().map(|inputs| energy(kernels, &pool, &difference, inputs, cols));
        (ty, [errors[0] / outputs[0], errors[1] / outputs[1]])
    };
    Ok(TYPES.map(of_type).into())
}

/// The sum of the squares of `W x` over rows of inputs, at most [`TOKENS`] of them.
pub fn energy(kernels: Kernels, pool: &ThreadPool, weights: &[f32], inputs: &[f32], cols: usize) -> f64 {
    let rows = weights.len() / cols;
    let len = packed_len(WeightType::F32, rows, cols).expect("it is in memory");
    let mut bytes = vec![0; len];
    let groups = bytes.chunks_mut(len / rows.div_ceil(sluice_kernels::ROW_GROUP));
    for (rows, group) in weights.chunks(sluice_kernels::ROW_GROUP * cols).zip(groups) {
        sluice_kernels::pack_row_group(WeightType::F32, rows, rows.len() / cols, cols, group);
    }
    let n = (inputs.len() / cols).min(TOKENS);
    let mut x = Activations::new(Precision::Exact);
    x.set(&inputs[..n * cols], n, cols);
    let mut y = vec![0.0; n * rows];
    kernels.matmul(pool, Matrix::new(WeightType::F32, rows, cols, &bytes).expect("as it was packed"), &x, &mut y);
    y.iter().map(|&y| f64::from(y) * f64::from(y)).sum()
}

/// For the whole model: perplexity and divergence with all matrices quantised as they are, and rotated in the largest blocks up to
/// `most` that their columns allow. The results are rotated back and stored in `q8`, whose error is small in comparison.
pub fn whole(path: &Path, text: &str, most: usize) -> Result<(), Box<dyn Error>> {
    let (kernels, model) = (Kernels::detect()?, Model::open(path)?);
    let pool = ThreadPool::new(std::thread::available_parallelism()?.get());
    let measured = record(path, &built_in(path, 0)?, |_| true)?;
    let mut ids = tokens(path, text)?;
    ids.truncate(SCORED + 1);
    let reference = score(path, &ids, 512, None)?;
    println!("f32: perplexity {:.4} over {} tokens", reference.perplexity, reference.rows.len());
    let changed = path.with_extension("changed");
    for ty in [WeightType::Q2, WeightType::Q3] {
        for most in [0, most] {
            let mut packed: Vec<(usize, Packed)> = Vec::new();
            for number in model.matrices() {
                let (tensor, (_, cols)) = (model.tensor(number), model.shape(number));
                let block = if most == 0 { 0 } else { most.min(1 << cols.trailing_zeros()) };
                let rotation = (block > 1).then(|| Rotation::new(cols, block));
                let (mut weights, mut inputs) =
                    (model.weights(number), measured[&(tensor.layer, name(&tensor.name)?)].to_vec());
                for rows in [&mut weights, &mut inputs] {
                    rotation.iter().for_each(|rotation| rotation.apply(rows));
                }
                let feedback = feedback(kernels, &pool, &inputs, cols).ok_or("nothing was measured")?;
                let mut found = model.unpacked(number, ty, &pack_by(&feedback, ty, &weights, cols).bytes);
                rotation.iter().for_each(|rotation| rotation.undo(&mut found));
                packed.push((number, pack_q8(&found, cols)));
            }
            model.write(&changed, &packed.iter().map(|(number, packed)| (*number, packed)).collect())?;
            let found = score(&changed, &ids, 512, Some(&reference))?;
            let change = 100.0 * (found.perplexity / reference.perplexity - 1.0);
            println!(
                "{ty}, blocks of {most}: perplexity {:.4} ({change:+.2} %), divergence {:.5}, same first choice {:.1} %",
                found.perplexity,
                found.divergence,
                100.0 * found.agreement
            );
        }
    }
    std::fs::remove_file(&changed)?;
    Ok(())
}

/// A tensor's name, as observers get it.
pub fn name(name: &str) -> Result<&'static str, Box<dyn Error>> {
    let known = ["q", "k", "v", "o", "gate_up", "down", "head"];
    Ok(known.into_iter().find(|&known| known == name).ok_or("only dense models with plain attention are studied")?)
}

/// The cost of rotating one token's activations, compared with the product: one thread, everything in its caches, the shortest time
/// of many.
pub fn cost() -> Result<(), Box<dyn Error>> {
    let (kernels, pool) = (Kernels::detect()?, ThreadPool::new(1));
    println!("rows x columns, block: microseconds to turn and to round to int8; of the product in q2, q3, q4");
    for (rows, cols) in [(3072, 576), (576, 1536), (1536, 2048), (2048, 768), (4096, 7168), (7168, 2048)] {
        let x: Vec<f32> = (0..cols).map(|i| (i as f32 * 1.37).sin()).collect();
        let mut activations = Activations::new(Precision::Int8);
        let rounding = shortest(|| activations.set(black_box(&x), 1, cols));
        let products = TYPES.map(|ty| {
            let bytes = vec![0x35; packed_len(ty, rows, cols).expect("it fits in memory")];
            let (matrix, mut y) = (Matrix::new(ty, rows, cols, &bytes).expect("as it was made"), vec![0.0; rows]);
            shortest(|| kernels.matmul(&pool, matrix, &activations, black_box(&mut y)))
        });
        for block in BLOCKS.into_iter().skip(1).filter(|&block| cols.is_multiple_of(block)) {
            let (rotation, mut row) = (Rotation::new(cols, block), x.clone());
            // The rotation is orthogonal, so the numbers keep their size.
            let turning = shortest(|| rotation.apply(black_box(&mut row)));
            println!("{rows} x {cols}, {block}: {turning:.2} {rounding:.2}; {products:.1?}");
        }
    }
    Ok(())
}

/// Microseconds.
fn shortest(mut f: impl FnMut()) -> f64 {
    let mut one = || {
        let started = Instant::now();
        f();
        started.elapsed().as_secs_f64() * 1e6
    };
    (0..300).map(|_| one()).fold(f64::INFINITY, f64::min)
}
