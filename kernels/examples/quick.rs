use sluice_kernels::*;
use std::hint::black_box;
const COLS: usize = 4096;
fn cpu() -> f64 {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut t) };
    t.tv_sec as f64 + t.tv_nsec as f64 / 1e9
}
fn secs(f: impl FnOnce()) -> f64 {
    let s = cpu();
    f();
    cpu() - s
}
fn median(v: &mut Vec<f64>) -> f64 {
    v.sort_by(f64::total_cmp);
    v[v.len() / 2]
}
fn read(pool: &ThreadPool, data: &[u8]) {
    let part = data.len().div_ceil(pool.threads()).next_multiple_of(128);
    pool.run(data.len().div_ceil(part), &|i| {
        let mut sums = [0u64; 16];
        for chunk in data[i * part..((i + 1) * part).min(data.len())].as_chunks::<128>().0 {
            for (sum, word) in sums.iter_mut().zip(chunk.as_chunks::<8>().0) {
                *sum ^= u64::from_le_bytes(*word);
            }
        }
        black_box(sums);
    });
}
fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let threads: usize = args[0].parse().unwrap();
    let filter = args.get(1).cloned().unwrap_or_default();
    let k = Kernels::detect().unwrap();
    let pool = ThreadPool::new(threads);
    let data = vec![0x2bu8; 256 << 20];
    let cached = &data[..];
    if let Some(mode) = args.get(2) {
        let ty: WeightType = filter.parse().unwrap();
        let (n, exact) = match mode.as_str() {
            "prefill" => (64, false),
            "exact" => (64, true),
            _ => (1, false),
        };
        let group = row_group_len(ty, COLS).unwrap();
        let w = Matrix::new(ty, 512, COLS, &cached[..64 * group]).unwrap();
        let mut x = Activations::new(if exact { Precision::Exact } else { Precision::Int8 });
        x.set(&vec![0.5; n * COLS], n, COLS);
        let mut y = vec![0.0; n * 512];
        let mut best = f64::MAX;
        for _ in 0..4000 / n {
            best = best.min(secs(|| k.matmul(&pool, w, &x, &mut y)));
        }
        println!(
            "{ty} {mode} best {:.1} GOP/s, {:.1} GB/s",
            2.0 * (n * 512 * COLS) as f64 / best / 1e9,
            64.0 * group as f64 / best / 1e9
        );
        return;
    }
    println!("{} {} threads", k.isa_name(), threads);
    let gemm = |ty: WeightType, n: usize, exact: bool| {
        let group = row_group_len(ty, COLS).unwrap();
        let w = Matrix::new(ty, 512, COLS, &cached[..64 * group]).unwrap();
        let mut x = Activations::new(if exact { Precision::Exact } else { Precision::Int8 });
        x.set(&vec![0.5; n * COLS], n, COLS);
        let mut y = vec![0.0; n * 512];
        secs(|| k.matmul(&pool, w, &x, &mut y))
    };
    let q4 = WeightType::Q4;
    for ty in WeightType::all() {
        if !filter.is_empty() && !filter.split(',').any(|f| f == ty.name()) {
            continue;
        }
        let group = row_group_len(ty, COLS).unwrap();
        let groups = data.len() / group;
        let w = Matrix::new(ty, groups * 8, COLS, &data[..groups * group]).unwrap();
        let mut x = Activations::new(Precision::Int8);
        x.set(&vec![0.5; COLS], 1, COLS);
        let mut y = vec![0.0; groups * 8];
        k.matmul(&pool, w, &x, &mut y);
        let slow = secs(|| k.matmul(&pool, w, &x, &mut y)) > 1.0;
        let (mut r, mut g, mut ratio) = (vec![], vec![], vec![]);
        for _ in 0..if slow { 1 } else { 9 } {
            let a = secs(|| read(&pool, &data));
            let b = secs(|| k.matmul(&pool, w, &x, &mut y)) * data.len() as f64 / (groups * group) as f64;
            r.push(a);
            g.push(b);
            ratio.push(a / b);
        }
        let (mut p, mut f, mut q4s) = (vec![], vec![], vec![]);
        for _ in 0..if slow { 1 } else { 7 } {
            let base = gemm(q4, 64, false);
            p.push(base / gemm(ty, 64, false));
            f.push(gemm(q4, 64, true) / gemm(ty, 64, true));
            q4s.push(2.0 * 64.0 * 512.0 * COLS as f64 / base / 1e9);
        }
        println!(
            "{:<24} read {:5.1} gemv {:5.1} ratio {:.2}   prefill/q4 {:.2} (q4 {:.0} GOP/s) exact/q4 {:.2}",
            ty.name(),
            data.len() as f64 / median(&mut r) / 1e9,
            data.len() as f64 / median(&mut g) / 1e9,
            median(&mut ratio),
            median(&mut p),
            median(&mut q4s),
            median(&mut f)
        );
    }
}
