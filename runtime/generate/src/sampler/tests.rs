//! Tests of the sampler, most of them against a naive one that sorts everything.

use super::Rng;
use super::*;
use proptest::prelude::*;

fn config(temperature: f32) -> SamplerConfig {
    SamplerConfig { temperature, ..SamplerConfig::default() }
}

fn sampler(config: SamplerConfig) -> Sampler {
    Sampler::new(config).unwrap()
}

/// Probabilities by the textbook: each step on full, sorted vectors, as Hugging Face writes them.
fn naive(config: &SamplerConfig, logits: &[f32], history: &[u32]) -> Vec<f64> {
    let mut scores: Vec<f64> = logits.iter().map(|&x| f64::from(x)).collect();
    let penalty = config.repetition_penalty;
    for id in 0..logits.len() {
        if history.contains(&(id as u32)) {
            let x = logits[id];
            scores[id] = f64::from(if x < 0.0 { x * penalty } else { x / penalty });
        }
    }
    let softmax = |scores: &[f64]| -> Vec<f64> {
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|x| (x - largest).exp()).collect();
        let total: f64 = weights.iter().sum();
        weights.iter().map(|w| w / total).collect()
    };
    for x in &mut scores {
        *x /= f64::from(config.temperature);
    }
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
    if config.top_k > 0 && (config.top_k as usize) < scores.len() {
        let kth = scores[order[config.top_k as usize - 1]];
        for x in &mut scores {
            if *x < kth {
                *x = f64::NEG_INFINITY;
            }
        }
    }
    if config.top_p < 1.0 {
        let p = softmax(&scores);
        let mut before = 0.0;
        for (rank, &id) in order.iter().enumerate() {
            if rank > 0 && before >= f64::from(config.top_p) {
                scores[id] = f64::NEG_INFINITY;
            }
            before += p[id];
        }
    }
    let p = softmax(&scores);
    let least = p.iter().copied().fold(0.0, f64::max) * f64::from(config.min_p);
    for (x, &p) in scores.iter_mut().zip(&p) {
        if p < least {
            *x = f64::NEG_INFINITY;
        }
    }
    softmax(&scores)
}

/// The sampler's probabilities, read from its candidates after a draw.
fn probabilities(sampler: &mut Sampler, logits: &[f32], history: &[u32]) -> Vec<f64> {
    let drawn = sampler.sample(logits, history).unwrap();
    let total: f64 = sampler.candidates.iter().map(|c| c.weight).sum();
    let mut p = vec![0.0; logits.len()];
    for c in &sampler.candidates {
        p[c.id as usize] = c.weight / total;
    }
    assert!(p[drawn as usize] > 0.0);
    p
}

#[test]
fn greedy_takes_the_likeliest_and_of_equals_the_first() {
    let mut greedy = sampler(config(0.0));
    let before = greedy.state();
    assert_eq!(greedy.sample(&[0.0, 2.0, 1.0, 2.0], &[]), Ok(1));
    assert_eq!(greedy.sample(&[f32::NEG_INFINITY, -5.0], &[]), Ok(1));
    assert_eq!(greedy.sample(&[-0.0, 0.0], &[]), Ok(0));
    assert_eq!(greedy.state(), before);
}

#[test]
fn repetition_is_penalised_once_per_token() {
    let penalty = |repetition_penalty| sampler(SamplerConfig { repetition_penalty, ..config(0.0) });
    // 3 / 1.5 = 2 < 2.5, and 3 / 1.5 / 1.5 would be 1.33 < 1.9.
    assert_eq!(penalty(1.5).sample(&[3.0, 2.5, 1.9], &[0, 0]), Ok(1));
    assert_eq!(penalty(1.5).sample(&[3.0, 1.9], &[0, 0]), Ok(0));
    assert_eq!(penalty(1.0).sample(&[3.0, 2.5], &[0, 99]), Ok(0));
    // Negative logits move away from 0 as well.
    assert_eq!(penalty(2.0).sample(&[-1.0, -1.5], &[0]), Ok(1));
    // Below 1, occurring makes a token likelier.
    assert_eq!(penalty(0.5).sample(&[2.0, 1.5], &[1]), Ok(1));
    // Extreme values neither exclude a token nor overflow.
    assert_eq!(penalty(1e-38).sample(&[1e38, 2e38], &[0, 1]), Ok(0));
    assert_eq!(penalty(1e38).sample(&[-1e38, f32::NEG_INFINITY], &[0, 1]), Ok(0));
    assert_eq!(penalty(1.1).sample(&[1.0], &[1]), Err(SamplerError::HistoryOutOfRange { id: 1, vocab: 1 }));
}

#[test]
fn senseless_logits_are_errors() {
    for temperature in [0.0, 0.7] {
        let mut sampler = sampler(config(temperature));
        let before = sampler.state();
        let nan = sampler.sample(&[0.0, f32::NAN], &[]).unwrap_err();
        assert!(matches!(nan, SamplerError::NotANumber { id: 1, .. }));
        let infinite = sampler.sample(&[f32::INFINITY, 0.0], &[]).unwrap_err();
        assert!(matches!(infinite, SamplerError::NotANumber { id: 0, .. }));
        let excluded = [f32::NEG_INFINITY; 3];
        assert_eq!(sampler.sample(&excluded, &[]), Err(SamplerError::NothingLeft));
        let none = sampler.sample(&[], &[]).unwrap_err();
        assert_eq!(none, SamplerError::BadLength { count: 0 });
        assert_eq!(sampler.state(), before);
    }
}

#[test]
fn senseless_settings_are_named() {
    let base = config(1.0);
    for (bad, wrong) in [
        (config(-0.1), "temperature"),
        (config(f32::NAN), "temperature"),
        (config(f32::INFINITY), "temperature"),
        (SamplerConfig { top_p: 0.0, ..base }, "top_p"),
        (SamplerConfig { top_p: 1.1, ..base }, "top_p"),
        (SamplerConfig { min_p: -0.1, ..base }, "min_p"),
        (SamplerConfig { min_p: f32::NAN, ..base }, "min_p"),
        (SamplerConfig { repetition_penalty: 0.0, ..base }, "repetition_penalty"),
        (SamplerConfig { repetition_penalty: f32::INFINITY, ..base }, "repetition_penalty"),
    ] {
        match Sampler::new(bad) {
            Err(SamplerError::Config { field, .. }) => assert_eq!(field, wrong),
            other => panic!("{bad:?}: {other:?}"),
        }
    }
}

#[test]
fn top_k_keeps_equals() {
    let mut sampler = sampler(SamplerConfig { top_k: 2, ..config(1.0) });
    sampler.sample(&[1.0, 3.0, 2.0, 2.0, 0.0], &[]).unwrap();
    let kept: Vec<u32> = sampler.candidates.iter().map(|c| c.id).collect();
    assert_eq!(kept, [1, 2, 3]);
}

#[test]
fn tiny_temperatures_and_huge_logits_are_greedy() {
    let mut sampler = sampler(config(f32::MIN_POSITIVE));
    for _ in 0..20 {
        assert_eq!(sampler.sample(&[f32::MAX, f32::MIN, 1e38], &[]), Ok(0));
        assert_eq!(sampler.sample(&[30.0, 30.5], &[]), Ok(1));
    }
}

#[test]
fn frequencies_follow_the_probabilities() {
    let mut sampler = sampler(SamplerConfig { seed: 42, ..config(0.8) });
    let logits = [1.0, 0.0, -1.0, 2.0, f32::NEG_INFINITY, 0.5];
    let want = naive(sampler.config(), &logits, &[]);
    let mut counts = [0u32; 6];
    let draws = 50_000;
    for _ in 0..draws {
        counts[sampler.sample(&logits, &[]).unwrap() as usize] += 1;
    }
    assert_eq!(counts[4], 0);
    // Pearson's statistic with 4 degrees of freedom: one seed in a thousand exceeds 18.5.
    let chi2: f64 = (0..6)
        .filter(|&i| want[i] > 0.0)
        .map(|i| {
            let expected = want[i] * f64::from(draws);
            (f64::from(counts[i]) - expected).powi(2) / expected
        })
        .sum();
    assert!(chi2 < 18.5, "{chi2}: {counts:?}");
}

/// Pinned: these tokens must never change, on any platform or in any version.
#[test]
fn a_seed_means_the_same_for_ever() {
    let mut sampler = sampler(SamplerConfig {
        temperature: 0.9,
        top_k: 50,
        top_p: 0.95,
        min_p: 0.01,
        repetition_penalty: 1.1,
        seed: 2026,
    });
    let logits: Vec<f32> = (0..1000u32).map(|i| (i * 7919 % 1000) as f32 / 100.0).collect();
    let mut history = Vec::new();
    for _ in 0..12 {
        history.push(sampler.sample(&logits, &history).unwrap());
    }
    assert_eq!(history, PINNED);
}

const PINNED: [u32; 12] = [704, 531, 519, 124, 198, 877, 482, 803, 87, 889, 655, 815];

#[test]
fn goes_on_from_a_saved_state() {
    let config = SamplerConfig { seed: 7, ..config(1.0) };
    let logits: Vec<f32> = (0..100).map(|i| (i as f32).sin()).collect();
    let mut first = sampler(config);
    for _ in 0..5 {
        first.sample(&logits, &[]).unwrap();
    }
    let mut second = Sampler::from_state(config, first.state()).unwrap();
    for _ in 0..50 {
        assert_eq!(first.sample(&logits, &[]), second.sample(&logits, &[]));
    }
    assert_eq!(Sampler::from_state(config, [0; 4]).unwrap_err(), SamplerError::BadState);
}

#[test]
fn a_warm_sampler_does_not_allocate() {
    let mut sampler = sampler(SamplerConfig { top_p: 0.9, top_k: 700, ..config(1.0) });
    let mut rng = Rng::from_seed(1);
    let mut logits = vec![f32::NEG_INFINITY; 5000];
    logits[3] = 1.0;
    sampler.sample(&logits, &[]).unwrap();
    let warm = |s: &Sampler| (s.scores.as_ptr(), s.candidates.as_ptr(), s.candidates.capacity());
    let before = warm(&sampler);
    for _ in 0..20 {
        logits.fill_with(|| rng.next_f64() as f32 * 8.0);
        sampler.sample(&logits, &[]).unwrap();
        assert_eq!(warm(&sampler), before);
    }
}

fn any_config() -> impl Strategy<Value = SamplerConfig> {
    (
        0.05f32..3.0,
        prop_oneof![Just(0u32), 1u32..400],
        prop_oneof![Just(1.0f32), 0.01f32..1.0],
        prop_oneof![Just(0.0f32), 0.0f32..1.0],
        prop_oneof![Just(1.0f32), 0.5f32..2.0],
        any::<u64>(),
    )
        .prop_map(|(temperature, top_k, top_p, min_p, repetition_penalty, seed)| SamplerConfig {
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty,
            seed,
        })
}

/// Logits with excluded tokens and with equals, which bf16 models produce all the time.
fn any_logits() -> impl Strategy<Value = Vec<f32>> {
    let logit = prop_oneof![
        1 => Just(f32::NEG_INFINITY),
        4 => (-20i8..20).prop_map(|x| f32::from(x) / 2.0),
        8 => -10f32..10.0,
    ];
    prop::collection::vec(logit, 1..600)
        .prop_filter("something must be left", |logits| logits.iter().any(|x| x.is_finite()))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn agrees_with_the_naive_sampler(
        config in any_config(),
        logits in any_logits(),
        picks in prop::collection::vec(any::<prop::sample::Index>(), 0..20),
    ) {
        let history: Vec<u32> = picks.iter().map(|i| i.index(logits.len()) as u32).collect();
        let want = naive(&config, &logits, &history);
        let got = probabilities(&mut sampler(config), &logits, &history);
        for (id, (got, want)) in got.iter().zip(&want).enumerate() {
            prop_assert!((got - want).abs() < 1e-9, "token {}: {} {}", id, got, want);
        }
    }

    #[test]
    fn the_seed_decides_alone(config in any_config(), logits in any_logits()) {
        let mut first = sampler(config);
        let mut second = sampler(config);
        // The buffers of a used sampler hold other data, which must not matter.
        second.sample(&[1.0, 2.0], &[]).unwrap();
        second.rng = Rng::from_seed(config.seed);
        for _ in 0..4 {
            prop_assert_eq!(first.sample(&logits, &[]), second.sample(&logits, &[]));
        }
    }

    #[test]
    fn any_bits_give_a_token_or_an_error(
        config in any_config(),
        bits in prop::collection::vec(any::<u32>(), 0..50),
        history in prop::collection::vec(0u32..60, 0..5),
    ) {
        let logits: Vec<f32> = bits.into_iter().map(f32::from_bits).collect();
        if let Ok(id) = sampler(config).sample(&logits, &history) {
            prop_assert!(logits[id as usize] > f32::NEG_INFINITY);
        }
    }
}

#[test]
fn the_draw_of_a_token_depends_on_seed_and_index_alone() {
    let logits: Vec<f32> = (0..50).map(|i| (i as f32 * 0.7).sin()).collect();
    let settings = SamplerConfig { seed: 9, ..config(1.0) };
    let mut stream = sampler(settings);
    let in_order: Vec<u32> = (0..40).map(|_| stream.sample(&logits, &[]).unwrap()).collect();
    let mut any = sampler(settings);
    for index in [0, 1, 2, 39, 7, 7, 8, 0, 20] {
        assert_eq!(any.sample_at(index, &logits, &[]), Ok(in_order[index as usize]), "{index}");
    }
    // A sampler whose position is unknown finds it.
    let mut resumed = Sampler::from_state(settings, any.state()).unwrap();
    assert_eq!(resumed.sample_at(5, &logits, &[]), Ok(in_order[5]));
    // A call that fails draws nothing.
    assert!(resumed.sample_at(6, &[f32::NAN], &[]).is_err());
    assert_eq!(resumed.sample_at(6, &logits, &[]), Ok(in_order[6]));
}

#[test]
fn logarithms_of_probabilities_agree_with_the_book() {
    let logits = [1.0, 3.0, f32::NEG_INFINITY, 3.0, -2.0];
    let total: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
    let book = |id: usize| (f64::from(logits[id]) - total.ln()) as f32;
    let (own, top) = logprobs(&logits, 4, 3);
    assert!((own - book(4)).abs() < 1e-6, "{own}");
    assert_eq!(top.iter().map(|t| t.id).collect::<Vec<_>>(), [1, 3, 0], "of equals the lower id first");
    assert!(top.iter().all(|t| (t.logprob - book(t.id as usize)).abs() < 1e-6));
    // More than there are: all tokens, the excluded one last.
    let (excluded, all) = logprobs(&logits, 2, 100);
    assert_eq!((excluded, all.len(), all[4].id), (f32::NEG_INFINITY, 5, 2));
    assert_eq!(logprobs(&logits, 0, 0).1, []);
}
