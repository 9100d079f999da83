//! Callers at their worst: handles dropped on many threads, observers and owners that panic, requests that contradict themselves.

use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;
use std::sync::{Arc, Barrier, Mutex};

use proptest::prelude::*;
use sluice_format::WeightType;
use sluice_generate::{
    Constraint, Draft, Event, Finish, GenerationError, Handle, Model, Request, SamplerConfig, SchedulerOptions, Watch,
    WhenFull,
};
use sluice_model::{Cancel, Control, Engine, EngineOptions, Progress, Span, Want};
use sluice_tests::Converted;
use sluice_tests::house::{Heard, House};

fn options(sequences: usize, context: usize) -> EngineOptions {
    EngineOptions {
        sequences: Some(sequences),
        context: Some(context),
        forget: true,
        threads: Some(1),
        ..EngineOptions::default()
    }
}

fn all_free(engine: &Engine) -> bool {
    engine.pages().iter().all(|pages| pages.free == pages.total)
}

#[test]
fn pages_that_go_on_two_threads_at_a_time_come_back() {
    let model = Converted::new("demo-model", Some(WeightType::Q8));
    let mut engine = model.open(&options(2, 500));
    let tokens: Vec<u32> = (0..450).collect();
    let (mut sequence, mut saved) = (engine.new_sequence(), Vec::new());
    engine.forward(&mut sequence, &tokens, &mut Vec::new()).unwrap();
    sequence.save(&mut saved).unwrap();
    drop(sequence);
    // Both release the same pages, in the same order.
    const ROUNDS: usize = 3000;
    let (start, end) = (Barrier::new(2), Barrier::new(2));
    let hand = Mutex::new(None);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..ROUNDS {
                let fork = {
                    start.wait();
                    hand.lock().unwrap().take()
                };
                end.wait();
                drop(fork);
            }
        });
        for _ in 0..ROUNDS {
            let sequence = engine.restore(&mut &saved[..], Path::new("saved")).expect("every page has come back");
            *hand.lock().unwrap() = Some(sequence.fork());
            start.wait();
            end.wait();
            drop(sequence);
        }
    });
    assert!(all_free(&engine), "{:?}", engine.pages());
}

#[test]
fn an_observer_that_panics_leaves_an_engine_that_works() {
    for name in ["golden/deepseek_v32", "golden/gpt_oss", "golden/qwen3_next"] {
        let model = Converted::new(name, None);
        let least = model.least_budget_for(&options(2, 200));
        for budget in [None, Some(least)] {
            let mut engine = model.open(&EngineOptions { budget, threads: Some(2), ..options(2, 200) });
            let layers = engine.spec().layers.len();
            let tokens: Vec<u32> = (0..90).map(|i| i * 37 % 101).collect();
            let (mut alone, mut want) = (engine.new_sequence(), Vec::new());
            engine.forward_all(&mut alone, &tokens, &mut |_, row| want.push(row.to_vec())).unwrap();
            drop(alone);
            for at in 0..=layers {
                let (mut sequence, mut logits) = (engine.new_sequence(), Vec::new());
                engine.forward(&mut sequence, &tokens[..10], &mut logits).unwrap();
                let cancel = Cancel::new();
                let mut progress = |p: Progress| assert!(p.layers != at, "as it is meant to");
                let mut control =
                    Control { cancel: Some(&cancel), progress: Some(&mut progress), ..Control::default() };
                let span = Span::prompt(&mut sequence, &tokens[10..80], Want::All);
                let outcome = catch_unwind(AssertUnwindSafe(|| {
                    engine.step(&mut [span], &mut control, &mut |_, _, _| assert!(at > 0, "as it is meant to"))
                }));
                assert!(outcome.is_err());
                cancel.cancel();
                let position = sequence.position();
                for mut fork in [sequence.fork(), sequence] {
                    let mut rows = Vec::new();
                    engine.forward_all(&mut fork, &tokens[position..], &mut |_, row| rows.push(row.to_vec())).unwrap();
                    assert!(rows == want[position..], "{name}, layer {at}");
                }
                assert!(all_free(&engine), "{name}, layer {at}: {:?}", engine.pages());
            }
        }
    }
}

#[test]
fn an_owner_may_have_the_last_handle_of_the_model() {
    let converted = Converted::new("demo-model", Some(WeightType::Q8));
    let model = Arc::new(Model::open(&converted.path, &options(2, 200)).unwrap());
    let (sender, events) = channel();
    let own = Arc::clone(&model);
    let owner = move |event| {
        let _ = own.status();
        sender.send(event).map_or(ControlFlow::Break(()), ControlFlow::Continue)
    };
    let (other, heard) = channel();
    let listens = move |event| other.send(event).map_or(ControlFlow::Break(()), ControlFlow::Continue);
    // Enough longer than the first one to be still running when the model is dropped.
    model.submit(Request::new(vec![1, 2, 3], 50), owner).unwrap();
    model.submit(Request::new(vec![4, 5, 6], 180), listens).unwrap();
    drop(model);
    // The model is dropped on its own thread, with the first one's owner. That cancels the second one.
    assert!(matches!(events.into_iter().last(), Some(Event::Finish { reason: Finish::Length, .. })));
    assert!(matches!(heard.into_iter().last(), Some(Event::Finish { reason: Finish::Cancelled, .. })));
}

/// Cancels a generation when it is dropped.
struct CancelsAtEnd(Handle);

impl Drop for CancelsAtEnd {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

#[test]
fn an_owner_that_panics_ends_its_own_generation_alone() {
    let converted = Converted::new("demo-model", Some(WeightType::Q8));
    let scheduling = SchedulerOptions { running: Some(1), ..SchedulerOptions::default() };
    let model = Model::new(converted.open(&options(1, 200)), scheduling, false).unwrap();
    let gate = Arc::new(Barrier::new(2));
    let inside = Arc::clone(&gate);
    let mut calls = 0;
    let handle = model
        .submit(Request::new(vec![1, 2, 3], 150), move |_| {
            calls += 1;
            assert_eq!(calls, 1, "one that has panicked is not called again");
            inside.wait();
            panic!("as it is meant to");
        })
        .unwrap();
    // This one waits in the queue, and its owner looks at the scheduler when it is dropped.
    let guard = CancelsAtEnd(handle.clone());
    let owner = move |_| {
        let _ = &guard;
        ControlFlow::Continue(())
    };
    model.submit(Request::new(vec![1], 5), owner).unwrap();
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| model.batch(vec![Request::new(vec![1, 2], 4), Request::new(vec![7], 4)]));
        while model.status().queued < 3 && !waits.is_finished() {
            std::thread::yield_now();
        }
        gate.wait();
        let outcome = waits.join().unwrap();
        assert!(outcome.iter().all(|o| o.as_ref().is_ok_and(|answer| answer.ids.len() == 4)), "{outcome:?}");
    });
    assert_eq!(handle.place(), None, "it has ended, too");
    assert_eq!(model.complete(Request::new(vec![1], 1)).unwrap().ids.len(), 1);
}

/// Panics at the `after`-th call.
#[derive(Debug)]
struct Panics {
    after: usize,
    when: usize,
}

impl Panics {
    fn call(&mut self, when: usize) {
        if self.when == when {
            self.after -= 1;
            assert!(self.after > 0, "as it is meant to");
        }
    }
}

impl Constraint for Panics {
    fn mask(&mut self, _: &mut [f32]) {
        self.call(0);
    }

    fn accept(&mut self, _: u32) {
        self.call(1);
    }

    fn is_complete(&self) -> bool {
        assert!(self.when != 2, "as it is meant to");
        false
    }
}

impl Draft for Panics {
    fn propose(&mut self, _: &[u32], _: &mut Vec<u32>) {
        self.call(3);
    }
}

impl Drop for Panics {
    fn drop(&mut self) {
        assert!(self.when != 4 || std::thread::panicking(), "as it is meant to");
    }
}

#[test]
fn a_constraint_or_a_draft_that_panics_ends_its_own_generation_alone() {
    let converted = Converted::new("demo-model", Some(WeightType::Q8));
    let model = Model::new(converted.open(&options(3, 200)), SchedulerOptions::default(), false).unwrap();
    let request = || Request::new(vec![1, 2, 3], 20);
    let want = model.complete(request()).unwrap();
    for when in 0..5 {
        let panics = || Panics { after: 5, when };
        let bad = match when {
            3 => Request { draft: Some(Box::new(panics())), ..request() },
            _ => Request { constraint: Some(Box::new(panics())), ..request() },
        };
        let mut outcome = model.batch(vec![request(), bad, request()]).into_iter();
        assert_eq!(outcome.next().unwrap().unwrap().ids, want.ids);
        match outcome.next().unwrap() {
            Err(GenerationError::Panicked { what }) => assert!(what.contains("(as it is meant to)"), "{what}"),
            other => assert!(when == 4 && other.unwrap().ids == want.ids),
        }
        assert_eq!(outcome.next().unwrap().unwrap().ids, want.ids);
    }
}

/// Proposes the text so far, whether or not it repeats, and more than there is room for.
#[derive(Debug)]
struct Echo(usize);

impl Draft for Echo {
    fn propose(&mut self, context: &[u32], out: &mut Vec<u32>) {
        self.0 += 1;
        out.extend(context.iter().rev().skip(self.0 % 3).cycle().take(self.0 % 40));
    }
}

#[derive(Clone, Debug)]
struct Wish {
    prompt: usize,
    tokens: usize,
    temperature: f32,
    keep: Option<usize>,
    draft: bool,
    /// Cancelled in this turn, after this layer.
    cancelled: Option<(usize, usize)>,
    /// Returns `Break` for this event.
    breaks: Option<usize>,
    pause: usize,
}

fn any_wish(context: usize) -> impl Strategy<Value = Wish> {
    let keep = proptest::option::of(prop_oneof![0..context, context - 4..context]);
    let temperature = proptest::sample::select(vec![0.0, 1.0]);
    let pause = prop_oneof![2 => Just(0usize), 1 => 1usize..50];
    let cancelled = proptest::option::weighted(0.3, (0usize..120, 1usize..6));
    let breaks = proptest::option::weighted(0.2, 0usize..60);
    let prompt = prop_oneof![1..context / 3, context - 3..=context, 1..=context];
    (prompt, 0usize..200, temperature, keep, any::<bool>(), cancelled, breaks, pause).prop_map(
        |(prompt, tokens, temperature, keep, draft, cancelled, breaks, pause)| Wish {
            prompt,
            tokens,
            temperature,
            keep,
            draft,
            cancelled,
            breaks,
            pause,
        },
    )
}

fn request(engine: &Engine, number: usize, wish: &Wish, draft: bool) -> Request {
    let vocab = engine.spec().vocab_size as u32;
    let prompt = (0..wish.prompt as u32).map(|i| (i * 7919 + number as u32 * 104_729 + 13) % vocab).collect();
    Request {
        sampling: SamplerConfig { temperature: wish.temperature, seed: number as u64, ..SamplerConfig::default() },
        when_full: wish.keep.map_or(WhenFull::Stop, |keep| WhenFull::DropOldest { keep }),
        draft: (draft && wish.draft).then(|| Box::new(Echo(number)) as Box<dyn Draft>),
        ..Request::new(prompt, wish.tokens)
    }
}

#[derive(Clone, Debug)]
struct Case {
    model: usize,
    wishes: Vec<Wish>,
    sequences: usize,
    rows: usize,
    spill: usize,
    kept: usize,
    marks: usize,
    least: bool,
    budgets: Vec<(usize, f64)>,
}

const CONTEXT: usize = 200;
const MODELS: [(&str, Option<WeightType>); 3] =
    [("demo-model", Some(WeightType::Q8)), ("golden/gpt_oss", None), ("golden/qwen3_next", None)];

fn any_case() -> impl Strategy<Value = Case> {
    let wishes = proptest::collection::vec(any_wish(CONTEXT), 1..8);
    let budgets = proptest::collection::vec((0usize..200, 0.0f64..=1.0), 0..4);
    (0..MODELS.len(), wishes, 1usize..4, 1usize..100, (0usize..3, 0usize..6), 0usize..3, any::<bool>(), budgets)
        .prop_map(|(model, wishes, sequences, rows, (spill, kept), marks, least, budgets)| Case {
            model,
            wishes,
            sequences,
            rows,
            spill,
            kept,
            marks,
            least,
            budgets,
        })
}

/// The result of each alone, without a draft and without being cancelled.
fn alone(model: &Converted, wishes: &[Wish]) -> Vec<Heard> {
    let mut house = House::new(model.open(&options(1, CONTEXT)), SchedulerOptions::default());
    let each = wishes.iter().enumerate().map(|(number, wish)| {
        let id = house.submit(request(&house.engine, number, wish, false));
        house.run();
        house.owners.remove(&id).unwrap().2
    });
    each.collect()
}

/// Submits the wish of this number; an owner that returned `Break` receives nothing after that.
fn submit(house: &mut House, number: usize, wish: &Wish) -> u64 {
    let request = request(&house.engine, number, wish, true);
    let Some(mut left) = wish.breaks else { return house.submit(request) };
    let owner = move |_| match left.checked_sub(1) {
        None => ControlFlow::Break(()),
        Some(less) => {
            left = less;
            ControlFlow::Continue(())
        }
    };
    house.scheduler.submit(request, owner).unwrap().id()
}

/// Sets the budget to this fraction of the range from the least to the most; a small one also makes the engine release its memory.
fn change_budget(house: &mut House, part: f64) {
    let memory = house.engine.memory();
    let bytes = memory.least() + ((memory.most() - memory.least()) as f64 * part) as u64;
    house.scheduler.submitter().set_budget(bytes);
    if part < 0.3 {
        house.engine.release_idle();
    }
}

fn run(model: &Converted, case: &Case, spill: Option<PathBuf>) -> Result<(), TestCaseError> {
    let want = alone(model, &case.wishes);
    let opens = EngineOptions { marks: case.marks, mark_every: Some(20), ..options(case.sequences, CONTEXT) };
    let budget = case.least.then(|| model.least_budget_for(&opens));
    let engine = model.open(&EngineOptions { budget, ..opens });
    let scheduling = SchedulerOptions { prompt_rows: case.rows, spill, kept: case.kept, ..SchedulerOptions::default() };
    let mut house = House::new(engine, scheduling);
    let (mut ids, mut turns, mut comes) = (Vec::new(), 0, 0);
    loop {
        while ids.len() < case.wishes.len() && comes <= turns {
            let wish = &case.wishes[ids.len()];
            let id = submit(&mut house, ids.len(), wish);
            ids.push(id);
            comes = turns + wish.pause;
        }
        case.budgets.iter().filter(|budget| budget.0 == turns).for_each(|budget| change_budget(&mut house, budget.1));
        let victims: Vec<(usize, Handle)> = ids
            .iter()
            .zip(&case.wishes)
            .filter_map(|(id, wish)| {
                let (turn, layer) = wish.cancelled?;
                (turn == turns).then(|| Some((layer, house.owners.get(id)?.0.clone())))?
            })
            .collect();
        let mut progress =
            |p: Progress| victims.iter().filter(|v| v.0 == p.layers).for_each(|(_, handle)| handle.cancel());
        let worked = house.turn_watched(&mut Watch { progress: Some(&mut progress), routing: None });
        victims.iter().for_each(|(_, handle)| handle.cancel());
        turns += 1;
        prop_assert!(turns < 10_000, "no end: {:?}", house.scheduler.status());
        if !worked && ids.len() == case.wishes.len() {
            break;
        }
        if !worked {
            comes = comes.min(turns);
        }
    }
    house.run();
    for (number, (id, want)) in ids.iter().zip(&want).enumerate() {
        let Some((_, _, heard)) = house.owners.get(id) else { continue };
        prop_assert_eq!(&heard.error, &None, "generation {}", number);
        if heard.finish == Some(Finish::Cancelled) {
            prop_assert!(case.wishes[number].cancelled.is_some());
            prop_assert_eq!(&heard.ids[..], &want.ids[..heard.ids.len()], "generation {}", number);
        } else {
            prop_assert_eq!((heard.said(), &heard.shifts), (want.said(), &want.shifts), "generation {}", number);
        }
    }
    house.scheduler.release_kept();
    prop_assert!(all_free(&house.engine), "{:?}", house.engine.pages());
    Ok(())
}

#[test]
fn whoever_comes_and_goes_the_others_say_what_they_say_alone() {
    let cases = std::env::var("SLUICE_HOSTILE_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(8);
    let folder = tempfile::tempdir().unwrap();
    let models = MODELS.map(|(name, ty)| Converted::new(name, ty));
    let config = ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() };
    let outcome = proptest::test_runner::TestRunner::new(config).run(&any_case(), |case| {
        // No folder, an existing one, and one that does not exist.
        let spill = [None, Some(folder.path().to_owned()), Some(folder.path().join("gone"))];
        run(&models[case.model], &case, spill[case.spill].clone())
    });
    outcome.unwrap();
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "no file is left");
}
