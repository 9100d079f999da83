//! Compressed models and models in volumes: after being killed and resumed, the files are those of an uninterrupted run.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::common::killed::{self, KillAt, StopAtNames};
use crate::common::{Noise, Synthetic, options};
use sluice_converter::{ConvertError, Options, UpgradeOptions, convert, upgrade};
use sluice_format::{FormatError, ModelFile, VolumeName};

const SPLIT: u64 = 700_000;

fn source() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let src = dir.path().join("src");
    fs::create_dir(&src).unwrap();
    Synthetic { experts: 60, layers: 3, hidden: 96, width: 64, ..Synthetic::default() }.write(&src, 3);
    (dir, src)
}

fn test_options(compress: bool) -> Options {
    Options { compress, split_size: Some(SPLIT), ..options("bf16", "bf16") }
}

/// Not a test of its own: the process that the other tests kill.
#[test]
fn child_of_volumes() {
    killed::child(|compress| test_options(compress == "true"));
}

fn spawn(src: &Path, dst: &Path, at: KillAt, compress: bool) -> std::process::Child {
    killed::spawn("volumes::child_of_volumes", src, dst, at, &compress.to_string())
}

#[test]
fn killed_at_any_moment_it_resumes_to_the_same_files() {
    let (dir, src) = source();
    let mut noise = Noise(u64::from(std::process::id()) | 1);
    for compress in [false, true] {
        let folder = |name: String| {
            let folder = dir.path().join(name);
            fs::create_dir(&folder).unwrap();
            folder.join("m.sluice")
        };
        let whole = convert(&src, &folder(format!("want-{compress}")), &test_options(compress), &()).unwrap();
        assert!(whole.files.len() > 2, "{:?}", whole.files);
        let want: Vec<Vec<u8>> = whole.files.iter().map(|file| fs::read(file).unwrap()).collect();
        for round in 0..9 {
            let dst = folder(format!("{compress}-{round}"));
            // After some bytes; or at some moment, possibly while gaps are closed or files get their names. Half of it is more than
            // one of the journal's batches.
            let bytes = whole.bytes_written * (round + 1) / 6;
            let at = if round < 5 { KillAt { bytes, journaled: round >= 2 } } else { KillAt::NEVER };
            let mut child = spawn(&src, &dst, at, compress);
            if round >= 5 {
                std::thread::sleep(Duration::from_millis(noise.bits() % 300));
                child.kill().unwrap();
            }
            let ended = child.wait().unwrap();
            let again = match convert(&src, &dst, &test_options(compress), &()) {
                // It had ended before it was killed.
                Err(ConvertError::Exists { .. }) if ended.success() || round >= 5 => whole.files.len(),
                again => {
                    let again = again.unwrap();
                    assert!(!at.journaled || again.resumed_extents > 0, "what was journaled is kept");
                    again.files.len()
                }
            };
            assert_eq!(again, want.len());
            for (volume, want) in (0..).zip(&want) {
                let path = VolumeName::first_of(&dst, want_len(&whole.files)).path_of(volume);
                assert!(fs::read(&path).unwrap() == *want, "round {round}, {}", path.display());
            }
            let left = fs::read_dir(dst.parent().unwrap()).unwrap().count();
            assert_eq!(left, whole.files.len(), "nothing else is left");
        }
    }
}

fn want_len(files: &[PathBuf]) -> u16 {
    files.len() as u16
}

/// Converts, and is stopped when all files but the first have their names.
fn stop_at_names(src: &Path, dst: &Path, options: &Options) {
    let stop = StopAtNames::new(dst);
    let stopped = convert(src, dst, options, &stop).map(drop);
    assert!(matches!(stopped, Err(ConvertError::InTheWay { .. })), "{stopped:?}");
    stop.put_back();
}

/// Killed between two renames: names that have been given are taken back, and nothing is made again.
#[test]
fn volumes_that_have_their_names_already_are_taken_back() {
    let (dir, src) = source();
    let options = test_options(false);
    let dst = dir.path().join("m.sluice");
    let whole = convert(&src, &dst, &options, &()).unwrap();
    let count = whole.files.len() as u16;
    let want: Vec<Vec<u8>> = whole.files.iter().map(|file| fs::read(file).unwrap()).collect();
    let other = dir.path().join("o.sluice");
    stop_at_names(&src, &other, &options);
    let names = VolumeName::first_of(&other, count);
    assert!((0..count).all(|volume| names.path_of(volume).exists() == (volume > 0)));
    let plan = sluice_converter::plan(&src, &options).unwrap();
    sluice_converter::check_destination(&plan, &other).expect("what will be taken back is in nobody's way");
    let again = convert(&src, &other, &options, &()).unwrap();
    assert!(again.resumed_extents > 0);
    for (file, want) in again.files.iter().zip(&want) {
        assert!(fs::read(file).unwrap() == *want);
    }
    ModelFile::open(&again.files[1]).unwrap();
}

/// Whatever the options were before: nothing of it is left beside the result, and no file from elsewhere is gone.
#[test]
fn nothing_is_left_of_volumes_that_were_not_finished() {
    let (dir, src) = source();
    let split = test_options(false);
    let finished = convert(&src, &dir.path().join("m.sluice"), &split, &()).unwrap();
    for named in [false, true] {
        let folder = dir.path().join(format!("folder-{named}"));
        fs::create_dir(&folder).unwrap();
        let dst = folder.join("m.sluice");
        if named {
            stop_at_names(&src, &dst, &split);
        } else {
            let at = KillAt { bytes: finished.bytes_written - 1, journaled: true };
            spawn(&src, &dst, at, false).wait().unwrap();
        }
        assert_eq!(folder.join("m.sluice.partial-00002").exists(), !named);
        let strange = ["m.sluice.partial-00077", "m-00002-of-00009.sluice", "m.sluice.partial-000002"];
        strange.iter().for_each(|name| fs::write(folder.join(name), "a novel").unwrap());
        let whole = convert(&src, &dst, &Options { split_size: None, ..split.clone() }, &()).unwrap();
        assert!(whole.restarted);
        let mut left: Vec<_> = fs::read_dir(&folder).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.sort();
        let mut expected = vec!["m.sluice"];
        expected.extend(strange);
        expected.sort_unstable();
        assert_eq!(left, expected);
        assert!(strange.iter().all(|name| fs::read(folder.join(name)).unwrap() == b"a novel"));
    }
}

#[test]
fn what_exists_is_not_replaced_unless_asked() {
    let (dir, src) = source();
    let dst = dir.path().join("m.sluice");
    let whole = convert(&src, &dst, &test_options(true), &()).unwrap();
    assert!(matches!(convert(&src, &dst, &test_options(true), &()), Err(ConvertError::Exists { .. })));
    let again = convert(&src, &dst, &Options { overwrite: true, ..test_options(true) }, &()).unwrap();
    assert_eq!((&again.files, &again.model_id), (&whole.files, &whole.model_id));
    assert!(!again.notes.iter().any(|note| note.contains("are there too")), "{:?}", again.notes);
    // Volumes of an earlier model that no new one replaces are named, because the name now stands for two models.
    let fewer = Options { split_size: Some(2 * SPLIT), overwrite: true, ..test_options(true) };
    let fewer = convert(&src, &dst, &fewer, &()).unwrap();
    assert!(fewer.files.len() > 1 && fewer.files.len() < whole.files.len(), "{:?}", fewer.files);
    let said = |note: &String| note.contains("are there too") && note.contains(whole.files[0].to_str().unwrap());
    assert!(fewer.notes.iter().any(said), "{:?}", fewer.notes);
    // Another file with the name of a volume stays.
    fs::write(&whole.files[1], "precious").unwrap();
    let refused = convert(&src, &dst, &Options { overwrite: true, ..test_options(true) }, &());
    assert!(matches!(refused, Err(ConvertError::NotReplaced { .. })));
    assert_eq!(fs::read(&whole.files[1]).unwrap(), b"precious");
}

/// The least size in the message is the least that works.
#[test]
fn volumes_that_are_too_small_are_refused_with_the_least() {
    let (dir, src) = source();
    for compress in [false, true] {
        let with = |bytes| Options { split_size: Some(bytes), ..test_options(compress) };
        let dst = dir.path().join(format!("{compress}.sluice"));
        let refused = convert(&src, &dst, &with(20_000), &()).unwrap_err();
        let ConvertError::Format(FormatError::VolumeSize { most: 20_000, least }) = refused else {
            panic!("{refused}")
        };
        assert!(refused.to_string().contains(&format!("the least is {least} bytes")), "{refused}");
        assert!(convert(&src, &dst, &with(least - 1), &()).is_err());
        let made = convert(&src, &dst, &with(least), &()).unwrap();
        assert!(made.files.iter().all(|file| fs::metadata(file).unwrap().len() <= least));
        let options = UpgradeOptions { split_size: Some(1), ..UpgradeOptions::default() };
        let refused = upgrade(&dst, Some(&dir.path().join("other.sluice")), &options, &()).unwrap_err();
        let ConvertError::Format(FormatError::VolumeSize { least, .. }) = refused else { panic!("{refused}") };
        let options = UpgradeOptions { split_size: Some(least), ..options };
        let to = dir.path().join(format!("upgraded-{compress}.sluice"));
        // It may be so already.
        let made = upgrade(&dst, Some(&to), &options, &()).unwrap();
        let lens: Vec<u64> = made.files.iter().map(|file| fs::metadata(file).unwrap().len()).collect();
        assert!(lens.iter().all(|len| *len <= least), "{lens:?} for {least}");
    }
}
