//! The fuzzer: libFuzzer with one target, which `SLUICE_FUZZ_TARGET` names. `fuzz/run.sh` starts it; see CONTRIBUTING.md.

// libFuzzer brings its own.
#![no_main]

mod limits;
mod mutate;
mod targets;

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use libfuzzer_sys::{fuzz_mutator, fuzz_target};

use targets::{TARGETS, Target};

#[global_allocator]
static ALLOCATOR: limits::Counting = limits::Counting;

static TARGET: LazyLock<&'static Target> = LazyLock::new(|| {
    let name = std::env::var("SLUICE_FUZZ_TARGET").unwrap_or_default();
    TARGETS.iter().find(|target| target.name == name).unwrap_or_else(|| {
        let names = TARGETS.each_ref().map(|target| target.name);
        fail(&format!("SLUICE_FUZZ_TARGET names no target; there are {}", names.join(", ")))
    })
});

/// For the target's own files. It stays: the caller, who names the place with `TMPDIR`, knows when the process has ended.
static FOLDER: LazyLock<PathBuf> =
    LazyLock::new(|| tempfile::tempdir().unwrap_or_else(|e| fail(&format!("no temporary folder: {e}"))).keep());

fn fail(problem: &str) -> ! {
    eprintln!("sluice-fuzz: {problem}");
    std::process::exit(2);
}

/// Before the first run: the sound inputs are written, if `SLUICE_FUZZ_SEEDS` says where to, and nothing else is done.
fn begin() {
    limits::abort_on_panic();
    if let Some(folder) = std::env::var_os("SLUICE_FUZZ_SEEDS") {
        for (name, file) in (TARGET.seeds)(&FOLDER) {
            let path = Path::new(&folder).join(name);
            std::fs::write(&path, file).unwrap_or_else(|e| fail(&format!("{}: {e}", path.display())));
        }
        std::process::exit(0);
    }
}

fuzz_target!(init: begin(), |input: &[u8]| {
    limits::begin_run();
    (TARGET.run)(input, &FOLDER);
});

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    let next = mutate::mutate(&TARGET, &data[..size], max_size, seed, &FOLDER);
    data[..next.len()].copy_from_slice(&next);
    next.len()
});
