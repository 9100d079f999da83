//! When room runs out: a full context, and too few pages for all. No text changes.

use std::path::PathBuf;
use std::time::Duration;

use proptest::prelude::*;
use sluice_format::WeightType;
use sluice_generate::{Completion, Finish, Model, Place, Request, SamplerConfig, SchedulerOptions, WhenFull};
use sluice_model::{Engine, EngineOptions};
use sluice_tests::house::{Heard, House};
use sluice_tests::{Converted, argmax};

/// Latents, with a tokenizer; windows with sinks; keys beside recurrent states.
const MODELS: [(&str, Option<WeightType>); 3] =
    [("demo-model", Some(WeightType::Q8)), ("golden/gpt_oss", None), ("golden/qwen3_next", None)];

fn open(model: &Converted, sequences: usize, context: usize) -> Engine {
    model.open(&EngineOptions {
        sequences: Some(sequences),
        context: Some(context),
        forget: true,
        threads: Some(1),
        ..EngineOptions::default()
    })
}

fn prompt(engine: &Engine, number: u32, length: usize) -> Vec<u32> {
    let vocab = engine.spec().vocab_size as u32;
    (0..length as u32).map(|i| (i * 7919 + number * 104_729 + 13) % vocab).collect()
}

#[test]
fn what_is_dropped_leaves_what_its_shorter_text_would_give() {
    const CONTEXT: usize = 40;
    for (name, ty) in MODELS {
        let model = Converted::new(name, ty);
        let mut house = House::new(open(&model, 1, CONTEXT), SchedulerOptions { prompt_rows: 7, ..Default::default() });
        for (keep, length, count) in [(0, 5, 70), (5, 30, 60), (39, 40, 4), (12, 1, 50)] {
            let tokens = prompt(&house.engine, 3, length);
            let request = Request { when_full: WhenFull::DropOldest { keep }, ..Request::new(tokens.clone(), count) };
            let id = house.submit(request);
            house.run();
            house.scheduler.release_kept();
            // Calculated by hand: a fresh sequence for every token.
            let (mut window, mut ids, mut shifts) = (tokens, Vec::new(), Vec::new());
            for _ in 0..count {
                if window.len() > CONTEXT {
                    let dropped = (window.len() - keep) / 2;
                    window.drain(keep..keep + dropped);
                    shifts.push((dropped, window.len()));
                }
                let (mut sequence, mut logits) = (house.engine.new_sequence(), Vec::new());
                house.engine.forward(&mut sequence, &window, &mut logits).unwrap();
                ids.push(argmax(&logits));
                window.push(ids[ids.len() - 1]);
            }
            let heard = house.heard(id);
            assert_eq!(heard.finish, Some(Finish::Length), "{name}");
            assert_eq!(heard.ids, ids, "{name}, {keep} of {length} kept");
            assert_eq!(heard.shifts, shifts, "{name}, {keep} of {length} kept");
            assert!(!shifts.is_empty());
        }
    }
}

/// One of many requests: a seed, a length of the prompt, tokens to generate, what to do when the context is full.
#[derive(Clone, Debug)]
struct Wish {
    prompt: usize,
    tokens: usize,
    temperature: f32,
    keep: Option<usize>,
    /// Turns before the next request comes.
    pause: usize,
}

fn any_wish(context: usize) -> impl Strategy<Value = Wish> {
    let temperature = proptest::sample::select(vec![0.0, 0.8, 1.5]);
    let keep = proptest::option::weighted(0.3, 0..context / 2);
    (1..context / 3, 20usize..280, temperature, keep, prop_oneof![2 => Just(0usize), 1 => 1usize..90])
        .prop_map(|(prompt, tokens, temperature, keep, pause)| Wish { prompt, tokens, temperature, keep, pause })
}

fn request(engine: &Engine, number: usize, wish: &Wish) -> Request {
    Request {
        sampling: SamplerConfig { temperature: wish.temperature, seed: number as u64, ..SamplerConfig::default() },
        when_full: wish.keep.map_or(WhenFull::Stop, |keep| WhenFull::DropOldest { keep }),
        ..Request::new(prompt(engine, number as u32, wish.prompt), wish.tokens)
    }
}

/// In these cases, it depends on chance whether one has to wait; two tests below have cases where one must.
#[test]
fn when_pages_run_out_everyone_still_says_what_they_say_alone() {
    const CONTEXT: usize = 384;
    let spill = tempfile::tempdir().unwrap();
    let models = MODELS.map(|(name, ty)| (name, Converted::new(name, ty)));
    let wishes = proptest::collection::vec(any_wish(CONTEXT), 2..9);
    let case = (0..MODELS.len(), wishes, 1usize..3, 1usize..300, any::<bool>());
    let config = ProptestConfig { cases: 16, failure_persistence: None, ..ProptestConfig::default() };
    let outcome = proptest::test_runner::TestRunner::new(config).run(&case, |(at, wishes, sequences, rows, spills)| {
        let (name, model) = &models[at];
        let mut alone = House::new(open(model, 1, CONTEXT), SchedulerOptions::default());
        let want: Vec<Heard> = wishes
            .iter()
            .enumerate()
            .map(|(number, wish)| {
                let id = alone.submit(request(&alone.engine, number, wish));
                alone.run();
                alone.owners.remove(&id).unwrap().2
            })
            .collect();
        let folder: Option<PathBuf> = spills.then(|| spill.path().to_owned());
        let options = SchedulerOptions { prompt_rows: rows, spill: folder, ..SchedulerOptions::default() };
        let mut house = House::new(open(model, sequences, CONTEXT), options);
        let mut ids = Vec::new();
        for (number, wish) in wishes.iter().enumerate() {
            ids.push(house.submit(request(&house.engine, number, wish)));
            for _ in 0..wish.pause {
                house.turn();
            }
        }
        // Each turn gives the oldest a token, or a part of its prompt.
        let mut turns = 0;
        while house.turn() {
            turns += 1;
            prop_assert!(turns < 20_000, "{name}: no end");
        }
        house.run();
        for (number, (id, want)) in ids.iter().zip(&want).enumerate() {
            let heard = house.heard(*id);
            prop_assert_eq!(&heard.error, &None);
            prop_assert_eq!(
                (heard.said(), &heard.shifts),
                (want.said(), &want.shifts),
                "{}: generation {}",
                name,
                number
            );
        }
        house.scheduler.release_kept();
        let free = house.engine.pages();
        assert!(free.iter().all(|count| count.free == count.total), "all pages have come back: {free:?}");
        assert_eq!(std::fs::read_dir(spill.path()).unwrap().count(), 0, "no file is left");
        Ok(())
    });
    outcome.unwrap();
}

#[test]
fn the_youngest_gives_way_and_comes_before_the_queue() {
    let model = Converted::new("demo-model", Some(WeightType::Q8));
    // Four pages of 64 tokens and one more: two short ones fit at first, but no longer when they have grown.
    let mut house = House::new(open(&model, 1, 256), SchedulerOptions { running: Some(3), ..Default::default() });
    let long = |house: &House, n| Request::new(prompt(&house.engine, n, 20), 180);
    let (first, second) = (house.submit(long(&house, 0)), house.submit(long(&house, 1)));
    let mut saved = None;
    for _ in 0..170 {
        house.turn();
        saved = house.owners[&second].0.place();
        if matches!(saved, Some(Place::Saved { .. })) {
            break;
        }
    }
    let Some(Place::Saved { generated }) = saved else { panic!("the younger one is saved: {saved:?}") };
    assert_eq!(house.heard(second).ids.len(), generated, "what it said until then was heard");
    let status = house.scheduler.status();
    assert_eq!((status.saved, status.decoding, status.preemptions), (1, 1, 1));
    // A third one comes, which would fit, but does not overtake.
    let third = house.submit(Request::new(prompt(&house.engine, 2, 3), 2));
    let before = house.heard(first).ids.len();
    house.turn();
    assert_eq!(house.heard(first).ids.len(), before + 1, "the oldest goes on");
    assert_eq!(house.owners[&third].0.place(), Some(Place::Queued { ahead: 0 }));
    // Another one is cancelled while it waits.
    house.run();
    assert_eq!((house.heard(first).ids.len(), house.heard(second).ids.len()), (180, 180));
    assert_eq!(house.scheduler.status().saved, 0);

    let (first, second) = (house.submit(long(&house, 0)), house.submit(long(&house, 1)));
    while house.scheduler.status().saved == 0 {
        assert!(house.turn());
    }
    house.owners[&second].0.cancel();
    house.turn();
    assert_eq!(house.heard(second).finish, Some(Finish::Cancelled));
    assert_eq!((house.heard(first).finish, house.scheduler.status().saved), (None, 0));
    house.run();
}

#[test]
fn a_saved_sequence_that_was_replaced_or_damaged_is_read_again() {
    let model = Converted::new("demo-model", Some(WeightType::Q8));
    let folder = tempfile::tempdir().unwrap();
    let request = |house: &House, n| Request::new(prompt(&house.engine, n, 20), 180);
    let mut alone = House::new(open(&model, 1, 256), SchedulerOptions::default());
    let want = alone.submit(request(&alone, 1));
    alone.run();
    alone.scheduler.release_kept();
    let mut other = alone.engine.new_sequence();
    alone.engine.forward(&mut other, &prompt(&alone.engine, 7, 90), &mut Vec::new()).unwrap();
    for replaced in [true, false] {
        let spill = Some(folder.path().to_owned());
        let mut house = House::new(open(&model, 1, 256), SchedulerOptions { spill, ..SchedulerOptions::default() });
        let ids = [0, 1].map(|n| house.submit(request(&house, n)));
        while house.scheduler.status().saved == 0 {
            assert!(house.turn(), "one has to wait");
        }
        let file = std::fs::read_dir(folder.path()).unwrap().next().unwrap().unwrap().path();
        match replaced {
            true => other.save_file(&file).unwrap(),
            false => std::fs::write(&file, b"SLUSEQ").unwrap(),
        }
        house.run();
        assert_eq!(house.heard(ids[1]).said(), alone.heard(want).said());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "no file is left");
    }
}

#[test]
fn who_is_alone_and_finds_no_pages_has_a_full_context() {
    let model = Converted::new("demo-model", Some(WeightType::Q8));
    let mut house = House::new(open(&model, 1, 256), SchedulerOptions::default());
    let (mut other, mut logits) = (house.engine.new_sequence(), Vec::new());
    let tokens = prompt(&house.engine, 9, 100);
    house.engine.forward(&mut other, &tokens, &mut logits).unwrap();
    let fits = house.engine.tokens_that_fit();
    assert!(fits < 256);
    let ends = house.submit(Request::new(prompt(&house.engine, 0, 10), 250));
    house.run();
    let heard = house.heard(ends);
    assert_eq!((heard.finish, heard.ids.len()), (Some(Finish::Context), fits - 10 + 1));
    let drops =
        Request { when_full: WhenFull::DropOldest { keep: 4 }, ..Request::new(prompt(&house.engine, 0, 10), 250) };
    let drops = house.submit(drops);
    house.run();
    assert_eq!((house.heard(drops).finish, house.heard(drops).ids.len()), (Some(Finish::Length), 250));
    assert!(!house.heard(drops).shifts.is_empty());
    let never = house.submit(Request::new(prompt(&house.engine, 0, fits + 1), 2));
    house.run();
    let error = house.heard(never).error.as_deref().unwrap();
    assert!(error.contains("pages"), "{error}");
    drop(other);
    let again = house.submit(Request::new(prompt(&house.engine, 0, fits + 1), 2));
    house.run();
    assert_eq!(house.heard(again).finish, Some(Finish::Length));
}

#[test]
fn a_model_that_rests_and_changes_its_budget_answers_the_same() {
    let converted = Converted::new("demo-model", Some(WeightType::Q8));
    let options = SchedulerOptions { rest_after: Some(Duration::ZERO), ..SchedulerOptions::default() };
    let model = Model::new(open(&converted, 2, 256), options, false).unwrap();
    let ask = |n: u32| Request { max_tokens: 12, ..model.text(&format!("Question {n}: what")).unwrap() };
    let said = |answer: Completion| (answer.ids, answer.text, answer.finish);
    let want: Vec<_> = (0..4).map(|n| said(model.complete(ask(n)).unwrap())).collect();
    let least = model.set_budget(0);
    assert!(least > 0);
    assert_eq!((0..4).map(|n| said(model.complete(ask(n)).unwrap())).collect::<Vec<_>>(), want);
    model.set_budget(u64::MAX);
    let together: Vec<_> = model.batch((0..4).map(ask).collect()).into_iter().map(|a| said(a.unwrap())).collect();
    assert_eq!(together, want);
}
