//! In steady state a pass over a layer allocates nothing, on any thread.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use sluice_storage::io::{Arena, DataFile, DirectMode, EngineKind, IoConfig, PAGE_BYTES, Scheduler, open_engine};
use sluice_storage::pool::{Arrival, Choice, ExpertDirectory, ExtentLocation, PolicyKind, Pool, Routing};
use xxhash_rust::xxh3::xxh3_64;

/// Counts what the system allocator is asked for.
struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: every call goes unchanged to the system allocator, which keeps the contract.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, SeqCst);
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract of `dealloc`.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, SeqCst);
        // SAFETY: the caller keeps the contract of `realloc`.
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

#[test]
fn passes_do_not_allocate_in_steady_state() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    let bytes: Vec<u8> = (0..EXPERTS).flat_map(|id| vec![id as u8; EXPERT_BYTES]).collect();
    std::fs::write(file.path(), &bytes).expect("written");
    let locate = |(id, bytes): (usize, &[u8])| ExtentLocation {
        file: 0,
        offset: (id * EXPERT_BYTES) as u64,
        len: EXPERT_BYTES as u64,
        checksum: xxh3_64(bytes),
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
        let mut pool = Pool::new(io, arena, directory, policy);
        sweep(&mut pool, 50);
        let before = ALLOCATIONS.load(SeqCst);
        sweep(&mut pool, 200);
        let allocations = ALLOCATIONS.load(SeqCst) - before;
        assert_eq!(allocations, 0, "{kind:?}");
        assert!(pool.stats().misses > 500, "the pool was not under pressure");
    }
}
