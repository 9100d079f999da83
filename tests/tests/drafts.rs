//! Drafts change no text: the tokens are those that sampling would have chosen one by one, and rejected proposals leave no trace.

use sluice_format::{ModelFile, WeightType};
use sluice_generate::{
    Constraint, Draft, Drafts, Penalties, PromptLookup, Request, SamplerConfig, SchedulerOptions, WhenFull,
};
use sluice_model::memory::{Demand, MemoryPlan};
use sluice_model::{Control, Engine, EngineOptions, KvType, Phase, PredictionSpan, Span, Want};
use sluice_tests::house::{Heard, House};
use sluice_tests::{Converted, argmax};
use sluice_text::StopCondition;

const CONTEXT: usize = 192;

/// A draft that knows the answer, and sometimes gives a wrong token.
#[derive(Debug)]
struct Oracle {
    /// Prompt and answer.
    text: Vec<u32>,
    vocab: u32,
    /// One of this many tokens is wrong; 0: none.
    lies: usize,
}

impl Draft for Oracle {
    fn propose(&mut self, context: &[u32], out: &mut Vec<u32>) {
        let rest = self.text.get(context.len()..).unwrap_or_default();
        for (i, &id) in rest.iter().take(9).enumerate() {
            let lie = self.lies > 0 && (context.len() + i).is_multiple_of(self.lies);
            // Ids that the model does not have are wrong too.
            out.push(if lie { [(id + 1) % self.vocab, u32::MAX][i % 2] } else { id });
        }
    }
}

/// A constraint that allows every third token.
#[derive(Debug)]
struct Thirds(usize);

impl Constraint for Thirds {
    fn mask(&mut self, logits: &mut [f32]) {
        let phase = self.0 % 3;
        logits.iter_mut().enumerate().filter(|(id, _)| id % 3 != phase).for_each(|(_, l)| *l = f32::NEG_INFINITY);
    }

    fn accept(&mut self, id: u32) {
        assert_eq!(id as usize % 3, self.0 % 3);
        self.0 += 1;
    }
}

/// Requests of all kinds, without a draft.
fn request(number: u32, vocab: u32, text: bool) -> Request {
    let length = [5, 40, 90, 130][number as usize % 4];
    let prompt = (0..length).map(|i| (i % 17 * 7919 + number * 104_729 + 13) % vocab).collect();
    let stop = if text && number % 3 == 1 { vec!["e".to_owned()] } else { vec![] };
    Request {
        sampling: SamplerConfig {
            temperature: [0.0, 0.9][number as usize % 2],
            repetition_penalty: [1.0, 1.1, 1.0][number as usize % 3],
            seed: u64::from(number),
            ..SamplerConfig::default()
        },
        stop: StopCondition::new([], stop).unwrap(),
        bias: if number % 4 == 2 { vec![(3, 2.0), (5, f32::NEG_INFINITY)] } else { vec![] },
        constraint: (number % 5 == 3).then(|| Box::new(Thirds(0)) as Box<dyn Constraint>),
        when_full: if number.is_multiple_of(2) { WhenFull::DropOldest { keep: 3 } } else { WhenFull::Stop },
        ..Request::new(prompt, 90)
    }
}

fn options(sequences: usize) -> EngineOptions {
    EngineOptions {
        sequences: Some(sequences),
        context: Some(CONTEXT),
        forget: true,
        threads: Some(1),
        ..EngineOptions::default()
    }
}

fn open(model: &Converted, sequences: usize) -> House {
    House::new(model.open(&options(sequences)), SchedulerOptions { prompt_rows: 20, ..SchedulerOptions::default() })
}

/// Opens a house that drafts for generations without a draft of their own: `tokens` each time, or as many as pay.
fn open_drafting(model: &Converted, sequences: usize, drafts: Drafts, tokens: Option<usize>) -> House {
    let file = ModelFile::open(&model.path).unwrap();
    let prediction = drafts.opens_prediction(|| options(sequences).holds_prediction(&file));
    let engine = model.open(&EngineOptions { prediction, ..options(sequences) });
    let scheduling = SchedulerOptions { prompt_rows: 20, drafts, draft_tokens: tokens, ..SchedulerOptions::default() };
    House::new(engine, scheduling)
}

/// The texts of these requests when they run together, and the number of turns.
fn run(house: &mut House, requests: Vec<Request>) -> (Vec<Heard>, usize) {
    let ids: Vec<u64> = requests.into_iter().map(|request| house.submit(request)).collect();
    let mut turns = 0;
    while house.turn() {
        turns += 1;
    }
    (ids.iter().map(|id| house.owners.remove(id).unwrap().2).collect(), turns)
}

#[test]
fn drafts_change_no_text() {
    for (name, ty) in [("demo-model", Some(WeightType::Q8)), ("golden/gpt_oss", None), ("golden/qwen3_next", None)] {
        let model = Converted::new(name, ty);
        let mut house = open(&model, 2);
        let vocab = house.engine.spec().vocab_size as u32;
        let requests = || (0..8).map(|n| request(n, vocab, name == "demo-model"));
        let (want, _) = run(&mut house, requests().collect());
        assert!(want.iter().all(|heard| heard.error.is_none() && heard.finish.is_some()));
        for lies in [0, 1, 2, 5] {
            let with_draft = requests().zip(&want).map(|(request, heard)| {
                let text = request.prompt.iter().chain(&heard.ids).copied().collect();
                Request { draft: Some(Box::new(Oracle { text, vocab, lies })), ..request }
            });
            let (got, _) = run(&mut house, with_draft.collect());
            for (number, (got, want)) in got.iter().zip(&want).enumerate() {
                assert_eq!((got.said(), &got.shifts), (want.said(), &want.shifts), "{name}: {number}, {lies} lies");
            }
        }
        let status = house.scheduler.status();
        assert!(status.proposed > status.came_true && status.came_true > 100, "{name}: {status:?}");
        let lookup = requests().map(|request| Request { draft: Some(Box::new(PromptLookup::default())), ..request });
        let (got, _) = run(&mut house, lookup.collect());
        assert!(got.iter().zip(&want).all(|(got, want)| got.said() == want.said()), "{name}: look-up");
        house.scheduler.release_kept();
        let free = house.engine.pages();
        assert!(free.iter().all(|count| count.free == count.total), "{name}: {free:?}");
    }
}

#[test]
fn a_draft_that_comes_true_saves_steps() {
    let model = Converted::new("demo-model", Some(WeightType::Q8));
    let mut house = open(&model, 1);
    let request = || Request::new(vec![1, 2, 3], 80);
    let (want, alone) = run(&mut house, vec![request()]);
    let text = [1, 2, 3].into_iter().chain(want[0].ids.iter().copied()).collect();
    let draft: Box<dyn Draft> = Box::new(Oracle { text, vocab: 1536, lies: 0 });
    let (got, turns) = run(&mut house, vec![Request { draft: Some(draft), ..request() }]);
    assert_eq!(got[0].said(), want[0].said());
    assert_eq!((alone, turns), (80, 9), "the prompt gives one token, and every step with nine proposals ten");
}

#[test]
fn whoever_proposes_changes_no_text() {
    for (name, ty) in [("golden/deepseek_v3", None), ("golden/glm4_moe", Some(WeightType::Q8))] {
        let model = Converted::new(name, ty);
        let mut house = open(&model, 2);
        let vocab = house.engine.spec().vocab_size as u32;
        let requests = || {
            let with_more = |request: Request| Request {
                logprobs: Some(1),
                penalties: Penalties { presence: 0.2, frequency: 0.1 },
                ..request
            };
            (0..8).map(move |n| with_more(request(n, vocab, false)))
        };
        let (want, _) = run(&mut house, requests().collect());
        assert!(want.iter().all(|heard| heard.error.is_none() && heard.finish.is_some()));
        for (drafts, tokens) in
            [(Drafts::Lookup, Some(3)), (Drafts::Prediction, Some(4)), (Drafts::Auto, Some(2)), (Drafts::Auto, None)]
        {
            let mut house = open_drafting(&model, 2, drafts, tokens);
            let (got, _) = run(&mut house, requests().collect());
            for (number, (got, want)) in got.iter().zip(&want).enumerate() {
                assert_eq!((got.said(), &got.shifts), (want.said(), &want.shifts), "{name}: {number}, {drafts:?}");
            }
            let status = house.scheduler.status();
            assert!(tokens.is_none() || status.proposed > 20, "{name}, {drafts:?}: {status:?}");
            assert_eq!((house.scheduler.draft_failure(), status.drafts_failed), (None, false));
            house.scheduler.release_kept();
            let free = house.engine.pages();
            assert!(free.iter().all(|count| count.free == count.total), "{name}, {drafts:?}: {free:?}");
        }
    }
}

/// The tokens that the prediction layer finds the likeliest after each token but the first and last of a text, if it gets the whole
/// text.
fn predicted(engine: &mut Engine, text: &[u32]) -> Vec<u32> {
    let mut inputs = Vec::new();
    let mut observer = |rows: &[f32]| inputs.extend_from_slice(rows);
    let mut control = Control { head_inputs: Some(&mut observer), ..Control::default() };
    let mut sequence = engine.new_sequence();
    engine.step(&mut [Span::prompt(&mut sequence, text, Want::Last)], &mut control, &mut |_, _, _| ()).unwrap();
    let mut sequence = engine.new_prediction_sequence().unwrap();
    let (tokens, width) = (&text[1..], engine.spec().hidden_size);
    let head_inputs = &inputs[..tokens.len() * width];
    let span = PredictionSpan { sequence: &mut sequence, tokens, head_inputs, phase: Phase::Prompt, logits: Want::All };
    let mut found = Vec::new();
    engine.predict(&mut [span], &mut Control::default(), &mut |_, _, row| found.push(argmax(row))).unwrap();
    found
}

#[test]
fn the_prediction_layer_proposes_what_it_finds_likeliest() {
    let model = Converted::new("golden/deepseek_v3", None);
    let mut house = open_drafting(&model, 1, Drafts::Prediction, Some(1));
    let (mut proposed, mut came_true) = (0, 0);
    for number in 0..6 {
        let prompt: Vec<u32> = (0..20).map(|i| (i * 37 + number * 11) % 160).collect();
        let (heard, _) = run(&mut house, vec![Request::new(prompt.clone(), 60)]);
        let text = [&prompt[..], &heard[0].ids].concat();
        house.scheduler.release_kept();
        // Proposal `i` is of token `i + 2`.
        let proposals = predicted(&mut house.engine, &text);
        let mut at = prompt.len() + 1;
        // The last token of a text is not proposed.
        while at + 1 < text.len() {
            proposed += 1;
            let comes_true = proposals[at - 2] == text[at];
            came_true += u64::from(comes_true);
            at += 1 + usize::from(comes_true);
        }
        let status = house.scheduler.status();
        assert_eq!((status.proposed, status.came_true), (proposed, came_true), "prompt {number}");
    }
    assert!(came_true > 0, "none of {proposed} proposals came true: the test shows nothing");
}

#[test]
fn the_layer_is_opened_unasked_only_where_it_takes_no_place_from_experts() {
    let model = Converted::new("golden/glm4_moe", Some(WeightType::Q8));
    let file = ModelFile::open(&model.path).unwrap();
    let opens = |drafts: Drafts, budget: Option<u64>| {
        let options = EngineOptions { budget, ..options(1) };
        drafts.opens_prediction(|| options.holds_prediction(&file))
    };
    let demand = Demand { prediction: true, ..Demand::one(CONTEXT, KvType::F32) };
    let all = MemoryPlan::new(&file, None, demand).unwrap();
    assert_eq!((all.slots, all.dense_streamed), (all.experts, 0));
    let less = MemoryPlan::new(&file, Some(all.used() - all.slot_len), demand).unwrap();
    assert!(less.slots < less.experts);
    for (drafts, with_all, with_less) in [
        (Drafts::Off, false, false),
        (Drafts::Lookup, false, false),
        (Drafts::Auto, true, false),
        (Drafts::Prediction, true, true),
    ] {
        let found = (opens(drafts, None), opens(drafts, less.requested));
        assert_eq!(found, (with_all, with_less), "{drafts:?}");
    }
    let none = Converted::new("demo-model", Some(WeightType::Q8));
    let none = ModelFile::open(&none.path).unwrap();
    assert!(!Drafts::Auto.opens_prediction(|| options(1).holds_prediction(&none)), "there is no layer");
}

/// Head inputs that wait for the prediction layer are planned for: three times 32 rows of f32 for each sequence.
#[test]
fn waiting_inputs_are_in_the_memory_plan() {
    let model = Converted::new("golden/glm4_moe", Some(WeightType::Q8));
    let file = ModelFile::open(&model.path).unwrap();
    let scratch = |sequences: usize, prediction: bool| {
        let demand = Demand { sequences, prediction, ..Demand::one(CONTEXT, KvType::F32) };
        MemoryPlan::of_extents(file.spec(), file.extents(), Some(1 << 38), demand, 1 << 40).unwrap().scratch
    };
    // So many that the scratch is charged.
    let more = |sequences| scratch(sequences, true) - scratch(sequences, false);
    let waiting = 4000 * 3 * 32 * 4 * file.spec().hidden_size as u64;
    assert!(more(8000) - more(4000) >= waiting, "{} and {}, not {waiting} more", more(8000), more(4000));
}
