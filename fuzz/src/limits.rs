//! What a run may not do: panic, or have more memory than [`MEMORY_MAX`]. (libFuzzer looks at the clock, and once a second at
//! the memory of the whole process; here the very allocation is caught that goes too far.)

use std::alloc::{GlobalAlloc, Layout, System};
use std::backtrace::Backtrace;
use std::panic::Location;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Most bytes that a run may have at once.
const MEMORY_MAX: usize = 1 << 30;

/// The system's allocator, which counts.
pub(crate) struct Counting;

static ALLOCATED: AtomicUsize = AtomicUsize::new(0);
static RUNNING: AtomicBool = AtomicBool::new(false);

impl Counting {
    fn count(&self, more: usize) {
        let now = ALLOCATED.fetch_add(more, Ordering::Relaxed).saturating_add(more);
        if now > MEMORY_MAX && RUNNING.swap(false, Ordering::Relaxed) {
            eprintln!(
                "sluice-fuzz: {now} bytes are allocated, the last {more} of them here:\n{}",
                Backtrace::force_capture()
            );
            std::process::abort();
        }
    }
}

// SAFETY: every call goes to the system's allocator with the very arguments that it came with.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.count(layout.size());
        // SAFETY: the caller keeps the contract of the same function.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        self.count(layout.size());
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, old: *mut u8, layout: Layout) {
        ALLOCATED.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(old, layout) }
    }

    unsafe fn realloc(&self, old: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        self.count(size);
        ALLOCATED.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.realloc(old, layout, size) }
    }
}

/// From here on, memory has its limit.
pub(crate) fn begin_run() {
    RUNNING.store(true, Ordering::Relaxed);
}

/// Ends the process at a panic, with its stack, unless it is one inside of a library whose panics the program catches on
/// purpose. (One of those that is not caught ends the process as well, by libFuzzer's own doing.)
pub(crate) fn abort_on_panic() {
    // Whatever the program itself does about panics of that library, it does at the first use.
    let _ = sluice_text::Tokenizer::from_json(b"{}");
    std::panic::set_hook(Box::new(|panic| {
        let stack = Backtrace::force_capture().to_string();
        if !is_caught(panic.location(), &stack) {
            eprintln!("sluice-fuzz: {panic}\n{stack}");
            std::process::abort();
        }
    }));
}

/// Whether the panic is one of the tokenizers library, or of what that calls: `text::tokenizer` makes errors of them. Code of
/// the standard library does not count: whoever called it does.
fn is_caught(location: Option<&Location<'_>>, stack: &str) -> bool {
    let is_library = |file: &str| file.contains("/registry/src/");
    let is_std = |file: &str| file.starts_with("/rustc/") || file.starts_with("library/");
    let file = location.map_or("", Location::file);
    let files = stack.lines().filter_map(|line| line.trim().strip_prefix("at "));
    let mut callers = files.filter(|file| !is_std(file) && !file.contains("/limits.rs:"));
    let at_fault = if is_std(file) { callers.next().unwrap_or(file) } else { file };
    is_library(at_fault) && stack.contains("tokenizers::")
}
