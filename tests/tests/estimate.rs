//! What `sluice plan` computes: hit rates are those of replays, sizes are those of hand calculations.

use sluice_converter::synth::{Geometry, Layout, WeightTypes};
use sluice_format::WeightType;
use sluice_runtime::KvType;
use sluice_runtime::estimate::{Bound, CURVES, Machine, Needs, Speed};
use sluice_runtime::pool::policy::PolicyKind;
use sluice_runtime::trace::{Replay, Trace};
use sluice_tests::fixture;

const FOUR_BITS: WeightTypes = WeightTypes { experts: WeightType::Int4, dense: WeightType::Q8 };

/// The default policy may become better than the curves, not worse.
#[test]
fn curves_are_replays() {
    for curve in CURVES {
        let trace = Trace::open(&fixture("traces").join(format!("{}.jsonl", curve.trace))).unwrap();
        let replay = Replay::new(&trace, Some(curve.experts as u32)).unwrap();
        for &(part, rate) in curve.points {
            let found = replay.run(PolicyKind::default(), replay.slots(part)).hit_rate();
            assert!((rate - 0.01..rate + 0.05).contains(&found), "{} at {part}: {found}, not {rate}", curve.trace);
        }
    }
}

/// DeepSeek-R1 in four bits. An expert: 3 × 7168 × 2048 weights at 4.5 bits = 24 772 608 bytes, which is whole pages. A
/// token uses 58 layers × 8 of them: 11.49 GB.
#[test]
fn figures_of_deepseek_r1() {
    let geometry = Geometry::load("deepseek-r1", None).unwrap();
    let layout = Layout::new(geometry.spec(), FOUR_BITS, 4096).unwrap();
    let (spec, extents) = (geometry.spec(), layout.extents());
    let needs = Needs::of(spec, extents, 4096, KvType::F32);
    assert_eq!(needs.expert_bytes, 24_772_608);
    assert_eq!((needs.experts, needs.experts_per_token), (58 * 256, 58 * 8));
    assert_eq!(needs.token_cycle_bytes, 24_772_608 * 464);
    assert!((needs.token_cycle_bytes as f64 / 11.49e9 - 1.0).abs() < 0.001);
    // Per layer 187 million weights of attention; 3 × 18432 × 7168 in three dense layers, a ninth of that shared in 58;
    // the head: 129280 × 7168. At 8.5 bits 18.0 GB; routers in bf16 are 0.2 GB of it.
    assert!((17.0e9..18.5e9).contains(&(needs.dense_bytes as f64)), "{}", needs.dense_bytes);
    // Latents of 576 f32 in 61 layers.
    assert_eq!(needs.kv_cache_bytes, 4096 * 576 * 4 * 61);
    // A row of 576 has 18 scales of two bytes.
    for (kv_type, row) in [(KvType::F16, 2 * 576), (KvType::Bf16, 2 * 576), (KvType::Q8, 576 + 2 * 18)] {
        let narrow = Needs::of(spec, extents, 4096, kv_type);
        assert_eq!(narrow.kv_cache_bytes, 4096 * row * 61);
        assert_eq!(needs.least_memory - narrow.least_memory, needs.kv_cache_bytes - narrow.kv_cache_bytes);
    }

    let gib = |n: u64| n << 30;
    let machine = Machine { ram: gib(64), ssd: 3_000_000_000, memory_bandwidth: 50_000_000_000 };
    let speed = Speed::of(spec, extents, machine, 4096, KvType::F32).unwrap();
    assert_eq!(speed.bound, Bound::Drive);
    assert_eq!(speed.streamed_bytes, 0);
    assert!((speed.cached - speed.memory.slots as f64 / 14_848.0).abs() < 1e-12);
    let misses = needs.token_cycle_bytes as f64 * (1.0 - speed.hit_rate);
    assert!((speed.missed_bytes as f64 - misses).abs() <= 1.0);
    assert!((speed.tokens_per_second - 3e9 / misses).abs() < 1e-6);
    let [low, high] = speed.tokens_per_second_range;
    assert!(low < speed.tokens_per_second && speed.tokens_per_second < high);
    let touched = needs.dense_bytes + needs.token_cycle_bytes + needs.kv_cache_bytes;
    assert!((speed.memory_seconds - touched as f64 / 50e9).abs() < 1e-9);

    // With room for everything nothing is read from the drive any more.
    let all = Speed::of(spec, extents, Machine { ram: gib(1024), ..machine }, 4096, KvType::F32).unwrap();
    assert_eq!((all.hit_rate, all.missed_bytes, all.bound), (1.0, 0, Bound::Memory));
    assert_eq!(all.memory.effective, needs.best_memory);
    let none = Speed::of(spec, extents, Machine { ram: gib(1), ..machine }, 4096, KvType::F32).unwrap_err();
    assert_eq!(none.least, needs.least_memory);
}
