//! Sequences that are marked, forked and taken back: whatever has happened to them, they give the same bits as their tokens
//! computed at once.

use proptest::prelude::*;
use sluice_model::ModelError;
use sluice_model::session::SessionError;
use sluice_model::{
    Cancel, Control, Engine, EngineOptions, KvType, Mark, Phase, Progress, RewindError, RuntimeError, Sequence, Span,
    Want,
};
use sluice_tests::{ATTENTIONS, Converted, Golden, forgets};

/// Most tokens of a sequence: within a page, and over several.
const LENGTHS: [usize; 2] = [30, 300];
/// Most sequences.
const SEQUENCES: usize = 6;
/// Marks that a sequence with recurrent states keeps.
const MARKS: usize = 2;

/// What happens to the sequence with this number, modulo the number of sequences.
#[derive(Clone, Debug)]
enum Event {
    /// All sequences take a part of what they can take, in one step: no token, one, or more.
    Step(Vec<Take>),
    /// A sequence begins a step that is cancelled after some layer.
    Cancelled(usize, usize, usize),
    Fork(usize),
    Mark(usize),
    /// Back to one of all marks that were ever made.
    RewindToMark(usize, usize),
    /// Back to a part of its length.
    RewindTo(usize, f64),
    /// The same, but what is missing is computed again.
    Rewind(usize, f64),
    Clear(usize),
    /// So many proposals are checked, and so many of them do not come true.
    Draft(usize, usize, usize),
    /// It is saved, and the restored sequence replaces it.
    Saved(usize),
    /// A budget between the least and the most.
    Budget(f64),
    /// All memory goes back to the system.
    Rest,
}

/// How many tokens a sequence takes.
#[derive(Clone, Copy, Debug)]
enum Take {
    Few(usize),
    /// A fraction of the most.
    Part(f64),
}

impl Take {
    fn of(self, most: usize) -> usize {
        match self {
            Take::Few(n) => n.min(most),
            Take::Part(part) => (most as f64 * part) as usize,
        }
    }
}

fn any_event() -> impl Strategy<Value = Event> {
    let few = |n: std::ops::Range<usize>| n.prop_map(Take::Few);
    let take = prop_oneof![2 => few(0..1), 4 => few(1..2), 2 => few(2..8), 2 => (0.0f64..1.0).prop_map(Take::Part)];
    let which = 0usize..64;
    prop_oneof![
        6 => proptest::collection::vec(take, 4).prop_map(Event::Step),
        1 => (which.clone(), 1usize..8, 0usize..64).prop_map(|(i, take, layer)| Event::Cancelled(i, take, layer)),
        1 => which.clone().prop_map(Event::Fork),
        2 => which.clone().prop_map(Event::Mark),
        2 => (which.clone(), 0usize..64).prop_map(|(i, mark)| Event::RewindToMark(i, mark)),
        2 => (which.clone(), 0.0f64..=1.0).prop_map(|(i, part)| Event::RewindTo(i, part)),
        1 => (which.clone(), 0.0f64..=1.0).prop_map(|(i, part)| Event::Rewind(i, part)),
        1 => which.clone().prop_map(Event::Clear),
        2 => (which.clone(), 1usize..9, 0usize..9).prop_map(|(i, take, lies)| Event::Draft(i, take, lies)),
        1 => which.prop_map(Event::Saved),
        1 => (0.0f64..=1.0).prop_map(Event::Budget),
        1 => Just(Event::Rest),
    ]
}

/// A sequence, its tokens as the test knows them, and the logits that it gave.
struct Tracked {
    sequence: Sequence,
    tokens: Vec<u32>,
    logits: Vec<Vec<f32>>,
}

impl Tracked {
    fn truncate(&mut self, position: usize) {
        self.tokens.truncate(position);
        self.logits.truncate(position);
    }

    /// The logits so far agree with those of its tokens computed at once.
    fn check(&self, alone: &mut Engine) -> Result<(), TestCaseError> {
        prop_assert_eq!(self.sequence.tokens(), &self.tokens[..]);
        if self.tokens.is_empty() {
            return Ok(());
        }
        let (mut sequence, mut at) = (alone.new_sequence(), Vec::new());
        alone
            .forward_all(&mut sequence, &self.tokens, &mut |i, row| {
                if row != self.logits[i] {
                    at.push(i);
                }
            })
            .unwrap();
        prop_assert!(at.is_empty(), "other bits at {at:?} of {}", self.tokens.len());
        Ok(())
    }
}

/// Appends tokens to the sequences, in one step; some of these tokens have not occurred before. Returns false if there are not
/// enough pages; then nothing has changed.
fn step(engine: &mut Engine, all: &mut [Tracked], takes: &[Take], vocab: u32, fresh: &mut u32) -> bool {
    step_of(engine, all, takes, vocab, fresh, Phase::Prompt)
}

/// The same; spans of more than one token have this phase.
fn step_of(
    engine: &mut Engine,
    all: &mut [Tracked],
    takes: &[Take],
    vocab: u32,
    fresh: &mut u32,
    several: Phase,
) -> bool {
    let (mut spans, mut owners) = (Vec::new(), Vec::new());
    let length = engine.memory().context;
    let takes: Vec<_> =
        all.iter().enumerate().map(|(i, t)| takes[i % takes.len()].of(length - t.tokens.len())).collect();
    let pages = engine.pages();
    let appends = all.iter().zip(&takes).map(|(tracked, &n)| (&tracked.sequence, n)).filter(|append| append.1 > 0);
    let room = engine.room_for(appends);
    for (i, Tracked { sequence, tokens, .. }) in all.iter_mut().enumerate() {
        let (start, take) = (tokens.len(), takes[i]);
        if take == 0 {
            continue;
        }
        tokens.extend((0..take).map(|_| {
            *fresh = fresh.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (*fresh >> 8) % vocab
        }));
        let phase = if take == 1 { Phase::Decode } else { several };
        owners.push(i);
        spans.push(Span { sequence, tokens: &tokens[start..], phase, logits: Want::All });
    }
    if spans.is_empty() {
        return true;
    }
    let mut rows = Vec::new();
    let outcome = engine.step(&mut spans, &mut Control::default(), &mut |span, _, row| rows.push((span, row.to_vec())));
    if let Err(RuntimeError::Model(ModelError::PagesFull(full))) = outcome {
        assert!(room.is_err() && full.wanted > full.free, "{full}");
        assert!(rows.is_empty(), "a step that does not fit does nothing");
        for Tracked { sequence, tokens, logits } in all {
            tokens.truncate(logits.len());
            assert_eq!(sequence.tokens(), &tokens[..]);
        }
        // Marks that were not requested may have been removed.
        assert!(engine.pages().iter().zip(pages).all(|(now, before)| now.free >= before.free));
        return false;
    }
    outcome.unwrap();
    rows.into_iter().for_each(|(span, row)| all[owners[span]].logits.push(row));
    true
}

/// Begins to append `take` tokens; the step is cancelled after one of the layers.
fn cancelled_step(engine: &mut Engine, tracked: &mut Tracked, take: usize, layer: usize) {
    let take = take.min(engine.memory().context - tracked.tokens.len());
    if take == 0 || engine.room_for(std::iter::once((&tracked.sequence, take))).is_err() {
        return;
    }
    let last = 1 + layer % engine.spec().layers.len();
    let cancel = Cancel::new();
    let switch = cancel.clone();
    let mut progress = |p: Progress| {
        if p.layers == last {
            switch.cancel();
        }
    };
    let mut control = Control { cancel: Some(&cancel), progress: Some(&mut progress), ..Control::default() };
    let tokens = [1, 2, 3, 4, 5, 6, 7, 8];
    let span = Span::prompt(&mut tracked.sequence, &tokens[..take], Want::All);
    let outcome = engine.step(&mut [span], &mut control, &mut |_, _, _| panic!("the step has no logits"));
    assert!(matches!(outcome, Err(RuntimeError::Model(ModelError::Cancelled))));
}

/// Goes back to a mark, if the sequence still has it.
fn rewind_to_mark(tracked: &mut Tracked, mark: Mark) -> Result<(), TestCaseError> {
    let stands = tracked.sequence.marks().any(|own| own == mark);
    match tracked.sequence.rewind(mark) {
        Ok(()) => tracked.truncate(mark.position()),
        Err(error) => prop_assert_eq!(error, RewindError::NoSuchMark { position: mark.position() }),
    }
    prop_assert_eq!(tracked.sequence.position(), tracked.tokens.len());
    prop_assert_eq!(stands, tracked.sequence.marks().any(|own| own == mark));
    Ok(())
}

/// Goes back to this fraction of the tokens, and computes what is missing.
fn rewind(engine: &mut Engine, tracked: &mut Tracked, part: f64) {
    let wanted = (tracked.tokens.len() as f64 * part) as usize;
    match engine.rewind(&mut tracked.sequence, wanted, &mut Control::default()) {
        Ok(()) => tracked.truncate(wanted),
        // What must be computed again needs more pages than there are.
        Err(RuntimeError::Model(ModelError::PagesFull(_))) => tracked.truncate(tracked.sequence.position()),
        Err(error) => panic!("{error}"),
    }
}

/// Checks proposals, and takes back those that did not come true.
fn draft(engine: &mut Engine, tracked: &mut Tracked, take: usize, lies: usize, vocab: u32, fresh: &mut u32) {
    let before = tracked.tokens.len();
    if step_of(engine, std::slice::from_mut(tracked), &[Take::Few(take)], vocab, fresh, Phase::Draft) {
        let wanted = before.max(tracked.tokens.len().saturating_sub(lies));
        let reached = tracked.sequence.rewind_to(wanted).unwrap();
        tracked.truncate(reached);
    }
}

/// Sets the budget to this fraction of the range from the least to the most.
fn set_budget(engine: &mut Engine, part: f64) {
    let (least, most) = (engine.memory().least(), engine.memory().most());
    engine.set_budget(least + ((most - least) as f64 * part) as u64).unwrap();
}

/// Saves and restores a sequence, if there are pages for both.
fn save_and_restore(engine: &Engine, tracked: &mut Tracked) {
    let mut file = Vec::new();
    tracked.sequence.save(&mut file).unwrap();
    match engine.restore(&mut &file[..], std::path::Path::new("saved")) {
        Ok(sequence) => tracked.sequence = sequence,
        Err(error) => assert!(matches!(error, SessionError::PagesFull { .. }), "{error}"),
    }
}

fn run(family: &str, engines: [&mut Engine; 2], events: &[Event]) -> Result<(), TestCaseError> {
    let [engine, alone] = engines;
    let forgets = forgets(family);
    let vocab = engine.spec().vocab_size as u32;
    let new = |engine: &Engine| Tracked { sequence: engine.new_sequence(), tokens: vec![], logits: vec![] };
    let mut all = vec![new(engine), new(engine)];
    let (mut marks, mut fresh): (Vec<Mark>, u32) = (Vec::new(), events.len() as u32);
    for event in events {
        let count = all.len();
        match *event {
            // If there are not enough pages, one of the sequences is dropped.
            Event::Step(ref takes) => {
                while !step(engine, &mut all, takes, vocab, &mut fresh) {
                    all.pop().expect("one sequence alone has pages enough").check(alone)?;
                }
                if all.is_empty() {
                    all.push(new(engine));
                }
            }
            Event::Cancelled(i, take, layer) => cancelled_step(engine, &mut all[i % count], take, layer),
            Event::Fork(i) if count < SEQUENCES => {
                let Tracked { sequence, tokens, logits } = &all[i % count];
                all.push(Tracked { sequence: sequence.fork(), tokens: tokens.clone(), logits: logits.clone() });
            }
            Event::Fork(_) => {}
            Event::Mark(i) => {
                let sequence = &mut all[i % count].sequence;
                let mark = sequence.mark().unwrap();
                prop_assert_eq!(mark.position(), sequence.position());
                prop_assert!(!forgets || sequence.marks().filter(|m| m.position() > 0).count() <= MARKS);
                marks.push(mark);
            }
            Event::RewindToMark(i, mark) if !marks.is_empty() => {
                all[i % count].check(alone)?;
                rewind_to_mark(&mut all[i % count], marks[mark % marks.len()])?;
            }
            Event::RewindToMark(..) => {}
            Event::RewindTo(i, part) => {
                let tracked = &mut all[i % count];
                tracked.check(alone)?;
                let wanted = (tracked.tokens.len() as f64 * part) as usize;
                let nearest = tracked.sequence.marks().map(Mark::position).filter(|&p| p <= wanted).max();
                let reached = tracked.sequence.rewind_to(wanted).unwrap();
                prop_assert!(reached == wanted || forgets && (nearest.unwrap_or(0)..wanted).contains(&reached));
                tracked.truncate(reached);
            }
            Event::Rewind(i, part) => {
                all[i % count].check(alone)?;
                rewind(engine, &mut all[i % count], part);
            }
            Event::Clear(i) => {
                all[i % count].sequence.clear();
                all[i % count].truncate(0);
            }
            Event::Draft(i, take, lies) => draft(engine, &mut all[i % count], take, lies, vocab, &mut fresh),
            Event::Saved(i) => save_and_restore(engine, &mut all[i % count]),
            Event::Budget(part) => set_budget(engine, part),
            Event::Rest => engine.release_idle(),
        }
    }
    // All of them continue, so that everything they remember is checked.
    while !step(engine, &mut all, &[Take::Few(1)], vocab, &mut fresh) {
        all.pop().expect("one sequence alone has pages enough").check(alone)?;
    }
    all.iter().try_for_each(|tracked| tracked.check(alone))?;
    drop(all);
    prop_assert!(engine.pages().iter().all(|pages| pages.free == pages.total), "every page has come back");
    Ok(())
}

#[test]
fn a_sequence_gives_the_bits_of_its_tokens_whatever_it_has_been_through() {
    let cases = std::env::var("SLUICE_SEQUENCE_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(6);
    for family in ATTENTIONS {
        let model = Converted::new(&format!("golden/{family}"), None);
        // With pages for all of them, and with few; with several types of keys and values, and numbers of threads.
        for (length, sequences, kv_type, threads) in [
            (LENGTHS[0], SEQUENCES, KvType::F16, 1),
            (LENGTHS[1], SEQUENCES, KvType::F32, 2),
            (LENGTHS[1], 2, KvType::Q8, 3),
        ] {
            let options = EngineOptions {
                context: Some(length),
                sequences: Some(sequences),
                marks: MARKS,
                mark_every: Some(16),
                kv_type,
                forget: true,
                ..EngineOptions::default()
            };
            // Passes of few rows move windows forward within a step.
            let few = EngineOptions {
                budget: Some(model.least_budget_for(&options)),
                threads: Some(threads),
                ..options.clone()
            };
            let (mut engine, mut alone) = (model.open(&few), model.open(&options));
            let config = ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() };
            let engines = std::cell::RefCell::new((&mut engine, &mut alone));
            let outcome = proptest::test_runner::TestRunner::new(config).run(
                &proptest::collection::vec(any_event(), 1..30),
                |events| {
                    let (engine, alone) = &mut *engines.borrow_mut();
                    run(family, [engine, alone], &events)
                },
            );
            outcome.unwrap_or_else(|e| panic!("{family}, {sequences} times {length} tokens: {e}"));
        }
    }
}

#[test]
fn a_recurrent_model_needs_room_for_marks_and_is_told_so() {
    let model = Converted::new("golden/qwen3_next", None);
    let ids = Golden::load("qwen3_next").ids("input_ids");
    let plan = |marks| {
        let engine = model.open(&EngineOptions { marks, ..EngineOptions::default() });
        let (context, kv_type) = (engine.memory().context, engine.memory().kv_type);
        let bytes = Sequence::mark_memory(engine.spec(), context, kv_type);
        (engine.memory().kv_cache, bytes, engine)
    };
    let (without, bytes, mut engine) = plan(0);
    assert_eq!(plan(3).0, without + 3 * bytes);
    let (mut sequence, mut logits) = (engine.new_sequence(), Vec::new());
    let start = sequence.mark().unwrap();
    engine.forward(&mut sequence, &ids[..5], &mut logits).unwrap();
    assert_eq!(sequence.mark(), Err(RewindError::NoMarks { bytes }));
    engine.decode(&mut sequence, ids[5], &mut logits).unwrap();
    // There is still a state where the last step began, but none in between.
    assert_eq!(sequence.reachable(5), Ok(5));
    assert_eq!(sequence.reachable(4), Ok(0));
    assert_eq!(sequence.rewind_to(7), Err(RewindError::Beyond { position: 6, wanted: 7 }));
    assert_eq!(sequence.rewind(start), Ok(()));
    assert_eq!(sequence.position(), 0);
    assert_eq!(engine.new_sequence().rewind(start), Err(RewindError::NoSuchMark { position: 0 }));
}
