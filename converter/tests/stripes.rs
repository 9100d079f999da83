//! Models that are striped over folders: converted so, restriped there and back, killed and resumed, they are the same bytes.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::common::killed::{self, KillAt, StopAtNames};
use crate::common::{Noise, Synthetic, options};
use sluice_converter::{
    ConvertError, Options, Progress, Striping, UpgradeOptions, convert, left_elsewhere, restripe, upgrade,
};
use sluice_format::{ModelFile, Shares};

fn source(dir: &Path) -> PathBuf {
    let src = dir.join("src");
    fs::create_dir(&src).unwrap();
    Synthetic { experts: 60, layers: 3, hidden: 96, width: 64, ..Synthetic::default() }.write(&src, 3);
    src
}

/// Folders `name-0`, `name-1`, …, one for each share.
fn striping(dir: &Path, name: &str, shares: &[u32]) -> Striping {
    let folder = |number| dir.join(format!("{name}-{number}"));
    let folders: Vec<PathBuf> = (0..shares.len()).map(folder).collect();
    folders.iter().for_each(|folder| fs::create_dir_all(folder).unwrap());
    Striping::new(folders, Shares::new(shares).unwrap()).unwrap()
}

fn striped(compress: bool, striping: &Striping) -> Options {
    Options { compress, striping: Some(striping.clone()), ..options("bf16", "bf16") }
}

fn read_all(files: &[PathBuf]) -> Vec<Vec<u8>> {
    files.iter().map(|file| fs::read(file).unwrap()).collect()
}

/// What is in the folders, by name. Of partial files in other folders than the first, the number of the conversion is left out.
fn names(striping: &Striping) -> Vec<String> {
    let entries = striping.folders().iter().flat_map(|folder| fs::read_dir(folder).unwrap());
    let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    for name in &mut names {
        if let Some(at) = name.find(".partial-") {
            let number = name.split_off(at + ".partial-00002".len());
            assert_eq!(number.len(), 17, "{name}{number}");
        }
    }
    names.sort();
    names
}

/// The partial files of the second volumes of `m.sluice`.
fn seconds(folder: &Path) -> Vec<PathBuf> {
    let paths = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut paths: Vec<PathBuf> =
        paths.filter(|path| path.to_str().unwrap().contains("m.sluice.partial-00002-")).collect();
    paths.sort();
    paths
}

/// Starts to convert `src` to `m.sluice` in these folders, with shares of 2 and 1, in a process that is killed after `bytes`.
fn interrupt(src: &Path, over: &Striping, bytes: u64) {
    let folders: Vec<String> = over.folders().iter().map(|folder| folder.display().to_string()).collect();
    let (dst, at) = (over.destination(Path::new("m.sluice")), KillAt { bytes, journaled: true });
    let also = format!("false,{}", folders.join(","));
    killed::spawn("stripes::child_of_stripes", src, &dst, at, &also).wait().unwrap();
    assert!(dst.with_extension("sluice.partial").exists(), "it was killed too late");
}

/// Striped over the first folder of `ours` and the second one of `theirs`.
fn sharing(ours: &Striping, theirs: &Striping) -> Striping {
    let folders = vec![ours.folders()[0].clone(), theirs.folders()[1].clone()];
    Striping::new(folders, ours.shares().clone()).unwrap()
}

#[test]
fn converting_restriping_and_joining_agree_to_the_byte() {
    let dir = tempfile::tempdir().unwrap();
    let src = source(dir.path());
    for (round, shares) in [&[1, 1][..], &[2, 1], &[3, 1, 2]].into_iter().enumerate() {
        for compress in [false, true] {
            let at = |name: &str| dir.path().join(format!("{name}-{round}-{compress}.sluice"));
            let over = striping(dir.path(), &format!("{round}-{compress}"), shares);
            let whole = convert(&src, &at("whole"), &Options { compress, ..options("bf16", "bf16") }, &()).unwrap();
            let direct =
                convert(&src, &over.destination(Path::new("m.sluice")), &striped(compress, &over), &()).unwrap();
            assert_eq!(direct.files.len(), shares.len());
            let model = ModelFile::open(&direct.files[0]).unwrap();
            assert!(model.is_striped() && model.verify_all(&mut |_| ()).is_empty());
            assert_eq!(model.compressed_extents() > 0, compress);

            let made = restripe(&at("whole"), Some(Path::new("n.sluice")), &over, false, &()).unwrap();
            assert!(made.written && made.state_id == model.state_id().to_string());
            assert!(read_all(&made.files) == read_all(&direct.files), "{shares:?} {compress}");
            // Back, and there again by way of other drives.
            let options = UpgradeOptions::default();
            upgrade(&made.files[0], Some(&at("joined")), &options, &()).unwrap();
            assert!(fs::read(at("joined")).unwrap() == fs::read(at("whole")).unwrap(), "{shares:?} {compress}");
            let other = striping(dir.path(), &format!("other-{round}-{compress}"), &[1, 4]);
            let moved = restripe(&made.files[0], None, &other, false, &()).unwrap();
            let again = restripe(&moved.files[0], Some(Path::new("o.sluice")), &over, false, &()).unwrap();
            assert!(read_all(&again.files) == read_all(&direct.files));
            assert_ne!(whole.model_id, made.model_id, "the extent table is part of it");
            assert_eq!(names(&other), ["n-00001-of-00002.sluice", "n-00002-of-00002.sluice"]);
        }
    }
}

#[test]
fn what_is_so_already_stays_and_nothing_takes_the_place_of_its_source() {
    let dir = tempfile::tempdir().unwrap();
    let (src, over) = (source(dir.path()), striping(dir.path(), "d", &[1, 1]));
    let dst = over.destination(Path::new("m.sluice"));
    let made = convert(&src, &dst, &striped(false, &over), &()).unwrap();
    let before = read_all(&made.files);
    assert!(matches!(convert(&src, &dst, &striped(false, &over), &()), Err(ConvertError::Exists { .. })));
    assert!(!restripe(&made.files[0], None, &over, true, &()).unwrap().written);
    // Other shares would write over what is read.
    let other = Striping::new(over.folders().to_vec(), Shares::new(&[2, 1]).unwrap()).unwrap();
    let refused = restripe(&made.files[0], None, &other, true, &()).unwrap_err();
    assert!(matches!(&refused, ConvertError::Options(text) if text.contains("--into")), "{refused}");
    // Under another name it is done.
    let renamed = restripe(&made.files[0], Some(Path::new("n.sluice")), &other, false, &()).unwrap();
    assert!(renamed.written);
    // Something else in a volume's place is not replaced.
    fs::remove_file(&renamed.files[1]).unwrap();
    fs::write(&renamed.files[1], "a novel").unwrap();
    let refused = restripe(&made.files[0], Some(Path::new("n.sluice")), &other, true, &()).unwrap_err();
    assert!(matches!(refused, ConvertError::NotReplaced { .. }), "{refused}");
    assert!(read_all(&made.files) == before);
    // A damaged stripe ends it, and leaves nothing.
    let model = ModelFile::open(&made.files[0]).unwrap();
    let stripe = model.extents().iter().find_map(|e| model.stripes(e).get(1)).unwrap();
    let mut bytes = before[1].clone();
    bytes[stripe.offset as usize] ^= 1;
    fs::write(&made.files[1], bytes).unwrap();
    let there = names(&over);
    let refused = restripe(&made.files[0], Some(Path::new("o.sluice")), &over, false, &()).unwrap_err().to_string();
    assert!(refused.contains(&made.files[1].display().to_string()) && refused.contains("damaged"), "{refused}");
    assert_eq!(names(&over), there);
}

/// Ends the program, as far as a test can, after so many bytes.
struct Stop(AtomicU64);

impl Progress for Stop {
    fn started(&self, _: u64, _: u64) {}
    fn note(&self, _: &str) {}
    fn advanced(&self, bytes: u64) {
        let left = self.0.load(Ordering::Relaxed);
        self.0.store(left.saturating_sub(bytes), Ordering::Relaxed);
        assert!(left > bytes, "it is stopped here");
    }
}

#[test]
fn a_restripe_that_was_stopped_begins_again_and_the_source_is_whole() {
    let dir = tempfile::tempdir().unwrap();
    let src = source(dir.path());
    let path = dir.path().join("m.sluice");
    convert(&src, &path, &options("bf16", "bf16"), &()).unwrap();
    let sound = fs::read(&path).unwrap();
    let want = restripe(&path, None, &striping(dir.path(), "want", &[2, 1]), false, &()).unwrap();
    let want_lens: Vec<usize> = read_all(&want.files).iter().map(Vec::len).collect();
    let over = striping(dir.path(), "over", &[2, 1]);
    for part in [0, 1, 3, 7] {
        let stop = Stop(AtomicU64::new(sound.len() as u64 * part / 8));
        let stopped = catch_unwind(AssertUnwindSafe(|| restripe(&path, None, &over, false, &stop)));
        assert!(stopped.is_err(), "it was stopped");
        assert_eq!(names(&over), ["m.sluice.partial", "m.sluice.partial-00002", "m.sluice.partial.journal"]);
    }
    let made = restripe(&path, None, &over, false, &()).unwrap();
    assert_eq!(names(&over), ["m-00001-of-00002.sluice", "m-00002-of-00002.sluice"]);
    assert_eq!(read_all(&made.files).iter().map(Vec::len).collect::<Vec<_>>(), want_lens);
    // The extents are the same; the superblock names other folders.
    assert!(read_all(&made.files)[1] == read_all(&want.files)[1]);
    assert_eq!((made.model_id, fs::read(&path).unwrap() == sound), (want.model_id, true));
    assert!(ModelFile::open(&made.files[0]).unwrap().verify_all(&mut |_| ()).is_empty());
}

/// Not a test of its own: the process that the next one kills. What is for it: whether to compress, and the folders.
#[test]
fn child_of_stripes() {
    killed::child(|also| {
        let mut parts = also.split(',');
        let compress = parts.next() == Some("true");
        let folders: Vec<PathBuf> = parts.map(PathBuf::from).collect();
        striped(compress, &Striping::new(folders, Shares::new(&[2, 1]).unwrap()).unwrap())
    });
}

#[test]
fn killed_at_any_moment_a_conversion_resumes_to_the_same_volumes() {
    let dir = tempfile::tempdir().unwrap();
    let src = source(dir.path());
    let mut noise = Noise(u64::from(std::process::id()) | 1);
    for compress in [false, true] {
        let over = striping(dir.path(), &format!("{compress}"), &[2, 1]);
        let whole = convert(&src, &over.destination(Path::new("want")), &striped(compress, &over), &()).unwrap();
        let want = read_all(&whole.files);
        whole.files.iter().for_each(|file| fs::remove_file(file).unwrap());
        let folders: Vec<String> = over.folders().iter().map(|folder| folder.display().to_string()).collect();
        for round in 0..6 {
            let dst = over.destination(Path::new("m.sluice"));
            let bytes = whole.bytes_written * (round + 1) / 5;
            let at = if round < 4 { KillAt { bytes, journaled: round >= 2 } } else { KillAt::NEVER };
            let also = format!("{compress},{}", folders.join(","));
            let mut child = killed::spawn("stripes::child_of_stripes", &src, &dst, at, &also);
            if round >= 4 {
                std::thread::sleep(std::time::Duration::from_millis(noise.bits() % 300));
                child.kill().unwrap();
            }
            child.wait().unwrap();
            match convert(&src, &dst, &striped(compress, &over), &()) {
                // It had ended before it was killed.
                Err(ConvertError::Exists { .. }) => {}
                again => assert!(!at.journaled || again.unwrap().resumed_extents > 0, "what was journaled is kept"),
            }
            let files =
                [over.folders()[0].join("m-00001-of-00002.sluice"), over.folders()[1].join("m-00002-of-00002.sluice")];
            assert!(read_all(&files) == want, "round {round}, compressed: {compress}");
            assert_eq!(names(&over), ["m-00001-of-00002.sluice", "m-00002-of-00002.sluice"], "nothing else is left");
            files.iter().for_each(|file| fs::remove_file(file).unwrap());
        }
    }
}

#[test]
fn other_folders_or_shares_are_another_conversion() {
    let dir = tempfile::tempdir().unwrap();
    let (src, over) = (source(dir.path()), striping(dir.path(), "a", &[1, 1]));
    let both = Options { split_size: Some(700_000), ..striped(false, &over) };
    let refused = convert(&src, &over.destination(Path::new("m.sluice")), &both, &()).unwrap_err();
    assert!(matches!(refused, ConvertError::Options(_)), "{refused}");
    let hash = |options: &Options| sluice_converter::plan(&src, options).unwrap().file_bytes();
    assert!(hash(&striped(false, &over)) > hash(&options("bf16", "bf16")), "tables of each volume");
}

/// A partial file in a folder that is not used any more is found through the journal, whatever the conversion is now.
#[test]
fn other_folders_leave_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let (src, over) = (source(dir.path()), striping(dir.path(), "a", &[2, 1]));
    let whole = convert(&src, &over.destination(Path::new("want")), &striped(false, &over), &()).unwrap();
    whole.files.iter().for_each(|file| fs::remove_file(file).unwrap());
    let dst = over.destination(Path::new("m.sluice"));
    let interrupt = || {
        interrupt(&src, &over, whole.bytes_written / 2);
        let left = seconds(&fs::canonicalize(&over.folders()[1]).unwrap());
        assert_eq!((left.len(), left_elsewhere(&dst)), (1, left));
    };
    let moved = sharing(&over, &striping(dir.path(), "b", &[2, 1]));
    for now in [striped(false, &moved), options("bf16", "bf16")] {
        interrupt();
        // What is not of this program stays.
        let strange = over.folders()[1].join("m.sluice.partial-00003");
        fs::write(&strange, "a novel").unwrap();
        let summary = convert(&src, &dst, &now, &()).unwrap();
        assert!(summary.notes.iter().any(|note| note.contains("partial-00002") && note.contains("has been removed")));
        let left: Vec<_> = fs::read_dir(&over.folders()[1]).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["m.sluice.partial-00003"]);
        fs::remove_file(strange).unwrap();
        summary.files.iter().for_each(|file| fs::remove_file(file).unwrap());
    }
    // In another order it is another conversion, which leaves this one alone and names what it finds.
    interrupt();
    let turned: Vec<PathBuf> = over.folders().iter().rev().cloned().collect();
    let turned = Striping::new(turned, Shares::new(&[1, 1]).unwrap()).unwrap();
    let summary = convert(&src, &turned.destination(Path::new("m.sluice")), &striped(false, &turned), &()).unwrap();
    for left in [dst.with_extension("sluice.partial"), seconds(&over.folders()[1])[0].clone()] {
        assert!(summary.notes.iter().any(|note| note.starts_with(left.to_str().unwrap())), "{:?}", summary.notes);
        assert!(left.exists());
    }
}

#[test]
fn volumes_of_another_model_are_not_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let (src, theirs) = (source(dir.path()), striping(dir.path(), "a", &[1, 1]));
    let other = convert(&src, &theirs.destination(Path::new("m.sluice")), &striped(false, &theirs), &()).unwrap();
    // The second volume of both models would be the same file.
    let ours = sharing(&striping(dir.path(), "b", &[1, 1]), &theirs);
    let dst = ours.destination(Path::new("m.sluice"));
    let before = read_all(&other.files);
    let overwriting = |striping: &Striping| Options { overwrite: true, ..striped(false, striping) };
    let is_refused = |refused: Result<(), ConvertError>| {
        assert!(
            matches!(&refused, Err(ConvertError::OtherModel { path, .. }) if *path == other.files[1]),
            "{refused:?}"
        );
        assert!(read_all(&other.files) == before);
    };
    is_refused(convert(&src, &dst, &overwriting(&ours), &()).map(drop));
    assert_eq!(fs::read_dir(&ours.folders()[0]).unwrap().count(), 0, "nothing was begun");
    let whole = dir.path().join("m.sluice");
    convert(&src, &whole, &options("bf16", "bf16"), &()).unwrap();
    is_refused(restripe(&whole, None, &ours, true, &()).map(drop));
    // Not even beside a first volume of another model.
    let elsewhere = striping(dir.path(), "c", &[2, 1]);
    let third = convert(&src, &elsewhere.destination(Path::new("m.sluice")), &striped(false, &elsewhere), &()).unwrap();
    let first = ours.folders()[0].join("m-00001-of-00002.sluice");
    fs::copy(&third.files[0], &first).unwrap();
    is_refused(convert(&src, &dst, &overwriting(&ours), &()).map(drop));
    fs::remove_file(first).unwrap();
    // Its own are, and what is left in a folder that is not used any more is named.
    let again = convert(&src, &other.files[0].with_file_name("m.sluice"), &overwriting(&theirs), &()).unwrap();
    assert!(read_all(&again.files) == before);
    assert!(!again.notes.iter().any(|note| note.contains("overwritten")), "{:?}", again.notes);
    let folders = vec![theirs.folders()[0].clone(), elsewhere.folders()[0].clone()];
    let moved = Striping::new(folders, Shares::new(&[1, 1]).unwrap()).unwrap();
    let moved = convert(&src, &other.files[0].with_file_name("m.sluice"), &overwriting(&moved), &()).unwrap();
    let orphan = fs::canonicalize(&other.files[1]).unwrap();
    assert!(moved.notes.iter().any(|note| note.starts_with(orphan.to_str().unwrap())), "{:?}", moved.notes);
}

/// The second volumes of two models would be the same file, and one of the two is there when the other goes on.
#[test]
fn a_volume_of_another_model_is_not_taken_for_one_that_an_interrupted_conversion_has_finished() {
    let dir = tempfile::tempdir().unwrap();
    let (src, theirs) = (source(dir.path()), striping(dir.path(), "a", &[1, 1]));
    let ours = sharing(&striping(dir.path(), "b", &[1, 1]), &theirs);
    let dst = ours.destination(Path::new("m.sluice"));
    interrupt(&src, &ours, 1 << 20);
    let other = Options { striping: Some(theirs.clone()), ..options("q8", "q8") };
    let other = convert(&src, &theirs.destination(Path::new("m.sluice")), &other, &()).unwrap();
    let before = read_all(&other.files);
    let refused = convert(&src, &dst, &striped(false, &ours), &()).unwrap_err();
    assert!(matches!(&refused, ConvertError::Exists { path } if *path == other.files[1]), "{refused}");
    assert!(read_all(&other.files) == before);
}

/// Their partial second volumes are kept apart: each goes on where it was, whatever the other one does.
#[test]
fn conversions_of_one_name_that_share_a_folder_keep_their_work() {
    let dir = tempfile::tempdir().unwrap();
    let (src, theirs) = (source(dir.path()), striping(dir.path(), "a", &[2, 1]));
    let ours = sharing(&striping(dir.path(), "b", &[2, 1]), &theirs);
    let dst = ours.destination(Path::new("m.sluice"));
    let shared = ours.folders()[1].clone();
    interrupt(&src, &ours, 1 << 20);
    let left = seconds(&shared);
    interrupt(&src, &theirs, 1 << 20);
    assert_eq!(seconds(&shared).len(), 2);
    let summary = convert(&src, &theirs.destination(Path::new("m.sluice")), &striped(false, &theirs), &()).unwrap();
    assert!(summary.resumed_extents > 0);
    assert!(summary.notes.iter().any(|note| note.starts_with(left[0].to_str().unwrap())), "{:?}", summary.notes);
    // The finished volume is in the way of ours, and not ours.
    let before = read_all(&summary.files);
    let refused = convert(&src, &dst, &striped(false, &ours), &()).unwrap_err();
    assert!(matches!(&refused, ConvertError::Exists { path } if *path == summary.files[1]), "{refused}");
    assert!(read_all(&summary.files) == before && seconds(&shared) == left);
    summary.files.iter().for_each(|file| fs::remove_file(file).unwrap());
    // Nor does a model in that folder take it for its own, whether it is one file or several.
    for split_size in [None, Some(700_000)] {
        let beside = convert(&src, &shared.join("m.sluice"), &Options { split_size, ..options("bf16", "bf16") }, &());
        let beside = beside.unwrap();
        assert_eq!(seconds(&shared), left);
        beside.files.iter().for_each(|file| fs::remove_file(file).unwrap());
    }
    let summary = convert(&src, &dst, &striped(false, &ours), &()).unwrap();
    assert!(summary.resumed_extents > 0);
    assert!(ModelFile::open(&summary.files[0]).unwrap().verify_all(&mut |_| ()).is_empty());
    assert_eq!(names(&ours), ["m-00001-of-00002.sluice", "m-00002-of-00002.sluice"]);
}

/// Keeps what is said.
#[derive(Default)]
struct Notes(Mutex<Vec<String>>);

impl Progress for Notes {
    fn started(&self, _: u64, _: u64) {}
    fn advanced(&self, _: u64) {}
    fn note(&self, text: &str) {
        self.0.lock().unwrap().push(text.to_owned());
    }
}

/// Whether it was killed while it wrote or while it gave the volumes their names.
#[test]
fn a_restripe_to_other_folders_finds_what_an_interrupted_one_has_left() {
    let dir = tempfile::tempdir().unwrap();
    let src = source(dir.path());
    let path = dir.path().join("m.sluice");
    convert(&src, &path, &options("bf16", "bf16"), &()).unwrap();
    let want = restripe(&path, None, &striping(dir.path(), "want", &[2, 1]), false, &()).unwrap();
    let over = striping(dir.path(), "over", &[2, 1]);
    let moved = sharing(&over, &striping(dir.path(), "moved", &[2, 1]));
    let second = over.folders()[1].join("m-00002-of-00002.sluice");
    for (named, now) in [(false, &moved), (true, &moved), (true, &over)] {
        if named {
            stop_at_names(&path, &over);
            assert!(second.exists() && seconds(&over.folders()[1]).is_empty());
        } else {
            let stop = Stop(AtomicU64::new(100_000));
            let stopped = catch_unwind(AssertUnwindSafe(|| restripe(&path, None, &over, false, &stop)));
            assert!(stopped.is_err() && seconds(&over.folders()[1]).len() == 1, "it was stopped");
        }
        let notes = Notes::default();
        let made = restripe(&path, None, now, false, &notes).unwrap();
        assert!(read_all(&made.files)[1] == read_all(&want.files)[1]);
        assert_eq!(names(now), ["m-00001-of-00002.sluice", "m-00002-of-00002.sluice"]);
        let notes = notes.0.into_inner().unwrap();
        let is_said = notes.iter().any(|note| note.contains("over-1") && note.contains("has been removed"));
        assert_eq!(is_said, now != &over, "{notes:?}");
        made.files.iter().for_each(|file| fs::remove_file(file).unwrap());
        assert_eq!(fs::read_dir(&over.folders()[1]).unwrap().count(), 0, "nothing is left of the first one");
    }
}

/// Restripes `path`, and is stopped when the second volume has its name and the first has not.
fn stop_at_names(path: &Path, over: &Striping) {
    let stop = StopAtNames::new(&over.destination(path));
    let stopped = restripe(path, None, over, false, &stop);
    assert!(matches!(stopped, Err(ConvertError::InTheWay { .. })), "{stopped:?}");
    stop.put_back();
}

/// Two copies of a model with the same shares have second volumes of the same content: one of a copy is neither removed nor taken back, be it
/// that the volumes were not being given their names yet, or that the interrupted one's has been removed since.
#[test]
fn the_volume_of_a_copy_is_not_taken_for_one_that_an_interrupted_restripe_has_finished() {
    let dir = tempfile::tempdir().unwrap();
    let src = source(dir.path());
    let path = dir.path().join("m.sluice");
    convert(&src, &path, &options("bf16", "bf16"), &()).unwrap();
    let ours = striping(dir.path(), "ours", &[2, 1]);
    let theirs = sharing(&striping(dir.path(), "theirs", &[2, 1]), &ours);
    let moved = sharing(&ours, &striping(dir.path(), "moved", &[2, 1]));
    for named in [false, true] {
        if named {
            stop_at_names(&path, &ours);
            fs::remove_file(ours.folders()[1].join("m-00002-of-00002.sluice")).unwrap();
        } else {
            let stop = Stop(AtomicU64::new(100_000));
            let stopped = catch_unwind(AssertUnwindSafe(|| restripe(&path, None, &ours, false, &stop)));
            assert!(stopped.is_err());
            fs::remove_file(&seconds(&ours.folders()[1])[0]).unwrap();
        }
        let copy = restripe(&path, None, &theirs, false, &()).unwrap().files;
        if !named {
            // As if it had been killed when all was written.
            fs::copy(&copy[0], ours.folders()[0].join("m.sluice.partial")).unwrap();
        }
        let before = read_all(&copy);
        for overwrite in [false, true] {
            let refused = restripe(&path, None, &ours, overwrite, &()).unwrap_err();
            let (ConvertError::Exists { path } | ConvertError::OtherModel { path, .. }) = &refused else {
                panic!("{refused}")
            };
            assert_eq!(path, &copy[1]);
            assert!(read_all(&copy) == before);
        }
        let made = restripe(&path, None, &moved, false, &()).unwrap().files;
        assert!(read_all(&copy) == before);
        copy.iter().chain(&made).for_each(|file| fs::remove_file(file).unwrap());
    }
}

/// A partial volume beside the first one is of this conversion only if the one before it had all volumes in this folder.
#[test]
fn what_is_said_to_be_of_another_conversion_is_not_removed() {
    let dir = tempfile::tempdir().unwrap();
    let src = source(dir.path());
    let path = dir.path().join("m.sluice");
    convert(&src, &path, &options("bf16", "bf16"), &()).unwrap();
    let over = striping(dir.path(), "over", &[2, 1]);
    let dst = over.destination(&path);
    // An earlier program gave it this name, with another first folder.
    let theirs = dst.with_extension("sluice.partial-00002");
    fs::write(&theirs, b"").unwrap();
    let is_named = |notes: &[String]| notes.iter().any(|note| note.starts_with(theirs.to_str().unwrap()));
    let notes = Notes::default();
    let made = restripe(&path, None, &over, false, &notes).unwrap().files;
    assert!(theirs.exists() && is_named(&notes.0.into_inner().unwrap()));
    made.iter().for_each(|file| fs::remove_file(file).unwrap());
    let made = convert(&src, &dst, &striped(false, &over), &()).unwrap();
    assert!(theirs.exists() && is_named(&made.notes));
    made.files.iter().for_each(|file| fs::remove_file(file).unwrap());
    // What volumes in this folder have left is removed, and not named.
    let split = UpgradeOptions { split_size: Some(700_000), ..UpgradeOptions::default() };
    let stop = Stop(AtomicU64::new(100_000));
    assert!(catch_unwind(AssertUnwindSafe(|| upgrade(&path, Some(&dst), &split, &stop))).is_err());
    let notes = Notes::default();
    restripe(&path, None, &over, false, &notes).unwrap();
    assert!(!theirs.exists() && !is_named(&notes.0.into_inner().unwrap()));
    assert_eq!(names(&over), ["m-00001-of-00002.sluice", "m-00002-of-00002.sluice"]);
}
