//! Whether reading compressed experts is faster than reading plain ones, which depends on the drive and on how fast the threads
//! decompress.

use std::time::{Duration, Instant};

use serde::Serialize;
use sluice_format::planes::{Frames, encode};
use sluice_format::{ANY_INDEX, ExtentKind, Layout, PAGE_SIZES, TensorRecord, WeightType};
use sluice_kernels::ThreadPool;

/// Least time of a measurement.
const LEAST_TIME: Duration = Duration::from_millis(40);
/// Bytes of the sample: an expert of a small model.
const SAMPLE: usize = 6 << 20;

/// The value of compressing experts on a machine.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct CompressionWorth {
    /// Stored bytes of an expert ÷ its bytes in memory.
    pub stored_part: f64,
    /// Bytes in memory that all threads together decompress in a second.
    pub decompressed_per_second: f64,
    /// On drives that are slower than this, in bytes per second, compressed experts arrive sooner than plain ones, even if nothing
    /// else is read while an expert is decompressed. If reads overlap, compression may also pay on faster drives.
    pub pays_below: f64,
}

impl CompressionWorth {
    /// Reading `stored_part` and decompressing it takes less time than reading all, if the drive is slower than this.
    fn new(stored_part: f64, decompressed_per_second: f64) -> Self {
        let pays_below = decompressed_per_second * (1.0 - stored_part).max(0.0);
        CompressionWorth { stored_part, decompressed_per_second, pays_below }
    }

    /// Measures with the stored bytes of a compressed extent; `None` if they do not become `logical_len` bytes.
    pub fn measure(stored: &[u8], logical_len: usize, threads: &ThreadPool) -> Option<Self> {
        let mut frames = Frames::default();
        let frames = frames.read(stored, logical_len as u64).ok()?;
        let ends: Vec<usize> = frames.iter().map(|frame| frame.range().end).collect();
        let mut out = vec![0; logical_len];
        let (mut best, begun) = (Duration::MAX, Instant::now());
        // The first run also creates the threads' buffers.
        for run in 0.. {
            let started = Instant::now();
            threads.for_each_part(&mut out, &ends, &|i, part| {
                // Data that cannot be decoded are noticed where they are used; here only the time matters.
                let _ = frames[i].decode(stored, part);
            });
            best = if run == 0 { best } else { best.min(started.elapsed()) };
            if run >= 3 && begun.elapsed() >= LEAST_TIME {
                break;
            }
        }
        let stored_part = stored.len() as f64 / logical_len.max(1) as f64;
        Some(CompressionWorth::new(stored_part, logical_len as f64 / best.as_secs_f64().max(1e-9)))
    }

    /// The value for experts of a type, from a sample of random weights; `None` for a type that compression does not shorten
    /// enough.
    pub fn of_type(ty: WeightType, threads: &ThreadPool) -> Option<Self> {
        let logical = sample(ty)?;
        let tensor = TensorRecord {
            kind: ExtentKind::Expert,
            weight_type: ty,
            layout: Layout::Plain,
            layer: 0,
            index: ANY_INDEX,
            shape: [1, 1, 0],
            offset: 0,
            len: logical.len() as u64,
            name: "sample".into(),
        };
        let stored = encode(&logical, &[tensor], PAGE_SIZES[0])?;
        CompressionWorth::measure(&stored, logical.len(), threads)
    }
}

/// Values that are distributed like trained weights, which are close to a normal distribution: sums of four uniform numbers.
fn sample(ty: WeightType) -> Option<Vec<u8>> {
    let mut state = 1u64;
    let mut normal = move || {
        let mut uniform = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u32 << 24) as f32 - 0.5
        };
        0.03 * (uniform() + uniform() + uniform() + uniform())
    };
    match ty {
        WeightType::Bf16 => {
            Some((0..SAMPLE / 2).flat_map(|_| ((normal().to_bits() >> 16) as u16).to_le_bytes()).collect())
        }
        WeightType::F16 => {
            // Normal numbers only: exponents of f32 moved to those of f16.
            let bits = |value: f32| {
                let bits = value.to_bits();
                let exponent = ((bits >> 23) & 0xff) as i32 - 127 + 15;
                let mantissa = (bits >> 13) & 0x3ff;
                ((bits >> 16) & 0x8000) | if exponent > 0 { (exponent as u32) << 10 | mantissa } else { 0 }
            };
            Some((0..SAMPLE / 2).flat_map(|_| (bits(normal()) as u16).to_le_bytes()).collect())
        }
        WeightType::Fp8 => {
            // Scaled so that the largest values nearly fill the range, as block scales do.
            let code = |value: f32| {
                let scaled = (value * (448.0 / 0.06)).clamp(-448.0, 448.0);
                let bits = scaled.to_bits();
                let exponent = ((bits >> 23) & 0xff) as i32 - 127 + 7;
                let mantissa = (bits >> 20) & 7;
                ((bits >> 24) & 0x80) | if exponent > 0 { (exponent as u32).min(15) << 3 | mantissa.min(6) } else { 0 }
            };
            Some((0..SAMPLE).map(|_| code(normal()) as u8).collect())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_shrink_by_what_their_exponents_waste() {
        let threads = ThreadPool::new(2);
        for (ty, least, most) in
            [(WeightType::Bf16, 0.6, 0.72), (WeightType::F16, 0.8, 0.92), (WeightType::Fp8, 0.75, 0.92)]
        {
            let worth = CompressionWorth::of_type(ty, &threads).unwrap();
            assert!((least..most).contains(&worth.stored_part), "{ty}: {worth:?}");
            assert!(worth.pays_below > 0.0 && worth.pays_below < worth.decompressed_per_second);
        }
        assert_eq!(CompressionWorth::of_type(WeightType::Q4, &threads), None);
        assert_eq!(CompressionWorth::measure(&[1, 2, 3], 100, &threads), None);
    }
}
