//! The table of errors in `docs/QUANTISATION.md`: relative root mean square error of 3- and 4-bit types.
//!
//! `cargo run --release -p sluice-kernels --example quantisation_error [-- MODEL.safetensors]`. Weights are random
//! numbers from a fixed seed, and the bf16 matrices of routed experts in the model if there is one. The types of
//! llama.cpp are computed in `reference.rs`.

mod reference;

use sluice_kernels::*;
use std::time::Instant;

const COLS: usize = 2048;
const ROWS: usize = 512;

/// SplitMix64.
struct Rng(u64);

impl Rng {
    /// Uniform in 0..1, without 0.
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (((z ^ (z >> 31)) >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    }

    fn normal(&mut self) -> f64 {
        (-2.0 * self.uniform().ln()).sqrt() * (std::f64::consts::TAU * self.uniform()).cos()
    }

    fn laplace(&mut self) -> f64 {
        let u = self.uniform() - 0.5;
        -u.signum() * (1.0 - 2.0 * u.abs()).ln()
    }

    /// Student's distribution with four degrees of freedom: the tails are heavy.
    fn student(&mut self) -> f64 {
        let square: f64 = (0..4).map(|_| self.normal().powi(2)).sum();
        self.normal() / (square / 4.0).sqrt()
    }
}

/// Row-major numbers.
struct Weights {
    name: &'static str,
    cols: usize,
    data: Vec<f32>,
}

fn random(name: &'static str, mut number: impl FnMut() -> f64) -> Weights {
    Weights { name, cols: COLS, data: (0..ROWS * COLS).map(|_| number() as f32).collect() }
}

/// The routed experts' bf16 matrices of a safetensors file; all widths are cut into rows of 128.
fn experts(path: &str) -> std::io::Result<Weights> {
    let bytes = std::fs::read(path)?;
    let malformed = || std::io::Error::other("not a safetensors file");
    let header_len = u64::from_le_bytes(*bytes.first_chunk().ok_or_else(malformed)?) as usize;
    let header = bytes.get(8..8 + header_len).ok_or_else(malformed)?;
    let (header, data) = (String::from_utf8_lossy(header), &bytes[8 + header_len..]);
    let mut out = Vec::new();
    // Enough JSON for one purpose: each entry is `"name":{…"data_offsets":[a,b]…}`.
    for entry in header.split('}') {
        if !entry.contains(".experts.") || !entry.contains("\"BF16\"") || !entry.contains(".weight") {
            continue;
        }
        let offsets = entry.split("\"data_offsets\":[").nth(1).and_then(|s| s.split(']').next());
        let offsets: Vec<usize> =
            offsets.ok_or_else(malformed)?.split(',').filter_map(|n| n.trim().parse().ok()).collect();
        let range = offsets[0]..offsets[1];
        out.extend(data[range].as_chunks::<2>().0.iter().map(|b| bf16_to_f32(u16::from_le_bytes(*b))));
    }
    out.truncate(out.len() / 256 * 256);
    Ok(Weights { name: "experts", cols: 128, data: out })
}

/// Packs and unpacks; also megabytes of f32 per second.
fn ours(ty: WeightType, w: &Weights) -> (Vec<f32>, f64) {
    let rows = w.data.len() / w.cols;
    let (len, group) = (packed_len(ty, rows, w.cols), row_group_len(ty, w.cols));
    let (len, group) = (len.expect("small"), group.expect("small"));
    let mut out = vec![0; len];
    let start = Instant::now();
    for (out, rows) in out.chunks_exact_mut(group).zip(w.data.chunks(ROW_GROUP * w.cols)) {
        pack_row_group(ty, rows, rows.len() / w.cols, w.cols, out);
    }
    let rate = 4e-6 * w.data.len() as f64 / start.elapsed().as_secs_f64();
    (unpack(Matrix::new(ty, rows, w.cols, &out).expect("just packed")), rate)
}

/// Percent.
fn relative_error(got: &[f32], want: &[f32]) -> f64 {
    let error: f64 = got.iter().zip(want).map(|(g, w)| (f64::from(*g) - f64::from(*w)).powi(2)).sum();
    let size: f64 = want.iter().map(|w| f64::from(*w).powi(2)).sum();
    100.0 * (error / size).sqrt()
}

fn main() -> std::io::Result<()> {
    let mut rng = Rng(1);
    let mut all = vec![random("normal", || rng.normal())];
    all.push(random("Laplace", || rng.laplace()));
    all.push(random("Student t4", || rng.student()));
    if let Some(path) = std::env::args().nth(1) {
        all.push(experts(&path)?);
    }
    println!("relative RMS error in percent");
    println!("type    {}", all.iter().map(|w| format!("{:>11}", w.name)).collect::<String>());
    for (name, round_trip) in reference::TYPES {
        let errors = all.iter().map(|w| format!("{:11.3}", relative_error(&round_trip(&w.data), &w.data)));
        println!("{name:8}{}", errors.collect::<String>());
    }
    for (name, ty) in [("q8", WeightType::Q8), ("q4", WeightType::Q4), ("q3", WeightType::Q3)] {
        let results: Vec<_> = all.iter().map(|w| (relative_error(&ours(ty, w).0, &w.data), ours(ty, w).1)).collect();
        let errors: String = results.iter().map(|r| format!("{:11.3}", r.0)).collect();
        println!("{name:8}{errors}   packed at {:.0} MB/s of f32", results[0].1);
    }
    Ok(())
}
