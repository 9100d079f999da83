//! Speed of products per weight type and instruction set, beside the bandwidth of a plain reading loop.
//!
//! `cargo bench -p sluice-kernels --bench gemv [-- THREADS MEBIBYTES]`. GEMV reads 256 MiB of weights, more than the caches
//! hold; the rate counts those bytes. GEMM multiplies a smaller matrix with 64 tokens.

use sluice_kernels::*;
use std::hint::black_box;
use std::time::Instant;

const COLS: usize = 4096;
const ROUNDS: usize = 15;

fn seconds(f: impl FnOnce()) -> f64 {
    let start = Instant::now();
    f();
    start.elapsed().as_secs_f64()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
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

fn main() {
    let numbers: Vec<usize> = std::env::args().skip(1).filter_map(|a| a.parse().ok()).collect();
    let threads = numbers.first().copied().unwrap_or(2);
    let mebibytes = numbers.get(1).copied().unwrap_or(256);
    let pool = ThreadPool::new(threads);
    // No scale or number among these bytes is NaN or subnormal.
    let data = vec![0x2b_u8; mebibytes << 20];
    for ty in WeightType::ALL {
        for k in Kernels::available().into_iter().skip(1) {
            let mut x = Activations::new(Precision::Int8);
            let group = row_group_len(ty, COLS).expect("small");
            let rows = data.len() / group * ROW_GROUP;
            let bytes = rows / ROW_GROUP * group;
            let w = Matrix::new(ty, rows, COLS, &data[..bytes]).expect("sized to fit");
            x.set(&[0.5; COLS], 1, COLS);
            let mut y = vec![0.0; rows];
            // Taking turns, so that a busy machine slows both down alike.
            let (mut gemv, mut plain) = (Vec::new(), Vec::new());
            for _ in 0..ROUNDS {
                plain.push(seconds(|| read(&pool, &data[..bytes])));
                gemv.push(seconds(|| k.matmul(&pool, w, &x, &mut y)));
            }
            let (rate, plain) = (bytes as f64 / median(gemv) / 1e9, bytes as f64 / median(plain) / 1e9);

            let (rows, n) = (1024, 64);
            let w = Matrix::new(ty, rows, COLS, &data[..rows / ROW_GROUP * group]).expect("sized to fit");
            x.set(&vec![0.5; n * COLS], n, COLS);
            let mut y = vec![0.0; n * rows];
            let gemm = median((0..ROUNDS).map(|_| seconds(|| k.matmul(&pool, w, &x, &mut y))).collect());
            let gop = 2.0 * (n * rows * COLS) as f64 / gemm / 1e9;
            let percent = 100.0 * rate / plain;
            let (ty, isa) = (format!("{ty:?}"), k.isa_name());
            println!(
                "{ty:6} {isa:7} GEMV {rate:6.1} GB/s ({percent:3.0} % of {plain:5.1})   GEMM of {n} tokens {gop:7.1} GOP/s"
            );
        }
    }
}
