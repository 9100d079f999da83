//! Programs that were killed when their files were whole: the same command is repeated, and finds that all is done, or goes on.

use std::fs;
use std::path::{Path, PathBuf};

use crate::common::killed::StopAtNames;
use crate::common::{Synthetic, options};
use sluice_converter::{
    ConvertError, Options, Progress, Striping, Summary, UpgradeOptions, convert, plan, restripe, settle, upgrade,
};
use sluice_format::{ModelFile, Shares, VolumeName};

const SPLIT: Option<u64> = Some(700_000);

fn source(dir: &Path) -> PathBuf {
    let src = dir.join("src");
    fs::create_dir(&src).unwrap();
    Synthetic { experts: 60, layers: 3, hidden: 96, width: 64, ..Synthetic::default() }.write(&src, 3);
    src
}

/// Striped over two new folders.
fn striping(dir: &Path, names: [&str; 2]) -> Striping {
    let folders = names.map(|name| dir.join(name)).to_vec();
    folders.iter().for_each(|folder| fs::create_dir_all(folder).unwrap());
    Striping::new(folders, Shares::new(&[2, 1]).unwrap()).unwrap()
}

fn names(folder: &Path) -> Vec<String> {
    let names = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.collect();
    names.sort();
    names
}

fn read_all(files: &[PathBuf]) -> Vec<Vec<u8>> {
    files.iter().map(|file| fs::read(file).unwrap()).collect()
}

fn journal_of(dst: &Path) -> PathBuf {
    dst.with_extension("sluice.partial.journal")
}

/// Gives the journal a second name. What has two is not removed.
struct Keep {
    journal: PathBuf,
    kept: PathBuf,
}

impl Progress for Keep {
    fn started(&self, _: u64, _: u64) {}
    fn advanced(&self, _: u64) {
        let _ = fs::hard_link(&self.journal, &self.kept);
    }
    fn note(&self, _: &str) {}
}

/// Converts, as if it had been killed when the model was complete and only its journal was left.
fn killed_late(src: &Path, dst: &Path, options: &Options) -> Summary {
    let keep = Keep { journal: journal_of(dst), kept: src.with_extension("kept") };
    let made = convert(src, dst, options, &keep).unwrap();
    fs::remove_file(&keep.kept).unwrap();
    assert!(keep.journal.exists());
    made
}

#[test]
fn a_conversion_that_was_complete_when_it_was_killed_is_done() {
    let dir = tempfile::tempdir().unwrap();
    let src = source(dir.path());
    let over = striping(dir.path(), ["a", "b"]);
    let folder = &over.folders()[0];
    let dst = folder.join("m.sluice");
    let base = options("bf16", "bf16");
    for options in [
        base.clone(),
        Options { split_size: SPLIT, ..base.clone() },
        Options { split_size: SPLIT, compress: true, ..base.clone() },
        Options { striping: Some(over.clone()), ..base.clone() },
    ] {
        let first = killed_late(&src, &dst, &options);
        let before = read_all(&first.files);
        // What a compressed model did not need.
        let spare = folder.join("m.sluice.partial-00077");
        if options.compress {
            fs::copy(&first.files[0], &spare).unwrap();
        }
        for overwrite in [false, true] {
            fs::copy(journal_of(&dst), dir.path().join("journal")).unwrap();
            let again = convert(&src, &dst, &Options { overwrite, ..options.clone() }, &()).unwrap();
            assert_eq!((&again.model_id, &again.files), (&first.model_id, &first.files));
            assert_eq!(
                (again.file_bytes, &again.errors, &again.sizes),
                (first.file_bytes, &first.errors, &first.sizes)
            );
            assert_eq!((again.bytes_written, again.bytes_read, again.stored_bytes), (0, 0, first.stored_bytes));
            assert!(again.notes.iter().any(|note| note.contains("nothing is left to do")), "{:?}", again.notes);
            assert!(!journal_of(&dst).exists() && !spare.exists());
            assert!(read_all(&first.files) == before);
            fs::copy(dir.path().join("journal"), journal_of(&dst)).unwrap();
        }
        // Of another source or with other options, it is not done.
        let other = Options { dense_type: "f32".parse().unwrap(), ..options.clone() };
        assert!(settle(&plan(&src, &other).unwrap(), &dst, None).unwrap().is_none());
        let mut files = fs::read_dir(&src).unwrap().map(|entry| entry.unwrap().path());
        let file = files.find(|path| path.extension().is_some_and(|end| end == "safetensors")).unwrap();
        let file = fs::File::options().write(true).open(file).unwrap();
        file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
        assert!(settle(&plan(&src, &options).unwrap(), &dst, None).unwrap().is_none());
        assert!(matches!(convert(&src, &dst, &options, &()), Err(ConvertError::Exists { .. })));
        assert!(read_all(&first.files) == before);
        first.files.iter().for_each(|file| fs::remove_file(file).unwrap());
        file.set_modified(std::time::SystemTime::now()).unwrap();
    }
}

/// A model of the same name, and the journal of another that is whole: its extents are not those of the journal.
#[test]
fn another_model_is_not_taken_for_one_that_is_done() {
    let dir = tempfile::tempdir().unwrap();
    let src = source(dir.path());
    let dst = dir.path().join("m.sluice");
    let options = options("bf16", "bf16");
    killed_late(&src, &dst, &options);
    let other = tempfile::tempdir().unwrap();
    let shape = Synthetic { experts: 60, layers: 3, hidden: 96, width: 64, ..Synthetic::default() };
    let mut tensors = shape.tensors();
    tensors.values_mut().for_each(|tensor| tensor.bytes.rotate_right(2));
    crate::common::safetensors::write_dir(other.path(), &shape.config(), &tensors, 3);
    fs::remove_file(&dst).unwrap();
    let journal = fs::read(journal_of(&dst)).unwrap();
    fs::remove_file(journal_of(&dst)).unwrap();
    convert(other.path(), &dst, &options, &()).unwrap();
    fs::write(journal_of(&dst), journal).unwrap();
    let before = fs::read(&dst).unwrap();
    assert!(matches!(convert(&src, &dst, &options, &()), Err(ConvertError::Exists { .. })));
    assert!(fs::read(&dst).unwrap() == before);
}

#[test]
fn what_was_written_again_before_is_done() {
    let dir = tempfile::tempdir().unwrap();
    let src = source(dir.path());
    let path = dir.path().join("m.sluice");
    convert(&src, &path, &options("bf16", "bf16"), &()).unwrap();
    let over = striping(dir.path(), ["c", "d"]);
    let first = restripe(&path, None, &over, false, &()).unwrap();
    assert!(first.written);
    let before = read_all(&first.files);
    let dst = over.folders()[0].join("m.sluice");
    // Killed before its journal was removed, or after.
    for journal in [true, false] {
        if journal {
            fs::write(journal_of(&dst), b"SLJRNL\x04\n").unwrap();
        }
        let again = restripe(&path, None, &over, false, &()).unwrap();
        assert_eq!((again.written, &again.files, &again.model_id), (false, &first.files, &first.model_id));
        assert_eq!(names(&over.folders()[0]), ["m-00001-of-00002.sluice"]);
        assert!(read_all(&first.files) == before);
    }
    assert!(restripe(&path, None, &over, true, &()).unwrap().written, "it is written again where that is asked for");
    assert!(read_all(&first.files) == before);
    // With other shares, or of another model, it is not what was asked for.
    let other = Striping::new(over.folders().to_vec(), Shares::new(&[1, 1]).unwrap()).unwrap();
    assert!(matches!(restripe(&path, None, &other, false, &()), Err(ConvertError::Exists { .. })));
    let q8 = dir.path().join("q8/m.sluice");
    fs::create_dir(dir.path().join("q8")).unwrap();
    convert(&src, &q8, &options("q8", "q8"), &()).unwrap();
    assert!(matches!(restripe(&q8, None, &over, false, &()), Err(ConvertError::Exists { .. })));
    assert!(read_all(&first.files) == before);

    let joined = dir.path().join("joined.sluice");
    let base = UpgradeOptions::default();
    for options in [
        base,
        UpgradeOptions { compress: Some(true), ..base },
        UpgradeOptions { split_size: SPLIT, ..base },
        UpgradeOptions { split_size: SPLIT, compress: Some(true), ..base },
    ] {
        let made = upgrade(&first.files[0], Some(&joined), &options, &()).unwrap();
        let again = upgrade(&first.files[0], Some(&joined), &options, &()).unwrap();
        assert_eq!((made.written, again.written, &again.files), (true, false, &made.files), "{options:?}");
        match upgrade(&q8, Some(&joined), &options, &()) {
            Err(ConvertError::Exists { .. }) => {}
            // It has fewer volumes, which have other names.
            Ok(other) if other.written => other.files.iter().for_each(|file| fs::remove_file(file).unwrap()),
            other => panic!("{options:?}: {other:?}"),
        }
        made.files.iter().for_each(|file| fs::remove_file(file).unwrap());
    }
}

/// In its own place: killed while the volumes got their names, and when only the old file was left to remove.
#[test]
fn volumes_in_the_place_of_one_file_are_gone_on_with() {
    let dir = tempfile::tempdir().unwrap();
    let src = source(dir.path());
    let at = |name: &str| dir.path().join(name).join("m.sluice");
    ["want", "own"].iter().for_each(|name| fs::create_dir(dir.path().join(name)).unwrap());
    let split = UpgradeOptions { split_size: SPLIT, ..UpgradeOptions::default() };
    for path in [at("want"), at("own")] {
        convert(&src, &path, &options("bf16", "bf16"), &()).unwrap();
    }
    let whole = fs::read(at("want")).unwrap();
    let want = upgrade(&at("want"), None, &split, &()).unwrap().files;
    assert!(want.len() > 2 && !at("want").exists());
    let target = |volume: u16| VolumeName::first_of(&at("own"), want.len() as u16).path_of(volume);
    for first_named in [false, true] {
        fs::write(at("own"), &whole).unwrap();
        if first_named {
            for (volume, file) in (0..).zip(&want) {
                fs::copy(file, target(volume)).unwrap();
            }
            fs::write(journal_of(&at("own")), b"SLJRNL\x04\n").unwrap();
        } else {
            let stop = StopAtNames::new(&at("own"));
            assert!(matches!(upgrade(&at("own"), None, &split, &stop), Err(ConvertError::InTheWay { .. })));
            stop.put_back();
            assert!(target(1).exists() && !target(0).exists());
        }
        let made = upgrade(&at("own"), None, &split, &()).unwrap();
        assert_eq!(made.written, !first_named);
        assert!(read_all(&made.files) == read_all(&want));
        assert_eq!(names(&dir.path().join("own")), names(&dir.path().join("want")));
        made.files.iter().for_each(|file| fs::remove_file(file).unwrap());
    }
}

/// Their tables can be right where their weights are not, as in copies that are not finished.
#[test]
fn a_file_is_not_removed_for_damaged_volumes_in_its_place() {
    let dir = tempfile::tempdir().unwrap();
    let src = source(dir.path());
    let path = dir.path().join("m.sluice");
    convert(&src, &path, &options("bf16", "bf16"), &()).unwrap();
    let whole = fs::read(&path).unwrap();
    let split = UpgradeOptions { split_size: SPLIT, ..UpgradeOptions::default() };
    let files = upgrade(&path, None, &split, &()).unwrap().files;
    let sound = read_all(&files);
    fs::write(&path, &whole).unwrap();
    let model = ModelFile::open(&files[1]).unwrap();
    let stripe = model.extents().iter().flat_map(|e| model.stripes(e)).find(|stripe| stripe.volume == 1).unwrap();
    let mut damaged = sound[1].clone();
    damaged[stripe.offset as usize] ^= 1;
    fs::write(&files[1], damaged).unwrap();
    let refused = upgrade(&path, None, &split, &()).unwrap_err();
    assert!(matches!(refused, ConvertError::DamagedVolumes { .. }), "{refused}");
    let said = refused.to_string();
    assert!([&path, &files[1]].iter().all(|file| said.contains(file.to_str().unwrap())), "{said}");
    assert!(fs::read(&path).unwrap() == whole);
    upgrade(&path, None, &UpgradeOptions { overwrite: true, ..split }, &()).unwrap();
    assert!(!path.exists() && read_all(&files) == sound);
}

/// Volumes that others need are not lost to one file.
#[test]
fn one_file_neither_replaces_a_volume_nor_is_named_like_one() {
    let dir = tempfile::tempdir().unwrap();
    let src = source(dir.path());
    let over = striping(dir.path(), ["a", "b"]);
    let (path, base) = (dir.path().join("m.sluice"), options("bf16", "bf16"));
    convert(&src, &path, &base, &()).unwrap();
    let files = restripe(&path, None, &over, false, &()).unwrap().files;
    let before = read_all(&files);
    let renamed = over.folders()[1].join("renamed.sluice");
    fs::copy(&files[1], &renamed).unwrap();
    let free = dir.path().join("n-00003-of-00007.sluice");
    let compressed = Options { split_size: Some(u64::MAX), compress: true, ..base.clone() };
    for (dst, of) in [(&files[1], "2 of 2"), (&files[0], "1 of 2"), (&renamed, "2 of 2"), (&free, "3 of 7")] {
        for overwrite in [false, true] {
            let rewritten = UpgradeOptions { overwrite, ..UpgradeOptions::default() };
            let done = [
                convert(&src, dst, &Options { overwrite, ..base.clone() }, &()).map(drop),
                convert(&src, dst, &Options { overwrite, ..compressed.clone() }, &()).map(drop),
                upgrade(&path, Some(dst), &rewritten, &()).map(drop),
                upgrade(&path, Some(dst), &UpgradeOptions { compress: Some(true), ..rewritten }, &()).map(drop),
            ];
            for refused in done {
                match refused.unwrap_err() {
                    ConvertError::Exists { path } => assert!(!overwrite && path == renamed),
                    ConvertError::IsVolume { path, problem } => {
                        assert!(path == *dst && problem.contains(of), "{problem}")
                    }
                    other => panic!("{other}"),
                }
            }
        }
        assert!(read_all(&files) == before && !free.exists());
    }
    // A model in volumes may be named by any of them.
    let split = Options { split_size: SPLIT, ..base };
    let made = convert(&src, &free, &split, &()).unwrap();
    assert!(made.files.len() > 1 && made.files[0].to_str().unwrap().contains("n-00001-of-"), "{:?}", made.files);
    assert!(ModelFile::open(&files[0]).unwrap().verify_all(&mut |_| ()).is_empty());
}
