//! In steady state, neither a pass over a layer nor a step of many sequences allocates anything, on any thread.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};

use sluice_format::{AttentionSpec, ModelSpec};
use sluice_model::{Control, Engine, EngineOptions, PAGE_TOKENS, ReadEngineKind, Sequence, Span};
use sluice_storage::io::{Arena, DataFile, DirectMode, EngineKind, IoConfig, PAGE_BYTES, Scheduler, open_engine};
use sluice_storage::pool::{Arrival, Choice, ExpertDirectory, ExtentLocation, PolicyKind, Pool, Routing};
use xxhash_rust::xxh3::xxh3_64;

#[path = "../../../format/tests/support/mod.rs"]
mod support;

/// Counts the requests to the system allocator.
struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: every call goes unchanged to the system allocator, which fulfils the contract.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, SeqCst);
        // SAFETY: the caller fulfils the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller fulfils the contract of `dealloc`.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, SeqCst);
        // SAFETY: the caller fulfils the contract of `realloc`.
        unsafe { System.realloc(pointer, layout, bytes) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const EXPERTS: usize = 24;
const EXPERT_BYTES: usize = 5 * PAGE_BYTES;

fn sweep(pool: &mut Pool, rounds: usize) {
    let wanted: [u32; 8] = [0, 2, 3, 7, 11, 13, 20, 23];
    let choices = wanted.map(|expert| Choice { expert, weight: 1.0 });
    for round in 0..rounds {
        let first = round % 4;
        let routing = Routing { tokens: 1, prefill: false, in_order: false, choices: &choices[first..] };
        let mut pass = pool.begin_layer(0, &wanted[first..], &routing).expect("begun");
        let mut seen = 0;
        // With parts and without.
        while round % 2 == 0
            && let Some(arrival) = pass.arrival(Some(PAGE_BYTES)).expect("no faults")
        {
            match arrival {
                Arrival::Part(part) => part.more_at(None),
                Arrival::Settled(_) | Arrival::Unsettled(_) => seen += 1,
            }
        }
        while let Some(guard) = pass.next().expect("no faults") {
            assert_eq!(guard.bytes()[0], guard.expert() as u8);
            seen += 1;
        }
        assert_eq!(seen, wanted.len() - first);
    }
}

/// Allocations of one test must not count for the other.
static TURN: Mutex<()> = Mutex::new(());

#[test]
fn passes_do_not_allocate_in_steady_state() {
    let _one_at_a_time = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let file = tempfile::NamedTempFile::new().expect("a file");
    let bytes: Vec<u8> = (0..EXPERTS).flat_map(|id| vec![id as u8; EXPERT_BYTES]).collect();
    std::fs::write(file.path(), &bytes).expect("written");
    let locate = |(id, bytes): (usize, &[u8])| ExtentLocation {
        file: 0,
        offset: (id * EXPERT_BYTES) as u64,
        len: EXPERT_BYTES as u64,
        checksum: xxh3_64(bytes),
        packed: None,
        stripes: None,
    };
    let layer: Vec<_> = bytes.chunks(EXPERT_BYTES).enumerate().map(locate).collect();
    for kind in [EngineKind::Auto, EngineKind::Pread] {
        let config = IoConfig { chunk_bytes: 2 * PAGE_BYTES, ..IoConfig::default() };
        let directory = ExpertDirectory::new(std::slice::from_ref(&layer)).expect("valid");
        let arena = Arena::uniform(EXPERT_BYTES, 5, "experts").expect("memory");
        let data = DataFile::open(file.path(), DirectMode::Prefer).expect("open");
        let engine = open_engine(kind, vec![data], &[arena.region()], &config).expect("engine");
        let io = Arc::new(Scheduler::start(engine, config).expect("a thread"));
        let policy = PolicyKind::NextUse.build(directory.shape()).expect("online");
        let staging = Pool::reserve_staging(&directory, 0).expect("none");
        let mut pool = Pool::new(io, arena, staging, directory, policy);
        sweep(&mut pool, 50);
        let before = ALLOCATIONS.load(SeqCst);
        sweep(&mut pool, 200);
        let allocations = ALLOCATIONS.load(SeqCst) - before;
        assert_eq!(allocations, 0, "{kind:?}");
        assert!(pool.stats().misses > 500, "the pool was not under pressure");
    }
}

/// One model in which some layers see everything and others a window, one with recurrent states and an indexer, one with streams
/// and compressed entries, and one that chooses blocks of keys.
fn specs() -> [ModelSpec; 4] {
    let mut windows = support::gqa_spec();
    if let AttentionSpec::Gqa(gqa) = &mut windows.layers[0].attention {
        gqa.window = None;
    }
    let mut streams = support::streams_spec();
    // The numbers in the file are random, so tables of experts would not list valid ones.
    let experts = streams.layers.iter_mut().filter_map(|layer| layer.ffn.moe.as_mut());
    experts.for_each(|moe| moe.router.token_table = None);
    [windows, support::sparse_spec(), streams, support::hybrid_spec()]
        .map(|spec| ModelSpec { max_positions: 4096, ..spec })
}

/// Decodes a token of each sequence and returns how often it allocated meanwhile.
fn decode(engine: &mut Engine, sequences: &mut [Sequence]) -> u64 {
    let vocab = engine.spec().vocab_size;
    let tokens: Vec<_> = sequences.iter().enumerate().map(|(i, s)| ((i * 7 + s.position()) % vocab) as u32).collect();
    let mut spans: Vec<_> =
        sequences.iter_mut().zip(&tokens).map(|(sequence, token)| Span::decode(sequence, token)).collect();
    let before = ALLOCATIONS.load(SeqCst);
    engine.step(&mut spans, &mut Control::default(), &mut |_, _, _| ()).expect("there is room");
    ALLOCATIONS.load(SeqCst) - before
}

#[test]
fn many_sequences_decode_over_the_ends_of_pages_without_allocating() {
    let _one_at_a_time = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    for spec in specs() {
        let (_folder, path) = support::temp();
        support::write(&path, &support::plan(&spec, 64), 4096).expect("a sound model");
        let options = EngineOptions {
            sequences: Some(64),
            context: Some(4 * PAGE_TOKENS),
            read_engine: Some(ReadEngineKind::Pread),
            // With more threads, chance decides which of them already have scratch.
            threads: Some(1),
            forget: true,
            ..EngineOptions::default()
        };
        let mut engine = Engine::open(&path, &options).expect("a sound model");
        let mut sequences: Vec<_> = (0..64).map(|_| engine.new_sequence()).collect();
        // Scratch grows to the size that the longest sequence needs.
        for _ in 1..4 * PAGE_TOKENS {
            decode(&mut engine, &mut sequences[..2]);
        }
        sequences[..2].iter_mut().for_each(Sequence::clear);
        // They cross the ends of their pages at different times.
        for (i, sequence) in sequences.iter_mut().enumerate() {
            let prompt: Vec<u32> = (0..=i as u32).map(|token| token % engine.spec().vocab_size as u32).collect();
            engine.forward(sequence, &prompt, &mut Vec::new()).expect("there is room");
        }
        // While there are slots without memory, it is looked now and then how much the system has left. A quarter of them is soon full.
        let plan = engine.memory().clone();
        engine.set_budget((plan.used() - plan.slot_bytes / 4 * 3).max(plan.least())).expect("not too little");
        for _ in 0..20 {
            decode(&mut engine, &mut sequences);
        }
        let filled: usize = engine.residency().iter().map(|layer| layer.count()).sum();
        assert_eq!(filled, engine.memory().slots);
        let pages = sequences.iter().map(Sequence::pages).sum::<usize>();
        let allocations: u64 = (0..120).map(|_| decode(&mut engine, &mut sequences)).sum();
        assert_eq!(allocations, 0);
        assert!(sequences.iter().map(Sequence::pages).sum::<usize>() > pages, "no page was taken");
    }
}
