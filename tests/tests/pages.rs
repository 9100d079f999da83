//! Pages: what sequences take from the pool, share, and return, and the error of a step when they run out.

use std::path::Path;

use sluice_model::{
    Control, Engine, EngineOptions, ModelError, PAGE_TOKENS, PageKind, RewindError, RuntimeError, Sequence, Span,
    WINDOW_SLACK, Want,
};
use sluice_tests::Converted;

/// Layers with a window of 8 tokens and layers that see everything.
const WINDOWS: &str = "golden/gpt_oss";
const WINDOW: usize = 8;

fn options(sequences: usize, context: usize) -> EngineOptions {
    EngineOptions { sequences: Some(sequences), context: Some(context), forget: true, ..EngineOptions::default() }
}

fn tokens(count: usize) -> Vec<u32> {
    (0..count as u32).map(|i| i * 37 % 101).collect()
}

fn read(engine: &mut Engine, sequence: &mut Sequence, tokens: &[u32]) -> Vec<f32> {
    let mut logits = Vec::new();
    engine.forward(sequence, tokens, &mut logits).unwrap();
    logits
}

fn taken(engine: &Engine, kind: PageKind) -> usize {
    engine.pages().iter().filter(|pages| pages.kind == kind).map(|pages| pages.total - pages.free).sum()
}

#[test]
fn a_fork_takes_a_page_when_it_goes_on_and_none_before() {
    for fixture in ["demo-model", WINDOWS] {
        let model = Converted::new(fixture, None);
        // The demo model has no more positions.
        let length = if fixture == WINDOWS { 1000 } else { 500 };
        let mut engine = model.open(&options(51, length + 10));
        let (mut sequence, tokens) = (engine.new_sequence(), tokens(length));
        read(&mut engine, &mut sequence, &tokens);
        let own = taken(&engine, PageKind::Rows);
        assert_eq!(own, length.div_ceil(PAGE_TOKENS));
        let mut forks: Vec<_> = (0..50).map(|_| sequence.fork()).collect();
        assert_eq!(taken(&engine, PageKind::Rows), own, "{fixture}: forks share everything");
        assert_eq!((forks[0].own_pages(), forks[0].pages_for(1)), (0, forks[0].pages_for(2)));
        for (i, fork) in forks.iter_mut().enumerate() {
            read(&mut engine, fork, &[i as u32]);
            for pages in engine.pages() {
                let before = if pages.kind == PageKind::Rows { own } else { 2 };
                assert!(pages.total - pages.free <= before + i + 1, "{fixture}: {pages:?}");
            }
        }
        // Each gives the same bits as alone, and so does the one from which they were forked.
        let mut alone = engine.new_sequence();
        for number in [0, 49] {
            alone.clear();
            read(&mut engine, &mut alone, &tokens);
            read(&mut engine, &mut alone, &[number as u32]);
            let want = read(&mut engine, &mut alone, &[5]);
            assert!(read(&mut engine, &mut forks[number], &[5]) == want, "{fixture}: fork {number}");
        }
        alone.clear();
        read(&mut engine, &mut alone, &tokens);
        let want = read(&mut engine, &mut alone, &[7]);
        assert!(read(&mut engine, &mut sequence, &[7]) == want, "{fixture}");
        drop((forks, alone, sequence));
        assert!(engine.pages().iter().all(|pages| pages.free == pages.total));
    }
}

#[test]
fn a_window_keeps_itself_and_a_little_more() {
    let model = Converted::new(WINDOWS, None);
    let window = PageKind::Window(WINDOW);
    let count = |context, marks| {
        let engine = model.open(&EngineOptions { marks, ..options(1, context) });
        let pages = engine.pages().into_iter().find(|pages| pages.kind == window).unwrap();
        (pages.total, pages.bytes, engine)
    };
    // The plan has room for the window and the rows of a pass, whatever the context.
    let (many, bytes, _) = count(2048, 0);
    let (_, _, roomy) = count(1024, 0);
    let in_pass =
        |engine: &Engine| (WINDOW - 1 + WINDOW_SLACK).div_ceil(PAGE_TOKENS) + 2 + engine.memory().rows / PAGE_TOKENS;
    assert!(many <= in_pass(&roomy) + 2048 / PAGE_TOKENS);
    let least = |context| {
        let options = options(1, context);
        let engine = model.open(&EngineOptions { budget: Some(model.least_budget_for(&options)), ..options });
        let pages = engine.pages().into_iter().find(|pages| pages.kind == window).unwrap();
        assert_eq!(pages.total, in_pass(&engine), "window and rows, for {context} tokens");
        engine
    };
    drop(least(1024));
    let mut engine = least(2048);
    assert!(bytes > 0);

    let (mut sequence, tokens) = (engine.new_sequence(), tokens(1000));
    read(&mut engine, &mut sequence, &tokens);
    assert!(taken(&engine, window) <= 3, "{} pages", taken(&engine, window));
    assert_eq!(taken(&engine, PageKind::Rows), 1000usize.div_ceil(PAGE_TOKENS));
    // It can go back as far as the slack reaches; to go back farther, it must start again.
    assert_eq!(sequence.mark(), Err(RewindError::NoMarks { bytes: 2 * bytes }));
    assert_eq!(sequence.reachable(1000 - WINDOW_SLACK), Ok(1000 - WINDOW_SLACK));
    assert_eq!(sequence.reachable(500), Ok(0));
    let mut alone = engine.new_sequence();
    drop(alone.fork());
    for position in [1000 - WINDOW_SLACK, 500] {
        engine.rewind(&mut sequence, position, &mut Control::default()).unwrap();
        assert_eq!(sequence.tokens(), &tokens[..position]);
    }
    let saved = {
        let mut bytes = Vec::new();
        sequence.save(&mut bytes).unwrap();
        bytes
    };
    drop(sequence);
    let want = {
        read(&mut engine, &mut alone, &tokens[..500]);
        let logits = read(&mut engine, &mut alone, &[3]);
        alone.clear();
        logits
    };
    let mut back = engine.restore(&mut &saved[..], Path::new("saved")).unwrap();
    assert!(read(&mut engine, &mut back, &[3]) == want);
}

#[test]
fn a_mark_keeps_its_window_and_what_was_marked_on_the_way_gives_way() {
    let model = Converted::new(WINDOWS, None);
    let mut engine = model.open(&EngineOptions { marks: 2, mark_every: Some(100), ..options(2, 1000) });
    let (mut sequence, tokens) = (engine.new_sequence(), tokens(815));
    tokens.chunks(90).for_each(|part| drop(read(&mut engine, &mut sequence, part)));
    // Marks that were made while reading, every 180 tokens; two of them stay.
    assert_eq!(sequence.marks().count(), 0);
    assert_eq!(sequence.reachable(710), Ok(540));
    assert_eq!(sequence.reachable(500), Ok(0));
    let mut fork = sequence.fork();
    let mark = sequence.mark().unwrap();
    assert_eq!(sequence.reachable(700), Ok(0), "the oldest gives way");
    read(&mut engine, &mut sequence, &tokens[..100]);
    sequence.rewind(mark).unwrap();
    engine.rewind(&mut fork, 700, &mut Control::default()).unwrap();
    let (mut alone, mut want) = (engine.new_sequence(), Vec::new());
    engine.forward_all(&mut alone, &tokens, &mut |_, row| want.push(row.to_vec())).unwrap();
    assert!(read(&mut engine, &mut fork, &tokens[700..]) == want[814]);
    read(&mut engine, &mut alone, &[9]);
    assert!(read(&mut engine, &mut sequence, &[9, 9]) == read(&mut engine, &mut alone, &[9]));
}

#[test]
fn a_mark_that_is_given_up_gives_its_pages_back() {
    let model = Converted::new(WINDOWS, None);
    let mut engine = model.open(&EngineOptions { marks: 1, ..options(1, 1000) });
    let (mut sequence, tokens) = (engine.new_sequence(), tokens(600));
    read(&mut engine, &mut sequence, &tokens[..300]);
    let mark = sequence.mark().unwrap();
    read(&mut engine, &mut sequence, &tokens[300..]);
    let kept = taken(&engine, PageKind::Window(WINDOW));
    sequence.unmark(mark);
    assert!(taken(&engine, PageKind::Window(WINDOW)) < kept);
    assert_eq!(sequence.marks().count(), 0);
    assert!(matches!(sequence.rewind(mark), Err(RewindError::NoSuchMark { position: 300 })));
    assert_eq!(sequence.position(), 600);
}

#[test]
fn a_step_without_pages_changes_nothing_and_can_be_tried_again() {
    for fixture in ["demo-model", WINDOWS, "golden/qwen3_next"] {
        let model = Converted::new(fixture, None);
        let mut engine = model.open(&options(2, 130));
        assert_eq!(engine.tokens_that_fit(), 130);
        let tokens = tokens(130);
        let mut sequences: Vec<_> = (0..3).map(|_| engine.new_sequence()).collect();
        read(&mut engine, &mut sequences[0], &tokens[..130]);
        read(&mut engine, &mut sequences[1], &tokens[..60]);
        let (before, pages) = (sequences[1].pages(), engine.pages());
        let step = |engine: &mut Engine, sequences: &mut [Sequence]| {
            let spans = sequences[1..].iter_mut().map(|s| Span::prompt(s, &tokens[60..130], Want::Nothing));
            engine.step(&mut spans.collect::<Vec<_>>(), &mut Control::default(), &mut |_, _, _| ())
        };
        let appends = sequences[1..].iter().map(|sequence| (sequence, 70));
        let full = engine.room_for(appends).unwrap_err();
        let error = step(&mut engine, &mut sequences).unwrap_err();
        assert!(matches!(error, RuntimeError::Model(ModelError::PagesFull(same)) if same == full), "{error}");
        assert!(error.to_string().contains("end another sequence or save it"), "{error}");
        assert_eq!((sequences[1].pages(), sequences[2].position()), (before, 0));
        assert_eq!(engine.pages(), pages);
        // The first one ends.
        sequences[0].clear();
        step(&mut engine, &mut sequences).unwrap();
        let mut alone = engine.new_sequence();
        let saved = |sequence: &Sequence| {
            let mut bytes = Vec::new();
            sequence.save(&mut bytes).unwrap();
            bytes
        };
        let (second, third) = (saved(&sequences[1]), saved(&sequences[2]));
        drop(sequences);
        read(&mut engine, &mut alone, &tokens);
        assert!(saved(&alone) == second, "{fixture}");
        alone.clear();
        read(&mut engine, &mut alone, &tokens[60..]);
        assert!(saved(&alone) == third, "{fixture}");
    }
}
