//! Saved sequences and segments: looked at, restored, gone on with, gone back in, and saved again.

use std::cell::RefCell;
use std::fs;
use std::path::Path;

use sluice_model::session::{SegmentFile, peek};
use sluice_model::{Engine, EngineOptions, KvType, PAGE_TOKENS, ReadEngineKind, Sequence};

use super::Seeds;
use super::model::support;

const CONTEXT: usize = 80;
const BUDGET: u64 = 64 << 20;

thread_local! {
    /// The models that a session can be of, once they are opened.
    static ENGINES: RefCell<Vec<Engine>> = const { RefCell::new(Vec::new()) };
}

/// One model with latents, one with windows, one with an indexer and recurrent states, one that chooses blocks of keys, each with
/// another type of keys and values.
fn open(folder: &Path) -> Vec<Engine> {
    let specs = [support::small_spec(), support::gqa_spec(), support::sparse_spec(), support::hybrid_spec()];
    let types = [KvType::Q8, KvType::F16, KvType::F32, KvType::Bf16];
    let engines = specs.iter().zip(types).enumerate().map(|(i, (spec, kv_type))| {
        let path = folder.join(format!("{i}.sluice"));
        fs::write(&path, support::file_of(spec, 4096)).expect("the folder can be written");
        let options = EngineOptions {
            budget: Some(BUDGET),
            read_engine: Some(ReadEngineKind::Pread),
            no_calibration: true,
            threads: Some(1),
            forget: true,
            sequences: Some(3),
            context: Some(CONTEXT),
            kv_type,
            marks: 2,
            ..EngineOptions::default()
        };
        Engine::open(&path, &options).expect("the model is sound")
    });
    engines.collect()
}

fn with_engines(folder: &Path, mut with: impl FnMut(&mut Engine)) {
    ENGINES.with_borrow_mut(|engines| {
        if engines.is_empty() {
            *engines = open(folder);
        }
        engines.iter_mut().for_each(&mut with);
    });
}

/// The tokens of all seeds.
fn tokens(count: usize) -> Vec<u32> {
    (0..count as u32).map(|token| token % 7).collect()
}

/// A sequence of the first page of the seeds.
fn first_page(engine: &mut Engine) -> Sequence {
    let mut sequence = engine.new_sequence();
    engine.forward(&mut sequence, &tokens(PAGE_TOKENS), &mut Vec::new()).expect("there is room");
    sequence
}

/// As a segment, of its own and behind the first page.
fn run_segment(engine: &mut Engine, path: &Path) {
    let info = match peek(path) {
        Ok(info) => info,
        Err(error) => return drop(error.to_string()),
    };
    let text = [&tokens(info.start.min(CONTEXT))[..], &info.tokens].concat();
    let file = fs::File::open(path).expect("it was just written");
    let mut segments = [SegmentFile { file, path: path.to_owned() }];
    if let Ok(sequence) = engine.restore_segments(&mut segments, &text) {
        assert!(text.starts_with(sequence.tokens()));
    }
    if info.start == PAGE_TOKENS {
        let mut sequence = first_page(engine);
        match engine.restore_onto(&mut sequence, path) {
            Ok(()) => assert_eq!(sequence.tokens()[PAGE_TOKENS..], info.tokens),
            Err(_) => assert_eq!(sequence.tokens(), tokens(PAGE_TOKENS)),
        }
        if sequence.position() < CONTEXT {
            // Numbers that mean nothing give logits that mean nothing, or an error.
            let _: Result<(), _> = engine.forward(&mut sequence, &[1], &mut Vec::new());
        }
    }
}

pub(crate) fn run(input: &[u8], folder: &Path) {
    let path = folder.join("session");
    fs::write(&path, input).expect("the folder can be written");
    with_engines(folder, |engine| {
        run_segment(engine, &path);
        assert!(engine.pages().iter().all(|pages| pages.free == pages.total), "every page comes back");
        let mut sequence = match engine.restore(&mut &input[..], Path::new("session")) {
            Ok(sequence) => sequence,
            Err(error) => return drop(error.to_string()),
        };
        let mut saved = Vec::new();
        sequence.save(&mut saved).expect("memory is written");
        let again = engine.restore(&mut &saved[..], Path::new("saved")).expect("what was just saved is sound");
        assert_eq!(again.tokens(), sequence.tokens());
        assert!(again.marks().map(|m| m.position()).eq(sequence.marks().map(|m| m.position())));
        drop(again);
        // Numbers that mean nothing give logits that mean nothing, or an error.
        let mut logits = Vec::new();
        let marks: Vec<_> = sequence.marks().collect();
        for mark in std::iter::once(None).chain(marks.into_iter().rev().map(Some)) {
            if let Some(mark) = mark {
                sequence.rewind(mark).expect("the mark stands");
            }
            let room = (sequence.capacity() - sequence.position()).min(2);
            if room > 0
                && let Err(error) = engine.forward(&mut sequence, &[1, 0][..room], &mut logits)
            {
                return drop(error.to_string());
            }
        }
        sequence.rewind_to(sequence.position() / 2).expect("there are so many tokens");
        drop(sequence);
        assert!(engine.pages().iter().all(|pages| pages.free == pages.total), "every page comes back");
    });
}

pub(crate) fn seeds(folder: &Path) -> Seeds {
    let mut seeds = Seeds::new();
    with_engines(folder, |engine| {
        let mut sequence = engine.new_sequence();
        // Before the first token, in the first page and in the second.
        for count in [0, 3, 70] {
            sequence.mark().expect("there is room for marks");
            for token in 0..count {
                engine.decode(&mut sequence, token % 7, &mut Vec::new()).expect("there is room");
            }
            let mut bytes = Vec::new();
            sequence.save(&mut bytes).expect("memory is written");
            seeds.push((format!("{}-{count}", seeds.len() / 4), bytes));
        }
        let mut sequence = first_page(engine);
        engine.forward(&mut sequence, &tokens(70)[PAGE_TOKENS..], &mut Vec::new()).expect("there is room");
        let mut bytes = Vec::new();
        sequence.save_from(PAGE_TOKENS, &mut bytes).expect("memory is written");
        seeds.push((format!("{}-segment", seeds.len() / 4), bytes));
    });
    seeds
}
