//! Speed of products per weight type and instruction set, beside the bandwidth of a plain reading loop.
//!
//! `cargo bench -p sluice-kernels --bench gemv [-- THREADS]`. GEMV reads 256 MiB of weights, more than the caches hold;
//! the rate counts those bytes. GEMM multiplies a smaller matrix with 64 tokens.

use sluice_kernels::*;
use std::hint::black_box;
use std::time::Instant;

const COLS: usize = 4096;

/// The best of several runs, in seconds.
fn best(runs: usize, mut f: impl FnMut()) -> f64 {
    (0..runs)
        .map(|_| {
            let start = Instant::now();
            f();
            start.elapsed().as_secs_f64()
        })
        .fold(f64::INFINITY, f64::min)
}

fn read_bandwidth(pool: &ThreadPool, data: &[u8]) -> f64 {
    let part = data.len().div_ceil(pool.threads()).next_multiple_of(64);
    let seconds = best(8, || {
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
    });
    data.len() as f64 / seconds / 1e9
}

fn main() {
    let threads = std::env::args().skip(1).find_map(|a| a.parse().ok()).unwrap_or(2);
    let pool = ThreadPool::new(threads);
    // No scale or number among these bytes is NaN or subnormal.
    let data = vec![0x2b_u8; 256 << 20];
    let plain = read_bandwidth(&pool, &data);
    println!("{threads} threads, plain reading {plain:.1} GB/s");
    for ty in WeightType::ALL {
        for k in Kernels::available().into_iter().skip(1) {
            let mut x = Activations::new(Precision::Int8);
            let group = row_group_len(ty, COLS).expect("small");
            let rows = data.len() / group * ROW_GROUP;
            let w = Matrix::new(ty, rows, COLS, &data[..rows / ROW_GROUP * group]).expect("sized to fit");
            x.set(&[0.5; COLS], 1, COLS);
            let mut y = vec![0.0; rows];
            let gemv = best(8, || k.matmul(&pool, w, &x, &mut y));
            let rate = (rows / ROW_GROUP * group) as f64 / gemv / 1e9;

            let (rows, n) = (1024, 64);
            let w = Matrix::new(ty, rows, COLS, &data[..rows / ROW_GROUP * group]).expect("sized to fit");
            x.set(&vec![0.5; n * COLS], n, COLS);
            let mut y = vec![0.0; n * rows];
            let gemm = best(8, || k.matmul(&pool, w, &x, &mut y));
            let gflops = 2.0 * (n * rows * COLS) as f64 / gemm / 1e9;
            let percent = 100.0 * rate / plain;
            let (ty, isa) = (format!("{ty:?}"), k.isa_name());
            println!("{ty:6} {isa:7} GEMV {rate:6.1} GB/s ({percent:3.0} %)   GEMM of {n} tokens {gflops:7.1} GFLOP/s");
        }
    }
}
