//! Prompts in the expanded form of latent attention: the same mathematically, the same bits however they are read, and never mixed with
//! what was computed otherwise.

use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;
use sluice_format::WeightType;
use sluice_generate::{Drafts, Request, Sampled, SamplerConfig, SchedulerOptions, WhenFull};
use sluice_kernels::Activations;
use sluice_model::compute::InputObserver;
use sluice_model::memory::{Demand, MemoryPlan};
use sluice_model::session::SessionError;
use sluice_model::weights::MatrixPlace;
use sluice_model::{
    Control, Engine, EngineOptions, GENERATED, KvType, ModelError, Phase, PromptAttention, RuntimeError, Sequence,
    Span, Want,
};
use sluice_sessions::{Store, StoreOptions};
use sluice_tests::house::{Heard, House};
use sluice_tests::{Converted, Golden, relative_error};

/// All golden models with latent attention.
const FAMILIES: [&str; 12] = [
    "deepseek_v2",
    "deepseek_v2_lite",
    "deepseek_v3",
    "deepseek_v3_fp8",
    "deepseek_v32",
    "kimi_k2",
    "kimi_k2_int4",
    "kimi_k25_int4",
    "kimi_linear",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "bailing_hybrid",
];

fn expanded() -> EngineOptions {
    EngineOptions {
        prompt_attention: PromptAttention::Expanded,
        forget: true,
        threads: Some(1),
        ..EngineOptions::default()
    }
}

fn absorbed() -> EngineOptions {
    EngineOptions { prompt_attention: PromptAttention::Absorbed, ..expanded() }
}

fn demo() -> Converted {
    Converted::new("demo-model", Some(WeightType::Q8))
}

fn prompt(engine: &Engine, number: u32, length: usize) -> Vec<u32> {
    let vocab = engine.spec().vocab_size as u32;
    (0..length as u32).map(|i| (i * 7919 + i * i * 31 + number * 104_729 + 13) % vocab).collect()
}

/// A prompt for the demo model.
fn words(number: u32, length: usize) -> Vec<u32> {
    (0..length as u32).map(|i| (i * 7919 + number * 104_729 + 13) % 1536).collect()
}

/// All logits of tokens that are appended to a sequence, at most `most` in a step.
fn append(engine: &mut Engine, sequence: &mut Sequence, tokens: &[u32], phase: Phase, most: usize) -> Vec<f32> {
    let mut logits = Vec::new();
    for tokens in tokens.chunks(most) {
        let span = Span { sequence: &mut *sequence, tokens, phase, logits: Want::All };
        engine.step(&mut [span], &mut Control::default(), &mut |_, _, row| logits.extend_from_slice(row)).unwrap();
    }
    logits
}

fn logits(engine: &mut Engine, tokens: &[u32]) -> Vec<f32> {
    let mut sequence = engine.new_sequence();
    append(engine, &mut sequence, tokens, Phase::Prompt, usize::MAX)
}

#[test]
fn both_forms_say_what_the_reference_says() {
    for family in FAMILIES {
        let golden = Golden::load(family);
        let model = Converted::new(&format!("golden/{family}"), None);
        let open = |options| model.open(&EngineOptions { exact: true, ..options });
        let (mut engine, mut other) = (open(expanded()), open(absorbed()));
        assert_eq!(engine.prompt_attention(), PromptAttention::Expanded, "{family}");
        assert_eq!(other.prompt_attention(), PromptAttention::Absorbed, "{family}");
        let ids = golden.ids("input_ids");
        let (own, of_absorbed) = (logits(&mut engine, &ids), logits(&mut other, &ids));
        let errors = [relative_error(&own, &of_absorbed), relative_error(&own, &golden.array("logits").data)];
        println!("{family}: {:.1e} from the absorbed form, {:.1e} from the reference", errors[0], errors[1]);
        assert!(errors[0] > 0.0, "{family}: it is another computation");
        assert!(errors[0] < 1e-5 && errors[1] < 1e-4, "{family}: {errors:?}");
    }
}

#[test]
fn what_was_generated_has_the_absorbed_form() {
    let model = Converted::new("golden/deepseek_v3", None);
    let (mut engine, mut other) = (model.open(&expanded()), model.open(&absorbed()));
    let tokens = prompt(&engine, 1, 120);
    let want = logits(&mut other, &tokens);
    for phase in [Phase::Decode, Phase::Draft, Phase::Again] {
        for most in [1, 7, 120] {
            let mut sequence = engine.new_sequence();
            assert!(append(&mut engine, &mut sequence, &tokens, phase, most) == want, "{phase:?}, {most}");
            assert_eq!(sequence.tokens(), tokens);
            assert!(sequence.phased().iter().zip(&tokens).all(|(phased, token)| *phased == token | GENERATED));
        }
    }
    let mut sequence = other.new_sequence();
    append(&mut other, &mut sequence, &tokens, Phase::Decode, 7);
    assert_eq!(sequence.phased(), tokens, "phases make no difference there");
}

#[test]
fn neither_steps_nor_threads_nor_budgets_change_a_bit() {
    for family in ["deepseek_v3", "deepseek_v32", "glm_moe_dsa", "kimi_linear", "bailing_hybrid"] {
        let model = Converted::new(&format!("golden/{family}"), None);
        let least = model.least_budget_for(&EngineOptions { threads: Some(3), ..expanded() });
        for kv_type in [KvType::F32, KvType::Q8, KvType::Bf16] {
            let mut reference: Option<Vec<f32>> = None;
            let ways = [(200, 1, None), (1, 1, None), (7, 3, None), (95, 2, Some(least)), (97, 3, Some(2 * least))];
            for (most, threads, budget) in ways {
                let mut engine = model.open(&EngineOptions { kv_type, threads: Some(threads), budget, ..expanded() });
                let tokens = prompt(&engine, 1, 200);
                let mut sequence = engine.new_sequence();
                let own = append(&mut engine, &mut sequence, &tokens, Phase::Prompt, most);
                let reference = reference.get_or_insert_with(|| own.clone());
                assert!(*reference == own, "{family} {kv_type}: {most} at a time on {threads} threads");
            }
        }
    }
}

#[test]
fn weights_of_every_type_are_expanded() {
    for ty in [WeightType::F32, WeightType::Bf16, WeightType::Q8, WeightType::Q4] {
        let model = Converted::new("golden/deepseek_v3", Some(ty));
        let open = |options| model.open(&EngineOptions { exact: true, ..options });
        let (mut engine, mut other) = (open(expanded()), open(absorbed()));
        let ids = Golden::load("deepseek_v3").ids("input_ids");
        let error = relative_error(&logits(&mut engine, &ids), &logits(&mut other, &ids));
        assert!(error > 0.0 && error < 1e-5, "{ty}: {error:e}");
    }
}

#[test]
fn who_else_is_in_a_step_changes_no_bit() {
    let model = Converted::new("golden/deepseek_v3", None);
    let mut engine = model.open(&EngineOptions { sequences: Some(4), threads: Some(2), ..expanded() });
    let texts: Vec<Vec<u32>> = [130, 3, 97, 40].iter().zip(1..).map(|(&n, i)| prompt(&engine, i, n)).collect();
    let phases = [Phase::Prompt, Phase::Prompt, Phase::Decode, Phase::Prompt];
    // What stands before is read alone.
    let begin = |engine: &mut Engine, text: &[u32]| {
        let mut sequence = engine.new_sequence();
        append(engine, &mut sequence, &text[..2], Phase::Prompt, 2);
        sequence
    };
    let mut alone = Vec::new();
    for (text, phase) in texts.iter().zip(phases) {
        let mut sequence = begin(&mut engine, text);
        alone.push(append(&mut engine, &mut sequence, &text[2..], phase, usize::MAX));
    }
    let mut sequences: Vec<Sequence> = texts.iter().map(|text| begin(&mut engine, text)).collect();
    let spans = sequences.iter_mut().zip(&texts).zip(phases);
    let mut spans: Vec<_> = spans
        .map(|((sequence, text), phase)| Span { sequence, tokens: &text[2..], phase, logits: Want::All })
        .collect();
    let mut together = vec![Vec::new(); texts.len()];
    engine
        .step(&mut spans, &mut Control::default(), &mut |span, _, row| together[span].extend_from_slice(row))
        .unwrap();
    assert!(together == alone);
}

#[test]
fn sequences_keep_what_each_token_was() {
    for family in ["deepseek_v3", "deepseek_v32", "kimi_linear"] {
        let model = Converted::new(&format!("golden/{family}"), None);
        let mut engine = model.open(&EngineOptions { sequences: Some(4), marks: 4, ..expanded() });
        let tokens = prompt(&engine, 1, 160);
        let turns = [(0..100, Phase::Prompt), (100..110, Phase::Decode), (110..150, Phase::Prompt)];
        let read = |engine: &mut Engine| {
            let mut sequence = engine.new_sequence();
            for (turn, phase) in turns.clone() {
                append(engine, &mut sequence, &tokens[turn], phase, 33);
            }
            sequence
        };
        let rest = |engine: &mut Engine, sequence: &mut Sequence| {
            append(engine, sequence, &tokens[150..], Phase::Prompt, usize::MAX)
        };
        let mut whole = read(&mut engine);
        let (fork, phased) = (whole.fork(), whole.phased().to_vec());
        assert_eq!((phased[99], phased[100], phased[110]), (tokens[99], tokens[100] | GENERATED, tokens[110]));
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("session");
        whole.save_file(&file).unwrap();
        let want = rest(&mut engine, &mut whole);
        let mut plain = engine.new_sequence();
        append(&mut engine, &mut plain, &tokens[..150], Phase::Prompt, usize::MAX);
        // Tokens that choose their keys have the absorbed form in any case; what only the last layer computes nobody sees later.
        let differs = rest(&mut engine, &mut plain) != want;
        assert!(differs || family != "deepseek_v3", "what was generated makes a difference");
        drop((plain, whole));

        let mut again = fork.fork();
        assert_eq!(again.phased(), phased);
        assert!(rest(&mut engine, &mut again) == want, "{family}: a fork");
        let mut restored = engine.restore_file(&file).unwrap();
        assert_eq!((restored.phased(), restored.tokens()), (&phased[..], &tokens[..150]));
        assert!(rest(&mut engine, &mut restored) == want, "{family}: restored");
        drop((again, restored));
        // Back into the middle, by what is computed again where layers forget.
        let mut back = fork.fork();
        engine.rewind(&mut back, 105, &mut Control::default()).unwrap();
        assert_eq!(back.phased(), &phased[..105]);
        append(&mut engine, &mut back, &tokens[105..110], Phase::Decode, 1);
        append(&mut engine, &mut back, &tokens[110..150], Phase::Prompt, 9);
        assert!(rest(&mut engine, &mut back) == want, "{family}: taken back");

        let other = model.open(&absorbed());
        match other.restore_file(&file) {
            Err(SessionError::PromptAttention { found, wanted, .. }) => {
                assert_eq!((found.as_str(), wanted), ("expanded", PromptAttention::Absorbed));
            }
            other => panic!("{family}: {other:?}"),
        }
    }
}

#[test]
fn inputs_are_observed_in_the_absorbed_form_alone() {
    struct Nobody;
    impl InputObserver for Nobody {
        fn inputs(&self, _: MatrixPlace, _: u32, _: &Activations) {}
    }
    let model = Converted::new("golden/deepseek_v3", None);
    for (options, refused) in [(expanded(), true), (absorbed(), false)] {
        let mut engine = model.open(&options);
        let mut sequence = engine.new_sequence();
        let mut control = Control { inputs: Some(Arc::new(Nobody)), ..Control::default() };
        let span = Span::prompt(&mut sequence, &[1, 2, 3], Want::Last);
        let outcome = engine.step(&mut [span], &mut control, &mut |_, _, _| {});
        assert_eq!(matches!(outcome, Err(RuntimeError::Model(ModelError::ObservedExpanded))), refused);
        assert_eq!(outcome.is_err(), refused);
    }
}

#[test]
fn models_without_latents_have_one_form() {
    for family in ["llama", "qwen3_next", "gpt_oss"] {
        let model = Converted::new(&format!("golden/{family}"), None);
        assert_eq!(model.open(&expanded()).prompt_attention(), PromptAttention::Absorbed, "{family}");
    }
}

#[test]
fn memory_for_keys_and_values_is_planned() {
    let model = demo();
    let engine = model.open(&absorbed());
    let plan = |expanding| {
        let demand = Demand { expanding, ..Demand::one(256, KvType::F32) };
        MemoryPlan::of_extents(engine.spec(), engine.file().extents(), None, demand, 1 << 40).unwrap()
    };
    // A little scratch counts as overhead.
    let (some, more) = (plan(10_000), plan(20_000));
    assert!(more.scratch > some.scratch && some.scratch > plan(0).scratch);
    assert!(more.scratch - some.scratch > 10_000 << 10, "{} for 10,000 threads", more.scratch - some.scratch);
}

fn house(model: &Converted, sequences: usize, context: usize, scheduling: SchedulerOptions) -> House {
    let options = EngineOptions { sequences: Some(sequences), context: Some(context), ..expanded() };
    House::new(model.open(&options), scheduling)
}

fn ask(house: &mut House, request: Request) -> Heard {
    let id = house.submit(request);
    house.run();
    house.owners.remove(&id).unwrap().2
}

fn store(folder: &Path) -> Arc<Store> {
    let options = StoreOptions { folder: folder.to_owned(), max_bytes: 1 << 30, expire_after: None };
    Arc::new(Store::open(options).unwrap())
}

#[test]
fn the_next_turn_of_a_conversation_reads_the_last_answer_again() {
    let model = demo();
    let folder = tempfile::tempdir().unwrap();
    let kept = |store| SchedulerOptions { store, ..SchedulerOptions::default() };
    let mut one = house(&model, 2, 400, kept(None));
    let mut text = words(1, 80);
    let mut seen = 0;
    for turn in 2..6 {
        let heard = ask(&mut one, Request::new(text.clone(), 20));
        assert_eq!(heard.usage.cached_tokens, seen, "turn {turn}: of the text before, what was a prompt");
        // Another program each time, which finds what the one before has left on the drive.
        let mut restarted = house(&model, 2, 400, kept(Some(store(folder.path()))));
        let of_restarted = ask(&mut restarted, Request::new(text.clone(), 20));
        assert_eq!(of_restarted.said(), heard.said(), "turn {turn}");
        assert_eq!(of_restarted.usage.cached_tokens, seen, "turn {turn}");
        restarted.scheduler.release_kept();
        let mut alone = house(&model, 1, 400, kept(None));
        assert_eq!(ask(&mut alone, Request::new(text.clone(), 20)).said(), heard.said(), "turn {turn}");
        seen = text.len();
        text.extend(&heard.ids);
        text.extend(words(turn, 15));
    }
    let texts = store(folder.path()).texts(one.engine.binding());
    assert!(texts.iter().flatten().all(|&token| token < 1536), "tokens without phases");
}

#[test]
fn drafts_and_interruptions_change_no_text() {
    let model = demo();
    let request = |number: u32| {
        let temperature = [0.0, 1.0][number as usize % 2];
        // The prompt repeats itself, so that it proposes something.
        let mut tokens = words(number, 40);
        tokens.extend_from_within(..);
        Request {
            sampling: SamplerConfig { temperature, seed: number.into(), ..SamplerConfig::default() },
            when_full: WhenFull::DropOldest { keep: 50 },
            ..Request::new(tokens, 60)
        }
    };
    for number in 0..4 {
        let mut alone = house(&model, 1, 110, SchedulerOptions::default());
        let want = ask(&mut alone, request(number));
        assert!(!want.shifts.is_empty(), "{want:?}");
        for drafts in [Drafts::Lookup, Drafts::Off] {
            let scheduling = SchedulerOptions { drafts, draft_tokens: Some(3), kept: 0, ..SchedulerOptions::default() };
            let mut drafted = house(&model, 1, 110, scheduling.clone());
            assert_eq!(ask(&mut drafted, request(number)).said(), want.said(), "{number}, {drafts:?}");
            for cut in [1, 7, 31, 59] {
                let sampled = want.ids[..cut].iter().map(|&id| Sampled { id, logprob: None, top: Vec::new() });
                let mut resumed = house(&model, 1, 110, scheduling.clone());
                let request = Request { sampled: sampled.collect(), ..request(number) };
                assert_eq!(ask(&mut resumed, request).said(), want.said(), "{number}, {drafts:?}, {cut}");
            }
        }
    }
}

#[test]
fn who_waits_for_pages_says_the_same() {
    const CONTEXT: usize = 384;
    let model = demo();
    let spill = tempfile::tempdir().unwrap();
    let wishes = proptest::collection::vec((1usize..200, 20usize..180, 0usize..90), 2..8);
    let case = (wishes, 1usize..3, 1usize..300, any::<bool>());
    let config = ProptestConfig { cases: 6, failure_persistence: None, ..ProptestConfig::default() };
    let outcome = proptest::test_runner::TestRunner::new(config).run(&case, |(wishes, sequences, rows, spills)| {
        let request = |number: usize| {
            // Some begin with the same text.
            let tokens = words(number as u32 / 2, wishes[number].0);
            Request {
                sampling: SamplerConfig { temperature: 0.9, seed: number as u64, ..SamplerConfig::default() },
                ..Request::new(tokens, wishes[number].1)
            }
        };
        let mut alone = house(&model, 1, CONTEXT, SchedulerOptions { kept: 0, ..SchedulerOptions::default() });
        let want: Vec<Heard> = (0..wishes.len()).map(|i| ask(&mut alone, request(i))).collect();
        let spill = spills.then(|| spill.path().to_owned());
        let scheduling = SchedulerOptions { prompt_rows: rows, spill, ..SchedulerOptions::default() };
        let mut crowded = house(&model, sequences, CONTEXT, scheduling);
        let mut ids = Vec::new();
        for (number, &(_, _, pause)) in wishes.iter().enumerate() {
            ids.push(crowded.submit(request(number)));
            (0..pause).for_each(|_| _ = crowded.turn());
        }
        crowded.run();
        for (id, want) in ids.into_iter().zip(&want) {
            prop_assert_eq!(crowded.heard(id).said(), want.said());
        }
        Ok(())
    });
    outcome.unwrap();
}
