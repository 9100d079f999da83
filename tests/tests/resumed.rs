//! Generations that continue after tokens that an earlier run of the program sampled: they cannot be told from generations that
//! were never interrupted. Also generations in the background, which give way to all others.

use std::ops::ControlFlow;
use std::sync::mpsc::channel;

use sluice_format::WeightType;
use sluice_generate::{
    Constraint, Event, Finish, GenerationError, Penalties, Place, Priority, Request, Sampled, SamplerConfig, Scheduler,
    SchedulerOptions, Watch, WhenFull,
};
use sluice_model::{Engine, EngineOptions};
use sluice_tests::Converted;
use sluice_tests::house::House;
use sluice_text::{StopCondition, Tokenizer};

const CONTEXT: usize = 60;

/// Latents, with a tokenizer; windows; keys beside recurrent states.
const MODELS: [(&str, Option<WeightType>); 3] =
    [("demo-model", Some(WeightType::Q8)), ("golden/gpt_oss", None), ("golden/qwen3_next", None)];

fn open(model: &Converted, sequences: usize, context: usize) -> Engine {
    let options = EngineOptions { sequences: Some(sequences), context: Some(context), ..EngineOptions::default() };
    model.open(&EngineOptions { forget: true, threads: Some(1), ..options })
}

/// A constraint that allows one of three tokens, in turns, and ends after some.
#[derive(Debug)]
struct Turns(usize);

impl Constraint for Turns {
    fn mask(&mut self, logits: &mut [f32]) {
        let turn = self.0 % 3;
        logits
            .iter_mut()
            .enumerate()
            .filter(|(id, _)| id % 3 != turn)
            .for_each(|(_, logit)| *logit = f32::NEG_INFINITY);
    }

    fn accept(&mut self, _: u32) {
        self.0 += 1;
    }

    fn is_complete(&self) -> bool {
        self.0 >= 17
    }
}

/// Everything on which a generation's text can depend.
fn request(number: usize, vocab: usize, has_text: bool) -> Request {
    let prompt = (0..9 + number as u32).map(|i| (i * 7919 + 13) % vocab as u32).collect();
    let usual = Request {
        sampling: SamplerConfig {
            temperature: [0.0, 1.2][number % 2],
            seed: number as u64,
            ..SamplerConfig::default()
        },
        ..Request::new(prompt, 24)
    };
    match number {
        0 | 1 => usual,
        2 => Request { logprobs: Some(3), ..usual },
        3 => Request { penalties: Penalties { presence: 1.0, frequency: 0.5 }, ..usual },
        4 => Request { constraint: Some(Box::new(Turns(0))), ..usual },
        5 => {
            let sampling = SamplerConfig { repetition_penalty: 1.5, ..usual.sampling };
            Request { sampling, when_full: WhenFull::DropOldest { keep: 4 }, max_tokens: 90, ..usual }
        }
        6 if has_text => Request { stop: StopCondition::new([], vec!["e".into(), "\n\n".into()]).unwrap(), ..usual },
        _ => Request { max_tokens: 200, ..usual },
    }
}

/// What an owner receives, except how the prompt was read.
#[derive(Debug, Default, PartialEq)]
struct Heard {
    tokens: Vec<Sampled>,
    text: String,
    shifts: Vec<(usize, usize)>,
    finish: Option<Finish>,
    error: Option<String>,
}

fn hear(engine: &mut Engine, request: Request) -> Heard {
    let tokenizer = Tokenizer::of(engine.file().metadata()).unwrap();
    let mut scheduler = Scheduler::new(engine, tokenizer, SchedulerOptions::default());
    let (sender, events) = channel();
    let owner = move |event| sender.send(event).map_or(ControlFlow::Break(()), ControlFlow::Continue);
    let handle = scheduler.submit(request, owner).unwrap();
    while scheduler.turn(engine, &mut Watch::default()) {}
    assert_eq!(handle.place(), None);
    let mut heard = Heard::default();
    for event in events.try_iter() {
        assert!(heard.finish.is_none() && heard.error.is_none(), "{event:?} behind the end");
        match event {
            Event::Progress { .. } | Event::PromptToken { .. } => {}
            Event::Token { id, logprob, top } => heard.tokens.push(Sampled { id, logprob, top }),
            Event::Shifted { dropped, left } => heard.shifts.push((dropped, left)),
            Event::Text(text) => heard.text += &text,
            Event::Finish { reason, usage } => {
                assert_eq!(usage.generated_tokens, heard.tokens.len());
                heard.finish = Some(reason);
            }
            Event::Failed(error) => heard.error = Some(error.to_string()),
        }
    }
    heard
}

#[test]
fn nobody_can_tell_that_it_was_interrupted() {
    for (name, ty) in MODELS {
        let model = Converted::new(name, ty);
        let mut engine = open(&model, 1, CONTEXT);
        let (vocab, has_text) = (engine.spec().vocab_size, name == "demo-model");
        for number in 0..8 {
            let want = hear(&mut engine, request(number, vocab, has_text));
            assert_eq!(want.error, None, "{name}, {number}");
            let all = want.tokens.len();
            assert_eq!(number == 5, !want.shifts.is_empty(), "{name}, {number}");
            // The last case is a run that was killed before its end was recorded.
            for cut in [1, 2, all / 3, all / 2, all - 1, all] {
                let sampled = want.tokens[..cut.min(all)].to_vec();
                let got = hear(&mut engine, Request { sampled, ..request(number, vocab, has_text) });
                assert_eq!(got, want, "{name}, request {number}, {cut} of {all} tokens");
            }
        }
    }
}

#[test]
fn penalties_make_what_was_said_less_likely() {
    let model = Converted::new("demo-model", Some(WeightType::Q8));
    let mut engine = open(&model, 1, 400);
    let say =
        |engine: &mut Engine, penalties| hear(engine, Request { penalties, ..Request::new(vec![5, 6, 7], 120) }).tokens;
    let repeats = |tokens: &[Sampled]| {
        let mut ids: Vec<u32> = tokens.iter().map(|token| token.id).collect();
        ids.sort_unstable();
        ids.dedup();
        tokens.len() - ids.len()
    };
    let usual = repeats(&say(&mut engine, Penalties::default()));
    let strong = repeats(&say(&mut engine, Penalties { presence: 2.0, frequency: 2.0 }));
    assert!(strong < usual / 2, "{strong} repetitions instead of {usual}");
    // The logits of the second token lack exactly what is subtracted for the first.
    let first = say(&mut engine, Penalties::default())[0].id;
    let banned = say(&mut engine, Penalties { presence: 1e9, frequency: 0.0 });
    assert!(banned[1..].iter().all(|token| token.id != first), "a huge penalty lets nothing come twice");
}

#[test]
fn what_does_not_belong_to_the_request_is_refused() {
    let model = Converted::new("demo-model", Some(WeightType::Q8));
    let engine = open(&model, 1, CONTEXT);
    let tokenizer = Tokenizer::of(engine.file().metadata()).unwrap();
    let scheduler = Scheduler::new(&engine, tokenizer, SchedulerOptions::default());
    let token = |id| Sampled { id, logprob: None, top: Vec::new() };
    let submit = |request| scheduler.submit(request, |_| ControlFlow::Continue(())).map(|_| ());
    let with = |sampled: Vec<Sampled>, most| Request { sampled, ..Request::new(vec![5, 6], most) };
    assert!(matches!(submit(with(vec![token(1); 4], 3)), Err(GenerationError::SampledTooMany { given: 4, taken: 3 })));
    assert!(matches!(submit(with(vec![token(1 << 20)], 3)), Err(GenerationError::PromptToken { .. })));
    let scored = Request { prompt_logprobs: Some(1), ..with(vec![token(1)], 3) };
    assert!(matches!(submit(scored), Err(GenerationError::SampledAndScored)));
    assert!(submit(with(vec![token(1); 3], 3)).is_ok());
}

#[test]
fn the_background_gives_way() {
    let model = Converted::new("demo-model", Some(WeightType::Q8));
    let options = SchedulerOptions { running: Some(2), queue: Some(3), ..SchedulerOptions::default() };
    let mut house = House::new(open(&model, 2, 200), options);
    let ask = |first: u32, priority| Request { priority, ..Request::new((first..first + 20).collect(), 30) };
    let background: Vec<u64> = (0..6).map(|n| house.submit(ask(100 * n, Priority::Background))).collect();
    for _ in 0..5 {
        house.turn();
    }
    assert!(matches!(house.owners[&background[1]].0.place(), Some(Place::Decoding { .. })));
    // They take no place in the queue from generations for which somebody waits.
    let usual: Vec<u64> = (0..3).map(|n| house.submit(ask(50 + 100 * n, Priority::Usual))).collect();
    house.turn();
    for id in &usual[..2] {
        assert!(!matches!(house.owners[id].0.place(), Some(Place::Queued { .. })), "it begins at once");
    }
    assert!(
        background
            .iter()
            .all(|id| matches!(house.owners[id].0.place(), Some(Place::Queued { .. } | Place::Saved { .. })))
    );
    while house.owners[&usual[2]].0.place().is_some() {
        house.turn();
    }
    assert!(
        background.iter().any(|id| house.owners[id].0.place().is_some()),
        "those that nobody waits for are the last"
    );
    house.run();
    let mut alone = House::new(open(&model, 1, 200), SchedulerOptions::default());
    for (number, id) in background.iter().enumerate() {
        let single = alone.submit(ask(100 * number as u32, Priority::Usual));
        alone.run();
        assert_eq!(house.heard(*id).said(), alone.heard(single).said(), "{number}");
    }
}
