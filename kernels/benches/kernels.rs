//! Speed of products and of packing for each weight type, and of attention for each type of cached numbers, on every instruction
//! set but scalar.
//!
//! `cargo bench -p sluice-kernels [-- FILTER]`; a filter is a part of a name such as `gemv/q8/avx512` or `attention/latent`.
//! `SLUICE_BENCH_THREADS` sets how many threads multiply (default: one per core); attention runs on one, as a head does.
//!
//! A GEMV reads 256 MiB of weights, more than most caches hold; `read` is a plain loop over as many bytes. A GEMM multiplies 64
//! tokens with a matrix that fits in caches; its elements are multiplications with an addition each. Attention is that of a token
//! over a full cache, or of the last rows of a prompt; its elements are pairs of a query and a key.
//! `expanded` is the same for the expanded form of latent attention, including the expansion.

use criterion::{Bencher, BenchmarkGroup, Criterion, Throughput, measurement::WallTime};
use sluice_kernels::*;
use std::hint::black_box;
use std::time::Duration;

const COLS: usize = 4096;
const WEIGHTS: usize = 256 << 20;
const LINE: usize = 64;
/// Rows and tokens of a GEMM.
const GEMM: (usize, usize) = (1024, 64);

fn threads() -> ThreadPool {
    let asked = std::env::var("SLUICE_BENCH_THREADS").ok().and_then(|n| n.parse().ok());
    ThreadPool::new(asked.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, Into::into)))
}

/// The instruction sets that are worth measuring.
fn vectorised() -> impl Iterator<Item = Kernels> {
    Kernels::available().into_iter().filter(|k| k.isa_name() != "scalar")
}

fn group<'a>(c: &'a mut Criterion, name: &str) -> BenchmarkGroup<'a, WallTime> {
    let mut group = c.benchmark_group(name);
    group.sample_size(15).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(2));
    group
}

/// Random bytes in which no scale or number is NaN or subnormal.
fn weights(len: usize) -> Vec<u8> {
    vec![0x2b; len]
}

fn multiply(b: &mut Bencher<'_>, k: Kernels, pool: &ThreadPool, w: Matrix<'_>, tokens: usize) {
    let mut x = Activations::new(Precision::Int8);
    x.set(&vec![0.5; tokens * COLS], tokens, COLS);
    let mut y = vec![0.0; tokens * w.rows()];
    b.iter(|| k.matmul(pool, w, black_box(&x), &mut y));
}

fn read(pool: &ThreadPool, data: &[u8]) {
    let part = data.len().div_ceil(pool.threads()).next_multiple_of(64);
    pool.run(pool.threads(), &|i| {
        let end = ((i + 1) * part).min(data.len());
        let mut sums = [0u64; 16];
        for chunk in data[i * part..end].as_chunks::<128>().0 {
            for (sum, word) in sums.iter_mut().zip(chunk.as_chunks::<8>().0) {
                *sum ^= u64::from_le_bytes(*word);
            }
        }
        black_box(sums);
    });
}

fn gemv(c: &mut Criterion) {
    // Weights begin with a line of the cache, as those of a model do: it matters to what is prefetched.
    let (pool, buffer) = (threads(), weights(WEIGHTS + LINE));
    let data = &buffer[buffer.as_ptr().align_offset(LINE)..][..WEIGHTS];
    let mut group = group(c, "gemv");
    group.throughput(Throughput::Bytes(WEIGHTS as u64));
    group.bench_function("read", |b| b.iter(|| read(&pool, data)));
    for ty in WeightType::all() {
        let len = row_group_len(ty, COLS).expect("small");
        let groups = WEIGHTS / len;
        let w = Matrix::new(ty, groups * ROW_GROUP, COLS, &data[..groups * len]).expect("sized to fit");
        group.throughput(Throughput::Bytes((groups * len) as u64));
        for k in vectorised() {
            group.bench_function(format!("{ty}/{}", k.isa_name()), |b| multiply(b, k, &pool, w, 1));
        }
    }
    group.finish();
}

fn gemm(c: &mut Criterion) {
    let (rows, tokens) = GEMM;
    let pool = threads();
    let mut group = group(c, "gemm");
    group.throughput(Throughput::Elements((rows * COLS * tokens) as u64));
    for ty in WeightType::all() {
        let data = weights(packed_len(ty, rows, COLS).expect("small"));
        let w = Matrix::new(ty, rows, COLS, &data).expect("sized to fit");
        for k in vectorised() {
            group.bench_function(format!("{ty}/{}", k.isa_name()), |b| multiply(b, k, &pool, w, tokens));
        }
    }
    group.finish();
}

/// Packs rows from the form of a source into row groups, on one thread; bytes are those of the row group.
fn pack(c: &mut Criterion) {
    let mut group = group(c, "pack");
    for ty in WeightType::all() {
        let WeightType::Grouped(grouped) = ty else { continue };
        let codes = if grouped.codes().is_grid() { grouped.codes().block_len() * COLS / BLOCK } else { COLS };
        let scales = grouped.scale_row(COLS).expect("whole super-blocks");
        let (codes, scales) = (vec![1; ROW_GROUP * codes], vec![1; ROW_GROUP * scales]);
        let factors = vec![1.0; if grouped.has_row_factor() { ROW_GROUP } else { 0 }];
        let mut out = vec![0; row_group_len(ty, COLS).expect("small")];
        group.throughput(Throughput::Bytes(out.len() as u64));
        group.bench_function(ty.name(), |b| {
            b.iter(|| pack_row_group_grouped(grouped, black_box(&codes), ROW_GROUP, COLS, &scales, &factors, &mut out));
        });
    }
    group.finish();
}

/// A cache with a different number in every place.
fn cache(ty: KvType, positions: usize, width: usize) -> KvBuffer {
    let mut buffer = KvBuffer::new(ty, positions, width);
    let row = |j: usize| (0..width).map(|i| ((i * 7 + j * 13) % 97) as f32 / 97.0 - 0.5).collect::<Vec<_>>();
    (0..positions).for_each(|j| buffer.set(j, &row(j)));
    buffer
}

/// Attention of `queries` queries, `sharing` per row, that see all positions up to their row.
struct AttentionCase {
    name: &'static str,
    positions: usize,
    key: usize,
    value: usize,
    queries: usize,
    sharing: usize,
}

/// One token over a full cache, then the last rows of a prompt: first a group of eight heads, then heads that share latents.
const ATTENTION: [AttentionCase; 5] = [
    AttentionCase { name: "decode/head", positions: 16384, key: 128, value: 128, queries: 1, sharing: 1 },
    AttentionCase { name: "decode/group", positions: 4096, key: 128, value: 128, queries: 8, sharing: 8 },
    AttentionCase { name: "decode/latent", positions: 4096, key: 576, value: 512, queries: 16, sharing: 16 },
    AttentionCase { name: "prompt/group", positions: 2048, key: 128, value: 128, queries: 64, sharing: 8 },
    AttentionCase { name: "prompt/latent", positions: 2048, key: 576, value: 512, queries: 48, sharing: 1 },
];

fn attention(c: &mut Criterion) {
    let mut group = group(c, "attention");
    for ty in KvType::ALL {
        for case in &ATTENTION {
            let keys = cache(ty, case.positions, case.key);
            // A latent is a key, and its first numbers are a value.
            let values = (case.value == case.key).then(|| cache(ty, case.positions, case.value));
            group.throughput(Throughput::Elements((case.positions * case.queries) as u64));
            for k in vectorised() {
                let mut tile = QueryTile::default();
                group.bench_function(format!("{}/{ty}/{}", case.name, k.isa_name()), |b| {
                    b.iter(|| attend(k, &mut tile, case, &keys, values.as_ref().unwrap_or(&keys)));
                });
            }
        }
    }
    group.finish();
}

fn attend(k: Kernels, tile: &mut QueryTile, case: &AttentionCase, keys: &KvBuffer, values: &KvBuffer) {
    tile.begin(case.key, case.value, 0.1);
    let first = case.positions - case.queries / case.sharing;
    for i in 0..case.queries {
        tile.add(0..first + i / case.sharing + 1, None).fill(black_box(0.3));
    }
    for block in key_blocks(tile.positions()) {
        let (keys, values) = (keys.rows(block.clone()), values.rows(block.clone()));
        k.attend_block(tile, &KeyBlock::new(block, keys, values));
    }
    tile.finish();
    black_box(tile.results());
}

/// The last rows of a prompt with one head of DeepSeek-V3: latents are expanded to keys and values, and the rows meet them.
fn expanded(c: &mut Criterion) {
    const POSITIONS: usize = 2048;
    const ROWS: usize = 1024;
    const RANK: usize = 512;
    const ROTATED: usize = 64;
    const PLAIN: usize = 128;
    const VALUE: usize = 128;
    let numbers = |n: usize| (0..n).map(|i| (i * 7 % 97) as f32 / 97.0 - 0.5).collect::<Vec<_>>();
    let (latents, queries) = (numbers(POSITIONS * (RANK + ROTATED)), numbers(ROWS * (PLAIN + ROTATED)));
    let (keys, values) = (numbers(RANK * PLAIN), numbers(VALUE * RANK));
    let mut group = group(c, "expanded");
    group.throughput(Throughput::Elements((POSITIONS * ROWS) as u64));
    for k in vectorised() {
        let (mut expander, mut block, mut tile) =
            (Expander::default(), ExpandedKeys::default(), ExpandedTile::default());
        let (mut max, mut sum, mut out) = (vec![0.0; ROWS], vec![0.0; ROWS], vec![0.0; ROWS * VALUE]);
        group.bench_function(k.isa_name(), |b| {
            b.iter(|| {
                expander.set_keys(RANK, &keys);
                expander.set_values(RANK, &values);
                max.fill(f32::NEG_INFINITY);
                sum.fill(0.0);
                out.fill(0.0);
                for start in (0..POSITIONS).step_by(EXPANDED_BLOCK) {
                    let len = EXPANDED_BLOCK.min(POSITIONS - start);
                    let read = |i: usize, row: &mut [f32]| {
                        row.copy_from_slice(&latents[(start + i) * (RANK + ROTATED)..][..RANK + ROTATED]);
                    };
                    expander.expand(&k, (start, len), ROTATED, read, &mut block);
                    for first in (0..ROWS).step_by(EXPANDED_TILE) {
                        let n = EXPANDED_TILE.min(ROWS - first);
                        let sees = (first..first + n).map(|row| POSITIONS - ROWS + row + 1);
                        tile.set(PLAIN + ROTATED, 0.1, sees, |i, query| {
                            query.copy_from_slice(&queries[(first + i) * (PLAIN + ROTATED)..][..PLAIN + ROTATED]);
                        });
                        let (max, sum) = (&mut max[first..first + n], &mut sum[first..first + n]);
                        let out = &mut out[first * VALUE..(first + n) * VALUE];
                        k.attend_expanded(&mut tile, &block, Gathered { max, sum, out });
                    }
                }
                Gathered { max: &mut max, sum: &mut sum, out: &mut out }.finish();
                black_box(&out);
            });
        });
    }
    group.finish();
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    for benches in [gemv, gemm, pack, attention, expanded] {
        benches(&mut criterion);
    }
    criterion.final_summary();
}
