//! What `sluice plan` computes: its hit rates agree with replays, and its sizes with calculations by hand.

use sluice_converter::synth::{Geometry, Layout, WeightTypes};
use sluice_format::ModelFile;
use sluice_format::WeightType;
use sluice_lab::batch::{Load, Rates, Width, saved_bytes};
use sluice_lab::course::{Course, Item, Place};
use sluice_lab::estimate::{Bound, CURVES, Machine, Needs, Speed, StepWork};
use sluice_lab::schedule::{Cores, Forecast};
use sluice_lab::trace::{Phase, Replay, Trace};
use sluice_model::KvType;
use sluice_storage::pool::policy::PolicyKind;
use sluice_tests::Converted;
use sluice_tests::fixture;

const FOUR_BITS: WeightTypes = WeightTypes { experts: WeightType::Int4, dense: WeightType::Q8 };

/// The default policy may become better than the curves, but not worse.
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

/// DeepSeek-R1 in four bits. An expert has 3 × 7168 × 2048 weights at 4.5 bits = 24 772 608 bytes, which is a whole number of
/// pages. A token uses 58 layers × 8 of them: 11.49 GB.
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
    // Each layer has 187 million weights of attention; three dense layers have 3 × 18432 × 7168 each, and 58 layers a ninth of that
    // in shared experts; the head has 129280 × 7168. At 8.5 bits that is 18.0 GB, 0.2 GB of which are routers in bf16.
    assert!((17.0e9..18.5e9).contains(&(needs.dense_bytes as f64)), "{}", needs.dense_bytes);
    // Latents of 576 f32 in 61 layers.
    assert_eq!(needs.kv_cache_bytes, 4096 * 576 * 4 * 61);
    // A row of 576 has 18 scales of two bytes each.
    for (kv_type, row) in [(KvType::F16, 2 * 576), (KvType::Bf16, 2 * 576), (KvType::Q8, 576 + 2 * 18)] {
        let narrow = Needs::of(spec, extents, 4096, kv_type);
        assert_eq!(narrow.kv_cache_bytes, 4096 * row * 61);
        assert_eq!(needs.least_memory - narrow.least_memory, needs.kv_cache_bytes - narrow.kv_cache_bytes);
    }

    let gib = |n: u64| n << 30;
    let machine = Machine { ram: gib(64), ssd: 3_000_000_000, ssd_latency: 80e-6, memory_bandwidth: 50_000_000_000 };
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

    // With room for everything, nothing is read from the drive any more.
    let all = Speed::of(spec, extents, Machine { ram: gib(1024), ..machine }, 4096, KvType::F32).unwrap();
    assert_eq!((all.hit_rate, all.missed_bytes, all.bound), (1.0, 0, Bound::Memory));
    assert_eq!(all.memory.effective, needs.best_memory);
    let none = Speed::of(spec, extents, Machine { ram: gib(1), ..machine }, 4096, KvType::F32).unwrap_err();
    assert_eq!(none.least, needs.least_memory);
}

/// Qwen3-30B in four bits, on cores that get as much done as memory gives, and on slower ones.
#[test]
fn a_forecast_lies_between_the_bound_and_doing_one_thing_after_the_other() {
    let geometry = Geometry::load("qwen3-30b", None).unwrap();
    let layout = Layout::new(geometry.spec(), FOUR_BITS, 4096).unwrap();
    let model = (geometry.spec(), layout.extents());
    let on = |ram: u64, cores: Cores, replay: Option<&Replay>| {
        let machine = Machine { ram, ssd: 3_000_000_000, ssd_latency: 80e-6, memory_bandwidth: 50_000_000_000 };
        let speed = Speed::of(model.0, model.1, machine, 4096, KvType::F32).unwrap();
        let forecast = Forecast::of(model, (&machine, &cores), &speed, (4096, KvType::F32), replay).unwrap();
        (speed, forecast)
    };
    let usual = Cores::of_rate(50e9);
    let mut last = 0.0;
    for gib in [6, 9, 13, 40] {
        let (speed, forecast) = on(gib << 30, usual, None);
        assert!((forecast.hit_rate - speed.hit_rate).abs() < 0.02, "{forecast:?}");
        let both = forecast.drive_seconds + forecast.computing_seconds + 48.0 * 80e-6;
        assert!(
            (1.0 / speed.tokens_per_second * 0.95..both).contains(&forecast.token_seconds),
            "{forecast:?}, {speed:?}"
        );
        let [low, high] = forecast.tokens_per_second_range;
        assert!(low <= forecast.tokens_per_second && forecast.tokens_per_second <= high);
        assert!(forecast.tokens_per_second > last, "{gib} GiB: {forecast:?}");
        last = forecast.tokens_per_second;
    }
    let (speed, forecast) = on(40 << 30, usual, None);
    assert!((forecast.tokens_per_second / speed.tokens_per_second - 1.0).abs() < 0.01, "everything is in memory");
    // 6 sections of a layer and 2 of each of its 8 experts, 10 µs each, and the head's.
    let (_, barriers) = on(40 << 30, Cores { section_seconds: 1e-5, ..usual }, None);
    let more = barriers.token_seconds - forecast.token_seconds;
    assert!((more - 1e-5 * (48.0 * (6.0 + 2.0 * 8.0) + 1.0)).abs() < 1e-9, "{more}");
    // Attention of 32 heads to 4096 keys and values of 128: 3.2 billion operations.
    let (_, slow) = on(40 << 30, Cores { operations: Some(1e10), ..usual }, None);
    let keys = f64::from(4096 * 2 * 4 * 128 * 4 * 48) / 50e9;
    let more = slow.token_seconds - forecast.token_seconds;
    assert!((more - (2.0 * 32.0 * 256.0 * 4096.0 * 48.0 / 1e10 - keys)).abs() < 1e-6, "{more}");
    let (_, beside) = on(6 << 30, Cores { experts_beside_reads: 5e9, ..usual }, None);
    assert!(beside.token_seconds > on(6 << 30, usual, None).1.token_seconds);
    // Only what was read is verified, so it takes time where experts are missed.
    let verified = Cores { verification: Some(5e9), ..usual };
    assert_eq!(on(40 << 30, verified, None).1.token_seconds, forecast.token_seconds);
    assert!(on(6 << 30, verified, None).1.token_seconds > on(6 << 30, usual, None).1.token_seconds);

    let trace = Trace::open(&fixture("traces").join("qwen3-30b-a3b.jsonl")).unwrap();
    let replay = Replay::new(&trace, Some(128)).unwrap();
    let (speed, forecast) = on(9 << 30, usual, Some(&replay));
    let layers: Vec<usize> = (0..48).collect();
    let misses = replay.misses_of_tokens(speed.memory.slots, &layers, 48).unwrap();
    let generated = trace.tokens().iter().filter(|token| token.phase == Some(Phase::Decode)).count();
    assert_eq!(misses.len(), 48 * generated, "tokens of the prompt fill the cache, and are not counted");
    let missed: usize = misses.iter().sum();
    assert!(missed > 0 && (missed as u64) < replay.run(PolicyKind::default(), speed.memory.slots).misses());
    // The trace has 6 experts a layer, the model 8.
    let part = missed as f64 / (8 * 48 * generated) as f64;
    assert!((1.0 - forecast.hit_rate - part).abs() < 1e-9, "{part}: {forecast:?}");
    let other = Trace::open(&fixture("traces").join("olmoe-1b-7b.jsonl")).unwrap();
    let other = Replay::new(&other, Some(64)).unwrap();
    assert_eq!(other.misses_of_tokens(10, &[0, 1, 2], 3), None, "another number of layers");
}

/// The demo model, by hand. Attention of a layer: 96×128 + 192×96 + 80×128 + 2 × 4×32×64 + 128×128 weights in matrices, 288 in
/// norms; six of them. Routers: 32×128 with a bias of 32 in five layers, a norm of 128 in six. Dense parts: 3 × 384×128 once,
/// 3 × 64×128 in five layers. The head: 1536×128. That is 932 448, and the 4 experts of 3 × 64×128 of five layers add 491 520.
#[test]
fn work_of_a_step_of_the_demo_model() {
    let model = Converted::new("demo-model", Some(WeightType::Q8));
    let file = ModelFile::open(&model.path).unwrap();
    let one = StepWork::of(&file, 1, 20.0, 0.0, KvType::F32);
    assert_eq!(one.operations, 2.0 * (932_448.0 + 491_520.0));
    // An expert is 28 KiB on the drive, and a token's latents take 80 f32 in six layers.
    let eight = StepWork::of(&file, 8, 98.0, 10.0, KvType::F32);
    assert_eq!(eight.operations, 8.0 * one.operations);
    let more = 78.0 * f64::from(28 << 10) + 8.0 * 10.0 * (6.0 * 80.0 * 4.0);
    assert_eq!(eight.touched_bytes, one.touched_bytes + more);
    assert_eq!(one.touched_bytes, f64::from((204 + 4 + 480 + 64 + 296) << 10) + 20.0 * f64::from(28 << 10));
}

/// Of a model that is all in memory, only arithmetic makes reading again slow: saving pays where that takes four times as long as writing
/// and reading back what is saved, and a second.
#[test]
fn sequences_are_saved_where_that_takes_less_than_reading_again() {
    let model = Converted::new("golden/qwen3_moe", None);
    let file = ModelFile::open(&model.path).unwrap();
    let load = Load { answers: 8, prompt_tokens: 800.0, answer_tokens: 800.0, unlimited: 0, context: 512 };
    let worth = |drive: f64, arithmetic: f64| {
        let rates = Rates { drive, latency: 0.0, memory: 1e9, arithmetic };
        let width = Width::of(&file, None, KvType::F32, &load, &rates, 8).unwrap();
        width.worth_saving(&file, &load, &rates, KvType::F32)
    };
    let bytes = 2.0 * 8.0 * saved_bytes(&file, 64, KvType::F32) as f64;
    let operations = StepWork::of(&file, 8 * 64, 0.0, 32.0, KvType::F32).operations;
    // Ten seconds to read 64 tokens of each again, and less, or more, than a quarter of that to save them.
    assert_eq!(worth(bytes / 2.0, operations / 10.0), Some(64));
    assert_eq!(worth(bytes / 4.0, operations / 10.0), None);
    // Nothing takes long: 512 tokens of each take some milliseconds.
    assert_eq!(worth(1e12, operations * 1000.0), None);
    // Where 64 tokens take a quarter of a second, 256 take one.
    assert_eq!(worth(1e12, operations * 3.9), Some(256));
}

/// A batch of the demo model, simulated on machines on which one thing takes all the time.
#[test]
fn the_course_of_a_batch_takes_what_its_steps_take() {
    let model = Converted::new("demo-model", Some(WeightType::Q8));
    let file = ModelFile::open(&model.path).unwrap();
    let (answers, tokens) = (16, 40.0);
    let course = |drive: f64, arithmetic: f64, sequences: usize, items: &[Item]| {
        let rates = Rates { drive, latency: 0.0, memory: 1e15, arithmetic };
        let cores = Cores::of_rate(1e15);
        let place = Place { file: &file, budget: None, kv_type: KvType::F32, rates, cores, fresh: 1e15, more: 0.0 };
        let sum = |part: &dyn Fn(&Item) -> f64| items.iter().map(part).sum();
        let load = Load {
            answers: items.iter().map(|item| item.answers).sum(),
            prompt_tokens: sum(&|item| item.prompt),
            answer_tokens: sum(&|item| item.answers as f64 * item.tokens),
            unlimited: 0,
            context: 256,
        };
        Course::of(&place, &load, sequences, items).unwrap()
    };
    let items = vec![Item { prompt: 10.0, answers: 1, tokens }; answers];
    // All weights fit, so the drive reads them once, and not each expert is used.
    let slow_drive = course(1e6, 1e15, 4, &items);
    let bytes = file.extents().iter().map(|extent| extent.stored_len).sum::<u64>() as f64;
    assert!(slow_drive.seconds < 1.05 * bytes / 1e6 + 0.1, "{slow_drive:?}, {bytes}");
    assert!(slow_drive.seconds > 0.5 * bytes / 1e6, "{slow_drive:?}, {bytes}");
    assert_eq!(slow_drive.tokens, answers as f64 * tokens);
    // Arithmetic is the same, however many are answered at a time: of each token read or generated, but the last of each answer.
    let operations = StepWork::of(&file, 1, 0.0, 0.0, KvType::F32).operations;
    let rows = answers as f64 * (10.0 + tokens - 1.0);
    for sequences in [1, 4, 16] {
        let slow_cores = course(1e15, 1e9, sequences, &items);
        let want = rows * operations / 1e9;
        // The output head is not computed for tokens of prompts.
        assert!(
            slow_cores.seconds < 1.05 * want && slow_cores.seconds > 0.9 * want,
            "{sequences}: {slow_cores:?}, {want}"
        );
    }
    // An answer that goes on alone, and prompts that are read while it does.
    let mut uneven = items.clone();
    uneven[0].tokens = 400.0;
    let (even, uneven) = (course(1e15, 1e9, 4, &items), course(1e15, 1e9, 4, &uneven));
    let more = 360.0 * operations / 1e9;
    assert!((uneven.seconds - even.seconds) / more > 0.9 && (uneven.seconds - even.seconds) / more < 1.1);
    assert!(uneven.reading > 0.0 && uneven.generating > even.generating);
    // Of very many requests, some are simulated: in turns short and long ones, and as many of each as there are.
    let turns = |count: usize| -> Vec<Item> {
        let lengths = [10.0, 90.0, 20.0, 40.0];
        (0..count).map(|at| Item { prompt: 10.0, answers: 1, tokens: lengths[at % 4] }).collect()
    };
    let (few, many) = (course(1e15, 1e9, 4, &turns(4000)), course(1e15, 1e9, 4, &turns(40_000)));
    assert_eq!(many.tokens, 10.0 * few.tokens);
    assert!((many.seconds / few.seconds / 10.0 - 1.0).abs() < 0.03, "{few:?}, {many:?}");
    // Several answers to one prompt read it once.
    let shared = [Item { prompt: 10.0, answers, tokens }];
    assert!(course(1e15, 1e9, 16, &shared).reading < course(1e15, 1e9, 16, &items).reading);
}
