//! Many generations on one engine: each gives the same text as alone, whatever else is running.

use std::ops::ControlFlow;
use std::sync::mpsc::channel;

use sluice_format::WeightType;
use sluice_generate::{
    Completion, Constraint, Event, Finish, GenerationError, Handle, Model, Place, Request, SamplerConfig,
    SchedulerOptions, Watch, WhenFull,
};
use sluice_model::{Engine, EngineOptions};
use sluice_tests::house::{Heard, House};
use sluice_tests::{Converted, argmax};
use sluice_text::StopCondition;

const CONTEXT: usize = 400;

fn demo() -> Converted {
    Converted::new("demo-model", Some(WeightType::Q8))
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

fn open(model: &Converted, sequences: usize, prompt_rows: usize) -> House {
    // Nothing is kept, so each must compute everything itself.
    let scheduling = SchedulerOptions { prompt_rows, running: Some(sequences), kept: 0, ..SchedulerOptions::default() };
    House::new(model.open(&options(sequences)), scheduling)
}

fn prompt(number: u32, length: u32) -> Vec<u32> {
    (0..length).map(|i| (i * 7919 + number * 104_729 + 13) % 1536).collect()
}

/// Requests of all kinds: several seeds, temperatures, stop strings, lengths.
fn request(number: u32) -> Request {
    let sampling = SamplerConfig {
        temperature: [0.0, 0.7, 1.0, 1.5][number as usize % 4],
        top_p: [1.0, 0.9][number as usize % 2],
        repetition_penalty: [1.0, 1.2, 1.0][number as usize % 3],
        seed: u64::from(number / 3),
        ..SamplerConfig::default()
    };
    let stop = [vec![], vec!["the".to_owned()], vec!["e".to_owned(), "\n".to_owned()]][number as usize % 3].clone();
    Request {
        sampling,
        stop: StopCondition::new([], stop).unwrap(),
        ..Request::new(prompt(number, 1 + (number * 37) % 150), 5 + (number as usize * 11) % 30)
    }
}

#[test]
fn together_they_say_what_each_says_alone() {
    const COUNT: u32 = 14;
    let model = demo();
    let mut alone = open(&model, 1, 1000);
    let alone: Vec<Heard> = (0..COUNT)
        .map(|number| {
            let id = alone.submit(request(number));
            alone.run();
            std::mem::take(&mut alone.owners.get_mut(&id).unwrap().2)
        })
        .collect();
    assert!(alone.iter().any(|h| h.finish == Some(Finish::StopString)));
    assert!(alone.iter().any(|h| h.finish == Some(Finish::Length)));
    assert!(alone.iter().all(|h| h.error.is_none() && !h.ids.is_empty()));
    for (sequences, prompt_rows, seed) in [(1, 7, 1), (3, 16, 2), (5, 1, 3), (14, 64, 4), (4, 1000, 5)] {
        let mut house = open(&model, sequences, prompt_rows);
        let mut random: u64 = seed;
        let (mut next, mut ids) = (0, Vec::new());
        while next < COUNT {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            for _ in 0..random >> 62 {
                if next < COUNT {
                    ids.push(house.submit(request(next)));
                    next += 1;
                }
            }
            house.turn();
        }
        house.run();
        for (number, &id) in ids.iter().enumerate() {
            let what = format!("generation {number}, {sequences} sequences, {prompt_rows} rows of prompts");
            assert_eq!(house.heard(id).said(), alone[number].said(), "{what}");
        }
    }
}

#[test]
fn cancelling_one_changes_nothing_for_the_others() {
    let model = demo();
    let long = |number| Request {
        sampling: SamplerConfig { temperature: 1.0, ..SamplerConfig::default() },
        ..Request::new(prompt(number, 60), 20)
    };
    let mut house = open(&model, 4, 16);
    let ids: Vec<_> = (0..4).map(|n| house.submit(long(n))).collect();
    house.run();
    let layers = house.engine.spec().layers.len();
    let want: Vec<Heard> = ids.iter().map(|id| std::mem::take(&mut house.owners.get_mut(id).unwrap().2)).collect();
    // In the middle of a step, after each layer, and in each phase.
    for at in 1..=layers {
        for turn in [0, 1, 4, 9] {
            house.owners.clear();
            let ids: Vec<_> = (0..4).map(|n| house.submit(long(n))).collect();
            for _ in 0..turn {
                house.turn();
            }
            let victim = house.owners[&ids[1]].0.clone();
            let (before, mut layers_run) = (house.engine.stats().tokens, 0);
            let mut progress = |p: sluice_model::Progress| {
                layers_run += 1;
                if p.layers == at {
                    victim.cancel();
                }
            };
            house.turn_watched(&mut Watch { progress: Some(&mut progress), routing: None });
            assert!(layers_run > layers, "the step ended and was repeated");
            assert!(house.engine.stats().tokens > before);
            assert_eq!(house.heard(ids[1]).finish, Some(Finish::Cancelled), "within the step");
            assert_eq!(victim.place(), None);
            house.run();
            for n in [0, 2, 3] {
                assert_eq!(house.heard(ids[n]).said(), want[n].said(), "layer {at}, turn {turn}, generation {n}");
            }
            let cut = &house.heard(ids[1]).ids;
            assert_eq!(cut[..], want[1].ids[..cut.len()], "what it said until then stays");
            victim.cancel();
            assert!(!house.turn(), "cancelling one that has ended does nothing");
        }
    }
}

#[test]
fn who_comes_and_goes_cannot_keep_the_others_from_their_tokens() {
    let model = demo();
    let mut house = open(&model, 8, 16);
    let stayer = house.submit(Request::new(prompt(0, 5), 4));
    let victims: Vec<_> = (1..8).map(|n| house.submit(Request::new(prompt(n, 5), 4))).collect();
    let mut handles: Vec<_> = victims.iter().map(|id| house.owners[id].0.clone()).collect();
    // Each time that the step begins again, another generation is cancelled.
    let mut progress = |p: sluice_model::Progress| {
        if p.layers == 1 {
            handles.pop().iter().for_each(Handle::cancel);
        }
    };
    house.turn_watched(&mut Watch { progress: Some(&mut progress), routing: None });
    assert_eq!(house.heard(stayer).ids.len(), 1);
    house.run();
}

#[test]
fn a_long_prompt_does_not_keep_others_from_their_tokens() {
    let model = demo();
    let mut house = open(&model, 3, 16);
    let talkers = [0, 1].map(|n| house.submit(Request::new(prompt(n, 4), 200)));
    house.turn();
    let reader = house.submit(Request::new(prompt(2, 300), 3));
    let mut turns = 0;
    while house.heard(reader).ids.is_empty() {
        let before = talkers.map(|id| house.heard(id).ids.len());
        house.turn();
        turns += 1;
        for (id, before) in talkers.into_iter().zip(before) {
            assert_eq!(house.heard(id).ids.len(), before + 1, "a token between any two chunks");
        }
    }
    assert_eq!(turns, 300_usize.div_ceil(16), "the prompt goes on in every step");
    assert_eq!(house.heard(reader).read[..3], [16, 32, 48]);
    let status = house.scheduler.status();
    assert_eq!((status.queued, status.decoding), (0, 3));
    assert!(status.tokens_per_second > 0.0 && status.prompt_tokens_per_second > 0.0);
}

#[test]
fn the_queue_is_served_in_order_of_arrival() {
    let model = demo();
    let mut house = open(&model, 2, 16);
    let ids: Vec<_> = (0..7).map(|n| house.submit(Request::new(prompt(n, 6), 3))).collect();
    assert_eq!(house.scheduler.status().queued, 7);
    house.turn();
    assert_eq!(house.scheduler.status().queued, 5);
    assert_eq!(house.owners[&ids[4]].0.place(), Some(Place::Queued { ahead: 2 }));
    assert_eq!(house.owners[&ids[0]].0.place(), Some(Place::Decoding { generated: 1 }));
    // Cancelled in the queue: its owner is told at once, and the others move up.
    house.owners[&ids[3]].0.cancel();
    house.turn();
    assert_eq!(house.heard(ids[3]).finish, Some(Finish::Cancelled));
    assert_eq!(house.owners[&ids[4]].0.place(), Some(Place::Queued { ahead: 1 }));
    let mut ended = Vec::new();
    while house.turn() {
        let news = ids.iter().filter(|&&id| house.heard(id).finish.is_some() && !ended.contains(&id));
        ended.extend(news.copied().collect::<Vec<_>>());
    }
    let order: Vec<_> = ended.into_iter().filter(|&id| id != ids[3]).collect();
    assert_eq!(order, [0, 1, 2, 4, 5, 6].map(|n: usize| ids[n]));
}

#[test]
fn what_makes_no_sense_is_refused_before_it_reaches_the_engine() {
    let model = demo();
    let house = open(&model, 1, 16);
    let refused = |request: Request| house.scheduler.submit(request, |_| ControlFlow::Continue(())).unwrap_err();
    assert!(matches!(refused(Request::new(vec![], 3)), GenerationError::EmptyPrompt));
    let long = refused(Request::new(vec![1; CONTEXT + 1], 3));
    assert!(matches!(long, GenerationError::PromptTooLong { prompt: 401, context: 400, .. }), "{long}");
    assert!(matches!(refused(Request::new(vec![1, 99_999], 3)), GenerationError::PromptToken { id: 99_999, .. }));
    let hot = SamplerConfig { temperature: f32::NAN, ..SamplerConfig::default() };
    assert!(matches!(refused(Request { sampling: hot, ..Request::new(vec![1], 3) }), GenerationError::Sampler(_)));
    for bias in [(99_999, 1.0), (1, f32::NAN), (1, f32::INFINITY)] {
        let request = Request { bias: vec![bias], ..Request::new(vec![1], 3) };
        assert!(matches!(refused(request), GenerationError::Bias { .. }), "{bias:?}");
    }
    for keep in [CONTEXT, usize::MAX] {
        let request = Request { when_full: WhenFull::DropOldest { keep }, ..Request::new(vec![1], 3) };
        assert!(matches!(refused(request), GenerationError::KeepsTooMuch { context: CONTEXT, .. }));
    }
    assert_eq!(house.scheduler.status().queued, 0);
}

#[test]
fn a_full_context_ends_a_generation() {
    let model = demo();
    let mut house = open(&model, 2, 16);
    // The last token does not have to fit, because nothing follows it.
    for (length, tokens) in [(CONTEXT, 1), (CONTEXT - 2, 3)] {
        let id = house.submit(Request::new(prompt(3, length as u32), usize::MAX));
        house.run();
        let heard = house.heard(id);
        assert_eq!((heard.finish, heard.ids.len()), (Some(Finish::Context), tokens));
    }
    let nothing = house.submit(Request::new(prompt(3, 5), 0));
    house.run();
    assert_eq!((house.heard(nothing).finish, house.heard(nothing).ids.len()), (Some(Finish::Length), 0));
}

/// Bias, constraint and logprobs agree with the engine's own logits.
#[test]
fn tokens_and_their_probabilities_are_those_of_the_logits() {
    let model = demo();
    let mut house = open(&model, 1, 16);
    let mut logits = Vec::new();
    let mut sequence = house.engine.new_sequence();
    house.engine.forward(&mut sequence, &prompt(5, 9), &mut logits).unwrap();
    let best = argmax(&logits);
    let total: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    order.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b)));
    let (sender, events) = channel();
    let mut first = |request: Request| {
        let sender = sender.clone();
        house
            .scheduler
            .submit(request, move |e| sender.send(e).map_or(ControlFlow::Break(()), ControlFlow::Continue))
            .unwrap();
        house.run();
        let events: Vec<Event> = events.try_iter().collect();
        let token = events.into_iter().find_map(|e| match e {
            Event::Token { id, logprob, top } => Some((id, logprob, top)),
            _ => None,
        });
        token.unwrap()
    };
    let base = || Request { logprobs: Some(5), ..Request::new(prompt(5, 9), 1) };
    let (id, logprob, top) = first(base());
    assert_eq!(id, best);
    assert_eq!(top.iter().map(|t| t.id).collect::<Vec<_>>(), order[..5]);
    for t in &top {
        let book = f64::from(logits[t.id as usize]) - total.ln();
        assert!((f64::from(t.logprob) - book).abs() < 1e-5, "{t:?} {book}");
    }
    assert_eq!(logprob, Some(top[0].logprob));
    // A bias changes the choice, but not the model's own probabilities.
    let far = f64::from(logits[order[0] as usize] - logits[order[7] as usize]) as f32;
    let (id, logprob, same) = first(Request { bias: vec![(order[7], far + 1.0)], ..base() });
    assert_eq!((id, &same), (order[7], &top));
    assert!((logprob.unwrap() - top[0].logprob + far).abs() < 1e-4);
    let (id, ..) = first(Request { bias: vec![(order[0], f32::NEG_INFINITY)], ..base() });
    assert_eq!(id, order[1]);
    let (id, none, nothing) = first(Request { logprobs: None, ..base() });
    assert_eq!((id, none, nothing.len()), (best, None, 0));
}

/// A constraint that allows a list of tokens, one after the other.
#[derive(Debug)]
struct Script(Vec<u32>);

impl Constraint for Script {
    fn mask(&mut self, logits: &mut [f32]) {
        let next = self.0.first().copied();
        logits
            .iter_mut()
            .enumerate()
            .filter(|(id, _)| Some(*id as u32) != next)
            .for_each(|(_, l)| *l = f32::NEG_INFINITY);
    }

    fn accept(&mut self, id: u32) {
        assert_eq!(self.0.remove(0), id);
    }

    fn is_complete(&self) -> bool {
        self.0.is_empty()
    }
}

#[test]
fn a_constraint_decides_what_may_come_and_when_it_is_over() {
    let model = demo();
    let mut house = open(&model, 2, 16);
    let hot = SamplerConfig { temperature: 2.0, ..SamplerConfig::default() };
    let scripted = |script: &[u32]| Request {
        sampling: hot,
        constraint: Some(Box::new(Script(script.to_vec()))),
        ..Request::new(prompt(1, 4), 50)
    };
    let id = house.submit(scripted(&[700, 3, 1200]));
    let nothing = house.submit(scripted(&[9999]));
    house.run();
    assert_eq!((house.heard(id).finish, &house.heard(id).ids[..]), (Some(Finish::Complete), &[700, 3, 1200][..]));
    let error = house.heard(nothing).error.as_deref().unwrap();
    assert!(error.contains("every token is excluded"), "{error}");
}

/// A damaged expert ends only the generations that need it, with its name.
#[test]
fn a_failing_step_ends_only_those_concerned() {
    let model = demo();
    let requests = || (0..6).map(|n| Request::new(prompt(n, 3), 6));
    let mut house = open(&model, 6, 16);
    let ids: Vec<_> = requests().map(|r| house.submit(r)).collect();
    house.run();
    let want: Vec<Heard> = ids.iter().map(|id| std::mem::take(&mut house.owners.get_mut(id).unwrap().2)).collect();
    let file = sluice_format::ModelFile::open(&model.path).unwrap();
    let experts: Vec<_> = file.extents().iter().filter(|e| e.kind == sluice_format::ExtentKind::Expert).collect();
    let (mut both, bytes) = (0, std::fs::read(&model.path).unwrap());
    for expert in experts.iter().step_by(3) {
        let mut damaged = bytes.clone();
        damaged[expert.offset as usize + 10] ^= 0x40;
        let path = model.path.with_extension("damaged");
        std::fs::write(&path, damaged).unwrap();
        let engine = Engine::open(&path, &options(6)).unwrap();
        let mut house = House::new(engine, SchedulerOptions { prompt_rows: 16, ..SchedulerOptions::default() });
        let ids: Vec<_> = requests().map(|r| house.submit(r)).collect();
        house.run();
        let mut failed = 0;
        for (id, want) in ids.iter().zip(&want) {
            let heard = house.heard(*id);
            match &heard.error {
                None => assert_eq!(heard.said(), want.said()),
                Some(error) => {
                    assert!(error.contains("expert"), "{error}");
                    assert_eq!(heard.ids[..], want.ids[..heard.ids.len()]);
                    failed += 1;
                }
            }
        }
        both += usize::from(failed > 0 && failed < ids.len());
    }
    assert!(both > 0, "no damage concerned some and not others");
}

#[test]
fn the_front_door_serves_many_threads() {
    let model = demo();
    let model = Model::open(&model.path, &options(3)).unwrap();
    let ask = |n: u32| Request { max_tokens: 8, ..model.text(&format!("Question {n}: what")).unwrap() };
    let alone: Vec<_> = (0..6).map(|n| model.complete(ask(n)).unwrap()).collect();
    assert!(alone.iter().all(|a| !a.text.is_empty()));
    let said = |answer: &Completion| (answer.ids.clone(), answer.text.clone(), answer.finish);
    let alone: Vec<_> = alone.iter().map(said).collect();
    let together = model.batch((0..6).map(ask).collect());
    assert_eq!(together.into_iter().map(|answer| said(&answer.unwrap())).collect::<Vec<_>>(), alone);
    std::thread::scope(|scope| {
        let (model, ask) = (&model, &ask);
        let threads: Vec<_> = (0..6).map(|n| scope.spawn(move || model.complete(ask(n)).unwrap())).collect();
        let answers: Vec<_> = threads.into_iter().map(|t| said(&t.join().unwrap())).collect();
        assert_eq!(answers, alone);
    });
    // Closing cancels generations that are left.
    let (sender, events) = channel();
    let endless = Request { max_tokens: 380, stop: StopCondition::default(), ..ask(1) };
    model.submit(endless, move |e| sender.send(e).map_or(ControlFlow::Break(()), ControlFlow::Continue)).unwrap();
    drop(model);
    let last = events.into_iter().last();
    assert!(matches!(last, Some(Event::Finish { reason: Finish::Cancelled, .. })), "{last:?}");
}
