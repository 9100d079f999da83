//! Speed of products per weight type, and of attention per type of cached numbers, on every instruction set but scalar.
//!
//! `cargo bench -p sluice-kernels [-- FILTER]`; a filter is a part of a name such as `gemv/q8/avx512` or `attention/latent`.
//! `SLUICE_BENCH_THREADS` says how many threads multiply (default: one per core); attention runs on one, as a head does.
//!
//! A GEMV reads 256 MiB of weights, more than most caches hold; `read` is a plain loop over as many bytes. A GEMM multiplies a
//! matrix that caches hold with 64 tokens; its elements are multiplications with an addition each. Attention is that of one
//! query over a full cache; its elements are cached positions, so that types can be compared.

use criterion::{Bencher, BenchmarkGroup, Criterion, Throughput, measurement::WallTime};
use sluice_kernels::*;
use std::hint::black_box;
use std::time::Duration;

const COLS: usize = 4096;
const WEIGHTS: usize = 256 << 20;
/// Rows and tokens of a GEMM.
const GEMM: (usize, usize) = (1024, 64);

fn threads() -> ThreadPool {
    let asked = std::env::var("SLUICE_BENCH_THREADS").ok().and_then(|n| n.parse().ok());
    ThreadPool::new(asked.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, Into::into)))
}

/// A name such as `q8`.
fn name(ty: WeightType) -> String {
    format!("{ty:?}").to_lowercase()
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

/// Bytes among which no scale or number is NaN or subnormal.
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
    let (pool, data) = (threads(), weights(WEIGHTS));
    let mut group = group(c, "gemv");
    group.throughput(Throughput::Bytes(WEIGHTS as u64));
    group.bench_function("read", |b| b.iter(|| read(&pool, &data)));
    for ty in WeightType::ALL {
        let len = row_group_len(ty, COLS).expect("small");
        let groups = WEIGHTS / len;
        let w = Matrix::new(ty, groups * ROW_GROUP, COLS, &data[..groups * len]).expect("sized to fit");
        group.throughput(Throughput::Bytes((groups * len) as u64));
        for k in vectorised() {
            group.bench_function(format!("{}/{}", name(ty), k.isa_name()), |b| multiply(b, k, &pool, w, 1));
        }
    }
    group.finish();
}

fn gemm(c: &mut Criterion) {
    let (rows, tokens) = GEMM;
    let pool = threads();
    let mut group = group(c, "gemm");
    group.throughput(Throughput::Elements((rows * COLS * tokens) as u64));
    for ty in WeightType::ALL {
        let data = weights(packed_len(ty, rows, COLS).expect("small"));
        let w = Matrix::new(ty, rows, COLS, &data).expect("sized to fit");
        for k in vectorised() {
            group.bench_function(format!("{}/{}", name(ty), k.isa_name()), |b| multiply(b, k, &pool, w, tokens));
        }
    }
    group.finish();
}

/// A cache that holds something else in every place.
fn cache(ty: KvType, positions: usize, width: usize) -> KvBuffer {
    let mut buffer = KvBuffer::new(ty, positions, width);
    let row = |j: usize| (0..width).map(|i| ((i * 7 + j * 13) % 97) as f32 / 97.0 - 0.5).collect::<Vec<_>>();
    (0..positions).for_each(|j| buffer.set(j, &row(j)));
    buffer
}

fn attention(c: &mut Criterion) {
    let mut group = group(c, "attention");
    for ty in KvType::ALL {
        // One head with keys and values of its own; one head over latents that are both.
        for (kind, positions, k_dim, v_dim) in [("keys-values", 16384, 128, 128), ("latent", 4096, 576, 512)] {
            let keys = cache(ty, positions, k_dim);
            let values = (kind == "keys-values").then(|| cache(ty, positions, v_dim));
            let keys = keys.rows(0..positions);
            let values = values.as_ref().map_or(keys, |values| values.rows(0..positions));
            group.throughput(Throughput::Elements(positions as u64));
            for k in vectorised() {
                let (q, mut scores, mut out) = (vec![0.3; k_dim], vec![0.0; positions], vec![0.0; v_dim]);
                group.bench_function(format!("{kind}/{ty}/{}", k.isa_name()), |b| {
                    b.iter(|| k.attend(black_box(&q), keys, values, positions, 0.1, None, &mut scores, &mut out));
                });
            }
        }
    }
    group.finish();
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    for benches in [gemv, gemm, attention] {
        benches(&mut criterion);
    }
    criterion.final_summary();
}
