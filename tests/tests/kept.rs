//! Sequences that are kept between requests: what has been read is not read again, and no text depends on that.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use proptest::prelude::*;
use sluice_format::WeightType;
use sluice_generate::{
    Drain, Event, Finish, GenerationError, Model, Place, Request, SamplerConfig, SchedulerOptions, Watch, WhenFull,
};
use sluice_model::{Engine, EngineOptions, Progress};
use sluice_sessions::{Store, StoreOptions};
use sluice_tests::Converted;
use sluice_tests::house::{Heard, House};

/// Latents, with a tokenizer; windows with sinks; keys beside recurrent states.
const MODELS: [(&str, Option<WeightType>); 3] =
    [("demo-model", Some(WeightType::Q8)), ("golden/gpt_oss", None), ("golden/qwen3_next", None)];

fn options(sequences: usize, context: usize) -> EngineOptions {
    EngineOptions {
        sequences: Some(sequences),
        context: Some(context),
        forget: true,
        threads: Some(1),
        ..EngineOptions::default()
    }
}

fn demo(sequences: usize, context: usize, scheduling: SchedulerOptions) -> (Converted, House) {
    let model = Converted::new("demo-model", Some(WeightType::Q8));
    let house = House::new(model.open(&options(sequences, context)), scheduling);
    (model, house)
}

fn prompt(engine: &Engine, number: u32, length: usize) -> Vec<u32> {
    let vocab = engine.spec().vocab_size as u32;
    (0..length as u32).map(|i| (i * 7919 + number * 104_729 + 13) % vocab).collect()
}

/// A store with what is in the folder.
fn store(folder: &Path) -> Arc<Store> {
    let options = StoreOptions { folder: folder.to_owned(), max_bytes: 1 << 30, expire_after: None };
    Arc::new(Store::open(options).unwrap())
}

/// A prompt for the demo model.
fn words(number: u32, length: usize) -> Vec<u32> {
    (0..length as u32).map(|i| (i * 7919 + number * 104_729 + 13) % 1536).collect()
}

/// The result of a request, and how many tokens went through the layers for it.
fn ask(house: &mut House, request: Request) -> (Heard, u64) {
    let before = house.engine.stats().tokens;
    let id = house.submit(request);
    house.run();
    (house.owners.remove(&id).unwrap().2, house.engine.stats().tokens - before)
}

#[test]
fn the_next_turn_of_a_conversation_reads_its_new_tokens_alone() {
    for (name, ty) in MODELS {
        let model = Converted::new(name, ty);
        let mut house = House::new(model.open(&options(2, 400)), SchedulerOptions::default());
        let mut text = prompt(&house.engine, 1, 60);
        let mut seen = 0;
        for turn in 2..7 {
            let (heard, computed) = ask(&mut house, Request::new(text.clone(), 20));
            assert_eq!(heard.usage.cached_tokens, seen, "{name}, turn {turn}");
            assert_eq!(
                computed as usize,
                text.len() - seen + 19,
                "{name}, turn {turn}: the last token is not computed"
            );
            if seen > 0 {
                assert_eq!(heard.read.first(), Some(&seen), "{name}, turn {turn}");
            }
            let mut alone = House::new(model.open(&options(1, 400)), SchedulerOptions::default());
            assert_eq!(ask(&mut alone, Request::new(text.clone(), 20)).0.said(), heard.said(), "{name}, turn {turn}");
            text.extend(&heard.ids);
            seen = text.len() - 1;
            text.extend(prompt(&house.engine, turn, 15));
        }
        let status = house.scheduler.status();
        assert_eq!(status.totals.generated_tokens, 100);
        assert_eq!(status.totals.prompt_tokens, 60 + 95 + 130 + 165 + 200);
        assert_eq!(status.totals.cached_tokens, 79 + 114 + 149 + 184);
        assert!(status.kept > 0 && status.kept_tokens > 100, "{status:?}");
    }
}

#[test]
fn a_prompt_that_parts_from_an_earlier_one_goes_on_there_or_from_a_mark() {
    for (name, ty) in MODELS {
        let model = Converted::new(name, ty);
        let engine = model.open(&EngineOptions { marks: 2, ..options(2, 400) });
        let mut house = House::new(engine, SchedulerOptions::default());
        let text = prompt(&house.engine, 1, 240);
        let marked = |marks: &[usize]| Request { marks: marks.to_vec(), ..Request::new(text.clone(), 4) };
        // There is room for two of three marks.
        let (first, computed) = ask(&mut house, marked(&[50, 120, 170]));
        assert_eq!(computed, 243, "{name}");
        for (parts, want) in [(90, 0), (140, 120), (170, 170), (230, 170)] {
            let mut other = text[..parts].to_vec();
            other.extend(prompt(&house.engine, 9, 20));
            let (heard, computed) = ask(&mut house, Request { keep: false, ..Request::new(other.clone(), 4) });
            // A window reaches back a little farther than its tokens see, because it has whole pages.
            let cached = heard.usage.cached_tokens;
            match name {
                "demo-model" => assert_eq!(cached, parts),
                "golden/gpt_oss" => assert!((want..=parts).contains(&cached), "{cached} of {parts}"),
                _ => assert_eq!(cached, want, "{name}, {parts}"),
            }
            assert_eq!(computed as usize, other.len() - cached + 3, "{name}, {parts}");
            let mut alone = House::new(model.open(&options(1, 400)), SchedulerOptions::default());
            assert_eq!(ask(&mut alone, Request::new(other, 4)).0.said(), heard.said(), "{name}, {parts}");
        }
        // The same request again.
        let (again, _) = ask(&mut house, marked(&[]));
        let want = if name == "golden/qwen3_next" { 170 } else { text.len() - 1 };
        assert_eq!((again.said(), again.usage.cached_tokens), (first.said(), want), "{name}");
        let refused = |marks: &[usize]| {
            let request = Request { marks: marks.to_vec(), ..Request::new(text.clone(), 4) };
            house.scheduler.submit(request, |_| ControlFlow::Continue(())).unwrap_err()
        };
        for bad in [&[0][..], &[241], &[5, 5], &[7, 6]] {
            assert!(matches!(refused(bad), GenerationError::Mark { prompt: 240, .. }), "{bad:?}");
        }
        assert!(house.scheduler.submit(marked(&[240]), |_| ControlFlow::Continue(())).is_ok());
        house.run();
    }
}

#[test]
fn equal_prompts_that_come_together_are_read_once() {
    for (name, ty) in MODELS {
        let model = Converted::new(name, ty);
        let mut alone = House::new(model.open(&options(1, 400)), SchedulerOptions::default());
        let sampled = |seed, prompt| Request {
            sampling: SamplerConfig { temperature: 1.0, seed, ..SamplerConfig::default() },
            ..Request::new(prompt, 8)
        };
        let scheduling = SchedulerOptions { prompt_rows: 32, ..SchedulerOptions::default() };
        let mut house = House::new(model.open(&options(6, 400)), scheduling);
        let text = prompt(&house.engine, 3, 200);
        // Another one diverges from them in the middle, and comes first.
        let mut other = text[..130].to_vec();
        other.extend(prompt(&house.engine, 4, 50));
        let ids: Vec<u64> = [house.submit(sampled(9, other.clone()))]
            .into_iter()
            .chain((0..4).map(|seed| house.submit(sampled(seed, text.clone()))))
            .collect();
        house.turn();
        let status = house.scheduler.status();
        assert_eq!((status.queued, status.reading + status.decoding), (0, 5), "{name}: those that wait are admitted");
        house.run();
        // 180 tokens of the first, 70 more of the second, one each of three more; seven of each answer.
        assert_eq!(house.engine.stats().tokens, 180 + 70 + 3 + 5 * 7, "{name}");
        let cached = ids.iter().map(|id| house.heard(*id).usage.cached_tokens).collect::<Vec<_>>();
        assert_eq!(cached, [0, 130, 199, 199, 199], "{name}");
        for (number, id) in ids.iter().enumerate() {
            let request =
                if number == 0 { sampled(9, other.clone()) } else { sampled(number as u64 - 1, text.clone()) };
            alone.scheduler.release_kept();
            assert_eq!(ask(&mut alone, request).0.said(), house.heard(*id).said(), "{name}, {number}");
        }
    }
}

#[test]
fn those_that_wait_for_one_that_goes_do_not_wait_any_longer() {
    let (_model, mut house) = demo(4, 400, SchedulerOptions { prompt_rows: 32, ..SchedulerOptions::default() });
    let talks = house.submit(Request::new(prompt(&house.engine, 8, 4), 40));
    house.turn();
    let text = prompt(&house.engine, 3, 300);
    let ids: Vec<u64> = (0..3).map(|_| house.submit(Request::new(text.clone(), 3))).collect();
    house.turn();
    house.turn();
    assert_eq!(house.owners[&ids[0]].0.place(), Some(Place::Reading { read: 64, prompt: 300 }));
    assert_eq!(house.owners[&ids[1]].0.place(), Some(Place::Reading { read: 0, prompt: 300 }));
    house.owners[&ids[0]].0.cancel();
    house.run();
    assert_eq!(house.heard(ids[0]).finish, Some(Finish::Cancelled));
    assert_eq!(house.heard(ids[1]).ids, house.heard(ids[2]).ids);
    let cached = ids.iter().map(|id| house.heard(*id).usage.cached_tokens).collect::<Vec<_>>();
    assert_eq!(cached, [0, 64, 299], "what the first has read is there for the second, and all of that for the third");
    assert_eq!(house.heard(talks).ids.len(), 40);
}

#[test]
fn what_was_read_until_a_generation_was_cancelled_stays_for_the_retry() {
    let (_model, mut house) = demo(2, 400, SchedulerOptions { prompt_rows: 50, ..SchedulerOptions::default() });
    let talks = house.submit(Request::new(prompt(&house.engine, 8, 4), 40));
    house.turn();
    let text = prompt(&house.engine, 3, 300);
    let id = house.submit(Request::new(text.clone(), 3));
    house.turn();
    house.turn();
    let victim = house.owners[&id].0.clone();
    let mut progress = |p: Progress| {
        if p.layers == 1 {
            victim.cancel();
        }
    };
    house.turn_watched(&mut Watch { progress: Some(&mut progress), routing: None });
    assert_eq!((house.heard(id).finish, victim.place()), (Some(Finish::Cancelled), None));
    let again = house.submit(Request::new(text, 3));
    house.run();
    assert_eq!(house.heard(again).usage.cached_tokens, 100);
    assert_eq!(house.heard(talks).ids.len(), 40);
}

#[test]
fn kept_sequences_make_nobody_wait_and_nobody_lose_pages() {
    // There are six pages, and each conversation has four.
    let (_model, mut house) = demo(1, 384, SchedulerOptions::default());
    let (first, _) = ask(&mut house, Request::new(words(0, 200), 40));
    assert_eq!(house.scheduler.status().kept_tokens, 239);
    let (second, _) = ask(&mut house, Request::new(words(1, 200), 40));
    assert_eq!((first.finish, second.finish), (Some(Finish::Length), Some(Finish::Length)));
    // The older one has lost its end.
    let status = house.scheduler.status();
    assert_eq!((status.kept, status.kept_tokens), (2, 128 + 239), "{status:?}");
    let (again, computed) = ask(&mut house, Request::new(words(0, 200), 40));
    assert_eq!((again.said(), again.usage.cached_tokens, computed), (first.said(), 128, 72 + 39));
    // Two running generations keep their pages, whatever is kept; and a long one gets all of them.
    let ids = [5, 6].map(|n| house.submit(Request::new(prompt(&house.engine, n, 60), 60)));
    house.turn();
    assert_eq!(house.scheduler.status().decoding, 2);
    house.run();
    assert!(ids.iter().all(|id| house.heard(*id).finish == Some(Finish::Length)));
    let (long, _) = ask(&mut house, Request::new(words(7, 380), 10));
    assert_eq!((long.finish, long.ids.len()), (Some(Finish::Context), 5));
    let status = house.scheduler.status();
    assert_eq!((status.preemptions, status.kept), (0, 1));
    house.scheduler.release_kept();
    assert!(house.engine.pages().iter().all(|pages| pages.free == pages.total));
}

#[test]
fn as_many_are_kept_as_was_said_and_no_more_than_are_of_use() {
    let (_model, mut house) = demo(8, 400, SchedulerOptions { kept: 3, ..SchedulerOptions::default() });
    for number in 0..5 {
        ask(&mut house, Request::new(words(number, 40), 2));
        // The first one is used again and again.
        ask(&mut house, Request::new(words(0, 40), 2));
    }
    assert_eq!(house.scheduler.status().kept, 3);
    assert_eq!(ask(&mut house, Request::new(words(0, 40), 2)).0.usage.cached_tokens, 39);
    assert_eq!(ask(&mut house, Request::new(words(1, 40), 2)).0.usage.cached_tokens, 0);
    assert_eq!(ask(&mut house, Request::new(words(4, 40), 2)).0.usage.cached_tokens, 39);
    // If one begins with another, both are not kept.
    ask(&mut house, Request::new(words(4, 80), 2));
    ask(&mut house, Request::new(words(4, 60), 0));
    let kept = house.scheduler.status();
    assert_eq!((kept.kept, kept.kept_tokens), (3, 41 + 41 + 81), "{kept:?}");
    // Requests that leave nothing in memory.
    let private = Request { keep: false, ..Request::new(words(11, 80), 2) };
    ask(&mut house, private);
    assert_eq!(ask(&mut house, Request::new(words(11, 80), 2)).0.usage.cached_tokens, 0);
    let (_model, mut none) = demo(2, 400, SchedulerOptions { kept: 0, ..SchedulerOptions::default() });
    ask(&mut none, Request::new(words(1, 40), 2));
    assert_eq!(ask(&mut none, Request::new(words(1, 40), 2)).0.usage.cached_tokens, 0);
    assert!(none.engine.pages().iter().all(|pages| pages.free == pages.total));
}

#[test]
fn a_full_queue_refuses_and_knows_the_places_of_thousands() {
    let scheduling = SchedulerOptions { queue: Some(5000), running: Some(1), ..SchedulerOptions::default() };
    let (_model, mut house) = demo(1, 100, scheduling);
    let handles: Vec<_> = (0..5000)
        .map(|_| house.scheduler.submit(Request::new(vec![1, 2], 1), |_| ControlFlow::Continue(())).unwrap())
        .collect();
    let full = house.scheduler.submit(Request::new(vec![1], 1), |_| ControlFlow::Continue(())).unwrap_err();
    assert!(matches!(full, GenerationError::QueueFull { queued: 5000, limit: 5000 }), "{full}");
    for (ahead, handle) in handles.iter().enumerate() {
        assert_eq!(handle.place(), Some(Place::Queued { ahead }));
    }
    handles[0].cancel();
    handles[4999].cancel();
    house.turn();
    assert_eq!(handles[4998].place(), Some(Place::Queued { ahead: 4996 }));
    assert_eq!((handles[0].place(), handles[1].place(), handles[4999].place()), (None, None, None));
    house.scheduler.submitter().close();
    while house.turn() {}
    assert!(handles.iter().all(|handle| handle.place().is_none()));
}

#[test]
fn a_model_says_what_it_is_and_ends_what_it_has_begun() {
    let converted = Converted::new("demo-model", Some(WeightType::Q8));
    let scheduling = SchedulerOptions { running: Some(1), ..SchedulerOptions::default() };
    let model = Model::new(converted.open(&options(1, 400)), scheduling, false).unwrap();
    assert_eq!((model.vocab_size(), model.context(), model.template().is_none()), (1536, 400, true));
    assert!(model.metadata("config.json").is_some() && model.metadata("../config.json").is_none());
    assert!(!model.family().is_empty() && model.state_id().len() == 32);
    assert_eq!(model.recommended().0.seed, 0);
    let (sender, events) = channel();
    let submit = |tokens| {
        let sender = sender.clone();
        let owner = move |event| sender.send(event).map_or(ControlFlow::Break(()), ControlFlow::Continue);
        model.submit(Request::new(vec![1, 2, 3], tokens), owner).unwrap()
    };
    let (first, second) = (submit(30), submit(30));
    while matches!(first.place(), Some(Place::Queued { .. })) {
        std::thread::yield_now();
    }
    model.close(Drain { within: Duration::from_secs(600) });
    let ends = || {
        events.try_iter().filter_map(|event| match event {
            Event::Finish { reason, .. } => Some(reason),
            _ => None,
        })
    };
    let mut reasons: Vec<_> = ends().collect();
    reasons.sort_by_key(|reason| *reason == Finish::Length);
    assert_eq!(reasons, [Finish::Cancelled, Finish::Length]);
    assert_eq!(second.place(), None);
    // Without time to end, running generations are cancelled.
    let model = Model::new(converted.open(&options(1, 400)), SchedulerOptions::default(), false).unwrap();
    let (sender, events) = channel();
    let owner = move |event| sender.send(event).map_or(ControlFlow::Break(()), ControlFlow::Continue);
    model.submit(Request::new(vec![1, 2, 3], 390), owner).unwrap();
    model.close(Drain::default());
    assert!(matches!(events.into_iter().last(), Some(Event::Finish { reason: Finish::Cancelled, .. })));
}

fn with_store(folder: &Path) -> SchedulerOptions {
    SchedulerOptions { prompt_rows: 40, store: Some(store(folder)), save_every: 64, ..SchedulerOptions::default() }
}

#[test]
fn another_run_of_the_program_goes_on_from_the_drive() {
    for (name, ty) in MODELS {
        let model = Converted::new(name, ty);
        let folder = tempfile::tempdir().unwrap();
        let mut text = prompt(&model.open(&options(1, 240)), 1, 90);
        let mut seen = 0;
        for turn in 2..5 {
            let mut house = House::new(model.open(&options(2, 240)), with_store(folder.path()));
            let (heard, computed) = ask(&mut house, Request::new(text.clone(), 20));
            assert_eq!(heard.usage.cached_tokens, seen, "{name}, turn {turn}");
            assert_eq!(computed as usize, text.len() - seen + 19, "{name}, turn {turn}");
            assert_eq!(house.scheduler.status().totals.restored_tokens as usize, seen, "{name}, turn {turn}");
            let mut alone = House::new(model.open(&options(1, 240)), SchedulerOptions::default());
            assert_eq!(ask(&mut alone, Request::new(text.clone(), 20)).0.said(), heard.said(), "{name}, turn {turn}");
            text.extend(&heard.ids);
            seen = text.len() - 1;
            text.extend(prompt(&house.engine, turn, 15));
            house.scheduler.release_kept();
        }
        // With a damaged file, the result is the same as without it.
        for file in std::fs::read_dir(folder.path()).unwrap() {
            let path = file.unwrap().path();
            let mut bytes = std::fs::read(&path).unwrap();
            let last = bytes.len().saturating_sub(40);
            bytes.get_mut(last).into_iter().for_each(|byte| *byte ^= 1);
            std::fs::write(&path, bytes).unwrap();
        }
        let mut house = House::new(model.open(&options(2, 240)), with_store(folder.path()));
        let mut alone = House::new(model.open(&options(1, 240)), SchedulerOptions::default());
        let (heard, _) = ask(&mut house, Request::new(text.clone(), 20));
        assert_eq!(ask(&mut alone, Request::new(text.clone(), 20)).0.said(), heard.said(), "{name}");
        assert_eq!(house.scheduler.status().totals.restored_tokens, 0, "{name}");
    }
}

#[test]
fn another_run_goes_on_with_a_conversation_of_less_than_a_page() {
    for (name, ty) in MODELS {
        let model = Converted::new(name, ty);
        let folder = tempfile::tempdir().unwrap();
        let mut text = prompt(&model.open(&options(1, 240)), 1, 20);
        let mut house = House::new(model.open(&options(2, 240)), with_store(folder.path()));
        let (heard, _) = ask(&mut house, Request::new(text.clone(), 10));
        text.extend(&heard.ids);
        let seen = text.len() - 1;
        assert!(seen < 64);
        text.extend(prompt(&house.engine, 2, 5));
        house.scheduler.release_kept();
        drop(house);
        let mut house = House::new(model.open(&options(2, 240)), with_store(folder.path()));
        let (heard, computed) = ask(&mut house, Request::new(text.clone(), 10));
        assert_eq!((heard.usage.cached_tokens, computed as usize), (seen, text.len() - seen + 9), "{name}");
        let mut alone = House::new(model.open(&options(1, 240)), SchedulerOptions::default());
        assert_eq!(ask(&mut alone, Request::new(text, 10)).0.said(), heard.said(), "{name}");
    }
}

#[test]
fn a_program_that_is_killed_in_a_long_prompt_loses_little_of_it() {
    for (name, ty) in MODELS {
        let model = Converted::new(name, ty);
        let folder = tempfile::tempdir().unwrap();
        let mut house = House::new(model.open(&options(2, 240)), with_store(folder.path()));
        let text = prompt(&house.engine, 1, 220);
        // While another generation is decoding, prompts are read in parts.
        house.submit(Request { keep: false, ..Request::new(prompt(&house.engine, 2, 3), 60) });
        house.turn();
        let id = house.submit(Request { title: Some("A long one".into()), ..Request::new(text.clone(), 5) });
        (0..4).for_each(|_| _ = house.turn());
        let place = house.owners[&id].0.place();
        assert!(matches!(place, Some(Place::Reading { read, prompt: 220 }) if read >= 120), "{name}: {place:?}");
        drop(house);
        let again = store(folder.path());
        assert!(again.list().iter().any(|entry| entry.title.as_deref() == Some("A long one")), "{name}");
        assert!(again.list().iter().all(|entry| entry.tokens >= 64), "{name}: nothing of the one that is not kept");
        drop(again);
        let mut house = House::new(model.open(&options(2, 240)), with_store(folder.path()));
        let (heard, _) = ask(&mut house, Request::new(text.clone(), 5));
        assert!((64..160).contains(&heard.usage.cached_tokens), "{name}: {}", heard.usage.cached_tokens);
        let mut alone = House::new(model.open(&options(1, 240)), SchedulerOptions::default());
        assert_eq!(ask(&mut alone, Request::new(text, 5)).0.said(), heard.said(), "{name}");
    }
}

#[test]
fn a_model_that_rests_or_is_closed_has_everything_on_the_drive() {
    let converted = Converted::new("demo-model", Some(WeightType::Q8));
    let folder = tempfile::tempdir().unwrap();
    let scheduling = SchedulerOptions { rest_after: Some(Duration::ZERO), ..with_store(folder.path()) };
    let model = Model::new(converted.open(&options(4, 240)), scheduling, false).unwrap();
    // More at a time than may wait for writing.
    let requests = || (0..12).map(|n| Request::new(words(n, 70), 3)).collect();
    let want: Vec<_> = model.batch(requests()).into_iter().map(Result::unwrap).collect();
    while model.status().kept > 0 {
        std::thread::yield_now();
    }
    for (got, want) in model.batch(requests()).into_iter().map(Result::unwrap).zip(&want) {
        assert_eq!((&got.ids, got.usage.cached_tokens), (&want.ids, 69));
    }
    let restored = model.status().totals.restored_tokens;
    assert!(restored >= 64, "{restored}");
    model.complete(Request::new(words(50, 100), 3)).unwrap();
    model.close(Drain::default());
    let model = Model::new(converted.open(&options(4, 240)), with_store(folder.path()), false).unwrap();
    assert_eq!(model.complete(Request::new(words(50, 100), 3)).unwrap().usage.cached_tokens, 99);
}

#[test]
fn what_is_deleted_from_the_drive_goes_from_memory_and_does_not_come_back() {
    let folder = tempfile::tempdir().unwrap();
    let scheduling = with_store(folder.path());
    let store = scheduling.store.clone().unwrap();
    let (_model, mut house) = demo(4, 400, scheduling);
    let (deleted, other) = (words(1, 150), words(2, 150));
    let continued: Vec<u32> = deleted.iter().copied().chain(words(3, 80)).collect();
    for text in [&deleted, &continued, &other] {
        ask(&mut house, Request::new(text.clone(), 4));
    }
    store.flush();
    let first = store.list().into_iter().filter(|entry| entry.parent.is_none()).map(|entry| entry.id);
    for id in first {
        store.delete(&id).unwrap();
    }
    assert!(store.list().is_empty());
    for text in [&continued, &deleted, &other] {
        let heard = ask(&mut house, Request { keep: false, ..Request::new(text.clone(), 4) }).0;
        assert_eq!(heard.usage.cached_tokens, 0);
    }
    house.scheduler.release_kept();
    assert!(store.list().is_empty(), "{:?}", store.list());
}

/// One of many requests: a new text, or one with the beginning of an earlier text.
#[derive(Clone, Debug)]
struct Turn {
    /// Which of the earlier texts, and how much of it; `None` for a new text.
    base: Option<(usize, f64)>,
    more: usize,
    tokens: usize,
    temperature: f32,
    drops: bool,
    keep: bool,
    marks: Vec<f64>,
    /// Cancelled in this turn, after this layer.
    cancelled: Option<(usize, usize)>,
    pause: usize,
}

const CONTEXT: usize = 200;

fn any_turn() -> impl Strategy<Value = Turn> {
    let base = proptest::option::weighted(0.8, (0usize..100, prop_oneof![2 => Just(1.0), 1 => 0.0f64..1.0]));
    let temperature = proptest::sample::select(vec![0.0, 1.0]);
    let cancelled = proptest::option::weighted(0.2, (0usize..60, 1usize..6));
    let pause = prop_oneof![2 => Just(0usize), 1 => 1usize..50];
    let marks = proptest::collection::vec(0.0f64..1.0, 0..4);
    let flags = (proptest::bool::weighted(0.2), proptest::bool::weighted(0.9));
    (base, 0usize..60, 0usize..40, temperature, flags, marks, cancelled, pause).prop_map(
        |(base, more, tokens, temperature, (drops, keep), marks, cancelled, pause)| Turn {
            base,
            more,
            tokens,
            temperature,
            drops,
            keep,
            marks,
            cancelled,
            pause,
        },
    )
}

#[derive(Clone, Debug)]
struct Case {
    model: usize,
    turns: Vec<Turn>,
    sequences: usize,
    rows: usize,
    kept: usize,
    marks: usize,
    spills: bool,
    stores: bool,
    least: bool,
}

fn any_case() -> impl Strategy<Value = Case> {
    let turns = proptest::collection::vec(any_turn(), 2..12);
    let sizes = (1usize..5, 1usize..100, prop_oneof![Just(64usize), 1usize..5], 0usize..3);
    (0..MODELS.len(), turns, sizes, any::<bool>(), any::<bool>(), any::<bool>()).prop_map(
        |(model, turns, (sequences, rows, kept, marks), spills, stores, least)| Case {
            model,
            turns,
            sequences,
            rows,
            kept,
            marks,
            spills,
            stores,
            least,
        },
    )
}

fn request(turn: &Turn, number: usize, prompt: Vec<u32>) -> Request {
    let marks: std::collections::BTreeSet<usize> =
        turn.marks.iter().map(|part| 1 + (part * (prompt.len() - 1) as f64) as usize).collect();
    Request {
        sampling: SamplerConfig { temperature: turn.temperature, seed: number as u64 % 3, ..SamplerConfig::default() },
        when_full: if turn.drops { WhenFull::DropOldest { keep: 10 } } else { WhenFull::Stop },
        marks: marks.into_iter().collect(),
        keep: turn.keep,
        ..Request::new(prompt, turn.tokens)
    }
}

/// The prompts, and the result of each on an engine that keeps nothing.
fn alone(model: &Converted, turns: &[Turn]) -> Vec<(Vec<u32>, Heard)> {
    let options = EngineOptions { budget: None, ..options(1, CONTEXT) };
    let mut house = House::new(model.open(&options), SchedulerOptions { kept: 0, ..SchedulerOptions::default() });
    let mut texts: Vec<(Vec<u32>, Heard)> = Vec::new();
    for (number, turn) in turns.iter().enumerate() {
        let base = turn.base.filter(|_| number > 0).map(|(base, part)| {
            let (prompt, heard) = &texts[base % number];
            let text: Vec<u32> = prompt.iter().chain(&heard.ids).copied().collect();
            text[..(text.len() as f64 * part) as usize].to_vec()
        });
        let mut tokens = base.unwrap_or_default();
        tokens.extend(prompt(&house.engine, number as u32, turn.more + 1));
        tokens.truncate(CONTEXT);
        let (heard, _) = ask(&mut house, request(turn, number, tokens.clone()));
        texts.push((tokens, heard));
    }
    texts
}

fn check(model: &Converted, case: &Case, spill: Option<std::path::PathBuf>) -> Result<u64, TestCaseError> {
    let want = alone(model, &case.turns);
    let opens = EngineOptions { marks: case.marks, mark_every: Some(30), ..options(case.sequences, CONTEXT) };
    let budget = case.least.then(|| model.least_budget_for(&opens));
    let engine = model.open(&EngineOptions { budget, ..opens });
    let folder = tempfile::tempdir().unwrap();
    let scheduling = SchedulerOptions {
        prompt_rows: case.rows,
        kept: case.kept,
        spill,
        store: case.stores.then(|| store(folder.path())),
        save_every: 64,
        ..SchedulerOptions::default()
    };
    let mut house = House::new(engine, scheduling);
    let (mut ids, mut turn, mut comes) = (Vec::<u64>::new(), 0, 0);
    loop {
        while ids.len() < want.len() && comes <= turn {
            let (number, wish) = (ids.len(), &case.turns[ids.len()]);
            ids.push(house.submit(request(wish, number, want[number].0.clone())));
            comes = turn + wish.pause;
        }
        let victims: Vec<_> = ids
            .iter()
            .zip(&case.turns)
            .filter_map(|(id, wish)| {
                let (at, layer) = wish.cancelled.filter(|cancelled| cancelled.0 == turn)?;
                Some((at, layer, house.owners[id].0.clone()))
            })
            .collect();
        let mut progress = |p: Progress| victims.iter().filter(|v| v.1 == p.layers).for_each(|v| v.2.cancel());
        let worked = house.turn_watched(&mut Watch { progress: Some(&mut progress), routing: None });
        turn += 1;
        prop_assert!(turn < 10_000, "no end: {:?}", house.scheduler.status());
        prop_assert!(house.scheduler.status().kept <= case.kept);
        if !worked && ids.len() == want.len() {
            break;
        }
        comes = if worked { comes } else { turn };
    }
    house.run();
    for (number, (id, (_, want))) in ids.iter().zip(&want).enumerate() {
        let heard = house.heard(*id);
        prop_assert_eq!(&heard.error, &None, "generation {}", number);
        if heard.finish == Some(Finish::Cancelled) {
            prop_assert!(case.turns[number].cancelled.is_some());
            prop_assert_eq!(&heard.ids[..], &want.ids[..heard.ids.len()], "generation {}", number);
        } else {
            prop_assert_eq!((heard.said(), &heard.shifts), (want.said(), &want.shifts), "generation {}", number);
        }
    }
    house.scheduler.release_kept();
    let free = house.engine.pages();
    prop_assert!(free.iter().all(|count| count.free == count.total), "{:?}", free);
    Ok(house.scheduler.status().totals.cached_tokens)
}

#[test]
fn no_text_depends_on_what_is_kept() {
    let cases = std::env::var("SLUICE_KEPT_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(24);
    let folder = tempfile::tempdir().unwrap();
    let models = MODELS.map(|(name, ty)| Converted::new(name, ty));
    let config = ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() };
    let cached = std::cell::Cell::new(0);
    let outcome = proptest::test_runner::TestRunner::new(config).run(&any_case(), |case| {
        let spill = case.spills.then(|| folder.path().to_owned());
        cached.set(cached.get() + check(&models[case.model], &case, spill)?);
        Ok(())
    });
    outcome.unwrap();
    assert!(cached.get() > 0, "something was not read again");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "no file is left");
}
