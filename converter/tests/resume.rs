//! Conversions that are killed, resumed, contended, and run on other numbers of threads: the file is always the same.

use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::common::killed::{self, KillAt};
use crate::common::{Noise, Synthetic, options};
use sluice_converter::{ConvertError, Options, Progress, Summary, convert};

/// Enough extents for several batches of the journal.
fn source() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let src = dir.path().join("src");
    std::fs::create_dir(&src).unwrap();
    Synthetic { experts: 100, layers: 4, hidden: 96, width: 64, ..Synthetic::default() }.write(&src, 3);
    (dir, src)
}

fn test_options() -> Options {
    options("q8", "keep")
}

/// Not a test of its own: the process that the other tests kill.
#[test]
fn child() {
    killed::child(|_| test_options());
}

fn spawn(src: &Path, dst: &Path, at: KillAt) -> std::process::Child {
    killed::spawn("resume::child", src, dst, at, "")
}

fn reference(src: &Path, dir: &Path) -> (Vec<u8>, Summary) {
    let dst = dir.join("reference");
    let summary = convert(src, &dst, &test_options(), &()).unwrap();
    (std::fs::read(dst).unwrap(), summary)
}

#[test]
fn the_number_of_threads_does_not_show() {
    let (dir, src) = source();
    let (want, _) = reference(&src, dir.path());
    for threads in [1, 2, 5] {
        let dst = dir.path().join(format!("t{threads}"));
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| convert(&src, &dst, &test_options(), &())).unwrap();
        assert!(std::fs::read(dst).unwrap() == want, "{threads} threads");
    }
}

#[test]
fn killed_after_any_number_of_bytes_it_resumes_to_the_same_file() {
    let (dir, src) = source();
    let (want, summary) = reference(&src, dir.path());
    for tenth in 0..10 {
        let dst = dir.path().join(format!("k{tenth}"));
        // Four tenths are some 160 of 400 extents, and 64 make a batch.
        let at = KillAt { bytes: summary.bytes_written * tenth / 10 + 1, journaled: tenth >= 4 };
        let status = spawn(&src, &dst, at).wait().unwrap();
        assert_eq!(status.signal(), Some(9));
        assert!(!dst.exists());
        let again = convert(&src, &dst, &test_options(), &()).unwrap();
        assert!(std::fs::read(&dst).unwrap() == want, "killed after {tenth} tenths");
        assert_eq!((again.model_id, again.errors), (summary.model_id.clone(), summary.errors.clone()));
        assert!(tenth < 4 || again.resumed_extents > 0, "what was journaled is kept");
    }
}

#[test]
fn killed_again_and_again_at_random_moments_it_still_gets_there() {
    let (dir, src) = source();
    let (want, _) = reference(&src, dir.path());
    let mut noise = Noise(u64::from(std::process::id()) | 1);
    let dst = dir.path().join("random");
    for _ in 0..12 {
        let mut child = spawn(&src, &dst, KillAt::NEVER);
        std::thread::sleep(Duration::from_micros(noise.bits() % 60_000));
        child.kill().unwrap();
        child.wait().unwrap();
        if dst.exists() {
            break;
        }
    }
    if !dst.exists() {
        convert(&src, &dst, &test_options(), &()).unwrap();
    }
    assert!(std::fs::read(&dst).unwrap() == want);
}

/// Records remarks and bytes.
#[derive(Default)]
struct Listener {
    notes: Mutex<Vec<String>>,
    total: AtomicU64,
    bytes: AtomicU64,
}

impl Progress for Listener {
    fn started(&self, total_bytes: u64, already_done: u64) {
        self.total.store(total_bytes, Ordering::Relaxed);
        self.bytes.store(already_done, Ordering::Relaxed);
    }
    fn advanced(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }
    fn note(&self, text: &str) {
        self.notes.lock().unwrap().push(text.to_owned());
    }
}

#[test]
fn other_options_start_over_and_say_so() {
    let (dir, src) = source();
    let (_, summary) = reference(&src, dir.path());
    let dst = dir.path().join("other");
    spawn(&src, &dst, KillAt { bytes: summary.bytes_written * 9 / 10, journaled: true }).wait().unwrap();
    let listener = Listener::default();
    let other = convert(&src, &dst, &options("f32", "f32"), &listener).unwrap();
    assert!(other.restarted && other.resumed_extents == 0);
    assert!(listener.notes.into_inner().unwrap()[0].contains("starts over"));
    assert_eq!(listener.total.into_inner(), listener.bytes.into_inner());
    let clean = dir.path().join("clean");
    convert(&src, &clean, &options("f32", "f32"), &()).unwrap();
    assert!(std::fs::read(dst).unwrap() == std::fs::read(clean).unwrap());
}

#[test]
fn a_journal_without_its_file_is_not_believed() {
    let (dir, src) = source();
    let (want, summary) = reference(&src, dir.path());
    for truncated in [false, true] {
        let dst = dir.path().join(format!("lost{truncated}"));
        spawn(&src, &dst, KillAt { bytes: summary.bytes_written * 9 / 10, journaled: true }).wait().unwrap();
        let partial = dir.path().join(format!("lost{truncated}.partial"));
        if truncated {
            std::fs::OpenOptions::new().write(true).open(&partial).unwrap().set_len(8192).unwrap();
        } else {
            std::fs::remove_file(&partial).unwrap();
        }
        let again = convert(&src, &dst, &test_options(), &()).unwrap();
        // What is left of the file is the final norm, in one page.
        assert!(again.resumed_extents <= usize::from(truncated));
        assert!(std::fs::read(&dst).unwrap() == want);
    }
}

/// Killed in its last moment, a conversion leaves its journal beside the file that has its name.
#[test]
fn what_is_left_beside_a_complete_file_is_removed() {
    let (dir, src) = source();
    let (want, summary) = reference(&src, dir.path());
    let (dst, journal) = (dir.path().join("last"), dir.path().join("last.partial.journal"));
    spawn(&src, &dst, KillAt { bytes: summary.bytes_written * 9 / 10, journaled: true }).wait().unwrap();
    std::fs::remove_file(dir.path().join("last.partial")).unwrap();
    std::fs::write(&dst, &want).unwrap();
    assert!(journal.exists());
    let error = convert(&src, &dst, &test_options(), &()).unwrap_err();
    assert!(matches!(error, ConvertError::Exists { .. }), "{error}");
    assert!(!journal.exists() && std::fs::read(&dst).unwrap() == want);
}

#[test]
fn an_existing_destination_is_kept_unless_told_otherwise() {
    let (dir, src) = source();
    let dst = dir.path().join("there");
    std::fs::write(&dst, "mine").unwrap();
    let error = convert(&src, &dst, &test_options(), &()).unwrap_err();
    assert!(matches!(error, ConvertError::Exists { .. }), "{error}");
    assert_eq!(std::fs::read(&dst).unwrap(), b"mine");
    let overwrite = Options { overwrite: true, ..test_options() };
    let error = convert(&src, &dst, &overwrite, &()).unwrap_err();
    assert!(matches!(error, ConvertError::NotReplaced { .. }), "{error}");
    assert_eq!(std::fs::read(&dst).unwrap(), b"mine");
    // A model file, even a damaged one, is what the option is for.
    std::fs::write(&dst, sluice_format::MAGIC).unwrap();
    convert(&src, &dst, &overwrite, &()).unwrap();
    assert!(sluice_format::ModelFile::open(&dst).is_ok());
}

#[test]
fn a_second_conversion_to_the_same_place_is_refused() {
    let (dir, src) = source();
    let dst = dir.path().join("busy");
    let partial = std::fs::File::create(dir.path().join("busy.partial")).unwrap();
    partial.lock().unwrap();
    let error = convert(&src, &dst, &test_options(), &()).unwrap_err();
    assert!(matches!(error, ConvertError::Locked { .. }), "{error}");
    drop(partial);
    convert(&src, &dst, &test_options(), &()).unwrap();
}

/// A checkpoint of more than a TiB whose data are a hole.
#[test]
fn a_drive_that_is_too_small_is_an_error_before_anything_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let shape = Synthetic { layers: 200, dense_layers: 200, ..Synthetic::default() };
    let (hidden, dense_width) = (1 << 10, 1 << 20);
    let mut header = serde_json::Map::new();
    let mut end = 0u64;
    for (name, t) in shape.tensors() {
        let dims = t.shape.iter().map(|&d| match d {
            d if d == shape.hidden => hidden,
            d if d == shape.width * 3 => dense_width,
            d => d,
        });
        let dims: Vec<usize> = dims.collect();
        let len = dims.iter().product::<usize>() as u64 * 2;
        header.insert(name, serde_json::json!({"dtype": "BF16", "shape": dims, "data_offsets": [end, end + len]}));
        end += len;
    }
    let header = serde_json::to_vec(&header).unwrap();
    let file = std::fs::File::create(dir.path().join("model.safetensors")).unwrap();
    file.write_all_at(&[(header.len() as u64).to_le_bytes().as_slice(), &header].concat(), 0).unwrap();
    file.set_len(8 + header.len() as u64 + end).unwrap();
    let mut config = shape.config();
    config["hidden_size"] = hidden.into();
    config["intermediate_size"] = dense_width.into();
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();

    let out = tempfile::tempdir().unwrap();
    let error = convert(dir.path(), &out.path().join("big"), &Options::default(), &()).unwrap_err();
    let ConvertError::NoSpace { needed, available, .. } = error else { panic!("{error}") };
    assert!(needed > 1 << 40 && available < needed);
    assert!(std::fs::read_dir(out.path()).unwrap().next().is_none(), "nothing is left behind");
}
